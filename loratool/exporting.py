"""What can be asked of an export, and what an exporter is given."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from loratool.application import Part
from loratool.checkpoint import Checkpoint
from loratool.errors import Problem, UsageError
from loratool.plugins import option
from loratool.reports import Report

DEVICES = ("cpu", "cuda", "webgpu", "dml")
EXPORT_DTYPES = ("fp32", "fp16", "bf16")


@dataclass(frozen=True)
class ExportOptions:
    """What a deployment is for, and in which form it is wanted."""

    device: str = option("cpu", "what it is to run on: operators are fused for it", choices=DEVICES)
    dtype: str | None = option(
        None, "type of the weights (default: fp32 for the CPU, else fp16)", choices=EXPORT_DTYPES
    )
    fuse: bool = option(True, "use ONNX Runtime's fused operators, or standard ONNX alone")
    cache: bool = option(
        True, "give decoders a cache: one graph for the prompt, one for each token"
    )
    link: bool = option(
        False,
        "point the graph into merged .safetensors beside it, which transformers reads, too; with "
        "--graft, bring the base's data as a hard link",
    )
    graft: str = option(
        "", "put the change onto this ONNX model of the base, without tracing", metavar="BASE.onnx"
    )
    name: str = option("", "name of the grafted graph (default: the adapters')")
    swappable: bool = option(False, "export the base, with adapters to switch at every request")
    max_rank: int = option(64, "largest rank of an adapter of a --swappable export")
    module: str = option(
        "", "Python function that gives any torch module and sample inputs for it",
        metavar="PACKAGE.MODULE:FUNCTION",
    )  # fmt: skip
    strict: bool = option(False, "fail if the device cannot be used here to verify the result")

    def __post_init__(self) -> None:
        if self.device not in DEVICES:
            raise UsageError(f"device {self.device!r}: use one of {', '.join(DEVICES)}")
        if self.dtype is not None and self.dtype not in EXPORT_DTYPES:
            raise UsageError(f"dtype {self.dtype!r}: use one of {', '.join(EXPORT_DTYPES)}")
        if self.dtype == "bf16" and self.device == "cpu":
            raise UsageError(
                "--dtype bf16: ONNX Runtime has no bf16 kernels for products on the CPU; use fp32, "
                "which holds every bf16 value exactly, or fp16"
            )
        forms = [
            name
            for name, asked in (
                ("--link", self.link),
                ("--graft", bool(self.graft)),
                ("--swappable", self.swappable),
            )
            if asked
        ]
        if len(forms) > 1 and not (self.graft and self.link):
            raise UsageError(f"{' and '.join(forms)} are different forms: choose one")
        if self.max_rank < 1:
            raise UsageError(f"--max-rank {self.max_rank}: use a positive number")
        if self.name and not self.graft:
            raise UsageError("--name is about --graft")
        if self.graft and (self.dtype or self.module or not self.fuse or not self.cache):
            raise UsageError(
                "--graft keeps the graph that it is given: leave --dtype, --module, --no-fuse and "
                "--no-cache out"
            )

    @property
    def chosen_dtype(self) -> str:
        """The type of the weights, where none was asked for, too."""
        return self.dtype or ("fp32" if self.device == "cpu" else "fp16")


@dataclass(frozen=True)
class ExportJob:
    """What is to be exported.

    Attributes:
        merged: the model, lazy.
        plain: the base's weights in the merged model's class.
        base: the base itself.
        parts: the adapters, bound, with their weights; in a swappable export `merged` is the base.
        adapted: of a swappable export, the base merged with each adapter by itself.
        options: what was asked for.
    """

    merged: Checkpoint
    plain: Checkpoint
    base: Checkpoint
    parts: Sequence[Part]
    adapted: Sequence[Checkpoint]
    options: ExportOptions


class Exporter(Protocol):
    """A way to turn a merged checkpoint into something that runs."""

    def check(self, job: ExportJob) -> list[Problem]:
        """What stands in the way, by headers only."""
        ...

    def export(self, job: ExportJob, dest: Path, progress: Callable[[str], None]) -> Report:
        """Write the model into the empty folder `dest` and verify it.

        Raises VerificationError if the result does not do what the checkpoint does.
        """
        ...

    def graft(
        self, job: ExportJob, target: Path, overwrite: bool, progress: Callable[[str], None]
    ) -> Report:
        """Put the merged weights onto an exported base, in `target`, and verify the result.

        `target` may hold earlier grafts onto the same base: they stay as they are.
        """
        ...
