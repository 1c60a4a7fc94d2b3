"""The exact factorizer: the whole spectrum in fp64, for small models and for checking others."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from loratool_plugins.factorizers import _spectral as spectral

if TYPE_CHECKING:
    import torch

    from loratool.linalg import Factorization, FormedDelta, RankPolicy


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
        return self.factorize_formed(spectral.measured(delta), policy, generator)

    def wants_rounded(self, policy: RankPolicy, device: torch.device) -> bool:
        """Whether it would use a copy of the delta in bf16: it has no use for one."""
        return False

    def factorize_formed(
        self, delta: FormedDelta, policy: RankPolicy, generator: torch.Generator
    ) -> Factorization:
        """As `factorize`, of a delta that was measured while it was formed.

        Raises:
            InputError: `delta` holds NaN or Inf, or its eigenvectors are not found.
        """
        target = spectral.prepare(delta)
        if target.total == 0:
            return spectral.zero_factorization(target.shape_of_delta)
        return spectral.gram_factorization(target, policy)
