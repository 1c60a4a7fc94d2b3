"""References to checkpoints and adapters: `./dir`, `org/name@revision`, `ref=0.7`."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from pathlib import Path

from loratool.errors import UsageError

_HUB_NAME = re.compile(
    r"(?P<id>[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(@(?P<revision>[^:\s]+))?(:(?P<subfolder>.+))?"
)


@dataclass(frozen=True)
class Ref:
    """Where something lies.

    Attributes:
        text: as the user wrote it.
        path: the local path of that name, if there is one.
        repo, revision, subfolder: the parts of a Hub reference, if it reads as one.
    """

    text: str
    path: Path | None
    repo: str | None = None
    revision: str | None = None
    subfolder: str | None = None


def parse_ref(text: str | Path) -> Ref:
    """Read a reference; a local path of that name wins over the Hub."""
    text = str(text)
    if text and Path(text).exists():
        return Ref(text, Path(text))
    match = _HUB_NAME.fullmatch(text)
    if match is None:
        return Ref(text, None)
    return Ref(text, None, match["id"], match["revision"], match["subfolder"])


def parse_weighted(text: str) -> tuple[str, float]:
    """Split `REF=WEIGHT`; the weight is 1 if there is none.

    A path that itself holds an equals sign is taken as it is when it exists.

    Raises:
        UsageError: the weight is not a finite number.
    """
    head, sign, tail = text.rpartition("=")
    if not sign or Path(text).exists():
        return text, 1.0
    try:
        weight = float(tail)
    except ValueError:
        raise UsageError(f"{text}: {tail!r} after the equals sign is not a weight") from None
    if not math.isfinite(weight):
        raise UsageError(f"{text}: the weight must be finite, not {tail}")
    return head, weight
