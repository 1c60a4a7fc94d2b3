"""One timed run of a session, with what it is given."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort

from loratool.errors import FormatError, InputError, MismatchError
from loratool.quiet import shorten
from loratool.reports import listed
from loratool_plugins.steps.bench.feeds import Feeds
from loratool_plugins.steps.bench.graphs import Graph
from loratool_plugins.steps.bench.sessions import device_of

Values = Mapping[str, Any]  # OrtValue


def read_adapter(path: Path) -> Values:
    """The values of an .onnx_adapter file, by the inputs that they are for.

    Raises:
        InputError: there is no such file.
        FormatError: it is of another kind.
    """
    if not path.is_file():
        raise InputError(f"{path}: no such file")
    try:
        values: Values = ort.AdapterFormat.read_adapter(str(path)).get_parameters()
    except Exception as error:
        raise FormatError(f"{path}: is no .onnx_adapter file ({shorten(error)})") from error
    if not values:
        raise FormatError(f"{path}: holds nothing")
    return values


def takes_adapter(graph: Graph, adapter: Values, path: Path) -> bool:
    """Whether a graph has the inputs of an adapter, with values of its own without one.

    Raises:
        MismatchError: it has some of them, but not all.
    """
    own = {found.name for found in graph.inputs if found.is_optional}
    missing = sorted(adapter.keys() - own)
    if len(missing) == len(adapter):
        return False
    if missing:
        raise MismatchError(
            f"{path}: does not belong to {graph.path}, which has no input {listed(missing, 4)}"
        )
    return True


def timed_run(session: Any, feeds: Feeds, adapter: Values | None = None) -> Callable[[], float]:
    """A function that runs a session once and returns the seconds that it took.

    Inputs lie on the session's device before it starts, and outputs stay there.

    Args:
        session: a session of ONNX Runtime.
        feeds: a value for each input that it needs.
        adapter: values of inputs that have others by themselves.
    """
    device = device_of(session)
    binding = session.io_binding()
    for name, array in feeds.items():
        binding.bind_ortvalue_input(name, ort.OrtValue.ortvalue_from_numpy(array, device, 0))
    for name, value in (adapter or {}).items():
        if device != "cpu":
            value = ort.OrtValue.ortvalue_from_numpy(np.asarray(value.numpy()), device, 0)
        binding.bind_ortvalue_input(name, value)
    for output in session.get_outputs():
        binding.bind_output(output.name, device, 0)

    def run() -> float:
        started = time.perf_counter()
        session.run_with_iobinding(binding)
        binding.synchronize_outputs()
        return time.perf_counter() - started

    return run
