"""Kinds of modules told by names are those of diffusers' classes."""

from __future__ import annotations

from typing import Any

import diffusers
import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from loratool.skeleton import build_skeleton
from tests.diffusion import pipelines  # makes diffusers quiet
from tests.single_files import flux, ldm_unet, openclip, prefixed

CLASSES: dict[str, dict[str, Any]] = {
    "UNet2DConditionModel": {**pipelines.UNETS["sd1"], "num_class_embeds": 5},
    "FluxTransformer2DModel": {"num_layers": 1, "num_single_layers": 1},
    "SD3Transformer2DModel": {"num_layers": 2},
    "DiTTransformer2DModel": {"num_layers": 1},
    "QwenImageTransformer2DModel": {"num_layers": 1},
    "WanTransformer3DModel": {"num_layers": 1},
    "HunyuanVideo15Transformer3DModel": {"num_layers": 1, "num_refiner_layers": 1},
    "GlmImageTransformer2DModel": {"num_layers": 1},
    "AutoencoderKL": {},
    "UniDiffuserTextDecoder": {
        "prefix_length": 4, "prefix_inner_dim": 8, "prefix_hidden_dim": 6, "n_embd": 16,
        "n_head": 2, "n_layer": 1,
    },
    "VQModel": {},
    "T5FilmDecoder": {"num_layers": 1},
}  # fmt: skip


def kind_of(module: nn.Module) -> str:
    if isinstance(module, (nn.Linear, Conv1D)):
        return "linear" if isinstance(module, nn.Linear) else "conv1d"
    if isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d) and module.groups == 1:
        return "conv"
    return "embedding" if isinstance(module, nn.Embedding) else "other"


@pytest.mark.parametrize("name", CLASSES)
def test_kinds_are_those_of_the_class(name: str) -> None:
    with torch.device("meta"):
        model = getattr(diffusers, name)(**CLASSES[name])
    shapes = {key: tuple(value.shape) for key, value in model.named_parameters()}
    skeleton = build_skeleton({"_class_name": name}, shapes)
    assert not skeleton.guessed
    assert skeleton.kinds.keys() == shapes.keys()
    for key, kind in skeleton.kinds.items():
        module, _, leaf = key.rpartition(".")
        real = kind_of(model.get_submodule(module)) if leaf == "weight" else "other"
        assert kind == real, key


def test_single_files_are_no_guess() -> None:
    unet = prefixed("model.diffusion_model.", ldm_unet())
    text = prefixed("cond_stage_model.model.", openclip())
    for shapes in (flux(8), unet | text):
        skeleton = build_skeleton(None, shapes)
        assert not skeleton.guessed
        assert not skeleton.notes
    assert skeleton.kinds["cond_stage_model.model.token_embedding.weight"] == "embedding"
    assert (
        skeleton.kinds["cond_stage_model.model.transformer.resblocks.0.mlp.c_fc.weight"] == "linear"
    )
    block = "model.diffusion_model.input_blocks.1."
    assert skeleton.kinds[f"{block}1.transformer_blocks.0.attn1.to_q.weight"] == "linear"
    assert skeleton.kinds[f"{block}0.in_layers.2.weight"] == "conv"
