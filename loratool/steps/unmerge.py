"""unmerge: adapters taken out of a merged model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from loratool.adapter import Adapter
from loratool.checkpoint import Checkpoint
from loratool.errors import InputError, MismatchError, UsageError
from loratool.plugins import Operand, option
from loratool.record import Record, read_record
from loratool.recording import adapter_digests
from loratool.restoring import RestoredCheckpoint, restore
from loratool.steps.merge import Merge, MergedCheckpoint
from loratool.subtraction import subtract


@dataclass(frozen=True)
class Unmerge:
    """Take adapters out of a merged model: to the bit with a record, else approximately.

    A model merged with --reversible carries a record, from which the base's tensors are restored
    bit for bit; with several adapters merged, naming some takes out only these. Without a record,
    name the adapters: they are subtracted, which cannot bring back what rounding lost.
    """

    operands: ClassVar[tuple[Operand, ...]] = (
        Operand("merged", "checkpoint"),
        Operand("adapters", "adapter", many=True, required=False),
        Operand(
            "base",
            "checkpoint",
            required=False,
            flag=True,
            help="without a record: the base to compare the result with",
        ),
    )
    output: ClassVar[str] = "{merged}-unmerged"

    only: tuple[str, ...] = option(
        (), "take out only this adapter, by its name in the record", metavar="NAME"
    )

    def run(
        self,
        merged: Checkpoint,
        adapters: Sequence[tuple[Adapter, float]] = (),
        base: Checkpoint | None = None,
    ) -> Checkpoint:
        """Plan the restored model; nothing is computed yet.

        Raises:
            InputError: there is neither a record nor an adapter, or the record was changed.
            MismatchError: an adapter was not merged, or with another weight.
        """
        record = read_record(merged)
        if record is None:
            if self.only:
                raise InputError(f"{merged.label}: has no record to find --only {self.only[0]} in")
            return subtract(merged, adapters, base)
        if base is not None:
            raise UsageError("--base is for merged models without a record")
        return take_out(merged, record, adapters, self.only)


def take_out(
    merged: Checkpoint,
    record: Record,
    adapters: Sequence[tuple[Adapter, float]],
    only: Sequence[str] = (),
) -> Checkpoint:
    """Restore a base, and merge again, directly into it, what is to stay.

    Goes down through the records of earlier merges until everything that is asked for is found.

    Args:
        merged: the merged model.
        record: its record.
        adapters: which to take out, with their weights; with `only`, or where records keep
            digests only, also where to find the adapters that are to stay.
        only: which to take out, by name. With neither: all of the last merge.

    Raises:
        InputError: the record or the merged model was changed, or an adapter is missing.
        MismatchError: one of them was not merged.
    """
    wanted: list[str | tuple[Adapter, float]] = list(only) or list(adapters)
    given = [adapter for adapter, _ in adapters]
    rest: list[tuple[Adapter, float]] = []
    current, level = merged, record
    while True:
        chosen = {number: item for item in wanted if (number := _position(level, item)) is not None}
        restored = restore(current, level, given)
        taken = range(len(restored.adapters)) if not (only or adapters) else chosen
        rest += [
            (adapter, recorded.weight)
            for number, (adapter, recorded) in enumerate(
                zip(restored.adapters, level.adapters, strict=True)
            )
            if number not in taken
        ]
        wanted = [item for item in wanted if item not in chosen.values()]
        if not wanted:
            return merge_again(restored, rest) if rest else restored
        below = read_record(restored)
        if below is None:
            raise MismatchError(_never_merged(merged, record, wanted[0]))
        current, level = restored, below


def merge_again(
    base: RestoredCheckpoint, adapters: Sequence[tuple[Adapter, float]]
) -> MergedCheckpoint:
    """Merge adapters into a restored base as its record says that it was done before."""
    return Merge(**{**base.source.options, "reversible": True}).merged(base, adapters)


def _position(record: Record, item: str | tuple[Adapter, float]) -> int | None:
    """Where a record has an adapter, given by its name or by itself and its weight.

    A weight of 1, which is also that of an adapter named without one, stands for the recorded one.
    """
    if isinstance(item, str):
        names = [recorded.name for recorded in record.adapters]
        if names.count(item) > 1:
            raise UsageError(f"--only {item}: several adapters have that name: name their paths")
        return names.index(item) if item in names else None
    adapter, weight = item
    digests = adapter_digests(adapter)
    for number, recorded in enumerate(record.adapters):
        if recorded.tensors == digests:
            if weight not in (1.0, recorded.weight):
                raise MismatchError(
                    f"{adapter.label}: was merged with the weight {recorded.weight:g}, not "
                    f"{weight:g}"
                )
            return number
    return None


def _never_merged(merged: Checkpoint, record: Record, item: str | tuple[Adapter, float]) -> str:
    name = item if isinstance(item, str) else item[0].label
    known = ", ".join(f"{adapter.name}={adapter.weight:g}" for adapter in record.adapters)
    return f"{name}: was not merged into {merged.label}; its last merge was of {known}"
