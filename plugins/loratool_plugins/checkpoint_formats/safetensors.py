"""Checkpoints in safetensors files: single, or sharded with an index."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from loratool.checkpoint import Checkpoint, LazyTensor
from loratool.errors import FormatError
from loratool.safetensors_file import lazy_tensors, read_header
from loratool_plugins.checkpoint_formats import directory


@dataclass(frozen=True)
class Safetensors:
    """A directory or a file of safetensors; opening reads headers only."""

    # A directory may hold the same weights again for other loaders.
    refines: ClassVar[frozenset[str]] = frozenset({"torch", "gguf"})

    def objection(self, path: Path) -> str:
        """Why there are no safetensors files at `path`."""
        found = directory.find_weights(path, "model", (".safetensors",))
        return "" if found is not None else "no .safetensors file of a model"

    def open(self, path: Path) -> Checkpoint:
        """Open it by its headers.

        Raises:
            InputError: a file cannot be read.
            FormatError: a header lies, or index and files disagree.
        """
        found = directory.find_weights(path, "model", (".safetensors",))
        if found is None:
            raise FormatError(f"{path}: holds no safetensors weights")
        return open_files(found, path)


def open_files(found: directory.WeightFiles, path: Path) -> Checkpoint:
    """The checkpoint at `path` whose weights are these files; errors as `Safetensors.open`."""
    tensors: dict[str, LazyTensor] = {}
    shards: dict[str, str] = {}
    metadata = {}
    for name in found.files:
        header = read_header(found.folder / name)
        metadata[name] = header.metadata
        for key, tensor in lazy_tensors(found.folder / name, header).items():
            if key in tensors:
                raise FormatError(f"{found.folder / name}: {key}: is already in {shards[key]}")
            tensors[key] = tensor
            shards[key] = name
    directory.check_index(found, shards)
    return Checkpoint(
        tensors,
        config=directory.read_config(path),
        side_files=directory.side_files(path),
        index_files=directory.index_files(found),
        record=directory.record_files(path),
        shards=shards,
        metadata=metadata,
        path=path,
    )
