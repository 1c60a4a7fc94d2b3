"""Laws of the arithmetic on factors, against dense fp64 matrices."""

from __future__ import annotations

import math
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from loratool.linalg import Certificate, RankPolicy
from loratool.lowrank import (
    Product,
    compress,
    concatenated,
    decompose,
    exact_certificate,
    inner,
    rounded_factors,
    singular_values,
    squared_norm,
)
from tests.adapters import factors

law = settings(derandomize=True, deadline=None, max_examples=40)


@dataclass(frozen=True)
class Sum:
    """Random products of one shape, and what they are as a dense matrix."""

    parts: list[Product]

    @property
    def dense(self) -> torch.Tensor:
        return sum(p.factor * p.b.double() @ p.a.double() for p in self.parts)


@st.composite
def sums(draw: st.DrawFn, most: int = 4) -> Sum:
    """Sums of up to `most` products whose ranks may exceed the shape or repeat a part."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    out, into = draw(st.integers(1, 12)), draw(st.integers(1, 12))
    dtype = draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float64]))
    size = 2.0 ** draw(st.integers(-30, 30))
    parts = []
    for rank in draw(st.lists(st.integers(1, 6), min_size=1, max_size=most)):
        b = (torch.randn(out, rank, generator=generator) * size).to(dtype)
        a = torch.randn(rank, into, generator=generator).to(dtype)
        parts.append(Product(b, a, draw(st.sampled_from([1.0, 0.7, -0.3, 2.0, 1e-3]))))
    if draw(st.booleans()):
        parts.append(parts[0])
    return Sum(parts)


def relative(found: torch.Tensor, wanted: torch.Tensor, scale: torch.Tensor | None = None) -> float:
    """||found - wanted|| as a share of the largest thing that went into it."""
    size = (wanted if scale is None else scale).norm()
    return float((found - wanted).norm() / size) if size > 0 else float(found.norm())


def largest_part(total: Sum) -> torch.Tensor:
    """What fp64 rounding is relative to: the parts may cancel."""
    return max((Sum([part]).dense for part in total.parts), key=lambda dense: float(dense.norm()))


@given(total=sums())
@law
def test_concatenation_is_the_sum(total: Sum) -> None:
    b, a = concatenated(total.parts)
    assert b.dtype == a.dtype == torch.float64
    assert relative(b @ a, total.dense, largest_part(total)) < 1e-14


@given(one=sums(2))
@law
def test_inner_products_and_norms_are_those_of_the_dense_matrices(one: Sum) -> None:
    other = Sum(one.parts[::-1] + one.parts[:1])
    size = float(largest_part(one).norm()) ** 2 + 1e-300
    assert inner(one.parts, other.parts) == pytest.approx(
        float((one.dense * other.dense).sum()), abs=1e-12 * size
    )
    assert squared_norm(one.parts) == pytest.approx(
        float(one.dense.square().sum()), abs=1e-12 * size
    )


@given(total=sums())
@law
def test_decompose_is_a_singular_value_decomposition(total: Sum) -> None:
    u, sigma, v = decompose(total.parts)
    k = len(sigma)
    assert 1 <= k <= min(total.dense.shape)
    assert torch.allclose(u.T @ u, torch.eye(k, dtype=torch.float64), atol=1e-12)
    assert torch.allclose(v @ v.T, torch.eye(k, dtype=torch.float64), atol=1e-12)
    assert bool((sigma[:-1] >= sigma[1:]).all())
    assert relative((u * sigma) @ v, total.dense, largest_part(total)) < 1e-13
    reference = torch.linalg.svdvals(total.dense)[:k]
    assert float((sigma - reference).abs().max()) <= 1e-13 * float(largest_part(total).norm())
    assert torch.allclose(singular_values(total.parts), sigma, rtol=1e-9, atol=1e-13)


@given(total=sums())
@law
def test_recompressing_at_full_rank_keeps_the_product(total: Sum) -> None:
    for policy in (None, RankPolicy(64), RankPolicy(None, energy=1.0)):
        found = compress(total.parts, policy)
        tolerance = 1e-13 if policy is None or policy.energy is None else 2e-3  # 1 - 1e-6
        assert relative(found.b @ found.a, total.dense, largest_part(total)) < tolerance
        assert found.certificate.energy >= 1 - 1.1e-6


@given(total=sums(), rank=st.integers(1, 12))
@law
def test_the_truncation_error_squared_is_the_sum_of_the_dropped_squares(
    total: Sum, rank: int
) -> None:
    found = compress(total.parts, RankPolicy(rank))
    sigma = torch.linalg.svdvals(total.dense)
    dropped = float(sigma[rank:].square().sum())
    error = float((found.b @ found.a - total.dense).square().sum())
    size = float(largest_part(total).square().sum())
    assert error == pytest.approx(dropped, abs=1e-12 * size)
    certificate = found.certificate
    assert certificate.total - certificate.captured == pytest.approx(dropped, abs=1e-12 * size)


@given(total=sums())
@law
def test_energies_add_up_to_one(total: Sum) -> None:
    u, sigma, v = decompose(total.parts)
    whole = float(total.dense.square().sum())
    size = float(largest_part(total).square().sum())
    pieces = [sigma[i] * torch.outer(u[:, i], v[i]) for i in range(len(sigma))]
    assert sum(float(p.square().sum()) for p in pieces) == pytest.approx(whole, abs=1e-12 * size)
    assert float(sigma.square().sum()) == pytest.approx(whole, abs=1e-12 * size)
    if whole > 1e-6 * size:
        steps = [compress(total.parts, RankPolicy(r + 1)).certificate for r in range(len(sigma))]
        shares = [one.energy for one in steps]
        assert shares == sorted(shares)
        assert shares[-1] == pytest.approx(1.0, abs=1e-12)


@given(total=sums(), dtype=st.sampled_from(["F32", "BF16", "F16", "F64"]))
@law
def test_the_certificate_counts_what_rounding_costs(total: Sum, dtype: str) -> None:
    b, a = concatenated(total.parts)
    size = 2.0 ** -math.frexp(float(b.abs().max()))[1] if float(b.abs().max()) else 1.0
    b = b * size  # inside the range of fp16
    kept = rounded_factors(a, b, Certificate(1, 0.0, 0.0), dtype)
    wanted = float((b @ a - kept.b.double() @ kept.a.double()).square().sum())
    assert kept.certificate is not None
    assert kept.certificate.rounding == pytest.approx(wanted, rel=1e-6, abs=1e-30)
    assert (kept.certificate.rounding == 0) if dtype == "F64" else True


def test_nothing_rounded_costs_exactly_nothing() -> None:
    b, a = factors(1, 9, 7, 3, torch.bfloat16)
    kept = rounded_factors(a.double(), b.double(), Certificate(3, 1.0, 1.0), "BF16")
    assert kept.certificate is not None and kept.certificate.relative_error == 0
    assert torch.equal(kept.a, a) and torch.equal(kept.b, b)


def test_a_zero_sum_has_rank_one_and_no_error() -> None:
    part = Product(*factors(1, 6, 5, 2))
    found = compress([part, part._replace(factor=-1.0)], RankPolicy(4))
    assert found.certificate.relative_error == 0
    assert float((found.b @ found.a).norm()) < 1e-14
    zero = compress([part._replace(factor=0.0)], RankPolicy(4, energy=0.5, ratio=3.0))
    assert (zero.a.shape, zero.b.shape) == ((1, 5), (6, 1))
    assert exact_certificate([part._replace(factor=0.0)], 2).energy == 1.0


@pytest.mark.parametrize("size", [1e-40, 1e-150, 1e30, 1e150])
def test_tiny_and_huge_factors_are_decomposed_as_well(size: float) -> None:
    generator = torch.Generator().manual_seed(0)
    b = torch.randn(8, 3, generator=generator, dtype=torch.float64)
    a = torch.randn(3, 6, generator=generator, dtype=torch.float64)
    _, sigma, _ = decompose([Product(b * size, a)])
    assert torch.allclose(sigma / size, torch.linalg.svdvals(b @ a)[:3], rtol=1e-12)


def test_policies_choose_on_the_spectrum_of_the_sum() -> None:
    diagonal = torch.diag(torch.tensor([8.0, 4.0, 2.0, 1.0]))
    part = Product(diagonal, torch.eye(4))
    assert compress([part], RankPolicy(None, ratio=4.0)).certificate.rank == 3
    assert compress([part], RankPolicy(None, energy=0.9)).certificate.rank == 2
    assert compress([part], RankPolicy(1, energy=0.9)).certificate.rank == 1
