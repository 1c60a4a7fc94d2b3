"""Fine-tunes of which only a part has changed: nothing is lost, nothing else is written."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import loratool
from loratool.errors import MismatchError
from tests.models import RECIPES, Pair, Recipe, Selection, distance, load, make_pair, outputs
from tests.peers.peft_side import (
    PREFIX,
    factored_modules,
    load_strictly,
    lora_modules,
    on_base,
    settings,
)


def nothing(name: str) -> bool:
    return False


def biases(name: str) -> bool:
    return name.endswith("bias")


def norms(name: str) -> bool:
    return "norm" in name.lower() or ".ln_" in name


def tables(name: str) -> bool:
    return any(word in name for word in ("embeddings.weight", "embed_tokens", "wte", "shared"))


def one_matrix(name: str) -> bool:
    return "1" in name.split(".") and name.endswith(
        (
            "query.weight",
            "q_proj.weight",
            "c_attn.weight",
            "q_lin.weight",
            "decoder.block.1.layer.1.EncDecAttention.q.weight",
        )
    )


HEADS = {
    name: Recipe(recipe.model_type, recipe.tuned, recipe.tuned, recipe.settings)
    for name, recipe in RECIPES.items()
    if recipe.tuned.endswith(("Classification", "Answering"))
}
WITH_BIASES = ("bert-mlm", "roberta-mlm", "distilbert-mlm", "gpt2", "qwen2", "opt")
WITHOUT = ("llama", "llama-tied", "llama-bare", "t5")
CASES: dict[str, tuple[Recipe, Selection]] = {
    **{
        f"{what.__name__}-{name}": (RECIPES[name], what)
        for name in WITH_BIASES + WITHOUT
        for what in (biases, norms, tables, one_matrix)
        if what is not biases or name in WITH_BIASES
    },
    **{f"head-{name}": (RECIPES[name], nothing) for name in HEADS},
}


@dataclass(frozen=True)
class Extracted:
    pair: Pair
    adapter: Path

    @property
    def keys(self) -> set[str]:
        """The file's keys without PEFT's prefix."""
        found = load_file(self.adapter / "adapter_model.safetensors")
        return {key.removeprefix(PREFIX) for key in found}


def extracted(folder: Path, pair: Pair, **options: Any) -> Extracted:
    loratool.extract(pair.base, pair.tuned, **{"rank": 64, **options}).save(folder / "adapter")
    return Extracted(pair, folder / "adapter")


def check_reproduced(found: Extracted, folder: Path, vocabulary: int = 60) -> Any:
    """PEFT's model and the merged one give the fine-tune's outputs; returns PEFT's."""
    wanted = outputs(found.pair.load_tuned(), vocabulary)
    model = load_strictly(on_base(found.pair, found.adapter), found.adapter)
    assert distance(outputs(model, vocabulary), wanted) < 1e-5
    if found.pair.recipe.model_type != "t5":  # its tables are no longer tied then
        frugal = load_strictly(
            on_base(found.pair, found.adapter), found.adapter, low_cpu_mem_usage=True
        )
        assert distance(outputs(frugal, vocabulary), wanted) < 1e-5
    loratool.merge(found.pair.base, [(found.adapter, 1.0)]).save(folder / "merged")
    merged = Pair(found.pair.base, folder / "merged", found.pair.recipe).load_tuned()
    assert distance(outputs(merged, vocabulary), wanted) < 1e-5
    report = loratool.validate(found.adapter, found.pair.base)
    assert report.ok
    return model


@pytest.mark.parametrize("case", CASES)
def test_whatever_changed_comes_back(case: str, tmp_path: Path) -> None:
    recipe, select = CASES[case]
    found = extracted(tmp_path, make_pair(recipe, tmp_path, select))
    check_reproduced(found, tmp_path)
    modules = factored_modules(found.adapter)
    if select is one_matrix:
        assert len(modules) == 1
        assert found.keys == {f"{m}.lora_{side}.weight" for m in modules for side in "AB"}
    else:
        assert len(modules) == 1  # PEFT loads no adapter without a target
        assert all(
            not value.any()
            for key, value in load_file(found.adapter / "adapter_model.safetensors").items()
            if ".lora_B" in key
        )
        assert settings(found.adapter)["r"] == 1


@pytest.mark.parametrize("name", HEADS)
def test_an_unchanged_head_is_there_because_peft_asks_for_it(name: str, tmp_path: Path) -> None:
    pair = make_pair(HEADS[name], tmp_path, one_matrix)
    found = extracted(tmp_path, pair)
    check_reproduced(found, tmp_path)
    assert any("classifier" in k or "score" in k or "qa_outputs" in k for k in found.keys)


@pytest.mark.parametrize("rows", [72, 56])
@pytest.mark.parametrize(
    "name", ["bert-classifier", "bert-mlm", "llama", "llama-tied", "gpt2", "roberta-mlm"]
)
def test_a_resized_vocabulary_is_kept_whole(name: str, rows: int, tmp_path: Path) -> None:
    pair = make_pair(
        RECIPES[name],
        tmp_path,
        prepare=lambda model: model.resize_token_embeddings(rows, mean_resizing=False),
    )
    check_reproduced(extracted(tmp_path, pair), tmp_path, vocabulary=56)


