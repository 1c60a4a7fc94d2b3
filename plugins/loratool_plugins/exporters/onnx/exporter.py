"""The plugin: what is asked, and what is light enough to say before anything is traced."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from loratool import plugins
from loratool.dtypes import FLOAT_NAMES
from loratool.engine import single_threaded_tasks
from loratool.errors import InputError, Problem, UsageError, raise_problems
from loratool.exporting import ExportJob
from loratool.plugins import option
from loratool.reports import Report

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
            from loratool.shell import load_class  # transformers, which takes seconds

            try:
                load_class(checkpoint.config)
            except InputError as error:
                name, _, message = str(error).partition(": ")
                return [_error(name, message)]
        if (checkpoint.config or {}).get("quantization_config"):
            problems.append(_error("quantization_config", "export the unquantized model"))
        if job.options.swappable:
            from loratool_plugins.exporters.onnx.adapter_file import refusals

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
        # Tracing imports most of torch and transformers, which a graft has no use for.
        from loratool_plugins.exporters.onnx.deployment import deploy

        raise_problems(f"{job.merged.label}: cannot be exported to ONNX", self.check(job))
        return deploy(job, dest, self.opset, self.tolerance, self.seed, progress)

    def graft(self, job: ExportJob, target: Path, overwrite: bool, progress: Progress) -> Report:
        """Put the merged weights onto an ONNX model of the base, in `target`.

        Nothing is traced or run by PyTorch: the graph is the base's, and every value that changes
        is compared with the merged checkpoint's, bit by bit.

        Raises:
            InputError: the ONNX file is damaged.
            MismatchError: it is of another base, or lacks what the adapters change.
            OutputError: `target` holds something else than grafts of this base.
        """
        from loratool_plugins.exporters.onnx.graft import plan_graft, write_graft
        from loratool_plugins.exporters.onnx.grafts import graph_name

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


def _error(name: str, message: str, expected: str = "", found: str = "") -> Problem:
    return Problem("error", name, message, expected, found)
