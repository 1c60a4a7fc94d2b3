"""bitsandbytes' 4 bits a weight: nf4 and fp4, with plain or doubly quantized block maxima.

The value is table[code] * absmax of its block of consecutive values. `weight` holds two codes a
byte, the first in the high half; `weight.absmax` a maximum a block, or a byte for it that stands
for nested_quant_map[byte] * nested_absmax + nested_offset; and
`weight.quant_state.bitsandbytes__nf4` (or fp4) the shape and the sizes as JSON in bytes.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from loratool.checkpoint import Checkpoint, Form, LazyTensor, Parts
from loratool.dtypes import torch_dtype
from loratool.families import Family
from loratool.quantized.scheme import Findings, Found, aligned_tiles, small_content, turned
from loratool.quantized.unsupported import method_of

if TYPE_CHECKING:
    import torch

_STATE = re.compile(r"(.+)\.quant_state\.bitsandbytes__(nf4|fp4)")
_LEVELS = 16
_BYTE_LEVELS = 256
_KEPT = ("table", "nested_table")
_LONGEST_NUMBER = 24  # characters of a double


@dataclass(frozen=True)
class Blocks:
    """The sizes of a 4-bit weight, from its description.

    Attributes:
        kind: "nf4" or "fp4".
        rows, columns: of the matrix as it was quantized.
        size: values that share a maximum.
        nested: maxima that share one in turn; 0 if maxima are not quantized.
        offset: what is added to a maximum that was.
        state: the whole description.
    """

    kind: str
    rows: int
    columns: int
    size: int
    nested: int
    offset: float
    state: Mapping[str, Any]

    @property
    def count(self) -> int:
        """The number of blocks."""
        return math.ceil(self.rows * self.columns / self.size)

    @property
    def room(self) -> int:
        """Bytes that the description takes at most, whatever the offset is."""
        return len(_json({**self.state, "nested_offset": 0})) - 1 + _LONGEST_NUMBER

    @property
    def words(self) -> str:
        """The scheme, for people."""
        double = ", double quantization" if self.nested else ""
        return f"{self.kind}, blocks of {self.size}{double}"


def _json(state: Mapping[str, Any]) -> bytes:
    return json.dumps(dict(state)).encode()


def find(checkpoint: Checkpoint, settings: Mapping[str, Any], conv1d: Family | None) -> Findings:
    """The 4-bit weights of a checkpoint.

    Args:
        checkpoint: as it is stored.
        settings: what its config.json says of its quantization.
        conv1d: the family, if some of its plain weights are the transposes of the quantized ones.
    """
    findings = Findings()
    for name, state in checkpoint.items():
        if match := _STATE.fullmatch(name):
            _take(findings, checkpoint, match[1], state, conv1d)
    for name in checkpoint:
        weight = name.removesuffix(".absmax")
        if weight != name and weight in checkpoint and weight not in findings.tensors:
            described = (f"{weight}.quant_state.bitsandbytes__{kind}" for kind in ("nf4", "fp4"))
            if not any(state in checkpoint for state in described):
                findings.problems.append(
                    f"{weight}: {weight}.quant_state.bitsandbytes__nf4 (or fp4), which describes "
                    "it, is missing: save the model again with bitsandbytes 0.41.3 or later"
                )
    if method_of(settings) == "bitsandbytes" and settings.get("load_in_4bit"):
        for name, tensor in checkpoint.items():
            is_packed = tensor.dtype == "U8" and tensor.shape[1:] == (1,)
            if is_packed and name not in findings.tensors and f"{name}.absmax" not in checkpoint:
                findings.problems.append(f"{name}: its 4-bit codes lack {name}.absmax")
    return findings


def _take(
    findings: Findings,
    checkpoint: Checkpoint,
    name: str,
    state: LazyTensor,
    conv1d: Family | None,
) -> None:
    blocks = _description(small_content(state))
    if blocks is None:
        findings.problems.append(f"{state.name}: is no description of a 4-bit matrix")
        return
    pieces = {"state": state}
    wrong = []
    for part, (stored, dtype, count) in _companions(name, blocks).items():
        piece = checkpoint.get(stored)
        if piece is None:
            wrong.append(f"{stored}: is missing: download the checkpoint again")
            continue
        pieces[part] = piece
        # Codes may lie in a type of several bytes, for the sake of FSDP.
        found = piece.nbytes if part == "codes" else piece.numel
        if found != count or (part != "codes" and piece.dtype != dtype):
            wrong.append(
                f"{stored}: is {piece.dtype} {piece.shape}, but {state.name} describes {count} "
                f"values of {dtype}"
            )
    if wrong:
        findings.problems += wrong
        return
    module = name.rpartition(".")[0]
    is_turned = conv1d is not None and re.fullmatch(conv1d.conv1d, module) is not None
    shape = (blocks.columns, blocks.rows) if is_turned else (blocks.rows, blocks.columns)
    sizes = {"state": (blocks.room,)} if blocks.nested else {}

    def decode(parts: Parts) -> Iterator[torch.Tensor]:
        # Of other contents than those that were found: their offset is another one.
        own = _description(parts["state"].numpy().tobytes())
        assert own is not None
        values = decoded(parts, own)
        return turned(values) if is_turned else values

    def encode(values: torch.Tensor) -> Parts:
        tables = {part: pieces[part].read() for part in pieces if part in _KEPT}
        found = encoded(values.T.contiguous() if is_turned else values, tables, blocks)
        kind = torch_dtype(pieces["codes"].dtype)
        found |= {"codes": found["codes"].view(kind)}
        if not blocks.nested:
            found |= {"state": state.read()}
        return {part: found[part].view(sizes.get(part, pieces[part].shape)) for part in pieces}

    findings.add(name, Found(shape, blocks.words, Form(pieces, decode, encode, sizes)))


def _companions(name: str, blocks: Blocks) -> dict[str, tuple[str, str, int]]:
    """Part -> its stored name, its type and how many values it has; of codes: bytes."""
    codes = math.ceil(blocks.rows * blocks.columns / 2)
    found = {"codes": (name, "U8", codes), "table": (f"{name}.quant_map", "F32", _LEVELS)}
    if not blocks.nested:
        return found | {"absmax": (f"{name}.absmax", "F32", blocks.count)}
    nested = math.ceil(blocks.count / blocks.nested)
    return found | {
        "absmax": (f"{name}.absmax", "U8", blocks.count),
        "nested_absmax": (f"{name}.nested_absmax", "F32", nested),
        "nested_table": (f"{name}.nested_quant_map", "F32", _BYTE_LEVELS),
    }


def _description(content: bytes) -> Blocks | None:
    """What the JSON of a quant_state says; None if that is no 4-bit matrix."""
    try:
        state = json.loads(content.decode())
        rows, columns = state["shape"]
        found = Blocks(
            state["quant_type"],
            rows,
            columns,
            state["blocksize"],
            state.get("nested_blocksize", 0),
            float(state.get("nested_offset", 0.0)),
            state,
        )
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return None
    sizes = (found.rows, found.columns, found.size)
    are_counts = all(type(number) is int and number > 0 for number in sizes)
    is_nested = type(found.nested) is int and found.nested >= 0 and math.isfinite(found.offset)
    is_even = are_counts and found.size % 2 == 0
    return found if is_even and is_nested and found.kind in ("nf4", "fp4") else None


def decoded(parts: Parts, blocks: Blocks) -> Iterator[torch.Tensor]:
    """Yield table[code] * absmax in fp32, as bitsandbytes does on a CPU, in blocks of rows.

    Args:
        parts: codes, table, absmax and, where these are quantized, nested_absmax and nested_table.
        blocks: the sizes.
    """
    import torch

    codes = parts["codes"].reshape(-1).view(torch.uint8)
    table = parts["table"]
    pairs = torch.stack(  # byte -> its two values
        [table.repeat_interleave(_LEVELS), table.repeat(_LEVELS)], dim=1
    )
    maxima = _maxima(parts, blocks)
    columns = blocks.columns
    for start, end in aligned_tiles(blocks.rows, columns, blocks.size):
        first, last = start * columns, end * columns
        values = pairs.index_select(0, codes[first // 2 : (last + 1) // 2].int()).view(-1)
        mine = maxima[first // blocks.size : math.ceil(last / blocks.size)]
        whole = len(values) // blocks.size
        values[: whole * blocks.size].view(whole, blocks.size).mul_(mine[:whole, None])
        if len(mine) > whole:
            values[whole * blocks.size :].mul_(mine[whole])
        yield values[: last - first].view(end - start, columns)


def _maxima(parts: Parts, blocks: Blocks) -> torch.Tensor:
    import torch

    stored = parts["absmax"].reshape(-1)
    if not blocks.nested:
        return stored.float()
    values = parts["nested_table"][stored.long()]
    factors = parts["nested_absmax"].repeat_interleave(blocks.nested)[: len(values)]
    return values.mul_(factors).add_(torch.tensor(blocks.offset))


def encoded(values: torch.Tensor, tables: Parts, blocks: Blocks) -> dict[str, torch.Tensor]:
    """Codes and maxima of new values, as bitsandbytes quantizes.

    Args:
        values: (rows, columns), fp32 and finite.
        tables: the table of the codes and, for quantized maxima, that of those.
        blocks: the sizes.

    Returns:
        All parts, but for "state" where maxima are not quantized: that stays.
    """
    import torch

    size = blocks.size
    table = tables["table"]
    levels, order = torch.sort(table, stable=True)
    bounds = (levels[:-1] + levels[1:]) / 2
    codes, maxima = [], []
    for start, end in aligned_tiles(blocks.rows, blocks.columns, size):
        flat = values[start:end].reshape(-1).float()
        cells = torch.nn.functional.pad(flat, (0, -len(flat) % size)).view(-1, size)
        largest = cells.abs().amax(dim=1)
        shares = cells * (1.0 / largest.clamp(min=1e-38))[:, None]
        found = order[torch.bucketize(shares.view(-1)[: len(flat)], bounds)].to(torch.uint8)
        found = torch.nn.functional.pad(found, (0, len(found) % 2))
        codes.append(found[::2] << 4 | found[1::2])
        maxima.append(largest)
    parts = {**tables, "codes": torch.cat(codes), "absmax": torch.cat(maxima)}
    if blocks.nested:
        offset = parts["absmax"].mean()
        parts |= _quantized_maxima(parts["absmax"] - offset, tables["nested_table"], blocks.nested)
        text = _json({**blocks.state, "nested_offset": float(offset)}).ljust(blocks.room)
        parts |= {"state": torch.frombuffer(bytearray(text), dtype=torch.uint8)}
    return parts


def _quantized_maxima(maxima: torch.Tensor, table: torch.Tensor, size: int) -> Parts:
    """Bytes for maxima: the nearest of the table's levels, as shares of their block's largest."""
    import torch

    cells = torch.nn.functional.pad(maxima, (0, -len(maxima) % size)).view(-1, size)
    largest = cells.abs().amax(dim=1)
    shares = cells * (1.0 / largest.clamp(min=1e-38))[:, None]
    found = torch.bucketize(shares.view(-1)[: len(maxima)], (table[:-1] + table[1:]) / 2)
    return {"absmax": found.to(torch.uint8), "nested_absmax": largest}
