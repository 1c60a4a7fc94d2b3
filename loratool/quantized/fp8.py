"""fp8 weights with scales: value = code * scale, a scale a block, a row or a tensor.

Block scales as DeepSeek and Qwen publish them lie in `weight_scale_inv` (ceil(out / 128),
ceil(in / 128)), their block size in config.json; FBGEMM and compressed-tensors store `weight_scale`
a row or a tensor. Whatever the name, the value is multiplied by the scale. The last block of a row
or column may be cut off.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from loratool.checkpoint import Checkpoint, Form, LazyTensor, Parts
from loratool.dtypes import torch_dtype
from loratool.families import Family
from loratool.quantized.scheme import TILE, Findings, Found
from loratool.quantized.unsupported import OF_ACTIVATIONS, method_of

if TYPE_CHECKING:
    import torch

_CODES = ("F8_E4M3", "F8_E5M2", "F8_E4M3FNUZ", "F8_E5M2FNUZ")
_SCALES = ("F32", "BF16", "F16", "F64", "F8_E8M0", "U8")
_ENDS = ("_scale_inv", "_scale")
_METHODS = ("fp8", "fbgemm_fp8", "compressed-tensors")
_USUAL = (128, 128)


@dataclass(frozen=True)
class Grid:
    """Which scale belongs to which value.

    A weight (..., rows, columns) is `count` matrices; each has scales (down, across), each for a
    block of (height, width) values; blocks at the ends may be cut off.
    """

    count: int
    rows: int
    columns: int
    height: int
    width: int

    @property
    def down(self) -> int:
        """Blocks along the rows."""
        return math.ceil(self.rows / self.height)

    @property
    def across(self) -> int:
        """Blocks along the columns."""
        return math.ceil(self.columns / self.width)

    @property
    def words(self) -> str:
        """How fine the scales are, for people."""
        if (self.down, self.across) == (1, 1):
            return "one scale"
        if (self.height, self.across) == (1, 1):
            return "one scale a row"
        return f"blocks of {self.height}x{self.width}"

    def tiles(self) -> Iterator[tuple[int, slice, slice]]:
        """(matrix, its rows, the rows of its scales) of whole rows of blocks."""
        step = max(1, TILE // max(1, self.height * self.columns))
        for number in range(self.count):
            for start in range(0, self.down, step):
                rows = slice(start * self.height, (start + step) * self.height)
                yield number, rows, slice(start, start + step)


def find(checkpoint: Checkpoint, settings: Mapping[str, Any], conv1d: Family | None) -> Findings:
    """The fp8 weights of a checkpoint that have scales.

    Args:
        checkpoint: as it is stored.
        settings: what its config.json says of its quantization.
        conv1d: not used: fp8 weights are stored the way that plain ones are.
    """
    findings = Findings()
    expected = method_of(settings) in _METHODS
    for name, tensor in checkpoint.items():
        if tensor.dtype not in _CODES:
            continue
        companions = [name + end for end in _ENDS if name + end in checkpoint]
        if len(companions) == 1:
            _take(findings, tensor, checkpoint[companions[0]], settings)
        elif companions:
            findings.problems.append(f"{name}: has both {' and '.join(companions)}: remove one")
        elif expected:
            wanted = " or ".join(name + end for end in _ENDS)
            findings.problems.append(
                f"{name}: is fp8 but {wanted} is missing: download the checkpoint again"
            )
    for name in checkpoint:
        if expected and name.endswith((".weight_scale_inv", ".weight_scale")):
            weight = name.removesuffix("_scale_inv").removesuffix("_scale")
            if weight not in checkpoint:
                findings.problems.append(f"{name}: {weight}, which it scales, is missing")
        if name.rpartition(".")[2] in OF_ACTIVATIONS and (expected or findings.tensors):
            findings.hidden.add(name)
    return findings


def _take(
    findings: Findings, codes: LazyTensor, scales: LazyTensor, settings: Mapping[str, Any]
) -> None:
    if scales.dtype not in _SCALES:
        findings.problems.append(f"{scales.name}: scales of type {scales.dtype} are unknown")
        return
    grid = _grid(codes.shape, scales.shape, _block(settings))
    if grid is None:
        stated = _block(settings)
        size = f"blocks of {stated[0]}x{stated[1]}" if stated else "any size of blocks"
        findings.problems.append(
            f"{scales.name}: scales {scales.shape} do not fit {codes.name} {codes.shape} in {size}"
            + ("" if stated else ": config.json, which says weight_block_size, is needed")
        )
        return

    def decode(parts: Parts) -> Iterator[torch.Tensor]:
        return decoded(parts["codes"], parts["scales"], grid)

    def encode(values: torch.Tensor) -> Parts:
        found = encoded(values, torch_dtype(codes.dtype), torch_dtype(scales.dtype), grid)
        return {"codes": found[0], "scales": found[1].reshape(scales.shape)}

    kind = codes.dtype.removeprefix("F8_").lower()
    form = Form({"codes": codes, "scales": scales}, decode, encode)
    findings.add(codes.name, Found(codes.shape, f"fp8 ({kind}), {grid.words}", form))


def _block(settings: Mapping[str, Any]) -> tuple[int, int] | None:
    """The size of the blocks that config.json states."""
    stated = settings.get("weight_block_size")
    groups = settings.get("config_groups")
    for group in groups.values() if isinstance(groups, dict) else ():
        weights = group.get("weights") if isinstance(group, dict) else None
        stated = stated or (weights.get("block_structure") if isinstance(weights, dict) else None)
    if not isinstance(stated, list) or len(stated) != 2:
        return None
    height, width = stated
    return (height, width) if all(type(n) is int and n > 0 for n in stated) else None


def _grid(
    shape: tuple[int, ...], scales: tuple[int, ...], stated: tuple[int, int] | None
) -> Grid | None:
    """How scales of one shape lie over codes of another; None if they do not."""
    if len(shape) < 2 or not math.prod(shape):
        return None
    *lead, rows, columns = shape
    count = math.prod(lead)

    def grid(height: int, width: int) -> Grid:
        return Grid(count, rows, columns, height, width)

    if len(scales) == len(shape) and scales[:-2] == tuple(lead):
        down, across = scales[-2:]
        usual = grid(*(stated or _USUAL))
        if (down, across) == (usual.down, usual.across) and (stated or down * across > 1):
            return usual
        if down in (1, rows) and across in (1, columns):
            return grid(rows // down, columns // across)
        if stated is None and not rows % down and not columns % across:
            return grid(rows // down, columns // across)
    if scales == (rows,) and not lead:
        return grid(1, columns)
    if scales in ((*lead,), (*lead, 1)) or (math.prod(scales) == 1 and count == 1):
        return grid(rows, columns)
    return None


def decoded(codes: torch.Tensor, scales: torch.Tensor, grid: Grid) -> Iterator[torch.Tensor]:
    """Yield code * scale in fp32, rounded once, in blocks along axis 0.

    Args:
        codes: (..., rows, columns), an fp8 type.
        scales: count * down * across of any type; bytes are exponents of two, plus 127.
        grid: which scale is whose.

    Returns:
        Blocks of rows of the weight; of whole matrices where it has three axes.
    """
    factors = _as_fp32(scales).reshape(grid.count, grid.down, grid.across)
    matrices = codes.reshape(grid.count, grid.rows, grid.columns)
    full, rest = divmod(grid.columns, grid.width)
    for number, rows, blocks in grid.tiles():
        tile = matrices[number, rows].float()
        scale = factors[number, blocks].repeat_interleave(grid.height, dim=0)[: len(tile)]
        whole = tile[:, : full * grid.width]
        whole.view(len(tile), full, grid.width).mul_(scale[:, :full, None])
        if rest:
            tile[:, full * grid.width :].mul_(scale[:, full:])
        yield tile


def _as_fp32(scales: torch.Tensor) -> torch.Tensor:
    import torch

    if scales.dtype == torch.uint8:
        return torch.exp2(scales.float() - 127)
    return scales.float()


def encoded(
    values: torch.Tensor, codes: torch.dtype, scales: torch.dtype, grid: Grid
) -> tuple[torch.Tensor, torch.Tensor]:
    """New codes and scales: the largest value of a block becomes the largest fp8 number.

    Args:
        values: (..., rows, columns), fp32 and finite.
        codes: the codes' type.
        scales: the scales' type; values are divided by the scale as it is stored.
        grid: the blocks.

    Returns:
        Codes of the shape of `values`, and scales (count, down, across).
    """
    import torch

    most = torch.finfo(codes).max
    matrices = values.reshape(grid.count, grid.rows, grid.columns)
    found = torch.empty(matrices.shape, dtype=codes)
    stored = torch.empty(grid.count, grid.down, grid.across, dtype=scales)
    for number, rows, blocks in grid.tiles():
        tile = matrices[number, rows].float()
        missing = (-len(tile) % grid.height, -grid.columns % grid.width)
        padded = torch.nn.functional.pad(tile, (0, missing[1], 0, missing[0]))
        cells = padded.view(-1, grid.height, grid.across, grid.width)
        largest = cells.abs().amax(dim=(1, 3))
        scale = _stored_scale(torch.where(largest > 0, largest / most, 1.0), scales)
        stored[number, blocks] = scale
        quotients = (cells / _as_fp32(scale)[:, None, :, None]).clamp_(-most, most)
        rounded = quotients.view(padded.shape)[: len(tile), : grid.columns]
        found[number, rows] = rounded.to(codes)
    return found.view(values.shape), stored


def _stored_scale(scale: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Scales as they are stored; powers of two are rounded up, so that no value overflows."""
    import torch

    if dtype not in (torch.uint8, torch.float8_e8m0fnu):
        smallest = torch.finfo(dtype).smallest_normal
        return scale.clamp(min=smallest).to(dtype)
    mantissa, exponent = torch.frexp(scale)
    power = (exponent - (mantissa == 0.5).int()).clamp(-127, 127) + 127
    return power.to(torch.uint8).view(dtype)
