"""Values of GGUF tensors, tile by tile: from bytes, and back to bytes.

What llama.cpp's converter does to a tensor's rows and columns is undone here, and done again when
values are written. A block of quantized values never spans two rows.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any, Literal

import gguf
import numpy as np
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

from loratool.dtypes import torch_dtype

if TYPE_CHECKING:
    import torch

Array = np.ndarray[Any, np.dtype[Any]]

_TILE = 1 << 20  # values decoded at a time
# Kinds that hold values of a type of torch.
PLAIN = {
    "F32": "F32", "F16": "F16", "BF16": "BF16", "F64": "F64", "I8": "I8", "I16": "I16",
    "I32": "I32", "I64": "I64",
}  # fmt: skip


@dataclass(frozen=True)
class Layout:
    """What the converter did to a tensor.

    Attributes:
        change: nothing; "heads": the two halves of each of `heads` heads' rows were interleaved;
            "transposed"; "shifted": one was added to all values.
        heads: for "heads".
    """

    change: Literal["", "heads", "transposed", "shifted"] = ""
    heads: int = 0

    def stored_rows(self, rows: int) -> Array:
        """For each row of the plain weight, where it is stored."""
        if self.change != "heads":
            return np.arange(rows)
        stored = np.arange(rows).reshape(self.heads, rows // self.heads // 2, 2)
        return stored.swapaxes(1, 2).reshape(-1)


@dataclass(frozen=True)
class Codec:
    """Between a tensor's bytes and its plain values.

    Attributes:
        kind: how values are stored.
        shape: of the stored tensor, in the order of torch.
        layout: what the converter did to the plain one.
    """

    kind: GGMLQuantizationType
    shape: tuple[int, ...]
    layout: Layout = Layout()

    @property
    def plain_shape(self) -> tuple[int, ...]:
        """The shape of the plain tensor."""
        return self.shape[::-1] if self.layout.change == "transposed" else self.shape

    @property
    def _columns(self) -> int:
        """Values a row; the rows of a bias are its values."""
        is_bias = self.layout.change == "heads" and len(self.shape) == 1
        return 1 if is_bias else self.shape[-1]

    @property
    def dtype(self) -> str:
        """The safetensors dtype of the plain values."""
        shifted = self.layout.change == "shifted"  # one less needs the precision near one
        return "F32" if shifted else PLAIN.get(self.kind.name, "F32")

    @property
    def is_quantized(self) -> bool:
        """Whether a value is stored as a code and a scale."""
        return self.kind.name not in PLAIN

    @property
    def is_view(self) -> bool:
        """Whether the bytes are the plain values."""
        return self.layout.change == "" and self.kind.name in PLAIN

    @property
    def obstacle(self) -> str:
        """Why values cannot be written in this kind; "" if they can."""
        if can_quantize(self.kind):
            return ""
        return (
            f"is {self.kind.name}, which the gguf package reads and cannot write; quantize the "
            "merged model with llama.cpp's llama-quantize"
        )

    def decode(self, content: torch.Tensor) -> Iterator[torch.Tensor]:
        """The plain values in blocks of rows.

        Args:
            content: all bytes, uint8.
        """
        block, length = GGML_QUANT_SIZES[self.kind]
        columns = self._columns
        raw = content.numpy().reshape(-1, columns // block * length)
        if self.layout.change == "transposed":
            yield from self._decode_columns(raw, block, length)
            return
        step = max(1, _TILE // columns)
        places = self.layout.stored_rows(len(raw)) if self.layout.change == "heads" else None
        for start in range(0, len(raw), step):
            rows = slice(start, start + step)
            tile = self._values(raw[rows] if places is None else raw[places[rows]])
            if self.layout.change == "shifted":
                tile = tile.float() - 1
            yield tile.view(-1) if len(self.shape) == 1 else tile

    def _decode_columns(self, raw: Array, block: int, length: int) -> Iterator[torch.Tensor]:
        """Rows of the transpose: columns, as many whole blocks at a time as make a tile."""
        count = raw.shape[1] // length
        step = max(1, _TILE // (block * len(raw)))
        for start in range(0, count, step):
            part = np.ascontiguousarray(raw[:, start * length : (start + step) * length])
            yield self._values(part).T.contiguous()

    def _values(self, raw: Array) -> torch.Tensor:
        import torch

        if self.kind.name in PLAIN:
            plain = torch_dtype(PLAIN[self.kind.name])
            return torch.from_numpy(np.ascontiguousarray(raw)).view(plain)
        return torch.from_numpy(gguf.dequantize(raw, self.kind))

    def encode(self, values: torch.Tensor) -> torch.Tensor:
        """The bytes, uint8 and flat, of plain values of `plain_shape`."""
        import torch

        if self.layout.change == "transposed":
            values = values.T
        columns = self._columns
        rows = values.reshape(-1, columns)
        places = np.argsort(self.layout.stored_rows(len(rows)))
        block, length = GGML_QUANT_SIZES[self.kind]
        found = np.empty((len(rows), columns // block * length), np.uint8)
        step = max(1, _TILE // columns)
        for start in range(0, len(rows), step):
            tile = rows[torch.from_numpy(places[start : start + step])]
            if self.layout.change == "shifted":
                tile = tile.float() + 1
            found[start : start + step] = self._bytes(tile)
        return torch.from_numpy(found.reshape(-1))

    def _bytes(self, values: torch.Tensor) -> Array:
        import torch

        if self.kind.name in PLAIN:
            plain = values.to(torch_dtype(PLAIN[self.kind.name])).contiguous()
            found: Array = plain.view(torch.uint8).numpy()
            return found
        return gguf.quantize(values.float().numpy(), self.kind)


@cache
def can_dequantize(kind: GGMLQuantizationType) -> bool:
    """Whether the gguf package reads a kind."""
    if kind.name in PLAIN:
        return True
    try:
        gguf.dequantize(np.zeros((1, GGML_QUANT_SIZES[kind][1]), np.uint8), kind)
    except NotImplementedError:
        return False
    return True


@cache
def can_quantize(kind: GGMLQuantizationType) -> bool:
    """Whether the gguf package writes a kind."""
    if kind.name in PLAIN:
        return True
    try:
        gguf.quantize(np.zeros((1, GGML_QUANT_SIZES[kind][0]), np.float32), kind)
    except NotImplementedError:
        return False
    return True
