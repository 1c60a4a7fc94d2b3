"""Inputs of text models: their names, and random ones to trace and to compare with."""

from __future__ import annotations

import inspect
from typing import Any

import torch

from loratool.shell import position_limit

Feeds = dict[str, torch.Tensor]


def input_names(cls: Any, config: Any) -> tuple[str, ...]:
    """The inputs of the exported model.

    token_type_ids is one where the model tells segments apart: without it, pairs of texts would
    be read as one.
    """
    accepted = inspect.signature(cls.forward).parameters
    names = ["input_ids", "attention_mask"]
    if (getattr(config, "type_vocab_size", 0) or 0) > 1:
        names.append("token_type_ids")
    return tuple(name for name in names if name in accepted)


def sample_inputs(cls: Any, config: Any, batch: int, sequence: int, seed: int = 0) -> Feeds:
    """Random inputs, each int64 (batch, sequence), with padding on the right of all rows but one.

    Sequences are kept within half of the model's limit: some models count positions from an offset.
    """
    text = config.get_text_config()
    limit = position_limit(config)
    sequence = min(sequence, max(1, limit // 2)) if limit else sequence
    generator = torch.Generator().manual_seed(seed)
    pad = getattr(text, "pad_token_id", None)
    pad = pad if isinstance(pad, int) and 0 <= pad < text.vocab_size else 0
    ids = torch.randint(0, text.vocab_size, (batch, sequence), generator=generator)
    ids[ids == pad] = (pad + 1) % text.vocab_size
    mask = torch.ones_like(ids)
    for row in range(1, batch):
        mask[row, max(1, sequence - 2 * row) :] = 0
    ids[mask == 0] = pad
    segments = torch.zeros_like(ids)
    segments[:, sequence // 2 :] = 1
    made = {"input_ids": ids, "attention_mask": mask, "token_type_ids": segments}
    return {name: made[name] for name in input_names(cls, config)}
