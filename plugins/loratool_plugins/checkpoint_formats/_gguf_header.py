"""The header of a GGUF file: metadata, and which tensor lies where.

Read here rather than through gguf.GGUFReader, which takes seconds for a vocabulary that nobody
asked for and whose errors do not say which tensor is wrong; the kinds of values and their sizes are
the package's. The format is described at https://github.com/ggml-org/ggml/blob/master/docs/gguf.md.
"""

from __future__ import annotations

import math
import struct
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

from loratool.errors import FormatError, InputError, UnsupportedError
from loratool.files import file_size, read_start

MAGIC = b"GGUF"
_VERSIONS = (2, 3)
_ALIGNMENT = 32  # where general.alignment does not say otherwise
_MAX_DIMENSIONS = 4
_FIRST_READ = 1 << 22
_LEAST_ENTRY, _LEAST_VALUE = 32, 13  # bytes that the header has for a tensor, and for a value
# Type of a value -> how struct reads it; 8 is a string and 9 an array.
_SCALARS = {
    0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d",
}  # fmt: skip
_STRING, _ARRAY = 8, 9


@dataclass(frozen=True)
class Entry:
    """A tensor of a GGUF file.

    Attributes:
        name: its GGUF name.
        kind: how its values are stored.
        shape: in the order of torch, the slowest axis first.
        begin: of its bytes in the file.
        length: of these.
    """

    name: str
    kind: GGMLQuantizationType
    shape: tuple[int, ...]
    begin: int
    length: int


@dataclass(frozen=True)
class Header:
    """What a GGUF file says of itself.

    Attributes:
        path: the file.
        metadata: key -> value; an array of strings is only counted.
        entries: its tensors, in the order of their bytes.
        raw: all bytes before the first tensor.
        alignment: every tensor begins at a multiple of this, counted from the first.
    """

    path: Path
    metadata: Mapping[str, Any]
    entries: tuple[Entry, ...]
    raw: bytes
    alignment: int


def read_header(path: Path) -> Header:
    """Read and check the header of a GGUF file.

    Raises:
        InputError: the file cannot be read.
        FormatError: it is no GGUF file, is truncated, or contradicts itself.
        UnsupportedError: it is of a version or a byte order that is not read.
    """
    try:
        size = file_size(path)
        count = min(size, _FIRST_READ)
        while True:
            data = read_start(path, count)
            try:
                return _parse(path, data, size)
            except _TooShort:
                if count >= size:
                    raise FormatError(
                        f"{path}: ends inside its header, after {size} bytes: the file is "
                        "truncated; download it again"
                    ) from None
            count = min(size, 4 * count)
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from error


def parse_header(path: Path, raw: bytes) -> Header:
    """A header as `Header.raw` has it; errors as `read_header`."""
    return _parse(path, raw, sys.maxsize)


class _TooShort(Exception):
    """More of the file is needed."""


class _Cursor:
    """Reads one value after the other."""

    def __init__(self, path: Path, data: bytes) -> None:
        self._path = path
        self._data = data
        self.position = 0

    def take(self, format: str) -> tuple[Any, ...]:
        layout = struct.Struct(f"<{format}")
        end = self.position + layout.size
        if end > len(self._data):
            raise _TooShort
        found = layout.unpack_from(self._data, self.position)
        self.position = end
        return found

    def skip_string(self) -> None:
        (length,) = self.take("Q")
        if self.position + length > len(self._data):
            raise _TooShort
        self.position += length

    def _skip_strings(self, count: int) -> None:
        """A vocabulary: hundreds of thousands of them."""
        data, position = self._data, self.position
        size = len(data)
        for _ in range(count):
            if position + 8 > size:
                raise _TooShort
            position += 8 + int.from_bytes(data[position : position + 8], "little")
        if position > size:
            raise _TooShort
        self.position = position

    def string(self) -> str:
        start = self.position + 8
        self.skip_string()
        try:
            return self._data[start : self.position].decode()
        except UnicodeDecodeError as error:
            raise FormatError(
                f"{self._path}: a name or text in its header is not UTF-8; download it again"
            ) from error

    def value(self, kind: int) -> Any:
        if kind == _STRING:
            return self.string()
        if kind in _SCALARS:
            return self.take(_SCALARS[kind])[0]
        if kind != _ARRAY:
            raise FormatError(
                f"{self._path}: metadata of the unknown type {kind}; download it again"
            )
        inner, count = self.take("IQ")
        if inner in _SCALARS:
            if count * struct.calcsize(_SCALARS[inner]) > len(self._data) - self.position:
                raise _TooShort
            return list(self.take(f"{count}{_SCALARS[inner]}"))
        if inner == _STRING:
            self._skip_strings(count)
            return count
        raise FormatError(
            f"{self._path}: an array of the type {inner} in its metadata is not read; download it "
            "again"
        )


