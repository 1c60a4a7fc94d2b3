"""The weighted sum of the largest elements of each part."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from loratool.plugins import option
from loratool_plugins.combiners import _common as common

if TYPE_CHECKING:
    import torch

    from loratool_plugins.combiners._elementwise import Merge, Sparsifiers


@dataclass(frozen=True)
class MagnitudePrune(common.Elementwise):
    """The weighted sum of the largest elements of each part.

    Of each delta T_i keep the floor(density * size) largest elements by magnitude, of equal ones
    the first in row-major order, and sum w_i T_i: the trimming of TIES (Yadav et al., 2023, arXiv
    2306.01708) with task arithmetic (Ilharco et al., 2022, arXiv 2212.04089). Linear in the
    weights, but not in the parts.

    on=deltas is PEFT's "magnitude_prune_svd", with the sum of the ranks as default; on=factors is
    PEFT's "magnitude_prune", which prunes A and B apart and sums them with weights sqrt(|w_i s_i|):
    all ranks must be equal, products of different parts come in, and it is nonlinear in the
    weights. PEFT 0.21.2 gets both wrong where the first adapter uses rsLoRA: the new one inherits
    use_rslora.

    Vectors (biases) are treated alike, element by element.
    """

    density: float = option(0.2, "share of the elements of each part to keep, in (0, 1]")
    on: str = option("deltas", common.ON_HELP)

    def __post_init__(self) -> None:
        common.check_density("magnitude_prune", self.density)
        common.check_choice("magnitude_prune", "on", self.on, common.ON)

    def _how(self, generator: torch.Generator) -> tuple[Sparsifiers, Merge]:
        """Keep the largest, and sum."""
        from loratool_plugins.combiners import _elementwise as elementwise

        return elementwise.largest(self.density), elementwise.weighted_sum
