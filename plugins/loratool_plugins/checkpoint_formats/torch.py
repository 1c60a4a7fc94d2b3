"""Checkpoints written by torch.save: single, or sharded with an index.

Only what torch.load(weights_only=True) accepts is ever unpickled.
"""

from __future__ import annotations

import errno
import pickle
import re
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loratool.checkpoint import Checkpoint, LazyTensor
from loratool.dtypes import dtype_name
from loratool.errors import FormatError, InputError
from loratool.files import is_file, local, read_start
from loratool_plugins.checkpoint_formats import directory

if TYPE_CHECKING:
    import torch

_SUFFIXES = (".bin", ".pt", ".pth")
# How torch's message names what a pickle wants to call.
_FORBIDDEN = re.compile(r"GLOBAL (\S+)")


@dataclass(frozen=True)
class Torch:
    """A directory or a file of .bin, .pt or .pth; a file of .ckpt."""

    def objection(self, path: Path) -> str:
        """Why there are no torch files at `path`."""
        return "" if _find(path) is not None else f"no {', '.join(_SUFFIXES)} file of a model"

    def open(self, path: Path) -> Checkpoint:
        """Open it: zip files are mapped, legacy ones have to be loaded whole, which is noted.

        Raises:
            InputError: a file cannot be read.
            FormatError: weights_only refuses a file, or it holds something else than tensors.
        """
        found = _find(path)
        if found is None:
            raise FormatError(f"{path}: holds no torch weights")
        return open_files(found, path)


def _find(path: Path) -> directory.WeightFiles | None:
    """A folder's .ckpt files are what training left behind; one that is named is meant."""
    suffixes = (*_SUFFIXES, ".ckpt") if is_file(path) else _SUFFIXES
    return directory.find_weights(path, "pytorch_model", suffixes)


def open_files(found: directory.WeightFiles, path: Path) -> Checkpoint:
    """The checkpoint at `path` whose weights are these files; errors as `Torch.open`."""
    tensors: dict[str, LazyTensor] = {}
    shards: dict[str, str] = {}
    aliases: dict[str, str] = {}
    notes = []
    for name in found.files:
        file = found.folder / name
        mapped = _is_zip(file)
        if not mapped:
            notes.append(
                f"{file}: a legacy torch file cannot be mapped: it is loaded whole while in use"
            )
        state = load_state(file, mapped)
        aliases |= _aliases(state)
        for key, value in state.items():
            if key in tensors:
                raise FormatError(f"{file}: {key}: is already in {shards[key]}")
            tensors[key] = _lazy(key, value, file)
            shards[key] = name
    directory.check_index(found, shards)
    return Checkpoint(
        tensors,
        config=directory.read_config(path),
        side_files=directory.side_files(path),
        shards=shards,
        aliases=aliases,
        notes=tuple(notes),
        path=path,
    )


def load_lazily(file: Path) -> dict[str, LazyTensor]:
    """The tensors of one torch file; errors as `load_state`."""
    return load_with_metadata(file)[0]


def load_with_metadata(file: Path) -> tuple[dict[str, LazyTensor], Mapping[str, Any]]:
    """The tensors of one torch file, and what the state dict itself says; errors as `load_state`.

    The latter is the attribute `_metadata` that torch gives to state dicts: module -> facts.
    """
    state = load_state(file, _is_zip(file))
    said = getattr(state, "_metadata", None)
    tensors = {name: _lazy(name, value, file) for name, value in state.items()}
    return tensors, said if isinstance(said, Mapping) else {}


def _is_zip(file: Path) -> bool:
    """Whether it begins like a zip file, as torch decides it; a truncated one does, too."""
    try:
        return read_start(file, 4) == b"PK\x03\x04"
    except OSError as error:
        raise InputError(f"{file}: cannot be read: {error.strerror}") from error


def load_state(file: Path, mapped: bool) -> Mapping[str, torch.Tensor]:
    """The state dict of a torch file, through weights_only.

    Raises:
        InputError: it cannot be read.
        FormatError: it is refused, or is no mapping from names to dense tensors.
    """
    import torch

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of old pickles; what is read is checked below
            content: Any = torch.load(
                local(file), map_location="cpu", weights_only=True, mmap=mapped
            )
    except pickle.UnpicklingError as error:
        raise FormatError(_refusal(file, error)) from error
    except OSError as error:
        # torch seeks before the beginning of what is too short to be a torch file.
        if error.errno == errno.EINVAL:
            raise FormatError(_unreadable(file, error)) from error
        raise InputError(f"{file}: cannot be read: {error.strerror or error}") from error
    except Exception as error:  # bytes from anywhere: torch raises nearly everything on damage
        raise FormatError(_unreadable(file, error)) from error
    if isinstance(content, Mapping) and isinstance(content.get("state_dict"), Mapping):
        content = content["state_dict"]
    if not isinstance(content, Mapping) or not content:
        raise FormatError(
            f"{file}: holds no state dict (a mapping from names to tensors); name the file that "
            "holds the model's weights"
        )
    for key, value in content.items():
        if not isinstance(key, str) or not isinstance(value, torch.Tensor):
            raise FormatError(
                f"{file}: {key!r}: is no tensor but {type(value).__name__}; save the state dict "
                "alone"
            )
        if value.layout != torch.strided or value.is_quantized:
            raise FormatError(
                f"{file}: {key}: is sparse or quantized; only dense tensors can be read"
            )
    return content


def _refusal(file: Path, error: Exception) -> str:
    """What to say of a pickle that weights_only does not accept."""
    found = _FORBIDDEN.search(str(error))
    if found is None:
        return _unreadable(file, error)
    return (
        f"{file}: is refused, because loading it may run code: it needs {found[1]} (weights_only "
        "allows tensors only); get it as safetensors, or convert it where you trust it"
    )


def _unreadable(file: Path, error: Exception) -> str:
    # torch's advice, to load it without weights_only, is not ours.
    text = str(error).rpartition("WeightsUnpickler error:")[2].partition("Check the docu")[0]
    short = " ".join(text.split())[:160] or type(error).__name__
    if isinstance(error, (OSError, EOFError)):
        short = "it ends too early"
    return (
        f"{file}: is not a readable torch file ({short}); download it again, or get it as "
        "safetensors"
    )


def _lazy(name: str, value: torch.Tensor, file: Path) -> LazyTensor:
    def blocks() -> Iterator[torch.Tensor]:
        yield value.detach().contiguous()

    try:
        dtype = dtype_name(value.dtype)
    except FormatError as error:
        raise FormatError(f"{file}: {name}: {error}") from None
    return LazyTensor(name, dtype, tuple(value.shape), blocks, str(file))


def _aliases(state: Mapping[str, torch.Tensor]) -> dict[str, str]:
    """Names whose tensor is the same memory in the same shape as an earlier one's."""
    seen: dict[tuple[Any, ...], str] = {}
    found = {}
    for name, value in state.items():
        if not value.numel():
            continue
        place = (value.data_ptr(), tuple(value.shape), value.stride(), value.dtype)
        if place in seen:
            found[name] = seen[place]
        else:
            seen[place] = name
    return found
