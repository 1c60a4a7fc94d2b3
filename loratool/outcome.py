"""What became of every update of an adapter while it was drained."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from loratool.adapter import Adapter, LazyUpdate
from loratool.errors import InputError
from loratool.linalg import Certificate, Weighted
from loratool.reports import Report, Table, format_bytes, format_share
from loratool.updates import (
    KIND_NAMES,
    Experts,
    Kind,
    LowRank,
    Replacement,
    Sparse,
    Update,
    counted_kind,
)


@dataclass(frozen=True)
class Entries:
    """Single entries beside factors.

    Attributes:
        number: of entries.
        nbytes: of their values and places in a file.
        without: the energy that the factors alone capture; None if only theirs was measured.
    """

    number: int
    nbytes: int
    without: float | None


def _entries(update: Sparse) -> Entries:
    from loratool.gaps import sparse_bytes

    alone = update.added.certificate
    size = sparse_bytes(update.positions, update.values)
    both = update.certificate
    is_told = alone is not None and both is not None and alone.energy != both.energy
    return Entries(len(update.values), size, alone.energy if alone and is_told else None)


@dataclass
class Outcome:
    """Collects certificates and norms, one tensor at a time.

    Attributes:
        adapter: what is drained.
        low_rank: name -> the certificate of its factors.
        sparse: name -> the single entries beside its factors.
        replaced: name -> relative norm of the change (None: the base has no such tensor).
        others: name -> the kind of what is neither.
        left_out: the same for what `--lora-only` left out.
        unchanged: how many tensors turned out to be equal in both models.
        kinds: how many updates of each kind there were; IA3's biases go with their weights.
    """

    adapter: Adapter
    low_rank: dict[str, Certificate] = field(default_factory=dict)
    sparse: dict[str, Entries] = field(default_factory=dict)
    replaced: dict[str, float | None] = field(default_factory=dict)
    others: dict[str, Kind] = field(default_factory=dict)
    left_out: dict[str, float | None] = field(default_factory=dict)
    unchanged: int = 0
    kinds: Counter[Kind] = field(default_factory=Counter)

    def watch(
        self, results: Iterable[tuple[LazyUpdate, Update | None]]
    ) -> Iterator[tuple[LazyUpdate, Update | None]]:
        """Pass results on and remember what they say."""
        for update, found in results:
            if found is not None and not update.optional:
                self.kinds[found.kind] += 1
            if isinstance(found, Sparse):
                self.sparse[update.name] = _entries(found)
            if isinstance(found, LowRank | Sparse | Experts):
                self.low_rank[update.name] = found.certificate or Certificate(found.rank, 0, 0)
            elif isinstance(found, Replacement):
                self.replaced[update.name] = found.relative_norm
            elif found is not None:
                self.others[update.name] = found.kind
            else:
                self.unchanged += 1
            yield update, found

    def leave_out(self, update: LazyUpdate, found: Update | None) -> None:
        """Remember a change that is not written."""
        if isinstance(found, Replacement):
            self.left_out[update.name] = found.relative_norm

    def check(self) -> None:
        """Raise InputError if there was nothing to write."""
        if self.low_rank or self.replaced or self.others:
            return
        if self.left_out:
            raise InputError(
                "only tensors that low-rank factors cannot express have changed "
                f"({', '.join(list(self.left_out)[:4])}, ...); leave --lora-only out"
            )
        raise InputError(self.adapter.provenance.nothing)

    @property
    def energy(self) -> float:
        """Share of the squared norm of all low-rank deltas together that was captured."""
        total = sum(c.total for c in self.low_rank.values()) + self.adapter.provenance.lost()
        return sum(c.captured for c in self.low_rank.values()) / total if total > 0 else 1.0

    @property
    def _weighted(self) -> list[Weighted]:
        return [c.weighted for c in self.low_rank.values() if c.weighted is not None]

    def data(self, size: int) -> dict[str, Any]:
        """Everything for the manifest; plain values that depend on the inputs alone."""
        tensors: dict[str, Any] = {}
        for name, c in self.low_rank.items():
            tensors[name] = {
                "kind": self.adapter[name].kind,
                "shape": list(self.adapter[name].shape),
                "rank": c.rank,
                "energy": c.energy,
                "relative_error": c.relative_error,
                "share_of_optimum_at_least": c.captured / c.optimum_bound
                if c.optimum_bound > 0
                else 1.0,
                "delta_norm": c.total**0.5,
                "method": c.method,
                "steps": c.steps,
            }
            if c.weighted is not None:
                tensors[name]["weighted"] = _weighted_data([c.weighted])
        for name, entries in self.sparse.items():
            tensors[name]["entries"] = entries.number
            tensors[name]["entry_bytes"] = entries.nbytes
            if entries.without is not None:
                tensors[name]["energy_of_factors"] = entries.without
        for name, source in self.adapter.provenance.sources.items():
            if name in tensors:
                tensors[name]["from"] = source
        for name, norm in self.replaced.items():
            tensors[name] = {"kind": "replacement", "relative_norm": norm}
        for name, kind in self.others.items():
            tensors[name] = {"kind": kind, "shape": list(self.adapter[name].shape)}
        return {
            "kind": "adapter",
            "tensors": tensors,
            "left_out": self.left_out,
            "dropped": list(self.adapter.dropped),
            "totals": {
                "low_rank": len(self.low_rank),
                "replaced": len(self.replaced),
                "others": len(self.others),
                self.adapter.provenance.skipped.replace(" ", "_"): self.unchanged,
                "energy": self.energy,
                **self._entry_totals(),
                **({"weighted": _weighted_data(self._weighted)} if self._weighted else {}),
                "bytes": size,
            },
            **self.adapter.facts(),
        }

    def _entry_totals(self) -> dict[str, Any]:
        if not self.sparse:
            return {}
        found: dict[str, Any] = {
            "entries": sum(found.number for found in self.sparse.values()),
            "entry_bytes": sum(found.nbytes for found in self.sparse.values()),
        }
        alone = self.energy_of_factors
        return found if alone is None else {**found, "energy_of_factors": alone}

    @property
    def energy_of_factors(self) -> float | None:
        """The share that is captured without single entries, where that was measured."""
        if all(found.without is None for found in self.sparse.values()):
            return None
        total = sum(c.total for c in self.low_rank.values()) + self.adapter.provenance.lost()
        captured = 0.0
        for name, c in self.low_rank.items():
            alone = self.sparse[name].without if name in self.sparse else None
            captured += c.captured if alone is None else alone * c.total
        return captured / total if total > 0 else 1.0

    def report(self, target: Path, size: int, data: dict[str, Any]) -> Report:
        """The outcome for people."""
        lines = [
            ", ".join(counted_kinds(self.kinds.elements()))
            + (f", {self.unchanged} {self.adapter.provenance.skipped}" if self.unchanged else "")
        ]
        if self.low_rank:
            share = format_share(self.energy)
            lines.append(f"energy captured: {share} of ||delta||^2 of all low-rank updates")
        if self.sparse:
            totals = self._entry_totals()
            words = f"single entries: {totals['entries']:,}, {format_bytes(totals['entry_bytes'])}"
            if (alone := self.energy_of_factors) is not None:
                words += f"; the factors alone capture {format_share(alone)}"
            lines.append(words)
        if self._weighted:
            found = _weighted_data(self._weighted)
            lines.append(
                f"of the outputs' change for the calibration inputs: "
                f"{format_share(found['energy'])} (the truncated SVD of the same ranks: "
                f"{format_share(found['energy_of_svd'])})"
            )
        tuned = data.get("finetuned", {}).get("bytes")
        share = (
            f" ({size / tuned:.1%} of the fine-tuned model's {format_bytes(tuned)})"
            if tuned
            else ""
        )
        lines.append(f"size: {format_bytes(size)}{share}")
        if self.adapter.dropped:
            lines.append(
                f"{len(self.adapter.dropped)} tensors of the base are not in the fine-tuned model "
                f"({self.adapter.dropped[0]}, ...): merging leaves them out"
            )
        for names in data.get("duplicates", ()):
            lines.append(f"the same values: {' = '.join(names)}")
        for name, norm in self.left_out.items():
            lines.append(f"left out: {name} ({_norm(norm)})")
        lines += self.adapter.provenance.lines()
        return Report(
            f"{self.adapter.provenance.done} {target}",
            data,
            tuple(lines),
            self._table(),
            self.adapter.notes,
        )

    def _table(self) -> Table:
        rows: list[tuple[str, ...]] = [
            (name, str(c.rank), format_share(c.energy), _error(c.relative_error))
            for name, c in self.low_rank.items()
        ]
        columns: tuple[str, ...] = ("tensor", "rank", "energy", "relative error")
        if self.sparse:
            columns = (*columns, "entries")
            counts = {name: f"{found.number:,}" for name, found in self.sparse.items()}
            rows = [(*row, counts.get(row[0], "")) for row in rows]
        if sources := self.adapter.provenance.sources:
            columns = (*columns, "made of")
            rows = [(*row, sources.get(row[0], "")) for row in rows]
        return Table(columns, tuple(rows))


def counted_kinds(kinds: Iterable[Kind]) -> list[str]:
    """How many there are of each kind: ["2 DoRA updates", "1 tensor kept whole"]."""
    found = Counter(kinds)
    return [counted_kind(kind, found[kind]) for kind in KIND_NAMES if found[kind]]


def _weighted_data(parts: Sequence[Weighted]) -> dict[str, float]:
    """Shares of ||delta C^(1/2)||^2 that the factors and the truncated SVD capture."""
    total = sum(part.total for part in parts)
    if total <= 0:
        return {"energy": 1.0, "energy_of_svd": 1.0}
    captured, plain = sum(p.captured for p in parts), sum(p.plain for p in parts)
    return {"energy": min(1.0, captured / total), "energy_of_svd": min(1.0, plain / total)}


def _error(error: float) -> str:
    """Four places, or the magnitude of what would show as 0."""
    return f"{error:.4f}" if error >= 5e-5 or error == 0 else f"{error:.1e}"


def _norm(norm: float | None) -> str:
    return "not in the base" if norm is None else f"relative norm of the change {norm:.2e}"
