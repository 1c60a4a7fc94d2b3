"""Which tensor of a base each update of an adapter changes, and how.

Prefixes, orientation, tied weights, heads that the base lacks: all of that is decided here, from
headers alone, and everything that does not fit is collected rather than raised.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

from loratool.adapter import Adapter, LazyUpdate
from loratool.alignment import Alignment, align
from loratool.checkpoint import Checkpoint
from loratool.diffusion.adapter_keys import has_component
from loratool.dtypes import is_float
from loratool.errors import MismatchError, Problem
from loratool.naming_schemes import in_the_bases_names
from loratool.parts import Share, complaint, composed, joined
from loratool.pieces import Piece
from loratool.reports import listed
from loratool.skeleton import Skeleton
from loratool.targets import Targets, targets_of


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
        transposed: the adapter's names -> whether the base stores the weight as (in, out).
    """

    changed: Mapping[str, BoundUpdate] = field(default_factory=dict)
    added: Mapping[str, BoundUpdate] = field(default_factory=dict)
    dropped: tuple[str, ...] = ()
    alignment: Alignment = field(default_factory=lambda: Alignment({}))
    problems: tuple[Problem, ...] = ()
    transposed: Mapping[str, bool] = field(default_factory=dict)


def bind(adapter: Adapter, base: Checkpoint) -> Binding:
    """Bind every update to the tensors of `base`, by headers only; nothing is raised."""
    problems = list(adapter.problems)
    targets = targets_of(base)
    updates, unknown = in_the_bases_names(adapter, targets)
    problems.extend(unknown)
    names = {name: _full_shape(shares[0].update) for name, shares in updates.items()}
    moves = [move for move in adapter.moves if any(name.startswith(move[0]) for name in names)]
    try:
        alignment = align(names, targets.shapes, moves, option="")
    except MismatchError as error:
        return Binding(problems=(*problems, Problem("error", adapter.label, str(error))))
    binder = _Binder(adapter, base, targets, alignment)
    for name, shares in updates.items():
        binder.add(name, shares)
    changed = binder.changed()
    dropped = tuple(name for name in adapter.dropped if name in base)
    copies = _tied_copies(changed, base, targets.skeleton)
    changed |= {name: bound for name, bound in copies.items() if name not in dropped}
    problems.extend(binder.problems)
    return Binding(changed, binder.added, dropped, alignment, tuple(problems), binder.transposed)


@dataclass
class _Binder:
    """Collects what happens to each tensor of a base.

    Attributes:
        adapter: whose updates are bound.
        base: to what.
        targets: the base's names.
        alignment: of the adapter's names with these.
        plain: tensor -> the update that is for it as it is.
        shares: tensor -> updates of its parts.
        added: tensors that the base lacks.
        problems: what does not fit.
        transposed: updates -> whether they have to be transposed for the base.
    """

    adapter: Adapter
    base: Checkpoint
    targets: Targets
    alignment: Alignment
    plain: dict[str, BoundUpdate] = field(default_factory=dict)
    shares: dict[str, list[Share]] = field(default_factory=dict)
    added: dict[str, BoundUpdate] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)
    transposed: dict[str, bool] = field(default_factory=dict)

    def add(self, name: str, shares: Sequence[Share]) -> None:
        """Bind what an adapter does to one parameter."""
        update = shares[0].update
        skeleton = self.targets.skeleton
        target = self.alignment.pairs.get(name)
        twin = _is_tied_twin(name, update, self.adapter, self.alignment, skeleton)
        if twin and (target is None or not update.is_whole):
            return
        if target is not None:
            for share in shares:
                self._bind(share, target)
        elif update.optional:
            return
        elif update.kind == "replacement":
            self.added[name] = BoundUpdate(update, name)
            self.problems += _check_addition(update, self.adapter)
        else:
            self.problems.append(_missing(name, self.alignment, self.targets))

    def _bind(self, share: Share, target: str) -> None:
        update, shape = share.update, self.targets.shapes[target]
        pieces = self.targets.where(target)
        place = pieces[0].tensor
        transposed = _is_transposed(update, target, shape, self.targets.skeleton)
        self.transposed[update.name] = transposed
        if not share.is_plain:
            shape = _of_place(share, shape)  # the rows that are its
        elif update.kind == "replacement":
            self.problems += _replacement_problems(update, target, self.targets, self.base)
        if update.kind != "replacement":
            tying = bool(self.adapter.settings.get("ensure_weight_tying"))
            if share.part:
                problem = _part_problem(update, target, shape)
            else:
                problem = _shape_problem(update, target, shape, transposed)
            self.problems += [problem] if problem else []
            for tensor in dict.fromkeys(piece.tensor for piece in pieces):
                self.problems += _storage_problems(update, tensor, self.base)
            self.problems += _tie_problems(update, target, self.targets.skeleton, tying)
            self.problems += _orientation_problems(update, target, self.targets.skeleton)
        if share.is_plain and pieces == (Piece(place),):
            self.plain[place] = BoundUpdate(update, place, transposed)
            return
        oriented = replace(share, shape=share.shape or shape, transposed=transposed)
        for piece in pieces:
            if (found := composed(oriented, piece)) is not None:
                self.shares.setdefault(piece.tensor, []).append(found)

    def changed(self) -> dict[str, BoundUpdate]:
        """Base tensor -> the one update of it, in the order of the base."""
        found = dict(self.plain)
        for tensor, shares in self.shares.items():
            shape = self.base[tensor].shape
            if (plain := self.plain.get(tensor)) is not None:
                shares = [Share(plain.update, shape, plain.transposed), *shares]
            if message := complaint(shares, shape):
                self.problems.append(Problem("error", shares[0].update.name, message))
            elif not any(problem.severity == "error" for problem in self.problems):
                found[tensor] = BoundUpdate(joined(tensor, shape, shares), tensor)
        return {name: found[name] for name in self.base if name in found}


