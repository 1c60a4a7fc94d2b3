"""What is told of one merged tensor: right verdicts over types, sizes and ways of merging."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from loratool.dtypes import dtype_name, torch_dtype
from loratool.errors import InputError
from loratool.exact import exact_delta
from loratool.linalg import Workspace
from loratool.merging import Survival, merged_blocks
from loratool.proof import (
    COARSE,
    EVIDENCE,
    STOCHASTIC,
    Difference,
    Finding,
    Strength,
    difference,
    prove_update,
    roundest,
)
from loratool.replay import Names, Replay, Update
from loratool.rounding import Stochastic
from loratool.tally import Way

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
NAMES = Names("base: w", "merged: w")
RATIOS = (1e-5, 1e-4, 1e-3, 1e-2, 1e-1)


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """As the engine runs tasks."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def update_of(seed: int, shape: tuple[int, int], rank: int, ratio: float) -> Update:
    """An update whose entries are about `ratio` times those of `weight_of`."""
    generator = torch.Generator().manual_seed(seed)
    b = torch.randn(shape[0], rank, generator=generator)
    a = torch.randn(rank, shape[1], generator=generator)
    return Update(b, a, 0.02 * ratio / math.sqrt(rank))


def weight_of(seed: int, shape: tuple[int, int], dtype: torch.dtype) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1000 + seed)
    return (0.02 * torch.randn(shape, generator=generator)).to(dtype)


def ours(
    weight: torch.Tensor,
    *updates: Update,
    dtype: torch.dtype | None = None,
    at: float = 1.0,
    seed: int | None = None,
) -> torch.Tensor:
    """As loratool merges, stochastically if there is a seed."""
    name = dtype_name(dtype or weight.dtype)
    delta = exact_delta([(u.b, u.a, at * u.scale) for u in updates])
    chance = None if seed is None else Stochastic(name, torch.Generator().manual_seed(seed))
    blocks = merged_blocks(weight, delta, name, Survival(), "w", chance)
    return torch.cat([block.clone() for block in blocks])


def peft(weight: torch.Tensor, update: Update, at: float = 1.0) -> torch.Tensor:
    """As PEFT merges by default."""
    merged = weight.clone()
    merged += (update.b.float() @ update.a.float()) * (at * update.scale)
    return merged


def peft_safe(weight: torch.Tensor, update: Update, at: float = 1.0) -> torch.Tensor:
    """With safe_merge: the delta is rounded first."""
    delta = (update.b.float() @ update.a.float()) * (at * update.scale)
    return weight + delta.to(weight.dtype)


def peft_narrow(weight: torch.Tensor, update: Update) -> torch.Tensor:
    """Without autocast_adapter_dtype: factors and delta are rounded first."""
    b, a = (factor.to(weight.dtype).float() for factor in (update.b, update.a))
    return weight + ((b @ a) * update.scale).to(weight.dtype)


def on_gpu(weight: torch.Tensor, update: Update) -> torch.Tensor:
    """A product in the weight's type: rounded, scaled, rounded, added."""
    b, a = (factor.to(weight.dtype).float() for factor in (update.b, update.a))
    return weight + (b @ a).to(weight.dtype) * update.scale


def tf32(values: torch.Tensor) -> torch.Tensor:
    bits = values.float().view(torch.int32)
    return ((bits + 0x1000) & ~0x1FFF).view(torch.float32)


def coarse(weight: torch.Tensor, update: Update) -> torch.Tensor:
    """With a product in TF32."""
    delta = (tf32(update.b) @ tf32(update.a)) * update.scale
    return (weight.float() + delta).to(weight.dtype)


def judged(
    weight: torch.Tensor, merged: torch.Tensor, update: Update, expected: float = 1.0
) -> Finding:
    return prove_update(Replay(weight, merged, update, Workspace(), NAMES), expected)


MERGES: Mapping[str, Callable[[torch.Tensor, Update], torch.Tensor]] = {
    "ours": ours,
    "peft": peft,
    "safe_merge": peft_safe,
    "no autocast": peft_narrow,
    "gpu": on_gpu,
    "to fp32": lambda w, u: ours(w, u, dtype=FP32),
    "kept in fp32": lambda w, u: ours(w, u).float(),
    "to bf16": lambda w, u: ours(w, u, dtype=BF16),
    "loaded in bf16": lambda w, u: peft(w.bfloat16(), u),
    "loaded in bf16, safe_merge": lambda w, u: peft_safe(w.bfloat16(), u),
}


