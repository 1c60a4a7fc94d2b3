"""What a merge remembers of one tensor, so that it can be undone to the bit, and the undoing."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch

from loratool.deltas import Delta
from loratool.digests import TensorDigest
from loratool.dtypes import dtype_name
from loratool.errors import FormatError
from loratool.merging import Subtraction, subtracted_tiles
from loratool.residual import Decoder, Encoder, bit_patterns
from loratool.rounding import TILE_ELEMENTS


@dataclass(frozen=True)
class WayBack:
    """How one merged tensor becomes the base's again.

    Attributes:
        base: digest of the base's tensor.
        merged: digest of the merged one.
        residual: what subtracting the delta does not bring back, coded (`loratool.residual`).
        kept: values that were NaN or Inf, or became so by overflow.
    """

    base: str
    merged: str
    residual: bytes
    kept: int = 0


class Reversal:
    """The witness of one tensor's merge: subtracts every tile again, and keeps what is missing."""

    def __init__(self, dtype: str, shape: tuple[int, ...], columns: int) -> None:
        elements = max(TILE_ELEMENTS, columns)
        self._subtraction = Subtraction(dtype, elements)
        self._encoder = Encoder(dtype, elements)
        self._base = TensorDigest(dtype, shape)
        self._merged = TensorDigest(dtype, shape)
        self._kept = 0

    def see(
        self,
        base: torch.Tensor,
        merged: torch.Tensor,
        exact: torch.Tensor,
        delta: torch.Tensor,
        finite: bool,
    ) -> None:
        """See `loratool.merging.Witness`."""
        restored = self._subtraction.round(exact, delta, finite)
        wanted, found = bit_patterns(base), bit_patterns(restored)
        self._encoder.add(wanted, bit_patterns(merged), found)
        if not np.array_equal(wanted, found):
            raise AssertionError("a merge cannot be undone")
        self._base.update(base)
        self._merged.update(merged)
        if not finite:
            self._kept += int((~exact.isfinite()).sum())

    def finish(self) -> WayBack:
        """What to keep; proved: the way back was gone, and led to the bits that `base` is of."""
        residual = self._encoder.finish()
        return WayBack(self._base.hexdigest(), self._merged.hexdigest(), residual, self._kept)


class NotReversible(Exception):
    """A merged tensor, its delta and its residual do not belong together."""


def restored_blocks(merged: torch.Tensor, delta: Delta, way: WayBack) -> Iterator[torch.Tensor]:
    """Yield the base's values tile by tile along axis 0, each in a buffer that is reused.

    Args:
        merged: the merged values, in the base's type.
        delta: what was added, as a matrix of as many elements.
        way: what the merge kept.

    Raises:
        NotReversible: these do not lead back to the base. Blocks yielded before are worth nothing.
    """
    dtype = dtype_name(merged.dtype)
    found = TensorDigest(dtype, tuple(merged.shape))
    try:
        elements = max(TILE_ELEMENTS, delta.shape[1])
        decoder = Decoder(way.residual, dtype, merged.numel(), elements)
        for tile, restored in subtracted_tiles(merged, delta, dtype):
            decoder.restore(bit_patterns(tile), bit_patterns(restored))
            found.update(restored)
            yield restored
        decoder.finish()
    except FormatError as error:
        raise NotReversible(str(error)) from error
    if found.hexdigest() != way.base:
        raise NotReversible("the digest is not the base's")
