"""How exact PyTorch's own answers are, where a graph's differ from them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, TypeVar

import numpy as np
import torch

from loratool.errors import VerificationError
from loratool_plugins.exporters.onnx.comparing import Array, Tolerance
from loratool_plugins.exporters.onnx.references import Batch, References
from loratool_plugins.exporters.onnx.sessions import Arrays

T = TypeVar("T")
Answer = Callable[[Sequence[Batch], torch.dtype], References]


def judged(
    check: Callable[[References, Tolerance], T],
    answer: Answer,
    batches: Sequence[Batch],
    tolerance: Tolerance,
) -> tuple[T, Tolerance, str]:
    """Hold a graph against PyTorch in fp32, and where that fails against PyTorch in fp64.

    Models with huge activations (SmolLM2's first token) make PyTorch itself miss the exact values
    in fp32 by more than others do. In fp64 it tells by how much, and a graph may miss them by a few
    times that.

    Args:
        check: compares with answers, within a tolerance; raises VerificationError.
        answer: runs PyTorch on batches, in a type.
        batches: the inputs.
        tolerance: how far outputs may be apart.

    Returns:
        What `check` returns, the tolerance that held, and how PyTorch was run.

    Raises:
        VerificationError: the graph is farther from the exact values than that.
    """
    references = answer(batches, torch.float32)
    try:
        return check(references, tolerance), tolerance, references.how
    except VerificationError as error:
        if tolerance.relative:  # 16 bits are coarser than any such noise
            raise
        exact = answer(batches, torch.float64)
        noise = _noise(references, exact, batches)
        wider = replace(tolerance, noise=noise)
        try:
            return check(exact, wider), wider, f"{references.how}, in fp64"
        except VerificationError:
            raise error from None


def _noise(found: References, exact: References, batches: Sequence[Batch]) -> float:
    """The largest error of any output, as a share of its largest value, without padding."""
    return max(
        _share(_unpadded(one[name], batch), _unpadded(other[name], batch))
        for one, other, batch in zip(found.outputs, exact.outputs, batches, strict=True)
        for name in _numbers(other)
    )


def _numbers(outputs: Arrays) -> list[str]:
    return [name for name, value in outputs.items() if value.dtype.kind == "f"]


def _unpadded(values: Array, batch: Mapping[str, Any]) -> Array:
    mask = batch.get("attention_mask")
    if mask is None:
        return values
    seen = np.asarray(mask) == 1
    kept: Array = values
    if values.shape[:2] == seen.shape:
        kept = values[seen]
    elif values.ndim == 4 and (values.shape[0], values.shape[2]) == seen.shape:
        kept = np.moveaxis(values, 2, 1)[seen]
    return kept


def _share(found: Array, exact: Array) -> float:
    finite = np.isfinite(exact) & np.isfinite(found)
    largest = float(np.abs(exact[finite]).max(initial=0))
    error = float(np.abs(found[finite] - exact[finite]).max(initial=0))
    return error / largest if largest else 0.0
