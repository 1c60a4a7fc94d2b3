"""What an adapter is made of, for people and for machines; computed from its factors alone."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from loratool import plugins
from loratool.adapter import Adapter, LazyUpdate
from loratool.checkpoint_report import dtype_facts, dtype_words
from loratool.digests import combine_digests
from loratool.engine import single_threaded_tasks
from loratool.errors import Problem
from loratool.files import file_size, is_file
from loratool.json_files import MANIFEST, read_json
from loratool.measures import whole_tensor
from loratool.reports import Report, counted, format_bytes, format_share, listed
from loratool.update_measures import MeasuredUpdate, measure_update
from loratool.update_report import effective_ranks, update_facts, update_table, whole_facts
from loratool.updates import KIND_NAMES, NEED_BASE, WHOLE, Kind, counted_kind

_TOLD = 10  # problems that are told one by one


def adapter_report(adapter: Adapter, format_name: str | None, limit: int | None) -> Report:
    """Describe an adapter.

    Args:
        adapter: what to describe, sound or not.
        format_name: the plugin that opened it, if one did.
        limit: how many updates the table lists, the largest first; None for all.

    Raises:
        InputError: a file cannot be read.
        FormatError: its manifest is not JSON.
    """
    measured, whole = _measured(adapter)
    updates = {name: update_facts(adapter, name, found) for name, found in measured.items()}
    problems = [
        *adapter.problems,
        *(Problem("error", name, found.fault) for name, found in measured.items() if found.fault),
    ]
    rows = {name: facts for name, facts in whole.items() if "rows" in facts}
    whole = {name: facts for name, facts in whole.items() if name not in rows}
    data = {
        "kind": "inspection",
        "of": "adapter",
        "path": None if adapter.path is None else str(adapter.path),
        "format": format_name,
        "task_type": adapter.task_type,
        "rslora": adapter.rslora,
        **_totals(adapter, measured, updates, {**whole, **rows}),
        "updates": updates,
        "replaced": whole,
        "rows": rows,
        "dropped": list(adapter.dropped),
        "tied": dict(adapter.tied),
        "model_files": sorted(adapter.model_files),
        "settings": dict(adapter.settings),
        "problems": [problem.as_json() for problem in problems],
        **_manifest_facts(adapter),
    }
    order = sorted(updates, key=lambda name: -(updates[name]["norm"] or 0.0))
    lines = list(_lines(data))
    if limit is not None and len(order) > limit:
        lines.append(f"listed: the {limit} largest of {len(order)} updates; --all lists every one")
    return Report(
        f"{adapter.label}: an adapter",
        data,
        tuple(lines),
        update_table(updates, order[:limit]),
        (*adapter.notes, *_problem_notes(problems)),
    )


def _measured(
    adapter: Adapter,
) -> tuple[dict[str, MeasuredUpdate], dict[str, dict[str, Any]]]:
    """What is added to weights, measured, and facts of the tensors and rows that are kept whole."""

    def task(update: LazyUpdate) -> tuple[str, MeasuredUpdate | dict[str, Any] | None]:
        if not update.is_whole:
            return update.name, measure_update(update)
        tensor = whole_tensor(update)
        return update.name, None if tensor is None else whole_facts(update, tensor)

    measured: dict[str, MeasuredUpdate] = {}
    whole: dict[str, dict[str, Any]] = {}
    with single_threaded_tasks():
        for name, found in plugins.create("executors", "threads").map(task, adapter.values()):
            if isinstance(found, MeasuredUpdate):
                measured[name] = found
            elif found is not None:
                whole[name] = found
    return measured, whole


def _totals(
    adapter: Adapter,
    measured: Mapping[str, MeasuredUpdate],
    updates: Mapping[str, Mapping[str, Any]],
    whole: Mapping[str, Mapping[str, Any]],
) -> dict[str, Any]:
    every = {**updates, **whole}
    sigmas = (sigma for found in measured.values() for sigma in found.experts)
    squares = sorted((value**2 for sigma in sigmas for value in sigma), reverse=True)
    digests = {k: v for facts in every.values() for k, v in facts["digests"].items()}
    stored = list({t.name: t for update in adapter.values() for t in update.stored}.values())
    norms = [facts["norm"] for facts in updates.values() if facts["norm"] is not None]
    kinds: Counter[Kind] = Counter(adapter[name].kind for name in every)
    dense = [facts["dense_parameters"] for facts in updates.values()]
    return {
        "counts": {
            "low_rank": kinds["low_rank"],
            "replaced": kinds["replacement"],
            "others": len(updates) - kinds["low_rank"],
            "dropped": len(adapter.dropped),
        },
        "kinds": {kind: _kind_totals(adapter, kind, every) for kind in kinds},
        **{
            f"{key}s": _distribution(facts[key] for facts in updates.values())
            for key in ("rank", "alpha", "scale")
        },
        "dtypes": dtype_facts(stored),
        "parameters": _own_parameters(adapter, updates),
        "dense_parameters": None if None in dense else sum(dense),
        "replaced_parameters": sum(facts["parameters"] for facts in whole.values()),
        "norm": math.hypot(*norms),
        "without_norm": len(updates) - len(norms),
        "singular_values": len(squares),
        "effective_rank": effective_ranks(squares),
        "bytes": sum(tensor.nbytes for tensor in stored),
        "files": {name: file_size(file) for name, file in sorted(adapter.files.items())},
        "digest": combine_digests(digests) if digests else None,
    }


def _kind_totals(
    adapter: Adapter, kind: Kind, every: Mapping[str, Mapping[str, Any]]
) -> dict[str, Any]:
    """All updates of one kind together; their norm is null if that of one of them is not known."""
    names = [name for name in every if adapter[name].kind == kind]
    found = [every[name] for name in names]
    norms = [facts["norm"] for facts in found]
    return {
        "updates": len(found),
        "parameters": _own_parameters(adapter, {n: f for n, f in every.items() if n in names}),
        "bytes": sum(facts["bytes"] for facts in found),
        "norm": None if None in norms or kind in WHOLE else math.hypot(*norms),
    }


def _own_parameters(adapter: Adapter, facts: Mapping[str, Mapping[str, Any]]) -> int:
    """Without those of IA3's biases, which are their weights'."""
    return sum(found["parameters"] for name, found in facts.items() if not adapter[name].optional)


def _distribution(values: Iterable[float | None]) -> list[dict[str, float]]:
    """Every value with how many updates have it, ascending."""
    found = Counter(value for value in values if value is not None)
    return [{"value": value, "count": found[value]} for value in sorted(found)]


def _manifest_facts(adapter: Adapter) -> dict[str, Any]:
    """The manifest without what it says of single tensors, and the base that it names."""
    file = adapter.path / MANIFEST if adapter.path is not None else Path()
    content = dict(read_json(file)) if is_file(file) else {}
    content.pop("tensors", None)
    digest = None
    for side in ("base", "finetuned"):
        if isinstance(content.get(side), dict):
            content[side] = {k: v for k, v in content[side].items() if k != "tensors"}
    if isinstance(content.get("base"), dict) and isinstance(content["base"].get("digest"), str):
        digest = content["base"]["digest"]
    return {"base": {"name": adapter.base_name or None, "digest": digest}, "manifest": content}


def _lines(data: Mapping[str, Any]) -> Iterator[str]:
    counts, base = data["counts"], data["base"]
    if data["format"]:
        yield f"format: {data['format']}"
    digest = f" (digest {base['digest'][:16]})" if base["digest"] else ""
    yield f"base: {base['name'] or 'not named'}{digest}"
    if data["task_type"]:
        yield f"task: {data['task_type']}"
    dropped = f", {counts['dropped']} of the base's left out" if counts["dropped"] else ""
    numbers = {kind: facts["updates"] for kind, facts in data["kinds"].items()} or {"low_rank": 0}
    ordered = [kind for kind in KIND_NAMES if kind in numbers]
    yield ", ".join(counted_kind(kind, numbers[kind]) for kind in ordered) + dropped
    if data["updates"]:
        yield from _update_lines(data)
    if counts["replaced"] or data["rows"]:
        rows = (f"{name}: {counted(len(f['rows']), 'row')}" for name, f in data["rows"].items())
        names = listed([*data["replaced"], *rows], 3)
        yield f"kept whole: {data['replaced_parameters']:,} parameters ({names})"
    if data["dtypes"]:
        yield f"types: {dtype_words(data['dtypes'])}"
        yield f"size: {format_bytes(sum(data['files'].values()) or data['bytes'])}"
    if data["digest"]:
        yield f"digest: {data['digest']}"
    yield from _manifest_lines(data["manifest"])
    if data["model_files"]:
        yield f"model files: {listed(data['model_files'], 6)}"


def _update_lines(data: Mapping[str, Any]) -> Iterator[str]:
    convention = "alpha / sqrt(rank): rsLoRA" if data["rslora"] else "alpha / rank"
    if data["ranks"]:
        yield f"rank: {_spread(data['ranks'])}"
        yield f"alpha: {_spread(data['alphas'])}"
    if data["scales"]:
        yield f"scale, {convention}: {_spread(data['scales'])}"
    small, dense = data["parameters"], data["dense_parameters"]
    share = f" ({format_share(small / dense)})" if dense else ""
    yield f"parameters: {small:,}" + (
        f" against {dense:,} of the whole matrices{share}" if dense else ""
    )
    yield from _kind_lines(data["kinds"])
    if data["without_norm"] < len(data["updates"]):
        without = f", without {data['without_norm']} that tell none" * bool(data["without_norm"])
        yield f"norm of all deltas together: {data['norm']:.4g}{without}"
    if data["singular_values"]:
        most = data["effective_rank"]
        yield (
            f"energy: 90% in {most['0.9']:,} of {data['singular_values']:,} singular values, "
            f"99% in {most['0.99']:,}"
        )


def _kind_lines(kinds: Mapping[Kind, Mapping[str, Any]]) -> Iterator[str]:
    """The kinds of updates, where there are several or the norm of one depends on the base."""
    added = {kind: facts for kind, facts in kinds.items() if kind not in WHOLE}
    if len(added) < 2 and not NEED_BASE.intersection(added):
        return
    for kind, facts in added.items():
        more = "" if facts["norm"] is None else f", norm {facts['norm']:.4g}"
        if kind in NEED_BASE:
            more = ": what these add depends on the base"
        yield f"{counted_kind(kind, facts['updates'])}: {facts['parameters']:,} parameters{more}"


def _spread(values: Sequence[Mapping[str, float]]) -> str:
    """Values with their numbers: "16", "4 (10 updates), 8 (63 updates)"; the range of many."""
    if len(values) == 1:
        return f"{values[0]['value']:g}"
    if len(values) > 5:
        return f"{values[0]['value']:g} to {values[-1]['value']:g}"
    return ", ".join(f"{v['value']:g} ({counted(int(v['count']), 'update')})" for v in values)


def _manifest_lines(manifest: Mapping[str, Any]) -> Iterator[str]:
    if not manifest:
        return
    options = manifest.get("options")
    given = options.items() if isinstance(options, dict) else ()
    words = ", ".join(f"{k} {v}" for k, v in given if v is not None and v is not False)
    yield f"made by: loratool {manifest.get('loratool', '')}" + (f" ({words})" if words else "")
    totals = manifest.get("totals")
    energy = totals.get("energy") if isinstance(totals, dict) else None
    if isinstance(energy, float | int):
        yield f"energy captured when it was made: {format_share(energy)}"


def _problem_notes(problems: Sequence[Problem]) -> Iterator[str]:
    for problem in problems[:_TOLD]:
        yield f"{problem.severity}: {problem}"
    if len(problems) > _TOLD:
        yield f"and {len(problems) - _TOLD} more problems: --json lists them all"
