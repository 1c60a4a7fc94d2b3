"""Single entries beside low-rank updates: which are chosen, what they add, and their laws."""

from __future__ import annotations

import math
from fractions import Fraction
from itertools import permutations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from loratool.checkpoint import LazyTensor
from loratool.deltas import delta_of, dense
from loratool.errors import InputError
from loratool.gaps import decoded, encoded, expected_bytes, sparse_bytes
from loratool.linalg import Certificate
from loratool.merging import Survival, merged_blocks
from loratool.parts import Share, joined, rows_of
from loratool.scaling import squared_norm
from loratool.sparse import largest_entries, with_entries
from loratool.updates import Dense, LowRank, Sparse, entries_of
from tests.lazy import adapter_of, close, lazy_tensor
from tests.test_merging import bits, nearest
from tests.updates import Shape, delta, randn, sparse, sparses

SEEDS = st.integers(0, 10_000)


def places(elements: int) -> st.SearchStrategy[list[int]]:
    return st.sets(st.integers(0, elements - 1)).map(sorted)


@given(places(200_000))
def test_gaps_tell_the_places(found: list[int]) -> None:
    positions = torch.tensor(found, dtype=torch.int64)
    codes = encoded(positions)
    assert codes.dtype in (torch.uint8, torch.uint16)
    assert torch.equal(decoded(codes), positions)
    assert sparse_bytes(positions, positions.float()) == codes.nbytes + 4 * len(found)


@given(st.lists(st.integers(0, 255)))
def test_whatever_the_codes_are_the_places_ascend(codes: list[int]) -> None:
    positions = decoded(torch.tensor(codes, dtype=torch.uint8))
    assert bool((positions.diff() > 0).all()) and bool((positions >= 0).all())


@pytest.mark.parametrize("share", [0.2, 0.02, 0.002, 0.0002])
def test_the_expected_bytes_of_a_place(share: float) -> None:
    generator = torch.Generator().manual_seed(0)
    positions = (torch.rand(2_000_000, generator=generator) < share).nonzero().view(-1)
    found = encoded(positions).nbytes / len(positions)
    assert expected_bytes(share) == pytest.approx(found, rel=0.1)


@given(sparses())
def test_the_delta_is_the_sum_of_both_parts(given: tuple[Sparse, Shape]) -> None:
    update, shape = given
    assert close(dense(update, shape).flatten(1), delta(update, shape), 1e-6)
    assert squared_norm([(update, 1.0)], shape) == pytest.approx(
        float(dense(update, shape).square().sum())
    )


@given(SEEDS, st.integers(1, 9), st.integers(1, 9), st.integers(0, 30))
def test_transposed_twice_is_the_same(seed: int, rows: int, columns: int, count: int) -> None:
    update = sparse(seed, (rows, columns), 2, count)
    once = update.transposed()
    assert bool((once.positions.diff() > 0).all())
    assert torch.equal(dense(once, (columns, rows)), dense(update, (rows, columns)).T)
    assert torch.equal(once.transposed().positions, update.positions)
    assert torch.equal(once.transposed().values, update.values)


@given(SEEDS, st.sampled_from(["F32", "BF16", "F16"]), st.sampled_from([1.0, -0.3, 2.5]))
@settings(max_examples=40, deadline=None)
def test_a_merge_is_rounded_once(seed: int, dtype: str, weight: float) -> None:
    update = sparse(seed, (4, 5), 3, 9, scale=0.25)
    base = torch.randn(4, 5, generator=torch.Generator().manual_seed(seed))
    product = delta_of([(update.added, weight)], base.shape)
    low_rank = torch.empty(4, 5, dtype=torch.float64)
    product.rows(slice(None), low_rank)
    found = merged(base, [(update, weight)], dtype)
    entries = dict(zip(update.positions.tolist(), update.values.tolist(), strict=True))
    for place in range(20):
        added = low_rank.view(-1)[place].item()
        if place in entries:  # both are exact in fp64, and their sum is rounded to it
            added += entries[place] * (weight * 0.25)
        total = Fraction(base.view(-1)[place].item()) + Fraction(added)
        assert Fraction(found.view(-1)[place].item()) == nearest(total, dtype)


