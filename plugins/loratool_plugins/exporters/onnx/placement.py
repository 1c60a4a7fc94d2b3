"""Which use of an initializer stands for which tensor, where several tensors have its values.

Exporters keep equal constants once: all biases that are zero, all norms that are ones, an embedding
and the head that is tied to it. An adapter that changes one of them changes some of the uses only.
Which, is told by what lies around a use; every sign only chooses between tensors whose values are
those of the initializer, so that a wrong name can mislead nobody about other tensors.
"""

from __future__ import annotations

import ast
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import PurePosixPath

import onnx

from loratool.errors import Problem
from loratool.families import is_embedding
from loratool_plugins.exporters.onnx.base_graph import BaseGraph, Initializer, Use
from loratool_plugins.exporters.onnx.matching import Layout, Piece

Names = tuple[str | None, ...]

# Operators -> inputs that are added to a product, and the inputs that the product may come by.
_BIASES: Mapping[str, Mapping[int, tuple[int, ...]]] = {
    "Add": {0: (1,), 1: (0,)},
    "BiasGelu": {1: (0,)},
    "FastGelu": {1: (0,)},
    "BiasAdd": {1: (0,)},
    "BiasSplitGelu": {1: (0,)},
    "SkipLayerNormalization": {4: (0, 1)},
    "SkipSimplifiedLayerNormalization": {3: (0, 1)},
}
# Operators that have weight and bias themselves: input of the bias -> input of the weight.
_PARTNERS: Mapping[str, Mapping[int, int]] = {
    "Gemm": {2: 1},
    "FusedGemm": {2: 1},
    "Conv": {2: 1},
    "FusedConv": {2: 1},
    "ConvTranspose": {2: 1},
    "Attention": {2: 1},
    "QAttention": {2: 1},
    "MatMulNBits": {5: 1},
    "LayerNormalization": {1: 2, 2: 1},
    "SkipLayerNormalization": {2: 3, 3: 2},
    "GroupNormalization": {1: 2, 2: 1},
    "InstanceNormalization": {1: 2, 2: 1},
    "BatchNormalization": {1: 2, 2: 1},
}
_PRODUCTS = ("MatMul", "Gemm", "FusedMatMul", "FusedGemm", "Conv", "FusedConv", "MatMulNBits")
# What a product's values go through without being mixed.
_PASSES = (
    "Reshape", "Transpose", "Cast", "Identity", "Squeeze", "Unsqueeze", "Flatten", "Split", "Add",
)  # fmt: skip
_MOST_STEPS = 8
_SCOPES = "pkg.torch.onnx.name_scopes"


@dataclass(frozen=True)
class Placed:
    """Uses of an initializer that get the same values.

    Attributes:
        layout: how the initializer is made of tensors.
        names: the tensors, one a piece of the layout.
        uses: the uses.
    """

    layout: Layout
    names: Names
    uses: tuple[Use, ...]


@dataclass(frozen=True)
class Placement:
    """What becomes of the initializers that changed tensors are in.

    Attributes:
        placed: initializer -> its uses, by the values that they get; uses that keep the base's
            values are left out.
        problems: what cannot be told.
    """

    placed: Mapping[str, tuple[Placed, ...]]
    problems: tuple[Problem, ...]


def place(graph: BaseGraph, layouts: Mapping[str, Layout], changed: Collection[str]) -> Placement:
    """Decide for every use of an initializer which tensors it stands for.

    Args:
        graph: the graph.
        layouts: what its initializers are made of.
        changed: the tensors that get other values.
    """
    return _Placer(graph, layouts, frozenset(changed)).run()


