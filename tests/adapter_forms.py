"""Adapters written in one format and another, and what merging each of them gives."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

import loratool
from loratool.adapter import Adapter
from loratool.checkpoint import Checkpoint
from loratool.engine import Drain, save_adapter
from loratool.opening import open_adapter
from loratool.steps.convert import Convert

Tensors = dict[str, torch.Tensor]


def save_base(folder: Path, tensors: Mapping[str, torch.Tensor]) -> Path:
    """A checkpoint without a config."""
    folder.mkdir(parents=True)
    values = {name: value.detach().clone().contiguous() for name, value in tensors.items()}
    save_file(values, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def convert(
    source: Path | Adapter, form: str, folder: Path, base: Checkpoint | None = None, **told: Any
) -> Path:
    """Write an adapter in another format; `told` are the options of `loratool convert`."""
    adapter = source if isinstance(source, Adapter) else open_adapter(source)
    result = Convert(format=form, **told).run(adapter, base)
    save_adapter(result, folder, Drain("serial"))
    return folder


def merged(base: Path, adapter: Path | Adapter, folder: Path, weight: float = 1.0) -> Tensors:
    """The tensors of the merged model."""
    loratool.merge(base, [(adapter, weight)]).save(folder, executor="serial")
    found: Tensors = load_file(folder / "model.safetensors")
    return found


def assert_same_bits(one: Mapping[str, torch.Tensor], other: Mapping[str, torch.Tensor]) -> None:
    """Equal names, types and values."""
    assert one.keys() == other.keys()
    for name, value in one.items():
        assert value.dtype == other[name].dtype, name
        assert torch.equal(value, other[name]), name
