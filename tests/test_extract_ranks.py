"""Extractions by a budget, by ratio, above rounding noise, and of several ranks at once."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import loratool
from loratool.errors import InputError, LoratoolError, OutputError, UsageError
from tests.cli.tiny import CONFIG, NORM, UP, Tensors, finetuned, llama, save_model
from tests.cli.tiny import loratool as command

WEIGHTS = "adapter_model.safetensors"
PREFIX = "base_model.model."
LEAST = 4 * (2 * (4 * 32 + 3 * 40) + 48)  # bytes of rank 1 of every matrix of the tiny Llama


def projections(dtype: torch.dtype = torch.float32, scale: float = 0.02) -> Tensors:
    """Two large matrices of a Llama's layer, whose update is worth the words."""
    generator = torch.Generator().manual_seed(0)

    def matrix(out: int, inner: int) -> torch.Tensor:
        return (scale * torch.randn(out, inner, generator=generator)).to(dtype)

    return {
        "model.layers.0.mlp.up_proj.weight": matrix(320, 160),
        "model.layers.0.mlp.down_proj.weight": matrix(160, 320),
        "model.layers.0.self_attn.q_proj.weight": matrix(160, 160),
        NORM: torch.ones(160, dtype=dtype),
    }


def power_law(base: Tensors, size: float) -> Tensors:
    """Fine-tuned by updates with slowly falling singular values, of several strengths."""
    generator = torch.Generator().manual_seed(1)
    tuned = dict(base)
    for number, (name, value) in enumerate(base.items()):
        if value.ndim == 2:
            rank = min(value.shape)
            sigma = torch.arange(1, rank + 1, dtype=torch.float32) ** -0.6
            left = torch.randn(value.shape[0], rank, generator=generator) * sigma
            right = torch.randn(rank, value.shape[1], generator=generator)
            delta = left @ right
            delta *= size * (1 + number) ** 2 * value.float().norm() / delta.norm()
            tuned[name] = (value.float() + delta).to(value.dtype)
    return tuned


@dataclass(frozen=True)
class Folders:
    base: Path
    tuned: Path


def saved(folder: Path, base: Tensors, tuned: Tensors) -> Folders:
    return Folders(save_model(folder / "base", base), save_model(folder / "tuned", tuned))


@pytest.fixture(scope="module")
def slow(tmp_path_factory: pytest.TempPathFactory) -> Folders:
    base = projections()
    return saved(tmp_path_factory.mktemp("slow"), base, power_law(base, 0.01))


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Folders:
    """A whole model with a changed norm."""
    return saved(tmp_path_factory.mktemp("tiny"), llama(), finetuned(llama()))


def extract(folders: Folders, **options: Any) -> Any:
    return loratool.extract(folders.base, folders.tuned, **options)


def ranks(folder: Path) -> dict[str, int]:
    tensors = json.loads((folder / "loratool.json").read_text())["tensors"]
    return {name: entry["rank"] for name, entry in tensors.items() if "rank" in entry}


def tensor_bytes(folder: Path) -> int:
    return sum(value.nbytes for value in load_file(folder / WEIGHTS).values())


# A budget.


@pytest.mark.parametrize("weigh", [None, "energy", "relative"])
@pytest.mark.parametrize("size", [6_000, 40_000, 150_000])
def test_the_weights_keep_to_the_budget_and_use_it(
    slow: Folders, tmp_path: Path, weigh: str | None, size: int
) -> None:
    report = extract(slow, budget=str(size), weigh=weigh).save(tmp_path / "out")
    one_rank = max(4 * (320 + 160), 4 * (160 + 160))
    assert size - one_rank < tensor_bytes(tmp_path / "out") <= size
    facts = report.data["budget"]
    assert facts["factors"] + facts["kept_whole"] == tensor_bytes(tmp_path / "out")
    assert report.data["options"]["budget"] == str(size)


