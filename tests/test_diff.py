"""diff tells what differs, in numbers that a dense computation confirms."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import loratool
from fixtures.weights import RXNFP_BASE, RXNFP_TUNED, fetch
from loratool.errors import InputError, MismatchError, UsageError
from loratool.noise import rounding_noise
from loratool.suspicion import rounding_energy
from loratool.updates import LowRank

Tensors = dict[str, torch.Tensor]


def random(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def model(seed: int = 0, dtype: torch.dtype = torch.bfloat16, side: int = 96) -> Tensors:
    tensors: Tensors = {"model.embed_tokens.weight": 0.02 * random(seed, 40, side)}
    for n in range(2):
        prefix = f"model.layers.{n}"
        for place, name in enumerate(("self_attn.q_proj", "self_attn.k_proj", "mlp.up_proj")):
            tensors[f"{prefix}.{name}.weight"] = 0.02 * random(
                100 * seed + 10 * n + place, side, side
            )
        tensors[f"{prefix}.input_layernorm.weight"] = torch.ones(side)
    tensors["model.norm.weight"] = torch.ones(side)
    return {name: value.to(dtype) for name, value in tensors.items()}


def save(folder: Path, tensors: Tensors, **settings: Any) -> Path:
    folder.mkdir(parents=True)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = {"model_type": "llama", "architectures": ["LlamaForCausalLM"],
              "tie_word_embeddings": True, **settings}  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def matrices(tensors: Tensors) -> list[str]:
    return [name for name in tensors if "proj" in name]


def with_lora(base: Tensors, rank: int, size: float) -> Tensors:
    """A merged LoRA of |delta| / |W| = size, rounded once to the base's type."""
    tuned = dict(base)
    for place, name in enumerate(matrices(base)):
        weight = base[name].float()
        delta = random(900 + place, len(weight), rank) @ random(950 + place, rank, weight.shape[1])
        delta *= size * weight.norm() / delta.norm()
        tuned[name] = (weight + delta).to(base[name].dtype)
    return tuned


def exact(base: Tensors, tuned: Tensors, name: str) -> np.ndarray:
    delta = tuned[name].double() - base[name].double()
    return np.linalg.svd(delta.numpy(), compute_uv=False)


# ---- laws


def test_a_model_does_not_differ_from_itself(tmp_path: Path) -> None:
    path = save(tmp_path / "m", model())
    report = loratool.diff(path, path)
    assert report.data["looks_like"] == "same"
    assert report.title.endswith("nothing differs")
    assert report.data["recommendation"] is None and report.table is None
    assert report.data["counts"] == {
        "tensors": 10, "changed": 0, "unchanged": 10, "new": 0, "resized": 0, "removed": 0,
    }  # fmt: skip
    assert all(facts["relative_norm"] == 0 for facts in report.data["tensors"].values())
    assert "nothing differs" in loratool.diff(path, path, quick=True).title


def test_the_same_values_in_another_type_do_not_differ(tmp_path: Path) -> None:
    base = model()
    wide = save(tmp_path / "wide", {name: value.float() for name, value in base.items()})
    report = loratool.diff(save(tmp_path / "base", base), wide)
    assert report.data["looks_like"] == "same"
    assert report.data["dtypes"] == {"BF16 to F32": 10}
    assert "types differ: BF16 to F32 (10 tensors)" in report.lines


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_every_number_is_what_fp64_says(tmp_path: Path, dtype: torch.dtype) -> None:
    base = model(dtype=dtype)
    tuned = {n: (v.float() + 0.001 * random(7, *v.shape)).to(dtype) for n, v in base.items()}
    data = loratool.diff(save(tmp_path / "b", base), save(tmp_path / "t", tuned)).data
    for name, facts in data["tensors"].items():
        before, after = base[name].double(), tuned[name].double()
        delta = after - before
        assert facts["changed"] == int((before != after).sum())
        assert facts["relative_norm"] == pytest.approx(
            float(delta.norm() / before.norm()), rel=1e-5
        )
        if "proj" not in name:
            assert "sigma" not in facts and not facts["factored"]
            continue
        sigma = exact(base, tuned, name)
        np.testing.assert_allclose(facts["sigma"], sigma[: len(facts["sigma"])], rtol=1e-4)
        energy = np.cumsum(sigma**2) / (sigma**2).sum()
        for share in (0.5, 0.9, 0.99):
            rank = int((energy < share).sum()) + 1
            assert facts["rank_for"][f"{share:g}"] == [rank, rank]
        p = sigma / sigma.sum()
        p = p[p > 0]
        assert facts["effective_rank"][0] == pytest.approx(math.exp(-(p * np.log(p)).sum()), 1e-3)
        assert facts["stable_rank"] == pytest.approx((sigma**2).sum() / sigma[0] ** 2, rel=1e-4)
        assert facts["is_whole"]
    totals = data["total"]
    assert totals["changed"] == sum(facts["changed"] for facts in data["tensors"].values())


