"""Small ONNX graphs made by hand: a table of embeddings, a few products, and what goes wrong."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

WIDTH, VOCABULARY = 32, 50


def value(name: str, shape: Sequence[Any], dtype: int = TensorProto.INT64) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, dtype, list(shape))


def write_text_model(
    folder: Path,
    *,
    layers: int = 2,
    seed: int = 0,
    extra: int = 0,
    width: int = WIDTH,
    name: str = "model.onnx",
    data: str = "",
    inputs: Sequence[onnx.ValueInfoProto] = (),
    lora: bool = False,
    input_ids: Sequence[Any] = ("batch", "sequence"),
) -> Path:
    """input_ids and attention_mask -> logits, by products; the file.

    Args:
        folder: is made if need be.
        layers: products of (width, width).
        seed: of the weights.
        extra: products more in every layer, which make it slower.
        width: of everything.
        name: of the file.
        data: a file for the weights, if they are to lie outside.
        inputs: more of them; nothing uses their values.
        lora: whether every layer has optional inputs `lora_A.N` (width, r) and `lora_B.N`.
        input_ids: the axes.
    """
    folder.mkdir(parents=True, exist_ok=True)
    generator = np.random.default_rng(seed)
    table = generator.standard_normal((VOCABULARY, width)).astype(np.float32)
    weights = {"embed": table}
    nodes = [
        helper.make_node("Gather", ["embed", "input_ids"], ["h0"]),
        helper.make_node("Cast", ["attention_mask"], ["mask"], to=TensorProto.FLOAT),
        helper.make_node("Unsqueeze", ["mask", "last"], ["column"]),
    ]
    weights["last"] = np.array([-1], np.int64)
    optional = []
    for layer in range(layers):
        weights[f"w{layer}"] = (generator.standard_normal((width, width)) / width**0.5).astype("f4")
        nodes.append(helper.make_node("MatMul", [f"h{layer}", f"w{layer}"], [f"p{layer}.0"]))
        last = f"p{layer}.0"
        for number in range(extra):
            nodes.append(
                helper.make_node("MatMul", [last, f"w{layer}"], [f"p{layer}.{number + 1}"])
            )
            last = f"p{layer}.{number + 1}"
        if lora:
            for side, shape in (("A", (width, 0)), ("B", (0, width))):
                weights[f"lora_{side}.{layer}"] = np.zeros(shape, np.float32)
                axes = [axis or "rank" for axis in shape]
                optional.append(value(f"lora_{side}.{layer}", axes, TensorProto.FLOAT))
            nodes += [
                helper.make_node("MatMul", [f"h{layer}", f"lora_A.{layer}"], [f"a{layer}"]),
                helper.make_node("MatMul", [f"a{layer}", f"lora_B.{layer}"], [f"b{layer}"]),
                helper.make_node("Add", [last, f"b{layer}"], [f"s{layer}"]),
            ]
            last = f"s{layer}"
        nodes.append(helper.make_node("Tanh", [last], [f"h{layer + 1}"]))
    nodes.append(helper.make_node("Mul", [f"h{layers}", "column"], ["logits"]))
    graph = helper.make_graph(
        nodes,
        "text",
        [
            value("input_ids", input_ids),
            value("attention_mask", ("batch", "sequence")),
            *inputs,
            *optional,
        ],
        [value("logits", ("batch", "sequence", width), TensorProto.FLOAT)],
        [numpy_helper.from_array(array, key) for key, array in weights.items()],
    )
    return save(graph, folder / name, data)


def write_cached_model(folder: Path, name: str = "decode.onnx") -> Path:
    """input_ids, attention_mask and a cache of keys -> logits, and keys one token longer."""
    folder.mkdir(parents=True, exist_ok=True)
    table = np.ones((VOCABULARY, 4), np.float32)
    nodes = [
        helper.make_node("Gather", ["embed", "input_ids"], ["h"]),
        helper.make_node("Unsqueeze", ["h", "one"], ["key"]),
        helper.make_node("Concat", ["past_key_values.0.key", "key"], ["present.0.key"], axis=2),
        helper.make_node("ReduceSum", ["present.0.key", "axes"], ["kept"], keepdims=0),
        helper.make_node("Cast", ["attention_mask"], ["mask"], to=TensorProto.FLOAT),
        helper.make_node("Mul", ["kept", "mask"], ["logits"]),  # fails unless as long
    ]
    graph = helper.make_graph(
        nodes,
        "cached",
        [
            value("input_ids", ("batch", "sequence")),
            value("attention_mask", ("batch", "past + sequence")),
            value("past_key_values.0.key", ("batch", 1, "past", 4), TensorProto.FLOAT),
        ],
        [
            value("logits", ("batch", "total"), TensorProto.FLOAT),
            value("present.0.key", ("batch", 1, "total", 4), TensorProto.FLOAT),
        ],
        [
            numpy_helper.from_array(table, "embed"),
            numpy_helper.from_array(np.array([1], np.int64), "one"),
            numpy_helper.from_array(np.array([1, 3], np.int64), "axes"),
        ],
    )
    return save(graph, folder / name)


def save(graph: onnx.GraphProto, path: Path, data: str = "") -> Path:
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    if data:
        onnx.save(model, path, save_as_external_data=True, location=data, size_threshold=64)
    else:
        onnx.save(model, path)
    return path
