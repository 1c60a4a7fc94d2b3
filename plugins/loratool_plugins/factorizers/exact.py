"""The exact factorizer: the whole spectrum in fp64, for small models and for checking others."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from loratool_plugins.factorizers import _spectral as spectral

if TYPE_CHECKING:
    import torch

    from loratool.linalg import Factorization, RankPolicy


@dataclass(frozen=True)
class Exact:
    """Truncated SVD through the fp64 Gram matrix of the delta's shorter side.

    Chosen over torch.linalg.svd in fp64, which is two to five times slower: squared singular values
    come out with an absolute error of about 1e-16 of the largest, so singular values down to 1e-6
    of the largest are good to four digits, and those below are rounding of an fp32 delta (and not
    kept). Needs shorter^2 * 8 bytes three times over and shorter^2 * (longer + 9 shorter)
    multiplications: minutes for a side of 8192.
    """

    def factorize(
        self, delta: torch.Tensor, policy: RankPolicy, generator: torch.Generator
    ) -> Factorization:
        """Factorize `delta` (out, in), fp32, which may be overwritten; `generator` is not used.

        Raises:
            InputError: `delta` is not a matrix, is empty, or holds NaN or Inf.
        """
        target = spectral.prepare(spectral.measured(delta))
        if target.total == 0:
            return spectral.zero_factorization((delta.shape[0], delta.shape[1]))
        return spectral.gram_factorization(target, policy)
