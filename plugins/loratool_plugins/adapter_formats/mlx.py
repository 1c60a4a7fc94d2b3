"""MLX's adapters, as mlx_lm trains them: adapters.safetensors with adapter_config.json."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from loratool.adapter import Adapter, LazyUpdate
from loratool.checkpoint import LazyTensor
from loratool.errors import FormatError, InputError, Problem
from loratool.files import is_dir, is_file
from loratool.json_files import read_json
from loratool.safetensors_file import lazy_tensors, read_header
from loratool.updates import DoRA, Experts, Kind, LowRank, Replacement, Update
from loratool.writer import Spool, write_file, write_safetensors
from loratool_plugins.adapter_formats import _keys, _ours
from loratool_plugins.adapter_formats._experts import DOWN, halves
from loratool_plugins.adapter_formats._scales import (
    RUNTIME_TYPES,
    fold,
    most_common,
    require_finite,
)
from loratool_plugins.adapter_formats.mlx_layout import DEFAULT_SCALE, Reader, facts_of, switch_of
from loratool_plugins.executors.serial import Serial

if TYPE_CHECKING:
    import torch

CONFIG, WEIGHTS = "adapter_config.json", "adapters.safetensors"
_OLD = "adapters.npz"
_LAYER = re.compile(r"(?:.+?\.)?\d+\.(?P<inside>.+)")
_ONE_EXPERT = re.compile(r".+\.experts\.\d+\..+")


@dataclass(frozen=True)
class Mlx:
    """LoRA, DoRA and full fine-tunes as mlx_lm saves them."""

    carries: ClassVar[frozenset[Kind]] = frozenset({"low_rank", "experts", "dora", "replacement"})
    refines: ClassVar[frozenset[str]] = frozenset({"peft"})  # where the config is no JSON
    library: ClassVar[str] = "mlx"
    usage: ClassVar[str] = """\
