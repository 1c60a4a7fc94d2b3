"""What is left of a tensor after a merge was undone by subtraction: coded small, undone exactly.

Merging rounds W + delta to M; subtracting gives P = round(M - delta), which is W again wherever M
has at least as many binary places as W. Where M is larger, some of W's last bits are gone: as many
as its exponent exceeds that of P, the *drop*. Both sides know M and P, hence the drop, so the
residual bits(W) - bits(P) is coded by groups of equal drop: for a drop of k it is a number of about
k bits, and for no drop it is 0 almost everywhere. Bit patterns are subtracted as integers modulo
2^width, so that every pattern comes back: -0, subnormals, infinities and any NaN.

A coded residual is:

    u64 elements, u8 groups, then for each group
    u8 drop, u64 count, u8 planes, and for each plane u32 length and its bytes, compressed

Values are zigzag-coded (0, -1, 1, -2 become 0, 1, 2, 3) and cut into byte planes, lowest first,
each compressed by zstandard. Group 0 holds the residuals other than 0 of elements without a drop;
its positions, as gaps, are the last group, marked 255.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import zstandard

from loratool.errors import FormatError

Array = np.ndarray[Any, np.dtype[Any]]

_HEAD = struct.Struct("<QB")
_GROUP = struct.Struct("<BQB")
_LENGTH = struct.Struct("<I")
_GAPS = 255
_LEVEL = 3

# dtype -> (width in bits, bits of the significand that are stored, mask of the exponent)
_LAYOUT = {
    "F64": (64, 52, 0x7FF),
    "F32": (32, 23, 0xFF),
    "BF16": (16, 7, 0xFF),
    "F16": (16, 10, 0x1F),
    "F8_E4M3": (8, 3, 0xF),
    "F8_E5M2": (8, 2, 0x1F),
}


def bit_patterns(tensor: torch.Tensor) -> Array:
    """The bit patterns of a contiguous tensor's elements as a flat view of unsigned integers."""
    width = tensor.itemsize
    return tensor.reshape(-1).view(torch.uint8).numpy().view(f"<u{width}")


class Drops:
    """Finds where a tile has lost bits, and how many; reuses its buffers."""

    def __init__(self, dtype: str, elements: int) -> None:
        width, stored, mask = _LAYOUT[dtype]
        kind = np.dtype(f"<u{width // 8}").type
        self._shift, self._mask = kind(stored), kind(mask << stored)
        self._above, self._below = np.empty(elements, kind), np.empty(elements, kind)
        self._flags = np.empty(elements, np.bool_)

    def find(self, merged: Array, predicted: Array) -> tuple[Array, Array]:
        """Indices of the elements with a drop, ascending, and the drops, uint8, 1 or more.

        That the smallest normal numbers have the unit of subnormals is left aside: a drop is a
        name for a group, and both sides find the same one.
        """
        size = merged.size
        above = np.bitwise_and(merged, self._mask, out=self._above[:size])
        below = np.bitwise_and(predicted, self._mask, out=self._below[:size])
        places = np.flatnonzero(np.greater(above, below, out=self._flags[:size]))
        drops = (above.take(places) - below.take(places)) >> self._shift
        return places, np.minimum(drops, 254).astype(np.uint8)


