"""rescale scales every linear kind of update, and cuts ranks of whatever has factors A and B."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from loratool.engine import Drain, save_adapter
from loratool.errors import InputError, MismatchError
from loratool.steps.rescale import Rescale
from loratool.updates import IA3, Dense, DoRA, Experts, LoHa, LoKr, LowRank, Product, Rows
from tests import updates as some
from tests.adapters import config, stored
from tests.lazy import (
    Given,
    adapter_of,
    close,
    delta,
    experts,
    loaded,
    matrices,
    replacement,
    rows,
)
from tests.updates import randn

common = settings(derandomize=True, deadline=None, max_examples=30)
strengths = st.sampled_from([0.3, -0.3, 2.0, -1.0, 1e-3])


@st.composite
def linear(draw: st.DrawFn) -> Given:
    """An update of any linear kind, and the shape of its weight."""
    kind = draw(st.sampled_from(["loha", "lokr", "dense", "experts", "low_rank"]))
    seed, scale = draw(st.integers(0, 10_000)), draw(st.sampled_from([1.0, 16 / 3, 0.1, -0.7]))
    if kind == "loha":
        return draw(some.lohas())
    if kind == "lokr":
        return draw(some.lokrs())
    if kind == "experts":
        return experts(seed, 3, 5, 4, 2, scale), (3, 5, 4)
    shape = draw(some.shapes())
    if kind == "dense":
        return Dense(randn(seed, *shape), scale), shape
    columns = math.prod(shape[1:])
    return LowRank(randn(seed, 2, columns), randn(seed + 1, shape[0], 2), scale), shape


def rescaled(found: dict[str, Given], **options: Any) -> dict[str, Any]:
    return dict(loaded(Rescale(**options).run(adapter_of(found))))


@common
@given(found=linear(), by=strengths)
def test_by_multiplies_every_linear_kind_exactly(found: Given, by: float) -> None:
    update, shape = found
    (result,) = rescaled({"m.weight": found}, by=by).values()
    assert type(result) is type(update)
    before = update.scale  # type: ignore[union-attr]
    assert result.scale == before * abs(by)
    assert close(delta(result, shape), by * delta(update, shape), 1e-14)


# ---- experts


@common
@given(seed=st.integers(0, 1000), rank=st.integers(1, 5), dtype=st.sampled_from(["fp64", "fp32"]))
def test_every_expert_is_cut_to_its_best_approximation(seed: int, rank: int, dtype: str) -> None:
    update = experts(seed, 3, 7, 6, 4, 1.5, torch.float64)
    (found,) = rescaled({"m.w": (update, (3, 7, 6))}, rank=rank, dtype=dtype).values()
    assert isinstance(found, Experts) and found.certificate is not None
    assert found.rank == min(rank, 4)
    lost = total = 0.0
    for before, after in zip(matrices(update), matrices(found), strict=True):
        u, sigma, v = torch.linalg.svd(before, full_matrices=False)
        best = u[:, :rank] * sigma[:rank] @ v[:rank]
        assert close(after, best, 1e-12 if dtype == "fp64" else 1e-6)
        lost += float((before - after).square().sum())
        total += float(sigma.square().sum())
    assert math.isclose(found.certificate.total, total, rel_tol=1e-12)
    error = found.certificate.relative_error
    assert math.isclose(error, math.sqrt(lost / total), rel_tol=1e-5, abs_tol=1e-7)


def test_all_experts_get_the_rank_of_the_one_that_needs_most() -> None:
    steep = experts(0, 1, 8, 8, 4, dtype=torch.float64)
    flat = torch.eye(8, dtype=torch.float64)[None, :, :4]
    update = Experts(torch.cat([steep.a, flat.mT]), torch.cat([0.1 * steep.b, flat]))
    (found,) = rescaled({"m.w": (update, (2, 8, 8))}, energy=0.7).values()
    sigmas = [torch.linalg.svdvals(m).square() for m in matrices(update)]
    needed = [int((s.cumsum(0) < 0.7 * s.sum()).sum()) + 1 for s in sigmas]
    assert needed[0] < needed[1] == 3  # 4 equal values: 70% takes 3
    assert found.rank == 3
    for before, after in zip(matrices(update), matrices(found), strict=True):
        assert float(after.square().sum()) >= 0.7 * float(before.square().sum())


def test_normalize_gives_experts_and_others_one_rank() -> None:
    given = {
        "m.w": (experts(0, 3, 5, 4, 2, 0.5), (3, 5, 4)),
        "n.weight": (LowRank(randn(1, 3, 6), randn(2, 7, 3), 2.0), (7, 6)),
    }
    found = rescaled(given, normalize=True)
    for name, (update, shape) in given.items():
        assert (found[name].rank, found[name].scale) == (3, 1.0)
        assert close(delta(found[name], shape), delta(update, shape), 1e-6)


@pytest.mark.parametrize("budget", [200, 500, 1000, 4000])
def test_a_budget_counts_what_all_experts_take(budget: int) -> None:
    given = {
        "m.w": (experts(0, 3, 5, 4, 4), (3, 5, 4)),
        "n.weight": (LowRank(randn(1, 5, 12).float(), randn(2, 7, 5).float()), (7, 3, 2, 2)),
    }
    found = rescaled(given, budget=f"{budget}B")
    assert sum(u.a.nbytes + u.b.nbytes for u in found.values()) <= budget
    if budget == 4000:
        assert {n: u.rank for n, u in found.items()} == {"m.w": 4, "n.weight": 5}


def test_a_negative_strength_keeps_the_scale_of_experts_positive() -> None:
    update = experts(0, 2, 3, 4, 2, 1.5)
    (found,) = rescaled({"m.w": (update, (2, 3, 4))}, by=-2).values()
    assert found.scale == 3.0
    assert torch.equal(found.b, -update.b) and torch.equal(found.a, update.a)


# ---- biases beside factors


def with_bias(dtype: torch.dtype = torch.float32) -> dict[str, Given]:
    """A module with factors and a bias under the same scale, as PEFT's lora_bias has them."""
    low = LowRank(randn(0, 2, 5).to(dtype), randn(1, 6, 2).to(dtype), 1.5)
    return {"m.weight": (low, (6, 5)), "m.bias": (Dense(randn(2, 6).to(dtype), 1.5), (6,))}


