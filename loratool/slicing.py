"""From boxes to pieces: the slices of the checkpoint's tensors that a parameter consists of."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product

from loratool.boxes import MOST, Block, Digits, UntraceableError, length, strides, whole
from loratool.pieces import Index, Piece

Shape = tuple[int, ...]


@dataclass(frozen=True)
class _Axis:
    """Equally spaced indices of a parameter's axis.

    Attributes:
        start: the first one.
        count: how many.
        step: how far apart they are in the parameter.
        stride: how far apart their elements lie in the source.
    """

    start: int
    count: int
    step: int
    stride: int

    def part(self, low: int, count: int) -> _Axis:
        """`count` of them from the `low`th on."""
        return replace(self, start=self.start + low * self.step, count=count)


def as_pieces(
    blocks: Sequence[Block], shape: Shape, shapes: Mapping[str, Shape]
) -> tuple[Piece, ...]:
    """The pieces of a parameter, in the order of its blocks.

    Args:
        blocks: they cover it.
        shape: its shape.
        shapes: the shapes of the sources.

    Raises:
        UntraceableError: there would be too many.
    """
    found: list[Piece] = []
    for block in blocks:
        if shapes[block.source] == shape and block == whole(block.source, shape):
            found.append(Piece(block.source))
            continue
        for piece in _of_block(block, shape, shapes[block.source]):
            found.append(piece)
            if len(found) > MOST:
                raise UntraceableError(f"its elements lie in more than {MOST} places")
    return tuple(found)


def _of_block(block: Block, shape: Shape, source: Shape) -> Iterator[Piece]:
    """Keep the longest digit of each axis as a slice, and take every value of the others."""
    starts = zip(block.start, block.axes, strict=True)
    for choice in product(*(_one_digit(start, digits) for start, digits in starts)):
        axes = tuple(axis for axis, _ in choice)
        place = _Place(block.source, source, block.offset + sum(offset for _, offset in choice))
        yield from _pieces(axes, place, shape)


def _one_digit(start: int, digits: Digits) -> Iterator[tuple[_Axis, int]]:
    if not digits:
        yield _Axis(start, 1, 1, 0), 0
        return
    kept = max(range(len(digits)), key=lambda digit: digits[digit][0])
    apart = [length(digits[digit + 1 :]) for digit in range(len(digits))]
    values = (
        range(1) if digit == kept else range(digits[digit][0]) for digit in range(len(digits))
    )
    for chosen in product(*values):
        low = sum(value * step for value, step in zip(chosen, apart, strict=True))
        offset = sum(value * stride for value, (_, stride) in zip(chosen, digits, strict=True))
        size, stride = digits[kept]
        yield _Axis(start + low, size, apart[kept], stride), offset


@dataclass(frozen=True)
class _Place:
    """An element of a source.

    Attributes:
        source: its name.
        shape: its shape.
        offset: which element, counted row by row.
    """

    source: str
    shape: Shape
    offset: int

    def coordinate(self, axis: int) -> int:
        """The element's index on an axis."""
        return self.offset // strides(self.shape)[axis] % self.shape[axis]

    def step(self, stride: int) -> tuple[int, int]:
        """The outermost axis on which `stride` is a number of steps, and that number."""
        apart = strides(self.shape)
        axes = (a for a, size in enumerate(self.shape) if size > 1 and stride % apart[a] == 0)
        axis = next(axes)
        return axis, stride // apart[axis]

    def room(self, axis: int, step: int) -> int:
        """How many indices that far apart the axis has from here on."""
        return (self.shape[axis] - 1 - self.coordinate(axis)) // step + 1


def _pieces(axes: tuple[_Axis, ...], place: _Place, shape: Shape) -> Iterator[Piece]:
    """Divide a box until each part is a slice of the source on every axis."""
    owners: dict[int, int] = {}  # axis of the source -> axis of the parameter
    for number, axis in enumerate(axes):
        if axis.count == 1:
            continue
        owner, step = place.step(axis.stride)
        room = place.room(owner, step)
        if room < axis.count:
            yield from _divided(axes, place, shape, number, room)
            return
        if owner in owners:  # two axes of the parameter in one of the source
            shorter = min(number, owners[owner], key=lambda other: axes[other].count)
            yield from _divided(axes, place, shape, shorter, 1)
            return
        owners[owner] = number
    for transposed in (False, True):
        piece = _piece(axes, place, shape, owners, transposed)
        if piece is not None:
            yield piece
            return
    yield from _divided(axes, place, shape, min(owners.values()), 1)


def _divided(
    axes: tuple[_Axis, ...], place: _Place, shape: Shape, number: int, size: int
) -> Iterator[Piece]:
    """Go on with parts of one axis that have `size` indices."""
    axis = axes[number]
    for low in range(0, axis.count, size):
        part = axis.part(low, min(size, axis.count - low))
        moved = replace(place, offset=place.offset + low * axis.stride)
        yield from _pieces((*axes[:number], part, *axes[number + 1 :]), moved, shape)


def _piece(
    axes: tuple[_Axis, ...],
    place: _Place,
    shape: Shape,
    owners: Mapping[int, int],
    transposed: bool,
) -> Piece | None:
    """The box as one piece, or None if its axes come in another order than the source's."""
    pairs = _paired(axes, len(place.shape), owners, transposed)
    if pairs is None:
        return None
    part: list[Index] = [axis.start for axis in axes]
    where: list[Index] = [place.coordinate(axis) for axis in range(len(place.shape))]
    for source_axis, number in pairs.items():
        axis = axes[number]
        part[number] = _slice(axis.start, axis.count, axis.step)
        step = place.step(axis.stride)[1] if axis.count > 1 else 1
        where[source_axis] = _slice(place.coordinate(source_axis), axis.count, step)
    return Piece(place.source, _short(part, shape), _short(where, place.shape), transposed)


def _paired(
    axes: tuple[_Axis, ...], dimensions: int, owners: Mapping[int, int], transposed: bool
) -> dict[int, int] | None:
    """Source axis -> parameter axis, in the same order, from the last ones on.

    Axes of one index need no partner; a single index is taken of them, then.
    """
    order = list(range(dimensions))
    if transposed:
        if dimensions < 2 or len(axes) < 2:
            return None
        order[-2:] = order[:-3:-1]
    pairs: dict[int, int] = {}
    left = list(range(len(axes)))
    while left and order:
        number, source = left[-1], order[-1]
        if owners.get(source) == number or (source not in owners and axes[number].count == 1):
            pairs[order.pop()] = left.pop()
        elif axes[number].count == 1:
            left.pop()
        elif source not in owners:
            order.pop()
        else:
            return None
    if any(axes[number].count > 1 for number in left) or any(s in owners for s in order):
        return None
    last = [pairs.get(dimensions - 1), pairs.get(dimensions - 2)]
    return None if transposed and last != [len(axes) - 2, len(axes) - 1] else pairs


def _slice(start: int, count: int, step: int) -> slice:
    return slice(start, start + (count - 1) * step + 1, step if step > 1 else None)


def _short(index: list[Index], shape: Shape) -> tuple[Index, ...]:
    """The index without trailing axes that are taken whole."""
    short = list(index)
    while short and short[-1] == slice(0, shape[len(short) - 1], None):
        short.pop()
    return tuple(short)