class Encoder:
    """Collects the residual of one tensor, tile by tile in order."""

    def __init__(self, dtype: str, elements: int) -> None:
        """Make one for tiles of at most `elements` elements."""
        self._drops = Drops(dtype, elements)
        self._differs = np.empty(elements, np.bool_)
        self._sizes: list[Array] = []
        self._values: list[Array] = []
        self._odd_places: list[Array] = []
        self._odd_values: list[Array] = []
        self._elements = 0

    def add(self, base: Array, merged: Array, predicted: Array) -> None:
        """Take the bit patterns of the next elements of W, M and P (see the module).

        `predicted` becomes `base`, by what was taken alone.
        """
        places, sizes = self._drops.find(merged, predicted)
        found = predicted.take(places)
        values = base.take(places) - found
        predicted[places] = found + values
        self._sizes.append(sizes)
        self._values.append(values)
        differs = np.not_equal(base, predicted, out=self._differs[: base.size])
        if differs.any():
            odd = np.flatnonzero(differs)
            odd_values = base[odd] - predicted[odd]
            predicted[odd] += odd_values
            self._odd_places.append(odd + self._elements)
            self._odd_values.append(odd_values)
        self._elements += base.size

    def finish(self) -> bytes:
        """The coded residual."""
        groups = self._groups()
        out = [_HEAD.pack(self._elements, len(groups))]
        for drop, values in groups.items():
            planes = _planes(values)
            out.append(_GROUP.pack(drop, values.size, len(planes)))
            for plane in planes:
                out += (_LENGTH.pack(len(plane)), plane)
        coded = b"".join(out)
        self._prove(coded, groups)
        return coded

    def _groups(self) -> dict[int, Array]:
        found: dict[int, Array] = {}
        if self._sizes:
            sizes, values = np.concatenate(self._sizes), np.concatenate(self._values)
            for drop in np.flatnonzero(np.bincount(sizes)):
                found[int(drop)] = _zigzag(values[sizes == drop])
        if self._odd_places:
            found[0] = _zigzag(np.concatenate(self._odd_values))
            places = np.concatenate(self._odd_places)
            found[_GAPS] = np.diff(places, prepend=0).astype(np.uint64)
        return found

    def _prove(self, coded: bytes, groups: dict[int, Array]) -> None:
        """Read back what was coded."""
        for drop, (count, planes) in _groups(coded, self._elements).items():
            if not np.array_equal(_joined(count, planes, groups[drop].dtype), groups[drop]):
                raise AssertionError(f"group {drop} of a residual does not come back")


@dataclass
class _Stream:
    """The values of one group, and how many of them are used."""

    values: Array
    used: int = 0

    def take(self, count: int) -> Array:
        if self.used + count > self.values.size:
            raise FormatError("the residual holds too few values")
        self.used += count
        return self.values[self.used - count : self.used]


class Decoder:
    """Gives back the bit patterns of W, tile by tile in the order of encoding."""

    def __init__(self, coded: bytes, dtype: str, total: int, elements: int) -> None:
        """Read a coded residual.

        Args:
            coded: what `Encoder.finish` returned.
            dtype: of the base's tensor.
            total: its number of elements.
            elements: the size of the largest tile.

        Raises:
            FormatError: it is malformed, or of a tensor with another number of elements.
        """
        self._drops = Drops(dtype, elements)
        self._position = 0
        kind = np.dtype(f"<u{_LAYOUT[dtype][0] // 8}")
        groups = _groups(coded, total)
        gaps = _joined(*groups.pop(_GAPS, (0, [])), np.dtype("<u8"))
        self._odd_places = np.cumsum(gaps, dtype=np.uint64).astype(np.int64)
        if gaps.size and not 0 <= self._odd_places[-1] < total:
            raise FormatError("the residual names an element beyond the tensor")
        self._streams = {
            drop: _Stream(_unzigzag(_joined(count, planes, kind)))
            for drop, (count, planes) in groups.items()
        }

    def restore(self, merged: Array, predicted: Array) -> None:
        """Turn the bit patterns of the next elements of P into those of W, given those of M.

        Raises:
            FormatError: the residual does not fit the tensor.
        """
        places, sizes = self._drops.find(merged, predicted)
        values = np.empty(places.size, predicted.dtype)
        for drop in np.flatnonzero(np.bincount(sizes)):
            chosen = sizes == drop
            values[chosen] = self._stream(int(drop)).take(int(np.count_nonzero(chosen)))
        predicted[places] += values
        end = self._position + predicted.size
        first, last = np.searchsorted(self._odd_places, (self._position, end))
        if last > first:
            odd = self._odd_places[first:last] - self._position
            predicted[odd] += self._stream(0).take(last - first)
        self._position = end

    def _stream(self, drop: int) -> _Stream:
        if drop not in self._streams:
            raise FormatError("the residual lacks a group of values")
        return self._streams[drop]

    def finish(self) -> None:
        """Raise FormatError unless every value was used."""
        if any(stream.used != stream.values.size for stream in self._streams.values()):
            raise FormatError("the residual holds too many values")


