"""Factors fitted to the model that they make, beside the same computed densely by hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import loratool
from fixtures.reactions import encode, reactions
from fixtures.weights import RXNFP_BASE, RXNFP_TUNED, fetch
from loratool.calibration import Inputs, read_inputs
from loratool.errors import InputError, UsageError
from loratool.linalg import SecondMoment
from loratool.lockstep import build_along
from loratool.moments import can_be_watched, collect
from loratool.opening import open_checkpoint
from loratool.running import open_model, run
from tests.memory_models import TINY, change
from tests.models import RECIPES, Pair, build, load, make_pair, perturb, tiny_config

ROWS = [[5, 9, 2, 7, 11], [4, 8], [3, 30, 31, 40, 41, 42, 43], [6, 50], list(range(3, 20))]
Model = Any


@pytest.fixture(scope="module")
def ids(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("lockstep") / "ids.json"
    path.write_text(json.dumps(ROWS))
    return path


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    return make_pair(RECIPES["llama"], tmp_path_factory.mktemp("llama"))


def given_to(model: Model, name: str) -> torch.Tensor:
    """What a module is given for all rows: (tokens, in), fp64."""
    found = []
    module = model.get_submodule(name)
    hook = module.register_forward_pre_hook(lambda _, args: found.append(args[0].flatten(0, -2)))
    with torch.no_grad():
        for row in ROWS:
            model(input_ids=torch.tensor([row]))
    hook.remove()
    return torch.cat(found).double()


def dense(
    base: Model, tuned: Model, built: Model, names: list[str], rank: int, ridge: float
) -> None:
    """Give `built`, layer by layer, what reduced-rank ridge regression finds."""
    for name in names:
        turned = type(built.get_submodule(name)).__name__ == "Conv1D"

        def weight(model: Model, name: str = name, turned: bool = turned) -> torch.Tensor:
            found: torch.Tensor = model.get_submodule(name).weight.detach().double()
            return found.t() if turned else found

        y, x = given_to(tuned, name), given_to(built, name)
        after, before = weight(tuned), weight(base)
        wanted, c = y @ after.t() - x @ before.t(), x.t() @ x
        shift = ridge * c.diagonal().mean()
        metric = c + shift * torch.eye(len(c)).double()
        full = torch.linalg.solve(metric, x.t() @ wanted + shift * (after - before).t()).t()
        _, vectors = torch.linalg.eigh(full @ metric @ full.t())
        left = vectors[:, -rank:]
        update = before + left @ (left.t() @ full)
        built.get_submodule(name).weight.data = (update.t() if turned else update).float()


def logits(model: Model) -> torch.Tensor:
    with torch.no_grad():
        return torch.cat([model(input_ids=torch.tensor([row]))[0].flatten() for row in ROWS])


@pytest.mark.parametrize(("recipe", "ridge"), [("llama", 1.0), ("llama", 0.05), ("gpt2", 1.0)])
def test_the_same_as_dense_regression_layer_by_layer(
    tmp_path: Path, ids: Path, recipe: str, ridge: float
) -> None:
    pair = make_pair(RECIPES[recipe], tmp_path)
    lazy = loratool.extract(
        pair.base, pair.tuned, rank=4, calibrate=str(ids), calibrate_on="merged",
        factorizer=f"activation:ridge={ridge}", exclude=["lm_head*"],
    )  # fmt: skip
    report = lazy.save(tmp_path / "adapter")
    merged = loratool.merge(pair.base, [(tmp_path / "adapter", 1.0)])
    tuned, built = pair.load_tuned(), pair.load_tuned()
    base = load(pair.recipe.tuned, pair.base)
    layers = [n for n, t in report.data["tensors"].items() if t["kind"] == "low_rank"]
    order = [name for name, _ in tuned.named_modules()]
    names = sorted((name.removesuffix(".weight") for name in layers), key=order.index)
    for name in names:
        built.get_submodule(name).weight.data = base.get_submodule(name).weight.data.clone()
    dense(base, tuned, built, names, 4, ridge)
    assert len(names) == (14 if recipe == "llama" else 8)
    for name in names:
        found = merged[f"{name}.weight"].read()
        wanted = built.get_submodule(name).weight.detach()
        assert float((found - wanted).norm() / wanted.norm()) < 1e-4, name
        told = report.data["tensors"][f"{name}.weight"]
        after = tuned.get_submodule(name).weight.detach().double()
        before = base.get_submodule(name).weight.detach().double()
        d, rest = after - before, after - found.double()
        energy = 1 - float(rest.square().sum() / d.square().sum())
        assert told["energy"] == pytest.approx(energy, abs=1e-4)
    assert any("the one that the factors make" in line for line in report.lines)
    assert report.data["calibration"]["model"] == "merged"
    assert report.data["calibration"]["plain"] == report.data["calibration"]["apart"] == []


def test_full_rank_gives_the_fine_tunes_outputs(tmp_path: Path, ids: Path, llama: Pair) -> None:
    loratool.extract(llama.base, llama.tuned, rank=64, calibrate=str(ids)).save(tmp_path / "full")
    merged = loratool.merge(llama.base, [(tmp_path / "full", 1.0)])
    merged.save(tmp_path / "merged")
    found = logits(load(llama.recipe.tuned, tmp_path / "merged"))
    torch.testing.assert_close(found, logits(llama.load_tuned()), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("rows", [[[5]], [[4, 8]]])
def test_fewer_tokens_than_inputs(tmp_path: Path, llama: Pair, rows: list[list[int]]) -> None:
    path = tmp_path / "few.json"
    path.write_text(json.dumps(rows))
    for ridge in ("1", "1e-6"):
        loratool.extract(
            llama.base, llama.tuned, rank=4, calibrate=str(path), calibrate_on="merged",
            factorizer=f"activation:ridge={ridge}",
        ).save(tmp_path / ridge)  # fmt: skip
        merged = loratool.merge(llama.base, [(tmp_path / ridge, 1.0)])
        assert all(bool(tensor.read().isfinite().all()) for tensor in merged.values())


def test_the_same_bytes_with_any_executor(tmp_path: Path, ids: Path, llama: Pair) -> None:
    found = set()
    for executor in ("serial", "threads:workers=3"):
        lazy = loratool.extract(llama.base, llama.tuned, rank=4, calibrate=str(ids))
        assert lazy.save(tmp_path / executor, executor=executor).data["calibration"]["samples"] == 5
        found.add((tmp_path / executor / "adapter_model.safetensors").read_bytes())
    assert len(found) == 1


def test_layers_that_stand_in_several_places(tmp_path: Path, ids: Path) -> None:
    config = transformers.AlbertConfig(
        vocab_size=64, hidden_size=32, embedding_size=16, num_hidden_layers=3,
        num_attention_heads=4, intermediate_size=48, max_position_embeddings=24,
        initializer_range=0.2,
    )  # fmt: skip
    model = build("AlbertModel", config)
    model.save_pretrained(tmp_path / "base")
    perturb(model)
    model.save_pretrained(tmp_path / "tuned")
    options = {"rank": 4, "calibrate": str(ids)}
    one = loratool.extract(
        tmp_path / "base", tmp_path / "tuned", calibrate_on="merged", **options
    ).save(tmp_path / "one")
    other = loratool.extract(
        tmp_path / "base", tmp_path / "tuned", calibrate_on="finetuned", **options
    ).save(tmp_path / "other")
    apart = one.data["calibration"]["apart"]
    assert any("query" in name for name in apart) and not any("pooler" in n for n in apart)
    assert any("called at several places" in line for line in one.lines)
    for name in apart:
        assert one.data["tensors"][name]["energy"] == other.data["tensors"][name]["energy"]
    assert "pooler.weight" in one.data["tensors"]


@pytest.mark.parametrize("lora_only", [False, True])
def test_the_model_that_is_built_is_the_merged_one(
    tmp_path: Path, ids: Path, lora_only: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Excluded targets stay the base's; norms, biases and heads are what the adapter carries."""
    import loratool.calibrated as calibrated

    pair = make_pair(RECIPES["bert-bare-base"], tmp_path)
    seen: list[Any] = []
    build_along = calibrated.build_along

    def spied(tuned: Any, built: Any, *rest: Any) -> Any:
        seen.append(built)
        return build_along(tuned, built, *rest)

    monkeypatch.setattr(calibrated, "build_along", spied)
    loratool.extract(
        pair.base, pair.tuned, rank=4, calibrate=str(ids), lora_only=lora_only,
        exclude=["*attention.output.dense.*"], embeddings="whole", calibrate_on="merged",
    ).save(tmp_path / "adapter")  # fmt: skip
    merged = loratool.merge(pair.base, [(tmp_path / "adapter", 1.0)])
    base = open_checkpoint(pair.base)
    (built,) = seen
    found = {name: tensor.read() for name, tensor in built.tensors.items()}
    compared = 0
    for name, tensor in merged.items():
        spelled = [n for n in found if n == name or n.endswith(f".{name}")]
        for other in spelled:
            assert torch.equal(found[other], tensor.read()), name
            compared += 1
        if "attention.output.dense" in name:
            assert torch.equal(tensor.read(), base[name.removeprefix("bert.")].read())
    assert compared > 30


