"""Norms and digests of what files hold, for reports.

Everything here touches values; whoever only reads headers does not import it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from loratool.adapter import LazyUpdate
from loratool.checkpoint import LazyTensor
from loratool.digests import TensorDigest
from loratool.dtypes import is_float
from loratool.linalg import squared_norm, tiles
from loratool.updates import Replacement, Rows

# Between these an fp32 sum of squares has neither lost small values nor overflowed.
_SAFE = (1e-20, 1e30)


@dataclass(frozen=True)
class Measured:
    """A tensor's values in two numbers.

    Attributes:
        norm: Frobenius norm, good to about 1e-7; None for integers. NaN or Inf if it holds such.
        digest: of dtype, shape and bytes.
    """

    norm: float | None
    digest: str


def measure(tensor: LazyTensor) -> Measured:
    """Read a tensor once, tile by tile, and digest it."""
    digest = TensorDigest(tensor.dtype, tensor.shape)
    total = 0.0
    for block in tensor.blocks():
        digest.update(block)
        if is_float(tensor.dtype):
            total += block_energy(block)
    norm = total**0.5 if is_float(tensor.dtype) else None
    return Measured(norm, digest.hexdigest())


def block_energy(block: torch.Tensor) -> float:
    """||block||_F^2 of any shape and float dtype, good to about 1e-7; tile by tile."""
    flat = block.reshape(-1)
    total = 0.0
    for part in tiles(flat):
        tile = flat[part]
        found = squared_norm(tile.float()) if tile.dtype != torch.float64 else math.nan
        if not _SAFE[0] < found < _SAFE[1]:
            found = float(tile.double().square().sum())
        total += found
    return total


def whole_tensor(update: LazyUpdate) -> LazyTensor | None:
    """The tensor, or the rows of one, that an update sets, if there is any after all."""
    if update.stored:
        return update.stored[0]
    found = update.load()
    return found.tensor if isinstance(found, Replacement | Rows) else None
