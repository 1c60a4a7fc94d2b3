"""Parameters whose values tell which parameter they are, so that a graph is traced without weights.

An exporter that optimises renames, turns and packs weights; which initializer of the finished graph
is which tensor of the checkpoint, and how it is turned, is then to be read off its values. So every
parameter gets values that vary along one axis only and take the memory of that axis: the first is
the parameter's number, the others follow from it. NumPy keeps the other axes at stride 0 through a
transposition; what would copy them is done without copies by `lazily`.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from onnxscript.optimizer import _constant_folding
from transformers.exporters import onnxruntime_fusions

from loratool.errors import InputError
from loratool.shell import Shell
from loratool_plugins.exporters.onnx.origins import Origin, Part

Array = np.ndarray[Any, np.dtype[Any]]

# The bit patterns of positive normal numbers: of fp16 (fp32 and fp64 hold them exactly), and of
# bf16. Odd ones only, since the constants of models are round numbers.
_PATTERNS = {torch.float16: range(0x0401, 0x7C00, 2), torch.bfloat16: range(0x0081, 0x7F80, 2)}
# What moves values without changing them: may be computed while tracing.
_LAYOUT_OPS = {
    *("Cast", "CastLike", "Concat", "Constant", "Identity", "Reshape", "Squeeze"),
    *("Transpose", "Unsqueeze"),
}
_SPREAD = 0x9E3779B1  # any odd number: spreads neighbouring numbers over the patterns


@dataclass(frozen=True)
class Fingerprints:
    """The values that stand for a model's parameters while it is traced.

    Attributes:
        columns: key -> the values along the axis that they vary along; one-dimensional.
        axes: key -> that axis, and the parameter's shape.
        numbers: first value -> key.
    """

    columns: Mapping[str, Array]
    axes: Mapping[str, tuple[int, tuple[int, ...]]]
    numbers: Mapping[float, str]

    def identify(self, values: Array) -> Origin | None:
        """What an initializer is made of, or None if it is no arrangement of whole parameters."""
        is_float = values.dtype.kind == "f" or values.dtype.name == "bfloat16"
        if not is_float or not values.size:
            return None
        for axis in _varying_axes(values):
            if (parts := self._parts(values, axis)) is None:
                continue
            if len(parts) > 1:
                return Origin(tuple(values.shape), axis, parts)
            only = replace(parts[0], length=values.shape[0] if values.ndim else 1)
            return Origin(tuple(values.shape), 0, (only,))
        return None

    def _parts(self, values: Array, axis: int) -> tuple[Part, ...] | None:
        """The parameters that follow each other along an axis; zeros may stand between them."""
        first = tuple(slice(None) if at == axis else 0 for at in range(values.ndim))
        profile = np.asarray(values[first], np.float64).reshape(-1)
        other = tuple(size for at, size in enumerate(values.shape) if at != axis)
        parts: list[Part] = []
        start = 0
        while start < profile.size:
            if profile[start] == 0:
                zeros = int(np.argmax(profile[start:] != 0)) or profile.size - start
                parts.append(Part(None, (), zeros))
                start += zeros
                continue
            key = self.numbers.get(float(profile[start]))
            if key is None:
                return None
            part = self._part(key, profile[start:], axis, other, whole=start == 0)
            if part is None:
                return None
            parts.append(part)
            start += part.length
        return tuple(parts) if any(part.key is not None for part in parts) else None

    def _part(
        self, key: str, profile: Array, axis: int, other: tuple[int, ...], whole: bool
    ) -> Part | None:
        column = self.columns[key]
        varying, shape = self.axes[key]
        if column.size > profile.size or not np.array_equal(profile[: column.size], column):
            return None
        length = column.size
        rest = tuple(size for at, size in enumerate(shape) if at != varying)
        order = _order_of(rest, other)
        if order is None and whole and profile.size == column.size:
            # Axes of size 1 came or went, or axes were merged that do not vary: values stay put.
            sizes = (*other[:axis], length, *other[axis:])
            if int(np.prod(sizes)) == int(np.prod(shape)) and _keeps_order(shape, varying, sizes):
                return Part(key, tuple(range(len(shape))), length)
        if order is None:
            return None
        others = [at for at in range(len(shape)) if at != varying]
        turned = [others[at] for at in order]
        turned.insert(axis, varying)
        return Part(key, tuple(turned), length)


def _order_of(rest: tuple[int, ...], other: tuple[int, ...]) -> tuple[int, ...] | None:
    """How to permute the sizes `rest` to get `other`, moving as little as possible."""
    if Counter(rest) != Counter(other):
        return None
    left = list(range(len(rest)))
    order = []
    for at, size in enumerate(other):
        same = at if at in left and rest[at] == size else next(i for i in left if rest[i] == size)
        left.remove(same)
        order.append(same)
    return tuple(order)


def _keeps_order(shape: tuple[int, ...], varying: int, sizes: tuple[int, ...]) -> bool:
    """Whether a reshape from one to the other leaves the varying axis where it was."""
    before = int(np.prod(shape[:varying], dtype=np.int64))
    sums = list(itertools.accumulate(sizes, lambda a, b: a * b, initial=1))
    return any(
        total == before and size == shape[varying] for total, size in zip(sums, sizes, strict=False)
    )


def _varying_axes(values: Array) -> Iterator[int]:
    """The axes along which alone an array's values may vary; none if they vary along several."""
    if values.ndim == 0:
        yield 0
        return
    corner = (0,) * values.ndim
    changing = []
    for axis in range(values.ndim):
        line = tuple(slice(None) if at == axis else 0 for at in range(values.ndim))
        if values.strides[axis] != 0 and bool((values[line] != values[corner]).any()):
            changing.append(axis)
    if len(changing) > 1:
        return
    for axis in changing or range(values.ndim):
        others = [at for at in range(values.ndim) if at != axis and values.strides[at] != 0]
        narrow = tuple(
            slice(None) if at == axis or at in others else slice(0, 1) for at in range(values.ndim)
        )
        line = tuple(slice(None) if at == axis else slice(0, 1) for at in range(values.ndim))
        if not others or bool((values[narrow] == values[line]).all()):
            yield axis


