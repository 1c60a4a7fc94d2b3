"""merge: a base with adapters worked into its weights."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, ClassVar

from loratool.adapter import Adapter
from loratool.application import Part, Rounding, Trace, apply_parts, bind_part
from loratool.checkpoint import RECORD, Checkpoint, LazyTensor
from loratool.dtypes import FLOAT_NAMES, parse_float_dtype
from loratool.errors import UsageError
from loratool.files import files_below
from loratool.kinship import require_distinct
from loratool.plugins import Operand, option
from loratool.recording import Recorder
from loratool.reports import Report, Table, counted, format_bytes, format_share
from loratool.requantizing import RequantizedCheckpoint, requantized
from loratool.shards import parse_size, plan_shards, safetensors_name
from loratool.skeleton import complete_config, is_diffusers

_CONFIG_DTYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}
_RECORD_LEFT_BEHIND = (
    "the base carries the record of an earlier merge; it is left behind, because this merge is not "
    "--reversible"
)


@dataclass(frozen=True)
class MergedCheckpoint(Checkpoint):
    """A checkpoint that is merged while it is read.

    Attributes:
        traces: base tensor -> what its merge leaves behind, once it was computed.
        counts: tensors with updates added, replaced whole, added, and left out.
        recorder: writes the record of a reversible merge, or None.
    """

    traces: Mapping[str, Trace] = field(default_factory=dict)
    counts: Mapping[str, int] = field(default_factory=dict)
    recorder: Recorder | None = None

    @property
    def disk_bytes(self) -> int:
        """About the bytes that writing it takes."""
        return self.nbytes + (self.recorder.nbytes if self.recorder else 0)

    def beside(self, folder: Path) -> AbstractContextManager[Callable[[str], None]]:
        """Write the record, if the merge is reversible."""
        return _recorded(self.recorder, folder) if self.recorder else super().beside(folder)

    def report(self, target: Path | str) -> Report:
        """What was done; call it after draining."""
        survival = {name: trace.survival for name, trace in self.traces.items()}
        wanted = sum(s.wanted for s in survival.values())
        kept = sum(s.kept for s in survival.values())
        share = kept / wanted if wanted > 0 else None
        lines = [
            ", ".join(f"{counted(n, 'tensor')} {what}" for what, n in self.counts.items() if n)
            or "nothing to add: the base's bytes",
            f"size: {format_bytes(self.nbytes)}",
        ]
        if share is not None:
            lines.insert(1, f"share of the update that survived rounding: {format_share(share)}")
        record = self._record_facts(Path(target))
        if record:
            lines.append(
                f"record: {format_bytes(record['bytes'])}, of which residuals "
                f"{record['residual_bits_per_weight']:.3f} bits a weight; `loratool unmerge "
                f"{target}` restores the base"
            )
        shares = {n: s.kept / s.wanted if s.wanted > 0 else None for n, s in survival.items()}
        rows = tuple(
            (name, "no update" if share is None else format_share(share))
            for name, share in shares.items()
        )
        data = {
            "kind": "merged",
            "survived": share,
            "tensors": shares,
            "counts": dict(self.counts),
            "bytes": self.nbytes,
            "record": record,
        }
        table = Table(("tensor", "survived rounding"), rows)
        return Report(f"Merged {target}", data, tuple(lines), table, (*self.notes, *self._kept()))

    def _record_facts(self, target: Path) -> dict[str, Any] | None:
        if self.recorder is None:
            return None
        sizes = [file.stat().st_size for file in files_below(target / RECORD).values()]
        weights = sum(self.recorder.base[name].numel for name in self.traces)
        bits = 8 * sum(trace.residual_bytes for trace in self.traces.values())
        return {
            "bytes": sum(sizes),
            "residual_bits_per_weight": bits / weights if weights else 0.0,
            "proved": True,
        }

    def _kept(self) -> list[str]:
        kept = {name: trace.kept for name, trace in self.traces.items() if trace.kept}
        if not kept:
            return []
        return [
            f"{sum(kept.values())} merged values are NaN or Inf ({next(iter(kept))}, ...): the "
            "base had them, or its type overflows; unmerge restores what was there"
        ]


@contextmanager
def _recorded(recorder: Recorder, folder: Path) -> Iterator[Callable[[str], None]]:
    with recorder.writing(folder) as recording:
        yield recording.see


@dataclass(frozen=True)
class Merge:
    """Work adapters into a base's weights: W + delta, exact and rounded once."""

    operands: ClassVar[tuple[Operand, ...]] = (
        Operand("base", "checkpoint"),
        Operand("adapters", "adapter", many=True),
    )
    output: ClassVar[str] = "{base}-merged"
    names_base: ClassVar[bool] = True

    dtype: str | None = option(
        None, "type of the merged model (default: the base's)", choices=tuple(FLOAT_NAMES)
    )
    max_shard_size: str | None = option(
        None, "start a new file beyond this size (default: the base's files)", metavar="5GB"
    )
    architecture: str = option("", "model class or type, where config.json does not say")
    rounding: str = option(
        "nearest", "how sums are rounded: stochastic keeps small updates on average",
        choices=("nearest", "stochastic"),
    )  # fmt: skip
    seed: int = option(0, "seed of stochastic rounding")
    reversible: bool = option(False, "keep a record from which unmerge restores the base's bits")
    embed_adapter: bool = option(
        True, "keep the adapters themselves in the record, not only their digests"
    )
    requantize: bool = option(
        False, "write a quantized base's tensors in its scheme again, and say what that costs"
    )
    force: bool = option(False, "requantize even where the update drowns in the error of that")

    def __post_init__(self) -> None:
        if self.reversible and self.dtype is not None:
            raise UsageError("--reversible keeps the base's type: leave --dtype out")
        if not self.reversible and not self.embed_adapter:
            raise UsageError("--no-embed-adapter is about the record of a --reversible merge")
        if self.force and not self.requantize:
            raise UsageError("--force is about --requantize")
        options = {
            "--dtype": self.dtype, "--max-shard-size": self.max_shard_size,
            "--reversible": self.reversible,
        }  # fmt: skip
        for name, value in options.items():
            if self.requantize and value:
                raise UsageError(f"--requantize keeps the base's own scheme: leave {name} out")

    def run(
        self, base: Checkpoint, adapters: Sequence[tuple[Adapter, float]]
    ) -> MergedCheckpoint | RequantizedCheckpoint:
        """Bind every adapter and plan the merged tensors; nothing is computed yet.

        Returns:
            The merged model; with `requantize`, what is stored of it in the base's scheme.

        Raises:
            MismatchError: an adapter does not fit, or is given twice; all complaints at once; or
                the scheme cannot be written.
            UsageError: an option's value makes no sense.
        """
        if not self.requantize:
            return self.merged(base, adapters)
        parts = bind_parts(base, adapters)
        # Quantized anew are the sums as they are, not rounded to anything in between.
        applied = apply_parts(replace(base, quantized={}), parts, None, self._rounding, False)
        return requantized(base, parts, applied, self.force)

    def merged(
        self, base: Checkpoint, adapters: Sequence[tuple[Adapter, float]]
    ) -> MergedCheckpoint:
        """The merged model in plain values; errors as `run`."""
        dtype = parse_float_dtype(self.dtype) if self.dtype else None
        limit = parse_size(self.max_shard_size) if self.max_shard_size else None
        parts = bind_parts(base, adapters)
        # What is to be restored keeps all bits of dequantized values.
        source = replace(base, quantized={}) if self.reversible else base
        applied = apply_parts(source, parts, dtype, self._rounding, self.reversible)
        renames = _renames(base, parts)
        tensors = {
            renames.get(name, name): tensor.renamed(renames.get(name, name))
            for name, tensor in applied.tensors.items()
        }
        shards = plan_shards(base, tensors, {new: old for old, new in renames.items()}, limit)
        written = dtype or ("BF16" if source.quantized else "F32" if base.quantized else None)
        config, side_files, notes = self._model_files(base, parts, tensors, written)
        if base.quantized:
            notes = (*notes, _dequantized_note(base, written))
        recorder = None
        if self.reversible:
            options = {field.name: getattr(self, field.name) for field in fields(self)}
            recorder = Recorder(
                base, parts, applied, renames, side_files, self.embed_adapter, options
            )
        elif base.record:
            notes = (*notes, _RECORD_LEFT_BEHIND)
        return MergedCheckpoint(
            {name: tensors[name] for name in shards},
            config=config,
            side_files=side_files,
            shards=shards,
            metadata={safetensors_name(n): {"format": "pt", **m} for n, m in base.metadata.items()},
            components=base.components,
            notes=(*base.notes, *(n for p in parts for n in p.notes()), *notes),
            traces=applied.traces,
            counts=_counts(parts),
            recorder=recorder,
        )

    @property
    def _rounding(self) -> Rounding:
        return Rounding(self.rounding, self.seed)

    def _model_files(
        self,
        base: Checkpoint,
        parts: Sequence[Part],
        tensors: Mapping[str, LazyTensor],
        dtype: str | None,
    ) -> tuple[Mapping[str, Any] | None, Mapping[str, Any], tuple[str, ...]]:
        """The config and side files of the merged model: the base's, under the adapters'."""
        if base.components:
            return self._component_files(base, parts, dtype)
        side_files = dict(base.side_files)
        original = base.config
        notes: list[str] = []
        for part in parts:
            side_files |= part.adapter.model_files
            if part.adapter.model_config is not None:
                if original is not base.config and original != part.adapter.model_config:
                    notes.append(
                        f"{part.adapter.label}: its model/config.json differs from an earlier "
                        "adapter's: the last one is used"
                    )
                original = part.adapter.model_config
        shapes = {name: tensor.shape for name, tensor in tensors.items()}
        config, completed = complete_config(original, shapes, base.config, self.architecture)
        if config is not None and not is_diffusers(config) and dtype in _CONFIG_DTYPES:
            key = "dtype" if "dtype" in config else "torch_dtype"
            config[key] = _CONFIG_DTYPES[dtype]
        if config is not None and config != base.config:
            side_files |= Checkpoint({}).with_config(config).side_files
        return config, side_files, (*notes, *completed)

    def _component_files(
        self, base: Checkpoint, parts: Sequence[Part], dtype: str | None
    ) -> tuple[Mapping[str, Any] | None, Mapping[str, Any], tuple[str, ...]]:
        """Those of a model of several components: the base's alone."""
        config, notes = complete_config(base.config, {}, architecture=self.architecture)
        side_files = dict(base.side_files)
        if dtype in _CONFIG_DTYPES:
            for name, component in base.components.items():
                side_files |= _with_dtype(f"{name}/config.json", component, dtype)
        left_out = tuple(
            f"{part.adapter.label}: its files under model/ are left out: they belong to a single "
            "model, and the base has several components"
            for part in parts
            if part.adapter.model_files
        )
        return config, side_files, (*left_out, *notes)


