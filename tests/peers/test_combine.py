"""stack beside PEFT's add_weighted_adapter, on every combination_type.

Where PEFT is right both agree, compared as B @ A * scale of each module. Where it is wrong, a test
shows it against the exact sum in fp64; the docstrings of `Stack` and of the combiners say so.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer

import loratool
from loratool.errors import MismatchError
from loratool.linalg import named_generator
from loratool.opening import open_adapter
from loratool.updates import LowRank
from loratool_plugins.combiners import _elementwise as elementwise
from tests.models import RECIPES, Pair, build, distance, load, make_pair, outputs, tiny_config
from tests.peers.peft_side import PREFIX, load_strictly, on_base

TARGETS = ["q_proj", "down_proj"]
WEIGHTS = (0.7, 0.5, -0.3)
FULL = 32  # the rank of every target
Configs = Mapping[str, Mapping[str, Any]]
Deltas = dict[str, torch.Tensor]

EQUAL_RANKS: Configs = {
    "one": {"r": 4, "lora_alpha": 8, "target_modules": TARGETS},
    "two": {"r": 4, "lora_alpha": 3, "target_modules": [*TARGETS, "o_proj"]},
    "three": {"r": 4, "lora_alpha": 16, "target_modules": TARGETS, "alpha_pattern": {"q_proj": 5}},
}
ANY_RANKS: Configs = {
    "one": {**EQUAL_RANKS["one"], "r": 3, "rank_pattern": {"down_proj": 6}},
    "two": {**EQUAL_RANKS["two"], "r": 5},
    "three": {**EQUAL_RANKS["three"], "use_rslora": True},  # not the first: PEFT is right
}


@pytest.fixture(autouse=True)
def quietly() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def llama() -> Any:
    return build("LlamaForCausalLM", tiny_config("llama"))


def with_adapters(configs: Configs) -> Any:
    """A PEFT model with random adapters; the same ones for the same configs."""
    model: Any = None
    with torch.random.fork_rng():
        torch.manual_seed(0)
        for name, config in configs.items():
            settings = LoraConfig(init_lora_weights=False, **config)
            if model is None:
                model = get_peft_model(llama(), settings, adapter_name=name)
            else:
                model.add_adapter(name, settings)
    return model.eval()


def saved(model: Any, names: Sequence[str], folder: Path) -> list[Path]:
    model.save_pretrained(folder, selected_adapters=list(names))
    return [folder / name for name in names]


def lora_layers(model: Any, adapter: str) -> dict[str, LoraLayer]:
    """Parameter name -> the layer, in PEFT's order."""
    return {
        f"{name.removeprefix(PREFIX)}.weight": module
        for name, module in model.named_modules()
        if isinstance(module, LoraLayer) and adapter in module.lora_A
    }


def peft_deltas(model: Any, adapter: str) -> Deltas:
    layers = lora_layers(model, adapter)
    return {name: layer.get_delta_weight(adapter).detach() for name, layer in layers.items()}


def exact_deltas(model: Any, adapter: str) -> Deltas:
    """scale * B @ A in fp64, from what PEFT holds."""
    found = {}
    for name, layer in lora_layers(model, adapter).items():
        a, b = (side[adapter].weight.detach().double() for side in (layer.lora_A, layer.lora_B))
        found[name] = layer.scaling[adapter] * b @ a
    return found


def exact_sum(model: Any, names: Sequence[str], weights: Sequence[float]) -> Deltas:
    total: Deltas = {}
    for adapter, weight in zip(names, weights, strict=True):
        for name, delta in exact_deltas(model, adapter).items():
            total[name] = total.get(name, torch.zeros_like(delta)) + weight * delta
    return total


def our_deltas(adapter: Mapping[str, Any]) -> Deltas:
    found = {}
    for name, update in adapter.items():
        low = update.load()
        assert isinstance(low, LowRank)
        found[name] = low.scale * low.b.double() @ low.a.double()
    return found


def assert_close(found: Deltas, wanted: Deltas, tolerance: float) -> None:
    assert found.keys() == wanted.keys()
    for name, delta in wanted.items():
        assert float((found[name] - delta).norm() / delta.norm()) < tolerance, name