@pytest.mark.parametrize("how", MERGES)
@pytest.mark.parametrize("dtype", [BF16, FP16, FP32])
def test_every_way_of_merging_is_recognised(how: str, dtype: torch.dtype) -> None:
    """Never a contradiction; and a verdict wherever 16 weights show the update."""
    for number, ratio in enumerate(RATIOS):
        for rank in (1, 4, 16):
            shape = (96, 110)
            weight = weight_of(number, shape, dtype)
            update = update_of(rank, shape, rank, ratio)
            merged = MERGES[how](weight, update)
            found = judged(weight, merged, update)
            told = int((merged.double() != weight.to(merged.dtype).double()).sum())
            assert found.verdict in ("applied", "cannot be told"), (ratio, rank, found)
            assert (found.verdict == "applied") == (found.tally.agreeing >= EVIDENCE)
            if ratio >= 1e-3:
                assert found.verdict == "applied"
                assert found.contained and told > EVIDENCE
                assert found.strength.value == 1
                assert found.strength.low < 1 < found.strength.high


@given(
    seed=st.integers(0, 10**6),
    dtype=st.sampled_from((BF16, FP16, FP32)),
    merged_dtype=st.sampled_from((BF16, FP16, FP32)),
    rank=st.integers(1, 16),
    ratio=st.floats(-6, 0.5).map(lambda x: 10**x),
    strength=st.sampled_from((1.0, 0.5, -1.0, 0.3, 2.7)),
    how=st.sampled_from((ours, peft, peft_safe)),
)
@settings(max_examples=150, deadline=None)
def test_no_merge_is_outside_the_bound(
    seed: int,
    dtype: torch.dtype,
    merged_dtype: torch.dtype,
    rank: int,
    ratio: float,
    strength: float,
    how: Callable[..., torch.Tensor],
) -> None:
    weight, update = weight_of(seed, (24, 31), dtype), update_of(seed, (24, 31), rank, ratio)
    if how is ours:
        merged = ours(weight, update, dtype=merged_dtype, at=strength)
    else:
        merged = how(weight.to(merged_dtype), update, at=strength)
    replay = Replay(weight, merged, update, Workspace(), NAMES)
    tallies = [replay.tally(strength, way, "limits") for way in replay.ways()]
    best = min(tallies, key=lambda tally: tally.outside)
    assert best.outside == 0
    assert best.low <= strength <= best.high
    support = replay.supported(strength, best.way)
    assert support.missing == 0
    assert support.low <= strength <= support.high


@pytest.mark.parametrize("dtype", [BF16, FP16, FP32])
@pytest.mark.parametrize("at", [0.5, 1.37, -1.0])
def test_another_strength_is_told(dtype: torch.dtype, at: float) -> None:
    for ratio in RATIOS[1:]:
        weight, update = weight_of(1, (256, 128), dtype), update_of(2, (256, 128), 8, ratio)
        for how in (ours, peft, peft_safe):
            found = judged(weight, how(weight, update, at=at), update)
            assert found.verdict == "another strength", (ratio, how, found)
            assert found.strength.low <= at <= found.strength.high
            if ratio >= 1e-3:
                assert found.strength.value == at
            back = judged(weight, how(weight, update, at=at), update, expected=at)
            assert (back.verdict, back.strength.value) == ("applied", at)


@pytest.mark.parametrize("dtype", [BF16, FP16, FP32])
def test_what_is_not_there_is_not_applied(dtype: torch.dtype) -> None:
    for ratio in RATIOS[1:]:
        shape = (256, 128)
        weight, update = weight_of(3, shape, dtype), update_of(4, shape, 4, ratio)
        another = update_of(5, shape, 4, ratio)
        copies = [weight, weight.float()] if dtype == BF16 else [weight]
        for merged in (*copies, ours(weight, another), ours(weight, update_of(6, shape, 16, 1))):
            found = judged(weight, merged, update)
            assert found.verdict == "not applied", (ratio, found)
            assert found.strength is None and not found.contained


