"""Embeddings, convolutions and experts that loratool extracts as factors, through PEFT."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

import loratool
from tests.models import RECIPES, Pair, distance, outputs
from tests.peers.conftest import FULL
from tests.peers.peft_side import load_strictly, on_base


@pytest.mark.parametrize("name", RECIPES)
def test_embeddings_as_factors(name: str, pair_of: Callable[[str], Pair], tmp_path: Path) -> None:
    pair = pair_of(name)
    adapter = tmp_path / "adapter"
    loratool.extract(pair.base, pair.tuned, rank=FULL, embeddings="lowrank").save(adapter)
    model = on_base(pair, adapter)
    wanted = outputs(pair.load_tuned())
    assert distance(outputs(load_strictly(model, adapter)), wanted) < 1e-5
