"""Sessions of ONNX Runtime: their devices, their memory, and graphs that are run in pieces."""

from __future__ import annotations

import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper, numpy_helper

from loratool.errors import UsageError, VerificationError
from loratool_plugins.exporters.onnx import sessions
from loratool_plugins.exporters.onnx.pieces import cut, weight_bytes
from loratool_plugins.exporters.onnx.sessions import (
    PieceSession,
    open_bounded,
    open_session,
    require_device,
    shortfall,
    usable,
)
from tests.plugins.exporters.verified_graphs import FEED, chain, save


@pytest.fixture
def no_small_models(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sessions, "SMALL", 0)


def in_pieces(path: Path, limit: int) -> PieceSession:
    model = onnx.load(path, load_external_data=False)
    whole = open_session(path, frugal=True)
    return PieceSession(whole, model, path.parent, cut(model, limit), 1)


def assert_same(path: Path, feeds: dict[str, Any], limit: int, pieces: int) -> None:
    session = in_pieces(path, limit)
    assert len(session.pieces) == pieces
    expected = open_session(path).run(None, feeds)
    for found, value in zip(session.run(None, feeds), expected, strict=True):
        np.testing.assert_allclose(found, value, rtol=1e-5, atol=1e-6)


def test_the_cpu_is_always_there() -> None:
    assert shortfall("cpu", usable("cpu")) == ""
    require_device("cpu", ["CPUExecutionProvider"])


@pytest.mark.parametrize("device", ["cuda", "webgpu", "dml"])
def test_a_device_that_is_not_there_is_said(device: str, tmp_path: Path) -> None:
    used = open_session(chain(tmp_path, 1), device).get_providers()
    if used != ["CPUExecutionProvider"]:
        pytest.skip(f"this machine has {device}")
    assert usable(device) == used
    message = shortfall(device, used)
    assert message.endswith(f"verified on the CPU instead of {device}")
    listed = sessions.PROVIDERS[device] in ort.get_available_providers()
    assert ("cannot start" if listed else "in this build") in message
    with pytest.raises(VerificationError, match="not enough for --strict"):
        require_device(device, used)


def test_a_device_that_is_used_is_no_shortfall() -> None:
    assert shortfall("cuda", ["CUDAExecutionProvider", "CPUExecutionProvider"]) == ""


def test_no_such_device(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="use one of cpu, cuda, webgpu, dml"):
        open_session(chain(tmp_path, 1), "tpu")


@pytest.mark.parametrize(("limit", "pieces"), [(1, 5), (600, 3), (1 << 20, 1)])
def test_pieces_do_what_the_whole_does(tmp_path: Path, limit: int, pieces: int) -> None:
    assert_same(chain(tmp_path, 5), FEED, limit, pieces)


def test_what_is_computed_from_weights_alone_stays_beside_its_users(tmp_path: Path) -> None:
    """The transposed weight comes first and is used first and last."""
    weight = np.arange(64, dtype=np.float32).reshape(8, 8) / 64
    nodes = [
        helper.make_node("Transpose", ["w"], ["t"]),
        helper.make_node("MatMul", ["x", "t"], ["a"]),
        helper.make_node("MatMul", ["a", "v"], ["b"]),
        helper.make_node("MatMul", ["b", "t"], ["y"]),
    ]
    path = save(
        tmp_path / "model.onnx", nodes,
        [numpy_helper.from_array(weight, "w"), numpy_helper.from_array(1 - weight, "v")],
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 8])],
        [
            helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", 8]),
            helper.make_tensor_value_info("t", TensorProto.FLOAT, [8, 8]),
        ],
    )  # fmt: skip
    model = onnx.load(path, load_external_data=False)
    assert weight_bytes(model) == 512
    first, second, third = cut(model, 1)
    assert (first.inputs, first.outputs, first.nodes) == (("x",), ("a",), (0, 1))
    assert (second.inputs, second.outputs, second.nodes) == (("a",), ("b",), (2,))
    assert (third.inputs, set(third.outputs), third.nodes) == (("b",), {"y", "t"}, (0, 3))
    assert_same(path, FEED, 1, 3)


