"""Sessions of ONNX Runtime with the same options, and one timed run of them."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort

from loratool.errors import FormatError, InputError, MismatchError
from loratool.quiet import quiet, shorten
from loratool.reports import listed
from loratool_plugins.steps.bench.feeds import Feeds
from loratool_plugins.steps.bench.graphs import Graph

Provider = str
PROVIDERS: Mapping[str, Provider] = {
    "cpu": "CPUExecutionProvider",
    "cuda": "CUDAExecutionProvider",
    "tensorrt": "TensorrtExecutionProvider",
    "rocm": "ROCMExecutionProvider",
    "dml": "DmlExecutionProvider",
    "webgpu": "WebGpuExecutionProvider",
    "coreml": "CoreMLExecutionProvider",
    "openvino": "OpenVINOExecutionProvider",
}
# Providers whose device holds inputs and outputs between runs, and what I/O binding calls it.
_DEVICES = {"CUDAExecutionProvider": "cuda", "TensorrtExecutionProvider": "cuda"}
_FATAL, _WARNING = 4, 2

Values = Mapping[str, Any]  # OrtValue


@dataclass(frozen=True)
class Options:
    """What all sessions share.

    Attributes:
        provider: a key of `PROVIDERS`.
        threads: of each operator; 0 for ONNX Runtime's choice.
    """

    provider: str = "cpu"
    threads: int = 0


def open_session(path: Path, options: Options) -> Any:
    """A session of a graph; which provider it really has, `providers_of` says.

    Threads stop spinning when a run ends: they would take the processor from the session that runs
    next.

    Raises:
        InputError: ONNX Runtime refuses the graph.
    """
    wanted = PROVIDERS[options.provider]
    settings = ort.SessionOptions()
    settings.intra_op_num_threads = options.threads
    settings.log_severity_level = _FATAL
    settings.add_session_config_entry("session.force_spinning_stop", "1")
    available = ort.get_available_providers()
    chosen = [name for name in dict.fromkeys((wanted, PROVIDERS["cpu"])) if name in available]
    ort.set_default_logger_severity(_FATAL)
    try:
        with quiet():
            if _DEVICES.get(wanted) == "cuda" and hasattr(ort, "preload_dlls"):
                ort.preload_dlls()  # finds CUDA where pip put it; prints if it is not there
            return ort.InferenceSession(str(path), settings, providers=chosen)
    except Exception as error:
        raise InputError(
            f"{path}: ONNX Runtime {ort.__version__} refuses it: {shorten(error)}"
        ) from error
    finally:
        ort.set_default_logger_severity(_WARNING)


def providers_of(session: Any) -> list[Provider]:
    """The providers that a session really has, the first one first."""
    return list(session.get_providers())


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
    device = _DEVICES.get(providers_of(session)[0], "cpu")
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
