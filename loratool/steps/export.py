"""export: a base with adapters merged on the fly, as a model that runs elsewhere."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

from loratool import plugins
from loratool.adapter import Adapter
from loratool.checkpoint import Checkpoint
from loratool.engine import Drain
from loratool.errors import InputError, raise_problems
from loratool.exporting import Exporter, ExportJob, ExportOptions
from loratool.places import atomic_directory
from loratool.plugins import Operand, option
from loratool.reports import Report
from loratool.skeleton import is_diffusers
from loratool.steps.merge import Merge, MergedCheckpoint, bind_parts


@dataclass(frozen=True)
class LazyExport:
    """An export that is done when it is written.

    Attributes:
        job: what to export.
        exporter: the plugin that does it.
    """

    job: ExportJob
    exporter: Exporter

    def write(self, target: Path, drain: Drain) -> Report:
        """Export, verify and write.

        Raises:
            InputError: the architecture cannot be exported.
            VerificationError: the result does not do what PyTorch does.
            OutputError: the output place is taken or too small.
        """
        drain.start("Exporting", 0)

        def tell(text: str) -> None:
            drain.progress(text, 0)

        if self.job.options.graft:
            report = self.exporter.graft(self.job, target, drain.overwrite, tell)
        else:
            size = {"fp32": 4}.get(self.job.options.chosen_dtype, 2)
            needed = sum(tensor.numel * size for tensor in self.job.merged.values())
            with atomic_directory(target, drain.overwrite, needed) as folder:
                report = self.exporter.export(self.job, folder, tell)
        notes = (*self.job.merged.notes, *report.notes)
        return replace(report, title=f"Exported {target}", notes=notes)


@dataclass(frozen=True)
class Export(ExportOptions):
    """Write a merged model as ONNX, and prove that it answers as PyTorch does."""

    operands: ClassVar[tuple[Operand, ...]] = (
        Operand("base", "checkpoint"),
        Operand("adapters", "adapter", many=True, required=False),
    )
    output: ClassVar[str] = "{base}-onnx"
    names_base: ClassVar[bool] = True
    has_tasks: ClassVar[bool] = False

    exporter: str = option("onnx", "how to export, with options: onnx:opset=21", kind="exporters")
    architecture: str = option("", "model class or type, where config.json does not say")

    def run(self, base: Checkpoint, adapters: Sequence[tuple[Adapter, float]] = ()) -> LazyExport:
        """Bind the adapters, and ask the exporter by headers whether it can do it.

        Raises:
            MismatchError: an adapter does not fit, or the model cannot be exported.
            InputError: the model's class is not known, or is none of transformers'.
        """
        if is_diffusers(base.config):
            raise InputError(
                f"{base.label}: is a diffusers model: only models of transformers can be exported"
            )
        exporter: Exporter = plugins.create("exporters", self.exporter)
        # What is linked to is the merged model itself, in the type of the graph.
        dtype = self.chosen_dtype if self.link and not self.graft else None
        merge = Merge(architecture=self.architecture, dtype=dtype)
        merged = merge.merged(base, () if self.swappable else adapters)
        if merged.config is None and not (self.graft or self.module):
            raise InputError(
                f"{base.label}: has no config.json: name its class by --architecture, or a "
                "function that makes the model by --module"
            )
        plain = merged if self.swappable else in_class_of(merged, base, merge, adapters)
        each = [merge.merged(base, [adapter]) for adapter in adapters] if self.swappable else []
        job = ExportJob(merged, plain, base, bind_parts(base, adapters), each, self)
        raise_problems(f"{base.label} cannot be exported:", exporter.check(job))
        return LazyExport(job, exporter)


def in_class_of(
    merged: MergedCheckpoint,
    base: Checkpoint,
    merge: Merge,
    adapters: Sequence[tuple[Adapter, float]],
) -> Checkpoint:
    """The base's weights in the merged model's class; what the base lacks, from the adapters."""
    plain = merge.merged(
        base, [(_without_factors(adapter), weight) for adapter, weight in adapters]
    )
    return plain.with_config(merged.config) if merged.config is not None else plain


def _without_factors(adapter: Adapter) -> Adapter:
    """The adapter with nothing that is added to weights: only what it replaces."""
    updates = {
        name: update if update.is_whole else replace(update, load=lambda: None)
        for name, update in adapter.items()
    }
    return replace(adapter, updates=updates)
