"""The base, lazily, from a merged model and the record of its merge."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import blake3
import zstandard

from loratool import record as layout
from loratool.adapter import Adapter
from loratool.application import Part, bind_part, changes_of
from loratool.checkpoint import MODEL_INDEX, RECORD, Checkpoint, LazyTensor
from loratool.errors import FormatError, InputError, MismatchError
from loratool.files import file_content, is_file
from loratool.json_files import parse_json
from loratool.opening import open_adapter
from loratool.record import BaseFile, BaseTensor, Record
from loratool.recording import adapter_digests
from loratool.reports import Report, counted
from loratool.safetensors_file import lazy_tensors, read_header
from loratool.shards import is_index, safetensors_name

if TYPE_CHECKING:
    import torch

_MOST_BYTES = 1 << 30  # of a file of the base that holds no tensors, unpacked


@dataclass(frozen=True)
class RestoredCheckpoint(Checkpoint):
    """A base that is restored from a merged model while it is read.

    Attributes:
        merged: the merged model.
        source: its record.
        adapters: what was merged into the base, in the record's order.
        is_exact: whether the files come back as they were, not the tensors alone.
    """

    merged: Checkpoint = field(default_factory=lambda: Checkpoint({}))
    source: Record = field(default_factory=lambda: Record({}, ()))
    adapters: tuple[Adapter, ...] = ()
    is_exact: bool = True

    def check(self, name: str, digest: str) -> None:
        """Raise InputError if a tensor's digest is not the base's."""
        if digest != self.source.tensors[name].digest:
            raise changed_after_merge(self.merged, self.source, name)

    def known_digest(self, name: str) -> str | None:
        """The record's digest of a tensor."""
        return self.source.tensors[name].digest

    def beside(self, folder: Path) -> AbstractContextManager[Callable[[str], None]]:
        """Check what is copied without being looked at; what is computed checks itself."""

        def see(name: str) -> None:
            if self.source.tensors[name].how != "residual":
                self.check(name, self[name].digest())

        return nullcontext(see)

    def report(self, target: Path | str) -> Report:
        """What was restored; call it after draining."""
        taken = ", ".join(f"{a.name}={a.weight:g}" for a in self.source.adapters)
        hows = Counter(found.how for found in self.source.tensors.values())
        lines = [
            f"taken out: {taken}",
            f"{counted(len(self), 'tensor')} of the base, bit for bit: the digest of each agrees "
            "with the record",
            f"{hows['residual']} by subtraction and residual, {hows['stored']} from the record, "
            f"{hows['same']} as they were",
            "the files are the base's, byte for byte"
            if self.is_exact
            else "the tensors are the base's; the files differ, see the notes",
        ]
        if self.record:
            lines.append("it still holds adapters of an earlier merge: unmerge it again for these")
        data = {
            "kind": "unmerged",
            "exact": True,
            "files_exact": self.is_exact,
            "taken_out": [{"name": a.name, "weight": a.weight} for a in self.source.adapters],
            "tensors": len(self),
            "by": dict(hows),
            "bytes": self.nbytes,
        }
        return Report(f"Restored {target}", data, tuple(lines), notes=self.notes)


def restore(
    merged: Checkpoint, record: Record, given: Sequence[Adapter] = ()
) -> RestoredCheckpoint:
    """Plan the base that a record leads back to; values are restored when they are read.

    Args:
        merged: the merged model.
        record: its record.
        given: adapters to use where the record keeps digests only.

    Raises:
        InputError: an adapter is missing, or the record or the merged model was changed.
        MismatchError: an adapter is not the one that was merged.
    """
    adapters = tuple(find_adapters(record, given))
    files = _Files(merged, record)
    side_files, index = files.side_files()
    headers = files.headers()
    shards = files.shards()
    skeleton = Checkpoint(
        {name: _header_only(name, found) for name, found in record.tensors.items()},
        config=_config(merged, side_files, MODEL_INDEX if merged.components else "config.json"),
        components={n: _config(merged, side_files, f"{n}/config.json") for n in merged.components},
    )
    parts = [
        bind_part(adapter, recorded.weight, skeleton)
        for adapter, recorded in zip(adapters, record.adapters, strict=True)
    ]
    stored = _stored(record)
    return RestoredCheckpoint(
        {
            name: _tensor(name, found, merged, parts, stored, record)
            for name, found in record.tensors.items()
        },
        config=skeleton.config,
        side_files=side_files,
        shards=shards,
        metadata={safetensors_name(n): found for n, found in record.metadata.items()},
        notes=(*merged.notes, *files.notes),
        index_files=index,
        headers=headers,
        record=record.previous(),
        components=skeleton.components,
        merged=merged,
        source=record,
        adapters=adapters,
        is_exact=not files.notes,
    )


def _config(
    merged: Checkpoint, side_files: Mapping[str, Path | bytes], name: str
) -> dict[str, Any] | None:
    content = side_files.get(name)
    return None if content is None else parse_json(file_content(content), f"{merged.label}: {name}")


