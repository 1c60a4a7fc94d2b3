"""How far outputs are from PyTorch's, and how far they may be."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from loratool.errors import VerificationError
from loratool.quiet import shorten
from loratool_plugins.exporters.onnx.sessions import Arrays, Session

Array = np.ndarray[Any, np.dtype[Any]]


@dataclass(frozen=True)
class Tolerance:
    """How far an output may be from PyTorch's.

    Attributes:
        value: the limit.
        relative: whether it is a share of the largest absolute value of that output. If not, it is
            absolute for values up to 10 and grows with them from there, as rounding does: a correct
            GPT-2 with logits of 127 is off by 2.6e-4.
        noise: how far PyTorch's own outputs in fp32 are from the exact ones, as a share of the
            largest value; four times that is allowed.
    """

    value: float
    relative: bool
    noise: float = 0.0

    def limit(self, largest: float) -> float:
        """The largest absolute difference that is allowed."""
        usual = self.value * (largest if self.relative else max(1.0, largest / 10))
        return max(usual, 4 * self.noise * largest)


# For weights and activations of a type: fp16 rounds to 11 bits, bf16 to 8.
TOLERANCES: Mapping[str, Tolerance] = {
    "fp32": Tolerance(1e-4, relative=False),
    "fp16": Tolerance(2e-2, relative=True),
    "bf16": Tolerance(8e-2, relative=True),
}


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

    def judge(self, label: str, tolerance: Tolerance) -> None:
        """Raise VerificationError if an output is too far from PyTorch's."""
        for name, difference in self.differences.items():
            allowed = tolerance.limit(self.largest[name])
            if not difference <= allowed:
                raise VerificationError(
                    f"{label}: {name} differs from PyTorch by {difference:.1e} on {self.batch} x "
                    f"{self.sequence} tokens, where values reach {self.largest[name]:.1e}; "
                    f"allowed is {allowed:.1e}"
                )


def compare(session: Session, feed: Mapping[str, Any], reference: Arrays) -> Comparison:
    """Run a session and compare every output, where there is one a token only on unpadded tokens.

    Args:
        session: the model.
        feed: tensors or arrays by name; those that the model does not take are left out.
        reference: PyTorch's outputs, by the same names.

    Raises:
        VerificationError: the outputs' names or shapes differ, or NaN is among them.
    """
    outputs = session.get_outputs()
    names = [output.name for output in outputs]
    if set(names) != set(reference):
        raise VerificationError(
            f"the ONNX model returns {', '.join(names)}, PyTorch {', '.join(reference)}"
        )
    given = {name: np.asarray(value) for name, value in feed.items()}
    results = run_session(session, given)
    masks = _masks(session, given)
    differences, largest = {}, {}
    for output in outputs:
        found, expected, name = results[output.name], reference[output.name], output.name
        if found.shape != expected.shape:
            raise VerificationError(
                f"{name} has shape {found.shape} in ONNX Runtime and {expected.shape} in PyTorch"
            )
        for axis, size in enumerate(output.shape):
            if axis and size in masks:
                mask = masks[size]
                found, expected = (np.moveaxis(each, axis, 1)[mask] for each in (found, expected))
                break
        differences[name], largest[name] = difference(name, found, expected)
    first = next(iter(given.values()))
    sequence = first.shape[1] if first.ndim > 1 else 1
    return Comparison(first.shape[0], sequence, differences, largest)


def difference(name: str, found: Array, expected: Array) -> tuple[float, float]:
    """The largest absolute difference of two arrays, and the largest absolute expected value.

    Infinities must stand in the same places.

    Raises:
        VerificationError: NaN is in one of them.
    """
    for where, values in (("ONNX Runtime", found), ("PyTorch", expected)):
        if np.isnan(values).any():
            raise VerificationError(f"{name}: {where} gives NaN")
    found, expected = found.astype(np.float32), expected.astype(np.float32)
    with np.errstate(invalid="ignore"):
        apart = np.where(found == expected, 0, np.abs(found - expected))
    finite = np.abs(expected[np.isfinite(expected)])
    return float(apart.max(initial=0)), float(finite.max(initial=0))


def run_session(session: Session, feed: Arrays) -> Arrays:
    """All outputs of a session by name, given the inputs that it takes and floats in its types.

    Raises:
        VerificationError: an input is missing, or ONNX Runtime cannot run it.
    """
    given = {}
    for entry in session.get_inputs():
        if entry.name not in feed:
            raise VerificationError(f"the ONNX model has an input {entry.name} that nothing feeds")
        given[entry.name] = feed[entry.name].astype(_dtype(entry.type), copy=False)
    names = [output.name for output in session.get_outputs()]
    try:
        results: Sequence[Any] = session.run(names, given)
    except VerificationError:
        raise
    except Exception as error:
        raise VerificationError(f"ONNX Runtime cannot run it: {shorten(error)}") from error
    return dict(zip(names, results, strict=True))


def _masks(session: Session, given: Arrays) -> dict[str, Array]:
    """Name of an axis -> which places along it are no padding, bool (batch, places)."""
    found = {}
    for entry in session.get_inputs():
        if entry.name.endswith("attention_mask") and len(entry.shape) == 2:
            axis = entry.shape[1]
            if isinstance(axis, str):
                found[axis] = given[entry.name] == 1
    return found


_TYPES = {
    "tensor(float)": np.float32,
    "tensor(float16)": np.float16,
    "tensor(double)": np.float64,
    "tensor(int64)": np.int64,
    "tensor(int32)": np.int32,
    "tensor(bool)": np.bool_,
}


def _dtype(ort_type: str) -> Any:
    if ort_type not in _TYPES:
        raise VerificationError(f"an input of type {ort_type} cannot be given to ONNX Runtime here")
    return _TYPES[ort_type]
