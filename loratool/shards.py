"""Which tensor is written to which file."""

from __future__ import annotations

import re
from collections.abc import Mapping

from loratool.checkpoint import Checkpoint, LazyTensor
from loratool.errors import UsageError

INDEX_SUFFIX = ".safetensors.index.json"
_UNITS = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


def safetensors_name(name: str) -> str:
    """The file name that a weight file's safetensors copy gets."""
    if name.endswith(".safetensors"):
        return name
    stem = re.sub(r"\.(bin|pt|pth)$", "", name)
    return f"{re.sub('^pytorch_model', 'model', stem)}.safetensors"


def plan_shards(
    base: Checkpoint,
    tensors: Mapping[str, LazyTensor],
    originals: Mapping[str, str],
    limit: int | None,
) -> dict[str, str]:
    """Choose a file for every tensor.

    Args:
        base: the checkpoint whose files are kept where there is no limit.
        tensors: what is to be written.
        originals: tensor -> its name in the base, where that differs.
        limit: bytes beyond which a new file is started, or None.

    Returns:
        Tensor -> file name, in the order in which they are written.
    """
    last = safetensors_name(list(base.shards.values())[-1]) if base.shards else "model.safetensors"
    if limit is None:
        files = {
            name: safetensors_name(base.shards.get(originals.get(name, name), last))
            for name in tensors
        }
        return {name: files[name] for name in sorted(tensors, key=lambda n: files[n])}
    groups: list[list[str]] = [[]]
    size = 0
    for name, tensor in tensors.items():
        if groups[-1] and size + tensor.nbytes > limit:
            groups.append([])
            size = 0
        groups[-1].append(name)
        size += tensor.nbytes
    if len(groups) == 1:
        return dict.fromkeys(tensors, "model.safetensors")
    return {
        name: f"model-{number:05d}-of-{len(groups):05d}.safetensors"
        for number, group in enumerate(groups, 1)
        for name in group
    }


def parse_size(text: str) -> int:
    """Bytes from "5GB" or "500MiB"; UsageError otherwise."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMG]?i?B)?\s*", text, re.IGNORECASE)
    size = int(float(match[1]) * _UNITS[(match[2] or "B").upper()]) if match else 0
    if size < 1:
        raise UsageError(f"{text!r} is not a size: write it like 5GB or 500MiB")
    return size
