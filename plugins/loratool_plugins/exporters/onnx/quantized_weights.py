"""Weights that a graph holds quantized, by their shapes: nothing can be put there exactly."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import onnx

from loratool_plugins.exporters.onnx.base_graph import BaseGraph, all_nodes

# Operators that take quantized weights -> the input that is the weight.
_OPERATORS: Mapping[str, int] = {
    "DequantizeLinear": 0,
    "MatMulInteger": 1,
    "DynamicQuantizeMatMul": 1,
    "QLinearMatMul": 3,
    "QGemm": 3,
    "QAttention": 1,
    "ConvInteger": 1,
    "QLinearConv": 3,
    "GatherBlockQuantized": 0,
}


@dataclass(frozen=True)
class QuantizedWeight:
    """A weight of a node.

    Attributes:
        node: the node's name, or that of its output.
        shape: (out, in) of blockwise weights, else as it is stored.
        scheme: in words.
    """

    node: str
    shape: tuple[int, ...]
    scheme: str

    def may_hold(self, shape: tuple[int, ...]) -> bool:
        """Whether a tensor of this shape can be in it: as it is, turned, or beside others."""
        wanted = sorted(size for size in shape if size != 1)
        found = sorted(size for size in self.shape if size != 1)
        if wanted == found:
            return True
        return len(wanted) == len(found) == 2 and any(
            inner in found and out < max(found) for inner, out in (wanted, wanted[::-1])
        )


def quantized_weights(graph: BaseGraph) -> Iterator[QuantizedWeight]:
    """The quantized weights of a graph, in the order of its nodes."""
    for node in all_nodes(graph.model.graph):
        settings = {entry.name: onnx.helper.get_attribute_value(entry) for entry in node.attribute}
        name = node.name or node.output[0]
        if node.op_type in ("MatMulNBits", "MatMulBnb4"):
            yield QuantizedWeight(
                name, (int(settings["N"]), int(settings["K"])), _scheme(node, settings)
            )
            continue
        index = _OPERATORS.get(node.op_type)
        if index is None or index >= len(node.input):
            continue
        found = graph.initializers.get(node.input[index])
        if found is not None and not found.is_float and found.numel > 1:
            yield QuantizedWeight(name, tuple(found.proto.dims), node.op_type)


def _scheme(node: onnx.NodeProto, settings: Mapping[str, Any]) -> str:
    if node.op_type == "MatMulBnb4":
        return f"MatMulBnb4, blocks of {settings.get('block_size')}"
    points = "with zero points" if len(node.input) > 3 and node.input[3] else "symmetric"
    return (
        f"MatMulNBits, {settings.get('bits', 4)} bits, blocks of {settings.get('block_size')}, "
        f"{points}"
    )
