"""Differences of two tensors, tile by tile."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def difference(one: torch.Tensor, other: torch.Tensor, out: torch.Tensor) -> None:
    """out = one - other, rounded to the type of `out` once, without temporaries where it can.

    Args:
        one: of any float dtype.
        other: of the same shape.
        out: fp32, or fp64.
    """
    import torch

    if torch.float64 in (one.dtype, other.dtype):
        out.copy_(one.double() - other.double())
        return
    out.copy_(one)
    out.sub_(other.float() if other.itemsize == 1 else other)  # torch cannot calculate in fp8
