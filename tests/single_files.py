"""Tiny random diffusion models as their makers' code stores them in single files.

The names come from walking through the constructors of that code: blocks are numbered as they are
appended. Nothing here knows diffusers' names.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

import torch

Shapes = dict[str, tuple[int, ...]]
State = dict[str, torch.Tensor]
UNET = "model.diffusion_model."


def random_state(shapes: Mapping[str, tuple[int, ...]], seed: int = 0) -> State:
    """A random tensor of every shape."""
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def prefixed(prefix: str, shapes: Mapping[str, tuple[int, ...]]) -> Shapes:
    """The same under names that start with `prefix`."""
    return {f"{prefix}{name}": shape for name, shape in shapes.items()}


class _Modules:
    """Collects the parameters of modules."""

    def __init__(self) -> None:
        self.shapes: Shapes = {}

    def linear(self, name: str, out: int, inner: int, bias: bool = True) -> None:
        self.shapes[f"{name}.weight"] = (out, inner)
        if bias:
            self.shapes[f"{name}.bias"] = (out,)

    def conv(self, name: str, out: int, inner: int, size: int = 3) -> None:
        self.shapes[f"{name}.weight"] = (out, inner, size, size)
        self.shapes[f"{name}.bias"] = (out,)

    def norm(self, name: str, width: int) -> None:
        self.shapes[f"{name}.weight"] = self.shapes[f"{name}.bias"] = (width,)


def ldm_unet(
    channels: Sequence[int] = (4, 8, 8),
    layers: int = 2,
    depths: Sequence[int] = (1, 1, 0),
    context: int = 16,
    linear: bool = False,
    pooled: int = 0,
) -> Shapes:
    """The UNet of latent diffusion.

    Args:
        channels: of each level.
        layers: resnets a level.
        depths: transformer blocks of each level; 0 for no attention.
        context: width of the text's encoding.
        linear: whether attentions are entered through linear modules (SD 2, XL).
        pooled: width of what it is conditioned on besides (XL); 0 for nothing.
    """
    made = _Modules()
    time = 4 * channels[0]

    def resnet(name: str, inner: int, out: int) -> None:
        made.norm(f"{name}.in_layers.0", inner)
        made.conv(f"{name}.in_layers.2", out, inner)
        made.linear(f"{name}.emb_layers.1", out, time)
        made.norm(f"{name}.out_layers.0", out)
        made.conv(f"{name}.out_layers.3", out, out)
        if inner != out:
            made.conv(f"{name}.skip_connection", out, inner, 1)

    def attention(name: str, width: int, depth: int) -> None:
        made.norm(f"{name}.norm", width)
        for side in ("proj_in", "proj_out"):
            if linear:
                made.linear(f"{name}.{side}", width, width)
            else:
                made.conv(f"{name}.{side}", width, width, 1)
        for number in range(depth):
            block = f"{name}.transformer_blocks.{number}"
            for attn, inner in (("attn1", width), ("attn2", context)):
                made.linear(f"{block}.{attn}.to_q", width, width, bias=False)
                made.linear(f"{block}.{attn}.to_k", width, inner, bias=False)
                made.linear(f"{block}.{attn}.to_v", width, inner, bias=False)
                made.linear(f"{block}.{attn}.to_out.0", width, width)
            made.linear(f"{block}.ff.net.0.proj", 8 * width, width)
            made.linear(f"{block}.ff.net.2", width, 4 * width)
            for norm in ("norm1", "norm2", "norm3"):
                made.norm(f"{block}.{norm}", width)

    made.linear("time_embed.0", time, channels[0])
    made.linear("time_embed.2", time, time)
    if pooled:
        made.linear("label_emb.0.0", time, pooled)
        made.linear("label_emb.0.2", time, time)
    made.conv("input_blocks.0.0", channels[0], 4)
    current, skips, block = channels[0], [channels[0]], 1
    for level, width in enumerate(channels):
        for _ in range(layers):
            resnet(f"input_blocks.{block}.0", current, width)
            if depths[level]:
                attention(f"input_blocks.{block}.1", width, depths[level])
            current, block = width, block + 1
            skips.append(width)
        if level < len(channels) - 1:
            made.conv(f"input_blocks.{block}.0.op", width, width)
            skips.append(width)
            block += 1
    resnet("middle_block.0", current, current)
    attention("middle_block.1", current, max(depths[-1], 1))
    resnet("middle_block.2", current, current)
    block = 0
    for level, width in reversed(list(enumerate(channels))):
        for layer in range(layers + 1):
            resnet(f"output_blocks.{block}.0", current + skips.pop(), width)
            place = 1
            if depths[level]:
                attention(f"output_blocks.{block}.1", width, depths[level])
                place = 2
            if level and layer == layers:
                made.conv(f"output_blocks.{block}.{place}.conv", width, width)
            current, block = width, block + 1
    made.norm("out.0", channels[0])
    made.conv("out.2", 4, channels[0])
    return made.shapes


def ldm_vae(channels: Sequence[int] = (4, 8), layers: int = 1, latent: int = 4) -> Shapes:
    """The autoencoder of latent diffusion."""
    made = _Modules()

    def resnet(name: str, inner: int, out: int) -> None:
        for number, width in ((1, inner), (2, out)):
            made.norm(f"{name}.norm{number}", width)
            made.conv(f"{name}.conv{number}", out, width)
        if inner != out:
            made.conv(f"{name}.nin_shortcut", out, inner, 1)

    def middle(name: str, width: int) -> None:
        resnet(f"{name}.block_1", width, width)
        made.norm(f"{name}.attn_1.norm", width)
        for part in ("q", "k", "v", "proj_out"):
            made.conv(f"{name}.attn_1.{part}", width, width, 1)
        resnet(f"{name}.block_2", width, width)

    made.conv("encoder.conv_in", channels[0], 3)
    current = channels[0]
    for level, width in enumerate(channels):
        for layer in range(layers):
            resnet(f"encoder.down.{level}.block.{layer}", current, width)
            current = width
        if level < len(channels) - 1:
            made.conv(f"encoder.down.{level}.downsample.conv", width, width)
    middle("encoder.mid", current)
    made.norm("encoder.norm_out", current)
    made.conv("encoder.conv_out", 2 * latent, current)
    made.conv("decoder.conv_in", current, latent)
    middle("decoder.mid", current)
    for level, width in reversed(list(enumerate(channels))):
        for layer in range(layers + 1):
            resnet(f"decoder.up.{level}.block.{layer}", current, width)
            current = width
        if level:
            made.conv(f"decoder.up.{level}.upsample.conv", width, width)
    made.norm("decoder.norm_out", current)
    made.conv("decoder.conv_out", 3, current)
    made.conv("quant_conv", 2 * latent, 2 * latent, 1)
    made.conv("post_quant_conv", latent, latent, 1)
    return made.shapes


def openclip(layers: int = 2, width: int = 8, projection: int = 6) -> Shapes:
    """The text half of OpenCLIP."""
    made = _Modules()
    made.shapes["positional_embedding"] = (10, width)
    made.shapes["text_projection"] = (width, projection)
    made.shapes["logit_scale"] = ()
    made.shapes["token_embedding.weight"] = (32, width)
    for layer in range(layers):
        block = f"transformer.resblocks.{layer}"
        made.shapes[f"{block}.attn.in_proj_weight"] = (3 * width, width)
        made.shapes[f"{block}.attn.in_proj_bias"] = (3 * width,)
        made.linear(f"{block}.attn.out_proj", width, width)
        made.norm(f"{block}.ln_1", width)
        made.norm(f"{block}.ln_2", width)
        made.linear(f"{block}.mlp.c_fc", 4 * width, width)
        made.linear(f"{block}.mlp.c_proj", width, 4 * width)
    made.norm("ln_final", width)
    return made.shapes


def clip(layers: int = 2, width: int = 8) -> Shapes:
    """The text half of OpenAI's CLIP, as transformers names it."""
    made = _Modules()
    made.shapes["text_model.embeddings.position_ids"] = (1, 10)
    made.shapes["text_model.embeddings.position_embedding.weight"] = (10, width)
    made.shapes["text_model.embeddings.token_embedding.weight"] = (32, width)
    for layer in range(layers):
        block = f"text_model.encoder.layers.{layer}"
        for part in ("q_proj", "k_proj", "v_proj", "out_proj"):
            made.linear(f"{block}.self_attn.{part}", width, width)
        made.norm(f"{block}.layer_norm1", width)
        made.norm(f"{block}.layer_norm2", width)
        made.linear(f"{block}.mlp.fc1", 4 * width, width)
        made.linear(f"{block}.mlp.fc2", width, 4 * width)
    made.norm("text_model.final_layer_norm", width)
    return made.shapes


