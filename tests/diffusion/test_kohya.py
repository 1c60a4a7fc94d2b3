"""Underscored names mean what diffusers' own converters make of them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from diffusers.loaders.lora_conversion_utils import (
    _convert_kohya_flux_lora_to_diffusers,
    _convert_non_diffusers_lora_to_diffusers,
    _convert_xlabs_flux_lora_to_diffusers,
    _maybe_map_sgm_blocks_to_diffusers,
)
from diffusers.utils.state_dict_utils import (
    convert_all_state_dict_to_peft,
    convert_state_dict_to_peft,
    convert_unet_state_dict_to_peft,
)

from loratool.diffusion.adapter_keys import parse_key
from loratool.diffusion.kohya import kohya_layout, kohya_modules, kohya_spelling
from loratool.diffusion.layouts import canonical_shapes, model_kind, single_file_modules
from loratool.diffusion.links import Rows
from loratool.diffusion.xlabs import xlabs_modules
from tests import single_files
from tests.diffusion import pipelines
from tests.diffusion.pipelines import KINDS
from tests.single_files import Shapes, State

REAL_FLUX = {"x_embedder": (3072, 64), "context_embedder": (3072, 4096)}
UNET_CONFIG = type("Config", (), {"layers_per_block": 2})()


def modules(shapes: Shapes, dimensions: int = 2) -> set[str]:
    """Modules whose weight has at least so many dimensions."""
    return {
        name.removesuffix(".weight")
        for name, shape in shapes.items()
        if name.endswith(".weight") and len(shape) >= dimensions
    }


def whole(shapes: Shapes, module: str) -> tuple[Rows, ...]:
    return (Rows(module, 0, shapes[f"{module}.weight"][0]),)


def pairs(names: Mapping[str, tuple[Rows, ...]]) -> State:
    """A kohya file of rank 1 whose up weights tell the name and the row, and down the name."""
    state: State = {}
    for number, (name, rows) in enumerate(names.items()):
        height = sum(part.count for part in rows)
        up = torch.arange(height, dtype=torch.float64)[:, None] + 100_000.0 * (number + 1)
        state[f"{name}.lora_up.weight"] = up
        state[f"{name}.lora_down.weight"] = torch.full((1, 3), float(number + 1))
        state[f"{name}.alpha"] = torch.tensor(1.0)
    return state


def check(names: Mapping[str, tuple[Rows, ...]], converted: Mapping[str, torch.Tensor]) -> None:
    """diffusers reads from each name the rows that we say."""
    found = {}
    for key, value in converted.items():
        parsed = parse_key(key)
        assert parsed is not None, key
        if parsed.side == "B":
            found[parsed.module] = value[:, 0]
    numbers = {name: number for number, name in enumerate(names, 1)}
    left = set(found)
    for name, rows in names.items():
        start = 100_000.0 * numbers[name]
        for part in rows:
            wanted = start + torch.arange(part.count, dtype=torch.float64)
            assert torch.equal(found[part.module][part.start : part.stop], wanted), name
            start += part.count
            left.discard(part.module)
    assert not left


def of(layout: Mapping[str, tuple[Rows, ...]], *prefixes: str) -> dict[str, tuple[Rows, ...]]:
    return {name: rows for name, rows in layout.items() if name.startswith(prefixes)}


def targets(shapes: Shapes, layout: Mapping[str, tuple[Rows, ...]]) -> dict[str, tuple[Rows, ...]]:
    """What an adapter has: no norms and no tables of embeddings, and no flat parameters."""
    wanted = modules(shapes)
    return {
        name: rows
        for name, rows in layout.items()
        if all(row.module in wanted and "embeddings" not in row.module for row in rows)
    }


def convert_unet(state: State) -> dict[str, torch.Tensor]:
    mapped = _maybe_map_sgm_blocks_to_diffusers(dict(state), UNET_CONFIG)
    converted, _ = _convert_non_diffusers_lora_to_diffusers(mapped)
    unet = {k.removeprefix("unet."): v for k, v in converted.items() if k.startswith("unet.")}
    found = {f"unet.{k}": v for k, v in convert_unet_state_dict_to_peft(unet).items()}
    for encoder in ("text_encoder", "text_encoder_2"):
        start = f"{encoder}."
        text = {k.removeprefix(start): v for k, v in converted.items() if k.startswith(start)}
        if text:
            found |= {start + k: v for k, v in convert_state_dict_to_peft(text).items()}
    return found


@pytest.mark.parametrize("kind", ["sd1", "sd2", "sdxl"])
def test_stable_diffusion_as_sd_scripts_writes_it(kind: str) -> None:
    shapes = pipelines.canonical_shapes(kind)
    layout = targets(shapes, kohya_layout(shapes))
    layout = {n: rows for n, rows in layout.items() if not rows[0].module.startswith("vae")}
    wanted = {m for m in modules(shapes) if not m.startswith("vae.") and "embeddings" not in m}
    assert {row.module for rows in layout.values() for row in rows} == wanted
    check(layout, convert_unet(pairs(layout)))
    starts = ("lora_te_",) if kind != "sdxl" else ("lora_te1_", "lora_te2_")
    assert {n for n in layout if n.startswith(starts)} == {
        n for n in layout if not n.startswith("lora_unet_")
    }
    assert any("input_blocks" in name for name in layout) == (kind == "sdxl")


@pytest.mark.parametrize("kind", ["sd1", "sd2", "sdxl"])
@pytest.mark.parametrize("style", ["input_blocks", "down_blocks"])
def test_both_namings_of_a_unet_are_known(kind: str, style: str) -> None:
    shapes = pipelines.canonical_shapes(kind)
    known = of(targets(shapes, kohya_modules(shapes).targets), "lora_unet_")
    ldm = {f"lora_unet_{name.replace('.', '_')}" for name in single_file_modules(shapes)}
    chosen = {
        name: rows for name, rows in known.items() if (name in ldm) == (style == "input_blocks")
    }
    assert {row.module for rows in chosen.values() for row in rows} == {
        module for module in modules(shapes) if module.startswith("unet.")
    }
    # Of these two diffusers does not read the other naming.
    unread = ("upsamplers", "add_embedding")
    read = {n: rows for n, rows in chosen.items() if not any(u in rows[0].module for u in unread)}
    check(read, convert_unet(pairs(read)))


def test_names_of_the_real_sdxl() -> None:
    shapes = canonical_shapes(
        single_files.ldm_unet(
            channels=(320, 640, 1280), depths=(0, 2, 10), context=2048, linear=True, pooled=2816
        )
    )
    known = kohya_modules(shapes).targets
    block = "unet.down_blocks.1.attentions.0.transformer_blocks.0"
    for name in (
        "lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q",
        "lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_attn1_to_q",
    ):
        assert known[name] == (Rows(f"{block}.attn1.to_q", 0, 640),)
    assert (
        known["lora_unet_output_blocks_2_2_conv"][0].module == "unet.up_blocks.0.upsamplers.0.conv"
    )
    assert (
        known["lora_unet_middle_block_1_proj_in"][0].module == "unet.mid_block.attentions.0.proj_in"
    )


def real_flux() -> Shapes:
    """diffusers knows the real height of Flux's modules only."""
    shapes = canonical_shapes(single_files.flux(3072))
    clip = {f"text_encoder.{name}": shape for name, shape in single_files.clip().items()}
    return shapes | clip