@pytest.mark.parametrize(
    ("model_type", "architecture"),
    [
        ("bert", "BertForMaskedLM"),
        ("bert", "BertForSequenceClassification"),
        ("gpt2", "GPT2LMHeadModel"),
        ("opt", "OPTForCausalLM"),
        ("gemma2", "Gemma2ForCausalLM"),
        ("t5", "T5ForConditionalGeneration"),
    ],
)
def test_equal_models_meet_at_every_module(
    tmp_path: Path, ids: Path, model_type: str, architecture: str
) -> None:
    reference = build(architecture, tiny_config(model_type, pad_token_id=0))
    reference.save_pretrained(tmp_path / "model")
    one, two = (open_model(open_checkpoint(tmp_path / "model")) for _ in range(2))
    inputs = read_inputs(ids, one)
    modules = one.shell.model.named_modules()
    wanted = {name for name, module in modules if can_be_watched(module)}
    moments: dict[str, SecondMoment] = {}
    collect(one, inputs, wanted, moments.__setitem__)
    found: dict[str, SecondMoment] = {}
    course = build_along(one, two, inputs, wanted, found.__setitem__)
    assert course.fitted == found.keys() == moments.keys()
    assert not course.alone and not course.again
    for name, moment in found.items():
        assert moment.drift is not None and not bool(moment.drift.any()), name
        assert moment.count == moments[name].count
        torch.testing.assert_close(moment.values, moments[name].values, rtol=1e-4, atol=1e-5)
    assert len({id(moment) for moment in found.values()}) < len(found) or model_type == "gpt2"


