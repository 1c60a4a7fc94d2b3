"""PEFT's adapter directory: adapter_config.json and adapter_model.safetensors."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from loratool.adapter import Adapter, FormatOptions, LazyUpdate, Rereading
from loratool.checkpoint import LazyTensor
from loratool.errors import FormatError, Problem
from loratool.files import is_file
from loratool.json_files import read_json
from loratool.updates import Kind, Update
from loratool.writer import Spool, write_file, write_safetensors
from loratool_plugins.adapter_formats import _ours, peft_config, peft_sparse
from loratool_plugins.adapter_formats._peft_dialects import PREFIX
from loratool_plugins.adapter_formats.peft_config import check_settings
from loratool_plugins.adapter_formats.peft_files import WEIGHTS, open_weights
from loratool_plugins.adapter_formats.peft_layout import plan_layout
from loratool_plugins.adapter_formats.peft_reader import Reader
from loratool_plugins.adapter_formats.peft_writer import CARRIES, refusals, spool_all
from loratool_plugins.executors.serial import Serial

if TYPE_CHECKING:
    import torch

_CONFIG = peft_config.FILE
# What PEFT's config says by itself.
_ON_MODULES = (
    "low_rank",
    "sparse",
    "dora",
    "loha",
    "lokr",
    "ia3",
)  # kinds that target_modules is for
_SAID = (
    "task_type", "base_name", "naming", "rslora", "short_targets", "settings",
)  # fmt: skip


@dataclass(frozen=True)
class Peft:
    """LoRA as the peft package saves it."""

    carries: ClassVar[frozenset[Kind]] = CARRIES

    def objection(self, path: Path) -> str:
        """Why it is no directory with PEFT's adapter_config.json."""
        if is_file(path):
            return "a file, not a directory"
        if not is_file(path / _CONFIG):
            return f"no {_CONFIG}"
        try:
            settings = read_json(path / _CONFIG)
        except FormatError:
            return ""  # opening it says what is wrong with the file
        if peft_config.is_of_adapters_library(settings):
            return ""  # opening it says why it is not merged
        return "" if "peft_type" in settings else f"peft_type is missing in {_CONFIG}"

    def refusals(self, adapter: Adapter) -> Iterable[Problem]:
        """What PEFT's settings, which hold for a whole adapter, cannot say."""
        return refusals(adapter)

    def open(self, path: Path) -> Adapter:
        """Open it by its headers; what is wrong inside is collected.

        Raises:
            InputError: a file is missing or cannot be read.
            FormatError: it is malformed, or of a kind that loratool cannot merge yet.
        """
        return _open(path, FormatOptions())

    def whole_bytes(self, adapter: Adapter, targets: Sequence[str], kept: Sequence[str]) -> int:
        """Bytes of tensors beside factors of `targets`: PEFT keeps modules whole."""
        layout = plan_layout(adapter, dict.fromkeys(targets, 1), kept)
        return sum(adapter.context[name].nbytes for name in layout.whole.values())

    def write(
        self, adapter: Adapter, results: Iterable[tuple[LazyUpdate, Update | None]], folder: Path
    ) -> None:
        """Write weights and config.

        Factors are spooled as they come: their ranks, and which modules have to be kept whole,
        are known only at the end.
        """
        with Spool(folder) as spool:
            plan = spool_all(adapter, results, spool)
            if not plan.written and not plan.replaced:
                return
            layout = plan.layout()
            tensors = dict(plan.tensors(layout))
            context = plan.adapter.context
            tensors |= {key: context[name] for key, name in layout.whole.items()}
            if layout.placeholder:
                tensors |= _placeholder(spool, plan.adapter, layout.placeholder)
            # Settings of formats of diffusion models come back with kohya's names for it.
            said = [name for name in _SAID if not (name == "settings" and adapter.layout)]
            entries = plan.entries(layout)
            more = {peft_sparse.KEY: list(entries)} if entries else {}
            metadata = {"format": "pt", _ours.KEY: _ours.text_of(adapter, said, **more)}
            write_safetensors(folder / WEIGHTS[0], tensors, metadata, Serial())
            if entries:
                merged = {key: t for parts in entries.values() for key, t in parts.items()}
                peft_sparse.write(folder, merged)
        config = plan.config(layout)
        write_file(folder / _CONFIG, (json.dumps(config, indent=2, sort_keys=True) + "\n").encode())


