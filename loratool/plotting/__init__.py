"""Pictures of reports, drawn by matplotlib, which is imported when one is drawn.

A picture is made of a report's data alone, the same that `--json` prints. Equal data give equal
bytes of SVG with the same version of matplotlib.
"""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

from loratool.errors import InputError, OutputError, UsageError

SUFFIXES = (".svg", ".png")


def check_picture(path: str) -> None:
    """Raise an error if no picture could be written to `path`; before any long work.

    Raises:
        UsageError: its suffix names no format of pictures.
        OutputError: it lies in no directory, or is one.
        InputError: matplotlib is missing.
    """
    place = Path(path)
    if place.suffix.lower() not in SUFFIXES:
        raise UsageError(f"--plot: {path}: pictures end in {' or '.join(SUFFIXES)}")
    if not place.parent.is_dir():
        raise OutputError(f"{place.parent}: there is no such directory for the picture")
    if place.is_dir():
        raise OutputError(f"{path}: is a directory, not a place for a picture")
    if find_spec("matplotlib") is None:
        raise InputError("--plot needs matplotlib: pip install 'loratool[plot]'")