@given(SEEDS, st.booleans())
@settings(max_examples=25, deadline=None)
def test_no_order_of_updates_changes_a_bit(seed: int, with_dense: bool) -> None:
    parts = [(sparse(seed + n, (6, 7), 2, 20, 0.3), w) for n, w in enumerate([1.0, -0.7, 0.31])]
    parts.append((sparse(seed + 9, (6, 7), 2, 0).added, 1.3))
    if with_dense:
        parts.append((Dense(randn(seed, 6, 7)), 0.9))  # type: ignore[arg-type]
    base = randn(seed, 6, 7).float()
    found = {bits(merged(base, order, "F32")) for order in permutations(parts)}
    assert len(found) == 1


def merged(base: torch.Tensor, parts, dtype: str) -> torch.Tensor:
    blocks = merged_blocks(base, delta_of(parts, base.shape), dtype, Survival(), "weight")
    return torch.cat([block.clone() for block in blocks])


def test_it_is_the_same_in_whatever_tiles() -> None:
    update = sparse(3, (40, 11), 2, 130)
    found = delta_of([(update, 1.0)], (40, 11))
    whole = dense(update, (40, 11))
    for step in (1, 7, 40):
        rows = torch.empty(40, 11, dtype=torch.float64)
        for start in range(0, 40, step):
            found.rows(slice(start, start + step), rows[start : start + step])
        assert torch.equal(rows, whole)


@given(sparses(), st.data())
@settings(deadline=None)
def test_rows_of_it(given: tuple[Sparse, Shape], data: st.DataObject) -> None:
    update, shape = given
    cut = data.draw(st.integers(0, shape[0]))
    rows = [slice(cut, shape[0]), slice(0, cut)]
    whole = dense(update, shape)
    found = rows_of(update, rows)
    assert isinstance(found, Sparse)
    assert close(dense(found, shape), torch.cat([whole[cut:], whole[:cut]]))


@given(SEEDS, st.integers(1, 6), st.integers(1, 6), st.integers(1, 5))
@settings(deadline=None)
def test_parts_of_one_tensor_and_back(seed: int, one: int, other: int, columns: int) -> None:
    """As a fused weight of a base has them, rows below rows, and as it is taken apart."""
    names, sizes = ("q", "k"), (one, other)
    updates = [sparse(seed + n, (size, columns), 2, 7) for n, size in enumerate(sizes)]
    lazy = adapter_of({n: (u, (s, columns)) for n, u, s in zip(names, updates, sizes, strict=True)})
    ends = (slice(0, one), slice(one, one + other))
    shape = (one + other, columns)
    shares = [
        Share(lazy[name], (size, columns), place=(end,))
        for name, size, end in zip(names, sizes, ends, strict=True)
    ]
    together = joined("qkv", shape, shares)
    found = together.load()
    assert together.kind == "sparse" and isinstance(found, Sparse)
    assert bool((found.positions.diff() > 0).all())
    whole = torch.cat([dense(u, (s, columns)) for u, s in zip(updates, sizes, strict=True)])
    assert close(dense(found, shape), whole, 1e-6)
    half = Share(together, shape, part=(ends[1], slice(0, columns)))
    back = half.load()
    assert isinstance(back, Sparse)
    assert close(dense(back, (other, columns)), whole[one:], 1e-6)


# Which entries are chosen


def chosen(residual: torch.Tensor, number: int) -> list[int]:
    """The largest, of equal ones the first, of those that are not 0."""
    flat = residual.abs().view(-1)
    order = sorted(range(len(flat)), key=lambda place: (-float(flat[place]), place))
    return sorted(place for place in order[:number] if flat[place] > 0)


