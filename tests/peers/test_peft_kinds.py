"""Every kind of update that PEFT saves merges into the weights that PEFT itself merges."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers.pytorch_utils import Conv1D

import loratool
from loratool.engine import Drain, save_adapter
from loratool.errors import LoratoolError, UsageError
from loratool.opening import open_adapter


class Net(nn.Module):
    """One module of every kind that adapters are put on."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(20, 12)
        self.first = nn.Linear(12, 18)
        self.square = nn.Linear(18, 18, bias=False)
        self.fused = Conv1D(24, 18)
        self.line = nn.Conv1d(6, 8, 3)
        self.plane = nn.Conv2d(6, 8, (3, 2))
        self.point = nn.Conv2d(6, 10, 1)
        self.cube = nn.Conv3d(3, 4, 2)
        self.grouped = nn.Conv2d(6, 8, 3, groups=2)
        self.last = nn.Linear(24, 5)


ALL = ["table", "first", "square", "line", "plane", "point", "cube"]
LINEAR = ["first", "square"]
LYCORIS = ["first", "square", "line", "plane", "point", "grouped"]


def lora(**options: Any) -> peft.PeftConfig:
    return peft.LoraConfig(r=4, lora_alpha=6, **options)


CASES: Mapping[str, peft.PeftConfig] = {
    "all kinds of modules": lora(target_modules=ALL),
    "embedding": lora(target_modules=["table"]),
    "rslora": lora(target_modules=ALL, use_rslora=True),
    "dora": lora(target_modules=[*ALL, "last"], use_dora=True),
    "dora of Conv1D": lora(target_modules=["fused"], use_dora=True, fan_in_fan_out=True),
    "Conv1D": lora(target_modules=["fused"], fan_in_fan_out=True),
    "bias of lora_B": lora(target_modules=["first", "plane", "last"], lora_bias=True),
    "bias of Conv1D": lora(target_modules=["fused"], lora_bias=True, fan_in_fan_out=True),
    "patterns": lora(
        target_modules=ALL,
        rank_pattern={"plane": 2, "first": 3},
        alpha_pattern={"cube": 9, "^table": 1},
    ),
    "module to save": lora(target_modules=["first"], modules_to_save=["last", "point"]),
    "biases": lora(target_modules=["first", "plane"], bias="all"),
    "trained rows": lora(target_modules=["first"], trainable_token_indices={"table": [3, 7]}),
    "trained rows alone": peft.TrainableTokensConfig(
        target_modules=["table"], token_indices=[0, 19]
    ),
    "parameters": lora(target_modules=[], target_parameters=["first.weight"]),
    "loha": peft.LoHaConfig(r=3, alpha=5, target_modules=LYCORIS),
    "loha, Tucker": peft.LoHaConfig(
        r=3, alpha=5, target_modules=LYCORIS, use_effective_conv2d=True
    ),
    "loha, patterns": peft.LoHaConfig(
        r=3, alpha=5, target_modules=LINEAR, rank_pattern={"first": 2}, alpha_pattern={"square": 1}
    ),
    "lokr": peft.LoKrConfig(r=2, alpha=5, target_modules=["first", "square", "plane", "grouped"]),
    "lokr of Conv1d": peft.LoKrConfig(r=2, alpha=5, target_modules=["line"]),
    "lokr, both in factors": peft.LoKrConfig(
        r=1, alpha=5, target_modules=LYCORIS, decompose_both=True
    ),
    "lokr, Tucker": peft.LoKrConfig(  # PEFT itself fails on Conv1d
        r=1, alpha=5, target_modules=["first", "plane", "grouped"], use_effective_conv2d=True
    ),
    "ia3": peft.IA3Config(
        target_modules=["first", "square", "plane", "last"], feedforward_modules=["square"]
    ),
    "ia3 of inputs": peft.IA3Config(
        target_modules=["first", "plane"], feedforward_modules=["first", "plane"]
    ),
    "ia3 of Conv1D": peft.IA3Config(
        target_modules=["fused"], feedforward_modules=[], fan_in_fan_out=True
    ),
    "ia3 of the inputs of Conv1D": peft.IA3Config(
        target_modules=["fused"], feedforward_modules=["fused"], fan_in_fan_out=True
    ),
}  # fmt: skip


def made(config: peft.PeftConfig, folder: Path) -> dict[str, torch.Tensor]:
    """Save a base and a random adapter; returns the weights that PEFT merges."""
    torch.manual_seed(0)
    net = Net()
    save_file(net.state_dict(), folder / "base.safetensors")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = peft.get_peft_model(net, config)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if parameter.requires_grad:
                    noise = torch.randn(parameter.shape) * 0.2
                    keep = "magnitude" in name or "ia3" in name or "trainable" in name
                    parameter.copy_(parameter + noise if keep else noise)
        model.save_pretrained(folder / "adapter")
        merged: nn.Module = model.merge_and_unload()
    return {name: value.clone() for name, value in merged.state_dict().items()}


