"""Adapters applied to the tensors of a base, lazily: what a merge does to each tensor."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from loratool.adapter import Adapter, FormatOptions
from loratool.binding import Binding, BoundUpdate, bind
from loratool.checkpoint import Checkpoint, LazyTensor
from loratool.dtypes import is_float
from loratool.errors import InputError, MismatchError, UsageError, raise_problems
from loratool.linalg import is_finite, named_generator, same_values
from loratool.updates import KIND_NAMES, Added, DoRA, Replacement, Rows, tensors_of

if TYPE_CHECKING:
    import torch

    from loratool.deltas import Delta
    from loratool.merging import Survival
    from loratool.reversal import WayBack
    from loratool.rounding import SumRounder


@dataclass(frozen=True)
class Part:
    """An adapter bound to a base, and its weight."""

    adapter: Adapter
    weight: float
    binding: Binding

    def notes(self) -> list[str]:
        """What the user should know of how this adapter is applied."""
        notes = [*self.adapter.notes]
        notes += [str(p) for p in self.binding.problems if p.severity == "warning"]
        if words := self.binding.alignment.describe():
            notes.append(f"{self.adapter.label}: {words} to get the base's")
        whole = [b for b in self.binding.changed.values() if b.update.is_whole]
        if whole and self.weight != 1:
            notes.append(
                f"{self.adapter.label}: {len(whole)} tensors are replaced whole "
                f"({whole[0].tensor}, ...): the weight {self.weight:g} does not scale these"
            )
        return notes


def bind_part(adapter: Adapter, weight: float, base: Checkpoint) -> Part:
    """Bind an adapter.

    Raises:
        MismatchError: it does not fit; all complaints at once.
        UsageError: the weight is not finite.
    """
    if not math.isfinite(weight):
        raise UsageError(f"{adapter.label}: the weight must be finite, not {weight}")
    fixed = [u for u in adapter.values() if not u.is_linear and not u.is_whole]
    if fixed and weight != 1:
        raise UsageError(
            f"{adapter.label}: {fixed[0].name}: {KIND_NAMES[fixed[0].kind]}: this kind cannot be "
            f"scaled, so the weight {weight:g} means nothing: merge it with 1, or make plain LoRA "
            "of it first (loratool convert --to-lora)"
        )
    adapter = adapter.reread(FormatOptions(base=base))
    binding = bind(adapter, base)
    raise_problems(f"{adapter.label} does not fit {base.label}:", binding.problems)
    return Part(adapter, weight, binding)


@dataclass(frozen=True)
class Rounding:
    """How sums are rounded.

    Attributes:
        mode: "nearest", ties to even, or "stochastic".
        seed: of the random numbers of the latter.
    """

    mode: str = "nearest"
    seed: int = 0

    def rounder(self, dtype: str, name: str, elements: int) -> SumRounder:
        """A rounder for one tensor."""
        from loratool.rounding import Nearest, Stochastic

        if self.mode == "stochastic":
            return Stochastic(dtype, named_generator(self.seed, name))
        return Nearest(dtype, elements)


@dataclass(frozen=True)
class Changes:
    """What adapters do to one tensor of the base.

    Attributes:
        whole: what replaces it first, if anything.
        rows: what replaces some of its rows, after that.
        updates: what is added to it, with their adapters' weights.
    """

    whole: BoundUpdate | None = None
    rows: tuple[BoundUpdate, ...] = ()
    updates: tuple[tuple[BoundUpdate, float], ...] = ()

    @property
    def can_be_subtracted(self) -> bool:
        """Whether the base comes back by subtracting the updates again, but for rounding."""
        linear = all(bound.update.is_linear for bound, _ in self.updates)
        return linear and self.whole is None and not self.rows

    def load_delta(self, beneath: LazyTensor) -> Delta | None:
        """The sum of the updates, or None where there is nothing to add.

        Args:
            beneath: the tensor that they are added to.

        Raises:
            InputError: NaN or Inf in an update; or an adapter holds a copy of the tensor that it
                was trained on, and that is another one.
        """
        from loratool.deltas import delta_of

        parts: list[tuple[Added, float]] = []
        for bound, weight in self.updates:
            if (found := load_added(bound)) is not None:
                _require_same_beneath(bound, beneath)
                parts.append((found, weight))
        if not parts:
            return None
        by_column = any(isinstance(u, DoRA) and u.axis for u, _ in parts)
        return delta_of(parts, beneath.shape, beneath.read() if by_column else None)


def load_added(bound: BoundUpdate) -> Added | None:
    """What an update adds to its tensor, as the base stores it; None if nothing after all.

    Raises:
        InputError: NaN or Inf in it.
    """
    found = bound.update.load()
    if found is None or isinstance(found, Rows | Replacement):
        return None
    for part, values in tensors_of(found):
        if not is_finite(values):
            raise _not_finite(bound, f"{part} holds")
    return found.transposed() if bound.transposed else found


def changes_of(name: str, parts: Sequence[Part]) -> Changes | None:
    """What the parts do to a base tensor; None if they leave it out.

    Raises:
        MismatchError: two of them replace it whole.
    """
    found = [(p.binding.changed[name], p) for p in parts if name in p.binding.changed]
    if not found and any(name in part.binding.dropped for part in parts):
        return None
    whole = [(bound, part) for bound, part in found if bound.update.kind == "replacement"]
    if len(whole) > 1:
        labels = " and ".join(part.adapter.label for _, part in whole)
        raise MismatchError(f"{name}: {labels} both replace it whole: merge one of them")
    rows = tuple(bound for bound, _ in found if bound.update.kind == "rows")
    _require_different_rows(name, [part for bound, part in found if bound in rows], rows)
    updates = tuple((b, p.weight) for b, p in found if not b.update.is_whole)
    return Changes(whole[0][0] if whole else None, rows, updates)


@dataclass
class Trace:
    """What one tensor's merge leaves behind, once it was computed.

    Attributes:
        survival: how much of the update survived rounding.
        way: how to undo it; only of a reversible merge, and until the record has it.
        residual_bytes: size of the coded residual.
        kept: values that were NaN or Inf, or became so, and are in the merged model.
    """

    survival: Survival
    way: WayBack | None = None
    residual_bytes: int = 0
    kept: int = 0


@dataclass(frozen=True)
class Applied:
    """The tensors of a merged model, and what each leaves behind.

    Attributes:
        tensors: the base's name, or the name of an added tensor -> the merged tensor.
        changes: base tensor -> what is done to it; without those that are left out.
        traces: base tensor -> what its merge leaves behind, for those with low-rank updates.
    """

    tensors: Mapping[str, LazyTensor]
    changes: Mapping[str, Changes]
    traces: Mapping[str, Trace] = field(default_factory=dict)


def apply_parts(
    base: Checkpoint,
    parts: Sequence[Part],
    dtype: str | None,
    rounding: Rounding,
    reversible: bool,
) -> Applied:
    """Plan every tensor of a merged model; nothing is computed yet.

    Args:
        base: the base.
        parts: adapters bound to it, in any order.
        dtype: of all float tensors, or None for the types that the base is written in.
        rounding: how sums are rounded.
        reversible: whether each merge leaves its way back.

    Raises:
        MismatchError: two adapters replace or add the same tensor.
    """
    from loratool.merging import Survival

    tensors: dict[str, LazyTensor] = {}
    changes: dict[str, Changes] = {}
    traces: dict[str, Trace] = {}
    for name, tensor in base.items():
        if (change := changes_of(name, parts)) is None:
            continue
        changes[name] = change
        target = dtype if dtype and is_float(tensor.dtype) else base.written_dtype(name)
        start = tensor if change.whole is None else _replaced(change.whole, name, tensor)
        if change.rows:
            start = with_rows(start, change.rows)
        if change.updates:
            trace = traces[name] = Trace(Survival())
            undo = reversible and change.can_be_subtracted
            tensors[name] = _updated(start, change, target, rounding, trace, undo)
        else:
            tensors[name] = _as_dtype(start, target)
    for part in parts:
        for name, bound in part.binding.added.items():
            if name in tensors:
                raise MismatchError(f"{name}: two adapters add it: merge one of them")
            tensors[name] = _added(bound, base, dtype)
    return Applied(tensors, changes, traces)


def _updated(
    tensor: LazyTensor,
    change: Changes,
    dtype: str,
    rounding: Rounding,
    trace: Trace,
    undo: bool,
) -> LazyTensor:
    def blocks() -> Iterator[torch.Tensor]:
        from loratool.merging import merged_blocks, tile_elements
        from loratool.reversal import Reversal
        from loratool.rounding import rounded_blocks

        name = f"{tensor.origin}: {tensor.name}"
        trace.survival.kept = trace.survival.wanted = 0.0
        delta = change.load_delta(tensor)
        weight = tensor.read()
        if delta is not None:
            columns = delta.shape[1]
            witness = Reversal(dtype, tensor.shape, columns) if undo else None
            rounder = rounding.rounder(dtype, tensor.name, tile_elements(delta.shape))
            yield from merged_blocks(weight, delta, dtype, trace.survival, name, rounder, witness)
            if witness is not None:
                trace.way = witness.finish()
                trace.kept = trace.way.kept
                trace.residual_bytes = len(trace.way.residual)
        elif dtype == tensor.dtype:
            yield weight
        else:
            yield from rounded_blocks(weight, dtype, name)

    return LazyTensor(tensor.name, dtype, tensor.shape, blocks, tensor.origin)


def _replaced(bound: BoundUpdate, name: str, before: LazyTensor | None) -> LazyTensor:
    """The replacement under the base's name, in the dtype of what it replaces."""

    def blocks() -> Iterator[torch.Tensor]:
        found = bound.update.load()
        if isinstance(found, Replacement):
            yield from _finite_blocks(found.tensor, bound)
        elif before is not None:  # an extraction found it unchanged
            yield from before.blocks()

    update = bound.update
    lazy = LazyTensor(name, update.dtype, update.shape, blocks, update.origin)
    return lazy if before is None else _as_dtype(lazy, before.dtype)


