"""Chooses between plain truncated SVD and the recovery of a merged LoRA, once a model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from loratool.linalg import Choice, named_generator
from loratool_plugins.factorizers.krylov import Krylov
from loratool_plugins.factorizers.rounding_cell import Refusal, RoundingCell

if TYPE_CHECKING:
    from collections.abc import Iterable

    import torch

    from loratool.linalg import Context, Factorization, RankPolicy

# Matrices that are tried; only one of them has to be a merged LoRA's, for every other matrix is
# still judged by itself.
_TRIED = 2


@dataclass(frozen=True)
class Auto:
    """rounding_cell if a trial recovers a merged LoRA from one of two matrices, else krylov.

    A fine-tune that is none costs these two trials; a model of fp32 weights not even them.
    """

    # Recovered factors hold more than the weights' own type could keep.
    is_precise = True

    def factorize(
        self, delta: torch.Tensor, policy: RankPolicy, generator: torch.Generator
    ) -> Factorization:
        """Factorize `delta` as krylov does: without the weights there is nothing to choose.

        Raises:
            InputError: `delta` is not a matrix, is empty, or holds NaN or Inf.
        """
        return Krylov().factorize(delta, policy, generator)

    def choose(
        self, samples: Iterable[tuple[torch.Tensor, Context]], policy: RankPolicy, seed: int
    ) -> Choice:
        """Try to recover a LoRA from the first samples.

        Args:
            samples: deltas (out, in), fp32, that are not zero, and where they come from.
            policy: how many singular values to keep.
            seed: of the random start.

        Raises:
            InputError: a sample holds NaN or Inf.
        """
        reason = "nothing has changed"
        for _, (delta, context) in zip(range(_TRIED), samples, strict=False):
            generator = named_generator(seed, context.name)
            plain = Krylov().factorize(delta, policy, generator)
            found = RoundingCell().recovered(plain, policy, generator, context)
            if not isinstance(found, Refusal):
                share = found.certificate.details["recovery"]["held_out"]
                return Choice(
                    "rounding_cell",
                    RoundingCell(),
                    f"{context.name} is a merged, rounded LoRA: {share:.0%} of its held-out "
                    "weights are predicted",
                )
            told = "" if found.held_out is None else f" ({found.held_out:.0%} predicted)"
            reason = f"{context.name}: {found.reason}{told}"
        return Choice("krylov", Krylov(), reason)
