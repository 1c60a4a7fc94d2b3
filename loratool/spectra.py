"""A spectrum of which only the largest singular values are known, and what these tell for certain.

The values that are not known are bounded by three facts: there are `count - len(sigma)` of them,
the sum of their squares is `total` less the known squares, and none is larger than the last known
one. A sum below a millionth of the total, which fp32 cannot tell, counts as 0. Every answer that
they leave open is a pair (low, high) that holds it.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from typing import NamedTuple

# A share of the energy closer to 1 than this cannot be told from 1 in fp32.
RESOLUTION = 1e-6


class Range(NamedTuple):
    """Bounds of a number; both are the number where it is known."""

    low: float
    high: float

    @property
    def is_exact(self) -> bool:
        """Whether the number is known."""
        return self.low == self.high


@dataclass(frozen=True)
class Spectrum:
    """Singular values of a matrix.

    Attributes:
        sigma: the largest of them, descending; without those that are 0.
        total: ||D||_F^2.
        count: how many the matrix has: its shorter side.
    """

    sigma: tuple[float, ...]
    total: float
    count: int

    @cached_property
    def _cumulative(self) -> tuple[float, ...]:
        """Energy of the first 0, 1, 2, ... values."""
        return (0.0, *accumulate(value * value for value in self.sigma))

    @property
    def known(self) -> float:
        """Energy of the known values."""
        return self._cumulative[-1]

    @property
    def rest(self) -> float:
        """Energy of the values that are not known; 0 where it is only rounding."""
        missing = self.total - self.known
        is_over = len(self.sigma) == self.count or missing <= RESOLUTION * self.total
        return 0.0 if is_over else missing

    @property
    def is_whole(self) -> bool:
        """Whether every value that is not 0 is known."""
        return self.rest == 0

    @property
    def stable_rank(self) -> float:
        """||D||_F^2 / ||D||_2^2 (Rudelson and Vershynin 2007), in [1, count]; 0 for a zero matrix.

        It is known from the largest value alone.
        """
        return self.total / self.sigma[0] ** 2 if self.sigma and self.sigma[0] else 0.0

    @property
    def effective_rank(self) -> Range:
        """exp of the entropy of sigma / sum(sigma) (Roy and Vetterli 2007, definition 1).

        With a rest of energy E in m values of at most s, the highest value belongs to m equal ones,
        and the lowest to E / s^2 values of s: the first vector, normalised, is majorised by every
        possible one and the second majorises them, and entropy is Schur-concave.
        """
        if not self.rest:
            found = _entropy_rank(self.sigma)
            return Range(found, found)
        left, last = self.count - len(self.sigma), self.sigma[-1]
        flat = math.sqrt(self.rest / left)
        whole = min(left, int(self.rest / last**2))
        remainder = math.sqrt(max(0.0, self.rest - whole * last**2))
        low = _entropy_rank(self.sigma, [(last, whole), (remainder, 1)])
        return Range(low, max(low, _entropy_rank(self.sigma, [(flat, left)])))

    def captured(self, rank: int) -> Range:
        """Energy that the best approximation of a rank captures."""
        if rank <= len(self.sigma):
            found = self._cumulative[max(0, rank)]
            return Range(found, found)
        more = rank - len(self.sigma)
        left = self.count - len(self.sigma)
        if not self.rest or more >= left:
            return Range(self.total, self.total)
        most = min(self.total, self.known + more * self.sigma[-1] ** 2)
        return Range(self.known + self.rest * more / left, most)

    def rank_for(self, share: float) -> Range:
        """The smallest rank that captures a share of the energy, in (0, 1]; 0 of a zero matrix."""
        wanted = share * self.total * (1 - RESOLUTION)
        if wanted <= self.known or not self.rest:
            found = min(bisect_left(self._cumulative, wanted), len(self.sigma))
            return Range(found, found)
        return smallest_rank([self], share)

    def above(self, edge: float) -> Range:
        """How many values are larger than `edge`."""
        known = sum(value > edge for value in self.sigma)
        if known < len(self.sigma) or not self.rest:
            return Range(known, known)
        most = self.count if edge <= 0 else known + int(self.rest / edge**2)
        return Range(known, min(self.count, most))


def _entropy_rank(sigma: Sequence[float], more: Iterable[tuple[float, int]] = ()) -> float:
    """exp(-sum p ln p) of values, and of others that are there several times."""
    groups = [*((value, 1) for value in sigma), *more]
    groups = [(value, times) for value, times in groups if value > 0 and times > 0]
    size = math.fsum(value * times for value, times in groups)
    if size == 0:
        return 0.0
    shares = [(value / size, times) for value, times in groups]
    return math.exp(-math.fsum(times * p * math.log(p) for p, times in shares))


def captured(spectra: Iterable[Spectrum], rank: int) -> Range:
    """Energy that one rank for every matrix captures of all of them together."""
    found = [spectrum.captured(rank) for spectrum in spectra]
    return Range(math.fsum(f.low for f in found), math.fsum(f.high for f in found))


def smallest_rank(spectra: Sequence[Spectrum], share: float) -> Range:
    """The smallest rank for every matrix that captures a share of the energy of all together."""
    wanted = share * math.fsum(spectrum.total for spectrum in spectra) * (1 - RESOLUTION)
    most = max((spectrum.count for spectrum in spectra), default=0)
    ranks = range(most)
    return Range(
        bisect_left(ranks, wanted, key=lambda rank: captured(spectra, rank).high),
        bisect_left(ranks, wanted, key=lambda rank: captured(spectra, rank).low),
    )


def summed(spectra: Sequence[Spectrum]) -> Spectrum:
    """What a rank common to several matrices keeps and loses: squares added place by place.

    The places beyond the shortest list of known values count as not known.
    """
    known = min(len(spectrum.sigma) for spectrum in spectra)
    if all(spectrum.is_whole for spectrum in spectra):
        known = max(len(spectrum.sigma) for spectrum in spectra)
    sigma = tuple(
        math.hypot(*(s.sigma[place] for s in spectra if place < len(s.sigma)))
        for place in range(known)
    )
    total = math.fsum(spectrum.total for spectrum in spectra)
    return Spectrum(sigma, total, max(spectrum.count for spectrum in spectra))
