"""What an export to ONNX tells: plain data for the manifest, and lines for people."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import onnx_ir as ir
import onnxruntime as ort

from loratool.digests import file_digest
from loratool.dtypes import FLOAT_NAMES
from loratool.engine import run_facts
from loratool.exporting import ExportJob
from loratool.reports import counted, format_bytes
from loratool.runtime import LORA_A, LORA_B
from loratool.sources import Sources
from loratool_plugins.exporters.onnx.graph import Traced
from loratool_plugins.exporters.onnx.weights import Written

_FORMS = {
    "as traced": "not optimised: ONNX Runtime does that when it loads it",
    "standard": "optimised with the operators of the ONNX standard alone",
}
_PACKAGES = ("transformers", "onnx", "onnx-ir", "onnxscript")


def describe(
    traced: Sequence[Traced],
    operators: Mapping[str, Mapping[str, Mapping[str, int]]],
    sources: Sources,
    written: Written,
    folder: Path,
) -> dict[str, Any]:
    """Graphs, files and weights of a saved model."""
    graphs = {
        found.graph.name: {
            "file": f"{found.graph.name}.onnx",
            "form": found.form,
            "inputs": [_signature(value) for value in found.graph.model.graph.inputs],
            "outputs": [_signature(value) for value in found.graph.model.graph.outputs],
            "nodes": sum(operators["merged"][found.graph.name].values()),
            "base_nodes": sum(operators["base"][found.graph.name].values()),
            "operators": operators["merged"][found.graph.name],
        }
        for found in traced
    }
    paths = [*(folder / f"{name}.onnx" for name in graphs), *written.files]
    return {
        "graphs": graphs,
        "files": {
            str(path.relative_to(folder)): {
                "bytes": path.stat().st_size,
                "blake3": file_digest(path),
            }
            for path in paths
        },
        "weights": len(written.blocks),
        "external_constants": written.constants,
        "tied": dict(sources.tied),
        "untied": list(sources.untied),
        "surplus": list(sources.surplus),
    }


def _signature(value: ir.Value) -> dict[str, Any]:
    shape = [size if isinstance(size, int) else str(size) for size in value.shape or ()]
    return {"name": value.name, "dtype": value.dtype.name if value.dtype else "", "shape": shape}


def describe_run(seconds: float) -> dict[str, Any]:
    """Versions and time: what may differ between two runs of the same export."""
    versions = {name: version(name) for name in _PACKAGES}
    return {
        **run_facts(),
        **versions,
        "onnxruntime": ort.__version__,
        "seconds": round(seconds, 1),
    }


def lines(data: Mapping[str, Any]) -> tuple[str, ...]:
    """The facts for people, one a line."""
    found = data["verification"]
    rows = [f"{name}: {format_bytes(file['bytes'])}" for name, file in data["files"].items()]
    whose = "swappable model" if data["swappable"] else "merged model"
    for name, graph in data["graphs"].items():
        prefix = "" if name == "model" else f"{name} "
        for kind in ("inputs", "outputs"):
            rows.append(f"{prefix}{kind}: {_signatures(graph[kind])}")
        rows.append(
            f"{prefix}nodes: {graph['nodes']} in the {whose}, {graph['base_nodes']} in the "
            f"base; {_FORMS.get(graph['form'], 'fused for ' + graph['form'])}"
        )
    rows.append(f"verified with ONNX Runtime on {', '.join(found['providers'])}")
    rows += _compared(found)
    for entry in data["adapters"]:
        low, high = entry["ranks"]
        rank = f"rank {low}" if low == high else f"ranks {low} to {high}"
        targets = counted(entry["targets"], "target")
        rows.append(f"{entry['file']}: {format_bytes(entry['bytes'])}, {targets}, {rank}")
        rows += [f"  {row}" for row in _compared(found["adapters"][entry["adapter"]])]
    return tuple(rows)


def _compared(found: Mapping[str, Any]) -> Iterator[str]:
    for entry in found.get("inputs", ()):
        yield (
            f"largest difference from PyTorch on {entry['batch']} x {entry['sequence']}: "
            f"{_differences(entry)}"
        )
    for entry in found.get("generation", ()):
        ties = f" but for {counted(len(entry['ties']), 'tie')}" if entry["ties"] else ""
        yield (
            f"{entry['tokens']} tokens generated after {entry['batch']} prompts of "
            f"{entry['prompt']}: as PyTorch{ties}; largest difference: {_differences(entry)}"
        )


def _differences(entry: Mapping[str, Any]) -> str:
    return ", ".join(
        f"{name} {difference:.1e} (allowed: {entry['allowed'][name]:.1e})"
        for name, difference in entry["max_difference"].items()
    )


# What there are many of: only the first is shown.
_SERIES = ("past_key_values.", "present.", LORA_A, LORA_B)


def _signatures(entries: Sequence[Mapping[str, Any]]) -> str:
    """Names, types and shapes; of a cache and of factors the first tensor alone."""
    many = [e for e in entries if e["name"].startswith(_SERIES) or e["name"].endswith(_SERIES)]
    shown = [entry for entry in entries if entry not in many[1:]]
    more = f" and {len(many) - 1} more like it" if len(many) > 1 else ""
    return ", ".join(map(_signature_text, shown)) + more


def _signature_text(entry: Mapping[str, Any]) -> str:
    return f"{entry['name']} {entry['dtype'].lower()} ({', '.join(map(str, entry['shape']))})"


def notes(
    job: ExportJob, sources: Sources, traced: Sequence[Traced], written: Written
) -> tuple[str, ...]:
    """What the user should hear in any case."""
    merged, dtype = job.merged, job.options.chosen_dtype
    told = [
        f"{found.graph.name}.onnx is {_FORMS[found.form]}: {found.reason}"
        for found in traced
        if found.reason
    ]
    if several := written.in_several_layouts():
        told.append(
            f"{', '.join(sorted(several)[:3])}: stored {max(several.values())} times, for the "
            "graphs want several layouts"
        )
    stored = {tensor.dtype for tensor in merged.values()} & set(FLOAT_NAMES.values())
    if stored - {FLOAT_NAMES[dtype]}:
        exact = dtype == "fp32" and "F64" not in stored
        on_cpu = "BF16" in stored and job.options.device == "cpu"
        reason = "; ONNX Runtime runs no bf16 on the CPU" if on_cpu else ""
        told.append(
            f"weights stored as {', '.join(sorted(stored))} were exported as {dtype} "
            f"({'exactly' if exact else 'rounded'}{reason})"
        )
    if sources.untied:
        told.append(
            f"{sources.untied[0]} is tied by config.json but has values of its own: exported untied"
        )
    if surplus := sources.surplus:
        more = f" and {len(surplus) - 3} more" if len(surplus) > 3 else ""
        told.append(f"left out, for the class has no such tensor: {', '.join(surplus[:3])}{more}")
    return tuple(told)
