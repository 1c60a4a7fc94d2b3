"""Export to ONNX: traced without weights, filled by streaming, always verified."""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path, PurePosixPath

import onnx_ir as ir
import torch

from loratool import plugins
from loratool.checkpoint import Checkpoint
from loratool.dtypes import FLOAT_NAMES
from loratool.engine import single_threaded_tasks
from loratool.errors import InputError, Problem, UsageError, VerificationError, raise_problems
from loratool.exporting import ExportJob, ExportOptions
from loratool.json_files import MANIFEST, manifest, parse_json
from loratool.plugins import option
from loratool.reports import Report
from loratool.shell import load_class
from loratool.writer import write_file, write_side_files
from loratool_plugins.exporters.onnx import report
from loratool_plugins.exporters.onnx.adapter_file import (
    Swapped,
    add_slots,
    refusals,
    write_adapters,
)
from loratool_plugins.exporters.onnx.comparing import TOLERANCES
from loratool_plugins.exporters.onnx.genai import GENAI_FILE, genai_config, objection
from loratool_plugins.exporters.onnx.graft import plan_graft, write_graft
from loratool_plugins.exporters.onnx.grafts import graph_name
from loratool_plugins.exporters.onnx.graph import Form, Traced, count_operators, trace
from loratool_plugins.exporters.onnx.linking import link_weights
from loratool_plugins.exporters.onnx.preparation import Prepared, prepare
from loratool_plugins.exporters.onnx.swappable import describe
from loratool_plugins.exporters.onnx.verify import verify_export
from loratool_plugins.exporters.onnx.weights import Block, Graph, Written, write_weights

MODEL_FILE = "model.onnx"
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
_READABLE = {FLOAT_NAMES[name] for name in ("fp64", "fp32", "fp16", "bf16")}

Progress = Callable[[str], None]


