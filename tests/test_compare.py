"""Fidelity on inputs: beside transformers on the same models, written and loaded, and its laws."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from PIL import Image

import loratool
from fixtures.reactions import encode, reactions
from fixtures.weights import MINILM, RXNFP_BASE, RXNFP_TUNED, fetch
from loratool import comparing
from loratool.errors import InputError, MismatchError, UsageError
from loratool.reports import Report
from tests.adapters import factors, write_adapter
from tests.models import CONFIGS, RECIPES, Pair, build, load, make_pair, perturb, tiny_config

SAMPLES = [[5, 9, 11, 40, 8, 33], [7, 7, 12], [60, 3, 4, 5, 6, 7, 8, 9, 10], [21]]


def linear(name: str) -> bool:
    return "_proj" in name or "dense" in name or "query" in name


def write_ids(folder: Path, samples: Sequence[Sequence[int]] = SAMPLES) -> Path:
    path = folder / "ids.json"
    path.write_text(json.dumps(samples))
    return path


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    folder = tmp_path_factory.mktemp("compare")
    pair = make_pair(RECIPES["llama"], folder, linear)
    loratool.extract(pair.base, pair.tuned, rank=6).save(folder / "rank-6")
    write_ids(folder)
    return pair


@pytest.fixture
def adapter(llama: Pair) -> Path:
    return llama.base.parent / "rank-6"


@pytest.fixture
def ids(llama: Pair) -> Path:
    return llama.base.parent / "ids.json"


def rows(report: Report) -> dict[str, Mapping[str, Any]]:
    """The models by role, and those of adapters by rank."""
    return {
        f"{m['role']} {m['rank']}" if m["role"] in ("cut", "adapter") else m["role"]: m
        for m in report.data["models"]
    }


@torch.no_grad()
def answers(model: Any, samples: Sequence[Sequence[int]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits and hidden states (states, positions, size) of samples run one by one."""
    logits, states = [], []
    for sample in samples:
        found = model(input_ids=torch.tensor([sample]), output_hidden_states=True)
        logits.append(found.logits.reshape(-1, found.logits.shape[-1]).double())
        states.append(torch.stack([state[0].double() for state in found.hidden_states]))
    return torch.cat(logits), torch.cat(states, dim=1)


def assert_is_closeness(
    found: Mapping[str, Any], x: torch.Tensor, y: torch.Tensor, tolerance: float = 1e-5
) -> None:
    kl = torch.nn.functional.kl_div(
        x.log_softmax(-1), y.log_softmax(-1), log_target=True, reduction="batchmean"
    )
    assert found["kl"] == pytest.approx(float(kl), abs=tolerance)
    assert found["agreement"] == float((x.argmax(-1) == y.argmax(-1)).double().mean())
    cosine = torch.nn.functional.cosine_similarity(x, y).mean()
    assert found["cosine"] == pytest.approx(float(cosine), abs=tolerance)
    error = ((x - y).norm(dim=-1) / y.norm(dim=-1)).mean()
    assert found["relative_error"] == pytest.approx(float(error), abs=tolerance)


def test_the_figures_are_those_of_transformers(
    llama: Pair, adapter: Path, ids: Path, tmp_path: Path
) -> None:
    report = loratool.compare(llama.base, llama.tuned, [(adapter, 0.5)], inputs=ids, ranks=[2])
    data, found = report.data, rows(report)
    assert data["positions"] == sum(map(len, SAMPLES)) and data["classes"] == 64
    assert data["layers"] == ["embeddings", "model.layers.0", "model.layers.1"]
    assert list(found) == ["base", "cut 2", "adapter 6", "finetuned"]
    loratool.merge(llama.base, [(adapter, 0.5)]).save(tmp_path / "merged")
    loratool.rescale(adapter, rank=2).save(tmp_path / "rank-2")
    loratool.merge(llama.base, [(tmp_path / "rank-2", 0.5)]).save(tmp_path / "merged-2")
    expected, states = answers(llama.load_tuned(), SAMPLES)
    for key, folder in (
        ("base", llama.base), ("cut 2", tmp_path / "merged-2"), ("adapter 6", tmp_path / "merged")
    ):  # fmt: skip
        logits, own = answers(load("LlamaForCausalLM", folder), SAMPLES)
        assert_is_closeness(found[key], logits, expected)
        # The last of transformers' states is the one after the norm.
        for place, told in enumerate(found[key]["layer_errors"][:-1]):
            x, y = own[place], states[place]
            error = float(((x - y).norm(dim=-1) / y.norm(dim=-1)).mean())
            assert told == pytest.approx(error, abs=1e-5)
    gap = 1 - found["adapter 6"]["kl"] / found["base"]["kl"]
    assert found["adapter 6"]["gap_closed"] == pytest.approx(gap)
    assert found["adapter 6"]["adapters"] == ["rank-6=0.5"]


