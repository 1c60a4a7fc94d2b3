"""Factors as optional inputs: nothing without an adapter, the merged model with one."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch
from onnx import TensorProto, checker

from loratool.application import Part as Bound
from loratool.application import Rounding, apply_parts
from loratool.errors import InputError, MismatchError
from loratool.opening import open_checkpoint
from loratool.runtime import Session
from loratool_plugins.exporters.onnx.adapter_file import add_slots, targets_of, write_adapters
from loratool_plugins.exporters.onnx.graph import trace
from loratool_plugins.exporters.onnx.origins import Origin, Part
from loratool_plugins.exporters.onnx.preparation import prepare
from loratool_plugins.exporters.onnx.swappable import (
    METADATA_KEY,
    Slot,
    adaptable,
    make_swappable,
)
from loratool_plugins.exporters.onnx.weights import Graph, write_weights
from tests.models import build, tiny_config
from tests.swappable_models import (
    Base,
    bound,
    difference,
    make_adapter,
    make_base,
    session,
)

_LINEAR = {
    "bert": ["query", "key", "value", "attention.output.dense", "intermediate.dense"],
    "llama": ["q_proj", "v_proj", "gate_proj", "down_proj", "lm_head"],
    "gpt2": ["c_attn", "c_proj", "c_fc"],
}
_BASES: Mapping[str, tuple[str, str, str | None]] = {
    "bert": ("BertForMaskedLM", "bert", None),
    "llama": ("LlamaForCausalLM", "llama", None),
    "gpt2": ("GPT2LMHeadModel", "gpt2", None),
    "bert, fused for cpu": ("BertForMaskedLM", "bert", "cpu"),
    "llama, fused for cuda": ("LlamaForCausalLM", "llama", "cuda"),
}


@pytest.fixture(scope="module")
def make(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Base]:
    """Each model is exported once for all tests."""
    made: dict[str, Base] = {}

    def build(kind: str) -> Base:
        if kind not in made:
            architecture, model_type, fusions = _BASES[kind]
            folder = tmp_path_factory.mktemp("base")
            made[kind] = make_base(architecture, model_type, folder, fusions)
        return made[kind]

    return build


def swappable(base: Base, targets: Any = None) -> tuple[ir.Model, list[Slot]]:
    graph = replace(base.graph, model=base.graph.model.clone())
    wanted = adaptable([graph]) if targets is None else targets
    return graph.model, make_swappable([graph], wanted, base.tied)


def outputs(path: Path, feeds: Any, adapter: Path | None = None) -> np.ndarray[Any, Any]:
    options = ort.RunOptions()
    if adapter is not None:
        loaded = ort.LoraAdapter()
        loaded.Load(str(adapter))
        options.add_active_adapter(loaded)
    found: np.ndarray[Any, Any] = session(path).run(None, feeds, options)[0]
    return found


@pytest.mark.parametrize("kind", list(_BASES))
def test_a_graph_with_factors_is_the_base_and_with_an_adapter_what_peft_computes(
    kind: str, make: Callable[[str], Base], tmp_path: Path
) -> None:
    base = make(kind)
    targets = _LINEAR[kind.partition(",")[0]]
    trained = make_adapter(
        base, tmp_path / "math", targets,
        rank_pattern={targets[0]: 2}, alpha_pattern={targets[1]: 11}, use_rslora=True,
    )  # fmt: skip
    model, slots = swappable(base)
    ir.save(base.graph.model, tmp_path / "base.onnx")
    ir.save(model, tmp_path / "model.onnx")
    if "fused" not in kind:  # it does not know ONNX Runtime's own operators
        checker.check_model(str(tmp_path / "model.onnx"), full_check=True)

    (written,) = write_adapters([bound(base, trained)], slots, tmp_path)

    plain = outputs(tmp_path / "base.onnx", base.feeds)
    assert plain.tobytes() == outputs(tmp_path / "model.onnx", base.feeds).tobytes()
    adapted = outputs(tmp_path / "model.onnx", base.feeds, tmp_path / "math.onnx_adapter")
    assert difference(adapted, plain, base.feeds) > 0.01
    assert difference(adapted, trained.expected, base.feeds) < 2e-5
    assert written["file"] == "math.onnx_adapter"
    assert written["ranks"] == [2, 4]
    assert [path.name for path in tmp_path.glob(".*")] == []


def test_the_graph_says_what_it_takes(make: Callable[[str], Base], tmp_path: Path) -> None:
    model, slots = swappable(make("gpt2"), ["transformer.h.0.mlp.c_fc.weight"])
    ir.save(model, tmp_path / "model.onnx")

    loaded = session(tmp_path / "model.onnx")

    (slot,) = slots
    assert (slot.target, slot.turned) == ("transformer.h.0.mlp.c_fc", False)
    optional = {v.name: v.shape for v in loaded.get_overridable_initializers()}
    assert optional == {
        "transformer.h.0.mlp.c_fc.lora_A": [32, slot.rank],
        "transformer.h.0.mlp.c_fc.lora_B": [slot.rank, 128],
    }
    said = json.loads(loaded.get_modelmeta().custom_metadata_map[METADATA_KEY])
    assert said["targets"][slot.target]["lora_A"] == [32, "r"]


def test_without_adapters_all_weights_that_are_only_multiplied_by_are_meant(
    make: Callable[[str], Base],
) -> None:
    graph = make("gpt2").graph

    every, linear = adaptable([graph]), adaptable([graph], "linear")

    assert set(every) - set(linear) == {"transformer.wpe.weight", "transformer.wte.weight"}
    assert [name.rpartition("h.0.")[2] for name in linear] == [
        "attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight",
    ]  # fmt: skip


def test_no_two_targets_share_a_rank(make: Callable[[str], Base]) -> None:
    _, slots = swappable(make("llama"))

    assert len({slot.rank for slot in slots}) == len(slots) > 7


def test_embeddings_and_tied_heads_have_factors_of_their_own(
    make: Callable[[str], Base], tmp_path: Path
) -> None:
    base = make("gpt2")
    trained = make_adapter(base, tmp_path / "words", ["wte", "wpe"], ensure_weight_tying=True, r=3)
    part = bound(base, trained)
    model, slots = swappable(base, targets_of([part], adaptable([base.graph])))
    ir.save(model, tmp_path / "model.onnx")

    write_adapters([part], slots, tmp_path)

    kinds = {slot.target: (slot.kind, slot.turned) for slot in slots}
    assert kinds == {
        "transformer.wpe": ("embedding", False),
        "transformer.wte": ("embedding", False),
        "lm_head": ("linear", True),
    }
    found = outputs(tmp_path / "model.onnx", base.feeds, tmp_path / "words.onnx_adapter")
    merged = _merged_logits(base, part)
    assert difference(found, merged, base.feeds) < 2e-5


def _merged_logits(base: Base, part: Bound) -> np.ndarray[Any, Any]:
    applied = apply_parts(open_checkpoint(str(base.folder)), [part], None, Rounding(), False)
    state = {name: tensor.read() for name, tensor in applied.tensors.items()}
    model = type(base.model).from_pretrained(None, config=base.model.config, state_dict=state)
    with torch.no_grad():
        feeds = {name: torch.from_numpy(feed) for name, feed in base.feeds.items()}
        found: np.ndarray[Any, Any] = model.eval()(**feeds).logits.numpy()
    return found


def test_a_weight_scales_an_adapter(make: Callable[[str], Base], tmp_path: Path) -> None:
    base = make("llama")
    trained = make_adapter(base, tmp_path / "code", ["o_proj"])
    part = bound(base, trained, -0.5)
    model, slots = swappable(base, targets_of([part], adaptable([base.graph])))
    ir.save(model, tmp_path / "model.onnx")

    write_adapters([part], slots, tmp_path)

    assert [slot.target for slot in slots] == ["model.layers.0.self_attn.o_proj"]
    found = outputs(tmp_path / "model.onnx", base.feeds, tmp_path / "code.onnx_adapter")
    assert difference(found, _merged_logits(base, part), base.feeds) < 2e-5


_NO_GRAPH = Graph("", ir.Model(ir.Graph([], [], nodes=[]), ir_version=10), {})


def test_a_decoders_two_graphs_take_the_same_adapters(tmp_path: Path) -> None:
    """Traced without weights and fused, with a cache, switched between adapters and none."""
    model = build("LlamaForCausalLM", tiny_config("llama", num_hidden_layers=1))
    model.save_pretrained(tmp_path / "base")
    random = np.random.default_rng(0)
    ids, mask = random.integers(3, 60, (2, 7)), np.ones((2, 7), np.int64)
    mask[1, :3] = 0
    positions = np.maximum(mask.cumsum(1) - 1, 0)
    feeds = {"input_ids": ids, "attention_mask": mask}
    base = Base(model, tmp_path / "base", _NO_GRAPH, feeds)
    trained = {
        "math": make_adapter(base, tmp_path / "math", ["q_proj", "gate_proj", "lm_head"]),
        "code": make_adapter(base, tmp_path / "code", ["v_proj"], r=2),
    }
    prepared = prepare(open_checkpoint(str(base.folder)), torch.float32, cache=True)
    graphs = [
        trace(prepared.shell, stage, prepared.prints, "cuda", 20).graph for stage in prepared.stages
    ]
    folder = tmp_path / "model"
    folder.mkdir()

    found = add_slots(graphs, prepared, [bound(base, t) for t in trained.values()], max_rank=4)
    write_weights(graphs, prepared.tensors, folder / "model.onnx.data", lambda name: None)
    for graph in graphs:
        ir.save(graph.model, folder / f"{graph.name}.onnx")
    write_adapters(found.parts, found.slots, folder, max_rank=4)

    loaded = Session(folder)
    assert loaded.graphs == ("decode", "prefill")
    assert loaded.adapters == ("code", "math")
    for name in ("math", "code", "math"):
        loaded.set(name)
        begun = loaded.run(
            {"input_ids": ids[:, :-1], "attention_mask": mask[:, :-1],
             "position_ids": positions[:, :-1]},
            graph="prefill",
        )  # fmt: skip
        past = {
            key.replace("present", "past_key_values"): value
            for key, value in begun.items()
            if key.startswith("present")
        }
        last = {"input_ids": ids[:, -1:], "attention_mask": mask, "position_ids": positions[:, -1:]}
        binding = loaded.bind(graph="decode")
        for key, value in {**last, **past}.items():
            binding.bind_cpu_input(key, np.ascontiguousarray(value))
        binding.bind_output("logits")
        loaded.session("decode").run_with_iobinding(binding)
        logits = binding.copy_outputs_to_cpu()[0][:, -1]
        expected = trained[name].expected[:, -1]
        assert np.abs(logits - expected).max() < 2e-5 * np.abs(expected).max()


# Forms of nodes, on their own.

_W = np.random.default_rng(0).standard_normal((6, 8)).astype(np.float32)
_BIAS = np.arange(8, dtype=np.float32)


def graph_of(
    nodes: str, weights: Mapping[str, np.ndarray[Any, Any]], x: str, dtype: str = "float"
) -> ir.Model:
    text = f"""
        <ir_version: 10, opset_import: ["" : 20, "com.microsoft" : 1]>
        g ({dtype}[{x}] x) => ({dtype}[{x.replace("6", "8")}] y) {{ {nodes} }}
    """
    model = ir.from_onnx_text(text)
    by_name = {v.name: v for node in model.graph for v in node.inputs if v is not None}
    for name, array in weights.items():
        by_name[name].const_value = ir.tensor(array, name=name)
        by_name[name].dtype = ir.DataType.from_numpy(array.dtype)
        by_name[name].shape = ir.Shape(array.shape)
        model.graph.register_initializer(by_name[name])
    return model


def origin_of(array: np.ndarray[Any, Any], *parts: Part, axis: int = 0) -> Origin:
    return Origin(array.shape, axis, parts or (Part("w.weight", (0, 1), len(array)),))


_FORMS = {
    "MatMul": ("y = MatMul (x, W)", False, 1.0, False),
    "MatMul with a bias": ("t = MatMul (x, W) y = Add (t, b)", False, 1.0, True),
    "Transpose": ("t = Transpose <perm=[1,0]> (W) y = MatMul (x, t)", True, 1.0, False),
    "Identity": ("t = Identity (W) u = Transpose (t) y = MatMul (x, u)", True, 1.0, False),
    "Gemm": ("y = Gemm (x, W, b)", False, 1.0, True),
    "Gemm, transB": ("y = Gemm <transB=1, alpha=0.5> (x, W, b)", True, 0.5, True),
    "FusedMatMul": (
        "y = com.microsoft.FusedMatMul <alpha=0.25, transB=1> (x, W)", True, 0.25, False,
    ),
}  # fmt: skip


@pytest.mark.parametrize("axes", [("n", 6), ("n", "m", 6)], ids=["2-D", "3-D"])
@pytest.mark.parametrize("dtype", [np.float32, np.float16])
@pytest.mark.parametrize("form", list(_FORMS))
def test_every_form_of_a_product_takes_factors(
    form: str, dtype: Any, axes: tuple[Any, ...], tmp_path: Path
) -> None:
    nodes, turned, alpha, has_bias = _FORMS[form]
    if "Gemm" in form and len(axes) == 3:
        pytest.skip("Gemm is for matrices")
    weights = {"W": (_W.T if turned else _W).astype(dtype)}
    weights |= {"b": _BIAS.astype(dtype)} if has_bias else {}
    text = {np.float32: "float", np.float16: "float16"}[dtype]
    model = graph_of(nodes, weights, ",".join(map(str, axes)), text)
    ir.save(model, tmp_path / "base.onnx")
    (slot,) = make_swappable([Graph("model", model, {"W": origin_of(weights["W"])})], ["w.weight"])
    ir.save(model, tmp_path / "model.onnx")
    random = np.random.default_rng(1)
    x = random.standard_normal([6 if axis == 6 else 3 for axis in axes]).astype(dtype)
    a, b = random.standard_normal((6, 2)).astype(dtype), random.standard_normal((2, 8))
    loaded = session(tmp_path / "model.onnx")

    (plain,) = loaded.run(None, {"x": x})
    (found,) = loaded.run(None, {"x": x, slot.a: a, slot.b: b.astype(dtype)})

    assert slot.turned == turned
    assert plain.tobytes() == session(tmp_path / "base.onnx").run(None, {"x": x})[0].tobytes()
    wide = weights["W"].astype(float)
    wide = wide.T if turned else wide
    expected = alpha * (x.astype(float) @ (wide + a.astype(float) @ b)) + has_bias * _BIAS
    assert np.abs(found - expected).max() < (1e-5 if dtype == np.float32 else 0.1)


def test_a_packed_weight_has_a_pair_for_each_part(tmp_path: Path) -> None:
    model = graph_of("y = MatMul (x, W)", {"W": _W}, "n,6")
    origin = origin_of(_W, Part("q.weight", (1, 0), 5), Part("k.weight", (1, 0), 3), axis=1)
    slots = make_swappable([Graph("model", model, {"W": origin})], ["k.weight"])
    ir.save(model, tmp_path / "model.onnx")
    x, a, b = np.ones((2, 6), "f"), np.full((6, 1), 0.5, "f"), np.full((1, 3), 2, "f")

    (found,) = session(tmp_path / "model.onnx").run(None, {"x": x, slots[1].a: a, slots[1].b: b})

    assert [(slot.target, slot.columns) for slot in slots] == [("q", 5), ("k", 3)]
    np.testing.assert_allclose(found, x @ _W + [[0] * 5 + [6] * 3], atol=1e-5)


@pytest.mark.parametrize(
    ("nodes", "message"),
    [
        ("t = Mul (W, W) y = MatMul (x, t)", "w.weight: Mul W: takes the weight in a way"),
        ("t = Transpose (x) u = Transpose (W) y = MatMul (u, t)", "not its right factor"),
        ("y = Conv (x, W)", "w.weight: Conv"),
    ],
)
def test_what_takes_no_factors_is_named_and_the_graph_left_alone(nodes: str, message: str) -> None:
    model = graph_of(nodes, {"W": _W}, "n,6")
    graph = Graph("model", model, {"W": origin_of(_W)})
    before = ir.to_proto(model).SerializeToString()

    with pytest.raises(MismatchError, match=message) as caught:
        make_swappable([graph], ["w.weight", "other.weight"])

    assert "other.weight: no node of the graph uses it" in str(caught.value)
    assert ir.to_proto(model).SerializeToString() == before
    assert adaptable([graph]) == ()


# Adapters that are none for this.


def test_other_kinds_of_update_are_refused_with_the_way_out(
    make: Callable[[str], Base], tmp_path: Path
) -> None:
    base = make("llama")
    make_adapter(base, tmp_path / "dora", ["q_proj"], use_dora=True, modules_to_save=["lm_head"])
    make_adapter(base, tmp_path / "wide", ["q_proj"], r=9)
    _, slots = swappable(base)
    parts = [bound(base, tmp_path / name) for name in ("dora", "wide")]

    with pytest.raises(MismatchError) as caught:
        write_adapters(parts, slots, tmp_path, max_rank=8)

    message = str(caught.value)
    assert f"{tmp_path / 'wide'} cannot be switched per call:" in message
    assert "q_proj.weight: has rank 9, --max-rank allows 8" in message
    assert "q_proj.weight: DoRA update" in message
    assert "`loratool convert --to-lora --base BASE`" in message
    assert "lm_head.weight: tensor kept whole" in message
    assert "`loratool convert --lora-only`" in message
    assert list(tmp_path.glob("*.onnx_adapter")) == []


def test_a_rank_above_the_limit_is_refused_with_the_way_out(
    make: Callable[[str], Base], tmp_path: Path
) -> None:
    base = make("llama")
    trained = make_adapter(base, tmp_path / "big", ["q_proj", "v_proj"], rank_pattern={"v_proj": 9})
    _, slots = swappable(base)

    with pytest.raises(MismatchError, match=r"v_proj.*has rank 9, --max-rank allows 8.*--rank 8"):
        write_adapters([bound(base, trained)], slots, tmp_path, max_rank=8)


def test_an_update_that_the_graph_has_no_inputs_for_is_an_error(
    make: Callable[[str], Base], tmp_path: Path
) -> None:
    base = make("llama")
    trained = make_adapter(base, tmp_path / "wide", ["q_proj", "v_proj"])
    _, slots = swappable(base, ["model.layers.0.self_attn.q_proj.weight"])

    with pytest.raises(MismatchError, match=r"v_proj.weight: the graph has no inputs"):
        write_adapters([bound(base, trained)], slots, tmp_path)


def test_factors_that_overflow_fp16_are_an_error(
    make: Callable[[str], Base], tmp_path: Path
) -> None:
    base = make("llama")
    trained = make_adapter(base, tmp_path / "huge", ["q_proj"], lora_alpha=1e12)
    slots = [replace(slot, dtype=ir.DataType.FLOAT16) for slot in swappable(base)[1]]

    with pytest.raises(InputError, match=r"q_proj.weight: its factors overflow float16"):
        write_adapters([bound(base, trained)], slots, tmp_path)


@pytest.mark.parametrize(
    ("dtype", "number"),
    [(ir.DataType.FLOAT16, TensorProto.FLOAT16), (ir.DataType.BFLOAT16, TensorProto.BFLOAT16)],
)
def test_factors_have_the_type_of_the_graph(
    dtype: ir.DataType, number: int, make: Callable[[str], Base], tmp_path: Path
) -> None:
    base = make("llama")
    trained = make_adapter(base, tmp_path / "half", ["q_proj"], lora_alpha=1e-3)
    slots = [replace(slot, dtype=dtype) for slot in swappable(base)[1]]

    write_adapters([bound(base, trained)], slots, tmp_path)

    path = str(tmp_path / "half.onnx_adapter")
    values = ort.AdapterFormat.read_adapter(path).get_parameters()
    assert {value.element_type() for value in values.values()} == {number}
    if dtype == ir.DataType.FLOAT16:
        target = "model.layers.0.self_attn.q_proj"
        a, b = (values[f"{target}.lora_{x}"].numpy().astype(float) for x in "AB")
        (update,) = bound(base, trained).binding.changed.values()
        exact: Any = update.update.load()
        expected = (exact.scale * exact.b.double() @ exact.a.double()).numpy().T
        assert np.abs(a @ b - expected).max() < 2e-3 * np.abs(expected).max()


def test_two_adapters_of_one_name_are_an_error(make: Callable[[str], Base], tmp_path: Path) -> None:
    base = make("llama")
    parts = [
        bound(base, make_adapter(base, tmp_path / folder / "math", ["q_proj"]))
        for folder in ("one", "other")
    ]
    _, slots = swappable(base)

    with pytest.raises(MismatchError, match="both called math: rename one"):
        write_adapters(parts, slots, tmp_path)
