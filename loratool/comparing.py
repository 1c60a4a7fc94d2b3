"""Several models run on the same inputs, and compared with one of them.

Models are run one after the other, each in one pass over its weights (`loratool.running`). What the
first one, the reference, answers and hands from layer to layer is put aside in a temporary file;
the others are compared with it while they run, so that memory holds no more than for one of them.
Where the file would become too large, the inputs are taken in several groups of batches, and each
group is one pass of every model.
"""

from __future__ import annotations

import shutil
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from loratool.answers import Answer, answers_of
from loratool.calibration import Inputs
from loratool.errors import InputError, MismatchError
from loratool.fidelity import Tally
from loratool.quiet import quiet, shorten
from loratool.reports import counted
from loratool.running import Batch, Model, Watch, run
from loratool.spool import Spool

Progress = Callable[[str, int], None]

# Bytes put aside at a time, and the share of the free disk that is taken at most.
_SPOOL, _SHARE_OF_DISK = 8 << 30, 0.5
# Rows and tokens of the trial.
_TRIAL_ROWS, _TRIAL_TOKENS = 2, 8


def compare(
    reference: Model,
    models: Sequence[Model],
    groups: Sequence[Inputs],
    device: torch.device | None,
    progress: Progress,
) -> list[Tally]:
    """Run every model, and say how close each is to the reference.

    Args:
        reference: what the others are compared with.
        models: the others, with the same parameters (`require_same_shapes`).
        groups: the inputs, as `divide` gives them.
        device: where to compute; None for the CPU.
        progress: is told each module's name and the bytes of its weights as it is loaded.

    Raises:
        InputError: a model cannot be run, or gives NaN.
        OutputError: the place for temporary files is full.
    """
    tallies = [Tally() for _ in models]
    for inputs in groups:
        with Spool() as spool:
            for batch, name, answer in _answers(reference, inputs, spool.put, device, progress):
                spool.put((batch, name), answer.values)
            for model, tally in zip(models, tallies, strict=True):
                _compare(model, inputs, spool, tally, device, progress)
    return tallies


def divide(reference: Model, inputs: Inputs, limit: int | None = None) -> tuple[Inputs, ...]:
    """Try a few tokens on the reference without its weights, and divide the inputs into groups.

    Args:
        reference: what is to be run.
        inputs: all of them.
        limit: bytes that may be put aside at a time; None for 8 GiB or half of the free disk.

    Raises:
        InputError: the reference cannot be run on such inputs.
    """
    size = _bytes_a_position(reference, inputs)
    if limit is None:
        free = shutil.disk_usage(tempfile.gettempdir()).free
        limit = min(_SPOOL, int(_SHARE_OF_DISK * free))
    return _groups(inputs, size, limit)


def weight_bytes(model: Model) -> int:
    """Bytes that are loaded in one pass, tied parameters once for each module that has them."""
    modules = model.shell.model.modules()
    own = (p for m in modules for p in m._parameters.values() if p is not None)
    return sum(parameter.nbytes for parameter in own)


def require_same_shapes(model: Model, reference: Model) -> None:
    """Raise MismatchError if a model's answers could be of another shape than the reference's."""
    one, other = (
        {name: tuple(value.shape) for name, value in each.shell.model.state_dict().items()}
        for each in (model, reference)
    )
    wrong = sorted(name for name in one.keys() | other.keys() if one.get(name) != other.get(name))
    if wrong:
        raise MismatchError(
            f"{model.label}: {wrong[0]} has shape {one.get(wrong[0])}, in {reference.label} "
            f"{other.get(wrong[0])} ({counted(len(wrong), 'such tensor')}): their answers cannot "
            "be compared"
        )


def layers_of(model: torch.nn.Module) -> dict[torch.nn.Module, str]:
    """The layers that a model consists of: module -> name.

    Those are the members of its outermost lists of modules that are themselves made of modules:
    `model.layers.0`, `encoder.layer.0`, `h.0`, the blocks of encoder and decoder.
    """
    found: dict[torch.nn.Module, str] = {}
    lists: list[str] = []
    for name, module in model.named_modules():
        if any(name.startswith(f"{outer}.") for outer in lists):
            continue
        if isinstance(module, torch.nn.ModuleList):
            members = list(module.named_children())
            if all(any(True for _ in member.children()) for _, member in members):
                lists.append(name)
                found |= {member: f"{name}.{number}" for number, member in members}
    return found


