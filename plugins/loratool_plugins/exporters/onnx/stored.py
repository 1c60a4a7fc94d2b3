"""Whether the weights in an external data file are a checkpoint's, to the bit."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np

from loratool.checkpoint import LazyTensor
from loratool.errors import InputError, VerificationError
from loratool.writer import tensor_bytes
from loratool_plugins.exporters.onnx.origins import assemble
from loratool_plugins.exporters.onnx.weights import Block


def check_stored(stored: Iterable[Block], tensors: Mapping[str, LazyTensor]) -> int:
    """Read a checkpoint again and compare files with it, a block at a time.

    Args:
        stored: what files hold, in the order in which the checkpoint is best read.
        tensors: the checkpoint.

    Returns:
        The bytes that were compared.

    Raises:
        VerificationError: a block is not what its tensors give, or its file is too short.
    """
    compared = 0
    files: dict[Path, np.ndarray[tuple[int], np.dtype[np.uint8]]] = {}
    for entry in stored:
        if entry.path not in files:
            empty = not entry.path.stat().st_size
            files[entry.path] = (
                np.empty(0, np.uint8) if empty else np.memmap(entry.path, np.uint8, "r")
            )
        compared += _compare(entry, tensors, files[entry.path])
    return compared


def _compare(
    entry: Block,
    tensors: Mapping[str, LazyTensor],
    file: np.ndarray[tuple[int], np.dtype[np.uint8]],
) -> int:
    offset = entry.offset
    try:
        for piece in assemble(entry.origin, tensors, entry.dtype):
            expected = np.frombuffer(tensor_bytes(piece), np.uint8)
            found = file[offset : offset + expected.size]
            offset += expected.size
            if found.size < expected.size:
                raise VerificationError(
                    f"{entry.path.name}: ends before {_name(entry)} does, at byte {file.size}"
                )
            if not np.array_equal(expected, found):
                raise VerificationError(_changed(entry))
    except InputError as error:  # beyond the range of a type: it was not when it was written
        raise VerificationError(f"{_changed(entry)} ({error})") from error
    return offset - entry.offset


def _changed(entry: Block) -> str:
    return (
        f"{entry.path.name}: {_name(entry)} is not what the checkpoint gives when read again; "
        "did an input change meanwhile?"
    )


def _name(entry: Block) -> str:
    return ", ".join(entry.origin.keys)
