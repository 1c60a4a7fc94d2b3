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

from loratool.adapter import LowRank
from loratool.dtypes import torch_dtype
from loratool.linalg import Certificate, Factorization, RankPolicy

# What fp64 rounding may do to an energy, as a share of the total.
_FP64_SLACK = 1e-12
# Singular values below this share of the largest are rounding of fp64 products.
_NEGLIGIBLE = 1e-14


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
    b = torch.cat([part.b.double() * part.factor for part in parts], dim=1)
    a = torch.cat([part.a.double() for part in parts], dim=0)
    return b, a


def inner(one: Sequence[Product], other: Sequence[Product]) -> float:
    """<D1, D2> = tr(D1^T D2) of two sums of products, in fp64."""
    b1, a1 = concatenated(one)
    b2, a2 = concatenated(other)
    return float(((b1.T @ b2) * (a1 @ a2.T)).sum())


def squared_norm(parts: Sequence[Product]) -> float:
    """||D||_F^2 of a sum of products, in fp64."""
    return max(0.0, inner(parts, parts))


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
    b, a = concatenated(parts)
    # A power of two that brings tiny and huge factors to where fp64 squares are safe.
    shift_b, shift_a = (-_exponent(factor) for factor in (b, a))
    q_b, r_b = torch.linalg.qr(torch.ldexp(b, torch.tensor(shift_b)))
    q_a, r_a = torch.linalg.qr(torch.ldexp(a, torch.tensor(shift_a)).T)
    u, sigma, v = torch.linalg.svd(r_b @ r_a.T, full_matrices=False)
    kept = max(1, int((sigma > _NEGLIGIBLE * sigma[0]).sum()))
    sigma = torch.ldexp(sigma[:kept], torch.tensor(-shift_b - shift_a))
    return q_b @ u[:, :kept], sigma, v[:kept] @ q_a.T


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
    u, sigma, v = decompose(parts)
    energies = sigma.square()
    total = float(energies.sum())
    shape = (u.shape[0], v.shape[1])
    rank = len(sigma) if policy is None else policy.choose(energies, total, shape) or len(sigma)
    captured = float(energies[:rank].sum())
    root = sigma[:rank].sqrt()
    bound = min(total, captured) * (1 + _FP64_SLACK)
    return Factorization(
        a=root[:, None] * v[:rank],
        b=u[:, :rank] * root,
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

    ||B A - B' A'||^2 is a trace of products of the small Gram matrices of [B, B'] and [A; -A'].

    Args:
        a: (r, in).
        b: (out, r).
        certificate: the error so far, of scale * B @ A.
        dtype: of the result's factors.
        scale: of the result.
    """
    kind = torch_dtype(dtype)
    a_rounded, b_rounded = a.to(kind), b.to(kind)
    columns = torch.cat([b.double(), b_rounded.double()], dim=1)
    rows = torch.cat([a.double(), -a_rounded.double()], dim=0)
    lost = float(((columns.T @ columns) * (rows @ rows.T)).sum().clamp(min=0))
    certificate = replace(certificate, rounding=certificate.rounding + lost * scale**2)
    return LowRank(a_rounded.contiguous(), b_rounded.contiguous(), scale, certificate)
