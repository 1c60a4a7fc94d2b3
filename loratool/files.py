"""Files that may not be here yet: reading one that lies elsewhere brings it.

A *mirror* is a directory of this machine that stands for a remote one. What is known of its files
without having them (that they are there, how long they are) is asked here, and so are their first
bytes; `local` brings a whole file. For every other path these functions do what `pathlib` does, so
that formats read all inputs through them alike. Stores make mirrors; files of a mirror are never
written.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from loratool.errors import InputError


@dataclass(frozen=True)
class Mirror:
    """A directory that stands for a remote one.

    Attributes:
        folder: the directory, absolute; it holds the files that were brought already.
        sizes: the names of all remote files, relative to it, -> their bytes.
        start: reads at most so many bytes from a file's beginning, without bringing the file.
        fetch: brings a file to its place in the folder; may be called by several threads.
    """

    folder: Path
    sizes: Mapping[str, int]
    start: Callable[[str, int], bytes]
    fetch: Callable[[str], object]


_mirrors: dict[Path, Mirror] = {}


def add_mirror(mirror: Mirror) -> None:
    """Make a mirror known to this process; a later one for the same folder replaces it."""
    _mirrors[mirror.folder] = mirror


def mirror_of(path: Path) -> Mirror | None:
    """The mirror that a path lies in."""
    if not _mirrors:
        return None
    return next((_mirrors[p] for p in (path, *path.parents) if p in _mirrors), None)


def _absent(path: Path) -> tuple[Mirror, str] | None:
    """The mirror, and the name in it, of a file that was not brought yet."""
    mirror = mirror_of(path)
    if mirror is None or path == mirror.folder or path.exists():
        return None
    return mirror, path.relative_to(mirror.folder).as_posix()


def is_file(path: Path) -> bool:
    """Whether there is such a file, here or there."""
    found = _absent(path)
    return path.is_file() if found is None else found[1] in found[0].sizes


def is_dir(path: Path) -> bool:
    """Whether there is such a directory, here or there."""
    found = _absent(path)
    if found is None:
        return path.is_dir()
    return any(name.startswith(f"{found[1]}/") for name in found[0].sizes)


def entries(folder: Path) -> list[Path]:
    """What lies in a directory, sorted.

    Raises:
        InputError: it cannot be read.
    """
    mirror = mirror_of(folder)
    if mirror is not None:
        inside = folder.relative_to(mirror.folder).as_posix()
        names = {
            PurePosixPath(name).relative_to(inside).parts[0]
            for name in mirror.sizes
            if PurePosixPath(name).is_relative_to(inside)
        }
        return sorted(folder / name for name in names)
    try:
        return sorted(folder.iterdir())
    except OSError as error:
        raise InputError(f"{folder}: cannot be read: {error.strerror}") from error


def files_below(folder: Path) -> dict[str, Path]:
    """All files below a folder, by their names relative to it, sorted; {} if there is none."""
    mirror = mirror_of(folder)
    if mirror is None:
        paths = (path for path in folder.rglob("*") if path.is_file())
    else:
        everything = (mirror.folder / name for name in mirror.sizes)
        paths = (path for path in everything if path.is_relative_to(folder))
    return {path.relative_to(folder).as_posix(): path for path in sorted(paths)}


def file_size(path: Path) -> int:
    """A file's length in bytes; OSError as `Path.stat`."""
    found = _absent(path)
    if found is None or found[1] not in found[0].sizes:
        return path.stat().st_size
    return found[0].sizes[found[1]]


def read_start(path: Path, count: int) -> bytes:
    """At most `count` bytes from a file's beginning; OSError as `open`."""
    found = _absent(path)
    if found is not None and found[1] in found[0].sizes:
        return found[0].start(found[1], count)
    with path.open("rb") as file:
        return file.read(count)


def file_content(source: Path | bytes) -> bytes:
    """A file's content, or what stands for it."""
    return source if isinstance(source, bytes) else local(source).read_bytes()


def local(path: Path) -> Path:
    """The path itself, once its file is here.

    Raises:
        InputError: it cannot be brought.
    """
    found = _absent(path)
    if found is not None and found[1] in found[0].sizes:
        found[0].fetch(found[1])
    return path
