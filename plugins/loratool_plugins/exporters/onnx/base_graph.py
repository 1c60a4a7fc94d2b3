"""An ONNX file that anybody made: opened, checked, and its initializers seen where they lie."""

from __future__ import annotations

import math
import mmap
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import onnx
import torch
from onnx import TensorProto

from loratool.errors import FormatError, InputError, UnsupportedError
from loratool.files import file_size, local
from loratool.reports import format_bytes

# The oldest operator set whose graphs are taken: quantization and Split as they are today.
OLDEST_OPSET = 13
# What a protobuf file may have at most.
_LARGEST_FILE = (1 << 31) - 1
_ONNX_DOMAINS = ("", "ai.onnx")

FLOATS: Mapping[int, torch.dtype] = {
    TensorProto.FLOAT: torch.float32,
    TensorProto.FLOAT16: torch.float16,
    TensorProto.BFLOAT16: torch.bfloat16,
    TensorProto.DOUBLE: torch.float64,
}
_INTEGERS: Mapping[int, torch.dtype] = {
    TensorProto.UINT8: torch.uint8,
    TensorProto.INT8: torch.int8,
    TensorProto.INT16: torch.int16,
    TensorProto.UINT16: torch.uint16,
    TensorProto.INT32: torch.int32,
    TensorProto.INT64: torch.int64,
}
# Types that share a byte between two or more values are seen as bytes.
_PACKED: Mapping[int, int] = {
    TensorProto.UINT4: 4, TensorProto.INT4: 4, TensorProto.FLOAT4E2M1: 4,
    getattr(TensorProto, "UINT2", -1): 2, getattr(TensorProto, "INT2", -2): 2,
}  # fmt: skip


@dataclass(frozen=True)
class Use:
    """A place where an initializer goes into the graph.

    Attributes:
        node: that takes it; None for an output of the graph.
        index: of the node's input, or of the graph's output.
        number: what tells it from all other uses in the model; grows along the nodes.
    """

    node: onnx.NodeProto | None = field(repr=False, compare=False)
    index: int
    number: int

    @property
    def label(self) -> str:
        """How messages call it."""
        if self.node is None:
            return f"output {self.index}"
        return f"{self.node.op_type} {self.node.name or self.node.output[0]}"


@dataclass(frozen=True)
class Initializer:
    """An initializer whose values are looked at where they lie.

    Attributes:
        name: in the graph.
        proto: its message; changed by nobody but the writer of a graft.
        dtype: of its values; bytes where several values share one.
        shape: of its values.
        data: its bytes: a view of the mapped file, or of the message.
        location: the external file it lies in, relative to the graph's folder; "" if inside.
        offset: in that file.
        uses: where it goes, in the order of the nodes.
    """

    name: str
    proto: TensorProto = field(repr=False, compare=False)
    dtype: torch.dtype
    shape: tuple[int, ...]
    data: torch.Tensor = field(repr=False, compare=False)
    location: str = ""
    offset: int = 0
    uses: tuple[Use, ...] = field(default=(), repr=False, compare=False)

    @property
    def is_float(self) -> bool:
        """Whether it holds plain floating-point values."""
        return self.proto.data_type in FLOATS

    @property
    def numel(self) -> int:
        """Number of values."""
        return math.prod(self.shape)

    @property
    def values(self) -> torch.Tensor:
        """The values in their shape, as a view; not to be written to."""
        if self.proto.data_type in _PACKED:
            return self.data
        return self.data.view(self.dtype).view(self.shape)


@dataclass(frozen=True)
class BaseGraph:
    """A checked ONNX model without its external data.

    Attributes:
        path: the file.
        model: the parsed message; external data is not loaded.
        initializers: those that hold numbers, of the main graph and of graphs inside nodes.
        producers: name of a value -> the node that makes it.
        files: the external files, by location, as they lie on this machine.
    """

    path: Path
    model: onnx.ModelProto = field(repr=False)
    initializers: Mapping[str, Initializer] = field(repr=False)
    producers: Mapping[str, onnx.NodeProto] = field(repr=False)
    files: Mapping[str, Path]


