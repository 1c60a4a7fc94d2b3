"""The updates of a stack as they will be: kinds, types, shapes and ranks, from headers."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from loratool.adapter import LazyUpdate
from loratool.checkpoint import LazyTensor
from loratool.dtypes import FLOAT_NAMES, itemsize
from loratool.errors import MismatchError
from loratool.stack_kinds import Share, is_vector, widest
from loratool.stack_plan import StackPlan
from loratool.updates import Experts, Kind, LowRank, Sparse, matrix_shape

if TYPE_CHECKING:
    from loratool.stacking import Stacker


@dataclass(frozen=True)
class Dtypes:
    """The types of the results.

    Attributes:
        factors: of A and B.
        vectors: of the deltas of biases.
        notes: why factors are wider than the adapters', if they are.
    """

    factors: str
    vectors: str
    notes: tuple[str, ...] = ()


def dtypes_of(plan: StackPlan, stacker: Stacker, asked: str | None) -> Dtypes:
    """The types of factors and vectors: as asked, or wide enough for an exact sum.

    Args:
        plan: what is stacked.
        stacker: how.
        asked: safetensors name of the type that was asked for.
    """
    if asked is not None:
        return Dtypes(asked, asked)
    every = {share.update.dtype for shares in plan.shares.values() for share in shares
             if is_vector(share.update)}  # fmt: skip
    vectors = "F64" if "F64" in every else "F32"  # a sum of 16-bit numbers has more bits
    dtypes = {share.update.dtype for _, shares in plan.factored() for share in shares}
    if len(dtypes) != 1:
        return Dtypes("F64" if "F64" in dtypes else "F32", vectors)
    common = dtypes.pop()
    if itemsize(common) >= 4:
        return Dtypes(common, vectors)
    if stacker.policy is not None or not getattr(stacker.combiner, "exact", False):
        return Dtypes(common if itemsize(common) == 2 else "F32", vectors)
    inexact = next((n for n, shares in plan.factored() if not _folds_exactly(plan, shares)), None)
    if inexact is None:
        return Dtypes(common, vectors)
    note = (
        f"the weights times the scales are not powers of two apart ({inexact}, ...): factors are "
        f"written in fp32 to keep the sum exact; --dtype {_typed(common)} rounds them"
    )
    return Dtypes("F32", vectors, (note,))


def _typed(dtype: str) -> str:
    return next(text for text, name in FLOAT_NAMES.items() if name == dtype)


def _folds_exactly(plan: StackPlan, shares: Sequence[Share]) -> bool:
    """Whether all weights times scales are one number times powers of two."""
    if len(shares) == 1:
        return True
    factors = []
    for share in shares:
        if plan.adapters[share.number].path is None:
            return False  # only computing it would tell its scale
        found = share.update.load()  # maps the factors, reads none
        found = found.added if isinstance(found, Sparse) else found
        if isinstance(found, LowRank | Experts) and found.scale != 0:
            factors.append(abs(share.weight * found.scale))
    return all(math.frexp(factor / min(factors))[0] == 0.5 for factor in factors)


def combined_updates(
    plan: StackPlan, stacker: Stacker, dtypes: Dtypes, context: dict[str, LazyTensor]
) -> dict[str, LazyUpdate]:
    """One update for each tensor, computed when it is loaded.

    Args:
        plan: what is stacked.
        stacker: how.
        dtypes: of the results.
        context: gets the values of what is replaced whole, as they are loaded.

    Raises:
        MismatchError: the combiner needs equal ranks, and two differ; or it is no sum, and there
            are single entries.
    """
    return {
        name: _combined(name, shares, stacker, dtypes, context)
        for name, shares in plan.shares.items()
    }


def _combined(
    name: str,
    shares: Sequence[Share],
    stacker: Stacker,
    dtypes: Dtypes,
    context: dict[str, LazyTensor],
) -> LazyUpdate:
    first = shares[0].update
    match first.kind:
        case "replacement":
            load = _later(lambda stacking: stacking.replacement(name, shares, context))
            return LazyUpdate(name, first.kind, first.shape, first.dtype, load, origin=first.origin)
        case "rows":
            return _rows(name, shares)
        case "dense":
            dtype = dtypes.vectors
            return LazyUpdate(
                name,
                first.kind,
                first.shape,
                dtype,
                lambda: stacker.combine_vectors(name, shares, dtype),
            )
    kind = _factored_kind(stacker, name, shares)
    wide = "F64" if dtypes.factors == "F64" else dtypes.vectors
    return LazyUpdate(
        name,
        kind,
        widest(shares),
        dtypes.factors,
        lambda: stacker.combine(name, shares, dtypes.factors, wide),
        rank=_rank(stacker, name, shares),
        transposed=_transposed(shares),
        beneath=next((s.update.beneath for s in shares if s.update.beneath), None),
        embedding=any(share.update.embedding for share in shares),
    )


def _factored_kind(stacker: Stacker, name: str, shares: Sequence[Share]) -> Kind:
    """The kind of the result of updates with factors.

    Raises:
        MismatchError: there are single entries beside factors, and the combiner is no sum.
    """
    entries = next((share for share in shares if share.update.kind == "sparse"), None)
    if entries is None:
        return shares[0].update.kind
    if not getattr(stacker.combiner, "exact", False):
        raise MismatchError(
            f"{name}: {entries.label} has single entries beside its factors, which only a sum "
            "(--combiner total) can take: make plain LoRA of it first (`loratool convert "
            "--to-lora`)"
        )
    return "sparse"


def _later(task: Callable[[Any], Any]) -> Callable[[], Any]:
    """A task for `loratool.stacking`, which is imported only when it is done."""

    def load() -> Any:
        from loratool import stacking

        return task(stacking)

    return load


def _rows(name: str, shares: Sequence[Share]) -> LazyUpdate:
    """The rows of all together."""
    first = shares[0].update
    found = {share.update.dtype for share in shares}
    wide = "F64" if "F64" in found else "F32"
    dtype = found.pop() if len(found) == 1 else wide
    indices = tuple(row for share in shares for row in share.update.rows)
    shape = (sum(share.update.shape[0] for share in shares), *first.shape[1:])
    load = _later(lambda stacking: stacking.rows(name, shares, dtype))
    return LazyUpdate(name, "rows", shape, dtype, load, rows=indices, embedding=first.embedding)


def _rank(stacker: Stacker, name: str, shares: Sequence[Share]) -> int | None:
    """The largest rank that the result may have, where headers tell it.

    Raises:
        MismatchError: the combiner needs equal ranks, and two differ.
    """
    known = [(share, share.update.rank) for share in shares if share.update.rank is not None]
    equal = getattr(stacker.combiner, "needs_equal_ranks", False)
    if equal and known:
        one, rank = known[0]
        for other, other_rank in known[1:]:
            if other_rank != rank:
                raise MismatchError(
                    f"{name}: {one.label} has rank {rank} and {other.label} rank {other_rank}; "
                    "on=factors needs equal ranks: use on=deltas"
                )
    if len(known) < len(shares):
        return None
    largest = known[0][1] if equal else sum(rank for _, rank in known)
    shape = shares[0].update.shape
    matrix = matrix_shape(shape[1:] if shares[0].update.kind == "experts" else shape)
    if stacker.policy is not None:
        return min(largest, stacker.policy.limit(matrix))
    is_sum = getattr(stacker.combiner, "exact", False) or equal
    return largest if is_sum else min(largest, *matrix)


def _transposed(shares: Sequence[Share]) -> bool | None:
    """Whether the base stores the weight as (in, out), if one of the adapters knows."""
    known = [s.update.transposed for s in shares if s.update.transposed is not None]
    return any(known) if known else None