def _with_dtype(
    name: str, config: Mapping[str, Any] | None, dtype: str
) -> Mapping[str, Path | bytes]:
    """A component's config.json with another dtype, if it states one."""
    stated = {"dtype", "torch_dtype"}.intersection(config or {})
    if config is None or not stated:
        return {}
    changed = {**config, **dict.fromkeys(stated, _CONFIG_DTYPES[dtype])}
    return {name: Checkpoint({}).with_config(changed).side_files["config.json"]}


def bind_parts(base: Checkpoint, adapters: Sequence[tuple[Adapter, float]]) -> list[Part]:
    """Bind every adapter whose weight is not 0.

    Raises:
        MismatchError: an adapter does not fit, or is given twice.
    """
    merged = [(adapter, weight) for adapter, weight in adapters if weight != 0]
    require_distinct([adapter for adapter, _ in merged])
    return [bind_part(adapter, weight, base) for adapter, weight in merged]


def _dequantized_note(base: Checkpoint, dtype: str | None) -> str:
    return (
        f"{base.label}: the base is quantized: its {counted(len(base.quantized), 'tensor')} are "
        f"written dequantized, as {dtype}, and config.json says nothing of quantization; `merge "
        "--requantize` writes the base's scheme again"
    )


def _counts(parts: Sequence[Part]) -> dict[str, int]:
    changed = [bound for part in parts for bound in part.binding.changed.values()]
    return {
        "updated": len({b.tensor for b in changed if not b.update.is_whole}),
        "with rows replaced": len({b.tensor for b in changed if b.update.kind == "rows"}),
        "replaced whole": len({b.tensor for b in changed if b.update.kind == "replacement"}),
        "added": len({name for part in parts for name in part.binding.added}),
        "left out that the fine-tuned model does not have": len(
            {name for part in parts for name in part.binding.dropped}
        ),
    }


def _renames(base: Checkpoint, parts: Sequence[Part]) -> dict[str, str]:
    """Base name -> the name in the class whose config the merged model gets."""
    renames: dict[str, str] = {}
    if base.components:
        return renames  # its names say which component they belong to
    for part in parts:
        alignment = part.binding.alignment
        named = alignment.prefix_here or alignment.prefix_there or alignment.moves
        if named and part.adapter.model_config is not None:
            renames |= {name: alignment.name_here(name) for name in base}
    return {old: new for old, new in renames.items() if old != new}
