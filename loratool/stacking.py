"""From several updates of one tensor to one: everything of a stack that touches values."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from loratool.checkpoint import LazyTensor
from loratool.errors import InputError
from loratool.interference import Collector
from loratool.kinship import same_bytes
from loratool.linalg import Factorizer, RankPolicy, is_finite, named_generator
from loratool.lowrank import rounded_factors, weighted
from loratool.plugins import Combiner
from loratool.stack_plan import Share, different_replacements
from loratool.updates import LowRank, Replacement


@dataclass(frozen=True)
class Stacker:
    """Combines the shares of one tensor; used by several threads at a time.

    Attributes:
        combiner: makes one low-rank update of several.
        policy: the rank of the result; None for the combiner's choice.
        factorizer: for combiners that make a dense delta.
        seed: of all random numbers.
        names: what reports call the adapters, by number.
    """

    combiner: Combiner
    policy: RankPolicy | None
    factorizer: Factorizer
    seed: int
    names: Sequence[str]
    interference: Collector = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "interference", Collector(self.names))

    def combine(self, name: str, shares: Sequence[Share], dtype: str) -> LowRank | None:
        """One update of low-rank ones, with factors of a safetensors dtype; None if none changes.

        Raises:
            InputError: NaN or Inf in a factor, or a result that overflows `dtype`.
        """
        present = [(share, found) for share in shares if (found := _factors(share)) is not None]
        if not present:
            return None
        parts = [found for _, found in present]
        weights = [share.weight for share, _ in present]
        self.interference.add(
            name, {share.number: weighted(found, share.weight) for share, found in present}
        )
        generator = named_generator(self.seed, name)
        try:
            found = self.combiner.combine(parts, weights, self.policy, self.factorizer, generator)
        except InputError as error:
            raise InputError(f"{name}: {error}") from error
        if found.certificate is None:
            raise TypeError(f"{type(self.combiner).__name__} gave no certificate")
        result = rounded_factors(found.a, found.b, found.certificate, dtype, found.scale)
        if result.certificate is None or not math.isfinite(result.certificate.rounding):
            raise InputError(f"{name}: the factors overflow {dtype}; choose a wider --dtype")
        return result


def _factors(share: Share) -> LowRank | None:
    found = share.update.load()
    if not isinstance(found, LowRank):
        return None
    for side, factor in (("A", found.a), ("B", found.b)):
        if not _holds_finite(factor):
            origin = share.update.origin or share.label
            raise InputError(
                f"{origin}: {share.update.name}: lora_{side} holds NaN or Inf: repair the adapter"
            )
    return found


def _holds_finite(factor: torch.Tensor) -> bool:
    """Whether a factor holds neither NaN nor Inf: both come through a sum, in one quick pass."""
    quick = factor.itemsize in (2, 4)  # sums of these cannot overflow fp64
    if quick and math.isfinite(float(factor.sum(dtype=torch.float64))):
        return True
    return is_finite(factor)


def replacement(
    name: str, shares: Sequence[Share], context: dict[str, LazyTensor]
) -> Replacement | None:
    """The one replacement of a tensor; None if it is unchanged after all.

    Args:
        name: of the tensor in the result.
        shares: of adapters that replace it; equal replacements are one.
        context: gets the new value under `name`.

    Raises:
        MismatchError: two adapters replace it by different values, both named.
    """
    chosen: tuple[Share, Replacement] | None = None
    for share in shares:
        found = share.update.load()
        if not isinstance(found, Replacement):
            continue
        if chosen is None:
            chosen = share, found
        elif not _same_tensor(chosen[1].tensor, found.tensor):
            raise different_replacements(name, chosen[0], share)
    if chosen is None:
        return None
    context[name] = chosen[1].tensor.renamed(name)
    return chosen[1]


def _same_tensor(one: LazyTensor, other: LazyTensor) -> bool:
    return one.dtype == other.dtype and one.shape == other.shape and same_bytes(one, other)
