"""loratool convert: what it prints, where it writes, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.cli.tiny import PREFIX, UP, done, loratool, names, refused, unchanged

DOWN = "model.layers.0.mlp.down_proj.weight"


def peft_folder(folder: Path, tensors: dict[str, torch.Tensor], **config: object) -> Path:
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture
def loha(tmp_path: Path) -> Path:
    """A LoHa adapter of two projections; the exact rank of their deltas is 9."""
    generator = torch.Generator().manual_seed(3)
    tensors = {}
    for name, (out, width) in ((UP, (24, 16)), (DOWN, (16, 24))):
        module = f"{PREFIX}{name.removesuffix('.weight')}"
        for which in ("w1", "w2"):
            tensors[f"{module}.hada_{which}_a"] = torch.randn(out, 3, generator=generator)
            tensors[f"{module}.hada_{which}_b"] = torch.randn(3, width, generator=generator) / 4
    return peft_folder(
        tmp_path / "loha", tensors, peft_type="LOHA", r=3, alpha=3, target_modules=["up_proj"]
    )


@pytest.fixture
def dora(tmp_path: Path) -> Path:
    module = f"{PREFIX}{UP.removesuffix('.weight')}"
    generator = torch.Generator().manual_seed(4)
    tensors = {
        f"{module}.lora_A.weight": torch.randn(2, 16, generator=generator),
        f"{module}.lora_B.weight": torch.randn(24, 2, generator=generator) / 8,
        f"{module}.lora_magnitude_vector": torch.rand(24, generator=generator) + 0.5,
    }
    return peft_folder(
        tmp_path / "dora", tensors,
        peft_type="LORA", r=2, lora_alpha=2, use_dora=True, target_modules=["up_proj"],
    )  # fmt: skip


def merged(base: Path, adapter: Path, place: Path) -> dict[str, torch.Tensor]:
    done(loratool("merge", base, adapter, "-o", place))
    found: dict[str, torch.Tensor] = load_file(place / "model.safetensors")
    return found


def test_the_output_is_named_after_the_adapter_and_what_it_becomes(
    loha: Path, adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    result = done(loratool("convert", loha, "--to-lora"))
    done(loratool("convert", adapter, "--format", "peft"))
    assert names(tmp_path) == ["adapter-peft", "loha", "loha-lora"]
    assert "Converted loha-lora" in result.out
    for line in (
        "2 low-rank updates",
        "made low-rank: 2 LoHa updates",
        "exact but for rounding: 2 of 2",
        "format: peft -> peft",
    ):
        assert line in result.out
    (row,) = [line for line in result.out.splitlines() if UP in line and "LoHa update" in line]
    assert " 9 " in row and "100.00%" in row


def test_an_exact_conversion_merges_to_the_same_weights(
    base: Path, loha: Path, tmp_path: Path
) -> None:
    done(loratool("convert", loha, "--to-lora", "-o", tmp_path / "lora"))
    done(loratool("validate", tmp_path / "lora", "--base", base, "--deep"))
    one = merged(base, loha, tmp_path / "one")
    other = merged(base, tmp_path / "lora", tmp_path / "other")
    assert all(torch.allclose(one[name], other[name], rtol=0, atol=1e-6) for name in one)


def test_what_is_lost_is_said_for_each_tensor(base: Path, dora: Path, tmp_path: Path) -> None:
    arguments = ("convert", dora, "--to-lora", "--base", base, "--rank", 3)
    result = done(loratool(*arguments, "-o", tmp_path / "lora", "--json"))
    facts = result.data["tensors"][UP]
    assert facts["from"] == "DoRA update" and facts["rank"] == 3
    assert result.data["options"]["rank"] == 3
    one, other, start = (
        merged(base, dora, tmp_path / "one")[UP],
        merged(base, tmp_path / "lora", tmp_path / "other")[UP],
        load_file(base / "model.safetensors")[UP],
    )
    measured = float((other - one).norm() / (one - start).norm())
    assert measured > 0.01 and abs(measured - facts["relative_error"]) < 1e-4
    more = done(loratool(*arguments[:-1], 8, "-o", tmp_path / "more", "--json"))
    assert more.data["tensors"][UP]["relative_error"] < facts["relative_error"]
    text = done(loratool(*arguments, "-o", tmp_path / "again"))
    assert f"relative error of a delta: at most {facts['relative_error']:.1e} ({UP})" in text.out


def test_another_format_keeps_every_byte_of_the_factors(adapter: Path, tmp_path: Path) -> None:
    result = done(loratool("convert", adapter, "--format", "peft", "-o", tmp_path / "out"))
    assert "no value was changed" in result.out
    before, after = (
        load_file(place / "adapter_model.safetensors") for place in (adapter, tmp_path / "out")
    )
    assert before.keys() == after.keys()
    assert all(torch.equal(after[name], value) for name, value in before.items())
    quiet = done(loratool("convert", adapter, "--format", "peft", "-o", tmp_path / "o", "-q"))
    assert quiet.out == quiet.err == ""


def test_plain_lora_stays_as_it_is(adapter: Path, tmp_path: Path) -> None:
    result = done(loratool("convert", adapter, "--to-lora", "-o", tmp_path / "out"))
    assert "nothing is computed" in result.err and "kept whole" in result.err
    before, after = (
        load_file(place / "adapter_model.safetensors") for place in (adapter, tmp_path / "out")
    )
    assert all(torch.equal(after[name], value) for name, value in before.items())


def test_what_it_refuses(base: Path, adapter: Path, dora: Path, loha: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with unchanged(tmp_path):
        refused(loratool("convert", adapter, "-o", out), "--format", "--to-lora", status=2)
        refused(
            loratool("convert", adapter, "--format", "peft", "--rank", 2, "-o", out),
            "--rank", "add --to-lora", status=2,
        )  # fmt: skip
        refused(loratool("convert", adapter, "--format", "pdf", "-o", out), "pdf", "peft")
        refused(loratool("convert", dora, "--to-lora", "-o", out), "1 DoRA update", UP, "--base")
        refused(
            loratool("convert", loha, "--to-lora", "--alpha", 3, "-o", out),
            "says itself what --alpha would say",
        )
        refused(
            loratool("convert", loha, "--to-lora", "--enable-lora", "1,x", "-o", out),
            "--enable-lora 1,x", status=2,
        )  # fmt: skip
        refused(loratool("convert", loha, "--to-lora", "-o", loha), "not empty")


def test_help_tells_what_is_lost_and_what_is_not() -> None:
    text = " ".join(done(loratool("convert", "--help")).out.split())
    for words in ("changes no value", "exact up to rank 64", "FORMAT_OR_LORA", "--drop"):
        assert words in text
