"""Which tensor of a merged checkpoint is which of the base, and which update it should show.

Headers only.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from loratool.alignment import Alignment, align
from loratool.binding import Binding, BoundUpdate
from loratool.checkpoint import Checkpoint, LazyTensor
from loratool.dtypes import is_float
from loratool.errors import MismatchError
from loratool.families import is_buffer
from loratool.skeleton import build_skeleton


@dataclass(frozen=True)
class Counterpart:
    """A tensor of the merged checkpoint.

    Attributes:
        name: the base's name for it, or the merged model's where the base has none.
        merged: the tensor.
        base: what it was before, or None.
        bound: the update that it should show, or None.
    """

    name: str
    merged: LazyTensor
    base: LazyTensor | None
    bound: BoundUpdate | None


@dataclass(frozen=True)
class Counterparts:
    """All tensors of the merged checkpoint, sorted out.

    Attributes:
        found: those that can be compared, in the base's order, then what the adapter adds.
        absent: updates whose tensor the merged checkpoint lacks, by name.
        missing: other tensors of the base that it should have and lacks.
        extra: its tensors that neither the base nor the adapter knows.
        notes: what the user should hear.
    """

    found: tuple[Counterpart, ...]
    absent: tuple[str, ...]
    missing: tuple[str, ...]
    extra: tuple[str, ...]
    notes: tuple[str, ...]


def pair_up(base: Checkpoint, merged: Checkpoint, binding: Binding) -> Counterparts:
    """Find the counterpart of every tensor.

    Names are matched as `loratool.alignment` does. What a model's class computes by itself or ties
    to another tensor may be absent, and what the adapter leaves out need not be there.

    Args:
        base: the base.
        merged: what may be a merge into it, under the base's names or the adapter's.
        binding: the adapter's, without errors.

    Raises:
        MismatchError: the merged checkpoint is of another architecture, or quantized.
    """
    alignment = _align(base, merged, binding)
    there = {old: new for new, old in alignment.pairs.items()}
    _require_merge(base, merged, binding, there)
    tied = _tied(base)
    found, absent, missing = [], [], []
    for name, tensor in base.items():
        bound = binding.changed.get(name)
        if name in there:
            found.append(Counterpart(name, merged[there[name]], tensor, bound))
        elif tied.get(name) in there or name in binding.dropped or is_buffer(name, tensor.shape):
            continue
        elif bound is not None:
            absent.append(name)
        else:
            missing.append(name)
    unknown = [name for name in merged if name not in alignment.pairs]
    for name in binding.added:
        matching = [other for other in unknown if _is_added(other, name, alignment)]
        if matching:
            bound = binding.added[name]
            found.append(Counterpart(matching[0], merged[matching[0]], None, bound))
            unknown.remove(matching[0])
        else:
            absent.append(name)
    extra = []
    for name in unknown:
        twin = tied.get(name, "")
        if twin in base:  # the base stores it once
            found.append(Counterpart(name, merged[name], base[twin], binding.changed.get(twin)))
        elif not is_buffer(name, merged[name].shape):
            extra.append(name)
    words = alignment.describe()
    notes = (f"{merged.label}: {words} to get the base's",) if words else ()
    return Counterparts(tuple(found), tuple(absent), tuple(missing), tuple(extra), notes)


def _align(base: Checkpoint, merged: Checkpoint, binding: Binding) -> Alignment:
    shapes, others = ({n: t.shape for n, t in c.items()} for c in (merged, base))
    moves = [
        (old, new)
        for old, new in binding.alignment.moves
        if any(n.startswith(old) and new + n.removeprefix(old) in others for n in shapes)
    ]
    try:
        return align(shapes, others, moves, option="")
    except MismatchError as error:
        raise MismatchError(f"{merged.label} against {base.label}: {error}") from error


def _tied(base: Checkpoint) -> dict[str, str]:
    shapes = {name: tensor.shape for name, tensor in base.items()}
    return {**build_skeleton(base.config, shapes).tied, **base.aliases}


def _is_added(name: str, added: str, alignment: Alignment) -> bool:
    """Whether a tensor of the merged checkpoint is what the adapter calls `added`."""
    return name in (added, alignment.name_here(added))


def _require_merge(
    base: Checkpoint, merged: Checkpoint, binding: Binding, there: dict[str, str]
) -> None:
    for name, bound in binding.changed.items():
        other = merged.get(there.get(name, ""))
        if other is None or bound.update.kind == "replacement":
            continue
        if not is_float(other.dtype) or other.name in merged.quantized:
            scheme = merged.quantized.get(other.name, other.dtype)
            raise MismatchError(
                f"{merged.label}: {other.name} is quantized or integer ({scheme}): the merge can "
                "only be proved before quantization"
            )
    kept = [n for n in base if n not in binding.dropped and not is_buffer(n, base[n].shape)]
    wrong = [n for n in kept if not _has_shape(n, base, merged, binding, there)]
    if 2 * len(wrong) > len(kept):
        raise MismatchError(
            f"{merged.label} is no merge into {base.label}: {len(wrong)} of {len(kept)} tensors "
            f"are not there in the base's shape:\n{_examples(wrong, base, merged, there)}"
        )


def _has_shape(
    name: str, base: Checkpoint, merged: Checkpoint, binding: Binding, there: dict[str, str]
) -> bool:
    if name not in there:
        return False
    bound = binding.changed.get(name)
    resized = bound.update.shape if bound and bound.update.kind == "replacement" else None
    return merged[there[name]].shape in (base[name].shape, resized)


def _examples(
    names: Iterable[str], base: Checkpoint, merged: Checkpoint, there: dict[str, str]
) -> str:
    lines = []
    for name in list(names)[:3]:
        shape = str(merged[there[name]].shape) if name in there else "missing"
        lines.append(f"  {name}: {base[name].shape} in the base, {shape}")
    return "\n".join(lines)
