"""What PEFT makes of a base and an adapter's files, with every complaint an error."""

from __future__ import annotations

import warnings
from pathlib import Path

import peft
import torch
from safetensors.torch import load_file
from torch import nn

Tensors = dict[str, torch.Tensor]
_WORDS = ("lora", "hada", "lokr", "ia3", "trainable", "modules_to_save")


def merged_by_peft(model: nn.Module, base: Path, adapter: Path) -> Tensors:
    """The merged weights; keys of the adapter that are missing or unexpected are failures."""
    model.load_state_dict(load_file(base))
    with warnings.catch_warnings():
        warnings.simplefilter("error", category=UserWarning)
        loaded = peft.PeftModel.from_pretrained(model, adapter)
        weights = peft.load_peft_weights(adapter)
        result = peft.set_peft_model_state_dict(loaded, weights)
    assert not result.unexpected_keys
    assert [k for k in result.missing_keys if any(word in k for word in _WORDS)] == []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        merged: nn.Module = loaded.merge_and_unload()
    return {name: value.clone() for name, value in merged.state_dict().items()}
