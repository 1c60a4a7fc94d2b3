"""Adapters of diffusion models: the same merge through every format, with and without the base."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import loratool
from loratool.adapter import LazyUpdate
from loratool.errors import FormatError, InputError, MismatchError
from loratool.opening import open_adapter, open_checkpoint
from loratool.updates import DoRA, LowRank, tensors_of
from tests.adapter_forms import Tensors, assert_same_bits
from tests.cli.tiny import done, refused
from tests.cli.tiny import loratool as command
from tests.diffusion import pipelines
from tests.diffusion.adapters import (
    changed,
    converted,
    denoiser,
    foreign,
    merged,
    single_file,
    tensors,
    trained,
)

KINDS = ("sd1", "sdxl", "flux", "sd3")
SS = {"ss_network_dim": "2", "modelspec.title": "Tiny", "sshs_model_hash": "0"}
QUERY = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_q"
Bases = Callable[[str], tuple[Path, Path]]


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Bases:
    """Kind -> the folder of a pipeline, and its denoiser and text encoder in a single file."""

    @cache
    def save(kind: str) -> tuple[Path, Path]:
        folder = tmp_path_factory.mktemp(kind)
        pipeline = pipelines.save(kind, folder / kind)
        return pipeline, single_file(kind, pipeline, folder / f"{kind}.safetensors")

    return save


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Kind -> an adapter of several ranks that diffusers has saved."""

    @cache
    def save(kind: str) -> Path:
        folder = tmp_path_factory.mktemp(f"{kind}-lora") / "lora"
        return trained(kind, folder, rank_pattern={"to_k": 3}, lora_alpha=2)

    return save


def same_factors(one: Path, other: Path) -> None:
    """Both have the same updates under the same names, to the bit."""
    here, there = open_adapter(one), open_adapter(other)
    assert here.keys() == there.keys()
    for name, update in here.items():
        assert update.shape == there[name].shape and update.kind == there[name].kind
        found, wanted = update.load(), there[name].load()
        assert isinstance(found, LowRank | DoRA) and isinstance(wanted, LowRank | DoRA)
        for (_, a), (_, b) in zip(tensors_of(found), tensors_of(wanted), strict=True):
            assert a.dtype == b.dtype and torch.equal(a, b), name


@pytest.mark.parametrize("kind", KINDS)
def test_every_format_merges_to_the_same_bits(
    kind: str, bases: Bases, sources: Callable[[str], Path], tmp_path: Path
) -> None:
    """And comes back from each with its own names and factors, without a base."""
    source = sources(kind)
    folder, single = bases(kind)
    wanted = merged(folder, source, tmp_path / "m")
    in_single = merged(single, source, tmp_path / "ms")
    assert changed(wanted, folder) == len(open_adapter(source))
    assert 15 < changed(in_single, single) < len(in_single)
    for form in ("kohya", "lycoris", "peft"):
        written = converted(source, form, tmp_path / form, folder)
        assert_same_bits(merged(folder, written, tmp_path / f"{form}-m"), wanted)
        assert_same_bits(merged(single, written, tmp_path / f"{form}-ms"), in_single)
        back = converted(written, "diffusers", tmp_path / f"{form}-back")
        same_factors(back, source)


@pytest.mark.parametrize("kind", KINDS)
def test_a_file_of_kohyas_own(
    kind: str, bases: Bases, sources: Callable[[str], Path], tmp_path: Path
) -> None:
    """Names that only the base resolves, in either of its layouts, and the same file again."""
    folder, single = bases(kind)
    made = converted(sources(kind), "kohya", tmp_path / "made", folder)
    file = foreign(made, tmp_path / "foreign.safetensors", SS)
    adapter = open_adapter(file)
    assert (adapter.format, adapter.naming) == ("kohya", "kohya")
    assert not adapter.problems and not adapter.notes
    fewer = kind in ("flux", "sd3")
    assert (len(adapter) < len(open_adapter(sources(kind)))) == fewer
    for base in (folder, single):
        wanted = merged(base, sources(kind), tmp_path / f"w-{base.name}")
        assert_same_bits(merged(base, file, tmp_path / f"m-{base.name}"), wanted)
        assert loratool.validate(file, base).ok
        for form in ("diffusers", "peft"):
            written = converted(file, form, tmp_path / f"{form}-{base.name}", base)
            assert_same_bits(merged(base, written, tmp_path / f"{form}-m-{base.name}"), wanted)
            back = converted(written, "kohya", tmp_path / f"{form}-back-{base.name}")
            assert_same_bits(tensors(back), load_file(file))
            with safe_open(back / "lora.safetensors", "pt") as content:
                said = content.metadata()
            assert {k: v for k, v in SS.items() if said.get(k) == v}.keys() == {
                "ss_network_dim", "modelspec.title",
            }  # fmt: skip


