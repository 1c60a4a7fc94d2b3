"""A cache of remote directories whose files come when they are read.

One state of one URL has one directory, named by a digest of both, so that two states never mix.
"""

from __future__ import annotations

import atexit
import fcntl
import hashlib
import json
import os
import re
import shutil
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from loratool.errors import InputError
from loratool.files import Mirror, add_mirror, bringing
from loratool_plugins.stores._fsspec_errors import ReadError, reading
from loratool_plugins.stores._fsspec_http import web_pieces
from loratool_plugins.stores._fsspec_listing import describe_again
from loratool_plugins.stores._fsspec_place import Listing, Place, RemoteFile

_BLOCK = 8 << 20
_BLOCKS_AT_ONCE = 4
_TRIES = 3  # without a single byte in between
_PAUSE_SECONDS = 0.3
# Files of a store that says nothing of changes are kept for this process only.
_PROCESS = uuid.uuid4().hex


def mirror(place: Place, listing: Listing) -> Path:
    """Make a state of a place known as a mirror; the path that stands for the place.

    Raises:
        InputError: the cache cannot be written.
    """
    source = _Source(place, listing, _home(place, listing))
    try:
        source.folder.mkdir(parents=True, exist_ok=True)
        source.remove_damaged()
    except OSError as error:
        raise _unwritable(source.home, error) from error
    sizes = {name: file.size for name, file in listing.files.items()}
    name = place.name.rstrip("/")
    if listing.single:
        name = name.rpartition("/")[0]
    add_mirror(Mirror(name, source.folder, sizes, source.start, source.fetch))
    return source.folder / next(iter(sizes)) if listing.single else source.folder


def _home(place: Place, listing: Listing) -> Path:
    base = os.environ.get("XDG_CACHE_HOME") or ""
    if not Path(base).is_absolute():
        base = str(Path("~/.cache").expanduser())
    state = [place.url, sorted((name, f.size, f.stamp) for name, f in listing.files.items())]
    lasts = all(file.stamp for file in listing.files.values())
    key = json.dumps([*state, "" if lasts else _PROCESS])
    home = Path(base).resolve() / "loratool" / "fsspec" / hashlib.sha256(key.encode()).hexdigest()
    if not lasts:
        atexit.register(shutil.rmtree, home, ignore_errors=True)
    return home


def _unwritable(path: Path, error: OSError) -> InputError:
    return InputError(
        f"{path}: cannot be written: {error.strerror or error}; make room, or set XDG_CACHE_HOME "
        "to another directory"
    )


@dataclass(frozen=True)
class _Source:
    """One state of a place.

    Attributes:
        place: the place.
        listing: what lay there.
        home: the directory of this state, for `folder` and what has come of files so far.
    """

    place: Place
    listing: Listing
    home: Path

    @property
    def folder(self) -> Path:
        """Where whole files are; its last part is like the URL's, for names made of it."""
        last = self.place.name.rstrip("/").rpartition("/")[2]
        return self.home / (re.sub(r"[^\w.-]", "_", last).strip(".")[:100] or "files")

    def remove_damaged(self) -> None:
        """Remove files that are not as long as they were when they came."""
        for name, file in self.listing.files.items():
            path = self.folder / name
            if path.is_file() and path.stat().st_size != file.size:
                path.unlink()

    def start(self, name: str, count: int) -> bytes:
        """The first bytes of a file."""
        data = bytearray()
        file = self.listing.files[name]
        transfer(self.place, file, 0, min(count, file.size), data.extend)
        return bytes(data)

    def fetch(self, name: str) -> None:
        """Bring a whole file, going on where an earlier try stopped.

        Raises:
            InputError: it cannot be had, is not as long as listed, or was changed since.
        """
        file, target = self.listing.files[name], self.folder / name
        partial = self.home / f"{hashlib.sha256(name.encode()).hexdigest()[:16]}.partial"
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            with partial.open("ab") as output:
                with suppress(OSError):  # some network file systems have no locks
                    fcntl.flock(output, fcntl.LOCK_EX)
                if target.exists():  # another process was faster
                    return
                position = os.fstat(output.fileno()).st_size
                if position > file.size:
                    output.truncate(position := 0)
                self._bring(name, file, position, output.write)
                output.flush()
                if describe_again(self.place, file).stamp != file.stamp:
                    output.truncate(0)
                    raise InputError(
                        f"{self.place.name}: {name} was changed while it was read; run it again"
                    )
                os.fsync(output.fileno())
                partial.rename(target)
        except OSError as error:
            raise _unwritable(self.home, error) from error

    def _bring(
        self, name: str, file: RemoteFile, position: int, write: Callable[[bytes], object]
    ) -> None:
        tell = bringing(name, file.size)
        tell(position)

        def take(piece: bytes) -> None:
            write(piece)
            tell(len(piece))

        transfer(self.place, file, position, file.size, take)


def transfer(
    place: Place, file: RemoteFile, begin: int, end: int, take: Callable[[bytes], object]
) -> None:
    """Hand the bytes begin to end of a file to `take`, through some interruptions.

    Raises:
        ReadError: it cannot be read, or ends too early.
    """
    tries = 0
    pieces = web_pieces if place.is_web else _pieces
    while begin < end:
        try:
            for piece in pieces(place, file, begin, end):
                take(piece)
                begin, tries = begin + len(piece), 0
            if begin < end:
                raise ReadError(
                    f"{place.name}: {file.path.rpartition('/')[2]} ended after {begin} bytes, but "
                    f"{file.size} were announced; run it again",
                    again=True,
                )
        except ReadError as error:
            tries += 1
            if not error.again or tries >= _TRIES:
                raise
            time.sleep(_PAUSE_SECONDS * tries)


def _pieces(place: Place, file: RemoteFile, begin: int, end: int) -> Iterator[bytes]:
    """Blocks of a file, some at a time."""
    name = file.path.rpartition("/")[2]
    while begin < end:
        starts = list(range(begin, end, _BLOCK))[:_BLOCKS_AT_ONCE]
        ends = [min(start + _BLOCK, end) for start in starts]
        with place.lock, reading(place, name):
            blocks = place.fs.cat_ranges([file.path] * len(starts), starts, ends, on_error="raise")
        for block, start, stop in zip(blocks, starts, ends, strict=True):
            yield block
            if len(block) != stop - start:
                return
        begin = ends[-1]
