"""UNets of Stable Diffusion 1, 2 and XL: as in single files (LDM), and as diffusers names them."""

from __future__ import annotations

from collections.abc import Collection, Iterable

from loratool.diffusion.links import Link, below, link, numbers

_OUTSIDE = (
    link("time_embed.0", "time_embedding.linear_1"),
    link("time_embed.2", "time_embedding.linear_2"),
    link("input_blocks.0.0", "conv_in"),
    link("out.0", "conv_norm_out"),
    link("out.2", "conv_out"),
)
_RESNET = (
    link("in_layers.0", "norm1"),
    link("in_layers.2", "conv1"),
    link("emb_layers.1", "time_emb_proj"),
    link("out_layers.0", "norm2"),
    link("out_layers.3", "conv2"),
    link("skip_connection", "conv_shortcut"),
)


def of_single_file(names: Collection[str], has_pooled_text: bool) -> list[Link]:
    """The links of a UNet, from its names in a single file without their prefix.

    Args:
        names: of its tensors.
        has_pooled_text: whether its label embedding is diffusers' `add_embedding` (SDXL) rather
            than `class_embedding` (the unCLIP models of Stable Diffusion 2.1).
    """
    blocks = numbers(names, "input_blocks.")
    downs = [block for block in blocks if f"input_blocks.{block}.0.op.weight" in names]
    depth = (downs[0] if downs else len(blocks)) - 1
    levels = len(downs) + 1
    last = {level: level * (depth + 1) + depth for level in range(levels)}
    attended = {level for level, block in last.items() if _has_attention(block, names)}
    label = "add_embedding" if has_pooled_text else "class_embedding"
    return _links(levels, depth, attended, label)


def of_diffusers(names: Collection[str]) -> list[Link]:
    """The same, from its names in diffusers' layout without the component."""
    levels = len(numbers(names, "down_blocks."))
    depth = len(numbers(names, "down_blocks.0.resnets."))
    attended = {n for n in range(levels) if numbers(names, f"up_blocks.{n}.attentions.")}
    pooled = any(name.startswith("add_embedding.") for name in names)
    return _links(levels, depth, attended, "add_embedding" if pooled else "class_embedding")


def _has_attention(block: int, names: Iterable[str]) -> bool:
    """Whether the second module of a block on the way up is no upsampler."""
    start = f"output_blocks.{block}.1."
    return any(name.startswith(start) and not name.startswith(f"{start}conv.") for name in names)


def _links(levels: int, depth: int, attended: Iterable[int], label: str) -> list[Link]:
    """All links of a UNet with `levels` resolutions and `depth` resnets on the way down each.

    Args:
        levels: the number of resolutions.
        depth: resnets of each on the way down; on the way up there is one more.
        attended: the levels, counted on the way up, whose last block has an attention: then the
            upsampler is the third module of the block in the single file, else the second.
        label: diffusers' name for the embedding of what the UNet is conditioned on besides text.
    """
    found = [*_OUTSIDE, link("label_emb.0.0", f"{label}.linear_1")]
    found.append(link("label_emb.0.2", f"{label}.linear_2"))
    found.append(link("label_emb.weight", f"{label}.weight"))  # a table of classes
    for level in range(levels):
        for layer in range(depth):
            block, part = (
                f"input_blocks.{1 + level * (depth + 1) + layer}.",
                f"down_blocks.{level}.",
            )
            found += [below(inside, f"{block}0.", f"{part}resnets.{layer}.") for inside in _RESNET]
            found.append(link(f"{block}1", f"{part}attentions.{layer}"))
        down = f"input_blocks.{(level + 1) * (depth + 1)}.0.op"
        found.append(link(down, f"down_blocks.{level}.downsamplers.0.conv"))
        for layer in range(depth + 1):
            block, part = f"output_blocks.{level * (depth + 1) + layer}.", f"up_blocks.{level}."
            found += [below(inside, f"{block}0.", f"{part}resnets.{layer}.") for inside in _RESNET]
            if level in attended or layer < depth:
                found.append(link(f"{block}1", f"{part}attentions.{layer}"))
        up = f"output_blocks.{level * (depth + 1) + depth}.{2 if level in attended else 1}.conv"
        found.append(link(up, f"up_blocks.{level}.upsamplers.0.conv"))
    for place, number in ((0, 0), (2, 1)):
        block, part = f"middle_block.{place}.", f"mid_block.resnets.{number}."
        found += [below(inside, block, part) for inside in _RESNET]
    found.append(link("middle_block.1", "mid_block.attentions.0"))
    return found
