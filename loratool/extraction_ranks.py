"""Extractions whose ranks depend on more than one matrix, or are several.

Everything here plans by headers; values are touched when the plans are drained.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

from loratool import plugins
from loratool.adapter import Adapter, LazyUpdate
from loratool.errors import InputError
from loratool.ladder import Ladder
from loratool.pairing import Pair
from loratool.rank_options import RankOptions
from loratool.reports import counted, format_bytes, listed

if TYPE_CHECKING:
    from loratool.delta import DeltaReader
    from loratool.gathering import Budget, Gathering

Updates = Mapping[str, LazyUpdate]
# Makes the adapter of low-rank updates, of what is kept whole, and of what was asked for.
Build = Callable[[Updates, Updates, Mapping[str, Any]], Adapter]


def ladder(
    pair: Pair,
    reader: DeltaReader,
    low_rank: Updates,
    whole: Updates,
    options: RankOptions,
    build: Build,
) -> Ladder:
    """One adapter for each rank that is asked for, all from the factors of the largest."""
    gathering = _gathering(pair, reader, low_rank, whole, options)
    kept = _kept(gathering)

    def factors(rank: int) -> Updates:
        return {
            name: replace(
                update,
                rank=min(rank, gathering.target(name).cap),
                load=partial(gathering.update, name, rank),
            )
            for name, update in low_rank.items()
        }

    adapters = {
        rank: build(factors(rank), kept, {**options.facts(), "rank": rank})
        for rank in options.ladder
    }
    return Ladder({rank: replace(a, gathered=gathering) for rank, a in adapters.items()})


def within_budget(
    pair: Pair,
    reader: DeltaReader,
    low_rank: Updates,
    whole: Updates,
    options: RankOptions,
    build: Build,
) -> Adapter:
    """The adapter that captures most in the bytes that are asked for.

    Raises:
        InputError: they do not suffice for one rank of every update, as far as headers tell.
    """
    from loratool.gathering import Budget

    size = options.budget_bytes or 0
    gathering = _gathering(pair, reader, low_rank, whole, options)

    def whole_bytes(targets: Sequence[str], kept: Sequence[str]) -> int:
        return _whole_bytes(adapter, targets, [name for name in kept if name in adapter])

    label = pair.finetuned.label
    budget = Budget(gathering, size, whole_bytes, options.weigh == "relative", label)
    updates = {
        name: replace(update, rank=None, load=partial(budget.update, name))
        for name, update in low_rank.items()
    }
    adapter = build(updates, _kept(gathering), options.facts())
    _check_budget(pair, gathering, list(low_rank), size, whole_bytes, label)
    before, facts = adapter.provenance, adapter.facts
    provenance = replace(
        before,
        lines=lambda: (*before.lines(), *_budget_lines(budget, options)),
        lost=lambda: before.lost() + sum(budget.left_out.values()),
        skipped="without an update",
    )
    return replace(
        adapter,
        gathered=gathering,
        provenance=provenance,
        facts=lambda: {**facts(), "budget": _budget_facts(budget)},
    )


def _gathering(
    pair: Pair, reader: DeltaReader, low_rank: Updates, whole: Updates, options: RankOptions
) -> Gathering:
    from loratool.gathering import Gathering, target_of

    sources = list(pair.tied_tables().values())
    targets = [
        target_of(
            change,
            low_rank[change.name],
            reader,
            options.policy,
            1 + sources.count(change.name),
            options.budget_bytes,
        )
        for change in pair.changes()
        if change.name in low_rank
    ]
    return Gathering(targets, whole)


def _kept(gathering: Gathering) -> Updates:
    """What is kept whole, looked at once however many adapters hold it."""
    return {
        name: replace(update, load=partial(gathering.replacement, name))
        for name, update in gathering.whole.items()
    }


def _check_budget(
    pair: Pair,
    gathering: Gathering,
    targets: Sequence[str],
    size: int,
    whole_bytes: Callable[[Sequence[str], Sequence[str]], int],
    label: str,
) -> None:
    """Raise InputError if headers show that a budget is too small."""
    least = sum(gathering.target(name).cost for name in targets)
    if size < least:
        raise InputError(
            f"{label}: a budget of {format_bytes(size)} is too small: rank 1 of all "
            f"{counted(len(targets), 'target')} takes {format_bytes(least)}; raise it, or choose "
            "fewer with --target and --exclude"
        )
    changes = {change.name: change for change in pair.changes()}
    certain = [
        name
        for name, change in changes.items()
        if name in gathering.whole
        and (change.before is None or change.before.shape != change.after.shape)
    ]
    kept = whole_bytes(targets, certain)
    if size < least + kept:
        raise InputError(
            f"{label}: a budget of {format_bytes(size)} is too small: {format_bytes(kept)} are "
            f"for what the base lacks, or has in another shape ({listed(certain, 3)}), and rank 1 "
            f"of all {counted(len(targets), 'target')} takes {format_bytes(least)}; --lora-only "
            "leaves the former out"
        )


def _whole_bytes(adapter: Adapter, targets: Sequence[str], kept: Sequence[str]) -> int:
    """Bytes of what the adapter's format stores besides factors."""
    writer = plugins.create("adapter_formats", adapter.format)
    told = getattr(writer, "whole_bytes", None)
    if told is not None:
        return int(told(adapter, targets, kept))
    return sum(adapter[name].nbytes for name in kept)


def _budget_lines(budget: Budget, options: RankOptions) -> tuple[str, ...]:
    """What the report adds, after draining."""
    kept = f", kept whole: {format_bytes(budget.kept)}" if budget.kept else ""
    allowed = format_bytes(budget.size)
    lines = [f"factors: {format_bytes(budget.spent)}{kept}, of the {allowed} allowed"]
    if budget.left_out:
        lines.append(
            f"{counted(len(budget.left_out), 'update')} left out, since the budget captures more "
            f"elsewhere: {listed(sorted(budget.left_out), 3)}"
        )
    cap = options.policy.rank
    if options.max_rank is None and options.rank is None and budget.exhausted:
        capped = [n for n in budget.exhausted if budget.gathering.target(n).cap == cap]
        if capped:
            lines.append(
                f"{counted(len(capped), 'update')} of rank {cap}, the largest that was looked at: "
                "--max-rank allows more"
            )
    return tuple(lines)


def _budget_facts(budget: Budget) -> dict[str, Any]:
    """For the manifest; call it after draining."""
    return {
        "bytes": budget.size,
        "factors": budget.spent,
        "kept_whole": budget.kept,
        "left_out": {name: total**0.5 for name, total in sorted(budget.left_out.items())},
    }
