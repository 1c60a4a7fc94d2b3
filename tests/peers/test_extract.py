"""Adapters that loratool extracts, on the base, through PEFT: the fine-tune's outputs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import loratool
from tests.models import RECIPES, Pair, distance, load, outputs
from tests.peers.peft_side import by_hand, load_strictly, on_base


@pytest.mark.parametrize("name", RECIPES)
def test_peft_gives_the_outputs_of_the_fine_tune(
    name: str, pair_of: Callable[[str], Pair], adapter_of: Callable[..., Path]
) -> None:
    pair, adapter = pair_of(name), adapter_of(name)
    model = on_base(pair, adapter)
    before, wanted = outputs(model), outputs(pair.load_tuned())
    assert distance(before, wanted) > 1e-2
    assert distance(outputs(load_strictly(model, adapter)), wanted) < 1e-5


@pytest.mark.parametrize("name", RECIPES)
def test_at_a_lower_rank_peft_gives_the_outputs_of_base_plus_ba(
    name: str, pair_of: Callable[[str], Pair], adapter_of: Callable[..., Path]
) -> None:
    pair, adapter = pair_of(name), adapter_of(name, 4)
    model = on_base(pair, adapter)
    wanted = outputs(by_hand(pair, adapter, model))
    assert distance(outputs(pair.load_tuned()), wanted) > 1e-3
    assert distance(outputs(load_strictly(model, adapter)), wanted) < 1e-5


@pytest.mark.parametrize("name", ["llama", "bert-classifier", "gpt2"])
def test_half_precision_models_give_half_precision_adapters(
    name: str, pair_of: Callable[[str], Pair], tmp_path: Path
) -> None:
    full = pair_of(name)
    pair = Pair(tmp_path / "base", tmp_path / "tuned", full.recipe)
    load(full.recipe.base, full.base).bfloat16().save_pretrained(pair.base)
    load(full.recipe.tuned, full.tuned).bfloat16().save_pretrained(pair.tuned)
    adapter = tmp_path / "adapter"
    loratool.extract(pair.base, pair.tuned, rank=4).save(adapter)
    tensors = load_file(adapter / "adapter_model.safetensors")
    assert {value.dtype for value in tensors.values()} == {torch.bfloat16}
    model = on_base(pair, adapter)
    wanted = outputs(by_hand(pair, adapter, model))
    assert distance(outputs(load_strictly(model, adapter)), wanted) < 1e-5