def test_flux_as_sd_scripts_writes_it() -> None:
    shapes = real_flux()
    layout = targets(shapes, kohya_layout(shapes))
    assert {row.module for rows in layout.values() for row in rows} == {
        m for m in modules(shapes) if "embeddings" not in m
    }
    assert layout["lora_unet_double_blocks_0_img_attn_qkv"] == tuple(
        Rows(f"transformer.transformer_blocks.0.attn.to_{letter}", 0, 3072) for letter in "qkv"
    )
    single = "transformer.single_transformer_blocks.1."
    assert layout["lora_unet_single_blocks_1_linear1"] == (
        *(Rows(f"{single}attn.to_{letter}", 0, 3072) for letter in "qkv"),
        Rows(f"{single}proj_mlp", 0, 12288),
    )
    norm = "transformer.norm_out.linear"
    assert layout["lora_unet_final_layer_adaLN_modulation_1"] == (
        Rows(norm, 3072, 6144), Rows(norm, 0, 3072),
    )  # fmt: skip
    converted = _convert_kohya_flux_lora_to_diffusers(pairs(layout))
    # These it names without their component.
    fixed = {
        key if key.startswith(("transformer.", "text_encoder.")) else f"transformer.{key}": value
        for key, value in converted.items()
    }
    text = {k: v for k, v in fixed.items() if k.startswith("text_encoder.")}
    rest = {k: v for k, v in fixed.items() if k not in text}
    check(layout, rest | convert_all_state_dict_to_peft(text))


