"""Small ONNX graphs: made by hand, and traced from random models."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import torch
from onnx import TensorProto, helper, numpy_helper
from transformers.exporters.exporter_onnx import OnnxConfig, OnnxExporter

from loratool.quiet import quiet
from loratool.shell import Shell
from loratool_plugins.exporters.onnx.stages import name_graph, stages_of

FEED = {"x": np.linspace(-1, 1, 24, dtype=np.float32).reshape(3, 8)}


def chain(folder: Path, layers: int, width: int = 8, dtype: Any = np.float32) -> Path:
    """x -> x @ W.T, as often as asked, each layer with a square weight of its own."""
    generator = np.random.default_rng(0)
    kind = TensorProto.FLOAT if dtype is np.float32 else TensorProto.FLOAT16
    nodes, weights, value = [], [], "x"
    for layer in range(layers):
        weight = generator.standard_normal((width, width)) / np.sqrt(width)
        weights.append(numpy_helper.from_array(weight.astype(dtype), f"w{layer}"))
        nodes += [
            helper.make_node("Transpose", [f"w{layer}"], [f"t{layer}"], perm=[1, 0]),
            helper.make_node("MatMul", [value, f"t{layer}"], [f"y{layer}"]),
        ]
        value = f"y{layer}"
    return save(
        folder / "model.onnx", nodes, weights,
        [helper.make_tensor_value_info("x", kind, ["batch", width])],
        [helper.make_tensor_value_info(value, kind, ["batch", width])],
    )  # fmt: skip


def save(
    path: Path, nodes: Sequence[Any], weights: Sequence[Any], inputs: Any, outputs: Any
) -> Path:
    """Save a graph with its weights in a file of their own."""
    graph = helper.make_graph(nodes, "graph", inputs, outputs, initializer=weights)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    onnx.save(
        model, path, save_as_external_data=True, location=f"{path.name}.data", size_threshold=0
    )
    return path


def trace_stages(
    model: Any, folder: Path, dtype: torch.dtype = torch.float32, fusions: Any = None
) -> dict[str, Path]:
    """The graphs of a model with its weights: stage -> file. Changes the model's type."""
    model.to(dtype).eval()
    paths = {}
    for stage in stages_of(Shell(type(model).__name__, model, {})):
        settings = OnnxConfig(
            dynamic=True, dynamic_shapes=stage.dynamic_shapes, opset_version=20,
            optimize=fusions is not None, ort_fusions=fusions,
        )  # fmt: skip
        with quiet():
            program = OnnxExporter().export(stage.module, dict(stage.inputs), settings).program
        name_graph(program, stage)
        paths[stage.name] = folder / f"{stage.name}.onnx"
        ir.save(program, paths[stage.name], external_data=f"{stage.name}.onnx.data")
    return paths
