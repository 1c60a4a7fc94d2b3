"""What combiners share: checks of options, PEFT's weights of factors, and how they end."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from loratool.errors import InputError, UsageError
from loratool.linalg import Factorizer, RankPolicy
from loratool.updates import LowRank

if TYPE_CHECKING:
    import torch

    from loratool.lowrank import Product
    from loratool_plugins.combiners._elementwise import Merge, Sparsifiers

ON = ("deltas", "factors")
ON_HELP = "deltas: on B @ A, as published; factors: on A and B apart, as PEFT does"


class DeltasOrFactors:
    """What combiners have in common that work on deltas or, as PEFT does, on factors.

    Attributes:
        on: which.
    """

    on: str

    @property
    def needs_equal_ranks(self) -> bool:
        """Whether all parts must have one rank."""
        return self.on == "factors"


class Elementwise(DeltasOrFactors):
    """What combiners share that look at every element of the parts."""

    def _how(self, generator: torch.Generator) -> tuple[Sparsifiers, Merge]:
        """How each part is thinned out, and how all are merged."""
        raise NotImplementedError

    def combine(
        self,
        parts: Sequence[LowRank],
        weights: Sequence[float],
        policy: RankPolicy | None,
        factorizer: Factorizer,
        generator: torch.Generator,
    ) -> LowRank:
        """The combination in fp32; its certificate is that of the factorization.

        Raises:
            InputError: on=factors, and the ranks differ.
        """
        from loratool_plugins.combiners import _elementwise as elementwise

        how = self._how(generator)
        return elementwise.combine(self.on, parts, weights, policy, factorizer, generator, *how)

    def combine_vectors(
        self, parts: Sequence[torch.Tensor], weights: Sequence[float], generator: torch.Generator
    ) -> torch.Tensor:
        """The same of vectors (n,), element by element, in fp32."""
        from loratool_plugins.combiners import _elementwise as elementwise

        return elementwise.combine_vectors(parts, weights, *self._how(generator))


def check_choice(combiner: str, key: str, value: str, choices: Sequence[str]) -> None:
    """Raise UsageError if an option has none of its values."""
    if value not in choices:
        raise UsageError(f"{combiner}: {key} is one of {', '.join(choices)}, not {value!r}")


def check_density(combiner: str, density: float) -> None:
    """Raise UsageError if a density does not lie in (0, 1]."""
    if not 0 < density <= 1:
        raise UsageError(f"{combiner}: density must lie in (0, 1], not {density:g}")


def factor_weights(
    parts: Sequence[LowRank], weights: Sequence[float]
) -> tuple[list[float], list[float]]:
    """The weights that PEFT gives A and B: their products are w_i s_i, the sign goes to A.

    Raises:
        InputError: the ranks differ.
    """
    ranks = [part.rank for part in parts]
    if len(set(ranks)) > 1:
        raise InputError(
            f"on=factors needs equal ranks, not {', '.join(map(str, ranks))}: use on=deltas"
        )
    scaled = [weight * part.scale for part, weight in zip(parts, weights, strict=True)]
    on_b = [math.sqrt(abs(factor)) for factor in scaled]
    return [math.copysign(root, w) for root, w in zip(on_b, scaled, strict=True)], on_b


def finished(product: Product, policy: RankPolicy | None) -> LowRank:
    """A combination that is known by its factors, recompressed if a policy is given."""
    from loratool import lowrank

    if policy is not None:
        found = lowrank.compress([product], policy)
        return LowRank(found.a, found.b, 1.0, found.certificate)
    certificate = lowrank.exact_certificate([product], product.a.shape[0])
    return LowRank(product.a, product.b, product.factor, certificate)
