"""Adapters that name weights as on disk and as in memory meet in a stack, given the base."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file

import loratool
from loratool.errors import MismatchError
from loratool.updates import LowRank
from tests.lazy import adapter_of
from tests.memory_models import TINY, loaded
from tests.peers.test_names_in_memory import (
    ATTENTION,
    merged_by_peft,
    random_factors,
    same,
    save_old_adapter,
)
from tests.updates import randn

Saved = Callable[[str], Path]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Saved:
    """Name of a tiny model -> a folder with it as "base"."""

    @cache
    def save(name: str) -> Path:
        folder = tmp_path_factory.mktemp(name)
        TINY[name].build().save_pretrained(folder / "base")
        return folder / "base"

    return save


def adapters(
    name: str, base: Path, folder: Path, parameters: list[str], old: list[str]
) -> tuple[Path, Path]:
    """An adapter as PEFT saves it today, and one with the names on disk."""
    config = LoraConfig(
        r=2, lora_alpha=6, target_modules=ATTENTION, target_parameters=parameters or None
    )
    model = get_peft_model(loaded(TINY[name], base), config)
    random_factors(model)
    model.save_pretrained(folder / "new")
    disk = dict(load_file(base / "model.safetensors"))
    save_old_adapter(disk, folder / "old", old)
    return folder / "new", folder / "old"


def merged(base: Path, given: list[tuple[Path, float]], out: Path) -> dict[str, torch.Tensor]:
    loratool.merge(base, given).save(out)
    return dict(load_file(out / "model.safetensors"))


CASES = {
    "vit": ([], ["query", "value", "classifier"]),
    "dinov2": ([], ["query", "weights_in"]),
    "mixtral": (
        ["experts.gate_up_proj", "experts.down_proj"],
        ["q_proj", "o_proj", "w1", "w2", "w3", "gate"],
    ),
}


@pytest.mark.parametrize("order", ["new first", "old first"])
@pytest.mark.parametrize("name", CASES)
def test_both_ways_of_naming_meet(name: str, order: str, saved: Saved, tmp_path: Path) -> None:
    base = saved(name)
    new, old = adapters(name, base, tmp_path, *CASES[name])
    given = [(new, 0.7), (old, -0.5)][:: 1 if order == "new first" else -1]
    found = loratool.stack(given, base=base)
    found.save(tmp_path / "stacked")
    wanted = merged(base, given, tmp_path / "wanted")
    same(merged(base, [(tmp_path / "stacked", 1.0)], tmp_path / "found"), wanted)
    model = loaded(TINY[name], base)
    same(merged_by_peft(model, tmp_path / "stacked", tmp_path / "peft"), wanted)
    before = load_file(base / "model.safetensors")
    changed = sum(not torch.equal(before[key], value) for key, value in wanted.items())
    assert changed > len(found) / 2


def test_names_on_disk_alone_stay_as_they_are(saved: Saved, tmp_path: Path) -> None:
    base = saved("vit")
    disk = dict(load_file(base / "model.safetensors"))
    for number, targets in enumerate((["query"], ["query", "value"])):
        save_old_adapter(disk, tmp_path / str(number), targets)
    given = [(tmp_path / "0", 1.0), (tmp_path / "1", 1.0)]
    assert set(loratool.stack(given, base=base)) == set(loratool.stack(given))
    assert all(name in disk for name in loratool.stack(given, base=base))


def test_a_weight_under_both_of_its_names_is_refused(saved: Saved) -> None:
    names = ("vit.encoder.layer.0.attention.attention.query", "vit.layers.0.attention.q_proj")
    both, one = (
        adapter_of(
            {f"{n}.weight": (LowRank(randn(0, 2, 32), randn(1, 32, 2)), (32, 32)) for n in some}
        )
        for some in (names, names[1:])
    )
    with pytest.raises(MismatchError, match="two of its tensors are one tensor of the base"):
        loratool.stack([(one, 1.0), (both, 1.0)], base=saved("vit"))


def test_square_experts_that_are_stored_transposed(tmp_path: Path) -> None:
    """What shapes do not tell, the model's class does, and files that loratool wrote."""
    tiny = replace(TINY["gpt_oss"], settings={**TINY["gpt_oss"].settings, "intermediate_size": 32})
    tiny.build().save_pretrained(tmp_path / "base")
    config = LoraConfig(r=2, target_modules=[], target_parameters=["experts.down_proj"])
    model = get_peft_model(loaded(tiny, tmp_path / "base"), config)
    random_factors(model)
    model.save_pretrained(tmp_path / "adapter")
    wanted = merged_by_peft(loaded(tiny, tmp_path / "base"), tmp_path / "adapter", tmp_path / "1")
    same(merged(tmp_path / "base", [(tmp_path / "adapter", 1.0)], tmp_path / "2"), wanted)
    loratool.stack([(tmp_path / "adapter", 1.0)]).save(tmp_path / "stacked")
    same(merged(tmp_path / "base", [(tmp_path / "stacked", 1.0)], tmp_path / "3"), wanted)
