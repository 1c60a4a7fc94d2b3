"""Which tensor of a base each update of an adapter changes, and how.

Prefixes, orientation, tied weights, heads that the base lacks: all of that is decided here, from
headers alone, and everything that does not fit is collected rather than raised.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from loratool.adapter import Adapter, LazyUpdate
from loratool.alignment import Alignment, align
from loratool.checkpoint import Checkpoint
from loratool.dtypes import is_float
from loratool.errors import MismatchError, Problem
from loratool.skeleton import Skeleton, build_skeleton

# Companions of quantized weights in the common schemes.
_SCALE_SUFFIXES = ("_scale_inv", "_scale", ".absmax", ".quant_state.bitsandbytes__nf4")


@dataclass(frozen=True)
class BoundUpdate:
    """An update with the tensor that it changes.

    Attributes:
        update: the update.
        tensor: the base tensor's name; for a tensor that the base lacks, the name it gets.
        transposed: whether the base stores the weight as (in, out).
    """

    update: LazyUpdate
    tensor: str
    transposed: bool = False


@dataclass(frozen=True)
class Binding:
    """An adapter's updates by base tensor.

    Attributes:
        changed: base tensor name -> what changes it.
        added: tensors that the base lacks, by the adapter's name for them.
        dropped: base tensors that the fine-tuned model does not have.
        alignment: how the adapter's names stand for the base's.
        problems: everything that does not fit.
    """

    changed: Mapping[str, BoundUpdate] = field(default_factory=dict)
    added: Mapping[str, BoundUpdate] = field(default_factory=dict)
    dropped: tuple[str, ...] = ()
    alignment: Alignment = field(default_factory=lambda: Alignment({}))
    problems: tuple[Problem, ...] = ()


def bind(adapter: Adapter, base: Checkpoint) -> Binding:
    """Bind every update to a tensor of `base`, by headers only; nothing is raised."""
    problems = list(adapter.problems)
    shapes = {name: tensor.shape for name, tensor in base.items()}
    names = {name: _full_shape(update) for name, update in adapter.items()}
    moves = [move for move in adapter.moves if any(name.startswith(move[0]) for name in names)]
    try:
        alignment = align(names, shapes, moves, option="")
    except MismatchError as error:
        return Binding(problems=(*problems, Problem("error", adapter.label, str(error))))
    skeleton = build_skeleton(base.config, shapes)
    changed: dict[str, BoundUpdate] = {}
    added: dict[str, BoundUpdate] = {}
    for name, update in adapter.items():
        target = alignment.pairs.get(name)
        found: list[Problem] = []
        if _is_tied_twin(name, update, adapter, alignment, skeleton) and (
            target is None or not update.is_whole
        ):
            continue
        if target is not None:
            tying = bool(adapter.settings.get("ensure_weight_tying"))
            bound, found = _fit(update, target, base, skeleton, tying)
            changed[target] = bound
        elif update.optional:
            continue
        elif update.kind == "replacement":
            added[name] = BoundUpdate(update, name)
            found = _check_addition(update, adapter)
        else:
            found = [_missing(name, alignment, base, skeleton)]
        problems.extend(found)
    dropped = tuple(name for name in adapter.dropped if name in base)
    copies = _tied_copies(changed, base, skeleton)
    changed |= {name: bound for name, bound in copies.items() if name not in dropped}
    return Binding(changed, added, dropped, alignment, tuple(problems))


def _fit(
    update: LazyUpdate, target: str, base: Checkpoint, skeleton: Skeleton, tying: bool
) -> tuple[BoundUpdate, list[Problem]]:
    tensor = base[target]
    if update.kind == "replacement":
        resizable = _may_be_resized(update, target, base)
        severity: Literal["error", "warning"] = "warning" if resizable else "error"
        problems = []
        if tensor.shape != update.shape:
            message = "the adapter replaces it by a tensor of another shape"
            problems = [
                Problem(severity, update.name, message, f"{tensor.shape}", f"{update.shape}")
            ]
        return BoundUpdate(update, target), problems
    problems = []
    transposed = _is_transposed(update, target, tensor.shape, skeleton)
    if (problem := _shape_problem(update, target, tensor.shape, transposed)) is not None:
        problems.append(problem)
    if not is_float(tensor.dtype):
        message = f"{target} is quantized or integer in the base: updates cannot be added to it"
        problems.append(Problem("error", update.name, message, "a float dtype", tensor.dtype))
    if any(f"{target}{end}" in base for end in _SCALE_SUFFIXES):
        message = f"{target} is stored with block scales: updates cannot be added to its codes"
        problems.append(Problem("error", update.name, message))
    if target in skeleton.tied and skeleton.tied[target] in base:
        message = f"is tied to {skeleton.tied[target]} in the base: merging would change both"
        problems.append(Problem("error", update.name, message))
    heads = [head for head, source in skeleton.tied.items() if source == target]
    if heads and not update.is_whole and not tying:
        message = (
            f"{heads[0]} shares its values with it: a merge changes both, the adapter alone "
            "changes only the embedding"
        )
        problems.append(Problem("warning", update.name, message))
    return BoundUpdate(update, target, transposed), problems


def _shape_problem(
    update: LazyUpdate, target: str, shape: tuple[int, ...], transposed: bool
) -> Problem | None:
    """What is wrong with an update's shape for a tensor of the base."""
    if update.kind == "rows":
        return _rows_problem(update, target, shape)
    if update.kind == "ia3" and len(update.shape) == 2:
        axis = update.shape.index(0) ^ 1
        stored = axis ^ int(transposed)
        if len(shape) > stored and shape[stored] == update.shape[axis]:
            return None
        message = f"scales {update.shape[axis]} values, {target} has another number of them"
        return Problem("error", update.name, message, f"{shape}", f"{update.shape[axis]}")
    expected = _swapped(shape) if transposed else shape
    if update.shape == expected or _same_matrix(update.shape, expected):
        return None
    what = "B @ A" if update.kind == "low_rank" else "the update"
    message = f"{what} does not have the shape of {target} in the base"
    return Problem("error", update.name, message, f"{expected}", f"{update.shape}")


