"""LoRA factors as optional inputs of a graph, so that adapters are switched from call to call.

A weight W that a node multiplies by, y = x W, gets two more inputs A (in, r) and B (r, out) whose
default values have rank 0: y + (x A) B is then y. Nothing is transposed at run time, and the
adapter's scale is part of B. A table that rows are looked up in gets A (rows, r) and B (r, width),
and y + A[ids] B. Weights that lie side by side in one initializer have a pair each.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import onnx_ir as ir

from loratool.errors import Problem, raise_problems
from loratool.runtime import LORA_A, LORA_B
from loratool_plugins.exporters.onnx.origins import Origin, Part
from loratool_plugins.exporters.onnx.weights import Graph

METADATA_KEY = "loratool.swappable"
_LAYOUT = "y + (x @ lora_A) @ lora_B, lora_A (in, r), lora_B (r, out); tables: lora_A[ids] @ lora_B"
_RANK = "lora_rank"
_MICROSOFT = "com.microsoft"
# How often a weight may be turned or passed on before a node computes with it.
_STEPS = 8

_Kind = Literal["linear", "embedding"]


@dataclass(frozen=True)
class Slot:
    """A pair of optional inputs for one tensor of the checkpoint.

    Attributes:
        tensor: its name in the checkpoint.
        target: what the inputs' names begin with.
        kind: whether it is multiplied by, or rows are looked up in it.
        turned: whether the graph takes the tensor transposed, so that it is (out, in) itself.
        rows: of A: `in`, or the rows of the table.
        columns: of B: `out`, or the table's width.
        rank: the symbol of the rank; no two pairs share one.
        dtype: of both inputs.
    """

    tensor: str
    target: str
    kind: _Kind
    turned: bool
    rows: int
    columns: int
    rank: str
    dtype: ir.DataType

    @property
    def a(self) -> str:
        """The name of the first input, (rows, r)."""
        return self.target + LORA_A

    @property
    def b(self) -> str:
        """The name of the second input, (r, columns)."""
        return self.target + LORA_B


def adaptable(graphs: Sequence[Graph], kind: _Kind | None = None) -> tuple[str, ...]:
    """The tensors that `make_swappable` has a way for, in the graphs' order.

    Args:
        graphs: of one model.
        kind: only those that are used in this way alone; None for all.
    """
    tensors = frozenset(key for graph in graphs for o in graph.origins.values() for key in o.keys)
    plans = [_look(graph, tensors) for graph in graphs]
    out = {problem.tensor for plan in plans for problem in plan.problems}
    uses = [key for plan in plans for site in plan.sites for key in site.keys]
    if kind is not None:
        out |= {tensor for tensor, found, _ in uses if found != kind}
    return tuple(dict.fromkeys(tensor for tensor, _, _ in uses if tensor not in out))


def make_swappable(
    graphs: Sequence[Graph],
    targets: Collection[str],
    tied: Mapping[str, Sequence[str]] | None = None,
) -> list[Slot]:
    """Give the graphs of a model optional inputs for the factors of updates of `targets`.

    Args:
        graphs: changed in place; nodes and inputs are added, none is removed. Initializers need no
            values. All graphs get the same inputs, used or not, so that they take the same files.
        targets: tensors that adapters may change, by the names in the graphs' origins.
        tied: tensor -> the names of all parameters that are this tensor, in the model's order. A
            table that is looked up in and multiplied by has a pair for each use, called by the
            first of these names and by the last.

    Returns:
        What was added; more than `targets` where a weight lies beside others in one initializer.

    Raises:
        MismatchError: a tensor is not in the graphs, or is used in a way that no factors can be
            added to; all of them are listed, and the graphs are as they were.
    """
    wanted = frozenset(targets)
    plans = [_look(graph, wanted) for graph in graphs]
    sites = [site for plan in plans for site in plan.sites]
    problems = [p for plan in plans for p in plan.problems if p.tensor in wanted]
    seen = {tensor for site in sites for tensor, _, _ in site.keys} | {p.tensor for p in problems}
    problems += [
        Problem("error", name, "no node of the graph uses it")
        for name in targets
        if name not in seen
    ]
    heading = "cannot be made swappable (merge the adapter instead):"
    raise_problems(heading, dict.fromkeys(problems))
    slots = _slots(sites, tied or {})
    for plan in plans:
        pairs = {key: _add_inputs(plan.model.graph, slot) for key, slot in slots.items()}
        for site in plan.sites:
            _add_update(site, [pairs[key] for key in site.keys])
        plan.model.metadata_props[METADATA_KEY] = json.dumps(describe(list(slots.values())))
    return list(slots.values())


def describe(slots: Sequence[Slot]) -> dict[str, object]:
    """What was added, for manifests and the graph's metadata."""
    return {
        "layout": _LAYOUT,
        "targets": {
            slot.target: {
                "tensor": slot.tensor,
                "kind": slot.kind,
                "lora_A": [slot.rows, "r"],
                "lora_B": ["r", slot.columns],
            }
            for slot in slots
        },
    }


