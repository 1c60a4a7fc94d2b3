"""validate --merged: what a whole checkpoint is told to be, whoever made it, and exit statuses."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import loratool as library
from tests.cli.tiny import (
    CONFIG,
    NORM,
    PREFIX,
    UP,
    Result,
    Tensors,
    done,
    finetuned,
    llama,
    loratool,
    model_folder,
    refused,
    save_model,
    unchanged,
)

Q = "model.layers.0.self_attn.q_proj.weight"
EMBED = "model.embed_tokens.weight"


def values(folder: Path) -> Tensors:
    found: Tensors = {}
    for file in sorted(folder.glob("*.safetensors")):
        found |= {name: value.clone() for name, value in load_file(file).items()}
    return found


def validated(adapter: Path, base: Path, merged: Path, *options: object, status: int = 0) -> Any:
    with unchanged(merged):
        result = loratool(
            "validate", adapter, "--base", base, "--merged", merged, "--json", *options
        )
    assert result.status == status, result
    assert result.data["ok"] == (status == 0)
    assert result.data["kind"] == "proof"
    return result.data


@pytest.fixture(scope="module")
def merged(inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The right merge, to be copied before it is changed."""
    out = tmp_path_factory.mktemp("merged") / "merged"
    done(loratool("merge", inputs / "base", inputs / "adapter", "-o", out))
    return out


@pytest.fixture
def changed(merged: Path, tmp_path: Path) -> Callable[[Callable[[Tensors], Any]], Path]:
    """The right merge with something done to its tensors."""

    def change(how: Callable[[Tensors], Any]) -> Path:
        tensors = values(merged)
        how(tensors)
        return save_model(tmp_path / "changed", tensors)

    return change


def test_a_merge_is_proved(base: Path, adapter: Path, merged: Path) -> None:
    data = validated(adapter, base, merged)
    assert data["verdict"] == "applied"
    assert data["counts"] == {
        "applied": 15, "cannot be told": 0, "another strength": 0, "not applied": 0,
        "other changes": 0,
    }  # fmt: skip
    assert data["strength"]["value"] == data["expected_strength"] == 1
    assert data["unchanged"] == 6
    assert (data["missing"], data["extra"]) == ([], [])
    up = data["tensors"][UP]
    assert up["kind"] == "low_rank" and data["tensors"][NORM]["kind"] == "replacement"
    assert up["reproduced"] == up["changed"] == up["agreeing"] == 384
    assert up["way"].startswith("rounded once")
    assert 0.5 < data["residual_to_noise"] < 2


def test_it_is_told_in_words(base: Path, adapter: Path, merged: Path) -> None:
    report = done(loratool("validate", adapter, "--base", base, "--merged", merged))
    assert f"{merged} contains {adapter}, and no other change" in report.out
    assert "15 updates: 15 applied" in report.out
    assert "100.00% of 4352 changed weights reproduced to the bit in 14 tensors" in report.out
    assert "other tensors: 6 as in the base" in report.out
    quiet = done(loratool("validate", adapter, "--base", base, "--merged", merged, "-q"))
    assert quiet.out == ""


def test_another_strength(base: Path, adapter: Path, tmp_path: Path) -> None:
    half = tmp_path / "half"
    done(loratool("merge", base, f"{adapter}=0.5", "-o", half))
    data = validated(adapter, base, half, status=1)
    assert data["verdict"] == "another strength"
    assert data["strength"]["value"] == 0.5
    assert data["strength"]["low"] < 0.5 < data["strength"]["high"]
    assert data["counts"]["another strength"] == 14
    assert data["counts"]["applied"] == 1  # the norm, which no weight scales
    report = loratool("validate", adapter, "--base", base, "--merged", half)
    assert f"{half} contains {adapter} at strength 0.5 (±" in report.out
    assert "), not 1\n" in report.out
    data = validated(adapter, base, half, "--weight", 0.5)
    assert data["verdict"] == "applied"
    words = done(loratool("validate", adapter, "--base", base, "--merged", half, "--weight", ".5"))
    assert f"contains {adapter} at strength 0.5, and no other change" in words.out
    data = validated(adapter, base, half, "--weight", -0.5, status=1)
    assert (data["verdict"], data["strength"]["value"]) == ("another strength", 0.5)


