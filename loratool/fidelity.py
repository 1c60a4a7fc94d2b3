"""How much a model's answers are those of a reference: sums over positions, in fp64.

    tally = Tally()
    tally.add_answer("logits", found, expected, are_logits=True)      # batch by batch
    tally.answers["logits"].kl                      # a mean over all positions

A position is one row of a matrix (n, classes): a token, or a sample where the model answers once
for each.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from statistics import NormalDist

import torch

# Elements that are taken to fp64 at a time.
_TILE = 1 << 21


@dataclass
class Closeness:
    """Sums over positions; the properties are means over them, NaN where there are none.

    Attributes:
        positions: how many there were.
        classes: length of the vectors.
        are_logits: whether they stand for probabilities.
        cosines: of the vectors with the reference's.
        errors: of ||x - y|| / ||y||, y being the reference's.
        divergences: of KL(softmax(y) || softmax(x)) in nats.
        agreeing: at how many both have the same largest element.
    """

    positions: int = 0
    classes: int = 0
    are_logits: bool = False
    cosines: float = 0.0
    errors: float = 0.0
    divergences: float = 0.0
    agreeing: int = 0

    def add(self, found: torch.Tensor, expected: torch.Tensor, are_logits: bool) -> None:
        """Add some positions.

        Args:
            found: (n, classes), any float type; -inf stands for an impossible class.
            expected: the same of the reference.
            are_logits: whether they stand for probabilities.
        """
        self.classes, self.are_logits = found.shape[-1], are_logits
        self.positions += len(found)
        for part in _parts(found):
            x, y = found[part].double(), expected[part].double()
            if are_logits:
                self.divergences += float(_divergences(x, y).sum())
                self.agreeing += int((x.argmax(-1) == y.argmax(-1)).sum())
            x, y = _comparable(x, y)
            norms, distances = y.norm(dim=-1), (x - y).norm(dim=-1)
            self.errors += float(_ratio(distances, norms).sum())
            products = norms * x.norm(dim=-1)
            cosines = _ratio((x * y).sum(-1), products)
            # Two zero vectors are the same, whatever direction that is.
            self.cosines += float(torch.where((products == 0) & (distances == 0), 1, cosines).sum())

    @property
    def cosine(self) -> float:
        """Mean cosine of the vectors."""
        return self._mean(self.cosines)

    @property
    def error(self) -> float:
        """Mean relative error of the vectors, ||x - y|| / ||y||.

        A mean over positions, because the first tokens of language models have activations that
        are hundreds of times larger than the others' (Sun et al., 2024, "Massive activations") and
        would be all that a common norm tells of.
        """
        return self._mean(self.errors)

    @property
    def kl(self) -> float | None:
        """Mean KL divergence from the reference in nats; None where there are no probabilities."""
        return self._mean(self.divergences) if self.are_logits else None

    @property
    def agreement(self) -> float | None:
        """Share of positions with the reference's top class; None without probabilities."""
        return self._mean(self.agreeing) if self.are_logits else None

    @property
    def interval(self) -> tuple[float, float] | None:
        """The 95% interval of the agreement, as if positions were independent."""
        return wilson(self.agreeing, self.positions) if self.are_logits else None

    def _mean(self, total: float) -> float:
        return total / self.positions if self.positions else math.nan


@dataclass
class Tally:
    """What has been compared of one model.

    Attributes:
        answers: name of an output -> how close it is.
        layers: name of a layer -> how close is what it hands on; in the order of the data.
    """

    answers: dict[str, Closeness] = field(default_factory=dict)
    layers: dict[str, Closeness] = field(default_factory=dict)

    def add_answer(
        self, name: str, found: torch.Tensor, expected: torch.Tensor, are_logits: bool
    ) -> None:
        """Add positions of an output; see `Closeness.add`."""
        self.answers.setdefault(name, Closeness()).add(found, expected, are_logits)

    def add_layer(self, name: str, found: torch.Tensor, expected: torch.Tensor) -> None:
        """Add positions (n, size) of what a layer hands on."""
        self.layers.setdefault(name, Closeness()).add(found, expected, False)


def wilson(successes: int, count: int, level: float = 0.95) -> tuple[float, float]:
    """The interval of a share (Wilson, 1927); (0, 1) where nothing was counted."""
    if not count:
        return 0.0, 1.0
    z = NormalDist().inv_cdf((1 + level) / 2)
    share, spread = successes / count, z * z / count
    middle = (share + spread / 2) / (1 + spread)
    half = math.sqrt(share * (1 - share) * spread + spread * spread / 4) / (1 + spread)
    return max(0.0, middle - half), min(1.0, middle + half)


def _parts(rows: torch.Tensor) -> Iterator[slice]:
    height = max(1, _TILE // max(1, rows.shape[-1]))
    for start in range(0, len(rows), height):
        yield slice(start, start + height)


def _divergences(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """KL(softmax(y) || softmax(x)) of each row, in nats; inf where x excludes what y does not."""
    log_q, log_p = x.log_softmax(-1), y.log_softmax(-1)
    p = log_p.exp()
    # Rounding may take what is 0 below it.
    return torch.where(p > 0, p * (log_p - log_q), 0).sum(-1).clamp(min=0)


def _comparable(x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The vectors with 0 where one of them excludes a class."""
    excluded = x.eq(-math.inf) | y.eq(-math.inf)
    return x.masked_fill(excluded, 0), y.masked_fill(excluded, 0)


def _ratio(above: torch.Tensor, below: torch.Tensor) -> torch.Tensor:
    """Quotients; 0 / 0 is 0."""
    return torch.where(above == 0, 0, above / below)