def test_nothing_but_norms_depends_on_the_scale(tmp_path: Path) -> None:
    base = model(dtype=torch.float32)
    tuned = {name: value + 0.01 * random(5, *value.shape) for name, value in base.items()}
    reports = [
        loratool.diff(
            save(tmp_path / f"b{factor}", {n: v * factor for n, v in base.items()}),
            save(tmp_path / f"t{factor}", {n: v * factor for n, v in tuned.items()}),
        ).data
        for factor in (1, 2**-10)
    ]
    for name, facts in reports[0]["tensors"].items():
        other = reports[1]["tensors"][name]
        for key in ("relative_norm", "changed", "rank_for", "effective_rank", "above_noise"):
            if key not in facts or key == "rank_for":
                assert facts.get(key) == other.get(key)
            else:
                assert facts[key] == pytest.approx(other[key], rel=1e-6), key
    assert reports[0]["recommendation"]["rank"] == reports[1]["recommendation"]["rank"]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_merged_lora_is_recognised_with_its_rank(tmp_path: Path, dtype: torch.dtype) -> None:
    base = model(dtype=dtype)
    tuned = with_lora(base, rank=6, size=0.05)
    paths = save(tmp_path / "b", base), save(tmp_path / "t", tuned)
    report = loratool.diff(*paths)
    data = report.data
    assert (data["looks_like"], data["merged_rank"]) == ("merged_lora", 6)
    assert data["recommendation"]["rank"] == 6
    assert "looks like a merged LoRA of rank 6" in report.title
    for name in matrices(base):
        facts = data["tensors"][name]
        assert facts["above_noise"] == [6, 6] and facts["merged_rank"] == 6
        assert facts["rank_for"]["0.9"][0] <= 6
    command = f"loratool extract {paths[0]} {paths[1]} --rank 6"
    if dtype == torch.bfloat16:  # fp32 rounds too little to find anything in its cells
        command += " --factorizer rounding_cell"
    assert data["recommendation"]["command"] == command


def test_what_rounding_hides_may_be_a_merged_lora(tmp_path: Path) -> None:
    base = model()
    paths = save(tmp_path / "b", base), save(tmp_path / "t", with_lora(base, 8, 5e-4))
    report = loratool.diff(*paths)
    assert report.data["looks_like"] == "sparse" and report.data["may_be_merged_lora"]
    assert any("perhaps a merged LoRA" in line for line in report.lines)
    extracted = loratool.extract(*paths).save(tmp_path / "out")
    (line,) = [line for line in extracted.lines if "too small to tell" in line]
    assert "`--factorizer auto`" in line and "--rank 1 --sparse" in line
    assert not any("wrong tool" in line for line in extracted.lines)


def test_full_fine_tuning_is_no_lora(tmp_path: Path) -> None:
    base = model()
    tuned = {n: (v.float() + 0.002 * random(3, *v.shape)).bfloat16() for n, v in base.items()}
    data = loratool.diff(save(tmp_path / "b", base), save(tmp_path / "t", tuned)).data
    assert data["looks_like"] == "full" and data["merged_rank"] is None
    assert not data["may_be_merged_lora"]


def test_a_sparse_update_is_recognised(tmp_path: Path) -> None:
    base = model()
    tuned = dict(base)
    for name in matrices(base):
        mask = random(8, *base[name].shape) > 2
        tuned[name] = torch.where(mask, base[name] * 2, base[name])
    report = loratool.diff(save(tmp_path / "b", base), save(tmp_path / "t", tuned))
    assert report.data["looks_like"] == "sparse"
    assert any("wrong tool" in line for line in report.lines)
    recommended = report.data["recommendation"]
    assert recommended["command"].endswith(f"--rank 1 --sparse {recommended['sparse']:g}")
    made = loratool.extract(
        tmp_path / "b", tmp_path / "t", rank=1, sparse=recommended["sparse"]
    ).save(tmp_path / "adapter")
    assert made.data["totals"]["energy"] == pytest.approx(recommended["energy"], abs=0.05)
    files = sum(path.stat().st_size for path in (tmp_path / "adapter").glob("*.safetensors"))
    assert files == pytest.approx(recommended["bytes"], rel=0.1, abs=4096)


