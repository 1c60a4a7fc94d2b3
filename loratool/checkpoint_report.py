"""What a checkpoint is made of, for people and for machines; by headers alone unless asked."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from loratool import plugins
from loratool.checkpoint import Checkpoint, LazyTensor
from loratool.diffusion.layouts import canonical_shapes, model_kind
from loratool.digests import combine_digests
from loratool.files import file_size, is_file
from loratool.quantized import schemes
from loratool.record import read_record
from loratool.reports import (
    Report,
    Table,
    bar,
    counted,
    format_bytes,
    format_count,
    listed,
)

_NUMBER = re.compile(r"(?<![^.])\d+(?![^.])")  # a layer's number in a name


def checkpoint_report(
    checkpoint: Checkpoint, format_name: str | None, *, deep: bool, limit: int | None
) -> Report:
    """Describe a checkpoint.

    Args:
        checkpoint: what to describe.
        format_name: the plugin that opened it, if one did.
        deep: whether to read the values, for norms and digests.
        limit: how many tensors the table lists, the largest first; None for all.

    Raises:
        InputError: a file cannot be read.
    """
    tensors = {name: tensor_facts(tensor) for name, tensor in checkpoint.items()}
    for name, file in checkpoint.shards.items():
        tensors[name]["file"] = file
    for name, scheme in checkpoint.quantized.items():
        tensors[name]["quantized"] = scheme
    on_disk = checkpoint.stored.checkpoint if checkpoint.stored else checkpoint
    data: dict[str, Any] = {
        "kind": "inspection",
        "of": "checkpoint",
        "path": None if checkpoint.path is None else str(checkpoint.path),
        "format": format_name,
        **_config_facts(checkpoint.config or {}),
        "components": _component_facts(checkpoint),
        "diffusion": _diffusion_kind(checkpoint),
        "counts": {"tensors": len(tensors), "files": len(set(on_disk.shards.values()))},
        "parameters": sum(tensor.numel for tensor in checkpoint.values()),
        "bytes": checkpoint.nbytes,
        "dtypes": dtype_facts(checkpoint.values()),
        "quantized": schemes(checkpoint),
        "files": _file_sizes(on_disk),
        "side_files": sorted(checkpoint.side_files),
        "merged": _merges(checkpoint),
        "aliases": dict(checkpoint.aliases),
        "tensors": tensors,
    }
    if deep:
        _measure(checkpoint, tensors)
        data |= _deep_facts(tensors)
    order = sorted(tensors, key=lambda name: -tensors[name]["bytes"])
    alone = deep or limit is None
    table = _tensor_table(tensors, order[:limit]) if alone else _group_table(tensors, limit)
    lines = [*_lines(data), *(_deep_lines(data) if deep else ())]
    if alone and limit is not None and len(order) > limit:
        lines.append(f"listed: the {limit} largest of {len(order)} tensors; --all lists every one")
    title = f"{checkpoint.label}: a checkpoint"
    return Report(title, data, tuple(lines), table, (*checkpoint.notes, *_notes(checkpoint, data)))


def tensor_facts(tensor: LazyTensor) -> dict[str, Any]:
    """What a header says of a tensor."""
    return {"shape": list(tensor.shape), "dtype": tensor.dtype, "bytes": tensor.nbytes}


def dtype_facts(tensors: Iterable[LazyTensor]) -> dict[str, dict[str, int]]:
    """dtype -> how many tensors, parameters and bytes have it, the most common first."""
    found: dict[str, dict[str, int]] = {}
    for tensor in tensors:
        facts = found.setdefault(tensor.dtype, {"tensors": 0, "parameters": 0, "bytes": 0})
        facts["tensors"] += 1
        facts["parameters"] += tensor.numel
        facts["bytes"] += tensor.nbytes
    return dict(sorted(found.items(), key=lambda item: -item[1]["bytes"]))


def dtype_words(dtypes: Mapping[str, Mapping[str, int]]) -> str:
    """The same for people: "BF16 (291 tensors), F32 (2 tensors)"."""
    return ", ".join(f"{name} ({counted(f['tensors'], 'tensor')})" for name, f in dtypes.items())


def _config_facts(config: Mapping[str, Any]) -> dict[str, Any]:
    """Strangers' configs may hold anything: only what is of the right type is told."""
    architectures = config.get("architectures")
    names = architectures if isinstance(architectures, list) else [config.get("_class_name")]
    model_type, tied = config.get("model_type"), config.get("tie_word_embeddings")
    return {
        "architecture": next((name for name in names if isinstance(name, str)), None),
        "model_type": model_type if isinstance(model_type, str) else None,
        "tie_word_embeddings": tied if isinstance(tied, bool) else None,
    }