```python
from mlx_lm import load

model, tokenizer = load("BASE", adapter_path="ADAPTER")
```"""

    def objection(self, path: Path) -> str:
        """Why there is no adapters.safetensors of MLX."""
        folder, file = _place(path)
        if is_dir(path) and not is_file(file):
            if is_file(path / _OLD):
                return f"{_OLD} is of an old MLX: save its arrays as {WEIGHTS}"
            return f"no {WEIGHTS}"
        if file.suffix != ".safetensors":
            return "no .safetensors file"
        try:
            settings = _settings(folder)
        except FormatError:
            settings = {}  # opening it says what is wrong with the file
        if "peft_type" in settings:
            return f"{CONFIG} is PEFT's"
        if settings.get("fine_tune_type") == "full" and is_dir(path):
            return ""
        return _keys.objection(file, "mlx", "*.lora_a / *.lora_b")

    def open(self, path: Path) -> Adapter:
        """Open it by its headers; what is wrong inside is collected.

        Raises:
            InputError: a file cannot be read.
            FormatError: it is malformed, or holds keys of another format, too.
        """
        folder, file = _place(path)
        header = read_header(file)
        tensors = lazy_tensors(file, header)
        settings = _settings(folder)
        ours = _ours.parsed(header.metadata.get(_ours.KEY), str(file))
        facts = _ours.restored(ours, str(file))
        transposed = facts.pop("transposed")
        if not facts["settings"]:
            facts["settings"] = settings
        reader, notes = _reader(path, file, tensors, settings, ours)
        updates = reader.updates()
        for name in transposed:
            if name in updates:
                updates[name] = replace(updates[name], transposed=True)
        files, model_files, config = _ours.beside(path, (file, folder / CONFIG))
        facts.setdefault("base_name", _text(settings.get("model")))
        return Adapter(
            updates,
            **facts,
            model_files=model_files,
            model_config=config,
            context=reader.replaced,
            problems=tuple(reader.problems),
            notes=notes,
            files=files,
            path=path,
        )

    def refusals(self, adapter: Adapter) -> Iterable[Problem]:
        """What MLX has no layer for, and kinds that one config cannot state together."""
        kinds = {update.kind for update in adapter.values()}
        for update in adapter.values():
            if message := _refusal(update, kinds, _model_type(adapter)):
                yield Problem("error", update.name, message)

    def write(
        self, adapter: Adapter, results: Iterable[tuple[LazyUpdate, Update | None]], folder: Path
    ) -> tuple[str, ...]:
        """Write weights and config: one rank, padded with zeros, and one scale for all."""
        with Spool(folder) as spool:
            entries: list[_Entry] = []
            whole: dict[str, LazyTensor] = {}
            shared: list[str] = []
            for update, found in results:
                if isinstance(found, Replacement):
                    whole[update.name] = found.tensor.renamed(update.name)
                elif isinstance(found, Experts):
                    entries += _experts(adapter, update, found, shared, spool)
                elif isinstance(found, LowRank | DoRA):
                    entries.append(_entry(adapter, update, found, spool))
            if not entries and not whole:
                return ()
            layout = _Layout(entries)
            tensors = {t.name: t for e in entries for t in layout.tensors(e, spool)}
            text = _ours.text_of(
                adapter,
                ranks=layout.ranks,
                folds=layout.folds,
                scales=layout.scales,
                shared=shared,
                tables=[entry.module for entry in entries if entry.table],
            )
            metadata = {"format": "mlx", _ours.KEY: text}
            write_safetensors(folder / WEIGHTS, {**tensors, **whole}, metadata, Serial())
        config = layout.config(adapter)
        write_file(folder / CONFIG, (json.dumps(config, indent=4, sort_keys=True) + "\n").encode())
        if not layout.rounded:
            return ()
        return (
            f"{len(layout.rounded)} updates have another scale than the config's "
            f"{layout.scale:g} ({layout.rounded[0]}, ...): worked into lora_b and rounded to fp32",
        )


def _place(path: Path) -> tuple[Path, Path]:
    """The folder and the weight file."""
    return (path.parent, path) if is_file(path) else (path, path / WEIGHTS)


def _settings(folder: Path) -> dict[str, Any]:
    return read_json(folder / CONFIG) if is_file(folder / CONFIG) else {}


def _text(value: Any) -> str:
    return value if isinstance(value, str) else ""


def _reader(
    path: Path,
    file: Path,
    tensors: Mapping[str, LazyTensor],
    settings: Mapping[str, Any],
    ours: Mapping[str, Any],
) -> tuple[Reader, tuple[str, ...]]:
    """The reader that the config asks for, and what had to be assumed.

    Raises:
        FormatError: the config, the metadata, or the mixture of keys is wrong.
    """
    where = file.parent / CONFIG
    parameters = settings.get("lora_parameters") or {}
    kind = settings.get("fine_tune_type") or "lora"
    if not isinstance(parameters, dict) or kind not in ("lora", "dora", "full"):
        raise FormatError(f"{where}: fine_tune_type is {kind!r}, or lora_parameters is no object")
    if kind != "full":
        _keys.require_one_style(file, tensors)
    dora = kind == "dora" or settings.get("use_dora") is True or parameters.get("use_dora") is True
    scale, rank = parameters.get("scale"), parameters.get("rank")
    notes: tuple[str, ...] = ()
    if scale is None:
        scale = DEFAULT_SCALE
        if kind != "full":
            reason = f"{CONFIG} does not say scale" if settings else f"there is no {CONFIG}"
            notes = (f"{path}: {reason}: taken as MLX's default {DEFAULT_SCALE:g}",)
    if isinstance(scale, bool) or not isinstance(scale, int | float) or not math.isfinite(scale):
        raise FormatError(f"{where}: scale must be a finite number, not {scale!r}")
    if rank is not None and (type(rank) is not int or rank < 1):
        raise FormatError(f"{where}: rank must be a whole number from 1 up, not {rank!r}")
    try:
        facts = facts_of(ours)
    except (TypeError, ValueError) as error:
        raise FormatError(f"{file}: its metadata is not what loratool writes") from error
    return Reader(tensors, float(scale), rank, dora, kind == "full", facts), notes


def _model_type(adapter: Adapter) -> str:
    return _text((adapter.model_config or {}).get("model_type"))


def _refusal(update: LazyUpdate, kinds: set[Kind], model_type: str) -> str:
    """Why an update cannot be written; "" if it can."""
    if update.kind == "replacement":
        if kinds == {"replacement"}:
            return ""
        return "MLX takes either updates or whole tensors, not both: leave these out"
    if update.kind == "experts":
        if switch_of(update, model_type) is None or update.shape[1] % 2:
            return "MLX has gate_up_proj and down_proj of experts only: leave it out"
        return "MLX has no experts beside DoRA: convert with --to-lora" if "dora" in kinds else ""
    if update.kind == "low_rank" and "dora" in kinds:
        return "MLX has either DoRA or LoRA in all layers: convert with --to-lora"
    if len(update.shape) > 2:
        return "MLX has no updates of convolutions: leave it out"
    if _ONE_EXPERT.fullmatch(update.name):
        return "MLX has the experts of a layer in one tensor: leave single ones out"
    return "" if update.name.endswith(".weight") else "MLX has updates of modules' weights only"


@dataclass(frozen=True)
class _Entry:
    """Spooled factors as MLX lays them out, but for the rank and the scale of all.

    Attributes:
        module: MLX's name.
        a: (in, r), (V, r) of a table, or (E, r, in) of experts.
        b: (r, out), or (E, out, r).
        scale: of the product.
        magnitude: (out,), of DoRA.
        table: whether it is an embedding's.
    """

    module: str
    a: LazyTensor
    b: LazyTensor
    scale: float
    magnitude: LazyTensor | None = None
    table: bool = False

    @property
    def is_experts(self) -> bool:
        """Whether there is one pair for each expert."""
        return len(self.b.shape) == 3

    @property
    def rank(self) -> int:
        """Columns of the product's left factor."""
        return self.b.shape[2] if self.is_experts else self.b.shape[0]