def test_the_fine_tune_is_itself_and_an_exact_adapter_too(
    llama: Pair, ids: Path, tmp_path: Path
) -> None:
    exact = loratool.extract(llama.base, llama.tuned, rank=32)
    found = rows(loratool.compare(llama.base, llama.tuned, [(exact, 1.0)], inputs=ids))
    same = found["finetuned"]
    assert (same["kl"], same["agreement"], same["relative_error"]) == (0, 1, 0)
    assert same["cosine"] == pytest.approx(1, abs=1e-12) and not any(same["layer_errors"])
    best = found["adapter 32"]
    assert best["kl"] < 1e-9 and best["agreement"] == 1 and best["gap_closed"] > 1 - 1e-6
    assert max(best["layer_errors"]) < 1e-4
    assert found["base"]["kl"] > 0.01 and found["base"]["gap_closed"] is None


def test_higher_ranks_are_closer_and_say_the_same_as_files(
    llama: Pair, adapter: Path, ids: Path
) -> None:
    report = loratool.compare(
        llama.base, llama.tuned, [(adapter, 1.0)], inputs=ids, ranks=[4, 1, 6, 9]
    )
    models = [m for m in report.data["models"] if m["role"] in ("cut", "adapter")]
    assert [m["rank"] for m in models] == [1, 4, 6]
    last = [m["layer_errors"][-1] for m in models]
    assert last == sorted(last, reverse=True)
    assert report.ok


def test_adapters_are_compared_one_by_one_in_any_order(
    llama: Pair, adapter: Path, ids: Path, tmp_path: Path
) -> None:
    other = write_adapter(tmp_path / "other", {"model.layers.0.mlp.up_proj": factors(0, 48, 32, 2)})
    given = [(adapter, 1.0), (other, 1.0)]

    def by_name(order: Sequence[tuple[Path, float]]) -> dict[Any, Mapping[str, Any]]:
        data = loratool.compare(llama.base, llama.tuned, order, inputs=ids).data
        return {(m["role"], *m["adapters"]): m for m in data["models"]}

    one, two = by_name(given), by_name(given[::-1])
    assert one == two and ("adapter", "other") in one
    alone = by_name(given[1:])
    assert alone["adapter", "other"] == one["adapter", "other"]