def _component_facts(checkpoint: Checkpoint) -> dict[str, dict[str, Any]]:
    """Component -> its class, and how much it holds."""
    found: dict[str, dict[str, Any]] = {
        name: {
            "architecture": _config_facts(config or {})["architecture"],
            **dict.fromkeys(("tensors", "parameters", "bytes"), 0),
        }
        for name, config in checkpoint.components.items()
    }
    for name, tensor in checkpoint.items() if found else ():
        facts = found[name.partition(".")[0]]
        facts["tensors"] += 1
        facts["parameters"] += tensor.numel
        facts["bytes"] += tensor.nbytes
    return found


def _diffusion_kind(checkpoint: Checkpoint) -> str | None:
    shapes = {name: tensor.shape for name, tensor in checkpoint.items()}
    return model_kind(canonical_shapes(shapes, checkpoint.components))


def _file_sizes(checkpoint: Checkpoint) -> dict[str, int]:
    """Weight file -> bytes of its tensors."""
    sizes: Counter[str] = Counter()
    for name, file in checkpoint.shards.items():
        sizes[file] += checkpoint[name].nbytes
    return dict(sizes)


def _merges(checkpoint: Checkpoint) -> list[dict[str, Any]]:
    """What the records of reversible merges say, the last merge first."""
    found = []
    files = checkpoint.record
    while record := read_record(replace(checkpoint, record=files)):
        found.append(
            {
                "adapters": [{"name": a.name, "weight": a.weight} for a in record.adapters],
                "embedded": all(adapter.folder for adapter in record.adapters),
                "bytes": sum(map(file_size, files.values())),
            }
        )
        files = record.previous()
    return found


def _measure(checkpoint: Checkpoint, tensors: Mapping[str, dict[str, Any]]) -> None:
    """Add norm and digest of every tensor, streamed."""
    from loratool.engine import single_threaded_tasks
    from loratool.measures import Measured, measure

    def task(name: str) -> tuple[str, Measured]:
        return name, measure(checkpoint[name])

    with single_threaded_tasks():
        for name, found in plugins.create("executors", "threads").map(task, checkpoint):
            tensors[name] |= {"norm": found.norm, "digest": found.digest}