def open_graph(path: Path) -> BaseGraph:
    """Open an ONNX file and check it as far as a look at it can tell.

    Raises:
        InputError: it cannot be read; or its external data is missing, too short, or lies outside
            of its folder.
        FormatError: it is no ONNX model, or contradicts itself.
        UnsupportedError: its operators are too old.
    """
    model = _parse(path)
    versions = {entry.domain: entry.version for entry in model.opset_import}
    opset = next((versions[name] for name in _ONNX_DOMAINS if name in versions), None)
    if opset is not None and opset < OLDEST_OPSET:
        raise UnsupportedError(
            f"{path}: uses version {opset} of the ONNX operators; the oldest that can be grafted "
            f"is {OLDEST_OPSET}: export it again, or convert it (onnx.version_converter)"
        )
    files: dict[str, Path] = {}
    maps: dict[str, torch.Tensor] = {}
    uses = _uses(model)
    found: dict[str, Initializer] = {}
    protos = [proto for graph in all_graphs(model.graph) for proto in graph.initializer]
    names = Counter(proto.name for proto in protos)
    for proto in protos:
        location, offset, data = _bytes(path, proto, files, maps)
        # Two branches of an If may use one name, each for a constant of its own.
        if data is not None and names[proto.name] == 1:
            found[proto.name] = Initializer(
                    proto.name, proto, _dtype(proto), tuple(proto.dims), data, location, offset,
                    tuple(uses.get(proto.name, ())),
                )  # fmt: skip
    producers = {out: node for node in all_nodes(model.graph) for out in node.output if out}
    return BaseGraph(path, model, found, producers, files)


def _parse(path: Path) -> onnx.ModelProto:
    try:
        size = file_size(path)
        if size > _LARGEST_FILE:
            raise FormatError(
                f"{path}: has {format_bytes(size)}, but an ONNX file holds 2 GiB at most: save it "
                "with its weights as external data (onnx.save(..., save_as_external_data=True))"
            )
        content = local(path).read_bytes()
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from error
    model = onnx.ModelProto()
    try:
        model.ParseFromString(content)
        valid = bool(model.opset_import) and model.HasField("graph") and model.ir_version > 0
    except Exception:  # protobuf's DecodeError
        valid = False
    if not valid or not model.graph.node:
        raise FormatError(
            f"{path}: is not an ONNX model, or is truncated; name the .onnx file of the base"
        )
    return model


def all_graphs(graph: onnx.GraphProto) -> Iterator[onnx.GraphProto]:
    """A graph, and the graphs inside its nodes (branches of If, bodies of Loop)."""
    yield graph
    for node in graph.node:
        for attribute in node.attribute:
            for inner in (*([attribute.g] if attribute.HasField("g") else []), *attribute.graphs):
                yield from all_graphs(inner)


def all_nodes(graph: onnx.GraphProto) -> Iterator[onnx.NodeProto]:
    """The nodes of a graph and of the graphs inside them."""
    for inner in all_graphs(graph):
        yield from inner.node


def _uses(model: onnx.ModelProto) -> dict[str, list[Use]]:
    uses: dict[str, list[Use]] = {}
    number = 0
    for graph in all_graphs(model.graph):
        for node in graph.node:
            for index, name in enumerate(node.input):
                if name:
                    uses.setdefault(name, []).append(Use(node, index, number))
                    number += 1
        for index, output in enumerate(graph.output):
            uses.setdefault(output.name, []).append(Use(None, index, number))
            number += 1
    return uses


def _dtype(proto: TensorProto) -> torch.dtype:
    known: Mapping[int, torch.dtype] = {**FLOATS, **_INTEGERS}
    return known.get(proto.data_type, torch.uint8)


def _bits(proto: TensorProto) -> int | None:
    """Bits of a value; None for types that are never weights."""
    if proto.data_type in _PACKED:
        return _PACKED[proto.data_type]
    if proto.data_type in FLOATS or proto.data_type in _INTEGERS:
        return 8 * _dtype(proto).itemsize
    return None


