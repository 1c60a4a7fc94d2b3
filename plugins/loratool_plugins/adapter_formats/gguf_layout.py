"""llama.cpp's names and rearrangements of an adapter's tensors, for each architecture.

An adapter's factors undergo what the converter does to the weights: where rows of q and k are
interleaved by heads, so are lora_b's; a tensor that is a table has its lora_a transposed. llama.cpp
multiplies by alpha / rank, the rank being the tensor's own.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import gguf

from loratool_plugins.checkpoint_formats._gguf_architectures import ARCHITECTURES, Architecture
from loratool_plugins.checkpoint_formats._gguf_values import Layout

TABLE = "token_embd.weight"
# The config's key of what llama.cpp calls the number of heads.
_HEADS = {
    "attention.head_count": ("num_attention_heads", "n_head"),
    "attention.head_count_kv": ("num_key_value_heads", "num_attention_heads", "n_head"),
}
EXPERTS = re.compile(r"blk\.(?P<layer>\d+)\.ffn_(?P<which>gate|up|down)_exps\.weight")
_ROUTER = {"blk.ffn_gate_inp": "mlp.gate"}
_SHARED = {
    "blk.ffn_gate_shexp": "mlp.shared_expert.gate_proj",
    "blk.ffn_up_shexp": "mlp.shared_expert.up_proj",
    "blk.ffn_down_shexp": "mlp.shared_expert.down_proj",
    "blk.ffn_gate_inp_shexp": "mlp.shared_expert_gate",
}


def _routed(name: str, model_type: str, more: Mapping[str, str]) -> Architecture:
    """An architecture whose MLPs are experts, but for these as another."""
    plain = ARCHITECTURES[name]
    dense = ("blk.ffn_gate", "blk.ffn_up", "blk.ffn_down")
    names = {ours: module for ours, module in plain.names.items() if ours not in dense}
    return replace(plain, model_type=model_type, names={**names, **_ROUTER, **more})


KNOWN: Mapping[str, Architecture] = {
    **ARCHITECTURES,
    "qwen2moe": _routed("qwen2", "qwen2_moe", _SHARED),
    "qwen3moe": _routed("qwen3", "qwen3_moe", {}),
}
# Model types of transformers -> llama.cpp's architecture.
_ARCHITECTURE_OF = {
    **{architecture.model_type: name for name, architecture in KNOWN.items()},
    "mistral": "llama", "mixtral": "llama", "gemma3": "gemma3",
}  # fmt: skip


def architecture_of(config: Mapping[str, Any] | None) -> str | None:
    """llama.cpp's name of a model's architecture; None if it is not known."""
    return _ARCHITECTURE_OF.get(str((config or {}).get("model_type")))


@dataclass(frozen=True)
class Names:
    """The names of one architecture.

    Attributes:
        architecture: llama.cpp's name of it.
    """

    architecture: str

    def parameter(self, tensor: str) -> str | None:
        """transformers' name of a tensor; None if the architecture has no such tensor.

        Experts' are called by their three projections: `mlp.experts.gate_proj`.
        """
        known = KNOWN[self.architecture]
        if match := EXPERTS.fullmatch(tensor):
            return f"{known.layer}.{match['layer']}.mlp.experts.{match['which']}_proj"
        return known.name(tensor)

    def tensor(self, parameter: str) -> str | None:
        """llama.cpp's name of a parameter; None if it has no such tensor.

        Parameters of a bare model are found without the prefix of the one with a head.
        """
        for name in (parameter, f"model.{parameter}", f"transformer.{parameter}"):
            module, _, leaf = name.rpartition(".")
            numbered = re.fullmatch(rf"{re.escape(self._layer)}\.(\d+)\.(.+)", module)
            key = f"blk.{numbered[2]}" if numbered else module
            found = _inverse(self.architecture).get(key)
            if found == "output" and not self._has_head():
                return None
            if found is not None:
                return f"blk.{numbered[1]}.{found}.{leaf}" if numbered else f"{found}.{leaf}"
        return None

    def experts(self, parameter: str) -> str | None:
        """The layer of a parameter that holds experts, as llama.cpp calls it: "blk.3"."""
        match = re.fullmatch(
            rf"(?:model\.)?{re.escape(self._layer.removeprefix('model.'))}\.(\d+)\.mlp\.experts\..+",
            parameter,
        )
        return None if match is None else f"blk.{match[1]}"

    def is_transposed(self, tensor: str) -> bool:
        """Whether transformers stores the weight as (in, out)."""
        return self._part(tensor) in KNOWN[self.architecture].transposed

    def is_shifted(self, tensor: str) -> bool:
        """Whether llama.cpp's values of a norm are one more."""
        return KNOWN[self.architecture].shifted and tensor.endswith("norm.weight")

    def interleaved_by(self, tensor: str) -> str | None:
        """Which heads the rows of a tensor are interleaved by: a key of the metadata, or None."""
        return KNOWN[self.architecture].heads.get(self._part(tensor))

    @property
    def _layer(self) -> str:
        return KNOWN[self.architecture].layer

    def _has_head(self) -> bool:
        """Whether the architecture has a head beside the embedding."""
        arch = next(k for k, name in gguf.MODEL_ARCH_NAMES.items() if name == self.architecture)
        return gguf.MODEL_TENSOR.OUTPUT in gguf.MODEL_TENSORS[arch]

    @staticmethod
    def _part(tensor: str) -> str:
        return tensor.removesuffix(".weight").rpartition(".")[2]


@cache
def _inverse(architecture: str) -> dict[str, str]:
    """transformers' module, "blk." standing for the layer -> llama.cpp's without that."""
    names = KNOWN[architecture].names
    return {
        f"blk.{module}" if gguf.startswith("blk.") else module: gguf.removeprefix("blk.")
        for gguf, module in names.items()
    }


def heads_of(config: Mapping[str, Any] | None) -> dict[str, int]:
    """The numbers of heads that a config tells, by llama.cpp's keys."""
    found = {}
    for key, names in _HEADS.items():
        values = [value for name in names if type(value := (config or {}).get(name)) is int]
        if values and values[0] > 0:
            found[key] = values[0]
    return found


def layout_of(names: Names, tensor: str, heads: Mapping[str, int]) -> Layout | None:
    """How the rows of lora_b are arranged; None if it takes a number of heads that is not known."""
    key = names.interleaved_by(tensor)
    if key is None:
        return Layout()
    return Layout("heads", heads[key]) if key in heads else None
