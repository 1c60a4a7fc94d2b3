"""Ranks within a budget: never above it, in order, and nearly as good as the best."""

from __future__ import annotations

from itertools import product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loratool.budget import allocate
from loratool.errors import UsageError

Layers = dict[str, tuple[list[float], int, float]]  # energies, cost, weight


def layers(count: int, values: int) -> st.SearchStrategy[Layers]:
    energy = st.lists(st.just(0.0) | st.floats(1e-6, 100), min_size=1, max_size=values)
    layer = st.tuples(
        energy.map(lambda found: sorted(found, reverse=True)),
        st.integers(1, 20),
        st.sampled_from([0.5, 1.0, 3.0]),
    )
    return st.lists(layer, min_size=1, max_size=count).map(
        lambda found: {f"layer{number}": item for number, item in enumerate(found)}
    )


def ranks(found: Layers, budget: int) -> dict[str, int]:
    return allocate(
        {name: energies for name, (energies, _, _) in found.items()},
        {name: cost for name, (_, cost, _) in found.items()},
        budget,
        {name: weight for name, (_, _, weight) in found.items()},
    )


def value(found: Layers, chosen: dict[str, int]) -> float:
    return sum(w * sum(energies[: chosen[n]]) for n, (energies, _, w) in found.items())


def spent(found: Layers, chosen: dict[str, int]) -> int:
    return sum(cost * chosen[name] for name, (_, cost, _) in found.items())


common = settings(derandomize=True, deadline=None, max_examples=200)


@common
@given(found=layers(6, 8), budget=st.integers(0, 400))
def test_a_budget_is_never_exceeded_and_spent_in_order(found: Layers, budget: int) -> None:
    chosen = ranks(found, budget)
    assert list(chosen) == list(found)
    assert spent(found, chosen) <= budget
    for name, (energies, _, _) in found.items():
        assert 0 <= chosen[name] <= len(energies)
        assert all(energy > 0 for energy in energies[: chosen[name]])


@common
@given(found=layers(3, 4), budget=st.integers(0, 80))
def test_the_choice_is_the_best_one_but_for_one_value(found: Layers, budget: int) -> None:
    chosen = ranks(found, budget)
    counts = product(*(range(len(energies) + 1) for energies, _, _ in found.values()))
    choices = (dict(zip(found, count, strict=True)) for count in counts)
    best = max(value(found, c) for c in choices if spent(found, c) <= budget)
    # What was not taken first, by worth per byte, is the most that the greedy rule can miss.
    left = (
        (w * energies[chosen[name]] / cost, w * energies[chosen[name]])
        for name, (energies, cost, w) in found.items()
        if chosen[name] < len(energies)
    )
    missed = max((worth for _, worth in left), default=0.0)
    assert value(found, chosen) >= best - missed - 1e-9


@common
@given(found=layers(5, 6), budget=st.integers(0, 200), more=st.integers(0, 50))
def test_a_larger_budget_captures_no_less(found: Layers, budget: int, more: int) -> None:
    small, large = ranks(found, budget), ranks(found, budget + more)
    assert value(found, large) >= value(found, small) - 1e-9


@common
@given(found=layers(5, 6))
def test_everything_fits_in_what_everything_costs(found: Layers) -> None:
    budget = sum(cost * len(energies) for energies, cost, _ in found.values())
    nonzero = {name: sum(e > 0 for e in energies) for name, (energies, _, _) in found.items()}
    assert ranks(found, budget) == nonzero


def test_the_densest_values_are_taken_first() -> None:
    energies = {"wide": [90.0, 10.0], "narrow": [20.0, 15.0, 1.0]}
    costs = {"wide": 10, "narrow": 1}  # densities 9, 1 and 20, 15, 1
    assert allocate(energies, costs, 2) == {"wide": 0, "narrow": 2}
    assert allocate(energies, costs, 12) == {"wide": 1, "narrow": 2}
    assert allocate(energies, costs, 13) == {"wide": 1, "narrow": 3}
    assert allocate(energies, costs, 23) == {"wide": 2, "narrow": 3}


def test_what_does_not_fit_is_skipped_with_all_that_is_smaller() -> None:
    assert allocate({"a": [100.0, 99.0], "b": [1.0]}, {"a": 10, "b": 1}, 9) == {"a": 0, "b": 1}


def test_weights_count_and_ties_go_to_the_first() -> None:
    energies, costs = {"a": [4.0], "b": [4.0]}, {"a": 1, "b": 1}
    assert allocate(energies, costs, 1) == {"a": 1, "b": 0}
    assert allocate(energies, costs, 1, {"b": 2.0}) == {"a": 0, "b": 1}
    assert allocate(energies, costs, 2, {"a": 0.0}) == {"a": 0, "b": 1}


@pytest.mark.parametrize(
    ("cost", "weight"), [(0, 1.0), (-3, 1.0), (1, -1.0), (1, float("nan")), (1, float("inf"))]
)
def test_impossible_costs_and_weights_are_refused(cost: int, weight: float) -> None:
    with pytest.raises(UsageError, match="a: costs"):
        allocate({"a": [1.0]}, {"a": cost}, 5, {"a": weight})
