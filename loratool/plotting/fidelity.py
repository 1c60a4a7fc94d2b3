"""A picture of how close models are to a fine-tune: over ranks, and from layer to layer."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePath
from typing import TYPE_CHECKING, Any

from loratool.plotting.canvas import CATEGORIES, GREY, SEQUENTIAL, style, write_figure
from loratool.reports import counted

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Facts = Mapping[str, Any]

_WIDTH, _HEIGHT = 12.0, 8.0  # inches
_SHOWN_LAYERS = 36  # numbers under the layers; of more, every other, fifth, ...


def draw_fidelity(data: Facts, path: Path) -> None:
    """Draw the data of a report of `loratool compare`.

    Args:
        data: the report's.
        path: an .svg or .png file, which is replaced.

    Raises:
        OutputError: it cannot be written.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    has_logits = data["models"][0]["kl"] is not None
    inputs = data["inputs"]
    title = (
        f"{PurePath(data['base']).name} with adapters against {PurePath(data['finetuned']).name}: "
        f"{counted(inputs['samples'], 'sample')}, {counted(data['positions'], 'position')}"
    )
    with style():
        figure = Figure(figsize=(_WIDTH, _HEIGHT), layout="constrained")
        FigureCanvasAgg(figure)
        figure.suptitle(title, fontsize=13, x=0.01, ha="left")
        above, below = figure.subfigures(2, 1, height_ratios=[1, 1.15], squeeze=False)[:, 0]
        left, right = above.subplots(1, 2)
        if has_logits:
            _over_ranks(left, data, "kl", "KL(fine-tune || model), nats", is_log=True)
            left.set_title("KL divergence from the fine-tune", loc="left")
            _over_ranks(right, data, "agreement", "top class agrees", is_share=True)
            right.set_title(
                "Agreement with the fine-tune's top class, with 95% interval", loc="left"
            )
        else:
            _over_ranks(left, data, "relative_error", "||x - y|| / ||y||", is_log=True)
            left.set_title(f"Relative error of {data['output']}", loc="left")
            _over_ranks(right, data, "cosine", "cosine")
            right.set_title(f"Cosine of {data['output']} with the fine-tune's", loc="left")
        _layers(below.subplots(), data)
        write_figure(figure, path)


def _over_ranks(
    axes: Axes, data: Facts, key: str, label: str, *, is_log: bool = False, is_share: bool = False
) -> None:
    """One number against the rank, a line for each adapter.

    Args:
        axes: where.
        data: the report's.
        key: which number.
        label: of its axis.
        is_log: whether it spreads over magnitudes.
        is_share: whether it is a share with an interval.
    """
    from matplotlib.ticker import PercentFormatter

    models: Sequence[Facts] = data["models"]
    ranks = sorted({m["rank"] for m in models if m["rank"]})
    place = {rank: math.log2(rank) for rank in ranks}
    place[0] = min(place.values(), default=1.0) - 1
    for name, colour in _colours(data).items():
        own = _line(models, name)
        known = [m for m in own if m["rank"] is not None]
        x, y = [place[m["rank"]] for m in known], [m[key] for m in known]
        axes.plot(x, y, color=colour, linewidth=1.8, marker="o", markersize=5, label=name)
        if is_share:
            low, high = zip(*(m["agreement_interval"] for m in known), strict=True)
            axes.fill_between(x, low, high, color=colour, alpha=0.15, linewidth=0)
        for model in own:
            if model["rank"] is None:
                axes.axhline(model[key], color=colour, linewidth=1.2, label=f"{name} (no rank)")
    for model in models:
        is_line = model["role"] == "base" and any(m["role"] == "rank 0" for m in models)
        if is_line or (model["role"] == "finetuned" and model["dtype"] != "fp32"):
            dashes = "--" if is_line else ":"
            axes.axhline(
                model[key], color=GREY, linewidth=1.2, linestyle=dashes, label=model["name"]
            )
    values = [m[key] for m in models if m["role"] != "finetuned" or m["dtype"] != "fp32"]
    positive = [value for value in values if value > 0]
    if is_log and positive and max(positive) > 8 * min(positive):
        if len(positive) < len(values):  # an exact adapter is at 0, which no logarithm shows
            axes.set_yscale("symlog", linthresh=min(positive))
        else:
            axes.set_yscale("log")
    if is_share:
        axes.yaxis.set_major_formatter(PercentFormatter(1.0))
        axes.set_ylim(top=1.005)
    axes.set_xticks([place[0], *(place[rank] for rank in ranks)], ["0", *map(str, ranks)])
    axes.set_xlabel("rank")
    axes.set_ylabel(label)
    axes.grid(axis="y", color="#dddddd", linewidth=0.6)
    if len(axes.get_legend_handles_labels()[1]) > 1:
        axes.legend(frameon=False, loc="best")


