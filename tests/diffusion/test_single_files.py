"""Single files taken apart as diffusers' own converters take them apart."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers.loaders.single_file_utils import (
    convert_flux_transformer_checkpoint_to_diffusers,
    convert_ldm_clip_checkpoint,
    convert_ldm_unet_checkpoint,
    convert_ldm_vae_checkpoint,
    convert_open_clip_checkpoint,
    convert_sd3_t5_checkpoint_to_diffusers,
    convert_sd3_transformer_checkpoint_to_diffusers,
)
from safetensors.torch import load_file, save_file

import loratool
from loratool.diffusion.layouts import canonical_shapes, ldm_pieces, model_kind
from loratool.diffusion.links import assembled_shape
from loratool.pieces import Piece
from tests import single_files
from tests.diffusion import pipelines
from tests.single_files import UNET, Shapes, State, prefixed, random_state

TWO_BLOCKS = SimpleNamespace(down_block_types=(0, 0), up_block_types=(0, 0))
XL = {"depths": (0, 1, 2), "linear": True, "pooled": 54}
UNETS: Mapping[str, Mapping[str, Any]] = {"sd1": {}, "sd2": {"linear": True}, "sdxl": XL}


def assemble(pieces: Sequence[Piece], state: Mapping[str, torch.Tensor]) -> torch.Tensor:
    shapes = {name: tuple(tensor.shape) for name, tensor in state.items()}
    first = state[pieces[0].tensor]
    made = torch.zeros(assembled_shape(pieces, shapes), dtype=first.dtype)
    for piece in pieces:
        value = state[piece.tensor][piece.place]
        made[piece.part] = value.T if piece.transposed else value
    return made


def shapes_of(state: Mapping[str, torch.Tensor]) -> Shapes:
    return {name: tuple(tensor.shape) for name, tensor in state.items()}


def check(state: State, expected: Mapping[str, torch.Tensor]) -> None:
    """Every parameter that diffusers finds in a file is found, with its values, and no other."""
    pieces = ldm_pieces(shapes_of(state))
    assert pieces.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(assemble(pieces[name], state), value), name


def named(component: str, state: Mapping[str, torch.Tensor]) -> State:
    return {f"{component}.{name}": value for name, value in state.items()}


def unet_config(kind: str) -> dict[str, Any]:
    pooled = "text_time" if kind == "sdxl" else None
    return {"layers_per_block": 2, "class_embed_type": None, "addition_embed_type": pooled}


@pytest.mark.parametrize("kind", UNETS)
def test_a_unet_is_what_diffusers_makes_of_it(kind: str) -> None:
    state = random_state(prefixed(UNET, single_files.ldm_unet(**UNETS[kind])))
    converted = convert_ldm_unet_checkpoint(dict(state), unet_config(kind))
    pipelines.unet(kind).load_state_dict(converted, strict=True)
    check(state, named("unet", converted))


def test_a_unet_of_one_resolution(kind: str = "sd1") -> None:
    state = random_state(
        prefixed(UNET, single_files.ldm_unet(channels=(4,), layers=3, depths=(1,)))
    )
    converted = convert_ldm_unet_checkpoint(dict(state), {"layers_per_block": 3})
    check(state, named("unet", converted))


@pytest.mark.parametrize(
    ("beside", "embedding"),
    [({}, "add_embedding"), ({"cond_stage_model.x": (1,)}, "class_embedding")],
)
def test_what_the_label_embedding_is_shows_in_the_text_encoder(
    beside: Shapes, embedding: str
) -> None:
    shapes = prefixed(UNET, single_files.ldm_unet(**UNETS["sdxl"])) | beside
    assert f"unet.{embedding}.linear_1.weight" in ldm_pieces(shapes)


def test_a_unet_needs_no_prefix() -> None:
    shapes = single_files.ldm_unet()
    bare = {name: piece for name, (piece,) in ldm_pieces(shapes).items()}
    pieces = ldm_pieces(prefixed(UNET, shapes))
    assert {n: p.tensor.removeprefix(UNET) for n, (p,) in pieces.items()} == {
        n: p.tensor for n, p in bare.items()
    }


@pytest.mark.parametrize("prefix", ["first_stage_model.", "vae."])
def test_an_autoencoder_is_what_diffusers_makes_of_it(prefix: str) -> None:
    state = random_state(prefixed(prefix, single_files.ldm_vae()))
    converted = convert_ldm_vae_checkpoint(dict(state), vars(TWO_BLOCKS))
    pipelines.vae().load_state_dict(converted, strict=True)
    check(state, named("vae", converted))


@pytest.mark.parametrize(
    ("prefix", "component"),
    [
        ("cond_stage_model.model.", "text_encoder"),
        ("conditioner.embedders.1.model.", "text_encoder_2"),
        ("conditioner.embedders.0.model.", "text_encoder_2"),
    ],
)
def test_openclip_is_what_diffusers_makes_of_it(prefix: str, component: str) -> None:
    state = random_state(prefixed(prefix, single_files.openclip(layers=25, width=4)))
    holder = SimpleNamespace(config=SimpleNamespace(hidden_size=4))
    converted = convert_open_clip_checkpoint(holder, dict(state), prefix)
    check(state, named(component, converted))


CLIPS: Mapping[str, tuple[str, Callable[[State], State]]] = {
    "cond_stage_model.transformer.": ("text_encoder", convert_ldm_clip_checkpoint),
    "conditioner.embedders.0.transformer.": ("text_encoder", convert_ldm_clip_checkpoint),
    "text_encoders.clip_l.transformer.": (
        "text_encoder",
        lambda state: convert_ldm_clip_checkpoint(state, "text_encoders.clip_l.transformer."),
    ),
    "text_encoders.clip_g.transformer.": (
        "text_encoder_2",
        lambda state: convert_ldm_clip_checkpoint(state, "text_encoders.clip_g.transformer."),
    ),
}


@pytest.mark.parametrize("prefix", CLIPS)
def test_clip_is_what_diffusers_makes_of_it(prefix: str) -> None:
    component, convert = CLIPS[prefix]
    state = random_state(prefixed(prefix, single_files.clip()))
    check(state, named(component, convert(dict(state))))


def test_names_of_clip_without_text_model_get_it() -> None:
    prefix = "cond_stage_model.transformer."
    bare = {name.removeprefix("text_model."): s for name, s in single_files.clip().items()}
    wanted = {f"text_encoder.{name}" for name in single_files.clip()}
    assert ldm_pieces(prefixed(prefix, bare)).keys() == wanted


def test_t5_is_what_diffusers_makes_of_it() -> None:
    state = random_state(prefixed("text_encoders.t5xxl.transformer.", single_files.t5()))
    check(state, named("text_encoder_3", convert_sd3_t5_checkpoint_to_diffusers(dict(state))))


def test_t5_is_the_second_text_encoder_of_flux() -> None:
    t5 = prefixed("text_encoders.t5xxl.transformer.", single_files.t5())
    pieces = ldm_pieces(prefixed(UNET, single_files.flux(8)) | t5)
    assert {f"text_encoder_2.{name}" for name in single_files.t5()} <= pieces.keys()


@pytest.mark.parametrize("prefix", ["", UNET])
@pytest.mark.parametrize("dual", [(), (0, 1)])
def test_sd3_is_what_diffusers_makes_of_it(dual: tuple[int, ...], prefix: str) -> None:
    state = random_state(prefixed(prefix, single_files.sd3(dual=dual)))
    converted = convert_sd3_transformer_checkpoint_to_diffusers(dict(state))
    if dual:
        known = {n: tuple(p.shape) for n, p in pipelines.sd3().state_dict().items()}
        assert converted.keys() == known.keys()
    check(state, named("transformer", converted))


@pytest.mark.parametrize("prefix", ["", UNET])
def test_flux_is_what_diffusers_makes_of_it(prefix: str) -> None:
    """diffusers' converter knows the real width only: bytes are enough to tell rows apart."""
    shapes = single_files.flux(3072, double=1, single=1, guidance=bool(prefix))
    state = {}
    for seed, (name, shape) in enumerate(prefixed(prefix, shapes).items()):
        rows = (torch.arange(shape[0]) * 7 + seed).remainder(251).to(torch.uint8)
        state[name] = rows if len(shape) == 1 else rows[:, None].expand(shape)
    converted = convert_flux_transformer_checkpoint_to_diffusers(dict(state))
    pieces = ldm_pieces(shapes_of(state))
    assert pieces.keys() == {f"transformer.{name}" for name in converted}
    # All columns are the same: the first two are enough.
    narrow = {n: t if t.ndim == 1 else t[:, :2] for n, t in state.items()}
    for name, value in converted.items():
        found = assemble(pieces[f"transformer.{name}"], narrow)
        assert torch.equal(found, value if value.ndim == 1 else value[:, :2]), name