def largest_error(found: Deltas, wanted: Deltas) -> float:
    return max(float((found[n] - wanted[n]).norm() / wanted[n].norm()) for n in wanted)


def our_masks(
    model: Any, names: Sequence[str], density: float, on: str, seed: int
) -> Iterator[torch.Tensor]:
    """The masks that loratool draws, in the order in which PEFT asks for its own."""
    layers = {name: layer for one in names for name, layer in lora_layers(model, one).items()}
    in_order = [n for n in lora_layers_in_order(model) if n in layers]
    for name in in_order:
        present = [one for one in names if one in layers[name].lora_A]
        generator = named_generator(seed, name)
        for side in ("lora_A", "lora_B") if on == "factors" else ("delta",):
            streams = elementwise.streams(generator, len(present))
            for one, stream in zip(present, streams, strict=True):
                if side == "delta":
                    shape = layers[name].get_delta_weight(one).shape
                else:
                    shape = getattr(layers[name], side)[one].weight.shape
                yield elementwise.keep_mask(shape, density, stream).float()


def lora_layers_in_order(model: Any) -> list[str]:
    return [
        f"{name.removeprefix(PREFIX)}.weight"
        for name, module in model.named_modules()
        if isinstance(module, LoraLayer)
    ]


# (combination_type, PEFT's options, our combiner, our options)
ON_DELTAS = [
    ("svd", {}, "total", {}),
    ("svd", {"svd_rank": 5}, "total", {"rank": 5}),
    ("svd", {"svd_rank": FULL}, "linear", {}),
    ("cat", {}, "total", {}),
    ("ties_svd", {"density": 0.3}, "ties:density=0.3", {}),
    (
        "ties_svd", {"density": 0.6, "majority_sign_method": "frequency", "svd_rank": 7},
        "ties:density=0.6,sign=frequency", {"rank": 7},
    ),
    ("magnitude_prune_svd", {"density": 0.3}, "magnitude_prune:density=0.3", {}),
    ("magnitude_prune_svd", {"density": 1.0}, "magnitude_prune:density=1", {"rank": FULL}),
    ("dare_linear_svd", {"density": 0.4}, "dare_linear:density=0.4", {}),
    ("dare_ties_svd", {"density": 0.4}, "dare_ties:density=0.4", {}),
    (
        "dare_ties_svd", {"density": 0.6, "majority_sign_method": "frequency", "svd_rank": 9},
        "dare_ties:density=0.6,sign=frequency", {"rank": 9},
    ),
]  # fmt: skip
ON_FACTORS = [
    ("linear", {}, "linear:on=factors"),
    ("ties", {"density": 0.3}, "ties:density=0.3,on=factors"),
    (
        "ties", {"density": 0.7, "majority_sign_method": "frequency"},
        "ties:density=0.7,sign=frequency,on=factors",
    ),
    ("magnitude_prune", {"density": 0.3}, "magnitude_prune:density=0.3,on=factors"),
    ("dare_linear", {"density": 0.4}, "dare_linear:density=0.4,on=factors"),
    ("dare_ties", {"density": 0.4}, "dare_ties:density=0.4,on=factors"),
    (
        "dare_ties", {"density": 0.6, "majority_sign_method": "frequency"},
        "dare_ties:density=0.6,sign=frequency,on=factors",
    ),
]  # fmt: skip


def share_masks(
    monkeypatch: pytest.MonkeyPatch, model: Any, names: Sequence[str], density: float, on: str
) -> Iterator[torch.Tensor]:
    """Let PEFT drop the elements that loratool drops; returns the masks not yet used."""
    masks = our_masks(model, names, density, on, seed=11)

    def bernoulli(probabilities: torch.Tensor) -> torch.Tensor:
        mask = next(masks)
        assert mask.shape == probabilities.shape
        assert torch.all(probabilities == torch.tensor(density))
        return mask

    monkeypatch.setattr(torch, "bernoulli", bernoulli)
    return masks