def test_names_need_the_base_only_where_they_are_the_makers(
    sources: Callable[[str], Path], tmp_path: Path
) -> None:
    converted(sources("sd1"), "kohya", tmp_path / "sd1")
    assert f"{QUERY}.lora_up.weight" in tensors(tmp_path / "sd1")
    for kind in ("sdxl", "flux", "sd3"):
        with pytest.raises(MismatchError, match="by its makers' names: give --base"):
            converted(sources(kind), "kohya", tmp_path / kind)


def test_a_file_of_kohyas_own_needs_its_base(
    bases: Bases, sources: Callable[[str], Path], tmp_path: Path
) -> None:
    made = converted(sources("flux"), "kohya", tmp_path / "made", bases("flux")[0])
    file = foreign(made, tmp_path / "foreign.safetensors")
    for form in ("peft", "diffusers"):
        with pytest.raises(MismatchError, match="is a name of kohya: give the base"):
            converted(file, form, tmp_path / form)
    with pytest.raises(MismatchError, match="the base has no module of this name"):
        converted(file, "peft", tmp_path / "peft", bases("sd1")[0])
    again = converted(file, "kohya", tmp_path / "again")
    assert_same_bits(tensors(again), load_file(file))


def test_dora_and_other_precisions(bases: Bases, tmp_path: Path) -> None:
    folder, single = bases("flux")
    parts = r".*(to_[qkv]|add_[qkv]_proj|proj_mlp|norm_out.linear)"
    source = trained("flux", tmp_path / "lora", use_dora=True, target_modules=parts, lora_alpha=3)
    written = converted(source, "kohya", tmp_path / "kohya", folder)
    assert any(key.endswith("qkv.dora_scale") for key in tensors(written))
    back = converted(written, "diffusers", tmp_path / "back")
    same_factors(back, source)
    file = foreign(written, tmp_path / "foreign.safetensors")
    for base in (folder, single):
        wanted = merged(base, source, tmp_path / f"w-{base.name}")
        found = merged(base, file, tmp_path / f"m-{base.name}")
        for name, value in wanted.items():
            torch.testing.assert_close(found[name], value, rtol=1e-6, atol=1e-6)
    part = trained("flux", tmp_path / "part", use_dora=True, target_modules=["to_q"], text=False)
    with pytest.raises(MismatchError, match="whose magnitudes have to be known for all"):
        converted(part, "kohya", tmp_path / "out", folder)


def test_scales_that_differ_are_worked_into_fused_factors(bases: Bases, tmp_path: Path) -> None:
    folder, _ = bases("flux")
    source = trained("flux", tmp_path / "lora", alpha_pattern={"to_q": 3, "to_k": 5}, r=3)
    written = converted(source, "kohya", tmp_path / "kohya", folder)
    wanted = merged(folder, source, tmp_path / "w")
    assert_same_bits(merged(folder, written, tmp_path / "m"), wanted)
    same_factors(converted(written, "diffusers", tmp_path / "back"), source)
    file = foreign(written, tmp_path / "foreign.safetensors")
    for name, value in merged(folder, file, tmp_path / "f").items():
        torch.testing.assert_close(value, wanted[name], rtol=1e-6, atol=1e-7)


def test_a_fused_module_of_which_only_a_part_is_adapted(bases: Bases, tmp_path: Path) -> None:
    folder, _ = bases("sd3")
    source = trained("sd3", tmp_path / "lora", text=False, target_modules=["attn.to_k"])
    written = converted(source, "kohya", tmp_path / "kohya", folder)
    up = tensors(written)["lora_unet_joint_blocks_0_x_block_attn_qkv.lora_up.weight"]
    assert up.shape == (24, 2) and not up[:8].any() and up[8:16].all() and not up[16:].any()
    file = foreign(written, tmp_path / "foreign.safetensors")
    wanted = merged(folder, source, tmp_path / "w")
    assert_same_bits(merged(folder, file, tmp_path / "m"), wanted)
    split = converted(file, "diffusers", tmp_path / "split", folder)
    assert tensors(split).keys() == tensors(source).keys()  # nothing of what was not adapted