# A tensor of the checkpoint, the kind of its use, and whether it is taken transposed.
_Key = tuple[str, _Kind, bool]


@dataclass(frozen=True)
class _View:
    """A weight matrix as a node sees it: its type, and the attributes of `Origin`."""

    shape: tuple[int, ...]
    axis: int
    parts: tuple[Part, ...]
    dtype: ir.DataType

    def turned(self) -> _View:
        parts = tuple(Part(p.key, p.permutation[::-1], p.length) for p in self.parts)
        return _View(self.shape[::-1], 1 - self.axis, parts, self.dtype)


@dataclass(frozen=True)
class _Site:
    """A node that computes with a weight.

    Attributes:
        node: the node.
        kind: how it uses the weight.
        view: the weight: (in, out), its parts side by side along `out`; or a table.
    """

    node: ir.Node
    kind: _Kind
    view: _View

    @property
    def keys(self) -> list[_Key]:
        """What each part of the weight is, in their order."""
        return [
            (part.key, self.kind, part.permutation == (1, 0))
            for part in self.view.parts
            if part.key is not None
        ]

    @property
    def columns(self) -> list[int]:
        """The width of each part."""
        parts = self.view.parts
        return [part.length for part in parts] if len(parts) > 1 else [self.view.shape[1]]


@dataclass
class _Plan:
    """Where factors would have to be added in a graph.

    Attributes:
        model: the graph.
        sites: nodes that use the tensors, in the graph's order.
        problems: uses that nothing can be added to, by tensor.
    """

    model: ir.Model
    sites: list[_Site] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)

    def refuse(self, keys: Sequence[str], fault: str) -> None:
        """Note why nothing can be added for these tensors."""
        self.problems += [Problem("error", key, fault) for key in keys]

    def follow(self, value: ir.Value, view: _View, keys: Sequence[str], steps: int) -> None:
        """Look at every use of a weight, through nodes that only turn it."""
        if value.is_graph_output():
            self.refuse(keys, f"{value.name} is an output of the graph itself")
        for node, index in value.uses():
            if node.op_type == "Identity" and steps:
                self.follow(node.outputs[0], view, keys, steps - 1)
            elif node.op_type == "Transpose" and steps:  # of a matrix: there is one way only
                self.follow(node.outputs[0], view.turned(), keys, steps - 1)
            elif isinstance(found := _site(node, index, view), str):
                self.refuse(keys, f"{node.op_type} {node.name or value.name}: {found}")
            else:
                self.sites.append(found)


def _look(graph: Graph, wanted: frozenset[str]) -> _Plan:
    """Find every use of these tensors in a graph."""
    plan = _Plan(graph.model)
    for name, origin in graph.origins.items():
        value = graph.model.graph.initializers[name]
        if not wanted.intersection(origin.keys):
            continue
        if fault := _unfit(value, origin):
            plan.refuse(origin.keys, fault)
            continue
        view = _View(origin.shape, origin.axis, origin.parts, _dtype(value))
        plan.follow(value, view, origin.keys, _STEPS)
    order = {node: number for number, node in enumerate(graph.model.graph.all_nodes())}
    plan.sites.sort(key=lambda site: order[site.node])
    return plan


def _unfit(value: ir.Value, origin: Origin) -> str:
    """Why an initializer takes no factors, whatever it is used for; "" if it may."""
    if len(origin.shape) != 2 or any(len(part.permutation) not in (0, 2) for part in origin.parts):
        return f"is {list(origin.shape)} in the graph: only matrices take factors"
    if len(origin.keys) != len(origin.parts):
        return "lies beside padding in the graph"
    if not _dtype(value).is_floating_point():
        return f"is {_dtype(value).name} in the graph: quantized weights take no factors"
    return ""


def _dtype(value: ir.Value) -> ir.DataType:
    dtype = value.dtype or (value.const_value.dtype if value.const_value is not None else None)
    assert isinstance(dtype, ir.DataType), f"{value.name}: an initializer without a type"
    return dtype


def _site(node: ir.Node, index: int, view: _View) -> _Site | str:
    """The use of a weight by a node, or why nothing can be added to it."""
    found = _USES.get((node.domain, node.op_type))
    if found is None:
        return "takes the weight in a way that no update can be added beside"
    return found(node, index, view)


def _of_gather(node: ir.Node, index: int, view: _View) -> _Site | str:
    if index != 0 or node.attributes.get_int("axis", 0) not in (0, -2):
        return "does not look up its rows"
    if len(view.parts) != 1:
        return "looks up rows of several tensors in one"
    return _Site(node, "embedding", view)