def with_rows(tensor: LazyTensor, bounds: Sequence[BoundUpdate]) -> LazyTensor:
    """A table with some of its rows replaced, in its own type."""

    def blocks() -> Iterator[torch.Tensor]:
        import torch

        from loratool.linalg import tiles
        from loratool.rounding import TILE_ELEMENTS, rounded_blocks

        new: dict[int, torch.Tensor] = {}
        for bound in bounds:
            found = bound.update.load()
            if isinstance(found, Rows):
                values = torch.cat(list(_finite_blocks(found.tensor, bound)))
                rounded = rounded_blocks(values, tensor.dtype, f"{found.tensor.origin}: rows")
                kept = torch.cat([block.flatten().clone() for block in rounded])
                new |= dict(zip(found.indices, kept.view(values.shape), strict=True))
        table = tensor.read()
        for rows in tiles(table, TILE_ELEMENTS):
            tile = table[rows]
            inside = [row for row in new if rows.start <= row < rows.start + len(tile)]
            if inside:
                tile = tile.clone()
            for row in inside:
                tile[row - rows.start] = new[row]
            yield tile

    return LazyTensor(tensor.name, tensor.dtype, tensor.shape, blocks, tensor.origin)


def _require_different_rows(
    name: str, parts: Sequence[Part], bounds: Sequence[BoundUpdate]
) -> None:
    owners: dict[int, Part] = {}
    for part, bound in zip(parts, bounds, strict=True):
        for row in bound.update.rows:
            if (other := owners.setdefault(row, part)) is not part:
                raise MismatchError(
                    f"{name}: {other.adapter.label} and {part.adapter.label} both replace row "
                    f"{row}: merge one of them"
                )


