"""Weights on their way from a checkpoint into the external data of one or several graphs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import numpy as np
import onnx_ir as ir
import torch

from loratool.checkpoint import Checkpoint
from loratool.writer import tensor_bytes
from loratool_plugins.exporters.onnx.origins import Origin, assemble

# Graphics processors read aligned tensors faster, and some of their libraries no others.
ALIGNMENT = 256
# Constants below this stay in the graph file; parameters never do.
_INLINE_BYTES = 1024

DTYPES = {
    ir.DataType.FLOAT: torch.float32,
    ir.DataType.FLOAT16: torch.float16,
    ir.DataType.BFLOAT16: torch.bfloat16,
    ir.DataType.DOUBLE: torch.float64,
}


@dataclass(frozen=True)
class Block:
    """Values in an external data file.

    Attributes:
        path: the file.
        origin: which values.
        dtype: the type they were cast to.
        offset: in bytes.
        length: in bytes.
    """

    path: Path
    origin: Origin
    dtype: torch.dtype
    offset: int
    length: int


@dataclass(frozen=True)
class Written:
    """What external data files hold of a checkpoint.

    Attributes:
        blocks: every arrangement of tensors that a graph asks for, once.
        constants: how many constants of the graphs the files hold as well.
        files: all of them.
    """

    blocks: tuple[Block, ...]
    constants: int
    files: tuple[Path, ...]

    def in_several_layouts(self) -> dict[str, int]:
        """Tensors that were written more than once -> how many times."""
        seen: dict[str, int] = {}
        for block in self.blocks:
            for key in block.origin.keys:
                seen[key] = seen.get(key, 0) + 1
        return {key: count for key, count in seen.items() if count > 1}


@dataclass(frozen=True)
class Graph:
    """A graph whose weights are wanted.

    Attributes:
        name: of its file, without the suffix.
        model: the traced model.
        origins: initializer -> what it is made of.
    """

    name: str
    model: ir.Model
    origins: Mapping[str, Origin]


def write_weights(
    graphs: Sequence[Graph],
    checkpoint: Checkpoint,
    path: Path,
    progress: Callable[[str], None],
) -> Written:
    """Stream a checkpoint into an external data file and make the graphs' initializers refer to it.

    Whatever several initializers, of one graph or of several, have in common is written once.
    Values come in the checkpoint's order; large constants of the graphs follow. Initializers that
    refer to a file already are left as they are.

    Args:
        graphs: their initializers' values are replaced.
        checkpoint: where the values come from; every tensor is read once for each arrangement that
            it is part of.
        path: the data file; must not exist, lies beside the graphs' files. It is not made if there
            is nothing to write.
        progress: is told each tensor's name before it is written.

    Raises:
        InputError: a value is beyond the range of the type it is exported as.
    """
    users: dict[tuple[Origin, torch.dtype], list[ir.Value]] = {}
    for graph in graphs:
        for name, origin in graph.origins.items():
            value = graph.model.graph.initializers[name]
            if isinstance(value.const_value, ir.ExternalTensor):
                continue
            assert value.const_value is not None
            users.setdefault((origin, DTYPES[value.const_value.dtype]), []).append(value)
    place = {name: number for number, name in enumerate(checkpoint)}
    order = sorted(users, key=lambda asked: place[asked[0].keys[0]])
    blocks = []
    with path.open("xb") as file:
        for origin, dtype in order:
            progress(origin.keys[0])
            offset = _align(file)
            _write(file, assemble(origin, checkpoint, dtype), origin)
            blocks.append(Block(path, origin, dtype, offset, file.tell() - offset))
            for value in users[origin, dtype]:
                refer(value, path, offset, file.tell() - offset)
        constants = _write_constants(graphs, file, path)
    if not blocks and not constants:
        path.unlink()
        return Written((), 0, ())
    return Written(tuple(blocks), constants, (path,))


def _align(file: IO[bytes]) -> int:
    file.write(bytes(-file.tell() % ALIGNMENT))
    return file.tell()


def _write(file: IO[bytes], pieces: Iterable[torch.Tensor], origin: Origin) -> None:
    count = 0
    for piece in pieces:
        file.write(tensor_bytes(piece))
        count += piece.numel()
    if count != (wanted := int(np.prod(origin.shape, dtype=np.int64))):
        raise AssertionError(f"{', '.join(origin.keys)}: {count} of {wanted} elements came")


def refer(value: ir.Value, path: Path, offset: int, length: int) -> None:
    """Let an initializer take its bytes from a data file that lies beside the graph's."""
    old = value.const_value
    assert old is not None  # every initializer of a traced graph has a value that stands for it
    value.const_value = ir.ExternalTensor(
        path.name, offset, length, old.dtype, shape=ir.Shape(old.shape), name=str(value.name),
        base_dir=path.parent,
    )  # fmt: skip


def _write_constants(graphs: Sequence[Graph], file: IO[bytes], path: Path) -> int:
    """Move the large constants that tracing made to the data file, equal ones once."""
    written: dict[bytes, tuple[int, int]] = {}
    for value in _constants(graphs):
        tensor = value.const_value
        assert tensor is not None
        if tensor.nbytes < _INLINE_BYTES:
            continue
        data = tensor.tobytes()
        if data not in written:
            written[data] = (_align(file), len(data))
            file.write(data)
        refer(value, path, *written[data])
    return len(written)


def _constants(graphs: Sequence[Graph]) -> Iterator[ir.Value]:
    for graph in graphs:
        for name, value in graph.model.graph.initializers.items():
            if name not in graph.origins and not isinstance(value.const_value, ir.ExternalTensor):
                yield value
