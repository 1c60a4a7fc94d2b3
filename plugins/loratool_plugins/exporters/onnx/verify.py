"""Whether a saved ONNX model does what its checkpoint does."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import torch

from loratool.checkpoint import Checkpoint
from loratool.engine import single_threaded_tasks
from loratool.errors import VerificationError
from loratool.quiet import quiet, shorten
from loratool.shell import load_class
from loratool_plugins.exporters.onnx.inputs import Feeds, sample_inputs
from loratool_plugins.exporters.onnx.weights import Written

# (batch, sequence) of the inputs that are compared; neither is the traced one.
_SHAPES = ((2, 7), (3, 13))
AXES = ("batch", "sequence")
_FATAL, _WARNING = 4, 2

Arrays = dict[str, np.ndarray[Any, np.dtype[Any]]]


@dataclass(frozen=True)
class Comparison:
    """How far an ONNX model is from PyTorch on one input.

    Attributes:
        batch: rows of the input.
        sequence: its columns.
        differences: output -> the largest absolute difference.
        largest: output -> the largest absolute value that PyTorch gives.
    """

    batch: int
    sequence: int
    differences: Mapping[str, float]
    largest: Mapping[str, float]


@dataclass(frozen=True)
class Tolerance:
    """How far an output may be from PyTorch's.

    Attributes:
        value: the limit.
        relative: whether it is a share of the largest absolute value of that output. If not, it is
            absolute for values up to 10 and grows with them from there, as rounding does: a correct
            GPT-2 with logits of 127 is off by 2.6e-4.
    """

    value: float
    relative: bool

    def limit(self, largest: float) -> float:
        """The largest absolute difference that is allowed."""
        return self.value * (largest if self.relative else max(1.0, largest / 10))


def open_session(path: Path, threads: int = 0) -> ort.InferenceSession:
    """Open an ONNX model on a GPU if ONNX Runtime can really use one, else on the CPU.

    Ask the session's `get_providers()` which of them it became: ONNX Runtime lists CUDA as
    available on machines without it, and falls back without an error.

    Args:
        path: the model file; its external data lies beside it.
        threads: intra-op threads on the CPU; 0 leaves the number to ONNX Runtime.

    Raises:
        VerificationError: ONNX Runtime refuses the model.
    """
    options = ort.SessionOptions()
    options.log_severity_level = _FATAL
    options.intra_op_num_threads = threads
    providers: list[Any] = ["CPUExecutionProvider"]
    if "CUDAExecutionProvider" in ort.get_available_providers():
        # TF32 rounds the inputs of matrix products to 10 bits: not what fp32 means here.
        providers.insert(0, ("CUDAExecutionProvider", {"use_tf32": "0"}))
    # That CUDA cannot be loaded goes to the default logger, whatever the session's level.
    ort.set_default_logger_severity(_FATAL)
    try:
        with quiet():
            if len(providers) > 1 and hasattr(ort, "preload_dlls"):
                ort.preload_dlls()  # finds CUDA where pip put it; prints if it is not there
            return ort.InferenceSession(str(path), options, providers=providers)
    except Exception as error:
        raise VerificationError(
            f"{path.name}: ONNX Runtime {ort.__version__} refuses it: {shorten(error)}"
        ) from error
    finally:
        ort.set_default_logger_severity(_WARNING)


def reference_outputs(
    merged: Checkpoint, tensors: dict[str, torch.Tensor], feeds: list[Feeds]
) -> list[Arrays]:
    """What PyTorch makes of a checkpoint, in fp32.

    transformers maps the names, ties and builds the buffers, so that an error of the exporter in
    any of these shows as a difference.

    Args:
        merged: the checkpoint, for its config.
        tensors: its tensors, as read for this purpose.
        feeds: the inputs.

    Raises:
        VerificationError: transformers finds the checkpoint incomplete.
    """
    assert merged.config is not None  # the exporter has built a graph from it
    cls, config = load_class(merged.config)
    try:
        with quiet():
            model, info = cls.from_pretrained(
                None,
                config=config,
                state_dict=tensors,
                dtype=torch.float32,
                output_loading_info=True,
            )
    except Exception as error:
        raise VerificationError(
            f"{merged.label}: transformers cannot load it: {shorten(error)}"
        ) from error
    if missing := sorted(info["missing_keys"]):
        raise VerificationError(f"{merged.label}: transformers finds no {', '.join(missing[:3])}")
    model.eval()
    with torch.inference_mode(), quiet():
        results = [model(**feed) for feed in feeds]
    return [
        {name: value.numpy() for name, value in result.items() if torch.is_tensor(value)}
        for result in results
    ]


def verify(
    path: Path, written: Written, merged: Checkpoint, seed: int, tolerance: Tolerance
) -> tuple[list[str], list[Comparison]]:
    """Read a checkpoint again, and hold a saved ONNX model against it.

    The stored weights must be these tensors bit by bit, and the model must do on padded random
    inputs of two shapes what PyTorch does. PyTorch's model is gone before ONNX Runtime loads its
    own.

    Returns:
        The session's providers, and one comparison a shape.

    Raises:
        VerificationError: a weight is another one, or an output is missing, not a number, or too
            far from PyTorch's.
    """
    assert merged.config is not None
    cls, config = load_class(merged.config)
    feeds = [sample_inputs(cls, config, *shape, seed + i) for i, shape in enumerate(_SHAPES)]
    with single_threaded_tasks():  # as they were written
        tensors = {name: tensor.read() for name, tensor in merged.items()}
    written.check(merged)
    references = reference_outputs(merged, tensors, feeds)
    del tensors
    session = open_session(path)
    comparisons = []
    for feed, reference in zip(feeds, references, strict=True):
        comparisons.append(compare(session, feed, reference))
        _judge(path.name, comparisons[-1], tolerance)
    return list(session.get_providers()), comparisons


def compare(session: ort.InferenceSession, feed: Feeds, reference: Arrays) -> Comparison:
    """Run a session and compare every output, where there is one a token only on unpadded tokens.

    Raises:
        VerificationError: the outputs' names or shapes differ, or NaN is among them.
    """
    outputs = session.get_outputs()
    names = [output.name for output in outputs]
    if set(names) != set(reference):
        raise VerificationError(
            f"the ONNX model returns {', '.join(names)}, PyTorch {', '.join(reference)}"
        )
    try:
        results = session.run(None, {name: tensor.numpy() for name, tensor in feed.items()})
    except Exception as error:
        raise VerificationError(f"ONNX Runtime cannot run it: {shorten(error)}") from error
    mask = feed["attention_mask"].numpy() == 1
    differences, largest = {}, {}
    for output, found in zip(outputs, results, strict=True):
        expected, name = reference[output.name], output.name
        if found.shape != expected.shape:
            raise VerificationError(
                f"{name} has shape {found.shape} in ONNX Runtime and {expected.shape} in PyTorch"
            )
        if np.isnan(found).any() or np.isnan(expected).any():
            where = "ONNX Runtime" if np.isnan(found).any() else "PyTorch"
            raise VerificationError(f"{name}: {where} gives NaN on {mask.shape} tokens")
        if tuple(output.shape[:2]) == AXES:
            found, expected = found[mask], expected[mask]
        differences[name] = float(np.abs(found.astype(np.float32) - expected).max(initial=0))
        largest[name] = float(np.abs(expected).max(initial=0))
    batch, sequence = mask.shape
    return Comparison(batch, sequence, differences, largest)


def _judge(label: str, found: Comparison, tolerance: Tolerance) -> None:
    for name, difference in found.differences.items():
        allowed = tolerance.limit(found.largest[name])
        if not difference <= allowed:
            raise VerificationError(
                f"{label}: {name} differs from PyTorch by {difference:.1e} on {found.batch} x "
                f"{found.sequence} tokens, where values reach {found.largest[name]:.1e}; allowed "
                f"is {allowed:.1e}"
            )
