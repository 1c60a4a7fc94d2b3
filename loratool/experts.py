"""Updates of experts, one low-rank matrix each, taken apart and put together again.

Whatever is done to low-rank updates is done to experts one by one; only the rank is common to all
of them, as the factors of a 3-D weight have it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from loratool.linalg import Certificate
from loratool.lowrank import padded
from loratool.updates import Experts, LowRank


def matrices(update: LowRank | Experts) -> list[LowRank]:
    """The low-rank updates of the matrices that a weight consists of: itself, or one an expert."""
    if isinstance(update, LowRank):
        return [update]
    return [update.expert(number) for number in range(len(update.a))]


def gathered(experts: Sequence[LowRank]) -> Experts:
    """The updates of all experts as one.

    Args:
        experts: at least one, of matrices of one shape, their factors of one type.

    Returns:
        Factors of the largest rank, the others filled up with zeros, and under the first scale:
        what another scale is more than that is folded into its B. Its certificate is that of all
        together, if each has one.
    """
    rank, scale = max(expert.rank for expert in experts), experts[0].scale
    pairs = [padded(expert.a, _scaled(expert, scale), rank) for expert in experts]
    a, b = (torch.stack(factors) for factors in zip(*pairs, strict=True))
    certificates = [expert.certificate for expert in experts if expert.certificate is not None]
    known = len(certificates) == len(experts)
    return Experts(a, b, scale, together(certificates, rank) if known else None)


def _scaled(expert: LowRank, scale: float) -> torch.Tensor:
    if expert.scale == scale:
        return expert.b
    if scale == 0:
        raise ValueError("the first expert's scale is 0, another's is not")
    return (expert.b.double() * (expert.scale / scale)).to(expert.b.dtype)


def together(certificates: Sequence[Certificate], rank: int) -> Certificate:
    """The certificate of several updates side by side, of one rank."""
    sums = {
        key: math.fsum(getattr(found, key) for found in certificates)
        for key in ("total", "captured", "rounding", "optimum_bound")
    }
    methods = sorted({found.method for found in certificates})
    steps = max(found.steps for found in certificates)
    return Certificate(rank, method=" ".join(methods), steps=steps, **sums)  # type: ignore[arg-type]