def _zigzag(values: Array) -> Array:
    """Unsigned numbers modulo 2^width, read as signed ones, small magnitudes first."""
    signed = values.view(f"<i{values.itemsize}")
    sign = (signed >> (8 * values.itemsize - 1)).view(values.dtype)
    coded: Array = (values << values.dtype.type(1)) ^ sign
    return coded


def _unzigzag(values: Array) -> Array:
    one = values.dtype.type(1)
    values = (values >> one) ^ (~(values & one) + one)
    return values


def _planes(values: Array) -> list[bytes]:
    """The byte planes of unsigned integers, lowest first, without empty high ones; compressed."""
    octets = np.ascontiguousarray(values).view(np.uint8).reshape(-1, values.itemsize)
    compressor = zstandard.ZstdCompressor(level=_LEVEL)
    planes = [np.ascontiguousarray(octets[:, place]) for place in range(values.itemsize)]
    while planes and not planes[-1].any():
        planes.pop()
    return [compressor.compress(plane.data) for plane in planes]


def _joined(count: int, planes: list[bytes], kind: np.dtype[Any]) -> Array:
    octets = np.zeros((count, kind.itemsize), np.uint8)
    if len(planes) > kind.itemsize:
        raise FormatError("the residual has too many byte planes")
    for place, plane in enumerate(planes):
        try:
            if zstandard.frame_content_size(plane) != count:
                raise FormatError("the residual has a byte plane of the wrong length")
            data = zstandard.ZstdDecompressor().decompress(plane)
        except zstandard.ZstdError as error:
            raise FormatError(f"the residual cannot be decompressed ({error})") from error
        octets[:, place] = np.frombuffer(data, np.uint8)
    return octets.reshape(-1).view(kind)


def _groups(coded: bytes, elements: int) -> dict[int, tuple[int, list[bytes]]]:
    """Drop -> number of values and their compressed planes."""
    found: dict[int, tuple[int, list[bytes]]] = {}
    try:
        size, number = _HEAD.unpack_from(coded)
        at = _HEAD.size
        for _ in range(number):
            drop, count, planes = _GROUP.unpack_from(coded, at)
            at += _GROUP.size
            parts = []
            for _ in range(planes):
                (length,) = _LENGTH.unpack_from(coded, at)
                at += _LENGTH.size
                parts.append(coded[at : at + length])
                at += length
            if drop in found or count > elements:
                raise FormatError("the residual contradicts itself")
            found[drop] = (count, parts)
    except struct.error as error:
        raise FormatError("the residual is cut short") from error
    if size != elements or at != len(coded):
        raise FormatError("the residual is of another tensor")
    return found


def distance(one: torch.Tensor, other: torch.Tensor) -> Array:
    """How many numbers of their type lie between two tensors' elements; flat, uint64.

    Both of one type and shape; +0 and -0 are neighbours.
    """
    left, right = (_ordered(bit_patterns(tensor.contiguous())) for tensor in (one, other))
    return np.where(left > right, left - right, right - left)


def _ordered(bits: Array) -> Array:
    """Bit patterns of floats as uint64 that ascend with the numbers."""
    width = 8 * bits.itemsize
    half = np.uint64(1 << (width - 1))
    wide = bits.astype(np.uint64)
    return np.where(wide >= half, np.uint64(2**width - 1) - wide, wide + half)
