"""A tiny module of experts, as transformers' are, and adapters that PEFT makes for it."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import peft
import torch
from safetensors.torch import save_file
from torch import nn

EXPERTS, OUT, INNER = 3, 6, 4
PARAMETERS = ("experts.square", "experts.wide")


class _Experts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.square = nn.Parameter(torch.randn(EXPERTS, OUT, OUT))
        self.wide = nn.Parameter(torch.randn(EXPERTS, OUT, INNER))


class Mixture(nn.Module):
    """Experts' weights, square and not, beside a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = _Experts()
        self.gate = nn.Linear(OUT, EXPERTS)


def save_base(folder: Path) -> Path:
    """The model without adapters."""
    torch.manual_seed(0)
    save_file(Mixture().state_dict(), folder / "base.safetensors")
    return folder / "base.safetensors"


def save_random(
    folder: Path, seed: int = 1, parameters: Sequence[str] = PARAMETERS, **options: Any
) -> Path:
    """An adapter with random factors, as PEFT saves it."""
    torch.manual_seed(seed)
    settings = {"r": 2, "lora_alpha": 3, "target_modules": ["gate"], **options}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = peft.LoraConfig(target_parameters=list(parameters), **settings)
        model = peft.get_peft_model(Mixture(), config)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.copy_(torch.randn(parameter.shape) * 0.3)
        model.save_pretrained(folder)
    return folder