def test_a_part_of_the_spectrum_is_told_as_such(tmp_path: Path) -> None:
    base = model(dtype=torch.float32, side=320)
    tuned = {name: value + 0.01 * random(4, *value.shape) for name, value in base.items()}
    paths = save(tmp_path / "b", base), save(tmp_path / "t", tuned)
    some, whole = (loratool.diff(*paths, max_rank=rank) for rank in (4, 320))
    assert some.table is not None and some.table.rows[0][-3:-1] == ("> 4", "> 4")
    for name in matrices(base):
        part, full = some.data["tensors"][name], whole.data["tensors"][name]
        assert len(part["sigma"]) == 4 and not part["is_whole"]
        for share, (low, high) in part["rank_for"].items():
            truth = full["rank_for"][share][0]
            assert full["rank_for"][share][1] == truth
            assert low <= truth <= high
        low, high = part["effective_rank"]
        assert low <= full["effective_rank"][0] <= high
    low, high = some.data["rank_for"]["0.9"]
    assert low <= whole.data["rank_for"]["0.9"][0] <= high
    assert any(f"90% needs rank {low} to {high}" in line for line in some.lines)


def test_quick_reads_no_spectra(tmp_path: Path) -> None:
    base = model()
    paths = save(tmp_path / "b", base), save(tmp_path / "t", with_lora(base, 2, 0.1))
    quick, slow = loratool.diff(*paths, quick=True).data, loratool.diff(*paths).data
    assert quick["looks_like"] == "unknown" and quick["recommendation"] is None
    for name, facts in quick["tensors"].items():
        assert "sigma" not in facts
        assert facts["relative_norm"] == slow["tensors"][name]["relative_norm"]


# ---- rounding


def test_the_noise_is_that_of_the_noise_floor_of_extract(tmp_path: Path) -> None:
    base = model()
    paths = save(tmp_path / "b", base), save(tmp_path / "t", tuned := with_lora(base, 6, 0.02))
    data = loratool.diff(*paths).data
    for name in matrices(base):
        noise = rounding_noise(tuned[name].float() - base[name].float(), tuned[name])
        assert data["tensors"][name]["noise_edge"] == pytest.approx(noise.edge)
        assert data["tensors"][name]["rounding_norm"] == pytest.approx(math.sqrt(noise.energy))
    adapter = loratool.extract(*paths, rank=64, noise_floor=True)
    for name in matrices(base):
        update = adapter[name].load()
        assert isinstance(update, LowRank)
        assert data["tensors"][name]["above_noise"] == [update.rank] * 2


def test_rows_and_columns_of_other_sizes_add_hardly_any_rank(tmp_path: Path) -> None:
    base = model(side=192)
    for name in matrices(base):
        sizes = torch.exp(0.7 * random(1, 192, 1)) * torch.exp(0.7 * random(2, 1, 192))
        base[name] = (base[name].float() * sizes).bfloat16()
    data = loratool.diff(
        save(tmp_path / "b", base), save(tmp_path / "t", tuned := with_lora(base, 8, 0.05))
    ).data
    for name in matrices(base):
        above = data["tensors"][name]["above_noise"][0]
        assert 8 <= above <= 9  # the model of the variances is a product, which these are nearly
        spread = rounding_energy(tuned[name]) ** 0.5 / 192 * 2 * 192**0.5  # one variance for all
        assert sum(value > spread for value in data["tensors"][name]["sigma"]) > above


def test_a_flat_spectrum_is_not_given_a_tiny_rank(tmp_path: Path) -> None:
    base = model()
    tuned = {n: (v.float() + 0.002 * random(3, *v.shape)).bfloat16() for n, v in base.items()}
    paths = save(tmp_path / "b", base), save(tmp_path / "t", tuned)
    assert loratool.diff(*paths, exclude=["*norm*"]).data["recommendation"]["rank"] >= 32


# ---- what is not in both


