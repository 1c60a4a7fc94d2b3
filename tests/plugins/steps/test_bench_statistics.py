"""A planted difference is found, and none is found where there is none."""

from __future__ import annotations

import numpy as np
import pytest

from loratool_plugins.steps.bench.rounds import LEAST_ROUNDS, Plan, run_rounds
from loratool_plugins.steps.bench.statistics import (
    Ratio,
    Times,
    judge,
    noise_floor,
    ratio_of_medians,
)


def rounds(seed: int, factors: tuple[float, ...], count: int = 20, noise: float = 0.01) -> Times:
    """Seconds (count, models): what a round shares, a factor for each model, and noise."""
    generator = np.random.default_rng(seed)
    shared = 0.05 * np.exp(0.2 * generator.standard_normal((count, 1)).cumsum(axis=0) / 4)
    own = np.exp(noise * generator.standard_normal((count, len(factors))))
    return shared * own * np.array(factors)


def verdict(times: Times, seed: int = 0) -> str:
    """Of the second model against the first, the third being the first once more."""
    floor = noise_floor(ratio_of_medians(times[:, 2], times[:, 0], seed, 2000))
    return judge(ratio_of_medians(times[:, 1], times[:, 0], seed, 2000), floor)


def test_a_planted_difference_of_five_per_cent_is_found() -> None:
    found = [verdict(rounds(seed, (1, 1.05, 1), 40, 0.005)) for seed in range(40)]
    assert found.count("slower") >= 36
    assert "faster" not in found
    found = [verdict(rounds(seed, (1.05, 1, 1.05), 40, 0.005)) for seed in range(40)]
    assert found.count("faster") >= 36


def test_no_difference_is_found_where_there_is_none() -> None:
    found = [verdict(rounds(seed, (1, 1, 1))) for seed in range(100)]
    assert found.count("slower") + found.count("faster") <= 3


def test_the_interval_holds_the_true_ratio_as_often_as_it_says() -> None:
    held = 0
    for seed in range(200):
        times = rounds(seed, (1, 1.1), 30, 0.05)
        ratio = ratio_of_medians(times[:, 1], times[:, 0], seed, 1000)
        held += ratio.low <= 1.1 <= ratio.high
    assert 180 <= held <= 200


def test_pairing_makes_the_interval_narrow_where_the_machine_drifts() -> None:
    times = rounds(0, (1, 1.05), 40, 0.002)
    paired = ratio_of_medians(times[:, 1], times[:, 0], 0)
    shuffled = np.random.default_rng(0).permutation(times[:, 1])
    loose = ratio_of_medians(shuffled, times[:, 0], 0)
    assert paired.high - paired.low < 0.5 * (loose.high - loose.low)


def test_the_same_seed_gives_the_same_interval_and_scales_cancel() -> None:
    times = rounds(3, (1, 1.02))
    one = ratio_of_medians(times[:, 1], times[:, 0], 7)
    assert one == ratio_of_medians(times[:, 1], times[:, 0], 7)
    assert one != ratio_of_medians(times[:, 1], times[:, 0], 8)
    scaled = ratio_of_medians(times[:, 1] * 1024, times[:, 0] * 1024, 7)
    assert (scaled.value, scaled.low, scaled.high) == pytest.approx((one.value, one.low, one.high))
    assert ratio_of_medians(times[:, 0], times[:, 0], 7) == Ratio(1, 1, 1)


def test_many_rounds_are_drawn_in_pieces() -> None:
    times = rounds(0, (1, 1.5), 5000)
    ratio = ratio_of_medians(times[:, 1], times[:, 0], 0, 500)
    assert ratio.low < ratio.value < ratio.high
    assert ratio.value == pytest.approx(1.5, rel=0.01)


def test_rounds_of_different_models_must_belong_together() -> None:
    with pytest.raises(ValueError, match="no rounds of two models"):
        ratio_of_medians(np.ones(3), np.ones(4), 0)
    with pytest.raises(ValueError, match="no rounds of two models"):
        ratio_of_medians(np.ones(0), np.ones(0), 0)


@pytest.mark.parametrize(
    ("ratio", "floor", "expected"),
    [
        (Ratio(1.07, 1.05, 1.09), 0.02, "slower"),
        (Ratio(1.07, 1.01, 1.09), 0.02, "unclear"),
        (Ratio(1.01, 1.005, 1.015), 0.02, "same"),
        (Ratio(1.01, 0.9, 1.4), 0.02, "same"),
        (Ratio(0.9, 0.88, 0.92), 0.02, "faster"),
        (Ratio(0.9, 0.88, 0.99), 0.02, "unclear"),
    ],
)
def test_what_is_said_of_a_ratio(ratio: Ratio, floor: float, expected: str) -> None:
    assert judge(ratio, floor) == expected


def test_the_noise_floor_is_as_far_as_the_reference_is_from_itself() -> None:
    assert noise_floor(Ratio(1, 0.99, 1.03)) == pytest.approx(0.03)
    assert noise_floor(Ratio(1, 0.8, 1.03)) == pytest.approx(0.25)
    assert noise_floor(Ratio(1, 1, 1)) == 0


class Clock:
    """A clock that runs which last as long as they say move on."""

    def __init__(self) -> None:
        self.now = 0.0
        self.order: list[str] = []

    def run(self, name: str, seconds: float):
        def once() -> float:
            self.now += seconds
            self.order.append(name)
            return seconds

        return once


def test_every_round_runs_each_once_in_an_order_that_the_seed_gives() -> None:
    def order(seed: int) -> list[str]:
        clock = Clock()
        runs = [clock.run(name, 1 + place) for place, name in enumerate("abcd")]
        found = run_rounds(runs, Plan(2, 5, 1000, seed), clock=lambda: clock.now)
        assert found.warmups == 2
        assert found.times.tolist() == [[1, 2, 3, 4]] * 5
        return clock.order

    found = order(1)
    groups = ["".join(found[start : start + 4]) for start in range(0, len(found), 4)]
    assert len(groups) == 7 and all(sorted(group) == list("abcd") for group in groups)
    assert len(set(groups)) > 1
    assert order(1) == found != order(2)


def test_no_round_begins_after_the_limit_but_for_the_first_ones() -> None:
    clock = Clock()
    runs = [clock.run("a", 1.0), clock.run("b", 1.0)]
    found = run_rounds(runs, Plan(10, 50, 20, 0), clock=lambda: clock.now)
    assert found.warmups == 5  # a quarter of 40 s, two a round
    assert len(found.times) == 15
    found = run_rounds(runs, Plan(10, 50, 0.5, 0), clock=lambda: clock.now)
    assert (found.warmups, len(found.times)) == (1, LEAST_ROUNDS)
