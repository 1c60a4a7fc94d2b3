"""From any kind of update to plain low-rank factors, and what is lost on the way.

A weight of any shape is seen as the matrix that `loratool.deltas` makes of it. Where an update's
own structure gives its delta as a product of few columns, the factors are exact; where it gives
the singular values cheaply, the truncation is optimal; only the rest is computed as a whole matrix
and factorized, one tensor at a time.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from loratool import lowrank
from loratool.deltas import delta_of, folded
from loratool.linalg import Certificate, Factorization, Factorizer, RankPolicy, Workspace, tiles
from loratool.rounding import TILE_ELEMENTS
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
)

# What fp64 rounding may do to an energy, as a share of the total.
_FP64_SLACK = 1e-12
# Singular values below this share of the largest are rounding of fp64 products.
_NEGLIGIBLE = 1e-14
# Wider products than the short side divided by this are searched faster as a whole matrix.
_NARROW = 4

_scratch = Workspace()


@dataclass(frozen=True)
class Aim:
    """What rank is wanted.

    Attributes:
        policy: how many singular values are kept where something has to be cut.
        exact_up_to: up to this rank factors are exact, whatever the policy would cut.
    """

    policy: RankPolicy
    exact_up_to: int = 0


@dataclass(frozen=True)
class Tools:
    """What whole matrices are factorized with.

    Attributes:
        factorizer: a plugin of that kind.
        generator: its random numbers.
    """

    factorizer: Factorizer
    generator: torch.Generator


def low_rank(
    update: LowRank | Sparse | Dense | LoHa | LoKr | DoRA | IA3,
    shape: Sequence[int],
    aim: Aim,
    tools: Tools,
    base: torch.Tensor | None = None,
) -> LowRank:
    """The update as B @ A with a certificate of its error; one that is low-rank stays as it is.

    Args:
        update: in the orientation of the weight.
        shape: of the weight; two dimensions or more.
        aim: the rank.
        tools: for what has no structure to use.
        base: the weight's values, of `shape`; needed for DoRA and IA3.

    Returns:
        Factors in fp32 or fp64, not yet rounded to a type to store. A zero delta that had to be
        computed has rank 1.

    Raises:
        InputError: the delta holds NaN or Inf.
    """
    if isinstance(update, LowRank):
        return update
    matrix = matrix_shape(shape)
    rank = exact_rank(update, matrix)
    if rank <= aim.exact_up_to:
        return exact(update, shape, base)
    if isinstance(update, LoKr):
        found = truncated_kronecker(update, aim.policy)
    elif isinstance(update, LoHa) and rank <= min(matrix) // _NARROW:
        found = lowrank.compress([hadamard(update)], aim.policy)
    else:
        whole = _scratch.take("delta", matrix, torch.float32)
        _compute(update, shape, base, whole)
        found = tools.factorizer.factorize(whole, aim.policy, tools.generator)
    if found.certificate.rank >= rank:
        return exact(update, shape, base)
    return LowRank(found.a, found.b, 1.0, found.certificate)


def exact_rank(update: Added, matrix: tuple[int, int]) -> int:
    """How many columns exact factors have, told by shapes: more only where the delta has less.

    Args:
        update: of a weight that is seen as a matrix.
        matrix: (rows, columns).
    """
    rows, columns = matrix
    match update:
        case LowRank():
            return update.rank
        case LoKr():
            return _inner(update.one) * _inner(update.other)
        case LoHa():
            return min(rows, columns, _inner(update.one) * _inner(update.other))
    return min(rows, columns)


def exact(update: Added, shape: Sequence[int], base: torch.Tensor | None = None) -> LowRank:
    """The update as a product of `exact_rank` columns, equal to it but for fp64 rounding.

    Factors in 16 bits have products in fp32 without any rounding, and so have the results.

    Args:
        update: in the orientation of the weight; not `Experts`.
        shape: of the weight.
        base: the weight's values, where the update needs them.

    Returns:
        Factors in fp64, with the update's own scale where it has one.
    """
    matrix = matrix_shape(shape)
    rank = exact_rank(update, matrix)
    match update:
        case LowRank():
            return update
        case LoKr():
            product = kronecker(update)
        case LoHa() if rank < min(matrix):
            product = hadamard(update)
        case _:
            whole = torch.empty(matrix, dtype=torch.float64)
            _compute(update, shape, base, whole)
            left, right = _split(Product(whole))
            product = lowrank.Product(left, right)
    certificate = lowrank.exact_certificate([product], rank)
    return LowRank(product.a, product.b, product.factor, certificate)


def hadamard(update: LoHa) -> lowrank.Product:
    """A LoHa delta as one product of rank r1 * r2, in fp64.

    (B1 A1) o (B2 A2) = B A, every row of B being the Kronecker product of the rows of B1 and B2,
    and every column of A that of the columns of A1 and A2 (Hyeon-Woo et al., 2022, "FedPara",
    proposition 1).
    """
    (left, right), (other_left, other_right) = _split(update.one), _split(update.other)
    b = (left[:, :, None] * other_left[:, None, :]).flatten(1)
    a = (right[:, None, :] * other_right[None, :, :]).flatten(0, 1)
    return lowrank.Product(b, a, update.scale)


def kronecker(update: LoKr) -> lowrank.Product:
    """A LoKr delta as one product, in fp64: kron(B1 A1, B2 A2) = kron(B1, B2) kron(A1, A2)."""
    (left, right), (other_left, other_right) = _split(update.one), _split(update.other)
    return lowrank.Product(_kron(left, other_left), _kron(right, other_right), update.scale)


def truncated_kronecker(update: LoKr, policy: RankPolicy) -> Factorization:
    """The best approximation of a LoKr delta, from the decompositions of its two small matrices.

    The singular values of a Kronecker product are the products of theirs, and its singular vectors
    the Kronecker products of theirs (Van Loan, 2000, "The ubiquitous Kronecker product", section
    2). Factors are balanced and in fp64.
    """
    u, sigma, v = _decomposed(update.one)
    other_u, other_sigma, other_v = _decomposed(update.other)
    products = torch.outer(sigma, other_sigma).flatten() * abs(update.scale)
    order = products.argsort(descending=True, stable=True)
    products = products[order]
    kept = max(1, int((products > _NEGLIGIBLE * products[0]).sum()))
    energies = products[:kept].square()
    total = float(energies.sum())
    shape = (len(u) * len(other_u), v.shape[1] * other_v.shape[1])
    rank = policy.choose(energies, total, shape) or kept
    one, other = order[:rank] // len(other_sigma), order[:rank] % len(other_sigma)
    root = products[:rank].sqrt()
    b = (u[:, None, one] * other_u[None, :, other]).flatten(0, 1)
    a = (v[one][:, :, None] * other_v[other][:, None, :]).flatten(1)
    captured = float(energies[:rank].sum())
    bound = captured * (1 + _FP64_SLACK)
    return Factorization(
        a=a.mul_(root[:, None]),
        b=b.mul_(root * math.copysign(1.0, update.scale)),
        sigma=products[:rank],
        certificate=Certificate(rank, total, captured, optimum_bound=bound, method="kronecker"),
    )


def _kron(one: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """The Kronecker product of matrices; torch's own fails on some that are transposed views."""
    return (one[:, None, :, None] * other[None, :, None, :]).flatten(2).flatten(0, 1)


