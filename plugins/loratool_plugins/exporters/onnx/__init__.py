"""Models of transformers as ONNX graphs."""

from loratool_plugins.exporters.onnx.exporter import DATA_FILE, MODEL_FILE, Onnx
from loratool_plugins.exporters.onnx.sessions import open_session

__all__ = ["DATA_FILE", "MODEL_FILE", "Onnx", "open_session"]
