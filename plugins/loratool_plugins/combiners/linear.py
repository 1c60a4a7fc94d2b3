"""The weighted sum at a rank that does not grow, or PEFT's approximation of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from loratool.linalg import Factorizer, RankPolicy
from loratool.plugins import option
from loratool.updates import LowRank
from loratool_plugins.combiners import _common as common

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Linear(common.DeltasOrFactors):
    """The weighted sum without directions that repeat (on=deltas), or PEFT's "linear" (on=factors).

    Task arithmetic (Ilharco et al., 2022, arXiv 2212.04089) on low-rank updates.

    on=deltas: the sum of w_i s_i B_i A_i, through QR of the factors and a small SVD; its rank is at
    most the sum of the ranks, and less where the parts share directions. Linear in the weights.

    on=factors: (sum of sqrt(|w_i s_i|) B_i) (sum of sign(w_i s_i) sqrt(|w_i s_i|) A_i), as PEFT's
    add_weighted_adapter does with combination_type="linear". All ranks must be equal. This is *not*
    the weighted sum: the products B_i A_j of different parts come in, and it is nonlinear in the
    weights. PEFT 0.21.2 gets its own formula wrong where the first adapter uses rsLoRA: the new one
    inherits use_rslora while its factors already hold the scales.

    Vectors (biases) are summed with the weights.
    """

    on: str = option("deltas", common.ON_HELP)

    def __post_init__(self) -> None:
        common.check_choice("linear", "on", self.on, common.ON)

    def combine(
        self,
        parts: Sequence[LowRank],
        weights: Sequence[float],
        policy: RankPolicy | None,
        factorizer: Factorizer,
        generator: torch.Generator,
    ) -> LowRank:
        """The combination, in fp64; `factorizer` and `generator` are not used.

        Raises:
            InputError: on=factors, and the ranks differ.
        """
        from loratool import lowrank

        if self.on == "factors":
            on_a, on_b = common.factor_weights(parts, weights)
            a, b = parts[0].a.double() * on_a[0], parts[0].b.double() * on_b[0]
            for part, weight_a, weight_b in zip(parts[1:], on_a[1:], on_b[1:], strict=True):
                a.add_(part.a.double(), alpha=weight_a)
                b.add_(part.b.double(), alpha=weight_b)
            return common.finished(lowrank.Product(b, a), policy)
        products = [lowrank.weighted(p, w) for p, w in zip(parts, weights, strict=True)]
        found = lowrank.compress(products, policy)
        return LowRank(found.a, found.b, 1.0, found.certificate)
