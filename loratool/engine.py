"""Drains lazy results: runs their tasks, tells progress, writes, and reports.

One intra-op thread a task, so that results do not depend on how many workers there are.
"""

from __future__ import annotations

import gc
import importlib
import platform
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

from loratool import plugins
from loratool.adapter import Adapter, Counter, LazyUpdate
from loratool.card import model_card
from loratool.checkpoint import Checkpoint
from loratool.digests import file_digest
from loratool.dtypes import itemsize
from loratool.errors import Problem, raise_problems
from loratool.json_files import MANIFEST, manifest
from loratool.outcome import Outcome
from loratool.places import atomic_directory
from loratool.reports import Report
from loratool.updates import FACTORABLE, KIND_NAMES, Update, elements_a_rank
from loratool.writer import write_checkpoint, write_file, write_side_files

Progress = Callable[[str, int], None]


def no_progress(name: str, size: int) -> None:
    """Tell nobody."""


def no_count(what: str, total: int) -> Callable[[str], None]:
    """Tell nobody of steps."""
    return lambda text: None


@dataclass(frozen=True)
class Drain:
    """How a lazy result is drained.

    Attributes:
        executor: an executor's name, with options ("threads:workers=4").
        overwrite: whether a non-empty output directory may be replaced.
        start: is told what is about to be done and how many bytes it reads or writes.
        progress: is told each tensor's name and bytes as it is done.
        alone: whether this process does nothing else, before or after.
        count: begins work that is counted in steps, not bytes; what it returns is told of each.
    """

    executor: str = "threads"
    overwrite: bool = False
    start: Callable[[str, int], None] = no_progress
    progress: Progress = no_progress
    alone: bool = False
    count: Counter = no_count


@contextmanager
def single_threaded_tasks(alone: bool = False) -> Iterator[None]:
    """One intra-op thread for every task started inside the block.

    Args:
        alone: as in `Drain`.
    """
    _import_torch(alone)
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _import_torch(alone: bool) -> None:
    """Import torch without looking for garbage in what it makes: a quarter of the time it takes.

    Args:
        alone: whether the process does nothing else. Then what is there now is never looked at
            again, not even when the process ends.
    """
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        importlib.import_module("torch")
        if alone:
            gc.freeze()
    finally:
        if was_enabled:
            gc.enable()


def save_adapter(
    adapter: Adapter, target: Path, drain: Drain, format_name: str | None = None
) -> Report:
    """Compute every update of an adapter and write it, with its manifest and model card.

    Args:
        adapter: what to write.
        target: the directory.
        drain: how.
        format_name: an adapter format, with options; None for the adapter's own.

    Raises:
        MismatchError: the format cannot hold all of it; nothing was computed.
        InputError: nothing differs, or a tensor holds NaN or Inf.
        OutputError: the output place is taken or too small.
    """
    writer = writer_for(adapter, format_name)
    executor = plugins.create("executors", drain.executor)
    with atomic_directory(target, drain.overwrite, needed_bytes(adapter)) as folder:
        updates = [*adapter.values(), *adapter.left_out.values()]
        drain.start(adapter.provenance.doing, sum(update.nbytes for update in updates))
        with adapter.while_drained(), single_threaded_tasks(drain.alone):
            if adapter.gathered is not None:
                adapter.gathered.gather(folder, executor, drain.progress)
                drain = replace(drain, progress=no_progress)
            if adapter.prepare is not None:
                adapter.prepare(executor.map, drain.count)
            return write_adapter(adapter, writer, folder, target, executor, drain.progress)


def writer_for(adapter: Adapter, format_name: str | None) -> plugins.AdapterFormat:
    """The format that an adapter is written in.

    Args:
        adapter: what is to be written.
        format_name: an adapter format, with options; None for the adapter's own.

    Raises:
        MismatchError: the format cannot hold all of it.
    """
    format_name = format_name or adapter.format
    writer: plugins.AdapterFormat = plugins.create("adapter_formats", format_name)
    raise_problems(
        f"{adapter.label} cannot be written as {format_name.partition(':')[0]}:",
        refusals(adapter, writer),
    )
    return writer


