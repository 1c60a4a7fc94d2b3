"""Adapters that PEFT itself saved merge into the weights that PEFT itself merges."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file

import loratool
from tests.models import Pair, load

CASES: Mapping[str, tuple[str, str, dict[str, Any]]] = {
    # name: (recipe whose base is used, class it is loaded with, LoraConfig)
    "plain": ("llama", "", {"target_modules": ["q_proj", "v_proj"], "lora_alpha": 16}),
    "all-linear": ("llama", "", {"target_modules": "all-linear"}),
    "regex": ("llama", "", {"target_modules": r".*\.1\..*_proj"}),
    "some layers": ("llama", "", {"target_modules": ["k_proj"], "layers_to_transform": [1]}),
    "rslora": (
        "llama", "", {"target_modules": ["q_proj", "down_proj"], "use_rslora": True},
    ),
    "patterns": (
        "llama", "",
        {
            "target_modules": ["q_proj", "v_proj", "down_proj"],
            "rank_pattern": {"v_proj": 2, r"layers.1.mlp.down_proj": 5},
            "alpha_pattern": {"^model.layers.0.self_attn.q_proj": 3, "v_proj": 7},
        },
    ),
    "patterns and rslora": (
        "llama", "",
        {
            "target_modules": ["q_proj", "v_proj"], "rank_pattern": {"v_proj": 2},
            "alpha_pattern": {"v_proj": 7}, "use_rslora": True,
        },
    ),
    "bias all": ("qwen2", "", {"target_modules": ["q_proj", "o_proj"], "bias": "all"}),
    "bias all of an encoder": ("bert-mlm", "", {"target_modules": ["query"], "bias": "all"}),
    "bias lora_only": ("qwen2", "", {"target_modules": ["q_proj"], "bias": "lora_only"}),
    "modules to save": (
        "llama", "",
        {"target_modules": ["q_proj"], "modules_to_save": ["lm_head", "embed_tokens"]},
    ),
    "norms to save": (
        "llama", "", {"target_modules": ["q_proj"], "modules_to_save": ["norm"]},
    ),
    "ties": (
        "llama-tied", "",
        {
            "target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"],
            "ensure_weight_tying": True,
        },
    ),
    "dora": ("qwen2", "", {"target_modules": ["q_proj", "down_proj"], "use_dora": True}),
    "bias of lora_B": ("qwen2", "", {"target_modules": ["q_proj"], "lora_bias": True}),
    "trained rows": (
        "qwen2", "", {"target_modules": ["q_proj"], "trainable_token_indices": [1, 2]},
    ),
    "parameters": (
        "qwen2", "",
        {"target_modules": [], "target_parameters": ["q_proj.weight", "v_proj.weight"]},
    ),
    "embedding": ("llama", "", {"target_modules": ["embed_tokens", "q_proj"]}),
    "embedding and head": ("llama", "", {"target_modules": ["embed_tokens", "lm_head"]}),
    "tied embedding": ("llama-tied", "", {"target_modules": ["embed_tokens"]}),
    "gpt2, dora": (
        "gpt2", "",
        {"target_modules": ["c_attn", "wte"], "fan_in_fan_out": True, "use_dora": True},
    ),
    "gpt2": ("gpt2", "", {"target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True}),
    "gpt2, told wrongly": ("gpt2", "", {"target_modules": ["c_attn", "c_proj"]}),
    "classifier": (
        "bert-classifier", "BertForSequenceClassification",
        {"target_modules": ["query", "output.dense"], "task_type": "SEQ_CLS"},
    ),
    "classifier of a bare model": (
        "bert-bare", "BertForSequenceClassification",
        {"target_modules": ["query", "dense"], "task_type": "SEQ_CLS"},
    ),
    "classifier with two layers": (
        "roberta-classifier", "RobertaForSequenceClassification",
        {"target_modules": ["query", "value"], "task_type": "SEQ_CLS", "bias": "all"},
    ),
}  # fmt: skip


def trained(
    pair: Pair, architecture: str, options: Mapping[str, Any], folder: Path, **saving: Any
) -> dict[str, torch.Tensor]:
    """Save a random adapter with PEFT; returns the weights that PEFT merges."""
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = load(architecture or pair.recipe.base, pair.base)
        peft_model = get_peft_model(model, LoraConfig(**{"r": 4, **options}))
        for parameter in peft_model.parameters():
            if parameter.requires_grad:
                parameter.data += 0.1 * torch.randn(parameter.shape)
        peft_model.save_pretrained(folder, **saving)
        merged = peft_model.merge_and_unload()
    return {name: value.clone() for name, value in merged.state_dict().items()}


def merged(base: Path, adapters: list[tuple[Path, float]], folder: Path) -> dict[str, torch.Tensor]:
    loratool.merge(base, [(path, weight) for path, weight in adapters]).save(folder)
    found: dict[str, torch.Tensor] = load_file(folder / "model.safetensors")
    return found


def compare(found: Mapping[str, torch.Tensor], wanted: Mapping[str, torch.Tensor]) -> None:
    """Every tensor of ours is PEFT's; names may differ by one prefix."""
    compared = 0
    for name, value in found.items():
        other = next((n for n in wanted if n == name or n.endswith(f".{name}")), None)
        if other is not None:
            torch.testing.assert_close(value, wanted[other], atol=1e-6, rtol=1e-6, msg=name)
            compared += 1
    assert compared >= len(found) - 7  # the masked-LM head that a classifier lacks


