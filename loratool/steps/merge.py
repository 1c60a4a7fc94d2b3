"""merge: a base with adapters worked into its weights."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from loratool.adapter import Adapter, LowRank, Replacement
from loratool.binding import Binding, BoundUpdate, bind
from loratool.checkpoint import Checkpoint, LazyTensor
from loratool.dtypes import FLOAT_NAMES, is_float, parse_float_dtype
from loratool.errors import InputError, MismatchError, UsageError, raise_problems
from loratool.plugins import Operand, option
from loratool.reports import Report, Table, counted, format_bytes, format_share
from loratool.shards import parse_size, plan_shards, safetensors_name
from loratool.skeleton import complete_config

if TYPE_CHECKING:
    import torch

    from loratool.merging import Survival

_TILE_ELEMENTS = 1 << 18
_CONFIG_DTYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}


@dataclass(frozen=True)
class MergedCheckpoint(Checkpoint):
    """A checkpoint that is merged while it is read.

    Attributes:
        survival: base tensor -> how much of its update survived rounding, once it was computed.
        counts: tensors with updates added, replaced whole, added, and left out.
    """

    survival: Mapping[str, Survival] = field(default_factory=dict)
    counts: Mapping[str, int] = field(default_factory=dict)

    def report(self, target: Path | str) -> Report:
        """What was done; call it after draining."""
        wanted = sum(s.wanted for s in self.survival.values())
        kept = sum(s.kept for s in self.survival.values())
        share = kept / wanted if wanted > 0 else None
        lines = [
            ", ".join(f"{counted(n, 'tensor')} {what}" for what, n in self.counts.items() if n)
            or "nothing to add: the base's bytes",
            f"size: {format_bytes(self.nbytes)}",
        ]
        if share is not None:
            lines.insert(1, f"share of the update that survived rounding: {format_share(share)}")
        rows = tuple(
            (name, format_share(s.kept / s.wanted) if s.wanted > 0 else "no update")
            for name, s in self.survival.items()
        )
        data = {
            "kind": "merged",
            "survived": share,
            "tensors": {
                name: s.kept / s.wanted if s.wanted > 0 else None
                for name, s in self.survival.items()
            },
            "counts": dict(self.counts),
            "bytes": self.nbytes,
        }
        table = Table(("tensor", "survived rounding"), rows)
        return Report(f"Merged {target}", data, tuple(lines), table, self.notes)


@dataclass(frozen=True)
class Merge:
    """Work adapters into a base's weights: W + delta, exact and rounded once."""

    operands: ClassVar[tuple[Operand, ...]] = (
        Operand("base", "checkpoint"),
        Operand("adapters", "adapter", many=True),
    )
    output: ClassVar[str] = "{base}-merged"

    dtype: str | None = option(
        None, "type of the merged model (default: the base's)", choices=tuple(FLOAT_NAMES)
    )
    max_shard_size: str | None = option(
        None, "start a new file beyond this size (default: the base's files)", metavar="5GB"
    )
    architecture: str = option("", "model class or type, where config.json does not say")

    def run(self, base: Checkpoint, adapters: Sequence[tuple[Adapter, float]]) -> MergedCheckpoint:
        """Bind every adapter and plan the merged tensors; nothing is computed yet.

        Raises:
            MismatchError: an adapter does not fit; all complaints at once.
            UsageError: an option's value makes no sense.
        """
        dtype = parse_float_dtype(self.dtype) if self.dtype else None
        limit = parse_size(self.max_shard_size) if self.max_shard_size else None
        parts = [_bound(adapter, weight, base) for adapter, weight in adapters if weight != 0]
        tensors, survival = _merged_tensors(base, parts, dtype)
        renames = _renames(base, parts)
        tensors = {renames.get(n, n): t.renamed(renames.get(n, n)) for n, t in tensors.items()}
        shards = plan_shards(base, tensors, {new: old for old, new in renames.items()}, limit)
        config, side_files, notes = self._model_files(base, parts, tensors, dtype)
        return MergedCheckpoint(
            {name: tensors[name] for name in shards},
            config=config,
            side_files=side_files,
            shards=shards,
            metadata={safetensors_name(n): {"format": "pt", **m} for n, m in base.metadata.items()},
            notes=(*base.notes, *(n for p in parts for n in p.notes()), *notes),
            survival=survival,
            counts=_counts(parts),
        )

    def _model_files(
        self,
        base: Checkpoint,
        parts: Sequence[_Part],
        tensors: Mapping[str, LazyTensor],
        dtype: str | None,
    ) -> tuple[Mapping[str, Any] | None, Mapping[str, Any], tuple[str, ...]]:
        """The config and side files of the merged model: the base's, under the adapters'."""
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
        if config is not None and dtype in _CONFIG_DTYPES:
            key = "dtype" if "dtype" in config else "torch_dtype"
            config[key] = _CONFIG_DTYPES[dtype]
        if config is not None and config != base.config:
            side_files |= Checkpoint({}).with_config(config).side_files
        return config, side_files, (*notes, *completed)


