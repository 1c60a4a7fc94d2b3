"""Strength and type of updates that no rank can be cut of: biases, full deltas, LoHa and LoKr."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from loratool.deltas import delta_of
from loratool.dtypes import torch_dtype
from loratool.linalg import Certificate
from loratool.rounding import TILE_ELEMENTS
from loratool.updates import Dense, LoHa, LoKr, LowRank, Product, Sparse, Update

Unfactored = Dense | LoHa | LoKr


def times(update: Unfactored, factor: float) -> Unfactored:
    """`factor` times the delta, exactly: its size goes into the scale, its sign into a tensor."""
    scale = update.scale * abs(factor)
    if factor >= 0:
        return replace(update, scale=scale)
    if isinstance(update, Dense):
        return Dense(_negative(update.values), scale)
    return replace(update, one=replace(update.one, left=_negative(update.one.left)), scale=scale)


def _negative(values: torch.Tensor) -> torch.Tensor:
    # torch negates no numbers of 8 bits
    return -values if values.itemsize > 1 else (-values.float()).to(values.dtype)


def under_scale(update: Dense, scale: float, dtype: torch.dtype | None = None) -> Dense:
    """The same delta under another scale, the rest worked into its values.

    Args:
        update: any shape.
        scale: not 0.
        dtype: of the values; None for theirs.
    """
    dtype = dtype or update.values.dtype
    if update.scale == scale and dtype == update.values.dtype:
        return update
    return Dense((update.values.double() * (update.scale / scale)).to(dtype), scale)


def in_dtype(update: Unfactored, dtype: str) -> Unfactored:
    """The update with all its tensors rounded to a safetensors dtype."""
    kind = torch_dtype(dtype)
    if isinstance(update, Dense):
        return replace(update, values=update.values.to(kind))
    one, other = (_in_dtype(product, kind) for product in (update.one, update.other))
    return replace(update, one=one, other=other)


def _in_dtype(product: Product, dtype: torch.dtype) -> Product:
    right, core = (None if t is None else t.to(dtype) for t in (product.right, product.core))
    return Product(product.left.to(dtype), right, core)


def rounding(before: Unfactored, after: Unfactored, shape: Sequence[int]) -> Certificate:
    """What was lost from one to the other, computed row by row.

    Args:
        before: the delta that is wanted.
        after: what became of it.
        shape: of the weight.
    """
    lost = squared_norm([(before, 1.0), (after, -1.0)], shape)
    total = squared_norm([(before, 1.0)], shape)
    return Certificate(0, total, total, rounding=lost, optimum_bound=total, method="rounded")


def squared_norm(
    parts: Sequence[tuple[LowRank | Sparse | Unfactored, float]], shape: Sequence[int]
) -> float:
    """||delta||_F^2 of a weighted sum of updates of one weight, in fp64.

    Args:
        parts: updates and weights.
        shape: of the weight.
    """
    delta = delta_of(parts, shape)
    known = delta.squared_norm()
    if known is not None:
        return known
    step = max(1, TILE_ELEMENTS // max(1, delta.shape[1]))
    total = 0.0
    for start in range(0, delta.shape[0], step):
        rows = slice(start, min(start + step, delta.shape[0]))
        tile = torch.empty(rows.stop - start, delta.shape[1], dtype=torch.float64)
        delta.rows(rows, tile)
        total += float(tile.square_().sum())
    return total


def rank_of(update: Update) -> int | None:
    """The rank that an update's scale alpha / rank divides by, where its tensors tell one."""
    found = getattr(update, "added", update)
    if isinstance(found, LoHa | LoKr):
        sides = (found.one, found.other) if isinstance(found, LoHa) else (found.other, found.one)
        ranks = (int(side.left.shape[1]) for side in sides if side.right is not None)
        return next(ranks, None)
    rank: int | None = getattr(found, "rank", None)
    return rank
