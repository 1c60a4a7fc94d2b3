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
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

from loratool.checkpoint import Checkpoint, Extent, LazyTensor
from loratool.errors import InputError, OutputError
from loratool.reports import format_bytes
from loratool.safetensors_file import build_header

if TYPE_CHECKING:
    import torch

    from loratool.plugins import Executor

_COPY_CHUNK = 8 << 20
_SPARE_BYTES = 1 << 20  # headers, configs and directory entries


@contextmanager
def atomic_directory(target: Path, overwrite: bool, needed: int = 0) -> Iterator[Path]:
    """Yield an empty directory that becomes `target` when the block ends without an exception.

    Args:
        target: the directory to make; its parent is created if need be.
        overwrite: whether a non-empty `target` may be replaced.
        needed: bytes that will be written, checked against the free space first.

    Raises:
        OutputError: `target` is taken, the disk is too small, or the place is not writable.
    """
    target = target.absolute()
    check_target(target, overwrite)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        _remove_leftovers(target)
        _check_space(target.parent, needed)
        temporary = Path(tempfile.mkdtemp(prefix=f".{target.name}.partial-", dir=target.parent))
    except OSError as error:
        raise OutputError(f"{target}: cannot be written: {error.strerror}") from error
    lock = os.open(temporary, os.O_RDONLY)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        temporary.chmod(0o777 & ~_umask())
        yield temporary
        _sync_tree(temporary)
        _rename_into_place(temporary, target, overwrite)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EFBIG):
            raise OutputError(f"{target}: cannot be written: {error.strerror}") from error
        raise
    finally:
        os.close(lock)
        shutil.rmtree(temporary, ignore_errors=True)


def check_target(target: Path, overwrite: bool) -> None:
    """Raise OutputError unless `target` is free, empty, or may be overwritten."""
    if target.is_dir():
        if not overwrite and any(target.iterdir()):
            raise OutputError(f"{target}: exists and is not empty; --overwrite replaces it")
    elif target.exists() or target.is_symlink():
        raise OutputError(f"{target}: exists and is not a directory; choose another -o")


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _remove_leftovers(target: Path) -> None:
    for entry in target.parent.glob(f".{target.name}.partial-*"):
        try:
            handle = os.open(entry, os.O_RDONLY)
        except OSError:
            continue
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(entry, ignore_errors=True)
        except BlockingIOError:
            pass  # its process is alive
        finally:
            os.close(handle)


def _check_space(folder: Path, needed: int) -> None:
    free = shutil.disk_usage(folder).free
    if needed and needed + _SPARE_BYTES > free:
        raise OutputError(
            f"{folder}: {format_bytes(needed)} are needed, {format_bytes(free)} are free; "
            "nothing was written"
        )


def _sync_tree(folder: Path) -> None:
    for path in [folder, *folder.rglob("*")]:
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def _rename_into_place(temporary: Path, target: Path, overwrite: bool) -> None:
    check_target(target, overwrite)  # it may have appeared meanwhile
    if target.is_dir() and any(target.iterdir()):
        if not _exchange(temporary, target):
            aside = temporary.with_name(f"{temporary.name}.old")
            target.rename(aside)
            temporary.rename(target)
            shutil.rmtree(aside)
    else:
        temporary.rename(target)
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
    return renameat2(at_cwd, bytes(one), at_cwd, bytes(other), exchange) == 0


