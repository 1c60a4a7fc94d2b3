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
from loratool.places import atomic_directory
from loratool.plugins import Exporter, Operand, option
from loratool.reports import Report
from loratool.skeleton import is_diffusers
from loratool.steps.merge import Merge, MergedCheckpoint


@dataclass(frozen=True)
class LazyExport:
    """An export that is done when it is written.

    Attributes:
        merged: the model to export.
        base: the base's weights in the merged model's class.
        exporter: the plugin that does it.
    """

    merged: Checkpoint
    base: Checkpoint
    exporter: Exporter

    def write(self, target: Path, drain: Drain) -> Report:
        """Export, verify and write.

        Raises:
            InputError: the architecture cannot be exported.
            VerificationError: the result does not do what PyTorch does.
            OutputError: the output place is taken or too small.
        """
        # fp32 is the widest that an export writes; verification needs no disk.
        needed = sum(tensor.numel * 4 for tensor in self.merged.values())
        with atomic_directory(target, drain.overwrite, needed) as folder:
            drain.start("Exporting", 0)
            report = self.exporter.export(
                self.merged, self.base, folder, lambda text: drain.progress(text, 0)
            )
        title = f"Exported {target}"
        notes = (*self.merged.notes, *report.notes)
        return Report(title, report.data, report.lines, report.table, notes, report.status)


@dataclass(frozen=True)
class Export:
    """Write a merged model as ONNX, and prove that it answers as PyTorch does."""

    operands: ClassVar[tuple[Operand, ...]] = (
        Operand("base", "checkpoint"),
        Operand("adapters", "adapter", many=True, required=False),
    )
    output: ClassVar[str] = "{base}-onnx"
    names_base: ClassVar[bool] = True
    has_tasks: ClassVar[bool] = False

    exporter: str = option("onnx", "how to export, with options: onnx:dtype=fp16", kind="exporters")
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
        merge = Merge(architecture=self.architecture)
        merged = merge.merged(base, adapters)
        if merged.config is None:
            raise InputError(f"{base.label}: has no config.json: name its class by --architecture")
        plain = in_class_of(merged, base, merge, adapters)
        raise_problems(f"{base.label} cannot be exported:", exporter.check(merged))
        return LazyExport(merged, plain, exporter)


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
