"""What part of a spectrum tells holds of the whole."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loratool.spectra import Range, Spectrum, captured, smallest_rank, summed

common = settings(derandomize=True, deadline=None, max_examples=60)
sigmas = st.lists(st.floats(1.0, 100.0), min_size=2, max_size=20).map(
    lambda values: sorted(values, reverse=True)
)


def whole(values: list[float]) -> Spectrum:
    return Spectrum(tuple(values), math.fsum(v * v for v in values), len(values))


def part(values: list[float], known: int) -> Spectrum:
    return Spectrum(tuple(values[:known]), whole(values).total, len(values))


def holds(bounds: Range, truth: Range) -> bool:
    assert truth.is_exact
    slack = 1e-6 * max(1.0, abs(truth.low))
    return bounds.low - slack <= truth.low <= bounds.high + slack


@common
@given(sigmas, st.data())
def test_bounds_hold_the_truth(values: list[float], data: st.DataObject) -> None:
    known = data.draw(st.integers(1, len(values)))
    full, some = whole(values), part(values, known)
    assert holds(some.effective_rank, full.effective_rank)
    for rank in range(len(values) + 1):
        truth = full.captured(rank)
        bounds = some.captured(rank)
        assert bounds.low <= truth.low * (1 + 2e-6) + 1e-12
        assert bounds.high >= truth.low * (1 - 2e-6)
    for share in (0.1, 0.5, 0.9, 0.99):
        assert holds(some.rank_for(share), full.rank_for(share))
    for edge in (values[0] / 2, values[known - 1] / 2, values[-1] / 2):
        if not some.is_whole:  # what is left counts as zero where it is only rounding
            assert holds(some.above(edge), full.above(edge))
    assert some.stable_rank == full.stable_rank


@common
@given(sigmas)
def test_a_whole_spectrum_is_exact(values: list[float]) -> None:
    found = whole(values)
    shares = np.array(values) / np.sum(values)
    entropy = float(-(shares * np.log(shares)).sum())
    assert found.effective_rank.is_exact
    assert found.effective_rank.low == pytest.approx(math.exp(entropy), rel=1e-9)
    assert 1 - 1e-9 <= found.stable_rank <= found.effective_rank.low * (1 + 1e-9)
    energies = np.cumsum(np.square(values)) / found.total
    for share in (0.5, 0.9, 0.99):
        rank = found.rank_for(share)
        assert rank.is_exact
        assert energies[int(rank.low) - 1] >= share * (1 - 2e-6)
        assert rank.low == 1 or energies[int(rank.low) - 2] < share


@common
@given(sigmas, st.floats(1e-3, 1e3))
def test_nothing_depends_on_the_scale(values: list[float], scale: float) -> None:
    one, other = part(values, 1), part([scale * value for value in values], 1)
    assert other.effective_rank == pytest.approx(one.effective_rank, rel=1e-6)
    assert other.stable_rank == pytest.approx(one.stable_rank, rel=1e-9)


def test_equal_values_have_full_effective_rank() -> None:
    assert whole([2.0] * 7).effective_rank == pytest.approx((7, 7))
    assert whole([2.0] * 7).stable_rank == pytest.approx(7)


def test_the_rank_of_all_together() -> None:
    one, other = whole([3.0, 1.0]), whole([2.0, 2.0])
    assert captured([one, other], 1) == (13, 13)
    assert smallest_rank([one, other], 13 / 18) == (1, 1)
    assert smallest_rank([one, other], 0.8) == (2, 2)
    assert summed([one, other]).sigma == pytest.approx((math.sqrt(13), math.sqrt(5)))
    assert summed([one, other]).total == 18


def test_a_zero_matrix() -> None:
    zero = Spectrum((), 0.0, 5)
    assert zero.is_whole and zero.stable_rank == 0
    assert zero.effective_rank == (0, 0)
    assert zero.rank_for(0.9) == (0, 0)
    assert zero.above(0.0) == (0, 0)
