"""Matrices in factors as LyCORIS and PEFT store them, for LoHa and LoKr."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from loratool.checkpoint import LazyTensor
from loratool.updates import Product

if TYPE_CHECKING:
    import torch

Parts = Mapping[str, LazyTensor]


def product(parts: Parts, family: str, which: str) -> Product:
    """A matrix from its tensors; in Tucker form the left factor is stored as (r, out).

    Args:
        parts: the tensors of a module, by the last part of their keys.
        family: "hada" or "lokr".
        which: "w1" or "w2".
    """
    if (whole := parts.get(f"{family}_{which}")) is not None:
        return Product(flat(whole.read()))
    left, right = (parts[f"{family}_{which}_{side}"].read() for side in "ab")
    core = parts.get(f"{family}_t{which[1]}")
    if core is None:
        return Product(left, flat(right))
    return Product(left.T, right, core.read())


def product_parts(key: str, core: str, product: Product) -> dict[str, torch.Tensor]:
    """The tensors of a matrix, by key; `core` is the key of its core, if it can have one."""
    if product.right is None:
        return {key: product.left}
    if product.core is None:
        return {f"{key}_a": product.left, f"{key}_b": product.right}
    return {f"{key}_a": product.left.T, f"{key}_b": product.right, core: product.core}


def flat(tensor: torch.Tensor) -> torch.Tensor:
    """A convolution's factor as a matrix."""
    return tensor.reshape(tensor.shape[0], -1)