def test_a_tiny_flux_has_the_parameters_of_diffusers_flux() -> None:
    shapes = {
        name: shape
        for name, shape in canonical_shapes(single_files.flux(8)).items()
        if not name.endswith(("norm_q.weight", "norm_k.weight", "norm_added_q.weight",
                              "norm_added_k.weight"))
    }  # fmt: skip
    model = {f"transformer.{n}": tuple(p.shape) for n, p in pipelines.flux().state_dict().items()}
    assert shapes.keys() <= model.keys()
    blocks = {name: shape for name, shape in shapes.items() if "transformer_blocks." in name}
    assert blocks == {name: model[name] for name in blocks}


def whole_file(kind: str) -> Shapes:
    """A single file with everything in it."""
    vae = prefixed("first_stage_model.", single_files.ldm_vae())
    if kind in ("flux", "sd3"):
        made = single_files.flux(8) if kind == "flux" else single_files.sd3()
        clip = prefixed("text_encoders.clip_l.transformer.", single_files.clip())
        return prefixed(UNET, made) | clip | vae
    unet = prefixed(UNET, single_files.ldm_unet(**UNETS[kind]))
    if kind == "sd1":
        text = prefixed("cond_stage_model.transformer.", single_files.clip())
    elif kind == "sd2":
        text = prefixed("cond_stage_model.model.", single_files.openclip())
    else:
        text = prefixed("conditioner.embedders.0.transformer.", single_files.clip())
        text |= prefixed("conditioner.embedders.1.model.", single_files.openclip())
    return unet | text | vae


