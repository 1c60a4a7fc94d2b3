"""How many bytes a change of weights takes: as low rank, as single entries, or as it is.

Reinforcement learning often changes few weights, and these at full rank; full fine-tuning changes
all at nearly full rank. For neither is LoRA the right form, and this tells.

What a factorization does not know is bounded, never guessed: with singular values sigma_i, the
rank k that holds the energy E beyond the first r values satisfies k - r >= E^2 / sum_{i>r}
sigma_i^4 (Cauchy-Schwarz) and k - r >= E / sigma_{r+1}^2. Entries are counted in samples of rows.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from loratool.checkpoint import LazyTensor
from loratool.gaps import expected_bytes
from loratool.linalg import Certificate, named_generator, tiles
from loratool.reports import format_bytes, format_share
from loratool.tiling import difference
from loratool.updates import LowRank, Sparse, matrix_shape

if TYPE_CHECKING:
    import torch

SHARE = 0.9  # of the energy, which all forms are compared at

Form = Literal["low_rank", "sparse", "dense"]

_SAMPLES = 8  # matrices that are looked at
_SAMPLE_ELEMENTS = 1 << 16  # of each
_PROBES = 16  # random vectors of a moment of the spectrum
_MOMENTS = 2  # matrices whose moment is estimated, of at most so many elements
_MOMENT_ELEMENTS = 1 << 25
# Sparse must be so much smaller than low rank, and such a share of the whole delta (of Gaussian
# noise, 44% of the entries hold 90%), to be called the better form; and low rank must be so much of
# the whole delta that neither is one.
_CLEARLY, _HALF = 1.5, 0.5
_NEARLY = 0.75


@dataclass(frozen=True)
class Spectrum:
    """What a factorization knows of a delta's singular values.

    Attributes:
        leading: the first squared singular values, descending.
        total: the sum of all squares.
        bound: an upper bound of the sum of as many leading squares.
        sides: (rows, columns) of the matrix.
        itemsize: bytes of an element of the factors.
    """

    leading: tuple[float, ...]
    total: float
    bound: float
    sides: tuple[int, int]
    itemsize: int

    @property
    def elements(self) -> int:
        """Of the matrix."""
        return math.prod(self.sides)

    def rank_needed(self, share: float = SHARE, fourth: float | None = None) -> tuple[int, bool]:
        """The rank that captures a share of the energy, and whether that is known.

        Args:
            share: of the total, below 1.
            fourth: the sum of the fourth powers of all singular values, if that is known.

        Returns:
            The smallest such rank; or a lower bound of it, and False.
        """
        wanted, found = share * self.total, 0.0
        for number, square in enumerate(self.leading, 1):
            found += square
            if found >= wanted:
                return number, True
        rank, captured = len(self.leading), max(self.bound, found)
        if not rank:
            return 1, self.total == 0
        # sigma_{r+1} <= sigma_r, whose square is at most what the bound leaves beside the others.
        next_square = captured - (found - self.leading[-1])
        missing = max(0.0, wanted - captured)
        more = missing / next_square if next_square > 0 else 0.0
        if fourth is not None:
            rest = fourth - math.fsum(square**2 for square in self.leading)
            more = max(more, missing**2 / rest if rest > 0 else 0.0)
        return min(rank + max(1, math.ceil(more)), *self.sides), False

    def bytes_for(self, rank: int) -> int:
        """Of factors of a rank."""
        return rank * sum(self.sides) * self.itemsize


def spectrum_of(update: LowRank, certificate: Certificate | None = None) -> Spectrum:
    """What factors that were just made of a delta tell: row i of A and column i of B are sigma_i.

    Args:
        update: factors of a singular value decomposition.
        certificate: theirs, if it is not the update's own.
    """
    found = certificate or update.certificate
    import torch

    rows = torch.linalg.vector_norm(update.a.double(), dim=1)
    columns = torch.linalg.vector_norm(update.b.double(), dim=0)
    squares = (rows * columns * update.scale).square().tolist()
    total = found.total if found else math.fsum(squares)
    bound = found.optimum_bound if found else 0.0
    sides = (int(update.b.shape[0]), int(update.a.shape[1]))
    return Spectrum(tuple(squares), total, bound, sides, update.a.itemsize)


@dataclass(frozen=True)
class Sample:
    """What some rows of a delta show of its entries.

    Attributes:
        changed: share of the weights that differ.
        needed: share of the entries, the largest, that hold `SHARE` of the energy.
    """

    changed: float
    needed: float


def sample_of(
    before: torch.Tensor, after: torch.Tensor, elements: int = _SAMPLE_ELEMENTS
) -> Sample:
    """Look at some rows of two tensors, evenly apart.

    Args:
        before: of any shape and float dtype.
        after: of the same shape.
        elements: about how many to look at; at least one row.
    """
    import torch

    matrix = matrix_shape(before.shape)
    before, after = before.reshape(matrix), after.reshape(matrix)
    count = max(1, min(matrix[0], elements // max(1, matrix[1])))
    rows = torch.linspace(0, matrix[0] - 1, count).round().long()
    one, other = before[rows], after[rows]
    delta = torch.empty(one.shape, dtype=torch.float32)
    difference(other, one, delta)
    squares = delta.double().square().view(-1).numpy()
    return Sample(float(np.count_nonzero(squares)) / max(1, squares.size), _needed(squares))


def _needed(squares: np.ndarray, share: float = SHARE) -> float:
    """The share of entries, the largest, that hold a share of the sum of all; 0 of none."""
    held = np.cumsum(np.sort(squares)[::-1])
    if not held.size or held[-1] == 0:
        return 0.0
    number = int(np.count_nonzero(held < share * held[-1])) + 1
    return min(1.0, number / len(held))


def fourth_moment(before: torch.Tensor, after: torch.Tensor, generator: torch.Generator) -> float:
    """About the sum of the fourth powers of the singular values of after - before.

    E ||D^T D z||^2 = tr((D^T D)^2) for random signs z (Hutchinson, 1990); one pass over the rows.
    """
    import torch

    matrix = matrix_shape(before.shape)
    before, after = before.reshape(matrix), after.reshape(matrix)
    signs = torch.randint(0, 2, (matrix[1], _PROBES), generator=generator)
    probes = signs.float().mul_(2).sub_(1)
    total = torch.zeros(matrix[1], _PROBES)
    for rows in tiles(before):
        tile = torch.empty(before[rows].shape)
        difference(after[rows], before[rows], tile)
        total += tile.T @ (tile @ probes)
    return float(total.double().square().sum()) / _PROBES


@dataclass(frozen=True)
class Forms:
    """What all matrices together take for `share` of the energy, in bytes.

    Attributes:
        low_rank: of factors.
        at_least: whether `low_rank` is a lower bound.
        sparse: of single entries with their places, estimated from samples.
        dense: of all entries.
        changed: share of the weights that differ, from samples.
        needed: share of the entries that single entries are of.
        share: of the energy.
    """

    low_rank: int
    at_least: bool
    sparse: int
    dense: int
    changed: float
    needed: float
    share: float = SHARE

    @property
    def best(self) -> Form:
        """Which of them to take; low rank unless another is clearly better."""
        if self.sparse * _CLEARLY <= self.low_rank and self.sparse <= _HALF * self.dense:
            return "sparse"
        return "dense" if self.low_rank >= _NEARLY * self.dense else "low_rank"

    @property
    def entries(self) -> float:
        """The share of the entries to ask for as single entries."""
        return _rounded_up(self.needed)

    def as_json(self) -> dict[str, Any]:
        """For manifests."""
        return {**asdict(self), "best": self.best}

    def lines(self) -> tuple[str, ...]:
        """What to tell people: nothing if low rank is the right form."""
        if self.best == "low_rank":
            return ()
        why, advice = "neither of low rank nor sparse", "keep the fine-tune itself"
        if self.best == "sparse":
            why = "sparse, and not of low rank"
            advice = f"`--rank 1 --sparse {self.entries:g}` keeps the largest entries"
        more = "more than " if self.at_least else ""
        return (
            f"LoRA is the wrong tool here: the difference is {why}; about "
            f"{format_share(self.changed)} of the weights changed",
            f"{self.share:.0%} of its energy takes {more}{format_bytes(self.low_rank)} as low "
            f"rank, about {format_bytes(self.sparse)} as single entries; all of it "
            f"{format_bytes(self.dense)}: {advice}",
        )


def _rounded_up(share: float) -> float:
    """To two digits."""
    digits = 1 - math.floor(math.log10(share)) if share > 0 else 0
    return min(math.ceil(share * 10.0**digits) / 10.0**digits, 0.99)


def forms_of(
    spectra: Mapping[str, Spectrum],
    tensors: Mapping[str, tuple[LazyTensor, LazyTensor]],
    seed: int = 0,
) -> Forms | None:
    """Compare the forms over all matrices; reads samples of a few, and two of them whole at most.

    Args:
        spectra: of every matrix.
        tensors: the two tensors of each, base and fine-tune, by the same names.
        seed: of random probes.

    Returns:
        None if no matrix has changed.
    """
    changed = {name: found for name, found in spectra.items() if found.total > 0}
    if not changed:
        return None
    names = _spread(list(changed), _SAMPLES)
    samples = {name: _sampled(*tensors[name]) for name in names}
    weights = [changed[name].elements for name in names]
    place = {name: expected_bytes(found.needed) for name, found in samples.items()}
    elements = sum(found.elements for found in changed.values())
    itemsize = max(found.itemsize for found in changed.values())
    needed = _mean([samples[name].needed for name in names], weights)
    per_element = [samples[n].needed * (place[n] + changed[n].itemsize) for n in names]
    ranks = {name: found.rank_needed() for name, found in changed.items()}
    low_rank = sum(changed[name].bytes_for(rank) for name, (rank, _) in ranks.items())
    forms = Forms(
        low_rank,
        not all(known for _, known in ranks.values()),
        round(elements * _mean(per_element, weights)),
        elements * itemsize,
        _mean([samples[name].changed for name in names], weights),
        needed,
    )
    if not forms.at_least or forms.best != "low_rank":
        return forms
    small = [n for n in names if not ranks[n][1] and changed[n].elements <= _MOMENT_ELEMENTS]
    shares = [_share_of_dense(n, changed[n], tensors[n], seed) for n in _spread(small, _MOMENTS)]
    at_least = round(min(shares, default=0.0) * forms.dense)
    return Forms(**{**asdict(forms), "low_rank": max(low_rank, at_least)})


def _sampled(base: LazyTensor, tuned: LazyTensor) -> Sample:
    return sample_of(base.read(), tuned.read())


def _share_of_dense(
    name: str, spectrum: Spectrum, pair: tuple[LazyTensor, LazyTensor], seed: int
) -> float:
    """Bytes of low rank at least, as a share of those of the whole matrix."""
    before, after = (tensor.read() for tensor in pair)
    moment = fourth_moment(before, after, named_generator(seed, name))
    rank, _ = spectrum.rank_needed(fourth=moment)
    return spectrum.bytes_for(rank) / (spectrum.elements * spectrum.itemsize)


def _spread(names: Sequence[str], number: int) -> list[str]:
    """Some of the names, evenly apart."""
    if len(names) <= number:
        return list(names)
    return [names[index * len(names) // number] for index in range(number)]


def _mean(values: Sequence[float], weights: Sequence[int]) -> float:
    pairs = zip(values, weights, strict=True)
    return math.fsum(value * weight for value, weight in pairs) / max(1, sum(weights))


class Advisor:
    """Watches updates being extracted, and tells at the end whether low rank was the right form.

    Tasks of several threads share it.
    """

    def __init__(self, seed: int) -> None:
        self._seed = seed
        self._spectra: dict[str, Spectrum] = {}
        self._tensors: dict[str, tuple[LazyTensor, LazyTensor]] = {}
        self._lock = threading.Lock()
        self._forms: Forms | None = None
        self._number = -1

    def see(self, name: str, found: object, base: LazyTensor, tuned: LazyTensor) -> None:
        """Note an update of tuned - base down; only plain matrices count."""
        if isinstance(found, LowRank | Sparse):
            added = found.added if isinstance(found, Sparse) else found
            self._spectra[name], self._tensors[name] = spectrum_of(added), (base, tuned)

    def forms(self) -> Forms | None:
        """The comparison; None where all updates reach the share that forms are compared at."""
        with self._lock:
            if self._number != len(self._spectra):
                spectra = {name: self._spectra[name] for name in sorted(self._spectra)}
                reached = all(found.rank_needed()[1] for found in spectra.values())
                self._forms = None if reached else forms_of(spectra, self._tensors, self._seed)
                self._number = len(spectra)
            return self._forms

    def entries(self) -> float:
        """The share of the entries to ask for as single entries; 0 if another form is better."""
        forms = self.forms()
        return forms.entries if forms is not None and forms.best == "sparse" else 0.0

    def lines(self) -> tuple[str, ...]:
        """For the report."""
        forms = self.forms()
        return () if forms is None else forms.lines()

    def facts(self) -> dict[str, Any]:
        """For the manifest."""
        forms = self.forms()
        return {} if forms is None else {"representation": forms.as_json()}
