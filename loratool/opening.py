"""From a reference to a lazy checkpoint or adapter: store, then format."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from loratool import plugins
from loratool.adapter import Adapter
from loratool.checkpoint import Checkpoint
from loratool.errors import FormatError, InputError, PluginError, UnsupportedError
from loratool.files import entries, is_dir, is_file
from loratool.json_files import MANIFEST, read_json
from loratool.quantized import dequantized, notes_of
from loratool.refs import Ref, could_be_remote, parse_ref, shown
from loratool.reports import counted, listed

# What else a path may hold: plugin kind, and what a person calls it.
_OTHERS = {
    "checkpoint": ("adapter_formats", "an adapter"),
    "adapter": ("checkpoint_formats", "a whole model"),
}


@dataclass(frozen=True)
class Located:
    """A reference, and the path that stands for what it points to."""

    ref: Ref
    path: Path


Source = str | Path | Ref | Located


def locate(source: Source) -> Located:
    """Find what a reference points to; what is remote comes when it is read (`loratool.files`).

    Raises:
        InputError: it does not exist, or cannot be had.
    """
    if isinstance(source, Located):
        return source
    ref = source if isinstance(source, Ref) else parse_ref(source)
    store = store_of(ref)
    try:
        return Located(ref, store.fetch(ref))
    except InputError as error:
        if ref.repo is None or isinstance(source, Ref):
            raise
        raise InputError(f"{error}; and there is no local path of that name") from error


def store_of(ref: Ref) -> Any:
    """The store that holds a reference.

    Raises:
        InputError: none does.
    """
    broken: list[str] = []
    for _, store in _usable("stores", broken):
        if store.holds(ref):
            return store
    hint = "; check the path, or write a name on the Hub as org/name"
    raise InputError(
        f"{shown(ref.text) or repr('')}: no such file or directory{hint}{_list(broken)}"
    )


def open_checkpoint(source: Source) -> Checkpoint:
    """Open a checkpoint by headers only; a quantized one as the plain one that it stands for.

    Raises:
        InputError: nothing is there, or it cannot be read.
        FormatError: no format recognises it, its files contradict themselves, or hold nothing.
        UnsupportedError: it is quantized in a way that cannot be read.
    """
    return _as_plain(_open_stored(source))


def _as_plain(stored: Checkpoint) -> Checkpoint:
    """A checkpoint with the values that its tensors stand for; errors as `dequantized`."""
    plain = dequantized(stored)
    return replace(plain, notes=(*plain.notes, *notes_of(plain)))


def _open_stored(source: Source) -> Checkpoint:
    """A checkpoint with its tensors as they are stored."""
    located = locate(source)
    _, format = _detect("checkpoint_formats", located, "checkpoint")
    checkpoint: Checkpoint = format.open(located.path)
    if not checkpoint:
        raise FormatError(f"{located.path}: holds no tensors; download it again")
    notes = (*_notes(located.ref), *checkpoint.notes)
    return replace(checkpoint, hub_name=located.ref.repo or "", notes=notes)


def open_adapter(source: Source) -> Adapter:
    """Open an adapter by headers only; what is wrong inside is collected in its `problems`.

    Raises:
        InputError: nothing is there, or it cannot be read.
        FormatError: no format recognises it.
    """
    located = locate(source)
    name, format = _detect("adapter_formats", located, "adapter")
    return _opened(format.open(located.path), located, name)


def _opened(adapter: Adapter, located: Located, format: str) -> Adapter:
    """An adapter as its format read it, with what belongs to the place where it lies."""
    notes = (*_notes(located.ref), *adapter.notes)
    again = adapter.rereading
    if again is not None:
        read = again.read
        again = replace(again, read=lambda options: _opened(read(options), located, format))
    digests = _base_digests(located.path)
    return replace(adapter, base_digests=digests, notes=notes, format=format, rereading=again)


def open_any(source: Source) -> Adapter | Checkpoint:
    """Open an adapter, or else a checkpoint, to be looked at or sent; the errors of both.

    A checkpoint that is quantized in a way that cannot be read comes as it is stored.
    """
    located = locate(source)
    if is_adapter(located):
        return open_adapter(located)
    stored = _open_stored(located)
    try:
        return _as_plain(stored)
    except UnsupportedError as error:
        return replace(stored, notes=(*stored.notes, str(error)))


def is_adapter(located: Located) -> bool:
    """Whether there is an adapter."""
    return _is_held("adapter_formats", located.path)


def _notes(ref: Ref) -> tuple[str, ...]:
    if not could_be_remote(ref):
        return ()
    return (f"{ref.text}: taken as the local path, not as the name on the Hub",)


def _base_digests(path: Path) -> Mapping[str, str]:
    """What the adapter's manifest, if it has one, says of the base's tensors."""
    file = path / MANIFEST
    if is_file(path) or not is_file(file):
        return {}
    base = read_json(file).get("base")
    digests = base.get("tensors") if isinstance(base, dict) else None
    if not isinstance(digests, dict):
        return {}
    return {str(name): str(digest) for name, digest in digests.items()}


def format_of(kind: str, path: Path) -> str | None:
    """The name of the format that opens a path; None if none or several would."""
    claims, _ = _claims(kind, path, [])
    return next(iter(claims)) if len(claims) == 1 else None


def _detect(kind: str, located: Located, what: str) -> tuple[str, Any]:
    """The one format that a path is in, and its name.

    Raises:
        FormatError: there is none, or more than one.
    """
    path = located.path
    broken: list[str] = []
    claims, objections = _claims(kind, path, broken)
    if len(claims) == 1:
        return next(iter(claims.items()))
    if claims:
        raise FormatError(
            f"{path}: could be of the formats {' and '.join(claims)}: keep the files of one of "
            "them in a directory of their own"
        )
    tried = [f"{name}: {reason}" for name, reason in objections.items()]
    raise FormatError(
        f"{path}: holds no {what} that loratool can read{_hint(located, what)}; tried:"
        f"{_list(tried)}{_list(broken)}"
    )


def _claims(kind: str, path: Path, broken: list[str]) -> tuple[dict[str, Any], dict[str, str]]:
    """The formats that a path could be in, by name, without those that others refine; and why not.

    Raises:
        InputError: none could open it, and one cannot tell: a file cannot be read, or names
            contradict each other.
    """
    claims: dict[str, Any] = {}
    objections: dict[str, str] = {}
    error: InputError | None = None
    for name, plugin in _usable(kind, broken):
        try:
            reason = plugin.objection(path)
        except InputError as found:
            error = error or found
            continue
        if reason:
            objections[name] = reason
        else:
            claims[name] = plugin
    if error is not None and not claims:
        raise error
    coarser = {other for plugin in claims.values() for other in getattr(plugin, "refines", ())}
    return {n: plugin for n, plugin in claims.items() if n not in coarser}, objections


def _usable(kind: str, broken: list[str]) -> Iterator[tuple[str, Any]]:
    """The plugins of a kind; one that cannot be had is passed over, and told to `broken`."""
    for name in plugins.names(kind):
        try:
            plugin = plugins.create(kind, name)
        except PluginError as error:
            broken.append(str(error))
            continue
        yield name, plugin


def _list(broken: list[str]) -> str:
    return "".join(f"\n  {message}" for message in broken)


def _hint(located: Located, what: str) -> str:
    """What the path may have been confused with, or what it holds."""
    path = located.path
    kind, name = _OTHERS[what]
    if what == "adapter" and is_file(path) and _is_held("adapter_formats", path.parent):
        return f"; name its directory, {path.parent}"
    if _is_held(kind, path):
        return f"; it is {name}"
    if what == "adapter" and (inside := _adapters_inside(located)):
        return f"; it holds {counted(len(inside), 'adapter')} further down: {listed(inside, 8)}"
    names = [entry.name for entry in entries(path)] if is_dir(path) else []
    return f"; it holds {listed(names, 6)}" if names else ""


def _adapters_inside(located: Located) -> list[str]:
    """References to the adapters in subfolders."""
    ref, path = located.ref, located.path
    sign = ":" if ref.repo and not ref.subfolder else "/"
    folders = [folder for folder in entries(path) if is_dir(folder)] if is_dir(path) else []
    return [f"{ref.text}{sign}{f.name}" for f in folders if _is_held("adapter_formats", f)]


def _is_held(kind: str, path: Path) -> bool:
    try:
        return bool(_claims(kind, path, [])[0])
    except InputError:
        return False
