"""From the names that an adapter's format uses to the base's own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from loratool.adapter import Adapter
from loratool.errors import Problem
from loratool.parts import Share
from loratool.reports import listed
from loratool.targets import Targets

# What kohya's prefixes stand for.
_COMPONENTS = (
    ("lora_te3_", "the third text encoder"),
    ("lora_te2_", "the second text encoder"),
    ("lora_te", "the text encoder"),
    ("lora_unet_", "the UNet or transformer"),
)


def in_the_bases_names(
    adapter: Adapter, targets: Targets
) -> tuple[Mapping[str, Sequence[Share]], list[Problem]]:
    """Parameter -> what the adapter does to it, and names that mean nothing here.

    Names are not yet aligned with the base's: one prefix more or less may be between them.
    """
    if not adapter.naming:
        return {name: (Share(update, ()),) for name, update in adapter.items()}, []
    found: dict[str, list[Share]] = {}
    problems: list[Problem] = []
    known = targets.kohya
    for name, update in adapter.items():
        module, _, leaf = name.rpartition(".")
        rows = known.targets.get(module)
        if rows is None:
            problems.append(Problem("error", name, why_unknown(module, targets)))
            continue
        place = 0
        for part in rows:
            parameter = f"{part.module}.{leaf}"
            shape = targets.canonical.get(parameter, ())
            whole = bool(shape) and part.count == shape[0]
            here = () if len(rows) == 1 else (slice(place, place + part.count),)
            there = () if whole else (slice(part.start, part.stop),)
            place += part.count
            shares = found.setdefault(parameter, [])
            shares.append(Share(update, update.shape, part=here, place=there))
        height = update.shape[0]
        if len(rows) > 1 and update.kind not in ("ia3", "rows") and height != place:
            message = "its rows are not those of the base's modules together"
            problems.append(Problem("error", name, message, f"{place}", f"{height}"))
    return found, problems


def why_unknown(module: str, targets: Targets) -> str:
    """Why one of kohya's names means nothing in a base."""
    if meanings := targets.kohya.ambiguous.get(module):
        choices = [" and ".join(row.module for row in rows) for rows in meanings]
        return f"its name fits several modules of the base: {', or '.join(choices)}"
    if not targets.canonical:
        return (
            "is a name of kohya's, and the base is no diffusion model that is known by such names"
        )
    part = next((words for prefix, words in _COMPONENTS if module.startswith(prefix)), "")
    prefix = next((prefix for prefix, _ in _COMPONENTS if module.startswith(prefix)), "")
    if prefix and not any(name.startswith(prefix) for name in targets.kohya.targets):
        components = sorted({name.partition(".")[0] for name in targets.canonical})
        return (
            f"is for {part}, and the base has only {listed(components, 4)}: give the whole model's "
            "folder or file"
        )
    return "the base has no module of this name"
