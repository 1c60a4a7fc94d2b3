"""What a merge remembers of one tensor, so that it can be undone to the bit, and the undoing."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from loratool.digests import TensorDigest
from loratool.dtypes import dtype_name
from loratool.errors import FormatError
from loratool.merging import ExactDelta, Subtraction, subtracted_tiles
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

    def __init__(self, dtype: str, shape: tuple[int, ...]) -> None:
        elements = max(TILE_ELEMENTS, shape[-1])
        self._subtraction = Subtraction(dtype, elements)
        self._encoder = Encoder(dtype, elements)
        self._base = TensorDigest(dtype, shape)
        self._restored = TensorDigest(dtype, shape)
        self._merged = TensorDigest(dtype, shape)
        self._kept = 0

    def see(
        self, base: torch.Tensor, merged: torch.Tensor, exact: torch.Tensor, delta: torch.Tensor
    ) -> None:
        """See `loratool.merging.Witness`."""
        restored = self._subtraction.round(exact, delta)
        self._encoder.add(bit_patterns(base), bit_patterns(merged), bit_patterns(restored))
        self._base.update(base)
        self._restored.update(restored)
        self._merged.update(merged)
        total = float(exact.sum())
        if total - total != 0:
            self._kept += int((~exact.isfinite()).sum())

    def finish(self) -> WayBack:
        """What to keep; proved: the way back was gone, and led to the base's digest."""
        base = self._base.hexdigest()
        if self._restored.hexdigest() != base:
            raise AssertionError("a merge cannot be undone")
        return WayBack(base, self._merged.hexdigest(), self._encoder.finish(), self._kept)


class NotReversible(Exception):
    """A merged tensor, its delta and its residual do not belong together."""


def restored_blocks(
    merged: torch.Tensor, delta: ExactDelta, way: WayBack
) -> Iterator[torch.Tensor]:
    """Yield the base's values tile by tile along axis 0, each in a buffer that is reused.

    Args:
        merged: (rows, columns), the merged values, in the base's type.
        delta: what was added; a product of the same shape.
        way: what the merge kept.

    Raises:
        NotReversible: these do not lead back to the base. Blocks yielded before are worth nothing.
    """
    dtype = dtype_name(merged.dtype)
    found = TensorDigest(dtype, tuple(merged.shape))
    try:
        elements = max(TILE_ELEMENTS, merged.shape[-1])
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
