"""Sessions of ONNX Runtime with the same options."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnxruntime as ort

from loratool.errors import InputError
from loratool.quiet import shorten
from loratool.runtime import start_session

Provider = str
PROVIDERS: Mapping[str, Provider] = {
    "cpu": "CPUExecutionProvider",
    "cuda": "CUDAExecutionProvider",
    "webgpu": "WebGpuExecutionProvider",
    "dml": "DmlExecutionProvider",
    "coreml": "CoreMLExecutionProvider",
}
# Providers whose device holds inputs and outputs between runs, and what I/O binding calls it.
_DEVICES = {"CUDAExecutionProvider": "cuda"}
_FATAL = 4


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
    if options.provider == "dml":  # which cannot do it
        settings.enable_mem_pattern = False
    settings.add_session_config_entry("session.force_spinning_stop", "1")
    available = ort.get_available_providers()
    chosen = [name for name in dict.fromkeys((wanted, PROVIDERS["cpu"])) if name in available]
    try:
        return start_session(str(path), settings, chosen)
    except Exception as error:
        raise InputError(
            f"{path}: ONNX Runtime {ort.__version__} refuses it: {shorten(error)}"
        ) from error


def providers_of(session: Any) -> list[Provider]:
    """The providers that a session really has, the first one first."""
    return list(session.get_providers())


def device_of(session: Any) -> str:
    """Where a session's inputs and outputs lie best: "cpu" or "cuda"."""
    return _DEVICES.get(providers_of(session)[0], "cpu")