@dataclass(frozen=True)
class _Part:
    adapter: Adapter
    weight: float
    binding: Binding

    def notes(self) -> list[str]:
        """What the user should know of how this adapter is applied."""
        notes = [*self.adapter.notes]
        notes += [str(p) for p in self.binding.problems if p.severity == "warning"]
        if words := self.binding.alignment.describe():
            notes.append(f"{self.adapter.label}: {words} to get the base's")
        whole = [b for b in self.binding.changed.values() if b.update.kind == "replacement"]
        if whole and self.weight != 1:
            notes.append(
                f"{self.adapter.label}: {len(whole)} tensors are replaced whole "
                f"({whole[0].tensor}, ...): the weight {self.weight:g} does not scale these"
            )
        return notes


def _bound(adapter: Adapter, weight: float, base: Checkpoint) -> _Part:
    if not math.isfinite(weight):
        raise UsageError(f"{adapter.label}: the weight must be finite, not {weight}")
    binding = bind(adapter, base)
    raise_problems(f"{adapter.label} does not fit {base.label}:", binding.problems)
    return _Part(adapter, weight, binding)


def _counts(parts: Sequence[_Part]) -> dict[str, int]:
    changed = [bound for part in parts for bound in part.binding.changed.values()]
    return {
        "updated": len({b.tensor for b in changed if b.update.kind == "low_rank"}),
        "replaced whole": len({b.tensor for b in changed if b.update.kind == "replacement"}),
        "added": len({name for part in parts for name in part.binding.added}),
        "left out that the fine-tuned model does not have": len(
            {name for part in parts for name in part.binding.dropped}
        ),
    }


def _merged_tensors(
    base: Checkpoint, parts: Sequence[_Part], dtype: str | None
) -> tuple[dict[str, LazyTensor], dict[str, Survival]]:
    from loratool.merging import Survival

    dropped = {name for part in parts for name in part.binding.dropped}
    tensors: dict[str, LazyTensor] = {}
    survival: dict[str, Survival] = {}
    for name, tensor in base.items():
        changes = [(p.binding.changed[name], p) for p in parts if name in p.binding.changed]
        if name in dropped and not changes:
            continue
        whole = [(bound, part) for bound, part in changes if bound.update.kind == "replacement"]
        if len(whole) > 1:
            labels = " and ".join(part.adapter.label for _, part in whole)
            raise MismatchError(f"{name}: {labels} both replace it whole: merge one of them")
        target = dtype if dtype and is_float(tensor.dtype) else tensor.dtype
        start = _replaced(tensor, whole[0][0]) if whole else tensor
        updates = [(b, p.weight) for b, p in changes if b.update.kind == "low_rank"]
        if updates:
            survival[name] = Survival()
            tensors[name] = _updated(start, updates, target, survival[name])
        else:
            tensors[name] = _as_dtype(start, target)
    for part in parts:
        for name, bound in part.binding.added.items():
            if name in tensors:
                raise MismatchError(f"{name}: two adapters add it: merge one of them")
            tensors[name] = _addition(bound, base, dtype)
    return tensors, survival


def _replaced(tensor: LazyTensor, bound: BoundUpdate) -> LazyTensor:
    """The replacement under the base's name, in the base's dtype."""
    update = bound.update
    lazy = LazyTensor(
        tensor.name,
        update.dtype,
        update.shape,
        _replacement_blocks(bound, tensor),
        update.origin,
    )
    return _as_dtype(lazy, tensor.dtype)


