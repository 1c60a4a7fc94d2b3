"""What a Hugging Face model directory looks like, whatever its weights are stored in."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from loratool.checkpoint import RECORD, SWITCH_COMMIT
from loratool.errors import FormatError
from loratool.files import entries, files_below, is_dir, is_file
from loratool.json_files import MANIFEST, read_json
from loratool.shards import is_index

_WEIGHT_SUFFIXES = {
    ".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".gguf", ".ot", ".tflite",
    ".npz", ".pkl", ".onnx", ".onnx_data", ".data",
}  # fmt: skip
# What a folder of settings holds, and nothing else: 1_Pooling, additional_chat_templates.
_SETTINGS_SUFFIXES = {".json", ".jinja", ".txt", ".model"}
# Beside a model's weights these would make transformers load the adapter on top of them.
_ADAPTER_FILES = {"adapter_config.json", MANIFEST}


@dataclass(frozen=True)
class WeightFiles:
    """The files that hold a checkpoint's tensors.

    Attributes:
        folder: where they lie.
        files: their names, in order.
        index: tensor name to file name, if an index says so.
        index_file: the name of that index.
    """

    folder: Path
    files: tuple[str, ...]
    index: Mapping[str, str] | None = None
    index_file: str | None = None


def find_weights(path: Path, stem: str, suffixes: tuple[str, ...]) -> WeightFiles | None:
    """The weight files of one kind at `path`, or None if there are none.

    Args:
        path: a file, or a directory with `STEM SUFFIX`, `STEM SUFFIX.index.json`, or exactly one
            other file of that kind.
        stem: "model" or "pytorch_model".
        suffixes: the kind's file name suffixes, the usual one first.

    Raises:
        FormatError: the index is malformed, names a file outside the directory or one that is
            missing; or several files could be meant.
    """
    if is_file(path):
        return WeightFiles(path.parent, (path.name,)) if path.suffix in suffixes else None
    if not is_dir(path):
        return None
    require_no_switch(path)
    if (usual := usual_weights(path, f"{stem}{suffixes[0]}")) is not None:
        return usual
    others = [
        entry.name
        for entry in entries(path)
        if entry.suffix in suffixes and is_file(entry) and not _is_training_state(entry.name)
    ]
    if len(others) > 1:
        raise FormatError(
            f"{path}: several weight files and no {stem}{suffixes[0]}.index.json: "
            f"{', '.join(others[:6])}; name the file that you mean"
        )
    return WeightFiles(path, tuple(others)) if others else None


def require_no_switch(path: Path) -> None:
    """Raise FormatError if a switch was interrupted after its commit, which must be completed."""
    if (path / SWITCH_COMMIT).exists():
        raise FormatError(
            f"{path}: a switch of its adapters was interrupted: run `loratool switch {path} "
            "--to ADAPTER`, which completes it first"
        )


def usual_weights(folder: Path, name: str, index_name: str = "") -> WeightFiles | None:
    """The file `name` in a folder, or the shards that its index names; None for neither."""
    index = folder / (index_name or f"{name}.index.json")
    if is_file(index):
        return _read_index(index)
    return WeightFiles(folder, (name,)) if is_file(folder / name) else None


def _is_training_state(name: str) -> bool:
    """Whether a file holds an adapter's weights, or a trainer's state, and no model's weights."""
    if name == "lora.pt" or name.endswith("adapters.safetensors"):
        return True
    return name.startswith(
        ("adapter_model", "training_args", "optimizer", "scheduler", "rng_state")
    )


def _read_index(index: Path) -> WeightFiles:
    content = read_json(index)
    weight_map = content.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise FormatError(f"{index}: has no weight_map; download the index again")
    for tensor, name in weight_map.items():
        if not isinstance(name, str) or PurePosixPath(name).name != name or name in ("", ".."):
            raise FormatError(
                f"{index}: {tensor}: {name!r} is not the name of a file in this directory; "
                "download the index again"
            )
    files = tuple(sorted(set(weight_map.values())))
    for name in files:
        if not _is_file(index.parent / name):
            raise FormatError(
                f"{index.parent / name}: missing, but {index.name} names it; download it"
            )
    return WeightFiles(index.parent, files, weight_map, index.name)


def _is_file(path: Path) -> bool:
    try:
        return is_file(path)
    except OSError:  # a name that is too long
        return False


def check_index(found: WeightFiles, holders: Mapping[str, str]) -> None:
    """Raise FormatError unless the index and the files (tensor name to file name) agree."""
    for tensor, name in (found.index or {}).items():
        if holders.get(tensor) != name:
            raise FormatError(
                f"{found.folder / name}: {tensor}: the index says that this file holds it, "
                "but it does not; download index and file again"
            )


def read_config(path: Path) -> dict[str, Any] | None:
    """The config.json of a model directory, or None."""
    config = path / "config.json"
    return read_json(config) if is_dir(path) and is_file(config) else None


def side_files(path: Path) -> dict[str, Path]:
    """The files of a model directory that hold no weights: config, tokenizer, licence, ...

    Folders of settings in it come along too, such as sentence-transformers' 1_Pooling.
    """
    if not is_dir(path):
        return {}
    found = {entry.name: entry for entry in entries(path) if _is_side_file(entry)}
    for folder in entries(path):
        if is_dir(folder) and not folder.name.startswith((".", "checkpoint-")):
            inside = entries(folder)
            if all(is_file(entry) and entry.suffix in _SETTINGS_SUFFIXES for entry in inside):
                found |= {f"{folder.name}/{e.name}": e for e in inside if _is_side_file(e)}
    return found


def index_files(found: WeightFiles) -> dict[str, Path]:
    """The index that says which of the weight files holds which tensor, if there is one."""
    return {} if found.index_file is None else {found.index_file: found.folder / found.index_file}


def record_files(path: Path) -> dict[str, Path]:
    """The files of the record of a reversible merge, by their names in its directory."""
    return files_below(path / RECORD) if is_dir(path) else {}


def _is_side_file(entry: Path) -> bool:
    return (
        is_file(entry)
        and not entry.name.startswith(".")
        and entry.suffix not in _WEIGHT_SUFFIXES
        and entry.name not in _ADAPTER_FILES
        and not is_index(entry.name)
    )
