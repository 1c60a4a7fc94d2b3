"""Refined adapters against those they start from, on models that run in a moment."""

from __future__ import annotations

import hashlib
import json
import math
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import loratool
from fixtures.reactions import encode, reactions
from fixtures.weights import RXNFP_BASE, RXNFP_TUNED, fetch
from loratool.adapter import Adapter
from loratool.calibration import Inputs, read_inputs
from loratool.engine import Drain
from loratool.errors import InputError, UsageError
from loratool.matching import Reference
from loratool.opening import open_checkpoint
from loratool.refining import Branch, refine
from loratool.running import open_model, run, whole_model
from loratool.training import Training
from loratool.updates import LowRank
from tests.models import RECIPES, Pair, make_pair

NAMES = ["llama", "bert-mlm", "gpt2", "t5"]
SMALL = [*NAMES, "bert-classifier"]


def token_ids(folder: Path, count: int = 60, vocabulary: int = 60, seed: int = 7) -> Path:
    generator = torch.Generator().manual_seed(seed)
    lines = [
        json.dumps(torch.randint(3, vocabulary, (5 + n % 8,), generator=generator).tolist())
        for n in range(count)
    ]
    path = folder / "ids.jsonl"
    path.write_text("\n".join(lines))
    return path


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, tuple[Pair, Path]]:
    made = {}
    for name in SMALL:
        folder = tmp_path_factory.mktemp(name)
        made[name] = make_pair(RECIPES[name], folder), token_ids(folder)
    return made


def extract(pair: Pair, ids: Path | None = None, **options: Any) -> Any:
    if ids is not None:
        options = {"calibrate": str(ids), "refine": 30, **options}
    return loratool.extract(pair.base, pair.tuned, **{"rank": 2, "factorizer": "exact", **options})


def factors(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "adapter_model.safetensors")


