"""Iso-C: the weighted sum with all its singular values made equal."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from loratool.linalg import Factorizer, RankPolicy
from loratool.updates import LowRank

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Iso:
    """Iso-C: the weighted sum with its singular values replaced by their mean.

    Marczak et al., 2025 (arXiv 2502.04959, section 4.1): the weighted sum U S V^T becomes
    mean(S) U V^T. The paper's mean runs over all min(out, in) singular values of a sum of full
    rank; here over those that are not zero, at most the sum of the ranks. With --rank the leading
    directions of the sum are kept, at the same mean. Computed from the factors, never dense (Core
    Space, arXiv 2509.17786). Nonlinear in the weights, except that all of them times c is the
    result times c.

    Vectors (biases) are summed with the weights.
    """

    def combine(
        self,
        parts: Sequence[LowRank],
        weights: Sequence[float],
        policy: RankPolicy | None,
        factorizer: Factorizer,
        generator: torch.Generator,
    ) -> LowRank:
        """The combination in fp64; `factorizer` and `generator` are not used."""
        from loratool import lowrank
        from loratool.linalg import Certificate

        products = [lowrank.weighted(p, w) for p, w in zip(parts, weights, strict=True)]
        u, sigma, v = lowrank.decompose(products)
        mean = float(sigma.mean())
        energies = sigma.new_full((len(sigma),), mean**2)
        total = float(energies.sum())
        shape = (u.shape[0], v.shape[1])
        rank = (policy.choose(energies, total, shape) if policy else None) or len(sigma)
        root = mean**0.5
        captured = rank * mean**2
        certificate = Certificate(rank, total, captured, optimum_bound=captured, method="qr")
        return LowRank(root * v[:rank], root * u[:, :rank], 1.0, certificate)
