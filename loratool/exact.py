"""Matrix products that every machine and order of work computes to the same bits.

The factors are rounded to fixed point so coarse that all partial sums of their product fit into
the 53 bits of a double. Then no order of additions, no number of threads and no fused
multiply-add can change the product; its error is that of one fp32 product, about 1e-7.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch.nn.functional import pad


@dataclass(frozen=True)
class ExactDelta:
    """A delta whose entries are exact in fp64: the product left @ right.

    Attributes:
        left: (rows, K), fp64; every row is a multiple of a power of two of its own.
        right: (K, columns), fp64; likewise every column.
    """

    left: torch.Tensor
    right: torch.Tensor

    needs_base: ClassVar[bool] = False

    @property
    def shape(self) -> tuple[int, int]:
        """(rows, columns)."""
        return self.left.shape[0], self.right.shape[1]

    def rows(self, rows: slice, out: torch.Tensor, base: torch.Tensor | None = None) -> None:
        """Write some of the delta's rows to `out`, fp64."""
        torch.mm(self.left[rows], self.right, out=out)

    def squared_norm(self) -> float:
        """||delta||_F^2."""
        grams = (self.left.T @ self.left) * (self.right @ self.right.T)
        return max(0.0, float(grams.sum()))


def exact_delta(parts: Sequence[tuple[torch.Tensor, torch.Tensor, float]]) -> ExactDelta:
    """The sum of factor * B @ A over `parts`, as one exact product.

    Args:
        parts: (B (out, r), A (r, in), factor), factor being weight times scale.

    Returns:
        left (out, K) and right (K, in) with K the sum of the ranks, or one more.
    """
    left = torch.cat([b.double() * factor for b, _, factor in parts], dim=1)
    right = torch.cat([a.double() for _, a, _ in parts], dim=0)
    terms = left.shape[1]
    bits = (53 - math.ceil(math.log2(terms))) // 2 if terms > 1 else 26
    left, right = _fixed_point(left, 1, bits), _fixed_point(right, 0, bits)
    if bool((left == 0).any()) or bool((right == 0).any()):
        # A sum of products that are all -0 is -0 or +0, as the BLAS begins it. One +0 more decides.
        left, right = pad(left, (0, 1)), pad(right, (0, 0, 0, 1))
    return ExactDelta(left, right)


def _fixed_point(values: torch.Tensor, dim: int, bits: int) -> torch.Tensor:
    """Round every slice along `dim` to `bits` bits below the power of two above its maximum."""
    _, exponent = torch.frexp(values.abs().amax(dim=dim, keepdim=True))
    # Below this the products would be subnormal doubles, which are not exact: round them away.
    exponent = exponent.clamp(min=-480)
    shift = torch.full_like(exponent, bits) - exponent
    return torch.ldexp(torch.ldexp(values, shift).round(), -shift)
