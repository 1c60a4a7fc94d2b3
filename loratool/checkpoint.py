"""A checkpoint as a lazy, ordered mapping from tensor names to tensors.

Opening a checkpoint reads headers only. A tensor's values are read, or computed, when its blocks
are asked for, and forgotten by the caller afterwards. Nothing here imports torch.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loratool.digests import TensorDigest
from loratool.dtypes import itemsize, torch_dtype
from loratool.files import named
from loratool.reports import Report, counted, format_bytes

if TYPE_CHECKING:
    import torch


# Directories of loratool inside a model's: the record of a merge, and a switch at work.
RECORD = "loratool-record"
SWITCH = ".loratool-switch"
SWITCH_COMMIT = f"{SWITCH}/commit.json"
# The file of a diffusers folder that tells its components.
MODEL_INDEX = "model_index.json"


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
        blocks: yields its values in order, as contiguous blocks: the whole, or some rows after
            others of the tensor seen as a matrix. A block may be a view of a memory map or a
            buffer that the next step of the iteration reuses: use it before going on, and never
            write to it.
        origin: the file it comes from, for messages.
        extent: where exactly these bytes lie on disk, if they do.
        raw: its little-endian bytes without a copy and without torch, where there is such a view.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    blocks: Callable[[], Iterator[torch.Tensor]] = field(repr=False, compare=False)
    origin: str = ""
    extent: Extent | None = None
    raw: Callable[[], memoryview] | None = field(default=None, repr=False, compare=False)

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
        if self.extent is not None:
            return next(self.blocks())
        import torch

        whole = torch.empty(self.shape, dtype=torch_dtype(self.dtype))
        flat, done = whole.view(-1), 0
        for block in self.blocks():
            flat[done : done + block.numel()] = block.reshape(-1)
            done += block.numel()
        if done != len(flat):
            raise AssertionError(f"{self.name}: {done} values of {self.shape}")
        return whole

    def digest(self) -> str:
        """The digest of its values (`loratool.digests`)."""
        digest = TensorDigest(self.dtype, self.shape)
        if self.raw is not None:
            digest.update_bytes(self.raw())
            return digest.hexdigest()
        for block in self.blocks():
            digest.update(block)
        return digest.hexdigest()

    def renamed(self, name: str) -> LazyTensor:
        """The same tensor under another name."""
        return replace(self, name=name)


Parts = Mapping[str, "torch.Tensor"]


@dataclass(frozen=True)
class Form:
    """How a tensor lies in a checkpoint that stores it otherwise than as its plain values.

    Attributes:
        pieces: part ("codes", "scales", ...) -> the stored tensor, under its stored name.
        decode: the values, in consecutive blocks along axis 0, from the parts' contents.
        encode: the parts' contents from all values, a tensor of the plain shape in fp32 or in the
            type that `decode` gives; where a part is text, it may be padded with spaces.
        sizes: the shapes of parts that `encode` makes larger than they are.
        obstacle: why values cannot be encoded; "" if they can.
    """

    pieces: Mapping[str, LazyTensor]
    decode: Callable[[Parts], Iterator[torch.Tensor]] = field(repr=False)
    encode: Callable[[torch.Tensor], Parts] = field(repr=False)
    sizes: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    obstacle: str = ""

    def blocks(self) -> Iterator[torch.Tensor]:
        """The values as they are stored, decoded block by block."""
        yield from self.decode({part: piece.read() for part, piece in self.pieces.items()})


@dataclass(frozen=True)
class Stored:
    """A checkpoint as it lies on disk, where that is not what `Checkpoint.tensors` show.

    Attributes:
        checkpoint: the stored tensors under their stored names, and the files beside them.
        forms: name -> how the tensor of that name is stored; the others are stored as they are.
    """

    checkpoint: Checkpoint
    forms: Mapping[str, Form]


@dataclass(frozen=True)
class Checkpoint(Mapping[str, LazyTensor]):
    """The tensors of a model, with the files that make it loadable.

    Attributes:
        tensors: name to tensor, in file order.
        config: the parsed config.json, or None; of several components, model_index.json.
        side_files: files that belong to the model but hold no tensors (config, tokenizer, ...):
            relative name to where its content is, or to the content itself.
        shards: tensor name to the file name that holds it; written files keep this layout.
        metadata: the `__metadata__` of each safetensors file, by file name.
        aliases: names that share the storage of another tensor -> that tensor's name.
        notes: what the user should hear about how it was opened.
        path: where it was opened, or None if it was computed.
        hub_name: its name on the Hub, if it was opened by that.
        index_files: files that say which file holds which tensor, as they lie beside the weights.
        headers: the exact safetensors header to write, by file name, where there is one to keep.
        record: the files of the record of what was merged into it (`loratool.record`), by name
            relative to its directory.
        components: of a model of several components, their names -> their parsed config.json, or
            None; tensors are called COMPONENT.NAME then, and each component's files lie in a folder
            of its name.
        quantized: tensor -> the scheme that its values are stored in, in words ("GGUF Q4_1"). What
            is read here are the dequantized values.
        stored: how it lies on disk, if that is not as `tensors` show it.
        written_as: the checkpoint format that it is written in.
    """

    tensors: Mapping[str, LazyTensor]
    config: Mapping[str, Any] | None = None
    side_files: Mapping[str, Path | bytes] = field(default_factory=dict)
    shards: Mapping[str, str] = field(default_factory=dict)
    metadata: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    aliases: Mapping[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    path: Path | None = None
    hub_name: str = ""
    index_files: Mapping[str, Path | bytes] = field(default_factory=dict)
    headers: Mapping[str, bytes] = field(default_factory=dict, repr=False)
    record: Mapping[str, Path] = field(default_factory=dict, repr=False)
    components: Mapping[str, Mapping[str, Any] | None] = field(default_factory=dict)
    quantized: Mapping[str, str] = field(default_factory=dict)
    stored: Stored | None = field(default=None, repr=False)
    written_as: str = "safetensors"

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
        return named(str(self.path)) if self.path is not None else "<computed checkpoint>"

    def as_stored(self, tensors: Mapping[str, LazyTensor]) -> dict[str, LazyTensor]:
        """Tensors of this checkpoint by the names that they have inside their file."""
        if not self.components:
            return dict(tensors)
        return {name.partition(".")[2]: tensor for name, tensor in tensors.items()}

    def written_dtype(self, name: str) -> str:
        """The type that a tensor is written in unless another is asked for.

        Dequantized values have fp32's precision only because every product of a code and a scale
        must be kept exactly; bf16 is what models are trained and served in.
        """
        return "BF16" if name in self.quantized else self.tensors[name].dtype

    def check(self, name: str, digest: str) -> None:
        """Raise InputError if a tensor is known to have another digest; here, none is."""

    def known_digest(self, name: str) -> str | None:
        """The digest that a tensor must have, where it is known without reading it."""
        return None

    @property
    def disk_bytes(self) -> int:
        """About the bytes that writing it takes."""
        return self.nbytes

    def beside(self, folder: Path) -> AbstractContextManager[Callable[[str], None]]:
        """Write what belongs beside the tensors while they are written to `folder`.

        Yields what is to be called with each tensor's name once it is written, in order.
        """
        return nullcontext(lambda name: None)

    def report(self, target: Path | str) -> Report:
        """What was written to `target`; call it after draining."""
        lines = (counted(len(self), "tensor"), f"size: {format_bytes(self.nbytes)}")
        data = {"kind": "checkpoint", "tensors": len(self), "bytes": self.nbytes}
        return Report(f"Wrote {target}", data, lines, notes=self.notes)

    def with_config(self, config: Mapping[str, Any]) -> Checkpoint:
        """The same tensors under another config.json."""
        content = (json.dumps(dict(config), indent=2, sort_keys=True) + "\n").encode()
        return replace(self, config=config, side_files={**self.side_files, "config.json": content})
