"""What differs between two models, for people and for machines."""

from __future__ import annotations

import math
import shlex
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import median_high
from typing import Any

from loratool.checkpoint import Checkpoint
from loratool.differences import Difference
from loratool.layers import Place, places
from loratool.pairing import Pair
from loratool.recommendation import Advice, Look, advise, factors_size
from loratool.reports import Report, Table, bar, counted, format_bytes, format_share, listed
from loratool.spectra import Range

_SHARES = (0.5, 0.9, 0.99)
_KINDS = {
    "linear": "linear weights",
    "conv1d": "linear weights stored as (in, out)",
    "conv": "convolutions",
    "experts": "experts",
    "embedding": "embeddings",
    "other": "norms, biases and others",
}
_LOOKS: Mapping[Look, str] = {
    "same": "nothing differs",
    "merged_lora": "a merged LoRA",
    "sparse": "a sparse update",
    "full": "full fine-tuning",
    "whole": "only tensors that low-rank factors cannot express differ",
    "unknown": "not told without spectra (--quick)",
}


@dataclass(frozen=True)
class Told:
    """How differences are told.

    Attributes:
        command: the words of the command line that extracts what is recommended, but for the rank
            and the output.
        max_rank: the most singular values that were looked for; 0 for none.
        every: whether the table lists every tensor, not only kinds of them.
    """

    command: tuple[str, ...]
    max_rank: int
    every: bool


def difference_report(pair: Pair, differences: Sequence[Difference], told: Told) -> Report:
    """Describe what differs between a fine-tune and its base."""
    found = {difference.name: difference for difference in differences}
    where = places(found)
    advice = advise(differences, told.max_rank)
    changed = [difference for difference in differences if difference.is_changed]
    data = {
        "kind": "difference",
        "base": _model_facts(pair.base),
        "finetuned": _model_facts(pair.finetuned),
        "max_rank": told.max_rank or None,
        "counts": {
            "tensors": len(differences),
            "changed": sum(not (d.is_new or d.is_resized) for d in changed),
            "unchanged": len(differences) - len(changed),
            "new": sum(d.is_new for d in differences),
            "resized": sum(d.is_resized for d in differences),
            "removed": len(pair.dropped),
        },
        **_advice_facts(advice, told),
        "total": _totals(differences),
        "kinds": {
            kind: _totals(members)
            for kind in _KINDS
            if (members := [d for d in differences if d.change.kind == kind])
        },
        "rows": {row: _totals(members) for row, members in _rows(found, where).items()},
        "tensors": {name: _facts(found[name], place) for name, place in where.items()},
        "removed": list(pair.dropped),
        "dtypes": dict(Counter(filter(None, map(_dtypes, differences)))),
    }
    if told.every:
        groups = {name: [found[name]] for name in where if found[name].is_changed}
    else:
        groups = {row: m for row, m in _rows(found, where).items() if any(d.changed for d in m)}
    return Report(
        f"{pair.finetuned.label} against {pair.base.label}: {_title(advice)}",
        data,
        tuple(_lines(data, differences, advice)),
        _table(groups, told) if changed else None,
        (),
    )


def _title(advice: Advice) -> str:
    looks = "" if advice.look in ("same", "whole", "unknown") else "looks like "
    rank = f" of rank {advice.merged_rank}" if advice.merged_rank else ""
    return looks + _LOOKS[advice.look] + rank


def _model_facts(model: Checkpoint) -> dict[str, Any]:
    return {"name": model.label, "tensors": len(model), "bytes": model.nbytes}


def _advice_facts(advice: Advice, told: Told) -> dict[str, Any]:
    recommended = None
    if advice.rank is not None:
        recommended = {
            "factorizer": advice.factorizer or None,
            "rank": advice.rank,
            "sparse": advice.entries,
            "energy": advice.energy,
            "bytes": advice.size,
            "command": _command(advice, told),
        }
    return {
        "looks_like": advice.look,
        "merged_rank": advice.merged_rank,
        "may_be_merged_lora": advice.is_blind or advice.look == "merged_lora",
        "energy_by_rank": {str(rank): share for rank, share in advice.kept.items()},
        "rank_for": {f"{share:g}": _pair(found) for share, found in advice.rank_for.items()},
        "whole_bytes": advice.whole_size,
        "representation": None if advice.forms is None else advice.forms.as_json(),
        "recommendation": recommended,
    }


def _command(advice: Advice, told: Told) -> str:
    return shlex.join([*told.command, *_options(advice)])


def _options(advice: Advice) -> list[str]:
    """What extract is to be asked for."""
    words = ["--rank", str(advice.rank)]
    if advice.entries is not None:
        words += ["--sparse", f"{advice.entries:g}"]
    if advice.factorizer:
        words += ["--factorizer", advice.factorizer]
    return words


