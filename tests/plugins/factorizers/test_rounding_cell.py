"""Recovery of merged LoRA: several times closer than truncated SVD, and refused where none was."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from loratool.errors import InputError
from loratool.linalg import Context, Factorization, RankPolicy, named_generator
from loratool_plugins.factorizers import rounding_cell
from loratool_plugins.factorizers.auto import Auto
from loratool_plugins.factorizers.krylov import Krylov
from loratool_plugins.factorizers.rounding_cell import RoundingCell
from tests.merged_lora import delta, merged, tuned


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)  # as the library does
    yield
    torch.set_num_threads(before)


def recover(context: Context, rank: int | None = 16, **policy: float) -> Factorization:
    generator = named_generator(0, context.name)
    wanted = RankPolicy(rank, **policy)
    return RoundingCell().factorize_in(delta(context), wanted, generator, context)


def plain(context: Context, rank: int) -> Factorization:
    return Krylov().factorize(delta(context), RankPolicy(rank), named_generator(0, context.name))


def error(found: Factorization, update: torch.Tensor) -> float:
    """||B A - update|| / ||update||."""
    return float((found.b @ found.a - update).norm() / update.norm())


def facts(found: Factorization) -> dict:
    return found.certificate.details["recovery"]


@pytest.mark.parametrize("delta_first", [False, True])
@pytest.mark.parametrize(
    ("dtype", "ratio"),
    [
        (torch.bfloat16, 1e-3),
        (torch.bfloat16, 3e-3),
        (torch.bfloat16, 2e-2),
        (torch.float16, 4e-4),
    ],
)
def test_it_is_several_times_closer_than_truncated_svd(dtype, ratio, delta_first) -> None:
    context, update = merged((384, 512), dtype=dtype, ratio=ratio, delta_first=delta_first)
    found = recover(context)
    assert found.certificate.method == "rounding-cell"
    assert facts(found)["rank"] == found.certificate.rank == 8
    if ratio > 1e-2:  # else the two leave nearly the same cells
        assert facts(found)["replay"] == ("delta, then sum" if delta_first else "sum")
    assert facts(found)["held_out"] > 0.8
    times = 7 if ratio < 1e-2 else 5
    assert times * error(found, update) < error(plain(context, 8), update)


@pytest.mark.parametrize("rank", [1, 2, 3, 6, 12])
def test_the_rank_is_found(rank: int) -> None:
    context, update = merged((384, 512), rank=rank)
    found = recover(context, rank=24)
    assert found.certificate.rank == rank
    assert 6 * error(found, update) < error(plain(context, rank), update)


def test_a_rank_twice_too_large_is_still_better_than_truncated_svd(monkeypatch) -> None:
    context, update = merged((384, 512))
    monkeypatch.setattr(rounding_cell, "_candidates", lambda *_: [16])
    monkeypatch.setattr(rounding_cell._Trials, "_between", lambda _, best: best)
    found = recover(context)
    assert facts(found)["rank"] == 16
    assert 3 * error(found, update) < error(plain(context, 16), update)


def test_the_base_may_be_more_precise_than_the_merge() -> None:
    context, update = merged((384, 512), base=torch.float32)
    found = recover(context)
    assert found.certificate.rank == 8
    assert 7 * error(found, update) < error(plain(context, 8), update)


@pytest.mark.parametrize("exponent", [-40, 20])
def test_it_does_not_depend_on_the_scale_of_the_weights(exponent: int) -> None:
    context, update = merged()
    before, after = (x * 2.0**exponent for x in (context.before, context.after))
    found, scaled = recover(context), recover(Context("w", before, after, False))
    assert facts(found) == facts(scaled)
    product = scaled.b.double() @ scaled.a.double() * 2.0**-exponent
    assert torch.allclose(product, (found.b @ found.a).double(), atol=1e-6 * float(update.norm()))


def test_the_certificate_is_that_of_the_factors_against_the_delta() -> None:
    for ratio in (3e-4, 3e-3):
        context, _ = merged((384, 1024), ratio=ratio)
        found, change = recover(context), delta(context).double()
        assert found.certificate.method == "rounding-cell"
        lost = float((change - found.b.double() @ found.a.double()).norm() / change.norm())
        assert found.certificate.relative_error == pytest.approx(lost, rel=1e-4)
        assert 0 <= found.certificate.energy <= plain(context, 8).certificate.energy


def test_an_energy_can_still_cut_the_rank() -> None:
    context, _ = merged()
    total = float(delta(context).square().sum())
    found = recover(context, rank=None, energy=0.4)
    assert found.certificate.method == "rounding-cell"
    assert facts(found)["rank"] == 8 > found.certificate.rank
    assert float(found.sigma.square().sum()) >= 0.4 * total
    assert float(found.sigma[:-1].square().sum()) < 0.4 * total


@pytest.mark.parametrize("gate", [True, False])
@pytest.mark.parametrize("decay", [0.3, 0.7])
@pytest.mark.parametrize("ratio", [3e-2, 3e-3, 3e-4])
def test_full_fine_tunes_are_refused(monkeypatch, ratio: float, decay: float, gate: bool) -> None:
    context = tuned(ratio=ratio, decay=decay)
    if not gate:
        monkeypatch.setattr(rounding_cell, "_candidates", lambda *_: [1, 2, 4, 8, 16])
    found, expected = recover(context), plain(context, 16)
    assert found.certificate.method.endswith("(not a rounded LoRA)")
    assert facts(found).get("held_out", 0.0) < 0.5
    assert torch.equal(found.a, expected.a) and torch.equal(found.b, expected.b)
    assert not found.is_precise


def test_a_larger_rank_than_asked_for_is_refused() -> None:
    context, _ = merged(rank=12)
    found = recover(context, rank=4)
    assert "no LoRA of rank 4 or less" in facts(found)["refused"]
    assert found.certificate.rank == 4


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_types_too_fine_to_hide_anything_are_refused_by_name(dtype: torch.dtype) -> None:
    context, _ = merged(dtype=torch.float32)
    context = Context("w", context.before, context.after.to(dtype), False)
    found = recover(context)
    assert facts(found)["refused"].startswith(f"{str(dtype)[6:]} weights: only what was rounded")
    assert found.certificate.method.endswith("(not a rounded LoRA)")


def test_a_zero_delta_gives_zero_factors() -> None:
    context, _ = merged()
    found = recover(Context("w", context.before, context.before, False))
    assert found.certificate.total == 0 and not found.b.any()


def test_one_changed_row_or_a_few_changed_weights_are_refused() -> None:
    context, _ = merged((256, 2048))
    after = context.before.clone()
    after[5] = context.after[5]
    assert facts(recover(Context("w", context.before, after, False)))["refused"]
    after[5] *= 3  # one direction, but nothing that would predict its elements
    found = recover(Context("w", context.before, after, False))
    assert facts(found)["refused"]
    after = context.before.clone()
    after[3, :10] = context.after[3, :10]
    assert facts(recover(Context("w", context.before, after, False)))["refused"]


@pytest.mark.parametrize("shape", [(1, 1), (1, 64), (64, 1), (3, 5), (2, 4096)])
def test_matrices_too_small_to_tell_are_refused(shape: tuple[int, int]) -> None:
    context, _ = merged(shape, rank=1, ratio=0.05)
    found = recover(context)
    assert found.certificate.total == 0 or facts(found)["refused"]


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_nan_and_inf_are_errors(bad: float) -> None:
    context, _ = merged()
    context.after[2, 3] = bad
    with pytest.raises(InputError, match="NaN or Inf"):
        recover(context)


def test_without_the_weights_it_says_that_it_is_plain() -> None:
    context, _ = merged()
    found = RoundingCell().factorize(delta(context), RankPolicy(4), named_generator(0, "w"))
    assert facts(found) == {"refused": "only the delta is known"}


def test_the_same_seed_gives_the_same_factors() -> None:
    context, _ = merged()
    one, other = recover(context), recover(context)
    assert torch.equal(one.a, other.a) and torch.equal(one.b, other.b)


def test_auto_tries_two_samples_and_says_why() -> None:
    lora, _ = merged()
    full = tuned()
    fp32, _ = merged(dtype=torch.float32)

    def choose(*contexts: Context) -> tuple[str, str]:
        samples = ((delta(context), context) for context in contexts)
        choice = Auto().choose(samples, RankPolicy(16), 0)
        return choice.name, choice.reason

    assert choose(lora)[0] == choose(full, lora)[0] == "rounding_cell"
    assert "is a merged, rounded LoRA" in choose(lora)[1]
    name, reason = choose(full, full, lora)
    assert name == "krylov" and "no LoRA of rank 16 or less" in reason
    assert choose(fp32) == ("krylov", "w: " + facts(recover(fp32))["refused"])
    assert choose() == ("krylov", "nothing has changed")
