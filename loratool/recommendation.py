"""Which rank a difference deserves, what kind of change it looks like, and what it would cost."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from loratool.differences import Difference, shape_of
from loratool.dtypes import itemsize
from loratool.spectra import Range, captured, smallest_rank

Look = Literal["same", "merged_lora", "sparse", "full", "whole", "unknown"]

# A rank that keeps this share is enough; where none does, doubling it has to add this much.
ENOUGH, WORTH_DOUBLING = 0.9, 0.05
_STEP = 8
# A change of fewer weights than this may be sparse.
_FEW = 0.35
# A place in a sparse matrix takes an index of so many bytes beside its value.
_INDEX = 4
# So much of the energy has to be of one kind before a model is said to be.
_MOST = 0.9


@dataclass(frozen=True)
class Advice:
    """What to do with a difference.

    Attributes:
        look: what it looks like: "same" (nothing differs), "merged_lora", "sparse", "full" (full
            fine-tuning), "whole" (only tensors that factors cannot express), or "unknown" (no
            spectra).
        merged_rank: the rank of the LoRA, if it looks like one.
        rank: the rank to extract with; None where there are no spectra.
        energy: the share of the energy of all factored changes that it keeps.
        size: bytes of the adapter at that rank, with what is kept whole.
        whole_size: bytes of that.
        sparse_size: bytes of all changed entries of the factored changes, as values and indices.
        rank_for: share -> smallest rank common to all that keeps it.
        kept: rank -> share of the energy that it keeps.
    """

    look: Look
    merged_rank: int | None
    rank: int | None
    energy: float
    size: int
    whole_size: int
    sparse_size: int
    rank_for: dict[float, Range]
    kept: dict[int, float]


def advise(differences: Sequence[Difference], largest: int) -> Advice:
    """Judge a model's differences.

    Args:
        differences: all of them.
        largest: the most singular values that were looked for.
    """
    changed = [d for d in differences if d.is_changed]
    factored = [d for d in changed if d.spectrum is not None]
    whole_size = sum(d.change.after.nbytes for d in changed if not d.change.factored)
    sparse = sum(d.changed * (_itemsize(d) + _INDEX) for d in changed if d.change.factored)
    spectra = [d.spectrum for d in factored if d.spectrum is not None]
    total = math.fsum(s.total for s in spectra)
    if not spectra or not total:
        is_whole = not any(d.change.factored for d in changed)
        look: Look = "unknown" if not is_whole else "whole" if changed else "same"
        return Advice(look, None, None, 0.0, whole_size, whole_size, sparse, {}, {})
    ranks = [2**power for power in range(11) if 2**power <= largest]
    kept = {
        rank: captured(spectra, rank).low / total
        for rank in ranks
        if any(rank < 2 * len(s.sigma) for s in spectra)
    }
    merged = _merged_rank(factored)
    rank_for = {share: smallest_rank(spectra, share) for share in (0.5, ENOUGH, 0.99)}
    rank = merged or min(_worthwhile(kept, rank_for[ENOUGH]), _most_above_noise(factored))
    needed = rank_for[ENOUGH].low
    if merged:
        look = "merged_lora"
    elif _is_few(factored) and sparse < factors_size(factored, int(needed)):
        look = "sparse"
    else:
        look = "full"
    size = whole_size + factors_size(factored, rank)
    return Advice(
        look,
        merged,
        rank,
        captured(spectra, rank).low / total,
        size,
        whole_size,
        sparse,
        rank_for,
        kept,
    )


def _most_above_noise(factored: Sequence[Difference]) -> int:
    """The most singular values of a matrix that are more than rounding; at least 1."""
    above = [d.spectrum.above(d.edge).high for d in factored if d.spectrum is not None]
    return max(1, int(max(above)))


def factors_size(factored: Sequence[Difference], rank: int) -> int:
    """Bytes of the factors of all these changes, in the type that extract gives them."""
    return sum(
        min(rank, *shape_of(d)) * sum(shape_of(d)) * _experts(d) * _itemsize(d) for d in factored
    )


def _experts(difference: Difference) -> int:
    return difference.change.after.shape[0] if difference.change.kind == "experts" else 1


def _itemsize(difference: Difference) -> int:
    before = difference.change.before
    return itemsize("BF16" if before is not None and before.dtype == "BF16" else "F32")


def _is_few(factored: Sequence[Difference]) -> bool:
    return sum(d.changed for d in factored) < _FEW * sum(d.elements for d in factored)


def _merged_rank(factored: Sequence[Difference]) -> int | None:
    """The most common rank of what looks like merged LoRA, if most of the energy does."""
    total = math.fsum(d.energy for d in factored)
    ranks: Counter[int] = Counter()
    for difference in factored:
        if rank := difference.merged_rank:
            ranks[rank] += 1
            total -= difference.energy
    if not ranks or total > (1 - _MOST) * math.fsum(d.energy for d in factored):
        return None
    most = max(ranks.values())
    return max(rank for rank, count in ranks.items() if count == most)


def _worthwhile(kept: dict[int, float], needed: Range) -> int:
    """A rank that keeps enough, or the largest whose doubling was worth it.

    Above 8 the former is rounded up to a multiple of 8, as products of such sizes are fast.
    """
    before, chosen = 0.0, 1
    for rank, share in kept.items():
        if share - before >= WORTH_DOUBLING:
            chosen = rank
        if share >= ENOUGH and needed.is_exact:
            fitting = rank if rank <= _STEP else -(-int(needed.low) // _STEP) * _STEP
            return min(chosen, fitting) if share - before < WORTH_DOUBLING else fitting
        before = share
    return chosen
