"""Quantized bases from the command line: what is told, written and refused."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch

from loratool.opening import open_checkpoint
from tests.cli.tiny import NORM, UP, done, llama, loratool, names, refused, snapshot, unchanged
from tests.quantized_files import fp8_model, rewritten, save


@pytest.fixture
def quantized(tmp_path: Path) -> Path:
    return fp8_model(tmp_path / "quantized")


def test_merging_says_what_is_dequantized(quantized: Path, adapter: Path, tmp_path: Path) -> None:
    found = done(loratool("merge", quantized, adapter, "-o", tmp_path / "out"))
    assert "14 of 21 tensors are quantized (fp8 (e4m3), " in found.err
    assert "14 tensors are written dequantized, as BF16" in found.err
    assert not open_checkpoint(tmp_path / "out").quantized


def test_requantizing_tells_the_error_beside_the_update(
    quantized: Path, adapter: Path, tmp_path: Path
) -> None:
    """The adapter is an extracted one: it also brings a norm, a config and nothing else new."""
    out = tmp_path / "out"
    found = done(loratool("merge", quantized, f"{adapter}=2", "--requantize", "-o", out))
    assert "15 tensors updated, 6 tensors as they are in the base, bit for bit" in found.out
    assert re.search(
        r"requantization error .* beside the update's norm .* \(0\.\d+ of it\)", found.out
    )
    assert re.search(r"share of the update that survived: 9\d\.\d+%", found.out)
    assert re.search(rf"{UP} .* 0\.\d+ +9\d\.\d+%", found.out)
    assert names(out) == names(quantized)
    tuned, before = open_checkpoint(out), open_checkpoint(quantized)
    assert tuned.quantized == before.quantized
    assert not torch.equal(tuned[NORM].read(), before[NORM].read())
    report = loratool(
        "merge", quantized, f"{adapter}=2", "--requantize", "-o", tmp_path / "again", "--json"
    ).data
    assert report["kind"] == "requantized" and len(report["tensors"]) == 14
    assert report["error"] < report["update"] and report["drowned"] == []
    assert snapshot(out) == snapshot(tmp_path / "again")


def test_an_update_that_drowns_is_refused(quantized: Path, adapter: Path, tmp_path: Path) -> None:
    small = f"{adapter}=0.001"
    with unchanged(tmp_path):
        result = loratool("merge", quantized, small, "--requantize", "-o", tmp_path / "out")
    assert result.status == 1 and "Traceback" not in result.err
    assert "Error: --requantize: the update drowns in 14 of 14 tensors" in result.err
    assert "and 4 more" in result.err and "--force" in result.err
    forced = loratool(
        "merge", quantized, small, "--requantize", "--force", "-o", tmp_path / "out", "--json"
    )
    assert len(done(forced).data["drowned"]) == 14


def test_options_that_make_no_sense_together(quantized: Path, adapter: Path) -> None:
    for options in (
        ["--requantize", "--dtype", "fp16"],
        ["--requantize", "--reversible"],
        ["--force"],
    ):
        refused(loratool("merge", quantized, adapter, *options), "--requantize", status=2)


def test_inspecting_shows_the_schemes(quantized: Path) -> None:
    found = done(loratool("inspect", quantized))
    assert "quantized: fp8 (e4m3), " in found.out and "dequantized: " in found.out
    data = loratool("inspect", quantized, "--json", "--deep").data
    assert data["tensors"][UP]["quantized"] == "fp8 (e4m3), blocks of 16x16"
    assert data["tensors"][UP]["dtype"] == "F32"
    assert data["bytes"] > sum(data["files"].values())


def test_what_is_wrong_with_the_codes_is_one_message(
    quantized: Path, adapter: Path, tmp_path: Path
) -> None:
    rewritten(quantized, {f"{UP}_scale_inv": None})
    with unchanged(tmp_path):
        for command in (("merge", quantized, adapter), ("inspect", quantized)):
            refused(loratool(*command), quantized, UP, "is missing")


def test_gptq_is_refused_as_a_base_and_shown_by_inspect(adapter: Path, tmp_path: Path) -> None:
    packed = save(tmp_path / "gptq", llama(), {"quant_method": "gptq", "bits": 4})
    for command in (
        ("merge", packed, adapter, "-o", tmp_path / "out"),
        ("extract", packed, tmp_path / "gptq", "-o", tmp_path / "out"),
        ("validate", adapter, "--base", packed),
    ):
        refused(loratool(*command), packed, "GPTQ", "quantized from")
    assert "GPTQ" in done(loratool("inspect", packed)).err
    assert not (tmp_path / "out").exists()


def test_a_damaged_gguf_file_is_one_message(adapter: Path, tmp_path: Path) -> None:
    file = tmp_path / "x.gguf"
    file.write_bytes(b"GGUF\3\0\0\0")
    refused(loratool("merge", file, adapter), file, "truncated")
    file.write_bytes(b"something else")
    refused(loratool("validate", adapter, "--base", file), file, "does not begin with GGUF")


def test_the_default_place_is_named_after_the_file(
    tmp_path: Path, adapter: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tests.gguf_files import model_of, save_gguf

    model = model_of("llama", hidden_size=16, intermediate_size=24, num_attention_heads=2,
                     num_key_value_heads=2, head_dim=8, vocab_size=32)  # fmt: skip
    save_gguf(tmp_path / "tiny.gguf", "llama", model)
    monkeypatch.chdir(tmp_path)
    done(loratool("merge", "tiny.gguf", adapter))
    assert json.loads((tmp_path / "tiny-merged" / "config.json").read_text())["hidden_size"] == 16
