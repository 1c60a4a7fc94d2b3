"""The exact factorizer against torch's fp64 singular value decomposition."""

from __future__ import annotations

import math

import pytest
import torch

from loratool.errors import InputError
from loratool.linalg import Factorization, RankPolicy
from loratool_plugins.factorizers.exact import Exact


def random_matrix(out: int, into: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(out, into, generator=torch.Generator().manual_seed(seed))


def graded(out: int, into: int, spectrum: list[float]) -> torch.Tensor:
    left, _ = torch.linalg.qr(random_matrix(out, len(spectrum), 1).double())
    right, _ = torch.linalg.qr(random_matrix(into, len(spectrum), 2).double())
    return ((left * torch.tensor(spectrum, dtype=torch.float64)) @ right.t()).float()


def factorize(delta: torch.Tensor, rank: int | None, energy: float | None = None) -> Factorization:
    return Exact().factorize(delta.clone(), RankPolicy(rank, energy), torch.Generator())


SHAPES = [(1, 1), (1, 50), (50, 1), (10, 8), (120, 90), (90, 300), (2000, 60), (60, 2000)]


@pytest.mark.parametrize("rank", [1, 5, 200])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_is_the_truncated_svd(shape: tuple[int, int], rank: int) -> None:
    delta = random_matrix(*shape)
    result = factorize(delta, rank)
    kept = min(rank, *shape)
    u, sigma, vh = torch.linalg.svd(delta.double(), full_matrices=False)
    best = (u[:, :kept] * sigma[:kept]) @ vh[:kept]
    assert result.certificate.rank == kept
    assert torch.allclose(result.sigma, sigma[:kept], rtol=1e-9)
    assert torch.dist(result.b.double() @ result.a.double(), best) < 1e-6 * best.norm()
    assert result.certificate.total == pytest.approx(float(sigma.square().sum()), rel=1e-12)
    optimal = float(sigma[:kept].square().sum())
    assert result.certificate.captured == pytest.approx(optimal, rel=1e-12)
    assert optimal <= result.certificate.optimum_bound <= optimal * (1 + 1e-9)
    assert result.certificate.method == "gram"


def test_small_singular_values_are_good_to_four_digits() -> None:
    spectrum = [1.0, 1e-1, 1e-2, 1e-3, 1e-4, 3e-6]
    result = factorize(graded(300, 200, spectrum), 6)
    reference = torch.linalg.svdvals(graded(300, 200, spectrum).double())[:6]
    assert torch.allclose(result.sigma, reference, rtol=1e-4)


def test_rounding_is_not_kept() -> None:
    delta = graded(300, 200, [4.0, 2.0, 1.0])
    assert factorize(delta, 8).certificate.rank == 3
    assert factorize(delta, None, 1.0).certificate.rank == 3


@pytest.mark.parametrize("size", [1e-42, 1e-30, 1e30])
def test_any_magnitude(size: float) -> None:
    delta = graded(40, 50, [1.0, 0.5])
    result = factorize(delta / delta.abs().max() * size, 1)
    expected = float(torch.linalg.svdvals(delta.double() / float(delta.abs().max()))[0])
    assert float(result.sigma[0]) / size == pytest.approx(
        expected, rel=1e-2 if size < 1e-40 else 1e-5
    )


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9, 0.999, 1.0])
def test_energy_takes_the_fewest_columns(share: float) -> None:
    delta = random_matrix(80, 120)
    energies = torch.linalg.svdvals(delta.double()).square()
    needed = int((energies.cumsum(0) < min(share, 1 - 1e-6) * energies.sum()).sum()) + 1
    assert factorize(delta, None, share).certificate.rank == needed
    assert factorize(delta, 3, share).certificate.rank == min(3, needed)


def test_zero_delta() -> None:
    result = factorize(torch.zeros(30, 20), 8)
    assert result.a.shape == (1, 20) and result.b.shape == (30, 1)
    assert not result.a.any() and not result.b.any()
    assert result.certificate.energy == 1


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_refuses_what_is_not_finite(bad: float) -> None:
    delta = random_matrix(30, 20)
    delta[3, 4] = bad
    with pytest.raises(InputError, match="NaN or Inf"):
        factorize(delta, 4)


def test_does_not_depend_on_the_generator() -> None:
    delta = random_matrix(90, 70)
    one, two = (
        Exact().factorize(delta.clone(), RankPolicy(4), torch.Generator().manual_seed(seed))
        for seed in (1, 2)
    )
    assert torch.equal(one.a, two.a) and torch.equal(one.b, two.b)