def test_graphs_inside_of_nodes_take_values_from_other_pieces(tmp_path: Path) -> None:
    def branch(name: str, *nodes: Any) -> Any:
        out = helper.make_tensor_value_info(f"{name}_out", TensorProto.FLOAT, None)
        return helper.make_graph(list(nodes), name, [], [out])

    def product(name: str, left: str, right: str) -> Any:
        return helper.make_node("MatMul", [left, right], [f"{name}_out"])

    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["a"]),
        helper.make_node("MatMul", ["a", "v"], ["b"]),
        helper.make_node(
            "If", ["flag"], ["y"],
            then_branch=branch("then", product("then", "a", "u")),
            else_branch=branch("else", product("else", "b", "w")),
        ),
    ]  # fmt: skip
    generator = np.random.default_rng(0)
    weights = [
        numpy_helper.from_array(generator.standard_normal((8, 8)).astype(np.float32), name)
        for name in "wvu"
    ]
    path = save(
        tmp_path / "model.onnx", nodes, weights,
        [
            helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 8]),
            helper.make_tensor_value_info("flag", TensorProto.BOOL, []),
        ],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", 8])],
    )  # fmt: skip
    for flag in (True, False):
        assert_same(path, {**FEED, "flag": np.array(flag)}, 1, 3)


def test_small_models_are_opened_as_users_open_them(tmp_path: Path) -> None:
    path = chain(tmp_path, 3, dtype=np.float16)
    assert isinstance(open_bounded(path), ort.InferenceSession)


@pytest.mark.usefixtures("no_small_models")
def test_only_half_precision_is_run_in_pieces(tmp_path: Path) -> None:
    assert isinstance(open_bounded(chain(tmp_path, 3)), ort.InferenceSession)
    half = open_bounded(chain(tmp_path, 3, dtype=np.float16))
    assert isinstance(half, PieceSession)
    assert half.get_inputs()[0].name == "x"
    assert half.get_providers() == ["CPUExecutionProvider"]


@pytest.mark.usefixtures("no_small_models")
def test_a_piece_without_its_weights_is_refused(tmp_path: Path) -> None:
    path = chain(tmp_path, 3, dtype=np.float16)
    (tmp_path / "model.onnx.data").write_bytes(b"short")
    with pytest.raises(VerificationError, match=r"model\.onnx: ONNX Runtime .* refuses it"):
        open_bounded(path)


def private_memory() -> int:
    with Path("/proc/self/status").open() as status:
        line = next(line for line in status if line.startswith("RssAnon"))
    return int(line.split()[1]) << 10


def growth_while_running(path: Path, dtype: Any) -> int:
    """The most private memory that opening and running a model twice takes, in bytes."""
    before, peak, ended = private_memory(), [0], threading.Event()

    def watch() -> None:
        while not ended.is_set():
            peak[0] = max(peak[0], private_memory())
            time.sleep(0.001)

    thread = threading.Thread(target=watch)
    thread.start()
    session = open_bounded(path, threads=1)
    feed = {"x": np.ones((3, 512), dtype)}
    for _ in range(2):
        session.run(None, feed)
    ended.set()
    thread.join()
    return peak[0] - before


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="measured on Linux only")
@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_weights_are_not_held(
    dtype: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, no_small_models: None
) -> None:
    """128 layers of 512 x 512: 128 MiB in fp32. What is taken does not grow with the layers."""
    monkeypatch.setattr(sessions, "PIECE", 4 << 20)
    (tmp_path / "first").mkdir()
    growth_while_running(chain(tmp_path / "first", 2, 512, dtype), dtype)  # loads what is shared
    path = chain(tmp_path, 128, 512, dtype)
    assert (tmp_path / "model.onnx.data").stat().st_size == 128 * 512 * 512 * np.dtype(
        dtype
    ).itemsize
    assert growth_while_running(path, dtype) < 32 << 20
