"""Running a model of transformers whose weights stay on disk, or are computed when they are needed.

    for number, outputs in run(open_model(checkpoint), batches):
        ...                                     # outputs["logits"], ...

Weights are loaded when a module is entered and dropped when nobody is inside it any more, so memory
holds the activations of all batches and the parameters of one module, whatever the model's size.

All batches go through in one pass over the weights. Each batch's forward runs in a thread of its
own, but only one of them computes at a time: it goes on until it needs a module that is not loaded.
When all wait, what nobody is inside is dropped, the first wanted module in the model's order is
loaded, and those that wait for it go on, one after the other, in the order of the batches. Whatever
way a batch takes through the model (experts, say), the same inputs give the same bits.
"""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from loratool.checkpoint import Checkpoint
from loratool.errors import InputError, LoratoolError
from loratool.in_memory import in_memory
from loratool.quiet import quiet, shorten
from loratool.shell import Shell, build_shell
from loratool.skeleton import build_skeleton, complete_config, is_diffusers
from loratool.sources import Sources, resolve

Batch = Mapping[str, torch.Tensor]
Outputs = dict[str, Any]

# What may be asked of a parameter without its values.
_METADATA = frozenset(
    (
        *("shape", "dtype", "device", "ndim", "layout", "requires_grad", "is_leaf", "itemsize"),
        *("nbytes", "is_cuda", "is_cpu", "is_meta", "is_sparse", "is_quantized", "is_mps"),
        *("grad", "grad_fn", "size", "dim", "numel", "nelement", "ndimension", "element_size"),
        *("is_floating_point", "is_complex", "get_device", "__len__", "stride", "is_xpu"),
    )
)


@dataclass(frozen=True)
class Model:
    """A model that can be run; `run` it as often as you like, but not twice at a time.

    Attributes:
        shell: the class named in its config, without weights.
        tensors: the checkpoint, by the names in memory.
        sources: which of these tensors each parameter takes its values from.
        label: how messages call it.
        notes: what had to be guessed.
    """

    shell: Shell
    tensors: Checkpoint
    sources: Sources
    label: str
    notes: tuple[str, ...] = ()

    @property
    def config(self) -> Any:
        """The config, as an object of transformers."""
        return self.shell.model.config

    def parameter(self, name: str, device: torch.device | None = None) -> torch.Tensor:
        """Read the values of a parameter or persistent buffer, in the type that it is computed in.

        They may be a view of a file: do not write to them.
        """
        owner, _, leaf = name.rpartition(".")
        module = self.shell.model.get_submodule(owner)
        like: torch.Tensor | None = module._parameters.get(leaf)
        like = module._buffers[leaf] if like is None else like
        assert like is not None  # it is one of the sources' names
        values = self.tensors[self.sources.keys[name]].read()
        if values.is_floating_point() or like.is_floating_point():
            values = values.to(like.dtype)
        return values.to(device) if device is not None else values


class Watch:
    """What may be looked at while batches pass; override what you need.

    All methods are called by one thread at a time.
    """

    def reached(self, batch: int, module: str, inputs: tuple[Any, ...]) -> None:
        """A module with parameters of its own is entered; its weights may not be loaded yet.

        Args:
            batch: the batch's number.
            module: the module's name in memory.
            inputs: as in `called`.
        """

    def called(self, batch: int, module: str, inputs: tuple[Any, ...]) -> None:
        """A module with parameters of its own is entered, and its weights are loaded.

        Args:
            batch: the batch's number.
            module: the module's name in memory.
            inputs: its arguments, the positional ones first. Do not change or keep them longer
                than needed: they are the memory that the pass takes.
        """

    def left(
        self, batch: int, module: torch.nn.Module, inputs: tuple[Any, ...], output: Any
    ) -> None:
        """A module, with or without parameters of its own, has done its work.

        Args:
            batch: the batch's number.
            module: itself.
            inputs: as in `called`.
            output: what it returns. Do not change or keep it, either.
        """

    def passed(self, module: str) -> None:
        """A module's weights are dropped.

        In nearly all models every batch that calls it at all has done so by now. A module that
        stands in several places (ALBERT's layers), or that batches reach in another order than the
        model's, is called again, and passed again.
        """


