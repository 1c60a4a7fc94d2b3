"""Rounding a sum of doubles once, to nearest or at random, to the type that is stored.

torch casts fp64 to bf16, fp16 and fp8 through fp32, which rounds twice, and w + d was rounded to
fp64 before. Rounding is monotone, so that can only go wrong where the fp32 (for fp32: the fp64)
number lies exactly half way between two numbers of the narrow type. These few are found and
rounded again, with the rest that fp64 had to drop (TwoSum) to decide.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Protocol

import numpy as np
import torch

from loratool.dtypes import torch_dtype
from loratool.errors import InputError
from loratool.linalg import tiles

Array = np.ndarray[Any, np.dtype[Any]]

TILE_ELEMENTS = 1 << 18  # long enough operations that threads seldom wait for the interpreter

# dtype -> (bits of the significand with the hidden one, exponent of the smallest subnormal)
_PRECISION = {
    "F32": (24, -149),
    "F16": (11, -24),
    "BF16": (8, -133),
    "F8_E4M3": (4, -9),
    "F8_E5M2": (3, -16),
}
# fp16 has subnormals where fp32 has none: below this its half-way points have no fixed pattern.
_SMALLEST_NORMAL_F16 = 2.0**-14
_SMALLEST_NORMAL_F32 = 2.0**-126


class SumRounder(Protocol):
    """Rounds sums weight + delta, given with their rounding to fp64."""

    def round(
        self, total: torch.Tensor, weight: torch.Tensor, delta: torch.Tensor, sign: int = 1
    ) -> torch.Tensor:
        """Round weight + sign * delta; `total` is that sum in fp64.

        Args:
            total: (n,), fp64, n at most the size that the rounder was made for.
            weight: (n,), fp64.
            delta: (n,), fp64.
            sign: 1 or -1.

        Returns:
            (n,) in the rounder's type; a buffer that the next call overwrites.
        """
        ...


class Nearest:
    """To nearest, ties to even."""

    def __init__(self, dtype: str, elements: int) -> None:
        self._dtype = dtype
        self._single = torch.empty(elements, dtype=torch.float32)
        self._narrow = torch.empty(elements, dtype=torch_dtype(dtype))
        self._low = np.empty(elements, np.uint32)
        self._flags = np.empty(elements, np.bool_)

    def round(
        self, total: torch.Tensor, weight: torch.Tensor, delta: torch.Tensor, sign: int = 1
    ) -> torch.Tensor:
        """See `SumRounder`."""
        if self._dtype == "F64":
            return total
        size = total.numel()
        single = self._single[:size]
        single.copy_(total)
        narrow = single if self._dtype == "F32" else self._narrow[:size].copy_(single)
        where = self._doubtful(total, single)
        if where.size:
            t, w, d = (x.numpy()[where] for x in (total, weight, delta))
            _store(_nearest(t, w, d, sign, self._dtype), narrow, where, self._dtype)
        return narrow

    def _doubtful(self, total: torch.Tensor, single: torch.Tensor) -> Array:
        """Indices of all numbers that the casts may have rounded wrongly, and of some others."""
        flags = self._flags[: total.numel()]
        if self._dtype == "BF16":
            np.equal(self._low_bits(single, 16), 1 << 15, out=flags)
        elif self._dtype == "F16":
            np.equal(self._low_bits(single, 13), 1 << 12, out=flags)
            flags |= np.abs(single.numpy()) < _SMALLEST_NORMAL_F16
        elif self._dtype == "F32":
            np.equal(total.numpy().view(np.uint64) & 0x1FFF_FFFF, 1 << 28, out=flags)
            flags |= np.abs(single.numpy()) < _SMALLEST_NORMAL_F32
        else:
            flags[:] = True
        return np.flatnonzero(flags)

    def _low_bits(self, single: torch.Tensor, count: int) -> Array:
        low = self._low[: single.numel()]
        return np.bitwise_and(single.numpy().view(np.uint32), (1 << count) - 1, out=low)


class Stochastic:
    """Up or down at random, so that the expectation is the sum itself (Gupta et al., 2015)."""

    def __init__(self, dtype: str, generator: torch.Generator) -> None:
        self._dtype = dtype
        self._generator = generator

    def round(
        self, total: torch.Tensor, weight: torch.Tensor, delta: torch.Tensor, sign: int = 1
    ) -> torch.Tensor:
        """See `SumRounder`; what fp64 drops of the sum is not looked at."""
        chance = torch.randint(0, 1 << 24, total.shape, generator=self._generator)
        if self._dtype == "F64":
            return total
        bits, lowest = _PRECISION[self._dtype]
        exponents = torch.bitwise_and(total.view(torch.int64), 0x7FF << 52)
        exponents.clamp_(min=(lowest + bits - 1 + 1023) << 52)
        unit = exponents.sub_((bits - 1) << 52).view(torch.float64)
        # 24 random bits and those of the significand fit into a double, so that a number that the
        # narrow type can represent is never moved.
        rounded = (total / unit + chance.double() * 2.0**-24).floor_() * unit
        rounded = torch.where(total.isfinite(), rounded, total)
        return _cast(torch.copysign(rounded, total), self._dtype)


def _nearest(total: Array, weight: Array, delta: Array, sign: int, dtype: str) -> Array:
    """weight + sign * delta rounded once to `dtype`, as fp64; slow, and right everywhere.

    Adding and subtracting 1.5 * 2^52 units in the last place of the narrow type leaves the
    multiple of that unit nearest to the sum, in one fp64 rounding. Where `total` had been
    rounded to exactly half way between two such multiples, the rest that fp64 had to drop
    decides instead.

    In numpy, which keeps the interpreter's lock for small arrays: between two calls of torch the
    other threads would take it.
    """
    bits, lowest = _PRECISION[dtype]
    magic = total.view(np.int64) & (0x7FF << 52)
    np.maximum(magic, (lowest + bits - 1 + 1023) << 52, out=magic)  # subnormals share a unit
    finite = np.isfinite(total)
    magic[~finite] = 1023 << 52
    magic += ((53 - bits) << 52) | (1 << 51)
    shifter = magic.view(np.float64)
    with np.errstate(invalid="ignore"):  # Inf - Inf
        rounded = (total + shifter) - shifter
        # A tie is off by half a unit: 2^-53 / 1.5 of the shifter.
        ties = np.abs(total - rounded) * (1.5 * 2.0**53) == shifter
    if ties.any():
        delta = delta[ties] * sign
        rounded[ties] = _untied(total[ties], weight[ties], delta, rounded[ties], shifter[ties])
    return np.copysign(np.where(finite, rounded, total), total)  # -0 stays -0


def _untied(total: Array, weight: Array, delta: Array, rounded: Array, shifter: Array) -> Array:
    part = total - weight  # TwoSum (Knuth, TAOCP 2, section 4.2.2): the rest, exactly
    rest = (weight - (total - part)) + (delta - part)
    unit = shifter / (1.5 * 2.0**52)
    up = ((rest > 0) & (rounded < total)).astype(np.float64)
    down = ((rest < 0) & (rounded > total)).astype(np.float64)
    moved: Array = rounded + unit * (up - down)
    return moved


def _store(values: Array, narrow: torch.Tensor, where: Array, dtype: str) -> None:
    """Put fp64 values that `dtype` can represent, or that overflow it, into some places."""
    with np.errstate(over="ignore"):
        single = values.astype(np.float32)  # exact, and so is what follows
    if dtype == "BF16":
        narrow.view(torch.uint16).numpy()[where] = single.view(np.uint32) >> 16
    elif dtype in ("F16", "F32"):
        with np.errstate(over="ignore"):
            narrow.numpy()[where] = single
    else:
        narrow[torch.from_numpy(where)] = torch.from_numpy(single).to(narrow.dtype)


def _cast(values: torch.Tensor, dtype: str) -> torch.Tensor:
    """Cast fp64 values that `dtype` can represent; the detour over fp32 is then exact."""
    single = values.to(torch.float32)
    return single if dtype == "F32" else single.to(torch_dtype(dtype))


def round_to(values: torch.Tensor, dtype: str) -> torch.Tensor:
    """Round fp64 `values` of any shape once to a safetensors dtype, to nearest, ties to even."""
    if dtype == "F64":
        return values.clone()
    flat = values.reshape(-1)
    zero = torch.zeros(1, dtype=torch.float64).expand(flat.numel())
    return Nearest(dtype, flat.numel()).round(flat, flat, zero).view(values.shape)


def rounded_blocks(values: torch.Tensor, dtype: str, name: str) -> Iterator[torch.Tensor]:
    """Yield `values` rounded once to `dtype`, tile by tile.

    Raises:
        InputError: a finite value overflows `dtype`.
    """
    flat = values.reshape(-1)
    size = min(flat.numel(), TILE_ELEMENTS)
    rounder = Nearest(dtype, size)
    zero = torch.zeros(1, dtype=torch.float64).expand(size)
    for part in tiles(flat, TILE_ELEMENTS):
        tile = flat[part].double()
        result = rounder.round(tile, tile, zero[: tile.numel()])
        if bool((tile.isfinite() & ~result.double().isfinite()).any()):
            raise InputError(f"{name}: its values overflow {dtype}; choose a wider --dtype")
        yield result