def _of_product(node: ir.Node, index: int, view: _View) -> _Site | str:
    """MatMul, Gemm and FusedMatMul: x W."""
    if index != 1:
        return "the weight is not its right factor"
    if node.attributes.get_int("transBatchA", 0) or node.attributes.get_int("transBatchB", 0):
        return "multiplies batches of matrices the other way round"
    if node.attributes.get_int("transB", 0):
        view = view.turned()
    if view.axis == 0 and len(view.parts) > 1:
        return "several tensors are packed along its inputs"
    return _Site(node, "linear", view)


_USES: Mapping[tuple[str, str], Callable[[ir.Node, int, _View], _Site | str]] = {
    ("", "MatMul"): _of_product,
    ("", "Gemm"): _of_product,
    (_MICROSOFT, "FusedMatMul"): _of_product,
    ("", "Gather"): _of_gather,
}


def _slots(sites: Sequence[_Site], tied: Mapping[str, Sequence[str]]) -> dict[_Key, Slot]:
    """One pair of inputs for each tensor and kind of use, whatever number of nodes share them."""
    slots: dict[_Key, Slot] = {}
    tables = {tensor for site in sites for tensor, kind, _ in site.keys if kind == "embedding"}
    for site in sites:
        for key, columns in zip(site.keys, site.columns, strict=True):
            if key not in slots:
                tensor, kind, turned = key
                names = tied.get(tensor, ()) if tensor in tables else ()
                slots[key] = Slot(
                    tensor,
                    _target(tensor, names, is_head=kind == "linear" and tensor in tables),
                    kind,
                    turned,
                    site.view.shape[0],
                    columns,
                    f"{_RANK}_{len(slots)}",
                    site.view.dtype,
                )
    return slots


def _target(tensor: str, names: Sequence[str], is_head: bool) -> str:
    """What a pair is called: the module, as far as the tensor is a module's weight.

    Args:
        tensor: the tensor.
        names: of all parameters that are this tensor, if it is a table.
        is_head: whether this is about products with a table.
    """
    name = names[-1 if is_head else 0] if names else tensor
    distinct = not is_head or len(names) > 1
    return name.removesuffix(".weight") + ("" if distinct else ".head")


def _add_inputs(graph: ir.Graph, slot: Slot) -> tuple[ir.Value, ir.Value]:
    """The pair's two inputs, with empty defaults."""
    rank = ir.SymbolicDim(slot.rank)
    found = []
    for name, shape in ((slot.a, (slot.rows, rank)), (slot.b, (rank, slot.columns))):
        value = ir.Value(name=name, type=ir.TensorType(slot.dtype), shape=ir.Shape(shape))
        empty = [dimension if isinstance(dimension, int) else 0 for dimension in shape]
        value.const_value = ir.tensor(np.zeros(empty, slot.dtype.numpy()), name=name)
        graph.inputs.append(value)
        graph.register_initializer(value)
        found.append(value)
    a, b = found
    return a, b


def _add_update(site: _Site, pairs: Sequence[tuple[ir.Value, ir.Value]]) -> None:
    """Add the products of a site's factors to what its node computes.

    Before a bias: ONNX Runtime fuses biases with what follows them.
    """
    result, graph = site.node.outputs[0], site.node.graph
    name, is_output = result.name, result.is_graph_output()
    assert graph is not None
    nodes, updates = [], []
    for number, (a, b) in enumerate(pairs):
        down = _down(site, a, f"{name}.lora_A.{number}")
        up = _node("MatMul", [down.outputs[0], b], f"{name}.lora_B.{number}")
        nodes += [down, up]
        updates.append(up.outputs[0])
    if len(updates) > 1:
        nodes.append(_node("Concat", updates, f"{name}.lora", axis=-1))
    add = _node("Add", [result, nodes[-1].outputs[0]], f"{name}.swappable")
    total = add.outputs[0]
    total.type, total.shape = result.type, result.shape
    result.replace_all_uses_with(total, replace_graph_outputs=True)
    add.replace_input_with(0, result)
    graph.insert_after(site.node, [*nodes, add])
    if is_output:
        result.name, total.name = f"{name}.base", name


def _down(site: _Site, a: ir.Value, name: str) -> ir.Node:
    """x A, or the rows of A that are looked up, as the site's node does it with its weight."""
    node = site.node
    if site.kind == "embedding":
        return _node("Gather", [a, node.inputs[1]], name, axis=0)
    x = node.inputs[0]
    alpha, turned = node.attributes.get_float("alpha", 1.0), node.attributes.get_int("transA", 0)
    if alpha == 1 and not turned:
        return _node("MatMul", [x, a], name)
    return _node(node.op_type, [x, a], name, node.domain, alpha=alpha, transA=turned)


def _node(
    op_type: str,
    inputs: Sequence[ir.Value | None],
    output: str,
    domain: str = "",
    **attributes: float,
) -> ir.Node:
    return ir.node(
        op_type, inputs, attributes=attributes, domain=domain, name=output,
        outputs=[ir.Value(name=output)],
    )  # fmt: skip
