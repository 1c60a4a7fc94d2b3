"""Whether a fine-tune looks like a merged LoRA: by the energy that rounding must leave."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from loratool.linalg import Context
from loratool.noise import rounding_noise
from loratool.suspicion import (
    Suspicion,
    gate,
    gates,
    in_any_order,
    merged_rank,
    rounding_energy,
    suspected,
    suspicion_facts,
    suspicion_lines,
)
from tests.merged_lora import delta, merged, tuned


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)  # as the library does
    yield
    torch.set_num_threads(before)


def spectrum(context: Context) -> tuple[float, list[float]]:
    sigma = torch.linalg.svdvals(delta(context).double())
    return float(sigma.square().sum()), sigma[:16].square().tolist()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_the_energy_of_rounding_is_that_of_rounding(dtype: torch.dtype) -> None:
    exact = torch.randn(500, 700, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    rounded = exact.to(dtype)
    measured = float((rounded.double() - exact).square().sum())
    assert rounding_energy(rounded) == pytest.approx(measured, rel=0.02)
    assert rounding_energy(torch.zeros(3, 4, dtype=dtype)) < 1e-10


@pytest.mark.parametrize("ratio", [6e-3, 3e-2])
def test_a_merged_lora_leaves_just_that_and_a_full_fine_tune_more(ratio: float) -> None:
    context, _ = merged(ratio=ratio, rank=8)
    total, energies = spectrum(context)
    found = gates(context.after, total, energies)
    assert 0.9 < found[7].ratio < 1.05
    assert found[7] == gate(context.after, total, sum(energies[:8]), 8)
    assert [g.passed for g in found[7:]] == [True] * 9
    assert not any(g.passed for g in found[:4])
    full = tuned(ratio=ratio)
    total, energies = spectrum(full)
    assert not any(g.passed for g in gates(full.after, total, energies))


def test_it_is_blind_to_changes_below_rounding() -> None:
    for context in (merged(ratio=3e-4)[0], tuned(ratio=3e-4)):
        total, energies = spectrum(context)
        found = gates(context.after, total, energies)
        assert all(g.passed and g.is_blind for g in found)


def test_only_ranks_that_leave_most_directions_are_looked_at() -> None:
    context, _ = merged((24, 40), rank=2)
    total, energies = spectrum(context)
    assert [g.rank for g in gates(context.after, total, energies)] == [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize("ratio", [3e-3, 6e-3, 3e-2])
def test_the_rank_of_a_merged_lora_is_where_the_gap_is(ratio: float) -> None:
    context, _ = merged(ratio=ratio, rank=8)
    total, energies = spectrum(context)
    found, sigma = gates(context.after, total, energies), [energy**0.5 for energy in energies]
    above = sum(value > rounding_noise(delta(context), context.after).edge for value in sigma)
    assert merged_rank(found, sigma, above) == 8
    full = tuned(ratio=ratio)
    total, energies = spectrum(full)
    assert merged_rank(gates(full.after, total, energies), sigma, 16) is None


def test_noise_alone_has_no_rank() -> None:
    after = torch.ones(100, 100, dtype=torch.bfloat16)
    noise = rounding_energy(after)
    assert merged_rank(gates(after, noise, [0.03 * noise, 0.025 * noise]), (1.1, 1.0), 0) is None
    assert merged_rank(gates(after, 6 * noise, [5 * noise, 0.1 * noise]), (7.1, 1.0), 1) == 1
    assert merged_rank(gates(after, 9 * noise, [5 * noise, 0.1 * noise]), (7.1, 1.0), 1) is None


def test_all_samples_must_pass() -> None:
    lora, full, fine = merged()[0], tuned(ratio=1e-2), merged(dtype=torch.float32)[0]
    good, bad = ("a", lora.after, *spectrum(lora)), ("b", full.after, *spectrum(full))
    found = suspected([good], 10**9)
    assert found is not None and found.rank == 8 and not found.is_blind
    assert suspected([good, bad], 10**9) is None
    assert suspected([("c", fine.after, *spectrum(fine))], 10**9) is None
    assert suspected([], 0) is None


def test_what_is_said_of_it() -> None:
    lora, small = merged()[0], merged(ratio=3e-4)[0]
    clear = suspected([("a", lora.after, *spectrum(lora))], 30_000_000)
    assert isinstance(clear, Suspicion)
    (line,) = suspicion_lines(clear)
    assert line.startswith("looks like a merged LoRA of about rank 8, rounded to bf16")
    assert "`--factorizer rounding_cell`" in line and "about 30 s" in line
    blind = suspected([("a", small.after, *spectrum(small))], 7_000_000_000)
    (line,) = suspicion_lines(blind)
    assert line.startswith("perhaps a merged LoRA") and "`--factorizer auto`" in line
    assert "2 h of processor time" in line
    (line,) = suspicion_lines(blind, "another")
    assert "a merged LoRA" in line and line.endswith("or another")
    assert suspicion_lines(clear, "another") == suspicion_lines(clear)
    assert suspicion_lines(None) == [] and suspicion_facts(None) == {}
    told = suspicion_facts(clear)["looks_like"]
    assert told["merged_lora_of_about_rank"] == 8 and not told["too_small_to_tell"]


def test_the_order_of_names_does_not_depend_on_how_they_come() -> None:
    names = [f"layers.{n}.weight" for n in range(20)]
    assert in_any_order(names) == in_any_order(reversed(names)) != names