def t5(width: int = 8) -> Shapes:
    """The encoder of T5 with one layer, as transformers names it."""
    attention, mlp = "encoder.block.0.layer.0", "encoder.block.0.layer.1"
    return {
        "shared.weight": (32, width),
        **{f"{attention}.SelfAttention.{part}.weight": (width, width) for part in "qkvo"},
        f"{attention}.SelfAttention.relative_attention_bias.weight": (4, 2),
        f"{attention}.layer_norm.weight": (width,),
        f"{mlp}.DenseReluDense.wi_0.weight": (2 * width, width),
        f"{mlp}.DenseReluDense.wi_1.weight": (2 * width, width),
        f"{mlp}.DenseReluDense.wo.weight": (width, 2 * width),
        f"{mlp}.layer_norm.weight": (width,),
        "encoder.final_layer_norm.weight": (width,),
    }


def flux(width: int, double: int = 2, single: int = 2, guidance: bool = True) -> Shapes:
    """The transformer of Flux; `width` is 3072 in the real one."""
    made = _Modules()
    made.linear("img_in", width, 4)
    made.linear("txt_in", width, 6)
    for name in ("time_in", "vector_in", *(["guidance_in"] if guidance else [])):
        made.linear(f"{name}.in_layer", width, 5)
        made.linear(f"{name}.out_layer", width, width)
    for block in range(double):
        for stream in ("img", "txt"):
            name = f"double_blocks.{block}.{stream}"
            made.linear(f"{name}_mod.lin", 6 * width, width)
            made.linear(f"{name}_attn.qkv", 3 * width, width)
            for norm in ("query_norm", "key_norm"):
                made.shapes[f"{name}_attn.norm.{norm}.scale"] = (2,)
            made.linear(f"{name}_attn.proj", width, width)
            made.linear(f"{name}_mlp.0", 4 * width, width)
            made.linear(f"{name}_mlp.2", width, 4 * width)
    for block in range(single):
        name = f"single_blocks.{block}"
        made.linear(f"{name}.linear1", 7 * width, width)
        made.linear(f"{name}.linear2", width, 5 * width)
        for norm in ("query_norm", "key_norm"):
            made.shapes[f"{name}.norm.{norm}.scale"] = (2,)
        made.linear(f"{name}.modulation.lin", 3 * width, width)
    made.linear("final_layer.linear", 4, width)
    made.linear("final_layer.adaLN_modulation.1", 2 * width, width)
    return made.shapes


