"""The exact merge: W + delta, where every machine and order of work gives the same bits.

The factors are rounded to fixed point so coarse that all partial sums of their product fit into
the 53 bits of a double. Then no order of additions, no number of threads and no fused
multiply-add can change the product; its error is that of one fp32 product, about 1e-7. The sum
with W is rounded once, to nearest, ties to even.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from loratool.dtypes import torch_dtype
from loratool.errors import InputError

_TILE_ELEMENTS = 1 << 17  # an fp64 tile of 1 MiB: a few of them stay in the L2 cache

# dtype -> (bits of the significand with the hidden one, exponent of the smallest subnormal)
_PRECISION = {
    "F32": (24, -149),
    "F16": (11, -24),
    "BF16": (8, -133),
    "F8_E4M3": (4, -9),
    "F8_E5M2": (3, -16),
}


@dataclass(frozen=True)
class ExactDelta:
    """A delta whose entries are exact in fp64: the product left @ right.

    Attributes:
        left: (rows, K), fp64; every row is a multiple of a power of two of its own.
        right: (K, columns), fp64; likewise every column.
    """

    left: torch.Tensor
    right: torch.Tensor


def exact_delta(parts: Sequence[tuple[torch.Tensor, torch.Tensor, float]]) -> ExactDelta:
    """The sum of factor * B @ A over `parts`, as one exact product.

    Args:
        parts: (B (out, r), A (r, in), factor), factor being weight times scale.

    Returns:
        left (out, K) and right (K, in) with K the sum of the ranks.
    """
    left = torch.cat([b.double() * factor for b, _, factor in parts], dim=1)
    right = torch.cat([a.double() for _, a, _ in parts], dim=0)
    terms = left.shape[1]
    bits = (53 - math.ceil(math.log2(terms))) // 2 if terms > 1 else 26
    return ExactDelta(_fixed_point(left, 1, bits), _fixed_point(right, 0, bits))


def _fixed_point(values: torch.Tensor, dim: int, bits: int) -> torch.Tensor:
    """Round every slice along `dim` to `bits` bits below the power of two above its maximum."""
    _, exponent = torch.frexp(values.abs().amax(dim=dim, keepdim=True))
    # Below this the products would be subnormal doubles, which are not exact: round them away.
    exponent = exponent.clamp(min=-480)
    shift = torch.full_like(exponent, bits) - exponent
    return torch.ldexp(torch.ldexp(values, shift).round(), -shift)


class _Rounder:
    """Rounds fp64 tiles to a narrower type, once, to nearest, ties to even; reuses its buffers."""

    def __init__(self, dtype: str, elements: int) -> None:
        self._bits, self._lowest = _PRECISION[dtype]
        self._magic = torch.empty(elements, dtype=torch.int64)
        self._rounded = torch.empty(elements, dtype=torch.float64)
        self._off = torch.empty(elements, dtype=torch.float64)

    def round(self, total: torch.Tensor, weight: torch.Tensor, delta: torch.Tensor) -> torch.Tensor:
        """Round weight + delta; `total` is their fp64 sum. All three are flat and of one size.

        Adding and subtracting 1.5 * 2^52 units in the last place of the narrow type leaves the
        multiple of that unit nearest to the sum, in one fp64 rounding. Where `total` had been
        rounded to exactly half way between two such multiples, the rest that fp64 had to drop
        decides instead.
        """
        size = total.numel()
        magic, rounded = self._magic[:size], self._rounded[:size]
        torch.bitwise_and(total.view(torch.int64), 0x7FF << 52, out=magic)
        magic.clamp_(min=(self._lowest + self._bits - 1 + 1023) << 52)  # subnormals share a unit
        magic.add_(((53 - self._bits) << 52) | (1 << 51))
        shifter = magic.view(torch.float64)
        torch.add(total, shifter, out=rounded)
        rounded.sub_(shifter)
        self._break_ties(total, weight, delta, rounded, shifter)
        return torch.copysign(rounded, total, out=rounded)  # -0 stays -0

    def _break_ties(
        self,
        total: torch.Tensor,
        weight: torch.Tensor,
        delta: torch.Tensor,
        rounded: torch.Tensor,
        shifter: torch.Tensor,
    ) -> None:
        unit = shifter  # 1.5 * 2^52 units; a tie is off by half a unit: 2^-53 / 1.5 of it
        off = torch.sub(total, rounded, out=self._off[: total.numel()])
        ties = off.abs_().mul_(1.5 * 2.0**53).eq(unit)
        if not bool(ties.any()):
            return
        where = ties.nonzero().squeeze(1)
        s, w, d, r = total[where], weight[where], delta[where], rounded[where]
        part = s - w  # TwoSum (Knuth, TAOCP 2, section 4.2.2): rest = w + d - s, exactly
        rest = (w - (s - part)) + (d - part)
        half = shifter[where] * (2.0**-53 / 1.5)
        rounded[where] = torch.where(rest == 0, r, s + torch.copysign(half, rest))


def round_to(values: torch.Tensor, dtype: str) -> torch.Tensor:
    """Round fp64 `values` once to a safetensors dtype, to nearest, ties to even.

    torch casts fp64 to bf16, fp16 and fp8 through fp32, which rounds twice.
    """
    flat = values.reshape(-1)
    if dtype != "F64":
        zero = torch.zeros_like(flat)
        flat = _Rounder(dtype, flat.numel()).round(flat, flat, zero)
    return narrow(flat, dtype).view(values.shape)


def narrow(values: torch.Tensor, dtype: str) -> torch.Tensor:
    """Cast fp64 values that `dtype` can represent; the detour over fp32 is then exact."""
    if dtype == "F64":
        return values.clone()
    single = values.to(torch.float32)
    return single if dtype == "F32" else single.to(torch_dtype(dtype))


@dataclass
class Survival:
    """How much of an update survived rounding: <after - before, delta> and ||delta||^2 in fp64."""

    kept: float = 0.0
    wanted: float = 0.0


def merged_blocks(
    weight: torch.Tensor, delta: ExactDelta, dtype: str, survival: Survival, name: str
) -> Iterator[torch.Tensor]:
    """Yield round(weight + delta) tile by tile along axis 0.

    Args:
        weight: (rows, columns), any float dtype; read once, never written.
        delta: a product of the same shape.
        dtype: the safetensors dtype of the result.
        survival: is added to.
        name: what errors call the tensor.

    Raises:
        InputError: NaN or Inf in the weight, or a result that overflows `dtype`.
    """
    rows, columns = weight.shape
    step = max(1, _TILE_ELEMENTS // max(1, columns))
    elements = min(step, rows) * columns
    rounder = None if dtype == "F64" else _Rounder(dtype, elements)
    buffers = [torch.empty(elements, dtype=torch.float64) for _ in range(3)]
    for start in range(0, rows, step):
        tile = weight[start : start + step]
        size = tile.numel()
        w, d, s = (buffer[:size] for buffer in buffers)
        w.view(tile.shape).copy_(tile)
        torch.mm(delta.left[start : start + step], delta.right, out=d.view(tile.shape))
        torch.add(w, d, out=s)
        rounded = s if rounder is None else rounder.round(s, w, d)
        _check_finite(rounded, w, name, dtype)
        result = narrow(rounded, dtype)
        survival.wanted += float(torch.dot(d, d))
        survival.kept += float(torch.dot(rounded.sub_(w), d))
        yield result.view(tile.shape)


def rounded_blocks(values: torch.Tensor, dtype: str, name: str) -> Iterator[torch.Tensor]:
    """Yield `values` rounded once to `dtype`, tile by tile along axis 0.

    Raises:
        InputError: a finite value overflows `dtype`.
    """
    flat = values.reshape(-1)
    for start in range(0, flat.numel(), _TILE_ELEMENTS):
        tile = flat[start : start + _TILE_ELEMENTS]
        result = round_to(tile.double(), dtype)
        if bool((torch.isfinite(tile.float()) & ~torch.isfinite(result.float())).any()):
            raise InputError(f"{name}: its values overflow {dtype}; choose a wider --dtype")
        yield result


def _check_finite(rounded: torch.Tensor, weight: torch.Tensor, name: str, dtype: str) -> None:
    if not rounded.numel():
        return
    low, high = torch.aminmax(rounded)  # one pass, and NaN comes through
    if max(-float(low), float(high)) <= torch.finfo(torch_dtype(dtype)).max:
        return
    if not bool(torch.isfinite(weight).all()):
        raise InputError(f"{name}: the base holds NaN or Inf; a merge would keep it: repair it")
    raise InputError(f"{name}: the merged values overflow {dtype}; choose a wider --dtype")
