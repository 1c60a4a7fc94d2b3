"""Second moments of what the modules of a model are given: E[x x^T] over the inputs' tokens.

They are collected while the model is run module by module (`loratool.running`), and each is handed
out and forgotten as soon as all batches have passed its module. Modules that are given the same
tensor (query, key and value) share one. So memory holds one or two moments at a time.
"""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch

from loratool.calibration import Inputs
from loratool.errors import InputError
from loratool.linalg import SecondMoment
from loratool.running import Model, Watch, run

Done = Callable[[str, SecondMoment], None]

# Rows of the moment that are computed at a time, and vectors that are summed in fp32.
_TILE, _VECTORS = 1024, 4096


def collect(
    model: Model,
    inputs: Inputs,
    wanted: Collection[str],
    done: Done,
    *,
    diagonal: bool = False,
    device: torch.device | None = None,
) -> frozenset[str]:
    """Run a model on inputs and hand out the second moments of what modules are given.

    Padding is left out. A module that is called at several places of the model (ALBERT's layers),
    or out of order, is found out when it is called again after it was handed out; its moment is
    then taken in a second pass, in which it is kept until the end.

    Args:
        model: what to run.
        inputs: read for this model.
        wanted: names of linear modules or convolutions, in memory.
        done: is given each module's name and moment once; twice for modules called again, and the
            second one is right.
        diagonal: whether only the diagonals are wanted.
        device: where to compute.

    Returns:
        The modules that no batch has called.

    Raises:
        InputError: the model cannot be run on the inputs, or gives NaN or Inf.
    """
    first = _Collector(model, inputs, wanted, done, diagonal)
    _run(model, inputs, first, device)
    if first.again:
        kept = _Collector(model, inputs, first.again, done, diagonal, keep=True)
        _run(model, inputs, kept, device)
        kept.finish()
    return frozenset(wanted) - first.finished


def can_be_watched(module: torch.nn.Module) -> bool:
    """Whether the moment of a module's inputs can be collected."""
    if isinstance(module, torch.nn.Conv1d | torch.nn.Conv2d):
        plain = module.padding_mode == "zeros" and not isinstance(module.padding, str)
        return plain and module.groups == 1
    return isinstance(module, torch.nn.Linear) or type(module).__name__ == "Conv1D"


def arguments(model: Model, inputs: Inputs) -> list[dict[str, Any]]:
    """What a model's forward is called with for the sake of its layers, not of its outputs."""
    batches: list[dict[str, Any]] = [dict(batch) for batch in inputs.batches]
    if "logits_to_keep" in inspect.signature(type(model.shell.model).forward).parameters:
        for batch in batches:  # the vocabulary's logits of every token are of no use here
            batch["logits_to_keep"] = 1
    return batches


def vectors(
    inputs: Inputs, batch: int, module: torch.nn.Module, tensor: torch.Tensor
) -> torch.Tensor:
    """What a module is given, without padding: (vectors, in), or (places, in * kernel)."""
    if isinstance(module, torch.nn.Conv1d | torch.nn.Conv2d):
        return torch.cat(list(_patches(module, tensor)))
    return inputs.unpadded(batch, tensor)


def _run(model: Model, inputs: Inputs, watch: Watch, device: torch.device | None) -> None:
    for _ in run(model, arguments(model, inputs), watch, device=device):
        pass


@dataclass
class _Group:
    """A moment that is being summed, and the tensors that it is of.

    Attributes:
        owner: the module whose inputs are summed.
        total: (n, n) or (n,), fp64; its lower triangle is not set before the end.
        count: how many vectors were added.
        given: batch -> what the owner was given, as far as it still exists, and its version.
        calls: how often it was called; by module for those that were given the same.
        moment: the result, once it was asked for.
    """

    owner: str
    total: torch.Tensor
    count: int = 0
    given: dict[int, list[tuple[weakref.ref[torch.Tensor], int]]] = field(default_factory=dict)
    calls: dict[str, int] = field(default_factory=dict)
    moment: SecondMoment | None = None

    def holds(self, batch: int, tensor: torch.Tensor) -> bool:
        """Whether the owner was given this very tensor."""
        known = self.given.get(batch, ())
        return any(ref() is tensor and version == tensor._version for ref, version in known)

    def add(self, batch: int, tensor: torch.Tensor, rows: torch.Tensor) -> None:
        """Add the vectors (m, n) that were made of a tensor."""
        self.given.setdefault(batch, []).append((weakref.ref(tensor), tensor._version))
        self.count += len(rows)
        for part in torch.split(rows.float(), _VECTORS):
            if self.total.dim() == 1:
                self.total += part.double().square().sum(0)
                continue
            for start in range(0, part.shape[1], _TILE):
                tile = slice(start, start + _TILE)
                self.total[tile, start:] += part[:, tile].t() @ part[:, start:]

    def result(self, label: str) -> SecondMoment:
        """The moment; InputError if it is not finite."""
        if self.moment is None:
            values = self.total
            if values.dim() == 2:
                for start in range(0, len(values), _TILE):
                    rows = slice(start, start + _TILE)
                    square = values[rows, rows]
                    values[rows, rows] = square.triu() + square.triu(1).t()
                    values[start + _TILE :, rows] = values[rows, start + _TILE :].t()
            values /= max(1, self.count)
            diagonal = values if values.dim() == 1 else values.diagonal()
            if not bool(diagonal.isfinite().all()):
                raise InputError(
                    f"{label}: {self.owner} is given NaN or Inf for these inputs: is the model "
                    "whole? (weights of fp16 models may overflow)"
                )
            self.moment = SecondMoment(values.cpu(), self.count)
        return self.moment


