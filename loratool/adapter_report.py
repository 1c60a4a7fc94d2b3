"""What an adapter is made of, for people and for machines; computed from its factors alone."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from loratool import plugins
from loratool.adapter import Adapter, LazyUpdate
from loratool.checkpoint import LazyTensor
from loratool.checkpoint_report import dtype_facts, dtype_words, tensor_facts
from loratool.digests import combine_digests
from loratool.engine import single_threaded_tasks
from loratool.errors import Problem
from loratool.files import file_size, is_file
from loratool.json_files import MANIFEST, read_json
from loratool.measures import Spectrum, measure, replaced_tensor, spectrum
from loratool.readiness import ready_servers
from loratool.reports import (
    Report,
    Table,
    bar,
    counted,
    format_bytes,
    format_count,
    format_share,
    listed,
    sparkline,
)
from loratool.updates import counted_kind

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
    spectra, whole, others = _measured(adapter)
    updates = {name: _update_facts(adapter, name, found) for name, found in spectra.items()}
    problems = [
        *adapter.problems,
        *(Problem("error", name, found.fault) for name, found in spectra.items() if found.fault),
    ]
    data = {
        "kind": "inspection",
        "of": "adapter",
        "path": None if adapter.path is None else str(adapter.path),
        "format": format_name,
        "task_type": adapter.task_type,
        "rslora": adapter.rslora,
        **_totals(adapter, updates, whole, others),
        "updates": updates,
        "replaced": whole,
        "others": others,
        "dropped": list(adapter.dropped),
        "tied": dict(adapter.tied),
        "model_files": sorted(adapter.model_files),
        "settings": dict(adapter.settings),
        "problems": [problem.as_json() for problem in problems],
        "ready_for": [] if problems else ready_servers(adapter),
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
        _table(updates, order[:limit]),
        (*adapter.notes, *_problem_notes(problems)),
    )


def _measured(
    adapter: Adapter,
) -> tuple[dict[str, Spectrum], dict[str, dict[str, Any]], dict[str, dict[str, Any]]]:
    """Spectra of low-rank updates, facts of tensors that are kept whole, and of other kinds."""

    def task(update: LazyUpdate) -> tuple[str, Spectrum | dict[str, Any] | None]:
        if update.kind == "low_rank":
            return update.name, spectrum(update)
        if not update.is_whole:
            digests = {tensor.name: measure(tensor).digest for tensor in update.stored}
            facts = {"kind": update.kind, "shape": list(update.shape), "digests": digests}
            return update.name, facts
        tensor = replaced_tensor(update)
        return update.name, None if tensor is None else _whole_facts(tensor)

    spectra: dict[str, Spectrum] = {}
    whole: dict[str, dict[str, Any]] = {}
    others: dict[str, dict[str, Any]] = {}
    with single_threaded_tasks():
        for name, found in plugins.create("executors", "threads").map(task, adapter.values()):
            if isinstance(found, Spectrum):
                spectra[name] = found
            elif found is not None:
                (whole if adapter[name].is_whole else others)[name] = found
    return spectra, whole, others


def _whole_facts(tensor: LazyTensor) -> dict[str, Any]:
    found = measure(tensor)
    return {
        **tensor_facts(tensor),
        "parameters": tensor.numel,
        "norm": found.norm,
        "digests": {tensor.name: found.digest},
    }


def _update_facts(adapter: Adapter, name: str, found: Spectrum) -> dict[str, Any]:
    update = adapter[name]
    out, width = update.shape[0], math.prod(update.shape[1:])
    rank = found.rank if update.rank is None else update.rank
    alpha = None
    if found.scale is not None:
        # To 12 digits: what dividing by the rank and multiplying again has added is not alpha.
        alpha = float(f"{found.scale * (math.sqrt(rank) if adapter.rslora else rank):.12g}")
    return {
        "shape": list(update.shape),
        "rank": rank,
        "alpha": alpha,
        "scale": found.scale,
        "dtype": update.dtype,
        "parameters": rank * (out + width),
        "dense_parameters": out * width,
        "bytes": sum(tensor.nbytes for tensor in update.stored),
        "norm": found.norm,
        "sigma": list(found.sigma),
        "energies": found.energies,
        "effective_rank": _effective_ranks([value**2 for value in found.sigma]),
        "digests": found.digests,
    }


def _effective_ranks(squares: Sequence[float]) -> dict[str, int]:
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


def _totals(
    adapter: Adapter,
    updates: Mapping[str, Mapping[str, Any]],
    whole: Mapping[str, Any],
    others: Mapping[str, Any],
) -> dict[str, Any]:
    squares = sorted((s**2 for facts in updates.values() for s in facts["sigma"]), reverse=True)
    digests = {
        k: v
        for facts in (*updates.values(), *whole.values(), *others.values())
        for k, v in facts["digests"].items()
    }
    stored = [tensor for update in adapter.values() for tensor in update.stored]
    return {
        "counts": {
            "low_rank": len(updates),
            "replaced": len(whole),
            "others": len(others),
            "dropped": len(adapter.dropped),
        },
        **{
            f"{key}s": _distribution(facts[key] for facts in updates.values())
            for key in ("rank", "alpha", "scale")
        },
        "dtypes": dtype_facts(stored),
        "parameters": sum(facts["parameters"] for facts in updates.values()),
        "dense_parameters": sum(facts["dense_parameters"] for facts in updates.values()),
        "replaced_parameters": sum(facts["parameters"] for facts in whole.values()),
        "norm": math.sqrt(math.fsum(squares)),
        "singular_values": len(squares),
        "effective_rank": _effective_ranks(squares),
        "bytes": sum(tensor.nbytes for tensor in stored),
        "files": {name: file_size(file) for name, file in sorted(adapter.files.items())},
        "digest": combine_digests(digests) if digests else None,
    }


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
    yield (
        f"{counted(counts['low_rank'], 'low-rank update')}, "
        f"{counted(counts['replaced'], 'tensor')} kept whole{dropped}"
        + "".join(f", {words}" for words in _kinds(data["others"]))
    )
    if counts["low_rank"]:
        yield from _low_rank_lines(data)
    if counts["replaced"]:
        names = listed(list(data["replaced"]), 3)
        yield f"kept whole: {data['replaced_parameters']:,} parameters ({names})"
    if data["dtypes"]:
        yield f"types: {dtype_words(data['dtypes'])}"
        yield f"size: {format_bytes(sum(data['files'].values()) or data['bytes'])}"
    if data["digest"]:
        yield f"digest: {data['digest']}"
    yield from _manifest_lines(data["manifest"])
    if data["model_files"]:
        yield f"model files: {listed(data['model_files'], 6)}"
    if data["ready_for"]:
        yield f"ready for: {', '.join(data['ready_for'])}"


def _kinds(others: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """How many there are of each other kind: ["2 LoHa updates"]."""
    found = Counter(facts["kind"] for facts in others.values())
    return [counted_kind(kind, number) for kind, number in found.items()]


def _low_rank_lines(data: Mapping[str, Any]) -> Iterator[str]:
    convention = "alpha / sqrt(rank): rsLoRA" if data["rslora"] else "alpha / rank"
    yield f"rank: {_spread(data['ranks'])}"
    yield f"alpha: {_spread(data['alphas'])}"
    yield f"scale, {convention}: {_spread(data['scales'])}"
    small, dense = data["parameters"], data["dense_parameters"]
    share = f" ({format_share(small / dense)})" if dense else ""
    yield f"parameters: {small:,} against {dense:,} of the whole matrices{share}"
    if data["singular_values"]:
        most = data["effective_rank"]
        yield f"norm of all deltas together: {data['norm']:.4g}"
        yield (
            f"energy: 90% in {most['0.9']:,} of {data['singular_values']:,} singular values, "
            f"99% in {most['0.99']:,}"
        )


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


def _table(updates: Mapping[str, Mapping[str, Any]], names: Sequence[str]) -> Table:
    top = max((updates[name]["norm"] or 0.0 for name in names), default=0.0)
    rows = []
    for name in names:
        facts = updates[name]
        norm, most = facts["norm"], facts["effective_rank"]
        parameters = (format_count(facts[key]) for key in ("parameters", "dense_parameters"))
        rows.append(
            (
                name.removesuffix(".weight"),
                "x".join(map(str, facts["shape"])),
                str(facts["rank"]),
                "/".join(parameters),
                "-" if norm is None else f"{norm:#.3g}",
                bar(norm / top) if norm and top else "",
                str(most["0.9"]),
                str(most["0.99"]),
                sparkline(facts["sigma"]),
            )
        )
    columns = ("module", "shape", "rank", "parameters", "norm", "", "90%", "99%", "spectrum")
    return Table(columns, tuple(rows), optional=("parameters", "shape", "spectrum"))
