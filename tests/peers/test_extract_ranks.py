"""Adapters of chosen ranks, on the base, through PEFT: the base plus B A."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

import loratool
from tests.models import Pair, distance, outputs
from tests.peers.peft_side import by_hand, load_strictly, on_base


@pytest.mark.parametrize("name", ["llama", "llama-tied", "bert-classifier", "gpt2", "opt"])
@pytest.mark.parametrize("weigh", ["energy", "relative"])
def test_peft_reads_the_ranks_that_a_budget_leaves(
    name: str, weigh: str, pair_of: Callable[[str], Pair], tmp_path: Path
) -> None:
    pair = pair_of(name)
    adapter = tmp_path / "adapter"
    whole = loratool.extract(pair.base, pair.tuned, rank=1).save(tmp_path / "one")
    size = 2 * whole.data["totals"]["bytes"]
    loratool.extract(pair.base, pair.tuned, budget=str(size), weigh=weigh).save(adapter)
    config = json.loads((adapter / "adapter_config.json").read_text())
    assert config["rank_pattern"] and config["alpha_pattern"]
    model = on_base(pair, adapter)
    wanted = outputs(by_hand(pair, adapter, model))
    assert distance(outputs(load_strictly(model, adapter)), wanted) < 1e-5


def test_embeddings_and_the_head_tied_to_them_count_twice(
    pair_of: Callable[[str], Pair], tmp_path: Path
) -> None:
    from safetensors.torch import load_file

    pair = pair_of("llama-tied")
    adapter = tmp_path / "adapter"
    loratool.extract(pair.base, pair.tuned, budget="20KiB", embeddings="lowrank").save(adapter)
    tensors = load_file(adapter / "adapter_model.safetensors")
    assert any("lora_embedding_A" in name for name in tensors)
    assert any("lm_head.lora_A" in name for name in tensors)
    assert sum(value.nbytes for value in tensors.values()) <= 20 * 1024
    model = on_base(pair, adapter)
    assert distance(outputs(load_strictly(model, adapter)), outputs(on_base(pair, adapter))) > 0.1


@pytest.mark.parametrize("name", ["bert-classifier", "gpt2"])
def test_peft_reads_each_of_several_ranks(
    name: str, pair_of: Callable[[str], Pair], tmp_path: Path
) -> None:
    pair = pair_of(name)
    loratool.extract(pair.base, pair.tuned, ranks=(2, 5)).save(tmp_path / "out")
    for rank in (2, 5):
        adapter = tmp_path / "out" / f"rank-{rank}"
        model = on_base(pair, adapter)
        wanted = outputs(by_hand(pair, adapter, model))
        assert distance(outputs(load_strictly(model, adapter)), wanted) < 1e-5