def _part_problem(update: LazyUpdate, target: str, shape: tuple[int, ...]) -> Problem | None:
    """What is wrong with an update of several weights together for one of them."""
    if math.prod(update.shape[1:]) == math.prod(shape[1:]):
        return None
    message = f"does not have the columns of {target} in the base"
    return Problem("error", update.name, message, f"{shape[1:]}", f"{update.shape[1:]}")


def _of_place(share: Share, shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape of the part of a weight that a share is for."""
    rows = share.place[0] if share.place else slice(None)
    count = len(range(*rows.indices(shape[0]))) if isinstance(rows, slice) else 1
    return (count, *shape[1:])


def _replacement_problems(
    update: LazyUpdate, target: str, targets: Targets, base: Checkpoint
) -> list[Problem]:
    shape = targets.shapes[target]
    if shape == update.shape:
        return []
    resizable = target in base and _may_be_resized(update, target, base)
    severity: Literal["error", "warning"] = "warning" if resizable else "error"
    message = "the adapter replaces it by a tensor of another shape"
    return [Problem(severity, update.name, message, f"{shape}", f"{update.shape}")]


def _storage_problems(update: LazyUpdate, target: str, base: Checkpoint) -> list[Problem]:
    dtype = base[target].dtype
    if is_float(dtype):
        return []
    message = f"{target} is quantized or integer in the base: updates cannot be added to it"
    return [Problem("error", update.name, message, "a float dtype", dtype)]


def _tie_problems(
    update: LazyUpdate, target: str, skeleton: Skeleton, tying: bool
) -> list[Problem]:
    if (twin := skeleton.tied.get(target)) is not None:
        message = f"is tied to {twin} in the base: merging would change both"
        return [Problem("error", update.name, message)]
    heads = [head for head, source in skeleton.tied.items() if source == target]
    if not heads or update.is_whole or tying:
        return []
    message = (
        f"{heads[0]} shares its values with it: a merge changes both, the adapter alone changes "
        "only the embedding"
    )
    return [Problem("warning", update.name, message)]


def _orientation_problems(update: LazyUpdate, target: str, skeleton: Skeleton) -> list[Problem]:
    """A warning where neither shapes nor the model tell how experts' square matrices are stored."""
    square = update.kind == "experts" and update.shape == _swapped(update.shape)
    if not square or update.transposed is not None or not skeleton.guessed:
        return []
    message = (
        f"its matrices are square, and the base has no config.json that tells how it stores "
        f"{target}: taken as (experts, out, in)"
    )
    return [Problem("warning", update.name, message)]


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
        return _experts_transposed(update, target, shape, skeleton)
    if update.kind in ("dense", "rows") or len(shape) != 2:
        return False
    kind = "other" if skeleton.guessed else skeleton.kinds.get(target, "other")
    if kind in ("linear", "conv1d"):
        return kind == "conv1d"
    if update.transposed is not None:
        return update.transposed
    return shape != update.shape and shape == update.shape[::-1]


def _experts_transposed(
    update: LazyUpdate, target: str, shape: tuple[int, ...], skeleton: Skeleton
) -> bool:
    """Shapes tell where rows and columns differ in number; else who wrote it, or the module."""
    if update.shape != _swapped(update.shape):
        return shape != update.shape and shape == _swapped(update.shape)
    if update.transposed is not None:
        return update.transposed
    return target in skeleton.transposed_experts


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


def _missing(name: str, alignment: Alignment, targets: Targets) -> Problem:
    expected = alignment.prefix_there + name.removeprefix(alignment.prefix_here)
    if twin := targets.skeleton.tied.get(expected):
        message = f"is tied to {twin} in the base: an update of one would change both"
        return Problem("error", name, message)
    components = {other.partition(".")[0] for other in targets.canonical}
    if components and has_component(name) and name.partition(".")[0] not in components:
        message = f"the base has no such component, but {listed(sorted(components), 4)}"
        return Problem("error", name, f"{message}: give the whole model's folder or file")
    ending = "." + ".".join(name.split(".")[-2:])
    close = next((other for other in targets.shapes if f".{other}".endswith(ending)), None)
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
