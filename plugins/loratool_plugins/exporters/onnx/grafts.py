"""A folder of grafts: graphs of one base with different adapters, which share the base's weights.

    base.onnx.data            the base's external data, once
    math.onnx, math.data      a graph, and the initializers that its adapter changes
    code.onnx, code.data      another
    loratool.json             what lies there

A graph is added under hidden names, synced and renamed into place, its data first and the manifest
last; whatever else lies in the folder is not touched.
"""

from __future__ import annotations

import fcntl
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loratool.checkpoint import Extent
from loratool.digests import file_digest
from loratool.errors import InputError, MismatchError, OutputError, UsageError
from loratool.files import local
from loratool.json_files import MANIFEST, manifest, read_json
from loratool.places import atomic_directory, check_space, sync_tree
from loratool.writer import copy_extent

KIND = "onnx-grafts"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+-]*")
_RESERVED = ("base", "loratool", "config")


@dataclass(frozen=True)
class Names:
    """The files of one graph."""

    name: str

    @property
    def graph(self) -> str:
        """The graph's file."""
        return f"{self.name}.onnx"

    @property
    def data(self) -> str:
        """The file of what the adapters change."""
        return f"{self.name}.data"


def graph_name(labels: Sequence[str]) -> str:
    """What the graph of some adapters is called: by their own names.

    Args:
        labels: paths or names on the Hub, in order; none for the base itself.
    """
    stems = [re.sub(r"[^A-Za-z0-9._+-]+", "-", Path(label).name).strip("-.") for label in labels]
    name = "+".join(filter(None, stems)) or "model"
    return f"{name}-graph" if name in _RESERVED else name


def check_name(name: str) -> None:
    """Raise UsageError unless a graph can be called so."""
    if not _NAME.fullmatch(name) or name in _RESERVED or name.endswith(".onnx"):
        raise UsageError(
            f"the name {name!r} cannot be that of a graph: use letters, digits, '.', '_', '-' and "
            f"'+', and none of {', '.join(_RESERVED)}; it makes NAME.onnx and NAME.data"
        )


@dataclass(frozen=True)
class Shared:
    """The base's files that all graphs of a folder refer to.

    Attributes:
        digest: identifies the base's graph file.
        files: name in the folder -> the file that it is to be, or what writes it.
    """

    digest: str
    files: Mapping[str, Path | Callable[[Path], None]]


@dataclass(frozen=True)
class Workplace:
    """Where a graph is being made.

    Attributes:
        folder: an existing directory for the graph's two files.
        shared: how each shared file came: "there already", "linked", "copied" or "written".
        complete: whether the shared files can be read in `folder` too.
    """

    folder: Path
    shared: Mapping[str, str]
    complete: bool = True


@contextmanager
def adding(
    target: Path, names: Names, shared: Shared, overwrite: bool, link: bool, needed: int
) -> Iterator[tuple[Workplace, Callable[[Mapping[str, Any]], None]]]:
    """Make a graph that joins a folder of grafts when the block ends without an exception.

    Yields where to write the graph's two files, and what takes the graph's entry for the manifest,
    which must be called.

    Args:
        target: the folder: new, empty, or with grafts of the same base.
        names: of the graph's files.
        shared: the base's files.
        overwrite: whether a graph of this name may be replaced.
        link: whether shared files may be hard links to the base's own.
        needed: bytes that the graph's files take.

    Raises:
        OutputError: the folder holds something else, or has a graph of this name; or it cannot be
            written.
        MismatchError: it holds grafts of another base.
    """
    check_name(names.name)
    entry: dict[str, Any] = {}
    if target.is_dir() and any(target.iterdir()):
        with _joining(target, names, shared, overwrite, link, needed) as (place, old):
            yield place, entry.update
            _publish(target, place.folder, names, _manifest(target, shared, old, names, entry))
        return
    for file in shared.files.values():
        if isinstance(file, Path):
            needed += file.stat().st_size
    with atomic_directory(target, False, needed) as folder:
        yield Workplace(folder, _bring(shared, folder, link, {})), entry.update
        content = _manifest(folder, shared, {}, names, entry)
        (folder / MANIFEST).write_bytes(manifest(content))


def _manifest(
    folder: Path, shared: Shared, old: Mapping[str, Any], names: Names, entry: Mapping[str, Any]
) -> dict[str, Any]:
    graphs = {**old.get("graphs", {}), names.name: dict(entry)}
    stamps = {
        name: _stamps(local(file), folder / name)
        for name, file in shared.files.items()
        if isinstance(file, Path)
    }
    base = {"digest": shared.digest, "files": sorted(shared.files), "stamps": stamps}
    return {"kind": KIND, "base": base, "graphs": dict(sorted(graphs.items()))}