def _facts(difference: Difference, place: Place) -> dict[str, Any]:
    """Everything that is known of one tensor, as plain data."""
    before, after = difference.change.before, difference.change.after
    facts: dict[str, Any] = {
        "kind": difference.change.kind,
        "row": place.row,
        "label": place.label,
        "layer": place.layer,
        "shape": list(after.shape),
        "base_shape": None if before is None else list(before.shape),
        "dtype": after.dtype,
        "base_dtype": None if before is None else before.dtype,
        "factored": difference.change.factored,
        "relative_norm": difference.relative,
        "norm": math.sqrt(difference.energy),
        "changed": difference.changed,
        "changed_share": difference.changed / max(1, difference.elements),
    }
    spectrum = difference.spectrum
    if spectrum is None:
        return facts
    return facts | {
        "sigma": list(spectrum.sigma),
        "singular_values": spectrum.count,
        "is_whole": spectrum.is_whole,
        "known_energy": spectrum.known / spectrum.total if spectrum.total else 1.0,
        "stable_rank": spectrum.stable_rank,
        "effective_rank": _pair(spectrum.effective_rank),
        "rank_for": {f"{share:g}": _pair(spectrum.rank_for(share)) for share in _SHARES},
        "rounding_norm": math.sqrt(difference.rounding),
        "noise_edge": difference.edge,
        "above_noise": _pair(spectrum.above(difference.edge)),
        "merged_rank": difference.merged_rank,
    }


def _pair(found: Range) -> list[float]:
    return [found.low, found.high]


def _dtypes(difference: Difference) -> str:
    before, after = difference.change.before, difference.change.after
    return f"{before.dtype} to {after.dtype}" if before and before.dtype != after.dtype else ""


def _totals(members: Sequence[Difference]) -> dict[str, Any]:
    """Several tensors together."""
    compared = [d for d in members if d.base_energy is not None]
    base = math.fsum(d.base_energy or 0.0 for d in compared)
    change = math.fsum(d.energy for d in compared)
    elements = sum(d.elements for d in members)
    return {
        "tensors": len(members),
        "changed_tensors": sum(d.is_changed for d in members),
        "elements": elements,
        "changed": sum(d.changed for d in members),
        "changed_share": sum(d.changed for d in members) / max(1, elements),
        "norm": math.sqrt(change),
        "relative_norm": _ratio(change, base) if compared else None,
    }


def _ratio(change: float, base: float) -> float:
    if change == 0:
        return 0.0
    return math.sqrt(change / base) if base else math.inf


def _rows(
    found: Mapping[str, Difference], where: Mapping[str, Place]
) -> dict[str, list[Difference]]:
    rows: dict[str, list[Difference]] = {}
    for name, place in where.items():
        rows.setdefault(place.row, []).append(found[name])
    return rows


def _lines(
    data: Mapping[str, Any], differences: Sequence[Difference], advice: Advice
) -> Iterator[str]:
    counts, total = data["counts"], data["total"]
    compared = counts["tensors"] - counts["new"] - counts["resized"]
    yield (
        f"{counts['changed']} of {counted(compared, 'tensor')} of both differ"
        + (
            f", in {format_share(total['changed_share'])} of their weights"
            * bool(counts["changed"])
        )
        + (f", by a relative norm of {_small(total['relative_norm'])}" * bool(counts["changed"]))
    )
    new = [d.name for d in differences if d.is_new]
    resized = [d for d in differences if d.is_resized]
    if new:
        yield f"{counted(len(new), 'tensor')} the base does not have: {listed(new, 3)}"
    for difference in resized:
        before = difference.change.before
        assert before is not None
        shapes = f"{_shape(before.shape)} in the base, {_shape(difference.change.after.shape)} here"
        yield f"resized: {difference.name}: {shapes}"
    if data["removed"]:
        yield (
            f"{counted(len(data['removed']), 'tensor')} of the base are not in the fine-tune: "
            f"{listed(data['removed'], 3)}"
        )
    if data["dtypes"]:
        changes = (
            f"{words} ({counted(count, 'tensor')})" for words, count in data["dtypes"].items()
        )
        yield f"types differ: {', '.join(changes)}"
    if counts["changed"]:
        for kind, facts in data["kinds"].items():
            yield (
                f"{_KINDS[kind]}: {facts['changed_tensors']} of {facts['tensors']} differ"
                + (f", relative norm {_small(facts['relative_norm'])}" * bool(facts["changed"]))
            )
    yield from _advice_lines(data, differences, advice)


