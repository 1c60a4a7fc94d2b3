"""A model class of transformers, built from its config.json without weights."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from transformers.initialization import no_init_weights
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from loratool.errors import InputError
from loratool.quiet import quiet, shorten
from loratool.skeleton import without_tags


@dataclass(frozen=True)
class Shell:
    """A model class built from its config, without weights.

    Every parameter is one zero on the CPU, expanded to the parameter's shape; buffers have their
    real values. On the meta device transformers would choose other attention kernels, so that the
    graph would be another one, and constants would be lost.

    Attributes:
        architecture: the class's name.
        model: the module, in evaluation mode.
        tied: parameter -> all names, in the model's order, of parameters that are the same tensor.
    """

    architecture: str
    model: torch.nn.Module
    tied: Mapping[str, tuple[str, ...]]


def load_class(content: Mapping[str, Any]) -> tuple[Any, Any]:
    """The transformers class that a config.json names first, and its config object.

    Caches, attentions and hidden states are turned off: the model returns its results only.

    Raises:
        InputError: transformers has no such class, it does not fit the config, or the config's
            values are refused.
    """
    names, model_type = content.get("architectures"), content.get("model_type")
    if not (isinstance(names, list) and names and model_type):
        raise InputError("config.json: must name model_type and architectures")
    cls: Any = getattr(transformers, str(names[0]), None)
    if not _is_model_class(cls):
        raise InputError(
            f"config.json: transformers {transformers.__version__} has no model class "
            f"{names[0]!r}; models that bring their own code are not supported"
        )
    if model_type not in CONFIG_MAPPING:
        raise InputError(f"config.json: transformers knows no model_type {model_type!r}")
    try:
        with quiet():
            config = CONFIG_MAPPING[model_type].from_dict(without_tags(content))
    except Exception as error:
        raise InputError(f"config.json: refused by transformers: {shorten(error)}") from error
    if not isinstance(config, cls.config_class):
        raise InputError(f"config.json: {names[0]} is not a class of model_type {model_type!r}")
    for flag in ("use_cache", "output_attentions", "output_hidden_states"):
        setattr(config, flag, False)
    config.return_dict = True
    return cls, config


def _is_model_class(found: Any) -> bool:
    known = inspect.isclass(found) and issubclass(found, transformers.PreTrainedModel)
    return known and found.config_class is not None


def build_shell(
    content: Mapping[str, Any], dtype: torch.dtype, attention: str | None = None
) -> Shell:
    """Build the class that a config.json names, without weights.

    Args:
        content: the parsed config.json.
        dtype: of the parameters, and of what the model computes in.
        attention: "eager" or "sdpa"; None for transformers' choice.

    Raises:
        InputError: transformers cannot build it.
    """
    cls, config = load_class(content)
    before = torch.get_default_dtype()
    try:
        torch.set_default_dtype(dtype)
        with quiet(), no_init_weights(), parameters_on_meta():
            config.dtype = dtype
            if attention is not None:
                config._attn_implementation = attention
            model = cls(config).eval()
        model.tie_weights()
    except Exception as error:
        raise InputError(f"{cls.__name__}: cannot be built: {shorten(error)}") from error
    finally:
        torch.set_default_dtype(before)
    return emptied(cls.__name__, model)


def emptied(architecture: str, model: torch.nn.Module, dtype: torch.dtype | None = None) -> Shell:
    """Put placeholders in the place of a module's parameters; shared ones stay shared.

    Args:
        architecture: what the model is called.
        model: the module, changed in place.
        dtype: that floating-point parameters and buffers are to have; None for their own.
    """
    _replace_parameters(model, dtype)
    return Shell(architecture, model, _tied_names(model))


@contextmanager
def parameters_on_meta() -> Iterator[None]:
    """Every parameter that is registered inside the block goes to the meta device, buffers do not.

    Moving them one by one as they are made never holds more than one parameter, and code that
    initialises them in place does no harm.
    """
    original = torch.nn.Module.register_parameter

    def register(module: torch.nn.Module, name: str, parameter: torch.nn.Parameter | None) -> None:
        if parameter is not None and not parameter.is_meta:
            parameter = torch.nn.Parameter(parameter.detach().to("meta"), requires_grad=False)
        original(module, name, parameter)

    torch.nn.Module.register_parameter = register  # type: ignore[method-assign,assignment]
    try:
        yield
    finally:
        torch.nn.Module.register_parameter = original  # type: ignore[method-assign]


def _placeholder(like: torch.Tensor, dtype: torch.dtype | None = None) -> torch.nn.Parameter:
    kind = dtype if dtype is not None and like.is_floating_point() else like.dtype
    return torch.nn.Parameter(torch.zeros((), dtype=kind).expand(like.shape), False)


def _replace_parameters(model: torch.nn.Module, dtype: torch.dtype | None) -> None:
    """Put placeholders in the place of parameters; shared ones stay shared."""
    made: dict[torch.nn.Parameter, torch.nn.Parameter] = {}
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                made.setdefault(parameter, _placeholder(parameter, dtype))
                module._parameters[name] = made[parameter]
        for name, buffer in module._buffers.items():
            if dtype is not None and buffer is not None and buffer.is_floating_point():
                module._buffers[name] = buffer.to(dtype)


def _tied_names(model: torch.nn.Module) -> dict[str, tuple[str, ...]]:
    groups: dict[torch.nn.Parameter, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        groups.setdefault(parameter, []).append(name)
    return {name: tuple(names) for names in groups.values() for name in names}


def untie(shell: Shell, names: Iterable[str]) -> None:
    """Give parameters of their own to names that are tied by config but differ in a checkpoint."""
    for name in names:
        owner, _, leaf = name.rpartition(".")
        module = shell.model.get_submodule(owner)
        module._parameters[leaf] = _placeholder(module.get_parameter(leaf))


def position_limit(config: Any) -> int | None:
    """The longest sequence that a model takes, or None if there is no limit."""
    limit = getattr(config.get_text_config(), "max_position_embeddings", None)
    return limit if isinstance(limit, int) and limit > 0 else None
