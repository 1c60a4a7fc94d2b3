"""Whether a fine-tune looks like a merged LoRA whose sum was rounded to bf16 or fp16.

Such a fine-tune differs from its base by a matrix of low rank and by rounding, whose energy is
known: a sum that is rounded to units in the last place u is off by u^2 / 12 on average, or by less
where most changes are too small to move a weight. So what the best matrix of that rank does not
capture has at most this energy, while of a full fine-tune more is left. The test costs one look at
the values, but says nothing where the whole change is no more than rounding.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import blake3

from loratool.linalg import Certificate, tiles
from loratool.spectra import RESOLUTION

if TYPE_CHECKING:
    import torch

    from loratool.updates import LowRank, Sparse

# Certificate.method of a matrix found in the rounding cells.
RECOVERED = "rounding-cell"
# Rounding leaves up to 1.04 times what is expected; full fine-tunes leave 1.5 and more.
_PASSES = 1.2
# Of the smaller side: beyond this rank little is left of anything.
_LARGEST_SHARE = 0.25
# The next singular value of a LoRA that was merged is smaller by this factor at least.
_GAP = 1.3
_COARSE = {"torch.bfloat16": "bf16", "torch.float16": "fp16"}
_EXPONENT_BITS = 0x7F800000  # of fp32
# Processor time of a recovery, a weight: 0.3 to 1.4 in benchmarks/rounding_cell.py.
_SECONDS = 1e-6


@dataclass(frozen=True)
class Gate:
    """The test on one matrix.

    Attributes:
        ratio: energy left over beyond a rank, in units of the energy expected of rounding alone.
        whole: the same of the whole change, as if the rank were 0.
        rank: that rank.
    """

    ratio: float
    whole: float
    rank: int

    @property
    def passed(self) -> bool:
        """Whether a matrix of this rank and rounding explain the change."""
        return self.ratio <= _PASSES

    @property
    def is_blind(self) -> bool:
        """Whether rounding alone explains it, so that nothing follows from having passed."""
        return self.whole <= _PASSES


@dataclass(frozen=True)
class Suspicion:
    """That a fine-tune is a merged, rounded LoRA.

    Attributes:
        gates: name -> the test on each matrix that was looked at; all passed.
        dtype: "bf16" or "fp16".
        weights: how many weights are in the matrices that it may be the LoRA of.
    """

    gates: Mapping[str, Gate]
    dtype: str
    weights: int

    @property
    def rank(self) -> int:
        """The power of two that explains all matrices that were looked at."""
        return 1 << (max(gate.rank for gate in self.gates.values()) - 1).bit_length()

    @property
    def is_blind(self) -> bool:
        """Whether the changes are too small for the test to mean much."""
        return any(gate.is_blind for gate in self.gates.values())


def is_coarse(values: torch.Tensor) -> bool:
    """Whether `values` are of a type whose rounding hides much of a small change."""
    return str(values.dtype) in _COARSE


def rounding_energy(after: torch.Tensor) -> float:
    """Sum of u^2 / 12 over `after` (any shape and float type), u its units in the last place."""
    import torch

    format = torch.finfo(after.dtype)
    least = max(format.smallest_normal, torch.finfo(torch.float32).smallest_normal)
    total = 0.0
    for part in tiles(after):
        exponents = after[part].float().view(torch.int32).bitwise_and_(_EXPONENT_BITS)
        powers = exponents.view(torch.float32).clamp_(min=least)
        total += float(torch.linalg.vector_norm(powers, dtype=torch.float64)) ** 2
    return float(total * format.eps**2 / 12)


def gate(after: torch.Tensor, total: float, captured: float, rank: int) -> Gate:
    """Test one matrix.

    Args:
        after: (out, in), the fine-tune's values.
        total: ||delta||_F^2.
        captured: the part of it that the best matrix of rank `rank` captures.
        rank: that rank, less than either side.
    """
    return _gate(rounding_energy(after), (after.shape[0], after.shape[1]), total, captured, rank)


def gates(after: torch.Tensor, total: float, energies: Sequence[float]) -> list[Gate]:
    """Test one matrix at every rank from 1 to the number of known squared singular values.

    Args:
        after: (out, in), the fine-tune's values.
        total: ||delta||_F^2.
        energies: the leading squared singular values of the delta, descending.
    """
    noise, shape = rounding_energy(after), (after.shape[0], after.shape[1])
    found, captured = [], 0.0
    for rank, energy in enumerate(energies, 1):
        if rank > _LARGEST_SHARE * min(shape):
            break
        captured += energy
        found.append(_gate(noise, shape, total, captured, rank))
    return found


def _gate(noise: float, shape: tuple[int, int], total: float, captured: float, rank: int) -> Gate:
    rows, columns = shape
    # The matrix of rank r takes its share of the rounding, too.
    left = noise * (rows - rank) * (columns - rank) / (rows * columns)
    if noise <= 0:
        return Gate(0.0, 0.0, rank)
    missing = total - captured
    missing = missing if missing > RESOLUTION * total else 0.0
    return Gate(missing / left if left > 0 else 0.0, total / noise, rank)


def first_passed(found: Iterable[Gate]) -> Gate | None:
    """The first of several tests, of ascending ranks, that is passed."""
    return next((gate for gate in found if gate.passed), None)


def merged_rank(found: Sequence[Gate], sigma: Sequence[float], above: int) -> int | None:
    """The rank at which a merged LoRA ends and rounding begins.

    The first rank that passes may be too low where the errors are as large as the update, and more
    values may stand above their edge than it has; the widest gap between two values from the one
    to the other decides.

    Args:
        found: the tests of a matrix at the ranks from 1 on.
        sigma: its leading singular values, descending; at least as many.
        above: how many of them are larger than those of rounding alone.

    Returns:
        None if no test is passed, or if no gap shows where the update ends.
    """
    first = first_passed(found)
    if first is None:
        return None
    last = max(first.rank, min(len(found), above))
    best = max(range(first.rank, last + 1), key=lambda rank: _gap(sigma, rank))
    return best if _gap(sigma, best) >= _GAP else None


def _gap(sigma: Sequence[float], rank: int) -> float:
    """By how much the next singular value is smaller."""
    rest = sigma[rank : rank + 1]
    return sigma[rank - 1] / rest[0] if rest and rest[0] > 0 else math.inf


def suspected(
    samples: Iterable[tuple[str, torch.Tensor, float, Sequence[float]]], weights: int
) -> Suspicion | None:
    """What a few matrices of a fine-tune say; None unless all of them pass.

    Args:
        samples: name, values of the fine-tune (out, in), ||delta||_F^2, and the leading squared
            singular values of the delta.
        weights: how many weights are in all matrices that changed.
    """
    found: dict[str, Gate] = {}
    dtypes = set()
    for name, after, total, energies in samples:
        if not is_coarse(after):
            return None
        first = first_passed(gates(after, total, energies))
        if first is None:
            return None
        found[name] = first
        dtypes.add(_COARSE[str(after.dtype)])
    return Suspicion(found, " and ".join(sorted(dtypes)), weights) if found else None


def in_any_order(names: Iterable[str]) -> list[str]:
    """Names in an order that is theirs alone, and has nothing to do with layers."""
    return sorted(names, key=lambda name: blake3.blake3(name.encode()).digest(8))


def suspicion_facts(found: Suspicion | None) -> dict[str, Any]:
    """A suspicion for the manifest; empty if there is none."""
    if found is None:
        return {}
    ratios = {name: gate.ratio for name, gate in found.gates.items()}
    return {
        "looks_like": {
            "merged_lora_of_about_rank": found.rank,
            "rounded_to": found.dtype,
            "left_over_in_units_of_rounding": ratios,
            "too_small_to_tell": found.is_blind,
        }
    }


def suspicion_lines(found: Suspicion | None, otherwise: str = "") -> list[str]:
    """A suspicion in words, and what can be done; nothing if there is none.

    Args:
        found: the suspicion.
        otherwise: what else it may be, and what to do then, where the test is blind.
    """
    if found is None:
        return []
    what = f"a merged LoRA of about rank {found.rank}, rounded to {found.dtype}"
    cost = _duration(found.weights * _SECONDS)
    if found.is_blind and otherwise:
        return [
            "the change is too small to tell without trying: it is a merged LoRA, which "
            f"`--factorizer auto` recovers in about {cost} of processor time, or {otherwise}"
        ]
    if found.is_blind:
        return [
            f"perhaps {what}: the change is too small to tell without trying, which "
            f"`--factorizer auto` does; recovering it takes about {cost} of processor time"
        ]
    return [
        f"looks like {what}: `--factorizer rounding_cell` finds factors 5 to 100 times closer to "
        f"it (the larger the matrices, the closer), in about {cost} of processor time"
    ]


def _duration(seconds: float) -> str:
    if seconds < 100:
        return f"{max(1, math.ceil(seconds))} s"
    return f"{math.ceil(seconds / 60)} min" if seconds < 6000 else f"{seconds / 3600:.0f} h"


def is_recovered(update: LowRank | Sparse | None) -> bool:
    """Whether an update's factors were found in rounding cells."""
    certificate = update.certificate if update is not None else None
    return certificate is not None and certificate.method == RECOVERED


