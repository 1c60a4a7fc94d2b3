"""Norms, spectra and digests of what files hold, for reports.

Everything here touches values; whoever only reads headers does not import it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch

from loratool.adapter import LazyUpdate
from loratool.checkpoint import LazyTensor
from loratool.digests import TensorDigest
from loratool.dtypes import is_float
from loratool.linalg import is_finite, squared_norm, tiles
from loratool.lowrank import singular_values, weighted
from loratool.updates import LowRank, Replacement

# Between these an fp32 sum of squares has neither lost small values nor overflowed.
_SAFE = (1e-20, 1e30)


@dataclass(frozen=True)
class Spectrum:
    """A low-rank update as it lies in its file.

    Attributes:
        scale: what B A is multiplied by; None if the factors cannot be had.
        rank: number of rows of A.
        sigma: the delta's singular values in fp64, descending; empty if they cannot be had.
        fault: why not, "" otherwise.
        digests: stored tensor -> its digest.
    """

    scale: float | None = None
    rank: int = 0
    sigma: tuple[float, ...] = ()
    fault: str = ""
    digests: dict[str, str] = field(default_factory=dict)

    @property
    def norm(self) -> float | None:
        """||delta||_F."""
        return math.hypot(*self.sigma) if self.sigma else None

    @property
    def energies(self) -> list[float]:
        """Share of ||delta||_F^2 of each singular value; all 0 for a zero delta."""
        top = self.sigma[0] if self.sigma else 0.0
        if top == 0:
            return [0.0 for _ in self.sigma]
        squares = [(value / top) ** 2 for value in self.sigma]
        return [square / math.fsum(squares) for square in squares]


def spectrum(update: LazyUpdate) -> Spectrum:
    """Read a low-rank update, and decompose it through its factors."""
    digests = {tensor.name: measure(tensor).digest for tensor in update.stored}
    found = update.load()
    if not isinstance(found, LowRank):
        return Spectrum(fault="there is nothing to change", digests=digests)
    a, b = found.a, found.b
    fault = ""
    if a.shape[0] != b.shape[1]:
        fault = "lora_A and lora_B have different ranks"
    elif not (a.numel() and b.numel()):
        fault = "its factors are empty"
    elif not (_is_finite(a) and _is_finite(b)):
        fault = "holds NaN or Inf"
    if fault:
        return Spectrum(found.scale, found.rank, fault=fault, digests=digests)
    sigma = singular_values([weighted(found)])
    return Spectrum(found.scale, found.rank, tuple(sigma.tolist()), digests=digests)


def _is_finite(tensor: torch.Tensor) -> bool:
    return not tensor.is_floating_point() or is_finite(tensor)


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
            total += _squared_norm(block)
    norm = total**0.5 if is_float(tensor.dtype) else None
    return Measured(norm, digest.hexdigest())


def _squared_norm(block: torch.Tensor) -> float:
    flat = block.reshape(-1)
    total = 0.0
    for part in tiles(flat):
        tile = flat[part]
        found = squared_norm(tile.float()) if tile.dtype != torch.float64 else math.nan
        if not _SAFE[0] < found < _SAFE[1]:
            found = float(tile.double().square().sum())
        total += found
    return total


def replaced_tensor(update: LazyUpdate) -> LazyTensor | None:
    """The tensor that an update puts in a whole tensor's place, if there is one."""
    if update.stored:
        return update.stored[0]
    found = update.load()
    return found.tensor if isinstance(found, Replacement) else None
