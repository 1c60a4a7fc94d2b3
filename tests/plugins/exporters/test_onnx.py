"""Exports of tiny random models, run in ONNX Runtime beside PyTorch."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file

from loratool.checkpoint import Checkpoint, LazyTensor
from loratool.digests import file_digest
from loratool.dtypes import dtype_name
from loratool.errors import InputError, UsageError, VerificationError
from loratool.exporting import ExportJob, ExportOptions
from loratool.opening import open_adapter, open_checkpoint
from loratool.reports import Report
from loratool.shell import build_shell
from loratool.sources import resolve
from loratool.steps.export import Export
from loratool_plugins.exporters.onnx import Onnx, open_session
from loratool_plugins.exporters.onnx.comparing import TOLERANCES, Tolerance
from loratool_plugins.exporters.onnx.deployment import DATA_FILE
from loratool_plugins.exporters.onnx.generation import generate, prompts_for
from loratool_plugins.exporters.onnx.preparation import prepare
from loratool_plugins.exporters.onnx.sessions import shortfall, usable
from loratool_plugins.exporters.onnx.verify import verify_export
from loratool_plugins.exporters.onnx.weights import Written
from tests.cli.tiny import loratool, names, refused

MODEL_FILE = "model.onnx"
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


def job_of(merged: Checkpoint, base: Checkpoint | None = None, **options: Any) -> ExportJob:
    base = base or merged
    return ExportJob(merged, base, base, (), (), ExportOptions(**options))


@dataclass(frozen=True)
class Exported:
    """An export, and the model whose answers are wanted of it."""

    model: Any
    checkpoint: Checkpoint
    folder: Path
    report: Report

    @property
    def graphs(self) -> dict[str, Path]:
        return {name: self.folder / f"{name}.onnx" for name in self.report.data["graphs"]}

    @property
    def first(self) -> Path:
        """The graph that reads a text."""
        return next(iter(self.graphs.values()))

    @property
    def itemsize(self) -> int:
        return 4 if self.report.data["dtype"] == "fp32" else 2


def export(
    model: Any, folder: Path, dtype: torch.dtype = torch.float32, **options: Any
) -> Exported:
    checkpoint = checkpoint_of(model, dtype)
    report = Onnx().export(job_of(checkpoint, **options), folder, quietly)
    with torch.no_grad():  # `model.to(dtype)` would round the buffers as well
        for parameter in model.parameters():
            parameter.copy_(parameter.to(dtype))
    return Exported(model, checkpoint, folder, report)


_CLASSIFIER = "bert classifier"
_HALF = "bert masked lm, tied, fp16 for cuda"
_DECODERS = ("llama", "llama, tied, standard", "gpt2, tied")
_KINDS: dict[str, Callable[[Path], Exported]] = {
    _CLASSIFIER: lambda out: export(bert("BertForSequenceClassification", num_labels=3), out),
    _HALF: lambda out: export(bert("BertForMaskedLM"), out, device="cuda"),
    "llama": lambda out: export(llama(tied=False), out, torch.bfloat16),
    "llama, tied, standard": lambda out: export(llama(tied=True), out, fuse=False),
    "gpt2, tied": lambda out: export(gpt2(), out),
}


@pytest.fixture(scope="module")
def make_export(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Exported]:
    """Each model is exported once for all tests."""
    made: dict[str, Exported] = {}

    def make(kind: str) -> Exported:
        if kind not in made:
            made[kind] = _KINDS[kind](tmp_path_factory.mktemp("onnx"))
        return made[kind]

    return make


@pytest.fixture(params=list(_KINDS))
def exported(request: pytest.FixtureRequest, make_export: Callable[[str], Exported]) -> Exported:
    return make_export(request.param)


@pytest.fixture(params=_DECODERS)
def decoder(request: pytest.FixtureRequest, make_export: Callable[[str], Exported]) -> Exported:
    return make_export(request.param)


@pytest.fixture
def classifier(make_export: Callable[[str], Exported]) -> Exported:
    return make_export(_CLASSIFIER)


def feeds_for(session: Any, batch: int, sequence: int, padding: int) -> dict[str, torch.Tensor]:
    """Padded at the end, but prompts at their start."""
    wanted = [entry.name for entry in session.get_inputs()]
    generator = torch.Generator().manual_seed(batch * 100 + sequence)
    ids = torch.randint(3, VOCABULARY, (batch, sequence), generator=generator)
    mask = torch.ones_like(ids)
    if padding:
        mask[-1, slice(padding) if "position_ids" in wanted else slice(-padding, None)] = 0
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    feeds = {
        "input_ids": ids, "attention_mask": mask, "token_type_ids": ids % 2,
        "position_ids": positions,
    }  # fmt: skip
    return {name: feeds[name] for name in wanted}


def run(session: Any, feeds: Mapping[str, torch.Tensor]) -> np.ndarray:
    (logits,) = session.run(["logits"], {name: value.numpy() for name, value in feeds.items()})
    return np.asarray(logits)


def places(paths: Sequence[Path]) -> set[tuple[str, int, int]]:
    """File, offset and length of all values that lie outside of graphs."""
    found = set()
    for path in paths:
        for tensor in onnx.load(path, load_external_data=False).graph.initializer:
            if tensor.data_location == onnx.TensorProto.EXTERNAL:
                place = {entry.key: entry.value for entry in tensor.external_data}
                found.add((place["location"], int(place["offset"]), int(place["length"])))
    return found


# Modules of the user's own: the cheapest to trace. Factories are found by these functions' names.


class Normed(torch.nn.Module):
    """A LayerNorm takes out what is added to all outputs of `first`."""

    def __init__(self) -> None:
        super().__init__()
        self.first = torch.nn.Linear(8, 6)
        self.norm = torch.nn.LayerNorm(6)

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"y": self.norm(self.first(x))}


class Convolved(torch.nn.Module):
    """A batch norm that optimisers fold into the convolution before it."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = torch.nn.Conv2d(3, 5, 3)
        self.norm = torch.nn.BatchNorm2d(5)

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"y": self.norm(self.conv(x)).relu()}


