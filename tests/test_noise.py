"""The edge of rounding noise: where theory, simulated noise and simulated fine-tunes put it."""

from __future__ import annotations

import math

import pytest
import torch

from loratool.linalg import RankPolicy
from loratool.noise import noise_edge, rounding_noise
from loratool_plugins.factorizers.exact import Exact
from loratool_plugins.factorizers.krylov import Krylov

TYPES = [torch.bfloat16, torch.float16, torch.float8_e4m3fn]


def randn(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def weights(rows: int, columns: int, spread: float) -> torch.Tensor:
    """Gaussian weights whose rows and columns differ in size."""
    found = 0.02 * randn(0, rows, columns)
    return found * (spread * randn(1, rows, 1)).exp() * (spread / 2 * randn(2, 1, columns)).exp()


@pytest.mark.parametrize("shape", [(1, 1), (7, 300), (300, 7), (512, 512)])
def test_equal_variances_give_the_edge_of_marchenko_and_pastur(shape: tuple[int, int]) -> None:
    rows, columns = shape
    variance = 3e-7
    edge = noise_edge(
        torch.full((rows,), variance * columns, dtype=torch.float64),
        torch.full((columns,), variance * rows, dtype=torch.float64),
    )
    expected = math.sqrt(variance) * (math.sqrt(rows) + math.sqrt(columns))
    assert edge == pytest.approx(expected, rel=1e-6)


def test_variances_that_differ_by_rows_and_columns_move_the_edge() -> None:
    r, c = (0.5 * randn(0, 600)).exp().double(), (0.3 * randn(1, 900)).exp().double()
    noise = r.sqrt()[:, None] * randn(2, 600, 900).double() * c.sqrt()
    edge = noise_edge(r * c.sum(), c * r.sum())
    assert 0.9 < float(torch.linalg.svdvals(noise)[0]) / edge < 1.01
    same = math.sqrt(float(r.mean() * c.mean())) * (math.sqrt(600) + math.sqrt(900))
    assert edge > 1.15 * same


def test_no_noise_has_no_edge() -> None:
    zeros = torch.zeros(4, dtype=torch.float64)
    assert noise_edge(zeros, zeros) == 0
    found = rounding_noise(torch.zeros(4, 4), torch.zeros(4, 4, dtype=torch.bfloat16))
    assert (found.edge, found.floor) == (0, 0)


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("spread", [0.0, 0.5])
def test_the_rounding_of_a_matrix_ends_just_under_its_edge(
    dtype: torch.dtype, spread: float
) -> None:
    whole = weights(384, 512, spread) * (50 if dtype.itemsize == 1 else 1)
    stored = whole.to(dtype)
    delta = stored.float() - whole
    noise = rounding_noise(delta, stored)
    assert noise.energy == pytest.approx(float(delta.double().square().sum()), rel=0.02)
    assert noise.total == pytest.approx(float(delta.double().square().sum()), rel=1e-9)
    assert 0.93 < float(torch.linalg.svdvals(delta)[0]) / noise.edge < 1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_as_many_values_pass_the_floor_as_the_update_has(dtype: torch.dtype) -> None:
    base = weights(384, 512, 0.0).to(dtype)
    update = 0.02 * 0.01 / math.sqrt(6) * randn(3, 384, 6) @ randn(4, 6, 512)
    tuned = (base.float() + update).to(dtype)
    delta = tuned.float() - base.float()
    noise = rounding_noise(delta, tuned)
    sigma = torch.linalg.svdvals(delta) / float(delta.norm())
    assert int((sigma >= noise.floor).sum()) == 6


@pytest.mark.parametrize("factorizer", [Krylov(), Krylov(compute="fp32"), Exact()], ids=str)
@pytest.mark.parametrize("rank", [0, 6, 40])
def test_factorizers_find_what_passes_the_floor(factorizer: Krylov | Exact, rank: int) -> None:
    base = weights(640, 800, 0.0).bfloat16()
    update = 0.02 * 0.02 / math.sqrt(max(1, rank)) * randn(3, 640, rank) @ randn(4, rank, 800)
    # Without an update, a base that was stored in more bits.
    before = base.float() if rank else weights(640, 800, 0.0)
    tuned = (before + update).bfloat16()
    delta = tuned.float() - before
    noise = rounding_noise(delta, tuned)
    policy = RankPolicy(None, floor=noise.floor)
    found = factorizer.factorize(delta.clone(), policy, torch.Generator().manual_seed(0))
    assert found.certificate.rank == max(1, rank)
    assert (float(found.sigma[0]) >= noise.edge) == (rank > 0)


def test_of_an_update_that_rounding_mostly_swallowed_nothing_is_dropped() -> None:
    base = weights(384, 512, 0.0).bfloat16()
    update = 0.02 * 0.0005 / 2 * randn(3, 384, 4) @ randn(4, 4, 512)
    tuned = (base.float() + update).bfloat16()
    delta = tuned.float() - base.float()
    assert 0 < float((delta != 0).double().mean()) < 0.15  # the rest was too small
    noise = rounding_noise(delta, tuned)
    assert noise.energy <= float(delta.double().square().sum())
    assert float(torch.linalg.svdvals(delta)[3]) > noise.edge


def test_fp32_has_next_to_none() -> None:
    base = weights(64, 64, 0.0)
    tuned = base + 0.001 * randn(3, 64, 64)
    assert rounding_noise(tuned - base, tuned).floor < 1e-4
