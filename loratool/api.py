"""The verbs as Python functions.

    adapter = loratool.extract("base", "finetuned", rank=16)     # lazy: headers only
    adapter.save("adapter")                                      # drains it
    loratool.merge("base", [(adapter, 1.0)]).save("merged")      # or takes it unsaved

Every input is a path or reference, or a checkpoint or adapter that is already open. A test holds
the signatures to the fields of the steps.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, TypeVar

from loratool.adapter import Adapter
from loratool.checkpoint import Checkpoint
from loratool.engine import Drain, save_adapter, save_checkpoint
from loratool.opening import open_adapter, open_checkpoint
from loratool.reports import Report
from loratool.steps.export import Export, LazyExport
from loratool.steps.extract import Extract
from loratool.steps.merge import Merge, MergedCheckpoint
from loratool.steps.validate import Validate

CheckpointLike = str | Path | Checkpoint
AdapterLike = str | Path | Adapter


@dataclass(frozen=True)
class LazyAdapter(Adapter):
    """An adapter that is computed while it is saved or merged."""

    def save(
        self,
        path: str | Path,
        *,
        overwrite: bool = False,
        executor: str = "threads",
        format: str = "peft",
    ) -> Report:
        """Compute and write it; see `loratool.engine.save_adapter` for the errors."""
        return save_adapter(self, Path(path), Drain(executor, overwrite), format)


@dataclass(frozen=True)
class LazyModel(MergedCheckpoint):
    """A merged checkpoint that is computed while it is saved."""

    def save(
        self, path: str | Path, *, overwrite: bool = False, executor: str = "threads"
    ) -> Report:
        """Compute and write it; see `loratool.engine.save_checkpoint` for the errors."""
        return save_checkpoint(self, Path(path), Drain(executor, overwrite))


@dataclass(frozen=True)
class LazyOnnx(LazyExport):
    """An export that is done and verified while it is saved."""

    def save(self, path: str | Path, *, overwrite: bool = False) -> Report:
        """Export, verify and write it; see `loratool.steps.export.LazyExport.write`."""
        return self.write(Path(path), Drain(overwrite=overwrite))


def extract(
    base: CheckpointLike,
    finetuned: CheckpointLike,
    *,
    rank: int | None = None,
    energy: float | None = None,
    target: Sequence[str] = (),
    exclude: Sequence[str] = (),
    factorizer: str = "krylov",
    seed: int = 0,
    dtype: str | None = None,
    lora_only: bool = False,
    map: Sequence[str] = (),
    architecture: str = "",
    base_name: str = "",
) -> LazyAdapter:
    """The difference of two checkpoints as a LoRA adapter, lazily.

    Args:
        base: the base model.
        finetuned: the fine-tuned model.
        rank: rank of every update; None for 16, or for no limit but `energy` if that is given.
        energy: keep the smallest rank that captures this share of ||delta||^2, in (0, 1].
        target: only tensors whose name matches one of these globs.
        exclude: no tensor whose name matches one of these globs.
        factorizer: "krylov" or "exact", or another plugin's name, with options.
        seed: of the factorizer's random start.
        dtype: of the factors: "fp32", "bf16", ...; None for bf16 with bf16 models, else fp32.
        lora_only: leave out what is not a low-rank update.
        map: "OLD=NEW": the fine-tune's name or prefix OLD is NEW in the base.
        architecture: model class or type, where config.json does not say.
        base_name: the base's Hub id.

    Raises:
        InputError: a checkpoint cannot be read.
        MismatchError: the two do not belong together.
        UsageError: an option's value makes no sense.
    """
    step = Extract(
        rank, energy, tuple(target), tuple(exclude), factorizer, seed, dtype, lora_only,
        tuple(map), architecture, base_name,
    )  # fmt: skip
    return _as(LazyAdapter, step.run(_checkpoint(base), _checkpoint(finetuned)))


def validate(adapter: AdapterLike, base: CheckpointLike, *, deep: bool = False) -> Report:
    """Check an adapter against a base by headers; the report lists every problem.

    Args:
        adapter: the adapter.
        base: the base model.
        deep: read the values too, and look for NaN and Inf.
    """
    return Validate(deep).run(_adapter(adapter), _checkpoint(base))


def merge(
    base: CheckpointLike,
    adapters: Sequence[tuple[AdapterLike, float]],
    *,
    dtype: str | None = None,
    max_shard_size: str | None = None,
    architecture: str = "",
) -> LazyModel:
    """The base with adapters worked into its weights, lazily.

    Args:
        base: the base model.
        adapters: (adapter, weight) pairs, in any order.
        dtype: of the merged model: "bf16", ...; None for the base's.
        max_shard_size: start a new file beyond this size ("5GB"); None for the base's files.
        architecture: model class or type, where config.json does not say.

    Raises:
        InputError: a file cannot be read.
        MismatchError: an adapter does not fit the base; all complaints at once.
    """
    step = Merge(dtype, max_shard_size, architecture)
    return _as(LazyModel, step.run(_checkpoint(base), _weighted(adapters)))


def export(
    base: CheckpointLike,
    adapters: Sequence[tuple[AdapterLike, float]] = (),
    *,
    exporter: str = "onnx",
    architecture: str = "",
) -> LazyOnnx:
    """The base with adapters merged on the fly, as ONNX, lazily.

    Args:
        base: the base model.
        adapters: (adapter, weight) pairs, in any order.
        exporter: the exporter plugin, with options ("onnx:dtype=fp16").
        architecture: model class or type, where config.json does not say.

    Raises:
        InputError: a file cannot be read, or the model's class is not known.
        MismatchError: an adapter does not fit the base; all complaints at once.
    """
    step = Export(exporter, architecture)
    return _as(LazyOnnx, step.run(_checkpoint(base), _weighted(adapters)))


def _checkpoint(source: CheckpointLike) -> Checkpoint:
    return source if isinstance(source, Checkpoint) else open_checkpoint(source)


def _adapter(source: AdapterLike) -> Adapter:
    return source if isinstance(source, Adapter) else open_adapter(source)


def _weighted(adapters: Sequence[tuple[AdapterLike, float]]) -> list[tuple[Adapter, float]]:
    return [(_adapter(adapter), weight) for adapter, weight in adapters]


T = TypeVar("T")


def _as(cls: type[T], value: Any) -> T:
    """The same fields as an instance of a subclass that can save itself."""
    return cls(**{field.name: getattr(value, field.name) for field in fields(value)})
