"""Adapters that are switched from call to call, with and without I/O binding."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper

from loratool.errors import FormatError, InputError, MismatchError
from loratool.runtime import Session

_RANDOM = np.random.default_rng(0)
_SHAPES = {"q": (6, 4), "v": (6, 3)}
_X = _RANDOM.standard_normal((2, 6)).astype("f")
_WEIGHTS = {name: _RANDOM.standard_normal(shape).astype("f") for name, shape in _SHAPES.items()}
Factors = Mapping[str, tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]]


def write_graph(path: Path) -> None:
    """Two products of x, `q` and `v`, each with factors as optional inputs."""
    nodes, inputs, outputs, values = [], [], [], []
    for name, (rows, columns) in _SHAPES.items():
        a, b = f"{name}.lora_A", f"{name}.lora_B"
        nodes += [
            helper.make_node("MatMul", ["x", name], [f"{name}.base"]),
            helper.make_node("MatMul", ["x", a], [f"{name}.down"]),
            helper.make_node("MatMul", [f"{name}.down", b], [f"{name}.up"]),
            helper.make_node("Add", [f"{name}.base", f"{name}.up"], [f"{name}.y"]),
        ]
        for key, shape in ((a, [rows, f"r_{name}"]), (b, [f"r_{name}", columns])):
            inputs.append(helper.make_tensor_value_info(key, TensorProto.FLOAT, shape))
            empty = [size if isinstance(size, int) else 0 for size in shape]
            values.append(helper.make_tensor(key, TensorProto.FLOAT, empty, b"", raw=True))
        values.append(onnx.numpy_helper.from_array(_WEIGHTS[name], name))
        outputs.append(helper.make_tensor_value_info(f"{name}.y", TensorProto.FLOAT, None))
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 6])
    graph = helper.make_graph(nodes, "g", [x, *inputs], outputs, values)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    onnx.save(model, path)


def write_adapter(path: Path, arrays: Mapping[str, np.ndarray[Any, Any]]) -> None:
    values = {name: ort.OrtValue.ortvalue_from_numpy(array) for name, array in arrays.items()}
    adapter = ort.AdapterFormat()
    adapter.set_parameters(values)
    adapter.export_adapter(str(path))


def factors(*targets: str, rank: int) -> dict[str, np.ndarray[Any, Any]]:
    found = {}
    for name in targets:
        rows, columns = _SHAPES[name]
        found[f"{name}.lora_A"] = _RANDOM.standard_normal((rows, rank)).astype("f")
        found[f"{name}.lora_B"] = _RANDOM.standard_normal((rank, columns)).astype("f")
    return found


_ADAPTERS = {"math": factors("q", "v", rank=3), "code": factors("q", rank=2), None: {}}


def expected(adapter: str | None) -> dict[str, np.ndarray[Any, Any]]:
    found = {}
    for name, weight in _WEIGHTS.items():
        values = _ADAPTERS[adapter]
        delta = 0.0
        if f"{name}.lora_A" in values:
            delta = values[f"{name}.lora_A"] @ values[f"{name}.lora_B"]
        found[f"{name}.y"] = _X @ (weight + delta)
    return found


def check(found: Mapping[str, Any], adapter: str | None) -> None:
    for name, value in expected(adapter).items():
        np.testing.assert_allclose(found[name], value, rtol=1e-5, atol=1e-5)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_graph(tmp_path / "model.onnx")
    for name, arrays in _ADAPTERS.items():
        if name is not None:
            write_adapter(tmp_path / f"{name}.onnx_adapter", arrays)
    return tmp_path


def test_a_folders_adapters_are_loaded_and_switched(folder: Path) -> None:
    session = Session(folder)

    assert session.adapters == ("code", "math")
    assert session.active is None
    assert session.targets == ("q", "v")
    for name in (None, "math", "code", "math", None, "code", None):
        session.set(name)
        assert session.active == name
        check(session.run({"x": _X}), name)


def test_a_call_may_name_another_adapter_than_the_one_that_is_set(folder: Path) -> None:
    session = Session(folder)
    session.set("math")

    check(session.run({"x": _X}, adapter="code"), "code")
    check(session.run({"x": _X}, adapter=None), None)
    check(session.run({"x": _X}), "math")
    assert list(session.run({"x": _X}, ["v.y"])) == ["v.y"]


def test_without_an_adapter_the_bits_are_the_base_models(folder: Path) -> None:
    session = Session(folder)

    found = session.run({"x": _X})

    (q, v) = session.session().run(None, {"x": _X})
    assert (found["q.y"].tobytes(), found["v.y"].tobytes()) == (q.tobytes(), v.tobytes())


def run_bound(session: Session, binding: Any, options: Any = None) -> dict[str, Any]:
    names = ["q.y", "v.y"]
    binding.bind_cpu_input("x", _X)
    for name in names:
        binding.bind_output(name)
    session.session().run_with_iobinding(binding, options)
    return dict(zip(names, binding.copy_outputs_to_cpu(), strict=True))


def test_binding_switches_where_onnx_runtimes_own_adapters_have_no_effect(folder: Path) -> None:
    session = Session(folder, options=_silent())
    loaded = ort.LoraAdapter()
    loaded.Load(str(folder / "math.onnx_adapter"))
    options = ort.RunOptions()
    options.add_active_adapter(loaded)
    names = ["q.y", "v.y"]
    unbound = session.session().run(names, {"x": _X}, options)

    check(dict(zip(names, unbound, strict=True)), "math")
    check(run_bound(session, session.session().io_binding(), options), None)
    check(run_bound(session, session.bind(adapter="math")), "math")


def _silent() -> Any:
    options = ort.SessionOptions()
    options.log_severity_level = 4
    return options


def test_nothing_stays_in_a_binding_of_the_adapter_before(folder: Path) -> None:
    session = Session(folder)
    binding = session.bind()

    for name in ("math", "code", None, "math", "code"):  # code leaves v alone
        session.set(name)
        assert session.bind(binding) is binding
        check(run_bound(session, binding), name)


def test_graphs_of_one_model_share_adapters(folder: Path) -> None:
    shutil.move(folder / "model.onnx", folder / "prefill.onnx")
    shutil.copy(folder / "prefill.onnx", folder / "decode.onnx")
    session = Session(folder)
    session.set("code")

    assert session.graphs == ("decode", "prefill")
    for graph in session.graphs:
        check(session.run({"x": _X}, graph=graph), "code")
        check(session.run({"x": _X}, graph=graph, adapter="math"), "math")
    with pytest.raises(InputError, match="name one of the graphs: decode, prefill"):
        session.run({"x": _X})
    with pytest.raises(InputError, match="there is no graph 'model': decode, prefill"):
        session.bind(graph="model")


def test_adapters_come_and_go(folder: Path) -> None:
    session = Session(folder / "model.onnx")
    assert session.adapters == ()

    session.load("sums", folder / "math.onnx_adapter")
    session.set("sums")
    check(session.run({"x": _X}), "math")
    session.load("sums", folder / "code.onnx_adapter")
    check(session.run({"x": _X}), "code")
    session.unload("sums")

    assert (session.adapters, session.active) == ((), None)
    check(session.run({"x": _X}), None)
    for use in (session.set, session.unload):
        with pytest.raises(InputError, match="no adapter 'sums' is loaded; there are none"):
            use("sums")
    with pytest.raises(InputError, match="no adapter 'sums'"):
        session.run({"x": _X}, adapter="sums")


def test_everything_that_does_not_fit_is_one_error_and_leaves_the_session_alone(
    folder: Path,
) -> None:
    session = Session(folder)
    good = factors("q", rank=2)
    wrong = {
        "k.lora_A": np.ones((6, 2), "f"),
        "q.lora_A": np.ones((5, 2), "f"),
        "q.lora_B": np.ones((2, 4), "f2"),
    }
    write_adapter(folder / "wrong.onnx_adapter", wrong)
    write_adapter(folder / "half.onnx_adapter", {"q.lora_A": good["q.lora_A"]})
    write_adapter(
        folder / "ranks.onnx_adapter", {**good, "q.lora_B": factors("q", rank=3)["q.lora_B"]}
    )

    with pytest.raises(MismatchError) as caught:
        session.load("math", folder / "wrong.onnx_adapter")

    message = str(caught.value)
    assert message.startswith(f"{folder / 'wrong.onnx_adapter'}: does not fit model.onnx:")
    assert "k.lora_A: the model has no such input" in message
    assert "q.lora_A: has the shape (5, 2), the model takes (6, r)" in message
    assert "q.lora_B: is a tensor(float16), the model takes a tensor(float)" in message
    with pytest.raises(MismatchError, match=r"q: has only one of \.lora_A and \.lora_B"):
        session.load("half", folder / "half.onnx_adapter")
    with pytest.raises(MismatchError, match=r"differ in rank: \[2, 3\]"):
        session.load("ranks", folder / "ranks.onnx_adapter")
    assert session.adapters == ("code", "math")
    check(session.run({"x": _X}, adapter="math"), "math")


def test_a_file_of_another_kind_is_an_error(folder: Path) -> None:
    session = Session(folder)
    (folder / "text.onnx_adapter").write_text("no adapter")

    with pytest.raises(FormatError, match=r"text.onnx_adapter: is no adapter file"):
        session.load("text", folder / "text.onnx_adapter")
    with pytest.raises(InputError, match=r"gone.onnx_adapter: there is no such file"):
        session.load("gone", folder / "gone.onnx_adapter")


def test_a_folder_that_takes_no_adapters_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"there is no .onnx file"):
        Session(tmp_path)
    write_graph(tmp_path / "model.onnx")
    (tmp_path / "loratool.json").write_text('{"kind": "merged"}')
    with pytest.raises(InputError, match=r"is no ONNX export: its loratool.json says 'merged'"):
        Session(tmp_path)
    (tmp_path / "loratool.json").write_text('{"kind": "onnx"}')
    assert Session(tmp_path).adapters == ()
    (tmp_path / "model.onnx").write_bytes(b"no graph")
    with pytest.raises(InputError, match=r"model.onnx: ONNX Runtime refuses it"):
        Session(tmp_path)


def test_a_graph_without_factors_is_an_error(tmp_path: Path) -> None:
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 6])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", 6])
    graph = helper.make_graph([helper.make_node("Neg", ["x"], ["y"])], "g", [x], [y])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    onnx.save(model, tmp_path / "model.onnx")

    with pytest.raises(InputError, match=r"takes no adapters.*--swappable"):
        Session(tmp_path)