def write_adapter(
    adapter: Adapter,
    writer: plugins.AdapterFormat,
    folder: Path,
    target: Path,
    executor: plugins.Executor,
    progress: Progress,
) -> Report:
    """Compute every update of an adapter and write it with what belongs beside it.

    To be called inside `single_threaded_tasks`.

    Args:
        adapter: what to write.
        writer: its format.
        folder: an existing, empty directory.
        target: what that directory will be called.
        executor: runs one task an update.
        progress: is told each tensor's name and bytes as it is done.

    Raises:
        InputError: nothing differs, or a tensor holds NaN or Inf.
    """
    outcome = Outcome(adapter)
    results = outcome.watch(_compute(list(adapter.values()), executor, progress))
    notes = writer.write(adapter, results, folder) or ()
    for update, found in _compute(list(adapter.left_out.values()), executor, progress):
        outcome.leave_out(update, found)
    outcome.check()
    write_side_files({f"model/{n}": c for n, c in adapter.model_files.items()}, folder)
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    data = {
        "loratool": version("loratool"),
        **outcome.data(size),
        "files": {file.name: file_digest(file) for file in _weight_files(folder)},
        "run": run_facts(),
    }
    library, usage = getattr(writer, "library", "peft"), getattr(writer, "usage", "")
    card = model_card(adapter, outcome, library, usage)
    write_file(folder / "README.md", card.encode())
    write_file(folder / MANIFEST, manifest(data))
    report = outcome.report(target, size, data)
    return replace(report, notes=(*report.notes, *notes))


def refusals(adapter: Adapter, writer: plugins.AdapterFormat) -> list[Problem]:
    """What of an adapter a format cannot hold, by headers only."""
    unknown = [
        Problem("error", update.name, _cure(update))
        for update in adapter.values()
        if update.kind not in writer.carries
    ]
    if adapter.naming and adapter.naming not in getattr(writer, "namings", ()):
        message = f"is a name of {adapter.naming}: give the base that resolves it (--base)"
        unknown.append(Problem("error", next(iter(adapter), adapter.label), message))
    return [*unknown, *writer.refusals(adapter)]


def _cure(update: LazyUpdate) -> str:
    """What is wrong with an update of a kind that a format does not carry, and what helps."""
    message = f"the format has no {KIND_NAMES[update.kind]}: `loratool convert` "
    if update.kind == "sparse":
        return message + "makes plain LoRA of it (--to-lora), or leaves its entries out (--drop)"
    if update.kind in FACTORABLE and len(update.shape) > 1:
        message += "makes plain LoRA of it (--to-lora), or "
    return message + "leaves it out (--drop)"


def _weight_files(folder: Path) -> list[Path]:
    """The files of tensors that a format has written."""
    return sorted(p for p in folder.iterdir() if p.suffix in (".safetensors", ".gguf", ".pt"))


def _compute(
    updates: list[LazyUpdate], executor: plugins.Executor, progress: Progress
) -> Iterator[tuple[LazyUpdate, Update | None]]:
    def load(update: LazyUpdate) -> tuple[LazyUpdate, Update | None]:
        return update, update.load()

    for update, found in executor.map(load, updates):
        progress(update.name, update.nbytes)
        yield update, found


_PLACE_BYTES = 2  # of a single entry, about


def needed_bytes(adapter: Adapter) -> int:
    """Disk that writing an adapter takes at most; factors are spooled first, so they count twice.

    Ranks that only an energy decides are not known yet and count as nothing.
    """
    total = 0 if adapter.gathered is None else adapter.gathered.disk_bytes
    for update in adapter.values():
        if update.is_whole:
            total += update.nbytes
        elif update.stored:
            total += 2 * sum(tensor.nbytes for tensor in update.stored)
        elif update.rank:
            elements = update.rank * elements_a_rank(update.kind, update.shape)
            total += 2 * elements * itemsize(update.dtype)
            total += 2 * update.entries * (itemsize(update.dtype) + _PLACE_BYTES)
        elif update.kind == "dense":
            total += 2 * update.nbytes
    return total


def save_checkpoint(checkpoint: Checkpoint, target: Path, drain: Drain) -> Report:
    """Compute every tensor of a checkpoint and write it.

    Raises:
        InputError: a tensor holds NaN or Inf.
        OutputError: the output place is taken or too small.
    """
    executor = plugins.create("executors", drain.executor)
    with atomic_directory(target, drain.overwrite, checkpoint.disk_bytes) as folder:
        drain.start("Writing", checkpoint.nbytes)
        with single_threaded_tasks(drain.alone), checkpoint.beside(folder) as done:

            def progress(name: str, size: int) -> None:
                done(name)
                drain.progress(name, size)

            if checkpoint.written_as == "safetensors":
                write_checkpoint(checkpoint, folder, executor, progress)
            else:
                format = plugins.create("checkpoint_formats", checkpoint.written_as)
                format.write(checkpoint, folder, executor, progress)
    return checkpoint.report(target)


def run_facts() -> dict[str, Any]:
    """What belongs to this run alone: versions, time, machine."""
    import torch

    return {
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "platform": platform.platform(),
        "cpu": torch.backends.cpu.get_cpu_capability(),
    }