@dataclass
class _Placer:
    graph: BaseGraph
    layouts: Mapping[str, Layout]
    changed: frozenset[str]
    open: list[tuple[Initializer, Use]] = field(default_factory=list)
    found: dict[str, dict[int, tuple[Layout, Names]]] = field(default_factory=dict)

    def run(self) -> Placement:
        problems = []
        for name, layout in self.layouts.items():
            if not self.changed.isdisjoint(layout.names):
                self._settle(self.graph.initializers[name], layout)
        self._settle_last()
        placed_names = self._placed_names()
        for initializer, use in self.open:
            layout = self.layouts[initializer.name]
            for name in sorted(self.changed & layout.names - placed_names):
                problems.append(_cannot_tell(name, initializer, use, layout))
        placed = {}
        for name, uses in self.found.items():
            groups = tuple(self._groups(self.graph.initializers[name], uses))
            if groups:
                placed[name] = groups
        return Placement(placed, _once(problems))

    def _settle_last(self) -> None:
        """A norm that nothing was told of is that of the one tensor which has no place yet."""
        placed, left = self._placed_names(), []
        for initializer, use in self.open:
            layout = self.layouts[initializer.name]
            if use.node is not None and "Norm" in use.node.op_type and len(layout.pieces) == 1:
                left.append((initializer, use, layout, layout.names - placed))
        for initializer, use, layout, names in left:
            rivals = [other for *_, other in left if other & names]
            if len(names) == len(rivals) == 1:
                self.found[initializer.name][use.number] = layout, tuple(names)
                self.open.remove((initializer, use))

    def _placed_names(self) -> set[str]:
        settled = (names for uses in self.found.values() for _, names in uses.values())
        return {name for names in settled for name in names if name is not None}

    def _settle(self, initializer: Initializer, layout: Layout) -> None:
        """Find the tensors of every use, or leave it open."""
        uses = self.found.setdefault(initializer.name, {})
        for use in initializer.uses:
            if all(len(piece.choices) <= 1 for piece in layout.pieces):
                uses[use.number] = (
                    layout,
                    tuple(next(iter(piece.choices), None) for piece in layout.pieces),
                )
            elif (told := self._told(initializer, layout, use)) is not None:
                uses[use.number] = told
            else:
                self.open.append((initializer, use))

    def _groups(
        self, initializer: Initializer, uses: Mapping[int, tuple[Layout, Names]]
    ) -> Iterator[Placed]:
        """Uses with the same changed tensors together."""
        groups: dict[Names, list[Use]] = {}
        layouts: dict[Names, Layout] = {}
        for use in initializer.uses:
            if use.number not in uses:
                continue
            layout, names = uses[use.number]
            if not self.changed.isdisjoint(names):
                groups.setdefault(names, []).append(use)
                layouts.setdefault(names, layout)
        for names, members in groups.items():
            yield Placed(layouts[names], names, tuple(members))

    def _told(
        self, initializer: Initializer, layout: Layout, use: Use
    ) -> tuple[Layout, Names] | None:
        """What the surroundings of a use say of it."""
        if use.node is None:
            return None
        if (told := self._by_weight(use, initializer, layout)) is not None:
            return told
        if len(layout.pieces) != 1:
            return None
        choices = sorted(layout.pieces[0].choices)
        for sign in (
            self._by_partner(use, choices),
            _by_name(_alias(use.node), choices),
            self._by_scope(use, choices),
            self._by_kind(use.node, choices),
            _by_name(initializer.name if len(initializer.uses) == 1 else "", choices),
        ):
            if len(sign) == 1:
                return layout, (sign[0],)
        return None

    def _by_weight(
        self, use: Use, initializer: Initializer, layout: Layout
    ) -> tuple[Layout, Names] | None:
        """A bias by the weight whose product it is added to."""
        node = use.node
        assert node is not None
        for weights in self._weights_of(node, use.index):
            biases = tuple(_sibling(name, "bias") for name, _ in weights)
            if told := _as_pieces(layout, biases, [length for _, length in weights]):
                return told
        return None

    def _weights_of(self, node: onnx.NodeProto, index: int) -> Iterator[list[tuple[str, int]]]:
        """The weights, with their outputs' number, of products that an input may be added to."""
        if node.op_type == "MultiHeadAttention" and index == 3:
            found = [self._source(name) for name in node.input[:3]]
            if all(found):
                yield [entry for entries in found if entries for entry in entries]
            return
        for data in _BIASES.get(node.op_type, {}).get(index, ()):
            if data < len(node.input) and (source := self._source(node.input[data])):
                yield source
        weight = _PARTNERS.get(node.op_type, {}).get(index)
        if weight is None or "Norm" in node.op_type:
            return
        if found_here := self._weight(node.input[weight], node):
            yield found_here

    def _source(self, value: str) -> list[tuple[str, int]] | None:
        """The weights of the product that a value comes from, as it is or turned."""
        part: int | None = None
        parts = 0
        for _ in range(_MOST_STEPS):
            node = self.graph.producers.get(value)
            if node is None:
                return None
            if node.op_type in _PRODUCTS:
                found = next(
                    (w for name in node.input[:2] if (w := self._weight(name, node))), None
                )
                if part is None or found is None:
                    return found
                return [found[part]] if len(found) == parts else None
            if node.op_type == "Split":
                part, parts = list(node.output).index(value), len(node.output)
            computed = [name for name in node.input if name not in self.graph.initializers]
            if node.op_type not in _PASSES or (node.op_type == "Add" and len(computed) != 1):
                return None
            value = computed[0]
        return None

    def _weight(self, value: str, node: onnx.NodeProto) -> list[tuple[str, int]] | None:
        """The tensors of a weight, with their lengths, that are known for sure."""
        for _ in range(_MOST_STEPS):
            if value in self.layouts:
                layout = self.layouts[value]
                if any(len(piece.choices) != 1 for piece in layout.pieces):
                    return None
                if len(layout.pieces) == 1:
                    turned = node.op_type.endswith("Conv") or _attribute(node, "transB")
                    length = layout.shape[0 if turned else -1]
                    return [(next(iter(layout.pieces[0].choices)), length)]
                return [(next(iter(p.choices)), p.length) for p in layout.pieces]
            producer = self.graph.producers.get(value)
            if producer is None or producer.op_type not in ("Transpose", "Identity", "Cast"):
                return None
            value = producer.input[0]
        return None

    def _by_partner(self, use: Use, choices: Sequence[str]) -> list[str]:
        """The scale of a norm by its bias, and the other way round."""
        node = use.node
        assert node is not None
        other = _PARTNERS.get(node.op_type, {}).get(use.index)
        if other is None or other >= len(node.input) or "Norm" not in node.op_type:
            return []
        layout = self.layouts.get(node.input[other])
        if layout is None or len(layout.pieces) != 1 or len(layout.pieces[0].choices) != 1:
            return []
        (partner,) = layout.pieces[0].choices
        return [
            name
            for name in choices
            if partner in (_sibling(name, "bias"), _sibling(name, "weight"))
        ]

    def _by_scope(self, use: Use, choices: Sequence[str]) -> list[str]:
        """By the module that the exporter says a node belongs to, or the smallest around it."""
        node = use.node
        assert node is not None
        exact = not ("Norm" in node.op_type and use.index in _BIASES.get(node.op_type, {}))
        for scope in _scopes(node):
            within = [name for name in choices if _is_inside(name, scope, exact)]
            if within:
                return within
        return []

    def _by_kind(self, node: onnx.NodeProto, choices: Sequence[str]) -> list[str]:
        """A table by whether rows are picked from it, or it is multiplied with."""
        wanted = node.op_type == "Gather"
        if not wanted and node.op_type not in (*_PRODUCTS, "Transpose"):
            return []
        return [n for n in choices if is_embedding(n.rpartition(".")[0]) == wanted]


