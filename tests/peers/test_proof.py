"""Merges by loratool and by PEFT, of every family and in each of PEFT's ways, are proved."""

from __future__ import annotations

import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file

import loratool
from loratool.reports import Report
from tests.models import RECIPES, Pair, Recipe, build, load, make_pair
from tests.peers.peft_side import load_strictly, on_base


def proved(adapter: Path, base: Path, merged: Path, **options: Any) -> Report:
    report = loratool.validate(adapter, base, merged, **options)
    assert report.ok, (report.title, report.lines, report.table and report.table.rows[:5])
    assert report.data["counts"]["cannot be told"] == 0
    return report


def ways(report: Report) -> set[str]:
    """What the ways of all tensors begin with."""
    entries = report.data["tensors"].values()
    return {entry["way"].partition(":")[0] for entry in entries if "way" in entry}


@pytest.mark.parametrize("name", RECIPES)
def test_our_merge_of_every_family(
    name: str, pair_of: Callable[[str], Pair], adapter_of: Callable[..., Path], tmp_path: Path
) -> None:
    pair, adapter = pair_of(name), adapter_of(name, 4)
    loratool.merge(pair.base, [(adapter, 1.0)]).save(tmp_path / "merged")
    report = proved(adapter, pair.base, tmp_path / "merged")
    assert ways(report) == {"rounded once"}
    low_rank = [e for e in report.data["tensors"].values() if e["kind"] == "low_rank"]
    assert all(e["reproduced"] == e["informative"] for e in low_rank)
    base = loratool.validate(adapter, pair.base, pair.base)
    assert (base.status, base.data["verdict"]) == (1, "not applied")


@pytest.mark.filterwarnings("ignore:Input and output embeddings are no longer tied")
@pytest.mark.parametrize("name", RECIPES)
def test_pefts_merge_of_every_family(
    name: str, pair_of: Callable[[str], Pair], adapter_of: Callable[..., Path], tmp_path: Path
) -> None:
    pair, adapter = pair_of(name), adapter_of(name, 4)
    model = load_strictly(on_base(pair, adapter), adapter).merge_and_unload()
    model.save_pretrained(tmp_path / "merged")
    proved(adapter, pair.base, tmp_path / "merged")


