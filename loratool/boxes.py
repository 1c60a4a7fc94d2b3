"""Boxes of a tensor whose elements lie in another tensor at regular distances.

An axis of a box is a sequence of digits (size, stride), outermost first, as of a number in mixed
radix: the index that they make up, each digit times the product of the sizes after it, lies each
digit times its stride further. One digit is a slice; a reshape that folds two axes into one makes
two digits of them. Integers only: no cost depends on how large the tensors are.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import product

Digits = tuple[tuple[int, int], ...]

# More boxes than this for one tensor: it does not consist of rows, columns and experts.
MOST = 1 << 14


class UntraceableError(Exception):
    """An operation that does more than move elements, or moves them without any regularity."""


@dataclass(frozen=True)
class Block:
    """A box of a tensor.

    Attributes:
        source: the name of the tensor that holds its elements.
        offset: which element of the source, counted row by row, the box's first one is.
        start: the box's first index on each axis.
        axes: the digits of each axis; () is an axis of length 1.
    """

    source: str
    offset: int
    start: tuple[int, ...]
    axes: tuple[Digits, ...]

    def with_axis(self, axis: int, run: Run) -> Block:
        """The block with a part of an axis instead of the axis."""
        start, axes = list(self.start), list(self.axes)
        start[axis], axes[axis] = run.start, run.digits
        return replace(self, offset=self.offset + run.offset, start=tuple(start), axes=tuple(axes))


@dataclass(frozen=True)
class Run:
    """A range of an axis.

    Attributes:
        start: its first index.
        digits: where its elements lie from the first one on.
        offset: how much further that first one lies than that of the axis.
    """

    start: int
    digits: Digits
    offset: int = 0

    @property
    def length(self) -> int:
        """Number of indices."""
        return length(self.digits)


def length(digits: Digits) -> int:
    """Number of indices that digits make up."""
    return math.prod(size for size, _ in digits)


def strides(shape: Sequence[int]) -> tuple[int, ...]:
    """How far neighbours on each axis lie apart, counted row by row."""
    return tuple(math.prod(shape[axis + 1 :]) for axis in range(len(shape)))


def whole(name: str, shape: Sequence[int]) -> Block:
    """All of a tensor, in place."""
    axes = zip(shape, strides(shape), strict=True)
    return Block(name, 0, (0,) * len(shape), tuple(_simplified((digit,)) for digit in axes))


def cut(run: Run, low: int, high: int) -> list[Run]:
    """The part of a run from its `low`th to before its `high`th index, as runs."""
    if low >= high:
        return []
    if low == 0 and high == run.length:
        return [run]
    (_, stride), *rest = run.digits
    inner = length(tuple(rest))
    first, last = low // inner, (high - 1) // inner

    def within(outer: int, start: int, stop: int) -> list[Run]:
        part = Run(run.start + outer * inner, tuple(rest), run.offset + outer * stride)
        return cut(part, start, stop)

    if first == last:
        return within(first, low - first * inner, high - first * inner)
    found = []
    if head := low % inner:
        found += within(first, head, inner)
        first += 1
    if count := high // inner - first:
        digits = _simplified(((count, stride), *rest))
        found.append(Run(run.start + first * inner, digits, run.offset + first * stride))
    if tail := high % inner:
        found += within(last, 0, tail)
    return found


def regrouped(block: Block, shape: Sequence[int], sizes: Sequence[int]) -> Iterator[Block]:
    """What a reshape makes of a block; no size is 1, neither before nor after.

    Args:
        block: of a tensor of the shape `shape`.
        shape: before.
        sizes: after, with the same product.

    Raises:
        UntraceableError: its elements do not lie in boxes afterwards.
    """
    choices = []
    for old, new in _groups(shape, sizes):
        runs = _folded(block.start[old], block.axes[old], shape[old])
        choices.append([box for run in runs for box in _unfolded(run, sizes[new])])
    for boxes in product(*choices):
        runs = [run for box in boxes for run in box]
        yield Block(
            block.source,
            block.offset + sum(run.offset for run in runs),
            tuple(run.start for run in runs),
            tuple(run.digits for run in runs),
        )


def _simplified(digits: Digits) -> Digits:
    """The same sequence of places with as few digits as possible."""
    found: list[tuple[int, int]] = []
    for size, stride in digits:
        if size == 1:
            continue
        if found and found[-1][1] == size * stride:
            found[-1] = (found[-1][0] * size, stride)
        else:
            found.append((size, stride))
    return tuple(found)


def _groups(old: Sequence[int], new: Sequence[int]) -> Iterator[tuple[slice, slice]]:
    """The smallest groups of axes whose sizes have the same product before and after."""
    i = j = 0
    while i < len(old):
        first_i, first_j, left, right = i, j, old[i], new[j]
        i, j = i + 1, j + 1
        while left != right:
            if left < right:
                left, i = left * old[i], i + 1
            else:
                right, j = right * new[j], j + 1
        yield slice(first_i, i), slice(first_j, j)


def _folded(starts: Sequence[int], axes: Sequence[Digits], sizes: Sequence[int]) -> list[Run]:
    """Fold several axes into one: the box's elements as runs of the flat index."""
    axis = len(sizes) - 1
    while axis and (starts[axis], length(axes[axis])) == (0, sizes[axis]):
        axis -= 1
    # From `axis` on, all axes but itself are there in full: together they are one run.
    digits = _simplified(sum(axes[axis:], ()))
    outer = [range(length(digits)) for digits in axes[:axis]]
    if math.prod(len(indices) for indices in outer) > MOST:
        raise UntraceableError("a reshape that does not keep rows together")
    runs = []
    for indices in product(*outer):
        starting = [start + index for start, index in zip(starts, indices, strict=False)]
        flat = sum(
            index * stride
            for index, stride in zip((*starting, starts[axis]), strides(sizes), strict=False)
        )
        offset = sum(_place(axes[i], index) for i, index in enumerate(indices))
        runs.append(Run(flat, digits, offset))
    return runs


