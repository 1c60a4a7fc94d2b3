"""Experts' weights: one of the gate's and the up projection's rows in transformers, two elsewhere.

transformers 5 holds a layer's experts as `experts.gate_up_proj` (E, 2 I, H), the gate's rows first,
and `experts.down_proj` (E, H, I). MLX and GGUF have three tensors.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

from loratool.adapter import LazyUpdate
from loratool.errors import Problem
from loratool.updates import Experts, Update
from loratool_plugins.adapter_formats._scales import TORCH_TYPES, fold

if TYPE_CHECKING:
    import torch

GATE_UP, DOWN = "gate_up_proj", "down_proj"


def joined(gate: Experts, up: Experts, shared: bool = False) -> Experts:
    """The update of both halves.

    Args:
        gate: of the first half of the rows; a (E, r, H), b (E, I, r).
        up: of the second.
        shared: whether both have the same `a`, which then serves both.

    Returns:
        a (E, R, H), b (E, 2 I, R), R being the sum of the ranks, or the rank if it is shared.
    """
    import torch

    scale = gate.scale or up.scale or 1.0
    gate_b, up_b = (fold(half.b, half.scale / scale, TORCH_TYPES).values for half in (gate, up))
    kind = torch.promote_types(gate_b.dtype, up_b.dtype)
    if shared:
        return Experts(gate.a, torch.cat([gate_b.to(kind), up_b.to(kind)], dim=1), scale)
    experts, rows, rank = gate_b.shape
    b = torch.zeros(experts, rows + up_b.shape[1], rank + up.rank, dtype=kind)
    b[:, :rows, :rank] = gate_b
    b[:, rows:, rank:] = up_b
    kind = torch.promote_types(gate.a.dtype, up.a.dtype)
    return Experts(torch.cat([gate.a.to(kind), up.a.to(kind)], dim=1), b, scale)


def halves(update: Experts) -> tuple[Experts, Experts, bool]:
    """The updates of the gate's rows and of the others', and whether they share all of `a`.

    Columns of b that are zero in a half are left out of it, with their rows of `a`.
    """
    rows = update.b.shape[1] // 2
    gate, up = update.b[:, :rows], update.b[:, rows:]
    kept = [_used(gate), _used(up)]
    if all(bool(columns.all()) for columns in kept):
        return replace(update, b=gate), replace(update, b=up), True
    first, second = (
        Experts(update.a[:, columns], half[:, :, columns], update.scale)
        for half, columns in zip((gate, up), kept, strict=True)
    )
    return first, second, False


def _used(b: torch.Tensor) -> torch.Tensor:
    """Which columns of b (E, rows, r) are not zero; the first one if all are."""
    used: torch.Tensor = (b != 0).any(dim=1).any(dim=0)
    if not used.any():
        used[0] = True
    return used


def padded(update: Experts, rank: int) -> Experts:
    """The same delta with factors of a larger rank, zeros being added."""
    from torch.nn.functional import pad

    more = rank - update.rank
    return replace(update, a=pad(update.a, (0, 0, 0, more)), b=pad(update.b, (0, more)))


def assembled(
    module: str, parts: Mapping[str, LazyUpdate], shared: bool
) -> tuple[list[LazyUpdate], Problem | None]:
    """The updates of transformers' two parameters of experts.

    Args:
        module: transformers' name of the module that holds them.
        parts: "gate", "up" and "down", as far as they have updates -> these, (E, rows, columns).
        shared: whether gate and up have the same `a`.

    Returns:
        The updates, and what is wrong, if anything is.
    """
    found = [replace(parts["down"], name=f"{module}.{DOWN}")] if "down" in parts else []
    there = [parts[which] for which in ("gate", "up") if which in parts]
    if not there:
        return found, None
    gate, up = parts.get("gate", there[0]), parts.get("up", there[0])
    if gate.shape != up.shape:
        message = "the gate's and the up projection's updates have different shapes"
        return found, Problem("error", up.name, message, f"{gate.shape}", f"{up.shape}")
    missing = None if len(there) == 2 else "up" if "gate" in parts else "gate"
    shared = shared or missing is not None
    number, rows, width = gate.shape
    whole = replace(
        gate,
        name=f"{module}.{GATE_UP}",
        shape=(number, 2 * rows, width),
        load=_joining(gate, up, shared, missing),
        rank=(gate.rank or 0) + (0 if shared else up.rank or 0),
        stored=tuple(tensor for half in there for tensor in half.stored),
    )
    return [*found, whole], None


def _joining(
    gate: LazyUpdate, up: LazyUpdate, shared: bool, missing: str | None
) -> Callable[[], Update]:
    """Both halves' update; the missing one's is zero."""

    def load() -> Update:
        first, second = gate.load(), up.load()
        if not isinstance(first, Experts) or not isinstance(second, Experts):
            raise AssertionError("the parts of experts are experts")
        if missing == "gate":
            first = replace(first, b=first.b.new_zeros(first.b.shape))
        elif missing == "up":
            second = replace(second, b=second.b.new_zeros(second.b.shape))
        return joined(first, second, shared)

    return load
