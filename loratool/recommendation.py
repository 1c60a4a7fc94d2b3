"""Which rank a difference deserves, what kind of change it looks like, and what it would cost."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from loratool.differences import Difference, shape_of
from loratool.dtypes import itemsize
from loratool.representation import Forms, forms_of
from loratool.representation import Spectrum as Known
from loratool.spectra import Range, captured, smallest_rank

Look = Literal["same", "merged_lora", "sparse", "full", "whole", "unknown"]

# A rank that keeps this share is enough; where none does, doubling it has to add this much.
ENOUGH, WORTH_DOUBLING = 0.9, 0.05
_STEP = 8
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
        factorizer: what to extract with, if not the usual one; else "".
        rank: the rank to extract with; None where there are no spectra.
        entries: the share of the entries to keep besides; None for none.
        energy: the share of the energy of all factored changes that they keep; of a sparse change
            estimated from samples.
        size: bytes of the adapter then, with what is kept whole.
        whole_size: bytes of that.
        is_blind: whether it may be a merged LoRA, too small beside rounding to look like one.
        forms: what the changed matrices take in other forms, but for experts; None of a merged
            LoRA, and where there are no spectra.
        rank_for: share -> smallest rank common to all that keeps it.
        kept: rank -> share of the energy that it keeps.
    """

    look: Look
    merged_rank: int | None = None
    factorizer: str = ""
    rank: int | None = None
    entries: float | None = None
    energy: float = 0.0
    size: int = 0
    whole_size: int = 0
    is_blind: bool = False
    forms: Forms | None = None
    rank_for: Mapping[float, Range] = field(default_factory=dict)
    kept: Mapping[int, float] = field(default_factory=dict)


def advise(differences: Sequence[Difference], largest: int) -> Advice:
    """Judge a model's differences; reads samples of some of those that are no merged LoRA.

    Args:
        differences: all of them.
        largest: the most singular values that were looked for.
    """
    changed = [d for d in differences if d.is_changed]
    factored = [d for d in changed if d.spectrum is not None]
    whole_size = sum(d.change.after.nbytes for d in changed if not d.change.factored)
    spectra = [d.spectrum for d in factored if d.spectrum is not None]
    total = math.fsum(s.total for s in spectra)
    if not spectra or not total:
        is_whole = not any(d.change.factored for d in changed)
        look: Look = "unknown" if not is_whole else "whole" if changed else "same"
        return Advice(look, size=whole_size, whole_size=whole_size)
    ranks = [2**power for power in range(11) if 2**power <= largest]
    kept = {
        rank: captured(spectra, rank).low / total
        for rank in ranks
        if any(rank < 2 * len(s.sigma) for s in spectra)
    }
    merged = _merged_rank(factored)
    rank_for = {share: smallest_rank(spectra, share) for share in (0.5, ENOUGH, 0.99)}
    rank = merged or min(_worthwhile(kept, rank_for[ENOUGH]), _most_above_noise(factored))
    forms = None if merged else _forms(factored)
    size = whole_size + factors_size(factored, rank)
    energy = captured(spectra, rank).low / total
    look, factorizer, entries = "full", "", None
    if merged:
        look = "merged_lora"
        is_rounded = all(d.change.after.dtype in ("BF16", "F16") for d in factored)
        factorizer = "rounding_cell" if is_rounded else ""
    elif forms is not None and forms.best == "sparse":
        look, rank, entries, energy = "sparse", 1, forms.entries, forms.share
        size = whole_size + factors_size(factored, 1) + forms.sparse
    return Advice(
        look,
        merged,
        factorizer,
        rank,
        entries,
        energy,
        size,
        whole_size,
        not merged and any(d.is_blind for d in factored),
        forms,
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


def _forms(factored: Sequence[Difference]) -> Forms | None:
    """What these changes take in every form; of experts only factors can be written."""
    known, tensors = {}, {}
    for difference in factored:
        found, change = difference.spectrum, difference.change
        if found is None or change.before is None or change.kind == "experts":
            continue
        leading = tuple(value * value for value in found.sigma)
        sides, size = shape_of(difference), _itemsize(difference)
        known[change.name] = Known(leading, found.total, found.known, sides, size)
        tensors[change.name] = change.before, change.after
    return forms_of(known, tensors)


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