def test_dotted_names_are_the_underscored_ones() -> None:
    shapes = real_flux()
    layout = of(targets(shapes, kohya_layout(shapes)), "lora_unet_")
    dotted = {
        f"diffusion_model.{name}": layout[f"lora_unet_{name.replace('.', '_')}"]
        for name in single_file_modules(shapes)
    }
    assert {kohya_spelling(name): rows for name, rows in dotted.items()} == layout
    blocks = {name: rows for name, rows in dotted.items() if "_blocks." in name}
    check(blocks, _convert_kohya_flux_lora_to_diffusers(pairs(blocks)))
    clip = "text_encoders.clip_l.transformer.text_model.encoder.layers.0.mlp.fc1"
    assert kohya_spelling(clip) == "lora_te1_text_model_encoder_layers_0_mlp_fc1"
    assert kohya_spelling("lora_unet_img_in") == "lora_unet_img_in"


def test_flux_under_the_names_of_diffusers() -> None:
    shapes = real_flux()
    known = of(targets(shapes, kohya_modules(shapes).targets), "lora_transformer_")
    blocks = {n: rows for n, rows in known.items() if "attn_" in n}
    assert len(blocks) == 2 * 8 + 2 * 3
    check(blocks, _convert_kohya_flux_lora_to_diffusers(pairs(blocks)))


def test_xlabs_names_of_flux() -> None:
    shapes = real_flux()
    known = xlabs_modules(shapes)
    assert len(known) == 2 * 4 + 2 * 2
    state = {
        key.replace(".lora_up.", ".up.").replace(".lora_down.", ".down."): value
        for key, value in pairs(known).items()
        if not key.endswith(".alpha")
    }
    check(known, _convert_xlabs_flux_lora_to_diffusers(state))
    assert xlabs_modules(pipelines.canonical_shapes("sd3")) == {}


def test_clip_is_known_without_text_model() -> None:
    """lycoris 4.1 writes so with transformers 5.23."""
    shapes = pipelines.canonical_shapes("sd1")
    known = kohya_modules(shapes).targets
    module = "text_encoder.text_model.encoder.layers.0.self_attn.k_proj"
    assert known["lora_te_encoder_layers_0_self_attn_k_proj"] == whole(shapes, module)
    assert known["lora_te_text_model_encoder_layers_0_self_attn_k_proj"] == whole(shapes, module)


def test_lycoris_names_what_it_wraps() -> None:
    shapes = pipelines.canonical_shapes("flux")
    known = kohya_modules(shapes).targets
    module = "transformer.transformer_blocks.0.attn.to_q"
    assert known["lycoris_transformer_blocks_0_attn_to_q"] == whole(shapes, module)


def test_t5_of_flux_and_sd3_is_the_third_text_encoder() -> None:
    name = "lora_te3_encoder_block_0_layer_0_SelfAttention_q"
    for kind, component in (("flux", "text_encoder_2"), ("sd3", "text_encoder_3")):
        shapes = pipelines.canonical_shapes(kind)
        module = f"{component}.encoder.block.0.layer.0.SelfAttention.q"
        assert kohya_layout(shapes)[name] == whole(shapes, module)
        assert not [n for n in kohya_layout(shapes) if n.startswith("lora_te2_")] or kind == "sd3"


