"""Rounding cells: ends that are right to the last bit, for every kind of number."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from loratool.dtypes import dtype_name
from loratool.rounding import round_to
from loratool_plugins.factorizers._cells import Cells, Fit, Replay, _cells, could_be, fitted
from tests.merged_lora import delta, merged

TYPES = [torch.bfloat16, torch.float16]
REPLAYS: list[Replay] = ["sum", "delta, then sum"]


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)  # as the library does
    yield
    torch.set_num_threads(before)


def every_number(dtype: torch.dtype) -> torch.Tensor:
    """All finite numbers of a type but the largest, which have no neighbour."""
    numbers = torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype)
    return numbers[numbers.float().abs() < torch.finfo(dtype).max]


def added(before: torch.Tensor, change: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return round_to(before.double() + change.double(), dtype_name(dtype))


@pytest.mark.parametrize("dtype", TYPES)
def test_the_ends_of_a_cell_round_to_its_weight_and_what_lies_outside_does_not(dtype) -> None:
    after = every_number(dtype)
    zero = torch.zeros(len(after), dtype=dtype)
    low, high = _cells(zero, after, "sum")
    smaller = torch.nextafter(low, torch.tensor(-torch.inf))
    larger = torch.nextafter(high, torch.tensor(torch.inf))
    for inside in (low, high):
        assert torch.equal(added(zero, inside, dtype).float(), after.float())
    for outside in (smaller, larger):
        assert not (added(zero, outside, dtype).float() == after.float()).any()


@pytest.mark.parametrize("replay", REPLAYS)
@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("base", [torch.float32, None])
def test_whatever_lies_in_a_cell_is_merged_to_the_same_weight(dtype, base, replay) -> None:
    context, update = merged(dtype=dtype, ratio=0.1, base=base, delta_first=replay != "sum")
    low, high = _cells(context.before, context.after, replay)
    assert bool((low <= update).all() and (update <= high).all())
    for part in (0.0, 0.3, 0.7, 1.0):
        inside = (low.double() + part * (high.double() - low.double())).float()
        change = inside if replay == "sum" else inside.to(dtype).float()
        found = added(context.before, change, dtype)
        hits = (found.float() == context.after.float()).float().mean()
        assert hits == 1 if 0 < part < 1 else hits > 0.99  # ends are rounded to fp32
    step = 1e-3 * (high - low)
    for outside in (low - step, high + step):
        change = outside if replay == "sum" else outside.to(dtype).float()
        found = added(context.before, change, dtype)
        assert (found.float() != context.after.float()).float().mean() > 0.99


@pytest.mark.parametrize("delta_first", [False, True])
def test_empty_cells_tell_how_a_merge_has_rounded(delta_first: bool) -> None:
    context, _ = merged(ratio=0.01, delta_first=delta_first)
    assert could_be("sum", context.before, context.after)
    assert could_be("delta, then sum", context.before, context.after) == delta_first


def test_what_was_merged_predicts_all_hidden_cells_and_nothing_predicts_none() -> None:
    context, update = merged(rank=3)
    u, s, v = torch.linalg.svd(update.double(), full_matrices=False)
    truth = Fit(u[:, :3].float(), s[:3].float(), v[:3].float())
    cells = Cells(context.before, context.after, "sum", 0)
    places = torch.arange(0, update.numel(), 7)
    hidden = cells.hide(places)
    assert 0 < hidden.count < len(places)
    assert hidden.share(truth) > 0.999  # fp32 factors
    assert hidden.share(truth._replace(sigma=torch.zeros(3))) == 0
    noise = cells.pull(truth, truth.left * 0, truth.right)
    cells.show(hidden)
    more = cells.pull(truth, truth.left * 0, truth.right)
    assert more.violation > noise.violation
    assert cells.pull(truth, truth.left * truth.sigma, truth.right).violation < 1e-9 * s[0] ** 2


def test_a_fit_moves_into_the_cells() -> None:
    context, update = merged(rank=4)
    u, s, v = torch.linalg.svd(delta(context).double(), full_matrices=False)
    start = Fit(u[:, :4].float(), s[:4].float(), v[:4].float())
    cells = Cells(context.before, context.after, "sum", 0)
    errors, violations = [], []
    for steps in (0, 10, 50):
        found = fitted(start, cells, steps)
        left, right = found.left * found.sigma, found.right
        errors.append(float((left @ right - update).norm() / update.norm()))
        violations.append(cells.pull(found, left, right).violation)
    assert errors[0] > 2 * errors[1] > 2 * errors[2]
    assert violations[0] > 10 * violations[1] > 10 * violations[2]