def _replacement_blocks(
    bound: BoundUpdate, before: LazyTensor | None
) -> Callable[[], Iterator[torch.Tensor]]:
    def blocks() -> Iterator[torch.Tensor]:
        found = bound.update.load()
        if isinstance(found, Replacement):
            yield from _finite_blocks(found.tensor, bound)
        elif before is not None:  # an extraction found it unchanged
            yield from before.blocks()

    return blocks


def _addition(bound: BoundUpdate, base: Checkpoint, dtype: str | None) -> LazyTensor:
    update = bound.update
    lazy = LazyTensor(
        bound.tensor,
        update.dtype,
        update.shape,
        _replacement_blocks(bound, None),
        update.origin,
    )
    if not is_float(update.dtype):
        return lazy
    return _as_dtype(lazy, dtype or _main_dtype(base) or update.dtype)


def _main_dtype(base: Checkpoint) -> str | None:
    """The float dtype that most of the base's elements have."""
    sizes: dict[str, int] = {}
    for tensor in base.values():
        if is_float(tensor.dtype):
            sizes[tensor.dtype] = sizes.get(tensor.dtype, 0) + tensor.numel
    return max(sizes, key=lambda name: sizes[name]) if sizes else None


def _as_dtype(tensor: LazyTensor, dtype: str) -> LazyTensor:
    """The tensor itself if it has the dtype, else rounded to it block by block."""
    if tensor.dtype == dtype or not is_float(tensor.dtype):
        return tensor

    def blocks() -> Iterator[torch.Tensor]:
        from loratool.merging import rounded_blocks

        for block in tensor.blocks():
            yield from rounded_blocks(block, dtype, f"{tensor.origin}: {tensor.name}")

    return LazyTensor(tensor.name, dtype, tensor.shape, blocks, tensor.origin)


def _updated(
    tensor: LazyTensor,
    updates: Sequence[tuple[BoundUpdate, float]],
    dtype: str,
    survival: Survival,
) -> LazyTensor:
    def blocks() -> Iterator[torch.Tensor]:
        from loratool.merging import exact_delta, merged_blocks, rounded_blocks

        name = f"{tensor.origin}: {tensor.name}"
        parts = []
        for bound, weight in updates:
            found = bound.update.load()
            if isinstance(found, LowRank):
                _require_finite(found, bound)
                pair = (found.a.T, found.b.T) if bound.transposed else (found.b, found.a)
                parts.append((*pair, weight * found.scale))
        survival.kept = survival.wanted = 0.0
        weight_tensor = tensor.read()
        if parts:
            yield from merged_blocks(weight_tensor, exact_delta(parts), dtype, survival, name)
        elif dtype == tensor.dtype:
            yield weight_tensor
        else:
            yield from rounded_blocks(weight_tensor, dtype, name)

    return LazyTensor(tensor.name, dtype, tensor.shape, blocks, tensor.origin)


def _require_finite(found: LowRank, bound: BoundUpdate) -> None:
    import torch

    for side, factor in (("A", found.a), ("B", found.b)):
        if not bool(torch.isfinite(factor.float()).all()):
            raise _not_finite(bound, f"lora_{side} holds")


def _finite_blocks(tensor: LazyTensor, bound: BoundUpdate) -> Iterator[torch.Tensor]:
    """A replacement's blocks; InputError if one holds NaN or Inf."""
    import torch

    for block in tensor.blocks():
        flat = block.reshape(-1)
        for start in range(0, flat.numel(), _TILE_ELEMENTS):
            if not bool(torch.isfinite(flat[start : start + _TILE_ELEMENTS].float()).all()):
                raise _not_finite(bound, "holds")
        yield block


def _not_finite(bound: BoundUpdate, what: str) -> InputError:
    origin = bound.update.origin or "the adapter"
    return InputError(f"{origin}: {bound.update.name}: {what} NaN or Inf: repair the adapter")


def _renames(base: Checkpoint, parts: Sequence[_Part]) -> dict[str, str]:
    """Base name -> the name in the class whose config the merged model gets."""
    renames: dict[str, str] = {}
    for part in parts:
        alignment = part.binding.alignment
        named = alignment.prefix_here or alignment.prefix_there or alignment.moves
        if named and part.adapter.model_config is not None:
            renames |= {name: alignment.name_here(name) for name in base}
    return {old: new for old, new in renames.items() if old != new}