@dataclass
class _Files:
    """The base's files, as far as they come back; `notes` tells what does not."""

    merged: Checkpoint
    record: Record
    notes: list[str] = field(default_factory=list)

    def side_files(self) -> tuple[dict[str, Path | bytes], dict[str, Path | bytes]]:
        """The files that hold no tensors, and the index among them."""
        found: dict[str, Path | bytes] = {}
        for name, recorded in self.record.side_files.items():
            content = self._side_file(name, recorded)
            if content is not None:
                found[name] = content
        index = {name: content for name, content in found.items() if is_index(name)}
        return {n: c for n, c in found.items() if n not in index}, index

    def _side_file(self, name: str, recorded: BaseFile) -> Path | bytes | None:
        if recorded.content is not None:
            return self._unpacked(name, recorded)
        if (source := self.merged.side_files.get(name)) is None:
            self.notes.append(f"{name}: is not in the merged model any more: it is left out")
            return None
        if blake3.blake3(file_content(source)).hexdigest() != recorded.digest:
            self.notes.append(f"{name}: was changed after the merge: it is kept as it is now")
        return source

    def _unpacked(self, name: str, recorded: BaseFile) -> bytes:
        assert recorded.content is not None
        data = self.record.read_blob(recorded.content)
        try:
            if zstandard.frame_content_size(data) > _MOST_BYTES:
                raise zstandard.ZstdError("too large")
            content = zstandard.ZstdDecompressor().decompress(data)
        except zstandard.ZstdError as error:
            raise FormatError(f"{self.record.path}: {name}: cannot be unpacked: {error}") from error
        if blake3.blake3(content).hexdigest() != recorded.digest:
            raise InputError(f"{self.record.path}: {name}: the record was changed after the merge")
        return content

    def headers(self) -> dict[str, bytes]:
        """The weight files' headers."""
        return {
            name: self._unpacked(name, recorded)
            for name, recorded in self.record.weight_files.items()
        }

    def shards(self) -> dict[str, str]:
        """Tensor -> the file that it is restored to."""
        original = {name: found.file for name, found in self.record.tensors.items()}
        for file in dict.fromkeys(original.values()):
            if file in self.record.weight_files:
                continue
            if (new := safetensors_name(file)) != file:
                found = f"its tensors are restored, in {new}; the file itself cannot be"
            else:
                found = "its tensors are restored; its header is written anew"
            self.notes.append(f"{file}: {found}")
        return {name: safetensors_name(file) for name, file in original.items()}


def find_adapters(record: Record, given: Sequence[Adapter]) -> Iterator[Adapter]:
    """The adapters of a record, in its order: its own copies, else those of `given`.

    Raises:
        InputError: one is neither kept nor given.
        MismatchError: the record's copy was changed.
    """
    digests = [adapter_digests(adapter) for adapter in given]
    for recorded in record.adapters:
        if not recorded.folder:
            found = next(
                (a for a, d in zip(given, digests, strict=True) if d == recorded.tensors), None
            )
            if found is None:
                raise InputError(
                    f"{record.path}: keeps only the digests of the adapter {recorded.name} "
                    f"(weight {recorded.weight:g}): name it after the merged model"
                )
            yield found
            continue
        place = record.path / recorded.folder
        adapter = open_adapter(place / recorded.file if recorded.file else place)
        if adapter_digests(adapter) != recorded.tensors:
            raise MismatchError(
                f"{place}: is not the adapter that was merged: the record was changed, or is of "
                "another adapter"
            )
        yield replace(adapter, path=Path(recorded.name))


def changed_after_merge(merged: Checkpoint, record: Record, name: str) -> InputError:
    """What to say when a base tensor does not come back: reads all of the merged model.

    Args:
        merged: the merged model.
        record: its record.
        name: a base tensor that does not have the record's digest.
    """
    expected = {t.merged: t.merged_digest for t in record.tensors.values() if t.merged is not None}
    expected.update(record.added)
    changed = [
        name
        for name, digest in expected.items()
        if name not in merged or merged[name].digest() != digest
    ]
    if not changed:
        return InputError(
            f"{record.path}: does not lead back to the base's {name}: the record was changed, or "
            "is of another model"
        )
    more = f" and {len(changed) - 5} more" if changed[5:] else ""
    return InputError(
        f"{merged.label}: changed after the merge: {', '.join(changed[:5])}{more}; the record "
        f"cannot undo that. Without {RECORD}, unmerge subtracts an adapter approximately"
    )


def _header_only(name: str, found: BaseTensor) -> LazyTensor:
    def blocks() -> Iterator[torch.Tensor]:
        raise AssertionError(f"{name}: has no values yet")

    return LazyTensor(name, found.dtype, found.shape, blocks)


def _stored(record: Record) -> Mapping[str, LazyTensor]:
    file = record.path / layout.STORED
    return lazy_tensors(file, read_header(file)) if is_file(file) else {}


def _tensor(
    name: str,
    found: BaseTensor,
    merged: Checkpoint,
    parts: Sequence[Part],
    stored: Mapping[str, LazyTensor],
    record: Record,
) -> LazyTensor:
    if found.how == "stored":
        source = stored.get(name)
        where = f"{record.path / layout.STORED}"
    else:
        source = merged.get(found.merged or "")
        where = merged.label
    if source is None or (source.dtype, source.shape) != (found.dtype, found.shape):
        raise InputError(f"{where}: {found.merged or name}: missing or changed after the merge")
    if found.how != "residual":
        return source.renamed(name)
    return _subtracted(name, found, merged, parts, record)


def _subtracted(
    name: str, found: BaseTensor, merged: Checkpoint, parts: Sequence[Part], record: Record
) -> LazyTensor:
    source = merged[found.merged or ""]

    def blocks() -> Iterator[torch.Tensor]:
        from loratool.reversal import NotReversible, WayBack, restored_blocks

        changes = changes_of(name, parts)
        delta = changes.load_delta(source) if changes else None
        if delta is None or found.residual is None:
            raise changed_after_merge(merged, record, name)
        residual = record.read_blob(found.residual)
        way = WayBack(found.digest, found.merged_digest, residual)
        try:
            yield from restored_blocks(source.read(), delta, way)
        except NotReversible as error:
            raise changed_after_merge(merged, record, name) from error

    return LazyTensor(name, found.dtype, found.shape, blocks, source.origin)