def test_strengths_that_differ_by_layer(base: Path, adapter: Path, tmp_path: Path) -> None:
    folders = {}
    for strength in (0.25, 1, 2):
        folders[strength] = tmp_path / str(strength)
        done(loratool("merge", base, f"{adapter}={strength}", "-o", folders[strength]))
    one, two, three = (values(folders[s]) for s in (0.25, 1, 2))
    mixed = {n: (one if "layers.0" in n else three if "layers.1" in n else two)[n] for n in one}
    report = loratool(
        "validate", adapter, "--base", base, "--merged", save_model(tmp_path / "mixed", mixed)
    )
    assert report.status == 1
    assert "at strengths from 0.25 to 2, not 1" in report.out


def test_the_base_itself_holds_nothing_of_it(base: Path, adapter: Path) -> None:
    data = validated(adapter, base, base, status=1)
    assert data["verdict"] == "not applied"
    assert data["counts"]["not applied"] == 15
    report = loratool("validate", adapter, "--base", base, "--merged", base)
    assert f"{base} does not contain {adapter}" in report.out


def test_another_adapter_was_merged(base: Path, adapter: Path, tmp_path: Path) -> None:
    file, other = other_adapter(adapter, tmp_path)
    done(loratool("merge", base, other, "-o", tmp_path / "out"))
    data = validated(adapter, base, tmp_path / "out", status=1)
    assert data["counts"]["not applied"] == 14
    assert data["verdict"] == "other changes"  # the norm, which both replace, is there
    report = loratool("validate", adapter, "--base", base, "--merged", tmp_path / "out")
    assert "contains only a part of" in report.out and ": 1 of 15 updates" in report.out
    assert file.exists()


def other_adapter(adapter: Path, folder: Path) -> tuple[Path, Path]:
    """The same targets with random factors of the same size."""
    copy = shutil.copytree(adapter, folder / "other")
    file = copy / "adapter_model.safetensors"
    generator = torch.Generator().manual_seed(7)
    stored = {
        name: torch.randn(value.shape, generator=generator) * value.std()
        if "lora" in name
        else value
        for name, value in load_file(file).items()
    }
    save_file(stored, file)
    return file, copy


def test_two_adapters_were_merged(base: Path, adapter: Path, tmp_path: Path) -> None:
    _, other = other_adapter(adapter, tmp_path)
    file = other / "adapter_model.safetensors"
    save_file({n: v for n, v in load_file(file).items() if "lora" in n}, file)
    done(loratool("merge", base, adapter, other, "-o", tmp_path / "out"))
    data = validated(adapter, base, tmp_path / "out", status=1)
    assert data["verdict"] == "other changes"
    assert data["counts"]["other changes"] == 14
    low_rank = [e for e in data["tensors"].values() if e["kind"] == "low_rank"]
    assert sum(entry["contained"] for entry in low_rank) >= 12  # 256 weights tell to 10%
    for entry in low_rank:
        middle = (entry["strength"]["low"] + entry["strength"]["high"]) / 2
        assert 0.7 < middle < 1.3


def test_one_layer_was_left_out(
    base: Path, adapter: Path, changed: Callable[..., Path], tensors: Tensors
) -> None:
    bad = changed(lambda found: found.update({Q: tensors[Q].clone()}))
    data = validated(adapter, base, bad, status=1)
    assert data["verdict"] == "other changes"
    assert data["counts"]["not applied"] == 1
    assert data["tensors"][Q]["verdict"] == "not applied"
    report = loratool("validate", adapter, "--base", base, "--merged", bad)
    assert "contains only a part of" in report.out and ": 14 of 15 updates" in report.out
    rows = [line for line in report.out.splitlines() if line.strip().startswith("model.")]
    assert Q in rows[0]  # what matters comes first


