"""Output that is either complete or not there.

Everything is written into a hidden sibling of the target directory, synced, and renamed into
place at the end. A run that is killed leaves only that sibling, which holds a lock while its
process lives; the next run for the same target removes it once the lock is free.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from loratool.errors import InputError, LoratoolError, OutputError
from loratool.reports import format_bytes

_SPARE_BYTES = 1 << 20  # headers, configs and directory entries
# What the place of the output can cause.
_PLACE_ERRORS = {
    errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.EFBIG, errno.EIO,
    errno.ENAMETOOLONG, errno.EXDEV, errno.EBUSY, errno.ENOTEMPTY, errno.EEXIST, errno.ENOENT,
}  # fmt: skip


@contextmanager
def atomic_directory(target: Path, overwrite: bool, needed: int = 0) -> Iterator[Path]:
    """Yield an empty directory that becomes `target` when the block ends without an exception.

    Args:
        target: the directory to make; its parents are created if need be, and removed again if
            nothing comes of it.
        overwrite: whether a non-empty `target` may be replaced.
        needed: bytes that will be written, checked against the free space first.

    Raises:
        OutputError: `target` is taken, the disk is too small, or the place is not writable.
        InputError: a file that the block reads has gone or cannot be read.
    """
    check_target(target, overwrite)
    target = target.resolve()  # through links and `..`: what is replaced is a directory
    created: list[Path] = []
    try:
        check_space(_existing(target.parent), needed)
        created = _make_parents(target.parent)
        _remove_leftovers(target)
        temporary, lock = _claim(target)
    except OSError as error:
        _remove_empty(created)
        raise OutputError(f"{target}: cannot be written: {error.strerror}") from error
    try:
        temporary.chmod(0o777 & ~_umask())
        yield temporary
        sync_tree(temporary)
        _rename_into_place(temporary, target, overwrite)
    except OSError as error:
        explained = _explained(error, target, temporary)
        if explained is None:
            raise
        raise explained from error
    finally:
        os.close(lock)
        shutil.rmtree(temporary, ignore_errors=True)
        if not target.exists():
            _remove_empty(created)


def _explained(error: OSError, target: Path, temporary: Path) -> LoratoolError | None:
    """What an error of the operating system means for the user; None if it is a bug of ours."""
    if isinstance(error.filename, str | bytes):
        file = Path(os.fsdecode(error.filename))
        ours = {target, target.parent, temporary}
        if file not in ours and temporary not in file.parents:
            return InputError(f"{file}: cannot be read: {error.strerror}")
    if error.errno in _PLACE_ERRORS:
        return OutputError(f"{target}: cannot be written: {error.strerror}")
    return None


def check_target(target: Path, overwrite: bool) -> None:
    """Raise OutputError unless `target` is free, empty, or may be overwritten."""
    try:
        if target.is_dir():
            if target.resolve().is_mount():
                raise OutputError(f"{target}: is a mount point; choose a directory below it")
            if not any(target.iterdir()):
                return
            if not overwrite:
                raise OutputError(
                    f"{target}: exists and is not empty; choose another -o, or replace it with "
                    "--overwrite"
                )
            _check_replaceable(target)
        elif target.exists() or target.is_symlink():
            raise OutputError(f"{target}: exists and is not a directory; choose another -o")
    except OSError as error:
        raise OutputError(f"{target}: cannot be written: {error.strerror}") from error


def _check_replaceable(target: Path) -> None:
    """Raise OutputError for what nobody means to lose: where one works, and one's home."""
    places = [Path.cwd()]
    with suppress(RuntimeError):  # nobody's home
        places.append(Path.home())
    for place in places:
        here = place.resolve()
        if target.resolve() in (here, *here.parents):
            raise OutputError(
                f"{target}: --overwrite would remove {place} with everything in it; choose "
                "another -o"
            )


def _existing(folder: Path) -> Path:
    """The innermost directory that is already there."""
    while not folder.exists():
        folder = folder.parent
    if not folder.is_dir():
        raise OutputError(f"{folder}: is not a directory; choose another -o")
    return folder


def _make_parents(folder: Path) -> list[Path]:
    """Create `folder`; the directories that did not exist before, innermost first."""
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:
        _remove_empty(missing)
        raise
    return missing


def _remove_empty(folders: list[Path]) -> None:
    for folder in folders:
        with suppress(OSError):
            folder.rmdir()


def _claim(target: Path) -> tuple[Path, int]:
    """Make the hidden sibling, and open and lock it."""
    while True:
        temporary = Path(tempfile.mkdtemp(prefix=_prefix(target), dir=target.parent))
        with suppress(FileNotFoundError):
            handle = os.open(temporary, os.O_RDONLY)
            _lock(handle, wait=True)
            if temporary.exists():
                return temporary, handle
            os.close(handle)
        # Another run took it for a leftover before it was locked: once more.


def _prefix(target: Path) -> str:
    return f".{target.name}.partial-"


def _lock(handle: int, wait: bool) -> bool:
    """Lock a directory until it is closed; False where it is taken or cannot be locked (NFS)."""
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except OSError:
        return False
    return True


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _remove_leftovers(target: Path) -> None:
    for entry in target.parent.iterdir():
        if not entry.name.startswith(_prefix(target)):
            continue
        try:
            handle = os.open(entry, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
        except OSError:
            continue
        try:
            if _lock(handle, wait=False):  # else its process is alive
                shutil.rmtree(entry, ignore_errors=True)
        finally:
            os.close(handle)


def check_space(folder: Path, needed: int) -> None:
    """Raise OutputError unless `needed` bytes and some spare ones fit on the folder's disk."""
    free = shutil.disk_usage(folder).free
    if needed and needed + _SPARE_BYTES > free:
        raise OutputError(
            f"{folder}: {format_bytes(needed)} are needed, {format_bytes(free)} are free; "
            "nothing was written; make room, or choose another -o"
        )


def sync_tree(folder: Path) -> None:
    """Have everything below a folder, and its names, on the disk."""
    for path in [folder, *folder.rglob("*")]:
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def _rename_into_place(temporary: Path, target: Path, overwrite: bool) -> None:
    check_target(target, overwrite)  # it may have appeared meanwhile
    if not target.is_dir() or not any(target.iterdir()):
        temporary.rename(target)
    elif not _exchange(temporary, target):
        aside = temporary.with_name(f"{temporary.name}.old")
        target.rename(aside)
        try:
            temporary.rename(target)
        except OSError:
            aside.rename(target)
            raise
        shutil.rmtree(aside)
    handle = os.open(target.parent, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _exchange(one: Path, other: Path) -> bool:
    """Swap two directories in one step (Linux renameat2); False where that cannot be done."""
    if not sys.platform.startswith("linux"):
        return False
    at_cwd, exchange = -100, 2
    try:
        renameat2 = ctypes.CDLL(None, use_errno=True).renameat2
    except AttributeError:
        return False
    return bool(renameat2(at_cwd, bytes(one), at_cwd, bytes(other), exchange) == 0)
