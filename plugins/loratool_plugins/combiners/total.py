"""The exact weighted sum of low-rank updates."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from loratool.linalg import Factorizer, RankPolicy
from loratool.updates import LowRank

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Total:
    """The exact weighted sum, by concatenation; recompressed only if a rank is asked for.

    w_1 s_1 B_1 A_1 + w_2 s_2 B_2 A_2 + ... = s [c_1 B_1, c_2 B_2, ...] [A_1; A_2; ...], where s is
    the smallest |w_i s_i| and c_i = w_i s_i / s: whatever the ranks, scales and alpha conventions.
    Multiplying by c_i is exact where it is a power of two, and else rounds once. Linear in the
    weights. With a rank, energy or ratio: the best approximation of the sum, through QR of the
    concatenated factors and the SVD of their small core (Halko, Martinsson and Tropp, 2011,
    section 5.1), at cost (out + in) R^2 for R the sum of the ranks.

    This is what PEFT's add_weighted_adapter calls "cat", and with a rank "svd". PEFT 0.21.2 gets
    both wrong, by a factor sqrt(rank), where the first adapter uses rsLoRA: the new one inherits
    use_rslora while its factors already hold the scales.

    Vectors (biases) are summed with the weights.
    """

    exact: ClassVar[bool] = True

    def combine(
        self,
        parts: Sequence[LowRank],
        weights: Sequence[float],
        policy: RankPolicy | None,
        factorizer: Factorizer,
        generator: torch.Generator,
    ) -> LowRank:
        """The sum, in fp64; `factorizer` and `generator` are not used."""
        from loratool import lowrank

        products = [lowrank.weighted(p, w) for p, w in zip(parts, weights, strict=True)]
        present = [product for product in products if product.factor != 0]
        if policy is not None or not present:
            found = lowrank.compress(products, policy)
            return LowRank(found.a, found.b, 1.0, found.certificate)
        scale = min(abs(product.factor) for product in present)
        b, a = lowrank.concatenated([p._replace(factor=p.factor / scale) for p in present])
        return LowRank(a, b, scale, lowrank.exact_certificate(present, a.shape[0]))
