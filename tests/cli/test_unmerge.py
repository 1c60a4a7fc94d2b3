"""unmerge and reversible merges at the terminal."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.cli.tiny import done, llama, loratool, refused, save_model, snapshot, unchanged
from tests.peft_files import random_factors, write_adapter

SHAPES = {f"model.layers.{layer}.self_attn.q_proj": (16, 16) for layer in range(2)}


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """base, adapters a and b, and `merged`, the base with both."""
    save_model(tmp_path / "base", llama())
    for seed, name in enumerate("ab"):
        write_adapter(tmp_path / name, random_factors(SHAPES, 2, seed))
    given = [tmp_path / "base", f"{tmp_path}/a=0.7", tmp_path / "b"]
    result = done(loratool("merge", *given, "--reversible", "-o", tmp_path / "merged"))
    assert "bits a weight" in result.out and "unmerge" in result.out
    return tmp_path


def test_the_default_output_and_what_is_printed(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(place)
    result = done(loratool("unmerge", "merged"))
    assert "taken out: a=0.7, b=1" in result.out and "bit for bit" in result.out
    assert snapshot(place / "merged-unmerged") == snapshot(place / "base")


def test_json(place: Path) -> None:
    data = done(loratool("unmerge", place / "merged", "-o", place / "out", "--json")).data
    assert data["exact"] and data["files_exact"] and data["by"] == {"same": 19, "residual": 2}


def test_one_by_name_or_by_path(place: Path) -> None:
    done(loratool("unmerge", place / "merged", "--only", "b", "-o", place / "named"))
    done(loratool("unmerge", place / "merged", place / "b", "-o", place / "given"))
    assert snapshot(place / "named") == snapshot(place / "given")


def test_without_a_record_it_says_that_it_is_approximate(place: Path) -> None:
    done(loratool("merge", place / "base", place / "a", "-o", place / "plain"))
    given = [place / "plain", place / "a", "--base", place / "base"]
    result = done(loratool("unmerge", *given, "-o", place / "out"))
    for words in ("APPROXIMATE", "units in the last place", "against the base"):
        assert words in result.out


def test_what_cannot_be_done_writes_nothing(place: Path) -> None:
    done(loratool("merge", place / "base", place / "a", "-o", place / "plain"))
    out = ("-o", place / "out")
    with unchanged(place):
        refused(loratool("unmerge", place / "plain", *out), "plain", "no record")
        refused(loratool("unmerge", place / "plain", "--only", "a", *out), "no record")
        refused(loratool("unmerge", place / "base", *out), "base", "no record")
        refused(loratool("unmerge", place / "merged", "--only", "c", *out), "c: was not merged")
        refused(loratool("unmerge", place / "merged", f"{place}/a=0.6", *out), "0.7, not 0.6")
        refused(
            loratool("unmerge", place / "merged", "--base", place / "base", *out),
            "without a record",
            status=2,
        )
        refused(loratool("unmerge", place / "plain", f"{place}/a=", *out), "weight", status=2)
        refused(loratool("merge", place / "base", place / "a", place / "a", *out), "twice")
        for options in (["--reversible", "--dtype", "bf16"], ["--no-embed-adapter"]):
            given = [place / "base", place / "a", *options, *out]
            refused(loratool("merge", *given), "--", status=2)


def test_a_plain_merge_leaves_the_record_of_its_base_behind_and_says_so(place: Path) -> None:
    given = [place / "merged", place / "a", "-o", place / "out"]
    assert "record of an earlier merge" in done(loratool("merge", *given)).err
    assert not (place / "out/loratool-record").exists()
