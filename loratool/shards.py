"""Which tensor is written to which file."""

from __future__ import annotations

import re
from collections.abc import Mapping

from loratool.checkpoint import Checkpoint, LazyTensor
from loratool.errors import MismatchError, UsageError

# How diffusers and transformers call the weights of a model: "model.fp16-00001-of-00002" is a shard
# of its variant "fp16", and so is, from older versions, "model-00001-of-00002.fp16".
_SHARD = r"-\d{5}-of-\d{5}"
_WEIGHTS = re.compile(
    r"(?P<stem>model|diffusion_pytorch_model)"
    rf"(\.(?P<variant>[^.]+?)({_SHARD})?|{_SHARD}(\.(?P<old_variant>[^.]+))?)?\.safetensors"
)
_INDEX = re.compile(r".+\.index(\.[^.]+)?\.json")
_UNITS = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


def safetensors_name(name: str) -> str:
    """The file name that a weight file's safetensors copy gets."""
    if name.endswith(".safetensors"):
        return name
    stem = re.sub(r"\.(bin|pt|pth|ckpt)$", "", name)
    return re.sub("(^|/)pytorch_model", r"\1model", stem) + ".safetensors"


def is_index(name: str) -> bool:
    """Whether a file of this name says which weight file holds which tensor."""
    return _INDEX.fullmatch(name) is not None


def index_name(file: str) -> str:
    """The name of the index beside a sharded model's safetensors file."""
    stem, variant = _stem_and_variant(file)
    return f"{_folder(file)}{stem}.safetensors.index{variant}.json"


def _stem_and_variant(file: str) -> tuple[str, str]:
    """("diffusion_pytorch_model", ".fp16"); the usual ones for a name that says neither."""
    found = _WEIGHTS.fullmatch(file.rpartition("/")[2])
    if found is None:
        return "model", ""
    variant = found["variant"] or found["old_variant"]
    return found["stem"], f".{variant}" if variant else ""


def _folder(file: str) -> str:
    """The folder of a weight file, with its slash; "" for none."""
    return file[: file.rfind("/") + 1]


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

    Raises:
        MismatchError: a new tensor belongs to a component that the base does not have.
    """
    last = {_component(base, name): file for name, file in base.shards.items()}
    files = {}
    for name in tensors:
        file = base.shards.get(originals.get(name, name)) or last.get(_component(base, name))
        if file is None and base.components:
            known = ", ".join(base.components)
            raise MismatchError(f"{base.label}: {name}: belongs to none of its components: {known}")
        files[name] = safetensors_name(file or "model.safetensors")
    if limit is None:
        return {name: files[name] for name in sorted(tensors, key=lambda n: files[n])}
    folders: dict[str, dict[str, LazyTensor]] = {}
    for name, tensor in tensors.items():
        folders.setdefault(_folder(files[name]), {})[name] = tensor
    return {
        name: file
        for inside in folders.values()
        for name, file in _split(inside, files[next(iter(inside))], limit).items()
    }


def _component(base: Checkpoint, name: str) -> str:
    return name.partition(".")[0] if base.components else ""


def _split(tensors: Mapping[str, LazyTensor], file: str, limit: int) -> dict[str, str]:
    """Tensor -> file, none larger than `limit` unless one tensor is; named as `file` is."""
    groups: list[list[str]] = [[]]
    size = 0
    for name, tensor in tensors.items():
        if groups[-1] and size + tensor.nbytes > limit:
            groups.append([])
            size = 0
        groups[-1].append(name)
        size += tensor.nbytes
    start = _folder(file) + "".join(_stem_and_variant(file))
    if len(groups) == 1:
        return dict.fromkeys(tensors, f"{start}.safetensors")
    return {
        name: f"{start}-{number:05d}-of-{len(groups):05d}.safetensors"
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