def _rows_problem(update: LazyUpdate, target: str, shape: tuple[int, ...]) -> Problem | None:
    if len(shape) != 2 or shape[1] != update.shape[1]:
        message = f"its rows are not those of {target} in the base"
        return Problem("error", update.name, message, f"{shape}", f"{update.shape}")
    if update.rows and max(update.rows) >= shape[0]:
        message = f"{target} has no such row; was the vocabulary resized?"
        expected = f"below {shape[0]}"
        return Problem("error", update.name, message, expected, f"{max(update.rows)}")
    return None


def _swapped(shape: tuple[int, ...]) -> tuple[int, ...]:
    return (*shape[:-2], *shape[:-3:-1])


def _same_matrix(one: tuple[int, ...], other: tuple[int, ...]) -> bool:
    """Whether both are a convolution's weight, whole or as the matrix (out, in * kernel).

    So are 1x1 kernels and linear weights of the same size.
    """
    flat = min(len(one), len(other)) == 2 or _trimmed(one) == _trimmed(other)
    return flat and one[0] == other[0] and math.prod(one) == math.prod(other)


def _trimmed(shape: tuple[int, ...]) -> tuple[int, ...]:
    while len(shape) > 2 and shape[-1] == 1:
        shape = shape[:-1]
    return shape


def _may_be_resized(update: LazyUpdate, target: str, base: Checkpoint) -> bool:
    """Embeddings and heads may have other numbers of rows, and heads' biases."""
    here, there = update.shape, base[target].shape
    if len(here) != len(there) or here[1:] != there[1:]:
        return False
    module, _, leaf = target.rpartition(".")
    weight = base.get(f"{module}.weight")
    is_norm = weight is not None and len(weight.shape) == 1
    return len(here) > 1 or (leaf == "bias" and not is_norm)


def _is_transposed(
    update: LazyUpdate, target: str, shape: tuple[int, ...], skeleton: Skeleton
) -> bool:
    """As PEFT decides: the module's class wins over what the adapter's config says."""
    if update.kind == "experts":
        return _experts_transposed(update, shape)
    if update.kind in ("dense", "rows") or len(shape) != 2:
        return False
    kind = "other" if skeleton.guessed else skeleton.kinds.get(target, "other")
    if kind in ("linear", "conv1d"):
        return kind == "conv1d"
    if update.transposed is not None:
        return update.transposed
    return shape != update.shape and shape == update.shape[::-1]


def _experts_transposed(update: LazyUpdate, shape: tuple[int, ...]) -> bool:
    """Shapes tell where rows and columns differ in number."""
    if update.shape != _swapped(update.shape):
        return shape != update.shape and shape == _swapped(update.shape)
    return bool(update.transposed)


def _is_tied_twin(
    name: str, update: LazyUpdate, adapter: Adapter, alignment: Alignment, skeleton: Skeleton
) -> bool:
    """Whether `name` only repeats, for PEFT, the embedding that it is tied to."""
    twin = adapter.tied.get(name) or skeleton.tied.get(alignment.pairs.get(name, name))
    if twin is None or twin not in adapter or twin not in alignment.pairs:
        return False
    return update.is_whole or bool(adapter.settings.get("ensure_weight_tying"))


def _full_shape(update: LazyUpdate) -> tuple[int, ...] | None:
    """The shape of the weight that it is for, as far as the update knows it."""
    return None if update.kind in ("ia3", "rows") else update.shape


def _check_addition(update: LazyUpdate, adapter: Adapter) -> list[Problem]:
    if adapter.model_config is not None:
        return []
    message = (
        "the base has no such tensor: it is added, but the base's config.json may describe a "
        "model without it"
    )
    return [Problem("warning", update.name, message)]


def _missing(name: str, alignment: Alignment, base: Checkpoint, skeleton: Skeleton) -> Problem:
    expected = alignment.prefix_there + name.removeprefix(alignment.prefix_here)
    if twin := skeleton.tied.get(expected):
        message = f"is tied to {twin} in the base: an update of one would change both"
        return Problem("error", name, message)
    ending = "." + ".".join(name.split(".")[-2:])
    close = next((other for other in base if f".{other}".endswith(ending)), None)
    hint = f"; the base has {close}" if close else ""
    return Problem("error", name, f"the base has no tensor {expected}{hint}")


def _tied_copies(
    changed: Mapping[str, BoundUpdate], base: Checkpoint, skeleton: Skeleton
) -> dict[str, BoundUpdate]:
    """Tensors that the base stores a second time under the name of a tied parameter."""
    copies = {}
    for name, twin in {**skeleton.tied, **base.aliases}.items():
        if name in base and name not in changed and twin in changed:
            bound = changed[twin]
            copies[name] = BoundUpdate(bound.update, name, bound.transposed)
    return copies
