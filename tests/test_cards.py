"""Model cards say what an adapter holds, whatever kinds of updates that are."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import loratool
from loratool.adapter import Adapter
from loratool.card_choice import Wishes
from loratool.engine import Drain, save_adapter
from loratool.errors import MismatchError
from loratool.front_matter import parse_card
from loratool.publishing import prepare
from loratool.updates import IA3, Dense, DoRA, LoHa, LowRank
from tests import updates as some
from tests.adapters import PREFIX, factors, write_adapter
from tests.lazy import Given, adapter_of, experts, rows
from tests.updates import randn

LOW: Given = (LowRank(randn(0, 2, 5), randn(1, 6, 2)), (6, 5))


def written(adapter: Adapter, folder: Path, format: str | None = None) -> str:
    save_adapter(adapter, folder, Drain("serial"), format)
    return (folder / "README.md").read_text()


def published(folder: Path) -> str:
    card = prepare(folder, Wishes("anna/math", None, "org/base", "mit")).files["README.md"]
    assert isinstance(card, bytes)
    return card.decode()


def tags(card: str) -> list[str]:
    found: list[str] = parse_card(card, "README.md").metadata["tags"]
    return found


ADAPTERS: dict[str, tuple[dict[str, Given], list[str]]] = {
    "factors of every shape": (
        {"m.weight": LOW, "c.weight": (LowRank(randn(2, 3, 12), randn(3, 4, 3)), (4, 3, 2, 2)),
         "e.up": (experts(4, 2, 3, 4, 2), (2, 3, 4))},
        ["- 2 low-rank updates of ranks 2 to 3", "- 1 low-rank update of experts of rank 2"],
    ),
    "biases": (
        {"m.weight": LOW, "m.bias": (Dense(randn(2, 6)), (6,))},
        ["- 1 low-rank update of rank 2", "- 1 full-size delta"],
    ),
    "rows": (
        {"m.weight": LOW, "t.weight": (rows((1, 3)), (2, 4))},
        ["- 1 low-rank update of rank 2", "- 1 table with replaced rows"],
    ),
    "DoRA": (
        {"m.weight": (DoRA(LowRank(randn(0, 2, 5), randn(1, 6, 2)), randn(2, 6)), (6, 5))},
        ["- 1 DoRA update"],
    ),
    "LoHa": (
        {"h.weight": (LoHa(some.product(0, 4, 2, 3), some.product(5, 4, 2, 3)), (4, 3))},
        ["- 1 LoHa update"],
    ),
    "IA3": ({"i.weight": (IA3(randn(3, 6)), (6, 0))}, ["- 1 IA3 scaling"]),
}  # fmt: skip


def made(name: str) -> Adapter:
    settings = {"peft_type": "IA3"} if name == "IA3" else {}
    return adapter_of(ADAPTERS[name][0], settings=settings)


@pytest.mark.parametrize("name", ADAPTERS)
def test_every_kind_is_counted(name: str, tmp_path: Path) -> None:
    _, lines = ADAPTERS[name]
    card = written(made(name), tmp_path / "a")
    contents = [line for line in card.splitlines() if line.startswith("- ")]
    is_lora = name not in ("LoHa", "IA3")
    assert ("- lora" in contents) == is_lora
    for line in lines:
        assert line in contents
    has_factors = name not in ("LoHa", "IA3", "DoRA")
    assert ("| module | updates |" in card) == has_factors
    assert any("squared norm" in line for line in contents) == has_factors
    assert ("# LoRA adapter\n" in card) == is_lora
    card = published(tmp_path / "a")
    for line in lines:
        assert line.partition(" of rank")[0] in card
    assert tags(card) == ["lora"] * is_lora + ["peft", "loratool"]


@pytest.mark.parametrize(
    ("name", "obstacle"),
    [("DoRA", "no plain LoRA but DoRA update (`loratool convert --to-lora`"),
     ("biases", "it changes biases"), ("rows", "it replaces whole tensors")],
)  # fmt: skip
def test_what_a_server_does_not_take_is_said(name: str, obstacle: str, tmp_path: Path) -> None:
    written(made(name), tmp_path / "a")
    assert obstacle in published(tmp_path / "a")


def test_an_adapter_of_another_format_is_loaded_by_its_own_library(tmp_path: Path) -> None:
    updates = {"model.layers.0.self_attn.q_proj.weight": LOW}
    written(adapter_of(updates), tmp_path / "a", "mlx")
    card = published(tmp_path / "a")
    assert parse_card(card, "README.md").metadata["library_name"] == "mlx"
    assert tags(card) == ["lora", "mlx", "loratool"]
    assert "peft" not in card.lower() and "vLLM" not in card and "anna/math" in card


def test_the_report_counts_every_kind(tmp_path: Path) -> None:
    updates = ADAPTERS["biases"][0]
    report = save_adapter(adapter_of(updates), tmp_path / "a", Drain("serial"))
    assert report.lines[0] == "1 low-rank update, 1 full-size delta"
    report = save_adapter(adapter_of(ADAPTERS["LoHa"][0]), tmp_path / "b", Drain("serial"))
    assert report.lines[0] == "1 LoHa update"
    assert not any("energy" in line for line in report.lines)


@pytest.mark.parametrize("name", ["biases", "rows", "LoHa", "IA3", "DoRA"])
def test_nan_in_any_tensor_of_any_kind_is_not_published(name: str, tmp_path: Path) -> None:
    written(made(name), tmp_path / "a")
    file = tmp_path / "a" / "adapter_model.safetensors"
    sound = load_file(file)
    published(tmp_path / "a")
    for key in sound:
        broken = {k: v.clone() for k, v in sound.items()}
        broken[key].view(-1)[-1] = torch.nan
        save_file(broken, file, metadata={"format": "pt"})
        with pytest.raises(MismatchError, match=f"{key}: holds NaN or Inf"):
            published(tmp_path / "a")


def test_nan_in_what_no_update_uses_is_not_published_either(tmp_path: Path) -> None:
    """The copy of the table beside trained rows, which the base has."""
    path = write_adapter(
        tmp_path / "a", {"m": factors(0, 6, 5, 2)}, trainable_token_indices={"t": [1]}
    )
    name = f"{PREFIX}t.token_adapter"
    tensors = {**load_file(path / "adapter_model.safetensors"),
               f"{name}.trainable_tokens_delta": torch.ones(1, 4),
               f"{name}.base_layer.weight": torch.full((3, 4), torch.nan)}  # fmt: skip
    save_file(tensors, path / "adapter_model.safetensors")
    assert loratool.inspect(path).data["problems"] == []
    with pytest.raises(MismatchError, match=r"base_layer\.weight: holds NaN or Inf"):
        published(path)
