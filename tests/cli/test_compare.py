"""loratool compare: a table for people, JSON for machines, a picture, one message on bad input."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.cli.tiny import done, finish, loratool, names, refused, start


@pytest.fixture
def ids(tmp_path: Path) -> Path:
    path = tmp_path / "ids.json"
    path.write_text(json.dumps([[5, 9, 11, 4], [7, 30, 12, 2, 8], [3]]))
    return path


def test_the_table_has_a_row_for_each_model(
    base: Path, tuned: Path, adapter: Path, ids: Path
) -> None:
    found = done(loratool("compare", base, tuned, adapter, "--inputs", ids, "--ranks", "1"))
    lines = found.out.splitlines()
    starts = [line.split()[:2] for line in lines if line.startswith(" ")]
    for start_of_row in (["base", "0"], ["rank", "0"], ["adapter", "1"], ["adapter", "2"]):
        assert start_of_row in starts
    assert f"adapter against {tuned}" in lines
    assert any("3 samples of token ids, 10 tokens" in line for line in lines)
    assert any("of the gap in KL that rank 0 leaves" in line for line in lines)


def test_json_has_every_number_and_is_the_same_again(
    base: Path, tuned: Path, adapter: Path, ids: Path
) -> None:
    command = ("compare", base, tuned, f"{adapter}=0.5", "--inputs", ids, "--json")
    first = done(loratool(*command))
    assert first.out == done(loratool(*command)).out
    data = first.data
    assert data["layers"] == ["embeddings", "model.layers.0", "model.layers.1"]
    # The fine-tune has another last norm, which the adapter keeps whole.
    assert [m["role"] for m in data["models"]] == ["base", "rank 0", "adapter", "finetuned"]
    assert data["models"][2]["adapters"] == ["adapter=0.5"]
    for model in data["models"]:
        assert len(model["layer_errors"]) == 3
        low, high = model["agreement_interval"]
        assert low <= model["agreement"] <= high


@pytest.mark.parametrize("suffix", ["svg", "png"])
def test_a_picture(
    base: Path, tuned: Path, adapter: Path, ids: Path, tmp_path: Path, suffix: str
) -> None:
    place = tmp_path / f"picture.{suffix}"
    command = ("compare", base, tuned, adapter, "--inputs", ids, "--ranks", "1", "--plot", place)
    done(loratool(*command))
    first = place.read_bytes()
    assert len(first) > 10_000
    if suffix == "svg":
        text = first.decode()
        assert "KL divergence from the fine-tune" in text and "model.layers" in text
        done(loratool(*command))
        assert place.read_bytes() == first


def test_bad_input_is_one_message(
    base: Path, tuned: Path, adapter: Path, ids: Path, tmp_path: Path
) -> None:
    command = ("compare", base, tuned, adapter)
    refused(loratool(*command), "--inputs FILE is needed", status=2)
    refused(loratool(*command, "--inputs", ids, "--ranks", "four"), "as 1,4,16", status=2)
    refused(loratool(*command, "--inputs", tmp_path / "nothing.txt"), "no such file")
    refused(loratool("compare", base, tuned, tuned, "--inputs", ids), "it is a whole model")
    place = tmp_path / "missing" / "picture.png"
    refused(loratool(*command, "--inputs", ids, "--plot", place), "no such directory")
    assert names(tmp_path) == ["ids.json"]


def test_nothing_heavy_is_imported_for_help() -> None:
    found = finish(start("compare", "--help"))
    assert found.status == 0 and "--ranks 1,4,16" in found.out
