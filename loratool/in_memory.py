"""A checkpoint as the model has it in memory: under the names there, and in the layout there.

Where names on disk and in memory agree this is the checkpoint itself. Elsewhere `Skeleton.pieces`
says where each parameter lies; its values are put together when its blocks are read.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from loratool.checkpoint import Checkpoint, Extent, LazyTensor
from loratool.dtypes import itemsize, torch_dtype
from loratool.errors import InputError
from loratool.pieces import Index, Piece
from loratool.skeleton import Skeleton

if TYPE_CHECKING:
    import torch

Shapes = Mapping[str, tuple[int, ...]]

# Bytes of a block that is put together, or one row of the parameter if that has more.
_TILE = 16 << 20


def in_memory(checkpoint: Checkpoint, skeleton: Skeleton) -> Checkpoint:
    """The same checkpoint under the names and in the layout that the model has in memory.

    Tensors that lie under their own name pass through as they are; those that the model does not
    have in memory are left out.

    Args:
        checkpoint: as it lies on disk.
        skeleton: of the model that it holds, built for these names and shapes.

    Raises:
        InputError: the tensors of one parameter are of different dtypes.
    """
    if not skeleton.pieces and not skeleton.unused:
        return checkpoint
    shapes = {name: tensor.shape for name, tensor in checkpoint.items()}
    tensors: dict[str, LazyTensor] = {}
    shards: dict[str, str] = {}
    moved: dict[str, str] = {}
    for name, users in pieces_by_tensor(skeleton, shapes).items():
        for parameter, piece in users:
            if parameter in tensors:
                continue
            tensors[parameter] = _in_memory(parameter, checkpoint, skeleton)
            if name in checkpoint.shards:
                shards[parameter] = checkpoint.shards[name]
            if piece == Piece(name):
                moved[name] = parameter
    aliases = {
        moved[name]: moved[twin]
        for name, twin in checkpoint.aliases.items()
        if name in moved and twin in moved
    }
    # A view to read from, under names that no file has: nothing is kept that says how to write it.
    return Checkpoint(
        tensors,
        config=checkpoint.config,
        side_files=checkpoint.side_files,
        shards=shards,
        aliases=aliases,
        notes=checkpoint.notes,
        path=checkpoint.path,
        hub_name=checkpoint.hub_name,
    )


def pieces_by_tensor(
    skeleton: Skeleton, shapes: Shapes
) -> dict[str, tuple[tuple[str, Piece], ...]]:
    """What of which parameters each tensor of a checkpoint holds.

    Args:
        skeleton: built for these names and shapes.
        shapes: the checkpoint's, in file order.

    Returns:
        Tensor of the checkpoint -> (parameter in memory, its piece there), in file order; a tensor
        that lies under its own name holds all of itself. Tensors that the model does not have in
        memory are not there.
    """
    users: dict[str, list[tuple[str, Piece]]] = {name: [] for name in shapes}
    for parameter, pieces in skeleton.pieces.items():
        for piece in pieces:
            users[piece.tensor].append((parameter, piece))
    for name, found in users.items():
        if not found and name not in skeleton.unused:
            found.append((name, Piece(name)))
    return {name: tuple(found) for name, found in users.items() if found}


def pieces_of(skeleton: Skeleton, parameter: str) -> tuple[Piece, ...]:
    """Where a parameter in memory lies in the checkpoint that the skeleton was built for."""
    return skeleton.pieces.get(parameter, (Piece(parameter),))


def shape_in_memory(pieces: Sequence[Piece], shapes: Shapes) -> tuple[int, ...]:
    """The shape of the parameter that the pieces make up.

    Args:
        pieces: all of the parameter's.
        shapes: the checkpoint's.
    """
    extents: list[int] = []
    for piece in pieces:
        left = list(_taken(shapes[piece.tensor], piece.place))
        if piece.transposed:
            left[-2:] = left[:-3:-1]
        ends = []
        for index in piece.part:
            if isinstance(index, slice):
                left.pop(0)
            ends.append(index.stop if isinstance(index, slice) else index + 1)
        ends += left
        extents = [max(pair) for pair in zip(ends, extents or ends, strict=True)]
    return tuple(extents)


def _taken(shape: Sequence[int], index: Sequence[Index]) -> Iterator[int]:
    """The shape of what an index takes of a tensor."""
    for axis, size in enumerate(shape):
        chosen = index[axis] if axis < len(index) else slice(None)
        if isinstance(chosen, slice):
            yield len(range(*chosen.indices(size)))


def _in_memory(parameter: str, checkpoint: Checkpoint, skeleton: Skeleton) -> LazyTensor:
    pieces = pieces_of(skeleton, parameter)
    sources = {piece.tensor: checkpoint[piece.tensor] for piece in pieces}
    first = checkpoint[pieces[0].tensor]
    if pieces == (Piece(first.name),):
        return first if first.name == parameter else first.renamed(parameter)
    other = next((s for s in sources.values() if s.dtype != first.dtype), None)
    if other is not None:
        raise InputError(
            f"{parameter}: is made of {first.name} of type {first.dtype} and {other.name} of type "
            f"{other.dtype}; store them in one type"
        )
    shape = shape_in_memory(pieces, {name: source.shape for name, source in sources.items()})
    is_experts = skeleton.kinds.get(parameter) == "experts"
    row = math.prod(shape[1:]) * itemsize(first.dtype)
    plan = _Plan(pieces, sources, shape, first.dtype, 1 if is_experts else max(1, _TILE // row))
    extent = _rows_of_file(pieces, first)
    blocks = plan.whole if extent else plan.blocks
    return LazyTensor(parameter, first.dtype, shape, blocks, first.origin, extent)


def _rows_of_file(pieces: Sequence[Piece], source: LazyTensor) -> Extent | None:
    """The bytes of a parameter that is nothing but consecutive rows of a tensor in a file."""
    piece, *others = pieces
    if others or piece.transposed or len(piece.place) != 1 or source.extent is None:
        return None
    rows = piece.place[0]
    if not isinstance(rows, slice) or rows.step is not None:
        return None
    size = source.extent.length // source.shape[0]
    start = source.extent.offset + rows.start * size
    return Extent(source.extent.path, start, (rows.stop - rows.start) * size)


@dataclass(frozen=True)
class _Plan:
    """How to put a parameter together.

    Attributes:
        pieces: they cover it.
        sources: the tensors that they are of.
        shape: the parameter's.
        dtype: of all of them.
        height: rows of a block.
    """

    pieces: Sequence[Piece]
    sources: Mapping[str, LazyTensor]
    shape: tuple[int, ...]
    dtype: str
    height: int

    def whole(self) -> Iterator[torch.Tensor]:
        """One view of the file."""
        (piece,) = self.pieces
        yield self.sources[piece.tensor].read()[piece.place]

    def blocks(self) -> Iterator[torch.Tensor]:
        """The parameter, block by block along axis 0, in one buffer."""
        import torch

        buffer = torch.empty((self.height, *self.shape[1:]), dtype=torch_dtype(self.dtype))
        values: dict[str, torch.Tensor] = {}
        for low in range(0, self.shape[0], self.height):
            high = min(low + self.height, self.shape[0])
            found = [(piece, rows) for piece in self.pieces if (rows := _rows(piece, low, high))]
            needed = {piece.tensor for piece, _ in found}
            values = {
                name: values[name] if name in values else self.sources[name].read()
                for name in needed
            }
            for piece, rows in found:
                _copy(piece, rows, values[piece.tensor], buffer)
            yield buffer[: high - low]


@dataclass(frozen=True)
class _Rows:
    """Which rows of a piece lie in a block, and where there."""

    of_piece: slice | None
    of_block: Index


def _rows(piece: Piece, low: int, high: int) -> _Rows | None:
    """The rows of a piece that lie in the rows `low` to before `high` of the parameter."""
    rows = piece.part[0] if piece.part else slice(0, high)
    if isinstance(rows, int):
        return _Rows(None, rows - low) if low <= rows < high else None
    step = rows.step or 1
    first = max(0, -(-(low - rows.start) // step))
    count = len(range(rows.start + first * step, min(rows.stop, high), step))
    if count == 0:
        return None
    start = rows.start + first * step - low
    return _Rows(slice(first, first + count), slice(start, start + (count - 1) * step + 1, step))


def _copy(piece: Piece, rows: _Rows, source: torch.Tensor, block: torch.Tensor) -> None:
    values = source[piece.place]
    if piece.transposed:
        values = values.transpose(-1, -2)
    if rows.of_piece is not None:
        values = values[rows.of_piece]
    block[(rows.of_block, *piece.part[1:])] = values
