"""loratool rescale: what it prints, where it writes, and what it refuses."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.cli.tiny import NORM, PREFIX, UP, Result, done, loratool, names, refused, unchanged

FACTOR = f"{PREFIX}{UP.removesuffix('.weight')}.lora_B.weight"


def test_the_output_is_named_after_the_adapter(
    adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    result = done(loratool("rescale", adapter, "--rank", 1))
    assert names(tmp_path) == ["adapter-rescaled"]
    assert "Rescaled adapter-rescaled" in result.out
    for line in ("14 low-rank updates", "rank 1, scale 1", "relative error against the delta"):
        assert line in result.out
    assert UP in result.out


def test_the_result_fits_the_base_and_merges(base: Path, adapter: Path, tmp_path: Path) -> None:
    for number, options in enumerate(
        (["--by", -0.5], ["--rank", 1, "--normalize", "--dtype", "bf16"], ["--budget", "2KiB"])
    ):
        out = tmp_path / str(number)
        done(loratool("rescale", adapter, *options, "-o", out))
        done(loratool("validate", out, "--base", base, "--deep"))
        done(loratool("merge", base, out, "-o", tmp_path / f"merged{number}"))


def test_what_replaces_whole_tensors_is_carried_along_and_noted(
    adapter: Path, tmp_path: Path
) -> None:
    result = done(loratool("rescale", adapter, "--by", 2, "-o", tmp_path / "out"))
    assert "kept whole" in result.err and NORM in result.err
    before = load_file(adapter / "adapter_model.safetensors")
    after = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert before.keys() == after.keys()
    assert all(torch.equal(after[name], value) for name, value in before.items())
    assert names(tmp_path / "out") == names(adapter)
    quiet = done(loratool("rescale", adapter, "--balance", "-o", tmp_path / "o", "-q"))
    assert quiet.out == quiet.err == ""


def test_the_report_as_json(adapter: Path, tmp_path: Path) -> None:
    result = done(
        loratool("rescale", adapter, "--budget", "1KiB", "-o", tmp_path / "out", "--json")
    )
    assert result.data["options"] == {"budget": "1KiB"}
    assert 0 < result.data["rescaled"]["energy"] < 1
    assert len(result.data["rescaled"]["left_out"]) + result.data["totals"]["low_rank"] == 14
    assert result.data == json.loads((tmp_path / "out" / "loratool.json").read_text())


def test_the_opposite_takes_the_adapter_out(base: Path, adapter: Path, tmp_path: Path) -> None:
    """Merging an adapter and its opposite gives the base, to the bit, where factors decide."""
    done(loratool("rescale", adapter, "--by", -1, "-o", tmp_path / "opposite"))
    for path in (adapter, tmp_path / "opposite"):
        bare = shutil.copytree(path, tmp_path / f"bare-{path.name}")
        tensors = load_file(bare / "adapter_model.safetensors")
        factors = {name: value for name, value in tensors.items() if ".lora_" in name}
        save_file(factors, bare / "adapter_model.safetensors")
    both = (tmp_path / "bare-adapter", tmp_path / "bare-opposite")
    done(loratool("merge", base, *both, "-o", tmp_path / "merged"))
    before = load_file(base / "model.safetensors")
    after = load_file(tmp_path / "merged" / "model.safetensors")
    assert all(torch.equal(after[name], value) for name, value in before.items())


USAGE: dict[str, tuple[Sequence[object], str]] = {
    "nothing": ((), "nothing to do"),
    "by 0": (("--by", 0), "other than 0"),
    "by nan": (("--by", "nan"), "finite"),
    "by text": (("--by", "half"), "not a valid float"),
    "alpha 0": (("--alpha", 0), "above 0"),
    "alpha and by": (("--alpha", 8, "--by", 2), "both set the strength"),
    "alpha and rank": (("--alpha", 8, "--rank", 2), "--alpha with --rank"),
    "alpha and normalize": (("--alpha", 8, "--normalize"), "--normalize makes alpha the rank"),
    "keep-delta alone": (("--keep-delta",), "--alpha"),
    "rank 0": (("--rank", 0), "rank must be at least 1"),
    "energy": (("--energy", 2), "energy"),
    "ratio": (("--ratio", 0.5), "ratio"),
    "budget": (("--budget", "small"), "not a size"),
    "dtype": (("--dtype", "int8"), "'int8' is not one of"),
}


@pytest.mark.parametrize("case", USAGE)
def test_usage_errors_have_status_2(case: str, adapter: Path, tmp_path: Path) -> None:
    given, word = USAGE[case]
    with unchanged(tmp_path):
        refused(loratool("rescale", adapter, *given, "-o", tmp_path / "out"), word, status=2)


def test_bad_adapters_are_refused(base: Path, adapter: Path, tmp_path: Path) -> None:
    bad = shutil.copytree(adapter, tmp_path / "bad")
    file = bad / "adapter_model.safetensors"
    tensors = load_file(file)

    def rescale(path: Path, *options: object) -> Result:
        return loratool(
            "rescale", path, *(options or ("--balance",)), "-o", tmp_path / "new" / "out"
        )

    def check(*words: object, path: Path = bad, options: Sequence[object] = ()) -> None:
        with unchanged(tmp_path):
            refused(rescale(path, *options), *words)

    check(base, "it is a whole model", path=base)
    check("no such file", path=tmp_path / "nowhere")
    check("budget of 8 B is too small", options=("--budget", "8B"))
    save_file({**tensors, "stray": torch.ones(1)}, file)
    check("cannot be rescaled", "stray")
    nan = tensors[FACTOR].clone()
    nan[0, 0] = torch.nan
    save_file({**tensors, FACTOR: nan}, file)
    for options in (("--balance",), ("--rank", 1), ("--budget", "1KiB"), ("--dtype", "fp16")):
        check(file, UP, "lora_B holds NaN", options=options)
    save_file({**tensors, FACTOR: 1e30 * tensors[FACTOR]}, file)
    check(file, UP, "overflow F16", options=("--dtype", "fp16"))
    missing = {name: value for name, value in tensors.items() if name != FACTOR}
    save_file(missing, file)
    check(UP.removesuffix(".weight"), "missing")
    file.write_bytes(file.read_bytes()[:-7])
    check(file, "truncated")


def test_an_output_that_is_the_input_is_refused(adapter: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(adapter, tmp_path / "copy")
    with unchanged(tmp_path):
        for options in ((), ("--overwrite",)):
            result = loratool("rescale", copy, "--by", 2, "-o", copy, *options)
            refused(result, copy)
