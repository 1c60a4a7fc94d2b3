"""Several adapters brought to one naming, so that updates of one weight have one name."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import combinations

from loratool.adapter import Adapter, FormatOptions
from loratool.alignment import align
from loratool.binding import Binding, bind
from loratool.checkpoint import Checkpoint
from loratool.common_names import CommonNames, renaming
from loratool.errors import MismatchError, raise_problems
from loratool.respelling import respelled
from loratool.targets import targets_of


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
    names = CommonNames(target, targets_of(base), _are_in_memory(bindings, base))
    return [
        _renamed(adapter, binding, names, chosen)
        for adapter, binding in zip(adapters, bindings, strict=True)
    ]


def _are_in_memory(bindings: Sequence[Binding], base: Checkpoint) -> bool:
    """Whether an adapter calls weights as the model does in memory, and not as the base does."""
    return any(there not in base for b in bindings for there in b.alignment.pairs.values())


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


def _renamed(adapter: Adapter, binding: Binding, names: CommonNames, chosen: Adapter) -> Adapter:
    rename = renaming(names, binding.alignment)
    common = [rename(name) for name in adapter]
    if len(set(common)) < len(common):
        raise MismatchError(f"{adapter.label}: two of its tensors are one tensor of the base")
    notes = [str(problem) for problem in binding.problems if problem.severity == "warning"]
    if words := binding.alignment.describe():
        notes.append(f"{adapter.label}: {words} to get the base's")

    def module(name: str) -> str:
        return rename(f"{name}.weight").removesuffix(".weight")

    return replace(
        adapter,
        updates=names.updates(adapter, binding),
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
