"""From a reference to a lazy checkpoint or adapter: store, then format."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from loratool import plugins
from loratool.adapter import Adapter
from loratool.checkpoint import Checkpoint
from loratool.errors import FormatError, InputError
from loratool.refs import parse_ref


def resolve(ref: str | Path) -> Path:
    """The local path of a reference.

    Raises:
        InputError: it does not exist, or no store can fetch it.
    """
    parsed = parse_ref(ref)
    for name in plugins.names("stores"):
        store = plugins.create("stores", name)
        if store.holds(parsed):
            found: Path = store.fetch(parsed)
            return found
    raise InputError(f"{parsed.text}: no such file or directory")


def open_checkpoint(ref: str | Path) -> Checkpoint:
    """Open a checkpoint by headers only.

    Raises:
        InputError: nothing is there, or it cannot be read.
        FormatError: no format recognises it, or its files contradict themselves.
    """
    path = resolve(ref)
    checkpoint: Checkpoint = _detect("checkpoint_formats", path, "checkpoint").open(path)
    return checkpoint


def open_adapter(ref: str | Path) -> Adapter:
    """Open an adapter by headers only; what is wrong inside is collected in its `problems`.

    Raises:
        InputError: nothing is there, or it cannot be read.
        FormatError: no format recognises it.
    """
    path = resolve(ref)
    adapter: Adapter = _detect("adapter_formats", path, "adapter").open(path)
    return adapter


def _detect(kind: str, path: Path, what: str) -> Any:
    tried = plugins.names(kind)
    for name in tried:
        plugin = plugins.create(kind, name)
        if plugin.detect(path):
            return plugin
    raise FormatError(f"{path}: holds no {what} that loratool can read (tried: {', '.join(tried)})")
