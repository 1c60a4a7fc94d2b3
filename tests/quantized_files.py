"""Checkpoints quantized by hand, as the publishers of each scheme lay them out."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from tests.cli.tiny import CONFIG, Tensors, llama

Config = Mapping[str, Any]
FP8: Config = {
    "quant_method": "fp8",
    "weight_block_size": [16, 16],
    "activation_scheme": "dynamic",
}
PER_TENSOR: Config = {"quant_method": "fp8", "weight_block_size": None}
FBGEMM: Config = {"quant_method": "fbgemm_fp8", "activation_scale_ub": 1200.0}
COMPRESSED: Config = {
    "quant_method": "compressed-tensors",
    "format": "float-quantized",
    "config_groups": {
        "group_0": {"weights": {"num_bits": 8, "type": "float", "strategy": "channel"}}
    },
}


def save(folder: Path, tensors: Tensors, quantization: Config | None, **settings: Any) -> Path:
    """A model's directory with safetensors and the quantization in its config.json."""
    folder.mkdir(parents=True)
    config = {**CONFIG, **settings}
    if quantization is not None:
        config["quantization_config"] = dict(quantization)
    (folder / "config.json").write_text(json.dumps(config))
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def is_linear(name: str) -> bool:
    return "_proj." in name


def block_scaled(
    value: torch.Tensor, block: tuple[int, int], dtype: torch.dtype = torch.float32
) -> tuple[torch.Tensor, torch.Tensor]:
    """fp8 codes and a scale for each block, those at the ends cut off."""
    rows, columns = value.shape
    scales = torch.ones(math.ceil(rows / block[0]), math.ceil(columns / block[1]), dtype=dtype)
    codes = torch.empty(value.shape, dtype=torch.float8_e4m3fn)
    for i in range(scales.shape[0]):
        for j in range(scales.shape[1]):
            place = (
                slice(i * block[0], (i + 1) * block[0]),
                slice(j * block[1], (j + 1) * block[1]),
            )
            scales[i, j] = value[place].abs().max() / 448
            scaled = value[place] / scales[i, j].float()
            codes[place] = scaled.clamp(-448, 448).to(torch.float8_e4m3fn)
    return codes, scales


def unscaled(codes: torch.Tensor, scales: torch.Tensor, block: tuple[int, int]) -> torch.Tensor:
    """The values, one by one."""
    spread = scales.float().repeat_interleave(block[0], 0).repeat_interleave(block[1], 1)
    return codes.float() * spread[: codes.shape[0], : codes.shape[1]]


def fp8_model(folder: Path, quantization: Config = FP8, **settings: Any) -> Path:
    """A tiny Llama in fp8 with the scales that a quantization_config asks for."""
    tensors: Tensors = {}
    for name, value in llama(dtype=torch.bfloat16).items():
        if not is_linear(name):
            tensors[name] = value
            continue
        method = quantization["quant_method"]
        stated = quantization.get("weight_block_size")
        block = tuple(stated) if stated else value.shape
        if method != "fp8":
            block = (1, value.shape[1])
        codes, scales = block_scaled(value.float(), (block[0], block[1]))
        tensors[name] = codes
        if method == "fp8":
            tensors[f"{name}_scale_inv"] = scales if stated else scales.reshape(())
        else:
            tensors[f"{name}_scale"] = scales
    return save(folder, tensors, quantization, **settings)


def rewritten(folder: Path, change: Mapping[str, torch.Tensor | None]) -> Path:
    """The same model with some tensors replaced, or taken away."""
    file = folder / "model.safetensors"
    tensors = {**load_file(file), **change}
    kept = {name: value.contiguous() for name, value in tensors.items() if value is not None}
    file.unlink()
    save_file(kept, file, metadata={"format": "pt"})
    return folder
