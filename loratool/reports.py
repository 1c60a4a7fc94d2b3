"""What a verb tells when it is done: once for people, once for machines."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any


@dataclass(frozen=True)
class Table:
    """Rows under column headings; cells are already formatted.

    Attributes:
        columns: the headings.
        rows: a cell for each column.
        optional: headings of columns that a narrow terminal may leave out, the first one first.
    """

    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    optional: tuple[str, ...] = ()


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


def format_count(count: int) -> str:
    """A large number in three digits or four: 9999, 45.1M, 1.17B."""
    if count < 10_000:
        return str(count)
    size, unit = count / 1000, "k"
    for larger in ("M", "B", "T"):
        if size >= 999.5:
            size, unit = size / 1000, larger
    return f"{size:.0f}{unit}" if size >= 99.95 else f"{size:#.3g}{unit}"


def bar(share: float, width: int = 10) -> str:
    """A horizontal bar of block characters for a share in [0, 1]; never empty but for 0."""
    if not 0 < share <= 1:
        return ""
    full, eighths = divmod(max(1, round(8 * width * share)), 8)
    return "█" * full + " ▏▎▍▌▋▊▉"[eighths].strip()


def sparkline(values: Sequence[float], width: int = 8) -> str:
    """Values as upright bars of block characters relative to the largest, at most `width`.

    Where there are more values than bars, a bar stands for the mean of its values.
    """
    top = max(values, default=0.0)
    if not 0 < top < math.inf:
        return ""
    count = min(width, len(values))
    edges = [len(values) * i // count for i in range(count + 1)]
    groups = [values[start:end] for start, end in pairwise(edges)]
    means = [sum(group) / len(group) for group in groups]
    return "".join("▁▂▃▄▅▆▇█"[min(7, int(8 * mean / top))] for mean in means)


def listed(names: Sequence[str], most: int) -> str:
    """The first names, and how many more there are: "a, b, and 3 more"."""
    more = f", and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


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
