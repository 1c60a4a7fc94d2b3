"""From several updates of one tensor to one: everything of a stack that touches values."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch

from loratool.checkpoint import LazyTensor
from loratool.deltas import summed_entries
from loratool.dtypes import torch_dtype
from loratool.errors import InputError, MismatchError
from loratool.experts import gathered, matrices
from loratool.interference import Collector
from loratool.kinship import same_bytes
from loratool.linalg import Factorizer, RankPolicy, is_finite, named_generator
from loratool.lowrank import rounded_factors, weighted
from loratool.plugins import Combiner
from loratool.stack_kinds import Share, different_replacements
from loratool.updates import Dense, Experts, LowRank, Replacement, Rows, Sparse, tensors_of


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

    def combine(
        self, name: str, shares: Sequence[Share], dtype: str, entries: str
    ) -> LowRank | Sparse | Experts | None:
        """One update of several with factors; None if none changes.

        Experts are combined one by one, and get one rank. Single entries are added up.

        Args:
            name: of the tensor.
            shares: of adapters that change it.
            dtype: safetensors dtype of the factors.
            entries: of single entries beside them.

        Raises:
            InputError: NaN or Inf in a factor, or a result that overflows `dtype`.
        """
        present = [(share, found) for share in shares if (found := _factors(share)) is not None]
        if not present:
            return None
        split = [matrices(_factors_of(found)) for _, found in present]
        weights = [share.weight for share, _ in present]
        self.interference.add(
            name,
            {
                share.number: [weighted(part, share.weight) for part in parts]
                for (share, _), parts in zip(present, split, strict=True)
            },
        )
        if not isinstance(present[0][1], Experts):
            whole = self._combined(name, name, [parts[0] for parts in split], weights, dtype)
            sparse = [(u, share.weight) for share, u in present if isinstance(u, Sparse)]
            return _with_entries(name, whole, sparse, entries) if sparse else whole
        experts = [
            self._combined(name, f"{name}[{number}]", parts, weights, dtype)
            for number, parts in enumerate(zip(*split, strict=True))
        ]
        return gathered(experts)

    def _combined(
        self, name: str, stream: str, parts: Sequence[LowRank], weights: list[float], dtype: str
    ) -> LowRank:
        """One matrix of several; `stream` names its random numbers."""
        generator = named_generator(self.seed, stream)
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

    def combine_vectors(self, name: str, shares: Sequence[Share], dtype: str) -> Dense | None:
        """One delta of a vector (a bias) of several; None if none changes.

        Raises:
            InputError: NaN or Inf in one, or a result that overflows `dtype`.
        """
        present = [(share, found) for share in shares if (found := _vector(share)) is not None]
        if not present:
            return None
        vectors = [found.values.double() * found.scale for _, found in present]
        weights = [share.weight for share, _ in present]
        if (combine := getattr(self.combiner, "combine_vectors", None)) is not None:
            total = combine(vectors, weights, named_generator(self.seed, name))
        else:
            total = sum(w * vector for w, vector in zip(weights, vectors, strict=True))
        values = total.to(torch_dtype(dtype))
        if not is_finite(values):
            raise InputError(f"{name}: overflows {dtype}; choose a wider --dtype")
        return Dense(values)


def _with_entries(
    name: str, added: LowRank, sparse: Sequence[tuple[Sparse, float]], dtype: str
) -> Sparse:
    """A low-rank update with the weighted sum of the single entries of several updates."""
    positions, total = summed_entries(sparse)
    values = total.to(torch_dtype(dtype))
    if not is_finite(values):
        raise InputError(f"{name}: the single entries overflow {dtype}; choose a wider --dtype")
    return Sparse(added, positions, values, certificate=added.certificate)


def _factors_of(update: LowRank | Sparse | Experts) -> LowRank | Experts:
    return update.added if isinstance(update, Sparse) else update


def _factors(share: Share) -> LowRank | Sparse | Experts | None:
    found = share.update.load()
    if not isinstance(found, LowRank | Sparse | Experts):
        return None
    _require_finite(share, found)
    return found


def _vector(share: Share) -> Dense | None:
    found = share.update.load()
    if not isinstance(found, Dense):
        return None
    _require_finite(share, found)
    return found


def _require_finite(share: Share, update: LowRank | Sparse | Experts | Dense) -> None:
    for part, values in tensors_of(update):
        if not _holds_finite(values):
            origin = share.update.origin or share.label
            raise InputError(
                f"{origin}: {share.update.name}: {part} holds NaN or Inf: repair the adapter"
            )


def _holds_finite(factor: torch.Tensor) -> bool:
    """Whether a factor holds neither NaN nor Inf: both come through a sum, in one quick pass."""
    quick = factor.itemsize in (2, 4)  # sums of these cannot overflow fp64
    if quick and math.isfinite(float(factor.sum(dtype=torch.float64))):
        return True
    return is_finite(factor)


def rows(name: str, shares: Sequence[Share], dtype: str) -> Rows | None:
    """The rows of all shares together, which are different ones; None if there are none."""
    found = [rows for share in shares if isinstance(rows := share.update.load(), Rows)]
    if not found:
        return None
    kind = torch_dtype(dtype)

    def blocks() -> Iterator[torch.Tensor]:
        for part in found:
            for block in part.tensor.blocks():
                yield block.to(kind)

    indices = tuple(index for part in found for index in part.indices)
    shape = (len(indices), *found[0].tensor.shape[1:])
    origin = found[0].tensor.origin
    return Rows(indices, LazyTensor(name, dtype, shape, blocks, origin))


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
            raise MismatchError(f"{name}: {different_replacements(name, chosen[0], share)}")
    if chosen is None:
        return None
    context[name] = chosen[1].tensor.renamed(name)
    return chosen[1]


def _same_tensor(one: LazyTensor, other: LazyTensor) -> bool:
    return one.dtype == other.dtype and one.shape == other.shape and same_bytes(one, other)
