"""How fast ONNX models run in ONNX Runtime, one beside the other."""

from loratool_plugins.steps.bench.step import Bench

__all__ = ["Bench"]
