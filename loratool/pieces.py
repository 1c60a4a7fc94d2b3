"""Where a parameter in memory lies in a checkpoint, if not simply under its name."""

from __future__ import annotations

from dataclasses import dataclass

Index = int | slice


@dataclass(frozen=True)
class Piece:
    """A part of a parameter, and the part of a checkpoint's tensor that holds its values.

    A parameter that is stored otherwise than it is in memory is a tuple of pieces that cover it:
    one of a fused tensor's rows, or one tensor of each expert.

    Attributes:
        tensor: the checkpoint's name.
        part: which part of the parameter: an index for each of its leading dimensions; () is all.
        place: which part of the tensor: likewise.
        transposed: whether the last two dimensions of the tensor's part are the other way round.
    """

    tensor: str
    part: tuple[Index, ...] = ()
    place: tuple[Index, ...] = ()
    transposed: bool = False