@pytest.mark.parametrize("kind", pipelines.KINDS)
def test_the_kind_is_known_whatever_the_layout(kind: str) -> None:
    assert model_kind(canonical_shapes(whole_file(kind))) == kind
    assert model_kind(pipelines.canonical_shapes(kind)) == kind


@pytest.mark.parametrize("kind", pipelines.KINDS)
def test_pieces_cover_each_parameter_once(kind: str) -> None:
    shapes = whole_file(kind)
    pieces = ldm_pieces(shapes)
    for name, parts in pieces.items():
        made = torch.zeros(assembled_shape(parts, shapes), dtype=torch.int32)
        for piece in parts:
            made[piece.part] += 1
        assert torch.equal(made, torch.ones_like(made)), name
    # All of the file is taken, but for what only training needs.
    taken = {name: torch.zeros(shape, dtype=torch.int32) for name, shape in shapes.items()}
    for parts in pieces.values():
        for piece in parts:
            taken[piece.tensor][piece.place] += 1
    left = {name for name, count in taken.items() if not torch.equal(count, torch.ones_like(count))}
    assert {name.rpartition(".")[2] for name in left} <= {"logit_scale", "text_projection"}


@pytest.mark.parametrize(
    "shapes",
    [
        {},
        {"model.embed_tokens.weight": (4, 4)},
        {"transformer.h.0.attn.c_attn.weight": (4, 12), "transformer.wte.weight": (8, 4)},
        {"encoder.layers.0.self_attn.q_proj.weight": (4, 4)},  # BART
        # A relative of Flux that modulates otherwise.
        {"double_blocks.0.img_attn.qkv.weight": (12, 4), "img_in.weight": (4, 4)},
        prefixed(UNET, {"blocks.0.attn.qkv.weight": (12, 4)}),
    ],
)
def test_an_unknown_layout_has_no_pieces(shapes: Shapes) -> None:
    assert ldm_pieces(shapes) == {}
    assert canonical_shapes(shapes) == {}
    assert model_kind(shapes) is None


def test_what_cannot_be_split_is_left_out() -> None:
    shapes = single_files.flux(8)
    shapes["double_blocks.0.img_attn.qkv.weight"] = (25, 8)
    shapes["single_blocks.0.linear1.weight"] = (24, 8)
    pieces = ldm_pieces(shapes)
    assert "transformer.transformer_blocks.0.attn.to_q.weight" not in pieces
    assert "transformer.single_transformer_blocks.0.attn.to_q.weight" not in pieces
    assert "transformer.transformer_blocks.1.attn.to_q.weight" in pieces


@pytest.mark.parametrize("suffix", [".safetensors", ".ckpt"])
def test_a_single_file_is_a_base(suffix: str, tmp_path: Path) -> None:
    """extract and merge go by the file's own names."""
    state = random_state(whole_file("sd1"))
    changed = f"{UNET}middle_block.1.transformer_blocks.0.attn1.to_q.weight"
    table = "cond_stage_model.transformer.text_model.embeddings.token_embedding.weight"
    b, a = torch.randn(8, 2), torch.randn(2, 8)
    tuned = {**state, changed: state[changed] + b @ a, table: state[table] + 1}
    files = []
    for name, content in (("base", state), ("tuned", tuned)):
        files.append(tmp_path / f"{name}{suffix}")
        if suffix == ".ckpt":
            torch.save({"state_dict": content, "epoch": 1}, files[-1])
        else:
            save_file(content, files[-1])
    report = loratool.extract(*files, rank=2).save(tmp_path / "lora")
    kinds = {name: facts["kind"] for name, facts in report.data["tensors"].items()}
    assert kinds == {changed: "low_rank", table: "replacement"}
    loratool.merge(files[0], [(tmp_path / "lora", 1.0)]).save(tmp_path / "merged")
    (merged,) = (tmp_path / "merged").glob("base.safetensors")
    found = load_file(merged)
    assert found.keys() == state.keys()
    for name, value in tuned.items():
        torch.testing.assert_close(found[name], value, rtol=1e-3, atol=1e-4)
    assert loratool.inspect(merged).data["diffusion"] == "sd1"