def write_file(path: Path, content: bytes) -> None:
    """Write a small file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)


def write_side_files(files: Mapping[str, Path | bytes], folder: Path) -> None:
    """Write or copy a model's side files.

    Raises:
        InputError: a name would leave the folder, or a file cannot be read.
    """
    for name, content in files.items():
        parts = PurePosixPath(name).parts
        if not parts or PurePosixPath(name).is_absolute() or ".." in parts:
            raise InputError(f"{name!r}: a side file must lie inside the model's directory")
        try:
            data = content if isinstance(content, bytes) else content.read_bytes()
        except OSError as error:
            raise InputError(f"{content!r}: cannot be read: {error.strerror}") from error
        write_file(folder / name, data)


def write_checkpoint(
    checkpoint: Checkpoint, folder: Path, executor: Executor, progress: Callable[[str, int], None]
) -> None:
    """Write a checkpoint as safetensors into `folder`, in the shards that it names.

    Args:
        checkpoint: tensors with `shards`; each file keeps the order of the mapping.
        folder: an existing, empty directory.
        executor: runs one task a tensor.
        progress: is told each tensor's name and bytes as it is done.
    """
    files: dict[str, dict[str, LazyTensor]] = {}
    for name, tensor in checkpoint.items():
        files.setdefault(checkpoint.shards[name], {})[name] = tensor
    for file, tensors in files.items():
        metadata = checkpoint.metadata.get(file, {"format": "pt"})
        write_safetensors(folder / file, tensors, metadata, executor, progress)
    if len(files) > 1:
        write_file(folder / "model.safetensors.index.json", _index(checkpoint))
    write_side_files(checkpoint.side_files, folder)


def _index(checkpoint: Checkpoint) -> bytes:
    import json

    content = {
        "metadata": {"total_size": checkpoint.nbytes},
        "weight_map": {name: checkpoint.shards[name] for name in sorted(checkpoint)},
    }
    return (json.dumps(content, indent=2) + "\n").encode()


def write_safetensors(
    path: Path,
    tensors: Mapping[str, LazyTensor],
    metadata: Mapping[str, str],
    executor: Executor,
    progress: Callable[[str, int], None] = lambda name, size: None,
) -> None:
    """Write tensors to one file: the header first, then every tensor at its offset."""
    header = build_header(((n, t.dtype, t.shape) for n, t in tensors.items()), metadata)
    offsets = {}
    position = len(header)
    for name, tensor in tensors.items():
        offsets[name] = position
        position += tensor.nbytes
    handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666)
    try:
        os.truncate(handle, position)
        _write_all(handle, header, 0)

        def write(name: str) -> str:
            _write_tensor(handle, tensors[name], offsets[name])
            return name

        for name in executor.map(write, tensors):
            progress(name, tensors[name].nbytes)
    finally:
        os.close(handle)
    _check_readable(path)


def _write_tensor(handle: int, tensor: LazyTensor, offset: int) -> None:
    if tensor.extent is not None:
        copy_extent(tensor.extent, handle, offset)
        return
    end = offset + tensor.nbytes
    for block in tensor.blocks():
        offset += _write_all(handle, tensor_bytes(block), offset)
    if offset != end:
        raise AssertionError(f"{tensor.name}: {end - offset} bytes missing")


def tensor_bytes(block: torch.Tensor) -> memoryview:
    """A tensor's little-endian bytes, without a copy where it is contiguous."""
    import torch

    if not block.numel():
        return memoryview(b"")
    return memoryview(block.contiguous().reshape(-1).view(torch.uint8).numpy())


def _write_all(handle: int, data: bytes | memoryview, offset: int) -> int:
    """pwrite until everything is written; the number of bytes."""
    view, done = memoryview(data), 0
    while done < len(view):
        done += os.pwrite(handle, view[done:], offset + done)
    return done


def copy_extent(extent: Extent, handle: int, offset: int) -> None:
    """Copy a byte range between files, inside the kernel where it can.

    Raises:
        InputError: the source has become shorter than its header said.
    """
    source = os.open(extent.path, os.O_RDONLY)
    try:
        done = 0
        while done < extent.length:
            count = _copy_some(
                source, handle, extent.length - done, extent.offset + done, offset + done
            )
            if count == 0:
                raise InputError(f"{extent.path}: became shorter while it was read")
            done += count
    finally:
        os.close(source)


def _copy_some(source: int, handle: int, count: int, at: int, to: int) -> int:
    if hasattr(os, "copy_file_range"):
        try:
            return os.copy_file_range(source, handle, count, at, to)
        except OSError as error:  # across file systems, or not supported by this one
            if error.errno not in (errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP):
                raise
    return _write_all(handle, os.pread(source, min(count, _COPY_CHUNK), at), to)


def _check_readable(path: Path) -> None:
    """Have the reference implementation read the header that we wrote."""
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        file.keys()


class Spool:
    """A file that tensors of unknown number and size are appended to, until their header is known.

    Use as a context manager: the file is removed at the end.
    """

    def __init__(self, folder: Path) -> None:
        self._path = folder / ".spool"
        self._file = self._path.open("xb")

    def __enter__(self) -> Spool:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()
        self._path.unlink()

    def add(self, name: str, tensor: torch.Tensor) -> LazyTensor:
        """Append a tensor; what is returned can be written from its extent."""
        from loratool.dtypes import dtype_name

        offset = self._file.tell()
        data = tensor_bytes(tensor)
        self._file.write(data)
        self._file.flush()
        extent = Extent(self._path, offset, len(data))
        dtype = dtype_name(tensor.dtype)
        return LazyTensor(name, dtype, tuple(tensor.shape), _no_blocks, str(self._path), extent)


def _no_blocks() -> Iterator[torch.Tensor]:
    raise AssertionError("a spooled tensor is copied from its extent")