def changed_vector(update: IA3, base: torch.Tensor) -> Dense:
    """What scaling a vector (a bias) adds to it: (l - 1) o b, in fp64."""
    factors = update.factors.double().reshape(base.shape)
    return Dense((factors - 1) * base.double())


def _inner(product: Product) -> int:
    """How many columns `_split` gives the left factor."""
    rows, right = product.left.shape[0], product.right
    if right is None:
        return min(rows, product.left.numel() // max(1, rows))
    kernel = 1 if product.core is None else math.prod(product.core.shape[2:])
    return min(rows, product.left.shape[1], right.shape[1] * kernel)


def _split(product: Product) -> tuple[torch.Tensor, torch.Tensor]:
    """A matrix as left @ right with no more columns than it has rows or columns; fp64.

    One that is whole gets the identity for its shorter side.
    """
    left = product.left.double().flatten(1)
    if product.right is None:
        whole = left
    else:
        right = folded(product).double()
        if left.shape[1] <= min(len(left), right.shape[1]):
            return left, right
        whole = left @ right
    rows, columns = whole.shape
    if rows <= columns:
        return torch.eye(rows, dtype=whole.dtype), whole
    return whole, torch.eye(columns, dtype=whole.dtype)


def _decomposed(product: Product) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """U (rows, k), sigma (k,) descending, V^T (k, columns) of a matrix in factors or whole."""
    if product.right is None:
        u, sigma, v = torch.linalg.svd(product.left.double().flatten(1), full_matrices=False)
        return u, sigma, v
    return lowrank.decompose([lowrank.Product(product.left, folded(product))])


def _compute(
    update: Added, shape: Sequence[int], base: torch.Tensor | None, out: torch.Tensor
) -> None:
    """Write the delta of a weight of `shape` to the matrix `out`, tile by tile through fp64."""
    delta = delta_of([(update, 1.0)], shape, base)
    under = base.reshape(delta.shape) if base is not None and delta.needs_base else None
    for rows in tiles(out, TILE_ELEMENTS):
        tile = torch.empty(out[rows].shape, dtype=torch.float64)
        delta.rows(rows, tile, None if under is None else under[rows].double())
        out[rows] = tile
