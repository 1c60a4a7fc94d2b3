"""A deployment folder: graphs traced without weights, filled by streaming, always verified."""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path, PurePosixPath

import onnx_ir as ir
import torch

from loratool.checkpoint import Checkpoint
from loratool.engine import single_threaded_tasks
from loratool.errors import VerificationError
from loratool.exporting import ExportJob, ExportOptions
from loratool.json_files import MANIFEST, manifest, parse_json
from loratool.reports import Report
from loratool.writer import write_file, write_side_files
from loratool_plugins.exporters.onnx import report
from loratool_plugins.exporters.onnx.adapter_file import (
    Swapped,
    add_slots,
    write_adapters,
)
from loratool_plugins.exporters.onnx.comparing import TOLERANCES
from loratool_plugins.exporters.onnx.genai import GENAI_FILE, genai_config, objection
from loratool_plugins.exporters.onnx.graph import Form, Traced, count_operators, trace
from loratool_plugins.exporters.onnx.linking import link_weights
from loratool_plugins.exporters.onnx.preparation import Prepared, prepare, untied_names
from loratool_plugins.exporters.onnx.swappable import describe
from loratool_plugins.exporters.onnx.verify import verify_export
from loratool_plugins.exporters.onnx.weights import Block, Graph, Written, write_weights

DATA_FILE = "model.onnx.data"
_TYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
# The end of a class name -> what pipelines call its task.
_TASKS = {
    "ForMaskedLM": "fill-mask",
    "ForCausalLM": "text-generation",
    "LMHeadModel": "text-generation",
    "ForConditionalGeneration": "text2text-generation",
    "ForSequenceClassification": "text-classification",
    "ForTokenClassification": "token-classification",
    "ForQuestionAnswering": "question-answering",
    "ForImageClassification": "image-classification",
    "ForPreTraining": "pretraining",
    "ForNextSentencePrediction": "next-sentence-prediction",
    "Model": "feature-extraction",
}
_PRODUCTS = ("MatMul", "Gemm", "com.microsoft::FusedMatMul")

Progress = Callable[[str], None]


def deploy(
    job: ExportJob, dest: Path, opset: int, tolerance: float, seed: int, progress: Progress
) -> Report:
    """Write a model into the empty folder `dest` and verify what was written.

    Args:
        job: what to export.
        dest: an existing, empty directory.
        opset: version of the ONNX operators.
        tolerance: how far outputs may be from PyTorch's; 0 for the usual of the type.
        seed: of the inputs that are compared.
        progress: is told what is done next.

    Raises:
        InputError: the model cannot be exported, or a tensor is missing or of another shape.
        VerificationError: the result is not what PyTorch computes, or its graph does more than the
            base's.
    """
    started = time.monotonic()
    options = job.options
    prepared = prepare(job.merged, _TYPES[options.chosen_dtype], options.cache, options.module)
    traced = _trace(prepared, options, opset, progress)
    graphs = [found.graph for found in traced]
    operators = _compare_with_base(job, prepared, traced, opset, progress)
    swapped = Swapped()
    if options.swappable:
        swapped = add_slots(graphs, prepared, job.parts, options.max_rank)
        operators["merged"] = {graph.name: count_operators(graph.model) for graph in graphs}
    with single_threaded_tasks():
        written = _write(job.merged, prepared, graphs, options, dest, progress)
        adapters = write_adapters(swapped.parts, swapped.slots, dest, options.max_rank)
    for graph in graphs:
        ir.save(graph.model, dest / f"{graph.name}.onnx")
    genai = _write_genai(job, prepared, dest)
    progress("comparing with PyTorch")
    limits = TOLERANCES[options.chosen_dtype]
    if tolerance:
        limits = replace(limits, value=tolerance)
    files = {entry["adapter"]: dest / entry["file"] for entry in adapters}
    found = verify_export(job, prepared, dest, written, limits, seed, files)
    data = {
        "loratool": version("loratool"),
        "kind": "onnx",
        "architecture": prepared.shell.architecture,
        "task": task_of(prepared.shell.architecture),
        "device": options.device,
        "dtype": options.chosen_dtype,
        "opset": opset,
        "linked": options.link,
        "genai": genai,
        **report.describe(traced, operators, prepared.sources, written, dest),
        "swappable": describe(swapped.slots) if options.swappable else None,
        "adapters": adapters,
        "verification": dict(found.data),
        "run": report.describe_run(time.monotonic() - started),
    }
    write_file(dest / MANIFEST, manifest(data))
    return Report(
        f"Exported {prepared.shell.architecture} to ONNX",
        data,
        report.lines(data),
        notes=(*report.notes(job, prepared.sources, traced, written), *found.notes),
    )


