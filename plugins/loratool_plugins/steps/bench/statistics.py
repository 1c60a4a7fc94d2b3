"""Ratios of latencies, how certain they are, and what may be said of them.

All of it is computed from rounds: in a round every session has run once, in random order, so what
slows the machine down for a while slows all of them down alike. Rounds, not single times, are drawn
again for the intervals (a paired bootstrap: Efron and Tibshirani 1993, An Introduction to the
Bootstrap, chapters 8 and 13).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

Times = np.ndarray[Any, np.dtype[np.float64]]
Verdict = Literal["same", "unclear", "slower", "faster"]

RESAMPLES = 10_000
LEVEL = 0.95
_CHUNK = 1 << 20  # times that are drawn at once


@dataclass(frozen=True)
class Ratio:
    """A ratio of two medians.

    Attributes:
        value: the one median divided by the reference's.
        low: the lower end of its interval.
        high: the upper end.
    """

    value: float
    low: float
    high: float


def ratio_of_medians(
    times: Times,
    reference: Times,
    seed: int,
    resamples: int = RESAMPLES,
    level: float = LEVEL,
) -> Ratio:
    """The ratio of two medians, with the percentile interval of a paired bootstrap.

    Args:
        times: seconds of each round, (rounds,).
        reference: of the same rounds, (rounds,).
        seed: of the rounds that are drawn; the same for the same result.
        resamples: how often as many rounds are drawn with replacement.
        level: the share of the draws that the interval holds.

    Raises:
        ValueError: they are of different lengths, or empty.
    """
    if times.shape != reference.shape or not times.size:
        raise ValueError(f"{times.shape} and {reference.shape} are no rounds of two models")
    generator = np.random.default_rng(seed)
    drawn = []
    left = resamples
    while left:
        count = min(left, max(1, _CHUNK // times.size))
        rounds = generator.integers(0, times.size, (count, times.size))
        drawn.append(np.median(times[rounds], axis=1) / np.median(reference[rounds], axis=1))
        left -= count
    tail = (1 - level) / 2
    low, high = np.quantile(np.concatenate(drawn), (tail, 1 - tail))
    return Ratio(float(np.median(times) / np.median(reference)), float(low), float(high))


def noise_floor(again: Ratio) -> float:
    """How far from 1 a ratio may be by chance: f for the band from 1 / (1 + f) to 1 + f.

    Args:
        again: the ratio of the reference to itself, in a session of its own.
    """
    return max(again.high, 1 / again.low) - 1


def judge(ratio: Ratio, floor: float) -> Verdict:
    """What can be said of a ratio.

    Args:
        ratio: of a model to the reference.
        floor: as `noise_floor` gives it.

    Returns:
        "slower" or "faster" where the whole interval lies beyond the band of noise; "unclear" where
        the ratio does, but not its interval; "same" where the ratio lies within the band.
    """
    low, high = 1 / (1 + floor), 1 + floor
    if ratio.low > high:
        return "slower"
    if ratio.high < low:
        return "faster"
    return "same" if low <= ratio.value <= high else "unclear"