def test_one_weight_was_edited(base: Path, adapter: Path, changed: Callable[..., Path]) -> None:
    bad = changed(lambda found: found[UP][2].__setitem__(3, 1.0))
    data = validated(adapter, base, bad, status=1)
    assert data["verdict"] == "other changes"
    assert "the first at [2, 3]" in data["tensors"][UP]["reason"]
    report = loratool("validate", adapter, "--base", base, "--merged", bad)
    assert f"contains {adapter}, and other changes" in report.out


@pytest.mark.parametrize("name", [EMBED, NORM, "model.layers.0.input_layernorm.weight"])
def test_another_tensor_was_edited(
    name: str, base: Path, adapter: Path, changed: Callable[..., Path]
) -> None:
    bad = changed(lambda found: found[name].view(-1)[3:5].add_(0.5))
    data = validated(adapter, base, bad, status=1)
    assert data["verdict"] == data["tensors"][name]["verdict"] == "other changes"
    assert "2 of " in data["tensors"][name]["reason"]
    assert data["unchanged"] == 5 + (name == NORM)


def test_missing_additional_and_resized_tensors(
    base: Path, adapter: Path, changed: Callable[..., Path]
) -> None:
    def spoil(found: Tensors) -> None:
        del found["lm_head.weight"]
        found["model.extra.weight"] = torch.ones(2)
        found[EMBED] = torch.cat([found[EMBED], torch.zeros(1, 16)])
        found[Q] = found[Q][:-1].clone()

    data = validated(adapter, base, changed(spoil), status=1)
    assert data["verdict"] == "other changes"
    assert data["missing"] == ["lm_head.weight"]
    assert data["extra"] == ["model.extra.weight"]
    assert data["tensors"][EMBED]["reason"] == "its shape is (33, 16), not (32, 16)"
    assert data["tensors"][Q]["reason"] == "its shape is (15, 16), not (16, 16)"


def test_buffers_may_be_gone_or_new(base: Path, adapter: Path, tmp_path: Path) -> None:
    tensors = {**values(base), "model.rotary_emb.inv_freq": torch.rand(4)}
    buffered = save_model(tmp_path / "base", tensors)
    done(loratool("merge", buffered, adapter, "-o", tmp_path / "merged"))
    plain = {n: v for n, v in values(tmp_path / "merged").items() if "inv_freq" not in n}
    validated(adapter, buffered, save_model(tmp_path / "plain", plain))
    validated(adapter, base, tmp_path / "merged")


def test_other_files_hold_the_same_tensors(
    base: Path, adapter: Path, merged: Path, tmp_path: Path
) -> None:
    tensors = values(merged)
    sharded = save_model(tmp_path / "sharded", tensors, files=3)
    prefixed = save_model(tmp_path / "prefixed", {f"wrapped.{n}": v for n, v in tensors.items()})
    places = [sharded, prefixed, merged / "model.safetensors"]
    for legacy in (False, True):
        places.append(model_folder(tmp_path / f"bin {legacy}"))
        file = places[-1] / "pytorch_model.bin"
        torch.save(tensors, file, _use_new_zipfile_serialization=not legacy)
    for place in places:
        result = loratool("validate", adapter, "--base", base, "--merged", place, "--json")
        assert (result.status, result.data["verdict"]) == (0, "applied"), place


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_a_merge_in_another_type(
    dtype: torch.dtype, base: Path, adapter: Path, tmp_path: Path
) -> None:
    name = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float64: "fp64"}[dtype]
    done(loratool("merge", base, adapter, "-o", tmp_path / "out", "--dtype", name))
    data = validated(adapter, base, tmp_path / "out")
    assert data["verdict"] == "applied" and data["unchanged"] == 6
    cast = save_model(tmp_path / "cast", {n: v.to(dtype) for n, v in values(base).items()})
    assert validated(adapter, base, cast, status=1)["verdict"] == "not applied"
    wide = {n: v.float() for n, v in values(tmp_path / "out").items()}
    validated(adapter, base, save_model(tmp_path / "wide", wide))


