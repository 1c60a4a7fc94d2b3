"""Writes the record of a reversible merge while the merged tensors are written."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import blake3
import zstandard

from loratool import record as layout
from loratool.adapter import Adapter
from loratool.application import Applied, Part
from loratool.checkpoint import RECORD, Checkpoint
from loratool.errors import UsageError
from loratool.files import file_content, file_size, is_file
from loratool.record import BaseFile, BaseTensor, Blob, Record, RecordedAdapter
from loratool.safetensors_file import raw_header
from loratool.writer import write_file, write_safetensors, write_side_files


@dataclass(frozen=True)
class Recorder:
    """Everything that a record is made of, but for what the merge finds out as it runs.

    Attributes:
        base: what is merged into.
        parts: the adapters, bound.
        applied: the merged tensors by the base's names.
        renames: base name -> name in the merged model, where they differ.
        side_files: the merged model's files that hold no tensors.
        embed: whether the adapters themselves are kept, or their digests only.
        options: what is needed to merge again.
    """

    base: Checkpoint
    parts: Sequence[Part]
    applied: Applied
    renames: Mapping[str, str]
    side_files: Mapping[str, Path | bytes]
    embed: bool
    options: Mapping[str, Any]

    def __post_init__(self) -> None:
        for part in self.parts:
            if not part.adapter.files:
                raise UsageError(
                    f"{part.adapter.label}: a reversible merge keeps the adapter's files: "
                    "save it first"
                )

    @property
    def nbytes(self) -> int:
        """About the bytes that the record will take."""
        stored = sum(t.nbytes for n, t in self.base.items() if self.how(n) == "stored")
        touched = sum(self.base[name].nbytes for name in self.applied.traces)
        kept = [file for part in self.parts for file in part.adapter.files.values()]
        embedded = sum(map(file_size, kept)) if self.embed else 0
        return stored + embedded + touched // 64

    def how(self, name: str) -> str:
        """How a tensor of the base will come back: `BaseTensor.how`."""
        change = self.applied.changes.get(name)
        if change is None or not change.can_be_subtracted:
            return "stored"
        return "residual" if change.updates else "same"

    @contextmanager
    def writing(self, folder: Path) -> Iterator[Recording]:
        """Write the record into a merged model's folder; it is complete when the block ends."""
        place = folder / RECORD
        place.mkdir()
        with _BlobFile(place / layout.BLOBS) as blobs:
            recording = Recording(self, blobs)
            yield recording
            write_file(place / layout.FILE, recording.finish(place).to_json())


