"""Export to ONNX: traced without weights, filled by streaming, always verified."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path, PurePosixPath
from typing import Literal

import onnx
import onnx_ir as ir
import torch

from loratool.checkpoint import Checkpoint
from loratool.dtypes import FLOAT_NAMES
from loratool.engine import single_threaded_tasks
from loratool.errors import InputError, Problem, UsageError, raise_problems
from loratool.json_files import MANIFEST, manifest
from loratool.plugins import option
from loratool.reports import Report
from loratool.shell import Shell, build_shell, load_class
from loratool.sources import Sources, resolve
from loratool.writer import write_file, write_side_files
from loratool_plugins.exporters.onnx import report
from loratool_plugins.exporters.onnx.graph import compare_nodes, describe_nodes, trace
from loratool_plugins.exporters.onnx.inputs import input_names
from loratool_plugins.exporters.onnx.verify import Tolerance, verify
from loratool_plugins.exporters.onnx.weights import Written, write_weights

MODEL_FILE = "model.onnx"
DATA_FILE = "model.onnx.data"
_OWN_FILES = {MODEL_FILE, DATA_FILE, MANIFEST}
_TYPES = {"fp32": torch.float32, "fp16": torch.float16}
_READABLE = {FLOAT_NAMES[name] for name in ("fp64", "fp32", "fp16", "bf16")}
_DEFAULT_TOLERANCE = {"fp32": 1e-4, "fp16": 2e-2}

# The end of a class name -> what pipelines call its task.
_TASKS = {
    "ForMaskedLM": "fill-mask",
    "ForCausalLM": "text-generation",
    "LMHeadModel": "text-generation",
    "ForSequenceClassification": "text-classification",
    "ForTokenClassification": "token-classification",
    "ForQuestionAnswering": "question-answering",
    "ForPreTraining": "pretraining",
    "ForNextSentencePrediction": "next-sentence-prediction",
    "Model": "feature-extraction",
}


@dataclass(frozen=True)
class Onnx:
    """An ONNX model for ONNX Runtime, with dynamic batch and sequence axes.

    Encoders with their task's head, and decoders as one forward pass without a cache. Weights lie
    in `model.onnx.data`, beside a small graph. What was saved is run beside PyTorch, and the graph
    is compared with the base model's: a merged adapter must not cost a single node. Writing holds a
    few blocks of the weights; verifying loads the model twice, one after the other.
    """

    dtype: Literal["fp32", "fp16"] = option(
        "fp32",
        "type of the weights; ONNX Runtime runs no bf16 on the CPU",
        choices=("fp32", "fp16"),
    )
    opset: int = option(20, "version of the ONNX operators, from 18")
    tolerance: float = option(
        0.0,
        "largest difference from PyTorch: absolute for fp32 (growing with values beyond 10), a "
        "share of the largest value for fp16; 0 for 1e-4 and 2e-2",
    )
    seed: int = option(0, "seed of the random inputs that the result is verified on")

    def __post_init__(self) -> None:
        if self.dtype not in _TYPES:
            raise UsageError(f"dtype {self.dtype!r}: use one of {', '.join(_TYPES)}")
        if self.opset < 18:
            raise UsageError(f"opset {self.opset}: use 18 or a later one")
        if not 0 <= self.tolerance < float("inf"):
            raise UsageError(f"tolerance {self.tolerance}: use a positive number, or 0")

    def check(self, checkpoint: Checkpoint) -> list[Problem]:
        """What stands in the way of an export, by config and headers only."""
        config = checkpoint.config
        if config is None:
            return [_error("config.json", "is missing, so the model's class is not known")]
        try:
            cls, loaded = load_class(config)
        except InputError as error:
            name, _, message = str(error).partition(": ")
            return [_error(name, message)]
        problems = []
        if config.get("quantization_config"):
            problems.append(_error("quantization_config", "export the unquantized model"))
        if _task(cls.__name__) is None or loaded.is_encoder_decoder:
            problems.append(
                _error(
                    "architectures",
                    f"{cls.__name__}: only encoders and decoders are exported, with heads "
                    f"{', '.join(_TASKS)}",
                )
            )
        elif input_names(cls, loaded)[:2] != ("input_ids", "attention_mask"):
            problems.append(_error("architectures", f"{cls.__name__}: does not read text"))
        for name, tensor in checkpoint.items():
            if tensor.dtype not in _READABLE and name.endswith((".weight", ".bias")):
                found = _error(name, "dequantize it first", "a float type", tensor.dtype)
                return [*problems, found]
        return problems

    def export(
        self, merged: Checkpoint, base: Checkpoint, dest: Path, progress: Callable[[str], None]
    ) -> Report:
        """Write `merged` into the empty folder `dest` and verify what was written.

        Args:
            merged: the model, lazy; read once to be written and once to be verified.
            base: the base's weights in the merged model's class, for its graph.
            dest: an existing, empty directory.
            progress: is told what is done next.

        Raises:
            InputError: the model cannot be exported, or a tensor is missing or of another shape.
            VerificationError: the result is not what PyTorch computes, or its graph not the base's.
        """
        started = time.monotonic()
        raise_problems(f"{merged.label}: cannot be exported to ONNX", self.check(merged))
        write_side_files(_foreign_files(merged), dest)
        progress("tracing the merged model")
        model, shell, sources, written = self._write(merged, dest, progress)
        progress("tracing the base")
        nodes, base_nodes = describe_nodes(model, shell.tied), self._base_nodes(base)
        compare_nodes(nodes, base_nodes)
        progress("comparing with PyTorch")
        tolerance = Tolerance(
            self.tolerance or _DEFAULT_TOLERANCE[self.dtype], relative=self.dtype == "fp16"
        )
        providers, comparisons = verify(dest / MODEL_FILE, written, merged, self.seed, tolerance)
        files = [dest / MODEL_FILE, dest / DATA_FILE]
        data = {
            "loratool": version("loratool"),
            "kind": "onnx",
            "architecture": shell.architecture,
            "task": _task(shell.architecture),
            "dtype": self.dtype,
            "opset": self.opset,
            **report.describe(model, files, sources, written),
            "nodes": {"merged": len(nodes), "base": len(base_nodes), "equal": True},
            "verification": report.describe_verification(
                providers, comparisons, tolerance, self.seed
            ),
            "run": report.describe_run(time.monotonic() - started),
        }
        write_file(dest / MANIFEST, manifest(data))
        _sync(dest)
        return Report(
            f"Exported {shell.architecture} to ONNX",
            data,
            report.lines(data),
            notes=report.notes(merged, self.dtype, sources),
        )

    def _write(
        self, merged: Checkpoint, dest: Path, progress: Callable[[str], None]
    ) -> tuple[ir.Model, Shell, Sources, Written]:
        """Trace the model and write graph and weights."""
        shell = build_shell(merged.config or {}, _TYPES[self.dtype])
        sources = resolve(merged, shell)
        model = trace(shell, self.opset)

        def tell(name: str) -> None:
            progress(f"writing {name}")

        with single_threaded_tasks():
            written = write_weights(model.graph, merged, shell, sources, dest / DATA_FILE, tell)
        ir.save(model, dest / MODEL_FILE)
        return model, shell, sources, written

    def _base_nodes(self, base: Checkpoint) -> list[onnx.NodeProto]:
        shell = build_shell(base.config or {}, _TYPES[self.dtype])
        resolve(base, shell)
        return describe_nodes(trace(shell, self.opset), shell.tied)


def _error(name: str, message: str, expected: str = "", found: str = "") -> Problem:
    return Problem("error", name, message, expected, found)


def _task(architecture: str) -> str | None:
    return next((task for end, task in _TASKS.items() if architecture.endswith(end)), None)


def _foreign_files(merged: Checkpoint) -> dict[str, Path | bytes]:
    """The side files of a model, without those that an export writes itself."""
    return {
        name: content
        for name, content in merged.side_files.items()
        if str(PurePosixPath(name)) not in _OWN_FILES
    }


def _sync(folder: Path) -> None:
    """Have the disk hold everything in a folder before it is renamed into place."""
    for path in [*folder.rglob("*"), folder]:
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
