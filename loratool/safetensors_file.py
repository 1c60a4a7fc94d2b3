"""The safetensors layout: an 8-byte length, a JSON header, then the tensors' bytes without gaps.

Read here rather than through the safetensors package because streaming needs every tensor's byte
range, and because a header that lies must be named file and tensor. The format is described at
https://github.com/huggingface/safetensors#format.
"""

from __future__ import annotations

import json
import math
import mmap
import reprlib
import struct
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loratool.checkpoint import Extent, LazyTensor
from loratool.dtypes import itemsize, torch_dtype
from loratool.errors import FormatError, InputError
from loratool.files import file_size, local, read_start

if TYPE_CHECKING:
    import torch

_MAX_HEADER = 100_000_000  # the limit of the reference implementation
_USUAL_HEADER = 1 << 16
_ALIGNMENT = 64  # so that a mapped tensor is aligned for any GPU kernel
_MAX_DIMENSIONS = 64


@dataclass(frozen=True)
class Entry:
    """What a header says of one tensor; offsets are relative to the end of the header."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


@dataclass(frozen=True)
class Header:
    """A parsed header: entries in the order of their bytes."""

    entries: tuple[Entry, ...]
    metadata: Mapping[str, str]
    data_start: int


def read_header(path: Path) -> Header:
    """Read and check the header of a safetensors file.

    Raises:
        InputError: the file cannot be read.
        FormatError: the header is truncated, is no JSON, or contradicts itself or the file's size.
    """
    try:
        size = file_size(path)
        start = read_start(path, _USUAL_HEADER)
        if len(start) < 8:
            raise FormatError(
                f"{path}: too short for a safetensors file ({size} bytes); download it again"
            )
        (length,) = struct.unpack("<Q", start[:8])
        if length > min(_MAX_HEADER, size - 8):
            raise FormatError(
                f"{path}: the safetensors header claims {length} bytes in a file of {size}: "
                "the file is truncated or is not safetensors; download it again"
            )
        if 8 + length > len(start):
            start = read_start(path, 8 + length)
        raw = start[8 : 8 + length]
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from error
    content = _parse_json(path, raw)
    metadata = content.pop("__metadata__", None)
    if metadata is None:
        metadata = {}  # the reference implementation reads null so
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise FormatError(f"{path}: __metadata__ in the safetensors header must map text to text")
    entries = sorted(
        (_parse_entry(path, name, value) for name, value in content.items()),
        key=lambda entry: (entry.begin, entry.end),
    )
    _check_layout(path, entries, size - 8 - length)
    return Header(tuple(entries), metadata, 8 + length)


def _parse_json(path: Path, raw: bytes) -> dict[str, Any]:
    def checked(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for key, value in pairs:
            if key in found:
                raise FormatError(f"{path}: {key}: the safetensors header names it twice")
            found[key] = value
            # JSON can spell lone surrogates, which are no text and could not be written again.
            for text in (key, value):
                if isinstance(text, str):
                    text.encode()
        return found

    try:
        content = json.loads(raw.decode(), object_pairs_hook=checked, parse_constant=_refuse)
    except (ValueError, RecursionError) as error:  # a number of 5000 digits is a plain ValueError
        raise FormatError(
            f"{path}: the safetensors header is not valid JSON ({error}); download it again"
        ) from error
    if not isinstance(content, dict):
        raise FormatError(f"{path}: the safetensors header is not a JSON object")
    return content


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is no JSON")  # but Python reads it


def _parse_entry(path: Path, name: str, value: Any) -> Entry:
    def are_counts(numbers: Any, most: int) -> bool:
        return (
            isinstance(numbers, list)
            and len(numbers) <= most
            and all(type(number) is int and 0 <= number < 1 << 63 for number in numbers)
        )

    try:
        dtype, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
    except (TypeError, KeyError):
        valid = False
    else:
        valid = isinstance(dtype, str) and are_counts(shape, _MAX_DIMENSIONS)
        valid = valid and are_counts(offsets, 2) and len(offsets) == 2
    if not valid:
        raise FormatError(
            f"{path}: {name}: the header needs a dtype, a shape and two data_offsets, "
            f"has {reprlib.repr(value)}"
        )
    try:
        expected = math.prod(shape) * itemsize(dtype)
    except FormatError as error:
        raise FormatError(f"{path}: {name}: {error}") from None
    begin, end = offsets
    if end - begin != expected:
        raise FormatError(
            f"{path}: {name}: {dtype} of shape {shape} takes {expected} bytes, "
            f"but the header reserves {end - begin}"
        )
    return Entry(name, dtype, tuple(shape), begin, end)


def _check_layout(path: Path, entries: list[Entry], available: int) -> None:
    position = 0
    for entry in entries:
        if entry.end > available:
            raise FormatError(
                f"{path}: {entry.name}: its bytes end at {entry.end}, but the file holds only "
                f"{available} bytes of tensors: the file is truncated; download it again"
            )
        if entry.begin != position:
            wrong = "overlaps the one before" if entry.begin < position else "leaves a gap"
            raise FormatError(
                f"{path}: {entry.name}: begins at byte {entry.begin} and {wrong}, which ends at "
                f"{position}: the file is damaged; download it again"
            )
        position = entry.end
    if position != available:
        raise FormatError(
            f"{path}: {available - position} bytes after the last tensor belong to no tensor; "
            "download it again"
        )


def whole_file(tensors: Mapping[str, LazyTensor]) -> tuple[Path, Header] | None:
    """The safetensors file that holds exactly these tensors, in this order, if there is one."""
    extents = [tensor.extent for tensor in tensors.values()]
    sources = {extent.path if extent is not None else None for extent in extents}
    if len(sources) != 1 or (source := sources.pop()) is None or source.suffix != ".safetensors":
        return None
    header = read_header(source)
    stored = [
        (e.name, e.dtype, e.shape, header.data_start + e.begin, e.end - e.begin)
        for e in header.entries
    ]
    wanted = [
        (name, tensor.dtype, tensor.shape, extent.offset, extent.length)
        for (name, tensor), extent in zip(tensors.items(), extents, strict=True)
        if extent is not None
    ]
    return (source, header) if stored == wanted else None


def raw_header(tensors: Mapping[str, LazyTensor]) -> bytes | None:
    """The header's bytes, length included, of the file that holds exactly these tensors."""
    if (found := whole_file(tensors)) is None:
        return None
    return read_start(found[0], found[1].data_start)


