"""What PEFT's tensors are worth: from stored tensors to the values of an update."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from loratool.checkpoint import LazyTensor
from loratool.updates import DoRA, Experts, LowRank, Product, Update
from loratool_plugins.adapter_formats._peft_dialects import Order, by_expert

if TYPE_CHECKING:
    import torch

Parts = Mapping[str, LazyTensor]


def factor_loader(a: LazyTensor, b: LazyTensor, scale: float) -> Callable[[], LowRank]:
    """Of a linear module or a convolution, whose kernel becomes part of the inputs."""

    def load() -> LowRank:
        rank = a.shape[0]
        return LowRank(a.read().reshape(rank, -1), b.read().reshape(-1, rank), scale)

    return load


def embedding_loader(a: LazyTensor, b: LazyTensor, scale: float) -> Callable[[], LowRank]:
    """The table is (V, D), and PEFT's B @ A its transpose."""
    return lambda: LowRank(b.read().T, a.read().T, scale)


def dora_loader(
    load: Callable[[], LowRank], magnitude: LazyTensor, axis: int
) -> Callable[[], Update]:
    """Factors with a magnitude for each row or column, however many dimensions it has."""
    return lambda: DoRA(load(), magnitude.read().reshape(-1), axis)


def expert_loader(
    a: LazyTensor, b: LazyTensor, number: int, scale: float, order: Order
) -> Callable[[], Update]:
    """A is stored expert by expert, B with the expert changing fastest, if PEFT wrote it."""

    def load() -> Update:
        first, second = a.read(), b.read()
        rank = first.shape[0] // number
        columns = by_expert(second, number, order)
        return Experts(first.reshape(number, rank, -1), columns, scale)

    return load


def matrix_size(parts: Parts, family: str, which: str) -> tuple[int, int] | None:
    """The rows and columns, kernel included, of a matrix by headers; None if there is none."""
    if (whole := parts.get(f"{family}_{which}")) is not None:
        flat, shape = (family, which) == ("lokr", "w1"), whole.shape
        fits = len(shape) == 2 if flat else len(shape) > 1
        return (shape[0], math.prod(shape[1:])) if fits else None
    left, right = (parts[f"{family}_{which}_{side}"].shape for side in "ab")
    core = parts.get(f"{family}_t{which[1]}")
    if len(left) != 2 or len(right) < 2:
        return None
    if core is None:
        return (left[0], math.prod(right[1:])) if left[1] == right[0] else None
    fits = len(right) == 2 < len(core.shape) and core.shape[:2] == (left[0], right[0])
    return (left[1], right[1] * math.prod(core.shape[2:])) if fits else None


def kernel_of(core: LazyTensor) -> tuple[int, ...]:
    """A core (r, r, *kernel); PEFT gives that of a 1-D kernel a second dimension of 1."""
    return core.shape[2:]


def whole_matrix(product: Product) -> torch.Tensor:
    """The matrix itself, in fp64."""
    left, right = product.left.double(), product.right
    return left if right is None else left @ right.double()
