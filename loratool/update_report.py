"""What is told of the single updates of an adapter, to people and to machines."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from loratool.adapter import Adapter, LazyUpdate
from loratool.checkpoint import LazyTensor
from loratool.checkpoint_report import tensor_facts
from loratool.measures import measure
from loratool.reports import Table, bar, format_count, sparkline
from loratool.update_measures import MeasuredUpdate

# In a table's narrow column; `loratool.updates.KIND_NAMES` has the whole names.
_SHORT = {
    "low_rank": "low-rank",
    "sparse": "low-rank + entries",
    "experts": "low-rank",
    "dense": "full-size",
    "loha": "LoHa",
    "lokr": "LoKr",
    "dora": "DoRA",
    "ia3": "IA3",
}


def layout_of(update: LazyUpdate) -> str:
    """What weight an update is for, in words; "" for a matrix (out, in)."""
    shape = update.shape
    if update.kind == "experts":
        return f"{shape[0]} experts"
    if update.kind == "ia3" and len(shape) == 2:
        return "of inputs" if shape[0] == 0 else "of outputs"
    if update.embedding:
        return "embedding"
    if len(shape) < 2:
        return "vector"
    if len(shape) > 2:
        return f"convolution {'x'.join(map(str, shape[2:]))}"
    return "stored as (in, out)" if update.transposed else ""


def update_facts(adapter: Adapter, name: str, found: MeasuredUpdate) -> dict[str, Any]:
    """Everything that is known of one update, as plain data."""
    update = adapter[name]
    rank = found.rank if update.rank is None else update.rank
    sigma = found.sigma
    return {
        "kind": update.kind,
        "layout": layout_of(update),
        "shape": list(update.shape),
        "rank": rank,
        "alpha": _alpha(adapter, update, found.scale, rank),
        "scale": found.scale,
        "dtype": update.dtype,
        "parameters": found.parameters,
        "entries": found.entries,
        "dense_parameters": math.prod(update.shape) or None,
        "bytes": sum(tensor.nbytes for tensor in update.stored),
        "norm": found.norm,
        "sigma": list(sigma),
        "energies": found.energies,
        "effective_rank": effective_ranks([value**2 for value in sigma]) if sigma else None,
        "experts": _experts(found) if update.kind == "experts" else None,
        "digests": found.digests,
    }


def _alpha(
    adapter: Adapter, update: LazyUpdate, scale: float | None, rank: int | None
) -> float | None:
    if scale is None or rank is None:
        return None
    root = adapter.rslora and update.kind not in ("loha", "lokr")
    # To 12 digits: what dividing by the rank and multiplying again has added is not alpha.
    return float(f"{scale * (math.sqrt(rank) if root else rank):.12g}")


def _experts(found: MeasuredUpdate) -> list[dict[str, Any]]:
    return [
        {
            "norm": math.hypot(*sigma),
            "effective_rank": effective_ranks([value**2 for value in sigma]),
        }
        for sigma in found.experts
    ]


def effective_ranks(squares: Sequence[float]) -> dict[str, int]:
    """How many of the largest singular values hold 90% and 99% of the energy.

    Args:
        squares: squared singular values, descending.
    """
    total = math.fsum(squares)
    found = {}
    for share in (0.9, 0.99):
        captured, count = 0.0, 0
        while count < len(squares) and captured < share * total:
            captured += squares[count]
            count += 1
        found[f"{share:g}"] = count
    return found


def whole_facts(update: LazyUpdate, tensor: LazyTensor) -> dict[str, Any]:
    """What is known of a tensor that is kept whole, or of the rows of a table that are."""
    found = measure(tensor)
    facts = {
        **tensor_facts(tensor),
        "parameters": tensor.numel,
        "norm": found.norm,
        "digests": {tensor.name: found.digest},
    }
    return {**facts, "rows": list(update.rows)} if update.kind == "rows" else facts


def update_table(updates: Mapping[str, Mapping[str, Any]], names: Sequence[str]) -> Table:
    """The updates of these names, a line each; their kinds where they are not all plain ones."""
    kinds = {name: _kind(updates[name]) for name in names}
    top = max((updates[name]["norm"] or 0.0 for name in names), default=0.0)
    rows: list[tuple[str, ...]] = []
    for name in names:
        facts = updates[name]
        norm, most = facts["norm"], facts["effective_rank"] or {}
        dense = facts["dense_parameters"]
        parameters = [format_count(facts["parameters"]), format_count(dense) if dense else "?"]
        rows.append(
            (
                name.removesuffix(".weight"),
                kinds[name],
                "x".join(str(size) if size else "?" for size in facts["shape"]),
                "-" if facts["rank"] is None else str(facts["rank"]),
                "/".join(parameters),
                "-" if norm is None else f"{norm:#.3g}",
                bar(norm / top) if norm and top else "",
                str(most.get("0.9", "-")),
                str(most.get("0.99", "-")),
                sparkline(facts["sigma"]),
            )
        )
    columns: tuple[str, ...] = (
        "module", "kind", "shape", "rank", "parameters", "norm", "", "90%", "99%", "spectrum",
    )  # fmt: skip
    if set(kinds.values()) <= {_SHORT["low_rank"]}:
        columns = (columns[0], *columns[2:])
        rows = [(row[0], *row[2:]) for row in rows]
    return Table(columns, tuple(rows), optional=("parameters", "shape", "spectrum"))


def _kind(facts: Mapping[str, Any]) -> str:
    return f"{_SHORT[facts['kind']]} {facts['layout']}".rstrip()
