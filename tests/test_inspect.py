"""inspect tells what is there, in numbers that a dense computation confirms."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

import loratool
from loratool.adapter import LazyUpdate
from loratool.checkpoint import Checkpoint
from loratool.digests import TensorDigest, combine_digests
from loratool.dtypes import dtype_name
from loratool.measures import measure
from loratool.reports import bar, format_count, listed, sparkline
from loratool.safetensors_file import lazy_tensors, read_header
from loratool.update_measures import measure_update
from loratool.updates import LowRank
from tests.adapters import PREFIX, Factors, config, factors, stored, write_adapter

common = settings(derandomize=True, deadline=None, max_examples=60)


@pytest.fixture
def modules() -> dict[str, Factors]:
    return {
        "layers.0.up_proj": factors(1, 10, 8, 3),
        "layers.1.up_proj": factors(2, 10, 8, 3, torch.bfloat16),
        "layers.1.down_proj": factors(3, 8, 10, 2),
    }


@pytest.fixture
def folder(tmp_path: Path, modules: dict[str, Factors]) -> Path:
    return write_adapter(
        tmp_path / "adapter",
        modules,
        {"norm.weight": torch.full((8,), 2.0)},
        lora_alpha=6,
        alpha_pattern={"layers.1.up_proj": 12},
        modules_to_save=["norm"],
        task_type="CAUSAL_LM",
        base_model_name_or_path="org/base",
    )


def digest_of(tensor: torch.Tensor) -> str:
    digest = TensorDigest(dtype_name(tensor.dtype), tuple(tensor.shape))
    digest.update(tensor)
    return digest.hexdigest()


# ---- adapters


def test_54_parameters_against_80(tmp_path: Path) -> None:
    path = write_adapter(tmp_path / "a", {"layer": factors(0, 10, 8, 3)})
    report = loratool.inspect(path)
    assert (report.data["parameters"], report.data["dense_parameters"]) == (54, 80)
    assert report.data["updates"]["layer.weight"]["parameters"] == 54
    assert "parameters: 54 against 80 of the whole matrices (67.50%)" in report.lines
    assert report.table is not None
    assert report.table.rows[0][:4] == ("layer", "10x8", "3", "54/80")


def test_the_numbers_of_every_update(folder: Path, modules: dict[str, Factors]) -> None:
    data = loratool.inspect(folder).data
    scales = {"layers.0.up_proj": 2.0, "layers.1.up_proj": 4.0, "layers.1.down_proj": 3.0}
    alphas = {"layers.0.up_proj": 6, "layers.1.up_proj": 12, "layers.1.down_proj": 6}
    total = 0.0
    for module, (b, a) in modules.items():
        found = data["updates"][f"{module}.weight"]
        dense = scales[module] * b.double().numpy() @ a.double().numpy()
        sigma = np.linalg.svd(dense, compute_uv=False)[: a.shape[0]]
        total += float((dense**2).sum())
        np.testing.assert_allclose(found["sigma"], sigma, rtol=1e-12)
        np.testing.assert_allclose(found["energies"], sigma**2 / (sigma**2).sum(), rtol=1e-12)
        assert math.isclose(found["norm"], np.linalg.norm(dense), rel_tol=1e-12)
        assert math.isclose(sum(found["energies"]), 1, rel_tol=1e-12)
        shares = np.cumsum(sigma**2) / (sigma**2).sum()
        assert found["effective_rank"] == {
            "0.9": int((shares < 0.9).sum()) + 1, "0.99": int((shares < 0.99).sum()) + 1,
        }  # fmt: skip
        assert (found["scale"], found["alpha"]) == (scales[module], alphas[module])
        assert found["shape"] == list(dense.shape)
        assert found["rank"] == a.shape[0]
        assert found["bytes"] == a.nbytes + b.nbytes
        assert found["digests"][f"{PREFIX}{module}.lora_A.weight"] == digest_of(a)
    assert math.isclose(data["norm"], math.sqrt(total), rel_tol=1e-12)


def test_the_adapter_as_a_whole(folder: Path) -> None:
    report = loratool.inspect(folder)
    data = report.data
    assert (data["kind"], data["of"], data["format"]) == ("inspection", "adapter", "peft")
    assert data["path"] == str(folder)
    assert data["base"] == {"name": "org/base", "digest": None}
    assert (data["task_type"], data["rslora"]) == ("CAUSAL_LM", False)
    assert data["counts"] == {"low_rank": 3, "replaced": 1, "others": 0, "dropped": 0}
    assert data["ranks"] == [{"value": 2, "count": 1}, {"value": 3, "count": 2}]
    assert data["alphas"] == [{"value": 6, "count": 2}, {"value": 12, "count": 1}]
    assert [entry["value"] for entry in data["scales"]] == [2, 3, 4]
    assert data["parameters"] == 54 + 54 + 36
    assert data["dense_parameters"] == 240
    assert data["replaced_parameters"] == 8
    assert data["singular_values"] == 8
    assert data["dtypes"]["F32"]["tensors"] == 5
    assert data["dtypes"]["BF16"] == {"tensors": 2, "parameters": 54, "bytes": 108}
    assert data["files"].keys() == {"adapter_config.json", "adapter_model.safetensors"}
    assert data["problems"] == [] and report.notes == ()
    norm = data["replaced"]["norm.weight"]
    assert math.isclose(norm["norm"], 2 * math.sqrt(8), rel_tol=1e-6)
    digests = {name: digest_of(value) for name, value in stored(folder).items()}
    assert data["digest"] == combine_digests(digests)
    assert report.ok
    json.dumps(data, allow_nan=False)


def test_the_lines_for_people(folder: Path) -> None:
    lines = loratool.inspect(folder).lines
    for line in (
        "format: peft",
        "base: org/base",
        "task: CAUSAL_LM",
        "3 low-rank updates, 1 tensor kept whole",
        "rank: 2 (1 update), 3 (2 updates)",
        "alpha: 6 (2 updates), 12 (1 update)",
        "parameters: 144 against 240 of the whole matrices (60.00%)",
        "kept whole: 8 parameters (norm.weight)",
        "types: F32 (5 tensors), BF16 (2 tensors)",
    ):
        assert line in lines


def test_rslora_is_told_and_its_alpha_is_the_config_s(tmp_path: Path) -> None:
    path = write_adapter(tmp_path / "a", {"m": factors(0, 6, 5, 3)}, lora_alpha=16, use_rslora=True)
    report = loratool.inspect(path)
    found = report.data["updates"]["m.weight"]
    assert report.data["rslora"] is True
    assert found["alpha"] == 16
    assert found["scale"] == 16 / math.sqrt(3)
    assert any("rsLoRA" in line for line in report.lines)


def test_the_digest_is_of_the_tensors_alone(folder: Path) -> None:
    before = loratool.inspect(folder).data["digest"]
    settings = {**config(folder), "lora_dropout": 0.5}
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    assert loratool.inspect(folder).data["digest"] == before
    tensors = stored(folder)
    tensors[f"{PREFIX}norm.weight"][0] += 1
    save_file(tensors, folder / "adapter_model.safetensors")
    assert loratool.inspect(folder).data["digest"] != before


def test_the_manifest_is_told_without_its_tensors(folder: Path) -> None:
    manifest = {
        "loratool": "9.9",
        "options": {"rank": 3, "energy": None, "seed": 0, "lora_only": False},
        "totals": {"energy": 0.75},
        "tensors": {"x": {}},
        "base": {"digest": "ab" * 32, "tensors": {"x": "00"}, "bytes": 7},
    }
    (folder / "loratool.json").write_text(json.dumps(manifest))
    report = loratool.inspect(folder)
    assert report.data["base"] == {"name": "org/base", "digest": "ab" * 32}
    assert "tensors" not in report.data["manifest"]
    assert report.data["manifest"]["base"] == {"digest": "ab" * 32, "bytes": 7}
    assert "base: org/base (digest abababababababab)" in report.lines
    assert "made by: loratool 9.9 (rank 3, seed 0)" in report.lines
    assert "energy captured when it was made: 75.00%" in report.lines


@pytest.mark.parametrize(
    "manifest", [{}, {"options": 3, "totals": [], "base": "x"}, {"totals": {"energy": "all"}}]
)
def test_a_strange_manifest_is_no_reason_to_fail(manifest: dict[str, Any], folder: Path) -> None:
    (folder / "loratool.json").write_text(json.dumps(manifest))
    assert loratool.inspect(folder).data["base"]["digest"] is None


def test_problems_are_told_and_the_rest_is_shown(
    tmp_path: Path, modules: dict[str, Factors]
) -> None:
    b, a = factors(4, 6, 5, 2)
    b[1, 1] = math.nan
    broken = {**modules, "bad": (b, a), "odd": (torch.ones(4, 3), torch.ones(2, 5))}
    path = write_adapter(tmp_path / "a", broken)
    tensors = stored(path)
    del tensors[f"{PREFIX}layers.0.up_proj.lora_A.weight"]
    save_file({**tensors, "stray": torch.ones(1)}, path / "adapter_model.safetensors")
    report = loratool.inspect(path)
    notes = "\n".join(report.notes)
    for words in ("stray", "layers.0.up_proj", "missing", "bad.weight: holds NaN or Inf",
                  "different ranks"):  # fmt: skip
        assert words in notes
    assert report.data["updates"]["bad.weight"]["norm"] is None
    assert "odd.weight" not in report.data["updates"]
    assert report.data["updates"]["layers.1.up_proj.weight"]["norm"] > 0
    assert len(report.data["problems"]) >= 4
    json.dumps(report.data, allow_nan=False)
    assert report.ok


def test_many_problems_are_counted(folder: Path) -> None:
    strays = {f"stray{number}": torch.ones(1) for number in range(30)}
    save_file({**stored(folder), **strays}, folder / "adapter_model.safetensors")
    report = loratool.inspect(folder)
    assert len(report.notes) == 11
    assert "20 more problems" in report.notes[-1]
    assert len(report.data["problems"]) == 30


@pytest.mark.parametrize("shape", [(0, 5), (4, 0)])
def test_empty_factors_are_told(shape: tuple[int, int], tmp_path: Path) -> None:
    path = write_adapter(tmp_path / "a", {"m": (torch.ones(shape[0], 2), torch.ones(2, shape[1]))})
    assert "its factors are empty" in loratool.inspect(path).notes[0]


def test_the_largest_updates_are_listed_first(tmp_path: Path) -> None:
    found = {f"m{n}": (n * torch.ones(4, 1), torch.ones(1, 3)) for n in range(25)}
    path = write_adapter(tmp_path / "a", found)
    report = loratool.inspect(path)
    assert report.table is not None
    assert [row[0] for row in report.table.rows] == [f"m{n}" for n in range(24, 4, -1)]
    assert "listed: the 20 largest of 25 updates; --all lists every one" in report.lines
    assert report.table.rows[0][5] == "█" * 10
    whole = loratool.inspect(path, all=True)
    assert whole.table is not None and len(whole.table.rows) == 25
    assert not any(line.startswith("listed") for line in whole.lines)
    assert whole.data == report.data
    assert len(report.data["updates"]) == 25


def test_a_zero_update_has_no_bars(tmp_path: Path) -> None:
    path = write_adapter(tmp_path / "a", {"m": (torch.zeros(4, 2), torch.ones(2, 3))})
    report = loratool.inspect(path)
    assert report.data["norm"] == 0
    assert set(report.data["updates"]["m.weight"]["energies"]) == {0.0}
    assert report.table is not None
    assert report.table.rows[0][5] == report.table.rows[0][-1] == ""


def test_a_computed_adapter_can_be_inspected(folder: Path) -> None:
    data = loratool.inspect(loratool.rescale(folder, by=2)).data
    assert data["path"] is None and data["format"] is None
    assert math.isclose(data["norm"], 2 * loratool.inspect(folder).data["norm"], rel_tol=1e-12)


# ---- checkpoints


@pytest.fixture
def model(tmp_path: Path) -> Path:
    path = tmp_path / "model"
    path.mkdir()
    tensors = {
        f"layers.{n}.proj.weight": torch.full((6, 4), n + 1.0, dtype=torch.bfloat16)
        for n in range(12)
    }
    tensors |= {"embed.weight": torch.ones(30, 4), "head.weight": torch.ones(30, 4)}
    tensors |= {"ids": torch.arange(7), "layers.0.norm.weight": torch.ones(4)}
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    settings = {"architectures": ["LlamaForCausalLM"], "model_type": "llama",
                "tie_word_embeddings": True}  # fmt: skip
    (path / "config.json").write_text(json.dumps(settings))
    (path / "tokenizer.json").write_text("{}")
    return path


def test_a_checkpoint_by_headers(model: Path) -> None:
    report = loratool.inspect(model)
    data = report.data
    assert (data["kind"], data["of"], data["format"]) == ("inspection", "checkpoint", "safetensors")
    assert (data["architecture"], data["model_type"]) == ("LlamaForCausalLM", "llama")
    assert data["tie_word_embeddings"] is True
    assert data["counts"] == {"tensors": 16, "files": 1}
    assert data["parameters"] == 12 * 24 + 240 + 7 + 4
    assert data["bytes"] == 12 * 48 + 960 + 56 + 16
    assert data["dtypes"]["BF16"] == {"tensors": 12, "parameters": 288, "bytes": 576}
    assert list(data["dtypes"]) == ["F32", "BF16", "I64"]
    assert data["files"] == {"model.safetensors": data["bytes"]}
    assert data["side_files"] == ["config.json", "tokenizer.json"]
    assert data["tensors"]["layers.3.proj.weight"] == {
        "shape": [6, 4], "dtype": "BF16", "bytes": 48, "file": "model.safetensors",
    }  # fmt: skip
    assert "digest" not in data
    assert "16 tensors, 539 parameters (539)" in report.lines


def test_layers_share_a_row_in_the_table(model: Path) -> None:
    report = loratool.inspect(model)
    assert report.table is not None
    rows = {row[0]: row for row in report.table.rows}
    assert rows["layers.*.proj.weight"][1:5] == ("6x4", "BF16", "12", "576 B")
    assert next(iter(rows)) == "layers.*.proj.weight"
    assert rows["embed.weight"][3] == "1"
    assert len(rows) == 5
    names = {row[0] for row in loratool.inspect(model, all=True).table.rows}  # type: ignore[union-attr]
    assert names == set(report.data["tensors"])


def test_many_kinds_of_tensors_are_summed_up(tmp_path: Path) -> None:
    found = {f"t{'x' * n}.weight": torch.ones(n + 1) for n in range(30)}
    save_file(found, tmp_path / "m.safetensors")
    table = loratool.inspect(tmp_path / "m.safetensors").table
    assert table is not None
    assert len(table.rows) == 21
    assert table.rows[-1][0] == "(all others)"
    assert table.rows[-1][3] == "10"


def test_a_deep_look_adds_norms_and_digests(model: Path) -> None:
    report = loratool.inspect(model, deep=True)
    tensors = report.data["tensors"]
    assert math.isclose(tensors["layers.2.proj.weight"]["norm"], 3 * math.sqrt(24), rel_tol=1e-6)
    assert tensors["ids"]["norm"] is None
    assert tensors["ids"]["digest"] == digest_of(torch.arange(7))
    assert report.data["digest"] == combine_digests(
        {name: facts["digest"] for name, facts in tensors.items()}
    )
    assert report.data["duplicates"] == [["embed.weight", "head.weight"]]
    assert "the same values: embed.weight = head.weight" in report.lines
    assert report.table is not None and report.table.columns[-2:] == ("norm", "digest")


def test_a_deep_look_names_what_is_not_finite(tmp_path: Path) -> None:
    value = torch.ones(5)
    value[2] = math.nan
    save_file({"a": torch.ones(3), "b": value}, tmp_path / "m.safetensors")
    report = loratool.inspect(tmp_path / "m.safetensors", deep=True)
    assert report.notes == ("b: holds NaN or Inf",)
    assert report.data["not_finite"] == ["b"]


def test_the_factors_file_of_an_adapter_is_recognised(folder: Path) -> None:
    report = loratool.inspect(folder / "adapter_model.safetensors")
    assert report.data["of"] == "checkpoint"
    assert any(f"name its directory, {folder}" in note for note in report.notes)


@pytest.mark.parametrize(
    "settings", [{"architectures": "Llama", "model_type": 3}, {"architectures": [1, None]}, {}]
)
def test_a_strange_config_is_no_reason_to_fail(settings: dict[str, Any], model: Path) -> None:
    (model / "config.json").write_text(json.dumps(settings))
    report = loratool.inspect(model)
    assert (report.data["architecture"], report.data["model_type"]) == (None, None)
    assert "architecture: config.json does not say" in report.lines


def test_a_torch_file_and_its_aliases(tmp_path: Path) -> None:
    value = torch.ones(4, 3)
    torch.save({"a.weight": value, "b.weight": value}, tmp_path / "m.bin")
    report = loratool.inspect(tmp_path / "m.bin")
    assert report.data["format"] == "torch"
    assert report.data["aliases"] == {"b.weight": "a.weight"}
    assert "the same memory: b.weight = a.weight" in report.lines


def test_an_empty_checkpoint_can_be_described() -> None:
    assert loratool.inspect(Checkpoint({})).data["counts"] == {"tensors": 0, "files": 0}


# ---- measures


@common
@given(
    seed=st.integers(0, 10_000),
    sides=st.tuples(st.integers(1, 12), st.integers(1, 12), st.integers(1, 8)),
    power=st.integers(-60, 60),
    dtype=st.sampled_from([torch.float64, torch.float32, torch.bfloat16]),
)
def test_spectra_of_any_size_and_magnitude(
    seed: int, sides: tuple[int, int, int], power: int, dtype: torch.dtype
) -> None:
    b, a = factors(seed, *sides, dtype)
    b = torch.ldexp(b, torch.tensor(power)).to(dtype)
    shape = (sides[0], sides[1])
    update = LazyUpdate("m", "low_rank", shape, dtype_name(dtype), lambda: LowRank(a, b, 0.5))
    found = measure_update(update)
    dense = 0.5 * b.double() @ a.double()
    exact = torch.linalg.svdvals(dense)
    assert math.isclose(sum(found.energies), 1, rel_tol=1e-12)
    assert found.norm is not None
    assert math.isclose(found.norm, float(dense.norm()), rel_tol=1e-12)
    sigma = torch.tensor(found.sigma, dtype=torch.float64)
    assert torch.allclose(sigma, exact[: len(sigma)], rtol=0, atol=1e-12 * float(exact[0]))


@pytest.mark.parametrize("magnitude", [1e-30, 1e-12, 1.0, 1e15, 1e30])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_norms_of_any_magnitude(magnitude: float, dtype: torch.dtype, tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    value = (magnitude * torch.randn(700, 900, generator=generator, dtype=torch.float64)).to(dtype)
    save_file({"v": value}, tmp_path / "v.safetensors")
    tensor = lazy_tensors(tmp_path / "v.safetensors", read_header(tmp_path / "v.safetensors"))["v"]
    found = measure(tensor)
    assert found.norm is not None
    assert math.isclose(found.norm, float(value.double().norm()), rel_tol=1e-6)
    assert found.digest == digest_of(value)


# ---- words


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0"), (54, "54"), (9999, "9999"), (10_000, "10.0k"), (12_345, "12.3k"),
     (999_949, "1.00M"), (167_936, "168k"), (45_088_768, "45.1M"), (6_738_415_616, "6.74B"),
     (70_000_000_000, "70.0B"), (1_500_000_000_000, "1.50T")],
)  # fmt: skip
def test_counts_in_few_digits(count: int, text: str) -> None:
    assert format_count(count) == text


@pytest.mark.parametrize(
    ("share", "text"),
    [(0.0, ""), (1e-9, "▏"), (0.5, "█████"), (0.55, "█████▌"), (1.0, "█" * 10),
     (math.nan, ""), (-1.0, ""), (1.5, "")],
)  # fmt: skip
def test_bars(share: float, text: str) -> None:
    assert bar(share) == text


@common
@given(share=st.floats(0, 1), width=st.integers(1, 30))
def test_bars_grow_with_their_share(share: float, width: int) -> None:
    assert len(bar(share, width)) <= width
    assert bool(bar(share, width)) == (share > 0)


def test_sparklines() -> None:
    assert sparkline([]) == sparkline([0.0, 0.0]) == sparkline([math.nan]) == ""
    assert sparkline([1.0]) == "█"
    assert sparkline([8.0, 4.0, 1.0, 0.0]) == "█▅▂▁"
    assert len(sparkline([1.0 / n for n in range(1, 100)])) == 8


def test_lists() -> None:
    assert listed(["a", "b"], 2) == "a, b"
    assert listed(["a", "b", "c", "d"], 2) == "a, b, and 2 more"