def _place(digits: Digits, index: int) -> int:
    """How much further than the first element of an axis its `index`th lies."""
    found = 0
    for size, stride in reversed(digits):
        index, digit = divmod(index, size)
        found += digit * stride
    return found


def _unfolded(run: Run, sizes: Sequence[int]) -> list[tuple[Run, ...]]:
    """Unfold an axis into several: boxes, each a run for every new axis."""
    if len(sizes) == 1:
        return [(run,)]
    inner = math.prod(sizes[1:])
    first, last = run.start // inner, (run.start + run.length - 1) // inner
    if first == last and run.length < inner:  # within one index of the outermost new axis
        rest = replace(run, start=run.start - first * inner)
        return [(Run(first, ()), *runs) for runs in _unfolded(rest, sizes[1:])]
    if run.start % inner == 0 and run.length % inner == 0:
        outer, within = _split(run.digits, inner)
        outermost = Run(run.start // inner, outer, run.offset)
        return [(outermost, *runs) for runs in _unfolded(Run(0, within), sizes[1:])]
    head, tail = -run.start % inner, (run.start + run.length) % inner
    cuts = ((0, head), (head, run.length - tail), (run.length - tail, run.length))
    return [box for ends in cuts for part in cut(run, *ends) for box in _unfolded(part, sizes)]


def _split(digits: Digits, inner: int) -> tuple[Digits, Digits]:
    """Divide digits into outer ones, and inner ones of the length `inner`."""
    within: list[tuple[int, int]] = []
    outer = list(digits)
    while inner > 1:
        size, stride = outer.pop()
        common = math.gcd(size, inner)
        if common not in (size, inner):
            raise UntraceableError("a reshape that does not keep rows together")
        within.insert(0, (common, stride))
        inner //= common
        if common < size:
            outer.append((size // common, stride * common))
    return tuple(outer), _simplified(tuple(within))