def _open(path: Path, options: FormatOptions) -> Adapter:
    """Open it with what its files do not say."""
    settings = read_json(path / _CONFIG)
    checked = check_settings(path / _CONFIG, settings)
    config = None if options.base is None else options.base.config
    weights = open_weights(path, settings, config)
    reader = Reader(checked, weights.tensors)
    updates = reader.updates()
    said = _ours.parsed(weights.metadata.get(_ours.KEY), str(weights.file))
    ours = _ours.restored(said, str(weights.file))
    if _ours.KEY in weights.metadata:
        updates = _oriented(updates, ours["transposed"])
    updates, misplaced = peft_sparse.with_entries(path, updates, said, weights.file)
    own = (path / _CONFIG, weights.file, path / peft_sparse.FILE)
    files, model_files, model_config = _ours.beside(path, own)
    return Adapter(
        updates,
        model_files=model_files,
        model_config=model_config,
        dropped=ours["dropped"],
        task_type=settings.get("task_type"),
        base_name=str(settings.get("base_model_name_or_path") or ""),
        base_revision=str(settings.get("revision") or ours.get("base_revision", "")),
        base_config=ours.get("base_config"),
        tied=ours["tied"],
        moves=ours["moves"],
        settings={**ours["settings"], **settings},
        layout=ours["layout"],
        context=reader.replaced,
        rslora=bool(settings.get("use_rslora")),
        short_targets=_short_targets(settings, updates),
        files=files,
        notes=(*weights.notes, *reader.notes),
        problems=(*weights.problems, *reader.problems, *misplaced),
        rereading=Rereading(frozenset({"base"}), updates, lambda told: _open(path, told))
        if weights.asks_for_base
        else None,
        path=path,
    )


def _oriented(
    updates: Mapping[str, LazyUpdate], transposed: Collection[str]
) -> dict[str, LazyUpdate]:
    """Experts' updates with what a file that loratool wrote says of how the base stores them."""

    def oriented(update: LazyUpdate) -> LazyUpdate:
        return replace(update, transposed=True if update.name in transposed else None)

    return {n: oriented(u) if u.kind == "experts" else u for n, u in updates.items()}


def _short_targets(
    settings: Mapping[str, Any], updates: Mapping[str, LazyUpdate]
) -> dict[str, frozenset[str]]:
    """The modules behind each plain entry of target_modules: PEFT adapted all that end in it."""
    targets = settings.get("target_modules")
    if not isinstance(targets, list) or any(
        settings.get(key) for key in ("layers_to_transform", "exclude_modules")
    ):
        return {}
    modules = [
        name.removesuffix(".weight")
        for name, update in updates.items()
        if name.endswith(".weight") and update.kind in _ON_MODULES
    ]
    found = {
        str(target): frozenset(m for m in modules if m == target or m.endswith(f".{target}"))
        for target in targets
        if "." not in str(target)
    }
    return {target: matching for target, matching in found.items() if matching}


def _placeholder(spool: Spool, adapter: Adapter, name: str) -> dict[str, LazyTensor]:
    """A zero update of rank 1: PEFT loads no adapter without a target."""
    import torch

    rows, columns = adapter.context[name].shape
    if adapter.kinds.get(name) == "conv1d":
        rows, columns = columns, rows
    module = PREFIX + name.removesuffix(".weight")
    zeros: list[tuple[str, torch.Tensor]] = [
        (f"{module}.lora_A.weight", torch.zeros(1, columns)),
        (f"{module}.lora_B.weight", torch.zeros(rows, 1)),
    ]
    return {key: spool.add(key, value) for key, value in zeros}
