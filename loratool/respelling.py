"""Adapters of diffusion models under diffusers' own names, whatever they are named for.

Names in kohya's format, and those of tensors in single files, may each stand for several modules:
their updates are cut by rows, which changes no value.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import replace

from loratool.adapter import Adapter, LazyUpdate
from loratool.alignment import align
from loratool.checkpoint import Checkpoint
from loratool.diffusion.kohya import kohya_layout
from loratool.diffusion.links import Rows
from loratool.errors import MismatchError, Problem, raise_problems
from loratool.naming_schemes import why_unknown
from loratool.parts import cut_rows
from loratool.targets import Targets, targets_of

Row = tuple[str, int, int]  # a module, its first row and the one after the last
_KOHYA = "kohya"


def named_for(
    adapter: Adapter, base: Checkpoint, namings: Collection[str], canonical: bool
) -> Adapter:
    """An adapter under names that a format can write; of a diffusion model, if it needs them.

    Args:
        adapter: any.
        base: what it is for.
        namings: unresolved names that the format can write.
        canonical: whether it calls modules of diffusion models as diffusers does, or by names that
            these tell.

    Raises:
        MismatchError: as `respelled`.
    """
    if adapter.naming in namings or not (adapter.naming or canonical):
        return adapter
    return respelled(adapter, base, whole=_KOHYA in namings)


def respelled(adapter: Adapter, base: Checkpoint, whole: bool = False) -> Adapter:
    """The adapter under canonical names ("unet.conv_in.weight"), with kohya's names for them.

    Args:
        adapter: whose names are kohya's, or those of parameters.
        base: a diffusion model; an adapter of parameters of another model stays as it is.
        whole: whether an update of what is one module in kohya's naming keeps its name, and is not
            cut, whatever it is for diffusers.

    Returns:
        The adapter; of names that the base does not have, none is changed.

    Raises:
        MismatchError: one of kohya's names means nothing in the base, or something cannot be cut;
            all complaints at once.
    """
    targets = targets_of(base)
    if not targets.canonical and not adapter.naming:
        return adapter
    problems: list[Problem] = []
    updates: dict[str, LazyUpdate] = {}
    kept: dict[str, tuple[Row, ...]] = {}
    usual = _usual_names(adapter, targets) if whole and not adapter.naming else {}
    for name, rows in _meanings(adapter, targets, problems).items():
        module = _module(name)
        if spelled := usual.get(tuple(replace(row, module=_module(row.module)) for row in rows)):
            kept[spelled] = ((module, 0, sum(row.count for row in rows)),)
            shape = targets.canonical.get(rows[0].module, ()) if len(rows) == 1 else ()
            updates[name] = replace(adapter[name], shape=_with_kernel(adapter[name], shape))
            continue
        for update in _cut(adapter[name], rows, targets, problems):
            if update.name in updates:
                message = f"is a second update of {update.name}"
                problems.append(Problem("error", name, message))
            updates[update.name] = update
    raise_problems(f"{adapter.label} does not fit {base.label}:", problems)
    return replace(
        adapter,
        updates=updates,
        naming="",
        layout=kept | _layout(adapter, updates, targets, kept),
        context={},
        kinds={},
        tied={},
        moves=(),
        short_targets={},
    )


def _usual_names(adapter: Adapter, targets: Targets) -> dict[tuple[Rows, ...], str]:
    """Canonical modules' rows -> kohya's name for them: the adapter's own, or else the usual."""
    found = {rows: name for name, rows in kohya_layout(targets.canonical).items()}
    own = {
        tuple(Rows(*row) for row in rows): name
        for name, rows in adapter.layout.items()
        if all(f"{module}.weight" in targets.canonical for module, _, _ in rows)
    }
    return found | own


def _meanings(
    adapter: Adapter, targets: Targets, problems: list[Problem]
) -> dict[str, tuple[Rows, ...]]:
    """Parameter of the adapter -> the canonical parameters' rows that its rows are; () if unknown.

    `Rows.module` is a parameter here, with its ".weight" or ".bias".
    """
    if not adapter.naming:
        return _of_parameters(adapter, targets, problems)
    found: dict[str, tuple[Rows, ...]] = {}
    for name in adapter:
        module, _, leaf = name.rpartition(".")
        rows = targets.kohya.targets.get(module)
        if rows is None:
            problems.append(Problem("error", name, why_unknown(module, targets)))
            continue
        found[name] = tuple(replace(row, module=f"{row.module}.{leaf}") for row in rows)
    return found


