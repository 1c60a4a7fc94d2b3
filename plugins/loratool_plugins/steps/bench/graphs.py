"""What the file of an ONNX graph tells without its weights."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import Any

import onnx

from loratool.errors import FormatError, InputError
from loratool.quiet import shorten

_NAMED = 6


@dataclass(frozen=True)
class Input:
    """An input of a graph.

    Attributes:
        name: of the input.
        dtype: its element type, a value of onnx.TensorProto.DataType.
        shape: a size for each axis, the name of one that varies, or None.
        is_optional: whether the graph has a value for it already.
    """

    name: str
    dtype: int
    shape: tuple[int | str | None, ...]
    is_optional: bool

    @property
    def text(self) -> str:
        """Name, type and shape, for people."""
        sizes = ", ".join("?" if size is None else str(size) for size in self.shape)
        return f"{self.name} {type_name(self.dtype)} ({sizes})"


@dataclass(frozen=True)
class Graph:
    """A graph and the files that it is made of.

    Attributes:
        path: its file.
        inputs: in the graph's order.
        outputs: names, in the graph's order.
        nodes: a digest of each node but for the names of initializers, subgraphs' included.
        operators: the operator of each node.
        data: files that hold its weights.
        vocabulary: rows of the table that input_ids are looked up in; None where that cannot be
            seen.
    """

    path: Path
    inputs: tuple[Input, ...]
    outputs: tuple[str, ...]
    nodes: tuple[str, ...]
    operators: tuple[str, ...]
    data: tuple[Path, ...]
    vocabulary: int | None

    @property
    def needed(self) -> tuple[Input, ...]:
        """The inputs that have to be given."""
        return tuple(found for found in self.inputs if not found.is_optional)

    @property
    def has_cache(self) -> bool:
        """Whether it reads a cache of keys and values."""
        return any(found.name.startswith("past_") for found in self.needed)

    @cached_property
    def counts(self) -> Mapping[str, int]:
        """Operator -> how many nodes have it, the most frequent first."""
        return dict(Counter(self.operators).most_common())


def read_graph(path: Path) -> Graph:
    """Read a graph without its weights.

    Raises:
        InputError: it cannot be read, or a file of its weights is missing, too short or outside
            its folder.
        FormatError: it is not ONNX.
    """
    try:
        model = onnx.load(str(path), load_external_data=False)
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from error
    except Exception as error:  # the parser's own errors, which differ between versions
        raise FormatError(f"{path}: is not an ONNX model ({shorten(error)})") from error
    graph = model.graph
    if not model.ir_version or not graph.node:
        raise FormatError(f"{path}: is not an ONNX model (it has no nodes)")
    initializers = {tensor.name: tensor for tensor in graph.initializer}
    nodes = list(_all_nodes(graph.node))
    for function in model.functions:
        nodes += _all_nodes(function.node)
    return Graph(
        path,
        tuple(_input(value, value.name in initializers) for value in graph.input),
        tuple(value.name for value in graph.output),
        tuple(_digest(node, initializers) for node in nodes),
        tuple(_operator(node) for node in nodes),
        _data_files(path, [*graph.initializer, *_constants(nodes)]),
        _vocabulary(graph, initializers),
    )


def node_difference(one: Graph, other: Graph) -> dict[str, int]:
    """Operator -> how many more nodes of it `other` has than `one`; no entry where as many."""
    return {
        name: other.counts.get(name, 0) - one.counts.get(name, 0)
        for name in sorted({*one.counts, *other.counts})
        if other.counts.get(name, 0) != one.counts.get(name, 0)
    }


def type_name(dtype: int) -> str:
    """The name of an element type: "int64"."""
    return str(onnx.TensorProto.DataType.Name(dtype)).lower()


def _input(value: Any, is_optional: bool) -> Input:
    tensor = value.type.tensor_type
    shape = tuple(
        axis.dim_value if axis.HasField("dim_value") else axis.dim_param or None
        for axis in tensor.shape.dim
    )
    return Input(value.name, tensor.elem_type, shape, is_optional)


def _all_nodes(nodes: Sequence[Any]) -> Iterator[Any]:
    """Nodes, each followed by those of its subgraphs."""
    for node in nodes:
        yield node
        for attribute in node.attribute:
            for graph in (attribute.g, *attribute.graphs):
                yield from _all_nodes(graph.node)


def _constants(nodes: Sequence[Any]) -> Iterator[Any]:
    for node in nodes:
        for attribute in node.attribute:
            yield from (attribute.t, *attribute.tensors)
            for graph in (attribute.g, *attribute.graphs):
                yield from graph.initializer


def _operator(node: Any) -> str:
    return node.op_type if node.domain in ("", "ai.onnx") else f"{node.domain}.{node.op_type}"


def _digest(node: Any, initializers: Mapping[str, Any]) -> str:
    """Of all that makes a node but what its weights are called and comments."""
    bare = onnx.NodeProto()
    bare.CopyFrom(node)
    bare.ClearField("doc_string")
    del bare.metadata_props[:]
    for place, name in enumerate(bare.input):
        if name in initializers:
            bare.input[place] = "\0"
    return hashlib.blake2b(bare.SerializeToString(deterministic=True), digest_size=12).hexdigest()


def _vocabulary(graph: Any, initializers: Mapping[str, Any]) -> int | None:
    rows = [
        initializers[node.input[0]].dims[0]
        for node in graph.node
        if node.op_type == "Gather" and len(node.input) > 1 and node.input[0] in initializers
        and node.input[1] == "input_ids" and initializers[node.input[0]].dims
    ]  # fmt: skip
    return min(rows, default=None)


def _data_files(path: Path, tensors: Sequence[Any]) -> tuple[Path, ...]:
    """The files of external data that tensors lie in, once they are known to hold them."""
    ends: dict[str, int] = {}
    for tensor in tensors:
        if tensor.data_location != onnx.TensorProto.EXTERNAL:
            continue
        entries = {entry.key: entry.value for entry in tensor.external_data}
        location = entries.get("location", "")
        end = int(entries.get("offset") or 0) + int(entries.get("length") or 0)
        ends[location] = max(ends.get(location, 0), end)
    complaints = [text for name, end in ends.items() if (text := _complaint(path, name, end))]
    if complaints:
        more = [f"and {len(complaints) - _NAMED} more"] if len(complaints) > _NAMED else []
        told = "\n  ".join([*complaints[:_NAMED], *more])
        raise InputError(f"{path}: its weights cannot be had:\n  {told}")
    return tuple(path.parent / name for name in sorted(ends))


def _complaint(path: Path, location: str, end: int) -> str:
    """What is wrong with a file of external data; "" if nothing is."""
    place = PurePosixPath(location)
    if not location or place.is_absolute() or ".." in place.parts:
        return (
            f"{location or 'a tensor names no file'}: external data must lie in the folder of the "
            "graph, or below it: put it there"
        )
    file = path.parent / location
    if not file.is_file():
        return f"{location}: there is no such file beside the graph: copy it there, too"
    size = file.stat().st_size
    if size < end:
        return f"{location}: has {size} bytes, and the graph needs {end}: copy it again"
    return ""
