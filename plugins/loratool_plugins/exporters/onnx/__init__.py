"""Models of transformers as ONNX graphs."""

from loratool_plugins.exporters.onnx.exporter import Onnx
from loratool_plugins.exporters.onnx.sessions import open_session

__all__ = ["Onnx", "open_session"]