@pytest.mark.parametrize("size", [6_000, 40_000])
def test_an_adapter_of_the_largest_ranks_is_rescaled_to_the_same(
    slow: Folders, tmp_path: Path, size: int
) -> None:
    extract(slow, budget=str(size), max_rank=40).save(tmp_path / "at once")
    extract(slow, rank=40).save(tmp_path / "large")
    loratool.rescale(tmp_path / "large", budget=str(size)).save(tmp_path / "rescaled")
    assert ranks(tmp_path / "at once") == ranks(tmp_path / "rescaled")
    assert len(set(ranks(tmp_path / "at once").values())) > 1


def test_nothing_else_of_those_bytes_captures_more(slow: Folders, tmp_path: Path) -> None:
    budget = extract(slow, budget="60000", max_rank=40).save(tmp_path / "budget")
    rank = 60_000 // (4 * (480 + 480 + 320))
    uniform = extract(slow, rank=rank).save(tmp_path / "uniform")
    assert budget.data["totals"]["energy"] > uniform.data["totals"]["energy"]
    relative = extract(slow, budget="60000", weigh="relative").save(tmp_path / "relative")

    def mean(report: Any) -> float:
        shares = [entry["energy"] for entry in report.data["tensors"].values()]
        return sum(shares) / 3

    assert mean(relative) > max(mean(budget), mean(uniform))
    assert relative.data["totals"]["energy"] < budget.data["totals"]["energy"]


def test_what_is_left_out_for_others_is_named_and_counts_as_lost(
    slow: Folders, tmp_path: Path
) -> None:
    report = extract(slow, budget="6000").save(tmp_path / "out")
    left_out = report.data["budget"]["left_out"]
    assert left_out and not set(left_out) & set(ranks(tmp_path / "out"))
    assert any("left out" in line and next(iter(left_out)) in line for line in report.lines)
    kept = report.data["tensors"].values()
    captured = sum(entry["energy"] * entry["delta_norm"] ** 2 for entry in kept)
    total = sum(entry["delta_norm"] ** 2 for entry in kept) + sum(n**2 for n in left_out.values())
    assert report.data["totals"]["energy"] == pytest.approx(captured / total)


def test_what_is_kept_whole_comes_first(tiny: Folders, tmp_path: Path) -> None:
    report = extract(tiny, budget="3000").save(tmp_path / "all")
    assert report.data["budget"]["kept_whole"] == 16 * 4
    assert tensor_bytes(tmp_path / "all") <= 3000
    alone = extract(tiny, budget="3000", lora_only=True).save(tmp_path / "alone")
    assert alone.data["budget"]["kept_whole"] == 0


def test_a_budget_below_one_rank_of_every_target_is_refused_by_headers(tiny: Folders) -> None:
    least = LEAST
    with pytest.raises(InputError, match=f"rank 1 of all 15 targets takes {least / 1024:.1f} KiB"):
        extract(tiny, budget=str(least - 1))
    extract(tiny, budget=str(least))


def test_a_budget_that_whole_tensors_use_up_is_refused(tmp_path: Path) -> None:
    tuned = finetuned(llama())
    table = "model.embed_tokens.weight"
    tuned[table] = tuned[table] + 1
    folders = saved(tmp_path, llama(), tuned)
    kept, head = 4 * (32 * 16 + 16), 4 * 48  # the head has not changed after all
    size = LEAST - head + kept
    with pytest.raises(InputError, match=r"2\.1 KiB are for 2 changed tensors .*--lora-only"):
        extract(folders, budget=str(size - 1)).save(tmp_path / "out")
    assert not (tmp_path / "out").exists()
    extract(folders, budget=str(size)).save(tmp_path / "out")
    assert tensor_bytes(tmp_path / "out") <= size


