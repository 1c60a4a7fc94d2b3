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

METADATA_KEY = "loratool.swappable"
_LAYOUT = "y + (x @ lora_A) @ lora_B, lora_A (in, r), lora_B (r, out); tables: lora_A[ids] @ lora_B"
_RANK = "lora_rank"
_MICROSOFT = "com.microsoft"
# How often a weight may be turned or passed on before a node computes with it.
_STEPS = 8


@dataclass(frozen=True)
class Slot:
    """A pair of optional inputs for one tensor of the checkpoint.

    Attributes:
        tensor: its name in the checkpoint.
        target: what the inputs' names begin with.
        kind: whether it is multiplied by, or rows are looked up in it.
        turned: whether the graph takes the tensor transposed, so that it is (out, in) on disk.
        rows: of A: `in`, or the rows of the table.
        columns: of B: `out`, or the table's width.
        rank: the symbol of the rank; no two pairs share one.
    """

    tensor: str
    target: str
    kind: Literal["linear", "embedding"]
    turned: bool
    rows: int
    columns: int
    rank: str

    @property
    def a(self) -> str:
        """The name of the first input, (rows, r)."""
        return self.target + LORA_A

    @property
    def b(self) -> str:
        """The name of the second input, (r, columns)."""
        return self.target + LORA_B


def adaptable(model: ir.Model, origins: Mapping[str, Origin]) -> tuple[str, ...]:
    """The tensors of the checkpoint that `make_swappable` has a way for, in the graph's order."""
    plan = _Plan(model, origins)
    plan.look(frozenset(key for origin in origins.values() for key in origin.keys))
    refused = {problem.tensor for problem in plan.problems}
    found = (tensor for site in plan.sites for tensor, _, _ in site.keys)
    return tuple(dict.fromkeys(tensor for tensor in found if tensor not in refused))


def make_swappable(
    model: ir.Model,
    origins: Mapping[str, Origin],
    targets: Collection[str],
    aliases: Mapping[str, Sequence[str]] | None = None,
) -> list[Slot]:
    """Give a graph optional inputs for the factors of updates of `targets`.

    Args:
        model: changed in place; nodes and inputs are added, none is removed. Initializers need no
            values.
        origins: the weights among its initializers, and what each is made of.
        targets: tensors of the checkpoint that adapters may change.
        aliases: tensor -> all names of parameters that are this tensor. A tied table is looked up
            in and multiplied by: each use has its own pair, the second one by another name.

    Returns:
        What was added; more than `targets` where a weight lies beside others in one initializer.

    Raises:
        MismatchError: a tensor is not in the graph, or it is used in a way that no factors can be
            added to; all of them are listed, and the graph is as it was.
    """
    plan = _Plan(model, origins)
    wanted = frozenset(targets)
    plan.look(wanted)
    seen = {tensor for site in plan.sites for tensor, _, _ in site.keys}
    seen |= {problem.tensor for problem in plan.problems}
    missing = [name for name in targets if name not in seen]
    absent = [Problem("error", name, "no node of the graph uses it") for name in missing]
    problems = [problem for problem in plan.problems if problem.tensor in wanted]
    raise_problems("cannot be made swappable (merge the adapter instead):", [*problems, *absent])
    slots = _slots(plan.sites, aliases or {})
    pairs = {key: _add_inputs(model.graph, slot, plan.types[key]) for key, slot in slots.items()}
    for site in plan.sites:
        _add_update(site, [pairs[key] for key in site.keys])
    found = list(slots.values())
    model.metadata_props[METADATA_KEY] = json.dumps(describe(found))
    return found


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
_Key = tuple[str, str, bool]


@dataclass(frozen=True)
class _View:
    """A weight matrix as a node sees it; the attributes are those of `Origin`."""

    shape: tuple[int, ...]
    axis: int
    parts: tuple[Part, ...]

    def turned(self) -> _View:
        parts = tuple(Part(p.key, p.permutation[::-1], p.length) for p in self.parts)
        return _View(self.shape[::-1], 1 - self.axis, parts)