def hashes(folder: Path) -> dict[str, str]:
    return {
        str(path): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def distance(adapter: Adapter, pair: Pair, ids: Path, measure: str) -> float:
    """How far the merged model's outputs are from the fine-tune's, on all samples."""
    teacher = open_model(open_checkpoint(pair.tuned))
    inputs = read_inputs(ids, teacher)
    merged = open_model(loratool.merge(pair.base, [(adapter, 1.0)]))
    with Reference.take(teacher, inputs, measure) as reference:
        losses = [float(reference.loss(n, outputs)) for n, outputs in run(merged, inputs.batches)]
    return sum(losses) / len(losses)


@pytest.fixture(scope="module", params=NAMES)
def saved(request, pairs, tmp_path_factory) -> tuple[Pair, Path, Any]:
    """A pair, its refined adapter, and the report of that."""
    pair, ids = pairs[request.param]
    folder = tmp_path_factory.mktemp("refined")
    return pair, folder / "adapter", extract(pair, ids).save(folder / "adapter")


def test_outputs_come_closer_than_those_of_the_plain_adapter(tmp_path, saved) -> None:
    pair, folder, report = saved
    told = report.data["refinement"]
    assert told["after"] < 0.97 * told["before"]
    assert told["losses"][0] == [0, told["before"]]
    assert [told["kept_step"], told["after"]] in told["losses"]
    assert any(line.startswith("refined: KL divergence") for line in report.lines)
    ids = token_ids(tmp_path, seed=8)
    after = distance(loratool.open_adapter(folder), pair, ids, "kl")
    assert after < 0.97 * distance(extract(pair), pair, ids, "kl")


def test_certificates_are_those_of_the_refined_factors(saved) -> None:
    pair, folder, report = saved
    base, tuned = (open_checkpoint(path) for path in (pair.base, pair.tuned))
    adapter = loratool.open_adapter(folder)
    checked = 0
    for name, told in report.data["tensors"].items():
        if told["kind"] != "low_rank":
            continue
        update = adapter[name].load()
        assert isinstance(update, LowRank)
        delta = tuned[name].read().double() - base[name].read().double()
        found = update.scale * (update.b.double() @ update.a.double())
        found = found.T if told["shape"] != list(delta.shape) or is_conv1d(pair) else found
        lost = float((delta - found).square().sum() / delta.square().sum())
        assert told["energy"] == pytest.approx(1 - lost, abs=1e-6)
        assert told["relative_error"] == pytest.approx(math.sqrt(lost), abs=1e-6)
        assert told["rank"] == update.rank == 2
        checked += 1
    assert checked > 5
    refinement = report.data["refinement"]
    assert refinement["energy_after"] < refinement["energy_before"]


def is_conv1d(pair: Pair) -> bool:
    return pair.recipe.model_type == "gpt2"


@pytest.mark.parametrize("rate", [1e3, 1e30])
def test_nothing_worse_than_the_start_comes_back(tmp_path, pairs, rate) -> None:
    pair, ids = pairs["llama"]
    extract(pair).save(tmp_path / "plain")
    report = extract(pair, ids, refine_rate=rate).save(tmp_path / "refined")
    assert factors(tmp_path / "plain").keys() == factors(tmp_path / "refined").keys()
    plain, refined = (
        (tmp_path / folder / "adapter_model.safetensors").read_bytes()
        for folder in ("plain", "refined")
    )
    assert plain == refined
    assert report.data["refinement"]["kept_step"] == 0
    assert any("did not help" in line for line in report.lines)


def test_the_same_seed_gives_the_same_bytes(tmp_path, pairs) -> None:
    pair, ids = pairs["bert-classifier"]

    def written(name: str, **options: Any) -> bytes:
        executor = options.pop("executor", "threads")
        extract(pair, ids, **options).save(tmp_path / name, executor=executor)
        return (tmp_path / name / "adapter_model.safetensors").read_bytes()

    first = written("first")
    assert written("again", executor="serial") == first
    assert written("other", seed=1) != first


def test_an_unsaved_adapter_is_refined_when_it_is_merged(tmp_path, pairs) -> None:
    pair, ids = pairs["llama"]
    extract(pair, ids).save(tmp_path / "adapter")
    for name, adapter in (
        ("a", extract(pair, ids)),
        ("b", loratool.open_adapter(tmp_path / "adapter")),
    ):
        loratool.merge(pair.base, [(adapter, 1.0)]).save(tmp_path / name)
    one, other = (load_file(tmp_path / name / "model.safetensors") for name in "ab")
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_the_models_stay_as_they_are(tmp_path, pairs) -> None:
    pair, ids = pairs["gpt2"]
    before = hashes(pair.base), hashes(pair.tuned)
    extract(pair, ids).save(tmp_path / "adapter")
    assert (hashes(pair.base), hashes(pair.tuned)) == before


def references(pair: Pair, ids: Path) -> tuple[Any, Reference, Inputs]:
    teacher = open_model(open_checkpoint(pair.tuned))
    inputs = read_inputs(ids, teacher)
    return open_model(open_checkpoint(pair.base)), Reference.take(teacher, inputs, None), inputs


@pytest.mark.parametrize("scale", [0.25, 2.0, 8 / math.sqrt(2)])
def test_the_scale_is_part_of_the_function(pairs, scale) -> None:
    """The same products at another alpha / r start from, and come to, the same outputs."""
    pair, ids = pairs["llama"]
    base, reference, _ = references(pair, ids)
    adapter = extract(pair)
    plain = {name: update.load() for name, update in adapter.items() if update.kind == "low_rank"}
    found = []
    for factor in (1.0, scale):
        root = math.sqrt(factor)
        starts = {
            name: (LowRank(update.a / root, update.b / root, factor), "F32")
            for name, update in plain.items()
        }
        found.append(refine(whole_model(base), starts, reference, reference, Training(10)))
    assert found[1].before == pytest.approx(found[0].before, rel=1e-5)
    assert found[1].after == pytest.approx(found[0].after, rel=1e-3)
    assert all(update.scale == scale for update in found[1].updates.values())


def test_a_branch_computes_what_a_merge_does(pairs) -> None:
    pair, ids = pairs["gpt2"]
    base, reference, inputs = references(pair, ids)
    adapter = extract(pair, lora_only=True)
    merged = dict(run(open_model(loratool.merge(pair.base, [(adapter, 1.0)])), inputs.batches))
    model = whole_model(base)
    for name, update in adapter.items():
        found = update.load()
        assert isinstance(found, LowRank)
        Branch.beside(model.get_submodule(name.rpartition(".")[0]), found, "F32")
    for number, batch in enumerate(inputs.batches):
        with torch.no_grad():
            logits = model(**batch)["logits"]
        torch.testing.assert_close(logits, merged[number]["logits"], rtol=1e-4, atol=1e-4)
    reference.close()


def test_recomputed_layers_give_the_same_result(pairs, monkeypatch) -> None:
    pair, ids = pairs["llama"]
    base, reference, _ = references(pair, ids)
    adapter = extract(pair)
    starts = {
        name: (update.load(), "F32")
        for name, update in adapter.items()
        if update.kind == "low_rank"
    }
    kept = refine(whole_model(base), starts, reference, reference, Training(5))
    monkeypatch.setattr("loratool.refining._RECOMPUTE", 0)
    recomputed = refine(whole_model(base), starts, reference, reference, Training(5))
    for one, other in zip(recomputed.losses, kept.losses, strict=True):
        assert one == pytest.approx(other, rel=1e-5)
    assert kept.after < kept.before


def test_outputs_in_a_file_give_the_same_result(tmp_path, pairs, monkeypatch) -> None:
    pair, ids = pairs["llama"]
    extract(pair, ids).save(tmp_path / "memory")
    monkeypatch.setattr("loratool.matching._IN_MEMORY", 0)
    extract(pair, ids).save(tmp_path / "file")
    one, other = (tmp_path / n / "adapter_model.safetensors" for n in ("memory", "file"))
    assert one.read_bytes() == other.read_bytes()


def test_a_penalty_holds_the_factors_near_their_start(tmp_path, pairs) -> None:
    pair, ids = pairs["llama"]
    energies = [
        extract(pair, ids, refine_penalty=penalty)
        .save(tmp_path / str(penalty))
        .data["refinement"]["energy_after"]
        for penalty in (0.0, 10.0, 1e4)
    ]
    assert energies == sorted(energies)
    assert energies[0] < energies[1]


def test_mean_squared_error_is_made_small_where_it_is_asked_for(tmp_path, pairs) -> None:
    pair, ids = pairs["bert-classifier"]
    report = extract(pair, ids, refine_loss="mse").save(tmp_path / "adapter")
    told = report.data["refinement"]
    assert told["compared"] == "mean squared error of the logits"
    assert told["after"] < told["before"]


def test_a_model_without_a_head_matches_hidden_states(tmp_path) -> None:
    pair, ids = make_pair(RECIPES["bert-bare"], tmp_path / "pair"), token_ids(tmp_path)
    report = extract(pair, ids).save(tmp_path / "adapter")
    told = report.data["refinement"]
    assert told["compared"] == "mean squared error of the last hidden states"
    assert told["after"] < told["before"]
    with pytest.raises(UsageError, match="no logits of several classes"):
        extract(pair, ids, refine_loss="kl").save(tmp_path / "other")
    assert not (tmp_path / "other").exists()


def test_a_body_alone_matches_hidden_states(tmp_path, pairs) -> None:
    """--lora-only leaves the base's own head, which gives other outputs than the fine-tune's."""
    pair, ids = pairs["bert-classifier"]
    report = extract(pair, ids, lora_only=True).save(tmp_path / "adapter")
    told = report.data["refinement"]
    assert told["compared"] == "mean squared error of the last hidden states"
    assert told["after"] < told["before"]


def test_tables_as_low_rank_updates_stay_as_they_are(tmp_path, pairs) -> None:
    pair, ids = pairs["llama"]
    extract(pair, embeddings="lowrank").save(tmp_path / "plain")
    lazy = extract(pair, ids, embeddings="lowrank")
    assert any("not refined" in note and "embed_tokens" in note for note in lazy.notes)
    lazy.save(tmp_path / "refined")
    plain, refined = factors(tmp_path / "plain"), factors(tmp_path / "refined")
    changed = {name for name in plain if not torch.equal(plain[name], refined[name])}
    assert changed and all(".lora_A." in name or ".lora_B." in name for name in changed)
    assert any("embed" in name for name in plain)
    assert not any("embed" in name for name in changed)


def test_progress_is_told_step_by_step(tmp_path, pairs) -> None:
    from loratool.engine import save_adapter

    pair, ids = pairs["llama"]
    told: dict[str, list[str]] = {}
    totals: dict[str, int] = {}

    def count(what: str, total: int) -> Any:
        totals[what] = total
        return told.setdefault(what, []).append

    save_adapter(extract(pair, ids), tmp_path / "adapter", Drain(count=count))
    assert totals["Refining"] == 30
    assert 1 <= len(told["Refining"]) <= 30
    assert "held-out loss" in told["Refining"][-1]
    assert len(told["Factorizing"]) == totals["Factorizing"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"refine": 10}, "--calibrate FILE"),
        ({"refine": 0, "calibrate": "x"}, "at least 1 step"),
        ({"refine": 5, "calibrate": "x", "refine_rate": 0.0}, "learning rate"),
        ({"refine": 5, "calibrate": "x", "refine_rate": math.nan}, "learning rate"),
        ({"refine": 5, "calibrate": "x", "refine_penalty": -1.0}, "penalty"),
        ({"refine": 5, "calibrate": "x", "refine_loss": "l1"}, "kl or mse"),
        ({"refine_penalty": 1.0}, "--refine STEPS"),
        ({"refine": 5, "calibrate": "x", "sparse": 10.0}, "leave --sparse out"),
        ({"refine": 5, "calibrate": "x", "rank": None, "ranks": [1, 2]}, "leave one out"),
    ],
)
def test_options_that_make_no_sense_are_usage_errors(pairs, options, message) -> None:
    with pytest.raises(UsageError, match=message):
        extract(pairs["llama"][0], **options)


