"""Graphs are held to the exact values where PyTorch in fp32 is itself far from them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch

from loratool.errors import VerificationError
from loratool_plugins.exporters.onnx.comparing import TOLERANCES, Tolerance
from loratool_plugins.exporters.onnx.judging import judged
from loratool_plugins.exporters.onnx.references import References

EXACT = np.linspace(-30, 30, 24).reshape(2, 3, 4)
BATCH = {"attention_mask": torch.tensor([[1, 1, 1], [0, 1, 1]])}


def run(graph: Any, noise: float, limits: Tolerance = TOLERANCES["fp32"]) -> tuple[Any, ...]:
    """Hold a graph's output against a PyTorch that is off by `noise` in fp32."""
    asked = []

    def answer(batches: Sequence[Any], dtype: torch.dtype) -> References:
        asked.append(dtype)
        off = noise if dtype == torch.float32 else 0.0
        values = EXACT + off
        values[1, 0] += 100 * off  # padding, which may be anything
        return References([{"logits": values}], "streamed")

    def check(references: References, tolerance: Tolerance) -> float:
        found = float(np.abs(graph - references.outputs[0]["logits"]).max())
        if found > tolerance.limit(30):
            raise VerificationError(f"off by {found}")
        return found

    _, held, how = judged(check, answer, [BATCH], limits)
    return held.noise, how, asked


def test_a_graph_that_is_close_is_not_held_against_fp64() -> None:
    assert run(EXACT + 1e-5, 0.0) == (0.0, "streamed", [torch.float32])


def test_a_graph_that_is_closer_to_the_truth_than_pytorch_passes_and_the_noise_is_told() -> None:
    noise, how, _ = run(EXACT + 1e-3, -2e-3)
    assert noise == pytest.approx(2e-3 / 30)
    assert how == "streamed, in fp64"


def test_a_graph_that_is_farther_than_four_times_the_noise_fails() -> None:
    with pytest.raises(VerificationError, match="off by"):
        run(EXACT + 1e-2, 2e-3)
    with pytest.raises(VerificationError, match="off by"):
        run(EXACT + 1e-2, 0.0)


def test_half_precision_is_judged_once() -> None:
    with pytest.raises(VerificationError, match="off by"):
        run(EXACT + 10, 5.0, TOLERANCES["fp16"])