def _bytes(
    path: Path, proto: TensorProto, files: dict[str, Path], maps: dict[str, torch.Tensor]
) -> tuple[str, int, torch.Tensor | None]:
    """Where an initializer lies, and a view of its bytes; None for types that are no weights."""
    bits = _bits(proto)
    external = proto.data_location == TensorProto.EXTERNAL
    expected = None if bits is None else math.ceil(math.prod(proto.dims) * bits / 8)
    if not external:
        if expected is None:
            return "", 0, None
        data = _inside(proto)
        if data.numel() != expected:
            raise FormatError(
                f"{path}: {proto.name}: its shape {list(proto.dims)} needs {expected} bytes, and "
                f"it holds {data.numel()}; export it again"
            )
        return "", 0, data
    entries = {entry.key: entry.value for entry in proto.external_data}
    location = entries.get("location", "")
    if location not in files:
        files[location] = _external_file(path, proto.name, location)
    try:
        offset = int(entries.get("offset", 0))
        size = file_size(files[location])
        length = int(entries.get("length", size - offset if expected is None else expected))
    except ValueError:
        raise FormatError(
            f"{path}: {proto.name}: offset and length of its external data must be numbers"
        ) from None
    if expected is not None and length != expected:
        raise FormatError(
            f"{path}: {proto.name}: its shape {list(proto.dims)} needs {expected} bytes, and its "
            f"external data has {length}; export it again"
        )
    if offset < 0 or length < 0 or offset + length > size:
        raise InputError(
            f"{files[location]}: has {size} bytes, but {proto.name} in {path.name} lies at "
            f"{offset} to {offset + length}: the file is truncated, or is that of another model; "
            "copy it again"
        )
    if expected is None:
        return location, offset, None
    if location not in maps:
        maps[location] = _mapped(local(files[location]))
    data = maps[location][offset : offset + length]
    return location, offset, data if offset % _dtype(proto).itemsize == 0 else data.clone()


def _external_file(path: Path, name: str, location: str) -> Path:
    """The file of an initializer's external data, which must lie in the graph's folder."""
    relative = PurePosixPath(location)
    file = path.parent / relative
    leaves = relative.is_absolute() or ".." in relative.parts or not relative.parts
    if not leaves and file.exists():
        # In the Hub's cache both are links to files that lie beside each other elsewhere.
        folders = {path.parent.resolve(), path.resolve().parent}
        leaves = not any(file.resolve().is_relative_to(folder) for folder in folders)
    if leaves:
        raise InputError(
            f"{path}: {name}: its external data is at {location!r}, outside of the model's "
            "folder, which ONNX Runtime refuses; move the file beside the model and save it again"
        )
    try:
        file_size(file)
    except OSError as error:
        raise InputError(
            f"{file}: cannot be read: {error.strerror}; {path.name} keeps {name} there: copy it "
            "beside the model"
        ) from error
    return file


def _mapped(path: Path) -> torch.Tensor:
    with path.open("rb") as file:
        # A private map, since torch wants memory that could be written to; nobody does.
        found = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
    return torch.frombuffer(found, dtype=torch.uint8)


def _inside(proto: TensorProto) -> torch.Tensor:
    """The bytes of an initializer that the message holds."""
    if proto.HasField("raw_data"):
        raw: Any = proto.raw_data
        return torch.from_numpy(np.frombuffer(raw, np.uint8).copy())
    array = np.ascontiguousarray(onnx.numpy_helper.to_array(proto))
    if proto.data_type in _PACKED:
        return torch.from_numpy(np.frombuffer(_repacked(proto), np.uint8).copy())
    return torch.from_numpy(array.reshape(-1).view(np.uint8).copy())


def _repacked(proto: TensorProto) -> bytes:
    """Sub-byte values that a message holds one by one, as bytes."""
    return bytes(value & 0xFF for value in proto.int32_data)
