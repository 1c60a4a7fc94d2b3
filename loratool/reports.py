"""What a verb tells when it is done: once for people, once for machines."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Table:
    """Rows under column headings; cells are already formatted."""

    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


@dataclass(frozen=True)
class Report:
    """The outcome of a verb.

    Attributes:
        title: one line that says what was done.
        data: the same for machines (`--json`); plain JSON values only.
        lines: the facts a person wants, one a line.
        table: details by tensor, if there are any.
        notes: what the user should hear even with --quiet.
        status: the exit status: 0 for a good result, 1 for a bad one.
    """

    title: str
    data: Mapping[str, Any]
    lines: tuple[str, ...] = ()
    table: Table | None = None
    notes: tuple[str, ...] = field(default=())
    status: int = 0

    @property
    def ok(self) -> bool:
        """Whether the result is good."""
        return self.status == 0


def format_bytes(size: float) -> str:
    """Bytes with a binary unit: 3.4 MiB."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1024:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} TiB"


def format_share(share: float) -> str:
    """A share in [0, 1] as per cent, never rounded up to 100% when something is missing."""
    percent = min(share * 100, 99.99) if share < 1 else 100.0
    return f"{percent:.2f}%"


def counted(count: int, noun: str) -> str:
    """A number of things: "1 tensor", "2 tensors"."""
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def to_json(data: Any, indent: int) -> str:
    """Plain data as JSON with sorted keys; null for NaN and Inf, which JSON cannot say."""
    return json.dumps(_finite(data), indent=indent, sort_keys=True, allow_nan=False)


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    return [_finite(item) for item in value] if isinstance(value, list | tuple) else value
