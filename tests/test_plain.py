"""Updates of every kind become low-rank ones: exactly where they can, and with a true error."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from loratool import plain, plugins
from loratool.linalg import RankPolicy, named_generator
from loratool.updates import (
    IA3,
    Added,
    Dense,
    DoRA,
    LoHa,
    LoKr,
    LowRank,
    Product,
    Sparse,
    matrix_shape,
    tensors_of,
)
from tests import updates as some
from tests.updates import Shape

common = settings(derandomize=True, deadline=None, max_examples=40)
any_update = st.one_of(some.lohas(), some.lokrs(), some.sparses(), some.based())


def base_of(shape: Shape) -> torch.Tensor:
    return some.randn(99, *shape)


def plainly(
    update: Added, shape: Shape, aim: plain.Aim, factorizer: str = "exact", name: str = "w"
) -> LowRank:
    assert isinstance(update, LowRank | Sparse | Dense | LoHa | LoKr | DoRA | IA3)
    tools = plain.Tools(plugins.create("factorizers", factorizer), named_generator(0, name))
    return plain.low_rank(update, shape, aim, tools, base_of(shape))


def product_of(found: LowRank) -> torch.Tensor:
    return found.scale * found.b.double() @ found.a.double()


def fixed(rank: int) -> plain.Aim:
    return plain.Aim(RankPolicy(rank), rank)


def size(update: Added) -> float:
    """What rounding errors are relative to where products cancel."""
    return math.prod(float(part.norm()) for _, part in tensors_of(update)) + 1


# ---- exact


@common
@given(given=any_update)
def test_the_exact_form_is_the_delta(given: tuple[Added, Shape]) -> None:
    update, shape = given
    wanted = some.delta(update, shape, base_of(shape))
    rank = plain.exact_rank(update, matrix_shape(shape))
    found = plainly(update, shape, fixed(rank))
    assert found.rank == rank <= min(matrix_shape(shape))
    assert found.certificate is not None and found.certificate.relative_error == 0
    # Deltas are computed from factors in fixed point of some 24 bits.
    assert (product_of(found) - wanted).norm() <= 2e-7 * max(size(update), base_of(shape).norm())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_factors_of_16_bits_have_exact_products_in_fp32(dtype: torch.dtype) -> None:
    def narrow(product: Product) -> Product:
        right = None if product.right is None else product.right.to(dtype)
        return Product(product.left.to(dtype), right)

    loha = some.loha(0, (20, 30), 3, 2, 16 / 3, tucker=False)
    lokr = LoKr(Product(some.randn(1, 4, 3)), some.product(2, 5, 2, 10), 0.1)
    for update in (loha, lokr):
        update = type(update)(narrow(update.one), narrow(update.other), update.scale)
        found = plain.exact(update, (20, 30))
        assert torch.equal(found.b.float().double(), found.b)
        assert torch.equal(found.a.float().double(), found.a)
        assert found.scale == update.scale
        wanted = some.delta(update, (20, 30))
        assert (product_of(found) - wanted).norm() <= 1e-14 * wanted.norm()


def test_a_low_rank_update_is_itself() -> None:
    update = LowRank(some.randn(0, 3, 7), some.randn(1, 5, 3), 0.3)
    assert plainly(update, (5, 7), fixed(1)) is update


# ---- cut


@common
@given(given=any_update, rank=st.integers(1, 6), factorizer=st.sampled_from(["exact", "krylov"]))
def test_the_error_that_is_stated_is_the_error(
    given: tuple[Added, Shape], rank: int, factorizer: str
) -> None:
    update, shape = given
    wanted = some.delta(update, shape, base_of(shape))
    found = plainly(update, shape, plain.Aim(RankPolicy(rank)), factorizer)
    assert found.rank <= rank and found.certificate is not None
    norm = float(wanted.norm())
    measured = float((product_of(found) - wanted).norm()) / norm if norm else 0.0
    assert abs(measured - found.certificate.relative_error) <= 3e-4
    # Differences of squares: what fp32 leaves of a captured energy of nearly all.
    assert abs(measured**2 - found.certificate.relative_error**2) <= 1e-6
    assert math.isclose(found.certificate.total, norm**2, rel_tol=1e-6)


@common
@given(given=any_update, rank=st.integers(1, 6))
def test_the_truncation_is_optimal(given: tuple[Added, Shape], rank: int) -> None:
    update, shape = given
    sigma = torch.linalg.svdvals(some.delta(update, shape, base_of(shape)))
    found = plainly(update, shape, plain.Aim(RankPolicy(rank)))
    assert found.certificate is not None
    best, total = float(sigma[:rank].square().sum()), float(sigma.square().sum())
    assert abs(found.certificate.captured - best) <= 1e-6 * total
    assert found.certificate.captured <= found.certificate.optimum_bound <= best + 1e-6 * total


@common
@given(given=any_update)
def test_more_rank_never_loses_more(given: tuple[Added, Shape]) -> None:
    update, shape = given
    errors = []
    for rank in range(1, 1 + min(matrix_shape(shape))):
        found = plainly(update, shape, plain.Aim(RankPolicy(rank)))
        assert found.certificate is not None
        errors.append(found.certificate.relative_error)
    assert all(later <= earlier + 1e-6 for earlier, later in pairwise(errors))
    assert errors[-1] <= 1e-3  # what the exact factorizer leaves of the smallest singular values


@common
@given(given=any_update, share=st.floats(0.05, 0.9999))
def test_an_energy_is_reached_by_the_smallest_rank(
    given: tuple[Added, Shape], share: float
) -> None:
    update, shape = given
    sigma = torch.linalg.svdvals(some.delta(update, shape, base_of(shape)))
    total = float(sigma.square().sum())
    found = plainly(update, shape, plain.Aim(RankPolicy(None, share)))
    assert found.certificate is not None
    assert found.certificate.energy >= share - 1e-6
    smaller = float(sigma[: found.rank - 1].square().sum())
    assert total == 0 or smaller < (share + 1e-6) * total


@pytest.mark.parametrize("factorizer", ["exact", "krylov"])
def test_wide_products_are_searched_as_a_matrix_and_narrow_ones_by_their_factors(
    factorizer: str,
) -> None:
    shape = (48, 60)
    for rank, method in ((3, "qr"), (4, "matrix"), (7, "matrix")):
        update = some.loha(7, shape, rank, rank, 0.5, tucker=False)
        found = plainly(update, shape, plain.Aim(RankPolicy(2)), factorizer)
        assert found.certificate is not None
        assert (found.certificate.method == "qr") == (method == "qr")
        sigma = torch.linalg.svdvals(some.delta(update, shape))
        best = float((sigma[2:].square().sum() / sigma.square().sum()).sqrt())
        assert math.isclose(found.certificate.relative_error, best, rel_tol=1e-2)


def test_no_rank_above_the_exact_one_is_taken() -> None:
    update = some.loha(1, (20, 30), 2, 2, 0.5, tucker=False)
    found = plainly(update, (20, 30), plain.Aim(RankPolicy(None, 1.0)))
    assert found.rank == 4 and found.scale == 0.5
    assert found.certificate is not None and found.certificate.relative_error == 0


# ---- corners


@pytest.mark.parametrize("aim", [fixed(1), fixed(8), plain.Aim(RankPolicy(None, 0.5))])
def test_zero_deltas_stay_zero(aim: plain.Aim) -> None:
    def zero(product: Product) -> Product:
        return Product(torch.zeros_like(product.left), product.right)

    loha = some.loha(1, (12, 9), 3, 3, 1.0, tucker=False)
    loha = LoHa(zero(loha.one), loha.other)
    lokr = LoKr(Product(torch.zeros(3, 2)), some.product(4, 4, 2, 5))
    dense = Dense(torch.zeros(12, 9))
    dora = DoRA(
        LowRank(torch.zeros(2, 9), torch.zeros(12, 2)), base_of((12, 9)).norm(dim=1).double()
    )
    for update, shape in ((loha, (12, 9)), (lokr, (12, 10)), (dense, (12, 9)), (dora, (12, 9))):
        found = plainly(update, shape, aim)
        assert product_of(found).norm() < 1e-12
        assert found.certificate is not None
        if update is not dora:  # its norms are rounded
            assert found.certificate.relative_error == 0 and not bool(found.b.any())


def test_a_scale_of_0_or_below_is_kept() -> None:
    for scale in (0.0, -2.0):
        update = LoKr(Product(some.randn(0, 3, 3)), some.product(4, 4, 2, 5), scale)
        found = plainly(update, (12, 15), plain.Aim(RankPolicy(20)))
        assert torch.allclose(product_of(found), some.delta(update, (12, 15)), atol=1e-9)


def test_the_same_seed_gives_the_same_bytes() -> None:
    update, shape = Dense(some.randn(3, 80, 90)), (80, 90)
    one, other = (plainly(update, shape, plain.Aim(RankPolicy(4)), "krylov") for _ in range(2))
    assert torch.equal(one.a, other.a) and torch.equal(one.b, other.b)


def test_results_do_not_share_a_buffer() -> None:
    aim = fixed(30)
    one = plainly(Dense(some.randn(3, 8, 9)), (8, 9), aim)
    before = product_of(one)
    plainly(Dense(some.randn(4, 8, 9)), (8, 9), aim)
    assert torch.equal(product_of(one), before)


def test_what_scaling_a_bias_adds() -> None:
    factors, bias = some.randn(0, 5).float(), some.randn(1, 5).float()
    found = plain.changed_vector(IA3(factors), bias)
    assert torch.allclose(bias + found.values * found.scale, bias.double() * factors.double())