def build_header(
    tensors: Iterable[tuple[str, str, tuple[int, ...]]], metadata: Mapping[str, str]
) -> bytes:
    """The length and header for tensors (name, dtype, shape) that follow in this order.

    Padded with spaces so that the data starts at a multiple of 64 bytes.
    """
    content: dict[str, Any] = {}
    if metadata:
        content["__metadata__"] = dict(sorted(metadata.items()))
    position = 0
    for name, dtype, shape in tensors:
        end = position + math.prod(shape) * itemsize(dtype)
        content[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [position, end]}
        position = end
    raw = json.dumps(content, separators=(",", ":"), ensure_ascii=False).encode()
    raw += b" " * (-(8 + len(raw)) % _ALIGNMENT)
    return struct.pack("<Q", len(raw)) + raw


@dataclass(frozen=True)
class _MappedFile:
    """One file, mapped on first use."""

    path: Path
    maps: list[mmap.mmap]

    def tensor(self, entry: Entry, data_start: int) -> torch.Tensor:
        import torch

        dtype = torch_dtype(entry.dtype)
        if entry.begin == entry.end:
            return torch.empty(entry.shape, dtype=dtype)
        count = math.prod(entry.shape)
        content = self.content(data_start + entry.end)
        flat = torch.frombuffer(content, dtype=dtype, count=count, offset=data_start + entry.begin)
        return flat.view(entry.shape)

    def raw(self, entry: Entry, data_start: int) -> memoryview:
        """The bytes of a tensor."""
        if entry.begin == entry.end:
            return memoryview(b"")
        begin, end = data_start + entry.begin, data_start + entry.end
        return memoryview(self.content(end))[begin:end]

    def content(self, end: int) -> mmap.mmap:
        """The file's bytes.

        Raises:
            InputError: it cannot be mapped, or ends before `end`.
        """
        if not self.maps:
            try:
                with local(self.path).open("rb") as file:
                    # A private writable map costs no memory until written to, and spares torch's
                    # warning about read-only buffers.
                    self.maps.append(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY))
            except (OSError, ValueError) as error:
                raise InputError(f"{self.path}: cannot be mapped: {error}") from error
        if end > len(self.maps[0]):
            raise InputError(f"{self.path}: became shorter while it was read")
        return self.maps[0]


def lazy_tensors(path: Path, header: Header) -> dict[str, LazyTensor]:
    """The tensors of a safetensors file, in file order, as views of one shared memory map."""
    mapped = _MappedFile(path, [])

    def lazy(entry: Entry) -> LazyTensor:
        def blocks() -> Iterator[torch.Tensor]:
            yield mapped.tensor(entry, header.data_start)

        extent = Extent(path, header.data_start + entry.begin, entry.end - entry.begin)

        def raw() -> memoryview:
            return mapped.raw(entry, header.data_start)

        return LazyTensor(entry.name, entry.dtype, entry.shape, blocks, str(path), extent, raw)

    return {entry.name: lazy(entry) for entry in header.entries}