def _deep_facts(tensors: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    same: dict[str, list[str]] = {}
    for name, facts in tensors.items():
        if facts["bytes"] and len(facts["shape"]) > 1:
            same.setdefault(facts["digest"], []).append(name)
    norms = {name: facts["norm"] for name, facts in tensors.items() if facts["norm"] is not None}
    return {
        "digest": combine_digests({name: facts["digest"] for name, facts in tensors.items()}),
        "duplicates": [names for names in same.values() if len(names) > 1],
        "not_finite": [name for name, norm in norms.items() if not math.isfinite(norm)],
    }


def _lines(data: Mapping[str, Any]) -> Iterator[str]:
    counts = data["counts"]
    if data["format"]:
        files = listed(list(data["files"]), 1)
        yield f"format: {data['format']}, {counted(counts['files'], 'file')} ({files})"
    known = [data["architecture"], data["model_type"]]
    yield f"architecture: {', '.join(filter(None, known)) or 'config.json does not say'}"
    if data["diffusion"]:
        yield f"diffusion model of the kind {data['diffusion']}"
    for name, facts in data["components"].items():
        yield (
            f"component {name}: {facts['architecture'] or 'its config.json does not say'}, "
            f"{counted(facts['tensors'], 'tensor')}, {format_count(facts['parameters'])} "
            f"parameters, {format_bytes(facts['bytes'])}"
        )
    yield (
        f"{counted(counts['tensors'], 'tensor')}, {data['parameters']:,} parameters "
        f"({format_count(data['parameters'])})"
    )
    yield f"types: {dtype_words(data['dtypes'])}"
    if data["quantized"]:
        stored = sum(data["files"].values())
        yield f"quantized: {data['quantized']}; types and sizes are those of the values"
        yield f"size: {format_bytes(stored)}; dequantized: {format_bytes(data['bytes'])}"
    else:
        yield f"size: {format_bytes(data['bytes'])}"
    for name, twin in data["aliases"].items():
        yield f"the same memory: {name} = {twin}"
    if data["tie_word_embeddings"]:
        yield "config.json ties the head to the embedding"
    for number, merge in enumerate(data["merged"]):
        adapters = ", ".join(f"{a['name']}={a['weight']:g}" for a in merge["adapters"])
        yield (
            f"merged{' before that' * (number > 0)}: {adapters}; record of "
            f"{format_bytes(merge['bytes'])}"
        )
    if data["side_files"]:
        yield f"other files: {listed(data['side_files'], 6)}"


def _deep_lines(data: Mapping[str, Any]) -> Iterator[str]:
    for names in data["duplicates"]:
        yield f"the same values: {' = '.join(names)}"
    yield f"digest: {data['digest']}"


def _notes(checkpoint: Checkpoint, data: Mapping[str, Any]) -> Iterator[str]:
    for name in data.get("not_finite", ()):
        yield f"{name}: holds NaN or Inf"
    path = checkpoint.path
    if path is not None and is_file(path) and any(".lora_A." in name for name in checkpoint):
        yield f"these are an adapter's factors: name its directory, {path.parent}, to see it as one"


def _group_table(tensors: Mapping[str, Mapping[str, Any]], limit: int | None) -> Table:
    """Tensors that differ in the layer's number alone share a row."""
    groups: dict[tuple[str, str, str], list[int]] = {}
    for name, facts in tensors.items():
        key = (_NUMBER.sub("*", name), _shape(facts), _type(facts))
        groups.setdefault(key, []).append(facts["bytes"])
    order = sorted(groups, key=lambda key: -sum(groups[key]))
    top = sum(groups[order[0]]) if order else 0
    rows = [
        (*key, str(len(groups[key])), format_bytes(sum(groups[key])), _bar(sum(groups[key]), top))
        for key in order[:limit]
    ]
    if limit is not None and len(order) > limit:
        rest = [size for key in order[limit:] for size in groups[key]]
        rows.append(("(all others)", "", "", str(len(rest)), format_bytes(sum(rest)), ""))
    columns = ("tensors, * for a number", "shape", "type", "count", "size", "")
    return Table(columns, tuple(rows), optional=("type", "shape"))


def _tensor_table(tensors: Mapping[str, Mapping[str, Any]], names: Sequence[str]) -> Table:
    top = max((tensors[name]["bytes"] for name in names), default=0)
    is_deep = any("digest" in tensors[name] for name in names)
    rows: list[tuple[str, ...]] = []
    for name in names:
        facts = tensors[name]
        row: tuple[str, ...]
        size = facts["bytes"]
        row = (name, _shape(facts), _type(facts), format_bytes(size), _bar(size, top))
        if is_deep:
            norm = "-" if facts["norm"] is None else f"{facts['norm']:#.4g}"
            row = (*row, norm, facts["digest"][:16])
        rows.append(row)
    columns = ("tensor", "shape", "type", "size", "", *(("norm", "digest") if is_deep else ()))
    return Table(columns, tuple(rows), optional=("digest", "type", "", "shape"))


def _type(facts: Mapping[str, Any]) -> str:
    found: str = facts.get("quantized", facts["dtype"])
    return found


def _shape(facts: Mapping[str, Any]) -> str:
    return "x".join(map(str, facts["shape"])) or "scalar"


def _bar(size: int, top: int) -> str:
    return bar(size / top) if top else ""
