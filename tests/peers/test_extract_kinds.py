"""Embeddings, convolutions and experts that loratool extracts as factors, through PEFT."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import ResNetConfig, ResNetForImageClassification

import loratool
from loratool.updates import Experts
from tests import memory_models
from tests.memory_models import TINY, change, loaded
from tests.models import RECIPES, Pair, distance, outputs
from tests.peers.conftest import FULL
from tests.peers.peft_side import load_strictly, on_base, settings

# ---- embeddings


KEPT_WHOLE = {
    "t5": ["shared.weight"],
    "opt": ["model.decoder.embed_positions.weight"],
    "bert-mlm": ["bert.embeddings.word_embeddings.weight"],
    "bert-pretraining": ["bert.embeddings.word_embeddings.weight"],
    "distilbert-mlm": ["distilbert.embeddings.word_embeddings.weight"],
    "roberta-mlm": ["roberta.embeddings.word_embeddings.weight"],
}


@pytest.mark.parametrize("name", RECIPES)
def test_embeddings_as_factors(name: str, pair_of: Callable[[str], Pair], tmp_path: Path) -> None:
    pair, adapter = pair_of(name), tmp_path / "adapter"
    extracted = loratool.extract(pair.base, pair.tuned, rank=FULL, embeddings="lowrank")
    extracted.save(adapter)
    wanted = outputs(pair.load_tuned())
    assert distance(outputs(load_strictly(on_base(pair, adapter), adapter)), wanted) < 1e-5
    keys = load_file(adapter / "adapter_model.safetensors")
    assert any(key.endswith("lora_embedding_A") for key in keys)
    kept = [note.partition(":")[0] for note in extracted.notes if "kept whole" in note]
    assert kept == KEPT_WHOLE.get(name, [])


def test_factors_of_a_tied_embedding_are_the_heads_too(
    pair_of: Callable[[str], Pair], tmp_path: Path
) -> None:
    pair, adapter = pair_of("llama-tied"), tmp_path / "adapter"
    loratool.extract(pair.base, pair.tuned, rank=4, embeddings="lowrank").save(adapter)
    assert settings(adapter)["ensure_weight_tying"] is True
    found = load_strictly(on_base(pair, adapter), adapter).base_model.model
    table = found.model.embed_tokens.get_delta_weight("default")
    assert torch.equal(table, found.lm_head.get_delta_weight("default")) and table.norm() > 0
    merged = loratool.merge(pair.base, [(adapter, 1.0)])
    base = load_file(pair.base / "model.safetensors")["model.embed_tokens.weight"]
    change = merged["model.embed_tokens.weight"].read() - base
    torch.testing.assert_close(change, table, rtol=1e-4, atol=1e-6)


def test_a_tied_embedding_stays_tied_when_it_is_calculated_with(
    pair_of: Callable[[str], Pair], tmp_path: Path
) -> None:
    pair, adapter = pair_of("llama-tied"), tmp_path / "adapter"
    loratool.extract(pair.base, pair.tuned, rank=FULL, embeddings="lowrank").save(adapter)
    name = "model.embed_tokens.weight"
    base = load_file(pair.base / "model.safetensors")[name]
    change = load_file(pair.tuned / "model.safetensors")[name] - base
    results = {
        "rescaled": loratool.rescale(adapter, by=0.5),
        "stacked": loratool.stack([(adapter, 0.5)]),
        "converted": loratool.rescale(loratool.convert(adapter, to_lora=True), by=0.5),
    }
    for place, result in results.items():
        result.save(tmp_path / place)
        merged = loratool.merge(pair.base, [(tmp_path / place, 1.0)])
        found = merged[name].read() - base
        torch.testing.assert_close(found, change / 2, rtol=1e-4, atol=1e-6)


def test_lora_only_takes_embeddings_along_if_asked(
    pair_of: Callable[[str], Pair], tmp_path: Path
) -> None:
    pair = pair_of("llama")
    for embeddings in ("whole", "lowrank"):
        adapter = loratool.extract(pair.base, pair.tuned, lora_only=True, embeddings=embeddings)
        assert ("model.embed_tokens.weight" in adapter) == (embeddings == "lowrank")
        assert all(update.kind == "low_rank" for update in adapter.values())


# ---- convolutions


def save_resnets(folder: Path, groups: int = 1) -> None:
    """A residual network of plain convolutions, and a changed one."""
    config = ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 12], depths=[1, 1], layer_type="basic", num_labels=3
    )
    torch.manual_seed(0)
    model = ResNetForImageClassification(config)
    model.save_pretrained(folder / "base")
    change(model, seed=2)
    model.save_pretrained(folder / "tuned")


def seen(model: Any) -> torch.Tensor:
    pixels = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        logits: torch.Tensor = model(pixels).logits
    return logits


def resnet(folder: Path) -> Any:
    return ResNetForImageClassification.from_pretrained(folder).eval()


def test_convolutions_as_factors(tmp_path: Path) -> None:
    save_resnets(tmp_path)
    extracted = loratool.extract(tmp_path / "base", tmp_path / "tuned", rank=FULL)
    convolutions = {name: u for name, u in extracted.items() if len(u.shape) == 4}
    assert len(convolutions) >= 4
    assert all(update.kind == "low_rank" for update in convolutions.values())
    extracted.save(tmp_path / "adapter")
    wanted = seen(resnet(tmp_path / "tuned"))
    model = resnet(tmp_path / "base")
    assert distance(seen(model), wanted) > 1e-2
    assert distance(seen(load_strictly(model, tmp_path / "adapter")), wanted) < 1e-5
    merged = loratool.merge(tmp_path / "base", [(tmp_path / "adapter", 1.0)])
    for name, value in load_file(tmp_path / "tuned" / "model.safetensors").items():
        torch.testing.assert_close(merged[name].read(), value, rtol=1e-5, atol=1e-6)


def test_a_convolution_at_a_lower_rank_is_the_best_one_and_says_how_good(tmp_path: Path) -> None:
    save_resnets(tmp_path)
    extracted = loratool.extract(tmp_path / "base", tmp_path / "tuned", rank=3)
    report = extracted.save(tmp_path / "adapter")
    merged = loratool.merge(tmp_path / "base", [(tmp_path / "adapter", 1.0)])
    before, after = (
        load_file(tmp_path / place / "model.safetensors") for place in ("base", "tuned")
    )
    for name, update in extracted.items():
        if len(update.shape) != 4:
            continue
        delta = (after[name] - before[name]).double().flatten(1)
        sigma = torch.linalg.svdvals(delta)
        best = float((sigma[3:].square().sum() / sigma.square().sum()).sqrt())
        found = (merged[name].read() - before[name]).double().flatten(1)
        assert abs(float((found - delta).norm() / delta.norm()) - best) < 2e-3
        assert abs(report.data["tensors"][name]["relative_error"] - best) < 2e-3


# ---- experts


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe", "gpt_oss"])
@pytest.mark.parametrize("options", [{"rank": 3}, {"energy": 0.6}])
def test_each_expert_gets_its_own_best_factors(
    name: str, options: dict[str, Any], tmp_path: Path
) -> None:
    model = TINY[name].build()
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    model.save_pretrained(tmp_path / "base")
    change(model, seed=2)
    model.save_pretrained(tmp_path / "tuned")
    after = dict(model.named_parameters())
    extracted = loratool.extract(tmp_path / "base", tmp_path / "tuned", **options)
    experts = {n: u for n, u in extracted.items() if u.kind == "experts"}
    assert len(experts) == 4
    for parameter, update in experts.items():
        found = update.load()
        assert isinstance(found, Experts) and found.certificate is not None
        wanted = (after[parameter] - before[parameter]).detach().double()
        if update.transposed:
            wanted = wanted.mT
        assert update.shape == tuple(wanted.shape)
        assert (update.transposed is True) == (name == "gpt_oss")
        lost = 0.0
        for number, delta in enumerate(wanted):
            sigma = torch.linalg.svdvals(delta).square()
            one = found.expert(number)
            gap = float((one.b.double() @ one.a.double() - delta).square().sum())
            lost += gap
            if "rank" in options:
                assert found.rank == 3
                assert gap <= 1.01 * float(sigma[3:].sum())
            else:
                assert gap <= 0.4 * float(sigma.sum()) * 1.001
        total = float(wanted.square().sum())
        assert abs(found.certificate.relative_error - (lost / total) ** 0.5) < 1e-4
        assert abs(found.certificate.total / total - 1) < 1e-5


@pytest.mark.parametrize("name", ["mixtral", "qwen2_moe", "qwen3_moe"])
def test_experts_as_factors(name: str, tmp_path: Path) -> None:
    model = TINY[name].build()
    model.save_pretrained(tmp_path / "base")
    change(model, seed=2)
    model.save_pretrained(tmp_path / "tuned")
    adapter = tmp_path / "adapter"
    report = loratool.extract(tmp_path / "base", tmp_path / "tuned", rank=FULL).save(adapter)
    wanted = {
        f"model.layers.{layer}.mlp.experts.{leaf}"
        for layer in (0, 1)
        for leaf in ("gate_up_proj", "down_proj")
    }
    assert set(settings(adapter)["target_parameters"]) == wanted
    assert {n for n, f in report.data["tensors"].items() if f["kind"] == "experts"} == wanted
    base, tuned = (loaded(TINY[name], tmp_path / place) for place in ("base", "tuned"))
    logits = memory_models.outputs(tuned)
    assert distance(memory_models.outputs(base), logits) > 1e-2
    assert distance(memory_models.outputs(load_strictly(base, adapter)), logits) < 1e-5
