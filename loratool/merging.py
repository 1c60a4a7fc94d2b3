"""The exact merge: W + delta, where every machine and order of work gives the same bits.

The delta comes in fp64, the same everywhere (`loratool.exact`, `loratool.deltas`). The sum with W
is rounded once, to nearest, ties to even.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import torch

from loratool.deltas import Delta
from loratool.errors import InputError
from loratool.linalg import is_finite, tiles
from loratool.rounding import TILE_ELEMENTS, Nearest, SumRounder


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
    delta: Delta,
    dtype: str,
    survival: Survival,
    name: str,
    rounder: SumRounder | None = None,
    witness: Witness | None = None,
) -> Iterator[torch.Tensor]:
    """Yield round(weight + delta) tile by tile, each some rows of the delta, in a reused buffer.

    Args:
        weight: of any shape and float dtype; read once, never written.
        delta: what is added, as a matrix of as many elements.
        dtype: the safetensors dtype of the result.
        survival: is set.
        name: what errors call the tensor.
        rounder: how to round to `dtype`; to nearest by default.
        witness: sees every tile. With it, values that are not finite are kept, all NaN as one.

    Raises:
        InputError: NaN or Inf in the weight, or a result that overflows `dtype`.
    """
    weight = weight.view(delta.shape)
    wanted = delta.squared_norm()
    survival.kept, survival.wanted = 0.0, wanted or 0.0
    elements = tile_elements(delta.shape)
    rounder = rounder or Nearest(dtype, elements)
    buffers = [torch.empty(elements, dtype=torch.float64) for _ in range(3)]
    for rows in tiles(weight, TILE_ELEMENTS):
        tile = weight[rows]
        w, d, s = (buffer[: tile.numel()] for buffer in buffers)
        w.view(tile.shape).copy_(tile)
        delta.rows(rows, d.view(tile.shape), w.view(tile.shape))
        if wanted is None:
            survival.wanted += float(torch.dot(d, d))
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
    merged: torch.Tensor, delta: Delta, dtype: str
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yield (merged, round(merged - delta)) tile by tile, each some rows of the delta.

    Args:
        merged: of any shape and float dtype, and values of any kind.
        delta: a matrix of as many elements, of linear updates alone.
        dtype: the safetensors dtype of the result.
    """
    merged = merged.view(delta.shape)
    elements = tile_elements(delta.shape)
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


def tile_elements(shape: tuple[int, int]) -> int:
    """The size of the largest tile of a matrix."""
    rows, columns = shape
    return min(rows, max(1, TILE_ELEMENTS // max(1, columns))) * columns


def _not_finite(weight: torch.Tensor, name: str, dtype: str) -> InputError:
    if not is_finite(weight):
        return InputError(f"{name}: the base holds NaN or Inf; a merge would keep it: repair it")
    return InputError(f"{name}: the merged values overflow {dtype}; choose a wider --dtype")
