"""Which tensor of a base each update of an adapter changes, and how.

Prefixes, orientation, tied weights, heads that the base lacks: all of that is decided here, from
headers alone, and everything that does not fit is collected rather than raised.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from loratool.adapter import Adapter, LazyUpdate
from loratool.alignment import Alignment, align
from loratool.checkpoint import Checkpoint
from loratool.dtypes import is_float
from loratool.errors import MismatchError, Problem
from loratool.skeleton import Skeleton, build_skeleton


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
    names = {name: update.shape for name, update in adapter.items()}
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
        if target is not None:
            bound, found = _fit(update, target, base, skeleton)
            changed[target] = bound
        elif _is_tied_twin(name, adapter, alignment, skeleton):
            found = []
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
    update: LazyUpdate, target: str, base: Checkpoint, skeleton: Skeleton
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
    expected = tensor.shape[::-1] if transposed else tensor.shape
    if update.shape != expected:
        message = f"B @ A does not have the shape of {target} in the base"
        problems.append(Problem("error", update.name, message, f"{expected}", f"{update.shape}"))
    if not is_float(tensor.dtype):
        message = f"{target} is quantized or integer in the base: updates cannot be added to it"
        problems.append(Problem("error", update.name, message, "a float dtype", tensor.dtype))
    if target in skeleton.tied and skeleton.tied[target] in base:
        message = f"is tied to {skeleton.tied[target]} in the base: merging would change both"
        problems.append(Problem("error", update.name, message))
    return BoundUpdate(update, target, transposed), problems


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
    kind = "other" if skeleton.guessed else skeleton.kinds.get(target, "other")
    if kind in ("linear", "conv1d"):
        return kind == "conv1d"
    if update.transposed is not None:
        return update.transposed
    return shape != update.shape and shape == update.shape[::-1]


def _is_tied_twin(name: str, adapter: Adapter, alignment: Alignment, skeleton: Skeleton) -> bool:
    """Whether `name` only repeats, for PEFT, the embedding that it is tied to."""
    twin = adapter.tied.get(name) or skeleton.tied.get(name)
    return twin is not None and twin in adapter and twin in alignment.pairs


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
