"""How low-rank updates are trained; plain settings, without torch."""

from __future__ import annotations

import math
from dataclasses import dataclass

from loratool.errors import UsageError

DEFAULT_RATE = 0.03
MEASURES = ("kl", "mse")


@dataclass(frozen=True)
class Training:
    """How to train (`loratool.refining`).

    Attributes:
        steps: of Adam, at most; one a batch, in an order shuffled anew for each round.
        measure: of outputs (`loratool.matching`); None for "kl" where there are logits of classes,
            else "mse".
        rate: the learning rate as a share of each factor's root mean square, so that it means the
            same for small and large updates; it rises at the beginning and falls to 0 at the end.
        penalty: weight of the distance from the start.
        seed: of the order of batches.
    """

    steps: int
    measure: str | None = None
    rate: float = DEFAULT_RATE
    penalty: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise UsageError(f"refining needs at least 1 step, not {self.steps}")
        if self.measure not in (None, *MEASURES):
            raise UsageError(f"the loss must be kl or mse, not {self.measure}")
        if not 0 < self.rate < math.inf:
            raise UsageError(f"the learning rate must be above 0, not {self.rate}")
        if not 0 <= self.penalty < math.inf:
            raise UsageError(f"the penalty must be at least 0, not {self.penalty}")
