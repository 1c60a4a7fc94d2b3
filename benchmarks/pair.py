"""Reads a pair of checkpoints, PAIR/base and PAIR/tuned, tensor by tensor."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from files import SIDES
from safetensors import safe_open


@dataclass(frozen=True)
class Pair:
    """Where every tensor of the two checkpoints lies.

    Attributes:
        base: The shard that holds each tensor of the base, by tensor name.
        tuned: The same for the fine-tuned checkpoint.
    """

    base: Mapping[str, Path]
    tuned: Mapping[str, Path]


def open_pair(directory: Path) -> Pair:
    """Opens both checkpoints by their headers.

    Args:
        directory: The folder that holds `base` and `tuned`.

    Returns:
        The shard of every tensor, for both sides.
    """
    return Pair(*(_shards(directory / side) for side in SIDES))


def matrix_names(pair: Pair) -> list[str]:
    """Names the two-dimensional tensors that both checkpoints hold.

    Raises:
        ValueError: A matrix has not the same shape in both checkpoints.
    """
    names = []
    for name in pair.base:
        if name not in pair.tuned:
            continue
        shape, tuned_shape = (_shape(shards[name], name) for shards in (pair.base, pair.tuned))
        if len(shape) == 2 and shape != tuned_shape:
            raise ValueError(f"{name}: {shape} in the base, {tuned_shape} in the tuned checkpoint")
        if len(shape) == 2:
            names.append(name)
    return names


def read(shards: Mapping[str, Path], name: str) -> torch.Tensor:
    """Reads one tensor."""
    with safe_open(shards[name], framework="pt") as file:
        tensor: torch.Tensor = file.get_tensor(name)
    return tensor


def delta(pair: Pair, name: str) -> torch.Tensor:
    """Computes tuned - base of one tensor, in fp64, where it is exact for bf16 and fp16.

    Args:
        pair: The two checkpoints.
        name: A tensor that both hold.

    Returns:
        The delta, `(out, in)`, fp64.
    """
    return read(pair.tuned, name).double().sub_(read(pair.base, name))


def _shards(model: Path) -> dict[str, Path]:
    files = sorted(model.glob("*.safetensors"))
    if not files:
        raise FileNotFoundError(f"no .safetensors file in {model}")
    shards: dict[str, Path] = {}
    for path in files:
        with safe_open(path, framework="pt") as file:
            shards.update(dict.fromkeys(file.keys(), path))
    return shards


def _shape(path: Path, name: str) -> list[int]:
    with safe_open(path, framework="pt") as file:
        shape: list[int] = file.get_slice(name).get_shape()
    return shape
