"""Adapters that loratool extracts, on the base, through PEFT: the fine-tune's outputs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.models import RECIPES, Pair, distance, outputs
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
