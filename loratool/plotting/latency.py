"""A picture of how much slower or faster models are than a reference: dots, intervals, noise."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loratool.plotting.canvas import CATEGORIES, GREY, style, write_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Facts = Mapping[str, Any]

_WIDTH, _HEADING, _ROW, _PANEL = 12.0, 0.7, 0.34, 1.0  # inches
_COLUMNS = 3
_COLOURS = {"slower": CATEGORIES[4], "faster": CATEGORIES[2], "unclear": CATEGORIES[1]}


def draw_latency(data: Facts, path: Path) -> None:
    """Draw the data of a report of `loratool bench`.

    Args:
        data: the report's.
        path: an .svg or .png file, which is replaced.

    Raises:
        OutputError: it cannot be written.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    results: Sequence[Facts] = data["results"]
    columns = min(_COLUMNS, len(results))
    rows = -(-len(results) // columns)
    most = max(len(result["models"]) for result in results)
    height = _HEADING + rows * (_PANEL + _ROW * most)
    with style():
        figure = Figure(figsize=(_WIDTH, height), layout="constrained")
        FigureCanvasAgg(figure)
        figure.suptitle(
            f"Latency against {data['reference']} on {data['providers'][0]}: ratio of medians, "
            "with 95% interval; grey: noise",
            fontsize=13, x=0.01, ha="left",
        )  # fmt: skip
        grid = figure.subplots(rows, columns, squeeze=False, sharey=True)
        for place, axes in enumerate(grid.flat):
            if place < len(results):
                _ratios(axes, results[place])
            else:
                axes.set_visible(False)
        write_figure(figure, path)


def _ratios(axes: Axes, result: Facts) -> None:
    """The ratio of every model on one shape, and the band of noise."""
    reference, *others = result["models"]
    floor = result["noise_floor"]
    axes.axvspan(1 / (1 + floor), 1 + floor, color=GREY, alpha=0.18, linewidth=0)
    axes.axvline(1, color=GREY, linewidth=1.2)
    for place, facts in enumerate(others):
        low, high = facts["ratio_interval"]
        colour = _COLOURS.get(facts["verdict"], CATEGORIES[0])
        if facts["verdict"] is None:
            colour = GREY
        axes.plot([low, high], [place, place], color=colour, linewidth=2.2)
        axes.plot([facts["ratio"]], [place], color=colour, marker="o", markersize=6)
        axes.annotate(
            f"{facts['ratio']:.3f}", (facts["ratio"], place), (0, 6), textcoords="offset points",
            ha="center", fontsize=8, color=colour,
        )  # fmt: skip
    axes.set_yticks(range(len(others)), [facts["name"] for facts in others])
    axes.set_ylim(len(others) - 0.4, -0.7)
    axes.margins(x=0.12)
    axes.set_xlabel("ratio (above 1 is slower)")
    past = f"+{result['past']}" if result["past"] is not None else ""
    stage = "" if result["stage"] == "model" else f"{result['stage']} "
    axes.set_title(
        f"{stage}{result['batch']} x {result['sequence']}{past}: {1000 * reference['median']:.3g} "
        f"ms, noise ±{100 * floor:.1f}%",
        loc="left",
    )  # fmt: skip
    axes.grid(axis="x", color="#dddddd", linewidth=0.6)
