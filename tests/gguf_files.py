"""Tiny GGUF models, made of transformers' ones as llama.cpp's converter makes them.

Written for the tests from the converter's rules, with the gguf package's writer and its own map of
names, so that nothing of what is tested helps to make its input.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
import transformers
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
from transformers import PreTrainedModel

from tests.models import CONFIGS, build

Kind = GGMLQuantizationType
WIDE = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "head_dim": 16}
_LATER = {
    "gemma3_text": {**CONFIGS["gemma2"], "sliding_window_pattern": 6},
    "starcoder2": CONFIGS["llama"],
}
# Architecture -> class, settings beyond those of tests.models
MODELS: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    "llama": ("LlamaForCausalLM", WIDE),
    "qwen2": ("Qwen2ForCausalLM", WIDE),
    # transformers does not read the size of Qwen3's heads, nor GPT-2's positions, from GGUF.
    "qwen3": ("Qwen3ForCausalLM", {**WIDE, "head_dim": 128}),
    "gemma": ("GemmaForCausalLM", WIDE),
    "gemma2": ("Gemma2ForCausalLM", {**WIDE, "sliding_window": 8, "query_pre_attn_scalar": 16}),
    "gemma3": ("Gemma3ForCausalLM", {**WIDE, "sliding_window": 8, "query_pre_attn_scalar": 16}),
    "phi3": ("Phi3ForCausalLM", {**WIDE, "sliding_window": None}),
    "gpt2": ("GPT2LMHeadModel", {"n_embd": 64, "n_inner": 256, "n_positions": 1024}),
    "starcoder2": ("Starcoder2ForCausalLM", {**WIDE, "sliding_window": None}),
}
_TYPES = {"gemma3": "gemma3_text"}


def model_of(architecture: str, **settings: Any) -> PreTrainedModel:
    """A tiny random model; norms are random, too, since ones would hide what is done to them."""
    cls, own = MODELS[architecture]
    model_type = _TYPES.get(architecture, architecture)
    base = _LATER.get(model_type) or CONFIGS[model_type]
    config = transformers.AutoConfig.for_model(model_type, **{**base, **own, **settings})
    model = build(cls, config)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, value in model.named_parameters():
            if value.ndim == 1:
                value.copy_(0.5 + torch.rand(value.shape, generator=generator))
            elif name.endswith("embed_tokens.weight"):
                value[0] = torch.randn(value.shape[1], generator=generator)
    return model


def save_gguf(
    file: Path,
    architecture: str,
    model: PreTrainedModel,
    kind: Kind = Kind.F32,
    metadata: Mapping[str, Any] | None = None,
) -> Path:
    """Write a model; matrices whose rows are long enough get the kind, all others are F32."""
    config = model.config
    writer = gguf.GGUFWriter(file, architecture)
    writer.add_type("model")
    _add_metadata(writer, architecture, config)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list([f"token {number}" for number in range(config.vocab_size)])
    for key, value in {"bos": 1, "eos": 2, "padding": 0}.items():
        writer.add_uint32(f"tokenizer.ggml.{key}_token_id", value)
    for key, value in (metadata or {}).items():
        writer.add_key_value(key, *value)
    for name, values in converted(architecture, model).items():
        matrix = values.ndim > 1 and not values.shape[-1] % GGML_QUANT_SIZES[kind][0]
        chosen = kind if matrix else Kind.F32
        writer.add_tensor(name, gguf.quantize(values, chosen), raw_dtype=chosen)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


def converted(architecture: str, model: PreTrainedModel) -> dict[str, np.ndarray]:
    """The tensors as llama.cpp stores them, by their GGUF names."""
    config = model.config
    arch = next(k for k, v in gguf.MODEL_ARCH_NAMES.items() if v == architecture)
    names = gguf.get_tensor_name_map(arch, config.num_hidden_layers)
    tied = bool(config.tie_word_embeddings)
    found = {}
    for name, value in model.state_dict().items():
        if name == "lm_head.weight" and tied:
            continue
        module, _, leaf = name.rpartition(".")
        to = names.get_name(module)
        assert to is not None, name
        found[f"{to}.{leaf}"] = _changed(architecture, config, name, value.float()).numpy()
    return found


def _changed(architecture: str, config: Any, name: str, value: torch.Tensor) -> torch.Tensor:
    if architecture == "llama" and ".q_proj." in name:
        return permuted(value, config.num_attention_heads)
    if architecture == "llama" and ".k_proj." in name:
        return permuted(value, config.num_key_value_heads)
    if architecture.startswith("gemma") and name.endswith("norm.weight"):
        return value + 1
    if architecture == "gpt2" and name.endswith(("c_attn.weight", "c_proj.weight", "c_fc.weight")):
        return value.T.contiguous()
    return value


def permuted(value: torch.Tensor, heads: int) -> torch.Tensor:
    """LlamaModel.permute of llama.cpp's converter: the halves of each head become neighbours."""
    halves = value.reshape(heads, 2, value.shape[0] // heads // 2, *value.shape[1:])
    return halves.swapaxes(1, 2).reshape(value.shape).contiguous()


def _add_metadata(writer: gguf.GGUFWriter, architecture: str, config: Any) -> None:
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_head_count(config.num_attention_heads)
    if architecture == "gpt2":
        writer.add_feed_forward_length(config.n_inner)
        writer.add_layer_norm_eps(config.layer_norm_epsilon)
        return
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_rope_freq_base(_theta(config))
    writer.add_vocab_size(config.vocab_size)
    if architecture == "starcoder2":
        writer.add_layer_norm_eps(config.norm_epsilon)
        return
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    if architecture in ("llama", "phi3"):
        writer.add_rope_dimension_count(getattr(config, "head_dim", None) or 16)
    if architecture.startswith("gemma") or architecture == "qwen3":
        writer.add_key_length(config.head_dim)
        writer.add_value_length(config.head_dim)
    if architecture in ("gemma2", "gemma3"):
        writer.add_sliding_window(config.sliding_window)
    if architecture == "gemma2":
        writer.add_attn_logit_softcapping(config.attn_logit_softcapping)
        writer.add_final_logit_softcapping(config.final_logit_softcapping)


def _theta(config: Any) -> float:
    parameters: Mapping[str, Any] = config.rope_parameters
    return float(parameters.get("rope_theta") or parameters["full_attention"]["rope_theta"])
