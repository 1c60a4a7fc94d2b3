"""What an export to ONNX tells: plain data for the manifest, and lines for people."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import onnx_ir as ir
import onnxruntime as ort

from loratool.checkpoint import Checkpoint
from loratool.dtypes import FLOAT_NAMES
from loratool.engine import run_facts
from loratool.reports import format_bytes
from loratool.sources import Sources
from loratool_plugins.exporters.onnx.verify import Comparison, Tolerance
from loratool_plugins.exporters.onnx.weights import Written

_PACKAGES = ("transformers", "onnx", "onnx-ir", "onnxscript")


def describe(
    model: ir.Model, files: Sequence[Path], sources: Sources, written: Written
) -> dict[str, Any]:
    """Files, inputs, outputs and weights of a saved model."""
    return {
        "files": {path.name: path.stat().st_size for path in files},
        "inputs": [_signature(value) for value in model.graph.inputs],
        "outputs": [_signature(value) for value in model.graph.outputs],
        "weights": len(written.places),
        "external_constants": written.constants,
        "tied": dict(sources.tied),
        "untied": list(sources.untied),
        "surplus": list(sources.surplus),
    }


def _signature(value: ir.Value) -> dict[str, Any]:
    shape = [size if isinstance(size, int) else str(size) for size in value.shape or ()]
    return {"name": value.name, "dtype": value.dtype.name if value.dtype else "", "shape": shape}


def describe_verification(
    providers: Sequence[str], comparisons: Sequence[Comparison], tolerance: Tolerance, seed: int
) -> dict[str, Any]:
    """What was compared, how, and how far apart it was."""
    return {
        "providers": list(providers),
        "tolerance": tolerance.value,
        "relative": tolerance.relative,
        "seed": seed,
        "inputs": [
            {
                "batch": found.batch,
                "sequence": found.sequence,
                "max_difference": dict(found.differences),
                "allowed": {n: tolerance.limit(v) for n, v in found.largest.items()},
                "largest_value": dict(found.largest),
            }
            for found in comparisons
        ],
    }


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
    found, nodes = data["verification"], data["nodes"]
    rows = [f"{name}: {format_bytes(size)}" for name, size in data["files"].items()]
    for kind in ("inputs", "outputs"):
        rows.append(f"{kind}: {', '.join(_signature_text(entry) for entry in data[kind])}")
    rows.append(
        f"nodes: {nodes['merged']} in the merged model, {nodes['base']} in the base, all equal"
    )
    rows.append(f"verified with ONNX Runtime on {', '.join(found['providers'])}")
    for entry in found["inputs"]:
        differences = ", ".join(
            f"{name} {difference:.1e} (allowed: {entry['allowed'][name]:.1e})"
            for name, difference in entry["max_difference"].items()
        )
        rows.append(
            f"largest difference from PyTorch on {entry['batch']} x {entry['sequence']} tokens: "
            f"{differences}"
        )
    return tuple(rows)


def _signature_text(entry: Mapping[str, Any]) -> str:
    return f"{entry['name']} {entry['dtype'].lower()} ({', '.join(map(str, entry['shape']))})"


def notes(merged: Checkpoint, dtype: str, sources: Sources) -> tuple[str, ...]:
    """What the user should hear in any case."""
    told = []
    stored = {tensor.dtype for tensor in merged.values()} & set(FLOAT_NAMES.values())
    if stored - {FLOAT_NAMES[dtype]}:
        exact = dtype == "fp32" and "F64" not in stored
        reason = "; ONNX Runtime runs no bf16 on the CPU" if "BF16" in stored else ""
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