def test_extracted_from_single_files(bases: Bases, tmp_path: Path) -> None:
    """Names of single files are kohya's already: nothing is cut, or put together."""
    _, single = bases("flux")
    state = load_file(single)
    fused = "model.diffusion_model.double_blocks.0.img_attn.qkv.weight"
    swapped = "model.diffusion_model.final_layer.adaLN_modulation.1.weight"
    for name in (fused, swapped):
        state[name] = state[name] + torch.randn(state[name].shape[0], 1) @ torch.randn(1, 8)
    save_file(state, tmp_path / "tuned.safetensors")
    extracted = loratool.extract(
        single, tmp_path / "tuned.safetensors", rank=1, format="kohya", lora_only=True
    )
    extracted.save(tmp_path / "lora")
    modules = {key.partition(".")[0] for key in tensors(tmp_path / "lora")}
    assert modules == {
        "lora_unet_double_blocks_0_img_attn_qkv", "lora_unet_final_layer_adaLN_modulation_1"
    }  # fmt: skip
    assert set(open_adapter(tmp_path / "lora")) == {fused, swapped}
    found = merged(single, tmp_path / "lora", tmp_path / "m")
    for name in (fused, swapped):
        torch.testing.assert_close(found[name], state[name], rtol=1e-4, atol=1e-4)
    split = converted(tmp_path / "lora", "diffusers", tmp_path / "split", single)
    assert len(open_adapter(split)) == 4
    assert_same_bits(merged(single, split, tmp_path / "s"), found)


def test_steps_keep_to_kohyas_names(
    bases: Bases, sources: Callable[[str], Path], tmp_path: Path
) -> None:
    folder, _ = bases("flux")
    made = converted(sources("flux"), "kohya", tmp_path / "made", folder)
    one = foreign(made, tmp_path / "one.safetensors", SS)
    two = tmp_path / "two.safetensors"
    save_file({key: value * 0.5 for key, value in load_file(one).items()}, two)
    loratool.stack([(one, 1.0), (two, 2.0)]).save(tmp_path / "stacked")
    loratool.rescale(one, by=1.25).save(tmp_path / "rescaled")
    stacked, rescaled = open_adapter(tmp_path / "stacked"), open_adapter(tmp_path / "rescaled")
    for found in (stacked, rescaled):
        assert (found.format, found.naming) == ("kohya", "kohya")
    # 0.5 times every tensor, alpha too, is an eighth of the delta.
    found = merged(folder, tmp_path / "stacked", tmp_path / "m")
    wanted = merged(folder, tmp_path / "rescaled", tmp_path / "w")
    for name, value in wanted.items():
        torch.testing.assert_close(found[name], value, rtol=1e-5, atol=1e-6)
    with pytest.raises(MismatchError, match="names weights as kohya does"):
        loratool.stack([(one, 1.0), (sources("flux"), 1.0)])
    both = loratool.stack([(one, 0.5), (sources("flux"), 0.75)], base=folder)
    both.save(tmp_path / "both")
    for name, value in merged(folder, tmp_path / "both", tmp_path / "b").items():
        torch.testing.assert_close(value, wanted[name], rtol=1e-5, atol=1e-6)
    assert loratool.inspect(one).data["counts"]["low_rank"] == len(stacked)


# Dialects and single keys


def pair(module: str, rank: int = 2, out: int = 8, width: int = 8, **more: Any) -> Tensors:
    generator = torch.Generator().manual_seed(0)
    return {
        f"{module}.lora_down.weight": torch.randn(rank, width, generator=generator),
        f"{module}.lora_up.weight": torch.randn(out, rank, generator=generator),
        **{f"{module}.{key}": value for key, value in more.items()},
    }


def write(file: Path, state: Tensors, **metadata: str) -> Path:
    save_file(state, file, metadata=metadata or None)
    return file


def test_without_alpha_the_scale_is_one_and_said(bases: Bases, tmp_path: Path) -> None:
    file = write(tmp_path / "a.safetensors", pair(QUERY))
    (note,) = open_adapter(file).notes
    assert "1 module without alpha" in note and "--alpha" in note
    told = converted(file, "kohya", tmp_path / "told", alpha=8.0)
    assert float(tensors(told)[f"{QUERY}.alpha"]) == 8
    (update,) = open_adapter(told).values()
    found = update.load()
    assert isinstance(found, LowRank) and found.scale == 4
    with pytest.raises(InputError, match="says itself what --alpha would say"):
        converted(told, "kohya", tmp_path / "again", alpha=8.0)


@pytest.mark.parametrize("suffix", [".pt", ".ckpt", ".bin"])
def test_torch_files(suffix: str, tmp_path: Path) -> None:
    state = pair(QUERY, alpha=torch.tensor(1.0))
    torch.save(state, tmp_path / f"lora{suffix}")
    adapter = open_adapter(tmp_path / f"lora{suffix}")
    assert adapter.format == "kohya" and set(adapter) == {f"{QUERY}.weight"}
    assert open_adapter(tmp_path).format == "kohya"


@pytest.mark.parametrize(
    ("down", "up"), [("lora_A", "lora_B"), ("lora_down", "lora_up"), ("lora.down", "lora.up")]
)
@pytest.mark.parametrize("prefix", ["diffusion_model.", "model.diffusion_model."])
def test_keys_of_comfyui_and_its_trainers(
    prefix: str, down: str, up: str, bases: Bases, tmp_path: Path
) -> None:
    folder, single = bases("flux")
    module = f"{prefix}double_blocks.0.img_attn.qkv"
    usual = pair("lora_unet_double_blocks_0_img_attn_qkv", out=24)
    other = {
        key.replace("lora_unet_double_blocks_0_img_attn_qkv", module)
        .replace("lora_down", down).replace("lora_up", up): value
        for key, value in usual.items()
    }  # fmt: skip
    one, two = write(tmp_path / "1.safetensors", usual), write(tmp_path / "2.safetensors", other)
    assert open_adapter(two).format == "kohya"
    for base in (folder, single):
        wanted = merged(base, one, tmp_path / f"w-{base.name}")
        assert_same_bits(merged(base, two, tmp_path / f"m-{base.name}"), wanted)


def test_kohyas_ends_on_diffusers_names(bases: Bases, tmp_path: Path) -> None:
    name = "transformer.transformer_blocks.0.attn.to_q"
    file = write(tmp_path / "a.safetensors", pair(name, alpha=torch.tensor(2.0)))
    adapter = open_adapter(file)
    assert adapter.naming == "" and set(adapter) == {f"{name}.weight"}
    written = converted(file, "diffusers", tmp_path / "written")
    assert set(tensors(written)) == {f"{name}.lora_A.weight", f"{name}.lora_B.weight"}


def test_lokr_under_diffusers_names_and_settings(tmp_path: Path) -> None:
    """PEFT's LoKr in a pipeline: its scale is alpha / r, whole matrices or not."""
    name = "transformer.transformer_blocks.0.attn.to_q"
    state = {f"{name}.lokr_w1": torch.randn(2, 2), f"{name}.lokr_w2": torch.randn(4, 4)}
    settings = {"transformer.r": 4, "transformer.alpha": 8, "transformer.peft_type": "LOKR"}
    file = write(tmp_path / "a.safetensors", state, lora_adapter_metadata=json.dumps(settings))
    (update,) = open_adapter(file).values()
    assert update.kind == "lokr" and update.name == f"{name}.weight"
    assert getattr(update.load(), "scale", None) == 2


def test_split_qkv_is_merged_as_the_file_states_it(tmp_path: Path) -> None:
    """As sd-scripts, diffusers and ComfyUI do, though it was trained with three times as much."""
    name = "lora_unet_double_blocks_0_img_attn_qkv"
    state = pair(name, rank=6, out=24, alpha=torch.tensor(2.0))
    told = json.dumps({"split_qkv": "True"})
    file = write(tmp_path / "a.safetensors", state, ss_network_args=told)
    adapter = open_adapter(file)
    (note,) = adapter.notes
    assert "split_qkv" in note and "merged as the file states it" in note
    (update,) = adapter.values()
    found = update.load()
    assert isinstance(found, LowRank) and found.scale == 2 / 6


# Bad input: one line each, all of them at once, and nothing is written


def complaints(file: Path) -> list[str]:
    return [str(problem) for problem in open_adapter(file).problems]


def test_all_that_is_wrong_is_told_at_once(bases: Bases, tmp_path: Path) -> None:
    other = QUERY.replace("to_q", "to_k")
    third = QUERY.replace("to_q", "to_v")
    state = {
        **pair(QUERY), **pair(other), **pair(third, alpha=torch.ones(3)),
        "lora_unet_conv_in.lora_up.weight": torch.ones(4, 2),
        "lora_unet_conv_in.rest": torch.ones(1),
        f"{QUERY}.dora_scale": torch.ones(3, 1),
    }  # fmt: skip
    state[f"{other}.lora_up.weight"] = torch.ones(8, 3)
    file = write(tmp_path / "a.safetensors", state)
    found = "\n".join(complaints(file))
    for words in (
        "lora_unet_conv_in.lora_down.weight: missing, but lora_unet_conv_in.lora_up.weight is",
        "lora_unet_conv_in.rest: unexpected key",
        f"{other}: its two factors have different ranks (expected 2, found 3)",
        f"{third}.alpha: is no number (expected one value, found (3,))",
        f"{QUERY}.dora_scale: does not fit its update",
    ):
        assert words in found
    with pytest.raises(MismatchError) as error:
        loratool.merge(bases("sd1")[0], [(file, 1.0)])
    assert len(str(error.value).splitlines()) >= 6
    with pytest.raises(MismatchError, match="cannot be converted"):
        converted(file, "lycoris", tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("state", "words"),
    [
        ({"hada_w1_a": (8, 2), "hada_w1_b": (2, 8), "hada_w2_a": (8, 2)}, "hada_w2_b: missing"),
        ({"hada_w1_a": (8, 2), "hada_w1_b": (3, 8), "hada_w2_a": (8, 2), "hada_w2_b": (2, 8)},
         "the factors of w1 have different ranks"),
        ({"hada_w1_a": (8, 2), "hada_w1_b": (2, 8), "hada_w2_a": (8, 2), "hada_w2_b": (2, 4)},
         "its two matrices do not have one shape"),
        ({"hada_w1_a": (2, 8), "hada_w1_b": (2, 8), "hada_w2_a": (2, 8), "hada_w2_b": (2, 8),
          "hada_t1": (2, 2, 3, 3)}, "hada_t2: missing"),
        ({"lokr_w1": (2, 2)}, "lokr_w2_a: missing"),
        ({"lokr_w1": (2, 2), "lokr_w2_a": (4, 2), "lokr_w2_b": (3, 4)}, "different ranks"),
        ({"weight": (8,)}, "on_input: missing"),
        ({"diff": (8, 8), "lokr_w1": (2, 2), "lokr_w2": (4, 4)}, "updates of several methods"),
        ({"diff": (8, 8), "dora_scale": (8, 1)}, "does not go with this kind of update"),
        ({"diff_b": (8, 1)}, "is no bias"),
        ({"lora_down.weight": (2, 8, 3, 3), "lora_up.weight": (8, 2, 3, 3), "diff_b": (8,)},
         "has a kernel where its convolution is 1x1"),
        ({"lora_down.weight": (2, 8, 1, 1), "lora_mid.weight": (3, 2, 3, 3),
          "lora_up.weight": (8, 2, 1, 1), "diff_b": (8,)}, "does not fit its factors"),
    ],
)  # fmt: skip
def test_half_an_update_of_lycoris(
    state: dict[str, tuple[int, ...]], words: str, tmp_path: Path
) -> None:
    tensors = {f"{QUERY}.{key}": torch.ones(shape) for key, shape in state.items()}
    # What makes the file one of LyCORIS.
    tensors["lora_unet_conv_in.diff"] = torch.ones(4, 4, 3, 3)
    file = write(tmp_path / "a.safetensors", tensors)
    assert any(words in text for text in complaints(file)), complaints(file)


@pytest.mark.parametrize(
    ("key", "method"),
    [
        ("oft_blocks", "OFT"), ("a1.weight", "GLoRA"), ("lambda_layer", "T-LoRA"),
        ("oft_diag", "OFT"),
    ],
)  # fmt: skip
def test_methods_that_are_refused_by_name(key: str, method: str, tmp_path: Path) -> None:
    file = write(tmp_path / "a.safetensors", {f"{QUERY}.{key}": torch.ones(2, 2)})
    with pytest.raises(FormatError, match=f"is of {method}.*cannot merge that yet"):
        open_adapter(file)


def test_keys_of_two_formats(tmp_path: Path) -> None:
    state = {**pair(QUERY), "unet.conv_in.lora_A.weight": torch.ones(2, 4)}
    file = write(tmp_path / "a.safetensors", state)
    with pytest.raises(FormatError) as error:
        open_adapter(file)
    text = str(error.value)
    assert "keys of two formats" in text and "(kohya)" in text and "(diffusers)" in text
    assert "peft: a file, not a directory" in text


def test_what_no_format_knows_is_told_with_what_was_tried(tmp_path: Path) -> None:
    file = write(tmp_path / "a.safetensors", {"x": torch.ones(1)})
    with pytest.raises(FormatError) as error:
        open_adapter(file)
    for words in ("kohya: keys are not *.lora_down.weight", "lycoris: keys are not LyCORIS's",
                  "diffusers: keys are not COMPONENT.*.lora_A.weight"):  # fmt: skip
        assert words in str(error.value)


def test_a_directory_with_several_files(tmp_path: Path) -> None:
    for name in ("a", "b"):
        write(tmp_path / f"{name}.safetensors", pair(QUERY))
    with pytest.raises(FormatError, match="several files of weights: name the one that you mean"):
        open_adapter(tmp_path)
    assert open_adapter(tmp_path / "a.safetensors").format == "kohya"


def test_a_text_encoders_update_and_a_unet_alone(bases: Bases, tmp_path: Path) -> None:
    folder, _ = bases("sd1")
    text = "lora_te_text_model_encoder_layers_0_mlp_fc1"
    state = {**pair(QUERY), **pair(text, out=24, width=16)}
    file = write(tmp_path / "a.safetensors", state)
    loratool.merge(folder, [(file, 1.0)])
    with pytest.raises(MismatchError) as error:
        loratool.merge(folder / "unet", [(file, 1.0)])
    (line,) = str(error.value).splitlines()[1:]
    assert f"{text}.weight: is for the text encoder, and the base has only unet" in line
    diffusers = converted(file, "diffusers", tmp_path / "d", folder)
    with pytest.raises(MismatchError, match=r"mlp.fc1.weight: the base has no such component, but"):
        loratool.merge(folder / "unet", [(diffusers, 1.0)])


def test_magnitudes_of_columns_of_several_modules(bases: Bases, tmp_path: Path) -> None:
    folder, single = bases("flux")
    name = "lora_unet_double_blocks_0_img_attn_qkv"
    state = pair(name, out=24, alpha=torch.tensor(1.0), dora_scale=torch.ones(1, 8))
    file = write(tmp_path / "a.safetensors", state)
    (update,) = open_adapter(file).values()
    assert (update.kind, update.axis) == ("dora", 1)
    for base in (folder, single):
        with pytest.raises(MismatchError, match="a magnitude for each column of several modules"):
            loratool.merge(base, [(file, 1.0)])
        with pytest.raises(MismatchError, match="it cannot be cut"):
            converted(file, "peft", tmp_path / "out", base)
    assert_same_bits(tensors(converted(file, "kohya", tmp_path / "again")), state)


def test_dora_that_peft_does_not_have(bases: Bases, tmp_path: Path) -> None:
    columns = pair(QUERY, alpha=torch.tensor(1.0), dora_scale=torch.ones(1, 8))
    loha = {
        f"{QUERY}.{key}": torch.ones(shape)
        for key, shape in {
            "hada_w1_a": (8, 2), "hada_w1_b": (2, 8), "hada_w2_a": (8, 2), "hada_w2_b": (2, 8),
            "dora_scale": (8, 1),
        }.items()
    }  # fmt: skip
    scaled = {f"{QUERY}.weight": torch.ones(8), f"{QUERY}.on_input": torch.tensor(0)}
    for state, words in (
        (columns, "has a magnitude for each column"),
        (loha, "is DoRA of an update that is not low-rank"),
        (scaled, "scales outputs and not their biases"),
    ):
        file = write(tmp_path / "a.safetensors", state)
        with pytest.raises(MismatchError, match=words):
            converted(file, "peft", tmp_path / "out", bases("sd1")[0])
    scaled[f"{QUERY}.on_input"] = torch.tensor(1)
    file = write(tmp_path / "inputs.safetensors", scaled)
    written = converted(file, "peft", tmp_path / "inputs", bases("sd1")[0])
    assert [value.shape for value in tensors(written).values()] == [(1, 8)]
    with pytest.raises(MismatchError, match="write it as lycoris"):
        converted(write(tmp_path / "a.safetensors", loha), "kohya", tmp_path / "out")


def test_on_the_command_line(bases: Bases, tmp_path: Path) -> None:
    other = QUERY.replace("to_q", "to_k")
    state = {**pair(QUERY), **pair(other)}
    del state[f"{other}.lora_up.weight"], state[f"{QUERY}.lora_down.weight"]
    file, out = write(tmp_path / "a.safetensors", state), tmp_path / "out"
    missing = f"{QUERY}.lora_down.weight: missing", f"{other}.lora_up.weight: missing"
    refused(command("convert", file, "--format", "lycoris", "-o", out), *missing)
    write(file, pair(QUERY))
    told = f"{QUERY}.weight: is a name of kohya: give the base"
    refused(command("convert", file, "--format", "diffusers", "-o", out), told)
    assert not out.exists()
    base = bases("sd1")[0]
    done(command("convert", file, "--format", "diffusers", "--base", base, "-o", out))
    assert open_adapter(out).format == "diffusers"


def test_names_that_fit_two_modules(tmp_path: Path) -> None:
    shapes = {"unet.a_b.c.weight": (4, 4), "unet.a.b_c.weight": (4, 4)}
    folder = tmp_path / "model"
    (folder / "unet").mkdir(parents=True)
    (folder / "model_index.json").write_text(
        json.dumps({"_class_name": "X", "unet": ["diffusers", "UNet2DConditionModel"]})
    )
    (folder / "unet" / "config.json").write_text(json.dumps({"_class_name": "X"}))
    state = {name.removeprefix("unet."): torch.ones(shape) for name, shape in shapes.items()}
    save_file(state, folder / "unet" / "diffusion_pytorch_model.safetensors")
    file = write(tmp_path / "a.safetensors", pair("lora_unet_a_b_c", out=4, width=4))
    for run in (
        lambda: loratool.merge(folder, [(file, 1.0)]),
        lambda: converted(file, "peft", tmp_path / "out", folder),
    ):
        with pytest.raises(MismatchError, match="fits several modules of the base"):
            run()


def test_a_rank_that_contradicts_the_metadata(tmp_path: Path) -> None:
    source = trained("sd1", tmp_path / "lora", text=False)
    file = source / "pytorch_lora_weights.safetensors"
    with safe_open(file, "pt") as content:
        settings = json.loads(content.metadata()["lora_adapter_metadata"])
    for wrong, words in (
        ({"unet.r": 4}, "its metadata gives it another rank (expected 4, found 2)"),
        ({"unet.use_qalora": True}, "use_qalora"),
        ({"unet.alpha_pattern": {"to_q": "x"}}, "its scale is not finite"),
        ({"unet.init_lora_weights": "pissa"}, "init_lora_weights is 'pissa'"),
    ):
        text = json.dumps({**settings, **wrong})
        write(file, tensors(source), lora_adapter_metadata=text)
        try:
            found = "\n".join(complaints(file))
        except FormatError as error:
            found = str(error)
        assert words in found
    write(file, tensors(source), lora_adapter_metadata="[]")
    with pytest.raises(FormatError, match="is not a JSON object"):
        open_adapter(file)


@pytest.mark.parametrize("form", ["kohya", "lycoris", "diffusers"])
def test_what_a_format_cannot_carry_is_refused(form: str, tmp_path: Path) -> None:
    lycoris = {
        f"{QUERY}.lokr_w1": torch.ones(2, 2), f"{QUERY}.lokr_w2": torch.ones(4, 4),
        "lora_unet_conv_in.diff": torch.ones(4, 4, 3, 3),
        "lora_unet_conv_in.diff_b": torch.ones(4),
        **pair("lora_unet_mid_block_attentions_0_proj_in"),
    }  # fmt: skip
    file = write(tmp_path / "a.safetensors", lycoris)
    if form == "lycoris":
        assert tensors(converted(file, form, tmp_path / "out")).keys() >= lycoris.keys()
        return
    with pytest.raises(MismatchError) as error:
        converted(file, form, tmp_path / "out")
    assert "LoKr" in str(error.value)
    assert not (tmp_path / "out").exists()
    if form == "kohya":
        dropped = converted(file, form, tmp_path / "out", drop=True)
        assert {key.partition(".")[0] for key in tensors(dropped)} == {
            "lora_unet_mid_block_attentions_0_proj_in"
        }


def test_lohas_of_parts_of_one_module(bases: Bases, tmp_path: Path) -> None:
    """A file of kohya's names splits exactly; what was apart is not put together."""
    folder, single = bases("flux")
    name = "lora_unet_double_blocks_0_img_attn_qkv"
    generator = torch.Generator().manual_seed(0)
    state = {
        f"{name}.hada_w{w}_{side}": torch.randn(*shape, generator=generator)
        for w in (1, 2)
        for side, shape in (("a", (24, 2)), ("b", (2, 8)))
    }
    file = write(tmp_path / "a.safetensors", {**state, f"{name}.alpha": torch.tensor(1.0)})
    wanted = merged(folder, file, tmp_path / "w")
    peft = converted(file, "peft", tmp_path / "peft", folder)
    assert {update.kind for update in open_adapter(peft).values()} == {"loha"}
    assert_same_bits(merged(folder, peft, tmp_path / "m"), wanted)
    with pytest.raises(MismatchError, match="a LoHa update is not put together with others"):
        converted(peft, "lycoris", tmp_path / "out")
    lora = converted(file, "kohya", tmp_path / "lora", to_lora=True)
    for key, value in merged(folder, lora, tmp_path / "l").items():
        torch.testing.assert_close(value, wanted[key], rtol=1e-5, atol=1e-5)
    del single


