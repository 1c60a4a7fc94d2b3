"""Graphs that point into the .safetensors of the merged model: no weight is stored twice."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from loratool import plugins
from loratool.checkpoint import Checkpoint
from loratool.dtypes import torch_dtype
from loratool.safetensors_file import read_header
from loratool.writer import write_checkpoint
from loratool_plugins.exporters.onnx.weights import DTYPES, Block, Graph, refer

# What the libraries of graphics processors ask of an address.
_ALIGNMENT = 64


@dataclass(frozen=True)
class _Place:
    """Where a tensor lies: its file, and its offset and length in bytes."""

    path: Path
    offset: int
    length: int


def link_weights(
    graphs: Sequence[Graph],
    merged: Checkpoint,
    tensors: Checkpoint,
    folder: Path,
    progress: Callable[[str], None],
) -> tuple[Block, ...]:
    """Write a merged model as transformers reads it, and point graphs into its files.

    Only what lies in a graph as it does in the checkpoint can be pointed at: the graphs should be
    as traced. Other initializers are left as they are.

    Args:
        graphs: their initializers' values are replaced.
        merged: the model, by the names on disk, in the type of the graphs.
        tensors: the same, by the names in memory.
        folder: where the graphs are going to lie; has no files of these names.
        progress: is told each tensor's name when it is written.

    Returns:
        What the graphs now refer to.
    """
    # A tensor of an odd length moves all that follow it off their alignment: those come last.
    order = sorted(merged, key=lambda name: merged[name].nbytes % _ALIGNMENT != 0)
    ordered = replace(merged, tensors={name: merged[name] for name in order})
    serial = plugins.create("executors", "serial")
    write_checkpoint(ordered, folder, serial, lambda name, size: progress(f"writing {name}"))
    places = _places(ordered, folder)
    blocks: dict[_Place, Block] = {}
    for graph in graphs:
        for name, origin in graph.origins.items():
            key = origin.keys[0]
            value = graph.model.graph.initializers[name]
            assert value.const_value is not None
            dtype = DTYPES[value.const_value.dtype]
            if not origin.is_direct or tensors[key] is not merged.get(key):
                continue
            if torch_dtype(merged[key].dtype) != dtype:
                continue
            place = places[key]
            refer(value, place.path, place.offset, place.length)
            blocks[place] = Block(place.path, origin, dtype, place.offset, place.length)
    return tuple(blocks.values())


def _places(checkpoint: Checkpoint, folder: Path) -> dict[str, _Place]:
    places = {}
    for file in dict.fromkeys(checkpoint.shards[name] for name in checkpoint):
        header = read_header(folder / file)
        for entry in header.entries:
            offset = header.data_start + entry.begin
            places[entry.name] = _Place(folder / file, offset, entry.end - entry.begin)
    return places
