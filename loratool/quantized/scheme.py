"""What every scheme of quantization gives back, and what several of them need."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from loratool.checkpoint import Form, LazyTensor
from loratool.errors import InputError
from loratool.files import local
from loratool.linalg import tiles

if TYPE_CHECKING:
    import torch

TILE = 1 << 20  # elements that are decoded at a time


@dataclass(frozen=True)
class Found:
    """A quantized tensor.

    Attributes:
        shape: of the values that it stands for.
        words: its scheme, for people.
        form: how it is stored.
    """

    shape: tuple[int, ...]
    words: str
    form: Form


@dataclass
class Findings:
    """What a scheme recognises in a checkpoint.

    Attributes:
        tensors: name of the plain tensor -> what was found.
        hidden: stored tensors that a plain checkpoint does not have.
        problems: what is missing or contradicts itself, in a line each: "tensor: what".
    """

    tensors: dict[str, Found] = field(default_factory=dict)
    hidden: set[str] = field(default_factory=set)
    problems: list[str] = field(default_factory=list)

    def add(self, name: str, found: Found, *more: str) -> None:
        """Take up a tensor; its companions, and `more` stored tensors, are hidden."""
        self.tensors[name] = found
        stored = (piece.name for piece in found.form.pieces.values())
        self.hidden |= {other for other in (*stored, *more) if other != name}


def small_content(tensor: LazyTensor) -> bytes:
    """The bytes of a tensor of a few hundred bytes, without torch where it lies in a file.

    Raises:
        InputError: the file cannot be read.
    """
    if tensor.extent is None:
        return tensor.read().numpy().tobytes()
    path = tensor.extent.path
    try:
        with local(path).open("rb") as file:
            file.seek(tensor.extent.offset)
            return file.read(tensor.extent.length)
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from error


def aligned_tiles(rows: int, columns: int, block: int) -> Iterator[tuple[int, int]]:
    """Ranges of whole rows whose elements begin and, but for the last, end at a block's bounds.

    Args:
        rows: of a matrix that is cut into blocks of consecutive elements.
        columns: of it.
        block: elements a block.
    """
    unit = block // math.gcd(block, columns)
    step = max(1, TILE // max(1, unit * columns)) * unit
    return ((start, min(rows, start + step)) for start in range(0, rows, step))


def turned(blocks: Iterator[torch.Tensor]) -> Iterator[torch.Tensor]:
    """The transpose of a matrix that comes in blocks of rows, as one block."""
    import torch

    yield torch.cat(list(blocks)).T.contiguous()


def row_tiles(values: torch.Tensor) -> Iterator[slice]:
    """Ranges of rows of about `TILE` elements."""
    return tiles(values, TILE)
