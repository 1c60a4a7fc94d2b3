"""What updates add to a weight: the formulas, in any order and by any tiles."""

from __future__ import annotations

from itertools import permutations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from loratool.deltas import delta_of, matrix_shape
from loratool.updates import IA3, Added, Dense, DoRA, Experts, LowRank
from tests.updates import based, delta, lohas, lokrs, randn, sparses

Shape = tuple[int, ...]


@st.composite
def low_ranks(draw: st.DrawFn) -> tuple[LowRank, Shape]:
    shape = draw(st.sampled_from([(5, 7), (8, 3), (6, 4, 3), (4, 3, 2, 2)]))
    rank, seed = draw(st.integers(1, 4)), draw(st.integers(0, 99))
    inner = matrix_shape(shape)[1]
    return LowRank(randn(seed, rank, inner), randn(seed + 1, shape[0], rank), 0.75), shape


@st.composite
def experts(draw: st.DrawFn) -> tuple[Experts, Shape]:
    number, rank, seed = (draw(st.integers(1, n)) for n in (4, 3, 99))
    return Experts(randn(seed, number, rank, 6), randn(seed + 1, number, 5, rank), 1.5), (
        number, 5, 6,
    )  # fmt: skip


def rows(parts: list[tuple[Added, float]], shape: Shape, base: torch.Tensor) -> torch.Tensor:
    """The whole delta, in one tile."""
    found = delta_of(parts, shape, base)
    out = torch.empty(found.shape, dtype=torch.float64)
    found.rows(slice(None), out, base.double().reshape(found.shape))
    return out.view(shape)


def wanted(update: Added, shape: Shape, base: torch.Tensor) -> torch.Tensor:
    if isinstance(update, Experts):
        product = torch.einsum("eor,eri->eoi", update.b.double(), update.a.double())
        return product * update.scale
    return delta(update, shape, base).view(shape)


ANY = st.one_of(low_ranks(), experts(), lohas(), lokrs(), sparses(), based())


@settings(deadline=None)
@given(ANY, st.integers(0, 99))
def test_it_is_what_the_formula_says(case: tuple[Added, Shape], seed: int) -> None:
    update, shape = case
    base = randn(seed, *shape)
    torch.testing.assert_close(
        rows([(update, 1.0)], shape, base), wanted(update, shape, base), rtol=1e-5, atol=1e-5
    )


@settings(deadline=None)
@given(ANY, st.integers(1, 5), st.integers(0, 99))
def test_tiles_do_not_matter(case: tuple[Added, Shape], height: int, seed: int) -> None:
    update, shape = case
    base = randn(seed, *shape)
    found = delta_of([(update, 1.0)], shape, base)
    whole = rows([(update, 1.0)], shape, base).view(found.shape)
    matrix = base.double().reshape(found.shape)
    for start in range(0, found.shape[0], height):
        part = slice(start, min(start + height, found.shape[0]))
        out = torch.empty(whole[part].shape, dtype=torch.float64)
        found.rows(part, out, matrix[part])
        assert torch.equal(out, whole[part])


@settings(deadline=None)
@given(st.integers(0, 99))
def test_the_order_of_updates_of_all_kinds_changes_no_bit(seed: int) -> None:
    shape = (6, 8)
    base = randn(seed, *shape)
    parts: list[tuple[Added, float]] = [
        (LowRank(randn(seed + 1, 2, 8), randn(seed + 2, 6, 2), 0.3), 0.7),
        (Dense(randn(seed + 3, *shape)), 1 / 3),
        (DoRA(LowRank(randn(seed + 4, 2, 8), randn(seed + 5, 6, 2)), randn(seed + 6, 6)), 1.0),
        (IA3(randn(seed + 7, 8), 1), 1.0),
    ]
    first = rows(parts, shape, base)
    assert all(torch.equal(rows(list(p), shape, base), first) for p in permutations(parts))


@pytest.mark.parametrize("axis", [0, 1])
def test_what_is_zero_stays_zero_under_dora(axis: int) -> None:
    base = torch.zeros(3, 4)
    update = DoRA(LowRank(torch.zeros(1, 4), torch.zeros(3, 1)), torch.ones(3 + axis), axis)
    assert not rows([(update, 1.0)], (3, 4), base).any()


def test_an_update_of_another_size_is_an_error() -> None:
    with pytest.raises(ValueError, match="for a weight of"):
        delta_of([(LowRank(torch.ones(1, 4), torch.ones(3, 1)), 1.0)], (3, 5))


@settings(deadline=None)
@given(st.one_of(lohas(), lokrs(), low_ranks(), sparses()), st.integers(0, 99))
def test_the_transposed_update_has_the_transposed_delta(
    case: tuple[Added, Shape], seed: int
) -> None:
    update, shape = case
    if len(shape) != 2:
        return
    base = randn(seed, *shape)
    for found in (update, DoRA(update, randn(seed, shape[0]))):  # type: ignore[arg-type]
        straight = rows([(found, 1.0)], shape, base)
        turned = rows([(found.transposed(), 1.0)], shape[::-1], base.T.contiguous())
        torch.testing.assert_close(turned.T, straight, rtol=1e-5, atol=1e-5)