def _parse(path: Path, data: bytes, size: int) -> Header:
    if data[:4] != MAGIC:
        raise FormatError(
            f"{path}: does not begin with GGUF: it is no GGUF file; download it again"
        )
    cursor = _Cursor(path, data)
    _, version, tensors, values = cursor.take("IIQQ")
    if version not in _VERSIONS:
        if version & 0xFFFF == 0:
            raise UnsupportedError(f"{path}: is a big-endian GGUF file: get the little-endian one")
        raise UnsupportedError(
            f"{path}: is of GGUF version {version}; loratool reads 2 and 3: convert it anew"
        )
    if tensors * _LEAST_ENTRY + values * _LEAST_VALUE > size:
        raise FormatError(
            f"{path}: claims {tensors} tensors and {values} metadata in {size} bytes: the file is "
            "truncated or damaged; download it again"
        )
    metadata: dict[str, Any] = {}
    for _ in range(values):
        key = cursor.string()
        (kind,) = cursor.take("I")
        if key in metadata:
            raise FormatError(f"{path}: {key}: its metadata name it twice; download it again")
        metadata[key] = cursor.value(kind)
    found = [_entry(path, cursor) for _ in range(tensors)]
    alignment = metadata.get("general.alignment", _ALIGNMENT)
    if type(alignment) is not int or alignment < 1 or alignment & (alignment - 1):
        raise FormatError(f"{path}: general.alignment is {alignment!r}, no power of two")
    start = -(-cursor.position // alignment) * alignment
    if not found:
        start = min(start, size)
    elif start > size:
        raise _TooShort
    if start > len(data):
        raise _TooShort
    entries = sorted(
        (Entry(e.name, e.kind, e.shape, start + e.begin, e.length) for e in found),
        key=lambda entry: entry.begin,
    )
    _check_layout(path, entries, start, alignment, size)
    return Header(path, metadata, tuple(entries), data[:start], alignment)


def _entry(path: Path, cursor: _Cursor) -> Entry:
    """The next tensor, its begin counted from the first."""
    name = cursor.string()
    (dimensions,) = cursor.take("I")
    if not 1 <= dimensions <= _MAX_DIMENSIONS:
        raise FormatError(f"{path}: {name}: has {dimensions} dimensions; download it again")
    shape = cursor.take(f"{dimensions}Q")[::-1]
    if not all(0 < size < 1 << 63 for size in shape):
        raise FormatError(f"{path}: {name}: has the shape {shape}; download it again")
    number, begin = cursor.take("IQ")
    try:
        kind = GGMLQuantizationType(number)
    except ValueError:
        raise UnsupportedError(
            f"{path}: {name}: values of type {number} are unknown to this version of the gguf "
            "package: pip install --upgrade gguf"
        ) from None
    block, length = GGML_QUANT_SIZES[kind]
    if shape[-1] % block:
        raise FormatError(
            f"{path}: {name}: rows of {shape[-1]} values cannot be {kind.name}, which has blocks "
            f"of {block}; download it again"
        )
    return Entry(name, kind, shape, begin, math.prod(shape) // block * length)


def _check_layout(path: Path, entries: list[Entry], start: int, alignment: int, size: int) -> None:
    end = start
    names: set[str] = set()
    for entry in entries:
        if entry.name in names:
            raise FormatError(f"{path}: {entry.name}: the header names it twice; download it again")
        names.add(entry.name)
        if entry.begin < end or (entry.begin - start) % alignment:
            wrong = "overlaps the one before" if entry.begin < end else "is not aligned"
            raise FormatError(
                f"{path}: {entry.name}: begins at byte {entry.begin} and {wrong}: the file is "
                "damaged; download it again"
            )
        end = entry.begin + entry.length
        if end > size:
            raise FormatError(
                f"{path}: {entry.name}: its bytes end at {end}, but the file has {size}: it is "
                "truncated; download it again"
            )
