"""Several adapters brought to one naming, so that updates of one weight have one name."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import combinations

from loratool.adapter import Adapter, FormatOptions
from loratool.alignment import Alignment, align
from loratool.binding import Binding, bind
from loratool.checkpoint import Checkpoint
from loratool.errors import MismatchError, raise_problems
from loratool.respelling import respelled


def reference(adapters: Sequence[Adapter]) -> Adapter:
    """The adapter whose class the others are named for: the first that carries a model's config."""
    return next((a for a in adapters if a.model_config is not None), adapters[0])


def in_one_naming(adapters: Sequence[Adapter], base: Checkpoint | None) -> list[Adapter]:
    """The same adapters under the names of `reference(adapters)`.

    Args:
        adapters: at least one.
        base: what their names are resolved to; None if they use one naming already.

    Raises:
        MismatchError: an adapter does not fit the base, has errors of its own, or names weights
            differently and there is no base.
    """
    adapters = _in_one_scheme(adapters, base)
    if base is not None and adapters[0].naming:
        for adapter in adapters:
            _bound(adapter, base)
        return adapters
    if base is None:
        for adapter in adapters:
            raise_problems(f"{adapter.label} cannot be used:", adapter.problems)
        for one, other in combinations(adapters, 2):
            _require_one_naming(one, other)
        return list(adapters)
    adapters = [adapter.reread(FormatOptions(base=base)) for adapter in adapters]
    bindings = [_bound(adapter, base) for adapter in adapters]
    chosen = reference(adapters)
    target = next(b for a, b in zip(adapters, bindings, strict=True) if a is chosen).alignment
    return [
        _renamed(adapter, binding, _renaming(binding.alignment, target, base), chosen)
        for adapter, binding in zip(adapters, bindings, strict=True)
    ]


def _in_one_scheme(adapters: Sequence[Adapter], base: Checkpoint | None) -> list[Adapter]:
    """The adapters; under canonical names where only some of them have kohya's."""
    spelled = next((adapter for adapter in adapters if adapter.naming), None)
    other = next((adapter for adapter in adapters if not adapter.naming), None)
    if spelled is None or other is None:
        return list(adapters)
    if base is None:
        raise MismatchError(
            f"{spelled.label} names weights as {spelled.naming} does ({next(iter(spelled), '')}), "
            f"and {other.label} does not: give the base that they are for with --base"
        )
    return [respelled(adapter, base) for adapter in adapters]


def _require_one_naming(one: Adapter, other: Adapter) -> None:
    """Refuse two adapters if a prefix would pair more of their names than are equal."""
    shapes, others = ({n: u.shape for n, u in adapter.items()} for adapter in (one, other))
    try:
        found = align(shapes, others, option="")
    except MismatchError:  # there are several such prefixes
        pairs = {}
    else:
        if not (found.prefix_here or found.prefix_there):
            return
        pairs = {here: there for here, there in found.pairs.items() if here != there}
    example = "".join(f" ({here} and {there})" for here, there in list(pairs.items())[:1])
    raise MismatchError(
        f"{one.label} and {other.label} name the same weights differently{example}: give the base "
        "that they are for with --base"
    )


def _bound(adapter: Adapter, base: Checkpoint) -> Binding:
    binding = bind(adapter, base)
    raise_problems(f"{adapter.label} does not fit {base.label}:", binding.problems)
    return binding


def _renaming(source: Alignment, target: Alignment, base: Checkpoint) -> Callable[[str], str]:
    """From one adapter's names to another's, by way of the base's.

    What the base does not have (a head) keeps its name.
    """
    known = {there: here for here, there in target.pairs.items()}

    def rename(name: str) -> str:
        there = source.pairs.get(name) or _name_there(source, name)
        if source is target or there not in base:
            return name
        return known.get(there) or target.name_here(there)

    return rename


def _name_there(alignment: Alignment, name: str) -> str:
    for old, new in alignment.moves:
        if name.startswith(old):
            return new + name.removeprefix(old)
    return alignment.prefix_there + name.removeprefix(alignment.prefix_here)


def _renamed(
    adapter: Adapter, binding: Binding, rename: Callable[[str], str], chosen: Adapter
) -> Adapter:
    transposed = {bound.update.name: bound.transposed for bound in binding.changed.values()}
    updates = {
        rename(name): replace(
            update, name=rename(name), transposed=transposed.get(name, update.transposed)
        )
        for name, update in adapter.items()
    }
    if len(updates) < len(adapter):
        raise MismatchError(f"{adapter.label}: two of its tensors are one tensor of the base")
    notes = [str(problem) for problem in binding.problems if problem.severity == "warning"]
    if words := binding.alignment.describe():
        notes.append(f"{adapter.label}: {words} to get the base's")

    def module(name: str) -> str:
        return rename(f"{name}.weight").removesuffix(".weight")

    return replace(
        adapter,
        updates=updates,
        context={rename(n): tensor.renamed(rename(n)) for n, tensor in adapter.context.items()},
        kinds={rename(name): kind for name, kind in adapter.kinds.items()},
        tied={rename(name): rename(twin) for name, twin in adapter.tied.items()},
        short_targets={
            short: frozenset(map(module, modules))
            for short, modules in adapter.short_targets.items()
        },
        moves=chosen.moves,
        notes=(*adapter.notes, *notes),
    )
