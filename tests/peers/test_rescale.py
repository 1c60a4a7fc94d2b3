"""What PEFT saved and loratool rescaled, PEFT loads without a warning as what was asked for."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import PreTrainedModel

import loratool
from tests.models import Pair, distance, load, outputs
from tests.peers.peft_side import PREFIX, load_strictly, lora_modules, on_base, settings
from tests.peers.test_peft_adapters import CASES, trained

USED = ("plain", "rslora", "patterns", "patterns and rslora", "bias all of an encoder",
        "modules to save", "gpt2", "classifier")  # fmt: skip
Deltas = dict[str, torch.Tensor]


def cut(delta: torch.Tensor, keep: Callable[[torch.Tensor], int]) -> torch.Tensor:
    """The best approximation by the rank that `keep` chooses from the singular values."""
    u, sigma, v = torch.linalg.svd(delta, full_matrices=False)
    rank = keep(sigma)
    return u[:, :rank] * sigma[:rank] @ v[:rank]


def by_energy(share: float) -> Callable[[torch.Tensor], int]:
    def keep(sigma: torch.Tensor) -> int:
        energies = sigma.square().cumsum(0) / sigma.square().sum()
        return int((energies < share).sum()) + 1

    return keep


OPTIONS: Mapping[str, tuple[dict[str, Any], Callable[[torch.Tensor], torch.Tensor], float]] = {
    # name: (options, what becomes of a delta, tolerance)
    "by": ({"by": 0.3}, lambda d: 0.3 * d, 1e-6),
    "by a negative": ({"by": -2.0}, lambda d: -2 * d, 1e-6),
    "rank": ({"rank": 2}, lambda d: cut(d, lambda s: 2), 1e-5),
    "energy": ({"energy": 0.8}, lambda d: cut(d, by_energy(0.8)), 1e-5),
    "ratio": ({"ratio": 2.0}, lambda d: cut(d, lambda s: int((s >= s[0] / 2).sum())), 1e-5),
    "normalize": ({"normalize": True}, lambda d: d, 1e-6),
    "balance": ({"balance": True}, lambda d: d, 1e-6),
    "alpha, same delta": ({"alpha": 5.0, "keep_delta": True}, lambda d: d, 1e-6),
    "everything": (
        {"by": -0.5, "rank": 3, "energy": 0.9, "normalize": True, "dtype": "fp16"},
        lambda d: -0.5 * cut(d, lambda s: min(3, by_energy(0.9)(s))), 2e-3,
    ),
}  # fmt: skip


def base_model(pair: Pair, architecture: str) -> PreTrainedModel:
    return load(architecture or pair.recipe.base, pair.base)


def deltas(model: Any) -> Deltas:
    """Module -> what PEFT itself says it adds, as (out, in)."""
    found = {}
    for module in lora_modules(model):
        layer = model.get_submodule(PREFIX + module)
        delta = layer.get_delta_weight("default").detach().double()
        found[module] = delta.T if layer.fan_in_fan_out else delta
    return found


@pytest.fixture(scope="module")
def made(
    pair_of: Callable[[str], Pair], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], tuple[Path, Deltas]]:
    """Name of a case -> an adapter that PEFT saved, and its deltas."""
    known: dict[str, tuple[Path, Deltas]] = {}

    def make(case: str) -> tuple[Path, Deltas]:
        if case not in known:
            recipe, architecture, options = CASES[case]
            path = tmp_path_factory.mktemp("made") / "adapter"
            trained(pair_of(recipe), architecture, options, path)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                model = base_model(pair_of(recipe), architecture)
                known[case] = path, deltas(PeftModel.from_pretrained(model, path))
        return known[case]

    return make


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("case", USED)
def test_peft_loads_the_delta_that_was_asked_for(
    case: str,
    name: str,
    pair_of: Callable[[str], Pair],
    made: Callable[[str], tuple[Path, Deltas]],
    tmp_path: Path,
) -> None:
    adapter, before = made(case)
    options, wanted, tolerance = OPTIONS[name]
    recipe, architecture, _ = CASES[case]
    loratool.rescale(adapter, **options).save(tmp_path / "out")
    loaded = load_strictly(base_model(pair_of(recipe), architecture), tmp_path / "out")
    after = deltas(loaded)
    assert after.keys() == before.keys()
    for module, delta in before.items():
        assert distance(after[module], wanted(delta)) < tolerance, module
    if options.get("normalize"):
        found = settings(tmp_path / "out")
        assert found["r"] == found["lora_alpha"]
        assert found["rank_pattern"] == found["alpha_pattern"] == {}
        assert found["use_rslora"] is False


@pytest.mark.parametrize("case", USED)
def test_alpha_means_what_it_means_to_peft(
    case: str,
    pair_of: Callable[[str], Pair],
    made: Callable[[str], tuple[Path, Deltas]],
    tmp_path: Path,
) -> None:
    adapter, _ = made(case)
    recipe, architecture, options = CASES[case]
    loratool.rescale(adapter, alpha=5).save(tmp_path / "out")
    found = settings(tmp_path / "out")
    assert (found["lora_alpha"], found["alpha_pattern"]) == (5, {})
    assert found["use_rslora"] is options.get("use_rslora", False)
    loaded = load_strictly(base_model(pair_of(recipe), architecture), tmp_path / "out")
    for module in lora_modules(loaded):
        layer = loaded.get_submodule(PREFIX + module)
        rank = layer.r["default"]
        scale = 5 / (math.sqrt(rank) if options.get("use_rslora") else rank)
        assert math.isclose(layer.scaling["default"], scale)


@pytest.mark.parametrize("case", ["plain", "patterns", "gpt2", "classifier"])
def test_a_budget_leaves_out_modules_that_peft_then_does_not_adapt(
    case: str,
    pair_of: Callable[[str], Pair],
    made: Callable[[str], tuple[Path, Deltas]],
    tmp_path: Path,
) -> None:
    adapter, before = made(case)
    recipe, architecture, _ = CASES[case]
    report = loratool.rescale(adapter, budget="700B").save(tmp_path / "out")
    loaded = load_strictly(base_model(pair_of(recipe), architecture), tmp_path / "out")
    after = deltas(loaded)
    left_out = {name.removesuffix(".weight") for name in report.data["rescaled"]["left_out"]}
    assert left_out
    assert after.keys() == before.keys() - left_out
    for module, delta in after.items():
        rank = loaded.get_submodule(PREFIX + module).r["default"]
        assert distance(delta, cut(before[module], lambda s, rank=rank: rank)) < 1e-5


@pytest.mark.parametrize("recipe", ["bert-classifier", "llama", "llama-tied"])
@pytest.mark.parametrize(
    "options",
    [{"by": 0.5}, {"normalize": True, "dtype": "fp32"}, {"alpha": 8.0, "keep_delta": True}],
)
def test_what_loratool_extracted_keeps_its_heads_and_norms(
    recipe: str,
    options: dict[str, Any],
    pair_of: Callable[[str], Pair],
    adapter_of: Callable[..., Path],
    tmp_path: Path,
) -> None:
    pair, adapter = pair_of(recipe), adapter_of(recipe, 4)
    loratool.rescale(adapter, **options).save(tmp_path / "out")
    assert loratool.validate(tmp_path / "out", pair.base).data["problems"] == []
    before = load_strictly(on_base(pair, adapter), adapter)
    after = load_strictly(on_base(pair, tmp_path / "out"), tmp_path / "out")
    for module in lora_modules(before):
        layer = before.get_submodule(PREFIX + module)
        if "by" in options:
            layer.scaling["default"] *= options["by"]
    assert distance(outputs(after), outputs(before)) < 1e-5