def test_groups_of_inputs_add_up(
    llama: Pair, adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    many = [sample for _ in range(20) for sample in SAMPLES]
    ids = write_ids(tmp_path, many)
    arguments: Any = (llama.base, llama.tuned, [(adapter, 1.0)])
    once = loratool.compare(*arguments, inputs=ids)
    seen: list[int] = []
    original = comparing._groups
    monkeypatch.setattr(comparing, "_SPOOL", 20_000)
    monkeypatch.setattr(
        comparing, "_groups",
        lambda *given: seen.append(len(groups := original(*given))) or groups,
    )  # fmt: skip
    in_parts = loratool.compare(*arguments, inputs=ids)
    assert seen[0] > 1
    for one, other in zip(once.data["models"], in_parts.data["models"], strict=True):
        assert one["kl"] == pytest.approx(other["kl"], rel=1e-9)
        assert one["layer_errors"] == pytest.approx(other["layer_errors"], rel=1e-9)
        assert one["agreement"] == other["agreement"]


def test_a_classifier_of_a_masked_language_model(tmp_path: Path) -> None:
    pair = make_pair(RECIPES["bert-classifier"], tmp_path, tuned_settings={"num_labels": 5})
    ids = write_ids(tmp_path)
    for rank in (1, 4):
        loratool.extract(pair.base, pair.tuned, rank=rank).save(tmp_path / f"r{rank}")
    given = [(tmp_path / "r1", 1.0), (tmp_path / "r4", 1.0)]
    report = loratool.compare(pair.base, pair.tuned, given, inputs=ids)
    assert report.data["positions"] == len(SAMPLES) and report.data["classes"] == 5
    roles = [(m["role"], m["adapters"]) for m in report.data["models"]]
    # Both keep the same head: one rank 0 stands for both.
    assert roles == [
        ("rank 0", ["r1", "r4"]), ("adapter", ["r1"]), ("adapter", ["r4"]), ("finetuned", []),
    ]  # fmt: skip
    loratool.merge(pair.base, [(tmp_path / "r4", 1.0)]).save(tmp_path / "merged")
    architecture = "BertForSequenceClassification"
    expected, _ = answers(pair.load_tuned(), SAMPLES)
    found, _ = answers(load(architecture, tmp_path / "merged"), SAMPLES)
    assert_is_closeness(report.data["models"][2], found, expected)
    tuned = pair.load_tuned().state_dict()
    head = {n: v for n, v in tuned.items() if "classifier" in n or "pooler" in n}
    other = {n: 2 * v for n, v in head.items()}
    module = "bert.encoder.layer.0.output.dense"
    for name, whole in (("same", head), ("other", other)):
        kept = ["classifier", "pooler"]
        write_adapter(tmp_path / name, {module: factors(0, 32, 48, 2)}, whole, modules_to_save=kept)
    given = [(tmp_path / name, 1.0) for name in ("same", "other")]
    report = loratool.compare(pair.base, pair.tuned, given, inputs=ids)
    names = [m["name"] for m in report.data["models"] if m["role"] == "rank 0"]
    assert names == ["rank 0 of same", "rank 0 of other"]


def test_encoders_are_compared_by_their_vectors(tmp_path: Path) -> None:
    pair = make_pair(RECIPES["bert-bare"], tmp_path, linear)
    adapter = loratool.extract(pair.base, pair.tuned, rank=32)
    ids = write_ids(tmp_path)
    report = loratool.compare(pair.base, pair.tuned, [(adapter, 1.0)], inputs=ids)
    assert report.data["output"] == "last_hidden_state"
    base, *_ = report.data["models"]
    assert base["kl"] is None and base["agreement"] is None
    one, other = load("BertModel", pair.base), pair.load_tuned()
    cosines, pooled = [], []
    for sample in SAMPLES:
        with torch.no_grad():
            x, y = (m(input_ids=torch.tensor([sample])).last_hidden_state[0] for m in (one, other))
        cosines += torch.nn.functional.cosine_similarity(x, y).tolist()
        pooled.append(float(torch.nn.functional.cosine_similarity(x.mean(0), y.mean(0), dim=0)))
    assert base["cosine"] == pytest.approx(np.mean(cosines), abs=1e-5)
    found = base["outputs"]["mean of last_hidden_state"]["cosine"]
    assert found == pytest.approx(np.mean(pooled), abs=1e-5)
    exact, own = report.data["models"][-2:]
    assert exact["relative_error"] < 1e-4 and own["relative_error"] == 0
    assert exact["gap_closed"] > 0.999


@pytest.mark.parametrize(
    ("recipe", "outputs", "positions"),
    [
        ("bert-answers", ["start_logits", "end_logits"], 4),
        ("bert-tokens", ["logits"], 19),
        ("bert-pretraining", ["prediction_logits", "seq_relationship_logits"], 19),
        ("t5", ["logits"], 19),
    ],
)
def test_heads_of_other_kinds(
    tmp_path: Path, recipe: str, outputs: list[str], positions: int
) -> None:
    pair = make_pair(RECIPES[recipe], tmp_path)
    adapter = loratool.extract(pair.base, pair.tuned, rank=32)
    data = loratool.compare(
        pair.base, pair.tuned, [(adapter, 1.0)], inputs=write_ids(tmp_path)
    ).data
    exact = next(m for m in data["models"] if m["role"] == "adapter")
    assert list(exact["outputs"]) == outputs and data["positions"] == positions
    assert all(found["kl"] < 1e-8 for found in exact["outputs"].values())
    assert max(exact["layer_errors"]) < 1e-3
    if recipe == "t5":
        assert data["layers"][:2] == ["encoder.block embeddings", "encoder.block.0"]
        assert "decoder.block.1" in data["layers"]


def test_layers_that_are_one_module_are_told_apart(tmp_path: Path) -> None:
    sizes = {**CONFIGS["bert"], "embedding_size": 16, "num_hidden_groups": 1}
    model = build("AlbertModel", transformers.AlbertConfig(**sizes))
    model.save_pretrained(tmp_path / "base")
    perturb(model, lambda name: "ffn.weight" in name)
    model.save_pretrained(tmp_path / "tuned")
    adapter = loratool.extract(tmp_path / "base", tmp_path / "tuned", rank=1)
    data = loratool.compare(
        tmp_path / "base", tmp_path / "tuned", [(adapter, 1.0)], inputs=write_ids(tmp_path)
    ).data
    assert len(data["layers"]) == 3 and data["layers"][2].endswith(".0 (2)")
    first, second = data["models"][0]["layer_errors"][1:]
    assert 0 < first < second


def test_images(tmp_path: Path) -> None:
    config = transformers.ViTConfig(**{**CONFIGS["bert"], "image_size": 16, "patch_size": 4})
    model = build("ViTForImageClassification", config)
    for name in ("base", "tuned"):
        model.save_pretrained(tmp_path / name)
        settings = {
            "image_processor_type": "ViTImageProcessor", "size": {"height": 16, "width": 16}
        }  # fmt: skip
        (tmp_path / name / "preprocessor_config.json").write_text(json.dumps(settings))
        perturb(model, lambda name: "layer" in name and name.endswith("weight"))
    (tmp_path / "images").mkdir()
    pixels = np.random.default_rng(0).integers(0, 256, (5, 20, 20, 3), dtype=np.uint8)
    for number, image in enumerate(pixels):
        Image.fromarray(image).save(tmp_path / "images" / f"{number}.png")
    adapter = loratool.extract(tmp_path / "base", tmp_path / "tuned", rank=32)
    data = loratool.compare(
        tmp_path / "base", tmp_path / "tuned", [(adapter, 1.0)], inputs=tmp_path / "images"
    ).data
    assert data["inputs"] == {
        "file": str(tmp_path / "images"), "kind": "images", "samples": 5, "tokens": None
    }  # fmt: skip
    base, exact = data["models"][0], data["models"][-2]
    assert base["kl"] > 1e-4 and exact["kl"] < 1e-9 and data["positions"] == 5


def test_a_fine_tune_in_bf16_shows_what_its_own_rounding_does(
    llama: Pair, ids: Path, tmp_path: Path
) -> None:
    for name in ("base", "tuned"):
        model = load("LlamaForCausalLM", llama.base.parent / name).bfloat16()
        model.save_pretrained(tmp_path / name)
    adapter = loratool.extract(tmp_path / "base", tmp_path / "tuned", rank=32)
    report = loratool.compare(tmp_path / "base", tmp_path / "tuned", [(adapter, 1.0)], inputs=ids)
    own = report.data["models"][-1]
    assert own["name"] == "fine-tune in bf16" and own["dtype"] == "bf16"
    assert 1e-4 < own["relative_error"] < 0.1 and own["layer_errors"][0] == 0
    assert report.data["models"][0]["kl"] > 10 * own["kl"]


def test_other_names_in_the_base(llama: Pair, adapter: Path, ids: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    tensors = load_file(llama.base / "model.safetensors")
    moved = {name.replace("model.layers.", "blocks."): value for name, value in tensors.items()}
    (tmp_path / "base").mkdir()
    save_file(moved, tmp_path / "base" / "model.safetensors", metadata={"format": "pt"})
    moves = ["model.layers.=blocks."]
    own = loratool.extract(tmp_path / "base", llama.tuned, rank=6, map=moves)
    found = loratool.compare(tmp_path / "base", llama.tuned, [(own, 1.0)], inputs=ids, map=moves)
    plain = loratool.compare(llama.base, llama.tuned, [(adapter, 1.0)], inputs=ids)
    for one, other in zip(found.data["models"], plain.data["models"], strict=True):
        assert one["kl"] == pytest.approx(other["kl"], rel=1e-4, abs=1e-12)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"inputs": None}, "--inputs FILE is needed"),
        ({"samples": 0}, "--samples must be at least 1"),
        ({"length": 0}, "--length must be at least 1"),
        ({"ranks": [4, 0]}, "write ranks from 1 up"),
        ({"device": "abacus"}, "--device abacus: write cpu"),
        ({"plot": "picture.jpeg"}, "end in .svg or .png"),
        ({"length": 99}, "has only 24 positions"),
    ],
)
def test_options_that_make_no_sense(
    llama: Pair, adapter: Path, ids: Path, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        loratool.compare(llama.base, llama.tuned, [(adapter, 1.0)], **{"inputs": ids, **options})


def test_what_cannot_be_compared_is_told_before_anything_is_run(
    llama: Pair, adapter: Path, ids: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(comparing, "run", None)

    def refused(match: str, error: type[Exception] = InputError, **given: Any) -> None:
        arguments = {"adapters": [(adapter, 1.0)], "inputs": ids, **given}
        base, tuned = arguments.pop("base", llama.base), arguments.pop("tuned", llama.tuned)
        with pytest.raises(error, match=match):
            loratool.compare(base, tuned, **arguments)

    refused("no such file", inputs=tmp_path / "missing.json")
    refused("at least one adapter", UsageError, adapters=[])
    refused("weight of 0", UsageError, adapters=[(adapter, 0.0)])
    (tmp_path / "empty.txt").write_text("\n")
    refused("is empty", inputs=tmp_path / "empty.txt")
    (tmp_path / "texts.txt").write_text("some words\n")
    refused("has no tokenizer", inputs=tmp_path / "texts.txt")
    (tmp_path / "wrong.json").write_text(json.dumps([[1, 64]]))
    refused("token id 64 is not in", inputs=tmp_path / "wrong.json")
    (tmp_path / "long.json").write_text(json.dumps([[1] * 25]))
    refused("--length 24", inputs=tmp_path / "long.json")
    if not torch.cuda.is_available():
        refused("--device cuda: there is none", device="cuda")
    stranger = write_adapter(tmp_path / "stranger", {"layer": factors(0, 8, 8, 2)})
    refused("does not fit", MismatchError, adapters=[(stranger, 1.0)])
    dora = {f"base_model.model.{UP}.lora_magnitude_vector": torch.ones(48)}
    folder = write_adapter(tmp_path / "dora", {UP: factors(0, 48, 32, 2)}, use_dora=True)
    _add(folder, dora)
    refused("convert --to-lora", MismatchError, adapters=[(folder, 1.0)], ranks=[1])
    config = tiny_config("llama", vocab_size=70)
    build("LlamaForCausalLM", config).save_pretrained(tmp_path / "larger")
    refused("cannot be compared", tuned=tmp_path / "larger")
    config = tiny_config("llama", pad_token_id=None)
    build("LlamaForSequenceClassification", config).save_pretrained(tmp_path / "unpadded")
    head = {"score.weight": torch.ones(2, 32)}
    given = write_adapter(
        tmp_path / "head", {UP: factors(0, 48, 32, 2)}, head, modules_to_save=["score"]
    )
    refused("padding token", tuned=tmp_path / "unpadded", adapters=[(given, 1.0)])
    refused("score.weight", tuned=tmp_path / "unpadded")


UP = "model.layers.0.mlp.up_proj"


def _add(folder: Path, tensors: dict[str, torch.Tensor]) -> None:
    from safetensors.torch import load_file, save_file

    path = folder / "adapter_model.safetensors"
    save_file({**load_file(path), **tensors}, path, metadata={"format": "pt"})


def test_a_model_that_overflows_is_named(llama: Pair, ids: Path, tmp_path: Path) -> None:
    modules = {}
    for seed, name in enumerate((UP, UP.replace("up_proj", "gate_proj"))):
        b, a = factors(seed, 48, 32, 2)
        modules[name] = (1e18 * b, 1e18 * a)
    wild = write_adapter(tmp_path / "wild", modules)
    with pytest.raises(InputError, match="wild: gives NaN in logits"):
        loratool.compare(llama.base, llama.tuned, [(wild, 1.0)], inputs=ids)


def test_rxnfp(tmp_path: Path) -> None:
    """The classifier of the demo: agreement is what the demo counts, with transformers."""
    from fixtures.demo import share_agreeing

    fetch()
    texts = reactions(300, seed=0)[:24]
    ids, mask = encode(texts, RXNFP_BASE / "vocab.txt")
    samples = [
        [token for token, is_real in zip(*row, strict=True) if is_real]
        for row in zip(ids, mask, strict=True)
    ]
    loratool.extract(RXNFP_BASE, RXNFP_TUNED, rank=16).save(tmp_path / "adapter")
    report = loratool.compare(
        RXNFP_BASE, RXNFP_TUNED, [(tmp_path / "adapter", 1.0)], inputs=write_ids(tmp_path, samples),
        ranks=[4],
    )  # fmt: skip
    found = rows(report)
    assert list(found) == ["rank 0", "cut 4", "adapter 16", "finetuned"]
    loratool.merge(RXNFP_BASE, [(tmp_path / "adapter", 1.0)]).save(tmp_path / "merged")
    classifier = transformers.BertForSequenceClassification
    config = transformers.AutoConfig.from_pretrained(tmp_path / "adapter" / "model")
    merged = load(classifier.__name__, tmp_path / "merged")
    tuned = load(classifier.__name__, RXNFP_TUNED, config=config)
    given = {"input_ids": torch.tensor(ids), "attention_mask": torch.tensor(mask)}
    with torch.no_grad():
        x, y = (model(**given).logits for model in (merged, tuned))
    assert found["adapter 16"]["agreement"] == share_agreeing(x, y) >= 0.9
    assert_is_closeness(found["adapter 16"], x.double(), y.double(), 1e-4)
    kls = [m["kl"] for m in report.data["models"]]
    assert kls == sorted(kls, reverse=True)
    assert found["rank 0"]["agreement"] < 0.2 and found["adapter 16"]["gap_closed"] > 0.9


def test_minilm(tmp_path: Path) -> None:
    fetch()
    modules = {}
    for layer in range(6):
        for seed, part in enumerate(("query", "value")):
            b, a = factors(10 * layer + seed, 384, 384, 4)
            modules[f"encoder.layer.{layer}.attention.self.{part}"] = (0.1 * b, 0.05 * a)
    adapter = write_adapter(tmp_path / "adapter", modules)
    tuned = loratool.merge(MINILM, [(adapter, 1.0)])
    texts = tmp_path / "texts.txt"
    texts.write_text("A cat sat on the mat.\nInterest rates rose again last month.\nHello!\n")
    report = loratool.compare(MINILM, tuned, [(adapter, 1.0)], inputs=texts, ranks=[1, 2])
    found = rows(report)
    assert report.data["inputs"]["kind"] == "texts" and report.data["positions"] > 15
    assert found["adapter 4"]["relative_error"] == 0
    errors = [found[key]["relative_error"] for key in ("base", "cut 1", "cut 2", "adapter 4")]
    assert errors == sorted(errors, reverse=True) and errors[0] > 0.01
    assert not math.isnan(found["base"]["cosine"])
