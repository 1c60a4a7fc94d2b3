"""What a format cannot say of an adapter: kept in the metadata of its files, under one key.

So that an adapter that loratool wrote comes back whole, without its base, from any format.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

from loratool.adapter import Adapter, LazyUpdate
from loratool.errors import FormatError
from loratool.families import is_embedding
from loratool.files import entries, is_dir, is_file
from loratool.json_files import MANIFEST, read_json

KEY = "loratool"
_KEPT = (
    "model_type", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim",
    "hidden_size",
)  # fmt: skip


def text_of(adapter: Adapter, said: Collection[str] = (), **more: Any) -> str:
    """The metadata of an adapter, as JSON.

    Args:
        adapter: what is written.
        said: the names of those `Adapter` fields that the format can say itself.
        more: what the format wants to remember besides; plain JSON values.
    """
    facts: dict[str, Any] = {
        "dropped": list(adapter.dropped),
        "tied": dict(adapter.tied),
        "moves": [list(move) for move in adapter.moves],
        "task_type": adapter.task_type,
        "base_name": adapter.base_name,
        "base_revision": adapter.base_revision,
        "base_config": shape_of(adapter.base_config),
        "naming": adapter.naming,
        "layout": {name: [list(row) for row in rows] for name, rows in adapter.layout.items()},
        "rslora": adapter.rslora,
        "short_targets": {name: sorted(found) for name, found in adapter.short_targets.items()},
        "transposed": [name for name, update in adapter.items() if update.transposed],
        "settings": dict(adapter.settings),
    }
    kept = {name: value for name, value in facts.items() if name not in said and value}
    return json.dumps({**kept, **more}, sort_keys=True)


def parsed(text: str | None, label: str) -> dict[str, Any]:
    """The metadata as plain data, {} if there is none; FormatError naming `label` otherwise."""
    try:
        found = json.loads(text or "{}")
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict):
        raise FormatError(f"{label}: its {KEY} metadata is not a JSON object")
    return found


def restored(ours: Mapping[str, Any], label: str) -> dict[str, Any]:
    """The fields of an `Adapter` that the metadata tells.

    Raises:
        FormatError: one of them is not what loratool writes.
    """
    found: dict[str, Any] = {}
    try:
        for name in ("dropped", "transposed"):
            found[name] = tuple(map(_text, ours.get(name, ())))
        for name in ("task_type", "base_name", "base_revision", "naming"):
            if name in ours:
                found[name] = _text(ours[name])
        for name in ("tied", "short_targets", "settings"):
            found[name] = dict(ours.get(name, {}))
        if "base_config" in ours:
            found["base_config"] = dict(ours["base_config"])
        found["tied"] = {old: _text(new) for old, new in found["tied"].items()}
        found["short_targets"] = {
            name: frozenset(map(_text, modules)) for name, modules in found["short_targets"].items()
        }
        found["moves"] = tuple((_text(old), _text(new)) for old, new in ours.get("moves", ()))
        found["layout"] = layout_of(ours, label)
    except (TypeError, ValueError) as error:
        raise FormatError(f"{label}: its {KEY} metadata is not what loratool writes") from error
    found["rslora"] = ours.get("rslora") is True
    return found


def layout_of(ours: Mapping[str, Any], label: str) -> dict[str, tuple[tuple[str, int, int], ...]]:
    """`Adapter.layout`, if the metadata tells it; FormatError naming `label` otherwise."""
    try:
        return {
            name: tuple((_text(module), int(start), int(stop)) for module, start, stop in rows)
            for name, rows in ours.get("layout", {}).items()
        }
    except (AttributeError, TypeError, ValueError) as error:
        raise FormatError(f"{label}: its {KEY} metadata is not what loratool writes") from error


def shape_of(config: Mapping[str, Any] | None) -> dict[str, Any]:
    """What formats need of the base's config.json."""
    return {name: config[name] for name in _KEPT if name in config} if config else {}


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{value!r} is no text")
    return value


def model_files(path: Path) -> tuple[dict[str, Path], dict[str, Any] | None]:
    """The files under an adapter directory's model/, by name, and the config.json among them."""
    model = path / "model"
    if not is_dir(model):
        return {}, None
    found = {file.name: file for file in entries(model) if is_file(file)}
    return found, read_json(found["config.json"]) if "config.json" in found else None


def beside(
    path: Path, own: Iterable[Path]
) -> tuple[dict[str, Path], dict[str, Path], dict[str, Any] | None]:
    """What belongs to an adapter beside its own files.

    Args:
        path: its directory, or the one file that it is.
        own: the files of its format.

    Returns:
        `Adapter.files`, `Adapter.model_files` and `Adapter.model_config`.
    """
    models, config = model_files(path) if is_dir(path) else ({}, None)
    manifest = (path / MANIFEST,) if is_dir(path) else ()
    files = {file.name: file for file in (*own, *manifest) if is_file(file)}
    return files | {f"model/{name}": file for name, file in models.items()}, models, config


def is_table(adapter: Adapter, update: LazyUpdate) -> bool:
    """Whether an update is for an embedding's table, whose factors formats store transposed."""
    module = update.name.removesuffix(".weight")
    kind = adapter.kinds.get(update.name)
    return update.embedding or kind == "embedding" or (kind is None and is_embedding(module))