@dataclass
class Recording:
    """One record in the making: `see` or `carry` every tensor of the merged model, in order."""

    recorder: Recorder
    blobs: _BlobFile
    tensors: dict[str, BaseTensor] = field(default_factory=dict)
    added: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        renames = self.recorder.renames
        self._base_names = {renames.get(n, n): n for n in self.recorder.applied.changes}

    def see(self, merged_name: str) -> None:
        """Keep what the merge of one tensor left behind."""
        name = self._base_names.get(merged_name)
        if name is None:
            self.added[merged_name] = self.recorder.applied.tensors[merged_name].digest()
            return
        if self.recorder.how(name) == "stored":
            merged_digest = self.recorder.applied.tensors[name].digest()
            self._keep(name, self._base_digest(name), "stored", merged_name, merged_digest)
            return
        trace = self.recorder.applied.traces.get(name)
        if trace is None or trace.way is None:  # nothing was added after all
            digest = self._base_digest(name)
            self._keep(name, digest, "same", merged_name, digest)
            return
        way, trace.way = trace.way, None
        residual = self.blobs.add(way.residual)
        self._keep(name, way.base, "residual", merged_name, way.merged, residual)

    def carry(self, merged_name: str) -> None:
        """Take over what the base's own record says of a tensor that stays as it is on disk."""
        name = self._base_names[merged_name]
        digest = self.recorder.base.known_digest(name)
        if digest is None or self.recorder.how(name) != "same":
            self.see(merged_name)
        else:
            self._keep(name, digest, "same", merged_name, digest)

    def _base_digest(self, name: str) -> str:
        digest = self.recorder.base[name].digest()
        self.recorder.base.check(name, digest)
        return digest

    def _keep(
        self,
        name: str,
        digest: str,
        how: str,
        merged: str | None,
        merged_digest: str,
        residual: Blob | None = None,
    ) -> None:
        tensor = self.recorder.base[name]
        self.tensors[name] = BaseTensor(
            tensor.dtype,
            tensor.shape,
            self.recorder.base.shards[name],
            digest,
            how,
            merged,
            merged_digest,
            residual,
        )

    def finish(self, place: Path) -> Record:
        """Write everything but record.json."""
        from loratool.plugins import create

        recorder = self.recorder
        base = recorder.base
        stored = {name: base[name] for name in base if recorder.how(name) == "stored"}
        if stored:
            executor = create("executors", "serial")
            write_safetensors(place / layout.STORED, stored, {"format": "pt"}, executor)
        for name in stored.keys() - self.tensors.keys():  # not in the merged model
            self._keep(name, self._base_digest(name), "stored", None, "")
        write_side_files({f"{layout.PREVIOUS}/{n}": f for n, f in base.record.items()}, place)
        return Record(
            tensors={name: self.tensors[name] for name in base},
            adapters=tuple(self._adapter(n, part, place) for n, part in self._numbered()),
            weight_files=self._weight_files(),
            side_files=self._side_files(),
            metadata=base.metadata,
            options=recorder.options,
            added=self.added,
        )

    def _numbered(self) -> Iterator[tuple[int, Part]]:
        return enumerate(self.recorder.parts, 1)

    def _adapter(self, number: int, part: Part, place: Path) -> RecordedAdapter:
        adapter = part.adapter
        name = adapter.path.resolve().stem if adapter.path else "adapter"
        folder = file = ""
        if self.recorder.embed:
            folder = f"{layout.ADAPTERS}/{number}-{name}"
            write_side_files({f"{folder}/{n}": f for n, f in adapter.files.items()}, place)
            if adapter.path is not None and is_file(adapter.path):
                file = adapter.path.name
        return RecordedAdapter(name, part.weight, adapter_digests(adapter), folder, file)

    def _weight_files(self) -> dict[str, BaseFile]:
        """The headers of the base's safetensors files, and its index."""
        base = self.recorder.base
        found = {}
        for file in dict.fromkeys(base.shards.values()):
            tensors = {n: t for n, t in base.items() if base.shards[n] == file}
            header = base.headers.get(file) or raw_header(base.as_stored(tensors))
            if header is not None:
                found[file] = self._file(header)
        return found

    def _side_files(self) -> dict[str, BaseFile]:
        base = self.recorder.base
        found = {}
        for name, source in {**base.side_files, **base.index_files}.items():
            content = file_content(source)
            merged = self.recorder.side_files.get(name)
            kept = merged is not None and (merged == source or file_content(merged) == content)
            digest = blake3.blake3(content).hexdigest()
            found[name] = BaseFile(digest) if kept else self._file(content)
        return found

    def _file(self, content: bytes) -> BaseFile:
        compressed = zstandard.ZstdCompressor().compress(content)
        return BaseFile(blake3.blake3(content).hexdigest(), self.blobs.add(compressed))


class _BlobFile:
    """A file that blobs are appended to."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __enter__(self) -> _BlobFile:
        self._file = self._path.open("xb", buffering=1 << 20)
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def add(self, data: bytes) -> Blob:
        """Append some bytes."""
        offset = self._file.tell()
        self._file.write(data)
        return Blob(offset, len(data), blake3.blake3(data).hexdigest())


def adapter_digests(adapter: Adapter) -> dict[str, str]:
    """The digests of an adapter's tensors, by their names in its file."""
    stored = [tensor for update in adapter.values() for tensor in update.stored]
    return {tensor.name: tensor.digest() for tensor in stored}