def _line(models: Sequence[Facts], name: str) -> list[Facts]:
    """The models of one adapter from rank 0 up."""
    own = [m for m in models if name in m["adapters"]]
    if not any(m["role"] == "rank 0" for m in own):
        own += [m for m in models if m["role"] == "base"]
    return sorted(own, key=lambda model: (model["rank"] is None, model["rank"] or 0))


def _colours(data: Facts) -> dict[str, str]:
    """A colour for each adapter."""
    names = dict.fromkeys(
        n for m in data["models"] if m["role"] == "adapter" for n in m["adapters"]
    )
    return {name: CATEGORIES[place % len(CATEGORIES)] for place, name in enumerate(names)}


def _layers(axes: Axes, data: Facts) -> None:
    """The relative error of what each layer hands on, a line for each model."""
    layers: Sequence[str] = data["layers"]
    shown = [
        m for m in data["models"] if m["layer_errors"] and not (
            m["role"] == "finetuned" and m["dtype"] == "fp32"
        )
    ]  # fmt: skip
    styles = _styles(data)
    for model in shown:
        errors = [error if error > 0 else math.nan for error in model["layer_errors"]]
        axes.plot(range(len(errors)), errors, markersize=3, marker=".", **styles(model))
    every = [e for m in shown for e in m["layer_errors"] if e > 0]
    if every and max(every) > 8 * min(every):
        axes.set_yscale("log")
    places, labels = _layer_ticks(layers)
    axes.set_xticks(places, labels)
    for start in [number for number, name in enumerate(layers) if name.endswith("embeddings")][1:]:
        axes.axvline(start - 0.5, color=GREY, linewidth=0.6)
    axes.set_xlabel(_stacks(layers))
    axes.set_ylabel("||x - y|| / ||y||")
    axes.set_title("Relative error of what each layer hands on, mean over positions", loc="left")
    axes.grid(axis="y", color="#dddddd", linewidth=0.6)
    axes.legend(frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5))


def _styles(data: Facts) -> Any:
    """How the line of a model looks: by rank where there is one adapter, else by adapter."""
    from matplotlib import colormaps

    colours = _colours(data)
    ranks = sorted({m["rank"] for m in data["models"] if m["rank"]})
    scale = colormaps[SEQUENTIAL]

    def style_of(model: Facts) -> dict[str, Any]:
        if model["role"] in ("base", "rank 0", "finetuned"):
            dashes = {"base": "--", "rank 0": "-.", "finetuned": ":"}[model["role"]]
            return {"color": GREY, "linestyle": dashes, "linewidth": 1.4, "label": model["name"]}
        name = model["adapters"][0]
        rank = f"rank {model['rank']}" if model["rank"] else ""
        if len(colours) == 1 and rank:
            shade = scale(0.85 * ranks.index(model["rank"]) / max(1, len(ranks) - 1))
            return {"color": shade, "linewidth": 1.6, "label": rank}
        strength = (ranks.index(model["rank"]) + 1) / len(ranks) if rank else 1.0
        return {
            "color": colours[name], "linewidth": 1.6, "alpha": 0.35 + 0.65 * strength,
            "label": f"{name}{', ' * bool(rank)}{rank}",
        }  # fmt: skip

    return style_of


def _layer_ticks(layers: Sequence[str]) -> tuple[list[int], list[str]]:
    step = next(s for s in (1, 2, 5, 10, 20, 50, 100, 10**6) if len(layers) / s <= _SHOWN_LAYERS)
    places, labels = [], []
    for place, name in enumerate(layers):
        number = name.rpartition(".")[2]
        if name.endswith("embeddings"):
            places.append(place)
            labels.append("emb.")
        elif not number.isdecimal() or int(number) % step == 0:
            places.append(place)
            labels.append(number if number.isdecimal() else "")
    return places, labels


def _stacks(layers: Sequence[str]) -> str:
    """The lists that layers are members of, in order."""
    stacks = (name.rpartition(".")[0] for name in layers if not name.endswith("embeddings"))
    return ", then ".join(dict.fromkeys(stacks)) or "layer"
