"""Two models run side by side: a fine-tune, and the model whose weights are made on the way.

Both passes stop before every module. When all batches wait at one in both models, what the two are
about to give it is there at the same time: its weights in the model that is built can be fitted to
that, and are loaded next. So nothing has to be kept but the activations of the batches, and two
matrices (in, in) of one module at a time.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from loratool.calibration import Inputs
from loratool.errors import InputError
from loratool.linalg import SecondMoment
from loratool.moments import arguments, vectors
from loratool.running import Model, Watch, stops

Fit = Callable[[str, SecondMoment], None]

# Vectors that are summed at a time.
_VECTORS = 4096


@dataclass
class Course:
    """What came of a pass of two models.

    Attributes:
        fitted: modules that were fitted.
        alone: of these, those that the two models did not call alike, which were fitted to the
            inputs in the model that is built alone.
        again: of these, those that were called again after their weights were made.
    """

    fitted: set[str] = field(default_factory=set)
    alone: set[str] = field(default_factory=set)
    again: set[str] = field(default_factory=set)


def build_along(
    tuned: Model, built: Model, inputs: Inputs, wanted: Collection[str], fit: Fit
) -> Course:
    """Run two models of one class and hand out each module's inputs before its weights are loaded.

    Args:
        tuned: the fine-tune.
        built: the same class in another shell, whose weights may depend on what `fit` was given.
        inputs: read for either.
        wanted: names of linear modules or convolutions, in memory.
        fit: is given each module's name and moment once: of what it is given in `built`, with the
            drift from what it is given in `tuned`. Modules that are given the same share one.

    Raises:
        InputError: a model cannot be run on the inputs, or gives NaN or Inf.
    """
    names = [name for name, _ in built.shell.model.named_modules()]
    order = {name: number for number, name in enumerate(names)}
    course = Course()
    there, here = _Waiting(wanted, course), _Waiting(wanted, course)
    ahead = stops(tuned, arguments(tuned, inputs), there)
    behind = stops(built, arguments(built, inputs), here)
    latest: _Shared | None = None
    try:
        other = next(ahead, None)
        for module in behind:
            while other is not None and order[other] < order[module]:
                other = next(ahead, None)
            given = here.take(module)
            if given and module not in course.fitted:
                known = there.take(module) if other == module else {}
                if latest is None or not latest.holds(given, known):
                    latest = None  # forgotten before another takes its memory
                    found = built.shell.model.get_submodule(module)
                    latest = _Shared.of(inputs, found, given, known, f"{built.label}: {module}")
                if latest.moment.drift is None:
                    course.alone.add(module)
                course.fitted.add(module)
                fit(module, latest.moment)
            if other == module:
                other = next(ahead, None)
    finally:
        ahead.close()  # type: ignore[attr-defined]
        behind.close()  # type: ignore[attr-defined]
    return course


class _Waiting(Watch):
    """What batches wait with at the modules that they have reached."""

    def __init__(self, wanted: Collection[str], course: Course) -> None:
        self._wanted = frozenset(wanted)
        self._course = course
        self._given: dict[str, dict[int, torch.Tensor]] = {}

    def reached(self, batch: int, module: str, inputs: tuple[Any, ...]) -> None:
        """Keep what a module is given, unless it comes too late."""
        if module not in self._wanted:
            return
        if module in self._course.fitted:
            self._course.again.add(module)
        else:
            self._given.setdefault(module, {})[batch] = inputs[0]

    def called(self, batch: int, module: str, inputs: tuple[Any, ...]) -> None:
        """Forget what was not taken."""
        self._given.pop(module, None)

    def take(self, module: str) -> dict[int, torch.Tensor]:
        """Batch -> what it waits with; forgotten here."""
        return self._given.pop(module, {})


_Seen = tuple[weakref.ref[torch.Tensor], int]


@dataclass(frozen=True)
class _Shared:
    """A moment, and the tensors that it is of, by batch, as far as they still exist."""

    moment: SecondMoment
    given: Mapping[int, _Seen]
    known: Mapping[int, _Seen]
    is_plain: bool

    @classmethod
    def of(
        cls,
        inputs: Inputs,
        module: torch.nn.Module,
        given: Mapping[int, torch.Tensor],
        known: Mapping[int, torch.Tensor],
        label: str,
    ) -> _Shared:
        is_plain = not isinstance(module, torch.nn.Conv1d | torch.nn.Conv2d)
        alike = _are_alike(inputs, given, known)
        total = drift = torch.empty(0)
        count = 0
        for batch in sorted(given):
            rows = vectors(inputs, batch, module, given[batch])
            others = vectors(inputs, batch, module, known[batch]) if alike else rows
            if not count:
                total = torch.zeros(rows.shape[1], rows.shape[1], dtype=torch.float64)
                drift = torch.zeros_like(total) if alike else drift
            count += len(rows)
            both = zip(torch.split(rows, _VECTORS), torch.split(others, _VECTORS), strict=True)
            for part, other in both:
                own = part.double()
                total.addmm_(own.t(), own)
                if alike:
                    drift.addmm_((other.double() - own).t(), own)
        total /= max(1, count)
        drift /= max(1, count)
        if not all(bool(values.isfinite().all()) for values in (total, drift)):
            raise InputError(
                f"{label}: is given NaN or Inf for these inputs: is the model whole? (weights of "
                "fp16 models may overflow)"
            )
        total = (total + total.t()) / 2
        moment = SecondMoment(total, count, drift if alike else None)
        return cls(moment, _seen(given), _seen(known), is_plain)

    def holds(self, given: Mapping[int, torch.Tensor], known: Mapping[int, torch.Tensor]) -> bool:
        """Whether it is of these very tensors."""
        return self.is_plain and _are(self.given, given) and _are(self.known, known)


def _are_alike(
    inputs: Inputs, given: Mapping[int, torch.Tensor], known: Mapping[int, torch.Tensor]
) -> bool:
    """Whether the vectors of two models belong together one by one.

    Not where the batches went different ways, or where tokens were picked out of them, by which
    the two models may have chosen others.
    """
    if given.keys() != known.keys() or len(given) != len(inputs.batches):
        return False
    for batch, tensor in given.items():
        if tensor.shape != known[batch].shape:
            return False
        first = next(iter(inputs.batches[batch].values()))
        rows, tokens = len(first), first[0].numel()
        if tensor.dim() == 2 and len(tensor) not in (rows, rows * tokens):
            return False
    return True


def _seen(tensors: Mapping[int, torch.Tensor]) -> dict[int, _Seen]:
    return {batch: (weakref.ref(tensor), tensor._version) for batch, tensor in tensors.items()}


def _are(seen: Mapping[int, _Seen], tensors: Mapping[int, torch.Tensor]) -> bool:
    if seen.keys() != tensors.keys():
        return False
    return all(
        seen[batch][0]() is tensor and seen[batch][1] == tensor._version
        for batch, tensor in tensors.items()
    )
