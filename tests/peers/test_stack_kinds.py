"""stack on the kinds of update that PEFT saves: merged, it is what its parts are together."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import loratool
from loratool.errors import LoratoolError
from tests.peers.experts import PARAMETERS, Mixture, save_base, save_random
from tests.peers.loading import Tensors, merged_by_peft
from tests.peers.test_peft_kinds import CASES, Net, made

WEIGHTS = (0.7, -0.5)
COMBINED = (
    "all kinds of modules", "embedding", "rslora", "Conv1D", "bias of lora_B", "bias of Conv1D",
    "patterns", "parameters",
)  # fmt: skip
REFUSED = {
    "dora": "DoRA update", "ia3": "IA3 scaling", "loha": "LoHa update", "lokr": "LoKr update",
    "lokr of Conv1d": "full-size delta",
}  # fmt: skip


def two(name: str, folder: Path) -> tuple[Path, list[Path]]:
    """A base and two adapters of one kind for it, with different random factors."""
    for seed, place in enumerate(("one", "other")):
        (folder / place).mkdir()
        made(CASES[name], folder / place)
        path = folder / place / "adapter" / "adapter_model.safetensors"
        generator = torch.Generator().manual_seed(seed)
        tensors = load_file(path)
        for value in tensors.values():
            value.copy_(torch.randn(value.shape, generator=generator) * 0.3)
        _save(tensors, path)
    base = folder / "one" / "base.safetensors"
    return base, [folder / place / "adapter" for place in ("one", "other")]


def _save(tensors: Tensors, path: Path) -> None:
    from safetensors.torch import save_file

    save_file(tensors, path, metadata={"format": "pt"})


def merged(base: Path, adapters: list[tuple[Path, float]], place: Path) -> Tensors:
    loratool.merge(base, adapters).save(place)
    found: Tensors = load_file(place / "base.safetensors")
    return found


def agree(found: Tensors, wanted: Tensors, tolerance: float = 2e-6) -> None:
    assert found.keys() == wanted.keys()
    for key, value in wanted.items():
        torch.testing.assert_close(found[key], value, rtol=1e-5, atol=tolerance, msg=key)


@pytest.mark.parametrize("name", COMBINED)
def test_a_stack_merges_as_its_parts_do(tmp_path: Path, name: str) -> None:
    base, adapters = two(name, tmp_path)
    given = list(zip(adapters, WEIGHTS, strict=True))
    loratool.stack(given).save(tmp_path / "stacked")
    wanted = merged(base, given, tmp_path / "wanted")
    agree(merged(base, [(tmp_path / "stacked", 1.0)], tmp_path / "found"), wanted)
    agree(merged_by_peft(Net(), base, tmp_path / "stacked"), wanted)
    assert any(not torch.equal(value, load_file(base)[key]) for key, value in wanted.items())


def test_a_stack_of_experts_merges_as_its_parts_do(tmp_path: Path) -> None:
    base = save_base(tmp_path)
    one = save_random(tmp_path / "one", 1)
    other = save_random(tmp_path / "other", 2, PARAMETERS[:1], r=3, use_rslora=True)
    given = [(one, WEIGHTS[0]), (other, WEIGHTS[1])]
    loratool.stack(given).save(tmp_path / "stacked")
    wanted = merged(base, given, tmp_path / "wanted")
    agree(merged(base, [(tmp_path / "stacked", 1.0)], tmp_path / "found"), wanted)
    agree(merged_by_peft(Mixture(), base, tmp_path / "stacked"), wanted)


@pytest.mark.parametrize("combiner", ["ties:density=0.5", "dare_linear", "tsv", "iso"])
@pytest.mark.parametrize("name", ["all kinds of modules", "bias of lora_B"])
def test_peft_loads_every_combination(tmp_path: Path, name: str, combiner: str) -> None:
    base, adapters = two(name, tmp_path)
    given = list(zip(adapters, WEIGHTS, strict=True))
    loratool.stack(given, combiner=combiner, rank=3).save(tmp_path / "stacked")
    found = merged(base, [(tmp_path / "stacked", 1.0)], tmp_path / "found")
    agree(merged_by_peft(Net(), base, tmp_path / "stacked"), found)


def test_rows_of_two_adapters(tmp_path: Path) -> None:
    base, (one, other) = two("trained rows", tmp_path)
    config = other / "adapter_config.json"
    config.write_text(config.read_text().replace("3,", "4,").replace("7", "8"))
    loratool.stack([(one, 1.0), (other, 1.0)]).save(tmp_path / "stacked")
    wanted = merged(base, [(one, 1.0), (other, 1.0)], tmp_path / "wanted")
    agree(merged_by_peft(Net(), base, tmp_path / "stacked"), wanted)
    changed = (wanted["table.weight"] != load_file(base)["table.weight"]).any(dim=1)
    assert changed.nonzero().flatten().tolist() == [3, 4, 7, 8]


@pytest.mark.parametrize("name", REFUSED)
def test_other_kinds_are_refused_by_name(tmp_path: Path, name: str) -> None:
    _, (one, other) = two(name, tmp_path)
    words = rf"\.weight.*: {REFUSED[name]} of .*one/adapter: .*convert --to-lora"
    with pytest.raises(LoratoolError, match=words):
        loratool.stack([(one, 1.0), (other, 1.0)])
