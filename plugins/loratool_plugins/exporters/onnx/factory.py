"""Modules of the user's own, made by a Python function that is named as `package.module:function`.

The function is given the parsed config.json (or None) and returns the module and inputs to trace it
with:

    def make(config):
        inputs = {"x": torch.randn(2, 7, 16)}
        return MyModel(config["size"]), inputs, {"x": {0: "batch", 1: "steps"}}

The module's state_dict names are the checkpoint's. Its parameters need no values, and keep none.
"""

from __future__ import annotations

import importlib
import inspect
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from loratool.checkpoint import Checkpoint
from loratool.errors import InputError
from loratool.quiet import quiet, shorten
from loratool.shell import Shell, emptied, parameters_on_meta
from loratool_plugins.exporters.onnx.stages import Stage

# Layers that compute an adapter beside its base: package of the class -> its name.
_UNMERGED = {"peft": "BaseTunerLayer", "loralib": "LoRALayer"}
_BATCH = "batch"


def find_function(name: str) -> Callable[[Any], Any]:
    """Import a function; modules in the current directory are found too.

    Args:
        name: as `package.module:function`.

    Raises:
        InputError: there is no such module or function, or the module fails to import.
    """
    module_name, _, function_name = name.partition(":")
    if not re.fullmatch(r"[\w.]+:[\w.]+", name):
        raise InputError(f"{name}: give the factory as package.module:function")
    try:
        with _importing_from(Path.cwd()):
            found: Any = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is not None and (module_name + ".").startswith(error.name + "."):
            raise InputError(
                f"{name}: there is no module {error.name} in the current directory or among the "
                "installed packages"
            ) from error
        raise InputError(f"{name}: {module_name} cannot be imported: {shorten(error)}") from error
    except Exception as error:
        raise InputError(f"{name}: {module_name} cannot be imported: {shorten(error)}") from error
    for part in function_name.split("."):
        found = getattr(found, part, None)
    if not callable(found):
        raise InputError(f"{name}: {module_name} has no function {function_name}")
    function: Callable[[Any], Any] = found
    return function


def make(
    name: str, config: Mapping[str, Any] | None, dtype: torch.dtype = torch.float32
) -> tuple[Shell, Stage]:
    """Call a factory for a module without weights, and for how it is traced.

    Parameters are dropped one by one as they are made; buffers keep their values.

    Args:
        name: of the factory, as `package.module:function`.
        config: the parsed config.json of the checkpoint, if there is one.
        dtype: of the parameters and of all inputs and buffers that are floating-point numbers.

    Raises:
        InputError: the function cannot be found or fails, or what it returns cannot be used.
    """
    function = find_function(name)
    try:
        with quiet(), parameters_on_meta():
            found = function(None if config is None else dict(config))
    except Exception as error:
        raise InputError(f"{name}: raised {type(error).__name__}: {shorten(error)}") from error
    module, inputs, axes = _unpack(name, found)
    refuse_adapters(name, module)
    if lost := [label for label, value in module.named_buffers() if value.is_meta]:
        raise InputError(f"{name}: buffer {lost[0]} has no values; make it on the CPU")
    shell = emptied(type(module).__name__, module.eval(), dtype)
    inputs = _cast(inputs, dtype)
    symbols: dict[str, Any] = {}
    for meanings in axes.values():
        for meaning in meanings.values():
            symbols.setdefault(meaning, torch.export.Dim(meaning))
    shapes = {
        argument: {axis: symbols[meaning] for axis, meaning in axes.get(argument, {}).items()}
        for argument in inputs
    }
    return shell, Stage("model", module, inputs, shapes, axes, None)


def filled(name: str, checkpoint: Checkpoint) -> torch.nn.Module:
    """A factory's module with a checkpoint's values, in fp32; all of it is held.

    Args:
        name: of the factory, as `package.module:function`.
        checkpoint: its tensors' names are those of the module's state_dict.
    """
    with quiet():
        config = checkpoint.config
        module: torch.nn.Module = find_function(name)(None if config is None else dict(config))[0]
    values = {key: tensor.read() for key, tensor in checkpoint.items()}
    stored: dict[int, str] = {}
    parameters = list(module.named_parameters(remove_duplicate=False))
    for key, parameter in parameters:
        if key in values:
            stored.setdefault(id(parameter), key)
    for key, parameter in parameters:  # what is assigned is tied no more
        if key not in values and id(parameter) in stored:
            values[key] = values[stored[id(parameter)]]
    module.load_state_dict(values, strict=False, assign=True)
    return module.float().eval()


def refuse_adapters(label: str, module: torch.nn.Module) -> None:
    """Refuse a module that computes an adapter beside its base instead of having it merged.

    Args:
        label: what to call it.
        module: as it would be traced.

    Raises:
        InputError: a layer of it is one of peft's or loralib's.
    """
    for name, layer in module.named_modules():
        for base in type(layer).__mro__:
            package = base.__module__.partition(".")[0]
            if _UNMERGED.get(package) == base.__name__:
                raise InputError(
                    f"{label}: {name or type(module).__name__} is a layer of {package}, which "
                    "computes its adapter beside the base: about 30% more matrix products at each "
                    "call. Return the base model and name the adapter after BASE, or call "
                    "merge_and_unload() and save that"
                )