class Tied(torch.nn.Module):
    """A head that is the table."""

    def __init__(self) -> None:
        super().__init__()
        self.table = torch.nn.Embedding(9, 6)
        self.head = torch.nn.Linear(6, 9, bias=False)
        self.head.weight = self.table.weight

    def forward(self, ids: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"logits": self.head(self.table(ids))}


def make_normed(config: Any) -> Any:
    return (
        Normed(),
        {"x": torch.linspace(-1, 1, 80).reshape(2, 5, 8)},
        {"x": {0: "batch", 1: "steps"}},
    )


def make_convolved(config: Any) -> Any:
    return Convolved(), {"x": torch.randn(2, 3, 7, 7)}


def make_tied(config: Any) -> Any:
    ids = torch.arange(10).reshape(2, 5) % 9
    return Tied(), {"ids": ids}, {"ids": {0: "batch", 1: "steps"}}


TIED = f"{__name__}:make_tied"
NORMED, CONVOLVED = f"{__name__}:make_normed", f"{__name__}:make_convolved"


def state_of(module: torch.nn.Module) -> Checkpoint:
    """A module's tensors, random."""
    generator = torch.Generator().manual_seed(0)
    state = {
        name: torch.rand(value.shape, generator=generator) + 0.1
        if value.is_floating_point()
        else value
        for name, value in module.state_dict().items()
    }
    return Checkpoint({name: lazy(name, value) for name, value in state.items()})


@pytest.mark.parametrize(
    ("batch", "sequence", "padding"), [(1, 1, 0), (1, 9, 0), (4, 1, 0), (5, 30, 12), (2, 64, 3)]
)
def test_equals_pytorch_on_other_shapes(
    exported: Exported, batch: int, sequence: int, padding: int
) -> None:
    session = open_session(exported.first)
    feeds = feeds_for(session, batch, sequence, padding)
    with torch.no_grad():
        expected = exported.model(**feeds).logits.numpy()
    found = run(session, feeds)
    if found.shape[1:] != (3,):
        keep = feeds["attention_mask"].numpy() == 1
        found, expected = found[keep], expected[keep]
    allowed = TOLERANCES[exported.report.data["dtype"]].limit(float(np.abs(expected).max()))
    np.testing.assert_allclose(found, expected, rtol=0, atol=allowed)


