"""Which adapters contribute to which tensor of a stack, and with what weight: headers only."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from loratool.adapter import Adapter
from loratool.card import is_hub_name
from loratool.checkpoint import Checkpoint
from loratool.errors import InputError, MismatchError, UsageError, raise_grouped
from loratool.kinship import require_distinct, require_same_base
from loratool.naming import in_one_naming, reference
from loratool.skeleton import architecture_of
from loratool.stack_kinds import Share, is_factored, oriented, problems_of

# Keys of config.json that say nothing of the model.
_VOLATILE = ("_name_or_path", "transformers_version", "dtype", "torch_dtype")


@dataclass(frozen=True)
class LayerWeight:
    """One --weights option.

    Attributes:
        text: as it was given.
        adapter: the only adapter that it concerns, or "" for all.
        glob: of parameter or module names.
        weight: what the adapter's own weight is multiplied by.
    """

    text: str
    adapter: str
    glob: str
    weight: float

    def matches(self, name: str) -> bool:
        """Whether it concerns a parameter, by its own name or its module's."""
        return fnmatchcase(name, self.glob) or fnmatchcase(name.rpartition(".")[0], self.glob)


def parse_layer_weight(text: str) -> LayerWeight:
    """Read `GLOB=W` or `ADAPTER:GLOB=W`; UsageError if it is neither."""
    head, sign, tail = text.rpartition("=")
    adapter, colon, glob = head.rpartition(":")
    if not sign or not glob or (colon and not adapter):
        raise UsageError(f"--weights {text}: write GLOB=W or ADAPTER:GLOB=W")
    try:
        weight = float(tail)
    except ValueError:
        raise UsageError(f"--weights {text}: {tail!r} is not a number") from None
    if not math.isfinite(weight):
        raise UsageError(f"--weights {text}: the weight must be a finite number, not {tail}")
    return LayerWeight(text, adapter, glob, weight)


@dataclass(frozen=True)
class StackPlan:
    """What is stacked.

    Attributes:
        adapters: under one naming, without those of weight 0.
        names: what reports and --weights call them.
        weights: their own weights.
        shares: tensor -> who contributes to it, with the weight that counts there.
        notes: what the user should know.
    """

    adapters: Sequence[Adapter]
    names: Sequence[str]
    weights: Sequence[float]
    shares: Mapping[str, Sequence[Share]]
    notes: tuple[str, ...]

    def factored(self) -> Iterator[tuple[str, Sequence[Share]]]:
        """The tensors that get factors A and B."""
        return ((name, shares) for name, shares in self.shares.items() if is_factored(shares))


def plan_stack(
    given: Sequence[tuple[Adapter, float]],
    base: Checkpoint | None,
    rules: Sequence[LayerWeight] = (),
) -> StackPlan:
    """Decide who contributes to which tensor, from headers alone.

    Args:
        given: (adapter, weight) pairs.
        base: what their names are resolved to, if they differ.
        rules: weights by layer.

    Raises:
        MismatchError: the adapters do not belong together.
        InputError: nothing is left, or a rule matches nothing.
        UsageError: a weight is not finite, or all of them are 0.
    """
    for adapter, weight in given:
        if not math.isfinite(weight):
            raise UsageError(f"{adapter.label}: the weight must be finite, not {weight}")
    require_distinct([adapter for adapter, _ in given])
    names = short_names([adapter for adapter, _ in given])
    kept = [(a, w, n) for (a, w), n in zip(given, names, strict=True) if w != 0]
    if not kept:
        raise UsageError("every weight is 0: there is nothing to stack")
    notes = [f"{adapter.label}: its weight is 0: it is left out" for adapter, w in given if w == 0]
    adapters = in_one_naming([adapter for adapter, _, _ in kept], base)
    require_same_base(adapters)
    _require_one_model(adapters)
    _require_named(rules, names)
    weights = [weight for _, weight, _ in kept]
    kept_names = [name for _, _, name in kept]
    shares = _shares(adapters, kept_names, weights, rules)
    notes += [note for adapter in adapters for note in adapter.notes]
    notes += _kinship_notes(adapters)
    return StackPlan(adapters, kept_names, weights, shares, tuple(notes))


