"""Where the elements of a tensor come from, found by running operations on tensors without values.

A `Traced` tensor has a shape but no values. Whatever moves elements about (transpose, reshape,
chunk, cat, stack, ...) works on it as on any tensor of torch, and gives a tensor that knows of each
of its elements which element of which source it is. What calculates with elements is refused.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from loratool.boxes import Block, Run, UntraceableError, cut, regrouped, whole


class Traced(torch.Tensor):
    """A tensor without values that knows where its elements come from."""

    blocks: tuple[Block, ...]

    @staticmethod
    def __new__(cls, shape: Sequence[int], blocks: Sequence[Block]) -> Traced:
        """Make a tensor of the given blocks, which cover it."""
        # Always contiguous for torch: where the elements lie is what the blocks say.
        found: Traced = torch.Tensor._make_wrapper_subclass(
            cls, tuple(shape), dtype=torch.float32, device=torch.device("meta")
        )
        found.blocks = tuple(blocks)
        return found

    @classmethod
    def source(cls, name: str, shape: Sequence[int]) -> Traced:
        """A tensor that is itself a source."""
        return cls(shape, [whole(name, shape)])

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Move blocks instead of elements."""
        handler = _HANDLERS.get(func.overloadpacket.__name__)
        if handler is None:
            raise UntraceableError(f"torch.{func.overloadpacket.__name__}")
        return handler(*args, **(kwargs or {}))


def _view(tensor: Traced, sizes: Sequence[int]) -> Traced:
    sizes = list(sizes)
    if -1 in sizes:
        known = math.prod(size for size in sizes if size != -1)
        sizes[sizes.index(-1)] = tensor.numel() // max(known, 1)
    if math.prod(sizes) != tensor.numel():
        raise ValueError(f"a reshape of {tuple(tensor.shape)} to {tuple(sizes)}")
    plain = _squeeze(tensor)
    kept = [size for size in sizes if size != 1]
    blocks = [found for block in plain.blocks for found in regrouped(block, plain.shape, kept)]
    found = Traced(kept, blocks)
    for axis, size in enumerate(sizes):
        if size == 1:
            found = _unsqueeze(found, axis)
    return found


def _permute(tensor: Traced, order: Sequence[int]) -> Traced:
    order = [axis % tensor.ndim for axis in order]
    shape = [tensor.shape[axis] for axis in order]
    return Traced(
        shape,
        [
            replace(
                block,
                start=tuple(block.start[axis] for axis in order),
                axes=tuple(block.axes[axis] for axis in order),
            )
            for block in tensor.blocks
        ],
    )


def _transpose(tensor: Traced, one: int, other: int) -> Traced:
    order = list(range(tensor.ndim))
    order[one], order[other] = order[other], order[one]
    return _permute(tensor, order)


def _t(tensor: Traced) -> Traced:
    return _permute(tensor, range(tensor.ndim)[::-1])


def _narrow(tensor: Traced, axis: int, low: int, high: int) -> Traced:
    axis %= tensor.ndim
    blocks = []
    for block in tensor.blocks:
        start = block.start[axis]
        run = Run(start - low, block.axes[axis])
        parts = cut(run, max(low - start, 0), min(high - start, run.length))
        blocks += [block.with_axis(axis, part) for part in parts]
    shape = list(tensor.shape)
    shape[axis] = high - low
    return Traced(shape, blocks)


def _slice(
    tensor: Traced, axis: int = 0, low: int | None = None, high: int | None = None, step: int = 1
) -> Traced:
    axis %= tensor.ndim
    total = tensor.shape[axis]
    low, high, step = slice(low, high, step).indices(total)
    count = len(range(low, high, step))
    if step == 1 or count == 0:
        return _narrow(tensor, axis, low, low + count)
    # A window of `count` times `step` elements, and in each step the same one of them.
    first = min(low, total - count * step)
    if first < 0 or low - first >= step:
        chosen = [_narrow(tensor, axis, index, index + 1) for index in range(low, high, step)]
        return _cat(chosen, axis)
    window = _narrow(tensor, axis, first, first + count * step)
    shape = [*window.shape[:axis], count, step, *window.shape[axis + 1 :]]
    return _select(_view(window, shape), axis + 1, low - first)