@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
def test_how_it_was_rounded(rounding: str, base: Path, adapter: Path, tmp_path: Path) -> None:
    options = ("--rounding", rounding, "--dtype", "bf16")
    done(loratool("merge", base, adapter, "-o", tmp_path / "out", *options))
    data = validated(adapter, base, tmp_path / "out")
    ways = {entry["way"] for entry in data["tensors"].values() if "way" in entry}
    assert ways == {
        "by stochastic rounding"
        if rounding == "stochastic"
        else "rounded once: loratool's way, and PEFT's by default"
    }


def small(folder: Path, scale: float) -> tuple[Path, Path, Path]:
    """A bf16 base, an adapter of that size without a norm, and the merge of both."""
    tensors = llama(dtype=torch.bfloat16)
    base = save_model(folder / "base", tensors)
    tuned = {n: v for n, v in finetuned(llama()).items() if n != NORM}
    tuned = save_model(folder / "tuned", {**llama(), **tuned})
    wide = save_model(folder / "wide", llama())
    adapter = folder / "adapter"
    done(loratool("extract", wide, tuned, "-o", adapter, "--lora-only"))
    settings = json.loads((adapter / "adapter_config.json").read_text())
    settings["lora_alpha"] *= scale
    (adapter / "adapter_config.json").write_text(json.dumps(settings))
    done(loratool("merge", base, adapter, "-o", folder / "merged"))
    return base, adapter, folder / "merged"


def test_what_rounding_hides_cannot_be_told(tmp_path: Path) -> None:
    base, adapter, merged = small(tmp_path, 1e-8)
    for place in (base, merged):
        data = validated(adapter, base, place, status=3)
        assert data["verdict"] == "cannot be told"
        assert data["counts"]["cannot be told"] == 14
    report = loratool("validate", adapter, "--base", base, "--merged", merged)
    assert report.status == 3
    assert f"whether {merged} contains {adapter} cannot be told: rounding hides it" in report.out
    edited = values(merged)
    edited[UP][0, 0] *= 2
    bad = save_model(tmp_path / "edited", edited)
    assert validated(adapter, base, bad, status=1)["verdict"] == "other changes"


def test_few_weights_of_many_tensors_are_evidence_together(tmp_path: Path) -> None:
    base, adapter, merged = small(tmp_path, 5e-5)
    data = validated(adapter, base, merged)
    assert data["counts"]["cannot be told"] == 14
    assert data["evidence"] >= 16
    assert data["verdict"] == "applied"
    assert validated(adapter, base, base, status=1)["verdict"] == "not applied"


def test_tensors_are_judged_again_at_the_strength_of_the_others(tmp_path: Path) -> None:
    """One with few telling weights cannot find the strength by itself."""
    base, adapter, _ = small(tmp_path, 1.0)
    file = adapter / "adapter_model.safetensors"
    stored = load_file(file)
    for name in stored:
        if "layers.0" in name and "lora_B" in name:
            stored[name] = stored[name] * 3e-4
    save_file(stored, file)
    done(loratool("merge", base, f"{adapter}=0.5", "-o", tmp_path / "half"))
    data = validated(adapter, base, tmp_path / "half", status=1)
    assert (data["verdict"], data["strength"]["value"]) == ("another strength", 0.5)
    assert data["counts"]["other changes"] == data["counts"]["not applied"] == 0
    assert data["counts"]["another strength"] >= 7