def test_decoders_generate_as_transformers_does(decoder: Exported) -> None:
    model, count = decoder.model, 12
    sessions = {name: open_session(path) for name, path in decoder.graphs.items()}
    assert list(sessions) == ["prefill", "decode"]
    model.generation_config.eos_token_id = None  # no end of text stops it
    config = transformers.GenerationConfig(max_new_tokens=count, do_sample=False, pad_token_id=0)
    for prompt in prompts_for(type(model), model.config, seed=5):
        given = {name: value for name, value in prompt.items() if name != "position_ids"}
        expected = model.generate(**given, generation_config=config)[:, -count:]
        assert (generate(sessions, prompt, count).tokens == expected.numpy()).all()


def test_axes_are_dynamic_and_named(exported: Exported) -> None:
    session = open_session(exported.first)
    for entry in session.get_inputs():
        assert entry.shape == ["batch", "sequence"]
    assert session.get_outputs()[0].shape[0] == "batch"


def test_axes_of_a_cache_are_dynamic_and_named(decoder: Exported) -> None:
    session = open_session(decoder.graphs["decode"])
    shapes = {entry.name: entry.shape for entry in session.get_inputs()}
    assert shapes["input_ids"] == ["batch", 1]
    assert shapes["attention_mask"] == ["batch", "total"]
    key = shapes["past_key_values.0.key"]
    assert (key[0], key[2]) == ("batch", "past") and isinstance(key[1], int)
    returned = [entry.name for entry in session.get_outputs()]
    assert returned == ["logits", "present.0.key", "present.0.value"]


def test_attention_mask_matters(exported: Exported) -> None:
    session = open_session(exported.first)
    feeds = feeds_for(session, 2, 8, 0)
    # The last token sees all others, and a classifier sees the whole text.
    hidden = feeds["attention_mask"].clone()
    hidden[:, :3] = 0
    full, part = run(session, feeds), run(session, {**feeds, "attention_mask": hidden})
    assert np.abs(full[:, -1] - part[:, -1]).max() > 1e-3


def test_segments_are_an_input_of_bert_and_matter(classifier: Exported) -> None:
    session = open_session(classifier.folder / MODEL_FILE)
    feeds = feeds_for(session, 2, 8, 0)
    other = {**feeds, "token_type_ids": torch.zeros_like(feeds["input_ids"])}
    assert np.abs(run(session, feeds) - run(session, other)).max() > 1e-3


def test_weights_lie_outside_the_graphs_once_and_aligned(exported: Exported) -> None:
    """In one file for all graphs, where no tensor is stored in two layouts."""
    found = places(list(exported.graphs.values()))
    assert {file for file, _, _ in found} == {DATA_FILE}
    assert all(offset % 64 == 0 for _, offset, _ in found)
    weights = exported.itemsize * sum(value.numel() for value in exported.model.parameters())
    assert len(found) == exported.report.data["weights"]
    assert sum(length for _, _, length in found) == weights
    assert weights <= (exported.folder / DATA_FILE).stat().st_size <= weights + 256 * len(found)
    assert not [note for note in exported.report.notes if "stored" in note and "times" in note]
    for path in exported.graphs.values():
        initializers = onnx.load(path, load_external_data=False).graph.initializer
        assert sum(len(tensor.raw_data) for tensor in initializers) < 2048
        assert path.stat().st_size < 100_000


def test_nothing_of_this_machine_is_in_the_graphs(exported: Exported) -> None:
    for path in exported.graphs.values():
        content = path.read_bytes()
        assert b"site-packages" not in content and b"stack_trace" not in content


def test_report_and_manifest_tell_what_was_done(exported: Exported) -> None:
    data = exported.report.data
    manifest = json.loads((exported.folder / "loratool.json").read_text())
    assert manifest == json.loads(json.dumps(data))
    assert data["kind"] == "onnx" and data["surplus"] == []
    assert data["verification"]["providers"][-1] == "CPUExecutionProvider"
    assert data["files"].keys() == {DATA_FILE, *(path.name for path in exported.graphs.values())}
    for name, facts in data["files"].items():
        path = exported.folder / name
        assert facts == {"bytes": path.stat().st_size, "blake3": file_digest(path)}
    text = "\n".join(exported.report.lines)
    assert "CPUExecutionProvider" in text and "logits" in text
    for graph in data["graphs"].values():
        assert graph["nodes"] == graph["base_nodes"] == sum(graph["operators"].values()) > 50
        assert str(graph["nodes"]) in text