@given(SEEDS, st.integers(1, 12), st.integers(1, 12), st.integers(1, 150), st.booleans())
@settings(max_examples=60, deadline=None)
def test_the_largest_entries(seed: int, rows: int, columns: int, number: int, coarse: bool) -> None:
    before = randn(seed, rows, columns).mul(4).round().div(4).float()
    after = randn(seed + 1, rows, columns).mul(4).round().div(4).float()
    update = LowRank(randn(seed, 2, columns).float(), randn(seed, rows, 2).float())
    if coarse:  # with many of one size
        update = LowRank(torch.zeros(1, columns), torch.zeros(rows, 1))
    residual = after - before - update.b @ update.a
    found = largest_entries(before, after, update, number)
    assert found.positions.tolist() == chosen(residual, number)
    assert torch.equal(found.values, residual.view(-1)[found.positions])
    assert found.energy == pytest.approx(float(residual.double().square().sum()), rel=1e-6)


@pytest.mark.parametrize("number", [10, 5_000, 80_000, 400_000])
@pytest.mark.parametrize("pattern", ["even", "rows", "equal", "few"])
def test_the_largest_of_many_tiles(number: int, pattern: str) -> None:
    """Where a sample of rows tells the size of the rest, and where it misleads."""
    after = randn(0, 2000, 300).float()
    if pattern == "rows":
        after *= torch.arange(2000)[:, None] % 997 == 5
    elif pattern == "equal":
        after.sign_()
    elif pattern == "few":
        after *= randn(1, 2000, 300) > 1.5
    update = LowRank(torch.zeros(1, 300), torch.zeros(2000, 1))
    found = largest_entries(torch.zeros(2000, 300), after, update, number)
    sizes = after.abs().view(-1).numpy()
    order = np.argsort(-sizes, kind="stable")[:number]
    assert np.array_equal(found.positions.numpy(), np.sort(order[sizes[order] > 0]))


@pytest.mark.parametrize(("wanted", "number"), [(3, 3), (500, 200), (0.1, 20), (1e-9, 1)])
def test_how_many_entries(wanted: float, number: int) -> None:
    assert entries_of(wanted, 200) == number


def tensor(name: str, values: torch.Tensor) -> LazyTensor:
    return lazy_tensor(name, values)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float32, torch.float64])
def test_the_certificate_is_of_both_together(transposed: bool, kind: torch.dtype) -> None:
    base, tuned = randn(1, 20, 30).to(kind), randn(2, 20, 30).to(kind)
    difference = tuned.double() - base.double()
    u, s, v = torch.linalg.svd(difference)
    factors = (v[:3] * s[:3, None]).bfloat16(), u[:, :3].bfloat16()
    found = LowRank(*factors, certificate=Certificate(3, float(difference.square().sum()), 1.0))
    given = found.transposed() if transposed else found
    result = with_entries(given, tensor("w", base), tensor("w", tuned), transposed, 0.1, "BF16")
    assert isinstance(result, Sparse) and result.certificate is not None
    assert len(result.values) == 60 and result.added is given
    shape = (30, 20) if transposed else (20, 30)
    left = (difference.T if transposed else difference) - delta(result, shape)
    left_alone = difference - found.b.double() @ found.a.double()
    error = math.sqrt(left.square().sum() / difference.square().sum())
    assert result.certificate.relative_error == pytest.approx(error, rel=1e-5)
    assert float(left.square().sum()) < float(left_alone.square().sum())


def test_nothing_left_over_is_a_plain_update() -> None:
    base, tuned = torch.zeros(3, 4), torch.zeros(3, 4)
    tuned[1, 2] = 1.0
    found = LowRank(
        tuned[1:2], torch.tensor([[0.0], [1.0], [0.0]]), certificate=Certificate(1, 1, 1)
    )
    assert with_entries(found, tensor("w", base), tensor("w", tuned), False, 2, "F32") is found
    assert with_entries(None, tensor("w", base), tensor("w", base), False, 2, "F32") is None


def test_entries_that_overflow_are_told() -> None:
    tuned = torch.full((2, 2), 1e6)
    found = LowRank(torch.zeros(1, 2), torch.zeros(2, 1), certificate=Certificate(1, 4e12, 0))
    with pytest.raises(InputError, match="w: its largest entries overflow F16"):
        with_entries(found, tensor("w", torch.zeros(2, 2)), tensor("w", tuned), False, 2, "F16")
