"""Keys of diffusers' LoRA files, of all its ages, mean what diffusers makes of them."""

from __future__ import annotations

import pytest
import torch
from diffusers.utils.state_dict_utils import (
    convert_state_dict_to_diffusers,
    convert_state_dict_to_peft,
    convert_unet_state_dict_to_peft,
)

from loratool.diffusion.adapter_keys import AdapterKey, parse_key

ATTENTION = "down_blocks.0.attentions.0.transformer_blocks.0.attn1"
LAYER = "text_model.encoder.layers.0"
NOTHING = torch.zeros(1)

UNET = (
    *(f"{ATTENTION}.processor.to_{part}_lora.{way}.weight"
      for part in ("q", "k", "v", "out") for way in ("down", "up")),
    f"{ATTENTION}.to_q.lora.down.weight",
    f"{ATTENTION}.to_out.0.lora.up.weight",
    f"{ATTENTION}.to_q.lora_A.weight",
    f"{ATTENTION}.to_q.lora_B.weight",
    "down_blocks.0.resnets.0.conv1.lora.down.weight",
    "down_blocks.0.attentions.0.proj_in.lora.up.weight",
    "mid_block.attentions.0.transformer_blocks.0.ff.net.0.proj.lora.down.weight",
)  # fmt: skip
TEXT_OLD = (
    *(f"{LAYER}.self_attn.to_{part}_lora.{way}.weight"
      for part in ("q", "k", "v", "out") for way in ("down", "up")),
    f"{LAYER}.mlp.fc1.lora_linear_layer.up.weight",
)  # fmt: skip
TEXT_NEW = (
    *(f"{LAYER}.self_attn.{part}_proj.lora_linear_layer.{way}.weight"
      for part in ("q", "k", "v", "out") for way in ("down", "up")),
    f"{LAYER}.mlp.fc2.lora_linear_layer.down.weight",
    "text_projection.lora.down.weight",
    "text_projection.lora.up.weight",
)  # fmt: skip


def parsed(peft_key: str) -> AdapterKey:
    """What a key in PEFT's form says by itself."""
    for ending, side in ((".lora_A.weight", "A"), (".lora_B.weight", "B")):
        if peft_key.endswith(ending):
            return AdapterKey(peft_key.removesuffix(ending), side)  # type: ignore[arg-type]
    raise AssertionError(peft_key)


@pytest.mark.parametrize("key", UNET)
@pytest.mark.parametrize("prefix", ["unet.", ""])
def test_keys_of_a_unet(key: str, prefix: str) -> None:
    (converted,) = convert_unet_state_dict_to_peft({key: NOTHING})
    assert parse_key(prefix + key) == parsed(f"unet.{converted}")


@pytest.mark.parametrize("keys", [TEXT_OLD, TEXT_NEW])
@pytest.mark.parametrize("component", ["text_encoder", "text_encoder_2"])
def test_keys_of_a_text_encoder(keys: tuple[str, ...], component: str) -> None:
    state = dict.fromkeys(keys, NOTHING)
    converted = convert_state_dict_to_peft(convert_state_dict_to_diffusers(state))
    assert len(converted) == len(keys)
    for key, found in zip(keys, converted, strict=True):
        assert parse_key(f"{component}.{key}") == parsed(f"{component}.{found}")


def test_clip_without_text_model_is_named_as_with_it() -> None:
    module = "text_encoder.text_model.encoder.layers.0.self_attn.q_proj"
    bare = module.replace("text_model.", "")
    for name in (module, bare):
        assert parse_key(f"{name}.lora_A.weight") == AdapterKey(module, "A")


@pytest.mark.parametrize(
    ("key", "module", "side"),
    [
        ("transformer.x_embedder.lora_B.bias", "transformer.x_embedder", "B.bias"),
        ("transformer.x_embedder.lora_B.default.weight", "transformer.x_embedder", "B"),
        ("unet.conv_in.lora_magnitude_vector", "unet.conv_in", "magnitude"),
        ("unet.conv_in.lora_magnitude_vector.weight", "unet.conv_in", "magnitude"),
        ("unet.conv_in.alpha", "unet.conv_in", "alpha"),
        (
            "text_encoder_3.encoder.block.0.layer.0.SelfAttention.q.lora_A.weight",
            "text_encoder_3.encoder.block.0.layer.0.SelfAttention.q",
            "A",
        ),
    ],
)
def test_other_sides(key: str, module: str, side: str) -> None:
    found = parse_key(key)
    assert found is not None
    assert (found.module, found.side) == (module, side)


@pytest.mark.parametrize(
    "key",
    [
        "unet.conv_in.weight",
        "lora_unet_conv_in.lora_down.weight",
        "conv_in.hada_w1_a",
        "alpha",
        "",
        "lora_unet_conv_in.alpha",
    ],
)
def test_other_keys_are_none(key: str) -> None:
    assert parse_key(key) is None
