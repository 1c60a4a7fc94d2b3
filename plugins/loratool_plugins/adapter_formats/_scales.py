"""Scales in formats that have one for all updates, or none: what is left is folded into B."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from loratool.dtypes import dtype_name, torch_dtype
from loratool.errors import InputError
from loratool.linalg import is_finite

if TYPE_CHECKING:
    import torch

# What formats may store factors as; products are widened to the last types only.
TORCH_TYPES = ("F8_E4M3", "F8_E5M2", "F16", "BF16", "F32", "F64")
RUNTIME_TYPES = ("F16", "BF16", "F32")  # of MLX and llama.cpp
_PRECISION = {"F64": 53, "F32": 24, "F16": 11, "BF16": 8, "F8_E4M3": 4, "F8_E5M2": 3}


@dataclass(frozen=True)
class Folded:
    """A factor that a number was worked into.

    Attributes:
        values: the product, in B's type or the first wider one that holds it exactly.
        exact: whether it is the exact product.
    """

    values: torch.Tensor
    exact: bool


def fold(b: torch.Tensor, factor: float, types: Sequence[str]) -> Folded:
    """Work a factor into B, or another number than 1 into nothing: B in a type that there is.

    Args:
        b: (..., r), of a float type.
        factor: what to multiply by; finite.
        types: safetensors names of the types that the format has, the widest last.

    Returns:
        The product; in the widest type, rounded, where none holds it exactly.
    """
    import torch

    name = dtype_name(b.dtype)
    if factor == 1 and name in types:
        return Folded(b, True)
    product = b.double() * factor
    known = _bits(factor) + _PRECISION[name] <= _PRECISION["F64"]  # or else it is rounded already
    for candidate in (name, "F32", "F64"):
        values = product.to(torch_dtype(candidate))
        if candidate in types and torch.equal(values.double(), product):
            return Folded(values, known)
    return Folded(product.to(torch_dtype(types[-1])), False)


def unfold(b: torch.Tensor, factor: float, dtype: str) -> torch.Tensor:
    """B as it was before `fold`, in its own type; exact where the product was."""
    return (b.double() / factor).to(torch_dtype(dtype))


def alpha_of(scale: float, divisor: float) -> float:
    """The alpha that gives exactly this scale when divided again, where a double can."""
    alpha = scale * divisor
    neighbours = (alpha, math.nextafter(alpha, -math.inf), math.nextafter(alpha, math.inf))
    return next((value for value in neighbours if value / divisor == scale), alpha)


def most_common(values: Iterable[float]) -> float:
    """The value that most have, the first of them if several do."""
    return Counter(values).most_common(1)[0][0]


def require_finite(name: str, *tensors: torch.Tensor) -> None:
    """Raise InputError, naming the update, if one of its factors holds NaN or Inf."""
    if not all(map(is_finite, tensors)):
        raise InputError(f"{name}: its factors hold NaN or Inf: repair the adapter")


def _bits(value: float) -> int:
    """Significant bits of a double."""
    whole = abs(int(math.frexp(value)[0] * 2**53))
    return whole.bit_length() - ((whole & -whole).bit_length() - 1) if whole else 0