def test_the_result_does_not_depend_on_the_number_of_cores(
    base: Path, adapter: Path, merged: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = validated(adapter, base, merged)
    monkeypatch.setattr("os.sched_getaffinity", lambda _: {0, 1, 2, 3, 4}, raising=False)
    assert validated(adapter, base, merged) == first


def test_lazy_models_are_proved_unsaved(base: Path, adapter: Path) -> None:
    report = library.validate(adapter, base, library.merge(base, [(adapter, 1.0)]))
    assert report.ok and report.data["verdict"] == "applied"
    half = library.merge(base, [(adapter, 0.5)])
    assert library.validate(adapter, base, half, weight=0.5).ok


def test_an_adapter_that_does_not_fit_is_told_as_ever(
    base: Path, adapter: Path, merged: Path, tmp_path: Path
) -> None:
    bad = shutil.copytree(adapter, tmp_path / "bad")
    stored = load_file(bad / "adapter_model.safetensors")
    stored[f"{PREFIX}{UP.removesuffix('.weight')}.lora_B.weight"] = torch.zeros(99, 16)
    save_file(stored, bad / "adapter_model.safetensors")
    found = loratool("validate", bad, "--base", base, "--merged", merged)
    plain = loratool("validate", bad, "--base", base)
    assert (found.status, found.out) == (plain.status, plain.out) == (1, plain.out)


def test_factors_that_are_not_finite_are_told(
    base: Path, adapter: Path, merged: Path, tmp_path: Path
) -> None:
    bad = shutil.copytree(adapter, tmp_path / "bad")
    stored = load_file(bad / "adapter_model.safetensors")
    name = f"{PREFIX}{UP.removesuffix('.weight')}.lora_B.weight"
    stored[name][0, 0] = torch.nan
    save_file(stored, bad / "adapter_model.safetensors")
    found = loratool("validate", bad, "--base", base, "--merged", merged)
    assert found.status == 1
    assert "does not fit" in found.out and f"{name}: holds NaN or Inf" in found.out


def refusal(adapter: Path, base: Path, merged: Path) -> Result:
    return loratool("validate", adapter, "--base", base, "--merged", merged)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("name", [UP, NORM, EMBED])
def test_values_that_are_not_finite_are_refused(
    name: str, value: float, base: Path, adapter: Path, changed: Callable[..., Path]
) -> None:
    bad = changed(lambda found: found[name].view(-1)[3:4].fill_(value))
    refused(refusal(adapter, base, bad), bad, name, "holds NaN or Inf")


def test_other_architectures_are_refused(base: Path, adapter: Path, tmp_path: Path) -> None:
    wide = save_model(tmp_path / "wide", llama(hidden=8))
    refused(
        refusal(adapter, base, wide), wide, "is no merge into", "21 of 21 tensors", "(32, 16)",
        "(32, 8)",
    )  # fmt: skip
    renamed = {f"x.{name[::-1]}": value for name, value in llama().items()}
    other = save_model(tmp_path / "other", renamed)
    refused(refusal(adapter, base, other), other, "is no merge into", "missing")


@pytest.mark.parametrize("scheme", ["integer", "scaled"])
def test_quantized_models_are_refused(
    scheme: str, base: Path, adapter: Path, changed: Callable[..., Path]
) -> None:
    def quantize(found: Tensors) -> None:
        for name in list(found):
            if "proj" in name and scheme == "integer":
                found[name] = (found[name] * 100).to(torch.int8)
            elif "proj" in name:
                found[name] = found[name].to(torch.float8_e4m3fn)
                found[f"{name}_scale_inv"] = torch.ones(1)

    bad = changed(quantize)
    refused(refusal(adapter, base, bad), bad, "quantized", "_proj.weight")


def test_what_is_no_model_is_refused(base: Path, adapter: Path, tmp_path: Path) -> None:
    refused(refusal(adapter, base, tmp_path / "nowhere"), tmp_path / "nowhere", "no such file")
    refused(refusal(adapter, base, adapter), adapter, "holds no checkpoint", "it is an adapter")
    empty = model_folder(tmp_path / "empty", CONFIG)
    refused(refusal(adapter, base, empty), empty, "holds no checkpoint")


@pytest.mark.parametrize("weight", ["0", "nan", "inf", "-0.0"])
def test_strengths_that_make_no_sense(weight: str, base: Path, adapter: Path, merged: Path) -> None:
    result = loratool("validate", adapter, "--base", base, "--merged", merged, f"--weight={weight}")
    refused(result, "--weight", "cannot be looked for", status=2)


def test_a_strength_needs_a_merged_model(base: Path, adapter: Path) -> None:
    result = loratool("validate", adapter, "--base", base, "--weight", 0.5)
    refused(result, "--weight", "--merged", status=2)
