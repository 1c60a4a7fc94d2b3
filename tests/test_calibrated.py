"""Extraction that is fitted to inputs, as people call it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import loratool
from loratool.calibration import read_inputs
from loratool.errors import InputError, UsageError
from loratool.opening import open_checkpoint
from loratool.running import open_model, whole_model
from tests.memory_models import TINY, change
from tests.models import RECIPES, Pair, make_pair

ROWS = [[5, 9, 2, 7, 11], [4, 8], [3, 30, 31, 40, 41, 42, 43], [6, 50], list(range(3, 20))]


@pytest.fixture(scope="module")
def ids(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("calibrated") / "ids.json"
    path.write_text(json.dumps(ROWS))
    return path


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    return make_pair(RECIPES["llama"], tmp_path_factory.mktemp("llama"))


def output_errors(pair: Pair, folder: Path, ids: Path) -> dict[str, float]:
    """||(D - B A) x||^2 of every linear layer of the fine-tune, summed over its inputs."""
    base, tuned = open_checkpoint(pair.base), open_checkpoint(pair.tuned)
    merged = loratool.merge(base, [(folder, 1.0)])
    model = open_model(tuned)
    whole, inputs = whole_model(model), read_inputs(ids, model)
    found: dict[str, float] = {}

    def hook(name: str) -> Any:
        rest = tuned[f"{name}.weight"].read() - merged[f"{name}.weight"].read()
        rest = rest.t() if name.endswith(("c_attn", "c_fc", "c_proj")) else rest

        def add(module: Any, given: Any) -> None:
            error = (given[0] @ rest.t()).double().square().sum()
            found[name] = found.get(name, 0.0) + float(error)

        return add

    for name, module in whole.named_modules():
        is_layer = any(part in name for part in ("self_attn", "mlp", ".h."))
        if is_layer and f"{name}.weight" in merged and module.weight.dim() == 2:
            module.register_forward_pre_hook(hook(name))
    with torch.no_grad():
        for row in ROWS:
            whole(input_ids=torch.tensor([row]))
    assert inputs.count == len(ROWS)
    return found


@pytest.mark.parametrize("recipe", ["llama", "gpt2"])
def test_every_layers_outputs_are_nearer_than_with_the_svd(
    tmp_path: Path, ids: Path, recipe: str
) -> None:
    pair = make_pair(RECIPES[recipe], tmp_path)
    plain = loratool.extract(pair.base, pair.tuned, rank=4).save(tmp_path / "plain")
    assert "weighted" not in plain.data["totals"]
    lazy = loratool.extract(
        pair.base, pair.tuned, rank=4, calibrate=str(ids), calibrate_on="finetuned"
    )
    report = lazy.save(tmp_path / "full")
    before = output_errors(pair, tmp_path / "plain", ids)
    after = output_errors(pair, tmp_path / "full", ids)
    assert len(before) == (14 if recipe == "llama" else 8)
    for name, error in after.items():
        assert error < before[name], name
        told = report.data["tensors"][f"{name}.weight"]
        assert told["energy"] < plain.data["tensors"][f"{name}.weight"]["energy"]
        assert told["weighted"]["energy"] > told["weighted"]["energy_of_svd"]
        share = after[name] / before[name]
        lost = (1 - told["weighted"]["energy"]) / (1 - told["weighted"]["energy_of_svd"])
        assert share == pytest.approx(lost, rel=1e-2)
    assert report.data["calibration"]["samples"] == len(ROWS)
    assert any("calibrated on 5 token ids, 33 tokens" in line for line in report.lines)


def test_the_diagonal_and_the_base(tmp_path: Path, ids: Path, llama: Pair) -> None:
    weighted = {}
    for name, options in {
        "diagonal": {"moments": "diagonal"},
        "full": {"calibrate_on": "finetuned"},
        "base": {"calibrate_on": "base"},
    }.items():
        lazy = loratool.extract(llama.base, llama.tuned, rank=4, calibrate=str(ids), **options)
        report = lazy.save(tmp_path / name)
        weighted[name] = report.data["totals"]["weighted"]
        assert report.data["options"]["factorizer"] == "activation"
    errors = {name: sum(output_errors(llama, tmp_path / name, ids).values()) for name in weighted}
    assert errors["full"] < errors["diagonal"] and errors["full"] < errors["base"]
    assert weighted["diagonal"]["energy"] > weighted["diagonal"]["energy_of_svd"]


def test_a_base_of_another_class_can_be_run(tmp_path: Path, ids: Path) -> None:
    pair = make_pair(RECIPES["bert-bare-base"], tmp_path)
    lazy = loratool.extract(pair.base, pair.tuned, rank=4, calibrate=str(ids), calibrate_on="base")
    report = lazy.save(tmp_path / "adapter")
    low_rank = [t for t in report.data["tensors"].values() if t["kind"] == "low_rank"]
    assert low_rank and all("weighted" in tensor for tensor in low_rank)


def test_the_same_bytes_with_any_executor_and_when_merged_unsaved(
    tmp_path: Path, ids: Path, llama: Pair
) -> None:
    def weights(name: str, executor: str) -> bytes:
        lazy = loratool.extract(llama.base, llama.tuned, rank=4, calibrate=str(ids))
        lazy.save(tmp_path / name, executor=executor)
        return (tmp_path / name / "adapter_model.safetensors").read_bytes()

    assert weights("one", "serial") == weights("other", "threads:workers=3")
    lazy = loratool.extract(llama.base, llama.tuned, rank=4, calibrate=str(ids))
    direct = loratool.merge(llama.base, [(lazy, 1.0)])
    saved = loratool.merge(llama.base, [(tmp_path / "one", 1.0)])
    for name, tensor in saved.items():
        assert torch.allclose(tensor.read(), direct[name].read(), atol=1e-5)


def test_energy_chooses_the_rank_in_the_metric(tmp_path: Path, ids: Path, llama: Pair) -> None:
    lazy = loratool.extract(llama.base, llama.tuned, energy=0.8, calibrate=str(ids))
    report = lazy.save(tmp_path / "adapter")
    tensors = [t for t in report.data["tensors"].values() if "weighted" in t]
    assert all(tensor["weighted"]["energy"] >= 0.8 for tensor in tensors)
    assert any(tensor["energy"] < 0.8 for tensor in tensors)


def test_targets_without_known_inputs_are_named(tmp_path: Path, ids: Path) -> None:
    base = TINY["mixtral"].build()
    base.save_pretrained(tmp_path / "base")
    change(base)
    base.save_pretrained(tmp_path / "tuned")
    lazy = loratool.extract(
        tmp_path / "base", tmp_path / "tuned", rank=2, calibrate=str(ids), lora_only=True
    )
    assert any("experts" in note and "factorized plainly" in note for note in lazy.notes)
    report = lazy.save(tmp_path / "adapter")
    for name, told in report.data["tensors"].items():
        assert ("weighted" in told) == ("experts" not in name)
    assert all("experts" in name for name in report.data["calibration"]["plain"])


def test_embeddings_are_factorized_plainly(tmp_path: Path, ids: Path, llama: Pair) -> None:
    lazy = loratool.extract(
        llama.base, llama.tuned, rank=4, calibrate=str(ids), embeddings="lowrank"
    )
    report = lazy.save(tmp_path / "adapter")
    assert report.data["calibration"]["plain"] == ["model.embed_tokens.weight"]
    assert "energy" in report.data["tensors"]["model.embed_tokens.weight"]


def test_images(tmp_path: Path) -> None:
    from PIL import Image

    model = TINY["vit"].build()
    model.save_pretrained(tmp_path / "base")
    change(model)
    model.save_pretrained(tmp_path / "tuned")
    settings = {"image_processor_type": "ViTImageProcessor", "size": {"height": 16, "width": 16}}
    (tmp_path / "tuned" / "preprocessor_config.json").write_text(json.dumps(settings))
    (tmp_path / "images").mkdir()
    for number in range(4):
        noise = torch.randint(0, 255, (20, 20, 3), generator=torch.Generator().manual_seed(number))
        Image.fromarray(noise.byte().numpy()).save(tmp_path / "images" / f"{number}.png")
    lazy = loratool.extract(
        tmp_path / "base", tmp_path / "tuned", rank=2, calibrate=str(tmp_path / "images")
    )
    report = lazy.save(tmp_path / "adapter")
    low_rank = {n: t for n, t in report.data["tensors"].items() if t["kind"] == "low_rank"}
    assert all("weighted" in told for told in low_rank.values())
    assert any("projection" in name for name in low_rank)  # the convolution of the patches
    assert any("calibrated on 4 images run" in line for line in report.lines)


def test_options_that_make_no_sense() -> None:
    for options in (
        {"factorizer": "activation"},
        {"factorizer": "exact", "calibrate": "ids.json"},
        {"calibrate": "ids.json", "calibration_samples": 0},
    ):
        with pytest.raises(UsageError):
            loratool.extract("base", "tuned", **options)  # type: ignore[arg-type]


def test_bad_inputs_are_told_before_anything_is_computed(tmp_path: Path, llama: Pair) -> None:
    (tmp_path / "ids.json").write_text("[[5], [64]]")
    with pytest.raises(InputError, match="sample 2: token id 64"):
        loratool.extract(llama.base, llama.tuned, calibrate=str(tmp_path / "ids.json"))
    (tmp_path / "texts.txt").write_text("some text")
    with pytest.raises(InputError, match="has no tokenizer; give token ids"):
        loratool.extract(llama.base, llama.tuned, calibrate=str(tmp_path / "texts.txt"))
