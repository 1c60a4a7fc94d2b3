"""Which two-dimensional weights of diffusers' models are tables and not linear modules'."""

from __future__ import annotations

import re

# Names of the embedding tables of all models of diffusers 0.42, besides those of text encoders.
_TABLES = re.compile(
    r"(.*\.)?(embedding|embedding_table|embed|class_embedding|prior_token_embedding"
    r"|cond_type_embed|embed_image_indicator|audio_embeddings|pos_embedding|position_encoding)"
)


def is_table(module: str) -> bool:
    """Whether a module of this name holds an embedding table."""
    return _TABLES.fullmatch(module) is not None
