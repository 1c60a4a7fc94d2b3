"""Adapters with single entries: PEFT loads their factors, loratool's merge uses all of them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

import loratool
from tests.models import Pair, distance, load, outputs
from tests.peers.peft_side import by_hand, load_strictly, on_base


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert-classifier"])
def test_peft_has_the_factors_and_a_merge_the_entries(
    name: str, pair_of: Callable[[str], Pair], tmp_path: Path
) -> None:
    pair, adapter = pair_of(name), tmp_path / "adapter"
    loratool.extract(pair.base, pair.tuned, rank=2, sparse=10**6).save(adapter)
    assert (adapter / "sparse.safetensors").is_file()
    model, tuned = on_base(pair, adapter), outputs(pair.load_tuned())
    wanted = outputs(by_hand(pair, adapter, model))
    found = outputs(load_strictly(model, adapter))
    assert distance(found, wanted) < 1e-5 and distance(found, tuned) > 1e-2
    loratool.merge(pair.base, [(adapter, 1.0)]).save(tmp_path / "merged")
    assert distance(outputs(load(pair.recipe.tuned, tmp_path / "merged")), tuned) < 1e-5