def recovery_together(certificates: Iterable[Certificate]) -> dict[str, Any]:
    """`Certificate.details` of several matrices that make one tensor, as far as they are this."""
    tried = [c.details["recovery"] for c in certificates if "recovery" in c.details]
    accepted = [facts for facts in tried if not facts.get("refused")]
    if not accepted:
        return {"recovery": tried[0]} if tried else {}
    worst = min(accepted, key=lambda facts: float(facts["held_out"]))
    rank = max(facts["rank"] for facts in accepted)
    return {"recovery": {**worst, "rank": rank, "matrices": [len(accepted), len(tried)]}}


def recovery_lines(certificates: Mapping[str, Certificate]) -> list[str]:
    """What became of recovering a merged LoRA, in words; nothing if it was not tried."""
    tried = [c.details["recovery"] for c in certificates.values() if "recovery" in c.details]
    if not tried:
        return []
    accepted = [facts for facts in tried if not facts.get("refused")]
    lines = []
    if accepted:
        shares = [facts["held_out"] for facts in accepted]
        ranks = sorted({facts["rank"] for facts in accepted})
        spread = f"{ranks[0]}" if len(ranks) == 1 else f"{ranks[0]} to {ranks[-1]}"
        lines.append(
            f"recovered as a merged, rounded LoRA: {len(accepted)} of {len(tried)} matrices, rank "
            f"{spread}, {min(shares):.0%} to {max(shares):.0%} of the held-out weights predicted; "
            "what they do not capture of ||delta||^2 is mostly the merge's rounding"
        )
    reasons = Counter(facts["refused"] for facts in tried if facts.get("refused"))
    for reason, count in sorted(reasons.items()):
        lines.append(f"not recovered, plain truncated SVD: {count} of {len(tried)} ({reason})")
    return lines
