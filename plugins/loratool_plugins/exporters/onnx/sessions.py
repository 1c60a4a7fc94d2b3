"""Sessions of ONNX Runtime: on which device, and with how much memory.

ONNX Runtime maps a model's external data, but by default copies nearly all of it: it packs the
weights of matrix products, folds what is computed from weights alone, and casts fp16 weights for
CPUs, which have no kernels for them. A frugal session does none of this: a Llama of 1.17 billion
parameters in fp32 (4.7 GB) runs in 24 MB of private memory.
"""

from __future__ import annotations

import ctypes
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import onnx
import onnxruntime as ort
from onnx.helper import (
    make_graph,
    make_model,
    make_node,
    make_opsetid,
    make_tensor_value_info,
    np_dtype_to_tensor_dtype,
)

from loratool.errors import UsageError, VerificationError
from loratool.quiet import shorten
from loratool.runtime import start_session
from loratool_plugins.exporters.onnx.cpu_form import cpu_form
from loratool_plugins.exporters.onnx.pieces import Piece, cut, piece_model, weight_bytes

CPU = "CPUExecutionProvider"
PROVIDERS: Mapping[str, str] = {
    "cpu": CPU,
    "cuda": "CUDAExecutionProvider",
    "webgpu": "WebGpuExecutionProvider",
    "dml": "DmlExecutionProvider",
}
# Weights up to this many bytes are run as users run them, whatever ONNX Runtime copies of them.
SMALL = 64 << 20
# Bytes of weights in a piece of a larger model.
PIECE = 64 << 20
_FATAL = 4
# Weights of these types are cast before a CPU computes with them.
_HALF = (onnx.TensorProto.FLOAT16, onnx.TensorProto.BFLOAT16)

_FOLDER = "session.model_external_initializers_file_folder_path"

Arrays = dict[str, np.ndarray[Any, np.dtype[Any]]]


class Session(Protocol):
    """What is needed of an `onnxruntime.InferenceSession`."""

    def get_inputs(self) -> Sequence[Any]:
        """The inputs, with `name`, `type` and `shape`."""
        ...

    def get_outputs(self) -> Sequence[Any]:
        """The outputs, likewise."""
        ...

    def get_providers(self) -> Sequence[str]:
        """The execution providers that it uses, first choice first."""
        ...

    def run(self, names: Sequence[str] | None, feeds: Mapping[str, Any]) -> Sequence[Any]:
        """Compute outputs, all of them in order for None."""
        ...


def open_session(
    path: Path, device: str = "cpu", threads: int = 0, frugal: bool = False
) -> ort.InferenceSession:
    """Open an ONNX model on a device if ONNX Runtime can really use it, else on the CPU.

    Ask `shortfall` whether it is the device that was asked for: ONNX Runtime lists CUDA as
    available on machines without it, and falls back without an error.

    Args:
        path: the model file; its external data lies beside it.
        device: "cpu", "cuda", "webgpu" or "dml".
        threads: intra-op threads on the CPU; 0 leaves the number to ONNX Runtime.
        frugal: whether weights are to stay where they are mapped, at the cost of speed. On a CPU
            this holds for fp32; fp16 weights are cast as they are used (see `open_bounded`).

    Raises:
        UsageError: there is no such device.
        VerificationError: ONNX Runtime refuses the model.
    """
    options = _options(threads, frugal)
    if device == "dml":  # its documentation asks for both
        options.enable_mem_pattern = False
        options.execution_mode = ort.ExecutionMode.ORT_SEQUENTIAL
    return _open(str(path), path.name, options, _providers(device), frugal)


def open_bounded(path: Path, device: str = "cpu", threads: int = 0) -> Session:
    """Open an ONNX model so that running it holds little of it in memory.

    A small model is opened as everybody would. Of a larger one on a CPU weights stay mapped; with
    half-precision weights, which a CPU must cast, it is loaded whole but run in pieces. On another
    device the weights go into the device's memory. What a CPU has no kernels for is rewritten
    (`cpu_form`); `remark` tells it.

    Args:
        path: the model file; its external data lies beside it.
        device: as in `open_session`.
        threads: as in `open_session`.

    Raises:
        UsageError: there is no such device.
        VerificationError: ONNX Runtime refuses the model.
    """
    session: Session
    try:
        model = onnx.load(path, load_external_data=False)
    except Exception:  # ONNX Runtime says it better
        model = onnx.ModelProto()
    elsewhere = device != "cpu" and not shortfall(device, usable(device))
    runnable, rewritten = (model, ()) if elsewhere else cpu_form(model)
    if elsewhere or (weight_bytes(model) <= SMALL and not rewritten):
        session = open_session(path, device, threads)
        return session
    options = _options(threads, frugal=True)
    if rewritten:
        options.add_session_config_entry(_FOLDER, str(path.parent))
        content: str | bytes = runnable.SerializeToString()
    else:
        content = str(path)
    whole = _open(content, path.name, options, [CPU], frugal=True)
    cast = any(tensor.data_type in _HALF for tensor in model.graph.initializer)
    if not rewritten and not cast:
        session = whole
        return session
    pieces = cut(runnable, PIECE)
    return PieceSession(whole, runnable, path.parent, pieces, threads, "; ".join(rewritten))


def remark(session: Session) -> str:
    """What a session of `open_bounded` computes otherwise than the saved graph says; "" if nothing.

    It belongs into the manifest.
    """
    return session.remark if isinstance(session, PieceSession) else ""


