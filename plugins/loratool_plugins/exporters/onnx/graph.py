"""A model's ONNX graph, traced without its weights.

Nothing is optimised, so that every parameter stays in the graph under its own name and the weights
can be streamed in afterwards; ONNX Runtime optimises when it loads.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import onnx
import onnx_ir as ir
import torch
from transformers.exporters.exporter_onnx import OnnxConfig, OnnxExporter

from loratool.errors import InputError, VerificationError
from loratool.quiet import quiet, shorten
from loratool.shell import Shell, position_limit
from loratool_plugins.exporters.onnx.inputs import Feeds, sample_inputs

AXES = ("batch", "sequence")
# A size that is not the size of anything else in a model is less likely to be taken for it.
_TRACED_SHAPE = (2, 11)


def trace(shell: Shell, opset: int) -> ir.Model:
    """Trace a model with dynamic batch and sequence axes.

    Returns:
        A graph whose initializers are parameters by their names in the model, which have no values
        yet, and constants, which do. Nothing in it depends on this machine or run.

    Raises:
        InputError: transformers cannot export this class, or only with fixed axes.
    """
    config: Any = shell.model.config
    feeds = sample_inputs(type(shell.model), config, *_TRACED_SHAPE)
    # One symbol for all batch axes and one for all sequence axes: faster than Dim.AUTO, and fewer
    # nodes. Models whose axes are related in a way that this cannot state are left to Dim.AUTO.
    named = {
        0: torch.export.Dim(AXES[0]),
        1: torch.export.Dim(AXES[1], max=position_limit(config)),
    }
    auto = dict.fromkeys(named, torch.export.Dim.AUTO)
    try:
        try:
            model = _export(shell.model, feeds, named, opset)
        except torch._dynamo.exc.UserError:
            model = _export(shell.model, feeds, auto, opset)
    except Exception as error:
        raise InputError(
            f"{shell.architecture}: transformers cannot export it to ONNX: {shorten(error)}"
        ) from error
    if lost := [name for name in feeds if name not in {value.name for value in model.graph.inputs}]:
        raise InputError(f"{shell.architecture}: {lost[0]} is not an input of the traced graph")
    _strip(model)
    _name_axes(model, shell.architecture)
    return model


def _export(model: Any, feeds: Feeds, axes: dict[int, Any], opset: int) -> ir.Model:
    settings = OnnxConfig(
        dynamic=True,
        dynamic_shapes=dict.fromkeys(feeds, axes),
        optimize=False,
        opset_version=opset,
    )
    with quiet():
        program: ir.Model = OnnxExporter().export(model, dict(feeds), settings).program
    return program


def _values(model: ir.Model) -> Iterator[ir.Value]:
    yield from model.graph.inputs
    yield from model.graph.initializers.values()
    for node in model.graph.all_nodes():
        yield from node.outputs


def _strip(model: ir.Model) -> None:
    """Remove what the tracer noted about source files: most of the bytes, and not reproducible."""
    model.graph.doc_string = None
    for holder in (model, model.graph, *model.graph.all_nodes(), *_values(model)):
        holder.metadata_props.clear()
    for node in model.graph.all_nodes():
        node.doc_string = None


def _name_axes(model: ir.Model, architecture: str) -> None:
    """Call the symbols of the inputs' axes by their meaning, everywhere in the graph."""
    meaning: dict[str, str] = {}
    for value in model.graph.inputs:
        for axis, dimension in zip(AXES, value.shape or (), strict=True):
            if isinstance(dimension, int):
                raise InputError(f"{architecture}: the {axis} axis is fixed in its traced graph")
            meaning[str(dimension)] = axis

    def rename(dimension: int | ir.SymbolicDim) -> int | ir.SymbolicDim:
        if isinstance(dimension, int):
            return dimension
        text = re.sub(r"\w+", lambda word: meaning.get(word[0], word[0]), str(dimension))
        return ir.SymbolicDim(text)

    for value in _values(model):
        if value.shape is not None and not value.is_initializer():
            value.shape = ir.Shape([rename(dimension) for dimension in value.shape])


def describe_nodes(model: ir.Model, tied: Mapping[str, tuple[str, ...]]) -> list[onnx.NodeProto]:
    """Every node with its type, name, wiring and attributes; weights are mentioned by name only.

    Tied parameters go by the first of their names, since a checkpoint may hold any of them.
    """
    nodes = []
    for node in model.graph:
        proto = ir.serde.serialize_node(node)
        proto.input[:] = [tied[name][0] if name in tied else name for name in proto.input]
        nodes.append(proto)
    return nodes


def compare_nodes(merged: list[onnx.NodeProto], base: list[onnx.NodeProto]) -> None:
    """Raise VerificationError that names the first node in which two graphs differ."""
    for index, (one, other) in enumerate(zip(merged, base, strict=False)):
        if one != other:
            raise VerificationError(
                f"the merged model's graph is not the base's: node {index} is {one.op_type} "
                f"{one.name!r} in the merged model and {other.op_type} {other.name!r} in the base"
                f"{_detail(one, other)}"
            )
    if len(merged) != len(base):
        shorter = min(len(merged), len(base))
        extra = max(merged, base, key=len)[shorter]
        raise VerificationError(
            f"the merged model's graph has {len(merged)} nodes, the base's {len(base)}: "
            f"the first that only one has is {extra.op_type} {extra.name!r}"
        )


def _detail(one: onnx.NodeProto, other: onnx.NodeProto) -> str:
    """What differs between two nodes of the same type and name."""
    if (one.op_type, one.name) != (other.op_type, other.name):
        return ""
    fields: tuple[tuple[str, Callable[[onnx.NodeProto], Any]], ...] = (
        ("inputs", lambda node: list(node.input)),
        ("outputs", lambda node: list(node.output)),
        ("attributes", lambda node: " ".join(str(list(node.attribute)).split())),
    )
    for name, pick in fields:
        if pick(one) != pick(other):
            return f" ({name}: {str(pick(one))[:100]} against {str(pick(other))[:100]})"
    return ""
