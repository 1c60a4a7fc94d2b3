"""bench: which models there are, what they are given, what is told of them, and what is refused."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest
from onnx import TensorProto

import loratool
from loratool.errors import FormatError, InputError, MismatchError, UsageError
from loratool.reports import Report, to_json
from loratool_plugins.steps.bench import Bench, lineup, trial
from loratool_plugins.steps.bench.feeds import Making, make_feeds
from loratool_plugins.steps.bench.graphs import read_graph
from loratool_plugins.steps.bench.loading import Load, measure_load
from loratool_plugins.steps.bench.models import find_models
from loratool_plugins.steps.bench.sessions import PROVIDERS, Options
from loratool_plugins.steps.bench.shapes import Extent, Shape, extent, parse_shapes
from tests.onnx_graphs import VOCABULARY, WIDTH, value, write_cached_model, write_text_model

QUICK: dict[str, Any] = {"shape": ("2x4",), "threads": 1, "warmups": 1, "repeats": 3}


@pytest.fixture
def no_loads(monkeypatch: pytest.MonkeyPatch) -> None:
    """Loads are not measured: each takes a process."""
    made = Load(0.5, 1 << 20, 2 << 20, ("CPUExecutionProvider",))
    monkeypatch.setattr(trial, "measure_load", lambda path, options: made)


def bench(*models: Path, **options: Any) -> Report:
    return loratool.bench(models, **{**QUICK, **options})


def write_adapter(
    path: Path, layers: int = 2, values: Mapping[str, tuple[int, int]] | None = None
) -> Path:
    """An adapter of rank 3 with the shapes that every layer has, or other ones."""
    shapes = values or {
        f"lora_{side}.{layer}": shape
        for layer in range(layers)
        for side, shape in (("A", (WIDTH, 3)), ("B", (3, WIDTH)))
    }
    adapter = ort.AdapterFormat()
    adapter.set_adapter_version(1)
    adapter.set_model_version(1)
    adapter.set_parameters(
        {
            name: ort.OrtValue.ortvalue_from_numpy(np.ones(shape, np.float32))
            for name, shape in shapes.items()
        }
    )
    adapter.export_adapter(str(path))
    return path


# What is told.


def test_everything_is_told_of_every_model_and_shape(tmp_path: Path) -> None:
    base = write_text_model(tmp_path / "base", data="base.data").parent
    merged = write_text_model(tmp_path / "merged", data="merged.data", seed=1).parent
    slow = write_text_model(tmp_path / "slow", extra=2).parent
    report = bench(base, merged, slow, shape=("2x4", "1x3"))
    data = json.loads(to_json(report.data, indent=0))
    assert [model["name"] for model in data["models"]] == ["base", "merged", "slow"]
    assert data["reference"] == "base" and data["providers"] == ["CPUExecutionProvider"]
    for model in data["models"]:
        assert len(model["loads"]) == 3 and model["load_seconds"] > 0
        assert model["private_bytes"] > 0 and model["peak_bytes"] >= model["private_bytes"]
        assert model["disk_bytes"] == model["own_bytes"] == model["folder_bytes"]
    graphs = [model["graphs"]["model"] for model in data["models"]]
    assert [graph["equal_nodes"] for graph in graphs] == [True, True, False]
    assert graphs[2]["more_operators"] == {"MatMul": 4}
    assert [(r["batch"], r["sequence"], r["past"]) for r in data["results"]] == [
        (2, 4, None), (1, 3, None),
    ]  # fmt: skip
    for result in data["results"]:
        names = [model["name"] for model in result["models"]]
        assert names == ["base", "merged", "slow", "base again"]
        assert result["unit"] == "tokens/s" and result["rounds"] == 3
        for model in result["models"]:
            times = np.array(model["seconds"])
            assert model["median"] == pytest.approx(np.median(times))
            assert model["p10"] <= model["median"] <= model["p90"]
            tokens = result["batch"] * result["sequence"]
            assert model["throughput"] == pytest.approx(tokens / model["median"])
            low, high = model["ratio_interval"]
            assert low <= model["ratio"] <= high
        verdicts = [model["verdict"] for model in result["models"]]
        assert verdicts[0] is verdicts[3] is None
        assert set(verdicts[1:3]) <= {"same", "unclear", "slower", "faster"}
        assert result["noise_floor"] >= 0
    lines = "\n".join(report.lines)
    assert "merged: loaded in" in lines and "equal to the reference's" in lines
    assert "+4 MatMul" in lines and "on CPUExecutionProvider, 1 thread" in lines
    assert report.table is not None and len(report.table.rows) == 8


def test_what_is_said_follows_from_the_times(
    tmp_path: Path, no_loads: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = ("base", "same", "slow", "fast", "near")
    places = [write_text_model(tmp_path / name).parent for name in names]
    # Mean and spread; the last: the reference once more.
    seconds = iter(((1, 0.01), (1, 0.01), (1.07, 0.01), (0.5, 0.01), (1.05, 0.2), (1, 0.01)))
    generator = np.random.default_rng(0)

    def planted(session: Any, feeds: Any, adapter: Any) -> Callable[[], float]:
        mean, spread = next(seconds)
        return lambda: float(mean * (1 + spread * generator.standard_normal()))

    monkeypatch.setattr(trial, "timed_run", planted)
    report = bench(*places, repeats=40, plot=tmp_path / "out.svg")
    (result,) = report.data["results"]
    verdicts = [model["verdict"] for model in result["models"]]
    assert verdicts == [None, "same", "slower", "faster", "unclear", None]
    assert report.table is not None
    words = [row[-1] for row in report.table.rows]
    assert words[:2] == ["reference", "no difference beyond the noise"]
    assert words[2] == "1.07x slower" and words[3].endswith("x faster")
    assert words[4].endswith("x slower, not clear of the noise")
    assert words[5].startswith("noise floor: ±")


def test_loads_are_measured_in_processes_of_their_own(tmp_path: Path) -> None:
    small = write_text_model(tmp_path / "small")
    large = write_text_model(tmp_path / "large", width=1024, layers=4)
    options = Options("cpu", 1)
    one, other = measure_load(small, options), measure_load(large, options)
    assert one.providers == ("CPUExecutionProvider",)
    assert one.private is not None and other.private is not None and other.peak is not None
    assert other.private - one.private > 12 << 20  # of 16 MiB of weights
    assert other.peak >= other.private
    broken = tmp_path / "broken.onnx"
    broken.write_bytes(small.read_bytes().replace(b"MatMul", b"MatMux"))
    with pytest.raises(InputError, match=r"broken.onnx: ONNX Runtime .* refuses it"):
        measure_load(broken, options)


def test_files_that_models_share_are_counted_for_none_alone(tmp_path: Path, no_loads: None) -> None:
    base = write_text_model(tmp_path / "base", data="base.data").parent
    graft = tmp_path / "graft"
    graft.mkdir()
    os.link(base / "base.data", graft / "base.data")
    for name in ("math", "code"):
        content = (base / "model.onnx").read_bytes()
        (graft / f"{name}.onnx").write_bytes(content)
    report = bench(base, graft)
    models = {model["name"]: model for model in report.data["models"]}
    assert list(models) == ["base", "graft/code", "graft/math"]
    size = (base / "model.onnx").stat().st_size
    data = (base / "base.data").stat().st_size
    for model in models.values():
        assert (model["disk_bytes"], model["own_bytes"]) == (size + data, size)
    assert models["graft/math"]["folder_bytes"] == 2 * size + data


def test_a_model_is_measured_without_and_with_an_adapter(tmp_path: Path, no_loads: None) -> None:
    base = write_text_model(tmp_path / "base").parent
    swappable = write_text_model(tmp_path / "swap", lora=True).parent
    adapter = write_adapter(tmp_path / "math.onnx_adapter")
    report = bench(base, swappable, adapter=[adapter])
    models = {model["name"]: model for model in report.data["models"]}
    assert list(models) == ["base", "swap", "swap + math"]
    assert models["swap + math"]["own_bytes"] == adapter.stat().st_size
    assert models["swap"]["own_bytes"] == (swappable / "model.onnx").stat().st_size
    assert models["swap + math"]["load_seconds"] is None
    assert models["swap"]["graphs"]["model"]["more_operators"] == {"Add": 2, "MatMul": 4}


def test_against_names_the_reference(tmp_path: Path, no_loads: None) -> None:
    places = [write_text_model(tmp_path / name).parent for name in ("one", "two", "three")]
    report = bench(*places[:2], against=places[2])
    assert [model["name"] for model in report.data["models"]] == ["three", "one", "two"]
    report = bench(*places, against=places[1])
    assert [model["name"] for model in report.data["models"]] == ["two", "one", "three"]


@pytest.mark.parametrize("suffix", ["svg", "png"])
def test_a_picture(tmp_path: Path, no_loads: None, suffix: str) -> None:
    places = [write_text_model(tmp_path / name).parent for name in ("base", "merged")]
    picture = tmp_path / f"out.{suffix}"
    bench(*places, shape=("2x4", "1x2", "1x3", "1x5"), plot=picture)
    content = picture.read_bytes()
    if suffix == "svg":
        for words in ("Latency against base", "merged", "base again", "2 x 4", "1 x 5", "ratio"):
            assert words in content.decode(), words
    else:
        assert content.startswith(b"\x89PNG") and len(content) > 10_000


def test_a_provider_that_is_not_here_is_told_or_refused(tmp_path: Path, no_loads: None) -> None:
    base = write_text_model(tmp_path / "base").parent
    report = bench(base, provider="dml")
    assert report.data["providers"] == ["CPUExecutionProvider"]
    assert any("DmlExecutionProvider was asked for and is not here" in n for n in report.notes)
    with pytest.raises(InputError, match="has no DmlExecutionProvider here"):
        bench(base, provider="dml", strict=True)


def test_what_takes_too_long_is_cut_short_and_told(tmp_path: Path, no_loads: None) -> None:
    base = write_text_model(tmp_path / "base").parent
    report = bench(base, repeats=50, limit=1e-9)
    assert report.data["results"][0]["rounds"] == 3
    assert any("only 3 rounds fitted into --limit" in note for note in report.notes)


# Which models there are.


def test_stages_make_one_model_and_other_names_several(tmp_path: Path) -> None:
    for name in ("prefill", "decode", "math-prefill", "math-decode"):
        (tmp_path / f"{name}.onnx").touch()
    found = find_models([tmp_path])
    assert [model.name for model in found] == [tmp_path.name, f"{tmp_path.name}/math"]
    assert [sorted(model.graphs) for model in found] == [["decode", "prefill"]] * 2


def test_names_are_as_short_as_they_can_be(tmp_path: Path) -> None:
    for name in ("a/onnx", "b/onnx", "c"):
        write_text_model(tmp_path / name)
    places = [tmp_path / "a/onnx", tmp_path / "b/onnx/model.onnx", tmp_path / "c"]
    found = [model.name for model in find_models(places)]
    assert found[:2] == ["a/onnx", "b/onnx"] and found[2].endswith("c")


def test_a_decode_graph_computes_one_token_after_others(tmp_path: Path, no_loads: None) -> None:
    for name in ("one", "two"):
        write_cached_model(tmp_path / name, "decode.onnx")
        write_cached_model(tmp_path / name, "prefill.onnx")
    report = bench(tmp_path / "one", tmp_path / "two", shape=("2x6", "1x3+5"))
    found = [(r["stage"], r["batch"], r["sequence"], r["past"]) for r in report.data["results"]]
    assert found == [
        ("prefill", 2, 6, 0), ("prefill", 1, 3, 5), ("decode", 2, 1, 6), ("decode", 1, 3, 5),
    ]  # fmt: skip


def test_a_past_is_for_the_graphs_with_a_cache(tmp_path: Path, no_loads: None) -> None:
    write_cached_model(tmp_path, "decode.onnx")
    write_text_model(tmp_path, name="prefill.onnx")
    report = bench(tmp_path, shape=("2x6", "1x1+5"))
    found = [(r["stage"], r["sequence"], r["past"]) for r in report.data["results"]]
    assert found == [("prefill", 6, None), ("decode", 1, 6), ("decode", 1, 5)]
    (model,) = report.data["models"]  # both graphs together, as `no_loads` gives them
    assert (model["load_seconds"], model["private_bytes"], model["peak_bytes"]) == (
        1.0, 2 << 20, 3 << 20,
    )  # fmt: skip


def test_a_stage_that_only_one_has_is_left_out_and_told(tmp_path: Path) -> None:
    for name in ("prefill", "decode"):
        write_cached_model(tmp_path / "one", f"{name}.onnx")
    write_cached_model(tmp_path / "two", "decode.onnx")
    found = lineup.line_up([tmp_path / "one", tmp_path / "two"], None, [])
    assert found.notes == ("two: only one of the two has prefill: left out",)


# What they are given.


def feeds(path: Path, size: Extent, **making: Any) -> dict[str, np.ndarray]:
    return make_feeds(read_graph(path), size, Making(**making))


def test_inputs_follow_the_signature(tmp_path: Path) -> None:
    inputs = [
        value("token_type_ids", ("a", "b")),
        value("position_ids", ("a", "b")),
        value("past_key_values.0.key", ("a", 4, "p", 8), TensorProto.FLOAT16),
        value("past_key_values.0.encoder.key", ("a", 4, "e", 8), TensorProto.FLOAT),
        value("pixel_values", ("a", "c", "h", "w"), TensorProto.FLOAT),
        value("use_cache_branch", (1,), TensorProto.BOOL),
    ]
    path = write_text_model(tmp_path, inputs=inputs)
    (tmp_path / "config.json").write_text('{"vision_config": {"image_size": 16}}')
    found = feeds(path, Extent(2, 5, 3, 7), vocabulary=20)
    assert {name: array.shape for name, array in found.items()} == {
        "input_ids": (2, 5), "attention_mask": (2, 8), "token_type_ids": (2, 5),
        "position_ids": (2, 5), "past_key_values.0.key": (2, 4, 3, 8),
        "past_key_values.0.encoder.key": (2, 4, 7, 8), "pixel_values": (2, 3, 16, 16),
        "use_cache_branch": (1,),
    }  # fmt: skip
    assert found["input_ids"].dtype == np.int64 and found["input_ids"].max() < 20
    assert len(np.unique(found["input_ids"])) > 3
    assert found["attention_mask"].all() and not found["token_type_ids"].any()
    assert found["position_ids"].tolist() == [[3, 4, 5, 6, 7]] * 2
    assert found["past_key_values.0.key"].dtype == np.float16
    again = feeds(path, Extent(2, 5, 3, 7), vocabulary=20)
    assert all(np.array_equal(found[name], again[name]) for name in found)


def test_ids_are_below_what_config_or_graph_allow(tmp_path: Path) -> None:
    path = write_text_model(tmp_path)
    found = trial.vocabulary_of([read_graph(path)])
    assert found == VOCABULARY
    (tmp_path / "config.json").write_text('{"text_config": {"vocab_size": 30}}')
    assert trial.vocabulary_of([read_graph(path)]) == 30


def test_what_a_shape_means() -> None:
    assert parse_shapes(["32x512", " 1X1+7 "]) == [Shape(32, 512), Shape(1, 1, 7)]
    assert extent(Shape(4, 9), True, "decode") == Extent(4, 1, 9, 9)
    assert extent(Shape(4, 9), True, "prefill") == Extent(4, 9, 0, 9)
    assert extent(Shape(4, 9), False, "model") == Extent(4, 9, 0, 9)
    assert extent(Shape(4, 9, 2), True, "decode") == Extent(4, 9, 2, 9)


def test_what_cannot_be_made_up_is_named_and_can_be_given(tmp_path: Path, no_loads: None) -> None:
    extra = [
        value("lengths", ("batch",)),
        value("audio", ("batch", "samples"), TensorProto.FLOAT),
    ]
    place = write_text_model(tmp_path / "odd", inputs=extra).parent
    with pytest.raises(InputError) as raised:
        bench(place)
    text = str(raised.value)
    assert "lengths int64 (batch): what it means is not known" in text
    assert "--inputs FILE.npz" in text and "--dim samples=SIZE" in text
    np.savez(tmp_path / "given.npz", lengths=np.array([4, 4]))
    report = bench(place, dim=("samples=9",), inputs=tmp_path / "given.npz")
    assert report.data["results"][0]["rounds"] == 3
    np.savez(tmp_path / "wrong.npz", lengths=np.array([4.5, 4]))
    with pytest.raises(MismatchError, match=r"lengths is float64 \(2,\)"):
        bench(place, dim=("samples=9",), inputs=tmp_path / "wrong.npz")


# What is refused.


def test_bad_places_are_told_all_at_once(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "other.bin").touch()
    with pytest.raises(InputError) as raised:
        bench(tmp_path / "none", tmp_path / "empty", tmp_path / "other.bin")
    text = str(raised.value)
    for words in ("none: no such file", "empty: holds no .onnx file; it is empty", "is no .onnx"):
        assert words in text
    place = write_text_model(tmp_path / "m").parent
    with pytest.raises(UsageError, match="is given twice"):
        bench(place, tmp_path / "m" / ".." / "m")


@pytest.mark.parametrize("content", [b"", b"no ONNX at all", bytes(100), b"\x08\x09"])
def test_what_is_not_onnx(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "model.onnx").write_bytes(content)
    with pytest.raises(FormatError, match="is not an ONNX model"):
        bench(tmp_path)


def test_weights_that_are_missing_short_or_outside(tmp_path: Path) -> None:
    path = write_text_model(tmp_path / "m", data="w.data")
    data = path.parent / "w.data"
    content = data.read_bytes()
    data.write_bytes(content[:-1])
    with pytest.raises(InputError, match=rf"w.data: has {len(content) - 1} bytes"):
        bench(path)
    data.unlink()
    with pytest.raises(InputError, match=r"w.data: there is no such file beside the graph"):
        bench(path)
    (tmp_path / "w.data").write_bytes(content)
    path.write_bytes(path.read_bytes().replace(b"\x06w.data", b"\x06../w.d"))
    with pytest.raises(InputError, match=r"\.\./w\.d: external data must lie in the folder"):
        bench(path)


def test_models_that_take_other_inputs(tmp_path: Path) -> None:
    base = write_text_model(tmp_path / "base").parent
    more = write_text_model(tmp_path / "m", inputs=[value("token_type_ids", ("a", "b"))]).parent
    with pytest.raises(MismatchError, match="it also needs token_type_ids"):
        bench(base, more)
    with pytest.raises(MismatchError, match="it does not take token_type_ids"):
        bench(more, base)
    images = [value("pixel_values", ("b", 3, 4, 4), TensorProto.FLOAT)]
    flat = [value("pixel_values", ("b", 48), TensorProto.FLOAT)]
    one = write_text_model(tmp_path / "one", inputs=images).parent
    two = write_text_model(tmp_path / "two", inputs=flat).parent
    with pytest.raises(MismatchError, match=r"takes pixel_values float \(b, 48\) instead of"):
        bench(one, two)


def test_shapes_that_a_graph_cannot_take(tmp_path: Path, no_loads: None) -> None:
    fixed = write_text_model(tmp_path / "fixed", input_ids=(1, 8)).parent
    with pytest.raises(InputError, match="axis 0 is fixed to 1, and --shape asks for 2"):
        bench(fixed)
    with pytest.raises(InputError, match=r"has no cache .* leave \+3 out"):
        bench(write_text_model(tmp_path / "m").parent, shape=("1x1+3",))
    with pytest.raises(InputError, match=r"cannot run --shape 2x4: .*--vocab"):
        bench(tmp_path / "m", vocab=10 * VOCABULARY)


def test_adapters_that_nobody_takes(tmp_path: Path, no_loads: None) -> None:
    base = write_text_model(tmp_path / "base").parent
    swappable = write_text_model(tmp_path / "swap", lora=True).parent
    adapter = write_adapter(tmp_path / "a.onnx_adapter")
    with pytest.raises(MismatchError, match="no model here takes it"):
        bench(base, adapter=[adapter])
    deeper = write_adapter(tmp_path / "deep.onnx_adapter", layers=3)
    with pytest.raises(MismatchError, match=r"does not belong to .*no input lora_A\.2"):
        bench(swappable, adapter=[deeper])
    values = {"lora_A.0": (WIDTH + 1, 3), "lora_B.0": (3, WIDTH)}
    wrong = write_adapter(tmp_path / "wrong.onnx_adapter", values=values)
    with pytest.raises(InputError, match="cannot run --shape 2x4"):  # so it is really bound
        bench(swappable, adapter=[wrong])
    with pytest.raises(InputError, match="no such file"):
        bench(swappable, adapter=[tmp_path / "none"])
    with pytest.raises(FormatError, match=r"is no .onnx_adapter file"):
        bench(swappable, adapter=[swappable / "model.onnx"])


def test_a_reference_must_be_one_model(tmp_path: Path) -> None:
    for name in ("math.onnx", "code.onnx"):
        write_text_model(tmp_path / "m", name=name)
    with pytest.raises(InputError, match=r"holds several models \(code.onnx, math.onnx\)"):
        bench(tmp_path / "m", against=tmp_path / "m")
    found = lineup.line_up([tmp_path / "m"], tmp_path / "m" / "math.onnx", [])
    assert [one.name for one in found.contenders] == ["m/math", "m/code"]


@pytest.mark.parametrize(
    "options",
    [
        {"shape": ()}, {"shape": ("32",)}, {"shape": ("0x3",)}, {"shape": ("1x2", "1x2")},
        {"repeats": 2}, {"warmups": -1}, {"limit": 0.0}, {"limit": float("nan")},
        {"threads": -1}, {"vocab": 0}, {"dim": ("a",)}, {"dim": ("a=1", "a=2")},
        {"provider": "gpu"}, {"strict": True}, {"adapter": ("a", "a")}, {"plot": "x.pdf"},
        {"seed": -1},
    ],
)  # fmt: skip
def test_options_that_make_no_sense(options: dict[str, Any]) -> None:
    with pytest.raises(UsageError):
        Bench(**options)


def test_the_step_offers_every_provider() -> None:
    (field,) = [f for f in Bench.__dataclass_fields__.values() if f.name == "provider"]
    assert tuple(PROVIDERS) == field.metadata["choices"]
