"""Merging into quantized models, and writing what comes of it in their scheme again."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import loratool
from loratool.errors import InputError, MismatchError, UsageError
from loratool.opening import open_checkpoint
from tests.adapters import Factors, factors, write_adapter
from tests.cli.tiny import NORM, UP, llama
from tests.quantized_files import COMPRESSED, FBGEMM, FP8, PER_TENSOR, fp8_model

DOWN = "model.layers.0.mlp.down_proj.weight"


def update(folder: Path, scale: float = 1.0, **settings: Any) -> Path:
    """An update of two matrices."""
    return write_adapter(folder, {n.removesuffix(".weight"): f for n, f in both(scale).items()})


def both(scale: float) -> dict[str, Factors]:
    (b, a), (d, c) = factors(0, 24, 16, 2), factors(1, 16, 24, 2)
    return {UP: (b * scale, a), DOWN: (d * scale, c)}


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return fp8_model(tmp_path / "base")


def bits(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def test_the_default_is_bf16_and_a_config_without_quantization(base: Path, tmp_path: Path) -> None:
    report = loratool.merge(base, [(update(tmp_path / "a"), 1.0)]).save(tmp_path / "merged")
    assert any("14 tensors are written dequantized, as BF16" in note for note in report.notes)
    config = json.loads((tmp_path / "merged" / "config.json").read_text())
    assert "quantization_config" not in config
    assert config.get("dtype", config.get("torch_dtype")) == "bfloat16"
    merged = load_file(tmp_path / "merged" / "model.safetensors")
    assert merged.keys() == llama().keys()
    plain = open_checkpoint(base)
    for name, (b, a) in both(1.0).items():
        wanted = plain[name].read().double() + b.double() @ a.double()
        assert torch.equal(merged[name], wanted.float().bfloat16())


@pytest.mark.parametrize("quantization", [FP8, PER_TENSOR, FBGEMM, COMPRESSED])
def test_what_is_touched_is_quantized_anew_and_all_else_stays(
    quantization: Any, tmp_path: Path
) -> None:
    base = fp8_model(tmp_path / "base", quantization)
    out = tmp_path / "merged"
    adapter = update(tmp_path / "a")
    report = loratool.merge(base, [(adapter, 0.5)], requantize=True).save(out)
    before = load_file(base / "model.safetensors")
    after = load_file(out / "model.safetensors")
    assert list(before) == list(after)
    assert (out / "config.json").read_bytes() == (base / "config.json").read_bytes()
    for name, value in before.items():
        touched = name.startswith((UP, DOWN))
        assert (value.dtype, value.shape) == (after[name].dtype, after[name].shape)
        assert (bits(value) == bits(after[name])) != touched, name
    plain, found = open_checkpoint(base), open_checkpoint(out)
    assert found.quantized == plain.quantized
    for name, (b, a) in both(0.5).items():
        wanted = plain[name].read().double() + b.double() @ a.double()
        error = float((found[name].read().double() - wanted).norm())
        change = found[name].read().double() - plain[name].read().double()
        kept = float((change * (b.double() @ a.double())).sum())
        assert report.data["tensors"][name]["error"] == pytest.approx(error, rel=1e-4)
        norm = float((b.double() @ a.double()).norm())
        assert report.data["tensors"][name]["update"] == pytest.approx(norm)
        assert report.data["tensors"][name]["survived"] == pytest.approx(kept / norm**2)
        assert error < 0.05 * norm
    assert "(0.0" in report.lines[1], "the ratio in all"
    assert report.table is not None and len(report.table.rows) == 2


def test_an_update_that_drowns_is_refused_with_a_list(base: Path, tmp_path: Path) -> None:
    adapter = update(tmp_path / "a", scale=1e-4)
    out = tmp_path / "merged"
    with pytest.raises(InputError) as caught:
        loratool.merge(base, [(adapter, 1.0)], requantize=True).save(out)
    message = str(caught.value)
    assert "drowns in 2 of 2 tensors" in message and "--force" in message
    assert all(f"  {name}: error " in message for name in (UP, DOWN))
    assert not out.exists() and not list(tmp_path.glob(".merged*"))
    report = loratool.merge(base, [(adapter, 1.0)], requantize=True, force=True).save(out)
    assert sorted(report.data["drowned"]) == sorted([UP, DOWN])
    assert any("drowns" in note and "--force" in note for note in report.notes)
    assert (out / "model.safetensors").is_file()


def test_an_update_of_nothing_keeps_the_codes(base: Path, tmp_path: Path) -> None:
    nothing = {UP.removesuffix(".weight"): (torch.zeros(24, 2), torch.ones(2, 16))}
    adapter = write_adapter(tmp_path / "a", nothing)
    loratool.merge(base, [(adapter, 1.0)], requantize=True).save(tmp_path / "merged")
    loratool.merge(base, [(adapter, 0.0)], requantize=True).save(tmp_path / "unchanged")
    for out in ("merged", "unchanged"):
        after = load_file(tmp_path / out / "model.safetensors")
        for name, value in load_file(base / "model.safetensors").items():
            assert bits(value) == bits(after[name]), name


def test_what_is_not_quantized_is_replaced_as_ever(base: Path, tmp_path: Path) -> None:
    value = torch.full((16,), 0.75, dtype=torch.bfloat16)
    adapter = write_adapter(tmp_path / "a", {}, {NORM: value}, modules_to_save=["norm"])
    report = loratool.merge(base, [(adapter, 1.0)], requantize=True).save(tmp_path / "merged")
    assert torch.equal(open_checkpoint(tmp_path / "merged")[NORM].read(), value)
    assert report.data["tensors"] == {}


def test_a_quantized_tensor_that_is_replaced_whole_is_quantized_again(
    base: Path, tmp_path: Path
) -> None:
    value = torch.randn(24, 16, generator=torch.Generator().manual_seed(3))
    adapter = write_adapter(
        tmp_path / "a", {}, {UP: value}, modules_to_save=["layers.1.mlp.up_proj"]
    )
    report = loratool.merge(base, [(adapter, 1.0)], requantize=True).save(tmp_path / "merged")
    found = open_checkpoint(tmp_path / "merged")
    assert found.quantized == open_checkpoint(base).quantized
    assert float((found[UP].read() - value).norm()) < 0.05 * float(value.norm())
    change = float((value - open_checkpoint(base)[UP].read()).norm())
    assert report.data["tensors"][UP]["update"] == pytest.approx(change)


def test_adapters_that_make_another_model_are_refused(base: Path, tmp_path: Path) -> None:
    head = "score.weight"
    added = write_adapter(tmp_path / "a", {}, {head: torch.ones(3, 16)}, modules_to_save=["score"])
    longer = write_adapter(
        tmp_path / "b", {}, {"lm_head.weight": torch.ones(40, 16)}, modules_to_save=["lm_head"]
    )
    for adapter, what in (
        (added, f"adds .*{head}"),
        (longer, "replaces lm_head.weight by another"),
    ):
        with pytest.raises(MismatchError, match=what):
            loratool.merge(base, [(adapter, 1.0)], requantize=True)


@pytest.mark.parametrize(
    "options",
    [
        {"requantize": True, "dtype": "fp32"},
        {"requantize": True, "reversible": True},
        {"requantize": True, "max_shard_size": "1GB"},
        {"force": True},
    ],
)
def test_options_that_contradict_each_other(options: dict[str, Any], base: Path) -> None:
    with pytest.raises(UsageError, match=r"--requantize"):
        loratool.merge(base, [], **options)


def test_a_plain_base_cannot_be_requantized(tmp_path: Path) -> None:
    from tests.cli.tiny import save_model

    with pytest.raises(UsageError, match="is not quantized"):
        loratool.merge(save_model(tmp_path / "base", llama()), [], requantize=True)


def test_a_reversible_merge_restores_the_dequantized_base(base: Path, tmp_path: Path) -> None:
    merged, restored = tmp_path / "merged", tmp_path / "restored"
    adapter = update(tmp_path / "a")
    report = loratool.merge(base, [(adapter, 1.0)], reversible=True).save(merged)
    assert any("written dequantized, as F32" in note for note in report.notes)
    assert open_checkpoint(merged)[UP].dtype == "F32"
    loratool.unmerge(merged).save(restored)
    plain, found = open_checkpoint(base), open_checkpoint(restored)
    assert found.keys() == plain.keys() and not found.quantized
    for name, tensor in plain.items():
        assert bits(found[name].read()) == bits(tensor.read()), name
    assert found.config == plain.config


def test_an_adapter_is_switched_in_a_model_that_came_from_a_quantized_one(
    base: Path, tmp_path: Path
) -> None:
    one, other = update(tmp_path / "one"), update(tmp_path / "other", scale=0.5)
    for adapter, name in ((one, "switched"), (other, "wanted")):
        loratool.merge(base, [(adapter, 1.0)], reversible=True).save(tmp_path / name)
    loratool.switch(tmp_path / "switched", [(other, 1.0)])
    switched, wanted = open_checkpoint(tmp_path / "switched"), open_checkpoint(tmp_path / "wanted")
    assert all(bits(switched[name].read()) == bits(wanted[name].read()) for name in wanted)


def test_a_quantized_model_is_not_changed_in_place_nor_subtracted_from(
    base: Path, tmp_path: Path
) -> None:
    adapter = update(tmp_path / "a")
    with pytest.raises(InputError, match="is quantized"):
        loratool.switch(base, [(adapter, 1.0)])
    with pytest.raises(InputError, match="is quantized"):
        loratool.unmerge(base, [(adapter, 1.0)])


def test_adapters_are_validated_against_the_plain_shapes(base: Path, tmp_path: Path) -> None:
    assert loratool.validate(update(tmp_path / "a"), base).ok
    wrong = write_adapter(tmp_path / "b", {UP.removesuffix(".weight"): factors(0, 20, 16, 2)})
    assert not loratool.validate(wrong, base).ok


def test_a_merge_into_a_quantized_base_is_proved_before_it_is_quantized_again(
    base: Path, tmp_path: Path
) -> None:
    adapter = update(tmp_path / "a")
    loratool.merge(base, [(adapter, 1.0)]).save(tmp_path / "merged")
    loratool.merge(base, [(adapter, 1.0)], requantize=True).save(tmp_path / "again")
    assert loratool.validate(adapter, base, tmp_path / "merged").ok
    with pytest.raises(MismatchError, match=r"quantized .*only be proved before"):
        loratool.validate(adapter, base, tmp_path / "again")


def test_an_extraction_from_a_quantized_model_speaks_of_its_error(
    base: Path, tmp_path: Path
) -> None:
    loratool.merge(base, [(update(tmp_path / "a"), 1.0)]).save(tmp_path / "tuned")
    for pair in ((base, tmp_path / "tuned"), (tmp_path / "tuned", base)):
        found = loratool.extract(*pair, rank=2)
        assert any("contains its quantization error" in note for note in found.notes)
    report = loratool.extract(base, tmp_path / "tuned", rank=2).save(tmp_path / "found")
    assert report.data["totals"]["energy"] > 0.99


def test_codes_and_scales_come_of_one_computation(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from loratool.quantized import fp8

    calls = []
    original = fp8.encoded
    monkeypatch.setattr(fp8, "encoded", lambda *given: calls.append(1) or original(*given))
    adapter = update(tmp_path / "a")
    step = loratool.merge(base, [(adapter, 1.0)], requantize=True)
    step.save(tmp_path / "threads", executor="threads:workers=4")
    assert len(calls) == 2
    step.save(tmp_path / "serial", executor="serial")
    one, other = (tmp_path / n / "model.safetensors" for n in ("threads", "serial"))
    assert one.read_bytes() == other.read_bytes()
