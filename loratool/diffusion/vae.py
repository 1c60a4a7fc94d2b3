"""The variational autoencoder of Stable Diffusion: as in single files (LDM), and in diffusers."""

from __future__ import annotations

from dataclasses import replace

from loratool.diffusion.links import Link, Shapes, below, link, numbers, pieces_of
from loratool.pieces import Piece

_PREFIXES = ("first_stage_model.", "vae.")
_RESNET = (link("nin_shortcut", "conv_shortcut"),)
_ATTENTION = (
    link("norm", "group_norm"),
    link("q", "to_q"),
    link("k", "to_k"),
    link("v", "to_v"),
    link("proj_out", "to_out.0"),
)
_OUTSIDE = (
    link("quant_conv", "quant_conv"),
    link("post_quant_conv", "post_quant_conv"),
    *(link(f"{half}.{name}", f"{half}.{name}") for half in ("encoder", "decoder")
      for name in ("conv_in", "conv_out")),
    *(link(f"{half}.norm_out", f"{half}.conv_norm_out") for half in ("encoder", "decoder")),
)  # fmt: skip


def vae_pieces(shapes: Shapes) -> dict[str, tuple[Piece, ...]]:
    """Where the parameters of the autoencoder lie in a single file, by canonical names."""
    prefix = next((p for p in _PREFIXES if f"{p}decoder.mid.block_1.norm1.weight" in shapes), None)
    if prefix is None:
        return {}
    found = pieces_of(_links(shapes, prefix), shapes, prefix, "vae.")
    return {name: tuple(_linear(piece, name, shapes) for piece in p) for name, p in found.items()}


def _linear(piece: Piece, name: str, shapes: Shapes) -> Piece:
    """Attention is made of 1x1 convolutions in single files, of linear modules in diffusers."""
    extra = len(shapes[piece.tensor]) - 2
    if ".attentions." not in name or not name.endswith(".weight") or extra <= 0:
        return piece
    return replace(piece, place=(slice(None), slice(None), *(0,) * extra))


def _links(shapes: Shapes, prefix: str) -> list[Link]:
    found = [*_OUTSIDE]
    downs, ups = (numbers(shapes, f"{prefix}{way}.") for way in ("encoder.down", "decoder.up"))
    for level in downs:
        single, part = f"encoder.down.{level}.", f"encoder.down_blocks.{level}."
        found += _blocks(shapes, prefix, single, part)
        found.append(link(f"{single}downsample.conv", f"{part}downsamplers.0.conv"))
    for level in ups:
        single, part = f"decoder.up.{level}.", f"decoder.up_blocks.{len(ups) - 1 - level}."
        found += _blocks(shapes, prefix, single, part)
        found.append(link(f"{single}upsample.conv", f"{part}upsamplers.0.conv"))
    for half in ("encoder", "decoder"):
        for number in (1, 2):
            single, part = f"{half}.mid.block_{number}", f"{half}.mid_block.resnets.{number - 1}"
            found += _resnet(single, part)
        middle = f"{half}.mid.attn_1.", f"{half}.mid_block.attentions.0."
        found += [below(inside, *middle) for inside in _ATTENTION]
    return found


def _blocks(shapes: Shapes, prefix: str, single: str, part: str) -> list[Link]:
    layers = numbers(shapes, f"{prefix}{single}block.")
    both = ((f"{single}block.{layer}", f"{part}resnets.{layer}") for layer in layers)
    return [found for names in both for found in _resnet(*names)]


def _resnet(single: str, part: str) -> list[Link]:
    """A resnet has the same names inside in both layouts, but for its shortcut."""
    return [link(single, part), *(below(inside, f"{single}.", f"{part}.") for inside in _RESNET)]
