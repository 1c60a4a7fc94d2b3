"""Files that may not be here yet: reading one that lies elsewhere brings it.

A *mirror* is a directory of this machine that stands for a remote one. What is known of its files
without having them (that they are there, how long they are) is asked here, and so are their first
bytes; `local` brings a whole file. For every other path these functions do what `pathlib` does, so
that formats read all inputs through them alike. Stores make mirrors; files of a mirror are never
written.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from threading import Lock
from typing import Protocol

from loratool.errors import InputError

# Files that are opened through pickle, which may hold code.
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")


@dataclass(frozen=True)
class Mirror:
    """A directory that stands for a remote one.

    Attributes:
        name: what people call it: "org/name@revision".
        folder: the directory, absolute; it holds the files that were brought already.
        sizes: the names of all remote files, relative to it, -> their bytes.
        start: reads at most so many bytes from a file's beginning, without bringing the file.
        fetch: brings a file to its place in the folder, and checks it.
    """

    name: str
    folder: Path
    sizes: Mapping[str, int]
    start: Callable[[str, int], bytes]
    fetch: Callable[[str], object]
    _locks: dict[str, Lock] = field(init=False, repr=False)
    _starts: dict[str, bytes] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        absent = (name for name in self.sizes if not (self.folder / name).exists())
        object.__setattr__(self, "_locks", {name: Lock() for name in absent})

    @property
    def absent(self) -> Collection[str]:
        """The files that were not brought yet."""
        return self._locks.keys()

    def beginning(self, name: str, count: int) -> bytes:
        """As `start`, once for all formats that look at a file to find out whether it is theirs."""
        known = self._starts.get(name, b"")
        if len(known) < min(count, self.sizes[name]):
            known = self._starts[name] = self.start(name, count)
        return known[:count]

    def bring(self, name: str) -> None:
        """Fetch a file unless it is here; several threads may ask at a time."""
        if (lock := self._locks.get(name)) is None:
            return
        with lock:
            if name in self._locks:
                self.fetch(name)
                del self._locks[name]


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
    if mirror is None:
        return None
    name = path.relative_to(mirror.folder).as_posix()
    return (mirror, name) if name in mirror.absent else None


def named(text: str) -> str:
    """A text with the places of mirrors called by the mirrors' names."""
    for folder, mirror in _mirrors.items():
        text = text.replace(str(folder), mirror.name)
    return text


def absent_bytes(path: Path) -> int:
    """How much would have to be brought to have everything below a path."""
    if (mirror := mirror_of(path)) is None:
        return 0
    below = (name for name in mirror.absent if (mirror.folder / name).is_relative_to(path))
    return sum(mirror.sizes[name] for name in below)


class Watcher(Protocol):
    """Is told of files that are brought."""

    def begin(self, name: str, size: int) -> Callable[[int], None]:
        """A file of so many bytes begins to come; what is returned is told how many came."""
        ...


_watchers: list[Watcher] = []


@contextmanager
def watched_by(watcher: Watcher) -> Iterator[None]:
    """Tell a watcher of all files that are brought inside the block."""
    _watchers.append(watcher)
    try:
        yield
    finally:
        _watchers.remove(watcher)


def bringing(name: str, size: int) -> Callable[[int], None]:
    """For stores: announce a file; what is returned is to be told the bytes of each piece."""
    told = [watcher.begin(name, size) for watcher in _watchers]

    def advance(count: int) -> None:
        for tell in told:
            tell(count)

    return advance


def is_file(path: Path) -> bool:
    """Whether there is such a file, here or there."""
    return _absent(path) is not None or path.is_file()


def is_dir(path: Path) -> bool:
    """Whether there is such a directory, here or there."""
    mirror = mirror_of(path)
    if mirror is None:
        return path.is_dir()
    inside = PurePosixPath(path.relative_to(mirror.folder).as_posix())
    return any(inside in PurePosixPath(name).parents for name in mirror.sizes)


def entries(folder: Path) -> list[Path]:
    """What lies in a directory, sorted.

    Raises:
        InputError: it cannot be read.
    """
    mirror = mirror_of(folder)
    if mirror is not None:
        inside = PurePosixPath(folder.relative_to(mirror.folder).as_posix())
        paths = (PurePosixPath(name) for name in mirror.sizes)
        names = {p.relative_to(inside).parts[0] for p in paths if inside in p.parents}
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
    return path.stat().st_size if found is None else found[0].sizes[found[1]]


def read_start(path: Path, count: int) -> bytes:
    """At most `count` bytes from a file's beginning; OSError as `open`."""
    found = _absent(path)
    if found is not None:
        return found[0].beginning(found[1], count)
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
    if (found := _absent(path)) is not None:
        found[0].bring(found[1])
    return path
