"""Whether a merged checkpoint is a base with an adapter in it: every tensor judged, and the whole.

The whole, by the first rule that applies, over the adapter's updates but those that "cannot be
told", and over all other tensors:

1. There are some, and all are "not applied": so is the adapter.
2. An update shows "other changes", only some are applied, or a tensor that the adapter leaves alone
   is changed, missing or additional: "other changes".
3. An update is applied at another strength: "another strength".
4. No low-rank update is applied, and fewer than 16 weights of all together tell: "cannot be told".
   What is replaced whole says nothing of the factors.
5. "applied". Updates that cannot be told are tolerated: their bits are those of a merge.

What the tensors have in common is used once more: where several show one other strength, the
others are judged again at it, for one with few telling weights finds none by itself; likewise where
some were rounded stochastically.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from loratool import plugins
from loratool.adapter import Adapter
from loratool.application import Changes
from loratool.binding import Binding, BoundUpdate
from loratool.checkpoint import Checkpoint, LazyTensor
from loratool.computed import judge_computed
from loratool.counterpart import Counterpart, Counterparts, pair_up
from loratool.engine import single_threaded_tasks
from loratool.linalg import Workspace
from loratool.proof import (
    EVIDENCE,
    STOCHASTIC,
    Difference,
    Finding,
    Strength,
    Verdict,
    difference,
    prove_update,
    roundest,
)
from loratool.replay import Names, Replay, Update
from loratool.reports import Report, Table, counted, format_count, format_share, listed
from loratool.tally import Tally
from loratool.updates import Kind, LowRank, Replacement

_STATUS: dict[Verdict, int] = {
    "applied": 0, "another strength": 1, "not applied": 1, "other changes": 1, "cannot be told": 3,
}  # fmt: skip
# The order in which people want to see tensors.
_ORDER: tuple[Verdict, ...] = (
    "other changes", "not applied", "another strength", "cannot be told", "applied",
)  # fmt: skip
# As they follow a number.
_WORDS: dict[Verdict, str] = {
    "another strength": "applied at another strength", "other changes": "with other changes",
}  # fmt: skip
_WORKSPACE = Workspace()


@dataclass(frozen=True)
class Entry:
    """One tensor and what was found.

    Attributes:
        name: of the tensor.
        kind: what the adapter does to it.
        finding: the verdict; of an untouched tensor "other changes", or None if it has none.
    """

    name: str
    kind: Kind | Literal["untouched"]
    finding: Finding | None

    @property
    def verdict(self) -> Verdict | None:
        """In short."""
        return self.finding.verdict if self.finding else None

    @property
    def is_telling(self) -> bool:
        """Whether it has a verdict that says something."""
        return self.verdict not in (None, "cannot be told")


def prove(
    adapter: Adapter, base: Checkpoint, merged: Checkpoint, binding: Binding, expected: float
) -> Report:
    """Read all three, tile by tile, and report whether `merged` contains the adapter.

    Args:
        adapter: the adapter.
        base: what it was merged into.
        merged: the result, by anybody.
        binding: of the adapter to the base, without errors.
        expected: the strength that it should have been merged at, not 0.

    Raises:
        MismatchError: `merged` is of another architecture, or quantized.
        InputError: NaN or Inf where there should be a number.
    """
    counterparts = pair_up(base, merged, binding)
    executor: plugins.Executor = plugins.create("executors", "threads")
    with single_threaded_tasks():
        entries = list(executor.map(_judge(expected), counterparts.found))
        entries = _judge_again(entries, counterparts.found, expected, executor)
    for name in counterparts.absent:
        bound = binding.changed.get(name) or binding.added[name]
        finding = Finding("not applied", "the merged model has no such tensor")
        entries.append(Entry(name, bound.update.kind, finding))
    warnings = (str(problem) for problem in binding.problems if problem.severity == "warning")
    notes = (*base.notes, *merged.notes, *adapter.notes, *counterparts.notes, *warnings)
    labels = (adapter.label, base.label, merged.label)
    return _Outcome(*labels, expected, counterparts, entries, notes).report()


def _judge(expected: float, stochastic: bool = False) -> Callable[[Counterpart], Entry]:
    def judge(pair: Counterpart) -> Entry:
        bound, base = pair.bound, pair.base
        found = bound.update.load() if bound else None
        if isinstance(found, Replacement):
            return Entry(pair.name, "replacement", _judge_whole(pair.merged, base, found.tensor))
        if base is None:
            return Entry(pair.name, "untouched", None)
        if bound is None or found is None or not base.numel:
            return Entry(pair.name, "untouched", _judge_untouched(pair.merged, base))
        finding = _other_shape(pair.merged, base.shape)
        if not isinstance(found, LowRank):
            finding = finding or judge_computed(pair.merged, base, bound, expected)
            return Entry(pair.name, found.kind, finding)
        if finding is None:
            replay = _replay(pair.merged, base, bound, found)
            finding = prove_update(replay, expected, stochastic)
        return Entry(pair.name, "low_rank", finding)

    return judge


def _replay(merged: LazyTensor, base: LazyTensor, bound: BoundUpdate, found: LowRank) -> Replay:
    if bound.update.beneath is not None:
        Changes(updates=((bound, 1.0),)).load_delta(base)  # refuses another layer than the base's
    b, a = (found.a.T, found.b.T) if bound.transposed else (found.b, found.a)
    update = Update(b, a, found.scale)
    shape = (b.shape[0], a.shape[1])
    before, after = base.read().view(shape), merged.read().view(shape)
    return Replay(before, after, update, _WORKSPACE, _names(base, merged))


def _names(base: LazyTensor, merged: LazyTensor) -> Names:
    return Names(f"{base.origin}: {base.name}", f"{merged.origin}: {merged.name}")


def _judge_untouched(merged: LazyTensor, base: LazyTensor) -> Finding | None:
    if finding := _other_shape(merged, base.shape):
        return finding
    found = difference(merged.read(), base.read(), None, _names(base, merged))
    return _differing(found, merged, "the base's") if found else None


def _judge_whole(merged: LazyTensor, base: LazyTensor | None, new: LazyTensor) -> Finding:
    is_base = (
        base is not None
        and base.shape == merged.shape
        and difference(merged.read(), base.read(), None, _names(base, merged)) is None
    )
    found = _other_shape(merged, new.shape)
    if found is None:
        via = base.dtype if base is not None else None
        wrong = difference(merged.read(), new.read(), via, _names(new, merged))
        found = _differing(wrong, merged, "the adapter's") if wrong else None
    if found is None and is_base:
        return Finding("cannot be told", "the adapter's tensor is the base's")
    if is_base:
        return Finding("not applied", "still the base's tensor")
    return found or Finding("applied", "the adapter's tensor", contained=True)


def _other_shape(merged: LazyTensor, shape: tuple[int, ...]) -> Finding | None:
    if merged.shape == shape:
        return None
    return Finding("other changes", f"its shape is {merged.shape}, not {shape}")


def _differing(found: Difference, merged: LazyTensor, whose: str) -> Finding:
    index, place = found.first, ""
    for size in reversed(merged.shape):
        index, rest = divmod(index, size)
        place = f"{rest}, {place}" if place else str(rest)
    reason = f"{found.count:,} of {merged.numel:,} values are not {whose}, the first at [{place}]"
    return Finding("other changes", reason)


def _judge_again(
    entries: Sequence[Entry],
    pairs: Sequence[Counterpart],
    expected: float,
    executor: plugins.Executor,
) -> list[Entry]:
    """Judge the contradictory ones by what the others have in common."""
    common = _common_strength(entries, expected)
    stochastic = any(entry.finding and entry.finding.way == STOCHASTIC for entry in entries)
    if common is None and not stochastic:
        return list(entries)
    found = list(entries)
    doubtful = [
        number
        for number, entry in enumerate(entries)
        if entry.kind == "low_rank" and entry.verdict in ("other changes", "not applied")
    ]
    judge = _judge(expected if common is None else common, stochastic)
    again = executor.map(judge, [pairs[number] for number in doubtful])
    for number, entry in zip(doubtful, again, strict=True):
        if entry.verdict in ("applied", "cannot be told"):
            found[number] = entry if common is None else _at_another(entry)
    return found if common is None else [_unified(entry, common) for entry in found]


def _common_strength(entries: Sequence[Entry], expected: float) -> float | None:
    """The one other strength that all tensors at another strength allow, if there is one."""
    strengths = _strengths(entry for entry in entries if entry.verdict == "another strength")
    common = _intersection(strengths, expected) if strengths else None
    return common.value if common and common.value != expected else None


def _strengths(entries: Iterable[Entry]) -> list[Strength]:
    return [e.finding.strength for e in entries if e.finding and e.finding.strength]


def _intersection(strengths: Sequence[Strength], expected: float) -> Strength | None:
    """What all of them allow, or None."""
    low = max((s.low for s in strengths if s.is_limited), default=-math.inf)
    high = min((s.high for s in strengths if s.is_limited), default=math.inf)
    if low > high:
        return None
    if math.isinf(low):
        return strengths[0] if len({s.value for s in strengths}) == 1 else None
    return Strength(roundest(low, high, expected), low, high)


def _at_another(entry: Entry) -> Entry:
    if entry.finding is None or entry.verdict != "applied":
        return entry
    finding = replace(entry.finding, verdict="another strength", contained=False)
    return replace(entry, finding=finding)


def _unified(entry: Entry, common: float) -> Entry:
    """A strength that is as good as the common one becomes it."""
    finding = entry.finding
    if finding is None or finding.strength is None or finding.verdict != "another strength":
        return entry
    strength = replace(finding.strength, value=common)
    return replace(entry, finding=replace(finding, strength=strength))


@dataclass(frozen=True)
class _Outcome:
    """All entries, and what they say together."""

    adapter: str
    base: str
    merged: str
    expected: float
    counterparts: Counterparts
    entries: Sequence[Entry]
    notes: tuple[str, ...]

    @property
    def updates(self) -> list[Entry]:
        """What the adapter changes."""
        return [entry for entry in self.entries if entry.kind != "untouched"]

    @property
    def low_rank(self) -> list[Entry]:
        """What the adapter changes by factors or the like; not what it replaces whole."""
        kinds = ("replacement", "untouched")
        return [entry for entry in self.entries if entry.kind not in kinds]

    @property
    def changed(self) -> list[Entry]:
        """Untouched tensors that are not the base's."""
        return [e for e in self.entries if e.kind == "untouched" and e.finding]

    @property
    def has_other_changes(self) -> bool:
        """Whether tensors that the adapter leaves alone differ."""
        pairs = self.counterparts
        return bool(self.changed or pairs.missing or pairs.extra)

    @property
    def evidence(self) -> int:
        """Telling weights in low-rank updates that cannot be told by themselves."""
        tallies = [e.finding.tally for e in self.low_rank if e.finding and not e.is_telling]
        return sum(tally.agreeing for tally in tallies if tally)

    def verdict(self) -> Verdict:
        """The whole, by the rules of this module."""
        found = {entry.verdict for entry in self.updates if entry.is_telling}
        if found == {"not applied"}:
            return "not applied"
        if self.has_other_changes or found & {"other changes", "not applied"}:
            return "other changes"
        if "another strength" in found:
            return "another strength"
        applied = any(entry.verdict == "applied" for entry in self.low_rank)
        if self.low_rank and not applied and self.evidence < EVIDENCE:
            return "cannot be told"
        return "applied" if found or self.low_rank else "cannot be told"

    def report(self) -> Report:
        """For people and for machines."""
        verdict = self.verdict()
        lines = (*self._counts(), *self._measures(), *self._others())
        return Report(
            self._title(verdict),
            self._data(verdict),
            lines,
            self._table(),
            self.notes,
            _STATUS[verdict],
        )

    def strength(self) -> Strength | None:
        """That of all low-rank updates, if they have one in common."""
        merged = [e for e in self.low_rank if e.verdict in ("applied", "another strength")]
        strengths = _strengths(merged)
        if not strengths or len({s.value for s in strengths}) > 1:
            return None
        return _intersection(strengths, strengths[0].value)

    def _title(self, verdict: Verdict) -> str:
        merged, adapter = self.merged, self.adapter
        at = "" if self.expected == 1 else f" at strength {self.expected:g}"
        if verdict == "applied":
            return f"{merged} contains {adapter}{at}, and no other change"
        if verdict == "not applied":
            return f"{merged} does not contain {adapter}{at}"
        if verdict == "cannot be told":
            return f"whether {merged} contains {adapter}{at} cannot be told: rounding hides it"
        if verdict == "another strength":
            return f"{merged} contains {adapter} {self._other_strengths()}, not {self.expected:g}"
        telling = [entry for entry in self.updates if entry.is_telling]
        contained = [e for e in telling if e.finding and e.finding.contained]
        if contained and len(contained) == len(telling):
            return f"{merged} contains {adapter}{at}, and other changes"
        if contained:
            return (
                f"{merged} contains only a part of {adapter}{at}: {len(contained)} of "
                f"{counted(len(telling), 'update')}"
            )
        return f"{merged} is not {self.base} with {adapter} added{at}"

    def _other_strengths(self) -> str:
        if common := self.strength():
            return f"at strength {common}"
        values = sorted(s.value for s in _strengths(self.low_rank))
        return f"at strengths from {values[0]:.6g} to {values[-1]:.6g}"

    def _counts(self) -> list[str]:
        counts = Counter(entry.verdict for entry in self.updates)
        parts = [f"{counts[v]} {_WORDS.get(v, v)}" for v in reversed(_ORDER) if counts[v]]
        return [f"{counted(len(self.updates), 'update')}: {', '.join(parts)}"]

    def _measures(self) -> list[str]:
        lines = []
        if common := self.strength():
            lines.append(f"strength: {common}")
        by_way: dict[str, list[Tally]] = {}
        for entry in self.low_rank:
            if entry.finding and entry.finding.way and entry.finding.tally:
                by_way.setdefault(entry.finding.way, []).append(entry.finding.tally)
        for way, tallies in by_way.items():
            told = sum(tally.informative for tally in tallies)
            share = format_share(sum(tally.reproduced for tally in tallies) / told)
            lines.append(
                f"{share} of {format_count(told)} changed weights reproduced to the bit in "
                f"{counted(len(tallies), 'tensor')}: {way}"
            )
        if by_way and (ratio := self._residual()) is not None:
            lines.append(f"what is left over is {ratio:.3g} times what rounding explains")
        return lines

    def _residual(self) -> float | None:
        """||R - S||^2 over all low-rank updates, as a share of what rounding explains."""
        tallies = [e.finding.tally for e in self.low_rank if e.finding and e.finding.tally]
        noise = sum(tally.noise for tally in tallies)
        return sum(tally.residual for tally in tallies) / noise if noise else None

    def _others(self) -> list[str]:
        untouched = sum(entry.kind == "untouched" for entry in self.entries)
        pairs = self.counterparts
        parts = [f"{untouched - len(self.changed)} as in the base"]
        parts += [f"{len(self.changed)} changed"] if self.changed else []
        for names, what in ((pairs.missing, "missing"), (pairs.extra, "additional")):
            parts += [f"{len(names)} {what} ({listed(names, 2)})"] if names else []
        lines = [f"other tensors: {', '.join(parts)}"] if untouched or len(parts) > 1 else []
        hidden = [entry for entry in self.updates if not entry.is_telling]
        if hidden:
            lines.append(
                f"{counted(len(hidden), 'update')} cannot be told: applied or not, the bits are "
                "those of a merge"
            )
        return lines

    def _table(self) -> Table:
        rows: list[tuple[str, ...]] = [
            (name, "other changes", "", what)
            for names, what in (
                (self.counterparts.missing, "missing"),
                (self.counterparts.extra, "neither the base nor the adapter has it"),
            )
            for name in names
        ]
        shown = [entry for entry in self.entries if entry.finding]
        for verdict in _ORDER:
            for entry in (entry for entry in shown if entry.verdict == verdict):
                strength = entry.finding.strength if entry.finding else None
                reason = entry.finding.reason if entry.finding else ""
                rows.append((entry.name, verdict, str(strength or ""), reason))
        return Table(("tensor", "verdict", "strength", "why"), tuple(rows))

    def _data(self, verdict: Verdict) -> dict[str, Any]:
        counts = Counter(entry.verdict for entry in self.updates)
        common = self.strength()
        return {
            "kind": "proof",
            "ok": verdict == "applied",
            "verdict": verdict,
            "adapter": self.adapter,
            "base": self.base,
            "merged": self.merged,
            "expected_strength": self.expected,
            "strength": common.as_json() if common else None,
            "counts": {name: counts[name] for name in reversed(_ORDER)},
            "evidence": self.evidence,
            "residual_to_noise": self._residual(),
            "unchanged": sum(e.kind == "untouched" and not e.finding for e in self.entries),
            "missing": list(self.counterparts.missing),
            "extra": list(self.counterparts.extra),
            "tensors": {
                e.name: {"kind": e.kind, **e.finding.as_json()} for e in self.entries if e.finding
            },
        }