@pytest.mark.parametrize(
    ("options", "strength"),
    [
        ({"by": 0.3}, 0.3),
        ({"by": -2.0}, -2.0),
        ({"alpha": 5.0}, 2.5 / 1.5),
        ({"alpha": 5.0, "keep_delta": True}, 1.0),
        ({"alpha": 5.0, "keep_delta": True, "by": -0.5, "rank": 1}, -0.5),
        ({"normalize": True, "by": 3.0}, 3.0),
        ({"rank": 1}, 1.0),
        ({"balance": True}, 1.0),
        ({"dtype": "fp64"}, 1.0),
    ],
)
def test_a_bias_follows_the_factors_beside_it(options: dict[str, Any], strength: float) -> None:
    given = with_bias(torch.float64)
    found = rescaled(given, **options)
    bias, low = found["m.bias"], found["m.weight"]
    assert close(bias.scale * bias.values, strength * 1.5 * given["m.bias"][0].values, 1e-12)  # type: ignore[union-attr]
    assert bias.scale == low.scale  # what PEFT multiplies it by
    if "rank" not in options:
        assert close(delta(low, (6, 5)), strength * delta(given["m.weight"][0], (6, 5)), 1e-6)


def test_a_budget_leaves_out_no_factors_that_a_bias_is_beside() -> None:
    given = with_bias()
    given["n.weight"] = (LowRank(100 * randn(3, 3, 5).float(), randn(4, 6, 3).float()), (6, 5))
    found = rescaled(given, budget="88B")  # two ranks of 44 bytes
    assert {name: found[name].rank for name in ("m.weight", "n.weight")} == {
        "m.weight": 1, "n.weight": 1,
    }  # fmt: skip
    with pytest.raises(InputError, match="with a bias's beside it takes 44 B"):
        rescaled(given, budget="43B")


def test_a_bias_alone_has_no_alpha() -> None:
    given = {"m.bias": (Dense(randn(0, 6)), (6,))}
    assert torch.equal(rescaled(given, by=2)["m.bias"].values, randn(0, 6))
    with pytest.raises(MismatchError, match=r"m\.bias: full-size delta: has no alpha: --by"):
        rescaled(given, alpha=2)


# ---- what has no factors, and what is not linear


@common
@given(found=st.one_of(some.lohas(), some.lokrs()))
def test_alpha_of_loha_and_lokr_is_over_their_rank(found: tuple[LoHa | LoKr, Any]) -> None:
    update, _ = found
    sides = [update.one, update.other] if isinstance(update, LoHa) else [update.other, update.one]
    ranks = [side.left.shape[1] for side in sides if side.right is not None]
    if not ranks:
        with pytest.raises(InputError, match="change it with --by"):
            rescaled({"m.weight": found}, alpha=3)
        return
    (result,) = rescaled({"m.weight": found}, alpha=3).values()
    assert math.isclose(result.scale, 3 / ranks[0], rel_tol=1e-15)


@common
@given(found=linear(), dtype=st.sampled_from(["bf16", "fp16", "fp32"]))
def test_the_error_of_another_type_is_the_one_that_is_told(found: Given, dtype: str) -> None:
    update, shape = found
    step = Rescale(dtype=dtype).run(adapter_of({"m.weight": found}))
    (result,) = loaded(step).values()
    before, after = delta(update, shape), delta(result, shape)
    error = float((before - after).norm() / before.norm()) if before.norm() else 0.0
    line = step.provenance.lines()[-1]
    told = 0.0 if "exactly" in line else float(line.partition("at most ")[2].partition(" ")[0])
    assert math.isclose(told, error, rel_tol=0.1, abs_tol=2e-7)


