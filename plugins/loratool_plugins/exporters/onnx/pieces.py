"""A graph cut into pieces that are run one after the other.

ONNX Runtime maps external data, but what it transposes or casts of it (weights of fp16 on a CPU)
are copies, and it makes all of them before anything else is computed. In a piece these are bounded
by the piece's weights. A piece holds the nodes as they are, so running all pieces is running the
graph.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import onnx
from onnx.helper import make_tensor_value_info

_RANDOM = ("Random", "Bernoulli", "Multinomial")


@dataclass(frozen=True)
class Piece:
    """Some nodes of a graph.

    Attributes:
        inputs: values that they need and other pieces, or the caller, give.
        outputs: values of theirs that later pieces need, or that the graph returns.
        nodes: places of the nodes in the graph, in order.
    """

    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    nodes: tuple[int, ...]


def cut(model: onnx.ModelProto, limit: int) -> list[Piece]:
    """Cut a graph where the weights of the nodes since the last cut would exceed `limit`.

    What is computed from weights alone goes with the first node that uses it, and is computed again
    in another piece that does: no turned or cast weight crosses a cut.

    Args:
        model: the model; its weights may be in external data.
        limit: bytes of weights in a piece, if it is not a single node that has more.

    Returns:
        The pieces in their order; every node that the outputs depend on is in at least one.
    """
    graph = model.graph
    sizes = {tensor.name: _size(tensor) for tensor in graph.initializer}
    given = {value.name for value in graph.input}
    uses = [_uses(node) for node in graph.node]
    constant = _Constants(graph, uses, {name for name in sizes if name not in given})
    groups: list[list[int]] = [[]]
    held: set[str] = set()
    for index in range(len(graph.node)):
        if index in constant.nodes:
            continue
        weights = {name for use in uses[index] for name in constant.weights(use)}
        extra = sum(sizes[name] for name in weights - held)
        if extra and held and extra + sum(sizes[name] for name in held) > limit:
            groups.append([])
            held = set()
        groups[-1].append(index)
        held |= weights
    returned = [value.name for value in graph.output]
    for name in returned:
        groups[-1] += constant.chain(name)
    complete = [
        sorted({*group, *(i for at in group for use in uses[at] for i in constant.chain(use))})
        for group in groups
    ]
    return _wired(graph, uses, complete, {name for name in sizes if name not in given}, returned)


def piece_model(model: onnx.ModelProto, piece: Piece, types: Mapping[str, int]) -> onnx.ModelProto:
    """A piece as a model of its own, whose external data lies where the whole model's does.

    Args:
        model: the whole model.
        piece: as `cut` gives it.
        types: the element type of each of the piece's inputs.
    """
    made = onnx.ModelProto()
    made.ir_version = model.ir_version
    made.opset_import.extend(model.opset_import)
    made.functions.extend(model.functions)
    made.graph.name = model.graph.name
    nodes = [model.graph.node[index] for index in piece.nodes]
    made.graph.node.extend(nodes)
    used = {name for node in nodes for name in _uses(node)}
    made.graph.initializer.extend(t for t in model.graph.initializer if t.name in used)
    made.graph.input.extend(
        make_tensor_value_info(name, types[name], None) for name in piece.inputs if name in types
    )
    made.graph.output.extend(onnx.ValueInfoProto(name=name) for name in piece.outputs)
    return made


def weight_bytes(model: onnx.ModelProto) -> int:
    """Bytes of all initializers, in the file and outside of it."""
    return sum(_size(tensor) for tensor in model.graph.initializer)


class _Constants:
    """What is computed from initializers alone."""

    def __init__(self, graph: onnx.GraphProto, uses: Sequence[set[str]], weights: set[str]) -> None:
        self.nodes: set[int] = set()
        self._weights = {name: frozenset((name,)) for name in weights}
        self._chains: dict[str, frozenset[int]] = {name: frozenset() for name in weights}
        for index, node in enumerate(graph.node):
            if node.op_type.startswith(_RANDOM) or not uses[index] <= self._weights.keys():
                continue
            self.nodes.add(index)
            below = frozenset().union(*(self._weights[use] for use in uses[index]))
            chain = frozenset((index,)).union(*(self._chains[use] for use in uses[index]))
            for name in node.output:
                self._weights[name] = below
                self._chains[name] = chain

    def weights(self, name: str) -> frozenset[str]:
        """The initializers that a value is computed from, if it is from nothing else."""
        return self._weights.get(name, frozenset())

    def chain(self, name: str) -> frozenset[int]:
        """The nodes that compute such a value."""
        return self._chains.get(name, frozenset())


def _wired(
    graph: onnx.GraphProto,
    uses: Sequence[set[str]],
    groups: Sequence[Sequence[int]],
    weights: set[str],
    returned: Sequence[str],
) -> list[Piece]:
    pieces: list[Piece] = []
    wanted = set(returned)
    for group in reversed(groups):
        made = [name for index in group for name in graph.node[index].output if name]
        needed = set().union(*(uses[index] for index in group)) - set(made) - weights
        outputs = [name for name in made if name in wanted]
        wanted = (wanted - set(outputs)) | needed
        pieces.append(Piece(tuple(sorted(needed)), tuple(outputs), tuple(group)))
    return pieces[::-1]


def _uses(node: onnx.NodeProto) -> set[str]:
    """The values that a node takes, those of the graphs inside it included."""
    return set(_walk(node))


def _walk(node: onnx.NodeProto) -> Iterator[str]:
    yield from filter(None, node.input)
    for attribute in node.attribute:
        for graph in [*([attribute.g] if attribute.HasField("g") else []), *attribute.graphs]:
            own = {value.name for value in (*graph.input, *graph.initializer)}
            own |= {name for inner in graph.node for name in inner.output}
            for inner in graph.node:
                yield from (name for name in _walk(inner) if name not in own)
            yield from (value.name for value in graph.output if value.name not in own)


def _size(tensor: onnx.TensorProto) -> int:
    places = {entry.key: entry.value for entry in tensor.external_data}
    return int(places["length"]) if "length" in places else int(tensor.ByteSize())