@pytest.mark.parametrize("name", ["bert-classifier", "roberta-classifier", "llama-classifier"])
def test_other_numbers_of_labels_are_kept(name: str, tmp_path: Path) -> None:
    pair = make_pair(RECIPES[name], tmp_path, tuned_settings={"num_labels": 5})
    check_reproduced(extracted(tmp_path, pair), tmp_path)


def test_a_classifier_on_a_classifier_of_other_labels(tmp_path: Path) -> None:
    recipe = HEADS["bert-classifier"]
    pair = make_pair(
        recipe, tmp_path, tuned_settings={"num_labels": 5, "ignore_mismatched_sizes": True}
    )
    check_reproduced(extracted(tmp_path, pair), tmp_path)


@pytest.mark.parametrize("name", ["llama", "bert-classifier", "gpt2"])
def test_globs_leave_the_rest_as_in_the_base(
    name: str, pair_of: Callable[[str], Pair], tmp_path: Path
) -> None:
    found = extracted(tmp_path, pair_of(name), target=["*.1.*"], exclude=["*norm*", "*ln_*"])
    model = load_strictly(on_base(found.pair, found.adapter), found.adapter)
    layers = {next(part for part in m.split(".") if part.isdigit()) for m in lora_modules(model)}
    assert layers == {"1"}
    lazy = loratool.extract(
        found.pair.base, found.pair.tuned, rank=64, target=["*.1.*"], exclude=["*norm*", "*ln_*"]
    )
    for folder, adapter in (("lazy", lazy), ("saved", found.adapter)):
        loratool.merge(found.pair.base, [(adapter, 1.0)]).save(tmp_path / folder)
    files = [tmp_path / folder / "model.safetensors" for folder in ("lazy", "saved")]
    assert files[0].read_bytes() == files[1].read_bytes()
    merged = load(found.pair.recipe.tuned, tmp_path / "saved")
    assert distance(outputs(model), outputs(merged)) < 1e-5


@pytest.mark.parametrize("name", HEADS)
def test_a_changed_head_is_kept_whole_and_reported_so(name: str, tmp_path: Path) -> None:
    pair = make_pair(HEADS[name], tmp_path)
    lazy = loratool.extract(pair.base, pair.tuned, rank=2)
    data = lazy.save(tmp_path / "adapter").data
    keys = Extracted(pair, tmp_path / "adapter").keys
    for tensor, said in data["tensors"].items():
        factor = f"{tensor.removesuffix('.weight')}.lora_A.weight"
        assert (factor in keys) is (said["kind"] == "low_rank"), tensor
    for folder, adapter in (("lazy", lazy), ("saved", tmp_path / "adapter")):
        loratool.merge(pair.base, [(adapter, 1.0)]).save(tmp_path / folder)
    files = [tmp_path / folder / "model.safetensors" for folder in ("lazy", "saved")]
    assert files[0].read_bytes() == files[1].read_bytes()
    model = load_strictly(on_base(pair, tmp_path / "adapter"), tmp_path / "adapter")
    merged = load(pair.recipe.tuned, tmp_path / "saved")
    assert distance(outputs(model), outputs(merged)) < 1e-5


def test_names_paired_by_hand_are_remembered(tmp_path: Path) -> None:
    """Llama's question answering class calls its model `transformer`."""
    recipe = Recipe("llama", "LlamaForCausalLM", "LlamaForQuestionAnswering")
    pair = make_pair(recipe, tmp_path)
    with pytest.raises(MismatchError, match="--map"):
        loratool.extract(pair.base, pair.tuned)
    lazy = loratool.extract(pair.base, pair.tuned, rank=64, map=["transformer.=model."])
    lazy.save(tmp_path / "adapter")
    loratool.merge(pair.base, [(lazy, 1.0)]).save(tmp_path / "lazy")
    loratool.merge(pair.base, [(tmp_path / "adapter", 1.0)]).save(tmp_path / "saved")
    for folder in ("lazy", "saved"):
        merged = load(recipe.tuned, tmp_path / folder)
        assert distance(outputs(merged), outputs(pair.load_tuned())) < 1e-5
    names = load_file(tmp_path / "saved" / "model.safetensors").keys()
    assert names == load_file(pair.tuned / "model.safetensors").keys()


@pytest.mark.parametrize("owner", ["base", "tuned", "both"])
@pytest.mark.parametrize("name", ["bert-mlm", "gpt2"])
def test_buffers_of_old_checkpoints_are_no_updates(name: str, owner: str, tmp_path: Path) -> None:
    pair = make_pair(RECIPES[name], tmp_path)
    buffers = {
        "bert.embeddings.position_ids": torch.arange(24).view(1, -1),
        "transformer.h.0.attn.bias": torch.ones(1, 1, 24, 24),
        "transformer.h.0.attn.masked_bias": torch.tensor(-1e4),
    }
    mine = {k: v for k, v in buffers.items() if k.startswith("bert" if "bert" in name else "t")}
    for folder in (pair.base, pair.tuned):
        if owner in (folder.name, "both"):
            path = folder / "model.safetensors"
            scale = 1 if folder == pair.base else 2
            old = {key: scale * value for key, value in mine.items()}
            save_file({**load_file(path), **old}, path, {"format": "pt"})
    found = extracted(tmp_path, pair)
    assert not any(key in mine for key in found.keys)
    check_reproduced(found, tmp_path)
