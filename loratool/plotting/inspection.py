"""Pictures of what an adapter or a checkpoint holds."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path, PurePath
from typing import Any

from loratool.layers import Place, places
from loratool.plotting.canvas import Draw, draw_panels
from loratool.plotting.panels import Cell, Line, bars, energy_curves, heat_map, ranges, spectra
from loratool.reports import format_bytes, format_count

Facts = Mapping[str, Any]


def draw_inspection(data: Facts, path: Path) -> None:
    """Draw the data of a report of `loratool inspect`; of a checkpoint: with its norms.

    Args:
        data: the report's.
        path: an .svg or .png file, which is replaced.

    Raises:
        OutputError: it cannot be written.
    """
    draw = _draw_adapter if data["of"] == "adapter" else _draw_checkpoint
    draw(data, path)


def _draw_adapter(data: Facts, path: Path) -> None:
    updates: Mapping[str, Facts] = data["updates"]
    whole: Mapping[str, Facts] = {**data["replaced"], **data["rows"]}
    where = places([*updates, *whole])
    known = {n: place for n, place in where.items() if n in updates and updates[n]["norm"]}
    mapped = {name: place for name, place in known.items() if place.layer is not None}
    lines = [
        Line(place.label, place.layer, updates[name]["sigma"], updates[name]["norm"] ** 2)
        for name, place in known.items()
        if updates[name]["sigma"]
    ]
    apart: dict[str, list[float]] = {}
    for name, place in where.items():
        norm = updates[name]["norm"] if name in updates else whole[name]["norm"]
        if name not in mapped and norm:
            apart.setdefault(place.label, []).append(norm)
    maps: list[Draw] = []
    if mapped:
        values = {name: updates[name]["norm"] for name in mapped}
        maps.append(_map(values, mapped, "Norm of the delta", "||ΔW||"))
        most = {name: (updates[name]["effective_rank"] or {}).get("0.9") for name in mapped}
        if any(most.values()):
            title = "Rank that holds 90% of the energy of the delta"
            maps.append(_map(most, mapped, title, "rank", whole=True))
        for key in ("rank", "scale"):
            values = {name: updates[name][key] for name in mapped}
            if len(set(values.values())) > 1:
                maps.append(_map(values, mapped, key.capitalize(), key, whole=key == "rank"))
    panels: list[Draw] = []
    if lines:
        panels.append(partial(spectra, lines=lines, title="Singular values of the deltas"))
        panels.append(partial(energy_curves, lines=lines, title="Energy of the deltas"))
    if apart:
        title = "Norms of others" if mapped else "Norms"
        panels.append(partial(ranges, values=apart, title=title, label="norm"))
    draw_panels(path, _adapter_title(data), maps, len({p.label for p in mapped.values()}), panels)


def _adapter_title(data: Facts) -> str:
    words = [f"rank {_spread(data['ranks'])}"] if data["ranks"] else []
    words += [f"scale {_spread(data['scales'])}"] if data["scales"] else []
    words.append(f"{format_count(data['parameters'])} parameters")
    return f"{_name(data)}: {', '.join(words)}"


def _spread(values: list[Facts]) -> str:
    low, high = values[0]["value"], values[-1]["value"]
    return f"{low:g}" if low == high else f"{low:g} to {high:g}"


def _draw_checkpoint(data: Facts, path: Path) -> None:
    tensors: Mapping[str, Facts] = data["tensors"]
    where = places(tensors)
    size = {name: _root_mean_square(facts) for name, facts in tensors.items()}
    told = {name: place for name, place in where.items() if size[name]}
    mapped = {
        name: place
        for name, place in told.items()
        if place.layer is not None and len(tensors[name]["shape"]) > 1
    }
    apart: dict[str, list[float]] = {}
    for name, place in told.items():
        if name not in mapped:
            apart.setdefault(place.label, []).append(size[name] or 0.0)
    sizes = dict.fromkeys((place.label for place in mapped.values()), 0.0)
    sizes["all others"] = 0.0
    for name, place in where.items():
        sizes[place.label if name in mapped else "all others"] += tensors[name]["bytes"] / 2**20
    title = "Size of the weights, as root mean square"
    maps: list[Draw] = [_map(size, mapped, title, "rms")] if mapped else []
    panels: list[Draw] = [partial(bars, values=sizes, title="Size on disk", label="MiB")]
    if apart:
        title = "Root mean square of others"
        panels.append(partial(ranges, values=apart, title=title, label="rms"))
    parameters, stored = format_count(data["parameters"]), format_bytes(data["bytes"])
    heading = f"{_name(data)}: {parameters} parameters, {stored}, {' and '.join(data['dtypes'])}"
    draw_panels(path, heading, maps, len({p.label for p in mapped.values()}), panels)


def _root_mean_square(facts: Facts) -> float | None:
    count = 1
    for side in facts["shape"]:
        count *= side
    norm = facts["norm"]
    return norm / count**0.5 if norm and count else None


def _map(
    values: Mapping[str, float | None],
    where: Mapping[str, Place],
    title: str,
    unit: str,
    whole: bool = False,
) -> Draw:
    cells = [
        Cell(place.label, place.layer, values[name])
        for name, place in where.items()
        if place.layer is not None
    ]
    return partial(heat_map, cells=cells, title=title, unit=unit, whole=whole)


def _name(data: Facts) -> str:
    return PurePath(data["path"]).name if data["path"] else "computed"