def test_new_removed_and_resized_tensors(tmp_path: Path) -> None:
    base = model()
    tuned = dict(base)
    tuned["model.embed_tokens.weight"] = torch.cat([base["model.embed_tokens.weight"]] * 2)
    tuned["score.weight"] = random(1, 3, 96).bfloat16()
    del tuned["model.norm.weight"]
    settings = {"architectures": ["LlamaForSequenceClassification"]}
    report = loratool.diff(save(tmp_path / "b", base), save(tmp_path / "t", tuned, **settings))
    counts = report.data["counts"]
    assert (counts["new"], counts["resized"], counts["removed"]) == (1, 1, 1)
    assert report.data["removed"] == ["model.norm.weight"]
    assert report.data["tensors"]["score.weight"]["relative_norm"] is None
    assert "1 tensor the base does not have: score.weight" in report.lines
    assert "resized: model.embed_tokens.weight: 40x96 in the base, 80x96 here" in report.lines
    assert report.data["looks_like"] == "whole"


def test_changed_vectors_are_told_with_their_size(tmp_path: Path) -> None:
    base = model()
    tuned = {**base, "model.norm.weight": base["model.norm.weight"] * 1.5}
    report = loratool.diff(save(tmp_path / "b", base), save(tmp_path / "t", tuned))
    assert report.data["tensors"]["model.norm.weight"]["relative_norm"] == pytest.approx(0.5)
    assert report.table is not None
    assert [row[0] for row in report.table.rows] == ["model.norm"]
    assert report.data["looks_like"] == "whole"


def test_selections_go_into_the_command(tmp_path: Path) -> None:
    base = model()
    paths = save(tmp_path / "b", base), save(tmp_path / "t", with_lora(base, 2, 0.1))
    data = loratool.diff(*paths, target=["*.q_proj", "*.k_proj"], exclude=["*.1.*"]).data
    assert set(data["tensors"]) == {
        f"model.layers.0.self_attn.{matrix}_proj.weight" for matrix in "qk"
    }
    assert (
        "--target '*.q_proj' --target '*.k_proj' --exclude '*.1.*'"
        in (data["recommendation"]["command"])
    )


# ---- bad input


def test_not_a_number_is_named(tmp_path: Path) -> None:
    base = model()
    for name in ("model.layers.1.mlp.up_proj.weight", "model.norm.weight"):
        tuned = {**base, name: base[name].clone()}
        tuned[name].view(-1)[3] = math.nan
        folder = save(tmp_path / name, tuned)
        with pytest.raises(InputError, match=f"{name}: holds NaN or Inf"):
            loratool.diff(save(tmp_path / f"b{name}", base), folder)
        assert loratool.diff(folder, folder, exclude=[name]).data["looks_like"] == "same"


def test_other_architectures_are_refused(tmp_path: Path) -> None:
    one, other = save(tmp_path / "a", model()), save(tmp_path / "b", model(side=64))
    with pytest.raises(MismatchError, match="differ in shape"):
        loratool.diff(one, other)
    with pytest.raises(InputError, match="no tensor is left"):
        loratool.diff(one, one, target=["nothing"])
    with pytest.raises(UsageError, match="--max-rank"):
        loratool.diff(one, one, max_rank=0)


# ---- a real pair


@pytest.fixture(scope="module")
def real() -> Any:
    fetch()
    return loratool.diff(RXNFP_BASE, RXNFP_TUNED)


def test_a_real_pair_is_a_full_fine_tune(real: Any) -> None:
    data = real.data
    assert data["looks_like"] == "full"
    assert data["counts"]["new"] == 2 and data["counts"]["removed"] == 8
    assert data["rank_for"]["0.9"] == [37, 37]
    assert data["recommendation"]["rank"] == 40
    layers = {facts["layer"] for facts in data["tensors"].values()}
    assert layers == {None, *range(12)}
    json.dumps(data, allow_nan=False)


def test_what_is_recommended_is_what_extract_makes(real: Any, tmp_path: Path) -> None:
    recommended = real.data["recommendation"]
    rank = recommended["rank"]
    report = loratool.extract(RXNFP_BASE, RXNFP_TUNED, rank=rank).save(tmp_path / "adapter")
    assert report.data["totals"]["energy"] == pytest.approx(recommended["energy"], abs=1e-3)
    weights = tmp_path / "adapter" / "adapter_model.safetensors"
    assert weights.stat().st_size == pytest.approx(recommended["bytes"], rel=0.02)