def test_a_head_that_the_base_lacks_counts_by_headers(tmp_path: Path) -> None:
    tuned = finetuned(llama())
    base = {name: value for name, value in llama().items() if name != "lm_head.weight"}
    folders = saved(tmp_path, base, tuned)
    with pytest.raises(InputError, match=r"2\.0 KiB are .*lm_head\.weight.*--lora-only"):
        extract(folders, budget="3KiB")


def test_a_full_largest_rank_is_told(slow: Folders, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr("loratool.rank_options._DEFAULT_CAP", 5)
    report = extract(slow, budget="1MiB").save(tmp_path / "out")
    assert set(ranks(tmp_path / "out").values()) == {5}
    assert any("--max-rank" in line for line in report.lines)
    told = extract(slow, budget="1MiB", max_rank=5).save(tmp_path / "told")
    assert not any("--max-rank" in line for line in told.lines)


def test_a_budget_goes_with_other_criteria(slow: Folders, tmp_path: Path) -> None:
    extract(slow, energy=0.3).save(tmp_path / "energy")
    extract(slow, energy=0.3, budget="1MiB").save(tmp_path / "both")
    assert ranks(tmp_path / "both") == ranks(tmp_path / "energy")


def test_an_unsaved_adapter_within_a_budget_can_be_merged(slow: Folders, tmp_path: Path) -> None:
    adapter = extract(slow, budget="40000")
    loratool.merge(slow.base, [(adapter, 1.0)]).save(tmp_path / "lazy")
    extract(slow, budget="40000").save(tmp_path / "adapter")
    loratool.merge(slow.base, [(tmp_path / "adapter", 1.0)]).save(tmp_path / "saved")
    lazy, late = (load_file(tmp_path / n / "model.safetensors") for n in ("lazy", "saved"))
    assert all(torch.equal(lazy[name], late[name]) for name in late)


@pytest.mark.parametrize("executor", ["serial", "threads:workers=3"])
def test_the_executor_changes_no_byte(slow: Folders, tmp_path: Path, executor: str) -> None:
    extract(slow, budget="40000").save(tmp_path / "one")
    extract(slow, budget="40000").save(tmp_path / "other", executor=executor)
    one, other = ((tmp_path / name / WEIGHTS).read_bytes() for name in ("one", "other"))
    assert one == other


# The ratio.


def test_the_ratio_keeps_what_is_not_much_smaller_than_the_largest(
    slow: Folders, tmp_path: Path
) -> None:
    extract(slow, ratio=4.0, max_rank=30).save(tmp_path / "out")
    base, tuned = (load_file(f / "model.safetensors") for f in (slow.base, slow.tuned))
    for name, rank in ranks(tmp_path / "out").items():
        sigma = torch.linalg.svdvals(tuned[name].double() - base[name].double())
        assert rank == min(30, int((sigma >= sigma[0] / 4).sum()))


# The noise floor.


def lora(base: Tensors, rank: int, size: float) -> Tensors:
    """The base with updates of one rank merged and rounded."""
    generator = torch.Generator().manual_seed(2)
    tuned = dict(base)
    for name, value in base.items():
        if value.ndim == 2:
            b = torch.randn(value.shape[0], rank, generator=generator)
            a = torch.randn(rank, value.shape[1], generator=generator)
            delta = size * value.float().std() / rank**0.5 * b @ a
            tuned[name] = (value.float() + delta).to(value.dtype)
    return tuned


@pytest.mark.parametrize("factorizer", ["krylov", "exact"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_rank_of_a_merged_and_rounded_update_is_found(
    tmp_path: Path, factorizer: str, dtype: torch.dtype
) -> None:
    base = projections(dtype)
    folders = saved(tmp_path, base, lora(base, 5, 0.02))
    extract(folders, noise_floor=True, factorizer=factorizer).save(tmp_path / "out")
    assert set(ranks(tmp_path / "out").values()) == {5}
    extract(folders, noise_floor=True, max_rank=3, factorizer=factorizer).save(tmp_path / "capped")
    assert set(ranks(tmp_path / "capped").values()) == {3}


def test_what_is_noise_alone_is_left_out_and_named(tmp_path: Path) -> None:
    base = projections()
    tuned = {name: value.bfloat16() for name, value in base.items()}
    frozen = "model.layers.0.mlp.up_proj.weight"
    changed = lora(base, 4, 0.05)
    for name in set(base) - {frozen}:
        tuned[name] = changed[name].bfloat16()
    folders = saved(tmp_path, base, tuned)
    report = extract(folders, noise_floor=True).save(tmp_path / "out")
    assert frozen not in ranks(tmp_path / "out")
    assert set(ranks(tmp_path / "out").values()) == {4}
    assert list(report.data["under_noise"]) == [frozen]
    assert any(frozen in line and "rounding" in line for line in report.lines)
    assert report.data["options"]["noise_floor"] is True


def test_noise_and_nothing_else_is_an_error(tmp_path: Path) -> None:
    base = projections()
    tuned = {name: value.bfloat16() for name, value in base.items()}
    folders = saved(tmp_path, base, tuned)
    with pytest.raises(InputError, match=r"rounding.*--noise-floor"):
        extract(folders, noise_floor=True).save(tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_of_fp32_it_says_that_nothing_lies_under_it(slow: Folders) -> None:
    assert any("--noise-floor" in note for note in extract(slow, noise_floor=True).notes)
    assert not any("--noise-floor" in note for note in extract(slow).notes)


def test_a_budget_above_the_noise(tmp_path: Path) -> None:
    base = projections(torch.bfloat16)
    folders = saved(tmp_path, base, lora(base, 5, 0.02))
    extract(folders, noise_floor=True, budget="1MiB").save(tmp_path / "out")
    assert set(ranks(tmp_path / "out").values()) == {5}


def test_nan_is_named_with_a_noise_floor_too(tmp_path: Path) -> None:
    base = projections(torch.bfloat16)
    tuned = lora(base, 5, 0.02)
    name = "model.layers.0.mlp.down_proj.weight"
    tuned[name][3, 4] = float("nan")
    folders = saved(tmp_path, base, tuned)
    for options in ({"noise_floor": True}, {"budget": "1MiB"}, {"ranks": (2, 4)}):
        with pytest.raises(InputError, match=f"{name}: holds NaN"):
            extract(folders, **options).save(tmp_path / "out")
        assert not (tmp_path / "out").exists()


# Several ranks.


@pytest.mark.parametrize("factorizer", ["krylov", "exact"])
def test_each_adapter_is_as_good_as_one_of_its_rank(
    slow: Folders, tmp_path: Path, factorizer: str
) -> None:
    base, tuned = (load_file(f / "model.safetensors") for f in (slow.base, slow.tuned))
    extract(slow, ranks=(2, 8, 24), factorizer=factorizer).save(tmp_path / "out")
    for rank in (2, 8, 24):
        folder = tmp_path / "out" / f"rank-{rank}"
        factors = load_file(folder / WEIGHTS)
        manifest = json.loads((folder / "loratool.json").read_text())
        assert manifest["options"]["rank"] == rank
        assert manifest["options"]["ranks"] == [2, 8, 24]
        assert f"of rank {rank}" in (folder / "README.md").read_text()
        for name, entry in manifest["tensors"].items():
            module = PREFIX + name.removesuffix(".weight")
            b, a = (factors[f"{module}.lora_{side}.weight"].double() for side in "BA")
            delta = tuned[name].double() - base[name].double()
            sigma = torch.linalg.svdvals(delta).square()
            captured = float(sigma.sum() - (delta - b @ a).square().sum())
            assert captured >= 0.999 * float(sigma[:rank].sum())
            assert entry["rank"] == rank
            assert entry["energy"] == pytest.approx(captured / float(sigma.sum()), abs=1e-4)


def test_the_largest_is_what_that_rank_alone_gives(tiny: Folders, tmp_path: Path) -> None:
    extract(tiny, ranks=(1, 2, 4)).save(tmp_path / "out")
    extract(tiny, rank=4).save(tmp_path / "alone")
    large = tmp_path / "out" / "rank-4"
    for file in (WEIGHTS, "adapter_config.json", "README.md"):
        assert (large / file).read_bytes() == (tmp_path / "alone" / file).read_bytes()
    ours, alone = (
        json.loads((f / "loratool.json").read_text()) for f in (large, tmp_path / "alone")
    )
    assert ours["tensors"] == alone["tensors"] and ours["base"] == alone["base"]
    for rank in (1, 2):
        small = load_file(tmp_path / "out" / f"rank-{rank}" / WEIGHTS)
        whole = load_file(large / WEIGHTS)
        assert (
            torch.equal(small[f"{PREFIX}{NORM}"], whole[f"{PREFIX}{NORM}"])
            if (f"{PREFIX}{NORM}" in small)
            else set(small) == set(whole)
        )
        assert (tmp_path / "out" / f"rank-{rank}" / "model" / "config.json").exists()


def test_every_tensor_is_read_for_one_adapter_only(
    tiny: Folders, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from loratool_plugins.factorizers.krylov import Krylov

    calls = []
    plain = Krylov.factorize_formed

    def counted(self: Krylov, *arguments: Any) -> Any:
        calls.append(1)
        return plain(self, *arguments)

    monkeypatch.setattr(Krylov, "factorize_formed", counted)
    extract(tiny, ranks=(1, 2, 4)).save(tmp_path / "out")
    assert len(calls) == 14


def test_one_of_several_can_be_used_by_itself(slow: Folders, tmp_path: Path) -> None:
    ladder = extract(slow, ranks=(2, 8))
    assert list(ladder.adapters) == [2, 8]
    ladder.adapters[2].save(tmp_path / "two")
    assert set(ranks(tmp_path / "two").values()) == {2}
    extract(slow, ranks=(2, 8)).save(tmp_path / "out")
    two = (tmp_path / "two" / WEIGHTS).read_bytes()
    assert two == (tmp_path / "out" / "rank-2" / WEIGHTS).read_bytes()


def test_all_adapters_appear_together_or_none(slow: Folders, tmp_path: Path) -> None:
    target = tmp_path / "out"
    extract(slow, ranks=(2, 4)).save(target)
    assert sorted(path.name for path in target.iterdir()) == ["rank-2", "rank-4"]
    with pytest.raises(OutputError, match="not empty"):
        extract(slow, ranks=(2, 4)).save(target)
    extract(slow, ranks=(8,)).save(target, overwrite=True)
    assert [path.name for path in target.iterdir()] == ["rank-8"]
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_failure_of_the_last_leaves_nothing(
    slow: Folders, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from loratool import ladder

    plain = ladder.write_adapter

    def failing(adapter: Any, writer: Any, folder: Path, *rest: Any) -> Any:
        if folder.name == "rank-4":
            raise LoratoolError("the disk is on fire")
        return plain(adapter, writer, folder, *rest)

    monkeypatch.setattr(ladder, "write_adapter", failing)
    with pytest.raises(LoratoolError, match="on fire"):
        extract(slow, ranks=(2, 4)).save(tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_experts_and_transposed_weights_keep_to_a_budget_and_come_in_several_ranks(
    tmp_path: Path,
) -> None:
    from tests.models import Recipe, make_pair

    settings = {"num_local_experts": 3, "num_experts_per_tok": 2}
    recipe = Recipe("mixtral", "MixtralForCausalLM", "MixtralForCausalLM", settings)
    from tests import models

    models.CONFIGS["mixtral"] = models.CONFIGS["mistral"]  # type: ignore[index]
    try:
        pair = make_pair(recipe, tmp_path)
    finally:
        del models.CONFIGS["mixtral"]  # type: ignore[attr-defined]
    both = Folders(pair.base, pair.tuned)
    report = extract(both, ranks=(1, 3)).save(tmp_path / "out")
    alone = extract(both, rank=3).save(tmp_path / "alone")
    large, single = (load_file(f / WEIGHTS) for f in (tmp_path / "out/rank-3", tmp_path / "alone"))
    assert all(torch.equal(large[name], single[name]) for name in single)
    assert any(e["kind"] == "experts" for e in alone.data["tensors"].values())
    assert set(report.data["adapters"]) == {"rank-1", "rank-3"}
    size = alone.data["totals"]["bytes"] // 2
    extract(both, budget=str(size), lora_only=True).save(tmp_path / "budget")
    assert tensor_bytes(tmp_path / "budget") <= size


# The command line.


def test_the_report_has_a_row_for_each_rank(slow: Folders, tmp_path: Path) -> None:
    done = command("extract", slow.base, slow.tuned, "--ranks", "2,8", "-o", tmp_path / "out")
    assert done.status == 0, done.err
    rows = [line.split() for line in done.out.splitlines()]
    shares = {row[0]: float(row[1].rstrip("%")) for row in rows if row and row[-1][:5] == "rank-"}
    assert set(shares) == {"2", "8"} and shares["2"] < shares["8"]
    assert "2 adapters" in done.out
    again = command(
        "extract", slow.base, slow.tuned, "--ranks", "2,8", "-o", tmp_path / "j", "--json"
    )
    assert set(again.data["adapters"]) == {"rank-2", "rank-8"}


@pytest.mark.parametrize(
    ("arguments", "status", "words"),
    [
        (["--ranks", "2,4", "--rank", "3", "--budget", "1MiB"], 2, ["--ranks", "--rank", "--bud"]),
        (["--ranks", "2,x"], 2, ["--ranks", "2,x"]),
        (["--max-rank", "3"], 2, ["--max-rank"]),
        (["--weigh", "relative"], 2, ["--weigh", "--budget"]),
        (["--budget", "lots"], 2, ["lots"]),
        (["--budget", "100B"], 1, ["100 B", "rank 1 of all 3 targets", "--target"]),
    ],
)
def test_bad_options_end_with_one_message(
    slow: Folders, tmp_path: Path, arguments: list[str], status: int, words: list[str]
) -> None:
    result = command("extract", slow.base, slow.tuned, "-o", tmp_path / "out", *arguments)
    assert result.status == status
    assert all(word in result.err for word in words)
    assert not (tmp_path / "out").exists()


def test_the_budget_is_told_with_what_was_spent(tiny: Folders, tmp_path: Path) -> None:
    assert CONFIG["hidden_size"] == 16 and UP in llama()
    done = command("extract", tiny.base, tiny.tuned, "--budget", "4KiB", "-o", tmp_path / "out")
    assert done.status == 0, done.err
    assert "kept whole: 64 B, of the 4.0 KiB allowed" in done.out


@pytest.mark.parametrize("options", [{"budget": "1MiB"}, {"ranks": (2, 4)}, {"noise_floor": True}])
def test_what_is_measured_by_outputs_is_not_cut_by_weights(
    slow: Folders, options: dict[str, Any]
) -> None:
    flag = next(iter(options)).replace("_", "-")
    with pytest.raises(UsageError, match=f"--calibrate .*--{flag}"):
        extract(slow, calibrate="texts.txt", **options)


@pytest.mark.parametrize("factorizer", ["auto", "rounding_cell"])
@pytest.mark.parametrize("options", [{"ranks": "2,4"}, {"budget": "1MiB"}])
def test_only_singular_value_decompositions_are_cut(
    slow: Folders, factorizer: str, options: dict[str, Any]
) -> None:
    (flag,) = options
    with pytest.raises(UsageError, match=f"--{flag} .*--factorizer {factorizer} "):
        extract(slow, factorizer=factorizer, **options)