class _Listener(Watch):
    """Tells what layers hand on."""

    def __init__(
        self, model: Model, inputs: Inputs, tell: Callable[[tuple[int, str], torch.Tensor], None]
    ) -> None:
        self._layers = layers_of(model.shell.model)
        self._is_alone = len({name.rpartition(".")[0] for name in self._layers.values()}) == 1
        self._inputs = inputs
        self._tell = tell
        self._calls: Counter[tuple[int, str]] = Counter()

    def left(
        self, batch: int, module: torch.nn.Module, inputs: tuple[Any, ...], output: Any
    ) -> None:
        name = self._layers.get(module)
        if name is None:
            return
        self._calls[batch, name] += 1
        call = self._calls[batch, name]
        stack, _, number = name.rpartition(".")
        if number == "0" and call == 1:
            before = "embeddings" if self._is_alone else f"{stack} embeddings"
            self._told(batch, before, inputs)
        # Where all layers are one module (ALBERT), calls are told apart.
        self._told(batch, name if call == 1 else f"{name} ({call})", output)

    def _told(self, batch: int, name: str, values: Any) -> None:
        tensor = _first_tensor(values)
        if tensor is None:
            return
        if tensor.ndim > 3:  # maps of images: one vector for each sample
            tensor = tensor.flatten(1)
        self._tell((batch, name), self._inputs.unpadded(batch, tensor))


def _first_tensor(value: Any) -> torch.Tensor | None:
    """The first tensor of floats among what a layer takes or returns."""
    if torch.is_tensor(value):
        return value if value.is_floating_point() and value.ndim > 1 else None
    if isinstance(value, Mapping):
        value = tuple(value.values())
    if isinstance(value, list | tuple):
        return next((found for item in value if (found := _first_tensor(item)) is not None), None)
    return None


def _answers(
    model: Model,
    inputs: Inputs,
    tell: Callable[[tuple[int, str], torch.Tensor], None],
    device: torch.device | None,
    progress: Progress,
) -> Iterator[tuple[int, str, Answer]]:
    """Run a model: its answers, each batch's number and the output's name before them."""
    watch = _Listener(model, inputs, tell)

    def loaded(name: str, size: int) -> None:
        progress(f"{model.label}: {name}", size)

    for batch, outputs in run(model, inputs.batches, watch, device=device, progress=loaded):
        found = answers_of(outputs, inputs, batch, model.config, model.label)
        for name, answer in found.items():
            yield batch, name, answer


def _compare(
    model: Model,
    inputs: Inputs,
    spool: Spool,
    tally: Tally,
    device: torch.device | None,
    progress: Progress,
) -> None:
    def hear(key: tuple[int, str], values: torch.Tensor) -> None:
        tally.add_layer(key[1], values, spool.get(key).to(values.device))

    for batch, name, answer in _answers(model, inputs, hear, device, progress):
        expected = spool.get((batch, name)).to(answer.values.device)
        tally.add_answer(name, answer.values, expected, answer.are_logits)


def _bytes_a_position(model: Model, inputs: Inputs) -> float:
    """What is put aside for each token, or each image.

    Raises:
        InputError: the model cannot be run on these inputs.
    """
    batch = _beginning(inputs.batches[0])
    first = replace(inputs, batches=(batch,), rows=(tuple(range(_TRIAL_ROWS)),))
    sizes: list[int] = []
    listener = _Listener(model, first, lambda key, values: sizes.append(4 * values.numel()))
    handles = [
        module.register_forward_hook(
            lambda module, args, kwargs, output: listener.left(
                0, module, (*args, *kwargs.values()), output
            ),
            with_kwargs=True,
        )
        for module in layers_of(model.shell.model)
    ]
    try:
        with torch.no_grad(), quiet():
            outputs = dict(model.shell.model(**batch))
    except Exception as error:
        raise InputError(
            f"{model.label}: {model.shell.architecture} cannot be run on these {inputs.kind}: "
            f"{shorten(error)}"
        ) from error
    finally:
        for handle in handles:
            handle.remove()
    for name, value in outputs.items():
        if torch.is_tensor(value):  # without weights they may be NaN: only sizes are looked at
            outputs[name] = torch.zeros_like(value)
    answers = answers_of(outputs, first, 0, model.config, model.label)
    sizes += [4 * answer.values.numel() for answer in answers.values()]
    return sum(sizes) / _positions(first, 0)


def _beginning(batch: Batch) -> dict[str, torch.Tensor]:
    """A few rows of a batch, a few tokens of each."""
    return {
        name: value[:_TRIAL_ROWS] if value.ndim > 2 else value[:_TRIAL_ROWS, :_TRIAL_TOKENS]
        for name, value in batch.items()
    }


def _positions(inputs: Inputs, batch: int) -> int:
    """Tokens of a batch that are not padding, or its rows."""
    real = inputs.real(batch)
    return len(next(iter(inputs.batches[batch].values()))) if real is None else int(real.sum())


def _groups(inputs: Inputs, size: float, limit: int) -> tuple[Inputs, ...]:
    """The inputs as groups of batches, of which no more than `limit` bytes are put aside."""
    groups: list[list[int]] = []
    filled = 0.0
    for number in range(len(inputs.batches)):
        needed = size * _positions(inputs, number)
        if not groups or filled + needed > limit:
            groups.append([])
            filled = 0.0
        groups[-1].append(number)
        filled += needed
    return tuple(
        replace(
            inputs,
            batches=tuple(inputs.batches[number] for number in group),
            rows=tuple(inputs.rows[number] for number in group),
        )
        for group in groups
    )
