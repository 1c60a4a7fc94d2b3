"""Adapters subtracted from a merged model that carries no record: close, and honest about it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from loratool.adapter import Adapter
from loratool.application import Changes, Part, bind_part, changes_of
from loratool.checkpoint import Checkpoint, LazyTensor
from loratool.errors import InputError, MismatchError
from loratool.kinship import require_distinct
from loratool.reports import Report, Table, counted, format_share
from loratool.updates import KIND_NAMES

if TYPE_CHECKING:
    import torch


@dataclass
class Doubt:
    """How far a subtracted tensor may be from the base's, once it was computed.

    The merge rounded to a unit of the merged weight; where that is larger than the unit of the
    result, the difference is lost. This holds if the merge added the delta and rounded once.

    Attributes:
        elements: their number.
        one: elements that may be off by one unit in the last place.
        more: elements that may be off by more.
        differing: elements that do differ from the base's, where it is at hand.
        farthest: the largest difference in units in the last place, likewise.
    """

    elements: int = 0
    one: int = 0
    more: int = 0
    differing: int | None = None
    farthest: int = 0


@dataclass(frozen=True)
class SubtractedCheckpoint(Checkpoint):
    """A merged model with adapters subtracted while it is read.

    Attributes:
        doubts: tensor -> how far it may be off.
        taken: what was subtracted, for reports.
    """

    doubts: Mapping[str, Doubt] = field(default_factory=dict)
    taken: tuple[str, ...] = ()

    def report(self, target: Path | str) -> Report:
        """What was done, and how good it is; call it after draining."""
        doubts = self.doubts.values()
        elements = max(1, sum(doubt.elements for doubt in doubts))
        one, more = (sum(getattr(d, key) for d in doubts) / elements for key in ("one", "more"))
        lines = [
            f"subtracted: {', '.join(self.taken)}",
            "APPROXIMATE: what rounding lost in the merge is not brought back",
            f"{format_share(one)} of {counted(elements, 'weight')} may be off by one unit in the "
            f"last place, {format_share(more)} by more; none by more than half a unit of the "
            "merged weight, if the merge added the delta and rounded once",
        ]
        data = {
            "kind": "unmerged",
            "exact": False,
            "subtracted": list(self.taken),
            "weights": elements,
            "may_be_off_by_one_unit": one,
            "may_be_off_by_more": more,
            "tensors": {name: vars(doubt) for name, doubt in self.doubts.items()},
        }
        compared = [doubt for doubt in doubts if doubt.differing is not None]
        if compared:
            differing = sum(doubt.differing or 0 for doubt in compared) / elements
            farthest = max(doubt.farthest for doubt in compared)
            lines.append(
                f"against the base: {format_share(differing)} of the weights differ, by up to "
                f"{farthest} units in the last place"
                if differing
                else "against the base: no weight differs"
            )
            data |= {"differing": differing, "farthest_units": farthest}
        rows = tuple(
            (name, format_share(d.one / d.elements), format_share(d.more / d.elements))
            for name, d in self.doubts.items()
            if d.elements
        )
        table = Table(("tensor", "may be off by 1 unit", "by more"), rows)
        return Report(f"Unmerged {target}", data, tuple(lines), table, self.notes)


def subtract(
    merged: Checkpoint, adapters: Sequence[tuple[Adapter, float]], base: Checkpoint | None
) -> SubtractedCheckpoint:
    """Plan merged - delta, rounded once; nothing is computed yet.

    Args:
        merged: a merged model.
        adapters: what was merged, with weights.
        base: to compare the result with.

    Raises:
        InputError: no adapter is named, or the model is quantized.
        MismatchError: an adapter or the base does not fit the merged model.
    """
    if not adapters:
        raise InputError(
            f"{merged.label}: has no record to restore the base from (merge --reversible leaves "
            "one); name the adapter that was merged, to subtract it approximately"
        )
    if merged.quantized:
        raise InputError(
            f"{merged.label}: is quantized, which rounds more than a subtraction can make good: "
            "its base, which the adapters were merged into, is what you want"
        )
    require_distinct([adapter for adapter, _ in adapters])
    parts = [bind_part(adapter, weight, merged) for adapter, weight in adapters]
    tensors: dict[str, LazyTensor] = {}
    doubts: dict[str, Doubt] = {}
    for name, tensor in merged.items():
        changes = changes_of(name, parts) or Changes()
        if fixed := [b.update for b, _ in changes.updates if not b.update.is_linear]:
            raise MismatchError(
                f"{merged.label}: {name}: {KIND_NAMES[fixed[0].kind]}: this kind changes the "
                "base's own weights and cannot be subtracted; only a merge made with --reversible "
                "brings the base back"
            )
        if changes.updates:
            doubts[name] = Doubt()
            other = _counterpart(name, tensor, base)
            tensors[name] = _subtracted(tensor, changes, doubts[name], other)
        else:
            tensors[name] = tensor
    if not doubts:
        raise MismatchError(f"{merged.label}: no tensor has a low-rank update to subtract")
    return SubtractedCheckpoint(
        tensors,
        config=merged.config,
        side_files=merged.side_files,
        shards=merged.shards,
        metadata=merged.metadata,
        components=merged.components,
        notes=(*merged.notes, *_notes(parts)),
        doubts=doubts,
        taken=tuple(f"{part.adapter.label}={part.weight:g}" for part in parts),
    )


def _counterpart(name: str, tensor: LazyTensor, base: Checkpoint | None) -> LazyTensor | None:
    if base is None:
        return None
    other = base.get(name)
    if other is None or (other.shape, other.dtype) != (tensor.shape, tensor.dtype):
        found = "missing" if other is None else f"{other.dtype} {other.shape}"
        raise MismatchError(
            f"{base.label}: {name}: cannot be compared: {tensor.dtype} {tensor.shape} expected, "
            f"{found} found"
        )
    return other


def _notes(parts: Sequence[Part]) -> list[str]:
    notes = []
    for part in parts:
        changed = part.binding.changed.values()
        whole = [bound.tensor for bound in changed if bound.update.is_whole]
        if whole:
            notes.append(
                f"{part.adapter.label}: {counted(len(whole), 'tensor')} that it replaced whole "
                f"({whole[0]}, ...) cannot be subtracted and stay as they are"
            )
    return notes


def _subtracted(
    tensor: LazyTensor, changes: Changes, doubt: Doubt, base: LazyTensor | None
) -> LazyTensor:
    def blocks() -> Iterator[torch.Tensor]:
        from loratool.merging import subtracted_tiles, tile_elements
        from loratool.residual import Drops, bit_patterns, distance

        merged = tensor.read()
        delta = changes.load_delta(tensor)
        if delta is None:
            yield merged
            return
        values = None if base is None else base.read().view(delta.shape)
        drops = Drops(tensor.dtype, tile_elements(delta.shape))
        doubt.elements, doubt.one, doubt.more, doubt.farthest = merged.numel(), 0, 0, 0
        doubt.differing = None if values is None else 0
        row = 0
        for tile, result in subtracted_tiles(merged, delta, tensor.dtype):
            _, sizes = drops.find(bit_patterns(tile), bit_patterns(result))
            doubt.one += int((sizes == 1).sum())
            doubt.more += int((sizes > 1).sum())
            if values is not None:
                away = distance(values[row : row + len(result)], result)
                doubt.differing = (doubt.differing or 0) + int((away != 0).sum())
                doubt.farthest = max(doubt.farthest, int(away.max(initial=0)))
            row += len(result)
            yield result

    return LazyTensor(tensor.name, tensor.dtype, tensor.shape, blocks, tensor.origin)