@dataclass(frozen=True)
class _Site:
    """A node that computes with a weight.

    Attributes:
        node: the node.
        kind: how it uses the weight.
        view: the weight: (in, out), its parts side by side along `out`; or a table.
    """

    node: ir.Node
    kind: Literal["linear", "embedding"]
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
    """Where factors would have to be added.

    Attributes:
        model: the graph.
        origins: its weights.
        sites: nodes that use them, in the graph's order.
        types: of the factors.
        problems: uses that nothing can be added to, by tensor.
    """

    model: ir.Model
    origins: Mapping[str, Origin]
    sites: list[_Site] = field(default_factory=list)
    types: dict[_Key, ir.DataType] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)

    def look(self, wanted: frozenset[str]) -> None:
        """Find every use of these tensors."""
        for name, origin in self.origins.items():
            value = self.model.graph.initializers.get(name)
            if value is None or not wanted.intersection(origin.keys):
                continue
            if fault := _unfit(value, origin):
                self._refuse(origin, fault)
                continue
            view = _View(origin.shape, origin.axis, origin.parts)
            self._follow(value, view, _dtype(value), origin)
        order = {node: number for number, node in enumerate(self.model.graph.all_nodes())}
        self.sites.sort(key=lambda site: order[site.node])

    def _refuse(self, origin: Origin, fault: str) -> None:
        self.problems += [Problem("error", key, fault) for key in origin.keys]

    def _follow(
        self, value: ir.Value, view: _View, dtype: ir.DataType, origin: Origin, steps: int = _STEPS
    ) -> None:
        """Look at every use of a value, through nodes that only turn it."""
        if value.is_graph_output():
            self._refuse(origin, f"{value.name} is an output of the graph itself")
        for node, index in value.uses():
            if node.op_type == "Identity" and steps:
                self._follow(node.outputs[0], view, dtype, origin, steps - 1)
            elif node.op_type == "Transpose" and steps:  # of a matrix: there is one way only
                self._follow(node.outputs[0], view.turned(), dtype, origin, steps - 1)
            elif isinstance(found := _site(node, index, view), str):
                self._refuse(origin, f"{node.op_type} {node.name or value.name}: {found}")
            else:
                self.sites.append(found)
                self.types |= dict.fromkeys(found.keys, dtype)


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


def _slots(sites: Sequence[_Site], aliases: Mapping[str, Sequence[str]]) -> dict[_Key, Slot]:
    """One pair of inputs for each tensor and kind of use, whatever number of nodes share them."""
    slots: dict[_Key, Slot] = {}
    uses = {key for site in sites for key in site.keys}
    for site in sites:
        for key, columns in zip(site.keys, site.columns, strict=True):
            if key not in slots:
                tensor, _, turned = key
                several = sum(use[0] == tensor for use in uses) > 1
                target = _target(tensor, site.kind, aliases.get(tensor, ()) if several else None)
                slots[key] = Slot(
                    tensor, target, site.kind, turned, site.view.shape[0], columns,
                    f"{_RANK}_{len(slots)}",
                )  # fmt: skip
    return slots


def _target(tensor: str, kind: str, aliases: Sequence[str] | None) -> str:
    """What a pair is called: the module, as far as it has one.

    Args:
        tensor: of the checkpoint.
        kind: of its use.
        aliases: names of all parameters that are this tensor, in the model's order, where it is
            used in two ways: tables come first and heads last. None if it is used in one way.
    """
    name, ending = tensor, ""
    if aliases is not None and kind == "linear":
        name, ending = (aliases[-1], "") if len(aliases) > 1 else (tensor, ".head")
    elif aliases:
        name = aliases[0]
    return name.removesuffix(".weight") + ending


def _add_inputs(graph: ir.Graph, slot: Slot, dtype: ir.DataType) -> tuple[ir.Value, ir.Value]:
    """The pair's two inputs, with empty defaults."""
    rank = ir.SymbolicDim(slot.rank)
    found = []
    for name, shape in ((slot.a, (slot.rows, rank)), (slot.b, (rank, slot.columns))):
        value = ir.Value(name=name, type=ir.TensorType(dtype), shape=ir.Shape(shape))
        empty = [dimension if isinstance(dimension, int) else 0 for dimension in shape]
        value.const_value = ir.tensor(np.zeros(empty, dtype.numpy()), name=name)
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
