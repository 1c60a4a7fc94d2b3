"""The kinds of panels that pictures of models are made of.

Each draws into axes that it is given, from plain numbers.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import median
from typing import TYPE_CHECKING, Any

from loratool.plotting.canvas import CATEGORIES, GREY, SEQUENTIAL

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Points of all lines of a panel together, and of each at least: SVG files stay small.
_POINTS, _LEAST_POINTS = 640, 9
_DECADES = 1e4  # from the largest to the smallest singular value in the picture
_SHOWN_LAYERS = 24  # numbers under a heat map; of more layers every other, fifth, tenth, ...


@dataclass(frozen=True)
class Cell:
    """One matrix of a model, and a number of it.

    Attributes:
        row: the short name of its kind.
        layer: the number of its layer.
        value: what is shown; None for nothing.
        is_least: whether the number is only known to be at least this.
    """

    row: str
    layer: int
    value: float | None
    is_least: bool = False


@dataclass(frozen=True)
class Line:
    """The singular values of one matrix.

    Attributes:
        row: the short name of its kind.
        layer: the number of its layer; None if it lies in none.
        sigma: descending.
        total: ||D||_F^2 of all singular values, known or not.
    """

    row: str
    layer: int | None
    sigma: Sequence[float]
    total: float


def heat_map(
    axes: Axes, cells: Sequence[Cell], title: str, unit: str, *, percent: bool = False,
    whole: bool = False,
) -> None:  # fmt: skip
    """Layers by matrices, a number as colour.

    Args:
        axes: where.
        cells: rows appear in their order.
        title: what is shown.
        unit: along the colour bar.
        percent: whether the numbers are shares.
        whole: whether they are whole numbers, spread over magnitudes.
    """
    import numpy as np
    from matplotlib.colors import LogNorm, Normalize
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter, PercentFormatter

    rows = list(dict.fromkeys(cell.row for cell in cells))
    first, last = (edge(cell.layer for cell in cells) for edge in (min, max))
    grid = np.full((len(rows), last - first + 1), np.nan)
    for cell in cells:
        if cell.value is not None:
            grid[rows.index(cell.row), cell.layer - first] = cell.value
    found = grid[np.isfinite(grid)]
    low, high = (float(found.min()), float(found.max())) if found.size else (0.0, 1.0)
    is_log = low > 0 and high / low > 8 and not (percent and high > 0.5)
    norm = LogNorm(low, high) if is_log else Normalize(low, high if high > low else low + 1e-9)
    mesh = axes.pcolormesh(
        np.arange(first, last + 2) - 0.5,
        np.arange(len(rows) + 1) - 0.5,
        np.ma.masked_invalid(grid),
        cmap=SEQUENTIAL,
        norm=norm,
        edgecolors="white",
        linewidth=0.4,
    )
    for cell in cells:
        if cell.is_least and cell.value is not None:
            shade = "black" if norm(cell.value) > 0.5 else "white"
            axes.text(
                cell.layer, rows.index(cell.row), ">", ha="center", va="center", fontsize=7,
                color=shade,
            )  # fmt: skip
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.set_yticks(range(len(rows)), rows)
    axes.set_xticks(_layer_ticks(first, last))
    axes.set_xlabel("layer")
    axes.set_title(title, loc="left")
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    bar = axes.figure.colorbar(mesh, ax=axes, pad=0.01, aspect=12, fraction=0.05)
    bar.set_label(unit)
    bar.outline.set_visible(False)
    if is_log:
        bar.ax.yaxis.set_major_locator(LogLocator(base=10, subs=(1.0, 2.0, 5.0)))
        bar.ax.yaxis.set_minor_formatter(NullFormatter())
        bar.ax.minorticks_off()
    if percent and not is_log:
        bar.ax.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=_decimals(high - low)))
    elif percent:
        bar.ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:.3g}%"))
    elif is_log or whole:
        bar.ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.3g}"))


def _decimals(span: float) -> int:
    """Places after the point that tell the ticks of a range of shares apart."""
    return max(0, min(4, 1 - math.floor(math.log10(max(100 * span, 1e-3)))))


def _layer_ticks(first: int, last: int) -> list[int]:
    step = next(s for s in (1, 2, 5, 10, 20, 50, 100, 1000) if (last - first) / s < _SHOWN_LAYERS)
    return [layer for layer in range(first, last + 1) if layer % step == 0]


def spectra(axes: Axes, lines: Sequence[Line], title: str, edges: Sequence[float] = ()) -> None:
    """Singular values against their numbers, a thin line for each matrix.

    Coloured by kind of matrix where there are few, else by layer.

    Args:
        axes: where.
        lines: the matrices.
        title: what is shown.
        edges: the largest singular value of the rounding noise of each matrix.
    """
    colours = _line_colours(axes, lines)
    each = max(_LEAST_POINTS, _POINTS // max(1, len(lines)))
    for line, colour in zip(lines, colours, strict=True):
        places = sorted({*_spaced(len(line.sigma), each), *_drop(line.sigma)})
        axes.plot(
            [place + 1 for place in places],
            [line.sigma[place] for place in places],
            color=colour,
            linewidth=0.8,
            alpha=0.75,
            marker="." if len(line.sigma) == 1 else None,
        )
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel("number of the singular value")
    axes.set_ylabel("singular value")
    axes.set_title(title, loc="left")
    _plain_numbers(axes)
    top = max(line.sigma[0] for line in lines)
    least = min(line.sigma[-1] for line in lines)
    axes.set_ylim(max(least / 1.5, top / _DECADES), top * 1.5)
    if edges:
        _noise(axes, edges)


def _noise(axes: Axes, edges: Sequence[float]) -> None:
    """Where rounding alone would put the largest singular values of matrices."""
    bottom, top = axes.get_ylim()
    low, high, middle = min(edges), max(edges), median(edges)
    words = "edge of the rounding noise"
    if high < bottom:
        axes.annotate(
            f"{words}: {middle:.1g}, below", (0.99, 0.01), xycoords="axes fraction", ha="right",
            va="bottom", color="#333333", fontsize=9,
        )  # fmt: skip
        return
    axes.set_ylim(min(bottom, low / 1.5), max(top, high * 1.2))
    if high > 1.05 * low:
        axes.axhspan(low, high, color=GREY, alpha=0.2, linewidth=0)
    axes.axhline(middle, color="#333333", linestyle="--", linewidth=1.2)
    axes.annotate(
        words, (0.01, middle), xycoords=("axes fraction", "data"), xytext=(0, 3),
        textcoords="offset points", ha="left", va="bottom", color="#333333", fontsize=9,
    )  # fmt: skip


def _drop(sigma: Sequence[float]) -> tuple[int, ...]:
    """The two places between which the values fall most, before they vanish at the end."""
    ratios = [one / other for one, other in pairwise(sigma[: len(sigma) // 2])]
    if not ratios:
        return ()
    place = ratios.index(max(ratios))
    return place, place + 1


def _line_colours(axes: Axes, lines: Sequence[Line]) -> list[Any]:
    from matplotlib import colormaps
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize
    from matplotlib.lines import Line2D

    rows = list(dict.fromkeys(line.row for line in lines))
    if len(rows) <= len(CATEGORIES):
        colour = dict(zip(rows, CATEGORIES, strict=False))
        handles = [Line2D([], [], color=colour[row], linewidth=2, label=row) for row in rows]
        axes.legend(
            handles=handles, frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5),
            handlelength=1.2,
        )  # fmt: skip
        return [colour[line.row] for line in lines]
    layers = [line.layer for line in lines if line.layer is not None] or [0]
    norm, scale = Normalize(min(layers), max(max(layers), min(layers) + 1)), colormaps[SEQUENTIAL]
    bar = axes.figure.colorbar(ScalarMappable(norm, scale), ax=axes, pad=0.01, aspect=25)
    bar.set_label("layer (grey: none)")
    return [GREY if line.layer is None else scale(norm(line.layer)) for line in lines]


def _spaced(count: int, most: int) -> list[int]:
    """At most so many of the places 0 to count - 1, ever further apart, with the last."""
    if count <= most:
        return list(range(count))
    ratio = math.log(count) / (most - 1)
    return sorted({min(count, round(math.exp(ratio * step))) - 1 for step in range(most)})


def energy_curves(axes: Axes, lines: Sequence[Line], title: str, rank: int | None = None) -> None:
    """Energy against rank: of all matrices together, their median, and their range.

    A curve ends where singular values are not known any more.

    Args:
        axes: where.
        lines: the matrices.
        title: what is shown.
        rank: one to mark, with the energy that it keeps of all matrices together.
    """
    from matplotlib.ticker import PercentFormatter

    curves = [_shares(line) for line in lines if line.total > 0]
    longest = max(map(len, curves))
    ranks = [place + 1 for place in _spaced(longest, 60)]
    table = [sorted(_at(curve, rank) for curve in curves) for rank in ranks]
    total = math.fsum(line.total for line in lines)
    together = [
        math.fsum(_at(_shares(line), rank) * line.total for line in lines if line.total > 0) / total
        for rank in ranks
    ]
    axes.fill_between(
        ranks, [row[0] for row in table], [row[-1] for row in table], color=CATEGORIES[5],
        alpha=0.3, linewidth=0, label="range over matrices",
    )  # fmt: skip
    axes.plot(
        ranks, [median(row) for row in table], color=CATEGORIES[0], linestyle="--",
        linewidth=1.5, label="median matrix",
    )  # fmt: skip
    axes.plot(ranks, together, color=CATEGORIES[0], linewidth=2, label="all together")
    axes.set_xscale("log", base=2)
    axes.set_ylim(0, 1.02)
    axes.yaxis.set_major_formatter(PercentFormatter(1.0))
    for share in (0.5, 0.9):
        axes.axhline(share, color=GREY, linewidth=0.6, linestyle=":")
    if rank is not None and rank <= longest:
        kept = math.fsum(_at(_shares(line), rank) * line.total for line in lines if line.total)
        axes.axvline(rank, color=CATEGORIES[4], linewidth=1.2)
        title = f"{title}: rank {rank} keeps {kept / total:.0%}"
    axes.set_xlabel("rank of every matrix")
    axes.set_ylabel("energy kept")
    axes.set_title(title, loc="left")
    axes.legend(loc="lower right", framealpha=0.85, edgecolor="none")
    _plain_numbers(axes, x_only=True)


def _shares(line: Line) -> list[float]:
    kept, found = 0.0, []
    for value in line.sigma:
        kept += value * value
        found.append(min(1.0, kept / line.total))
    return found


def _at(curve: Sequence[float], rank: int) -> float:
    """The share at a rank; what is kept at the last known one beyond it."""
    return curve[min(rank, len(curve)) - 1]


def ranges(
    axes: Axes, values: Mapping[str, Sequence[float]], title: str, label: str, *,
    percent: bool = False, most: int = 14,
) -> None:  # fmt: skip
    """Tensors that lie in no map: a dot for the median of each kind, a line for its range.

    Args:
        axes: where.
        values: kind -> the numbers of its tensors; the largest are shown.
        title: what is shown.
        label: of the numbers.
        percent: whether they are shares.
        most: how many kinds to show.
    """
    from matplotlib.ticker import FuncFormatter

    ordered = sorted(values, key=lambda name: -max(values[name]))[:most]
    for place, name in enumerate(ordered):
        found = values[name]
        axes.plot([min(found), max(found)], [place, place], color=CATEGORIES[0], linewidth=2.5,
                  alpha=0.4, solid_capstyle="round")  # fmt: skip
        axes.plot(median(found), place, "o", color=CATEGORIES[0], markersize=5)
    axes.set_yticks(range(len(ordered)), ordered)
    axes.set_ylim(len(ordered) - 0.5, -0.5)
    every = [value for name in ordered for value in values[name] if value > 0]
    if every and max(every) > 8 * min(every):
        axes.set_xscale("log")
    axes.xaxis.set_major_formatter(
        FuncFormatter(lambda value, _: f"{100 * value:.3g}%" if percent else f"{value:.3g}")
    )
    axes.xaxis.set_minor_formatter(FuncFormatter(lambda value, _: ""))
    axes.set_xlabel(label)
    axes.set_title(title + (f" ({most} of {len(values)})" if len(values) > most else ""),
                   loc="left")  # fmt: skip
    axes.grid(axis="x", color="#dddddd", linewidth=0.6)
    axes.tick_params(axis="y", length=0)


def bars(axes: Axes, values: Mapping[str, float], title: str, label: str) -> None:
    """One number of each kind of tensors, as a horizontal bar.

    Args:
        axes: where.
        values: kind -> its number.
        title: what is shown.
        label: of the numbers.
    """
    names = list(values)
    axes.barh(range(len(names)), [values[name] for name in names], color=CATEGORIES[0])
    axes.set_yticks(range(len(names)), names)
    axes.set_ylim(len(names) - 0.5, -0.5)
    axes.set_xlabel(label)
    axes.set_title(title, loc="left")
    axes.tick_params(axis="y", length=0)


def _plain_numbers(axes: Axes, x_only: bool = False) -> None:
    """1, 10, 100 instead of powers."""
    from matplotlib.ticker import FuncFormatter

    for axis in (axes.xaxis,) if x_only else (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axis.set_minor_formatter(FuncFormatter(lambda value, _: ""))
