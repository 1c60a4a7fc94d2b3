"""TSV-M: singular vectors of the parts, made orthogonal to each other."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from loratool.linalg import Factorizer, RankPolicy
from loratool.updates import LowRank
from loratool_plugins.combiners import _common as common

if TYPE_CHECKING:
    import torch

# Singular values of concatenated unit vectors below this mean dependent ones.
_DEPENDENT = 1e-10


@dataclass(frozen=True)
class Tsv:
    """TSV-M: the parts' singular vectors, made orthogonal to each other.

    Gargiulo et al., 2024 (arXiv 2412.00081, section 4, "TSV-Merge"): of each delta T_i = U_i S_i
    V_i^T keep the leading singular triplets, concatenate U = [U_1, U_2, ...] and V likewise,
    replace both by the nearest matrices with orthonormal columns (the polar factors P Q^T of their
    singular value decompositions P D Q^T), and multiply: U' diag(w_i S_i) V'^T. The paper keeps the
    leading 1/T of each of T full-rank deltas; here each part keeps all of its rank, or, with --rank
    R, its leading R / T (at least 1). Computed from the factors, never dense (Core Space, arXiv
    2509.17786). Linear in the weights, but not in the parts; vectors that other parts hold as well
    count once.

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
        import torch

        from loratool import lowrank

        kept = max(1, policy.rank // len(parts)) if policy and policy.rank else None
        lefts, sigmas, rights = [], [], []
        for part, weight in zip(parts, weights, strict=True):
            u, sigma, v = lowrank.decompose([lowrank.weighted(part)])
            lefts.append(u[:, :kept])
            sigmas.append(weight * sigma[:kept])
            rights.append(v[:kept])
        sigma = torch.cat(sigmas)
        root = sigma.abs().sqrt()
        left = _orthonormal(torch.cat(lefts, dim=1)) * (root * sigma.sign())
        right = root[:, None] * _orthonormal(torch.cat(rights).T).T
        return common.finished(lowrank.Product(left, right), policy)


def _orthonormal(vectors: torch.Tensor) -> torch.Tensor:
    """The polar factor of `vectors` (length, k): the nearest matrix with orthonormal columns.

    Where columns are dependent it is the partial isometry, which alone is unique.
    """
    import torch

    q, r = torch.linalg.qr(vectors)
    left, sigma, right = torch.linalg.svd(r, full_matrices=False)
    independent = sigma > _DEPENDENT * sigma[0]
    polar: torch.Tensor = q @ (left[:, independent] @ right[independent])
    return polar
