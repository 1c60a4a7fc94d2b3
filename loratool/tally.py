"""What a tensor shows of one hypothesis about its merge: the numbers that a proof judges.

Counted by `loratool.replay`, judged by `loratool.proof`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import torch

# What to count beyond a replay: limits of the strength (low, high), least squares (visible, told),
# or how near weights are to their neighbours (whole, coarse, beyond, chances).
Look = Literal["replay", "limits", "squares", "neighbours"]


class Way(NamedTuple):
    """How a merge was calculated; each flag is one more rounding to the merged type.

    Attributes:
        cast: of the base, before anything was added to it.
        factors: of A and B, before they were multiplied.
        delta: of the delta, before it was added.
    """

    cast: bool = False
    factors: bool = False
    delta: bool = False

    @property
    def start(self) -> Way:
        """What it starts from: all that the bound depends on."""
        return self._replace(delta=False)


@dataclass
class Chances:
    """How many weights went to the farther of their two neighbours, and how many by chance would.

    Attributes:
        far: how many did.
        expected: how many would, rounded up or down at random so that the mean is right.
        variance: of that number.
    """

    far: int = 0
    expected: float = 0.0
    variance: float = 0.0

    @property
    def deviation(self) -> float:
        """`far` less `expected`, in standard deviations."""
        gap = self.far - self.expected
        return gap / math.sqrt(self.variance) if self.variance > 0 else gap * math.inf


@dataclass
class Moments:
    """Sums for least squares of R = merged - base on S, the update, over some weights, in fp64.

    Attributes:
        count: how many weights.
        along: sum of R S.
        change: sum of R^2.
        update: sum of S^2.
        spread: sums of (R S)^2, R S S^2 and S^4, for the variance.
    """

    count: int = 0
    along: float = 0.0
    change: float = 0.0
    update: float = 0.0
    spread: tuple[float, float, float] = (0.0, 0.0, 0.0)

    def add(self, change: torch.Tensor, update: torch.Tensor, count: int) -> None:
        """Add weights; (n,) each, 0 for those that do not count."""
        product, square = change * update, update * update
        self.count += count
        self.along += float(product.sum())
        self.change += dot(change, change)
        self.update += float(square.sum())
        new = (dot(product, product), dot(product, square), dot(square, square))
        self.spread = (self.spread[0] + new[0], self.spread[1] + new[1], self.spread[2] + new[2])

    @property
    def value(self) -> float:
        """The t that makes ||R - t S|| smallest; 0 if there is no update."""
        return self.along / self.update if self.update else 0.0

    @property
    def error(self) -> float:
        """Standard error of `value` for independent residuals of unequal variance.

        sqrt(sum S^2 (R - t S)^2) / sum S^2 (White, Econometrica 48, 1980); infinite if unknown.
        """
        one, two, three = self.spread
        rest = one - 2 * self.value * two + self.value**2 * three
        return math.sqrt(max(0.0, rest)) / self.update if self.update else math.inf

    @property
    def explained(self) -> float:
        """The share of ||R||^2 that t S explains."""
        return self.value * self.along / self.change if self.change else 0.0


@dataclass
class Tally:
    """What a tensor shows of one hypothesis. Counts are of weights, sums are in fp64.

    Attributes:
        strength: of the hypothesis.
        way: of the hypothesis.
        elements: all weights.
        same: that are the base's.
        informative: where the replay differs from the base.
        agreeing: of these, the ones that changed and are within the bound.
        reproduced: of the informative ones, equal to the replay to the bit.
        equal: of all, equal to the replay to the bit.
        outside: outside the bound.
        first_outside: flat index of the first of them, or -1.
        along: <R, S> with R = merged - base, and S the update at this strength.
        change: ||R||^2.
        update: ||S||^2.
        noise: what roundings to nearest explain of ||R - S||^2: ulp^2 / 12 for each.
        low: with `high`, the strengths that put every weight within its bound; low > high if none.
        visible: moments of weights whose update is at least eight units in the last place.
        told: moments of the informative ones.
        whole: moments of all.
        coarse: outside the bound of a product of coarse factors.
        beyond: further off than rounding up or down can bring them.
        chances: of weights within a quarter of a unit of a neighbour, and of the others.

    What a `Look` is for is counted only with that look.
    """

    strength: float
    way: Way
    elements: int = 0
    same: int = 0
    informative: int = 0
    agreeing: int = 0
    reproduced: int = 0
    equal: int = 0
    outside: int = 0
    first_outside: int = -1
    along: float = 0.0
    change: float = 0.0
    update: float = 0.0
    noise: float = 0.0
    low: float = -math.inf
    high: float = math.inf
    visible: Moments = field(default_factory=Moments)
    told: Moments = field(default_factory=Moments)
    whole: Moments = field(default_factory=Moments)
    coarse: int = 0
    beyond: int = 0
    chances: tuple[Chances, Chances] = field(default_factory=lambda: (Chances(), Chances()))

    @property
    def residual(self) -> float:
        """||R - S||^2."""
        return max(0.0, self.change - 2 * self.along + self.update)

    @property
    def explained(self) -> float:
        """The share of ||R||^2 that some multiple of S explains: their squared cosine."""
        size = self.change * self.update
        return min(1.0, self.along**2 / size) if size else 0.0


class Support(NamedTuple):
    """Strengths that weights allow.

    Attributes:
        low: the lowest.
        high: the highest.
        missing: how many weights allow none of them.
    """

    low: float
    high: float
    missing: int


def dot(one: torch.Tensor, other: torch.Tensor) -> float:
    """The inner product of two vectors (n,)."""
    return float(torch.dot(one, other))
