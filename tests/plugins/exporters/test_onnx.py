"""Exports of tiny random models, run in ONNX Runtime beside PyTorch."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
import transformers

from loratool.checkpoint import Checkpoint, LazyTensor
from loratool.dtypes import dtype_name
from loratool.errors import InputError, UsageError, VerificationError
from loratool.reports import Report
from loratool.shell import build_shell
from loratool.sources import resolve
from loratool_plugins.exporters.onnx import DATA_FILE, MODEL_FILE, Onnx, open_session
from loratool_plugins.exporters.onnx.verify import Tolerance, verify
from loratool_plugins.exporters.onnx.weights import Written

VOCABULARY = 40
_SIZES = {
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "intermediate_size": 32,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 64,
    "initializer_range": 0.4,  # weights that small differences cannot hide behind
}
_SPECIAL = {"bos_token_id": 1, "eos_token_id": 2}


def bert(architecture: str, layers: int = 1, **extra: Any) -> Any:
    sizes = _SIZES | {"num_hidden_layers": layers} | extra
    return _model(architecture, transformers.BertConfig(**sizes))


def llama(tied: bool) -> Any:
    config = transformers.LlamaConfig(
        num_key_value_heads=2, tie_word_embeddings=tied, **_SPECIAL, **_SIZES
    )
    return _model("LlamaForCausalLM", config)


def gpt2() -> Any:
    config = transformers.GPT2Config(
        n_embd=16, n_layer=1, n_head=2, n_positions=64, vocab_size=VOCABULARY,
        initializer_range=0.4, **_SPECIAL,
    )  # fmt: skip
    return _model("GPT2LMHeadModel", config)


def _model(architecture: str, config: Any) -> Any:
    torch.manual_seed(0)
    config.architectures = [architecture]
    model = getattr(transformers, architecture)(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():  # biases and norms start out as zeros and ones
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def lazy(name: str, tensor: torch.Tensor) -> LazyTensor:
    """A tensor that comes in blocks of a few rows."""

    def blocks() -> Iterator[torch.Tensor]:
        yield from torch.split(tensor, 7) if tensor.dim() else [tensor]

    return LazyTensor(name, dtype_name(tensor.dtype), tuple(tensor.shape), blocks)


def checkpoint_of(model: Any, dtype: torch.dtype = torch.float32) -> Checkpoint:
    """What `save_pretrained` would write: no tied name twice."""
    config = json.loads(model.config.to_json_string(use_diff=False))
    config["architectures"] = [type(model).__name__]
    tensors = {
        name: lazy(name, tensor.detach().to(dtype))
        for name, tensor in model.state_dict().items()
        if name not in model.all_tied_weights_keys
    }
    files = {"config.json": json.dumps(config).encode(), "sub/notes.txt": b"kept"}
    return Checkpoint(tensors, config=config, side_files=files)


def with_tensors(checkpoint: Checkpoint, tensors: Mapping[str, LazyTensor]) -> Checkpoint:
    return replace(checkpoint, tensors={**checkpoint.tensors, **tensors})


def quietly(message: str) -> None:
    """Progress that goes nowhere."""


@dataclass(frozen=True)
class Exported:
    model: Any
    checkpoint: Checkpoint
    folder: Path
    report: Report


def export(
    model: Any, folder: Path, dtype: torch.dtype = torch.float32, exporter: Onnx | None = None
) -> Exported:
    checkpoint = checkpoint_of(model, dtype)
    report = (exporter or Onnx()).export(checkpoint, checkpoint, folder, quietly)
    with torch.no_grad():  # `model.to(dtype)` would round the buffers as well
        for parameter in model.parameters():
            parameter.copy_(parameter.to(dtype))
    return Exported(model, checkpoint, folder, report)


_KINDS: dict[str, tuple[Callable[[], Any], torch.dtype]] = {
    "bert classifier": (
        lambda: bert("BertForSequenceClassification", layers=2, num_labels=3),
        torch.float32,
    ),
    "bert masked lm, tied": (lambda: bert("BertForMaskedLM"), torch.float32),
    "llama": (lambda: llama(tied=False), torch.bfloat16),
    "llama, tied": (lambda: llama(tied=True), torch.float32),
    "gpt2, tied": (gpt2, torch.float32),
}


@pytest.fixture(scope="module")
def make_export(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Exported]:
    """Each model is exported once for all tests."""
    made: dict[str, Exported] = {}

    def make(kind: str) -> Exported:
        if kind not in made:
            build, dtype = _KINDS[kind]
            made[kind] = export(build(), tmp_path_factory.mktemp("onnx"), dtype)
        return made[kind]

    return make


@pytest.fixture(params=list(_KINDS))
def exported(request: pytest.FixtureRequest, make_export: Callable[[str], Exported]) -> Exported:
    return make_export(request.param)


@pytest.fixture
def classifier(make_export: Callable[[str], Exported]) -> Exported:
    return make_export("bert classifier")


def feeds_for(session: Any, batch: int, sequence: int, padding: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(batch * 100 + sequence)
    ids = torch.randint(3, VOCABULARY, (batch, sequence), generator=generator)
    mask = torch.ones_like(ids)
    if padding:
        mask[-1, -padding:] = 0
    feeds = {"input_ids": ids, "attention_mask": mask, "token_type_ids": ids % 2}
    return {entry.name: feeds[entry.name] for entry in session.get_inputs()}


def run(session: Any, feeds: Mapping[str, torch.Tensor]) -> np.ndarray:
    (logits,) = session.run(["logits"], {name: value.numpy() for name, value in feeds.items()})
    return np.asarray(logits)


@pytest.mark.parametrize(
    ("batch", "sequence", "padding"), [(1, 1, 0), (1, 9, 0), (4, 1, 0), (5, 30, 12), (2, 64, 3)]
)
def test_equals_pytorch_on_other_shapes(
    exported: Exported, batch: int, sequence: int, padding: int
) -> None:
    session = open_session(exported.folder / MODEL_FILE)
    feeds = feeds_for(session, batch, sequence, padding)
    with torch.no_grad():
        expected = exported.model(**feeds).logits.numpy()
    found = run(session, feeds)
    if found.shape[1:] != (3,):
        keep = feeds["attention_mask"].numpy() == 1
        found, expected = found[keep], expected[keep]
    np.testing.assert_allclose(found, expected, atol=1e-4)


def test_axes_are_dynamic_and_named(exported: Exported) -> None:
    session = open_session(exported.folder / MODEL_FILE)
    for entry in session.get_inputs():
        assert entry.shape == ["batch", "sequence"]
    assert session.get_outputs()[0].shape[0] == "batch"


def test_attention_mask_matters(exported: Exported) -> None:
    session = open_session(exported.folder / MODEL_FILE)
    feeds = feeds_for(session, 2, 8, 0)
    # The last token sees all others, and a classifier sees the whole text.
    hidden = feeds["attention_mask"].clone()
    hidden[:, 2:5] = 0
    full, part = run(session, feeds), run(session, {**feeds, "attention_mask": hidden})
    assert np.abs(full[:, -1] - part[:, -1]).max() > 1e-3


def test_segments_are_an_input_of_bert_and_matter(classifier: Exported) -> None:
    session = open_session(classifier.folder / MODEL_FILE)
    feeds = feeds_for(session, 2, 8, 0)
    other = {**feeds, "token_type_ids": torch.zeros_like(feeds["input_ids"])}
    assert np.abs(run(session, feeds) - run(session, other)).max() > 1e-3


def test_weights_lie_outside_the_graph_once_and_aligned(exported: Exported) -> None:
    graph = onnx.load(exported.folder / MODEL_FILE, load_external_data=False).graph
    places = {
        tuple((entry.key, entry.value) for entry in tensor.external_data)
        for tensor in graph.initializer
        if tensor.data_location == onnx.TensorProto.EXTERNAL
    }
    offsets = [int(dict(place)["offset"]) for place in places]
    weights = 4 * sum(parameter.numel() for parameter in exported.model.parameters())
    size = (exported.folder / DATA_FILE).stat().st_size
    assert all(offset % 64 == 0 for offset in offsets)
    assert weights <= size <= weights + 64 * (len(places) + 1) + 4096
    inline = sum(len(tensor.raw_data) for tensor in graph.initializer)
    assert inline < 2048
    assert (exported.folder / MODEL_FILE).stat().st_size < 100_000


def test_nothing_of_this_machine_is_in_the_graph(classifier: Exported) -> None:
    content = (classifier.folder / MODEL_FILE).read_bytes()
    assert b"site-packages" not in content and b"stack_trace" not in content


def test_report_and_manifest_tell_what_was_done(exported: Exported) -> None:
    data = exported.report.data
    manifest = json.loads((exported.folder / "loratool.json").read_text())
    assert manifest == json.loads(json.dumps(data))
    assert data["nodes"]["merged"] == data["nodes"]["base"] > 50
    assert data["verification"]["providers"][-1] == "CPUExecutionProvider"
    assert [(e["batch"], e["sequence"]) for e in data["verification"]["inputs"]] == [
        (2, 7),
        (3, 13),
    ]
    assert data["surplus"] == []
    text = "\n".join(exported.report.lines)
    assert (
        "CPUExecutionProvider" in text and "logits" in text and str(data["nodes"]["base"]) in text
    )


def test_bf16_is_exported_as_fp32_and_said(make_export: Callable[[str], Exported]) -> None:
    (note,) = make_export("llama").report.notes
    assert "BF16" in note and "fp32 (exactly" in note


def test_side_files_come_along(classifier: Exported) -> None:
    assert json.loads((classifier.folder / "config.json").read_text())["model_type"] == "bert"
    assert (classifier.folder / "sub" / "notes.txt").read_text() == "kept"


def test_same_bytes_again_and_a_quiet_terminal(
    classifier: Exported, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    capfd.readouterr()
    checkpoint = classifier.checkpoint
    files = {"./model.onnx": b"an older export", "loratool.json": b"an older manifest"}
    again = replace(checkpoint, side_files={**checkpoint.side_files, **files})
    Onnx().export(again, again, tmp_path, quietly)
    assert capfd.readouterr() == ("", "")
    for name in (MODEL_FILE, DATA_FILE, "config.json"):
        assert (tmp_path / name).read_bytes() == (classifier.folder / name).read_bytes(), name
    one, other = (
        json.loads((folder / "loratool.json").read_text())
        for folder in (tmp_path, classifier.folder)
    )
    assert one | {"run": None} == other | {"run": None}


def test_fp16(tmp_path: Path) -> None:
    made = export(bert("BertForTokenClassification"), tmp_path, exporter=Onnx(dtype="fp16"))
    weights = 2 * sum(parameter.numel() for parameter in made.model.parameters())
    assert made.report.data["outputs"][0]["dtype"] == "FLOAT16"
    assert (tmp_path / DATA_FILE).stat().st_size < weights + 64 * 40
    assert "rounded" in made.report.notes[0]


def test_value_beyond_fp16_is_refused(tmp_path: Path) -> None:
    good = checkpoint_of(bert("BertModel"))
    name = "encoder.layer.0.output.dense.weight"
    large = with_tensors(good, {name: lazy(name, torch.full(good[name].shape, 1e5))})
    with pytest.raises(InputError, match=rf"{name} has values beyond .*export as fp32"):
        Onnx(dtype="fp16").export(large, large, tmp_path, quietly)


def test_weight_that_changes_between_reads_fails_verification(tmp_path: Path) -> None:
    good = checkpoint_of(bert("BertForSequenceClassification"))
    # Of all things one that changes no output: a LayerNorm takes the same shift out of every row.
    name = "bert.encoder.layer.0.output.dense.weight"
    right = good[name].read()
    reads = iter([right + 0.05, right])
    shaky = replace(good[name], blocks=lambda: iter([next(reads)]))
    with pytest.raises(VerificationError, match=rf"model\.onnx\.data: {name} is not what"):
        Onnx().export(with_tensors(good, {name: shaky}), good, tmp_path, quietly)


def verify_against(exported: Exported, checkpoint: Checkpoint) -> None:
    """Hold a saved model against another checkpoint by its outputs alone."""
    written = Written(exported.folder / DATA_FILE, {}, 0)
    tolerance = Tolerance(1e-4, relative=False)
    verify(exported.folder / MODEL_FILE, written, checkpoint, 0, tolerance)


def test_outputs_that_differ_fail_verification(classifier: Exported) -> None:
    verify_against(classifier, classifier.checkpoint)
    name = "bert.encoder.layer.1.attention.self.value.weight"
    moved = classifier.checkpoint[name].read().clone()
    moved[3, 5] += 0.05
    other = with_tensors(classifier.checkpoint, {name: lazy(name, moved)})
    with pytest.raises(VerificationError, match=r"model\.onnx: logits differs from PyTorch by"):
        verify_against(classifier, other)


def test_nan_fails_verification(classifier: Exported) -> None:
    name = "classifier.bias"
    broken = with_tensors(classifier.checkpoint, {name: lazy(name, torch.full((3,), torch.nan))})
    with pytest.raises(VerificationError, match=r"logits: PyTorch gives NaN"):
        verify_against(classifier, broken)


def test_checkpoint_that_transformers_cannot_complete_fails_verification(
    classifier: Exported,
) -> None:
    good = classifier.checkpoint
    part = replace(good, tensors={n: t for n, t in good.items() if n != "classifier.weight"})
    with pytest.raises(VerificationError, match=r"transformers finds no classifier\.weight"):
        verify_against(classifier, part)


def test_graph_that_is_not_the_bases_fails_verification(tmp_path: Path) -> None:
    merged, base = (checkpoint_of(bert("BertModel", layers=layers)) for layers in (1, 2))
    with pytest.raises(VerificationError, match=r"graph is not the base's: node \d+ is \w+ '"):
        Onnx().export(merged, base, tmp_path, quietly)


def test_head_that_is_tied_by_config_but_differs_is_exported_untied(tmp_path: Path) -> None:
    model = llama(tied=True)
    good = checkpoint_of(model)
    head = torch.randn(VOCABULARY, 16)
    both = with_tensors(good, {"lm_head.weight": lazy("lm_head.weight", head)})
    report = Onnx().export(both, good, tmp_path, quietly)
    assert report.data["untied"] == ["lm_head.weight"]
    assert any("exported untied" in note for note in report.notes)
    initializers = {
        tensor.name
        for tensor in onnx.load(tmp_path / MODEL_FILE, load_external_data=False).graph.initializer
    }
    assert {"lm_head.weight", "model.embed_tokens.weight"} <= initializers


def test_missing_tensor_is_named(tmp_path: Path) -> None:
    good = checkpoint_of(bert("BertForMaskedLM"))
    name = "bert.encoder.layer.0.intermediate.dense.weight"
    part = replace(good, tensors={n: t for n, t in good.items() if n != name})
    with pytest.raises(InputError, match=rf"has no {name}, which BertForMaskedLM needs"):
        Onnx().export(part, good, tmp_path, quietly)


def test_wrong_shape_is_named(tmp_path: Path) -> None:
    good = checkpoint_of(bert("BertModel"))
    bad = replace(good, config={**(good.config or {}), "intermediate_size": 48})
    with pytest.raises(InputError, match=r"intermediate.*has shape \(32.*has \(48"):
        Onnx().export(bad, good, tmp_path, quietly)


def resolve_names(checkpoint: Checkpoint) -> Any:
    return resolve(checkpoint, build_shell(checkpoint.config or {}, torch.float32))


def test_names_without_the_base_models_prefix_are_found() -> None:
    good = checkpoint_of(gpt2())
    short = {name.removeprefix("transformer."): tensor for name, tensor in good.items()}
    short["h.0.attn.bias"] = lazy("h.0.attn.bias", torch.ones(1, 1, 4, 4))
    sources = resolve_names(replace(good, tensors=short))
    assert sources.keys["transformer.h.0.attn.c_attn.weight"] == "h.0.attn.c_attn.weight"
    assert sources.tied == {"lm_head.weight": "wte.weight"}
    assert sources.surplus == ("h.0.attn.bias",)


def test_old_names_and_equal_tied_tensors_are_found() -> None:
    good = checkpoint_of(bert("BertForMaskedLM"))
    head, table = "cls.predictions.decoder.weight", "bert.embeddings.word_embeddings.weight"
    old = {name.replace("LayerNorm.weight", "LayerNorm.gamma"): t for name, t in good.items()}
    sources = resolve_names(replace(good, tensors={**old, head: good[table].renamed(head)}))
    assert sources.keys["bert.embeddings.LayerNorm.weight"] == "bert.embeddings.LayerNorm.gamma"
    assert (sources.untied, sources.surplus) == ((), ())


def test_parameters_of_a_shell_take_no_memory_and_buffers_have_values() -> None:
    config = checkpoint_of(llama(tied=True)).config or {}
    shell = build_shell({**config, "vocab_size": 2**16, "hidden_size": 2**12}, torch.float32)
    assert all(parameter.untyped_storage().nbytes() == 4 for parameter in shell.model.parameters())
    buffers = dict(shell.model.named_buffers())
    assert float(buffers["model.rotary_emb.inv_freq"][0]) == 1.0
    assert shell.tied["lm_head.weight"] == ("model.embed_tokens.weight", "lm_head.weight")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architectures": ["BertForTeaMaking"]}, "no model class 'BertForTeaMaking'"),
        ({"architectures": ["BertConfig"]}, "no model class 'BertConfig'"),
        ({"architectures": ["LlamaForCausalLM"]}, "not a class of model_type 'bert'"),
        ({"architectures": ["BertForMultipleChoice"]}, "only encoders and decoders"),
        ({"architectures": None}, "must name model_type and architectures"),
        ({"model_type": "bort"}, "knows no model_type 'bort'"),
        ({"hidden_size": "wide"}, "refused by transformers"),
        ({"quantization_config": {"quant_method": "gptq"}}, "unquantized"),
    ],
)
def test_config_that_cannot_be_exported_is_refused(
    changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    good = checkpoint_of(bert("BertModel"))
    bad = replace(good, config={**(good.config or {}), **changes})
    with pytest.raises(InputError, match=message):
        Onnx().export(bad, good, tmp_path, quietly)
    assert list(tmp_path.iterdir()) == []


def test_checkpoints_that_cannot_be_exported_are_refused() -> None:
    good = checkpoint_of(bert("BertModel"))
    assert Onnx().check(good) == []
    assert "is missing" in str(*Onnx().check(replace(good, config=None)))
    name = "pooler.dense.weight"
    packed = with_tensors(good, {name: replace(good[name], dtype="F8_E4M3")})
    assert str(*Onnx().check(packed)).startswith(f"{name}: dequantize it first")
    t5 = {"model_type": "t5", "architectures": ["T5ForConditionalGeneration"]}
    assert "only encoders and decoders" in str(*Onnx().check(replace(good, config=t5)))


@pytest.mark.parametrize("name", ["../evil", "/tmp/evil", "sub/../../evil"])
def test_side_file_outside_the_folder_is_refused(name: str, tmp_path: Path) -> None:
    good = checkpoint_of(bert("BertModel"))
    folder = tmp_path / "out"
    folder.mkdir()
    with pytest.raises(InputError, match="must lie inside"):
        Onnx().export(replace(good, side_files={name: b"x"}), good, folder, quietly)
    assert not (tmp_path / "evil").exists()


@pytest.mark.parametrize("options", [{"dtype": "bf16"}, {"opset": 11}, {"tolerance": -1.0}])
def test_options_that_no_model_could_satisfy(options: dict[str, Any]) -> None:
    with pytest.raises(UsageError):
        Onnx(**options)


def test_a_file_that_onnx_runtime_refuses(tmp_path: Path) -> None:
    (tmp_path / "broken.onnx").write_bytes(b"no protobuf")
    with pytest.raises(VerificationError, match=r"broken\.onnx: ONNX Runtime .* refuses it"):
        open_session(tmp_path / "broken.onnx")


def test_large_values_may_differ_more() -> None:
    absolute, share = Tolerance(1e-4, relative=False), Tolerance(2e-2, relative=True)
    assert absolute.limit(0.5) == absolute.limit(10) == 1e-4
    assert absolute.limit(100) == pytest.approx(1e-3)
    assert share.limit(0.5) == 1e-2