def _of_parameters(
    adapter: Adapter, targets: Targets, problems: list[Problem]
) -> dict[str, tuple[Rows, ...]]:
    """The same for names of parameters, of which a prefix more or less may be in the way."""
    names = {n: None if u.kind in ("ia3", "rows") else u.shape for n, u in adapter.items()}
    moves = [move for move in adapter.moves if any(name.startswith(move[0]) for name in names)]
    try:
        pairs = align(names, targets.shapes, moves, option="").pairs
    except MismatchError as error:
        problems.append(Problem("error", adapter.label, str(error)))
        return {}
    inside = _inside_tensors(targets)
    found: dict[str, tuple[Rows, ...]] = {}
    for name in names:
        target = pairs.get(name, "")
        if target in targets.canonical:
            height = (targets.canonical[target] or (0,))[0]
            found[name] = (Rows(target, 0, height),)
        else:
            found[name] = inside.get(target, ())
    return found


def _inside_tensors(targets: Targets) -> dict[str, tuple[Rows, ...]]:
    """Tensor of the base -> the canonical parameters' rows that its rows are, in order."""
    found: dict[str, list[tuple[int, Rows]]] = {}
    for name, shape in targets.canonical.items():
        for piece in targets.where(name):
            if not shape or piece.transposed:
                continue
            whole = slice(0, shape[0])
            part = piece.part[0] if piece.part else whole
            place = piece.place[0] if piece.place else whole
            if isinstance(part, slice) and isinstance(place, slice):
                rows = Rows(name, part.start, part.stop)
                found.setdefault(piece.tensor, []).append((place.start, rows))
    return {
        tensor: tuple(rows for _, rows in sorted(places, key=lambda item: item[0]))
        for tensor, places in found.items()
    }


def _cut(
    update: LazyUpdate, rows: Sequence[Rows], targets: Targets, problems: list[Problem]
) -> Iterator[LazyUpdate]:
    """The updates of the parameters that an update's rows are of."""
    if not rows:
        yield update
        return
    height = sum(row.count for row in rows)
    if len(rows) > 1 and (message := _obstacle(update, rows, height)):
        problems.append(Problem("error", update.name, message))
        return
    for name in dict.fromkeys(row.module for row in rows):
        own = cut_rows(update, name, _own_rows(rows, name)) if len(rows) > 1 else update
        yield replace(own, name=name, shape=_with_kernel(own, targets.canonical.get(name, ())))


def _obstacle(update: LazyUpdate, rows: Sequence[Rows], height: int) -> str:
    """Why an update of several modules cannot be cut; "" if it can."""
    if update.kind == "ia3" and not update.shape[0]:
        return ""  # it scales the inputs of all alike
    if update.shape[0] != height:
        return f"has {update.shape[0]} rows, the base's modules together {height}"
    if update.kind in ("experts", "rows"):
        return "is of several modules of the base: it cannot be cut"
    if update.axis and len({row.module for row in rows}) > 1:
        return "has a magnitude for each column of several modules together: it cannot be cut"
    if update.kind == "replacement" and len({row.module for row in rows}) < len(rows):
        return "is kept whole, and its rows lie otherwise in the base: it cannot be cut"
    return ""


def _own_rows(rows: Sequence[Rows], name: str) -> list[slice]:
    """Where the rows of a parameter lie among all, in the parameter's own order."""
    found, done = [], 0
    for row in rows:
        if row.module == name:
            found.append((row.start, slice(done, done + row.count)))
        done += row.count
    return [place for _, place in sorted(found, key=lambda item: item[0])]


def _with_kernel(update: LazyUpdate, shape: tuple[int, ...]) -> tuple[int, ...]:
    """The weight's shape, where the update only knows it as a matrix."""
    same = update.shape[:1] == shape[:1] and math.prod(update.shape) == math.prod(shape)
    return shape if same and len(update.shape) == 2 and update.kind != "ia3" else update.shape


def _layout(
    adapter: Adapter,
    updates: Mapping[str, LazyUpdate],
    targets: Targets,
    kept: Mapping[str, tuple[Row, ...]],
) -> dict[str, tuple[Row, ...]]:
    """Kohya's names for the modules of updates: those that the adapter has, or else the usual."""
    done = {module for rows in kept.values() for module, _, _ in rows}
    modules = {_module(name) for name in updates} - done
    if adapter.naming:
        known = {name: targets.kohya.targets[name] for name in map(_module, adapter)}
    else:
        if modules <= {module for rows in adapter.layout.values() for module, _, _ in rows}:
            return {
                name: rows
                for name, rows in adapter.layout.items()
                if any(module in modules for module, _, _ in rows)
            }
        known = kohya_layout(targets.canonical)
    return {
        name: tuple((row.module, row.start, row.stop) for row in rows)
        for name, rows in sorted(known.items())
        if any(row.module in modules for row in rows)
    }


def _module(name: str) -> str:
    return name.rpartition(".")[0]
