"""Whether a merged tensor holds an update that is no low-rank one: by computing what it should be.

Unlike `loratool.proof`, which finds the strength and the way of rounding by itself, this compares
with the merge at the expected strength, up to the few units in the last place by which peers that
add in narrower types differ.
"""

from __future__ import annotations

import math

import torch

from loratool.application import Rounding, load_added, with_rows
from loratool.binding import BoundUpdate
from loratool.checkpoint import LazyTensor
from loratool.deltas import delta_of
from loratool.dtypes import torch_dtype
from loratool.linalg import tiles
from loratool.merging import Survival, merged_blocks, tile_elements
from loratool.proof import Finding
from loratool.rounding import TILE_ELEMENTS
from loratool.updates import IA3, DoRA

# Adding in the weight's own type, factors rounded to it first, is off by some units of the sum and
# by this share of the delta.
_UNITS = 4
_SHARE_OF_DELTA = 2.0**-6


def judge_computed(
    merged: LazyTensor, base: LazyTensor, bound: BoundUpdate, strength: float
) -> Finding | None:
    """The verdict on one tensor; None if the update turns out to be nothing.

    Args:
        merged: a tensor of the base's shape.
        base: what the update was added to.
        bound: the update, of any kind but low-rank ones and replacements.
        strength: at which it should have been added.

    Raises:
        InputError: NaN or Inf in the base or the update.
    """
    before, after = base.read(), merged.read()
    if bound.update.kind == "rows":
        wanted = with_rows(base, [bound]).read().to(torch_dtype(merged.dtype))
        changed = int((wanted != before).sum())
        return _verdict(changed, int((after != before).sum()), int((after != wanted).sum()), after)
    update = load_added(bound)
    if update is None:
        return None
    if isinstance(update, DoRA | IA3) and strength != 1:
        return Finding("cannot be told", "an update of this kind has no strength")
    delta = delta_of([(update, strength)], base.shape, before)
    rounder = Rounding().rounder(merged.dtype, merged.name, tile_elements(delta.shape))
    name = f"{base.origin}: {base.name}"
    before, after = before.view(delta.shape), after.view(delta.shape)
    tiled = tiles(before, TILE_ELEMENTS)
    changed = moved = wrong = 0
    wanted_tiles = merged_blocks(before, delta, merged.dtype, Survival(), name, rounder)
    for rows, wanted in zip(tiled, wanted_tiles, strict=True):
        here, there = before[rows].to(wanted.dtype), after[rows]
        changed += int((wanted != here).sum())
        moved += int((there != here).sum())
        wrong += int((~_close(wanted, there, here)).sum())
    return _verdict(changed, moved, wrong, after)


def _close(wanted: torch.Tensor, found: torch.Tensor, base: torch.Tensor) -> torch.Tensor:
    """Where a value is what a merge by anybody may give."""
    target, value, before = wanted.double(), found.double(), base.double()
    unit = torch.finfo(wanted.dtype).eps * torch.maximum(target.abs(), before.abs())
    return (value - target).abs() <= _UNITS * unit + _SHARE_OF_DELTA * (target - before).abs()


def _verdict(changed: int, moved: int, wrong: int, merged: torch.Tensor) -> Finding:
    """From the numbers of weights that should differ from the base, do, and are wrong."""
    if not wrong and not changed:
        return Finding("cannot be told", "rounding leaves nothing of the update")
    if not wrong:
        return Finding("applied", "what the update makes of the base", contained=True)
    if not moved:
        return Finding("not applied", "still the base's tensor")
    total = math.prod(merged.shape)
    return Finding("other changes", f"{wrong:,} of {total:,} values are not what the update gives")
