"""Adapter directories as PEFT lays them out, written by hand."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

PREFIX = "base_model.model."
Factors = tuple[torch.Tensor, torch.Tensor]  # B (out, r), A (r, in)


def factors(
    seed: int, out: int, inner: int, rank: int, dtype: torch.dtype = torch.float32
) -> Factors:
    """Random factors whose singular values fall off."""
    generator = torch.Generator().manual_seed(seed)
    b = torch.randn(out, rank, generator=generator) * 0.5 ** torch.arange(rank)
    return b.to(dtype), torch.randn(rank, inner, generator=generator).to(dtype)


def write_adapter(
    folder: Path,
    modules: Mapping[str, Factors],
    whole: Mapping[str, torch.Tensor] | None = None,
    **settings: Any,
) -> Path:
    """Write an adapter; `whole` are parameters that it replaces, `settings` go to its config."""
    folder.mkdir(parents=True)
    tensors = {f"{PREFIX}{name}": value for name, value in (whole or {}).items()}
    for module, (b, a) in modules.items():
        tensors[f"{PREFIX}{module}.lora_A.weight"] = a.contiguous()
        tensors[f"{PREFIX}{module}.lora_B.weight"] = b.contiguous()
    rank = max(a.shape[0] for _, a in modules.values()) if modules else 1
    ranks = {module: a.shape[0] for module, (_, a) in modules.items() if a.shape[0] != rank}
    config = {
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": rank,
        "rank_pattern": ranks,
        "target_modules": sorted(modules),
        **settings,
    }
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def stored(folder: Path) -> dict[str, torch.Tensor]:
    """The tensors of an adapter's file."""
    found: dict[str, torch.Tensor] = load_file(folder / "adapter_model.safetensors")
    return found


def config(folder: Path) -> dict[str, Any]:
    """adapter_config.json."""
    found: dict[str, Any] = json.loads((folder / "adapter_config.json").read_text())
    return found
