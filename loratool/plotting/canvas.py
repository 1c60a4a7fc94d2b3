"""A figure from nothing to a file: its style, its panels' places, and writing it whole or not."""

from __future__ import annotations

import io
import os
import re
import tempfile
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loratool.errors import OutputError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Sequential, perceptually uniform, and told apart by colour-blind readers and in print.
SEQUENTIAL = "cividis"
# Okabe and Ito's palette (2008) but for its yellow, which is not seen as a thin line on white.
CATEGORIES = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#D55E00", "#56B4E9", "#000000")
GREY = "#666666"

_STYLE: dict[str, Any] = {
    "font.size": 10,
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


def style() -> AbstractContextManager[None]:
    """The look of all pictures, whatever the user's own settings of matplotlib are."""
    import matplotlib

    own: Any = matplotlib.rcParamsDefault  # its keys are one long literal type
    settings: Any = {key: value for key, value in own.items() if not key.startswith("backend")}
    settings.update(_STYLE)
    return matplotlib.rc_context(settings)


def new_figure(width: float, height: float, title: str) -> Figure:
    """An empty figure of so many inches that lays out its own panels."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(title, fontsize=13, x=0.01, ha="left")
    return figure


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
    if suffix == "svg":  # hundredths of a point are enough, and half the size
        return _COORDINATES.sub(lambda match: _DIGITS.sub(rb"\1", match[0]), content)
    return content


_COORDINATES = re.compile(rb' (?:d|x|y)="[^"]*"')
_DIGITS = re.compile(rb"(\.\d\d)\d+")