def stamp(shell: Shell, keys: Mapping[str, str]) -> Fingerprints:
    """Put fingerprints in the place of a shell's parameters and floating-point buffers.

    Args:
        shell: its parameters are replaced.
        keys: parameter or persistent buffer -> tensor of the checkpoint. Those with the same tensor
            share one parameter.

    Raises:
        InputError: there are more parameters than numbers to tell them apart.
    """
    columns: dict[str, Array] = {}
    axes: dict[str, tuple[int, tuple[int, ...]]] = {}
    numbers: dict[float, str] = {}
    made: dict[str, torch.nn.Parameter] = {}
    free = itertools.count()
    for name, key in keys.items():
        owner, _, leaf = name.rpartition(".")
        module = shell.model.get_submodule(owner)
        old: torch.Tensor | None = module._parameters.get(leaf)
        old = module._buffers.get(leaf) if old is None else old
        if old is None or not old.is_floating_point() or not old.numel():
            continue
        if key not in made:
            axis = _axis_to_vary(tuple(old.shape))
            column = _free_column(free, numbers, old.shape[axis] if old.ndim else 1, old.dtype)
            columns[key] = column.to(torch.float64).numpy()
            axes[key] = (axis, tuple(old.shape))
            numbers[float(column[0])] = key
            sizes = [size if at == axis else 1 for at, size in enumerate(old.shape)]
            values = column.to(old.dtype).reshape(sizes).expand(old.shape)
            made[key] = torch.nn.Parameter(values, requires_grad=False)
        if leaf in module._buffers:
            module._buffers[leaf] = made[key].data
        else:
            module._parameters[leaf] = made[key]
    return Fingerprints(columns, axes, numbers)