def test_a_base_in_another_type_is_still_the_base() -> None:
    weight, update = weight_of(3, (128, 128), FP32), update_of(4, (128, 128), 4, 0.05)
    found = judged(weight, weight.bfloat16(), update)
    assert found.verdict == "not applied"
    assert found.reason.startswith("the base's weights")


@pytest.mark.parametrize("dtype", [BF16, FP16, FP32])
def test_two_adapters_are_one_and_other_changes(dtype: torch.dtype) -> None:
    for ratio in RATIOS[2:]:
        shape = (256, 256)
        weight, update = weight_of(7, shape, dtype), update_of(8, shape, 4, ratio)
        for size in (0.5, 1.0, 3.0):
            merged = ours(weight, update, update_of(9, shape, 8, size * ratio))
            found = judged(weight, merged, update)
            assert (found.verdict, found.contained) == ("other changes", True), (ratio, found)
            assert found.strength.value == 1
            if ratio == 1e-1:
                assert found.tally.explained == pytest.approx(1 / (1 + size**2), abs=0.05)


@pytest.mark.parametrize("dtype", [BF16, FP16, FP32])
def test_edited_weights_are_found_and_the_first_is_named(dtype: torch.dtype) -> None:
    for ratio in RATIOS[1:]:
        shape = (200, 150)
        weight, update = weight_of(1, shape, dtype), update_of(2, shape, 4, ratio)
        for how in (ours, peft, peft_safe):
            merged = how(weight, update)
            merged[17, 3] += 0.1
            merged[180] *= 1.5
            found = judged(weight, merged, update)
            assert (found.verdict, found.contained) == ("other changes", True), (ratio, found)
            assert "the first at [17, 3]" in found.reason
            assert 100 < found.tally.outside <= 151
            assert found.strength.value == 1


@pytest.mark.parametrize("dtype", [BF16, FP16, FP32])
def test_one_unit_in_the_last_place_of_one_weight_is_found(dtype: torch.dtype) -> None:
    shape = (64, 64)
    weight, update = weight_of(1, shape, dtype), update_of(2, shape, 4, 1e-3)
    merged = ours(weight, update)
    merged[5, 6] *= 1 + 2 * torch.finfo(dtype).eps
    found = judged(weight, merged, update)
    assert (found.verdict, found.tally.outside) == ("other changes", 1)
    assert "[5, 6]" in found.reason


def test_half_a_merge_is_no_merge() -> None:
    weight, update = weight_of(1, (256, 64), BF16), update_of(2, (256, 64), 4, 1e-2)
    merged = ours(weight, update)
    merged[100:] = weight[100:]
    found = judged(weight, merged, update)
    assert (found.verdict, found.contained) == ("other changes", False)


def test_what_rounding_hides_cannot_be_told() -> None:
    weight, update = weight_of(1, (64, 64), BF16), update_of(2, (64, 64), 4, 1e-7)
    assert torch.equal(ours(weight, update), weight)
    found = judged(weight, weight, update)
    assert found.verdict == "cannot be told"
    assert found.reason == "the base's weights; rounding would hide the update"
    zero = update._replace(scale=0.0)
    assert judged(weight, weight, zero).reason == "the update is zero"
    assert judged(weight, ours(weight, update_of(3, (64, 64), 2, 0.1)), zero).verdict == (
        "other changes"
    )


def test_few_telling_weights_are_counted() -> None:
    weight, update = weight_of(1, (64, 64), BF16), update_of(2, (64, 64), 4, 1e-5)
    found = judged(weight, ours(weight, update), update)
    assert found.verdict == "cannot be told"
    assert 0 < found.tally.agreeing < EVIDENCE
    assert found.reason.startswith(f"only {found.tally.agreeing} weights tell")


@pytest.mark.parametrize("dtype", [BF16, FP16, FP32])
def test_stochastic_rounding_is_recognised(dtype: torch.dtype) -> None:
    for ratio in (1e-3, 1e-2, 1e-1):
        shape = (256, 200)
        weight, update = weight_of(1, shape, dtype), update_of(2, shape, 4, ratio)
        for at in (1.0, 0.5):
            found = judged(weight, ours(weight, update, at=at, seed=1), update)
            assert found.verdict == ("applied" if at == 1 else "another strength"), (ratio, found)
            assert found.strength.low <= at <= found.strength.high
            if dtype != FP32:  # there, its half units are within a product's error
                assert found.way == STOCHASTIC