def _sibling(name: str, kind: str) -> str:
    """The name of a module's other parameter: X.weight -> X.bias."""
    module, dot, parameter = name.rpartition(".")
    for old in ("weight", "bias"):
        parameter = parameter.replace(old, kind)
    return f"{module}{dot}{parameter}"


def _as_pieces(
    layout: Layout, biases: Sequence[str], lengths: Sequence[int]
) -> tuple[Layout, Names] | None:
    """Biases side by side, if that is what a layout can be; None for those that are not there."""
    if len(layout.shape) > 1 and layout.shape[-1] != sum(lengths):
        return None
    if len(layout.pieces) == len(biases):
        pairs = list(zip(biases, layout.pieces, strict=True))
        if all(bias in piece.choices or not piece.choices for bias, piece in pairs):
            return layout, tuple(bias if piece.choices else None for bias, piece in pairs)
    # All of them are zeros, and where one ends cannot be seen.
    choices = {name: order for piece in layout.pieces for name, order in piece.choices.items()}
    total = sum(piece.length for piece in layout.pieces)
    if layout.axis or total != sum(lengths) or not any(name in choices for name in biases):
        return None
    pieces = tuple(
        Piece({name: choices[name]} if name in choices else {}, length)
        for name, length in zip(biases, lengths, strict=True)
    )
    names = tuple(name if name in choices else None for name in biases)
    return Layout((total,), 0, pieces), names


def _attribute(node: onnx.NodeProto, name: str) -> int:
    return next((entry.i for entry in node.attribute if entry.name == name), 0)


def _alias(node: onnx.NodeProto) -> str:
    """The name under which a node passes an initializer on, if that is all it does."""
    return node.output[0] if node.op_type == "Identity" else ""


def _by_name(text: str, choices: Sequence[str]) -> list[str]:
    """The choices that a name in the graph ends with, or that end with it."""
    if not text:
        return []
    return [n for n in choices if f".{text}".endswith(f".{n}") or f".{n}".endswith(f".{text}")]


def _scopes(node: onnx.NodeProto) -> list[str]:
    """The modules that a node belongs to, by its notes or its name, the innermost first."""
    for entry in node.metadata_props:
        if entry.key == _SCOPES:
            try:
                listed = ast.literal_eval(entry.value)
            except (ValueError, SyntaxError):
                continue
            return [text for text in map(str, reversed(listed)) if text]
    path = PurePosixPath(node.name)
    if not path.is_absolute():
        return []
    parts = [part for part in path.parts[1:-1] if part]
    return [".".join(parts[:end]) for end in range(len(parts), 0, -1)]


def _is_inside(name: str, scope: str, exact: bool) -> bool:
    """Whether a parameter belongs to a module, or to one inside it.

    Either may have a prefix that the other lacks. If not `exact`, only one inside it counts.
    """
    module = name.rpartition(".")[0].split(".")
    around = scope.split(".")
    for one, other in _without_prefixes(module, around):
        if one[: len(other)] == other:
            return exact or len(one) > len(other)
    return False


def _without_prefixes(
    module: list[str], around: list[str]
) -> Iterator[tuple[list[str], list[str]]]:
    for skipped in range(3):
        if len(around) > skipped:
            yield module, around[skipped:]
    for skipped in range(1, 3):
        if len(module) > skipped:
            yield module[skipped:], around


def _cannot_tell(name: str, initializer: Initializer, use: Use, layout: Layout) -> Problem:
    others = len(layout.names) - 1
    return Problem(
        "error",
        name,
        f"{others} other tensors have the same values in the base, and the graph holds them once, "
        f"as {initializer.name}; it cannot be told which of its {len(initializer.uses)} uses is "
        f"meant ({use.label}, ...): export the base again with optimize=False, or export the "
        "merged model",
    )


def _once(problems: Sequence[Problem]) -> tuple[Problem, ...]:
    return tuple({problem.tensor: problem for problem in problems}.values())
