"""Text encoders inside single files: of transformers, and of OpenCLIP."""

from __future__ import annotations

import re
from collections.abc import Iterable

from loratool.diffusion.links import Shapes, below, link, numbers, pieces_of
from loratool.pieces import Piece

# What the names of an encoder of transformers start with -> the component.
_TRANSFORMERS = {
    "cond_stage_model.transformer.": "text_encoder.",
    "conditioner.embedders.0.transformer.": "text_encoder.",
    "text_encoders.clip_l.transformer.": "text_encoder.",
    "text_encoders.clip_g.transformer.": "text_encoder_2.",
}
# Flux has two text encoders, Stable Diffusion 3 three; T5 is the last of each.
_T5 = "text_encoders.t5xxl.transformer."
_OPENCLIP = {
    "cond_stage_model.model.": "text_encoder.",  # Stable Diffusion 2
    "conditioner.embedders.0.model.": "text_encoder_2.",  # the refiner of XL has this one only
    "conditioner.embedders.1.model.": "text_encoder_2.",
}
_ATTENTION = tuple(f"self_attn.{letter}_proj" for letter in "qkv")
_BLOCK = (
    link("ln_1", "layer_norm1"),
    link("ln_2", "layer_norm2"),
    link("mlp.c_fc", "mlp.fc1"),
    link("mlp.c_proj", "mlp.fc2"),
    link("attn.in_proj_weight", *(f"{name}.weight" for name in _ATTENTION)),
    link("attn.in_proj_bias", *(f"{name}.bias" for name in _ATTENTION)),
    link("attn.out_proj", "self_attn.out_proj"),
)
_OUTSIDE = (
    link("positional_embedding", "text_model.embeddings.position_embedding.weight"),
    link("token_embedding", "text_model.embeddings.token_embedding"),
    link("ln_final", "text_model.final_layer_norm"),
)
# Stable Diffusion 2 uses the last layer but one of OpenCLIP's ViT-H; diffusers has no other.
_UNUSED = 23
# CLIP's names in files of transformers 5.6 and later lack the first part of the older ones.
_BARE_CLIP = re.compile(
    r"(?P<component>text_encoder(_\d+)?\.)(?P<name>(encoder\.layers\.\d+\."
    r"|embeddings\.(token_embedding|position_embedding|position_ids)|final_layer_norm(?=\.|$)).*)"
)


def canonical_name(name: str) -> str:
    """A text encoder's name with CLIP's `text_model`, whether it has it or not; others as is."""
    found = _BARE_CLIP.fullmatch(name)
    return f"{found['component']}text_model.{found['name']}" if found else name


def text_pieces(shapes: Shapes, t5: str) -> dict[str, tuple[Piece, ...]]:
    """Where the parameters of text encoders lie in a single file, by canonical names.

    Args:
        shapes: of all tensors of the file.
        t5: the component that is T5, if there is one.
    """
    found: dict[str, tuple[Piece, ...]] = {}
    for prefix, component in {**_TRANSFORMERS, _T5: f"{t5}."}.items():
        found |= {
            canonical_name(component + name.removeprefix(prefix)): (Piece(name),)
            for name in shapes
            if name.startswith(prefix)
        }
    for prefix, component in _OPENCLIP.items():
        found |= _openclip(shapes, prefix, component)
    return found


def _openclip(shapes: Shapes, prefix: str, component: str) -> dict[str, tuple[Piece, ...]]:
    is_sd2 = prefix.startswith("cond_stage_model.")
    links = [*_OUTSIDE]
    for number in _layers(shapes, prefix):
        if is_sd2 and number == _UNUSED:
            continue
        single = f"transformer.resblocks.{number}."
        links += [
            below(inside, single, f"text_model.encoder.layers.{number}.") for inside in _BLOCK
        ]
    found = pieces_of(links, shapes, prefix, component)
    projection = f"{prefix}text_projection"
    if projection in shapes and not is_sd2:
        found[f"{component}text_projection.weight"] = (Piece(projection, transposed=True),)
    return found


def _layers(names: Iterable[str], prefix: str) -> list[int]:
    return numbers(names, f"{prefix}transformer.resblocks.")