def open_model(
    checkpoint: Checkpoint,
    dtype: torch.dtype = torch.float32,
    architecture: str = "",
    attention: str | None = None,
) -> Model:
    """Build the class that a checkpoint's config.json names and find its parameters; reads headers.

    Args:
        checkpoint: as on disk, or computed.
        dtype: of weights and activations; on most CPUs only fp32 is fast and exact.
        architecture: model class or type, where config.json does not say.
        attention: "eager" or "sdpa"; None for transformers' choice.

    Raises:
        InputError: there is no config, transformers cannot build the class, or tensors are missing
            or of another shape.
    """
    if is_diffusers(checkpoint.config) or checkpoint.components:
        raise InputError(f"{checkpoint.label}: is a diffusers model: only transformers' can be run")
    shapes = {name: tensor.shape for name, tensor in checkpoint.items()}
    config, notes = complete_config(checkpoint.config, shapes, architecture=architecture)
    if config is None:
        raise InputError(
            f"{checkpoint.label}: has no config.json, so its class is not known; name it with "
            "--architecture"
        )
    try:
        shell = build_shell(config, dtype, attention)
        tensors = in_memory(checkpoint, build_skeleton(config, shapes, strict=False))
    except InputError as error:
        raise InputError(f"{checkpoint.label}: cannot be run: {error}") from error
    return Model(shell, tensors, resolve(tensors, shell), checkpoint.label, notes)


def whole_model(model: Model, device: torch.device | None = None) -> torch.nn.Module:
    """The model with all of its weights in memory, in evaluation mode, tied parameters tied.

    A new module, with parameters of its own that may be changed and need no gradients yet.
    """
    placeholders = {id(parameter): parameter for parameter in model.shell.model.parameters()}
    made = copy.deepcopy(model.shell.model, placeholders)
    parameters: dict[str, torch.nn.Parameter] = {}
    for name, key in model.sources.keys.items():
        owner, _, leaf = name.rpartition(".")
        module = made.get_submodule(owner)
        if leaf in module._buffers:
            module._buffers[leaf] = model.parameter(name).clone()
            continue
        if key not in parameters or name in model.sources.untied:
            values = model.parameter(name).clone()
            parameters[key] = torch.nn.Parameter(values, requires_grad=False)
        module._parameters[leaf] = parameters[key]
    return made.to(device) if device is not None else made


def run(
    model: Model,
    batches: Sequence[Batch],
    watch: Watch | None = None,
    *,
    hidden_states: bool = False,
    device: torch.device | None = None,
    progress: Callable[[str, int], None] | None = None,
) -> Iterator[tuple[int, Outputs]]:
    """Run all batches through a model in one pass over its weights.

    Without gradients, dropout and cache. Outputs come as the batches finish, which is in their
    order unless they take different ways; take what you need of each before asking for the next,
    for the logits of a language model are large. Nothing happens before the first is asked for.

    Args:
        model: as `open_model` gives it.
        batches: the arguments of each forward call, by name.
        watch: is told of every module as it is called and passed.
        hidden_states: whether outputs have `hidden_states`, one tensor for the embeddings and one
            for each layer.
        device: where to compute; None for the CPU.
        progress: is told each module's name and the bytes of its parameters as it is loaded.

    Yields:
        The number of a batch, and its outputs by name as transformers calls them (`logits`, ...).

    Raises:
        InputError: the model cannot be run on a batch.
    """
    extra = {"output_hidden_states": True} if hidden_states else {}
    arguments = [{**batch, **extra} for batch in batches]
    one_pass = _Pass(model, arguments, watch or Watch(), device, progress or (lambda *_: None))
    try:
        for found in one_pass.run():
            if not isinstance(found, str):
                yield found
    finally:
        one_pass.close()


def stops(
    model: Model, batches: Sequence[Batch], watch: Watch, *, device: torch.device | None = None
) -> Iterator[str]:
    """As `run`, for those who want to be asked before weights are loaded instead of outputs.

    Args:
        model: as `open_model` gives it.
        batches: the arguments of each forward call, by name.
        watch: is told of every module as it is reached, called and passed.
        device: where to compute; None for the CPU.

    Yields:
        The name of each module in memory whose weights are loaded next, once every batch waits for
        it or for a later one. A batch that waits has told the watch what it has reached.

    Raises:
        InputError: the model cannot be run on a batch.
    """
    one_pass = _Pass(model, batches, watch, device, lambda *_: None)
    try:
        for found in one_pass.run():
            if isinstance(found, str):
                yield found
    finally:
        one_pass.close()


@dataclass
class _Owner:
    """A module with parameters or persistent buffers of its own.

    Attributes:
        order: its place in the model.
        name: in memory.
        module: itself.
        names: attribute -> the parameter's or buffer's name in memory.
        absent: attribute -> what stands for a parameter while it is not loaded.
        loaded: whether its values are.
        inside: how many calls, of all batches, need it just now.
    """

    order: int
    name: str
    module: torch.nn.Module
    names: dict[str, str]
    absent: dict[str, torch.Tensor] = field(default_factory=dict)
    loaded: bool = False
    inside: int = 0