def _trace(
    prepared: Prepared, options: ExportOptions, opset: int, progress: Progress
) -> list[Traced]:
    form: Form = "as traced" if options.link else "standard"
    if options.fuse and not options.link:
        form = options.device  # type: ignore[assignment]  # one of the same names
    traced = []
    for stage in prepared.stages:
        progress("tracing" if stage.name == "model" else f"tracing {stage.name}")
        traced.append(trace(prepared.shell, stage, prepared.prints, form, opset))
    return traced


def _compare_with_base(
    job: ExportJob, prepared: Prepared, traced: list[Traced], opset: int, progress: Progress
) -> dict[str, dict[str, dict[str, int]]]:
    """Count the operators of every graph and of the same graph of the base.

    A graph is traced without weights, from the config alone, so that a merged model's is the
    base's own unless an adapter has changed which parameters are tied: only then is the base's
    traced, too.

    Raises:
        VerificationError: a graph of the merged model has more of an operator than the base's.
    """
    dtype, options = _TYPES[job.options.chosen_dtype], job.options
    merged = {found.graph.name: count_operators(found.graph.model) for found in traced}
    before = merged
    if untied_names(job.plain, dtype, options.module) != prepared.sources.untied:
        base = prepare(job.plain, dtype, options.cache, options.module)
        again = _trace(base, options, opset, progress)
        before = {found.graph.name: count_operators(found.graph.model) for found in again}
    for name, counts in merged.items():
        own, allowed = _kinds(counts), _kinds(before[name])
        for kind, count in own.items():
            if count > allowed[kind]:
                raise VerificationError(
                    f"{name}.onnx: the merged model has {count} nodes {kind}, the base "
                    f"{allowed[kind]}: merging must not cost any"
                )
    return {"merged": merged, "base": before}


def _kinds(counts: Mapping[str, int]) -> Counter[str]:
    """Operator -> how many, all matrix products as one: a tied head is one of a turned table."""
    found: Counter[str] = Counter()
    for operator, count in counts.items():
        found["MatMul" if operator in _PRODUCTS else operator] += count
    return found


def _write(
    merged: Checkpoint,
    prepared: Prepared,
    graphs: Sequence[Graph],
    options: ExportOptions,
    dest: Path,
    progress: Progress,
) -> Written:
    """Write the weights and the model's other files."""
    linked: tuple[Block, ...] = ()
    if options.link:
        model = replace(merged, side_files=_foreign_files(merged))
        linked = link_weights(graphs, model, prepared.tensors, dest, progress)
    else:
        write_side_files(_foreign_files(merged), dest)
    written = write_weights(
        graphs, prepared.tensors, dest / DATA_FILE, lambda name: progress(f"writing {name}")
    )
    files = dict.fromkeys((*(block.path for block in linked), *written.files))
    return replace(written, blocks=(*linked, *written.blocks), files=tuple(files))


def _write_genai(job: ExportJob, prepared: Prepared, dest: Path) -> dict[str, str]:
    """Let onnxruntime-genai run the graphs, if it can: what file says so, or why it cannot."""
    if reason := objection(prepared.stages):
        return {"objection": reason}
    stated = job.merged.side_files.get("generation_config.json")
    generation = None
    if stated is not None:
        raw = stated if isinstance(stated, bytes) else stated.read_bytes()
        generation = parse_json(raw, "generation_config.json")
    content = genai_config(job.merged.config or {}, generation, prepared.stages, job.options.device)
    write_file(dest / GENAI_FILE, (json.dumps(content, indent=2) + "\n").encode())
    return {"file": GENAI_FILE}


def task_of(architecture: str) -> str | None:
    """What pipelines call the task of a model class; None if it has no such name."""
    return next((task for end, task in _TASKS.items() if architecture.endswith(end)), None)


def _foreign_files(merged: Checkpoint) -> dict[str, Path | bytes]:
    """The side files of a model, without those that an export writes itself."""
    return {
        name: content
        for name, content in merged.side_files.items()
        if str(PurePosixPath(name)) not in (DATA_FILE, MANIFEST, GENAI_FILE)
        and PurePosixPath(name).suffix != ".onnx"
    }
