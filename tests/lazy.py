"""Adapters in memory, of updates of any kind."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch

from loratool.adapter import Adapter, LazyUpdate
from loratool.checkpoint import LazyTensor
from loratool.dtypes import dtype_name
from loratool.updates import (
    DoRA,
    Experts,
    LowRank,
    Replacement,
    Rows,
    Sparse,
    Update,
    tensors_of,
)
from tests import updates as some
from tests.updates import Shape, randn

Given = tuple[Update, Shape]


def lazy_tensor(name: str, tensor: torch.Tensor) -> LazyTensor:
    def blocks() -> Iterator[torch.Tensor]:
        yield tensor

    return LazyTensor(name, dtype_name(tensor.dtype), tuple(tensor.shape), blocks)


def rows(indices: tuple[int, ...], columns: int = 4, seed: int = 0) -> Rows:
    """Some rows of a table, random."""
    return Rows(indices, lazy_tensor("rows", randn(seed, len(indices), columns).float()))


def replacement(name: str, tensor: torch.Tensor) -> Replacement:
    return Replacement(lazy_tensor(name, tensor))


def experts(
    seed: int, number: int, out: int, inner: int, rank: int, scale: float = 1.0,
    dtype: torch.dtype = torch.float32,
) -> Experts:  # fmt: skip
    """Experts whose singular values fall off."""
    falling = 0.5 ** torch.arange(rank, dtype=torch.float64)
    b = randn(seed, number, out, rank) * falling
    return Experts(randn(seed + 1, number, rank, inner).to(dtype), b.to(dtype), scale)


def adapter_of(found: Mapping[str, Given], **fields: Any) -> Adapter:
    """An adapter of updates with the shapes of their weights."""

    def lazy(name: str, update: Update, shape: Shape) -> LazyUpdate:
        if isinstance(update, Rows | Replacement):
            dtype = update.tensor.dtype
        else:
            dtype = dtype_name(tensors_of(update)[0][1].dtype)
        added = update.added if isinstance(update, DoRA | Sparse) else update
        rank = added.rank if isinstance(added, LowRank | Experts) else None
        indices = update.indices if isinstance(update, Rows) else ()
        return LazyUpdate(name, update.kind, shape, dtype, lambda: update, rank=rank, rows=indices)

    return Adapter({name: lazy(name, *given) for name, given in found.items()}, **fields)


def loaded(adapter: Adapter) -> dict[str, Update]:
    """What its updates are; without those that change nothing."""
    found = {name: update.load() for name, update in adapter.items()}
    return {name: update for name, update in found.items() if update is not None}


def delta(update: Update, shape: Shape) -> torch.Tensor:
    """The delta of a linear update as it is defined, in fp64 and of the weight's shape."""
    assert not isinstance(update, Rows | Replacement)
    if isinstance(update, Experts):
        return torch.stack(matrices(update))
    return some.delta(update, shape).reshape(shape)


def matrices(update: LowRank | Experts) -> list[torch.Tensor]:
    """The deltas of all experts, or the one, in fp64."""
    parts = (
        [update] if isinstance(update, LowRank) else list(map(update.expert, range(len(update.a))))
    )
    return [part.scale * part.b.double() @ part.a.double() for part in parts]


def close(one: torch.Tensor, other: torch.Tensor, tolerance: float = 1e-12) -> bool:
    size = max(float(one.norm()), float(other.norm()), math.ulp(0))
    return bool((one - other).norm() <= tolerance * size)