@dataclass(frozen=True)
class Onnx:
    """ONNX models for ONNX Runtime, with dynamic axes.

    Encoders of texts, images and sounds with their task's head; decoders as a graph that reads a
    prompt and one that adds a token, with a key-value cache; encoder-decoders. Weights lie in one
    `model.onnx.data`, beside small graphs. What was saved is run beside PyTorch, and a merged
    adapter must not cost a single node. A few of the largest tensors are held at a time.
    """

    opset: int = option(20, "version of the ONNX operators, from 18")
    tolerance: float = option(
        0.0,
        "largest difference from PyTorch: absolute for fp32 (growing with values beyond 10), a "
        "share of the largest value for fp16 and bf16; 0 for 1e-4, 2e-2 and 8e-2",
    )
    seed: int = option(0, "seed of the random inputs that the result is verified on")

    def __post_init__(self) -> None:
        if self.opset < 18:
            raise UsageError(f"opset {self.opset}: use 18 or a later one")
        if not 0 <= self.tolerance < float("inf"):
            raise UsageError(f"tolerance {self.tolerance}: use a positive number, or 0")

    def check(self, job: ExportJob) -> list[Problem]:
        """What stands in the way of an export, by config and headers only."""
        checkpoint = job.merged
        problems: list[Problem] = []
        if not (job.options.graft or job.options.module):
            if checkpoint.config is None:
                return [_error("config.json", "is missing, so the model's class is not known")]
            try:
                load_class(checkpoint.config)
            except InputError as error:
                name, _, message = str(error).partition(": ")
                return [_error(name, message)]
        if (checkpoint.config or {}).get("quantization_config"):
            problems.append(_error("quantization_config", "export the unquantized model"))
        if job.options.swappable:
            for part in job.parts:
                problems += refusals(part, job.options.max_rank)
        for name, tensor in checkpoint.items():
            if tensor.dtype not in _READABLE and name.endswith((".weight", ".bias")):
                found = _error(name, "dequantize it first", "a float type", tensor.dtype)
                return [*problems, found]
        return problems

    def export(self, job: ExportJob, dest: Path, progress: Progress) -> Report:
        """Write a model into the empty folder `dest` and verify what was written.

        Raises:
            InputError: the model cannot be exported, or a tensor is missing or of another shape.
            VerificationError: the result is not what PyTorch computes, or its graph does more than
                the base's.
        """
        started = time.monotonic()
        options = job.options
        raise_problems(f"{job.merged.label}: cannot be exported to ONNX", self.check(job))
        prepared = prepare(job.merged, _TYPES[options.chosen_dtype], options.cache, options.module)
        traced = self._trace(prepared, options, progress)
        graphs = [found.graph for found in traced]
        operators = self._compare_with_base(job, prepared, traced, progress)
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
        tolerance = TOLERANCES[options.chosen_dtype]
        if self.tolerance:
            tolerance = replace(tolerance, value=self.tolerance)
        files = {entry["adapter"]: dest / entry["file"] for entry in adapters}
        found = verify_export(job, prepared, dest, written, tolerance, self.seed, files)
        data = {
            "loratool": version("loratool"),
            "kind": "onnx",
            "architecture": prepared.shell.architecture,
            "task": task_of(prepared.shell.architecture),
            "device": options.device,
            "dtype": options.chosen_dtype,
            "opset": self.opset,
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

    def graft(self, job: ExportJob, target: Path, overwrite: bool, progress: Progress) -> Report:
        """Put the merged weights onto an ONNX model of the base, in `target`.

        Nothing is traced or run by PyTorch: the graph is the base's, and every value that changes
        is compared with the merged checkpoint's, bit by bit.

        Raises:
            InputError: the ONNX file is damaged.
            MismatchError: it is of another base, or lacks what the adapters change.
            OutputError: `target` holds something else than grafts of this base.
        """
        options = job.options
        raise_problems(f"{job.merged.label}: cannot be exported to ONNX", self.check(job))
        labels = [part.adapter.label for part in job.parts]
        executor = plugins.create("executors", "threads")
        progress("matching")
        with single_threaded_tasks():
            graft = plan_graft(Path(options.graft), job.base, job.merged)
            return write_graft(
                graft,
                target,
                options.name or graph_name(labels),
                executor,
                lambda name: progress(f"writing {name}"),
                overwrite,
                options.link,
                {"adapters": [{"adapter": p.adapter.label, "weight": p.weight} for p in job.parts]},
            )

    def _trace(
        self, prepared: Prepared, options: ExportOptions, progress: Progress
    ) -> list[Traced]:
        form: Form = "as traced" if options.link else "standard"
        if options.fuse and not options.link:
            form = options.device  # type: ignore[assignment]  # one of the same names
        traced = []
        for stage in prepared.stages:
            progress("tracing" if stage.name == "model" else f"tracing {stage.name}")
            traced.append(trace(prepared.shell, stage, prepared.prints, form, self.opset))
        return traced

    def _compare_with_base(
        self, job: ExportJob, prepared: Prepared, traced: list[Traced], progress: Progress
    ) -> dict[str, dict[str, dict[str, int]]]:
        """Count the operators of every graph and of the same graph of the base.

        A graph is traced without weights, from the config alone, so that a merged model's is the
        base's own unless an adapter has changed which parameters are tied: only then is the base's
        traced, too.

        Raises:
            VerificationError: a graph of the merged model has more of an operator than the base's.
        """
        base = prepare(
            job.plain, _TYPES[job.options.chosen_dtype], job.options.cache, job.options.module
        )
        merged = {found.graph.name: count_operators(found.graph.model) for found in traced}
        before = merged
        if base.sources.untied != prepared.sources.untied:
            again = self._trace(base, job.options, progress)
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


def _error(name: str, message: str, expected: str = "", found: str = "") -> Problem:
    return Problem("error", name, message, expected, found)


def _foreign_files(merged: Checkpoint) -> dict[str, Path | bytes]:
    """The side files of a model, without those that an export writes itself."""
    return {
        name: content
        for name, content in merged.side_files.items()
        if str(PurePosixPath(name)) not in (DATA_FILE, MANIFEST, GENAI_FILE)
        and PurePosixPath(name).suffix != ".onnx"
    }
