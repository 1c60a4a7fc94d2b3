"""What a stack is besides its updates, from what the adapters know of their models."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from loratool.adapter import Adapter
from loratool.card import is_hub_name
from loratool.checkpoint import LazyTensor
from loratool.errors import InputError, MismatchError
from loratool.stack_plan import StackPlan
from loratool.updates import counted_kind

if TYPE_CHECKING:
    import torch


def format_of(adapters: Sequence[Adapter]) -> str:
    """The adapters' own format where it says their names; else PEFT."""
    formats = {adapter.format for adapter in adapters}
    is_named = any(adapter.naming or adapter.layout for adapter in adapters)
    return formats.pop() if is_named and len(formats) == 1 else "peft"


def context_of(plan: StackPlan) -> dict[str, LazyTensor]:
    """The values that a format may need of whole modules, as far as the adapters know them.

    What the result replaces gets its value when it is loaded. What it leaves alone has the base's
    value, which an adapter knows that does not change it. Nobody knows the value of the rest.
    """
    if len(plan.adapters) == 1 and all(s.weight == 1 for ss in plan.shares.values() for s in ss):
        return dict(plan.adapters[0].context)
    context: dict[str, LazyTensor] = {}
    for adapter in plan.adapters:
        for name, tensor in adapter.context.items():
            shares = plan.shares.get(name, ())
            if shares and shares[0].update.kind == "replacement":
                context.setdefault(name, tensor)
            elif shares or name in adapter:
                context.setdefault(name, _unknown(tensor))
            elif name not in context or context[name].origin == "":
                context[name] = tensor
    return context


def _unknown(tensor: LazyTensor) -> LazyTensor:
    """Stands for a tensor that is needed only where a format cannot say what the result is."""

    def blocks() -> Iterator[torch.Tensor]:
        raise InputError(
            f"{tensor.name}: PEFT would keep the module whole that holds it, and its value is not "
            "known without the base: leave the module out with --weights"
        )
        yield

    return LazyTensor(tensor.name, tensor.dtype, tensor.shape, blocks)


def base_name_of(adapters: Sequence[Adapter]) -> str:
    """The base's name: one on the Hub before a path."""
    names = [adapter.base_name for adapter in adapters if adapter.base_name]
    return next((name for name in names if is_hub_name(name)), next(iter(names), ""))


def settings_of(plan: StackPlan) -> dict[str, Any]:
    """What of the adapters' configurations holds for all of them together.

    Raises:
        MismatchError: an adapter ties a table to a head, and another changes that table alone.
    """
    found = {key: v for a in plan.adapters for key, v in a.lasting_settings.items()}
    if not found.get("ensure_weight_tying"):
        return found
    ties = [bool(a.lasting_settings.get("ensure_weight_tying")) for a in plan.adapters]
    for name, shares in plan.shares.items():
        tying = next((share for share in shares if ties[share.number]), None)
        alone = next((share for share in shares if not ties[share.number]), None)
        if tying and alone and any(share.update.embedding for share in shares):
            raise MismatchError(
                f"{name}: {tying.label} changes it and the head that shares its values "
                f"(ensure_weight_tying), {alone.label} changes it alone: leave one out with "
                f"--weights '{alone.name}:{name}=0'"
            )
    return found


def tied_of(plan: StackPlan) -> dict[str, str]:
    """Parameter -> the one that it is tied to; MismatchError where adapters disagree."""
    tied: dict[str, str] = {}
    for adapter in plan.adapters:
        for name, twin in adapter.tied.items():
            for share in plan.shares.get(name, ()):
                if name not in plan.adapters[share.number].tied:
                    raise MismatchError(
                        f"{name}: {adapter.label} ties it to {twin}, and {share.label} changes it "
                        f"alone: leave it out with --weights '{share.name}:{name}=0'"
                    )
            if tied.setdefault(name, twin) != twin:
                raise MismatchError(
                    f"{name}: {adapter.label} ties it to {twin}, another adapter to {tied[name]}"
                )
    return tied


def moves_of(adapters: Sequence[Adapter]) -> tuple[tuple[str, str], ...]:
    """How names stand for the base's; MismatchError where adapters disagree."""
    moves: dict[str, str] = {}
    for adapter in adapters:
        for old, new in adapter.moves:
            if moves.setdefault(old, new) != new:
                raise MismatchError(
                    f"{adapter.label}: its {old}* is the base's {new}*, another adapter's "
                    f"{moves[old]}*: give the base with --base"
                )
    return tuple(moves.items())


def short_targets_of(plan: StackPlan) -> dict[str, frozenset[str]]:
    """The short names that mean the same modules to all who know them, and no others of ours."""
    ours = [name.removesuffix(".weight") for name, _ in plan.factored()]
    found: dict[str, set[frozenset[str]]] = {}
    for adapter in plan.adapters:
        for short, modules in adapter.short_targets.items():
            found.setdefault(short, set()).add(modules)
    agreed = {short: next(iter(sets)) for short, sets in found.items() if len(sets) == 1}
    return {
        short: modules
        for short, modules in agreed.items()
        if all(m in modules for m in ours if f".{m}".endswith(f".{short}"))
    }


def base_digests_of(adapters: Sequence[Adapter]) -> dict[str, str]:
    """Base tensor -> its digest, as far as any adapter knows it."""
    return {name: digest for a in adapters for name, digest in a.base_digests.items()}


def whole_notes(plan: StackPlan) -> Iterator[str]:
    """What weights do not scale."""
    for number, adapter in enumerate(plan.adapters):
        whole = {
            name: share.update.kind
            for name, shares in plan.shares.items()
            for share in shares
            if share.number == number and share.update.is_whole and share.weight != 1
        }
        if whole:
            kinds = Counter(whole.values()).items()
            counts = " and ".join(counted_kind(kind, count) for kind, count in kinds)
            yield (
                f"{adapter.label}: {counts} ({next(iter(whole))}, ...): weights do not scale these"
            )