@pytest.mark.parametrize("name", ["bert-classifier", "gpt2", "llama"])
def test_a_fine_tune_contains_its_extraction_and_more(
    name: str, pair_of: Callable[[str], Pair], adapter_of: Callable[..., Path]
) -> None:
    """A truncated singular value decomposition is a projection: its strength is one."""
    pair = pair_of(name)
    report = loratool.validate(adapter_of(name, 4), pair.base, pair.tuned)
    assert (report.status, report.data["verdict"]) == (1, "other changes")
    assert report.title.endswith(", and other changes")
    assert all(entry["contained"] for entry in report.data["tensors"].values())


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A Llama of 64 columns in fp32, and a LoRA adapter of it."""
    folder = tmp_path_factory.mktemp("wide")
    sizes = {"hidden_size": 64, "intermediate_size": 96, "tie_word_embeddings": False}
    pair = make_pair(Recipe("llama", "LlamaForCausalLM", "LlamaForCausalLM", sizes), folder)
    loratool.extract(pair.base, pair.tuned, rank=8, lora_only=True).save(folder / "adapter")
    return pair.base, folder / "adapter"


def narrowed(base: Path, dtype: torch.dtype, folder: Path) -> Path:
    """The base stored in another type."""
    shutil.copytree(base, folder)
    file = folder / "model.safetensors"
    save_file({n: v.to(dtype) for n, v in load_file(file).items()}, file, {"format": "pt"})
    return folder


def merge_with_peft(
    base: Path, adapter: Path, dtype: torch.dtype, folder: Path, safe: bool, autocast: bool
) -> Path:
    model = build("LlamaForCausalLM", load("LlamaForCausalLM", base).config).to(dtype)
    model.load_state_dict(load("LlamaForCausalLM", base).to(dtype).state_dict())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        peft = PeftModel.from_pretrained(model, adapter, autocast_adapter_dtype=autocast)
        peft.merge_and_unload(safe_merge=safe).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("stored", ["narrow base", "wide base"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("safe", "autocast", "way"),
    [
        (False, True, "rounded once"),
        (True, True, "delta rounded first"),
        (False, False, "factors and delta rounded first"),
        (True, False, "factors and delta rounded first"),
    ],
)
def test_each_of_pefts_ways_is_told(
    safe: bool,
    autocast: bool,
    way: str,
    dtype: torch.dtype,
    stored: str,
    wide: tuple[Path, Path],
    tmp_path: Path,
) -> None:
    original, adapter = wide
    base = narrowed(original, dtype, tmp_path / "base") if stored == "narrow base" else original
    merged = merge_with_peft(base, adapter, dtype, tmp_path / "merged", safe, autocast)
    report = proved(adapter, base, merged)
    assert ways(report) == {way}
    assert any("base rounded to" in line for line in report.lines) == (stored == "wide base")
    entries = [e for e in report.data["tensors"].values() if e["kind"] == "low_rank"]
    reproduced = sum(e["reproduced"] for e in entries) / sum(e["informative"] for e in entries)
    assert reproduced > 0.998


@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`")
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`")
@pytest.mark.parametrize("use_rslora", [False, True])
def test_alphas_and_patterns_count(
    use_rslora: bool, wide: tuple[Path, Path], tmp_path: Path
) -> None:
    from peft import LoraConfig, get_peft_model

    base, _ = wide
    config = LoraConfig(
        r=4, lora_alpha=7, target_modules=["q_proj", "down_proj", "lm_head"],
        rank_pattern={"down_proj": 2}, alpha_pattern={"q_proj": 3}, use_rslora=use_rslora,
        init_lora_weights=False,
    )  # fmt: skip
    model = get_peft_model(load("LlamaForCausalLM", base), config)
    model.save_pretrained(tmp_path / "adapter")
    model.merge_and_unload().save_pretrained(tmp_path / "merged")
    report = proved(tmp_path / "adapter", base, tmp_path / "merged")
    assert report.data["counts"]["applied"] == 5


def test_a_scaled_merge_is_told_apart(wide: tuple[Path, Path], tmp_path: Path) -> None:
    base, adapter = wide
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        peft = PeftModel.from_pretrained(load("LlamaForCausalLM", base), adapter)
    for module in peft.modules():
        if hasattr(module, "scale_layer"):
            module.scale_layer(0.3)
    peft.merge_and_unload().save_pretrained(tmp_path / "merged")
    report = loratool.validate(adapter, base, tmp_path / "merged")
    assert (report.status, report.data["verdict"]) == (1, "another strength")
    assert report.data["strength"]["value"] == pytest.approx(0.3)
    proved(adapter, base, tmp_path / "merged", weight=0.3)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`")
def test_a_module_that_was_kept_but_not_trained(wide: tuple[Path, Path], tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model

    base, _ = wide
    config = LoraConfig(
        r=4, target_modules=["q_proj"], init_lora_weights=False, modules_to_save=["lm_head"]
    )
    model = get_peft_model(load("LlamaForCausalLM", base), config)
    model.save_pretrained(tmp_path / "adapter")
    model.merge_and_unload().save_pretrained(tmp_path / "merged")
    report = loratool.validate(tmp_path / "adapter", base, tmp_path / "merged")
    assert report.ok and report.data["counts"]["applied"] == 2
    head = report.data["tensors"]["lm_head.weight"]
    assert (head["kind"], head["verdict"]) == ("replacement", "cannot be told")


def test_the_real_pair(tmp_path: Path) -> None:
    """rxnfp: a masked language model's base, prefixes, a new head, legacy torch files."""
    from fixtures.weights import RXNFP_BASE, RXNFP_TUNED, fetch

    fetch()
    adapter = tmp_path / "adapter"
    loratool.extract(RXNFP_BASE, RXNFP_TUNED, rank=8).save(adapter)
    loratool.merge(RXNFP_BASE, [(adapter, 1.0)], dtype="bf16").save(tmp_path / "merged")
    report = proved(adapter, RXNFP_BASE, tmp_path / "merged")
    assert report.data["counts"]["applied"] == 73 + 128
    tuned = loratool.validate(adapter, RXNFP_BASE, RXNFP_TUNED)
    assert tuned.data["verdict"] == "other changes"
    assert tuned.title.endswith(", and other changes")
    base = loratool.validate(adapter, RXNFP_BASE, RXNFP_BASE)
    assert base.data["verdict"] == "not applied"