@contextmanager
def _joining(
    target: Path, names: Names, shared: Shared, overwrite: bool, link: bool, needed: int
) -> Iterator[tuple[Workplace, Mapping[str, Any]]]:
    """A hidden folder inside a folder of grafts, which nobody else changes meanwhile."""
    check_space(target, needed)
    lock = os.open(target, os.O_RDONLY)
    temporary: Path | None = None
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        old = _check(target, names, shared, overwrite)
        # Nobody else holds the lock, so what begins like this was left by a run that was killed.
        for rest in target.glob(".*.partial-*"):
            shutil.rmtree(rest, ignore_errors=True)
        brought = _bring(shared, target, link, old["base"].get("stamps", {}))
        temporary = Path(tempfile.mkdtemp(prefix=f".{names.name}.partial-", dir=target))
        yield Workplace(temporary, brought, _linked_beside(shared, target, temporary)), old
    except OSError as error:
        inside = isinstance(error.filename, str) and target in Path(error.filename).parents
        if error.filename is not None and not inside:
            raise
        raise OutputError(f"{target}: cannot be written: {error.strerror}") from error
    finally:
        if temporary is not None:
            shutil.rmtree(temporary, ignore_errors=True)
        os.close(lock)


def _check(target: Path, names: Names, shared: Shared, overwrite: bool) -> dict[str, Any]:
    """The manifest of a folder that a graph may be added to."""
    try:
        found = read_json(target / MANIFEST)
    except InputError:
        found = {}
    if found.get("kind") != KIND:
        raise OutputError(
            f"{target}: exists and holds no grafts; choose another -o, or an empty folder"
        )
    if found["base"]["digest"] != shared.digest:
        raise MismatchError(
            f"{target}: holds grafts of another base ({', '.join(found['graphs'])}): graphs that "
            "share weights must be grafted on the same ONNX file; choose another -o"
        )
    taken = [file for file in (names.graph, names.data) if (target / file).exists()]
    if taken and not (overwrite and names.name in found["graphs"]):
        raise OutputError(
            f"{target / taken[0]}: exists; choose another --name, or replace it with --overwrite"
        )
    return found


def _bring(shared: Shared, folder: Path, link: bool, stamps: Mapping[str, Any]) -> dict[str, str]:
    """Have the base's files in a folder; how each came.

    A file that is there is compared with the base's, unless `stamps` say that neither was written
    to since they were found equal.
    """
    brought = {}
    for name, source in shared.files.items():
        place = folder / name
        partial = folder / f".{name}.partial-file"
        partial.unlink(missing_ok=True)
        if isinstance(source, Path):
            source = local(source)
            if place.exists():
                if stamps.get(name) != _stamps(source, place):
                    _require_same(source, place)
                brought[name] = "there already"
                continue
            brought[name] = _link_or_copy(source, partial, link)
        else:
            source(partial)
            if place.exists():
                _require_same(partial, place)
                partial.unlink()
                brought[name] = "there already"
                continue
            brought[name] = "written"
        with partial.open("rb") as file:
            os.fsync(file.fileno())
        partial.rename(place)
    return brought


def _linked_beside(shared: Shared, target: Path, temporary: Path) -> bool:
    """Have the shared files in a temporary folder too; False where there are no hard links."""
    try:
        for name in shared.files:
            os.link(target / name, temporary / name)
    except OSError:
        return False
    return True


def _stamps(source: Path, place: Path) -> list[list[int]]:
    """Sizes and times of the base's file and of the one in the folder."""
    found = (source.stat(), place.stat())
    return [[status.st_size, status.st_mtime_ns] for status in found]


def _link_or_copy(source: Path, place: Path, link: bool) -> str:
    if link:
        try:
            os.link(source.resolve(), place)
            return "linked"
        except OSError:  # another file system, or one without hard links
            pass
    handle = os.open(place, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
    try:
        # Inside the kernel, and without a second copy where the file system can share blocks.
        copy_extent(Extent(source, 0, source.stat().st_size), handle, 0)
    finally:
        os.close(handle)
    return "copied"


def _require_same(source: Path, place: Path) -> None:
    if source.samefile(place):
        return
    same = source.stat().st_size == place.stat().st_size
    if not same or file_digest(source) != file_digest(place):
        raise MismatchError(
            f"{place}: is not {source}, though the graphs are the same: the weights of one of them "
            "have changed; choose another -o"
        )


def _publish(target: Path, temporary: Path, names: Names, content: Mapping[str, Any]) -> None:
    """Move a finished graph into place, and only then tell of it."""
    (temporary / MANIFEST).write_bytes(manifest(content))
    sync_tree(temporary)
    # A graph that is replaced goes first: it must never be seen with the new one's data.
    (target / names.graph).unlink(missing_ok=True)
    for file in (names.data, names.graph, MANIFEST):
        (temporary / file).replace(target / file)
    handle = os.open(target, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
