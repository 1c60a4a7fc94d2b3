"""Diffusion transformers: Flux and Stable Diffusion 3, in their makers' files and in diffusers.

Sources: diffusers' loaders/single_file_utils.py, which states both layouts.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

from loratool.diffusion.links import Link, below, link, numbers

_QKV = ("attn.to_q", "attn.to_k", "attn.to_v")
_ADDED_QKV = ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj")
_EMBEDDER = (("in_layer", "linear_1"), ("out_layer", "linear_2"))
_MLP = (("mlp.0", "linear_1"), ("mlp.2", "linear_2"))

_FLUX = (
    link("img_in", "x_embedder"),
    link("txt_in", "context_embedder"),
    *(link(f"time_in.{a}", f"time_text_embed.timestep_embedder.{b}") for a, b in _EMBEDDER),
    *(link(f"vector_in.{a}", f"time_text_embed.text_embedder.{b}") for a, b in _EMBEDDER),
    *(link(f"guidance_in.{a}", f"time_text_embed.guidance_embedder.{b}") for a, b in _EMBEDDER),
    link("final_layer.linear", "proj_out"),
    # diffusers has scale before shift, Black Forest Labs' code the other way round.
    link("final_layer.adaLN_modulation.1", "norm_out.linear", swapped=True),
)
_FLUX_DOUBLE = (
    link("img_mod.lin", "norm1.linear"),
    link("txt_mod.lin", "norm1_context.linear"),
    link("img_attn.qkv", *_QKV),
    link("txt_attn.qkv", *_ADDED_QKV),
    link("img_attn.norm.query_norm.scale", "attn.norm_q.weight"),
    link("img_attn.norm.key_norm.scale", "attn.norm_k.weight"),
    link("txt_attn.norm.query_norm.scale", "attn.norm_added_q.weight"),
    link("txt_attn.norm.key_norm.scale", "attn.norm_added_k.weight"),
    link("img_attn.proj", "attn.to_out.0"),
    link("txt_attn.proj", "attn.to_add_out"),
    link("img_mlp.0", "ff.net.0.proj"),
    link("img_mlp.2", "ff.net.2"),
    link("txt_mlp.0", "ff_context.net.0.proj"),
    link("txt_mlp.2", "ff_context.net.2"),
)
_FLUX_SINGLE = (
    link("modulation.lin", "norm.linear"),
    link("linear1", *_QKV, "proj_mlp"),
    link("linear2", "proj_out"),
    link("norm.query_norm.scale", "attn.norm_q.weight"),
    link("norm.key_norm.scale", "attn.norm_k.weight"),
)
# Flux's relatives (Chroma, Flux 2) lack one of these.
_FLUX_SIGNS = {
    f"{module}.weight"
    for module in ("double_blocks.0.img_attn.qkv", "double_blocks.0.img_mod.lin",
                   "single_blocks.0.modulation.lin", "img_in", "vector_in.in_layer")
}  # fmt: skip

_SD3 = (
    link("pos_embed", "pos_embed.pos_embed"),
    link("x_embedder.proj", "pos_embed.proj"),
    link("context_embedder", "context_embedder"),
    *(link(f"t_embedder.{a}", f"time_text_embed.timestep_embedder.{b}") for a, b in _MLP),
    *(link(f"y_embedder.{a}", f"time_text_embed.text_embedder.{b}") for a, b in _MLP),
    link("final_layer.linear", "proj_out"),
    link("final_layer.adaLN_modulation.1", "norm_out.linear", swapped=True),
)
_SD3_BLOCK = (
    link("x_block.adaLN_modulation.1", "norm1.linear"),
    link("x_block.attn.qkv", *_QKV),
    link("x_block.attn.ln_q", "attn.norm_q"),
    link("x_block.attn.ln_k", "attn.norm_k"),
    link("x_block.attn.proj", "attn.to_out.0"),
    link("x_block.attn2.qkv", "attn2.to_q", "attn2.to_k", "attn2.to_v"),
    link("x_block.attn2.ln_q", "attn2.norm_q"),
    link("x_block.attn2.ln_k", "attn2.norm_k"),
    link("x_block.attn2.proj", "attn2.to_out.0"),
    link("x_block.mlp.fc1", "ff.net.0.proj"),
    link("x_block.mlp.fc2", "ff.net.2"),
    link("context_block.attn.qkv", *_ADDED_QKV),
    link("context_block.attn.ln_q", "attn.norm_added_q"),
    link("context_block.attn.ln_k", "attn.norm_added_k"),
    link("context_block.attn.proj", "attn.to_add_out"),
    link("context_block.mlp.fc1", "ff_context.net.0.proj"),
    link("context_block.mlp.fc2", "ff_context.net.2"),
)


def flux(double: Sequence[int], single: Sequence[int]) -> list[Link]:
    """The links of a Flux transformer with these blocks."""
    found = [*_FLUX]
    for block in double:
        parts = f"double_blocks.{block}.", f"transformer_blocks.{block}."
        found += [below(inside, *parts) for inside in _FLUX_DOUBLE]
    for block in single:
        parts = f"single_blocks.{block}.", f"single_transformer_blocks.{block}."
        found += [below(inside, *parts) for inside in _FLUX_SINGLE]
    return found


def sd3(blocks: Sequence[int]) -> list[Link]:
    """The links of a Stable Diffusion 3 transformer with these blocks."""
    found = [*_SD3]
    for block in blocks:
        # The last block only reads the text: its modulation is that of an output, as Flux's.
        modulation = link(
            "context_block.adaLN_modulation.1", "norm1_context.linear", swapped=block == blocks[-1]
        )
        parts = f"joint_blocks.{block}.", f"transformer_blocks.{block}."
        found += [below(inside, *parts) for inside in (*_SD3_BLOCK, modulation)]
    return found


def of_single_file(names: Collection[str]) -> list[Link]:
    """The links of a transformer, from its names in a single file without their prefix."""
    if _FLUX_SIGNS.issubset(names):
        return flux(numbers(names, "double_blocks."), numbers(names, "single_blocks."))
    if "joint_blocks.0.x_block.attn.qkv.weight" in names:
        return sd3(numbers(names, "joint_blocks."))
    return []


def of_diffusers(kind: str | None, names: Collection[str]) -> list[Link]:
    """The same, from its kind ("flux", "sd3") and its names in diffusers' layout."""
    blocks = numbers(names, "transformer_blocks.")
    if kind == "flux":
        return flux(blocks, numbers(names, "single_transformer_blocks."))
    return sd3(blocks) if kind == "sd3" else []
