"""What of a model's outputs stands for its answers: logits, or the vectors of an encoder."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from loratool.calibration import Inputs
from loratool.errors import InputError

# Logits over the tokens of a sample, not over classes.
_SPANS = ("start_logits", "end_logits")
# What encoders answer with where they have no head; each sample's vector first.
_VECTORS = ("image_embeds", "text_embeds", "last_hidden_state")
POOLED = "mean of last_hidden_state"


@dataclass(frozen=True)
class Answer:
    """One answer for each position.

    Attributes:
        values: (positions, classes), or (positions, size) of vectors. Classes that are padding
            have -inf.
        are_logits: whether a softmax over them gives probabilities.
    """

    values: torch.Tensor
    are_logits: bool


def answers_of(
    outputs: Mapping[str, Any], inputs: Inputs, batch: int, config: Any, label: str
) -> dict[str, Answer]:
    """The answers to one batch without those for padding, the one that counts most first.

    Args:
        outputs: of the model, by name.
        inputs: what it was run on.
        batch: the batch's number.
        config: the model's.
        label: how messages call the model.

    Raises:
        InputError: there is nothing that can be compared, or NaN in it.
    """
    found: dict[str, Answer] = {}
    # Labels that do not exclude each other, and numbers, have no common probabilities.
    exclusive = getattr(config, "problem_type", None) in (None, "single_label_classification")
    for name, value in outputs.items():
        if not torch.is_tensor(value):
            continue
        if name in _SPANS:
            found[name] = Answer(_without_padding(value, inputs, batch), True)
        elif name == "logits" or name.endswith("_logits"):
            rows = value.movedim(1, -1) if value.ndim == 4 else value
            flat = inputs.unpadded(batch, rows)
            found[name] = Answer(flat, exclusive and flat.shape[-1] > 1)
    if not found:
        for name in _VECTORS:
            if torch.is_tensor(value := outputs.get(name)):
                found[name] = Answer(inputs.unpadded(batch, value), False)
        hidden = outputs.get("last_hidden_state")
        if torch.is_tensor(hidden) and hidden.ndim == 3:
            found[POOLED] = Answer(_pooled(hidden, inputs, batch), False)
    if not found:
        names = ", ".join(outputs) or "nothing"
        raise InputError(f"{label}: gives {names}: neither logits nor vectors to compare")
    for name, answer in found.items():
        if bool(answer.values.isnan().any()):
            raise InputError(f"{label}: gives NaN in {name}: its weights or activations overflow")
    return found


def _without_padding(values: torch.Tensor, inputs: Inputs, batch: int) -> torch.Tensor:
    """Logits over tokens (rows, tokens), impossible where there is padding."""
    real = inputs.real(batch)
    return values if real is None else values.masked_fill(~real.to(values.device), -math.inf)


def _pooled(hidden: torch.Tensor, inputs: Inputs, batch: int) -> torch.Tensor:
    """The mean of each row's vectors: (rows, tokens, n) -> (rows, n)."""
    real = inputs.real(batch)
    if real is None or real.shape != hidden.shape[:2]:
        return hidden.mean(1)
    weights = real.to(hidden.device, hidden.dtype).unsqueeze(-1)
    return (hidden * weights).sum(1) / weights.sum(1)