@pytest.mark.parametrize("case", CASES)
def test_what_peft_saves_merges_as_peft_merges(
    case: str, pair_of: Callable[[str], Pair], tmp_path: Path
) -> None:
    recipe, architecture, options = CASES[case]
    pair = pair_of(recipe)
    wanted = trained(pair, architecture, options, tmp_path / "adapter")
    assert loratool.validate(tmp_path / "adapter", pair.base).ok
    found = merged(pair.base, [(tmp_path / "adapter", 1.0)], tmp_path / "merged")
    base = load_file(pair.base / "model.safetensors")
    assert any(name in base and not torch.equal(found[name], base[name]) for name in found)
    compare(found, wanted)


def test_a_pickled_adapter_merges_like_a_safe_one(
    pair_of: Callable[[str], Pair], tmp_path: Path
) -> None:
    pair = pair_of("llama")
    wanted = trained(pair, *CASES["patterns"][1:], tmp_path / "adapter", safe_serialization=False)
    assert (tmp_path / "adapter" / "adapter_model.bin").exists()
    compare(merged(pair.base, [(tmp_path / "adapter", 1.0)], tmp_path / "merged"), wanted)


@pytest.mark.parametrize("weight", [0.3, -2.0])
def test_a_weight_scales_the_update(
    weight: float, pair_of: Callable[[str], Pair], tmp_path: Path
) -> None:
    pair = pair_of("gpt2")
    peft = trained(pair, *CASES["gpt2"][1:], tmp_path / "adapter")
    found = merged(pair.base, [(tmp_path / "adapter", weight)], tmp_path / "merged")
    base = load_file(pair.base / "model.safetensors")
    wanted = {
        name: (value.double() + weight * (peft[name].double() - value.double())).float()
        for name, value in base.items()
    }
    compare(found, wanted)


def test_a_classifier_needs_its_class_named(pair_of: Callable[[str], Pair], tmp_path: Path) -> None:
    pair = pair_of("bert-bare")
    recipe, architecture, options = CASES["classifier of a bare model"]
    wanted = trained(pair_of(recipe), architecture, options, tmp_path / "adapter")
    out = loratool.merge(pair.base, [(tmp_path / "adapter", 1.0)], architecture=architecture)
    out.save(tmp_path / "merged")
    model = load(architecture, tmp_path / "merged")
    for name, value in model.state_dict().items():
        torch.testing.assert_close(value, wanted[name], atol=1e-6, rtol=1e-6)


def test_a_tied_embedding_and_head_are_updated_once(
    pair_of: Callable[[str], Pair], tmp_path: Path
) -> None:
    """PEFT's merge adds the delta of tied factors twice; its unmerged model shows what is right."""
    torch.manual_seed(0)
    pair = pair_of("llama-tied")
    config = LoraConfig(r=4, target_modules=["embed_tokens"], ensure_weight_tying=True)
    model = get_peft_model(load("LlamaForCausalLM", pair.base), config)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.1 * torch.randn(parameter.shape)
    model.save_pretrained(tmp_path / "adapter")
    merged(pair.base, [(tmp_path / "adapter", 1.0)], tmp_path / "merged")
    ids = torch.tensor([[1, 2, 3, 4]])
    with torch.no_grad():
        wanted = model(ids).logits
        found = load("LlamaForCausalLM", tmp_path / "merged")(ids).logits
        theirs = model.merge_and_unload()(ids).logits
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(theirs, wanted, atol=1e-2)


def test_a_tied_head_cannot_be_updated_alone(
    pair_of: Callable[[str], Pair], tmp_path: Path
) -> None:
    pair = pair_of("llama-tied")
    trained(pair, "", {"target_modules": ["lm_head", "q_proj"]}, tmp_path / "adapter")
    report = loratool.validate(tmp_path / "adapter", pair.base)
    (problem,) = report.data["problems"]
    assert problem["tensor"] == "lm_head.weight"
    assert "tied" in problem["message"]
