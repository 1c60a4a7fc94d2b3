"""TIES: trim, elect signs, and average what agrees."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from loratool.plugins import option
from loratool_plugins.combiners import _common as common

if TYPE_CHECKING:
    import torch

    from loratool_plugins.combiners._elementwise import Merge, Sparsifiers

SIGN_HELP = "how signs are elected: by the total of the values, or by the number of parts"
SIGNS = ("total", "frequency")


@dataclass(frozen=True)
class Ties(common.Elementwise):
    """TIES: the largest elements of each part, averaged where their signs agree.

    Yadav et al., 2023 (arXiv 2306.01708, section 4): of each delta T_i keep the floor(density *
    size) largest elements by magnitude, of equal ones the first in row-major order; elect for each
    element the sign of their sum (sign=total; + if it is 0) or of the sum of their signs
    (sign=frequency); then sum w_i T_i over the parts that have this sign, and divide by their
    number. Nonlinear in the weights: they come in after the election, as in PEFT, and do not
    sharpen it; all weights times 2 is the result times 2, but two parts with weights (1, 1) are not
    the sum of (1, 0) and (0, 1).

    on=deltas is PEFT's "ties_svd", with the sum of the ranks as default; on=factors is PEFT's
    "ties", which trims and elects on A and on B apart, with weights sqrt(|w_i s_i|): all ranks must
    be equal, and the result is no TIES of the deltas. PEFT 0.21.2 gets both wrong where the first
    adapter uses rsLoRA: the new one inherits use_rslora.

    Vectors (biases) are treated alike, element by element.
    """

    density: float = option(0.2, "share of the elements of each part to keep, in (0, 1]")
    sign: str = option("total", SIGN_HELP)
    on: str = option("deltas", common.ON_HELP)

    def __post_init__(self) -> None:
        common.check_density("ties", self.density)
        common.check_choice("ties", "sign", self.sign, SIGNS)
        common.check_choice("ties", "on", self.on, common.ON)

    def _how(self, generator: torch.Generator) -> tuple[Sparsifiers, Merge]:
        """Keep the largest, and average what has the elected sign."""
        from loratool_plugins.combiners import _elementwise as elementwise

        return elementwise.largest(self.density), elementwise.elected_mean(self.sign)
