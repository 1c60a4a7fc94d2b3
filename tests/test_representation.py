"""How many bytes a change takes in each form: bounds hold, and the right one is recommended."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from loratool.checkpoint import LazyTensor
from loratool.linalg import Certificate
from loratool.representation import (
    Advisor,
    Forms,
    Spectrum,
    forms_of,
    fourth_moment,
    sample_of,
    spectrum_of,
)
from loratool.updates import LowRank, Sparse
from tests.lazy import lazy_tensor
from tests.updates import randn

SHAPE = (96, 64)


def delta(kind: str, seed: int, shape: tuple[int, int] = SHAPE) -> torch.Tensor:
    found = randn(seed, *shape).float()
    if kind == "sparse":
        return found * (randn(seed + 1, *shape).float().abs() > 1.645)
    if kind == "low":
        return (randn(seed, shape[0], 3) @ randn(seed + 1, 3, shape[1])).float()
    return found


def factors(matrix: torch.Tensor, rank: int) -> LowRank:
    """The best of a rank, balanced, as a factorizer gives them."""
    u, s, v = torch.linalg.svd(matrix.double(), full_matrices=False)
    root = s[:rank].sqrt()
    captured = float(s[:rank].square().sum())
    certificate = Certificate(
        rank, float(s.square().sum()), captured, optimum_bound=captured * 1.001
    )
    a, b = v[:rank] * root[:, None], u[:, :rank] * root
    return LowRank(a.bfloat16(), b.bfloat16(), 1.0, certificate)


def true_rank(matrix: torch.Tensor, share: float) -> int:
    squares = torch.linalg.svdvals(matrix.double()).square()
    return int((squares.cumsum(0) < share * squares.sum()).sum()) + 1


@given(seed=st.integers(0, 999), rank=st.integers(1, 20), power=st.floats(0, 2), tall=st.booleans())
@settings(max_examples=60, deadline=None)
def test_a_bound_of_the_rank_is_one(seed: int, rank: int, power: float, tall: bool) -> None:
    u, _, v = torch.linalg.svd(randn(seed, *((40, 25) if tall else (25, 40))), full_matrices=False)
    sigma = torch.arange(1, 26, dtype=torch.float64) ** -power
    matrix = u * sigma @ v
    spectrum = spectrum_of(factors(matrix, rank))
    needed = true_rank(matrix, 0.9)
    fourth = float(sigma.pow(4).sum())
    for moment in (None, fourth):
        found, known = spectrum.rank_needed(fourth=moment)
        if known:
            assert abs(found - needed) <= 1  # factors are rounded
        else:
            assert rank < found <= max(needed, rank + 1)
    assert spectrum.rank_needed(fourth=fourth)[0] >= spectrum.rank_needed()[0]


def test_bytes_and_degenerate_spectra() -> None:
    spectrum = Spectrum((3.0, 1.0), 4.0, 4.0, (10, 6), 2)
    assert spectrum.rank_needed() == (2, True) and spectrum.bytes_for(2) == 64
    assert Spectrum((), 0.0, 0.0, (10, 6), 2).rank_needed() == (1, True)
    assert Spectrum((0.0,), 0.0, 0.0, (10, 6), 2).rank_needed() == (1, True)


def test_the_moment_is_that_of_the_singular_values() -> None:
    before, after = randn(0, 300, 200).bfloat16(), randn(1, 300, 200).bfloat16()
    generator = torch.Generator().manual_seed(0)
    wanted = torch.linalg.svdvals(after.double() - before.double()).pow(4).sum()
    assert fourth_moment(before, after, generator) == pytest.approx(float(wanted), rel=0.1)


@pytest.mark.parametrize(("kind", "changed", "needed"), [
    ("dense", 1.0, 0.445), ("sparse", 0.1, 0.0445),
])  # fmt: skip
def test_a_sample_shows_what_has_changed(kind: str, changed: float, needed: float) -> None:
    base = randn(9, 512, 512).float()
    found = sample_of(base, base + delta(kind, 3, (512, 512)))
    assert found.changed == pytest.approx(changed, rel=0.05)
    assert found.needed == pytest.approx(needed, rel=0.1)
    nothing = sample_of(base, base)
    assert nothing.changed == nothing.needed == 0


def compared(kind: str, rank: int = 8, count: int = 5) -> Forms:
    pairs: dict[str, tuple[LazyTensor, LazyTensor]] = {}
    spectra = {}
    for number in range(count):
        name, shape = f"m{number}", (300, 200)
        base, change = randn(number, *shape).float(), delta(kind, 50 + number, shape)
        pairs[name] = (lazy_tensor(name, base), lazy_tensor(name, base + change))
        spectra[name] = spectrum_of(factors(change, rank))
    found = forms_of(spectra, pairs)
    assert found is not None
    return found


@pytest.mark.parametrize("kind", ["sparse", "dense", "low"])
def test_the_right_form_is_recommended(kind: str) -> None:
    found = compared(kind)
    assert found.best == {"sparse": "sparse", "dense": "dense", "low": "low_rank"}[kind]
    assert found.dense == 5 * 300 * 200 * 2
    ranks = [true_rank(delta(kind, 50 + n, (300, 200)), 0.9) for n in range(5)]
    wanted = sum(ranks) * 500 * 2
    if found.at_least:
        assert 0.4 * wanted < found.low_rank <= wanted * 1.05
    else:
        assert found.low_rank == wanted
    text = "\n".join(found.lines())
    assert ("wrong tool" in text) == (kind != "low") and ("--sparse" in text) == (kind == "sparse")
    assert ("more than" in text) == (kind != "low")


def test_bytes_of_entries_are_those_of_their_file() -> None:
    """90% of the energy, as the estimate says, from the largest entries of the whole matrix."""
    from loratool.gaps import sparse_bytes

    found, total = compared("sparse"), 0
    for number in range(5):
        flat = delta("sparse", 50 + number, (300, 200)).view(-1)
        squares, order = flat.square().sort(descending=True)
        count = int((squares.cumsum(0) < 0.9 * squares.sum()).sum()) + 1
        places = order[:count].sort().values
        total += sparse_bytes(places, flat[places].bfloat16())
    assert found.sparse == pytest.approx(total, rel=0.05)


def test_an_advisor_says_nothing_where_low_rank_does_it() -> None:
    advisor = Advisor(0)
    base, change = randn(0, *SHAPE).float(), delta("low", 1)
    pair = lazy_tensor("w", base), lazy_tensor("w", base + change)
    advisor.see("w", factors(change, 3), *pair)
    advisor.see("none", None, *pair)
    assert advisor.facts() == {} and advisor.lines() == ()
    found = factors(delta("sparse", 1), 3)
    places = torch.arange(2)
    base = torch.zeros(SHAPE)
    pair = lazy_tensor("v", base), lazy_tensor("v", delta("sparse", 1))
    advisor.see("v", Sparse(found, places, torch.ones(2)), *pair)
    assert advisor.facts()["representation"]["best"] == "sparse"
    assert len(advisor.lines()) == 2


def test_no_change_has_no_form() -> None:
    assert forms_of({"w": Spectrum((0.0,), 0.0, 0.0, (3, 4), 2)}, {}) is None
    assert math.isfinite(Forms(1, False, 0, 1, 0.0, 0.0).share)
