"""DARE: drop elements at random and rescale the rest, then sum or elect."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from loratool.plugins import option
from loratool_plugins.combiners import _common as common
from loratool_plugins.combiners.ties import SIGN_HELP, SIGNS

if TYPE_CHECKING:
    import torch

    from loratool_plugins.combiners._elementwise import Merge, Sparsifiers

_DENSITY_HELP = "probability that an element of a part is kept, in (0, 1]"


@dataclass(frozen=True)
class DareLinear(common.Elementwise):
    """DARE: the weighted sum of parts thinned out at random and rescaled.

    Yu et al., 2023 (arXiv 2311.03099, section 3): keep each element of each delta with probability
    density, divide by density, and sum with the weights. Linear in the weights for one seed; its
    expected value is the weighted sum. The choice depends on the seed, the tensor's name and the
    order of the parts.

    on=deltas is PEFT's "dare_linear_svd", with the sum of the ranks as default; on=factors is
    PEFT's "dare_linear", which thins out A and B apart and sums them with weights sqrt(|w_i s_i|):
    all ranks must be equal, products of different parts come in, and it is nonlinear in the
    weights. PEFT 0.21.2 draws from torch's global generator, and gets both wrong where the first
    adapter uses rsLoRA: the new one inherits use_rslora.

    Vectors (biases) are treated alike, element by element.
    """

    density: float = option(0.5, _DENSITY_HELP)
    on: str = option("deltas", common.ON_HELP)

    def __post_init__(self) -> None:
        common.check_density("dare_linear", self.density)
        common.check_choice("dare_linear", "on", self.on, common.ON)

    def _how(self, generator: torch.Generator) -> tuple[Sparsifiers, Merge]:
        """Drop at random, and sum."""
        from loratool_plugins.combiners import _elementwise as elementwise

        return elementwise.dropped(self.density, generator), elementwise.weighted_sum


@dataclass(frozen=True)
class DareTies(common.Elementwise):
    """DARE and TIES: parts thinned out at random, averaged where their signs agree.

    Yu et al., 2023 (arXiv 2311.03099, section 3) in place of the trimming of TIES (Yadav et al.,
    2023, arXiv 2306.01708): keep each element of each delta with probability density, divide by
    density, then elect signs and average as `ties` does. Nonlinear in the weights, as `ties`. The
    choice depends on the seed, the tensor's name and the order of the parts.

    on=deltas is PEFT's "dare_ties_svd", with the sum of the ranks as default; on=factors is PEFT's
    "dare_ties", on A and B apart with weights sqrt(|w_i s_i|): all ranks must be equal. PEFT 0.21.2
    draws from torch's global generator, and gets both wrong where the first adapter uses rsLoRA:
    the new one inherits use_rslora.

    Vectors (biases) are treated alike, element by element.
    """

    density: float = option(0.5, _DENSITY_HELP)
    sign: str = option("total", SIGN_HELP)
    on: str = option("deltas", common.ON_HELP)

    def __post_init__(self) -> None:
        common.check_density("dare_ties", self.density)
        common.check_choice("dare_ties", "sign", self.sign, SIGNS)
        common.check_choice("dare_ties", "on", self.on, common.ON)

    def _how(self, generator: torch.Generator) -> tuple[Sparsifiers, Merge]:
        """Drop at random, and average what has the elected sign."""
        from loratool_plugins.combiners import _elementwise as elementwise

        return elementwise.dropped(self.density, generator), elementwise.elected_mean(self.sign)
