"""Whatever PEFT saves becomes plain LoRA that PEFT loads and merges to the same weights."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import ConvNextConfig, ConvNextForImageClassification

import loratool
from loratool.adapter import Adapter, LazyUpdate
from loratool.updates import LoHa
from tests import updates as some
from tests.memory_models import TINY, loaded, outputs
from tests.models import distance
from tests.peers.peft_side import load_strictly
from tests.peers.test_peft_kinds import CASES, LYCORIS, Net, lora, made

FULL = 24  # at least the rank of every weight of the net
# PEFT's LoRA of a convolution in groups cannot be merged; and its lora_bias is for all or none.
OTHERS = [name for name in LYCORIS if name != "grouped"]
CONVERTED = {
    **{name: config for name, config in CASES.items() if config.peft_type == "LORA"},
    "loha": peft.LoHaConfig(r=3, alpha=5, target_modules=OTHERS),
    "loha, Tucker": peft.LoHaConfig(r=3, alpha=5, target_modules=OTHERS, use_effective_conv2d=True),
    "lokr": peft.LoKrConfig(r=2, alpha=5, target_modules=OTHERS),
    "lokr, both in factors": peft.LoKrConfig(
        r=1, alpha=5, target_modules=OTHERS, decompose_both=True
    ),
    "lokr, Tucker": peft.LoKrConfig(
        r=1, alpha=5, target_modules=["first", "plane"], use_effective_conv2d=True
    ),
    "ia3": peft.IA3Config(target_modules=["first", "last"], feedforward_modules=[]),
    **{name: config for name, config in CASES.items() if name.startswith("ia3 of")},
}


def merged_by_peft(folder: Path, adapter: str = "lora") -> dict[str, torch.Tensor]:
    """What PEFT makes of the base with an adapter; a key that it does not take is a failure."""
    net = Net()
    net.load_state_dict(load_file(folder / "base.safetensors"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = peft.PeftModel.from_pretrained(net, folder / adapter)
        found: nn.Module = model.merge_and_unload()
    return {name: value.clone() for name, value in found.state_dict().items()}


def to_lora(folder: Path, **options: Any) -> dict[str, Any]:
    """Convert the adapter; returns its manifest."""
    base = folder / "base.safetensors"
    adapter = loratool.convert(folder / "adapter", base, to_lora=True, **options)
    adapter.save(folder / "lora", overwrite=True)
    manifest: dict[str, Any] = json.loads((folder / "lora" / "loratool.json").read_text())
    return manifest


@pytest.mark.parametrize("name", CONVERTED)
def test_at_full_rank_it_merges_to_the_same_weights(tmp_path: Path, name: str) -> None:
    wanted = made(CONVERTED[name], tmp_path)
    manifest = to_lora(tmp_path, rank=FULL)
    config = json.loads((tmp_path / "lora" / "adapter_config.json").read_text())
    assert config["peft_type"] == "LORA" and not config["use_dora"]
    found = merged_by_peft(tmp_path)
    for key, value in wanted.items():
        torch.testing.assert_close(found[key], value, rtol=1e-5, atol=3e-6, msg=key)
    errors = [facts.get("relative_error", 0.0) for facts in manifest["tensors"].values()]
    assert max(errors) < 1e-6


@pytest.mark.parametrize("name", ["dora", "loha, Tucker", "lokr", "ia3"])
def test_at_a_lower_rank_it_is_off_by_what_is_stated(tmp_path: Path, name: str) -> None:
    wanted = made(CONVERTED[name], tmp_path)
    manifest = to_lora(tmp_path, rank=2)
    base, found = load_file(tmp_path / "base.safetensors"), merged_by_peft(tmp_path)
    checked = 0
    for key, facts in manifest["tensors"].items():
        if facts["kind"] != "low_rank":
            continue
        change = (wanted[key] - base[key]).double()
        measured = float((found[key] - wanted[key]).double().norm() / change.norm())
        assert abs(measured - facts["relative_error"]) < 1e-3, key
        assert facts["rank"] <= 2
        checked += facts["relative_error"] > 0.01
    assert checked >= 2


def test_another_format_changes_no_byte_of_the_factors(tmp_path: Path) -> None:
    made(lora(target_modules=["first", "plane", "table"]), tmp_path)
    loratool.convert(tmp_path / "adapter", format="peft").save(tmp_path / "again")
    before, after = (
        load_file(tmp_path / place / "adapter_model.safetensors") for place in ("adapter", "again")
    )
    factors = [key for key in before if "lora_" in key]
    assert factors and all(torch.equal(before[key], after[key]) for key in factors)


def test_biases_that_peft_cannot_hold_beside_others_are_left_out_if_asked(tmp_path: Path) -> None:
    wanted = made(CASES["ia3"], tmp_path)
    base = tmp_path / "base.safetensors"
    with pytest.raises(loratool.LoratoolError, match=r"first\.bias.*--drop"):
        loratool.convert(tmp_path / "adapter", base, to_lora=True, rank=FULL)
    adapter = loratool.convert(tmp_path / "adapter", base, to_lora=True, rank=FULL, drop=True)
    assert any("left out: first.bias" in note for note in adapter.notes)
    adapter.save(tmp_path / "lora")
    found, start = merged_by_peft(tmp_path), load_file(base)
    for key, value in wanted.items():
        is_bias = key.endswith(".bias")
        torch.testing.assert_close(found[key], start[key] if is_bias else value, msg=key)


@pytest.mark.parametrize("name", ["vit", "dinov2", "mixtral"])
def test_dora_against_a_base_that_stores_its_weights_otherwise(name: str, tmp_path: Path) -> None:
    """Other names than in memory, and halves of fused tensors."""
    TINY[name].build().save_pretrained(tmp_path / "base")
    targets = ["q_proj", "o_proj", *["gate_proj", "up_proj", "down_proj"] * (name == "dinov2")]
    config = peft.LoraConfig(r=2, lora_alpha=3, target_modules=targets, use_dora=True)
    model = peft.get_peft_model(loaded(TINY[name], tmp_path / "base"), config)
    generator = torch.Generator().manual_seed(5)
    for key, parameter in model.named_parameters():
        if parameter.requires_grad:
            noise = 0.3 * torch.randn(parameter.shape, generator=generator)
            parameter.data = (parameter + noise).abs() if "magnitude" in key else noise
    model.save_pretrained(tmp_path / "adapter")
    wanted = outputs(model.eval())
    base = tmp_path / "base"
    loratool.convert(tmp_path / "adapter", base, to_lora=True, rank=64).save(tmp_path / "lora")
    start = loaded(TINY[name], base)
    assert distance(outputs(start), wanted) > 1e-2
    assert distance(outputs(load_strictly(start, tmp_path / "lora")), wanted) < 1e-5


def test_a_convolution_in_groups_is_refused(tmp_path: Path) -> None:
    config = ConvNextConfig(hidden_sizes=[8, 8], depths=[1, 1], num_stages=2, num_labels=2)
    torch.manual_seed(0)
    ConvNextForImageClassification(config).save_pretrained(tmp_path / "base")
    name = "convnext.encoder.stages.0.layers.0.dwconv.weight"
    update = LoHa(some.product(1, 8, 1, 49), some.product(2, 8, 1, 49))
    lazy = LazyUpdate(name, "loha", (8, 49), "F64", lambda: update)
    with pytest.raises(loratool.LoratoolError, match=r"dwconv\.weight: .* 8 groups"):
        loratool.convert(Adapter({name: lazy}), tmp_path / "base", to_lora=True)
