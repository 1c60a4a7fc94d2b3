"""Runs of several sessions, interleaved in random order."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from loratool_plugins.steps.bench.statistics import Times

LEAST_ROUNDS = 3  # however slow a model is: an interval needs some
_WARM_UP_SHARE = 0.25  # of the time that there is


@dataclass(frozen=True)
class Plan:
    """How often sessions run.

    Attributes:
        warmups: rounds whose times do not count.
        repeats: rounds whose times do.
        limit: seconds for each session; no round begins after that, but for the first ones.
        seed: of the order in each round.
    """

    warmups: int
    repeats: int
    limit: float
    seed: int


@dataclass(frozen=True)
class Rounds:
    """What was timed.

    Attributes:
        times: seconds, (rounds, sessions), float64.
        warmups: rounds that came before.
    """

    times: Times
    warmups: int


def run_rounds(
    runs: Sequence[Callable[[], float]],
    plan: Plan,
    told: Callable[[], None] = lambda: None,
    clock: Callable[[], float] = time.perf_counter,
) -> Rounds:
    """Run every session once a round, each round in an order of its own.

    Args:
        runs: run one session once and return the seconds that it took.
        plan: how often.
        told: is called after each round.
        clock: seconds since some moment.
    """
    generator = np.random.default_rng(plan.seed)
    budget = plan.limit * len(runs)
    started = clock()
    warmups = 0
    while warmups < plan.warmups and (
        not warmups or clock() - started < budget * _WARM_UP_SHARE
    ):  # fmt: skip
        _round(runs, generator)
        warmups += 1
        told()
    rows: list[Times] = []
    while len(rows) < plan.repeats and (
        len(rows) < LEAST_ROUNDS or clock() - started < budget
    ):  # fmt: skip
        rows.append(_round(runs, generator))
        told()
    return Rounds(np.stack(rows), warmups)


def _round(runs: Sequence[Callable[[], float]], generator: np.random.Generator) -> Times:
    times = np.empty(len(runs))
    for place in generator.permutation(len(runs)):
        times[place] = runs[place]()
    return times
