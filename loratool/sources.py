"""Which tensor of a checkpoint each parameter of a model takes its values from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from loratool.checkpoint import Checkpoint, LazyTensor
from loratool.errors import InputError
from loratool.shell import Shell, untie

# How checkpoints converted from TensorFlow call the parameters of a LayerNorm.
_OLD_NAMES = {"LayerNorm.weight": "LayerNorm.gamma", "LayerNorm.bias": "LayerNorm.beta"}


@dataclass(frozen=True)
class Sources:
    """Which tensor of a checkpoint goes where.

    Attributes:
        keys: name in the model -> name in the checkpoint, for parameters and persistent buffers.
        tied: names in the model that take another name's tensor -> that name in the checkpoint.
        untied: names that the config ties but whose tensors differ.
        surplus: names in the checkpoint that the model has no place for.
    """

    keys: Mapping[str, str]
    tied: Mapping[str, str]
    untied: tuple[str, ...]
    surplus: tuple[str, ...]


def resolve(checkpoint: Checkpoint, shell: Shell) -> Sources:
    """Find the checkpoint's tensor for every parameter of a model; untie in `shell` what differs.

    Args:
        checkpoint: names as the class has them in memory, or without (or with) the prefix of its
            base model.
        shell: the model.

    Raises:
        InputError: a parameter has no tensor, or one of another shape.
    """
    prefix = str(getattr(shell.model, "base_model_prefix", ""))
    state = shell.model.state_dict()
    own = {name: _find(checkpoint, name, prefix) for name in state}
    keys, untied = {}, []
    for name in state:
        key = own[name] or next(filter(None, map(own.get, shell.tied.get(name, ()))), None)
        if key is not None:
            keys[name] = key
            _check_shape(checkpoint, key, tuple(state[name].shape), shell.architecture)
    for name, key in keys.items():
        first = keys[shell.tied[name][0]] if name in shell.tied else key
        if key != first and not _equal(checkpoint[key], checkpoint[first]):
            untied.append(name)
    _check_complete(checkpoint, shell, keys)
    untie(shell, untied)
    used = set(keys.values())
    return Sources(
        keys,
        {name: key for name, key in keys.items() if own[name] is None},
        tuple(untied),
        tuple(name for name in checkpoint if checkpoint.aliases.get(name, name) not in used),
    )


def _find(checkpoint: Checkpoint, name: str, prefix: str) -> str | None:
    """The checkpoint's name for a parameter, or None."""
    spellings = [name, name.removeprefix(f"{prefix}."), f"{prefix}.{name}"]
    for new, old in _OLD_NAMES.items():
        spellings += [s.removesuffix(new) + old for s in spellings[:3] if s.endswith(new)]
    for spelling in spellings:
        key = checkpoint.aliases.get(spelling, spelling)
        if key in checkpoint:
            return key
    return None


def _check_shape(
    checkpoint: Checkpoint, key: str, expected: tuple[int, ...], architecture: str
) -> None:
    tensor = checkpoint[key]
    if tuple(tensor.shape) != expected:
        raise InputError(
            f"{tensor.origin or checkpoint.label}: {key} has shape {tuple(tensor.shape)}, but "
            f"{architecture} with this config.json has {expected}; correct the config"
        )


def _check_complete(checkpoint: Checkpoint, shell: Shell, keys: Mapping[str, str]) -> None:
    parameters = (name for name, _ in shell.model.named_parameters(remove_duplicate=False))
    missing = [name for name in parameters if name not in keys]
    if missing:
        more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
        raise InputError(
            f"{checkpoint.label}: has no {', '.join(missing[:3])}{more}, which "
            f"{shell.architecture} needs; is config.json's architecture the right one?"
        )


def _equal(one: LazyTensor, other: LazyTensor) -> bool:
    """Whether two tensors have the same values, as transformers decides whether to tie them."""
    if one.extent is not None and one.extent == other.extent:
        return True
    return one.dtype == other.dtype and torch.equal(one.read(), other.read())
