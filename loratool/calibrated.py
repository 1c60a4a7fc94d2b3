"""Updates that are fitted to what a model is given, all in one pass of the model.

Every second moment serves the targets of its module and is forgotten; the factors, which are small,
are kept until they are asked for.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from threading import Lock
from typing import Any, Literal

from loratool.calibration import Limits, read_inputs
from loratool.checkpoint import Checkpoint
from loratool.delta import DeltaReader
from loratool.digests import file_digest
from loratool.linalg import SecondMoment
from loratool.moments import can_be_watched, collect
from loratool.pairing import Change
from loratool.reports import listed
from loratool.running import Model, open_model
from loratool.updates import LowRank

Side = Literal["base", "finetuned"]


@dataclass(frozen=True)
class Plan:
    """What to calibrate on.

    Attributes:
        path: the file of inputs, or a folder of images.
        side: which of the two models is run.
        diagonal: whether only the diagonals of the second moments are used.
        limits: how much of the file is used.
        tokenizer: a directory with a tokenizer, or None for the models' own.
    """

    path: Path
    side: Side = "finetuned"
    diagonal: bool = False
    limits: Limits = field(default_factory=Limits)
    tokenizer: Path | None = None


class Calibration:
    """The pass that fits low-rank updates; nothing is run before the first is asked for.

    Attributes:
        notes: what the user should hear before it runs.
    """

    def __init__(
        self,
        plan: Plan,
        base: Checkpoint,
        finetuned: Checkpoint,
        changes: Sequence[tuple[Change, str]],
        architecture: str = "",
    ) -> None:
        """Read the inputs and find each target's module; headers only.

        Args:
            plan: what to calibrate on.
            base: the base, as on disk.
            finetuned: the fine-tune, as on disk.
            changes: what is factorized, and the safetensors dtype of its factors.
            architecture: the fine-tune's model class or type, where its config does not say.

        Raises:
            InputError: the model cannot be run, or the inputs cannot be used for it.
        """
        self._plan = plan
        chosen, other = (base, finetuned) if plan.side == "base" else (finetuned, base)
        given = architecture if plan.side == "finetuned" else ""
        self._model = open_model(chosen, architecture=given)
        self._inputs = read_inputs(
            plan.path, self._model, plan.limits, (chosen, other), plan.tokenizer
        )
        self._modules, self._plain = _modules_of(
            self._model, [change for change, _ in changes], plan.side
        )
        self._changes = {change.name: (change, dtype) for change, dtype in changes}
        self._found: dict[str, LowRank | None] = {}
        self._missed: tuple[str, ...] = ()
        self._done = False
        self._lock = Lock()
        self.notes = (*self._inputs.notes, *self._plain_notes())

    def load(self, reader: DeltaReader, name: str) -> LowRank | None:
        """The update of a target, after one pass for all of them.

        Args:
            reader: makes updates.
            name: the target's.

        Raises:
            InputError: NaN or Inf in a tensor or in what a module is given.
        """
        with self._lock:
            if not self._done:
                self._run(reader)
                self._done = True
        return self._found[name] if name in self._found else self._factorize(reader, name)

    def lines(self) -> tuple[str, ...]:
        """What the report says of it, after the pass."""
        inputs = self._inputs
        tokens = "" if inputs.tokens is None else f", {inputs.tokens} tokens"
        model = "base" if self._plan.side == "base" else "fine-tuned model"
        found = [f"calibrated on {inputs.count} {inputs.kind}{tokens} run through the {model}"]
        if self._missed:
            found.append(
                f"never called for these inputs, so factorized plainly: {listed(self._missed, 4)}"
            )
        return tuple(found)

    def facts(self) -> dict[str, Any]:
        """The same for the manifest."""
        path, inputs = self._plan.path, self._inputs
        return {
            "file": path.name,
            "digest": file_digest(path) if path.is_file() else None,
            "kind": inputs.kind,
            "samples": inputs.count,
            "tokens": inputs.tokens,
            "model": self._plan.side,
            "moments": "diagonal" if self._plan.diagonal else "full",
            "plain": sorted({*self._plain, *self._missed}),
        }

    def _run(self, reader: DeltaReader) -> None:
        def done(module: str, moment: SecondMoment) -> None:
            for name in self._modules[module]:
                self._found[name] = self._factorize(reader, name, moment)

        missed = collect(
            self._model, self._inputs, self._modules, done, diagonal=self._plan.diagonal
        )
        self._missed = tuple(
            name for module, names in self._modules.items() if module in missed for name in names
        )

    def _factorize(
        self, reader: DeltaReader, name: str, moment: SecondMoment | None = None
    ) -> LowRank | None:
        change, dtype = self._changes[name]
        assert change.before is not None  # of what is factorized
        return reader.factorize(change.before, change.after, change.transposed, dtype, moment)

    def _plain_notes(self) -> tuple[str, ...]:
        if not self._plain:
            return ()
        return (
            f"{listed(self._plain, 4)}: factorized plainly: inputs are known of linear layers and "
            "of convolutions without groups only",
        )


def _modules_of(
    model: Model, changes: Sequence[Change], side: Side
) -> tuple[Mapping[str, list[str]], tuple[str, ...]]:
    """Module -> the targets that are its weight; and the targets that have no such module."""
    users: dict[str, list[str]] = {}
    for parameter, key in model.sources.keys.items():
        users.setdefault(key, []).append(parameter)
    modules: dict[str, list[str]] = {}
    plain = []
    for change in changes:
        tensor = change.before if side == "base" else change.after
        assert tensor is not None
        owners = (name.rpartition(".") for name in users.get(tensor.name, ()))
        found = next(
            (
                owner
                for owner, _, leaf in owners
                if leaf == "weight" and can_be_watched(model.shell.model.get_submodule(owner))
            ),
            None,
        )
        if found is None or change.kind == "embedding":
            plain.append(change.name)
        else:
            modules.setdefault(found, []).append(change.name)
    return modules, tuple(plain)
