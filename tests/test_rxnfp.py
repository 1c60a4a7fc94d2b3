"""The main job on a real pair: rxnfp's masked language model and its fine-tune to 50 classes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import loratool
from fixtures.weights import RXNFP_BASE, RXNFP_TUNED, fetch


@pytest.fixture(scope="module", autouse=True)
def weights() -> None:
    fetch()


@pytest.fixture(scope="module")
def states() -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    def load(folder: Path) -> dict[str, torch.Tensor]:
        file = folder / "pytorch_model.bin"
        state: dict[str, torch.Tensor] = torch.load(file, weights_only=True, map_location="cpu")
        return state

    return load(RXNFP_BASE), load(RXNFP_TUNED)


@pytest.fixture(scope="module")
def spectra(states) -> dict[str, torch.Tensor]:
    """Exact squared singular values of every linear delta, descending, in fp64."""
    base, tuned = states
    found = {}
    for name, value in tuned.items():
        linear = value.ndim == 2 and ("encoder.layer" in name or "pooler" in name)
        if linear:
            delta = value.double() - base[name].double()
            small = delta @ delta.T if delta.shape[0] <= delta.shape[1] else delta.T @ delta
            found[name] = torch.linalg.eigvalsh(small).flip(0).clamp(min=0)
    assert len(found) == 73
    return found


def test_several_ranks_from_one_pass_reach_their_optima(tmp_path, states, spectra) -> None:
    base, tuned = states
    ranks = (4, 8, 16, 32)
    report = loratool.extract(RXNFP_BASE, RXNFP_TUNED, ranks=ranks).save(tmp_path / "out")
    for rank in ranks:
        factors = load_file(tmp_path / "out" / f"rank-{rank}" / "adapter_model.safetensors")
        told = report.data["adapters"][f"rank-{rank}"]["tensors"]
        for name, energies in spectra.items():
            module = f"base_model.model.{name.removesuffix('.weight')}"
            b, a = (factors[f"{module}.lora_{side}.weight"].double() for side in "BA")
            delta = tuned[name].double() - base[name].double()
            total = float(energies.sum())
            captured = total - float((delta - b @ a).square().sum())
            assert captured >= 0.999 * float(energies[:rank].sum()), (rank, name)
            assert told[name]["energy"] == pytest.approx(captured / total, abs=1e-4)


@pytest.mark.parametrize("rank", [4, 16, 64])
def test_every_matrix_reaches_its_optimum(tmp_path, states, spectra, rank: int) -> None:
    base, tuned = states
    report = loratool.extract(RXNFP_BASE, RXNFP_TUNED, rank=rank).save(tmp_path / "adapter")
    factors = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    for name, energies in spectra.items():
        module = f"base_model.model.{name.removesuffix('.weight')}"
        b, a = (factors[f"{module}.lora_{side}.weight"].double() for side in "BA")
        delta = tuned[name].double() - base[name].double()
        total = float(energies.sum())
        captured = total - float((delta - b @ a).square().sum())
        assert captured >= 0.999 * float(energies[:rank].sum()), name
        told = report.data["tensors"][name]
        assert told["rank"] == rank
        assert told["energy"] == pytest.approx(captured / total, abs=1e-4)
        error = float((delta - b @ a).norm() / delta.norm())
        assert told["relative_error"] == pytest.approx(error, abs=1e-4)


def test_energy_chooses_the_rank(tmp_path, spectra) -> None:
    report = loratool.extract(RXNFP_BASE, RXNFP_TUNED, energy=0.8).save(tmp_path / "adapter")
    ranks = set()
    for name, energies in spectra.items():
        told = report.data["tensors"][name]
        optimal = int((energies.cumsum(0) < 0.8 * energies.sum()).sum()) + 1
        assert told["energy"] >= 0.8
        assert optimal <= told["rank"] <= optimal + 1
        ranks.add(told["rank"])
    assert len(ranks) > 5


def test_the_same_seed_gives_the_same_bytes_with_any_executor(tmp_path) -> None:
    def files(name: str, **options) -> dict[str, bytes]:
        lazy = loratool.extract(RXNFP_BASE, RXNFP_TUNED, rank=8, seed=options.pop("seed", 0))
        lazy.save(tmp_path / name, **options)
        folder = tmp_path / name
        every = {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*.*")}
        kept = json.loads(every.pop("loratool.json"))
        kept.pop("run")
        return {**every, "manifest": json.dumps(kept).encode()}

    first = files("first")
    assert first == files("second", executor="serial")
    assert first == files("third", executor="threads:workers=5")
    other = files("fourth", seed=1)
    assert other["adapter_model.safetensors"] != first["adapter_model.safetensors"]


def test_the_merged_model_is_a_classifier_that_transformers_loads(tmp_path, states) -> None:
    from transformers import AutoModelForSequenceClassification

    adapter = loratool.extract(RXNFP_BASE, RXNFP_TUNED, rank=256)
    report = loratool.merge(RXNFP_BASE, [(adapter, 1.0)]).save(tmp_path / "merged")
    assert report.data["survived"] == pytest.approx(1, abs=1e-3)
    model, info = AutoModelForSequenceClassification.from_pretrained(
        tmp_path / "merged", output_loading_info=True
    )
    assert not any(info.values())
    assert model.config.num_labels == 50
    merged = model.state_dict()
    for name, value in states[1].items():
        assert torch.allclose(merged[name], value, atol=1e-5), name


def test_the_notes_tell_of_legacy_files_and_of_the_completed_config() -> None:
    notes = "\n".join(loratool.extract(RXNFP_BASE, RXNFP_TUNED).notes)
    assert "a legacy torch file cannot be mapped" in notes
    assert "config.json names other labels than the head's 50" in notes


def test_an_incomplete_config_is_completed_from_the_names() -> None:
    merged = loratool.merge(RXNFP_BASE, [])
    assert merged.config is not None
    assert merged.config["model_type"] == "bert"
    assert merged.config["architectures"] == ["BertForPreTraining"]
    assert any("model_type" in note for note in merged.notes)


def test_peft_loads_the_adapter_and_answers_as_the_merged_model(tmp_path) -> None:
    from transformers import AutoConfig, AutoModelForSequenceClassification

    from tests.peers.peft_side import load_strictly

    loratool.extract(RXNFP_BASE, RXNFP_TUNED, rank=16).save(tmp_path / "adapter")
    loratool.merge(RXNFP_BASE, [(tmp_path / "adapter", 1.0)]).save(tmp_path / "merged")
    config = AutoConfig.from_pretrained(tmp_path / "adapter" / "model")
    base = AutoModelForSequenceClassification.from_pretrained(RXNFP_BASE, config=config)
    tokens = torch.randint(5, 591, (4, 30), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(tokens)
    mask[1, 20:] = 0
    merged = AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged").eval()
    with torch.no_grad():
        expected = merged(input_ids=tokens, attention_mask=mask).logits
        peft = load_strictly(base, tmp_path / "adapter")
        found = peft(input_ids=tokens, attention_mask=mask).logits
    assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()
