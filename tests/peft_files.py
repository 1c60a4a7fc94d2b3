"""PEFT adapters written by hand, without peft."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

PREFIX = "base_model.model."
Factors = Mapping[str, tuple[torch.Tensor, torch.Tensor]]


def random_factors(
    shapes: Mapping[str, tuple[int, int]], rank: int, seed: int, size: float = 0.05
) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Module -> (A (r, in), B (out, r)), fp32, with entries of B @ A about `size`."""
    generator = torch.Generator().manual_seed(seed)
    found = {}
    for module, (rows, columns) in shapes.items():
        a = torch.randn(rank, columns, generator=generator)
        b = torch.randn(rows, rank, generator=generator) * size / rank**0.5
        found[module] = (a, b)
    return found


def write_adapter(
    folder: Path,
    factors: Factors,
    *,
    alpha: float | None = None,
    whole: Mapping[str, torch.Tensor] | None = None,
    **settings: Any,
) -> Path:
    """An adapter directory; alpha is the rank (scale 1) unless given."""
    folder.mkdir(parents=True)
    rank = next(iter(factors.values()))[0].shape[0]
    tensors = {}
    for module, (a, b) in factors.items():
        tensors[f"{PREFIX}{module}.lora_A.weight"] = a.contiguous()
        tensors[f"{PREFIX}{module}.lora_B.weight"] = b.contiguous()
    for name, value in (whole or {}).items():
        tensors[f"{PREFIX}{name}"] = value.contiguous()
    config = {
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": rank if alpha is None else alpha,
        "target_modules": sorted(factors),
        "modules_to_save": sorted({name.rpartition(".")[0] for name in whole or {}}) or None,
        **settings,
    }
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder
