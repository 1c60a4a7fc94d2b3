"""Combinations that look at every element of dense matrices, a few rows at a time.

A delta B @ A is never held: its rows are made as they are needed, once for every pass over them,
always in the same tiles and so with the same bits. Only the result is dense, in one fp32 buffer a
thread that is used again for the next tensor.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch

from loratool.linalg import Factorizer, RankPolicy, Workspace
from loratool.lowrank import Product
from loratool.updates import LowRank
from loratool_plugins.combiners import _common as common

_TILE_ELEMENTS = 1 << 18
_MAGNITUDE = 0x7FFFFFFF  # the bits of an fp32 number without its sign: they sort as magnitudes do
_LOW_BITS = 15

_scratch = Workspace()

Sparsify = Callable[[torch.Tensor], None]
"""Sets elements of a tile to 0, in place; is given the tiles of one matrix in order, once."""

Merge = Callable[[torch.Tensor, Sequence[float]], torch.Tensor]
"""Makes one tile of the parts' (parts, rows, columns) and their weights."""


@dataclass(frozen=True)
class Rows:
    """A matrix whose rows are made as they are needed.

    Attributes:
        shape: (rows, columns).
        fill: writes the rows of a slice into an fp32 tensor.
    """

    shape: tuple[int, int]
    fill: Callable[[slice, torch.Tensor], object]

    @staticmethod
    def of_product(part: LowRank) -> Rows:
        """scale * B @ A, each element the same whenever it is made."""
        b, a = (part.b.double() * part.scale).float(), part.a.float()
        return Rows((b.shape[0], a.shape[1]), lambda rows, out: torch.mm(b[rows], a, out=out))

    @staticmethod
    def of_tensor(tensor: torch.Tensor) -> Rows:
        """A matrix that is there."""
        rows, columns = tensor.shape
        return Rows((rows, columns), lambda some, out: out.copy_(tensor[some]))

    def slices(self) -> Iterator[slice]:
        """The tiles that it is made in."""
        rows, columns = self.shape
        step = max(1, _TILE_ELEMENTS // columns)
        return (slice(start, min(start + step, rows)) for start in range(0, rows, step))

    def tiles(self) -> Iterator[torch.Tensor]:
        """Its tiles in order, each valid until the next."""
        for rows in self.slices():
            shape = (rows.stop - rows.start, self.shape[1])
            tile = _scratch.take("tile", shape, torch.float32)
            self.fill(rows, tile)
            yield tile


Sparsifiers = Callable[[Sequence[Rows]], Sequence[Sparsify]]
"""Makes one of these for each matrix."""


def combined(
    matrices: Sequence[Rows],
    weights: Sequence[float],
    sparsify: Sequence[Sparsify],
    merge: Merge,
) -> torch.Tensor:
    """Sparsify every matrix and merge them, tile by tile.

    Returns:
        The dense result in this thread's buffer: valid until the next call.
    """
    first = matrices[0]
    dense = _scratch.take("dense", first.shape, torch.float32)
    for rows in first.slices():
        shape = (len(matrices), rows.stop - rows.start, first.shape[1])
        stack = _scratch.take("stack", shape, torch.float32)
        for tile, matrix, thin in zip(stack, matrices, sparsify, strict=True):
            matrix.fill(rows, tile)
            thin(tile)
        dense[rows] = merge(stack, weights)
    return dense


def combine(
    on: str,
    parts: Sequence[LowRank],
    weights: Sequence[float],
    policy: RankPolicy | None,
    factorizer: Factorizer,
    generator: torch.Generator,
    sparsifiers: Sparsifiers,
    merge: Merge,
) -> LowRank:
    """Sparsify and merge the parts' deltas or factors, as `on` says."""
    if on == "factors":
        return _on_factors(parts, weights, policy, sparsifiers, merge)
    return _on_deltas(parts, weights, policy, factorizer, generator, sparsifiers, merge)


def _on_deltas(
    parts: Sequence[LowRank],
    weights: Sequence[float],
    policy: RankPolicy | None,
    factorizer: Factorizer,
    generator: torch.Generator,
    sparsifiers: Sparsifiers,
    merge: Merge,
) -> LowRank:
    """Combine the dense deltas and factorize the result, at the sum of the ranks by default."""
    matrices = [Rows.of_product(part) for part in parts]
    dense = combined(matrices, weights, sparsifiers(matrices), merge)
    policy = policy or RankPolicy(sum(part.rank for part in parts))
    found = factorizer.factorize(dense, policy, generator)
    return LowRank(found.a, found.b, 1.0, found.certificate)


def _on_factors(
    parts: Sequence[LowRank],
    weights: Sequence[float],
    policy: RankPolicy | None,
    sparsifiers: Sparsifiers,
    merge: Merge,
) -> LowRank:
    """Combine all A and all B, each as if it were a delta, with PEFT's weights; A goes first."""
    on_a, on_b = common.factor_weights(parts, weights)
    found = []
    for tensors, scaled in (([p.a for p in parts], on_a), ([p.b for p in parts], on_b)):
        matrices = [Rows.of_tensor(tensor) for tensor in tensors]
        found.append(combined(matrices, scaled, sparsifiers(matrices), merge).clone())
    return common.finished(Product(b=found[1], a=found[0]), policy)


def combine_vectors(
    parts: Sequence[torch.Tensor],
    weights: Sequence[float],
    sparsifiers: Sparsifiers,
    merge: Merge,
) -> torch.Tensor:
    """Sparsify and merge vectors (n,), each seen as a matrix of one column."""
    matrices = [Rows.of_tensor(part[:, None]) for part in parts]
    return combined(matrices, weights, sparsifiers(matrices), merge).flatten().clone()


def weighted_sum(stack: torch.Tensor, weights: Sequence[float]) -> torch.Tensor:
    """The sum of the parts times their weights."""
    total = stack[0] * weights[0]
    for tile, weight in zip(stack[1:], weights[1:], strict=True):
        total.add_(tile, alpha=weight)
    return total


def elected_mean(sign: str) -> Merge:
    """TIES' sign election and disjoint mean: see `loratool_plugins.combiners.ties`."""

    def merge(stack: torch.Tensor, weights: Sequence[float]) -> torch.Tensor:
        signs = stack.sign()
        votes = (stack if sign == "total" else signs).sum(dim=0)
        elected = torch.where(votes >= 0, 1.0, -1.0)
        agreeing = signs == elected
        return weighted_sum(stack * agreeing, weights) / agreeing.sum(dim=0).clamp_(min=1)

    return merge


def largest(density: float) -> Sparsifiers:
    """Keep the given share of each matrix, the largest by magnitude."""
    return lambda matrices: [_Largest(matrix, density) for matrix in matrices]


class _Largest:
    """Keeps floor(density * size) elements: the largest, and of equal ones the first.

    The smallest magnitude that is kept is found exactly, in two passes over histograms of the
    magnitudes' bits: of their high bits, and of the low bits of those that share the high ones.
    """

    def __init__(self, matrix: Rows, density: float) -> None:
        size = matrix.shape[0] * matrix.shape[1]
        wanted = int(density * size)
        self._smallest, self._equal = -1, 0
        if wanted < size:
            self._smallest, self._equal = _nth_largest(matrix, wanted)

    def __call__(self, tile: torch.Tensor) -> None:
        bits = _magnitudes(tile)
        keep = bits > self._smallest
        if self._equal:
            equal = (bits == self._smallest).reshape(-1).nonzero().squeeze(1)[: self._equal]
            keep.view(-1)[equal] = True
            self._equal -= len(equal)
        tile.mul_(keep)


def _nth_largest(matrix: Rows, count: int) -> tuple[int, int]:
    """The magnitude of the `count`-th largest element, as bits, and its place among equal ones.

    For a count of 0: a magnitude that nothing exceeds, and 0.
    """
    if count == 0:
        return _MAGNITUDE, 0
    highs = torch.zeros(1 << (31 - _LOW_BITS), dtype=torch.int64)
    for tile in matrix.tiles():
        highs += torch.bincount((_magnitudes(tile) >> _LOW_BITS).reshape(-1), minlength=len(highs))
    high, left = _bin_from_top(highs, count)
    lows = torch.zeros(1 << _LOW_BITS, dtype=torch.int64)
    for tile in matrix.tiles():
        bits = _magnitudes(tile)
        inside = bits[(bits >> _LOW_BITS) == high] & ((1 << _LOW_BITS) - 1)
        lows += torch.bincount(inside, minlength=len(lows))
    low, left = _bin_from_top(lows, left)
    return (high << _LOW_BITS) | low, left


def _bin_from_top(counts: torch.Tensor, wanted: int) -> tuple[int, int]:
    """The bin of the `wanted`-th element counted from the last bin, and its place in that bin."""
    above = counts.flip(0).cumsum(0)
    place = int((above < wanted).sum())
    before = int(above[place - 1]) if place else 0
    return len(counts) - 1 - place, wanted - before


def _magnitudes(tile: torch.Tensor) -> torch.Tensor:
    return tile.view(torch.int32) & _MAGNITUDE


def dropped(density: float, generator: torch.Generator) -> Sparsifiers:
    """Keep each element with the given probability, and divide by it.

    Every matrix gets a random stream of its own, drawn element by element in row-major order: the
    choice depends on the generator and the order of the parts alone, not on tiles.
    """

    def sparsifiers(matrices: Sequence[Rows]) -> Sequence[Sparsify]:
        return [_Drop(density, stream) for stream in streams(generator, len(matrices))]

    return sparsifiers


def streams(generator: torch.Generator, count: int) -> list[torch.Generator]:
    """Independent random streams, seeded by a generator."""
    seeds = torch.randint(1 << 62, (count,), generator=generator).tolist()
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def keep_mask(shape: Sequence[int], density: float, stream: torch.Generator) -> torch.Tensor:
    """The next elements of a stream: True with probability `density`."""
    return torch.rand(tuple(shape), generator=stream) < density


class _Drop:
    def __init__(self, density: float, stream: torch.Generator) -> None:
        self._density = density
        self._stream = stream

    def __call__(self, tile: torch.Tensor) -> None:
        if self._density < 1:
            tile.mul_(keep_mask(tile.shape, self._density, self._stream)).div_(self._density)
