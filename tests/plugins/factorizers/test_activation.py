"""The activation factorizer against an SVD of D C^(1/2) with an explicit root."""

from __future__ import annotations

import pytest
import torch

from loratool.errors import InputError
from loratool.linalg import Context, Factorization, RankPolicy, SecondMoment
from loratool_plugins.factorizers.activation import Activation
from loratool_plugins.factorizers.krylov import Krylov


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def moment_of(columns: int, tokens: int, seed: int = 3) -> torch.Tensor:
    """Of inputs with a few strong directions, as activations have them."""
    inputs = randn(tokens, columns, seed=seed).double()
    inputs = inputs * torch.logspace(1, -2, columns, dtype=torch.float64)
    inputs = inputs @ torch.linalg.qr(randn(columns, columns, seed=seed + 1).double())[0]
    return inputs.t() @ inputs / tokens


def graded(out: int, columns: int) -> torch.Tensor:
    delta = randn(out, columns) * torch.logspace(0, -1.5, out)[:, None]
    return torch.linalg.qr(randn(out, out, seed=2))[0] @ delta


def factorize(
    delta: torch.Tensor,
    moment: torch.Tensor | None,
    policy: RankPolicy,
    transposed: bool = False,
) -> Factorization:
    given = None if moment is None else SecondMoment(moment, 100)
    context = Context("w", delta, delta, transposed, given)
    generator = torch.Generator().manual_seed(0)
    return Activation().factorize_in(delta.clone(), policy, generator, context)


def root_of(moment: torch.Tensor) -> torch.Tensor:
    if moment.dim() == 1:
        return moment.sqrt().diag()
    values, vectors = torch.linalg.eigh(moment)
    return (vectors * values.clamp(min=0).sqrt()) @ vectors.t()


def lost(delta: torch.Tensor, found: Factorization, moment: torch.Tensor) -> float:
    """||(D - B A) C^(1/2)||^2 by the explicit root."""
    rest = delta.double() - found.b.double() @ found.a.double()
    return float((rest @ root_of(moment)).square().sum())


def tail(delta: torch.Tensor, moment: torch.Tensor, rank: int) -> float:
    """The least that any matrix of this rank leaves (Eckart and Young)."""
    sigma = torch.linalg.svdvals(delta.double() @ root_of(moment))
    return float(sigma[rank:].square().sum())


@pytest.mark.parametrize("diagonal", [False, True])
@pytest.mark.parametrize("shape", [(40, 60), (60, 40), (200, 30), (1, 7), (7, 1)], ids=str)
def test_nothing_of_that_rank_is_nearer_in_the_metric(
    shape: tuple[int, int], diagonal: bool
) -> None:
    delta, moment = graded(*shape), moment_of(shape[1], 400)
    moment = moment.diagonal().clone() if diagonal else moment
    for rank in (1, 4):
        found = factorize(delta, moment, RankPolicy(rank))
        kept = min(rank, *shape)
        whole = float((delta.double() @ root_of(moment)).square().sum())
        assert lost(delta, found, moment) <= tail(delta, moment, kept) + 1e-6 * whole
        weighted = found.certificate.weighted
        assert weighted is not None
        assert weighted.total == pytest.approx(whole, rel=1e-5)
        assert weighted.total - weighted.captured == pytest.approx(
            lost(delta, found, moment), rel=1e-4, abs=1e-6 * whole
        )
        plain = Krylov().factorize(delta.clone(), RankPolicy(rank), torch.Generator())
        assert weighted.total - weighted.plain == pytest.approx(
            lost(delta, plain, moment), rel=1e-3, abs=1e-5 * whole
        )


def test_the_search_in_large_matrices_is_as_good_as_it_says() -> None:
    out, columns, rank = 1100, 1200, 8
    delta, moment = graded(out, columns), moment_of(columns, 2000)
    found = factorize(delta, moment, RankPolicy(rank))
    assert found.certificate.method == "activation-krylov"
    whole = float((delta.double() @ root_of(moment)).square().sum())
    best = whole - tail(delta, moment, rank)
    assert whole - lost(delta, found, moment) >= 0.999 * best


def test_the_plain_energy_is_told_honestly() -> None:
    delta, moment = graded(50, 60), moment_of(60, 400)
    found = factorize(delta, moment, RankPolicy(5))
    plain = Krylov().factorize(delta.clone(), RankPolicy(5), torch.Generator())
    rest = delta.double() - found.b.double() @ found.a.double()
    certificate = found.certificate
    assert certificate.total - certificate.captured == pytest.approx(
        float(rest.square().sum()), rel=1e-5
    )
    assert certificate.captured < plain.certificate.captured <= certificate.optimum_bound


def test_a_weight_that_is_stored_the_other_way_round() -> None:
    delta, moment = graded(50, 60), moment_of(60, 400)
    one = factorize(delta, moment, RankPolicy(5))
    other = factorize(delta.t().contiguous(), moment, RankPolicy(5), transposed=True)
    assert torch.dist(one.b @ one.a, (other.b @ other.a).t()) < 1e-4 * delta.norm()


def test_singular_moments_are_no_special_case() -> None:
    delta = graded(50, 60)
    few = moment_of(60, 3)  # three tokens
    found = factorize(delta, few, RankPolicy(3))
    whole = float((delta.double() @ root_of(few)).square().sum())
    assert lost(delta, found, few) <= 1e-6 * whole
    dead = moment_of(60, 400)
    dead[:30] = 0
    dead[:, :30] = 0
    for moment in (dead, dead.diagonal().clone()):
        found = factorize(delta, moment, RankPolicy(4))
        assert bool(found.a.isfinite().all() and found.b.isfinite().all())
        assert lost(delta, found, moment) <= tail(delta, moment, 4) * 1.0001


def test_inputs_that_are_zero_leave_the_plain_factors() -> None:
    delta = graded(50, 60)
    found = factorize(delta, torch.zeros(60, 60, dtype=torch.float64), RankPolicy(4))
    plain = factorize(delta, None, RankPolicy(4))
    assert torch.allclose(found.b @ found.a, plain.b @ plain.a)


def test_energy_is_a_share_of_the_weighted_energy() -> None:
    delta, moment = graded(50, 60), moment_of(60, 400)
    found = factorize(delta, moment, RankPolicy(None, energy=0.9))
    weighted = found.certificate.weighted
    assert weighted is not None
    rank = found.certificate.rank
    assert weighted.captured >= 0.9 * weighted.total
    assert tail(delta, moment, rank - 1) > 0.1 * weighted.total


def test_scale_does_not_matter() -> None:
    delta, moment = graded(50, 60), moment_of(60, 400)
    one = factorize(delta, moment, RankPolicy(4))
    small = factorize(delta * 2.0**-100, moment * 1e-6, RankPolicy(4))
    found, expected = (x.b.double() @ x.a.double() for x in (small, one))
    assert torch.allclose(found * 2.0**100, expected, atol=1e-4)


def test_bad_deltas() -> None:
    moment = moment_of(6, 40)
    with pytest.raises(InputError, match="NaN"):
        factorize(torch.full((5, 6), float("nan")), moment, RankPolicy(2))
    zero = factorize(torch.zeros(5, 6), moment, RankPolicy(2))
    assert zero.certificate.total == 0 and zero.certificate.rank == 1