def test_rounding_at_random_by_half_is_no_stochastic_rounding() -> None:
    shape = (256, 200)
    weight, update = weight_of(1, shape, BF16), update_of(2, shape, 4, 1e-2)
    merged = ours(weight, update)
    flips = torch.rand(shape, generator=torch.Generator().manual_seed(0)) < 0.5
    merged = torch.where(flips, merged, torch.nextafter(merged, torch.zeros(1, dtype=BF16)))
    assert judged(weight, merged, update).verdict == "other changes"


@pytest.mark.parametrize("dtype", [BF16, FP16, FP32])
def test_a_coarse_product_is_a_merge(dtype: torch.dtype) -> None:
    for ratio in RATIOS[1:]:
        for rank in (1, 16, 64):
            shape = (256, 200)
            weight, update = weight_of(1, shape, dtype), update_of(2, shape, rank, ratio)
            found = judged(weight, coarse(weight, update), update)
            assert found.verdict == "applied", (ratio, rank, found)
            assert found.way == COARSE or not found.tally.outside


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2, torch.float64])
def test_rare_types(dtype: torch.dtype) -> None:
    shape = (64, 80)
    weight, update = weight_of(1, shape, FP32).mul(25).to(dtype), update_of(2, shape, 8, 5.0)
    assert judged(weight, ours(weight, update), update).verdict == "applied"
    found = judged(weight, ours(weight, update, at=0.5), update)
    assert (found.verdict, found.strength.value) == ("another strength", 0.5)
    assert judged(weight, weight, update).verdict == "not applied"


@pytest.mark.parametrize("shape", [(1, 300), (300, 1), (7, 5), (2, 70_000), (70_000, 2)])
def test_odd_shapes(shape: tuple[int, int]) -> None:
    weight, update = weight_of(1, shape, BF16), update_of(2, shape, 3, 0.05)
    assert judged(weight, ours(weight, update), update).verdict == "applied"
    assert judged(weight, weight, update).verdict == "not applied"
    half = judged(weight, peft_safe(weight, update, at=0.5), update)
    assert (half.verdict, half.strength.value) == ("another strength", 0.5)


def test_a_large_tensor_is_judged_whole() -> None:
    """Rows that the sample leaves out count."""
    shape = (1024, 256)
    weight, update = weight_of(1, shape, BF16), update_of(2, shape, 4, 1e-2)
    replay = Replay(weight, weight, update, Workspace(), NAMES)
    sampled = replay.sample().tally(1.0, Way()).elements
    assert sampled < weight.numel() / 2
    for row in range(6):
        merged = ours(weight, update)
        merged[row, 9] *= 2
        found = judged(weight, merged, update)
        assert (found.verdict, found.tally.outside) == ("other changes", 1)
        assert f"[{row}, 9]" in found.reason
        assert found.tally.elements == weight.numel()


def test_a_strength_that_is_no_round_number() -> None:
    shape = (600, 256)
    weight, update = weight_of(1, shape, FP32), update_of(2, shape, 4, 1e-2)
    at = 0.123456789
    found = judged(weight, ours(weight, update, at=at), update)
    assert found.verdict == "another strength"
    assert found.strength.value == pytest.approx(at, rel=1e-6)
    assert found.strength.low <= at <= found.strength.high


def test_counts_are_of_weights() -> None:
    shape = (64, 50)
    weight, update = weight_of(1, shape, BF16), update_of(2, shape, 4, 1e-3)
    merged = ours(weight, update)
    tally = Replay(weight, merged, update, Workspace(), NAMES).tally(1.0, Way())
    changed = int((merged != weight).sum())
    assert tally.elements == tally.equal == weight.numel()
    assert tally.informative == tally.agreeing == tally.reproduced == changed
    assert tally.same == weight.numel() - changed
    delta = update.scale * (update.b.double() @ update.a.double())
    change = merged.double() - weight.double()
    assert tally.update == pytest.approx(float(delta.square().sum()), rel=1e-5)
    assert tally.along == pytest.approx(float((delta * change).sum()), rel=1e-5)
    assert tally.residual == pytest.approx(float((change - delta).square().sum()), rel=1e-5)
    assert tally.explained == pytest.approx(
        float((delta * change).sum() / delta.norm() / change.norm()) ** 2, rel=1e-5
    )
    _, exponent = torch.frexp(merged.double())
    units = torch.ldexp(torch.ones(shape).double(), exponent - 8)
    assert tally.noise == pytest.approx(float(units.square().sum()) / 12, rel=1e-9)


