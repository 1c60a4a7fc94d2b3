"""Arithmetic on matrices that are known by their factors, never through the dense matrix.

A `Product` stands for scale * B @ A; a sum of products is handled as one wide product, by
concatenation. Cost (out + in) R^2 for a total rank R, all in fp64.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import torch

from loratool.dtypes import torch_dtype
from loratool.linalg import Certificate, Factorization, RankPolicy, Workspace
from loratool.updates import LowRank

# What fp64 rounding may do to an energy, as a share of the total.
_FP64_SLACK = 1e-12
# Singular values below this share of the largest are rounding of fp64 products.
_NEGLIGIBLE = 1e-14
# Elements between 2^-n and 2^n have squares, and sums of products of squares, well inside fp64.
_SAFE_EXPONENT = 200

_scratch = Workspace()


class Product(NamedTuple):
    """factor * B @ A.

    Attributes:
        b: (out, r), any float dtype.
        a: (r, in).
        factor: weight times scale.
    """

    b: torch.Tensor
    a: torch.Tensor
    factor: float = 1.0


def weighted(update: LowRank, weight: float = 1.0) -> Product:
    """`weight` times an update's delta."""
    return Product(update.b, update.a, weight * update.scale)


def concatenated(parts: Sequence[Product]) -> tuple[torch.Tensor, torch.Tensor]:
    """The sum as one product, in fp64: B (out, R) with all factors folded in, A (R, in)."""
    factors = [part.factor for part in parts for _ in range(part.b.shape[1])]
    b = torch.cat([part.b for part in parts], dim=1).double()
    b.mul_(torch.tensor(factors, dtype=torch.float64))
    return b, torch.cat([part.a for part in parts], dim=0).double()


def inner(one: Sequence[Product], other: Sequence[Product]) -> float:
    """<D1, D2> = tr(D1^T D2) of two sums of products, in fp64."""
    b1, a1 = concatenated(one)
    b2, a2 = concatenated(other)
    return float(((b1.T @ b2) * (a1 @ a2.T)).sum())


def squared_norm(parts: Sequence[Product]) -> float:
    """||D||_F^2 of a sum of products, in fp64."""
    return max(0.0, inner(parts, parts))


def grams(parts: Sequence[Product]) -> torch.Tensor:
    """B^T B and A A^T of the concatenated factors, without `factor`: (2, R, R), fp64."""
    ones = [1.0] * len(parts)
    b = _stacked("b", [part.b.T for part in parts], ones)
    a = _stacked("a", [part.a for part in parts], ones)
    return torch.stack([b @ b.T, a @ a.T])


