"""A model made ready to be traced: its class without weights, and where each weight is found."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from loratool.checkpoint import Checkpoint
from loratool.in_memory import in_memory
from loratool.shell import Shell, build_shell
from loratool.skeleton import build_skeleton
from loratool.sources import Sources, resolve
from loratool_plugins.exporters.onnx.factory import check_names, make
from loratool_plugins.exporters.onnx.fingerprints import Fingerprints, stamp
from loratool_plugins.exporters.onnx.stages import Stage, stages_of


@dataclass(frozen=True)
class Prepared:
    """A model that can be traced.

    Attributes:
        shell: the model; its parameters are fingerprints.
        tensors: the checkpoint, by the names in memory.
        sources: which of these tensors each parameter takes its values from.
        first_names: parameter -> the tensor that it takes; tied ones all take the first's.
        prints: the fingerprints.
        stages: the graphs that the model is exported as.
    """

    shell: Shell
    tensors: Checkpoint
    sources: Sources
    first_names: Mapping[str, str]
    prints: Fingerprints
    stages: tuple[Stage, ...]


def prepare(checkpoint: Checkpoint, dtype: torch.dtype, cache: bool, module: str = "") -> Prepared:
    """Build a checkpoint's model without weights; reads headers.

    Args:
        checkpoint: as on disk, or computed.
        dtype: of the parameters, and of what the model computes in.
        cache: whether a decoder gets a key-value cache.
        module: the function that builds the model, as `package.module:function`; "" to take the
            class that config.json names.

    Raises:
        InputError: the class or function is not there, or tensors are missing or of another shape.
    """
    shell, tensors, sources, made = _resolved(checkpoint, dtype, module)
    _take_integers(shell, tensors, sources)
    names = _first_names(shell, sources)
    prints = stamp(shell, names)
    return Prepared(shell, tensors, sources, names, prints, made or stages_of(shell, cache))


def untied_names(checkpoint: Checkpoint, dtype: torch.dtype, module: str = "") -> tuple[str, ...]:
    """Parameters that are tied by config but have values of their own; arguments as `prepare`."""
    return _resolved(checkpoint, dtype, module)[2].untied


def _resolved(
    checkpoint: Checkpoint, dtype: torch.dtype, module: str
) -> tuple[Shell, Checkpoint, Sources, tuple[Stage, ...]]:
    """A model without weights, and where they are found; the stage that a function gives."""
    made: tuple[Stage, ...] = ()
    if module:
        shell, stage = make(module, checkpoint.config, dtype)
        tensors, made = checkpoint, (stage,)
        check_names(module, shell, {name: tensor.shape for name, tensor in checkpoint.items()})
    else:
        config = checkpoint.config or {}
        shapes = {name: tensor.shape for name, tensor in checkpoint.items()}
        shell = build_shell(config, dtype)
        tensors = in_memory(checkpoint, build_skeleton(config, shapes, strict=False))
    return shell, tensors, resolve(tensors, shell), made


def _first_names(shell: Shell, sources: Sources) -> Mapping[str, str]:
    """Parameter -> the tensor that it takes; tied ones all the first's, which has equal values."""
    return {
        name: key
        if name in sources.untied or name not in shell.tied
        else sources.keys[shell.tied[name][0]]
        for name, key in sources.keys.items()
    }


def _take_integers(shell: Shell, tensors: Checkpoint, sources: Sources) -> None:
    """Give buffers that are no floating-point numbers the checkpoint's values: they are traced."""
    for name, key in sources.keys.items():
        owner, _, leaf = name.rpartition(".")
        buffers = shell.model.get_submodule(owner)._buffers
        like = buffers.get(leaf)
        if like is not None and not like.is_floating_point():
            buffers[leaf] = tensors[key].read().to(like.dtype).clone()
