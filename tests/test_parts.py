"""Updates of parts of tensors: taken, joined, and the same values as before."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from loratool.adapter import LazyUpdate
from loratool.deltas import dense
from loratool.parts import Share, complaint, composed, joined
from loratool.pieces import Piece
from loratool.updates import Dense, DoRA, Experts, LowRank, Update
from tests.updates import randn


def lazy(update: Update, shape: tuple[int, ...]) -> LazyUpdate:
    return LazyUpdate("w", update.kind, shape, "F32", lambda: update)


def low_rank(seed: int, rows: int, columns: int, rank: int = 2) -> LowRank:
    return LowRank(randn(seed, rank, columns), randn(seed + 50, rows, rank), 0.5)


def value(share_or_update: LazyUpdate, shape: tuple[int, ...]) -> torch.Tensor:
    found = share_or_update.load()
    assert isinstance(found, LowRank | Experts | Dense)
    return dense(found, shape)


@settings(deadline=None)
@given(st.integers(0, 50), st.lists(st.integers(1, 5), min_size=1, max_size=4))
def test_updates_of_parts_are_one_update_of_the_tensor(seed: int, heights: list[int]) -> None:
    shape, shares, wanted, start = (sum(heights), 7), [], [], 0
    for number, height in enumerate(heights):
        update = low_rank(seed + number, height, 7, 1 + number)
        place = (slice(start, start + height),)
        shares.append(Share(lazy(update, (height, 7)), (height, 7), place=place))
        wanted.append(dense(update, (height, 7)))
        start += height
    assert not complaint(shares, shape)
    found = joined("fused", shape, shares)
    assert found.kind == "low_rank"
    torch.testing.assert_close(value(found, shape), torch.cat(wanted), rtol=1e-6, atol=1e-6)


@settings(deadline=None)
@given(st.integers(0, 50), st.integers(1, 5), st.integers(1, 5))
def test_an_update_of_a_fused_tensor_is_divided_by_rows(seed: int, one: int, other: int) -> None:
    update = low_rank(seed, one + other, 4)
    whole = dense(update, (one + other, 4))
    for rows in (slice(0, one), slice(one, one + other)):
        height = rows.stop - rows.start
        share = Share(lazy(update, (one + other, 4)), (one + other, 4), part=(rows,))
        found = joined("part", (height, 4), [share])
        torch.testing.assert_close(value(found, (height, 4)), whole[rows], rtol=1e-6, atol=1e-6)


def test_experts_on_disk_and_in_memory() -> None:
    """One tensor of each expert's gate and up projection, from a 3-D parameter and back."""
    update = Experts(randn(1, 3, 2, 5), randn(2, 3, 8, 2), 0.5)
    whole = dense(update, (3, 8, 5))
    shares = []
    for expert in range(3):
        for rows in (slice(0, 4), slice(4, 8)):
            source = Share(lazy(update, (3, 8, 5)), (3, 8, 5))
            taken = composed(source, Piece("t", (expert, rows)))
            assert taken is not None
            part = joined("t", (4, 5), [taken])
            assert part.kind == "low_rank"
            torch.testing.assert_close(
                value(part, (4, 5)), whole[expert, rows], rtol=1e-6, atol=1e-6
            )
            shares.append(Share(part, (4, 5), place=(expert, rows)))
    again = joined("fused", (3, 8, 5), shares)
    assert again.kind == "experts"
    torch.testing.assert_close(value(again, (3, 8, 5)), whole, rtol=1e-6, atol=1e-6)


def test_rows_of_rows() -> None:
    """Rows 2 to 5 of a parameter whose rows 0 to 3 and 4 to 7 lie in two tensors."""
    update = low_rank(3, 4, 6)
    share = Share(lazy(update, (4, 6)), (4, 6), place=(slice(2, 6),))
    first = composed(share, Piece("a", (slice(0, 4),)))
    second = composed(share, Piece("b", (slice(4, 8),), (slice(10, 14),)))
    assert first is not None and (first.part, first.place) == ((slice(0, 2),), (slice(2, 4),))
    assert second is not None and second.part == (slice(2, 4),)
    assert second.place == (slice(10, 12),)
    assert composed(share, Piece("c", (slice(8, 9),))) is None


def test_dora_needs_all_rows() -> None:
    update = DoRA(low_rank(4, 3, 5), randn(5, 3))
    half = Share(lazy(update, (3, 5)), (3, 5), place=(slice(0, 3),))
    other = Share(lazy(update, (3, 5)), (3, 5), place=(slice(3, 6),))
    assert "DoRA update: of only a part" in complaint([half], (6, 5))
    assert not complaint([half, other], (6, 5))
    found = joined("fused", (6, 5), [half, other]).load()
    assert isinstance(found, DoRA) and found.magnitude.shape == (6,)
    mixed = Share(lazy(low_rank(6, 3, 5), (3, 5)), (3, 5), place=(slice(3, 6),))
    assert complaint([half, mixed], (6, 5))
