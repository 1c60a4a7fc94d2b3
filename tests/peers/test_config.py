"""adapter_config.json and the model card say what PEFT and people need."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftConfig
from safetensors.torch import load_file

import loratool
from tests.models import RECIPES, Pair, distance, load, make_pair, outputs
from tests.peers.peft_side import (
    PREFIX,
    by_hand,
    deltas,
    load_strictly,
    lora_modules,
    on_base,
    settings,
)


@pytest.mark.parametrize(
    ("name", "task"),
    [
        ("bert-classifier", "SEQ_CLS"), ("roberta-classifier", "SEQ_CLS"),
        ("llama-classifier", "SEQ_CLS"), ("bert-tokens", "TOKEN_CLS"),
        ("bert-answers", "QUESTION_ANS"), ("llama", "CAUSAL_LM"), ("gpt2", "CAUSAL_LM"),
        ("t5", "SEQ_2_SEQ_LM"), ("bert-mlm", None), ("bert-bare", None), ("llama-bare", None),
    ],
)  # fmt: skip
def test_the_task_follows_from_the_class(
    name: str, task: str | None, adapter_of: Callable[..., Path]
) -> None:
    assert PeftConfig.from_pretrained(adapter_of(name)).task_type == task


@pytest.mark.parametrize("name", RECIPES)
def test_one_rank_needs_no_patterns(name: str, adapter_of: Callable[..., Path]) -> None:
    found = settings(adapter_of(name, 4))
    assert (found["r"], found["lora_alpha"]) == (4, 4)
    smaller = {"cls.seq_relationship": 2} if name == "bert-pretraining" else {}
    assert found["rank_pattern"] == found["alpha_pattern"] == smaller
    assert found["inference_mode"] is True
    assert found["fan_in_fan_out"] is name.startswith("gpt2")


def test_the_config_of_a_whole_classifier(adapter_of: Callable[..., Path]) -> None:
    found = settings(adapter_of("distilbert-classifier", 4))
    norms = [
        f"distilbert.transformer.layer.{i}.{n}_layer_norm" for i in (0, 1) for n in ("output", "sa")
    ]
    tables = ["LayerNorm", "position_embeddings", "word_embeddings"]
    embeddings = [f"distilbert.embeddings.{table}" for table in tables]
    assert found["modules_to_save"] == ["classifier", *embeddings, *norms, "pre_classifier"]
    assert found["target_modules"] == ["k_lin", "lin1", "lin2", "out_lin", "q_lin", "v_lin"]
    assert found["bias"] == "all"
    assert "ensure_weight_tying" not in found


@pytest.mark.parametrize(
    ("name", "tied"),
    [("llama-tied", True), ("gpt2", True), ("llama", False), ("bert-mlm", False)],
)
def test_ties_are_told_where_peft_knows_them(
    name: str, tied: bool, adapter_of: Callable[..., Path]
) -> None:
    assert settings(adapter_of(name)).get("ensure_weight_tying", False) is tied


def test_full_names_where_short_ones_mean_more(
    pair_of: Callable[[str], Pair], tmp_path: Path
) -> None:
    pair = pair_of("bert-classifier")
    loratool.extract(pair.base, pair.tuned, target=["*intermediate*", "*.0.*.query"]).save(
        tmp_path / "adapter"
    )
    layer = "bert.encoder.layer.{}.{}".format
    assert settings(tmp_path / "adapter")["target_modules"] == [
        layer(0, "attention.self.query"),
        layer(0, "intermediate.dense"),
        layer(1, "intermediate.dense"),
    ]


@pytest.mark.parametrize("name", ["bert-classifier", "llama", "gpt2", "llama-bare"])
def test_mixed_ranks_are_read_as_meant(
    name: str, pair_of: Callable[[str], Pair], tmp_path: Path
) -> None:
    pair, adapter = pair_of(name), tmp_path / "adapter"
    loratool.extract(pair.base, pair.tuned, energy=0.5, rank=9).save(adapter)
    found = settings(adapter)
    assert found["rank_pattern"]
    assert found["rank_pattern"] == found["alpha_pattern"]
    model = on_base(pair, adapter)
    wanted = outputs(by_hand(pair, adapter, model))
    loaded = load_strictly(model, adapter)
    assert distance(outputs(loaded), wanted) < 1e-5
    for module in lora_modules(loaded):
        layer = loaded.get_submodule(PREFIX + module)
        assert layer.scaling["default"] == 1
        assert layer.r["default"] == len(layer.lora_A["default"].weight)
    assert loratool.validate(adapter, pair.base).data["problems"] == []


@pytest.mark.parametrize("name", ["bert-classifier", "roberta-classifier", "llama-classifier",
                                  "bert-answers", "llama-tied", "gpt2", "qwen2"])  # fmt: skip
def test_lora_only_holds_factors_and_reports_the_rest(
    name: str, pair_of: Callable[[str], Pair], tmp_path: Path
) -> None:
    pair, adapter = pair_of(name), tmp_path / "adapter"
    loratool.extract(pair.base, pair.tuned, rank=4, lora_only=True).save(adapter)
    found = settings(adapter)
    assert (found["bias"], found["modules_to_save"]) == ("none", None)
    assert found["task_type"] in (None, "CAUSAL_LM")
    tensors = load_file(adapter / "adapter_model.safetensors")
    assert all(".lora_A." in key or ".lora_B." in key for key in tensors)
    assert not (adapter / "model").exists()
    config = pair.load_tuned().config
    torch.manual_seed(0)  # of the head that the base lacks
    model = load(pair.recipe.tuned, pair.base, config=config)
    wanted = with_factors(model, adapter)
    assert distance(outputs(load_strictly(model, adapter)), wanted) < 1e-5
    check_left_out(pair, adapter)


def with_factors(model: Any, adapter: Path) -> torch.Tensor:
    """The outputs of the model with B A added, without PEFT; the model is left as it was."""
    before = {name: value.clone() for name, value in model.state_dict().items()}
    for module, delta in deltas(model, adapter).items():
        model.get_submodule(module).weight.data += delta
    found = outputs(model)
    model.load_state_dict(before)
    return found


def check_left_out(pair: Pair, adapter: Path) -> None:
    left_out = json.loads((adapter / "loratool.json").read_text())["left_out"]
    base = load_file(pair.base / "model.safetensors")
    tuned = load_file(pair.tuned / "model.safetensors")
    factored = {
        key.removeprefix(PREFIX).replace("lora_A.weight", "weight")
        for key in load_file(adapter / "adapter_model.safetensors")
    }
    assert left_out.keys() == {name for name in tuned if name not in factored}
    for name, norm in left_out.items():
        if name in base:
            change = (tuned[name].double() - base[name].double()).norm()
            assert norm == pytest.approx(float(change / base[name].double().norm()))
        else:
            assert norm is None


def test_lora_only_says_what_it_left_out(pair_of: Callable[[str], Pair], tmp_path: Path) -> None:
    pair = pair_of("bert-classifier")
    report = loratool.extract(pair.base, pair.tuned, lora_only=True).save(tmp_path / "adapter")
    (head,) = [line for line in report.lines if "classifier.weight" in line]
    assert head == "left out: classifier.weight (not in the base)"
    (norm,) = [line for line in report.lines if "embeddings.LayerNorm.weight" in line]
    assert norm.startswith("left out: ") and "relative norm" in norm


def test_the_base_is_named_by_path_hub_id_or_as_asked(tmp_path: Path) -> None:
    pair = make_pair(RECIPES["bert-classifier"], tmp_path)

    def base_name(**options: Any) -> Any:
        loratool.extract(pair.base, pair.tuned, **options).save(tmp_path / "a", overwrite=True)
        card = (tmp_path / "a" / "README.md").read_text()
        assert str(tmp_path) not in card
        name = settings(tmp_path / "a")["base_model_name_or_path"]
        assert (f"base_model: {name}" in card) == ("/" in name and not name.startswith("/"))
        return name

    assert base_name() == str(pair.base)
    assert base_name(base_name="someone/model") == "someone/model"
    config = json.loads((pair.base / "config.json").read_text())
    config["_name_or_path"] = "google/bert"
    (pair.base / "config.json").write_text(json.dumps(config))
    assert base_name() == "google/bert"


def test_no_local_path_in_what_is_shared(adapter_of: Callable[..., Path], tmp_path: Path) -> None:
    adapter = adapter_of("bert-classifier")
    top = str(adapter.parent.parent).encode()
    for path in adapter.rglob("*"):
        if path.is_file() and path.name != "adapter_config.json":
            assert top not in path.read_bytes(), path.name


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`")
def test_the_card_loads_the_model(
    pair_of: Callable[[str], Pair], adapter_of: Callable[..., Path]
) -> None:
    pair, adapter = pair_of("bert-classifier"), adapter_of("bert-classifier")
    code = (adapter / "README.md").read_text().split("```python\n")[1].split("```")[0]
    code = code.replace("ADAPTER", str(adapter)).replace('"BASE"', repr(str(pair.base)))
    names: dict[str, Any] = {}
    exec(code, names)
    assert distance(outputs(names["model"].eval()), outputs(pair.load_tuned())) < 1e-5