class _Collector(Watch):
    """Sums moments while batches pass.

    Attributes:
        finished: modules whose moments were handed out.
        again: of these, the ones that were called again, and those whose calls did not agree with
            what they seemed to share.
    """

    def __init__(
        self,
        model: Model,
        inputs: Inputs,
        wanted: Collection[str],
        done: Done,
        diagonal: bool,
        keep: bool = False,
    ) -> None:
        self.finished: set[str] = set()
        self.again: set[str] = set()
        self._label = model.label
        self._inputs = inputs
        self._modules = {name: model.shell.model.get_submodule(name) for name in wanted}
        self._done = done
        self._diagonal = diagonal
        self._keep = keep
        self._latest: _Group | None = None
        self._groups: dict[str, _Group] = {}

    def called(self, batch: int, module: str, inputs: tuple[Any, ...]) -> None:
        """Add what a module is given to its moment, or to nobody's where that is done already."""
        found = self._modules.get(module)
        if found is None:
            return
        if module in self.finished:
            self.again.add(module)
            return
        tensor = inputs[0]
        group = self._groups.get(module)
        if group is None:
            group = self._group_for(batch, module, found, tensor)
        group.calls[module] = group.calls.get(module, 0) + 1
        if group.owner == module:
            group.add(batch, tensor, vectors(self._inputs, batch, found, tensor))
        elif not group.holds(batch, tensor):
            self.again.add(module)

    def passed(self, module: str) -> None:
        """Hand out the moment of a module."""
        if not self._keep and module in self._groups:
            self._finish(module)

    def finish(self) -> None:
        """Hand out what was kept."""
        for module in list(self._groups):
            self._finish(module)

    def _finish(self, module: str) -> None:
        group = self._groups.pop(module)
        self.finished.add(module)
        if group.calls[module] != group.calls[group.owner]:
            self.again.add(module)
        if self._keep or module not in self.again:
            self._done(module, group.result(self._label))

    def _group_for(
        self, batch: int, module: str, found: torch.nn.Module, tensor: torch.Tensor
    ) -> _Group:
        latest = self._latest
        is_plain = not isinstance(found, torch.nn.Conv1d | torch.nn.Conv2d)
        if not self._keep and is_plain and latest is not None and latest.holds(batch, tensor):
            self._groups[module] = latest
            return latest
        self._latest = latest = None  # forgotten before another takes its memory
        size = _width(found, tensor)
        shape = (size,) if self._diagonal else (size, size)
        group = _Group(module, torch.zeros(shape, dtype=torch.float64, device=tensor.device))
        self._groups[module] = group
        if is_plain:
            self._latest = group
        return group


def _width(module: torch.nn.Module, tensor: torch.Tensor) -> int:
    if isinstance(module, torch.nn.Conv1d | torch.nn.Conv2d):
        return module.weight[0].numel()
    return tensor.shape[-1]


def _patches(
    module: torch.nn.Conv1d | torch.nn.Conv2d, images: torch.Tensor
) -> Iterator[torch.Tensor]:
    """What each place of a convolution is computed from, image by image: (places, in * kernel)."""

    def both(sizes: Any, first: int) -> tuple[int, int]:
        return (first, sizes[0]) if len(sizes) == 1 else (sizes[0], sizes[1])

    flat = isinstance(module, torch.nn.Conv1d)
    for image in images.unsqueeze(-2) if flat else images:
        found = torch.nn.functional.unfold(
            image[None],
            both(module.kernel_size, 1),
            both(module.dilation, 1),
            both(module.padding, 0),
            both(module.stride, 1),
        )
        yield found[0].t()
