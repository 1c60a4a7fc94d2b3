"""The architectures whose GGUF files are read: names, what the converter changed, and the config.

Everything here is what llama.cpp's converter does to a checkpoint of transformers, seen from the
other side. An architecture that is not in the table is refused: its tensors may be permuted,
shifted or merged in ways that nothing in the file tells.
"""

from __future__ import annotations

import math
import re
import reprlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from loratool_plugins.checkpoint_formats._gguf_values import Layout

Config = dict[str, Any]
_NUMBERED = re.compile(r"blk\.(\d+)\.(.+)")


class Missing(Exception):
    """A key that the metadata lack."""


@dataclass(frozen=True)
class Model:
    """What a file says of its model.

    Attributes:
        architecture: general.architecture.
        metadata: all of it; of all parts of a split file, the first one's.
        shapes: its tensors' shapes, by their GGUF names.
        floats: reads the values of a small F32 tensor, by name.
    """

    architecture: str
    metadata: Mapping[str, Any]
    shapes: Mapping[str, tuple[int, ...]]
    floats: Callable[[str], list[float]]

    def get(self, key: str, default: Any = None) -> Any:
        """A number by its key without the architecture; one that differs by layer is refused."""
        name = f"{self.architecture}.{key}"
        found = self.metadata.get(name, default)
        if isinstance(found, list):
            if len(set(found)) != 1:
                raise Missing(f"{name} differs from layer to layer")
            found = found[0]
        is_number = type(found) in (int, float) and math.isfinite(found) and found >= 0
        if found is not default and not is_number:
            raise Missing(f"{name} is {reprlib.repr(found)}")
        return found

    def need(self, key: str) -> Any:
        """Likewise, and more than zero; Missing if it is not there."""
        found = self.get(key)
        if not found:
            raise Missing(f"{self.architecture}.{key} is {'missing' if found is None else found}")
        return found

    def text(self, key: str) -> str:
        """A text by its key, "" if it is not there."""
        return str(self.metadata.get(f"{self.architecture}.{key}") or "")

    def has(self, *leaves: str) -> bool:
        """Whether the first layer has any of these tensors."""
        return any(f"blk.0.{leaf}" in self.shapes for leaf in leaves)


@dataclass(frozen=True)
class Architecture:
    """How one architecture's GGUF files differ from its checkpoints.

    Attributes:
        model_type: of transformers.
        model_class: the class with the language modelling head.
        names: GGUF module -> transformers' module; "blk." and its number stand for the layer.
        layer: transformers' name of a layer, without its number.
        config: what config.json says beyond what all have.
        heads: leaf -> metadata key of the number of heads that its rows were interleaved by.
        transposed: leaves that are stored as (in, out) in the checkpoint.
        shifted: whether one is added to norms.
        unused: tensors that are no weights of the checkpoint.
    """

    model_type: str
    model_class: str
    names: Mapping[str, str]
    config: Callable[[Model], Config]
    layer: str = "model.layers"
    heads: Mapping[str, str] = field(default_factory=dict)
    transposed: tuple[str, ...] = ()
    shifted: bool = False
    unused: tuple[str, ...] = ("rope_freqs.weight",)

    def name(self, gguf: str) -> str | None:
        """transformers' name of a tensor; None if the architecture has no such tensor."""
        module, _, leaf = gguf.rpartition(".")
        if leaf not in ("weight", "bias"):
            return None
        numbered = _NUMBERED.fullmatch(module)
        found = self.names.get(f"blk.{numbered[2]}" if numbered else module)
        if found is None:
            return None
        return f"{self.layer}.{numbered[1]}.{found}.{leaf}" if numbered else f"{found}.{leaf}"

    def layout(self, gguf: str, model: Model) -> Layout:
        """What the converter did to a tensor."""
        module, _, leaf = gguf.rpartition(".")
        part = module.rpartition(".")[2]
        if key := self.heads.get(part):
            return Layout("heads", int(model.get(key) or model.need("attention.head_count")))
        if part in self.transposed and leaf == "weight":
            return Layout("transposed")
        is_norm = part.endswith("norm") and leaf == "weight"
        return Layout("shifted") if self.shifted and is_norm else Layout()


