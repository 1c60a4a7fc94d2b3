"""An extracted adapter whose low-rank updates are refined when the first of them is asked for.

The extraction's own updates are computed, the base with them is trained to answer as the fine-tune
does (`loratool.refining`), and then the refined updates are handed out one by one.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from loratool.adapter import Adapter, Counter, LazyUpdate, Mapper
from loratool.calibration import Inputs
from loratool.checkpoint import Checkpoint
from loratool.digests import file_digest
from loratool.errors import InputError
from loratool.linalg import Certificate, tiles
from loratool.matching import Reference
from loratool.pairing import Change
from loratool.refining import Refined, refine
from loratool.reports import counted, format_share
from loratool.running import Model, open_model, whole_model
from loratool.training import Training
from loratool.updates import LowRank, Update

_HELD_OUT = 0.2  # share of the samples
_ROWS = 8  # samples of a step: many small steps get further than few large ones


def refined(
    adapter: Adapter,
    changes: Iterable[Change],
    teacher: Model,
    inputs: Inputs,
    file: Path,
    merge: Callable[[Adapter], Checkpoint],
    training: Training,
) -> Adapter:
    """The adapter with its low-rank updates refined; headers only, nothing is computed yet.

    Matrices are refined; embeddings, convolutions and experts stay as they were extracted.

    Args:
        adapter: as extracted, under the names in memory.
        changes: what its updates are made of.
        teacher: the fine-tune.
        inputs: what it is run on.
        file: where they come from.
        merge: works an adapter into the base.
        training: how to train.

    Raises:
        InputError: there are not enough samples, nothing to refine, or the model cannot be run.
    """
    if inputs.count < 2:
        raise InputError(
            f"{file}: holds one sample; refining needs at least two, one of which is held out"
        )
    once = {name: replace(update, load=_Once(update.load)) for name, update in adapter.items()}
    starts = {name: update for name, update in once.items() if _is_matrix(adapter, update)}
    if not starts:
        raise InputError("no low-rank update of a matrix is left that could be refined")
    rest = {name: update for name, update in once.items() if name not in starts}
    frozen = merge(replace(adapter, updates=rest))
    student = open_model(frozen)
    fitted, held_out = map(_in_small_batches, inputs.split(_HELD_OUT))
    found = {change.name: change for change in changes if change.name in starts}
    refinement = Refinement(
        starts, found, teacher, student, fitted, held_out, file, training, torch.get_num_threads()
    )
    updates = {
        name: replace(update, load=partial(refinement.load, name)) if name in starts else update
        for name, update in once.items()
    }
    left = [update.name for update in rest.values() if update.is_linear]
    notes = list(inputs.notes)
    if left:
        notes.append(
            f"{counted(len(left), 'update')} of embeddings, convolutions or experts "
            f"({left[0]}, ...) are not refined: they stay as extracted"
        )
    return replace(
        adapter,
        updates=updates,
        notes=(*adapter.notes, *notes),
        facts=lambda: {**adapter.facts(), "refinement": refinement.facts()},
        provenance=replace(
            adapter.provenance,
            lines=lambda: (*adapter.provenance.lines(), *refinement.lines()),
        ),
        prepare=refinement.prepare,
    )


class _Once:
    """Loads an update the first time it is called, and has it ever after."""

    def __init__(self, load: Callable[[], Update | None]) -> None:
        self._load = load
        self._lock = threading.Lock()
        self._found: list[Update | None] = []

    def __call__(self) -> Update | None:
        with self._lock:
            if not self._found:
                self._found.append(self._load())
        return self._found[0]


def _is_matrix(adapter: Adapter, update: LazyUpdate) -> bool:
    is_tied = update.name in adapter.tied or update.name in adapter.tied.values()
    is_matrix = update.kind == "low_rank" and len(update.shape) == 2
    return is_matrix and not update.embedding and not is_tied


def _in_small_batches(inputs: Inputs) -> Inputs:
    """The same samples, at most `_ROWS` in a batch."""
    batches, rows = [], []
    for batch, numbers in zip(inputs.batches, inputs.rows, strict=True):
        for start in range(0, len(numbers), _ROWS):
            part = slice(start, start + _ROWS)
            batches.append({name: value[part] for name, value in batch.items()})
            rows.append(numbers[part])
    return replace(inputs, batches=tuple(batches), rows=tuple(rows))


@dataclass
class Refinement:
    """Training that happens once, when the first of its results is asked for.

    Attributes:
        starts: the updates to refine, as extracted.
        changes: name -> the two tensors that it is the difference of.
        teacher: the fine-tune.
        student: the base, with everything worked in that is not refined.
        fitted: inputs to train on.
        held_out: inputs to judge by.
        file: where they come from.
        training: how.
        threads: of torch's operations, whoever asks: the sums depend on it in the last bits.
    """

    starts: Mapping[str, LazyUpdate]
    changes: Mapping[str, Change]
    teacher: Model
    student: Model
    fitted: Inputs
    held_out: Inputs
    file: Path
    training: Training
    threads: int
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False)
    _done: Refined | None = field(default=None, repr=False)
    _what: str = ""
    _energy: tuple[float, float] = (1.0, 1.0)

    def load(self, name: str) -> Update | None:
        """A refined update; the first call trains all of them."""
        self.prepare(map, _silent)
        assert self._done is not None
        return self._done.updates.get(name)

    def prepare(self, map: Mapper, count: Counter) -> None:
        """Compute the start and train, if that has not been done yet.

        Args:
            map: how the extraction's tasks are run.
            count: tells the progress.

        Raises:
            InputError: the models cannot be run, or do not give the same outputs.
            OutputError: the fine-tune's outputs do not fit on the disk.
            UsageError: the fine-tune's outputs cannot be compared in the way that was asked for.
        """
        with self._lock:
            if self._done is None:
                starts = self._computed(map, count)
                with _threads(self.threads):
                    done = self._train(starts, count)
                    self._done = self._certified(starts, done)

    def facts(self) -> dict[str, Any]:
        """For the manifest; after draining."""
        found = self._done
        if found is None:
            return {}
        return {
            "options": {
                "steps": self.training.steps,
                "loss": self.training.measure,
                "rate": self.training.rate,
                "penalty": self.training.penalty,
                "seed": self.training.seed,
            },
            "inputs": {
                "file": self.file.name,
                "digest": file_digest(self.file) if self.file.is_file() else None,
                "kind": self.fitted.kind,
                "samples": self.fitted.count,
                "held_out": self.held_out.count,
            },
            "compared": self._what,
            "threads": self.threads,
            "trained": len(found.trained),
            "losses": [list(pair) for pair in found.losses],
            "before": found.before,
            "after": found.after,
            "energy_before": self._energy[0],
            "energy_after": self._energy[1],
            "steps": found.steps,
            "kept_step": found.best,
            "stopped": found.stopped,
        }

    def lines(self) -> tuple[str, ...]:
        """For people; after draining."""
        found = self._done
        if found is None:
            return ()
        where = f"{self._what}, on {counted(self.held_out.count, 'sample')} held out"
        taken = f"{found.steps} of {counted(self.training.steps, 'step')} ({found.stopped})"
        if not found.best:
            others = [loss for at, loss in found.losses if at]
            least = f"; the least after it was {min(others):.4g}" if others else ""
            return (
                f"refining did not help: {where}: {found.before:.4g} at the start{least}; {taken}: "
                "the updates are as extracted",
            )
        before, after = map(format_share, self._energy)
        return (
            f"refined: {where}: {found.before:.4g} -> {found.after:.4g} after {found.best} steps; "
            f"{taken}",
            f"energy of these updates: {before} -> {after}: it falls as the outputs come closer, "
            "for no factors of this rank have more than the extracted ones",
        )

    def _computed(self, map: Mapper, count: Counter) -> dict[str, LowRank]:
        """The extraction's updates, but for those that turn out to be nothing."""

        def load(update: LazyUpdate) -> tuple[str, Update | None]:
            return update.name, update.load()

        starts = {}
        tell = count("Factorizing", len(self.starts))
        with _threads(1):
            for name, update in map(load, list(self.starts.values())):
                tell(name)
                if isinstance(update, LowRank):
                    starts[name] = update
        return starts

    def _train(self, starts: Mapping[str, LowRank], count: Counter) -> Refined:
        training = self.training
        if not starts:
            return Refined({}, (), ((0, 0.0),), 0, 0, "nothing differs")
        same = self.student.shell.architecture == self.teacher.shell.architecture
        batches = [*self.fitted.batches, *self.held_out.batches]
        everything = replace(
            self.fitted, batches=tuple(batches), rows=(*self.fitted.rows, *self.held_out.rows)
        )
        modules = {name.rpartition(".")[0] for name in self.teacher.sources.keys}
        tell = count("Running the fine-tune", len(modules))
        with Reference.take(
            self.teacher,
            everything,
            training.measure,
            hidden=not same,
            progress=lambda module, size: tell(module),
        ) as reference:
            self._what = reference.what
            cut = len(self.fitted.batches)
            fitted = replace(reference, inputs=self.fitted, outputs=reference.outputs[:cut])
            held_out = replace(reference, inputs=self.held_out, outputs=reference.outputs[cut:])
            names = {name: _parameter(self.student, name) for name in starts}
            given = {names[n]: (update, self.starts[n].dtype) for n, update in starts.items()}
            model = whole_model(self.student)
            tell = count("Refining", training.steps)
            found = refine(model, given, fitted, held_out, training, tell)
        return replace(found, updates={n: found.updates[names[n]] for n in starts})

    def _certified(self, starts: Mapping[str, LowRank], found: Refined) -> Refined:
        """With certificates of what the factors are now."""
        if not found.best:
            return found
        updates, before, after, total = {}, 0.0, 0.0, 0.0
        for name, update in found.updates.items():
            old = starts[name].certificate or Certificate(update.rank, 0, 0)
            new = old
            if update is not starts[name]:
                lost = _squared_error(self.changes[name], update)
                method = f"{old.method}, refined"
                new = replace(old, captured=old.total - lost, rounding=0.0, method=method)
            updates[name] = replace(update, certificate=new)
            before, after, total = before + old.captured, after + new.captured, total + old.total
        self._energy = (before / total, after / total) if total else (1.0, 1.0)
        return replace(found, updates=updates)


def _parameter(model: Model, name: str) -> str:
    """The parameter of a model that an update is for; the prefix of its base may differ."""
    prefix = str(getattr(model.shell.model, "base_model_prefix", ""))
    for spelling in (name, name.removeprefix(f"{prefix}."), f"{prefix}.{name}"):
        if spelling in model.sources.keys:
            return spelling
    raise InputError(f"{name}: {model.shell.architecture} has no such parameter to refine")


def _squared_error(change: Change, update: LowRank) -> float:
    """||D - s B A||_F^2, in fp64, from the two tensors."""
    assert change.before is not None
    before, after = change.before.read(), change.after.read()
    here = update.transposed() if change.transposed else update
    a = here.a.double()
    total = 0.0
    for rows in tiles(before):
        delta = after[rows].double() - before[rows].double()
        total += float((delta - update.scale * (here.b[rows].double() @ a)).square().sum())
    return total


@contextmanager
def _threads(number: int) -> Iterator[None]:
    """This many intra-op threads inside the block."""
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _silent(what: str, total: int) -> Callable[[str], None]:
    return lambda text: None
