"""Computes the plain low-rank updates of an adapter that is converted.

Everything here touches values; the step that plans it touches headers only.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch

from loratool.adapter import LazyUpdate
from loratool.dtypes import torch_dtype
from loratool.errors import InputError
from loratool.linalg import Certificate, Factorizer, is_finite, named_generator
from loratool.lowrank import rounded_factors
from loratool.plain import Aim, Tools, changed_vector, low_rank
from loratool.underneath import Underneath
from loratool.updates import (
    IA3,
    KIND_NAMES,
    NEED_BASE,
    Dense,
    Experts,
    LowRank,
    Replacement,
    Rows,
    Update,
    matrix_shape,
    tensors_of,
)

__all__ = ["Aim", "Converter"]


@dataclass(frozen=True)
class Converter:
    """Makes plain low-rank updates of other kinds; used by several threads at a time.

    Attributes:
        aim: the rank.
        factorizer: of whole matrices.
        seed: of its random numbers.
        dtype: safetensors name of the factors' type; None for fp32, or fp64 of what is fp64.
        label: what errors call the adapter.
        results: name -> how well it went, as they are computed.
        digests: base tensor -> its digest, of those that were read.
    """

    aim: Aim
    factorizer: Factorizer
    seed: int
    dtype: str | None
    label: str
    results: dict[str, Certificate] = field(default_factory=dict)
    digests: dict[str, str] = field(default_factory=dict)

    def planned(self, update: LazyUpdate, under: Underneath | None) -> LazyUpdate:
        """The update that is computed when it is loaded: low-rank, or of a vector dense.

        Args:
            update: of any kind that is added to a weight, but of experts.
            under: the base's weight, where the update needs it, or where the base is known: its
                shape has a convolution's kernel, which some updates do not tell.
        """
        update = update if under is None else replace(update, shape=under.shape)
        dtype = self._dtype(update)
        if len(update.shape) < 2:
            return replace(
                update, kind="dense", dtype=dtype, load=lambda: self._vector(update, under),
                stored=(),
            )  # fmt: skip
        policy = self.aim.policy
        limit = None if policy.rank is None else policy.limit(matrix_shape(update.shape))
        return replace(
            update, kind="low_rank", dtype=dtype, rank=limit, stored=(),
            load=lambda: self._low_rank(update, under),
        )  # fmt: skip

    def _dtype(self, update: LazyUpdate) -> str:
        return self.dtype or ("F64" if update.dtype == "F64" else "F32")

    def _low_rank(self, update: LazyUpdate, under: Underneath | None) -> LowRank | None:
        found = self._found(update)
        if found is None:
            return None
        if isinstance(found, Experts | Rows | Replacement):
            raise TypeError(f"{update.name}: a {KIND_NAMES[found.kind]} has no matrix")
        tools = Tools(self.factorizer, named_generator(self.seed, update.name))
        base = self._values(under) if under is not None and found.kind in NEED_BASE else None
        try:
            factors = low_rank(found, update.shape, self.aim, tools, base)
        except InputError as error:
            raise InputError(f"{self._origin(update)}: {error}") from error
        if factors.certificate is None:  # it was low-rank after all
            return factors
        dtype = self._dtype(update)
        result = rounded_factors(factors.a, factors.b, factors.certificate, dtype, factors.scale)
        if not (is_finite(result.a) and is_finite(result.b)):
            raise InputError(
                f"{self._origin(update)}: its factors overflow {dtype}: choose a wider --dtype"
            )
        if result.certificate is not None:
            self.results[update.name] = result.certificate
        return result

    def _vector(self, update: LazyUpdate, under: Underneath | None) -> Update | None:
        found = self._found(update)
        if isinstance(found, IA3) and under is not None:
            found = changed_vector(found, self._values(under))
        if isinstance(found, Dense):
            return Dense(found.values.to(torch_dtype(self._dtype(update))), found.scale)
        return found

    def _found(self, update: LazyUpdate) -> Update | None:
        """The update; InputError if it cannot be calculated with."""
        found = update.load()
        if found is None or isinstance(found, Rows | Replacement):
            return found
        for part, values in tensors_of(found):
            if not is_finite(values):
                raise InputError(
                    f"{self._origin(update)}: {part} holds NaN or Inf: repair the adapter"
                )
        return found

    def _values(self, under: Underneath) -> torch.Tensor:
        tensor = under.tensor
        self.digests[tensor.name] = tensor.digest()
        values = under.read()
        if not is_finite(values):
            raise InputError(f"{tensor.origin}: {tensor.name}: holds NaN or Inf: repair the base")
        return values

    def _origin(self, update: LazyUpdate) -> str:
        return f"{update.origin or self.label}: {update.name}"