def check_names(label: str, shell: Shell, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Compare a module with the checkpoint that is to fill it.

    Args:
        label: the factory's name.
        shell: the module.
        shapes: of the checkpoint's tensors, by name.

    Raises:
        InputError: the checkpoint lacks parameters of the module, or has them in other shapes.
    """
    found = [
        (name, tuple(value.shape))
        for name, value in shell.model.named_parameters(remove_duplicate=False)
        if not any(other in shapes for other in shell.tied.get(name, ()) if other != name)
        or name in shapes
    ]
    own = {name for name, _ in found}
    missing = [name for name, _ in found if name not in shapes]
    if missing:
        unused = [name for name in shapes if name not in own]
        other = f"; the checkpoint's {_some(unused)} is not in the module" if unused else ""
        raise InputError(
            f"{label}: the checkpoint has no {_some(missing)}{other}: the names of the module's "
            "state_dict must be the checkpoint's"
        )
    wrong = [(name, shape) for name, shape in found if tuple(shapes[name]) != shape]
    if wrong:
        name, shape = wrong[0]
        more = f" ({len(wrong) - 1} more like it)" if len(wrong) > 1 else ""
        raise InputError(
            f"{label}: {name} has shape {shape} in the module and {tuple(shapes[name])} in the "
            f"checkpoint{more}"
        )


@contextmanager
def _importing_from(folder: Path) -> Iterator[None]:
    before = list(sys.path)
    sys.path.insert(0, str(folder))
    importlib.invalidate_caches()
    try:
        yield
    finally:
        sys.path[:] = before


def _unpack(
    name: str, found: Any
) -> tuple[torch.nn.Module, dict[str, torch.Tensor], dict[str, dict[int, str]]]:
    """What a factory returned, checked."""
    wanted = f"{name}: must return (module, inputs) or (module, inputs, dynamic_axes)"
    if not (isinstance(found, tuple) and len(found) in (2, 3)):
        raise InputError(f"{wanted}, and returned {type(found).__name__}")
    module, given = found[0], found[1]
    if not isinstance(module, torch.nn.Module):
        raise InputError(f"{wanted}; the module is of type {type(module).__name__}")
    inputs = _named(wanted, module, given)
    if len(found) == 2:
        return module, inputs, _batches(name, inputs)
    axes = found[2]
    if not isinstance(axes, Mapping):
        raise InputError(f"{wanted}; the dynamic_axes are of type {type(axes).__name__}")
    return module, inputs, _checked(name, inputs, axes)


def _named(wanted: str, module: torch.nn.Module, given: Any) -> dict[str, torch.Tensor]:
    """The inputs by the names of forward's arguments."""
    if torch.is_tensor(given):
        given = (given,)
    if isinstance(given, list | tuple):
        arguments = list(inspect.signature(module.forward).parameters)
        if len(given) > len(arguments):
            raise InputError(f"{wanted}; forward takes {len(arguments)} inputs, not {len(given)}")
        given = dict(zip(arguments, given, strict=False))
    if not (isinstance(given, Mapping) and given and all(map(torch.is_tensor, given.values()))):
        raise InputError(f"{wanted}; inputs are tensors by the names of forward's arguments")
    return dict(given)


def _batches(name: str, inputs: Mapping[str, torch.Tensor]) -> dict[str, dict[int, str]]:
    """The first axis of every input as the batch, where nothing else was said."""
    sizes = {key: tuple(value.shape)[:1] for key, value in inputs.items()}
    if len(set(sizes.values())) != 1:
        raise InputError(
            f"{name}: the inputs' first axes differ ({sizes}): return dynamic_axes as well, such "
            'as {"x": {0: "batch"}}'
        )
    return _checked(name, inputs, {key: {0: _BATCH} for key in inputs})


def _checked(
    name: str, inputs: Mapping[str, torch.Tensor], axes: Mapping[str, Mapping[int, str]]
) -> dict[str, dict[int, str]]:
    """Axes that vary, checked against the inputs."""
    sizes: dict[str, int] = {}
    for key, meanings in axes.items():
        if key not in inputs:
            raise InputError(f"{name}: dynamic_axes name {key}, which is not an input")
        for axis, meaning in meanings.items():
            if not (isinstance(axis, int) and 0 <= axis < inputs[key].ndim):
                raise InputError(f"{name}: {key} has no axis {axis}")
            if not str(meaning).isidentifier():
                raise InputError(f"{name}: {meaning!r} cannot be the name of an axis")
            size = inputs[key].shape[axis]
            if size < 2:
                raise InputError(
                    f"{name}: the {meaning} axis of {key} is of size {size}: give inputs of 2 or "
                    "more, or it cannot be told from a fixed one"
                )
            if sizes.setdefault(meaning, size) != size:
                raise InputError(f"{name}: the axis {meaning} is of sizes {sizes[meaning]}, {size}")
    return {key: dict(meanings) for key, meanings in axes.items()}


def _cast(inputs: Mapping[str, torch.Tensor], dtype: torch.dtype) -> dict[str, torch.Tensor]:
    return {
        key: (torch.zeros(value.shape, dtype=value.dtype) if value.is_meta else value.detach()).to(
            dtype if value.is_floating_point() else value.dtype
        )
        for key, value in inputs.items()
    }


def _some(names: list[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return f"{', '.join(names[:3])}{more}"
