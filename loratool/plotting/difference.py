"""A picture of what a fine-tune changed."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path, PurePath
from typing import Any

from loratool.plotting.canvas import new_figure, style, write_figure
from loratool.plotting.panels import Cell, Line, energy_curves, heat_map, ranges, spectra

Facts = Mapping[str, Any]

_WIDTH, _ROW, _MAP, _CURVES = 13.0, 0.24, 0.95, 3.6  # inches; a map is a frame and its rows


def draw_difference(data: Facts, path: Path) -> None:
    """Draw the data of a report of `loratool diff`.

    Args:
        data: the report's.
        path: an .svg or .png file, which is replaced.

    Raises:
        OutputError: it cannot be written.
    """
    tensors: Mapping[str, Facts] = data["tensors"]
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
    maps: list[Callable[[Any], None]] = []
    if mapped:
        maps.append(
            lambda axes: heat_map(
                axes, _cells(mapped, lambda f: f["relative_norm"]),
                "Relative norm of the change", "||ΔW|| / ||W||", percent=True,
            )
        )  # fmt: skip
    if mapped and lines:
        maps.append(
            lambda axes: heat_map(
                axes, _rank_cells(mapped),
                "Rank that holds 90% of the energy of the change"
                + "  (>: more than were looked for)" * any(c.is_least for c in _rank_cells(mapped)),
                "rank", whole=True,
            )
        )  # fmt: skip
    rows = len({facts["label"] for facts in mapped})
    panels = [bool(lines), bool(lines), bool(apart)]
    height = 0.5 + len(maps) * (_MAP + _ROW * rows) + _CURVES * any(panels)
    names = [PurePath(data[side]["name"]).name for side in ("finetuned", "base")]
    with style():
        figure = new_figure(_WIDTH, height, f"{names[0]} against {names[1]}: {_looks(data)}")
        heights = [*((_MAP + _ROW * rows,) * len(maps)), *([_CURVES] * any(panels))]
        if not heights:
            heights = [_CURVES]
        parts = figure.subfigures(len(heights), 1, height_ratios=heights, squeeze=False)[:, 0]
        for part, draw in zip(parts, maps, strict=False):
            draw(part.subplots())
        if any(panels):
            axes = iter(parts[-1].subplots(1, sum(panels), squeeze=False)[0])
            if lines:
                edges = [f["noise_edge"] for f in matrices if f.get("sigma")]
                spectra(next(axes), lines, "Singular values of the change", edges)
                energy_curves(
                    next(axes), lines, "Energy of the change against rank",
                    recommended and recommended["rank"],
                )  # fmt: skip
            if apart:
                ranges(next(axes), apart, "Other tensors", "||ΔW|| / ||W||", percent=True)
        elif not maps:
            parts[0].text(0.5, 0.5, "nothing differs", ha="center")
        write_figure(figure, path)


def _cells(matrices: list[Facts], value: Callable[[Facts], float | None]) -> list[Cell]:
    return [Cell(facts["label"], facts["layer"], value(facts)) for facts in matrices]


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
