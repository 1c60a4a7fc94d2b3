"""A figure from nothing to a file: its style, its panels' places, and writing it whole or not."""

from __future__ import annotations

import io
import os
import re
import tempfile
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loratool.errors import OutputError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Draw = Callable[["Axes"], None]

# Sequential, perceptually uniform, and told apart by colour-blind readers and in print.
SEQUENTIAL = "viridis"
# Okabe and Ito's palette (2008) but for its yellow, which is not seen as a thin line on white.
CATEGORIES = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#D55E00", "#56B4E9", "#000000")
GREY = "#666666"

_STYLE: dict[str, Any] = {
    "font.size": 10,
    "font.sans-serif": ["DejaVu Sans", "sans-serif"],
    "path.simplify_threshold": 0.3,
    "axes.titlesize": 11,
    "axes.labelsize": 10,
    "xtick.labelsize": 9,
    "ytick.labelsize": 9,
    "legend.fontsize": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": False,
    "svg.hashsalt": "loratool",
    "svg.fonttype": "none",
}
_DPI = 110
# Inches; a map is a frame and its rows.
_WIDTH, _HEADING, _MAP, _ROW, _PANEL = 13.0, 0.5, 0.95, 0.24, 3.6


def style() -> AbstractContextManager[None]:
    """The look of all pictures, whatever the user's own settings of matplotlib are."""
    import matplotlib

    own: Any = matplotlib.rcParamsDefault  # its keys are one long literal type
    settings: Any = {key: value for key, value in own.items() if not key.startswith("backend")}
    settings.update(_STYLE)
    return matplotlib.rc_context(settings)


def draw_panels(
    path: Path, title: str, maps: Sequence[Draw], rows: int, panels: Sequence[Draw]
) -> None:
    """Draw maps below one another, and panels side by side below them, into a file.

    Args:
        path: an .svg or .png file, which is replaced.
        title: of the whole picture.
        maps: each draws into the axes that it is given, as wide as the picture.
        rows: that a map has.
        panels: likewise, each as wide as its neighbours, the first a little wider.

    Raises:
        OutputError: the file cannot be written.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    heights = [_MAP + _ROW * rows] * len(maps) + [_PANEL] * bool(panels)
    with style():
        figure = Figure(figsize=(_WIDTH, _HEADING + sum(heights)), layout="constrained")
        FigureCanvasAgg(figure)
        figure.suptitle(title, fontsize=13, x=0.01, ha="left")
        if heights:
            parts = figure.subfigures(len(heights), 1, height_ratios=heights, squeeze=False)[:, 0]
            for part, draw in zip(parts, maps, strict=False):
                draw(part.subplots())
            if panels:
                widths = [1.3, *[1.0] * (len(panels) - 1)]
                axes = parts[-1].subplots(1, len(panels), squeeze=False, width_ratios=widths)[0]
                for place, draw in zip(axes, panels, strict=True):
                    draw(place)
        write_figure(figure, path)


def write_figure(figure: Figure, path: Path) -> None:
    """Write a figure as its file's suffix says, all of it or nothing.

    Raises:
        OutputError: the place cannot be written.
    """
    content = _drawn(figure, path.suffix.lower().removeprefix("."))
    try:
        handle, temporary = tempfile.mkstemp(suffix=path.suffix, dir=path.parent)
    except OSError as error:
        raise OutputError(f"{path}: cannot be written: {error.strerror}") from error
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
        mask = os.umask(0)
        os.umask(mask)
        Path(temporary).chmod(0o666 & ~mask)
        Path(temporary).replace(path)
    except OSError as error:
        raise OutputError(f"{path}: cannot be written: {error.strerror}") from error
    finally:
        Path(temporary).unlink(missing_ok=True)


def _drawn(figure: Figure, suffix: str) -> bytes:
    """The bytes of the file; without what differs from day to day."""
    buffer = io.BytesIO()
    metadata = {"Date": None} if suffix == "svg" else {"Software": None}
    figure.savefig(buffer, format=suffix, dpi=_DPI, metadata=metadata)
    content = buffer.getvalue()
    if suffix == "svg":
        content = _INDENTS.sub(b"\n", _COORDINATES.sub(_shortened, content))
    return content


def _shortened(match: re.Match[bytes]) -> bytes:
    """Coordinates to a tenth of a point; of polygons without their commands: half the size."""
    text = _DIGITS.sub(rb"\1", match[0])
    return text if _CURVES.search(text) else text.replace(b"\nL ", b"")


_COORDINATES = re.compile(rb' (?:d|x|y)="[^"]*"')
_DIGITS = re.compile(rb"(\.\d)\d+")
_INDENTS = re.compile(rb" *\n *")
_CURVES = re.compile(rb"[CQ]")
