"""Tiny random models whose tensors have other names, or another layout, in memory than on disk."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import save_file
from transformers import PreTrainedModel

from loratool.checkpoint import Checkpoint
from loratool.opening import open_checkpoint
from loratool.skeleton import Skeleton, build_skeleton
from tests.models import load

_VISION = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48,
    "image_size": 16, "patch_size": 4, "initializer_range": 0.2,
}  # fmt: skip
_TEXT = {
    "vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "intermediate_size": 48, "max_position_embeddings": 24,
    "initializer_range": 0.2, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
_EXPERTS = {**_TEXT, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}


@dataclass(frozen=True)
class Tiny:
    """A model.

    Attributes:
        model_type: its model type.
        architecture: its class.
        settings: its config.
    """

    model_type: str
    architecture: str
    settings: Mapping[str, Any]

    def build(self, seed: int = 0) -> PreTrainedModel:
        """The model with random values everywhere, norms and biases included."""
        config = transformers.AutoConfig.for_model(self.model_type, **self.settings)
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            model: PreTrainedModel = getattr(transformers, self.architecture)(config)
            change(model, seed + 1)
        return model.eval()


TINY: Mapping[str, Tiny] = {
    "vit": Tiny("vit", "ViTForImageClassification", _VISION),
    "vit-bare": Tiny("vit", "ViTModel", _VISION),
    "deit": Tiny("deit", "DeiTForImageClassification", _VISION),
    "beit": Tiny(
        "beit", "BeitForImageClassification", {**_VISION, "use_relative_position_bias": True}
    ),
    # Halves of a fused tensor.
    "dinov2": Tiny("dinov2", "Dinov2ForImageClassification", {**_VISION, "use_swiglu_ffn": True}),
    "mixtral": Tiny("mixtral", "MixtralForCausalLM", {**_TEXT, "num_local_experts": 4}),
    "qwen2_moe": Tiny(
        "qwen2_moe", "Qwen2MoeForCausalLM", {**_EXPERTS, "shared_expert_intermediate_size": 40}
    ),
    "qwen3_moe": Tiny("qwen3_moe", "Qwen3MoeForCausalLM", {**_EXPERTS, "head_dim": 8}),
    # A dense layer and a shared expert have linear modules by the names of Qwen's experts.
    "deepseek_v3": Tiny(
        "deepseek_v3", "DeepseekV3ForCausalLM",
        {
            **_EXPERTS, "num_key_value_heads": 4, "n_routed_experts": 4, "n_shared_experts": 1,
            "first_k_dense_replace": 1, "n_group": 1, "topk_group": 1, "q_lora_rank": 8,
            "kv_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 8,
        },
    ),
    # Experts stored as (E, in, out), on disk as in memory.
    "gpt_oss": Tiny(
        "gpt_oss", "GptOssForCausalLM",
        {**_TEXT, "num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 8},
    ),
    # Three tensors become one.
    "olmo_hybrid": Tiny("olmo_hybrid", "OlmoHybridForCausalLM", _TEXT),
    # Alternating rows become halves.
    "inkling2": Tiny("inkling2_text", "Inkling2TextModel", _TEXT),
    # Its config holds an infinity.
    "nemotron_h": Tiny("nemotron_h", "NemotronHForCausalLM", _TEXT),
}  # fmt: skip


def change(model: PreTrainedModel, seed: int = 1, by: float = 0.05) -> None:
    """Add noise to every parameter."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += by * torch.randn(parameter.shape, generator=generator)


def save_as_in_memory(model: PreTrainedModel, folder: Path) -> None:
    """A checkpoint under the names in memory, as some tools write them."""
    folder.mkdir()
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(folder)
    tensors = {name: value.clone() for name, value in model.state_dict().items()}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def opened(folder: Path) -> tuple[Checkpoint, Skeleton]:
    """A checkpoint and the skeleton of its model."""
    checkpoint = open_checkpoint(folder)
    shapes = {name: tensor.shape for name, tensor in checkpoint.items()}
    return checkpoint, build_skeleton(checkpoint.config, shapes)


def loaded(tiny: Tiny, folder: Path) -> PreTrainedModel:
    """What transformers makes of a checkpoint."""
    return load(tiny.architecture, folder)


def outputs(model: Any) -> torch.Tensor:
    """The logits for a fixed input."""
    generator = torch.Generator().manual_seed(0)
    config = model.config
    if hasattr(config, "image_size"):
        inputs = {"pixel_values": torch.randn(2, 3, 16, 16, generator=generator)}
    else:
        inputs = {"input_ids": torch.randint(3, 60, (2, 7), generator=generator)}
    with torch.no_grad():
        logits: torch.Tensor = model(**inputs).logits
    return logits