def _select(tensor: Traced, axis: int, index: int) -> Traced:
    axis %= tensor.ndim
    index %= tensor.shape[axis]
    return _squeeze(_narrow(tensor, axis, index, index + 1), axis)


def _squeeze(tensor: Traced, axes: int | Sequence[int] | None = None) -> Traced:
    chosen = range(tensor.ndim) if axes is None else [axes] if isinstance(axes, int) else axes
    gone = {axis % tensor.ndim for axis in chosen if tensor.shape[axis] == 1}
    kept = [axis for axis in range(tensor.ndim) if axis not in gone]
    return Traced(
        [tensor.shape[axis] for axis in kept],
        [
            replace(
                block,
                start=tuple(block.start[axis] for axis in kept),
                axes=tuple(block.axes[axis] for axis in kept),
            )
            for block in tensor.blocks
        ],
    )


def _unsqueeze(tensor: Traced, axis: int) -> Traced:
    axis %= tensor.ndim + 1

    def longer(values: tuple[Any, ...], value: Any) -> tuple[Any, ...]:
        return (*values[:axis], value, *values[axis:])

    return Traced(
        longer(tuple(tensor.shape), 1),
        [
            replace(block, start=longer(block.start, 0), axes=longer(block.axes, ()))
            for block in tensor.blocks
        ],
    )


def _split_sizes(tensor: Traced, sizes: Sequence[int], axis: int = 0) -> list[Traced]:
    found, low = [], 0
    for size in sizes:
        found.append(_narrow(tensor, axis, low, low + size))
        low += size
    if low != tensor.shape[axis]:
        raise ValueError(f"a split of {tensor.shape[axis]} into {list(sizes)}")
    return found


def _split_even(tensor: Traced, size: int, axis: int = 0) -> list[Traced]:
    total = tensor.shape[axis]
    return [_narrow(tensor, axis, low, min(low + size, total)) for low in range(0, total, size)]


def _unbind(tensor: Traced, axis: int = 0) -> list[Traced]:
    return [_select(tensor, axis, index) for index in range(tensor.shape[axis])]


def _cat(tensors: Sequence[Traced], axis: int = 0) -> Traced:
    first = tensors[0]
    axis %= first.ndim
    blocks: list[Block] = []
    low = 0
    for tensor in tensors:
        expected = [*first.shape[:axis], *first.shape[axis + 1 :]]
        if [*tensor.shape[:axis], *tensor.shape[axis + 1 :]] != expected:
            shapes = " and ".join(str(tuple(t.shape)) for t in (first, tensor))
            raise ValueError(f"tensors of the shapes {shapes} cannot be joined")
        for block in tensor.blocks:
            run = Run(block.start[axis] + low, block.axes[axis])
            blocks.append(block.with_axis(axis, run))
        low += tensor.shape[axis]
    shape = list(first.shape)
    shape[axis] = low
    return Traced(shape, blocks)


def _stack(tensors: Sequence[Traced], axis: int = 0) -> Traced:
    return _cat([_unsqueeze(tensor, axis) for tensor in tensors], axis)


def _same(tensor: Traced, **options: Any) -> Traced:
    return Traced(tensor.shape, tensor.blocks)


_HANDLERS: Mapping[str, Callable[..., Any]] = {
    "view": _view,
    "_unsafe_view": _view,
    "reshape": _view,
    "permute": _permute,
    "transpose": _transpose,
    "t": _t,
    "slice": _slice,
    "select": _select,
    "squeeze": _squeeze,
    "unsqueeze": _unsqueeze,
    "split": _split_even,
    "split_with_sizes": _split_sizes,
    "unbind": _unbind,
    "cat": _cat,
    "stack": _stack,
    "clone": _same,
    "detach": _same,
    "alias": _same,
}
