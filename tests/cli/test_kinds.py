"""Kinds of updates at the terminal: what is shown, what is done, and what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from loratool.engine import Drain, save_adapter
from loratool.updates import Dense, DoRA, LowRank
from tests.cli.tiny import done, loratool, refused
from tests.lazy import Given, adapter_of, experts
from tests.updates import randn

LOW: Given = (LowRank(randn(0, 2, 5).float(), randn(1, 6, 2).float(), 1.5), (6, 5))


@pytest.fixture
def adapters(tmp_path: Path) -> Path:
    """`plain` with biases, `conv` and `experts`, and `dora`, which is of another kind."""
    kinds: dict[str, dict[str, Given]] = {
        "plain": {"m.weight": LOW, "m.bias": (Dense(randn(2, 6).float(), 1.5), (6,))},
        "conv": {"c.weight": (LowRank(randn(3, 3, 12), randn(4, 4, 3)), (4, 3, 2, 2))},
        "experts": {"e.up": (experts(5, 2, 3, 4, 2), (2, 3, 4))},
        "dora": {"m.weight": (DoRA(LOW[0], torch.ones(6)), (6, 5))},  # type: ignore[arg-type]
    }
    for name, updates in kinds.items():
        save_adapter(adapter_of(updates), tmp_path / name, Drain("serial"))
    return tmp_path


def test_inspect_names_kinds_and_layouts(adapters: Path) -> None:
    text = done(loratool("inspect", adapters / "plain")).out
    assert "1 low-rank update, 1 full-size delta" in text
    assert "full-size vector" in text
    assert "low-rank convolution 2x2" in done(loratool("inspect", adapters / "conv")).out
    text = done(loratool("inspect", adapters / "experts")).out
    assert "1 low-rank update of experts" in text and "low-rank 2 experts" in text
    text = done(loratool("inspect", adapters / "dora")).out
    assert "1 DoRA update: 28 parameters: what these add depends on the base" in text
    data = done(loratool("inspect", adapters / "dora", "--json")).data
    assert data["updates"]["m.weight"]["norm"] is None
    assert data["kinds"]["dora"]["parameters"] == 28


def test_rescale_and_stack(adapters: Path, tmp_path: Path) -> None:
    out = tmp_path / "half"
    result = done(loratool("rescale", adapters / "plain", "--by", 0.5, "-o", out))
    assert "1 low-rank update, 1 full-size delta" in result.out
    assert "the delta is exactly the one asked for" in result.out
    result = done(
        loratool("stack", adapters / "experts", f"{adapters}/conv=2", "-o", tmp_path / "s")
    )
    assert "1 low-rank update, 1 low-rank update of experts" in result.out
    found = done(
        loratool("rescale", adapters / "experts", "--rank", 1, "-o", tmp_path / "r", "--json")
    )
    assert found.data["tensors"]["e.up"]["kind"] == "experts"
    assert found.data["tensors"]["e.up"]["rank"] == 1


def test_what_is_not_linear_is_refused_with_what_to_do(adapters: Path, tmp_path: Path) -> None:
    words = ("m.weight: DoRA update", "`loratool convert --to-lora --base BASE`")
    refused(loratool("rescale", adapters / "dora", "--by", 0.5, "-o", tmp_path / "o"), *words)
    given = (adapters / "dora", adapters / "plain")
    refused(loratool("stack", *given, "-o", tmp_path / "o"), *words, f"of {adapters}/dora")
    assert not (tmp_path / "o").exists()