class _Abandoned(BaseException):
    """Ends a forward call whose result nobody wants any more."""


class _Lane(threading.Thread):
    """The forward call of one batch.

    Attributes:
        number: the batch's.
        wanted: what it waits for; None before it starts.
        finished: whether it has a result or an error.
        frames: for each module that it is inside, what it needs there.
    """

    def __init__(self, number: int, work: Callable[[], Outputs]) -> None:
        super().__init__(daemon=True, name=f"batch {number}")
        self.number = number
        self.wanted: _Owner | None = None
        self.finished = False
        self.result: Outputs | None = None
        self.error: BaseException | None = None
        self.frames: list[list[_Owner]] = []
        self._work: Callable[[], Outputs] | None = work
        self._abandoned = False
        self._go, self._back = threading.Semaphore(0), threading.Semaphore(0)

    def run(self) -> None:
        """Compute; called by `start`."""
        try:
            self._await_turn()
            assert self._work is not None
            with torch.no_grad():
                self.result = self._work()
        except _Abandoned:
            pass
        except BaseException as error:
            self.error = error
        finally:
            self._work = None
            self.finished = True
            self._back.release()

    def take_turn(self) -> None:
        """Let it compute until it waits again or is finished; called by the pass."""
        self._go.release()
        self._back.acquire()

    def need(self, owner: _Owner) -> None:
        """Hold a module's values until the innermost module is left; called inside the lane."""
        frame = self.frames[-1]
        if any(held is owner for held in frame):
            return
        frame.append(owner)
        owner.inside += 1
        while not owner.loaded:
            self.wanted = owner
            self._back.release()
            self._await_turn()

    def leave(self) -> None:
        """Give up what the innermost module held; called inside the lane."""
        for owner in self.frames.pop():
            owner.inside -= 1

    def abandon(self) -> None:
        """End it at its next step; called by the pass."""
        self._abandoned = True
        self._go.release()
        self.join()

    def _await_turn(self) -> None:
        self._go.acquire()
        if self._abandoned:
            raise _Abandoned


class _Absent(torch.Tensor):
    """A parameter that is not loaded: what is computed with it waits until it is.

    Modules load their own parameters when they are called. This is for code that takes a parameter
    of a module without calling it (torch's attention, tied heads, state-space mixers).
    """

    owner: _Owner
    leaf: str
    _is_param = True

    @staticmethod
    def make(owner: _Owner, leaf: str, like: torch.Tensor, device: torch.device) -> _Absent:
        values = torch.zeros((), dtype=like.dtype, device=device).expand(like.shape)
        made: _Absent = torch.Tensor._make_subclass(_Absent, values)
        made.owner, made.leaf = owner, leaf
        return made

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        named = getattr(func, "__self__", func) if func.__name__ == "__get__" else func
        with torch._C.DisableTorchFunctionSubclass():
            if named.__name__ in _METADATA:
                return func(*args, **(kwargs or {}))
            return func(*_present(args), **_present(dict(kwargs or {})))


def _present(value: Any) -> Any:
    """Arguments with loaded parameters in the place of absent ones."""
    if isinstance(value, _Absent):
        lane = threading.current_thread()
        if not (isinstance(lane, _Lane) and lane.frames):
            raise AssertionError(f"{value.owner.name}.{value.leaf} is used outside of a pass")
        lane.need(value.owner)
        return value.owner.module._parameters[value.leaf]
    if type(value) in (list, tuple):
        return type(value)(_present(item) for item in value)
    if type(value) is dict:
        return {key: _present(item) for key, item in value.items()}
    return value


