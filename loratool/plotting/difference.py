"""A picture of what a fine-tune changed."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path, PurePath
from typing import Any

from loratool.layers import places
from loratool.plotting.canvas import Draw, draw_panels
from loratool.plotting.panels import Cell, Line, energy_curves, heat_map, ranges, spectra

Facts = Mapping[str, Any]

_RELATIVE = "||ΔW|| / ||W||"


def draw_difference(data: Facts, path: Path) -> None:
    """Draw the data of a report of `loratool diff`.

    Args:
        data: the report's.
        path: an .svg or .png file, which is replaced.

    Raises:
        OutputError: it cannot be written.
    """
    tensors: Mapping[str, Facts] = {name: data["tensors"][name] for name in places(data["tensors"])}
    matrices = [facts for facts in tensors.values() if facts["factored"]]
    mapped = [facts for facts in matrices if facts["layer"] is not None]
    lines = [
        Line(f["label"], f["layer"], f["sigma"], f["norm"] ** 2) for f in matrices if f.get("sigma")
    ]
    apart: dict[str, list[float]] = {}
    for facts in tensors.values():
        is_told = facts["relative_norm"] and (not facts["factored"] or facts["layer"] is None)
        if is_told:
            apart.setdefault(facts["label"], []).append(facts["relative_norm"])
    recommended = data["recommendation"]
    maps: list[Draw] = []
    if mapped:
        cells = [Cell(f["label"], f["layer"], f["relative_norm"]) for f in mapped]
        title = "Relative norm of the change"
        maps.append(partial(heat_map, cells=cells, title=title, unit=_RELATIVE, percent=True))
    if mapped and lines:
        cells = _rank_cells(mapped)
        title = "Rank that holds 90% of the energy of the change"
        title += "  (>: more than were looked for)" * any(cell.is_least for cell in cells)
        maps.append(partial(heat_map, cells=cells, title=title, unit="rank", whole=True))
    panels: list[Draw] = []
    if lines:
        edges = [f["noise_edge"] for f in matrices if f.get("sigma")]
        rank = recommended and recommended["rank"]
        title = "Singular values of the change"
        panels.append(partial(spectra, lines=lines, title=title, edges=edges))
        title = "Energy of the change"
        panels.append(partial(energy_curves, lines=lines, title=title, rank=rank))
    if apart:
        title = "Others" if mapped else "Tensors"
        panels.append(partial(ranges, values=apart, title=title, label=_RELATIVE, percent=True))
    names = [PurePath(data[side]["name"]).name for side in ("finetuned", "base")]
    heading = f"{names[0]} against {names[1]}: {_looks(data)}"
    draw_panels(path, heading, maps, len({facts["label"] for facts in mapped}), panels)


def _rank_cells(matrices: list[Facts]) -> list[Cell]:
    cells = []
    for facts in matrices:
        if not facts.get("sigma"):
            cells.append(Cell(facts["label"], facts["layer"], None))
            continue
        low, high = facts["rank_for"]["0.9"]
        known = len(facts["sigma"])
        cells.append(Cell(facts["label"], facts["layer"], min(low, known), low != high))
    return cells


def _looks(data: Facts) -> str:
    words = {
        "same": "nothing differs",
        "merged_lora": f"looks like a merged LoRA of rank {data['merged_rank']}",
        "sparse": "looks like a sparse update",
        "full": "looks like full fine-tuning",
    }
    return words.get(data["looks_like"], "what differs")