_DECODER = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
    "blk.attn_norm": "input_layernorm",
    "blk.attn_q": "self_attn.q_proj",
    "blk.attn_k": "self_attn.k_proj",
    "blk.attn_v": "self_attn.v_proj",
    "blk.attn_output": "self_attn.o_proj",
    "blk.ffn_norm": "post_attention_layernorm",
    "blk.ffn_gate": "mlp.gate_proj",
    "blk.ffn_up": "mlp.up_proj",
    "blk.ffn_down": "mlp.down_proj",
}
_HEAD_NORMS = {"blk.attn_q_norm": "self_attn.q_norm", "blk.attn_k_norm": "self_attn.k_norm"}
_FOUR_NORMS = {
    "blk.post_attention_norm": "post_attention_layernorm",
    "blk.ffn_norm": "pre_feedforward_layernorm",
    "blk.post_ffw_norm": "post_feedforward_layernorm",
}


def _decoder(model: Model) -> Config:
    """What all Llama-like configs say."""
    heads = model.need("attention.head_count")
    width = model.need("embedding_length")
    head = model.get("attention.key_length") or model.get("rope.dimension_count") or width // heads
    return {
        "hidden_size": width,
        "intermediate_size": model.need("feed_forward_length"),
        "num_hidden_layers": model.need("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": model.get("attention.head_count_kv", heads),
        "head_dim": head,
        "max_position_embeddings": model.need("context_length"),
        "rms_norm_eps": _decimal(model.need("attention.layer_norm_rms_epsilon")),
        "rope_theta": model.get("rope.freq_base", 10000.0),
        **_rope_scaling(model, head),
    }


def _decimal(value: float) -> float:
    """The short decimal number that an fp32 one stands for: 1e-05, not 9.99999974e-06."""
    return float(f"{value:.7g}")


def _rope_scaling(model: Model, head: int) -> Config:
    kind = model.text("rope.scaling.type")
    if "rope_freqs.weight" in model.shapes:
        if kind not in ("none", ""):
            raise Missing(f"rope_freqs.weight beside rope scaling {kind!r} is not understood")
        return {"rope_scaling": _llama3(model, head)}
    if kind in ("none", ""):
        return {}
    factor = model.need("rope.scaling.factor")
    if kind == "linear":
        return {"rope_scaling": {"rope_type": "linear", "factor": factor}}
    if kind != "yarn":
        raise Missing(f"rope scaling {kind!r} is not understood")
    scaling = {"rope_type": "yarn", "factor": factor}
    optional = {
        "original_max_position_embeddings": "rope.scaling.original_context_length",
        "beta_fast": "rope.scaling.yarn_beta_fast",
        "beta_slow": "rope.scaling.yarn_beta_slow",
    }
    scaling |= {name: v for name, key in optional.items() if (v := model.get(key)) is not None}
    return {"rope_scaling": scaling}


def _llama3(model: Model, head: int) -> Config:
    """The settings of Llama 3's rope scaling that give the factors in rope_freqs.weight."""
    stored = model.floats("rope_freqs.weight")
    if not all(math.isfinite(factor) and factor >= 1 for factor in stored):
        raise Missing("rope_freqs.weight holds other factors than those of Llama 3")
    theta = model.get("rope.freq_base", 10000.0)
    # The factor is what the lowest frequencies are divided by; the rest is the same for all
    # Llama 3.1, 3.2 and 3.3 models.
    settings = {
        "rope_type": "llama3",
        "factor": float(round(max(stored), 3)),
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    expected = _llama3_factors(settings, theta, head)
    if len(expected) != len(stored) or any(
        not math.isclose(one, other, rel_tol=1e-4)
        for one, other in zip(stored, expected, strict=True)
    ):
        raise Missing("rope_freqs.weight holds other factors than those of Llama 3")
    return settings


def _llama3_factors(settings: Config, theta: float, head: int) -> list[float]:
    low, high = settings["low_freq_factor"], settings["high_freq_factor"]
    context, factor = settings["original_max_position_embeddings"], settings["factor"]
    found = []
    for index in range(0, head, 2):
        wavelength = 2 * math.pi * theta ** (index / head)
        if wavelength < context / high:
            found.append(1.0)
        elif wavelength > context / low:
            found.append(factor)
        else:
            smooth = (context / wavelength - low) / (high - low)
            found.append(1 / ((1 - smooth) / factor + smooth))
    return found


def _llama(model: Model) -> Config:
    if model.get("expert_count"):
        raise Missing("a mixture of experts (Mixtral) is not supported")
    biased = model.has("attn_q.bias")
    if biased != model.has("attn_output.bias"):
        raise Missing("biases in q, k and v alone have no place in a Llama")
    return {**_decoder(model), "attention_bias": biased, "mlp_bias": model.has("ffn_gate.bias")}


def _qwen2(model: Model) -> Config:
    config = _decoder(model)
    if config.pop("head_dim") * config["num_attention_heads"] != config["hidden_size"]:
        raise Missing("heads that do not add up to the width have no place in a Qwen2")
    return config


def _qwen3(model: Model) -> Config:
    return {**_decoder(model), "attention_bias": model.has("attn_q.bias")}


def _gemma(model: Model) -> Config:
    return {**_decoder(model), "hidden_activation": "gelu_pytorch_tanh"}


def _gemma2(model: Model) -> Config:
    config = _gemma(model)
    # llama.cpp tells the 27B model, which alone scales by the width, by its number of layers.
    is_27b = model.need("block_count") == 46
    return config | {
        "attn_logit_softcapping": model.get("attn_logit_softcapping", 50.0),
        "final_logit_softcapping": model.get("final_logit_softcapping", 30.0),
        "sliding_window": model.need("attention.sliding_window"),
        "query_pre_attn_scalar": _query_scale(config, is_27b),
    }


def _gemma3(model: Model) -> Config:
    config = _gemma(model)
    config["rope_local_base_freq"] = model.get("rope.freq_base_swa", 10000.0)
    pattern = model.metadata.get("gemma3.attention.sliding_window_pattern", 6)
    if type(pattern) is not int or pattern < 1:
        raise Missing(f"gemma3.attention.sliding_window_pattern {pattern!r} is not understood")
    return config | {
        "sliding_window": model.need("attention.sliding_window"),
        "query_pre_attn_scalar": _query_scale(config, model.need("block_count") == 62),
        "layer_types": [
            "sliding_attention" if (layer + 1) % pattern else "full_attention"
            for layer in range(config["num_hidden_layers"])
        ],
    }


def _query_scale(config: Config, by_width: bool) -> int:
    width, heads = config["hidden_size"], config["num_attention_heads"]
    return int(width // heads if by_width else config["head_dim"])


def _phi3(model: Model) -> Config:
    config = _decoder(model)
    heads, head = config["num_attention_heads"], config.pop("head_dim")
    rotary = model.get("rope.dimension_count", head)
    config |= {
        "partial_rotary_factor": rotary / (config["hidden_size"] // heads),
        "original_max_position_embeddings": model.get(
            "rope.scaling.original_context_length", config["max_position_embeddings"]
        ),
        "sliding_window": model.get("attention.sliding_window") or None,
    }
    if "rope_factors_long.weight" in model.shapes:
        config["rope_scaling"] = {
            "type": "longrope",
            "long_factor": model.floats("rope_factors_long.weight"),
            "short_factor": model.floats("rope_factors_short.weight"),
        }
    return config


def _gpt2(model: Model) -> Config:
    width = model.need("embedding_length")
    inner = model.get("feed_forward_length", 4 * width)
    return {
        "n_embd": width,
        "n_layer": model.need("block_count"),
        "n_head": model.need("attention.head_count"),
        "n_positions": model.need("context_length"),
        "n_inner": None if inner == 4 * width else inner,
        "layer_norm_epsilon": _decimal(model.need("attention.layer_norm_epsilon")),
    }


def _starcoder2(model: Model) -> Config:
    heads = model.need("attention.head_count")
    return {
        "hidden_size": model.need("embedding_length"),
        "intermediate_size": model.need("feed_forward_length"),
        "num_hidden_layers": model.need("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": model.get("attention.head_count_kv", heads),
        "max_position_embeddings": model.need("context_length"),
        "norm_epsilon": _decimal(model.need("attention.layer_norm_epsilon")),
        "rope_theta": model.get("rope.freq_base", 10000.0),
        "sliding_window": model.get("attention.sliding_window"),
        "use_bias": model.has("attn_q.bias"),
    }


ARCHITECTURES: Mapping[str, Architecture] = {
    "llama": Architecture(
        "llama", "LlamaForCausalLM", _DECODER, _llama,
        heads={"attn_q": "attention.head_count", "attn_k": "attention.head_count_kv"},
    ),
    "qwen2": Architecture("qwen2", "Qwen2ForCausalLM", _DECODER, _qwen2),
    "qwen3": Architecture("qwen3", "Qwen3ForCausalLM", {**_DECODER, **_HEAD_NORMS}, _qwen3),
    "gemma": Architecture("gemma", "GemmaForCausalLM", _DECODER, _gemma, shifted=True),
    "gemma2": Architecture(
        "gemma2", "Gemma2ForCausalLM", {**_DECODER, **_FOUR_NORMS}, _gemma2, shifted=True
    ),
    "gemma3": Architecture(
        "gemma3_text", "Gemma3ForCausalLM", {**_DECODER, **_HEAD_NORMS, **_FOUR_NORMS}, _gemma3,
        shifted=True,
    ),
    "phi3": Architecture(
        "phi3",
        "Phi3ForCausalLM",
        {
            **{name: module for name, module in _DECODER.items() if name != "blk.ffn_gate"},
            "blk.attn_qkv": "self_attn.qkv_proj",
            "blk.ffn_up": "mlp.gate_up_proj",
        },
        _phi3,
        unused=("rope_factors_long.weight", "rope_factors_short.weight"),
    ),
    "gpt2": Architecture(
        "gpt2",
        "GPT2LMHeadModel",
        {
            "token_embd": "transformer.wte",
            "position_embd": "transformer.wpe",
            "output_norm": "transformer.ln_f",
            "output": "lm_head",
            "blk.attn_norm": "ln_1",
            "blk.attn_qkv": "attn.c_attn",
            "blk.attn_output": "attn.c_proj",
            "blk.ffn_norm": "ln_2",
            "blk.ffn_up": "mlp.c_fc",
            "blk.ffn_down": "mlp.c_proj",
        },
        _gpt2,
        layer="transformer.h",
        transposed=("attn_qkv", "attn_output", "ffn_up", "ffn_down"),
    ),
    "starcoder2": Architecture(
        "starcoder2",
        "Starcoder2ForCausalLM",
        {
            **{name: module for name, module in _DECODER.items() if name != "blk.ffn_gate"},
            "blk.ffn_up": "mlp.c_fc",
            "blk.ffn_down": "mlp.c_proj",
        },
        _starcoder2,
    ),
}  # fmt: skip


def contradiction(model: Model) -> str:
    """What tensors and metadata do not agree in, "" if they do: "tensor: what"."""
    width = model.need("embedding_length")
    table = model.shapes.get("token_embd.weight", ())
    if table[1:] != (width,):
        return f"token_embd.weight: is {table or 'missing'}, but the metadata say width {width}"
    leaves: dict[int, set[str]] = {}
    for name in model.shapes:
        if match := _NUMBERED.fullmatch(name):
            leaves.setdefault(int(match[1]), set()).add(match[2])
    layers = model.need("block_count")
    if more := next((number for number in leaves if number >= layers), None):
        return f"blk.{more}.{min(leaves[more])}: the metadata say {layers} layers"
    first = leaves.get(0, set())
    for number in range(layers):
        if missing := first - leaves.get(number, set()):
            return f"blk.{number}.{min(missing)}: is missing, but the first layer has it"
    return ""


_TOKENS = {
    "bos_token_id": "bos_token_id",
    "eos_token_id": "eos_token_id",
    "padding_token_id": "pad_token_id",
}


def config_of(architecture: Architecture, model: Model, dtypes: Sequence[str]) -> Config:
    """config.json as far as the metadata tell it.

    Args:
        architecture: of the model.
        model: what the file says.
        dtypes: the types of the values of all tensors; "" for quantized ones.

    Raises:
        Missing: something is not said, or cannot be said in config.json.
    """
    tokens = {name: model.metadata.get(f"tokenizer.ggml.{key}") for key, name in _TOKENS.items()}
    return {
        "architectures": [architecture.model_class],
        "model_type": architecture.model_type,
        "vocab_size": model.shapes["token_embd.weight"][0],
        **architecture.config(model),
        # llama.cpp leaves the head out where it is the embedding.
        "tie_word_embeddings": "output.weight" not in model.shapes,
        **tokens,
        "dtype": _dtype(dtypes),
    }


def _dtype(dtypes: Sequence[str]) -> str:
    """The type that a merged model of these tensors is written in; norms are always F32."""
    for dtype, name in (("", "bfloat16"), ("BF16", "bfloat16"), ("F16", "float16")):
        if dtype in dtypes:
            return name
    return "float32"