def test_one_sample_is_not_enough(tmp_path, pairs) -> None:
    with pytest.raises(InputError, match="at least two"):
        extract(pairs["llama"][0], token_ids(tmp_path, 1))


def test_a_model_that_cannot_be_run_is_refused(tmp_path, pairs) -> None:
    pair, ids = pairs["bert-mlm"]
    shutil.copytree(pair.tuned, tmp_path / "tuned")
    config = json.loads((pair.tuned / "config.json").read_text())
    config["architectures"] = ["BertForNothing"]
    (tmp_path / "tuned" / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match=r"cannot be run: .*BertForNothing"):
        loratool.extract(pair.base, tmp_path / "tuned", rank=2, calibrate=str(ids), refine=5)


def test_a_fit_to_activations_is_refined_further(tmp_path, pairs) -> None:
    pair, ids = pairs["llama"]
    report = extract(pair, ids, factorizer="activation").save(tmp_path / "adapter")
    told = report.data["refinement"]
    assert told["after"] < told["before"]
    assert report.data["calibration"]["kind"] == "token ids"
    methods = {tensor.get("method") for tensor in report.data["tensors"].values()}
    assert any(method and method.endswith(", refined") for method in methods)


def short_reactions(path: Path, kinds: Any, seed: int) -> Path:
    """The shortest 24 of many reactions, as token ids."""
    texts = sorted(reactions(200, seed=seed, kinds=kinds), key=len)[:24]
    ids, mask = encode(texts, RXNFP_BASE / "vocab.txt")
    rows = [row[: sum(real)] for row, real in zip(ids, mask, strict=True)]
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


def test_a_real_fine_tune_is_matched_on_inputs_that_it_was_not_trained_on(tmp_path) -> None:
    fetch()
    seen = short_reactions(tmp_path / "seen.jsonl", "known", seed=1)
    unseen = short_reactions(tmp_path / "unseen.jsonl", "other", seed=2)
    plain = loratool.extract(RXNFP_BASE, RXNFP_TUNED, rank=4)
    options = {"calibrate": str(seen), "refine": 12, "factorizer": "exact"}
    refined = loratool.extract(RXNFP_BASE, RXNFP_TUNED, rank=4, **options)
    assert plain.model_config is not None
    teacher = open_model(open_checkpoint(RXNFP_TUNED).with_config(plain.model_config))
    inputs = read_inputs(unseen, teacher)
    found = {}
    with Reference.take(teacher, inputs, "kl") as reference:
        for name, adapter in (("plain", plain), ("refined", refined)):
            merged = open_model(loratool.merge(RXNFP_BASE, [(adapter, 1.0)]))
            losses = [reference.loss(n, out) for n, out in run(merged, inputs.batches)]
            found[name] = float(sum(losses)) / len(losses)
    assert found["refined"] < 0.95 * found["plain"], found