def _advice_lines(
    data: Mapping[str, Any], differences: Sequence[Difference], advice: Advice
) -> Iterator[str]:
    if advice.rank is None:
        return
    spectra = [d for d in differences if d.is_changed and d.spectrum is not None]
    above = [d.spectrum.above(d.edge).low for d in spectra if d.spectrum is not None]
    exact = all(d.spectrum.above(d.edge).is_exact for d in spectra if d.spectrum is not None)
    yield (
        f"rounding noise: {'' if exact else 'at least '}{median_high(above):.0f} singular values "
        f"of the median matrix stand above it ({min(above):.0f} to {max(above):.0f})"
    )
    kept = [f"rank {rank} {share:.0%}" for rank, share in _told_ranks(advice)]
    needed = advice.rank_for[0.9]
    yield (
        f"energy kept of ||delta||^2: {', '.join(kept)}; 90% needs rank {_between(needed)}, "
        f"99% rank {_between(advice.rank_for[0.99])}"
    )
    recommended = data["recommendation"]
    if advice.forms is not None and advice.forms.best != "low_rank":
        yield from advice.forms.lines()
    elif advice.look == "full":
        low = format_bytes(factors_size(spectra, int(needed.low)))
        dense = format_bytes(sum(d.change.after.nbytes for d in spectra))
        least = "" if needed.is_exact else "at least "
        yield f"90% takes {least}{low} as factors; the matrices themselves take {dense}"
    if advice.is_blind:
        yield (
            "perhaps a merged LoRA: the change is too small to tell without trying, which "
            "`loratool extract --factorizer auto` does"
        )
    about = "" if advice.entries is None else "about "
    whole = f", of it {format_bytes(advice.whole_size)} kept whole" if advice.whole_size else ""
    yield (
        f"recommendation: {' '.join(_options(advice))} ({format_bytes(advice.size)}{whole}; "
        f"{about}{format_share(advice.energy)} of ||delta||^2)"
    )
    yield f"  {recommended['command']}"


def _told_ranks(advice: Advice) -> Iterator[tuple[int, float]]:
    """Every fourth power of two, and the one that is recommended."""
    last = max(advice.kept)
    for rank, share in advice.kept.items():
        if rank in (4, 16, 64, 256, advice.rank, last) and (rank >= 4 or rank == advice.rank):
            yield rank, share
        if share > 0.9999:
            return


def _between(found: Range) -> str:
    if found.is_exact:
        return f"{found.low:.0f}"
    return f"{found.low:.0f} to {found.high:.0f}"


def _table(groups: Mapping[str, Sequence[Difference]], told: Told) -> Table:
    """A line for each group of tensors: sums, and medians of what is of single matrices."""
    norms = {name: _totals(group)["norm"] for name, group in groups.items()}
    all_energy = math.fsum(norm**2 for norm in norms.values())
    rows = []
    for name, group in groups.items():
        total = _totals(group)
        ranks = [d for d in group if d.spectrum is not None and d.is_changed]
        relative = total["relative_norm"]
        rows.append(
            (
                name.removesuffix(".weight"),
                *(() if told.every else (str(len(group)),)),
                _shape(group[0].change.after.shape),
                ("resized" if group[0].is_resized else "new")
                if relative is None
                else _small(relative),
                bar(norms[name] ** 2 / all_energy) if all_energy else "",
                format_share(total["changed_share"]),
                *_rank_cells(ranks, told),
            )
        )
    columns = (
        "tensor" if told.every else "tensors, * for a number",
        *(() if told.every else ("count",)),
        "shape",
        "change",
        "share of all",
        "weights",
    )
    if told.max_rank:
        columns += ("stable rank", "effective rank", "50%", "90%", "99%", "above noise")
    optional = ("shape", "effective rank", "share of all", "stable rank", "50%")
    return Table(columns, tuple(rows), optional=optional)


def _rank_cells(group: Sequence[Difference], told: Told) -> tuple[str, ...]:
    if not told.max_rank:
        return ()
    spectra = [(d.spectrum, d.edge) for d in group if d.spectrum is not None]
    if not spectra:
        return ("-",) * 6
    effective = [spectrum.effective_rank for spectrum, _ in spectra]
    low, high = (median_high(values) for values in zip(*effective, strict=True))
    return (
        f"{median_high(spectrum.stable_rank for spectrum, _ in spectra):.1f}",
        f"{low:.0f}" if f"{low:.0f}" == f"{high:.0f}" else f"{low:.0f}-{high:.0f}",
        *(_median([s.rank_for(share) for s, _ in spectra], told) for share in _SHARES),
        _median([spectrum.above(edge) for spectrum, edge in spectra], told),
    )


def _median(found: Sequence[Range], told: Told) -> str:
    """The median of numbers of which some are known to be larger than what was looked for."""
    middle = median_high(found)
    return f"{middle.low:.0f}" if middle.is_exact else f"> {min(told.max_rank, middle.low):.0f}"


def _shape(shape: Sequence[int]) -> str:
    return "x".join(map(str, shape)) or "scalar"


def _small(share: float) -> str:
    """A relative norm: per cent where that can be read."""
    return f"{share:.2%}" if share >= 5e-4 or share == 0 else f"{share:.1e}"
