"""The shapes of inputs that models are measured on."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from loratool.errors import UsageError

# Stages that compute one token after others.
_ONE_TOKEN = ("decode", "decoder_with_past_model")
_SHAPE = re.compile(r"(\d+)[x×](\d+)(?:\+(\d+))?")


@dataclass(frozen=True)
class Shape:
    """How large inputs are.

    Attributes:
        batch: rows, at least 1.
        sequence: tokens of each row, at least 1.
        past: tokens that are in the cache already; None where the graph's stage decides.
    """

    batch: int
    sequence: int
    past: int | None = None

    @property
    def text(self) -> str:
        """As it is written on the command line: 16x256, or 1x1+512."""
        past = "" if self.past is None else f"+{self.past}"
        return f"{self.batch}x{self.sequence}{past}"


@dataclass(frozen=True)
class Extent:
    """The shape of one graph's inputs.

    Attributes:
        batch: rows.
        sequence: tokens that are computed in each row.
        past: tokens of each row that the cache holds.
        source: tokens of each row that an encoder has read before.
    """

    batch: int
    sequence: int
    past: int
    source: int

    @property
    def total(self) -> int:
        """Tokens of each row that are attended to."""
        return self.past + self.sequence


def parse_shapes(texts: Sequence[str]) -> list[Shape]:
    """Shapes from `BATCHxSEQUENCE` or `BATCHxSEQUENCE+PAST`.

    Raises:
        UsageError: one is none, has a 0 where it may not, or is given twice.
    """
    shapes = []
    for text in texts:
        match = _SHAPE.fullmatch(text.strip().lower())
        if match is None or int(match[1]) < 1 or int(match[2]) < 1:
            raise UsageError(
                f"--shape {text}: write BATCHxSEQUENCE, as 16x256, or BATCHxSEQUENCE+PAST for a "
                "graph with a cache, as 1x1+512"
            )
        past = None if match[3] is None else int(match[3])
        shapes.append(Shape(int(match[1]), int(match[2]), past))
    if twice := [shape for shape in shapes if shapes.count(shape) > 1]:
        raise UsageError(f"--shape {twice[0].text} is given twice: leave one out")
    return shapes


def extent(shape: Shape, has_cache: bool, stage: str) -> Extent:
    """What a shape means for a graph.

    A graph that decodes computes the token that follows SEQUENCE others; other graphs compute
    SEQUENCE tokens with nothing in their caches, if they have any. `+PAST` overrules both.
    """
    if shape.past is not None:
        sequence, past = shape.sequence, shape.past
    elif has_cache and stage in _ONE_TOKEN:
        sequence, past = 1, shape.sequence
    else:
        sequence, past = shape.sequence, 0
    return Extent(shape.batch, sequence, past, max(sequence, past))