def test_rounding_noise_is_what_is_left_over() -> None:
    shape = (512, 256)
    weight, update = weight_of(1, shape, BF16), update_of(2, shape, 8, 0.1)
    for how, way in ((ours, Way()), (peft_safe, Way(delta=True))):
        replay = Replay(weight, how(weight, update), update, Workspace(), NAMES)
        tally = replay.tally(1.0, way)
        assert tally.residual / tally.noise == pytest.approx(1, abs=0.02)


@pytest.mark.parametrize("which", ["base", "merged"])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_is_refused_by_name(which: str, value: float) -> None:
    weight, update = weight_of(1, (32, 32), BF16), update_of(2, (32, 32), 4, 0.1)
    merged = ours(weight, update)
    (weight if which == "base" else merged)[3, 4] = value
    with pytest.raises(InputError, match=f"{which}: w: holds NaN or Inf"):
        judged(weight, merged, update)


def test_signs_of_zero_are_no_change() -> None:
    weight = weight_of(1, (64, 64), BF16)
    weight[:32] = -0.0
    update = update_of(2, (64, 64), 2, 1e-7)
    update.b[:32] = 0
    assert judged(weight, weight.abs() * weight.sign(), update).verdict == "cannot be told"


@given(
    value=st.floats(-5, 5).filter(lambda x: abs(x) > 1e-3),
    width=st.floats(1e-6, 0.5),
)
@settings(max_examples=200, deadline=None)
def test_the_roundest_number_lies_within(value: float, width: float) -> None:
    found = roundest(value - width, value + width, expected=77.0)
    assert value - width <= found <= value + width
    assert roundest(value - width, value + width, value) == value


def test_strengths_in_words() -> None:
    assert str(Strength(0.5, 0.496, 0.504)) == "0.5 (±0.004)"
    assert str(Strength(1.0)) == "1"
    assert str(Strength(1.0, 1 - 3e-7, 1 + 2e-7)) == "1 (±3e-07)"
    assert roundest(0.99, 1.2, 5.0) == 1
    assert roundest(0.44, 0.56, 1.0) == 0.5
    assert roundest(-math.inf, 3.0, 1.0) == 1


@pytest.mark.parametrize("name", ["F32", "BF16", "F16", "F8_E4M3", "F64"])
def test_equal_values_in_another_type_are_no_difference(name: str) -> None:
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(300, 7, generator=generator, dtype=torch.float64)
    values[3, 3], values[4, 4] = math.nan, -math.inf
    for other in ("F32", "BF16", "F16"):
        base = values.to(torch_dtype(other))
        if name == "F8_E4M3":
            base[4, 4] = 2
        found = base.to(torch_dtype(name), copy=True)
        assert difference(found, base, None, NAMES) is None
        if name != "F8_E4M3":
            assert difference(base.to(BF16).float(), base, None, NAMES) is None
        found[100, 2] = 5
        assert difference(found, base, None, NAMES) == Difference(1, 702)


def test_conversions_by_way_of_the_base() -> None:
    generator = torch.Generator().manual_seed(0)
    new = torch.randn(100, generator=generator)
    merged = new.half().bfloat16()
    assert not torch.equal(merged, new.bfloat16())
    assert difference(merged, new, "F16", NAMES) is None
    assert difference(merged, new, None, NAMES) is not None
    whole = torch.arange(20).reshape(4, 5)
    assert difference(whole.to(torch.int32), whole, None, NAMES) is None
    assert difference(whole + (whole == 13), whole, None, NAMES) == Difference(1, 13)
    assert difference(torch.tensor(2.0), torch.tensor(2.0), None, NAMES) is None
    assert difference(torch.empty(0, 3), torch.empty(0, 3), None, NAMES) is None


def test_new_values_that_are_not_finite_are_refused() -> None:
    base = torch.ones(10)
    merged = base.clone()
    merged[3] = math.nan
    with pytest.raises(InputError, match="merged: w: holds NaN or Inf"):
        difference(merged, base, None, NAMES)
