"""Graphs for other devices, in a form that ONNX Runtime's CPU provider can run.

Most graphs fused for GPUs run on a CPU as they are, in fp32 and fp16. What has no kernel there is
rewritten in a copy that only verification sees: the same weights, wiring and mathematics.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import numpy as np
import onnx
from onnx import TensorProto, numpy_helper
from onnx.helper import make_node

# Where GroupQueryAttention takes the weights of its norms of queries and keys.
_NORMS = (14, 15)
_TYPE_ATTRIBUTES = ("to", "dtype")
WIDENED = "bf16 is computed in fp32 there: the CPU has no kernels for it"
NORMS_APART = (
    "norms of queries and keys are computed apart from GroupQueryAttention there: the CPU's "
    "kernel does not have them"
)


def cpu_form(model: onnx.ModelProto) -> tuple[onnx.ModelProto, tuple[str, ...]]:
    """A model that the CPU provider can run.

    Args:
        model: the model without its external data; it is not changed.

    Returns:
        The same object if nothing stands in the way, else a copy whose external data is the same;
        and what was rewritten, in words.
    """
    half = any(tensor.data_type == TensorProto.BFLOAT16 for tensor in model.graph.initializer)
    norms = [node for node in model.graph.node if _has_norms(node)]
    if not (half or norms):
        return model, ()
    made = onnx.ModelProto()
    made.CopyFrom(model)
    told = []
    if norms:
        _set_norms_apart(made.graph)
        told.append(NORMS_APART)
    if half:
        _widen(made)
        told.append(WIDENED)
    return made, tuple(told)


def _has_norms(node: onnx.NodeProto) -> bool:
    return (
        node.op_type == "GroupQueryAttention"
        and len(node.input) > _NORMS[1]
        and bool(node.input[_NORMS[0]])
    )


def _set_norms_apart(graph: onnx.GraphProto) -> None:
    nodes: list[onnx.NodeProto] = []
    sizes = {tensor.name: tensor.dims[0] for tensor in graph.initializer if tensor.dims}
    for number, node in enumerate(graph.node):
        if _has_norms(node):
            size = sizes[node.input[_NORMS[0]]]
            added, constants = _norms_of(node, size, f"{node.name or number}_apart")
            nodes += added
            graph.initializer.extend(constants)
        nodes.append(node)
    del graph.node[:]
    graph.node.extend(nodes)


def _norms_of(
    node: onnx.NodeProto, size: int, prefix: str
) -> tuple[list[onnx.NodeProto], list[onnx.TensorProto]]:
    """Nodes that norm what a GroupQueryAttention reads; it is made to read their results."""
    attributes = {entry.name: entry for entry in node.attribute}
    epsilon = attributes["qk_norm_epsilon"].f if "qk_norm_epsilon" in attributes else 1e-6
    heads = (attributes["num_heads"].i, attributes["kv_num_heads"].i)
    nodes: list[onnx.NodeProto] = []
    constants: list[onnx.TensorProto] = []

    def constant(values: list[int], name: str) -> str:
        constants.append(numpy_helper.from_array(np.array(values, np.int64), f"{prefix}_{name}"))
        return f"{prefix}_{name}"

    if not node.input[1]:  # queries, keys and values side by side
        parts = [f"{prefix}_{what}" for what in ("query", "key", "value")]
        widths = constant([heads[0] * size, heads[1] * size, heads[1] * size], "widths")
        nodes.append(make_node("Split", [node.input[0], widths], parts, axis=-1))
        node.input[0], node.input[1], node.input[2] = parts
    for at, (count, norm) in enumerate(zip(heads, _NORMS, strict=True)):
        apart, normed, joined = (f"{prefix}_{at}_{what}" for what in ("apart", "normed", "joined"))
        inner = constant([0, 0, count, size], f"{at}_inner")
        outer = constant([0, 0, count * size], f"{at}_outer")
        nodes += [
            make_node("Reshape", [node.input[at], inner], [apart]),
            make_node(
                "SimplifiedLayerNormalization", [apart, node.input[norm]], [normed],
                axis=-1, epsilon=epsilon,
            ),
            make_node("Reshape", [normed, outer], [joined]),
        ]  # fmt: skip
        node.input[at] = joined
    del node.input[_NORMS[0] :]
    while node.input and not node.input[-1]:
        del node.input[-1]
    kept = [entry for entry in node.attribute if entry.name != "qk_norm_epsilon"]
    del node.attribute[:]
    node.attribute.extend(kept)
    return nodes, constants


def _widen(model: onnx.ModelProto) -> None:
    """Let everything of bf16 be fp32; stored weights are cast where they are used."""
    graph = model.graph
    casts = []
    given = {value.name for value in graph.input}
    for tensor in graph.initializer:
        if tensor.data_type == TensorProto.BFLOAT16 and tensor.name not in given:
            name = tensor.name
            tensor.name = f"{name}.stored"
            casts.append(make_node("Cast", [tensor.name], [name], to=TensorProto.FLOAT))
    for inner in _graphs(graph):
        for value in (*inner.input, *inner.output, *inner.value_info):
            if value.type.tensor_type.elem_type == TensorProto.BFLOAT16:
                value.type.tensor_type.elem_type = TensorProto.FLOAT
        _widen_nodes(inner.node)
    for function in model.functions:
        _widen_nodes(function.node)
    widened = [*casts, *graph.node]
    del graph.node[:]
    graph.node.extend(widened)


def _widen_nodes(nodes: Iterable[onnx.NodeProto]) -> None:
    for node in nodes:
        for entry in node.attribute:
            if entry.name in _TYPE_ATTRIBUTES and entry.i == TensorProto.BFLOAT16:
                entry.i = TensorProto.FLOAT
            if entry.HasField("t") and entry.t.data_type == TensorProto.BFLOAT16:
                values = numpy_helper.to_array(entry.t).astype(np.float32)
                entry.t.CopyFrom(numpy_helper.from_array(values, entry.t.name))


def _graphs(graph: onnx.GraphProto) -> Iterator[onnx.GraphProto]:
    yield graph
    for node in graph.node:
        for entry in node.attribute:
            for inner in [*([entry.g] if entry.HasField("g") else []), *entry.graphs]:
                yield from _graphs(inner)
