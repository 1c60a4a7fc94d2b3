"""Pictures are valid files, the same for the same data, and say what they show."""

from __future__ import annotations

import json
import math
import sys
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

import pytest

import loratool
from fixtures.weights import RXNFP_BASE, RXNFP_TUNED, fetch
from loratool.errors import InputError, OutputError, UsageError
from loratool.plotting import check_picture
from loratool.plotting.difference import draw_difference
from loratool.plotting.inspection import draw_inspection
from tests.adapters import factors, write_adapter


def facts(name: str, layer: int | None, label: str, sigma: list[float]) -> dict[str, Any]:
    """What a report of diff says of one matrix."""
    total = math.fsum(value * value for value in sigma)
    return {
        "row": name, "label": label, "layer": layer, "factored": True, "relative_norm": 0.01,
        "norm": math.sqrt(total), "sigma": sigma, "noise_edge": 0.01,
        "rank_for": {"0.9": [len(sigma), len(sigma) + (layer or 0) % 2]},
    }  # fmt: skip


def difference(layers: int = 3) -> dict[str, Any]:
    tensors = {}
    for n in range(layers):
        for place, label in enumerate(("q_proj", "up_proj")):
            name = f"layers.{n}.{label}.weight"
            sigma = [(n + 1) / (k + 1 + place) for k in range(20)]
            tensors[name] = facts(name, n, label, sigma)
    tensors["norm.weight"] = {
        "label": "norm", "layer": None, "factored": False, "relative_norm": 0.002, "norm": 1.0,
    }  # fmt: skip
    return {
        "base": {"name": "org/base"}, "finetuned": {"name": "my/tuned"}, "looks_like": "full",
        "merged_rank": None, "recommendation": {"rank": 8}, "tensors": tensors,
    }  # fmt: skip


def texts(path: Path) -> str:
    root = ET.parse(path).getroot()
    return "\n".join("".join(found.itertext()) for found in root.iter() if found.tag[-4:] == "text")


def test_an_svg_says_what_it_shows(tmp_path: Path) -> None:
    path = tmp_path / "out.svg"
    draw_difference(difference(), path)
    shown = texts(path)
    for words in (
        "tuned against base: looks like full fine-tuning", "Relative norm of the change",
        "Rank that holds 90% of the energy", "more than were looked for", "q_proj", "up_proj",
        "Singular values of the change", "edge of the rounding noise", "rank 8 keeps", "layer",
        "norm", "all together", "median matrix",
    ):  # fmt: skip
        assert words in shown, words


@pytest.mark.parametrize("suffix", ["svg", "PNG"])
def test_the_same_data_give_the_same_bytes(tmp_path: Path, suffix: str) -> None:
    one, other = tmp_path / f"a.{suffix}", tmp_path / f"b.{suffix}"
    for path in (one, other):
        draw_difference(json.loads(json.dumps(difference(), sort_keys=True)), path)
    assert one.read_bytes() == other.read_bytes()
    content = one.read_bytes()
    assert content.startswith(b"\x89PNG\r\n" if suffix.lower() == "png" else b"<?xml")
    assert {path.name for path in tmp_path.iterdir()} == {one.name, other.name}


@pytest.mark.parametrize("layers", [1, 80])
def test_models_of_every_depth(tmp_path: Path, layers: int) -> None:
    draw_difference(difference(layers), tmp_path / "out.svg")
    shown = texts(tmp_path / "out.svg").splitlines()
    assert str(5 * ((layers - 1) // 5)) in shown


def test_what_is_missing_is_left_out(tmp_path: Path) -> None:
    data = difference()
    quick = {**data, "recommendation": None, "looks_like": "unknown", "tensors": {
        name: {k: v for k, v in found.items() if k not in ("sigma", "rank_for", "noise_edge")}
        for name, found in data["tensors"].items()
    }}  # fmt: skip
    draw_difference(quick, tmp_path / "quick.svg")
    assert "Singular values" not in texts(tmp_path / "quick.svg")
    same = {name: {**f, "relative_norm": 0.0, "sigma": []} for name, f in data["tensors"].items()}
    draw_difference({**data, "looks_like": "same", "recommendation": None, "tensors": same},
                    tmp_path / "same.svg")  # fmt: skip
    assert "nothing differs" in texts(tmp_path / "same.svg")


def test_more_kinds_than_colours_are_coloured_by_layer(tmp_path: Path) -> None:
    data = difference()
    tensors = {
        f"layers.{n}.m{k}.weight": facts("", n, f"m{k}", [2.0, 1.0])
        for n in range(2) for k in range(9)
    }  # fmt: skip
    draw_difference({**data, "tensors": tensors}, tmp_path / "out.svg")
    assert "layer (grey: none)" in texts(tmp_path / "out.svg")


def test_a_picture_replaces_another_one(tmp_path: Path) -> None:
    path = tmp_path / "out.svg"
    path.write_text("old")
    draw_difference(difference(), path)
    assert path.read_bytes().startswith(b"<?xml")


def test_a_picture_of_an_adapter(tmp_path: Path) -> None:
    modules = {f"layers.{n}.{m}": factors(n, 10, 8, 2 + n) for n in range(3) for m in ("q", "up")}
    path = write_adapter(tmp_path / "adapter", modules)
    loratool.inspect(path, plot=str(tmp_path / "out.svg"))
    shown = texts(tmp_path / "out.svg")
    for words in ("adapter: rank 2 to 4", "Norm of the delta", "Rank", "Energy of the deltas"):
        assert words in shown


def test_a_picture_of_a_checkpoint_needs_its_values(tmp_path: Path) -> None:
    fetch()
    with pytest.raises(UsageError, match="add --deep"):
        loratool.inspect(RXNFP_BASE, plot=str(tmp_path / "out.svg"))
    report = loratool.inspect(RXNFP_BASE, deep=True)
    draw_inspection(report.data, tmp_path / "out.svg")
    shown = texts(tmp_path / "out.svg")
    for words in ("bert_pretrained: 6.89M parameters", "root mean square", "Size on disk"):
        assert words in shown


def test_a_picture_of_a_real_difference(tmp_path: Path) -> None:
    fetch()
    path = tmp_path / "out.svg"
    data = loratool.diff(RXNFP_BASE, RXNFP_TUNED, target=["*.query"], plot=str(path)).data
    first = path.read_bytes()
    draw_difference(json.loads(json.dumps(data)), path)
    assert path.read_bytes() == first
    assert "bert_ft_10k_25s against bert_pretrained" in texts(path)


# ---- bad input


@pytest.mark.parametrize("name", ["out.pdf", "out", "out.svg.gz"])
def test_other_suffixes_are_usage_errors(tmp_path: Path, name: str) -> None:
    with pytest.raises(UsageError, match=r"\.svg or \.png"):
        loratool.diff("nowhere", "nowhere either", plot=str(tmp_path / name))


def test_the_place_is_looked_at_before_any_work(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="no such directory"):
        check_picture(str(tmp_path / "no" / "out.svg"))
    (tmp_path / "out.svg").mkdir()
    with pytest.raises(OutputError, match="is a directory"):
        check_picture(str(tmp_path / "out.svg"))


def test_without_matplotlib_the_command_to_install_it_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setattr("loratool.plotting.find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"pip install 'loratool\[plot\]'"):
        check_picture(str(tmp_path / "out.svg"))


def test_a_failed_picture_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "out.svg"
    path.write_text("old")

    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("pathlib.Path.replace", fail)
    with pytest.raises(OutputError, match=r"out\.svg: cannot be written: No space left"):
        draw_difference(difference(), path)
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]
