"""A model's ONNX graphs, traced without its weights.

Every parameter is a fingerprint while a graph is traced, so that the exporter may optimise, rename
and pack; afterwards each initializer tells which tensors it is made of.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import onnx_ir as ir
import onnxscript.optimizer
import torch
from onnxscript.rewriter import _basics, _matcher
from transformers.exporters import onnxruntime_fusions
from transformers.exporters.exporter_onnx import OnnxConfig, OnnxExporter

from loratool.errors import InputError
from loratool.quiet import quiet, shorten
from loratool.shell import Shell
from loratool_plugins.exporters.onnx.fingerprints import Fingerprints, lazily
from loratool_plugins.exporters.onnx.stages import WAY_OUT, Stage, loosened, name_graph
from loratool_plugins.exporters.onnx.weights import Graph

# "as traced" keeps weights as they lie in the checkpoint; "standard" optimises with the operators
# of the ONNX standard alone; the others fuse for one of ONNX Runtime's execution providers.
Form = Literal["as traced", "standard", "cpu", "cuda", "webgpu", "dml"]


@dataclass(frozen=True)
class Traced:
    """A graph, and what had to be done otherwise than asked.

    Attributes:
        graph: with a fingerprint in the place of every weight.
        form: that it has.
        reason: why that is not the form that was asked for; "" if it is.
    """

    graph: Graph
    form: Form
    reason: str = ""


def trace(shell: Shell, stage: Stage, prints: Fingerprints, form: Form, opset: int) -> Traced:
    """Trace one graph of a model whose parameters are fingerprints.

    Nothing in it depends on this machine or run. Where an optimiser computes with weights (as in
    folding a batch norm into a convolution), which only can be done when they are there, the graph
    stays as it was traced.

    Args:
        shell: the model.
        stage: which of its graphs.
        prints: as `stamp` put them into `shell`.
        form: of the graph.
        opset: version of the ONNX operators.

    Raises:
        InputError: transformers cannot export it.
    """
    used: set[str] = set()
    model = _export(shell, stage, prints, form, opset, used)
    graph = _graph(stage, prints, model)
    known = {key for origin in graph.origins.values() for key in origin.keys}
    if form != "as traced" and (lost := sorted(used - known)):
        reason = f"its optimiser computes with {lost[0]}, whose values it does not have"
        model = _export(shell, stage, prints, "as traced", opset, used)
        return Traced(_graph(stage, prints, model), "as traced", reason)
    return Traced(graph, form)


def _graph(stage: Stage, prints: Fingerprints, model: ir.Model) -> Graph:
    _strip(model)
    name_graph(model, stage)
    origins = {}
    for name, value in model.graph.initializers.items():
        assert value.const_value is not None
        if (origin := prints.identify(value.const_value.numpy())) is not None:
            origins[name] = origin
    return Graph(stage.name, model, origins)


def _export(
    shell: Shell, stage: Stage, prints: Fingerprints, form: Form, opset: int, used: set[str]
) -> ir.Model:
    def settings(stage: Stage) -> OnnxConfig:
        shapes = stage.dynamic_shapes
        return OnnxConfig(
            dynamic=True,
            dynamic_shapes=dict(shapes) if shapes is not None else None,
            optimize=form != "as traced",
            ort_fusions=None if form in ("as traced", "standard") else form,
            opset_version=opset,
        )

    try:
        with (
            quiet(),
            lazily(prints),
            _noting(used, prints),
            _rotating_by_positions(stage),
            _rejecting_early(),
        ):
            exporter = OnnxExporter()
            try:
                exported = exporter.export(stage.module, dict(stage.inputs), settings(stage))
            except torch._dynamo.exc.UserError:
                # Axes that are related in a way that names cannot state are left to be found.
                free = settings(loosened(stage))
                exported = exporter.export(stage.module, dict(stage.inputs), free)
    except Exception as error:
        raise InputError(
            f"{shell.architecture}: transformers cannot export it to ONNX ({stage.name}): "
            f"{shorten(error)}; {WAY_OUT}"
        ) from error
    program: ir.Model = exported.program
    return program


@contextmanager
def _rejecting_early() -> Iterator[None]:
    """Let onnxscript's matcher look at a node's operator before it lists the whole graph.

    For a pattern with several results it lists all nodes once for each node of the graph, though
    hardly any is an operator that the pattern's first result could come from: two thirds of the
    time of an export.
    """
    matcher: Any = _matcher.SimplePatternMatcher
    original = matcher.match

    def match(self: Any, model: ir.Model, graph: Any, node: ir.Node, **options: Any) -> Any:
        if not self.pattern.has_single_output_node:
            wanted = self.pattern.output_nodes[0].op_identifier()
            if wanted is not None and wanted != node.op_identifier():
                return _basics.MatchResult().fail("No match found.")
        return original(self, model, graph, node, **options)

    matcher.match = match
    try:
        yield
    finally:
        matcher.match = original


@contextmanager
def _rotating_by_positions(stage: Stage) -> Iterator[None]:
    """Keep the rotary embedding of a prompt out of GroupQueryAttention for the CPU.

    ONNX Runtime's kernel counts the positions of a prompt itself, padding on the left included,
    whatever position_ids say: its logits are right, and its cache is not the one that the decode
    graph goes on with.
    """
    fusions: Any = onnxruntime_fusions
    steps = fusions._STEPS
    fuse = fusions._fuse_group_query_attention
    if stage.name == "prefill":
        fusions._STEPS = tuple(
            (partial(fuse, rotary=False) if step is fuse else step, providers)
            for step, providers in steps
        )
    try:
        yield
    finally:
        fusions._STEPS = steps


@contextmanager
def _noting(used: set[str], prints: Fingerprints) -> Iterator[None]:
    """Note the tensors that a graph uses before it is optimised."""
    module: Any = onnxscript.optimizer
    original = module.optimize_ir

    def optimize_ir(model: ir.Model, *args: Any, **kwargs: Any) -> Any:
        for value in model.graph.initializers.values():
            if value.uses() and value.const_value is not None:
                found = prints.identify(value.const_value.numpy())
                used.update(found.keys if found is not None else ())
        return original(model, *args, **kwargs)

    module.optimize_ir = optimize_ir
    try:
        yield
    finally:
        module.optimize_ir = original


def count_operators(model: ir.Model) -> dict[str, int]:
    """Operator -> how many nodes of it, subgraphs included; sorted by name."""
    counts = Counter(
        f"{node.domain}::{node.op_type}" if node.domain else node.op_type
        for node in model.graph.all_nodes()
    )
    return dict(sorted(counts.items()))


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
