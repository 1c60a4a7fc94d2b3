"""Factorizations on disk, cut to smaller ranks: as good as those of that rank, and honest."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from loratool.factor_store import FactorStore, energies, total_energy
from loratool.linalg import Factorization, RankPolicy
from loratool_plugins.factorizers.exact import Exact
from loratool_plugins.factorizers.krylov import Krylov

FACTORIZERS = [Krylov(), Krylov(compute="fp32"), Exact()]


def matrix(decay: float, out: int = 300, inner: int = 420) -> tuple[torch.Tensor, torch.Tensor]:
    """A matrix and its singular values, which fall off as i^-decay."""
    generator = torch.Generator().manual_seed(0)
    sigma = torch.arange(1, out + 1, dtype=torch.float64) ** -decay
    u = torch.linalg.qr(torch.randn(out, out, generator=generator, dtype=torch.float64)).Q
    v = torch.linalg.qr(torch.randn(inner, out, generator=generator, dtype=torch.float64)).Q
    return ((u * sigma) @ v.T).float(), sigma


def factorized(factorizer: Krylov | Exact, delta: torch.Tensor, rank: int) -> Factorization:
    generator = torch.Generator().manual_seed(1)
    return factorizer.factorize(delta.clone(), RankPolicy(rank), generator)


@pytest.mark.parametrize("factorizer", FACTORIZERS, ids=str)
@pytest.mark.parametrize("decay", [0.25, 0.5, 1.0])
def test_every_smaller_rank_is_near_its_own_optimum(
    factorizer: Krylov | Exact, decay: float, tmp_path: Path
) -> None:
    delta, sigma = matrix(decay)
    store = FactorStore(tmp_path)
    stored = store.add(factorized(factorizer, delta, 32))
    for rank in (1, 4, 8, 16, 32):
        found = store.load(stored, rank)
        optimum = float(sigma[:rank].square().sum())
        total = float(sigma.square().sum())
        lost = float((delta.double() - found.b.double() @ found.a.double()).square().sum())
        certificate = found.certificate
        assert total - lost >= 0.999 * optimum
        assert certificate.rank == rank == len(found.sigma)
        assert certificate.captured == pytest.approx(total - lost, rel=1e-5)
        assert certificate.total == pytest.approx(total, rel=1e-5)
        assert optimum * (1 - 1e-6) <= certificate.optimum_bound


def test_the_full_rank_comes_back_as_it_was_and_a_larger_one_is_the_full_one() -> None:
    delta, _ = matrix(0.5, 30, 40)
    found = factorized(Exact(), delta, 7)
    store = FactorStore(None)
    stored = [store.add(found), store.add(factorized(Exact(), 2 * delta, 5))]
    for rank in (7, 100):
        again = store.load(stored[0], rank)
        assert torch.equal(again.a, found.a) and torch.equal(again.b, found.b)
        assert again.certificate == found.certificate
    assert store.load(stored[1], 5).a.shape == (5, 40)
    assert len(energies(stored)) == 7
    first = stored[0].sigma[0].square() + stored[1].sigma[0].square()
    assert energies(stored)[0] == pytest.approx(float(first))
    assert total_energy(stored) == pytest.approx(5 * found.certificate.total, rel=1e-5)


def test_nothing_is_seen_of_the_file(tmp_path: Path) -> None:
    store = FactorStore(tmp_path)
    store.add(factorized(Exact(), matrix(0.5, 30, 40)[0], 7))
    assert list(tmp_path.iterdir()) == []
