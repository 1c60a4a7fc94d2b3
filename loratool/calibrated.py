"""Updates that are fitted to what a model is given, all in one pass of the model.

Every second moment serves the targets of its module and is forgotten; the factors, which are small,
are kept until they are asked for.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from threading import Lock
from typing import Any, Literal

from loratool.built import built_model
from loratool.calibration import Limits, read_inputs
from loratool.checkpoint import Checkpoint
from loratool.delta import DeltaReader
from loratool.digests import file_digest
from loratool.linalg import SecondMoment
from loratool.lockstep import build_along
from loratool.moments import can_be_watched, collect
from loratool.pairing import Change, Pair
from loratool.reports import listed
from loratool.running import Model, open_model
from loratool.updates import Experts, LowRank

Side = Literal["base", "finetuned", "merged"]
_MODELS = {
    "base": "the base",
    "finetuned": "the fine-tuned model",
    "merged": "the fine-tuned model and, layer by layer, the one that the factors make",
}


@dataclass(frozen=True)
class Plan:
    """What to calibrate on.

    Attributes:
        path: the file of inputs, or a folder of images.
        side: which of the two models is run; "merged" for the fine-tune beside the model that the
            factors make, each layer's making good what the earlier ones have lost.
        diagonal: whether only the diagonals of the second moments are used; not with "merged".
        limits: how much of the file is used.
        tokenizer: a directory with a tokenizer, or None for the models' own.
        lora_only: whether the adapter has nothing but low-rank updates.
    """

    path: Path
    side: Side = "finetuned"
    diagonal: bool = False
    limits: Limits = field(default_factory=Limits)
    tokenizer: Path | None = None
    lora_only: bool = False


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
        pair: Pair,
        changes: Sequence[tuple[Change, str]],
        architecture: str = "",
    ) -> None:
        """Read the inputs and find each target's module; headers only.

        Args:
            plan: what to calibrate on.
            base: the base, as on disk.
            finetuned: the fine-tune, as on disk.
            pair: the two laid beside each other.
            changes: what is factorized, and the safetensors dtype of its factors.
            architecture: the fine-tune's model class or type, where its config does not say.

        Raises:
            InputError: the model cannot be run, or the inputs cannot be used for it.
        """
        self._plan = plan
        chosen, other = (base, finetuned) if plan.side == "base" else (finetuned, base)
        given = "" if plan.side == "base" else architecture
        self._model = open_model(chosen, architecture=given)
        self._pair = pair
        self._shell = open_model(chosen, architecture=given) if plan.side == "merged" else None
        self._inputs = read_inputs(
            plan.path, self._model, plan.limits, (chosen, other), plan.tokenizer
        )
        self._modules, self._plain = _modules_of(
            self._model, [change for change, _ in changes], plan.side
        )
        self._changes = {change.name: (change, dtype) for change, dtype in changes}
        self._found: dict[str, LowRank | None] = {}
        self._missed: tuple[str, ...] = ()
        self._apart: tuple[str, ...] = ()
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
        model = _MODELS[self._plan.side]
        found = [f"calibrated on {inputs.count} {inputs.kind}{tokens} run through {model}"]
        if self._plan.side == "merged":
            found.append(
                "each layer makes good what the earlier ones have lost, so the share of "
                "||delta||^2, which may be below 0, tells little here"
            )
        if self._apart:
            found.append(
                "called at several places, or not alike by the two models, so fitted to the inputs "
                f"of one of them: {listed(self._apart, 4)}"
            )
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
            **({"apart": sorted(self._apart)} if self._plan.side == "merged" else {}),
        }

    def _run(self, reader: DeltaReader) -> None:
        missed = (
            self._fit(reader, self._modules)
            if self._shell is None
            else self._build(reader, self._shell)
        )
        self._missed = self._targets(missed)

    def _targets(self, modules: Collection[str]) -> tuple[str, ...]:
        """The targets that are the weights of modules."""
        owners = self._modules.items()
        return tuple(name for module, names in owners if module in modules for name in names)

    def _fit(self, reader: DeltaReader, modules: Collection[str]) -> frozenset[str]:
        """Fit what modules have to their inputs in one model; the modules that were not called."""

        def done(module: str, moment: SecondMoment) -> None:
            for name in self._modules[module]:
                self._found[name] = self._factorize(reader, name, moment)

        diagonal = self._plan.diagonal
        return collect(self._model, self._inputs, modules, done, diagonal=diagonal)

    def _build(self, reader: DeltaReader, shell: Model) -> frozenset[str]:
        """Fit every module to its inputs in the model that the updates make; those not called.

        Modules that are called again after their weights are made (ALBERT's layers) cannot be
        fitted to all that they will be given. They are fitted to the fine-tune's inputs, and the
        others once more, beside them.
        """

        def update_of(change: Change) -> LowRank | Experts | None:
            name, before = change.name, change.before
            _, dtype = self._changes[name]
            if change.kind == "experts":
                assert before is not None  # of what is factored
                return reader.factorize_experts(before, change.after, change.transposed, dtype)
            if name not in self._found:
                self._found[name] = self._factorize(reader, name)
                early.add(name)
            return self._found[name]

        def fit(module: str, moment: SecondMoment) -> None:
            for name in self._modules[module]:
                if name not in early:
                    self._found[name] = self._factorize(reader, name, moment)

        early: set[str] = set()
        heads = not self._plan.lora_only
        built = built_model(self._pair, self._model, shell, update_of, heads)
        wanted = set(self._modules)
        course = build_along(self._model, built, self._inputs, wanted, fit)
        if again := frozenset(course.again):
            self._found.clear()
            early.clear()
            self._fit(reader, again)
            course = build_along(self._model, built, self._inputs, wanted - again, fit)
        self._apart = self._targets(again | course.alone | course.again)
        unseen = {module for module in wanted - again if early.intersection(self._modules[module])}
        return frozenset(wanted - again - course.fitted) | unseen

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