def test_sd3_as_sd_scripts_writes_it() -> None:
    shapes = pipelines.canonical_shapes("sd3")
    layout = kohya_layout(shapes)
    block = "transformer.transformer_blocks."
    assert layout["lora_unet_joint_blocks_0_x_block_attn_qkv"] == tuple(
        Rows(f"{block}0.attn.to_{letter}", 0, 8) for letter in "qkv"
    )
    assert layout["lora_unet_joint_blocks_1_x_block_attn2_qkv"] == tuple(
        Rows(f"{block}1.attn2.to_{letter}", 0, 8) for letter in "qkv"
    )
    assert layout["lora_unet_joint_blocks_2_context_block_adaLN_modulation_1"] == (
        Rows(f"{block}2.norm1_context.linear", 8, 16),
        Rows(f"{block}2.norm1_context.linear", 0, 8),
    )
    modulation = f"{block}1.norm1_context.linear"
    assert layout["lora_unet_joint_blocks_1_context_block_adaLN_modulation_1"] == whole(
        shapes, modulation
    )
    assert layout["lora_te1_text_model_encoder_layers_0_mlp_fc1"][0].module.startswith(
        "text_encoder.text_model."
    )


@pytest.mark.parametrize("kind", KINDS)
def test_the_layout_names_every_row_once(kind: str) -> None:
    shapes = pipelines.canonical_shapes(kind)
    layout = kohya_layout(shapes)
    rows = sorted((r.module, r.start, r.stop) for rs in layout.values() for r in rs)
    ends: dict[str, int] = {}
    for module, start, stop in rows:
        assert ends.get(module, 0) == start
        ends[module] = stop
    assert ends == {
        module: shapes[f"{module}.weight"][0]
        for module in modules(shapes, 1)
        if not module.startswith("vae.")
    }
    known = kohya_modules(shapes)
    # What lycoris wrote for one of several text encoders does not tell which.
    assert all(name.startswith("lycoris_") for name in known.ambiguous)
    assert bool(known.ambiguous) == (kind in ("sdxl", "sd3"))
    assert layout.items() <= known.targets.items()


@pytest.mark.parametrize("kind", KINDS)
def test_names_do_not_depend_on_the_layout(kind: str) -> None:
    """From a single file the same names mean the same modules."""
    made: dict[str, Any] = {
        "sd1": single_files.ldm_unet(),
        "sd2": single_files.ldm_unet(linear=True),
        "sdxl": single_files.ldm_unet(depths=(0, 1, 2), linear=True, pooled=54),
        "flux": single_files.flux(8),
        "sd3": single_files.sd3(),
    }
    single = kohya_layout(canonical_shapes(made[kind]))
    folder = kohya_layout(pipelines.canonical_shapes(kind))
    denoiser = of(folder, "lora_unet_")
    assert {name: [r.module for r in rows] for name, rows in single.items()} == {
        name: [r.module for r in rows] for name, rows in denoiser.items()
    }


def test_a_name_of_two_modules_is_told_and_not_picked() -> None:
    shapes = pipelines.canonical_shapes("sd1")
    shapes["unet.mid_block.attentions_0.proj_in.weight"] = (8, 8)
    found = kohya_modules(shapes)
    name = "lora_unet_mid_block_attentions_0_proj_in"
    assert name not in found.targets
    assert {rows[0].module for rows in found.ambiguous[name]} == {
        "unet.mid_block.attentions.0.proj_in",
        "unet.mid_block.attentions_0.proj_in",
    }
    assert name not in kohya_layout(shapes)
    # The single file's name for the one of them still tells which is meant.
    other = "lora_unet_middle_block_1_proj_in"
    assert found.targets[other][0].module == "unet.mid_block.attentions.0.proj_in"


def test_an_unknown_transformer_goes_by_diffusers_names() -> None:
    shapes: Shapes = {
        "transformer.blocks.0.attn1.to_q.weight": (4, 4),
        "text_encoder.layers.0.mlp.down_proj.weight": (4, 6),
    }
    assert model_kind(shapes) is None
    assert kohya_layout(shapes) == {
        "lora_unet_blocks_0_attn1_to_q": whole(shapes, "transformer.blocks.0.attn1.to_q"),
        "lora_te1_layers_0_mlp_down_proj": whole(shapes, "text_encoder.layers.0.mlp.down_proj"),
    }
    assert kohya_modules({}).targets == {}
