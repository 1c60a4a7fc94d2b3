"""From a reference to a lazy checkpoint or adapter: store, then format."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from loratool import plugins
from loratool.adapter import Adapter
from loratool.checkpoint import Checkpoint
from loratool.errors import FormatError, InputError, PluginError
from loratool.files import is_file
from loratool.json_files import MANIFEST, read_json
from loratool.refs import parse_ref

# What else a path may hold: plugin kind, and what a person calls it.
_OTHERS = {
    "checkpoint": ("adapter_formats", "an adapter"),
    "adapter": ("checkpoint_formats", "a whole model"),
}


def resolve(ref: str | Path) -> Path:
    """The local path of a reference.

    Raises:
        InputError: it does not exist, or no store can fetch it.
    """
    parsed = parse_ref(ref)
    broken: list[str] = []
    for store in _usable("stores", broken):
        if store.holds(parsed):
            found: Path = store.fetch(parsed)
            return found
    hint = "; if it is a name on the Hub, download it first" if parsed.repo else "; check the path"
    raise InputError(f"{parsed.text or repr('')}: no such file or directory{hint}{_list(broken)}")


def open_checkpoint(ref: str | Path) -> Checkpoint:
    """Open a checkpoint by headers only.

    Raises:
        InputError: nothing is there, or it cannot be read.
        FormatError: no format recognises it, its files contradict themselves, or hold nothing.
    """
    path = resolve(ref)
    checkpoint: Checkpoint = _detect("checkpoint_formats", path, "checkpoint").open(path)
    if not checkpoint:
        raise FormatError(f"{path}: holds no tensors; download it again")
    return checkpoint


def open_adapter(ref: str | Path) -> Adapter:
    """Open an adapter by headers only; what is wrong inside is collected in its `problems`.

    Raises:
        InputError: nothing is there, or it cannot be read.
        FormatError: no format recognises it.
    """
    path = resolve(ref)
    adapter: Adapter = _detect("adapter_formats", path, "adapter").open(path)
    return replace(adapter, base_digests=_base_digests(path))


def open_any(ref: str | Path) -> Adapter | Checkpoint:
    """Open an adapter, or else a checkpoint; the errors of both."""
    return open_adapter(ref) if _is_held("adapter_formats", resolve(ref)) else open_checkpoint(ref)


def _base_digests(path: Path) -> Mapping[str, str]:
    """What the adapter's manifest, if it has one, says of the base's tensors."""
    file = path / MANIFEST
    if not is_file(file):
        return {}
    base = read_json(file).get("base")
    digests = base.get("tensors") if isinstance(base, dict) else None
    if not isinstance(digests, dict):
        return {}
    return {str(name): str(digest) for name, digest in digests.items()}


def _detect(kind: str, path: Path, what: str) -> Any:
    broken: list[str] = []
    for plugin in _usable(kind, broken):
        if plugin.detect(path):
            return plugin
    raise FormatError(
        f"{path}: holds no {what} that loratool can read "
        f"(tried: {', '.join(plugins.names(kind))}){_hint(path, what)}{_list(broken)}"
    )


def _usable(kind: str, broken: list[str]) -> Iterator[Any]:
    """The plugins of a kind; one that cannot be had is passed over, and told to `broken`."""
    for name in plugins.names(kind):
        try:
            plugin = plugins.create(kind, name)
        except PluginError as error:
            broken.append(str(error))
            continue
        yield plugin


def _list(broken: list[str]) -> str:
    return "".join(f"\n  {message}" for message in broken)


def _hint(path: Path, what: str) -> str:
    """What the path may have been confused with."""
    kind, name = _OTHERS[what]
    if what == "adapter" and is_file(path) and _is_held("adapter_formats", path.parent):
        return f"; name its directory, {path.parent}"
    return f"; it is {name}" if _is_held(kind, path) else ""


def _is_held(kind: str, path: Path) -> bool:
    try:
        return any(plugin.detect(path) for plugin in _usable(kind, []))
    except InputError:
        return False
