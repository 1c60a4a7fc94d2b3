"""A checkpoint as a lazy, ordered mapping from tensor names to tensors.

Opening a checkpoint reads headers only. A tensor's values are read, or computed, when its blocks
are asked for, and forgotten by the caller afterwards. Nothing here imports torch.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loratool.dtypes import itemsize
from loratool.reports import Report, counted, format_bytes

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Extent:
    """Where the little-endian bytes of a tensor lie: `length` bytes from `offset` in `path`."""

    path: Path
    offset: int
    length: int


@dataclass(frozen=True)
class LazyTensor:
    """A tensor that is read or computed only when asked for.

    Attributes:
        name: its name in the checkpoint.
        dtype: its safetensors dtype name ("BF16").
        shape: its shape.
        blocks: yields its values as consecutive, contiguous blocks along axis 0 (one block of the
            whole shape is fine). A block may be a view of a memory map or a buffer that the next
            step of the iteration reuses: use it before going on, and never write to it.
        origin: the file it comes from, for messages.
        extent: where exactly these bytes lie on disk, if they do.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    blocks: Callable[[], Iterator[torch.Tensor]] = field(repr=False, compare=False)
    origin: str = ""
    extent: Extent | None = None

    @property
    def numel(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        return self.numel * itemsize(self.dtype)

    def read(self) -> torch.Tensor:
        """The whole tensor: a view of the file where it has an extent, else freshly computed."""
        import torch

        if self.extent is not None:
            return next(self.blocks())
        parts = [block.clone() for block in self.blocks()]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def renamed(self, name: str) -> LazyTensor:
        """The same tensor under another name."""
        return replace(self, name=name)


@dataclass(frozen=True)
class Checkpoint(Mapping[str, LazyTensor]):
    """The tensors of a model, with the files that make it loadable.

    Attributes:
        tensors: name to tensor, in file order.
        config: the parsed config.json, or None.
        side_files: files that belong to the model but hold no tensors (config, tokenizer, ...):
            relative name to where its content is, or to the content itself.
        shards: tensor name to the file name that holds it; written files keep this layout.
        metadata: the `__metadata__` of each safetensors file, by file name.
        aliases: names that share the storage of another tensor -> that tensor's name.
        notes: what the user should hear about how it was opened.
        path: where it was opened, or None if it was computed.
    """

    tensors: Mapping[str, LazyTensor]
    config: Mapping[str, Any] | None = None
    side_files: Mapping[str, Path | bytes] = field(default_factory=dict)
    shards: Mapping[str, str] = field(default_factory=dict)
    metadata: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    aliases: Mapping[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    path: Path | None = None

    def __getitem__(self, name: str) -> LazyTensor:
        return self.tensors[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.tensors)

    def __len__(self) -> int:
        return len(self.tensors)

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(tensor.nbytes for tensor in self.tensors.values())

    @property
    def label(self) -> str:
        """How messages call it."""
        return str(self.path) if self.path is not None else "<computed checkpoint>"

    def report(self, target: Path | str) -> Report:
        """What was written to `target`; call it after draining."""
        lines = (counted(len(self), "tensor"), f"size: {format_bytes(self.nbytes)}")
        data = {"kind": "checkpoint", "tensors": len(self), "bytes": self.nbytes}
        return Report(f"Wrote {target}", data, lines, notes=self.notes)

    def with_config(self, config: Mapping[str, Any]) -> Checkpoint:
        """The same tensors under another config.json."""
        content = (json.dumps(dict(config), indent=2, sort_keys=True) + "\n").encode()
        return replace(self, config=config, side_files={**self.side_files, "config.json": content})