def test_what_was_compared_is_told(classifier: Exported, decoder: Exported) -> None:
    compared = classifier.report.data["verification"]["inputs"]
    assert [(entry["batch"], entry["sequence"]) for entry in compared] == [(2, 7), (3, 13)]
    generated = decoder.report.data["verification"]["generation"]
    assert [(entry["batch"], entry["tokens"]) for entry in generated] == [(2, 16), (3, 16)]


def test_graphs_are_fused_for_the_device(make_export: Callable[[str], Exported]) -> None:
    def domains(kind: str) -> set[str]:
        found = set()
        for path in make_export(kind).graphs.values():
            nodes = onnx.load(path, load_external_data=False).graph.node
            found |= {node.domain for node in nodes}
        return found

    assert "com.microsoft" in domains("llama") & domains(_HALF)
    assert domains("llama, tied, standard") == {""}


def test_bf16_is_exported_as_fp32_and_said(make_export: Callable[[str], Exported]) -> None:
    (note,) = make_export("llama").report.notes
    assert "BF16" in note and "fp32 (exactly" in note


def test_fp16_is_the_type_for_cuda_and_said(make_export: Callable[[str], Exported]) -> None:
    report = make_export(_HALF).report
    assert report.data["graphs"]["model"]["outputs"][0]["dtype"] == "FLOAT16"
    assert "rounded" in report.notes[0]


def test_side_files_come_along(classifier: Exported) -> None:
    assert json.loads((classifier.folder / "config.json").read_text())["model_type"] == "bert"
    assert (classifier.folder / "sub" / "notes.txt").read_text() == "kept"


def test_same_bytes_again_and_a_quiet_terminal(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    checkpoint = state_of(Normed())
    files = {"./model.onnx": b"an older export", "loratool.json": b"an older manifest"}
    capfd.readouterr()
    manifests = []
    for folder, given in ((tmp_path / "one", {}), (tmp_path / "other", files)):
        folder.mkdir()
        made = replace(checkpoint, side_files=given)
        Onnx().export(job_of(made, module=NORMED), folder, quietly)
        manifests.append(json.loads((folder / "loratool.json").read_text()) | {"run": None})
    assert capfd.readouterr() == ("", "")
    assert names(tmp_path / "one") == names(tmp_path / "other")
    for name in (MODEL_FILE, DATA_FILE):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "other" / name).read_bytes()
    assert manifests[0] == manifests[1]


def test_value_beyond_fp16_is_refused(tmp_path: Path) -> None:
    good = state_of(Normed())
    large = with_tensors(good, {"first.weight": lazy("first.weight", torch.full((6, 8), 1e5))})
    with pytest.raises(InputError, match=r"first\.weight has values beyond .*export as fp32"):
        Onnx().export(job_of(large, module=NORMED, dtype="fp16"), tmp_path, quietly)


def test_weight_that_changes_between_reads_fails_verification(tmp_path: Path) -> None:
    good = state_of(Normed())
    # Of all things one that changes no output: a LayerNorm takes the same shift out of every row.
    name = "first.weight"
    right = good[name].read()
    reads = iter([right + 0.05, right])
    shaky = replace(good[name], blocks=lambda: iter([next(reads)]))
    job = job_of(with_tensors(good, {name: shaky}), good, module=NORMED)
    with pytest.raises(VerificationError, match=rf"model\.onnx\.data: {name} is not what"):
        Onnx().export(job, tmp_path, quietly)


def verify_against(exported: Exported, checkpoint: Checkpoint) -> None:
    """Hold a saved model against another checkpoint by its outputs alone."""
    prepared = prepare(exported.checkpoint, torch.float32, cache=True)
    tolerance, nothing = Tolerance(1e-4, relative=False), Written((), 0, ())
    verify_export(job_of(checkpoint), prepared, exported.folder, nothing, tolerance, 0, {})


def test_outputs_that_differ_fail_verification(classifier: Exported) -> None:
    verify_against(classifier, classifier.checkpoint)
    name = "bert.encoder.layer.0.attention.self.value.weight"
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


