"""Tiny diffusers models, built from configs of a few thousand parameters."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers

from tests.single_files import Shapes

transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()
diffusers.utils.logging.set_verbosity_error()
diffusers.utils.logging.disable_progress_bar()

_UNET: dict[str, Any] = {
    "block_out_channels": (4, 8, 8), "layers_per_block": 2, "norm_num_groups": 2,
    "sample_size": 8, "in_channels": 4, "out_channels": 4, "cross_attention_dim": 16,
    "attention_head_dim": 2,
    "down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
}  # fmt: skip
_XL: dict[str, Any] = {
    "use_linear_projection": True, "addition_embed_type": "text_time",
    "addition_time_embed_dim": 8, "projection_class_embeddings_input_dim": 54,
    "transformer_layers_per_block": (1, 1, 2),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
}  # fmt: skip
UNETS: dict[str, dict[str, Any]] = {
    "sd1": _UNET,
    "sd2": {**_UNET, "use_linear_projection": True},
    "sdxl": {**_UNET, **_XL},
}


def build(cls: Any, seed: int = 0, **settings: Any) -> Any:
    """A random model of a diffusers class; the same one for the same seed."""
    with torch.random.fork_rng(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(seed)
        return cls(**settings).eval()


def unet(kind: str, seed: int = 0) -> Any:
    """The UNet of "sd1", "sd2" or "sdxl"."""
    return build(diffusers.UNet2DConditionModel, seed, **UNETS[kind])


def flux(seed: int = 0) -> Any:
    """The transformer of Flux."""
    return build(
        diffusers.FluxTransformer2DModel, seed, patch_size=1, in_channels=4, num_layers=2,
        num_single_layers=2, attention_head_dim=4, num_attention_heads=2, joint_attention_dim=8,
        pooled_projection_dim=6, axes_dims_rope=(2, 2, 0), guidance_embeds=True,
    )  # fmt: skip


def sd3(seed: int = 0) -> Any:
    """The transformer of Stable Diffusion 3.5."""
    return build(
        diffusers.SD3Transformer2DModel, seed, sample_size=8, patch_size=2, in_channels=4,
        num_layers=3, attention_head_dim=4, num_attention_heads=2, joint_attention_dim=8,
        caption_projection_dim=8, pooled_projection_dim=6, out_channels=4, pos_embed_max_size=4,
        dual_attention_layers=(0, 1), qk_norm="rms_norm",
    )  # fmt: skip


def vae(seed: int = 0) -> Any:
    """The autoencoder."""
    return build(
        diffusers.AutoencoderKL, seed, block_out_channels=(4, 8), norm_num_groups=2,
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=4,
    )  # fmt: skip


def clip(seed: int = 0, projection: int | None = None) -> Any:
    """A CLIP text encoder, with a projection if it has a width."""
    settings: dict[str, Any] = {
        "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2,
        "num_attention_heads": 2, "vocab_size": 64, "max_position_embeddings": 12,
        "bos_token_id": 0, "eos_token_id": 2,
    }  # fmt: skip
    cls = transformers.CLIPTextModel
    if projection:
        settings["projection_dim"] = projection
        cls = transformers.CLIPTextModelWithProjection
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return cls(transformers.CLIPTextConfig(**settings)).eval()


def t5(seed: int = 0) -> Any:
    """A T5 encoder."""
    config = transformers.T5Config(
        vocab_size=32, d_model=16, d_kv=4, d_ff=24, num_layers=2, num_heads=2,
        feed_forward_proj="gated-gelu",
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return transformers.T5EncoderModel(config).eval()


def components(kind: str, seed: int = 0) -> dict[str, Any]:
    """The models of a pipeline of this kind, by component."""
    if kind in ("sd1", "sd2"):
        return {"unet": unet(kind, seed), "text_encoder": clip(seed), "vae": vae(seed)}
    if kind == "sdxl":
        two = {"text_encoder": clip(seed), "text_encoder_2": clip(seed + 1, projection=6)}
        return {"unet": unet(kind, seed), **two, "vae": vae(seed)}
    if kind == "flux":
        two = {"text_encoder": clip(seed), "text_encoder_2": t5(seed)}
        return {"transformer": flux(seed), **two, "vae": vae(seed)}
    three = {
        "text_encoder": clip(seed, projection=6),
        "text_encoder_2": clip(seed + 1, projection=6),
        "text_encoder_3": t5(seed),
    }
    return {"transformer": sd3(seed), **three, "vae": vae(seed)}


KINDS = ("sd1", "sd2", "sdxl", "flux", "sd3")
_PIPELINES = {
    "sd1": "StableDiffusionPipeline", "sd2": "StableDiffusionPipeline",
    "sdxl": "StableDiffusionXLPipeline", "flux": "FluxPipeline", "sd3": "StableDiffusion3Pipeline",
}  # fmt: skip
_OPTIONAL = {
    "sd1": ("tokenizer", "safety_checker", "feature_extractor"),
    "sdxl": ("tokenizer", "tokenizer_2"),
    "flux": ("tokenizer", "tokenizer_2"),
    "sd3": ("tokenizer", "tokenizer_2", "tokenizer_3"),
}


def pipeline(kind: str, seed: int = 0) -> Any:
    """A whole pipeline without tokenizers."""
    flow = kind in ("flux", "sd3")
    scheduler = (
        diffusers.FlowMatchEulerDiscreteScheduler()
        if flow
        else diffusers.DDIMScheduler(steps_offset=1, clip_sample=False)
    )
    absent = dict.fromkeys(_OPTIONAL["sd1" if kind == "sd2" else kind])
    extra = {"requires_safety_checker": False} if kind in ("sd1", "sd2") else {}
    made = getattr(diffusers, _PIPELINES[kind])
    return made(scheduler=scheduler, **components(kind, seed), **absent, **extra)


def save(kind: str, folder: Path, seed: int = 0, **settings: Any) -> Path:
    """A pipeline's folder; `settings` go to save_pretrained."""
    pipeline(kind, seed).save_pretrained(folder, **settings)
    return folder


def load(kind: str, folder: Path, **settings: Any) -> Any:
    """The pipeline in a folder, as diffusers opens it."""
    absent = dict.fromkeys(_OPTIONAL["sd1" if kind == "sd2" else kind])
    return diffusers.DiffusionPipeline.from_pretrained(folder, **absent, **settings)


def canonical_shapes(kind: str) -> Shapes:
    """Canonical name -> shape of every parameter of a pipeline of this kind."""
    found: Shapes = {}
    for component, model in components(kind).items():
        is_clip = type(model).__name__ == "CLIPTextModel"
        start = f"{component}.text_model." if is_clip else f"{component}."
        found |= {f"{start}{name}": tuple(p.shape) for name, p in model.named_parameters()}
    return found
