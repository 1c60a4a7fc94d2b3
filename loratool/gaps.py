"""Places of single entries as the gaps between them: one byte each, or two where they are rare.

A code below the largest number of its type says how many places are skipped before the next
entry; the largest number says to skip as many places and goes on. So places are ascending and all
different, whatever the codes are.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import torch

_TYPES = (np.uint8, np.uint16)


def encoded(positions: torch.Tensor) -> torch.Tensor:
    """The codes of places, in the type that takes fewer bytes.

    Args:
        positions: (k,) int64, ascending, all different, from 0.

    Returns:
        (n,) uint8 or uint16, n >= k.
    """
    import torch

    gaps = np.diff(positions.numpy(), prepend=-1) - 1
    kind = _best(gaps)
    skip = np.iinfo(kind).max
    ends = np.cumsum(gaps // skip + 1)
    codes = np.full(int(ends[-1]) if len(ends) else 0, skip, dtype=kind)
    codes[ends - 1] = gaps % skip
    return torch.from_numpy(codes)


def decoded(codes: torch.Tensor) -> torch.Tensor:
    """The places that codes tell: (k,) int64, ascending, all different."""
    import torch

    found = codes.numpy()
    skip = np.iinfo(found.dtype).max
    is_entry = found != skip
    steps = found.astype(np.int64)
    steps += is_entry
    ends = np.cumsum(steps, out=steps)
    return torch.from_numpy(ends[is_entry] - 1)


def sparse_bytes(positions: torch.Tensor, values: torch.Tensor) -> int:
    """What single entries take in a file."""
    gaps = np.diff(positions.numpy(), prepend=-1) - 1
    return _size(gaps, _best(gaps)) + values.numel() * values.itemsize


def expected_bytes(share: float) -> float:
    """About the bytes of one place, where this share of all places has an entry at random."""
    if share <= 0:
        return float(np.dtype(_TYPES[-1]).itemsize)
    sizes = []
    for kind in _TYPES:
        skipped = math.pow(1 - share, np.iinfo(kind).max)
        sizes.append(np.dtype(kind).itemsize / max(1 - skipped, 1e-300))
    return min(sizes)


def _best(gaps: np.ndarray) -> type[Any]:
    return min(_TYPES, key=lambda kind: _size(gaps, kind))


def _size(gaps: np.ndarray, kind: type[Any]) -> int:
    return int(np.sum(gaps // np.iinfo(kind).max + 1)) * np.dtype(kind).itemsize
