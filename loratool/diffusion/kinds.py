"""Which two-dimensional weights of diffusers' models are not linear modules'."""

from __future__ import annotations

import re

# Names of the embedding tables of all models of diffusers 0.42, besides those of text encoders.
_TABLES = re.compile(
    r"(.*\.)?(embedding|embedding_table|embed|class_embedding|prior_token_embedding"
    r"|cond_type_embed|embed_image_indicator|audio_embeddings|pos_embedding|position_encoding)"
)
# GPT-2's modules, which keep their weights as (in, out).
_CONV1D = re.compile(r"(.*\.)?h\.\d+\.(attn|crossattention|mlp)\.(c_attn|q_attn|c_proj|c_fc)")


def is_table(module: str) -> bool:
    """Whether a module of this name holds an embedding table."""
    return _TABLES.fullmatch(module) is not None


def is_conv1d(module: str) -> bool:
    """Whether a module of this name is GPT-2's kind of linear module."""
    return _CONV1D.fullmatch(module) is not None
