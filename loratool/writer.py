"""Files of checkpoints and adapters, written as their tensors are computed.

Where shapes are known the header comes first and every tensor is written at its offset; where
ranks are known only after computing, tensors are spooled and the header is put in front.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

from loratool.checkpoint import RECORD, Checkpoint, Extent, LazyTensor
from loratool.errors import InputError
from loratool.files import file_size, local
from loratool.safetensors_file import build_header, whole_file
from loratool.shards import index_name

if TYPE_CHECKING:
    import torch

    from loratool.plugins import Executor

_COPY_CHUNK = 8 << 20


def write_file(path: Path, content: bytes) -> None:
    """Write a small file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)


def _inside(folder: Path, name: str) -> Path:
    """Where a file called `name` goes; InputError if that is not below `folder`."""
    path = PurePosixPath(name)
    if not path.parts or path.is_absolute() or ".." in path.parts or "\0" in name:
        raise InputError(f"{name!r}: a model's file must lie inside its directory")
    return folder / path


def write_side_files(files: Mapping[str, Path | bytes], folder: Path) -> None:
    """Write or copy a model's side files.

    Raises:
        InputError: a name would leave the folder, is taken by a weight file, or the file cannot
            be read.
    """
    for name, content in files.items():
        target = _inside(folder, name)
        if target.exists():
            raise InputError(f"{name}: is the name of a side file and of a weight file; rename it")
        if isinstance(content, bytes):
            write_file(target, content)
            continue
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            source = local(content).open("rb")
        except OSError as error:
            raise InputError(f"{content}: cannot be read: {error.strerror}") from error
        with source, target.open("xb") as written:
            shutil.copyfileobj(source, written)


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
    files = weight_files(checkpoint)
    for file, tensors in files.items():
        write_weight_file(checkpoint, file, tensors, folder, executor, progress)
    write_side_files({**index_files(checkpoint, files), **checkpoint.side_files}, folder)
    write_side_files({f"{RECORD}/{n}": file for n, file in checkpoint.record.items()}, folder)


def weight_files(checkpoint: Checkpoint) -> dict[str, dict[str, LazyTensor]]:
    """File name -> the tensors that go into it, in order."""
    files: dict[str, dict[str, LazyTensor]] = {}
    for name, tensor in checkpoint.items():
        files.setdefault(checkpoint.shards[name], {})[name] = tensor
    return files


def write_weight_file(
    checkpoint: Checkpoint,
    file: str,
    tensors: Mapping[str, LazyTensor],
    folder: Path,
    executor: Executor,
    progress: Callable[[str, int], None],
) -> None:
    """Write one of a checkpoint's `weight_files`; copied as it is where it exists already."""
    path = _inside(folder, file)
    path.parent.mkdir(parents=True, exist_ok=True)
    metadata = checkpoint.metadata.get(file, {"format": "pt"})
    header = checkpoint.headers.get(file)
    stored = checkpoint.as_stored(tensors)
    source = _unchanged_file(stored, metadata)
    if source is None or header is not None:
        names = dict(zip(stored, tensors, strict=True))

        def written(name: str, size: int) -> None:
            progress(names[name], size)

        write_safetensors(path, stored, metadata, executor, written, header)
        return
    _copy_file(source, path)
    for name, tensor in tensors.items():
        progress(name, tensor.nbytes)


def index_files(
    checkpoint: Checkpoint, files: Mapping[str, Mapping[str, LazyTensor]]
) -> dict[str, Path | bytes]:
    """The indexes of a checkpoint's `weight_files`, by name; none for a file that is alone.

    Those of another checkpoint's files, kept as they were, win.
    """
    if checkpoint.index_files:
        return dict(checkpoint.index_files)
    indexes: dict[str, list[str]] = {}
    for file in files:
        indexes.setdefault(index_name(file), []).append(file)
    return {
        name: _index((file, checkpoint.as_stored(files[file])) for file in together)
        for name, together in indexes.items()
        if len(together) > 1
    }


def _unchanged_file(tensors: Mapping[str, LazyTensor], metadata: Mapping[str, str]) -> Path | None:
    """The file that holds exactly these tensors, in this order, under this metadata, if any."""
    if (found := whole_file(tensors)) is None:
        return None
    source, header = found
    # A merge adds the format that transformers asks for; for that alone no header is rewritten.
    same = {"format": "pt", **header.metadata} == {"format": "pt", **metadata}
    return source if same else None


def _copy_file(source: Path, path: Path) -> None:
    handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
    try:
        copy_extent(Extent(source, 0, file_size(source)), handle, 0)
    finally:
        os.close(handle)


def _index(files: Iterable[tuple[str, Mapping[str, LazyTensor]]]) -> bytes:
    holders: dict[str, str] = {}
    size = 0
    for file, tensors in files:
        holders |= dict.fromkeys(tensors, PurePosixPath(file).name)
        size += sum(tensor.nbytes for tensor in tensors.values())
    content = {"metadata": {"total_size": size}, "weight_map": dict(sorted(holders.items()))}
    return (json.dumps(content, indent=2) + "\n").encode()


def write_safetensors(
    path: Path,
    tensors: Mapping[str, LazyTensor],
    metadata: Mapping[str, str],
    executor: Executor,
    progress: Callable[[str, int], None] = lambda name, size: None,
    header: bytes | None = None,
) -> None:
    """Write tensors to one file: the header first, then every tensor at its offset.

    Args:
        path: the file, which must not exist.
        tensors: what to write, in this order.
        metadata: the file's `__metadata__`.
        executor: runs one task a tensor.
        progress: is told each tensor's name and bytes as it is done, in order.
        header: the header to write instead of one made of `tensors` and `metadata`; it must
            describe these tensors in this order.
    """
    header = header or build_header(((n, t.dtype, t.shape) for n, t in tensors.items()), metadata)
    write_in_order(path, header, tensors, executor, progress)
    _check_readable(path)


def write_in_order(
    path: Path,
    header: bytes,
    tensors: Mapping[str, LazyTensor],
    executor: Executor,
    progress: Callable[[str, int], None],
) -> None:
    """Write a file of a header and the bytes of tensors, one after the other, without gaps.

    Args:
        path: the file, which must not exist.
        header: what it begins with.
        tensors: what follows, in this order.
        executor: runs one task a tensor.
        progress: is told each tensor's name and bytes as it is done, in order.
    """
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
    return block.contiguous().reshape(-1).view(torch.uint8).numpy().data


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
    source = os.open(local(extent.path), os.O_RDONLY)
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
        """Append a tensor; what is returned can be read, or copied from its extent."""
        from loratool.dtypes import dtype_name

        offset = self._file.tell()
        data = tensor_bytes(tensor)
        self._file.write(data)
        self._file.flush()
        extent = Extent(self._path, offset, len(data))
        dtype, shape = tensor.dtype, tuple(tensor.shape)

        def blocks() -> Iterator[torch.Tensor]:
            import torch

            with extent.path.open("rb") as file:
                file.seek(extent.offset)
                raw = bytearray(file.read(extent.length))
            yield torch.frombuffer(raw, dtype=dtype).view(shape) if raw else tensor.new_empty(shape)

        return LazyTensor(name, dtype_name(dtype), shape, blocks, str(self._path), extent)
