"""loratool diff: a table and a verdict for people, JSON for machines, nothing written."""

from __future__ import annotations

import math
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest
import torch

from loratool.cli.output import ProgressBar
from tests.cli.test_inspect import run_in_terminal
from tests.cli.tiny import NORM, UP, Tensors, done, loratool, names, refused, save_model, unchanged


def test_the_table_and_the_verdict(base: Path, tuned: Path) -> None:
    text = done(loratool("diff", base, tuned)).out
    assert f"{tuned} against {base}: looks like a merged LoRA of rank 2" in text
    for words in ("model.layers.*.self_attn.q_proj", "above noise", "linear weights: 14 of",
                  "90% needs rank 2", f"loratool extract {base} {tuned} --rank 2"):  # fmt: skip
        assert words in text
    assert "input_layernorm" not in text  # it does not differ
    every = done(loratool("diff", base, tuned, "--all")).out
    assert UP.removesuffix(".weight") in every


def test_the_recommended_command_does_what_it_says(base: Path, tuned: Path, tmp_path: Path) -> None:
    found = done(loratool("diff", base, tuned, "--json")).data["recommendation"]
    words = found["command"].split()
    report = done(loratool(*words[1:], "-o", tmp_path / "adapter", "--json")).data
    assert math.isclose(report["totals"]["energy"], found["energy"], abs_tol=1e-4)


def test_json_is_all_there_is(base: Path, tuned: Path) -> None:
    found = done(loratool("diff", base, tuned, "--json"))
    assert found.err == ""
    data = found.data
    assert data["kind"] == "difference"
    assert data.keys() == {
        "kind", "base", "finetuned", "max_rank", "counts", "looks_like", "merged_rank",
        "may_be_merged_lora",
        "energy_by_rank", "rank_for", "whole_bytes", "representation", "recommendation", "total",
        "kinds", "rows", "tensors", "removed", "dtypes",
    }  # fmt: skip
    assert data["tensors"][UP].keys() == {
        "kind", "row", "label", "layer", "shape", "base_shape", "dtype", "base_dtype", "factored",
        "relative_norm", "norm", "changed", "changed_share", "rounding_norm", "sigma",
        "singular_values", "is_whole", "known_energy", "stable_rank", "effective_rank", "rank_for",
        "noise_edge", "above_noise", "merged_rank",
    }  # fmt: skip
    assert data["tensors"][NORM]["relative_norm"] > 0
    assert done(loratool("diff", base, tuned, "--json", "--executor", "serial")).data == data


def test_a_model_and_itself(base: Path) -> None:
    text = done(loratool("diff", base, base)).out
    assert f"{base} against {base}: nothing differs" in text
    assert "recommendation" not in text


@pytest.mark.parametrize("columns", [60, 80])
def test_the_table_keeps_to_the_terminal(columns: int, base: Path, tuned: Path) -> None:
    lines = run_in_terminal(columns, "diff", base, tuned)
    table = [line for line in lines if "proj" in line and "extract" not in line]
    assert table and all(len(line) <= columns for line in table)
    assert any("90%" in line for line in lines)


def test_a_picture(base: Path, tuned: Path, tmp_path: Path) -> None:
    path = tmp_path / "out.svg"
    with unchanged(base), unchanged(tuned):
        done(loratool("diff", base, tuned, "--plot", path, "-q"))
    assert ET.parse(path).getroot().tag.endswith("svg")
    assert names(tmp_path) == ["out.svg"]


def test_progress_is_told(base: Path, tuned: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[tuple[str, int]] = []
    monkeypatch.setattr(ProgressBar, "start", lambda self, *found: told.append(found))
    monkeypatch.setattr(ProgressBar, "advance", lambda self, *found: told.append(found))
    done(loratool("diff", base, tuned))
    (what, size), *rest = told
    assert what == "Comparing" and len(rest) == 21
    assert size == sum(count for _, count in rest)


def test_bad_input_is_one_message(
    base: Path, tuned: Path, tmp_path: Path, tensors: Tensors
) -> None:
    broken = {name: value.clone() for name, value in tensors.items()}
    broken[UP][1, 1] = math.nan
    other = {name: torch.cat([value, value]) for name, value in tensors.items()}
    nan, large = save_model(tmp_path / "nan", broken), save_model(tmp_path / "large", other)
    with unchanged(tmp_path):
        refused(loratool("diff", base, nan), nan, UP, "holds NaN or Inf", "--exclude")
        refused(loratool("diff", base, large), "tensors differ in shape")
        refused(loratool("diff", base, tuned, "--target", "x"), "no tensor is left")
        refused(loratool("diff", base, tmp_path / "none"), "no such file")
        refused(loratool("diff", base), "Missing argument", status=2)
        refused(loratool("diff", base, tuned, "--max-rank", 0), "--max-rank", status=2)
        refused(loratool("diff", base, tuned, "--plot", "x.pdf"), ".svg or .png", status=2)
        refused(loratool("diff", base, tuned, "--plot", tmp_path / "no" / "x.svg"), "no such dir")
        refused(loratool("diff", base, tuned, "--factorizer", "magic"), "magic")
        refused(loratool("diff", base, tuned, "--executor", "magic"), "magic")
        refused(loratool("inspect", base, "--plot", tmp_path / "x.svg"), "--deep", status=2)
