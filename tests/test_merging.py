"""The exact merge: the same bits in any order, one rounding, nothing lost that is not told."""

from __future__ import annotations

from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from loratool.dtypes import torch_dtype
from loratool.errors import InputError
from loratool.exact import exact_delta
from loratool.merging import Survival, merged_blocks
from loratool.rounding import round_to, rounded_blocks

NARROW = ("F32", "F16", "BF16", "F8_E4M3", "F8_E5M2")
_FORMAT = {  # bits of the significand, exponent of the smallest subnormal
    "F32": (24, -149),
    "F16": (11, -24),
    "BF16": (8, -133),
    "F8_E4M3": (4, -9),
    "F8_E5M2": (3, -16),
}


def nearest(value: Fraction, dtype: str) -> Fraction:
    """Round to nearest, ties to even, in exact arithmetic (no overflow)."""
    if value == 0:
        return value
    bits, lowest = _FORMAT[dtype]
    exponent = 0
    while Fraction(2) ** (exponent + 1) <= abs(value):
        exponent += 1
    while Fraction(2) ** exponent > abs(value):
        exponent -= 1
    unit = Fraction(2) ** max(exponent - bits + 1, lowest)
    return round(value / unit) * unit  # round() of a Fraction is to even


def factors(seed: int, out: int, inner: int, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    b = torch.randn(out, rank, generator=generator) * 0.01
    return b, torch.randn(rank, inner, generator=generator)


def merge(weight: torch.Tensor, parts, dtype: str) -> torch.Tensor:
    blocks = merged_blocks(weight, exact_delta(parts), dtype, Survival(), "weight")
    return torch.cat([block.clone() for block in blocks])


def bits(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().view(torch.uint8).numpy().tobytes()


@given(
    value=st.floats(-400, 400, allow_nan=False).flatmap(
        lambda x: st.sampled_from([x, x * 2.0**-9, x * 2.0**-20, x * 2.0**-140])
    ),
    dtype=st.sampled_from(NARROW),
)
@settings(max_examples=400, deadline=None)
def test_round_to_is_one_rounding(value: float, dtype: str) -> None:
    found = round_to(torch.tensor([value], dtype=torch.float64), dtype)
    assert Fraction(float(found.double())) == nearest(Fraction(value), dtype)


@pytest.mark.parametrize("dtype", NARROW)
def test_round_to_at_and_beside_every_tie(dtype: str) -> None:
    width = torch_dtype(dtype).itemsize * 8
    count = min(2**width, 2**16)
    codes = torch.arange(count, dtype=torch.int64)
    if width == 32:
        codes = codes * 65521 + 12345
        values = codes.to(torch.int32).view(torch.float32)
    elif width == 16:
        values = codes.to(torch.int16).view(torch_dtype(dtype))
    else:
        values = codes.to(torch.uint8).view(torch_dtype(dtype))
    values = values.double()
    values = values[torch.isfinite(values) & (values.abs() < 1e38)].unique()
    ties = (values[1:] + values[:-1]) / 2
    lower = torch.nextafter(ties, torch.tensor(-torch.inf, dtype=torch.float64))
    upper = torch.nextafter(ties, torch.tensor(torch.inf, dtype=torch.float64))
    if width < 32:  # neighbours of the sample are neighbours in the type
        assert torch.equal(round_to(lower, dtype).double(), values[:-1])
        assert torch.equal(round_to(upper, dtype).double(), values[1:])
    for tie, found in list(zip(ties, round_to(ties, dtype), strict=True))[::37]:
        assert Fraction(float(found.double())) == nearest(Fraction(float(tie)), dtype)


def test_every_16_bit_pattern_is_rounded_to_itself() -> None:
    for dtype in (torch.bfloat16, torch.float16):
        patterns = torch.arange(2**16).to(torch.int16).view(dtype)
        finite = patterns[torch.isfinite(patterns)]
        name = "BF16" if dtype == torch.bfloat16 else "F16"
        assert bits(round_to(finite.double(), name)) == bits(finite)


@given(
    seed=st.integers(0, 10**6),
    rank=st.integers(1, 40),
    dtype=st.sampled_from(("F32", "F16", "BF16")),
)
@settings(max_examples=60, deadline=None)
def test_merge_is_weight_plus_delta_rounded_once(seed: int, rank: int, dtype: str) -> None:
    b, a = factors(seed, 5, 7, rank)
    weight = torch.randn(5, 7, generator=torch.Generator().manual_seed(seed + 1))
    weight = weight.to(torch_dtype(dtype))
    delta = exact_delta([(b, a, 0.5)])
    found = merge(weight, [(b, a, 0.5)], dtype)
    for i in range(5):
        for j in range(7):
            exact = Fraction(float(weight[i, j])) + sum(
                Fraction(float(x)) * Fraction(float(y))
                for x, y in zip(delta.left[i], delta.right[:, j], strict=True)
            )
            assert Fraction(float(found[i, j])) == nearest(exact, dtype)


def test_a_sum_that_fp64_rounds_onto_a_tie_is_decided_by_what_it_dropped() -> None:
    # 1 + 2^-9 + 2^-60 is above the tie between the bf16 neighbours 1 and 1 + 2^-8 x 1/2.
    weight = torch.tensor([[1.0, 1.0, 1.0]], dtype=torch.bfloat16)
    unit = 2.0**-8
    for extra, expected in ((2.0**-70, 1 + 2 * unit), (0.0, 1.0), (-(2.0**-70), 1.0)):
        b = torch.tensor([[unit, extra]], dtype=torch.float64)
        a = torch.tensor([[1.0, 1.0, 1.0], [1.0, 1.0, 1.0]], dtype=torch.float64)
        left = type(exact_delta([(b, a, 1.0)]))(b, a)  # not coarsened: the product is exact here
        delta = float(b.sum())
        blocks = list(merged_blocks(weight, left, "BF16", Survival(), "w"))
        assert Fraction(float(blocks[0][0, 0])) == nearest(1 + Fraction(delta), "BF16"), expected


@given(seed=st.integers(0, 10**6), ranks=st.lists(st.integers(1, 20), min_size=1, max_size=4))
@settings(max_examples=40, deadline=None)
def test_any_order_of_adapters_gives_the_same_bits(seed: int, ranks: list[int]) -> None:
    parts = [(*factors(seed + i, 33, 65, r), 0.3 * (i - 1)) for i, r in enumerate(ranks)]
    weight = torch.randn(33, 65, generator=torch.Generator().manual_seed(seed)) * 0.02
    assert bits(merge(weight, parts, "F32")) == bits(merge(weight, parts[::-1], "F32"))


def test_threads_tiles_and_product_order_change_no_bit() -> None:
    b, a = factors(3, 700, 900, 16)
    weight = (torch.randn(700, 900, generator=torch.Generator().manual_seed(1)) * 0.02).bfloat16()
    whole = merge(weight, [(b, a, 1.0)], "BF16")
    pieces = [merge(weight[i : i + 13], [(b[i : i + 13], a, 1.0)], "BF16") for i in (0, 13, 26)]
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2 if before == 1 else 1)
        other = merge(weight, [(b, a, 1.0)], "BF16")
    finally:
        torch.set_num_threads(before)
    assert bits(whole) == bits(other)
    assert bits(whole[:39]) == bits(torch.cat(pieces))
    delta = exact_delta([(b, a, 1.0)])
    columns = [delta.left[:, k : k + 1] * delta.right[k : k + 1] for k in range(16)]
    reverse = sum(columns[::-1], torch.zeros(700, 900, dtype=torch.float64))
    assert torch.equal(delta.left @ delta.right, reverse)


@pytest.mark.parametrize("rank", [1, 2, 16, 17, 64, 320])
def test_the_delta_is_within_a_millionth_of_fp64(rank: int) -> None:
    b, a = factors(rank, 120, 150, rank)
    delta = exact_delta([(b, a, 2.0)])
    exact = 2 * (b.double() @ a.double())
    error = (delta.left @ delta.right - exact).norm() / exact.norm()
    assert error < 1e-6


@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_the_delta_is_exact_at_any_magnitude(scale: float) -> None:
    b, a = factors(0, 20, 30, 8)
    delta = exact_delta([(b.double() * scale, a.double(), 1.0)])
    exact = (b.double() * scale) @ a.double()
    assert ((delta.left @ delta.right - exact).norm() / exact.norm()) < 1e-6


def test_survival_is_the_projection_of_what_happened_on_what_was_wanted() -> None:
    b, a = factors(1, 300, 200, 4)
    weight = (torch.randn(300, 200, generator=torch.Generator().manual_seed(1)) * 20).bfloat16()
    survival = Survival()
    blocks = merged_blocks(weight, exact_delta([(b, a, 1.0)]), "BF16", survival, "w")
    after = torch.cat([block.clone() for block in blocks]).double()
    delta = b.double() @ a.double()
    kept = ((after - weight.double()) * delta).sum() / delta.square().sum()
    assert survival.kept / survival.wanted == pytest.approx(float(kept), rel=1e-5)
    assert 0 < survival.kept / survival.wanted < 0.9


def test_nan_in_the_base_and_overflow_are_told_apart() -> None:
    b, a = factors(1, 2, 2, 1)
    bad = torch.tensor([[1.0, float("nan")], [0.0, 1.0]])
    with pytest.raises(InputError, match="layer: the base holds NaN or Inf"):
        list(merged_blocks(bad, exact_delta([(b, a, 1.0)]), "F32", Survival(), "layer"))
    large = torch.full((2, 2), 65504.0, dtype=torch.float16)
    parts = [(torch.ones(2, 1), torch.ones(1, 2), 100.0)]
    with pytest.raises(InputError, match="layer: the merged values overflow F16"):
        list(merged_blocks(large, exact_delta(parts), "F16", Survival(), "layer"))
    with pytest.raises(InputError, match="overflow F16"):
        list(rounded_blocks(torch.full((3,), 1e6), "F16", "layer"))


@pytest.mark.parametrize("rank", [1, 2, 16])
@pytest.mark.parametrize(("rows", "columns"), [(1, 7), (5, 1), (5, 7)])
def test_a_delta_of_zero_has_no_sign(rank: int, rows: int, columns: int) -> None:
    left, right = torch.zeros(rows, rank), -torch.ones(rank, columns)
    delta = torch.empty(rows, columns, dtype=torch.float64)
    exact_delta([(left, right, 1.0)]).rows(slice(None), delta)
    assert not delta.signbit().any()