class _Pass:
    """One pass of all batches over the weights."""

    def __init__(
        self,
        model: Model,
        batches: Sequence[Mapping[str, Any]],
        watch: Watch,
        device: torch.device | None,
        progress: Callable[[str, int], None],
    ) -> None:
        self._model = model
        self._watch = watch
        self._device = device or torch.device("cpu")
        self._progress = progress
        self._owners = _owners(model)
        self._by_module = {owner.module: owner for owner in self._owners}
        self._undo: list[Callable[[], None]] = []
        self._lanes = [
            _Lane(number, lambda batch=batch: self._forward(batch))  # type: ignore[misc]
            for number, batch in enumerate(batches)
        ]

    def run(self) -> Iterator[tuple[int, Outputs] | str]:
        """Yield a batch's outputs when it is finished, and a module's name before it is loaded."""
        self._prepare()
        for lane in self._lanes:
            lane.start()
        waiting = list(self._lanes)
        while waiting:
            for lane in waiting:
                if lane.wanted is not None and not lane.wanted.loaded:
                    continue
                with quiet():
                    lane.take_turn()
                if lane.finished:
                    yield lane.number, self._result(lane)
            waiting = [lane for lane in waiting if not lane.finished]
            self._drop()
            wanted = [lane.wanted for lane in waiting if lane.wanted is not None]
            if wanted:
                first = min(wanted, key=lambda owner: owner.order)
                yield first.name
                self._load(first)

    def close(self) -> None:
        """End what still runs, and make the shell what it was."""
        for lane in self._lanes:
            if lane.is_alive():
                lane.abandon()
        for undo in self._undo:
            undo()

    def _prepare(self) -> None:
        for owner in self._owners:
            held = owner.module._parameters
            for leaf in owner.names:
                placeholder = held.get(leaf)
                if placeholder is not None:
                    owner.absent[leaf] = _Absent.make(owner, leaf, placeholder, self._device)
                    self._undo.append(_restorer(held, leaf))
                    _set(held, leaf, owner.absent[leaf])
        for module in self._model.shell.model.modules():
            for leaf, buffer in module._buffers.items():
                if buffer is not None:
                    self._undo.append(_restorer(module._buffers, leaf))
                    module._buffers[leaf] = buffer.to(self._device)
            entered = module.register_forward_pre_hook(self._enter, with_kwargs=True)
            left = module.register_forward_hook(self._leave, with_kwargs=True, always_call=True)
            self._undo += [entered.remove, left.remove]

    def _forward(self, batch: Mapping[str, Any]) -> Outputs:
        given = {n: v.to(self._device) if torch.is_tensor(v) else v for n, v in batch.items()}
        return dict(self._model.shell.model(**given))

    def _result(self, lane: _Lane) -> Outputs:
        lane.join()
        if isinstance(lane.error, Exception) and not isinstance(lane.error, LoratoolError):
            raise InputError(
                f"{self._model.label}: {self._model.shell.architecture} cannot be run on batch "
                f"{lane.number + 1}: {shorten(lane.error)}"
            ) from lane.error
        if lane.error is not None:
            raise lane.error
        result, lane.result = lane.result, None
        assert result is not None
        return result

    def _enter(self, module: torch.nn.Module, args: Any, kwargs: Any) -> None:
        lane = threading.current_thread()
        assert isinstance(lane, _Lane)  # the shell is this pass's as long as it runs
        lane.frames.append([])
        owner = self._by_module.get(module)
        if owner is not None:
            inputs = (*args, *kwargs.values())
            self._watch.reached(lane.number, owner.name, inputs)
            lane.need(owner)
            self._watch.called(lane.number, owner.name, inputs)

    def _leave(self, module: torch.nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        lane = threading.current_thread()
        assert isinstance(lane, _Lane)
        lane.leave()
        if output is not None:  # it is when the module fails
            self._watch.left(lane.number, module, (*args, *kwargs.values()), output)

    def _load(self, owner: _Owner) -> None:
        size = 0
        for leaf, name in owner.names.items():
            values = self._model.parameter(name, self._device)
            size += values.nbytes
            if leaf in owner.absent:
                _set(owner.module._parameters, leaf, torch.nn.Parameter(values, False))
            else:
                owner.module._buffers[leaf] = values
        owner.loaded = True
        self._progress(owner.name, size)

    def _drop(self) -> None:
        for owner in self._owners:
            if owner.loaded and not owner.inside:
                for leaf, absent in owner.absent.items():
                    _set(owner.module._parameters, leaf, absent)
                owner.loaded = False
                self._watch.passed(owner.name)


def _owners(model: Model) -> list[_Owner]:
    owners = []
    for order, (name, module) in enumerate(model.shell.model.named_modules()):
        leaves = [leaf for leaf, value in module._parameters.items() if value is not None]
        leaves += [
            leaf
            for leaf, value in module._buffers.items()
            if value is not None and _joined(name, leaf) in model.sources.keys
        ]
        if leaves:
            names = {leaf: _joined(name, leaf) for leaf in leaves}
            owners.append(_Owner(order, name, module, names))
    return owners


def _joined(module: str, leaf: str) -> str:
    return f"{module}.{leaf}" if module else leaf


def _set(held: dict[str, Any], leaf: str, value: torch.Tensor) -> None:
    held[leaf] = value


def _restorer(held: dict[str, Any], leaf: str) -> Callable[[], None]:
    """What puts back the present value."""
    before = held[leaf]
    return lambda: _set(held, leaf, before)