@pytest.mark.parametrize("configs", [EQUAL_RANKS, ANY_RANKS], ids=["equal ranks", "any ranks"])
@pytest.mark.parametrize(
    ("kind", "options", "combiner", "ours"),
    ON_DELTAS,
    ids=[f"{kind} {options}" for kind, options, _, _ in ON_DELTAS],
)
def test_combinations_of_deltas_agree(
    kind: str,
    options: dict[str, Any],
    combiner: str,
    ours: dict[str, Any],
    configs: Configs,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, names = with_adapters(configs), list(configs)
    paths = saved(model, names, tmp_path)
    if kind == "svd" and not options:  # PEFT's default is the largest rank of the configs
        ours = {"rank": 6 if configs is ANY_RANKS else 4}
    elif kind.endswith("_svd") and "svd_rank" not in options:
        options = {**options, "svd_rank": FULL}  # the dense combination itself
        ours = {"rank": FULL}
    with monkeypatch.context() as patch:
        density = options.get("density", 1.0)
        masks = share_masks(patch, model, names, density, "deltas") if "dare" in kind else iter(())
        model.add_weighted_adapter(
            names, list(WEIGHTS), "combined", combination_type=kind, **options
        )
        assert next(masks, None) is None
    found = loratool.stack(
        list(zip(paths, WEIGHTS, strict=True)), combiner=combiner, factorizer="exact", seed=11,
        **ours,
    )  # fmt: skip
    assert_close(our_deltas(found), peft_deltas(model, "combined"), 5e-6)
    if kind in ("svd", "cat") and "rank" not in ours:
        assert_close(our_deltas(found), exact_sum(model, names, WEIGHTS), 2e-7)


@pytest.mark.parametrize(
    ("kind", "options", "combiner"),
    ON_FACTORS,
    ids=[f"{kind} {options}" for kind, options, _ in ON_FACTORS],
)
def test_combinations_of_factors_agree(
    kind: str,
    options: dict[str, Any],
    combiner: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, names = with_adapters(EQUAL_RANKS), list(EQUAL_RANKS)
    paths = saved(model, names, tmp_path)
    with monkeypatch.context() as patch:
        density = options.get("density", 1.0)
        masks = share_masks(patch, model, names, density, "factors") if "dare" in kind else iter(())
        model.add_weighted_adapter(
            names, list(WEIGHTS), "combined", combination_type=kind, **options
        )
        assert next(masks, None) is None
    found = loratool.stack(list(zip(paths, WEIGHTS, strict=True)), combiner=combiner, seed=11)
    assert {update.rank for update in found.values()} == {4}
    assert_close(our_deltas(found), peft_deltas(model, "combined"), 5e-6)


def test_every_combination_type_is_compared() -> None:
    compared = {kind for kind, *_ in (*ON_DELTAS, *ON_FACTORS)}
    assert compared == {
        "svd", "linear", "cat", "ties", "ties_svd", "dare_ties", "dare_linear", "dare_ties_svd",
        "dare_linear_svd", "magnitude_prune", "magnitude_prune_svd",
    }  # fmt: skip


# Where PEFT is wrong


def of_kind(kind: str) -> dict[str, Any]:
    return {"density": 1.0} if kind not in ("svd", "cat", "linear") else {}


@pytest.mark.parametrize(("kind", "rank"), [("cat", 8), ("svd", 16), ("linear", 4)])
def test_peft_scales_twice_if_the_first_adapter_uses_rslora(
    kind: str, rank: int, tmp_path: Path
) -> None:
    configs = {
        name: {"r": 4, "lora_alpha": 8, "target_modules": TARGETS, "use_rslora": True}
        for name in ("one", "two")
    }
    model = with_adapters(configs)
    paths = saved(model, ["one", "two"], tmp_path)
    wanted = exact_sum(model, ["one", "two"], [0.7, 0.3])
    options = {"svd_rank": rank} if kind == "svd" else {}
    model.add_weighted_adapter(
        ["one", "two"], [0.7, 0.3], "combined", combination_type=kind, **options
    )
    given = list(zip(paths, (0.7, 0.3), strict=True))
    if kind == "linear":
        found = our_deltas(loratool.stack(given, combiner="linear:on=factors"))
    else:
        found = our_deltas(loratool.stack(given))
        assert_close(found, wanted, 1e-7)
    theirs = peft_deltas(model, "combined")
    assert_close({n: d / rank**0.5 for n, d in theirs.items()}, found, 1e-5)
    assert largest_error(theirs, found) > 0.9


@pytest.mark.parametrize("kind", ["linear", "ties", "dare_linear", "dare_ties", "magnitude_prune"])
def test_peft_cannot_combine_factors_whose_ranks_differ_by_module(
    kind: str, tmp_path: Path
) -> None:
    plain = {"r": 4, "lora_alpha": 8, "target_modules": TARGETS}
    model = with_adapters({"one": {**plain, "rank_pattern": {"down_proj": 2}}, "two": plain})
    paths = saved(model, ["one", "two"], tmp_path)
    with pytest.raises(RuntimeError, match="equal size"):
        model.add_weighted_adapter(
            ["one", "two"], [0.7, 0.3], "combined", combination_type=kind, **of_kind(kind)
        )
    found = our_deltas(loratool.stack(list(zip(paths, (0.7, 0.3), strict=True))))
    assert_close(found, exact_sum(model, ["one", "two"], [0.7, 0.3]), 1e-7)


def test_peft_cannot_load_what_it_combines_of_factors_with_one_rank_pattern(
    tmp_path: Path,
) -> None:
    patterned = {
        "r": 4, "lora_alpha": 8, "target_modules": TARGETS, "rank_pattern": {"down_proj": 2},
    }  # fmt: skip
    model = with_adapters({"one": patterned, "two": patterned})
    paths = saved(model, ["one", "two"], tmp_path)
    model.add_weighted_adapter(["one", "two"], [0.7, 0.3], "combined", combination_type="linear")
    saved(model, ["combined"], tmp_path)
    with pytest.raises(RuntimeError, match="size mismatch"):
        PeftModel.from_pretrained(llama(), tmp_path / "combined")
    ours = loratool.stack(list(zip(paths, (0.7, 0.3), strict=True)), combiner="linear:on=factors")
    ours.save(tmp_path / "ours")
    loaded = load_strictly(llama(), tmp_path / "ours")
    assert_close(peft_deltas(loaded, "default"), peft_deltas(model, "combined"), 5e-6)


def test_peft_breaks_a_module_with_fewer_rows_than_svd_rank(tmp_path: Path) -> None:
    plain = {"r": 4, "lora_alpha": 8, "target_modules": ["v_proj"]}  # (16, 32)
    model = with_adapters({"one": plain, "two": plain})
    paths = saved(model, ["one", "two"], tmp_path)
    model.add_weighted_adapter(
        ["one", "two"], [0.7, 0.3], "combined", combination_type="svd", svd_rank=20
    )
    with pytest.raises(RuntimeError, match="cannot be multiplied"):
        peft_deltas(model, "combined")
    found = loratool.stack(list(zip(paths, (0.7, 0.3), strict=True)), rank=20)
    assert_close(our_deltas(found), exact_sum(model, ["one", "two"], [0.7, 0.3]), 1e-6)


@pytest.mark.parametrize("setting", ["use_dora", "lora_bias"])
def test_peft_loses_what_is_not_in_the_factors(setting: str, tmp_path: Path) -> None:
    """Even of one adapter with weight 1; loratool adds up biases, and refuses DoRA by name."""
    model = with_adapters({"one": {**EQUAL_RANKS["one"], setting: True}})
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_magnitude_vector" in name:
                parameter *= 1.5
            elif name.endswith("lora_B.one.bias"):
                parameter += 0.5
    (path,) = saved(model, ["one"], tmp_path)
    model.add_weighted_adapter(["one"], [1.0], "combined", combination_type="cat")
    found = {}
    for name in ("one", "combined"):
        model.set_adapter(name)
        found[name] = outputs(model)
    assert distance(found["combined"], found["one"]) > 0.05
    if setting == "use_dora":
        with pytest.raises(MismatchError, match=r"proj\.weight and .*DoRA .*convert --to-lora"):
            loratool.stack([(path, 1.0)])
        return
    loratool.stack([(path, 1.0)]).save(tmp_path / "stacked")
    ours = load_strictly(llama(), tmp_path / "stacked")
    assert distance(outputs(ours), found["one"]) < 1e-6


# What we write


@pytest.mark.parametrize("options", [{}, {"rank": FULL}, {"combiner": "linear"}], ids=str)
def test_peft_answers_with_a_stack_as_with_the_weighted_sum(
    options: dict[str, Any], tmp_path: Path
) -> None:
    model, names = with_adapters(ANY_RANKS), list(ANY_RANKS)
    paths = saved(model, names, tmp_path)
    loratool.stack(list(zip(paths, WEIGHTS, strict=True)), **options).save(tmp_path / "stacked")
    wanted = exact_sum(model, names, WEIGHTS)
    by_hand = llama()
    with torch.no_grad():
        for name, delta in wanted.items():
            weight = by_hand.get_parameter(name)
            weight.copy_((weight.double() + delta).float())
    loaded = load_strictly(llama(), tmp_path / "stacked")
    assert_close(peft_deltas(loaded, "default"), wanted, 1e-6)
    assert distance(outputs(loaded), outputs(by_hand)) < 1e-5
    assert distance(outputs(loaded), outputs(llama())) > 1e-3


def test_a_stack_of_heads_and_updates_loads_in_peft(tmp_path: Path) -> None:
    """One adapter trained a head, the other did not: the result has both."""
    plain = {"r": 4, "lora_alpha": 8, "target_modules": TARGETS}
    configs = {"one": plain, "two": {**plain, "modules_to_save": ["lm_head"]}}
    model = with_adapters(configs)
    head = model.base_model.model.lm_head.modules_to_save["two"].weight
    with torch.no_grad():
        head += 0.1
    paths = saved(model, ["one", "two"], tmp_path)
    loratool.stack([(paths[0], 0.5), (paths[1], 2.0)]).save(tmp_path / "stacked")
    loaded = load_strictly(llama(), tmp_path / "stacked")
    assert_close(peft_deltas(loaded, "default"), exact_sum(model, ["one", "two"], [0.5, 2.0]), 1e-6)
    kept = loaded.base_model.model.lm_head.modules_to_save["default"].weight
    assert torch.equal(kept, head)
    reopened = open_adapter(tmp_path / "stacked")
    assert reopened["lm_head.weight"].kind == "replacement"


@pytest.mark.parametrize("opened", [False, True], ids=["computed", "opened"])
@pytest.mark.parametrize("name", ["bert-classifier", "gpt2", "llama-tied"])
def test_peft_answers_with_stacked_extractions_as_the_merged_model(
    name: str, opened: bool, pair_of: Callable[[str], Pair], tmp_path: Path
) -> None:
    """Two whole fine-tunes of one base, the second without what it kept whole as well."""
    pair = pair_of(name)
    second = make_pair(
        RECIPES[name], tmp_path / "second", lambda n: n.endswith(("query.weight", "_proj.weight"))
    )
    adapters: list[Any] = [loratool.extract(pair.base, one.tuned, rank=4) for one in (pair, second)]
    names = ["#1", "#2"]
    if opened:
        names = ["first", "other"]
        for adapter, label in zip(adapters, names, strict=True):
            adapter.save(tmp_path / label)
        adapters = [open_adapter(tmp_path / label) for label in names]
    whole = [n.rpartition(".")[0] for n, u in adapters[1].items() if u.kind == "replacement"]
    left_out = [f"{names[1]}:{module}=0" for module in dict.fromkeys(whole)]
    stacked = loratool.stack([(adapters[0], 1.0), (adapters[1], 0.5)], weights=left_out)
    stacked.save(tmp_path / "stacked")
    loratool.merge(pair.base, [(tmp_path / "stacked", 1.0)]).save(tmp_path / "merged")
    merged = outputs(load(pair.recipe.tuned, tmp_path / "merged"))
    loaded = load_strictly(on_base(pair, tmp_path / "stacked"), tmp_path / "stacked")
    assert distance(outputs(loaded), merged) < 1e-5
    assert distance(merged, outputs(pair.load_tuned())) > 1e-2
