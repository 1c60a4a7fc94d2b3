"""Graphs that the CPU provider has no kernels for, in a form that it can run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper, numpy_helper

from loratool.errors import VerificationError
from loratool_plugins.exporters.onnx.cpu_form import NORMS_APART, WIDENED, cpu_form
from loratool_plugins.exporters.onnx.sessions import open_bounded, open_session, remark
from tests.plugins.exporters.verified_graphs import FEED, chain, save

HEADS, SIZE = 2, 8
WIDTH = HEADS * SIZE


def test_what_a_cpu_can_run_is_left_alone(tmp_path: Path) -> None:
    model = onnx.load(chain(tmp_path, 2), load_external_data=False)
    assert cpu_form(model) == (model, ())
    assert cpu_form(model)[0] is model
    assert remark(open_bounded(tmp_path / "model.onnx")) == ""


def bf16_graph(folder: Path, weight: np.ndarray) -> Path:
    """(x + 1) @ weight in bf16, x and y being fp32."""
    kind = TensorProto.BFLOAT16
    one = helper.make_tensor("one", kind, [1], [1.0])
    nodes = [
        helper.make_node("Cast", ["x"], ["a"], to=kind),
        helper.make_node("Constant", [], ["one"], value=one),
        helper.make_node("Add", ["a", "one"], ["b"]),
        helper.make_node("MatMul", ["b", "w"], ["c"]),
        helper.make_node("Cast", ["c"], ["y"], to=TensorProto.FLOAT),
    ]
    return save(
        folder / "model.onnx", nodes,
        [helper.make_tensor("w", kind, weight.shape, weight.reshape(-1))],
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 8])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", 8])],
    )  # fmt: skip


def test_bf16_is_computed_in_fp32(tmp_path: Path) -> None:
    weight = np.arange(-32, 32, dtype=np.float32).reshape(8, 8)  # exact in bf16
    path = bf16_graph(tmp_path, weight)
    with pytest.raises(VerificationError, match="refuses it"):
        open_session(path)
    session = open_bounded(path)
    assert remark(session) == WIDENED
    (found,) = session.run(None, FEED)
    np.testing.assert_allclose(found, (FEED["x"] + 1) @ weight, rtol=1e-5)


def attention(folder: Path, packed: bool, normed: bool) -> Path:
    """One step of grouped queries over a cache of three tokens."""
    names = ["packed", "", ""] if packed else ["query", "key", "value"]
    inputs = [*names, "past_key", "past_value", "lengths", "total"]
    extra = {}
    if normed:
        inputs += [""] * 7 + ["query_norm", "key_norm"]
        extra = {"qk_norm_epsilon": 1e-3}
    node = helper.make_node(
        "GroupQueryAttention", inputs, ["y", "present_key", "present_value"], "attention",
        domain="com.microsoft", num_heads=HEADS, kv_num_heads=HEADS, **extra,
    )  # fmt: skip
    shapes = {name: ("n", 1, WIDTH * (3 if packed else 1)) for name in names if name}
    past = dict.fromkeys(("past_key", "past_value"), ("n", HEADS, "past", SIZE))
    given = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)
        for name, shape in {**shapes, **past}.items()
    ]
    weights = [
        numpy_helper.from_array(np.array([3], np.int32), "lengths"),
        numpy_helper.from_array(np.array(4, np.int32), "total"),
    ]
    if normed:
        weights += [numpy_helper.from_array(values, name) for name, values in NORMS.items()]
    graph = helper.make_graph(
        [node], "graph", given,
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", 1, WIDTH])],
        initializer=weights,
    )  # fmt: skip
    opsets = [helper.make_opsetid("", 20), helper.make_opsetid("com.microsoft", 1)]
    path = folder / f"{packed}-{normed}.onnx"
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=10), path)
    return path


NORMS = {
    "query_norm": np.linspace(0.5, 2, SIZE, dtype=np.float32),
    "key_norm": np.linspace(-1, 1, SIZE, dtype=np.float32),
}


def norm(values: np.ndarray, weight: np.ndarray) -> np.ndarray:
    apart = values.reshape(1, 1, HEADS, SIZE)
    normed = apart / np.sqrt((apart**2).mean(-1, keepdims=True) + 1e-3) * weight
    return normed.reshape(1, 1, WIDTH).astype(np.float32)


@pytest.mark.parametrize("packed", [False, True])
def test_norms_of_queries_and_keys_are_computed_apart(packed: bool, tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    query, key, value = (
        generator.standard_normal((1, 1, WIDTH)).astype(np.float32) for _ in range(3)
    )
    cache: dict[str, Any] = {
        name: generator.standard_normal((1, HEADS, 3, SIZE)).astype(np.float32)
        for name in ("past_key", "past_value")
    }
    given = (
        {"packed": np.concatenate([query, key, value], -1)}
        if packed
        else {"query": query, "key": key, "value": value}
    )
    path = attention(tmp_path, packed, normed=True)
    try:  # a later ONNX Runtime may have learnt it
        ort.InferenceSession(str(path)).run(None, {**given, **cache})
    except Exception as error:
        assert "norm" in str(error)
    session = open_bounded(path)
    assert remark(session) == NORMS_APART
    (found,) = session.run(None, {**given, **cache})
    plain = open_session(attention(tmp_path, packed=False, normed=False))
    ready = {
        "query": norm(query, NORMS["query_norm"]),
        "key": norm(key, NORMS["key_norm"]),
        "value": value,
    }
    (expected,) = plain.run(None, {**ready, **cache})
    np.testing.assert_allclose(found, expected, atol=1e-5)