def usable(device: str) -> Sequence[str]:
    """The providers that a session on a device really gets here, found out on a tiny model."""
    ends = [make_tensor_value_info(name, onnx.TensorProto.FLOAT, [1]) for name in "xy"]
    graph = make_graph([make_node("Identity", ["x"], ["y"])], "tiny", ends[:1], ends[1:])
    model = make_model(graph, opset_imports=[make_opsetid("", 18)], ir_version=8)
    content = model.SerializeToString()
    session = _open(content, "a tiny model", _options(1, False), _providers(device), False)
    found: Sequence[str] = session.get_providers()
    return found


def shortfall(device: str, used: Sequence[str]) -> str:
    """Why a session does not run on the device that was asked for; "" if it does.

    Args:
        device: what was asked for.
        used: what the session's `get_providers()` gives.
    """
    wanted = PROVIDERS[device]
    if wanted in used:
        return ""
    if wanted in ort.get_available_providers():
        reason = f"cannot start {wanted} on this machine (its device or driver is missing)"
    else:
        reason = f"has no {wanted} in this build"
    return f"ONNX Runtime {ort.__version__} {reason}; verified on the CPU instead of {device}"


def require_device(device: str, used: Sequence[str]) -> None:
    """Raise VerificationError if a session does not run on the device that was asked for."""
    if found := shortfall(device, used):
        raise VerificationError(f"{found}, which is not enough for --strict")


@dataclass
class PieceSession:
    """A model that is run piece by piece; to its users a session like others.

    Attributes:
        whole: the model in one session, which tells about it but is not run.
        model: the model without its external data.
        folder: where its external data lies.
        pieces: as `cut` gives them.
        threads: intra-op threads.
        remark: what was rewritten for the CPU.
    """

    whole: ort.InferenceSession
    model: onnx.ModelProto
    folder: Path
    pieces: Sequence[Piece]
    threads: int = 0
    remark: str = ""
    _sessions: dict[tuple[int, frozenset[str]], ort.InferenceSession] = field(default_factory=dict)

    def get_inputs(self) -> Sequence[Any]:
        """The inputs of the whole model."""
        found: Sequence[Any] = self.whole.get_inputs()
        return found

    def get_outputs(self) -> Sequence[Any]:
        """The outputs of the whole model."""
        found: Sequence[Any] = self.whole.get_outputs()
        return found

    def get_providers(self) -> Sequence[str]:
        """The execution providers."""
        found: Sequence[str] = self.whole.get_providers()
        return found

    def run(self, names: Sequence[str] | None, feeds: Mapping[str, Any]) -> list[Any]:
        """Run all pieces; a value is forgotten after the last piece that needs it."""
        returned = [value.name for value in self.model.graph.output]
        last = {name: at for at, piece in enumerate(self.pieces) for name in piece.inputs}
        values = dict(feeds)
        for number, piece in enumerate(self.pieces):
            given = {name: values[name] for name in piece.inputs if name in values}
            session = self._session(number, given)
            found = session.run(list(piece.outputs), given) if piece.outputs else []
            values.update(zip(piece.outputs, found, strict=True))
            _release()
            for name in piece.inputs:
                if last[name] == number and name not in returned:
                    values.pop(name, None)
        return [values[name] for name in names or returned]

    def _session(self, number: int, given: Mapping[str, Any]) -> ort.InferenceSession:
        key = number, frozenset(given)  # optional inputs may be given the next time
        if key not in self._sessions:
            types = {name: np_dtype_to_tensor_dtype(value.dtype) for name, value in given.items()}
            content = piece_model(self.model, self.pieces[number], types).SerializeToString()
            options = _options(self.threads, frugal=True)
            options.add_session_config_entry(_FOLDER, str(self.folder))
            label = f"piece {number + 1} of {len(self.pieces)}"
            self._sessions[key] = _open(content, label, options, [CPU], frugal=True)
        return self._sessions[key]


def _release() -> None:
    """Give what was freed back to the system; glibc would keep most of it."""
    try:
        ctypes.CDLL(None).malloc_trim(0)
    except (OSError, AttributeError):  # other C libraries have no such function
        return


def _options(threads: int, frugal: bool) -> ort.SessionOptions:
    options = ort.SessionOptions()
    options.log_severity_level = _FATAL
    options.intra_op_num_threads = threads
    if frugal:
        # One level more would cast all fp16 weights while loading.
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
        options.add_session_config_entry("session.disable_prepacking", "1")
        options.enable_cpu_mem_arena = False
        options.enable_mem_pattern = False
    return options


def _providers(device: str) -> list[Any]:
    if device not in PROVIDERS:
        raise UsageError(f"device {device!r}: use one of {', '.join(PROVIDERS)}")
    wanted = PROVIDERS[device]
    if wanted == CPU or wanted not in ort.get_available_providers():
        return [CPU]
    # TF32 rounds the inputs of matrix products to 10 bits: not what fp32 means here.
    return [(wanted, {"use_tf32": "0"}) if device == "cuda" else wanted, CPU]


def _open(
    model: str | bytes,
    label: str,
    options: ort.SessionOptions,
    providers: list[Any],
    frugal: bool,
) -> ort.InferenceSession:
    # Folding would store every transposed weight; left as they are, Transpose and MatMul become
    # one node that reads the weight where it lies.
    unwanted: dict[str, Any] = {"disabled_optimizers": ["ConstantFolding"]} if frugal else {}
    try:
        return start_session(model, options, providers, **unwanted)
    except Exception as error:
        raise VerificationError(
            f"{label}: ONNX Runtime {ort.__version__} refuses it: {shorten(error)}"
        ) from error