def decompose(
    parts: Sequence[Product],
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The singular value decomposition of a sum of products, U diag(sigma) V^T.

    QR of both concatenated factors and the SVD of the small core R_B R_A^T; optimal by the
    invariance of the Frobenius norm (Halko, Martinsson and Tropp, 2011, section 5.1).

    Returns:
        U (out, k), sigma (k,) descending, V^T (k, in), fp64, k = min(R, out, in); singular values
        that are rounding alone, and their vectors, are left out, but one is always kept.
    """
    core = _core(parts)
    return core.columns.times(core.u), core.sigma, core.rows.times(core.v.T).T


class _Basis:
    """The orthonormal columns Q of a matrix (length, R), kept as Householder reflections.

    Few columns of Q X are wanted, and Q itself would cost more than they do.
    """

    def __init__(self, matrix: torch.Tensor) -> None:
        reflections, self._tau = torch.geqrf(matrix)
        self._rank = min(matrix.shape)
        self._reflections = reflections[:, : self._rank]
        self.triangle = reflections[: self._rank].triu()

    def times(self, small: torch.Tensor) -> torch.Tensor:
        """Q @ small: (length, k) for `small` (min(length, R), k)."""
        padded = small.new_zeros(small.shape[1], len(self._reflections)).T
        padded[: self._rank] = small
        return torch.ormqr(self._reflections, self._tau, padded)


class _Core(NamedTuple):
    """A sum of products as Q_B u diag(sigma) v Q_A^T, before the large products are made."""

    columns: _Basis
    u: torch.Tensor
    sigma: torch.Tensor
    v: torch.Tensor
    rows: _Basis


def _core(parts: Sequence[Product]) -> _Core:
    b, a, shift = _shifted(parts)
    columns, rows = _Basis(b), _Basis(a.T)
    u, sigma, v = torch.linalg.svd(columns.triangle @ rows.triangle.T, full_matrices=False)
    kept = _significant(sigma)
    return _Core(columns, u[:, :kept], torch.ldexp(sigma[:kept], shift), v[:kept], rows)


def singular_values(parts: Sequence[Product]) -> torch.Tensor:
    """The singular values of a sum of products, as `decompose` gives them, without vectors."""
    b, a, shift = _shifted(parts)
    r_b, r_a = (torch.linalg.qr(factor, mode="r").R for factor in (b, a.T))
    sigma = torch.linalg.svdvals(r_b @ r_a.T)
    return torch.ldexp(sigma[: _significant(sigma)], shift)


def _shifted(parts: Sequence[Product]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """B and A, times powers of two where fp64 squares would not be safe, and what undoes them.

    They are valid until this thread calls it again: fresh memory costs more than filling it.
    """
    b = _stacked("b", [part.b.T for part in parts], [part.factor for part in parts]).T
    a = _stacked("a", [part.a for part in parts], [1.0] * len(parts))
    exponents = [_exponent(factor) for factor in (b, a)]
    if max(map(abs, exponents)) <= _SAFE_EXPONENT:
        return b, a, torch.tensor(0)
    b, a = (torch.ldexp(f, torch.tensor(-n)) for f, n in zip((b, a), exponents, strict=True))
    return b, a, torch.tensor(sum(exponents))


def _stacked(name: str, blocks: Sequence[torch.Tensor], factors: Sequence[float]) -> torch.Tensor:
    """Blocks of rows (r, length) times their factors, in fp64 and this thread's buffer."""
    ranks = [len(block) for block in blocks]
    stacked = _scratch.take(name, (sum(ranks), blocks[0].shape[1]), torch.float64)
    for rows, block, factor in zip(torch.split(stacked, ranks), blocks, factors, strict=True):
        rows.copy_(block)
        if factor != 1:
            rows.mul_(factor)
    return stacked


def _significant(sigma: torch.Tensor) -> int:
    """How many descending singular values are more than rounding; at least 1."""
    return max(1, int((sigma > _NEGLIGIBLE * sigma[0]).sum()))


def _exponent(tensor: torch.Tensor) -> int:
    largest = float(tensor.abs().max()) if tensor.numel() else 0.0
    return math.frexp(largest)[1] if largest > 0 else 0


def compress(parts: Sequence[Product], policy: RankPolicy | None) -> Factorization:
    """The best approximation of a sum of products by a matrix of the policy's rank.

    Args:
        parts: products of one shape (out, in).
        policy: how many singular values to keep; None for all that are not rounding.

    Returns:
        Balanced factors in fp64 and a certificate whose error is that of the truncation. A zero
        sum gives rank 1 with zero factors.
    """
    columns, u, sigma, v, rows = _core(parts)
    energies = sigma.square()
    total = float(energies.sum())
    shape = (parts[0].b.shape[0], parts[0].a.shape[1])
    rank = len(sigma) if policy is None else policy.choose(energies, total, shape) or len(sigma)
    captured = float(energies[:rank].sum())
    root = sigma[:rank].sqrt()
    bound = min(total, captured) * (1 + _FP64_SLACK)
    return Factorization(
        a=rows.times((root[:, None] * v[:rank]).T).T,
        b=columns.times(u[:, :rank] * root),
        sigma=sigma[:rank],
        certificate=Certificate(rank, total, captured, optimum_bound=bound, method="qr"),
    )


def exact_certificate(parts: Sequence[Product], rank: int) -> Certificate:
    """The certificate of a result that equals the sum of `parts` but for rounding."""
    total = squared_norm(parts)
    return Certificate(rank, total, total, optimum_bound=total, method="exact")


def rounded_factors(
    a: torch.Tensor, b: torch.Tensor, certificate: Certificate, dtype: str, scale: float = 1.0
) -> LowRank:
    """Round factors to a safetensors dtype, and add what that costs to the certificate.

    B A - B' A' = (B - B') A + B' (A - A') is a product of rank 2 r, whose norm is a trace of small
    Gram matrices: no cancellation, and exactly 0 where nothing is rounded.

    Args:
        a: (r, in).
        b: (out, r).
        certificate: the error so far, of scale * B @ A.
        dtype: of the result's factors.
        scale: of the result.
    """
    kind = torch_dtype(dtype)
    a_rounded, b_rounded = a.to(kind), b.to(kind)
    exact_a, exact_b = a.double(), b.double()
    columns = torch.cat([exact_b - b_rounded.double(), b_rounded.double()], dim=1)
    rows = torch.cat([exact_a, exact_a - a_rounded.double()], dim=0)
    lost = float(((columns.T @ columns) * (rows @ rows.T)).sum().clamp(min=0))
    certificate = replace(certificate, rounding=certificate.rounding + lost * scale**2)
    return LowRank(a_rounded.contiguous(), b_rounded.contiguous(), scale, certificate)


def balanced(a: torch.Tensor, b: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The same product with every row of A as long as its column of B, in fp64.

    The norms of A and B are then equal too. The rank-one components stay what they are; one that is
    zero on either side is left alone, since only zeros could balance it.

    Args:
        a: (r, in).
        b: (out, r).
    """
    a, b = a.double(), b.double()
    rows, columns = torch.linalg.vector_norm(a, dim=1), torch.linalg.vector_norm(b, dim=0)
    factor = torch.where((rows > 0) & (columns > 0), (rows / columns).sqrt(), torch.ones(()))
    return a / factor[:, None], b * factor


def padded(a: torch.Tensor, b: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The same product with rows of A (r, in) and columns of B (out, r) of zeros up to `rank`."""
    missing = rank - a.shape[0]
    return torch.nn.functional.pad(a, (0, 0, 0, missing)), torch.nn.functional.pad(b, (0, missing))
