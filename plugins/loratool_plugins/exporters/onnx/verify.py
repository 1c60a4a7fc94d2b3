"""Whether saved ONNX graphs do what their checkpoint does."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx
from blake3 import blake3

from loratool.checkpoint import Checkpoint
from loratool.engine import single_threaded_tasks
from loratool.shell import load_class
from loratool_plugins.exporters.onnx.comparing import Comparison, Tolerance, compare
from loratool_plugins.exporters.onnx.inputs import sample_inputs
from loratool_plugins.exporters.onnx.references import references_of
from loratool_plugins.exporters.onnx.sessions import Arrays, open_bounded, open_session
from loratool_plugins.exporters.onnx.stored import Stored, check_stored, direct
from loratool_plugins.exporters.onnx.weights import Written

__all__ = ["Comparison", "Tolerance", "compare", "open_session", "verify", "verify_graph"]

# (batch, sequence) of the inputs that are compared; neither is the traced one.
SHAPES = ((2, 7), (3, 13))


def verify(
    path: Path, written: Written, merged: Checkpoint, seed: int, tolerance: Tolerance
) -> tuple[list[str], list[Comparison]]:
    """Read a checkpoint again, and hold a saved ONNX model against it.

    The stored weights must be these tensors bit by bit, and the model must do on padded random
    inputs of two shapes what PyTorch does. Neither holds a large model.

    Returns:
        The session's providers, and one comparison a shape.

    Raises:
        VerificationError: a weight is another one, or an output is missing, not a number, or too
            far from PyTorch's.
    """
    assert merged.config is not None
    cls, config = load_class(merged.config)
    feeds = [sample_inputs(cls, config, *shape, seed + i) for i, shape in enumerate(SHAPES)]
    with single_threaded_tasks():  # as they were written
        check_stored(stored_of(written, merged), merged)
    references = references_of(merged, feeds)
    return verify_graph(path, feeds, references.outputs, tolerance)


def stored_of(written: Written, merged: Checkpoint) -> Iterator[Stored]:
    """Where the tensors of a checkpoint were written as they lie in it."""
    for name, (offset, dtype) in written.places.items():
        yield Stored(name, written.path, offset, dtype, direct(merged[name]))


def verify_graph(
    path: Path,
    feeds: Sequence[Mapping[str, Any]],
    references: Sequence[Arrays],
    tolerance: Tolerance,
    device: str = "cpu",
) -> tuple[list[str], list[Comparison]]:
    """Run a saved graph and compare what it gives with what PyTorch gives.

    Args:
        path: the graph; its external data lies beside it.
        feeds: its inputs, one mapping a sample.
        references: PyTorch's outputs for them.
        tolerance: how far they may be apart.
        device: where to run it, if that is possible here; the CPU otherwise.

    Returns:
        The session's providers, and one comparison a sample.

    Raises:
        VerificationError: ONNX Runtime refuses it, or an output is missing, not a number, or too
            far from PyTorch's.
    """
    session = open_bounded(path, device)
    comparisons = []
    for feed, reference in zip(feeds, references, strict=True):
        comparisons.append(compare(session, feed, reference))
        comparisons[-1].judge(path.name, tolerance)
    return list(session.get_providers()), comparisons


@dataclass(frozen=True)
class Facts:
    """What a manifest says of a graph's file.

    Attributes:
        operators: operator, with its domain where it is not ONNX's own -> how many nodes.
        digest: BLAKE3 of the file, in hex.
    """

    operators: Mapping[str, int]
    digest: str


def facts_of(path: Path) -> Facts:
    """Count the operators of a saved graph, inner graphs included, and digest its file."""
    graph = onnx.load(path, load_external_data=False).graph
    counts = Counter(_operators(graph))
    return Facts(dict(sorted(counts.items())), file_digest(path))


def file_digest(path: Path) -> str:
    """BLAKE3 of a file of any size, in hex."""
    return str(blake3().update_mmap(path).hexdigest())


def _operators(graph: onnx.GraphProto) -> Iterator[str]:
    for node in graph.node:
        domain = f"{node.domain}." if node.domain not in ("", "ai.onnx") else ""
        yield f"{domain}{node.op_type}"
        for attribute in node.attribute:
            for inner in [*([attribute.g] if attribute.HasField("g") else []), *attribute.graphs]:
                yield from _operators(inner)
