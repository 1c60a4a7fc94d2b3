"""Adapters of several ranks, from one pass over both models."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from loratool import plugins
from loratool.adapter import Adapter
from loratool.engine import (
    Drain,
    needed_bytes,
    no_progress,
    single_threaded_tasks,
    write_adapter,
    writer_for,
)
from loratool.places import atomic_directory
from loratool.reports import Report, Table, format_bytes, format_share


def folder_name(rank: int) -> str:
    """The directory of one adapter below that of all."""
    return f"rank-{rank}"


@dataclass(frozen=True)
class Ladder:
    """One adapter for each rank; what they have in common is computed once.

    Attributes:
        adapters: rank -> adapter, lazy; each can be used by itself.
    """

    adapters: Mapping[int, Adapter]

    def write(self, target: Path, drain: Drain) -> Report:
        """Compute all adapters and write them below `target`, all of them or none.

        Raises:
            MismatchError: the format cannot hold all of them; nothing was computed.
            InputError: nothing differs, or a tensor holds NaN or Inf.
            OutputError: the output place is taken or too small.
        """
        largest = self.adapters[max(self.adapters)]
        writers = {rank: writer_for(adapter, None) for rank, adapter in self.adapters.items()}
        executor = plugins.create("executors", drain.executor)
        kept = 0 if largest.gathered is None else largest.gathered.disk_bytes
        needed = kept + sum(needed_bytes(adapter) - kept for adapter in self.adapters.values())
        with atomic_directory(target, drain.overwrite, needed) as folder:
            updates = [*largest.values(), *largest.left_out.values()]
            drain.start(largest.provenance.doing, sum(update.nbytes for update in updates))
            reports = {}
            with largest.while_drained(), single_threaded_tasks(drain.alone):
                if largest.gathered is not None:
                    largest.gathered.gather(folder, executor, drain.progress)
                for rank, adapter in self.adapters.items():
                    name, writer = folder_name(rank), writers[rank]
                    (place := folder / name).mkdir()
                    reports[rank] = write_adapter(
                        adapter, writer, place, target / name, executor, no_progress
                    )
        return _together(target, largest, reports)


def _together(target: Path, adapter: Adapter, reports: Mapping[int, Report]) -> Report:
    """One report of all adapters, a row for each; their details are in their manifests."""
    rows = []
    for rank, report in reports.items():
        totals = report.data["tensors"].values()
        shares = [tensor["energy"] for tensor in totals if "energy" in tensor]
        energy = format_share(report.data["totals"]["energy"]) if shares else ""
        lowest = format_share(min(shares)) if shares else ""
        size = format_bytes(report.data["totals"]["bytes"])
        rows.append((str(rank), energy, lowest, size, folder_name(rank)))
    first = next(iter(reports.values()))
    lines = tuple(line for line in first.lines if not line.startswith(("energy", "size")))
    return Report(
        f"{adapter.provenance.done} {len(rows)} adapters into {target}",
        {
            "kind": "adapters",
            "adapters": {folder_name(rank): report.data for rank, report in reports.items()},
        },
        lines,
        Table(("rank", "energy captured", "lowest of a tensor", "size", "directory"), tuple(rows)),
        tuple(dict.fromkeys(note for report in reports.values() for note in report.notes)),
    )
