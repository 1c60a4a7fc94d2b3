"""Merged checkpoints load with transformers and give the fine-tune's, or PEFT's, outputs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file
from transformers import PreTrainedModel

import loratool
from tests.models import RECIPES, Pair, distance, outputs
from tests.peers.peft_side import load_strictly, on_base

_AUTO = {
    "LMHeadModel": "AutoModelForCausalLM",
    "ForConditionalGeneration": "AutoModelForSeq2SeqLM",
    "Model": "AutoModel",
}


def load_cleanly(path: Path, architecture: str) -> PreTrainedModel:
    """Load by the fitting Auto class; a missing, unexpected or mismatched key is a failure."""
    end = next((end for end in _AUTO if architecture.endswith(end)), None)
    auto = _AUTO[end] if end else f"AutoModel{architecture[architecture.index('For') :]}"
    model, info = getattr(transformers, auto).from_pretrained(path, output_loading_info=True)
    assert type(model).__name__ == architecture
    assert {key: list(value) for key, value in info.items() if value} == {}
    loaded: PreTrainedModel = model.eval()
    return loaded


def ties(model: PreTrainedModel) -> set[tuple[str, str]]:
    """Pairs of parameter names that share memory."""
    first: dict[int, str] = {}
    found = set()
    for name, parameter in model.named_parameters(remove_duplicate=False):
        other = first.setdefault(parameter.data_ptr(), name)
        if other != name:
            found.add((other, name))
    return found


@pytest.mark.parametrize("name", RECIPES)
def test_at_full_rank_the_merged_model_is_the_fine_tune(
    name: str,
    pair_of: Callable[[str], Pair],
    adapter_of: Callable[..., Path],
    tmp_path: Path,
) -> None:
    pair = pair_of(name)
    loratool.merge(pair.base, [(adapter_of(name), 1.0)]).save(tmp_path / "merged")
    merged, tuned = load_cleanly(tmp_path / "merged", pair.recipe.tuned), pair.load_tuned()
    assert distance(outputs(merged), outputs(tuned)) < 1e-5
    assert ties(merged) == ties(tuned)
    names = load_file(tmp_path / "merged" / "model.safetensors").keys()
    assert names == load_file(pair.tuned / "model.safetensors").keys()


@pytest.mark.filterwarnings("ignore:Input and output embeddings are no longer tied")
@pytest.mark.parametrize("name", RECIPES)
def test_at_a_lower_rank_it_is_what_peft_merges(
    name: str,
    pair_of: Callable[[str], Pair],
    adapter_of: Callable[..., Path],
    tmp_path: Path,
) -> None:
    pair, adapter = pair_of(name), adapter_of(name, 4)
    loratool.merge(pair.base, [(adapter, 1.0)]).save(tmp_path / "merged")
    wanted = load_strictly(on_base(pair, adapter), adapter).merge_and_unload()
    merged = load_cleanly(tmp_path / "merged", pair.recipe.tuned)
    assert distance(outputs(merged), outputs(wanted)) < 1e-5


@pytest.mark.parametrize("name", ["bert-classifier", "gpt2", "llama-tied"])
def test_an_unsaved_adapter_merges_into_the_same_bytes(
    name: str, pair_of: Callable[[str], Pair], adapter_of: Callable[..., Path], tmp_path: Path
) -> None:
    pair = pair_of(name)
    lazy = loratool.extract(pair.base, pair.tuned, rank=4)
    loratool.merge(pair.base, [(lazy, 1.0)]).save(tmp_path / "lazy")
    loratool.merge(pair.base, [(adapter_of(name, 4), 1.0)]).save(tmp_path / "saved")
    files = {path.name for path in (tmp_path / "lazy").iterdir()}
    assert files == {path.name for path in (tmp_path / "saved").iterdir()}
    assert {"config.json", "model.safetensors"} <= files
    for file in files:
        assert (tmp_path / "lazy" / file).read_bytes() == (tmp_path / "saved" / file).read_bytes()


def test_weight_zero_leaves_the_base(
    pair_of: Callable[[str], Pair], adapter_of: Callable[..., Path], tmp_path: Path
) -> None:
    pair = pair_of("llama")
    loratool.merge(pair.base, [(adapter_of("llama", 4), 0.0)]).save(tmp_path / "merged")
    assert same_tensors(tmp_path / "merged", pair.base)


def same_tensors(left: Path, right: Path) -> bool:
    a, b = load_file(left / "model.safetensors"), load_file(right / "model.safetensors")
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def merged_tensors(
    base: Path, adapters: list[tuple[Any, float]], folder: Path
) -> dict[str, torch.Tensor]:
    loratool.merge(base, adapters).save(folder)
    found: dict[str, torch.Tensor] = load_file(folder / "model.safetensors")
    return found


def test_several_adapters_add_up_with_their_weights(
    pair_of: Callable[[str], Pair], adapter_of: Callable[..., Path], tmp_path: Path
) -> None:
    pair = pair_of("llama")
    target = ["*_proj", "lm_head"]
    first = loratool.extract(pair.base, pair.tuned, rank=2, target=target)
    second = loratool.extract(pair.base, pair.tuned, rank=3, seed=1, target=target)
    base = load_file(pair.base / "model.safetensors")
    alone = [
        merged_tensors(pair.base, [(adapter, 1.0)], tmp_path / str(i))
        for i, adapter in enumerate((first, second))
    ]
    both = merged_tensors(pair.base, [(first, 0.75), (second, -1.5)], tmp_path / "both")
    swapped = merged_tensors(pair.base, [(second, -1.5), (first, 0.75)], tmp_path / "swapped")
    assert any(not torch.equal(base[name], both[name]) for name in base)
    for name, before in base.items():
        old = before.double()
        deltas = [tensors[name].double() - old for tensors in alone]
        wanted = old + 0.75 * deltas[0] - 1.5 * deltas[1]
        torch.testing.assert_close(both[name].double(), wanted, atol=1e-6, rtol=0)
        assert torch.equal(both[name], swapped[name])