def test_modules_that_only_one_model_calls(tmp_path: Path, ids: Path) -> None:
    """As where the two send a token to different experts."""
    models = []
    for layers in (1, 2):
        config = tiny_config("bert", pad_token_id=0, num_hidden_layers=layers)
        build("BertModel", config).save_pretrained(tmp_path / str(layers))
        models.append(open_model(open_checkpoint(tmp_path / str(layers))))
    inputs, found = read_inputs(ids, models[0]), dict[str, SecondMoment]()
    modules = models[1].shell.model.named_modules()
    wanted = {name for name, module in modules if can_be_watched(module)}
    course = build_along(models[0], models[1], inputs, wanted, found.__setitem__)
    assert course.fitted == wanted and not course.again
    assert course.alone == {name for name in wanted if ".layer.1." in name}
    assert {name for name, moment in found.items() if moment.drift is None} == course.alone


def test_convolutions_and_experts(tmp_path: Path, ids: Path) -> None:
    mixtral = TINY["mixtral"].build()
    mixtral.save_pretrained(tmp_path / "base")
    change(mixtral)
    mixtral.save_pretrained(tmp_path / "tuned")
    report = loratool.extract(
        tmp_path / "base", tmp_path / "tuned", rank=2, calibrate=str(ids), calibrate_on="merged"
    ).save(tmp_path / "adapter")
    for name, told in report.data["tensors"].items():
        if told["kind"] in ("low_rank", "experts"):
            assert ("weighted" in told) == ("experts" not in name)

    TINY["vit"].build().save_pretrained(tmp_path / "vit")
    one, two = (open_model(open_checkpoint(tmp_path / "vit")) for _ in range(2))
    name = next(n for n, _ in one.shell.model.named_modules() if n.endswith("projection"))
    images = torch.randn(3, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    inputs, found = Inputs(({"pixel_values": images},), ((0, 1, 2),), "images"), {}
    course = build_along(one, two, inputs, [name], found.__setitem__)
    assert course.fitted == {name} and not course.alone and not course.again
    assert found[name].drift is not None and not bool(found[name].drift.any())
    assert len(found[name].values) == one.shell.model.get_submodule(name).weight[0].numel()
    assert dict(run(one, inputs.batches))  # the shells are as they were


def test_options_that_make_no_sense() -> None:
    for options in (
        {"moments": "diagonal"},
        {"sparse": 10},
    ):
        with pytest.raises(UsageError):
            given = {"calibrate": "ids.json", "calibrate_on": "merged", **options}
            loratool.extract("base", "tuned", **given)  # type: ignore[arg-type]


def test_what_is_not_finite_is_told(tmp_path: Path, ids: Path) -> None:
    """In a bias, which is kept whole: the layers after it are given NaN by both models."""

    def spoil(model: Any) -> None:
        with torch.no_grad():
            model.transformer.h[0].ln_1.bias[0] = float("nan")

    pair = make_pair(RECIPES["gpt2"], tmp_path, prepare=spoil)
    lazy = loratool.extract(pair.base, pair.tuned, rank=2, calibrate=str(ids))
    with pytest.raises(InputError, match=r"NaN or Inf"):
        lazy.save(tmp_path / "adapter")
    assert not (tmp_path / "adapter").exists()


def test_a_ridge_must_be_positive(ids: Path, llama: Pair) -> None:
    with pytest.raises(UsageError, match="greater than 0"):
        loratool.extract(
            llama.base, llama.tuned, calibrate=str(ids), factorizer="activation:ridge=0"
        )


def test_the_real_pair_is_nearer_than_with_the_svd(tmp_path: Path) -> None:
    """Where the fit to the fine-tune's inputs alone is not (docs/adr/0022)."""
    fetch()
    rows, masks = encode(reactions(64 + 32, seed=1), RXNFP_TUNED / "vocab.txt")
    cut = [row[: sum(mask)] for row, mask in zip(rows[:64], masks, strict=False)]
    (tmp_path / "ids.json").write_text(json.dumps(cut))
    held_out = torch.tensor(rows[64:]), torch.tensor(masks[64:])
    batches = [dict(zip(("input_ids", "attention_mask"), held_out, strict=True))]
    answers = []
    for options in ({}, {"calibrate": str(tmp_path / "ids.json")}, None):
        if options is None:
            model = open_checkpoint(RXNFP_TUNED)
        else:
            folder = tmp_path / f"adapter{len(options)}"
            loratool.extract(RXNFP_BASE, RXNFP_TUNED, rank=4, **options).save(folder)
            model = loratool.merge(RXNFP_BASE, [(folder, 1.0)])
        ((_, found),) = run(open_model(model), batches)
        answers.append(found["logits"])
    plain, fitted = (float((a - answers[2]).norm() / answers[2].norm()) for a in answers[:2])
    assert fitted < 0.95 * plain
