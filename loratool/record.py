"""The record of a reversible merge: what is needed to take the adapters out again, to the bit.

It is a directory `loratool-record/` beside the merged model's files:

    record.json          which adapters, with what weights; every tensor of the base, with digests
    blobs.bin            residuals (`loratool.residual`) and small files, one after the other
    stored.safetensors   tensors of the base that were replaced or left out
    adapters/1-NAME/     the adapters, as they were; unless only their digests are kept
    previous/            the record that the base had itself
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

import blake3

from loratool.checkpoint import RECORD, Checkpoint
from loratool.errors import FormatError, InputError
from loratool.files import files_below, local
from loratool.json_files import read_json

VERSION = 1
FILE = "record.json"
BLOBS = "blobs.bin"
STORED = "stored.safetensors"
ADAPTERS = "adapters"
PREVIOUS = "previous"


@dataclass(frozen=True)
class Blob:
    """Some bytes in blobs.bin, compressed or not: `length` from `offset`, with their digest."""

    offset: int
    length: int
    digest: str


@dataclass(frozen=True)
class BaseTensor:
    """A tensor of the base.

    Attributes:
        dtype, shape: its type and shape.
        file: the file that held it.
        digest: of its values (`loratool.digests`).
        merged: its name in the merged model; None if it was left out.
        merged_digest: of the values there.
        how: "same" as in the merged model; "residual": by subtracting the delta; "stored".
        residual: for "residual".
    """

    dtype: str
    shape: tuple[int, ...]
    file: str
    digest: str
    how: str
    merged: str | None = None
    merged_digest: str = ""
    residual: Blob | None = None


@dataclass(frozen=True)
class BaseFile:
    """A file of the base.

    Attributes:
        digest: BLAKE3 of its bytes; of a weight file: of its header.
        content: the bytes (of a weight file: its header), compressed by zstandard; None if the
            merged model has the same file.
    """

    digest: str
    content: Blob | None = None


@dataclass(frozen=True)
class RecordedAdapter:
    """An adapter that was merged.

    Attributes:
        name: what the record calls it.
        weight: its weight.
        tensors: digests of its tensors, by their names in its file.
        folder: where it lies, relative to the record; "" if only the digests are kept.
        file: the file in `folder` to open, "" for the folder itself.
    """

    name: str
    weight: float
    tensors: Mapping[str, str]
    folder: str = ""
    file: str = ""


@dataclass(frozen=True)
class Record:
    """A record as read or to be written.

    Attributes:
        tensors: the base's tensors, in its order.
        adapters: what was merged, in the order given.
        weight_files: the base's weight files, for those that can be restored as they were.
        side_files: the base's other files.
        metadata: the base's safetensors metadata, by file.
        options: of the merge: what is needed to do it again.
        added: digests of the tensors of the merged model that the base did not have.
        path: where it lies.
    """

    tensors: Mapping[str, BaseTensor]
    adapters: tuple[RecordedAdapter, ...]
    weight_files: Mapping[str, BaseFile] = field(default_factory=dict)
    side_files: Mapping[str, BaseFile] = field(default_factory=dict)
    metadata: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    options: Mapping[str, Any] = field(default_factory=dict)
    added: Mapping[str, str] = field(default_factory=dict)
    path: Path = Path()

    def to_json(self) -> bytes:
        """record.json."""
        content = asdict(self)
        del content["path"]
        return (json.dumps({"version": VERSION, **content}, indent=1) + "\n").encode()

    def read_blob(self, blob: Blob) -> bytes:
        """A blob's bytes; InputError if they are not those that were written."""
        file = self.path / BLOBS
        try:
            with local(file).open("rb") as opened:
                opened.seek(blob.offset)
                data = opened.read(blob.length)
        except OSError as error:
            raise InputError(f"{file}: cannot be read: {error.strerror}") from error
        if blake3.blake3(data).hexdigest() != blob.digest:
            raise InputError(f"{file}: the record was changed after the merge")
        return data

    def previous(self) -> Mapping[str, Path]:
        """The files of the record that the base had itself, by name relative to it."""
        return files_below(self.path / PREVIOUS)


def read_record(merged: Checkpoint) -> Record | None:
    """The record of what was merged into a checkpoint, or None.

    Raises:
        InputError: it cannot be read.
        FormatError: it is malformed, or of a later version.
    """
    if not merged.record:
        return None
    file = merged.record.get(FILE)
    if file is None:
        raise InputError(f"{merged.label}/{RECORD}/{FILE}: missing; the record cannot be used")
    content = read_json(file)
    if content.get("version") != VERSION:
        raise FormatError(
            f"{file}: the record's version is {content.get('version')!r}, not {VERSION}: "
            "use the loratool that wrote it"
        )
    try:
        return _parse(content, file.parent)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise FormatError(f"{file}: the record was changed after the merge ({error!r})") from error


def _parse(content: Mapping[str, Any], path: Path) -> Record:
    def blob(found: Mapping[str, Any] | None) -> Blob | None:
        return None if found is None else Blob(**found)

    def base_tensor(found: Mapping[str, Any]) -> BaseTensor:
        parts = {**found, "shape": tuple(found["shape"]), "residual": blob(found["residual"])}
        return BaseTensor(**parts)

    def adapter(found: Mapping[str, Any]) -> RecordedAdapter:
        for name in (found["folder"], found["file"]):
            if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts:
                raise ValueError(f"{name!r} leaves the record")
        return RecordedAdapter(**found)

    def base_files(found: Mapping[str, Any]) -> dict[str, BaseFile]:
        return {n: BaseFile(f["digest"], blob(f["content"])) for n, f in found.items()}

    return Record(
        tensors={name: base_tensor(found) for name, found in content["tensors"].items()},
        adapters=tuple(adapter(found) for found in content["adapters"]),
        weight_files=base_files(content["weight_files"]),
        side_files=base_files(content["side_files"]),
        metadata=dict(content["metadata"]),
        options=dict(content["options"]),
        added=dict(content["added"]),
        path=path,
    )