def tied_and_apart() -> tuple[Checkpoint, Checkpoint]:
    """The same model, its head once tied and once with values of its own."""
    tied = Checkpoint({"table.weight": lazy("table.weight", torch.randn(9, 6))})
    return tied, with_tensors(tied, {"head.weight": lazy("head.weight", torch.randn(9, 6))})


def test_head_that_is_tied_by_config_but_differs_is_exported_untied(tmp_path: Path) -> None:
    tied, apart = tied_and_apart()
    report = Onnx().export(job_of(apart, tied, module=TIED), tmp_path, quietly)
    assert report.data["untied"] == ["head.weight"]
    assert any("exported untied" in note for note in report.notes)
    assert [length for _, _, length in places([tmp_path / MODEL_FILE])] == [4 * 9 * 6] * 2
    graph = report.data["graphs"]["model"]
    assert graph["nodes"] <= graph["base_nodes"]


def test_a_module_of_the_users_stays_tied(tmp_path: Path) -> None:
    tied, _ = tied_and_apart()
    report = Onnx().export(job_of(tied, module=TIED), tmp_path, quietly)
    assert report.data["tied"] == {"head.weight": "table.weight"}
    assert [length for _, _, length in places([tmp_path / MODEL_FILE])] == [4 * 9 * 6]


def test_a_merged_model_that_needs_more_nodes_than_its_base_is_refused(tmp_path: Path) -> None:
    """A head that is tied is turned at every call, one of its own when it is stored."""
    tied, apart = tied_and_apart()
    with pytest.raises(VerificationError, match=r"model\.onnx: .* nodes \w+.*must not cost any"):
        Onnx().export(job_of(tied, apart, module=TIED, fuse=False), tmp_path, quietly)
    assert names(tmp_path) == []


# Adapters, as PEFT saves them.


@dataclass(frozen=True)
class Tuned:
    """A base and its adapter on disk; the model that PEFT merges from them."""

    base: Path
    adapter: Path
    merged: Any

    def job(self, **options: Any) -> ExportJob:
        adapters = [(open_adapter(self.adapter), 1.0)]
        return Export(**options).run(open_checkpoint(self.base), adapters).job


@pytest.fixture(scope="module")
def tuned(tmp_path_factory: pytest.TempPathFactory) -> Tuned:
    folder = tmp_path_factory.mktemp("tuned")
    model = bert("BertForSequenceClassification", num_labels=3)
    model.save_pretrained(folder / "base")
    settings = LoraConfig(target_modules=["query", "dense"], r=3, init_lora_weights=False)
    peft = get_peft_model(model, settings)
    peft.save_pretrained(folder / "adapter")
    return Tuned(folder / "base", folder / "adapter", peft.merge_and_unload().eval())


def assert_answers(path: Path, model: Any) -> None:
    session = open_session(path)
    feeds = feeds_for(session, 3, 10, 4)
    with torch.no_grad():
        expected = model(**feeds).logits.numpy()
    np.testing.assert_allclose(run(session, feeds), expected, rtol=0, atol=1e-4)


def without_places(path: Path) -> bytes:
    """A graph without the offsets of its weights, which are in the order of the checkpoint."""
    model = onnx.load(path, load_external_data=False)
    for tensor in model.graph.initializer:
        del tensor.external_data[:]
    return bytes(model.SerializeToString())


def test_a_merged_adapter_costs_no_node(tuned: Tuned, classifier: Exported, tmp_path: Path) -> None:
    """The graph is the one of the base alone, byte by byte; only values differ."""
    report = Onnx().export(tuned.job(), tmp_path, quietly)
    graph, base = (each.data["graphs"]["model"] for each in (report, classifier.report))
    assert graph["operators"] == base["operators"]
    assert graph["nodes"] == graph["base_nodes"] == base["nodes"]
    assert without_places(tmp_path / MODEL_FILE) == without_places(classifier.first)
    data = [(folder / DATA_FILE).read_bytes() for folder in (tmp_path, classifier.folder)]
    assert data[0] != data[1]
    assert_answers(tmp_path / MODEL_FILE, tuned.merged)


