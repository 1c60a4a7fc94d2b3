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
from typing import Protocol

import torch
from torch.nn.functional import pad

from loratool.errors import InputError
from loratool.linalg import is_finite, tiles
from loratool.rounding import TILE_ELEMENTS, Nearest, SumRounder


@dataclass(frozen=True)
class ExactDelta:
    """A delta whose entries are exact in fp64: the product left @ right.

    Attributes:
        left: (rows, K), fp64; every row is a multiple of a power of two of its own.
        right: (K, columns), fp64; likewise every column.
    """

    left: torch.Tensor
    right: torch.Tensor

    def rows(self, rows: slice, out: torch.Tensor) -> None:
        """Write some of the delta's rows to `out`, fp64."""
        torch.mm(self.left[rows], self.right, out=out)

    def squared_norm(self) -> float:
        """||delta||_F^2."""
        grams = (self.left.T @ self.left) * (self.right @ self.right.T)
        return max(0.0, float(grams.sum()))


def exact_delta(parts: Sequence[tuple[torch.Tensor, torch.Tensor, float]]) -> ExactDelta:
    """The sum of factor * B @ A over `parts`, as one exact product.

    Args:
        parts: (B (out, r), A (r, in), factor), factor being weight times scale.

    Returns:
        left (out, K) and right (K, in) with K the sum of the ranks, or one more.
    """
    left = torch.cat([b.double() * factor for b, _, factor in parts], dim=1)
    right = torch.cat([a.double() for _, a, _ in parts], dim=0)
    terms = left.shape[1]
    bits = (53 - math.ceil(math.log2(terms))) // 2 if terms > 1 else 26
    left, right = _fixed_point(left, 1, bits), _fixed_point(right, 0, bits)
    if bool((left == 0).any()) or bool((right == 0).any()):
        # A sum of products that are all -0 is -0 or +0, as the BLAS begins it. One +0 more decides.
        left, right = pad(left, (0, 1)), pad(right, (0, 0, 0, 1))
    return ExactDelta(left, right)


def _fixed_point(values: torch.Tensor, dim: int, bits: int) -> torch.Tensor:
    """Round every slice along `dim` to `bits` bits below the power of two above its maximum."""
    _, exponent = torch.frexp(values.abs().amax(dim=dim, keepdim=True))
    # Below this the products would be subnormal doubles, which are not exact: round them away.
    exponent = exponent.clamp(min=-480)
    shift = torch.full_like(exponent, bits) - exponent
    return torch.ldexp(torch.ldexp(values, shift).round(), -shift)


@dataclass
class Survival:
    """How much of an update survived rounding: <after - before, delta> and ||delta||^2 in fp64."""

    kept: float = 0.0
    wanted: float = 0.0


class Witness(Protocol):
    """Sees every tile of a merge, to remember the way back."""

    def see(
        self,
        base: torch.Tensor,
        merged: torch.Tensor,
        exact: torch.Tensor,
        delta: torch.Tensor,
        finite: bool,
    ) -> None:
        """Look at the next tile; it must not be changed.

        Args:
            base: the base's values, in their type.
            merged: (n,), the merged values, in theirs.
            exact: (n,), the merged values in fp64.
            delta: (n,), what was added to the base, in fp64.
            finite: whether all of `exact` is.
        """
        ...


def merged_blocks(
    weight: torch.Tensor,
    delta: ExactDelta,
    dtype: str,
    survival: Survival,
    name: str,
    rounder: SumRounder | None = None,
    witness: Witness | None = None,
) -> Iterator[torch.Tensor]:
    """Yield round(weight + delta) tile by tile along axis 0, each in a buffer that is reused.

    Args:
        weight: (rows, columns), any float dtype; read once, never written.
        delta: a product of the same shape.
        dtype: the safetensors dtype of the result.
        survival: is set.
        name: what errors call the tensor.
        rounder: how to round to `dtype`; to nearest by default.
        witness: sees every tile. With it, values that are not finite are kept, all NaN as one.

    Raises:
        InputError: NaN or Inf in the weight, or a result that overflows `dtype`.
    """
    survival.kept, survival.wanted = 0.0, delta.squared_norm()
    elements = tile_elements(weight)
    rounder = rounder or Nearest(dtype, elements)
    buffers = [torch.empty(elements, dtype=torch.float64) for _ in range(3)]
    for rows in tiles(weight, TILE_ELEMENTS):
        tile = weight[rows]
        w, d, s = (buffer[: tile.numel()] for buffer in buffers)
        w.view(tile.shape).copy_(tile)
        delta.rows(rows, d.view(tile.shape))
        torch.add(w, d, out=s)
        result = rounder.round(s, w, d)
        exact = s.copy_(result)
        change = torch.sub(exact, w, out=w)
        kept = float(torch.dot(change, d))
        finite = math.isfinite(kept)
        if not finite:
            if witness is None:
                raise _not_finite(tile, name, dtype)
            result.masked_fill_(exact.isnan(), math.nan)
            exact.copy_(result)
            kept = float(torch.dot(change.nan_to_num_(0.0, 0.0, 0.0), d))
        survival.kept += kept
        if witness is not None:
            witness.see(tile, result, exact, d, finite)
        yield result.view(tile.shape)


def subtracted_tiles(
    merged: torch.Tensor, delta: ExactDelta, dtype: str
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yield (merged, round(merged - delta)) tile by tile along axis 0, for values of any kind.

    Args:
        merged: (rows, columns), any float dtype.
        delta: a product of the same shape.
        dtype: the safetensors dtype of the result.
    """
    elements = tile_elements(merged)
    subtraction = Subtraction(dtype, elements)
    m, d = (torch.empty(elements, dtype=torch.float64) for _ in range(2))
    for rows in tiles(merged, TILE_ELEMENTS):
        tile = merged[rows]
        exact, part = m[: tile.numel()], d[: tile.numel()]
        exact.view(tile.shape).copy_(tile)
        delta.rows(rows, part.view(tile.shape))
        finite = math.isfinite(float(exact.sum()))
        yield tile, subtraction.round(exact, part, finite).view(tile.shape)


class Subtraction:
    """round(merged - delta), to nearest, the same on every machine; reuses its buffers."""

    def __init__(self, dtype: str, elements: int) -> None:
        self._rounder = Nearest(dtype, elements)
        self._total = torch.empty(elements, dtype=torch.float64)

    def round(self, merged: torch.Tensor, delta: torch.Tensor, finite: bool) -> torch.Tensor:
        """Round merged - delta, both (n,) fp64; a buffer that the next call overwrites.

        `finite` may only be True if all of `merged` is.
        """
        total = torch.sub(merged, delta, out=self._total[: merged.numel()])
        result = self._rounder.round(total, merged, delta, sign=-1)
        if not finite:
            result = result.masked_fill(total.isnan(), math.nan)  # NaN have many bit patterns
        return result


def tile_elements(matrix: torch.Tensor) -> int:
    """The size of the largest tile of a matrix."""
    rows, columns = matrix.shape
    return min(rows, max(1, TILE_ELEMENTS // max(1, columns))) * columns


def _not_finite(weight: torch.Tensor, name: str, dtype: str) -> InputError:
    if not is_finite(weight):
        return InputError(f"{name}: the base holds NaN or Inf; a merge would keep it: repair it")
    return InputError(f"{name}: the merged values overflow {dtype}; choose a wider --dtype")
