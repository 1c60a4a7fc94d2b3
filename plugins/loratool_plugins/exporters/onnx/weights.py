"""Weights on their way from a checkpoint into a graph's external data, block by block."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import numpy as np
import onnx_ir as ir
import torch

from loratool.checkpoint import Checkpoint, LazyTensor
from loratool.errors import InputError, VerificationError
from loratool.shell import Shell
from loratool.sources import Sources
from loratool.writer import tensor_bytes

_ALIGNMENT = 64
# Constants below this stay in the graph file; parameters never do.
_INLINE_BYTES = 1024
# Blocks are cast in pieces of this many elements, however large they come.
_PIECE = 4 << 20


@dataclass(frozen=True)
class Written:
    """Where the tensors of a checkpoint lie in an external data file.

    Attributes:
        path: the file.
        places: name in the checkpoint -> offset in bytes, and the type it was cast to.
        constants: how many constants of the graph the file holds as well.
    """

    path: Path
    places: Mapping[str, tuple[int, torch.dtype]]
    constants: int

    def check(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Compare the file with the tensors that it should hold, bit by bit.

        Raises:
            VerificationError: a tensor is not what was written.
        """
        stored = np.memmap(self.path, np.uint8, "r") if self.places else np.empty(0, np.uint8)
        for name, (offset, dtype) in self.places.items():
            for piece in _cast_pieces([tensors[name]], dtype):
                data = np.frombuffer(tensor_bytes(piece), np.uint8)
                if not np.array_equal(data, stored[offset : offset + data.size]):
                    raise VerificationError(
                        f"{self.path.name}: {name} is not what the checkpoint gives when it is "
                        "read again; did an input change meanwhile?"
                    )
                offset += data.size


def write_weights(
    graph: ir.Graph,
    checkpoint: Checkpoint,
    shell: Shell,
    sources: Sources,
    path: Path,
    progress: Callable[[str], None],
) -> Written:
    """Stream a checkpoint into an external data file and make the graph's initializers refer to it.

    Tensors come in the checkpoint's order, each once however many names it has, cast to the
    model's types. Large constants of the graph follow.

    Args:
        graph: the traced graph; its initializers' values are replaced.
        checkpoint: where the values come from; read once.
        shell: the traced model, for the types.
        sources: as `resolve` found them for `checkpoint` and `shell`.
        path: the data file; must not exist, lies beside the graph's file.
        progress: is told each tensor's name before it is written.

    Raises:
        InputError: a value is beyond the range of the type it is exported as.
    """
    state = shell.model.state_dict()
    users: dict[str, list[ir.Value]] = {}
    for name, value in graph.initializers.items():
        if name in sources.keys:
            users.setdefault(sources.keys[name], []).append(value)
    places: dict[str, tuple[int, torch.dtype]] = {}
    constants = 0
    with path.open("xb") as file:
        for key in (key for key in checkpoint if key in users):
            progress(key)
            offset = _align(file)
            dtype = state[str(users[key][0].name)].dtype
            for piece in _checked_pieces(checkpoint[key], dtype):
                file.write(tensor_bytes(piece))
            for value in users[key]:
                _refer(value, path, offset, file.tell() - offset)
            places[key] = (offset, dtype)
        for name, value in graph.initializers.items():
            if name not in sources.keys and _write_constant(value, file, path):
                constants += 1
        file.flush()
        os.fsync(file.fileno())
    return Written(path, places, constants)


def _align(file: IO[bytes]) -> int:
    file.write(bytes(-file.tell() % _ALIGNMENT))
    return file.tell()


def _cast_pieces(blocks: Iterable[torch.Tensor], dtype: torch.dtype) -> Iterator[torch.Tensor]:
    """A tensor's elements cast to `dtype`, in pieces of bounded size."""
    for block in blocks:
        for piece in torch.split(block.reshape(-1), _PIECE):
            yield piece.to(dtype)


def _checked_pieces(tensor: LazyTensor, dtype: torch.dtype) -> Iterator[torch.Tensor]:
    count = 0
    for piece in _cast_pieces(tensor.blocks(), dtype):
        if dtype == torch.float16 and bool(piece.isinf().any()):
            raise InputError(
                f"{tensor.origin or 'checkpoint'}: {tensor.name} has values beyond the range "
                "of fp16; export as fp32"
            )
        count += piece.numel()
        yield piece
    if count != tensor.numel:
        raise AssertionError(f"{tensor.name}: {count} of {tensor.numel} elements came")


def _refer(value: ir.Value, path: Path, offset: int, length: int) -> None:
    """Let an initializer take its bytes from the data file."""
    old = value.const_value
    assert old is not None  # every initializer of a traced graph has a placeholder
    value.const_value = ir.ExternalTensor(
        path.name, offset, length, old.dtype, shape=ir.Shape(old.shape), name=str(value.name),
        base_dir=path.parent,
    )  # fmt: skip


def _write_constant(value: ir.Value, file: IO[bytes], path: Path) -> bool:
    """Move a constant made by tracing to the data file if it is large; whether it was."""
    tensor = value.const_value
    assert tensor is not None
    if isinstance(getattr(tensor, "raw", None), torch.nn.Parameter):
        raise AssertionError(f"{value.name}: a parameter that has lost its name in tracing")
    if tensor.nbytes < _INLINE_BYTES:
        return False
    offset = _align(file)
    file.write(tensor.tobytes())
    _refer(value, path, offset, file.tell() - offset)
    return True