def _free_column(
    free: Iterator[int], taken: Mapping[float, str], length: int, dtype: torch.dtype
) -> torch.Tensor:
    """The column of the next number whose first value nobody has."""
    for number in free:
        if number > len(_PATTERNS[torch.float16]):
            break
        column = _column(number, length, dtype)
        if float(column[0]) not in taken:
            return column
    raise InputError("the model has too many parameters to tell apart; export it with --no-fuse")


def _axis_to_vary(shape: tuple[int, ...]) -> int:
    """The axis whose place tells how a tensor is turned: one of two that are equally long."""
    counts = Counter(size for size in shape if size > 1)
    repeated = [size for size, count in counts.items() if count > 1]
    return shape.index(max(repeated)) if repeated else 0


def _column(number: int, length: int, dtype: torch.dtype) -> torch.Tensor:
    """The values of a parameter along its axis; exact in `dtype`."""
    kind = torch.bfloat16 if dtype == torch.bfloat16 else torch.float16
    patterns = _PATTERNS[kind]
    steps = torch.arange(length, dtype=torch.int64)
    # The number itself first; then a sequence of its own for every number.
    mixed = (steps * _SPREAD + (steps * steps) * (2 * number + 1) + number) % len(patterns)
    bits = (patterns.start + patterns.step * mixed).to(torch.int16)
    return bits.view(kind)


@contextmanager
def lazily(prints: Fingerprints) -> Iterator[None]:
    """Inside the block, exporters neither compute with fingerprints nor copy them.

    Constant folding is held to operators that move values: what a model computes from a weight
    (1 + w, say) stays a node. Packing several weights into one joins their columns only.
    """
    folding: Any = _constant_folding.FoldConstantsPass
    initialise = folding.__init__

    def init(self: Any, *args: Any, **kwargs: Any) -> None:
        initialise(self, *args, **kwargs)
        asked = self.should_fold

        def should_fold(node: ir.Node) -> bool | None:
            weights = [
                value
                for value in node.inputs
                if value is not None
                and value.const_value is not None
                and prints.identify(value.const_value.numpy()) is not None
            ]
            moved = node.op_type in _LAYOUT_OPS
            # A weight that is used elsewhere, too, would be stored twice.
            if weights and (not moved or any(len(value.uses()) > 1 for value in weights)):
                return False
            answer: bool | None = asked(node)
            return answer

        self.should_fold = should_fold

    folding.__init__ = init
    fusions: Any = onnxruntime_fusions
    numpy, fusions.np = fusions.np, _LazyNumpy()
    try:
        yield
    finally:
        folding.__init__, fusions.np = initialise, numpy


class _LazyNumpy:
    """NumPy, but arrays that are constant along an axis stay so without being copied."""

    def __getattr__(self, name: str) -> Any:
        return getattr(np, name)

    @staticmethod
    def concatenate(arrays: Sequence[Array], axis: int = 0) -> Array:
        """As NumPy's, for arrays whose strides along common other axes are 0 without copying."""
        arrays = [np.asarray(array) for array in arrays]
        place = axis % arrays[0].ndim
        still = [
            at
            for at in range(arrays[0].ndim)
            if at != place and all(array.strides[at] == 0 for array in arrays)
        ]
        narrow = tuple(slice(0, 1) if at in still else slice(None) for at in range(arrays[0].ndim))
        joined = np.concatenate([array[narrow] for array in arrays], axis=place)
        shape = tuple(
            arrays[0].shape[at] if at in still else joined.shape[at] for at in range(joined.ndim)
        )
        return np.broadcast_to(joined, shape)

    @staticmethod
    def ascontiguousarray(array: Array) -> Array:
        """As NumPy's, but for arrays with a stride of 0, which are left as they are."""
        array = np.asarray(array)
        if array.ndim and array.size > 1 and 0 in array.strides:
            return array
        return np.ascontiguousarray(array)
