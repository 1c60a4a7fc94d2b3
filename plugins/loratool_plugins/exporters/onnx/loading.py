"""Whether ONNX Runtime takes a graph, at the least that loading can cost."""

from __future__ import annotations

from pathlib import Path

import onnxruntime as ort

from loratool.errors import VerificationError
from loratool.quiet import shorten


def loads(path: Path, base: Path) -> str:
    """Load a graph on the CPU without optimising it; what came of it, in words.

    Args:
        path: the graph.
        base: the graph that it was made of: what the CPU cannot run of that, it cannot run here.

    Raises:
        VerificationError: ONNX Runtime loads the base, but not this.
    """
    error = _error(path)
    if error is None:
        return "loads"
    if _error(base) is None:
        raise VerificationError(f"{path.name}: ONNX Runtime does not load it: {shorten(error)}")
    return f"not tried: the base itself does not load ({shorten(error)})"


def _error(path: Path) -> Exception | None:
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.log_severity_level = 4
    options.add_session_config_entry("session.disable_prepacking", "1")
    try:
        ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # its exceptions have no common class but this
        return error
    return None
