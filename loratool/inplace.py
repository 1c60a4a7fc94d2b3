"""A model's files replaced where they lie, so that a kill half-way loses nothing.

New files are written to `.loratool-switch/` inside the model's directory and synced; then a commit
file says that they are complete, config.json (of a diffusers folder: model_index.json) is moved
aside, the files are renamed over the old ones, and the new config.json comes last. Killed before
the commit, the model is the old one; killed after it, nobody takes it for a model until `complete`
has finished the renames.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import stat
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from loratool.checkpoint import MODEL_INDEX, RECORD, SWITCH, SWITCH_COMMIT
from loratool.errors import InputError, OutputError
from loratool.json_files import read_json
from loratool.places import check_space, sync_tree


@contextmanager
def staged(folder: Path, needed: int) -> Iterator[Path]:
    """Yield an empty directory for new files; they replace the old ones with `commit`.

    Args:
        folder: the model's directory.
        needed: bytes that will be written.

    Raises:
        OutputError: another process is at work in it, it is not writable, or the disk is too small.
    """
    handle = _locked(folder)
    staging = folder / SWITCH
    try:
        check_space(folder, needed)
        shutil.rmtree(staging, ignore_errors=True)  # of a run that was killed before its commit
        (staging / "new").mkdir(parents=True)
        yield staging / "new"
    except OSError as error:
        if error.filename is None or folder in Path(os.fsdecode(error.filename)).parents:
            raise OutputError(f"{folder}: cannot be changed: {error.strerror}") from error
        raise
    finally:
        if not (folder / SWITCH_COMMIT).exists():
            shutil.rmtree(staging, ignore_errors=True)
        os.close(handle)


def commit(folder: Path, removed: Iterable[str]) -> None:
    """Decide that the staged files replace the old ones, and replace them.

    Args:
        folder: the model's directory, inside `staged`.
        removed: old files that the new model does not have.
    """
    new = folder / SWITCH / "new"
    config = folder / config_name(folder)
    if config.exists() and not (new / config.name).exists():
        shutil.copyfile(config, new / config.name)
    files = [p.relative_to(new).as_posix() for p in sorted(new.rglob("*")) if p.is_file()]
    require_own_files(folder, [*files, *removed])
    sync_tree(new)
    draft = folder / SWITCH / "draft.json"
    draft.write_text(json.dumps({"removed": sorted(removed)}))
    _sync(draft)
    _sync(draft.parent)
    _sync(folder)
    draft.rename(folder / SWITCH_COMMIT)
    _sync(draft.parent)
    _finish(folder)


def complete(folder: Path) -> bool:
    """Finish a switch that was killed after its commit; whether there was one.

    Raises:
        OutputError: another process is at work in the directory, or it is not writable.
    """
    if not (folder / SWITCH_COMMIT).exists():
        return False
    handle = _locked(folder)
    try:
        if not (folder / SWITCH_COMMIT).exists():
            return False
        _finish(folder)
    except OSError as error:
        raise OutputError(f"{folder}: cannot be changed: {error.strerror}") from error
    finally:
        os.close(handle)
    return True


def config_name(folder: Path) -> str:
    """The file in a model's directory without which nobody takes it for a model."""
    return MODEL_INDEX if (folder / MODEL_INDEX).exists() else "config.json"


def _finish(folder: Path) -> None:
    """The renames; each is done at most once, so that they can be taken up anywhere."""
    staging = folder / SWITCH
    new = staging / "new"
    removed = read_json(folder / SWITCH_COMMIT).get("removed", [])
    config = config_name(new)
    if (new / config).exists() and (folder / config).exists():
        (folder / config).rename(staging / "old-config.json")
        _sync(folder)
    if (new / RECORD).exists():
        if (folder / RECORD).exists():
            (folder / RECORD).rename(staging / "old-record")
        (new / RECORD).rename(folder / RECORD)
    for path in sorted(new.rglob("*")):
        if path.is_file() and path != new / config:
            target = folder / path.relative_to(new)
            target.parent.mkdir(parents=True, exist_ok=True)
            path.rename(target)
    for name in removed:
        with suppress(FileNotFoundError):
            (folder / name).unlink()
    _sync(folder)
    if (new / config).exists():
        (new / config).rename(folder / config)
        _sync(folder)
    (folder / SWITCH_COMMIT).unlink()
    shutil.rmtree(staging)


def require_own_files(folder: Path, names: Iterable[str]) -> None:
    """Refuse to replace files that belong to others as well.

    Raises:
        InputError: one is a link or is reached through one, or has several hard links: it lies in
            a Hub cache, or another model shares it.
    """
    for name in names:
        path = folder / name
        inner = [path, *(p for p in path.parents if folder in p.parents)]
        if any(part.is_symlink() for part in inner):
            raise InputError(
                f"{path}: is a link: other models may share what it leads to; copy the model "
                "(cp -rL) and switch the copy"
            )
        with suppress(FileNotFoundError):
            found = path.lstat()
            if stat.S_ISREG(found.st_mode) and found.st_nlink > 1:
                raise InputError(
                    f"{path}: has {found.st_nlink} hard links: other models share it; copy the "
                    "model and switch the copy"
                )


def _locked(folder: Path) -> int:
    """Open a directory and lock it; OutputError if another process has."""
    try:
        handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    except OSError as error:
        raise OutputError(f"{folder}: cannot be changed: {error.strerror}") from error
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(handle)
        raise OutputError(f"{folder}: another process is changing it; wait for it") from None
    except OSError:  # file systems without locks (NFS)
        return handle
    return handle


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