def _entry(adapter: Adapter, update: LazyUpdate, found: LowRank | DoRA, spool: Spool) -> _Entry:
    module = update.name.removesuffix(".weight")
    table = _ours.is_table(adapter, update)
    magnitude = None
    if isinstance(found, DoRA):
        if found.axis != 0 or not isinstance(found.added, LowRank):
            raise InputError(
                f"{update.name}: MLX's DoRA has low-rank factors and the norms of rows: convert "
                "it with --to-lora"
            )
        magnitude = spool.add(f"{module}.m", found.magnitude)
        low_rank = found.added
    else:
        low_rank = found
    require_finite(update.name, low_rank.a, low_rank.b)
    turned = low_rank.transposed() if table else low_rank
    a, b = spool.add(module, turned.a.T), spool.add(module, turned.b.T)
    return _Entry(module, a, b, low_rank.scale, magnitude, table)


def _experts(
    adapter: Adapter, update: LazyUpdate, found: Experts, shared: list[str], spool: Spool
) -> list[_Entry]:
    require_finite(update.name, found.a, found.b)
    switch = switch_of(update, _model_type(adapter))
    parts: dict[str, Experts]
    if update.name.endswith(f".{DOWN}"):
        parts = {"down_proj": found}
    else:
        gate, up, same = halves(found)
        parts = {"gate_proj": gate, "up_proj": up}
        shared += [switch.rpartition(".")[0]] if same and switch else []
    return [
        _Entry(
            f"{switch}.{which}",
            spool.add(which, part.a.contiguous()),
            spool.add(which, part.b.contiguous()),
            part.scale,
        )
        for which, part in parts.items()
    ]


@dataclass
class _Layout:
    """What is the same for all updates, and what was done to those that had something else."""

    entries: list[_Entry]
    ranks: dict[str, int] = field(default_factory=dict)
    folds: dict[str, tuple[float, str]] = field(default_factory=dict)
    scales: dict[str, float] = field(default_factory=dict)
    rounded: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.rank = max((entry.rank for entry in self.entries), default=0)
        self.scale = most_common(e.scale for e in self.entries) if self.entries else DEFAULT_SCALE
        if self.scale == 0:  # nothing could be worked into b
            self.scale = next((e.scale for e in self.entries if e.scale), 1.0)

    def tensors(self, entry: _Entry, spool: Spool) -> list[LazyTensor]:
        """An update's tensors under their keys."""
        factor = entry.scale / self.scale
        original = entry.b.read()
        b = fold(original, factor, RUNTIME_TYPES)
        a = fold(entry.a.read(), 1.0, RUNTIME_TYPES)
        if entry.scale != self.scale:
            self.scales[entry.module] = entry.scale
        if factor != 1 and factor != 0:
            self.folds[entry.module] = factor, entry.b.dtype
        if not (a.exact and b.exact):
            self.rounded.append(entry.module)
        if entry.rank != self.rank:
            self.ranks[entry.module] = entry.rank
        found = [
            spool.add(
                f"{entry.module}.lora_a", self._padded(a.values, 1 if entry.is_experts else 0)
            ),
            spool.add(
                f"{entry.module}.lora_b", self._padded(b.values, 0 if entry.is_experts else 1)
            ),
        ]
        return found if entry.magnitude is None else [*found, entry.magnitude]

    def _padded(self, values: torch.Tensor, from_end: int) -> torch.Tensor:
        """A factor with zeros up to the rank of all, in the dimension so far from the last."""
        from torch.nn.functional import pad

        more = self.rank - values.shape[-1 - from_end]
        return pad(values, (0, 0) * from_end + (0, more)) if more else values

    def config(self, adapter: Adapter) -> dict[str, Any]:
        """adapter_config.json: in which modules of which layers MLX puts factors."""
        config: dict[str, Any] = {
            "fine_tune_type": "full",
            "model": adapter.base_name,
            "num_layers": -1,  # all; layers without factors in the file stay as they are
            "lora_parameters": None,
        }
        if self.entries:
            dora = any(entry.magnitude is not None for entry in self.entries)
            config["fine_tune_type"] = "dora" if dora else "lora"
            keys = {_key(entry.module) for entry in self.entries}
            config["lora_parameters"] = {
                "rank": self.rank, "scale": self.scale, "dropout": 0.0, "keys": sorted(keys),
            }  # fmt: skip
        return config


def _key(module: str) -> str:
    """What MLX's config calls a module: by its name in its layer, or outside of layers whole."""
    match = _LAYER.fullmatch(module)
    return module if match is None else match["inside"]