OF_OTHER_KINDS: dict[str, Given] = {
    "h.weight": (LoHa(some.product(0, 4, 2, 3), some.product(5, 4, 2, 3)), (4, 3)),
    "k.weight": (LoKr(Product(randn(0, 2, 2)), Product(randn(1, 2, 2))), (4, 4)),
    "d.weight": (Dense(randn(2, 4, 3)), (4, 3)),
}
RELATIVE: dict[str, Given] = {
    "o.weight": (DoRA(LowRank(randn(0, 2, 5), randn(1, 6, 2)), randn(2, 6)), (6, 5)),
    "i.weight": (IA3(randn(3, 6)), (6, 0)),
}
WHOLE: dict[str, Given] = {
    "t.weight": (rows((1, 3)), (2, 4)),
    "r.weight": (replacement("r.weight", randn(0, 3, 3)), (3, 3)),
}
LOW: dict[str, Given] = {"m.weight": (LowRank(randn(0, 2, 5), randn(1, 6, 2)), (6, 5))}


@pytest.mark.parametrize(
    "options",
    [{"rank": 1}, {"energy": 0.5}, {"ratio": 3.0}, {"budget": "1KiB"}, {"normalize": True},
     {"balance": True}, {"alpha": 2.0, "keep_delta": True}],
    ids=str,
)  # fmt: skip
def test_what_has_no_factors_is_refused_by_name(options: dict[str, Any]) -> None:
    with pytest.raises(MismatchError) as caught:
        rescaled({**LOW, **OF_OTHER_KINDS}, **options)
    lines = str(caught.value).splitlines()
    kinds = {"h.weight": "LoHa update", "k.weight": "LoKr update", "d.weight": "full-size delta"}
    for name, kind in kinds.items():
        (line,) = [line for line in lines if name in line]
        assert line.startswith(f"  {name}: {kind}: has no factors A and B")
        assert "`loratool convert --to-lora`" in line


@pytest.mark.parametrize("options", [{"by": 0.5}, {"alpha": 2.0}, {"rank": 1}, {"dtype": "fp16"}])
def test_what_depends_on_the_base_is_refused_by_name(options: dict[str, Any]) -> None:
    with pytest.raises(MismatchError) as caught:
        rescaled({**LOW, **RELATIVE}, **options)
    text = str(caught.value)
    assert "o.weight: DoRA update: depends on the base's weights" in text
    assert "i.weight: IA3 scaling: depends on the base's weights" in text
    assert text.count("`loratool convert --to-lora --base BASE`") == 2


def test_by_1_passes_everything_on() -> None:
    given = {**LOW, **OF_OTHER_KINDS, **RELATIVE, **WHOLE}
    found = rescaled(given, by=1)
    assert found.keys() == given.keys()
    for name, (update, shape) in {**LOW, **OF_OTHER_KINDS}.items():
        assert torch.equal(delta(found[name], shape), delta(update, shape))
    for name, (update, _) in {**RELATIVE, **WHOLE}.items():
        assert found[name] is update


def test_what_is_set_passes_through_and_is_told() -> None:
    step = Rescale(by=0.5).run(adapter_of({**LOW, **WHOLE}))
    found = loaded(step)
    assert isinstance(found["t.weight"], Rows) and found["t.weight"] is WHOLE["t.weight"][0]
    assert found["r.weight"] is WHOLE["r.weight"][0]
    (note,) = step.notes
    assert note == (
        "1 table with replaced rows and 1 tensor kept whole (t.weight, ...): no strength can "
        "scale these"
    )


@pytest.mark.parametrize(
    "update", [Dense(torch.tensor([[math.nan]])), Dense(torch.empty(0, 2)),
               LoHa(Product(torch.ones(1, 1)), Product(torch.tensor([[math.inf]])))],
)  # fmt: skip
def test_what_cannot_be_calculated_with_is_named(update: Any) -> None:
    with pytest.raises(InputError, match=r"m\.weight: .+ (holds NaN or Inf|is empty)"):
        rescaled({"m.weight": (update, (1, 1))}, by=2)


def test_values_that_overflow_are_told() -> None:
    with pytest.raises(InputError, match=r"m\.weight: overflows F16: choose a wider --dtype"):
        rescaled({"m.weight": (Dense(torch.tensor([[1e6]])), (1, 1))}, dtype="fp16")


def test_a_folded_bias_in_16_bits_is_written_without_rounding(tmp_path: Path) -> None:
    """The scale of PEFT's factors is also its biases': another one has to be worked in."""
    low = LowRank(randn(0, 2, 5).bfloat16(), randn(1, 6, 2).bfloat16(), 1.5)
    values = randn(2, 6).bfloat16()
    adapter = adapter_of({"m.weight": (low, (6, 5)), "m.bias": (Dense(values, 0.1), (6,))})

    save_adapter(adapter, tmp_path / "out", Drain("serial"))
    written = stored(tmp_path / "out")["base_model.model.m.lora_B.bias"]
    scale = config(tmp_path / "out")["lora_alpha"] / 2
    assert written.dtype == torch.float32
    assert close(scale * written.double(), 0.1 * values.double(), 1e-7)
