"""Which parameters of which diffusion model a checkpoint holds, and where, whatever its layout."""

from __future__ import annotations

from collections.abc import Collection

from loratool.diffusion import dit, unet
from loratool.diffusion.links import Link, Rows, Shapes, assembled_shape, pieces_of, rows_of
from loratool.diffusion.text import canonical_name, text_pieces
from loratool.diffusion.vae import vae_pieces
from loratool.pieces import Piece

_PREFIX = "model.diffusion_model."
# Names that tell what a component is when it lies alone, without their component.
_SIGNS = (
    ("unet", {"down_blocks.0.resnets.0.conv1.weight", "conv_norm_out.weight"}),
    ("transformer", {"transformer_blocks.0.attn.to_q.weight", "proj_out.weight"}),
    ("text_encoder", {"text_model.embeddings.token_embedding.weight"}),
    ("text_encoder", {"embeddings.token_embedding.weight"}),  # transformers 5.6 and later
    ("vae", {"decoder.mid_block.resnets.0.conv1.weight", "decoder.conv_norm_out.weight"}),
)


def ldm_pieces(shapes: Shapes) -> dict[str, tuple[Piece, ...]]:
    """Where the parameters of a diffusion model lie in a single file.

    Known are Stable Diffusion 1, 2, XL and 3 and Flux as their makers' code stores them, with or
    without text encoders and autoencoder.

    Args:
        shapes: of all tensors of the file.

    Returns:
        Canonical name -> its pieces; {} for an unknown layout.
    """
    prefix = _PREFIX if any(name.startswith(_PREFIX) for name in shapes) else ""
    names = {name.removeprefix(prefix) for name in shapes if name.startswith(prefix)}
    found: dict[str, tuple[Piece, ...]] = {}
    t5 = "text_encoder_3"
    if "input_blocks.0.0.weight" in names and "middle_block.0.in_layers.0.weight" in names:
        pooled = not any(name.startswith("cond_stage_model.") for name in shapes)
        found = pieces_of(unet.of_single_file(names, pooled), shapes, prefix, "unet.")
    elif links := dit.of_single_file(names):
        found = pieces_of(links, shapes, prefix, "transformer.")
        if "double_blocks.0.img_attn.qkv.weight" in names:
            t5 = "text_encoder_2"
    return found | text_pieces(shapes, t5) | vae_pieces(shapes)


def canonical_pieces(
    shapes: Shapes, components: Collection[str] = ()
) -> dict[str, tuple[Piece, ...]]:
    """Where the parameters of a diffusion model lie in a checkpoint of any layout.

    Args:
        shapes: of all tensors: of a single file, of a diffusers folder ("unet.conv_in.weight"), or
            of one component alone ("conv_in.weight").
        components: of a diffusers folder, the names of its components.

    Returns:
        Canonical name -> its pieces; {} if this is no diffusion model that is known.
    """
    if components:
        return {canonical_name(name): (Piece(name),) for name in shapes}
    if found := ldm_pieces(shapes):
        return found
    for component, signs in _SIGNS:
        if signs <= shapes.keys():
            return {canonical_name(f"{component}.{name}"): (Piece(name),) for name in shapes}
    return {}


def canonical_shapes(
    shapes: Shapes, components: Collection[str] = ()
) -> dict[str, tuple[int, ...]]:
    """The shapes of a diffusion model's parameters by canonical names; see `canonical_pieces`."""
    pieces = canonical_pieces(shapes, components)
    return {name: assembled_shape(found, shapes) for name, found in pieces.items()}


def model_kind(shapes: Shapes) -> str | None:
    """The kind of a model by canonical names: sd1, sd2, sdxl, sd3 or flux; None for others.

    Stable Diffusion 1 projects into its transformers by convolutions, 2 and XL by linear modules;
    XL is conditioned on pooled text and sizes, too.
    """
    if "unet.down_blocks.0.resnets.0.conv1.weight" in shapes:
        if "unet.add_embedding.linear_1.weight" in shapes:
            return "sdxl"
        projections = [s for n, s in shapes.items() if n.endswith(".attentions.0.proj_in.weight")]
        if not projections:
            return None
        return "sd1" if len(projections[0]) == 4 else "sd2"
    flux = ("single_transformer_blocks.0.proj_mlp", "single_transformer_blocks.0.norm.linear",
            "time_text_embed.text_embedder.linear_1", "context_embedder", "x_embedder")  # fmt: skip
    if all(f"transformer.{module}.weight" in shapes for module in flux):
        return "flux"
    sd3 = ("transformer_blocks.0.attn.add_q_proj", "pos_embed.proj", "context_embedder",
           "time_text_embed.text_embedder.linear_1")  # fmt: skip
    return "sd3" if all(f"transformer.{module}.weight" in shapes for module in sd3) else None


def single_file_modules(shapes: Shapes) -> dict[str, tuple[Rows, ...]]:
    """The modules of the UNet or transformer as a single file names them.

    Args:
        shapes: of the model's parameters by canonical names.

    Returns:
        Name in a single file, without prefix ("double_blocks.0.img_attn.qkv") -> the canonical
        modules' rows that its rows are, in order; {} for an unknown kind of model.
    """
    kind = model_kind(shapes)
    component = "unet." if kind in ("sd1", "sd2", "sdxl") else "transformer."
    names = {name.removeprefix(component) for name in shapes if name.startswith(component)}
    if kind is None:
        return {}
    links = unet.of_diffusers(names) if component == "unet." else dit.of_diffusers(kind, names)
    modules = {name.removesuffix(".weight") for name in names if name.endswith(".weight")}
    found: dict[str, tuple[Rows, ...]] = {}
    for link in links:
        if len(link.parts) > 1 or link.swapped or link.parts[0] in modules:
            if rows := rows_of(link, shapes, component):
                found[link.single] = rows
            continue
        found |= _inside(link, modules, shapes, component)
    return found


def _inside(
    link: Link, modules: Collection[str], shapes: Shapes, component: str
) -> dict[str, tuple[Rows, ...]]:
    """The modules inside a linked one, which have the same names there in both layouts."""
    (part,) = link.parts
    found: dict[str, tuple[Rows, ...]] = {}
    for module in modules:
        if module.startswith(f"{part}."):
            rows = Rows(component + module, 0, shapes[f"{component}{module}.weight"][0])
            found[link.single + module.removeprefix(part)] = (rows,)
    return found