def sd3(width: int = 8, blocks: int = 3, dual: Collection[int] = (0, 1)) -> Shapes:
    """The transformer of Stable Diffusion 3.5; `dual` blocks have a second attention."""
    made = _Modules()
    made.shapes["pos_embed"] = (1, 9, width)
    made.conv("x_embedder.proj", width, 4, 2)
    for name, inner in (("t_embedder", 5), ("y_embedder", 6)):
        made.linear(f"{name}.mlp.0", width, inner)
        made.linear(f"{name}.mlp.2", width, width)
    made.linear("context_embedder", width, 7)
    for block in range(blocks):
        for stream in ("x_block", "context_block"):
            name = f"joint_blocks.{block}.{stream}"
            reads_only = stream == "context_block" and block == blocks - 1
            has_two = stream == "x_block" and block in dual
            for attn in ("attn", *(["attn2"] if has_two else [])):
                made.linear(f"{name}.{attn}.qkv", 3 * width, width)
                made.shapes[f"{name}.{attn}.ln_q.weight"] = (2,)
                made.shapes[f"{name}.{attn}.ln_k.weight"] = (2,)
                if not reads_only:
                    made.linear(f"{name}.{attn}.proj", width, width)
            chunks = 2 if reads_only else 9 if has_two else 6
            made.linear(f"{name}.adaLN_modulation.1", chunks * width, width)
            if not reads_only:
                made.linear(f"{name}.mlp.fc1", 4 * width, width)
                made.linear(f"{name}.mlp.fc2", width, 4 * width)
    made.linear("final_layer.linear", 16, width)
    made.linear("final_layer.adaLN_modulation.1", 2 * width, width)
    return made.shapes