def test_a_linked_graph_points_into_what_transformers_loads(tuned: Tuned, tmp_path: Path) -> None:
    job = tuned.job(link=True)
    report = Onnx().export(job, tmp_path, quietly)
    assert report.data["linked"] is True
    loaded = transformers.BertForSequenceClassification.from_pretrained(tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    assert stored.keys() == job.merged.keys()
    for name, value in job.merged.items():
        assert torch.equal(stored[name], value.read())
        assert torch.equal(loaded.state_dict()[name], stored[name])
    for name, value in tuned.merged.state_dict().items():
        torch.testing.assert_close(stored[name], value, rtol=0, atol=1e-5)
    found = places([tmp_path / MODEL_FILE])
    linked = [place for place in found if place[0] == "model.safetensors"]
    assert len(linked) == len(stored)  # and so no weight has a second copy
    assert sum(length for _, _, length in linked) == sum(value.nbytes for value in stored.values())
    assert all(offset % 64 == 0 for _, offset, _ in linked)
    content = (tmp_path / "model.safetensors").read_bytes()
    seen = set()
    for tensor in onnx.load(tmp_path / MODEL_FILE, load_external_data=False).graph.initializer:
        place = {entry.key: entry.value for entry in tensor.external_data}
        if place.get("location") == "model.safetensors" and tensor.name in stored:
            start = int(place["offset"])
            values = np.frombuffer(content[start : start + int(place["length"])], np.float32)
            np.testing.assert_array_equal(values, stored[tensor.name].numpy().ravel())
            seen.add(tensor.name)
    assert seen == stored.keys()
    assert_answers(tmp_path / MODEL_FILE, tuned.merged)


# What the device, the optimiser and transformers cannot do.

no_cuda = pytest.mark.skipif(
    not shortfall("cuda", usable("cuda")), reason="ONNX Runtime can use CUDA here"
)


@no_cuda
def test_a_device_that_is_not_here_is_a_note(make_export: Callable[[str], Exported]) -> None:
    report = make_export(_HALF).report
    assert report.data["device"] == "cuda"
    assert report.data["verification"]["device_used"] is False
    assert any("verified on the CPU instead of cuda" in note for note in report.notes)


@no_cuda
def test_a_device_that_is_not_here_is_an_error_if_asked_strictly(tmp_path: Path) -> None:
    base = tmp_path / "base"
    base.mkdir()
    save_file(
        {name: value.read() for name, value in state_of(Normed()).items()},
        base / "model.safetensors",
    )
    out = tmp_path / "out"
    found = loratool("export", base, "--module", NORMED, "--device", "cuda", "--strict", "-o", out)
    refused(found, "instead of cuda, which is not enough for --strict")
    assert names(tmp_path) == ["base"]


def test_an_optimiser_that_needs_values_leaves_the_graph_as_traced(tmp_path: Path) -> None:
    report = Onnx().export(job_of(state_of(Convolved()), module=CONVOLVED), tmp_path, quietly)
    assert report.data["graphs"]["model"]["form"] == "as traced"
    (note,) = report.notes
    assert "model.onnx is not optimised" in note and "computes with" in note
    assert [entry["batch"] for entry in report.data["verification"]["inputs"]] == [2, 3]


def test_what_transformers_cannot_export_has_a_way_out(tmp_path: Path) -> None:
    config = transformers.MambaConfig(
        hidden_size=16, num_hidden_layers=1, vocab_size=VOCABULARY, state_size=4
    )
    checkpoint = checkpoint_of(_model("MambaForCausalLM", config))
    with pytest.raises(InputError) as caught:
        Onnx().export(job_of(checkpoint), tmp_path, quietly)
    text = str(caught.value)
    assert text.startswith("MambaForCausalLM: transformers cannot export it to ONNX (model): ")
    assert text.endswith("give --module package.module:function")
    assert "\n" not in text and len(text) < 500
    assert names(tmp_path) == []


def test_missing_tensor_is_named(tmp_path: Path) -> None:
    good = checkpoint_of(bert("BertForMaskedLM"))
    name = "bert.encoder.layer.0.intermediate.dense.weight"
    part = replace(good, tensors={n: t for n, t in good.items() if n != name})
    with pytest.raises(InputError, match=rf"has no {name}, which BertForMaskedLM needs"):
        Onnx().export(job_of(part, good), tmp_path, quietly)


def test_wrong_shape_is_named(tmp_path: Path) -> None:
    good = checkpoint_of(bert("BertModel"))
    bad = replace(good, config={**(good.config or {}), "intermediate_size": 48})
    with pytest.raises(InputError, match=r"intermediate.*has shape \(32.*has \(48"):
        Onnx().export(job_of(bad, good), tmp_path, quietly)


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
        ({"architectures": ["BertForMultipleChoice"]}, "has no classifier.weight, "),
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
        Onnx().export(job_of(bad, good), tmp_path, quietly)
    assert list(tmp_path.iterdir()) == []


def test_checkpoints_that_cannot_be_exported_are_refused() -> None:
    good = checkpoint_of(bert("BertModel"))

    def check(checkpoint: Checkpoint) -> list[Any]:
        return Onnx().check(job_of(checkpoint))

    assert check(good) == []
    assert "is missing" in str(*check(replace(good, config=None)))
    name = "pooler.dense.weight"
    packed = with_tensors(good, {name: replace(good[name], dtype="F8_E4M3")})
    assert str(*check(packed)).startswith(f"{name}: dequantize it first")


@pytest.mark.parametrize("name", ["../evil", "/tmp/evil", "sub/../../evil"])
def test_side_file_outside_the_folder_is_refused(name: str, tmp_path: Path) -> None:
    good = replace(state_of(Normed()), side_files={name: b"x"})
    folder = tmp_path / "out"
    folder.mkdir()
    with pytest.raises(InputError, match="must lie inside"):
        Onnx().export(job_of(good, module=NORMED), folder, quietly)
    assert not (tmp_path / "evil").exists()


@pytest.mark.parametrize("options", [{"opset": 11}, {"tolerance": -1.0}])
def test_options_that_no_model_could_satisfy(options: dict[str, Any]) -> None:
    with pytest.raises(UsageError):
        Onnx(**options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"device": "tpu"}, "device 'tpu': use one of cpu, "),
        ({"dtype": "int8"}, "dtype 'int8': use one of fp32, "),
        ({"dtype": "bf16"}, "--dtype bf16: .* use fp32"),
        ({"link": True, "swappable": True}, "--link and --swappable are different forms"),
        ({"graft": "b.onnx", "swappable": True}, "--graft and --swappable are different forms"),
        ({"max_rank": 0}, "--max-rank 0: use a positive number"),
        ({"name": "mine"}, "--name is about --graft"),
        ({"graft": "b.onnx", "dtype": "fp16"}, "--graft keeps the graph.*leave --dtype"),
        ({"graft": "b.onnx", "module": "a:b"}, "--graft keeps the graph.*--module"),
        ({"graft": "b.onnx", "fuse": False}, "--graft keeps the graph.*--no-fuse"),
        ({"graft": "b.onnx", "cache": False}, "--graft keeps the graph.*--no-cache"),
    ],
)
def test_options_that_contradict_each_other(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message) as caught:
        ExportOptions(**options)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("options", "dtype"),
    [
        ({}, "fp32"),
        ({"device": "cuda"}, "fp16"),
        ({"device": "cuda", "dtype": "bf16"}, "bf16"),
        ({"device": "webgpu", "dtype": "fp32"}, "fp32"),
    ],
)
def test_the_type_that_a_device_is_given(options: dict[str, Any], dtype: str) -> None:
    assert ExportOptions(**options).chosen_dtype == dtype


def test_a_graft_may_be_linked() -> None:
    assert ExportOptions(graft="b.onnx", link=True, name="mine").graft == "b.onnx"


def test_a_file_that_onnx_runtime_refuses(tmp_path: Path) -> None:
    (tmp_path / "broken.onnx").write_bytes(b"no protobuf")
    with pytest.raises(VerificationError, match=r"broken\.onnx: ONNX Runtime .* refuses it"):
        open_session(tmp_path / "broken.onnx")


def test_large_values_may_differ_more() -> None:
    absolute, share = Tolerance(1e-4, relative=False), Tolerance(2e-2, relative=True)
    assert absolute.limit(0.5) == absolute.limit(10) == 1e-4
    assert absolute.limit(100) == pytest.approx(1e-3)
    assert share.limit(0.5) == 1e-2