def short_names(adapters: Sequence[Adapter]) -> list[str]:
    """What reports call adapters: as many last parts of their paths as tell them apart.

    Those that are computed are #1, #2, ... by their position.
    """
    paths = {
        number: Path(os.path.normpath(adapter.path.absolute()))
        for number, adapter in enumerate(adapters)
        if adapter.path is not None
    }
    names = [f"#{number}" for number in range(1, len(adapters) + 1)]
    depths = max((len(path.parts) for path in paths.values()), default=0)
    for depth in range(1, depths + 1):
        found = {number: "/".join(path.parts[-depth:]) for number, path in paths.items()}
        if len(set(found.values())) == len(found):
            break
    for number in paths:
        names[number] = found[number]
    return names


def _require_named(rules: Sequence[LayerWeight], names: Sequence[str]) -> None:
    for rule in rules:
        if rule.adapter and rule.adapter not in names:
            raise InputError(
                f"--weights {rule.text}: no adapter is called {rule.adapter!r}; they are "
                f"{', '.join(names)}"
            )


def _shares(
    adapters: Sequence[Adapter],
    names: Sequence[str],
    weights: Sequence[float],
    rules: Sequence[LayerWeight],
) -> dict[str, list[Share]]:
    """Tensor -> the adapters that change it with a weight that is not 0; in order of appearance."""
    shares: dict[str, list[Share]] = {}
    unused = set(rules)
    for number, (adapter, name, weight) in enumerate(zip(adapters, names, weights, strict=True)):
        own = [rule for rule in rules if rule.adapter in ("", name)]
        for parameter, update in adapter.items():
            matching = [rule for rule in own if rule.matches(parameter)]
            unused.difference_update(matching)
            factor = weight * matching[-1].weight if matching else weight
            if factor != 0:
                share = Share(number, adapter.label, name, update, factor)
                shares.setdefault(parameter, []).append(share)
    for rule in rules:
        if rule in unused:
            example = next((name for adapter in adapters for name in adapter), "nothing")
            raise InputError(
                f"--weights {rule.text}: {rule.glob!r} matches no tensor of the adapters "
                f"({example}, ...)"
            )
    if not shares:
        raise InputError("every tensor has the weight 0: there is nothing to stack")
    problems = [problem for name, found in shares.items() for problem in problems_of(name, found)]
    raise_grouped("the adapters cannot be combined:", problems)
    return {name: oriented(found) for name, found in shares.items()}


def _require_one_model(adapters: Sequence[Adapter]) -> None:
    """Refuse adapters that were made for different classes: PEFT loads the result as one."""
    tasks = {a.task_type: a for a in adapters if a.task_type}
    classes = {c: a for a in adapters if (c := architecture_of(a.model_config))}
    for what, found in (("tasks", tasks), ("model classes", classes)):
        if len(found) > 1:
            (name, one), (other_name, other) = list(found.items())[:2]
            raise MismatchError(
                f"{one.label} and {other.label} were made for different {what} ({name} and "
                f"{other_name}), and the result can be for one only: extract the other with "
                "--lora-only"
            )


def _kinship_notes(adapters: Sequence[Adapter]) -> Iterator[str]:
    first = reference(adapters)
    names = {a.base_name: a for a in adapters if is_hub_name(a.base_name)}
    if len(names) > 1:
        said = ", ".join(f"{name} ({adapter.label})" for name, adapter in names.items())
        yield f"the adapters name different bases: {said}; they are taken for one model"
    for adapter in adapters:
        if adapter.model_config is not None and _essence(adapter) != _essence(first):
            yield (
                f"{adapter.label}: its model/config.json differs from that of {first.label}, which "
                "is used"
            )
    for number, adapter in enumerate(adapters[1:], 1):
        if not any(name in other for other in adapters[:number] for name in adapter):
            yield f"{adapter.label}: changes no tensor that an adapter before it does"


def _essence(adapter: Adapter) -> dict[str, Any]:
    return {k: v for k, v in (adapter.model_config or {}).items() if k not in _VOLATILE}