def merge(
    folder: Path, weight: float = 1.0, place: str = "merged", **options: Any
) -> dict[str, torch.Tensor]:
    pairs = [(folder / "adapter", weight)]
    loratool.merge(folder / "base.safetensors", pairs, **options).save(folder / place)
    found: dict[str, torch.Tensor] = load_file(folder / place / "base.safetensors")
    return found


@pytest.mark.parametrize("name", CASES)
def test_a_merge_is_what_peft_merges(tmp_path: Path, name: str) -> None:
    wanted = made(CASES[name], tmp_path)
    found = merge(tmp_path)
    base = load_file(tmp_path / "base.safetensors")
    assert found.keys() == wanted.keys() == base.keys()
    for key, value in wanted.items():
        torch.testing.assert_close(found[key], value, rtol=1e-5, atol=2e-6, msg=key)
    assert any(not torch.equal(found[key], base[key]) for key in base)


@pytest.mark.parametrize("name", [name for name in CASES if name != "lokr of Conv1d"])
def test_what_is_written_again_is_the_same_to_peft(tmp_path: Path, name: str) -> None:
    wanted = made(CASES[name], tmp_path)
    merged = merge(tmp_path)
    save_adapter(open_adapter(tmp_path / "adapter"), tmp_path / "again", Drain())
    pairs = [(tmp_path / "again", 1.0)]
    loratool.merge(tmp_path / "base.safetensors", pairs).save(tmp_path / "once more")
    found = load_file(tmp_path / "once more" / "base.safetensors")
    assert all(torch.equal(value, found[key]) for key, value in merged.items())
    net = Net()
    net.load_state_dict(load_file(tmp_path / "base.safetensors"))
    with warnings.catch_warnings():
        warnings.simplefilter("error", category=UserWarning)
        model = peft.PeftModel.from_pretrained(net, tmp_path / "again")
        loaded = peft.load_peft_weights(tmp_path / "again")
        result = peft.set_peft_model_state_dict(model, loaded)
    missing = [key for key in result.missing_keys if is_of_adapter(key)]
    assert not result.unexpected_keys and not missing
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = model.merge_and_unload().state_dict()
    for key, value in wanted.items():
        torch.testing.assert_close(theirs[key], value, rtol=1e-6, atol=1e-6, msg=key)


def is_of_adapter(key: str) -> bool:
    words = ("lora", "hada", "lokr", "ia3", "trainable", "modules_to_save")
    return any(word in key for word in words)


@pytest.mark.parametrize("name", CASES)
def test_a_reversible_merge_gives_the_base_back(tmp_path: Path, name: str) -> None:
    made(CASES[name], tmp_path)
    merge(tmp_path, reversible=True)
    loratool.unmerge(tmp_path / "merged").save(tmp_path / "back")
    base, back = (
        load_file(tmp_path / place) for place in ("base.safetensors", "back/base.safetensors")
    )
    for key, value in base.items():
        assert torch.equal(value.view(torch.int32), back[key].view(torch.int32)), key


@pytest.mark.parametrize("name", CASES)
def test_a_merge_of_any_kind_is_recognised(tmp_path: Path, name: str) -> None:
    wanted = made(CASES[name], tmp_path)
    (tmp_path / "theirs").mkdir()
    save_file(
        {n: v.contiguous() for n, v in wanted.items()}, tmp_path / "theirs" / "model.safetensors"
    )
    base, adapter = tmp_path / "base.safetensors", tmp_path / "adapter"
    assert loratool.validate(adapter, base, merged=tmp_path / "theirs").status == 0
    assert loratool.validate(adapter, base, merged=base).status == 1


@pytest.mark.parametrize("name", ["dora", "ia3"])
def test_what_is_not_linear_is_not_scaled_or_subtracted(tmp_path: Path, name: str) -> None:
    made(CASES[name], tmp_path)
    with pytest.raises(UsageError, match="cannot be scaled"):
        merge(tmp_path, 0.5)
    merge(tmp_path)
    with pytest.raises(LoratoolError, match="cannot be subtracted"):
        loratool.unmerge(tmp_path / "merged", [(tmp_path / "adapter", 1.0)])


@pytest.mark.parametrize("name", ["loha", "lokr", "all kinds of modules", "bias of lora_B"])
def test_linear_kinds_scale_and_add_up(tmp_path: Path, name: str) -> None:
    made(CASES[name], tmp_path)
    start = load_file(tmp_path / "base.safetensors")
    one, quarter = merge(tmp_path, 1.0, "one"), merge(tmp_path, 0.25, "quarter")
    for key in start:
        whole, part = one[key] - start[key], quarter[key] - start[key]
        torch.testing.assert_close(whole / 4, part, rtol=1e-4, atol=1e-6)


def test_a_grouped_convolution_with_lora_is_refused(tmp_path: Path) -> None:
    torch.manual_seed(0)
    net = Net()
    save_file(net.state_dict(), tmp_path / "base.safetensors")
    model = peft.get_peft_model(net, lora(target_modules=["grouped"]))
    model.save_pretrained(tmp_path / "adapter")
    with pytest.raises(LoratoolError, match="grouped"):
        merge(tmp_path)