def _added(bound: BoundUpdate, base: Checkpoint, dtype: str | None) -> LazyTensor:
    lazy = _replaced(bound, bound.tensor, None)
    return _as_dtype(lazy, dtype or _main_dtype(base) or lazy.dtype)


def _main_dtype(base: Checkpoint) -> str | None:
    """The float dtype that most of the base's elements are written in."""
    sizes: dict[str, int] = {}
    for name, tensor in base.items():
        if is_float(tensor.dtype):
            dtype = base.written_dtype(name)
            sizes[dtype] = sizes.get(dtype, 0) + tensor.numel
    return max(sizes, key=lambda name: sizes[name]) if sizes else None


def _as_dtype(tensor: LazyTensor, dtype: str) -> LazyTensor:
    """The tensor itself if it has the dtype or is no float, else rounded to it tile by tile."""
    if tensor.dtype == dtype or not is_float(tensor.dtype):
        return tensor

    def blocks() -> Iterator[torch.Tensor]:
        from loratool.rounding import rounded_blocks

        for block in tensor.blocks():
            yield from rounded_blocks(block, dtype, f"{tensor.origin}: {tensor.name}")

    return LazyTensor(tensor.name, dtype, tensor.shape, blocks, tensor.origin)


def _require_same_beneath(bound: BoundUpdate, base: LazyTensor) -> None:
    copy = bound.update.beneath
    if copy is None:
        return
    if copy.shape != base.shape or not same_values(copy.read(), base.read()):
        raise InputError(
            f"{copy.origin}: {copy.name}: the adapter's copy of the layer that its factors are "
            f"added to differs from {base.origin}: {base.name}; loratool cannot merge both"
        )


def _finite_blocks(tensor: LazyTensor, bound: BoundUpdate) -> Iterator[torch.Tensor]:
    """A replacement's blocks; InputError if one holds NaN or Inf."""
    for block in tensor.blocks():
        if not is_finite(block):
            raise _not_finite(bound, "holds")
        yield block


def _not_finite(bound: BoundUpdate, what: str) -> InputError:
    origin = bound.update.origin or "the adapter"
    return InputError(f"{origin}: {bound.update.name}: {what} NaN or Inf: repair the adapter")