def test_lokrs_are_cut_by_blocks(bases: Bases, tmp_path: Path) -> None:
    folder, _ = bases("flux")
    name = "lora_unet_double_blocks_0_img_attn_qkv"
    for rows, kind in ((3, "lokr"), (2, "dense")):
        state = {
            f"{name}.lokr_w1": torch.randn(rows, 2), f"{name}.lokr_w2": torch.randn(24 // rows, 4)
        }  # fmt: skip
        file = write(tmp_path / f"{rows}.safetensors", state)
        wanted = merged(folder, file, tmp_path / f"w{rows}")
        written = converted(file, "lycoris", tmp_path / f"l{rows}", folder)
        assert_same_bits(merged(folder, written, tmp_path / f"m{rows}"), wanted)
        lora = converted(file, "diffusers", tmp_path / f"d{rows}", folder, to_lora=True, rank=8)
        for key, value in merged(folder, lora, tmp_path / f"r{rows}").items():
            torch.testing.assert_close(value, wanted[key], rtol=1e-4, atol=1e-4)
        del kind


def test_a_changed_file_is_no_longer_loratools(
    bases: Bases, sources: Callable[[str], Path], tmp_path: Path
) -> None:
    """Another program has taken something out, and has kept the metadata."""
    folder, _ = bases("flux")
    written = converted(sources("flux"), "kohya", tmp_path / "kohya", folder)
    file = written / "lora.safetensors"
    with safe_open(file, "pt") as content:
        metadata = content.metadata()
    state = load_file(file)
    name = "lora_unet_double_blocks_0_img_attn_qkv"
    state[f"{name}.lora_down.weight"] = state[f"{name}.lora_down.weight"][:3].contiguous()
    state[f"{name}.lora_up.weight"] = state[f"{name}.lora_up.weight"][:, :3].contiguous()
    save_file(state, file, metadata=metadata)
    adapter = open_adapter(written)
    assert adapter.naming == "kohya" and any("was changed since" in n for n in adapter.notes)
    assert_same_bits(
        merged(folder, written, tmp_path / "m"),
        merged(folder, foreign(written, tmp_path / "f.safetensors"), tmp_path / "w"),
    )


def test_one_component_is_named_as_it_was(sources: Callable[[str], Path], tmp_path: Path) -> None:
    """PEFT's adapter of a UNet, whose names say no component, through both formats and back."""
    source = open_adapter(sources("sd1"))
    names = {n: n.removeprefix("unet.") for n in source if n.startswith("unet.")}
    state = {
        f"base_model.model.{key.removeprefix('unet.')}": value
        for key, value in tensors(sources("sd1")).items()
        if key.startswith("unet.")
    }
    folder = tmp_path / "peft"
    folder.mkdir()
    save_file(state, folder / "adapter_model.safetensors")
    settings = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "rank_pattern": {"to_k": 3}}
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    assert set(open_adapter(folder)) == set(names.values())
    for form in ("kohya", "diffusers"):
        written = converted(folder, form, tmp_path / form)
        found: dict[str, LazyUpdate] = dict(open_adapter(written))
        assert found.keys() == set(names.values())
        starts = ("lora_unet_",) if form == "kohya" else ("unet.",)
        assert all(key.startswith(starts) for key in tensors(written))
        same_factors(converted(written, "peft", tmp_path / f"{form}-back"), folder)


def test_what_a_name_does_not_tell_needs_the_base(tmp_path: Path) -> None:
    folder = tmp_path / "peft"
    folder.mkdir()
    state = {
        "base_model.model.layers.0.q_proj.lora_A.weight": torch.ones(2, 4),
        "base_model.model.layers.0.q_proj.lora_B.weight": torch.ones(4, 2),
    }
    save_file(state, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 2}))
    for form, words in (
        ("kohya", "is no name of a diffusion model's; if it is of one, give --base"),
        ("diffusers", "is no name of a pipeline's; if it is of one, give the base with --base"),
    ):
        with pytest.raises(MismatchError, match=words):
            converted(folder, form, tmp_path / form)


def test_checkpoints_are_no_adapters(bases: Bases) -> None:
    for kind in ("sd1", "flux"):
        for base in bases(kind):
            assert open_checkpoint(base)
            with pytest.raises(FormatError, match="it is a whole model"):
                open_adapter(base)
    assert denoiser("flux") == "transformer"
