"""The largest entries that a low-rank update leaves out, found in one pass over two tensors.

Nothing of the size of the delta is held: it is formed again tile by tile, and only entries that
may be among the largest are kept.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np
import torch

from loratool.checkpoint import LazyTensor
from loratool.dtypes import torch_dtype
from loratool.errors import InputError
from loratool.linalg import Certificate, Workspace, is_finite, squared_norm, tiles
from loratool.tiling import difference
from loratool.updates import LowRank, Sparse, entries_of

# How many more entries than wanted are gathered, at least, before the smallest are dropped.
_SURPLUS = 1 << 16
# A threshold to begin with is guessed from so many elements, if at least so many of them count, so
# that about this many times the entries that are wanted exceed it.
_SAMPLE = 1 << 18
_FEWEST = 1 << 8
_MORE = 1.15

_scratch = Workspace()


@dataclass(frozen=True)
class Residual:
    """The largest entries of what a low-rank update leaves out of a delta.

    Attributes:
        positions: (k,) int64, ascending; row by row.
        values: (k,) fp32, or fp64 if one of the tensors is; none is 0.
        energy: ||D - B A||_F^2, of all entries.
    """

    positions: torch.Tensor
    values: torch.Tensor
    energy: float


def with_entries(
    found: LowRank | None,
    base: LazyTensor,
    tuned: LazyTensor,
    transposed: bool,
    wanted: float,
    dtype: str,
) -> LowRank | Sparse | None:
    """A low-rank update of a difference, and the largest entries that it leaves out.

    Args:
        found: made of tuned - base, with a certificate, its factors rounded; None if there is no
            difference.
        base: (out, in), or (in, out) if `transposed`; or a convolution's weight.
        tuned: of the same shape.
        transposed: whether both are stored as (in, out).
        wanted: how many entries, or below 1 which share of all.
        dtype: of the values, as safetensors calls it.

    Returns:
        The update with a certificate of both together; `found` if it leaves nothing out.

    Raises:
        InputError: an entry overflows `dtype`.
    """
    if found is None or found.certificate is None:
        return found
    stored = found.transposed() if transposed else found
    number = entries_of(wanted, base.numel)
    residual = largest_entries(base.read(), tuned.read(), stored, number)
    values = residual.values.to(torch_dtype(dtype))
    if not is_finite(values):
        raise InputError(
            f"{tuned.origin}: {tuned.name}: its largest entries overflow {dtype}; choose a wider "
            "--dtype"
        )
    kept = values != 0
    if not kept.any():
        return found
    positions, values, exact = residual.positions[kept], values[kept], residual.values[kept]
    error = exact.double() - values.double()
    left = residual.energy - _energy(exact.double()) + _energy(error)
    certificate = _together(found.certificate, max(0.0, left))
    update = Sparse(stored, positions, values, certificate=certificate)
    return replace(update.transposed(), added=found) if transposed else update


def _together(low_rank: Certificate, left: float) -> Certificate:
    """The certificate of factors and entries, which leave so much of the energy out."""
    total = low_rank.total
    return Certificate(
        low_rank.rank,
        total,
        captured=max(0.0, total - left),
        rounding=max(0.0, left - total),
        optimum_bound=total,
        method=f"{low_rank.method} + entries",
        steps=low_rank.steps,
    )


def largest_entries(
    before: torch.Tensor, after: torch.Tensor, update: LowRank, number: int
) -> Residual:
    """The entries of largest magnitude of after - before - update; of equal ones the first.

    Args:
        before: of any shape and float dtype, seen as the update's matrix.
        after: of the same shape.
        update: in the orientation of the tensors.
        number: how many at most; entries that are 0 are never among them.
    """
    found = _Left(before, after, update)
    start = found.guess(number)
    result = found.gather(number, start)
    if start and len(result.positions) < number:  # the sample was misleading
        result = found.gather(number, 0.0)
    return result


class _Left:
    """after - before - update as a matrix, formed tile by tile in reused buffers."""

    def __init__(self, before: torch.Tensor, after: torch.Tensor, update: LowRank) -> None:
        self._shape = (update.b.shape[0], update.a.shape[1])
        self._before, self._after = before.reshape(self._shape), after.reshape(self._shape)
        wide = torch.float64 in (before.dtype, after.dtype)
        self._kind = torch.float64 if wide else torch.float32
        self._a, self._b = update.a.to(self._kind), update.b.to(self._kind) * update.scale

    def guess(self, number: int) -> float:
        """A magnitude that a few more entries than `number` exceed, from some rows; 0 for none."""
        rows, columns = self._shape
        count = min(rows, max(1, _SAMPLE // columns))
        wanted = math.ceil(_MORE * number * count / rows)
        if wanted < _FEWEST or wanted >= count * columns:
            return 0.0
        chosen = torch.linspace(0, rows - 1, count).round().long()
        sample = torch.empty(count, columns, dtype=self._kind)
        difference(self._after[chosen], self._before[chosen], sample)
        sizes = sample.sub_(self._b[chosen] @ self._a).abs_().view(-1).numpy()
        return float(np.partition(sizes, len(sizes) - wanted)[len(sizes) - wanted])

    def gather(self, number: int, start: float) -> Residual:
        """The largest entries among those that exceed `start`, and the energy of all."""
        gathered, energy = _Largest(number, self._kind, start), 0.0
        for rows in tiles(self._before):
            size = tuple(self._before[rows].shape)
            tile, product = (_scratch.take(name, size, self._kind) for name in ("tile", "product"))
            difference(self._after[rows], self._before[rows], tile)
            tile.sub_(torch.mm(self._b[rows], self._a, out=product))
            energy += _energy(tile) if self._kind == torch.float64 else squared_norm(tile)
            gathered.see(tile.view(-1), product.view(-1), rows.start * self._shape[1])
        return Residual(*gathered.finish(), energy)


class _Largest:
    """Gathers the entries of largest magnitude of tiles that come in order."""

    def __init__(self, number: int, kind: torch.dtype, start: float) -> None:
        self._number = number
        self._positions = [np.empty(0, dtype=np.int64)]
        self._values = [torch.empty(0, dtype=kind).numpy()]
        self._held = 0
        self._least = start  # what is not larger cannot be among them

    def see(self, values: torch.Tensor, scratch: torch.Tensor, start: int) -> None:
        """The next entries.

        Args:
            values: (n,).
            scratch: (n,), overwritten.
            start: the position of the first.
        """
        found = np.flatnonzero(torch.abs(values, out=scratch).numpy() > self._least)
        if not len(found):
            return
        self._values.append(values.numpy()[found])
        self._positions.append(found + start)
        self._held += len(found)
        if self._held > 2 * self._number + _SURPLUS:
            self._drop()

    def _drop(self) -> None:
        positions, values = np.concatenate(self._positions), np.concatenate(self._values)
        if (surplus := len(values) - self._number) > 0:
            sizes = np.abs(values)
            least = np.partition(sizes, surplus)[surplus]
            kept = sizes > least
            equal = np.flatnonzero(sizes == least)
            kept[equal[: self._number - int(np.count_nonzero(kept))]] = True
            positions, values, self._least = positions[kept], values[kept], float(least)
        self._positions, self._values, self._held = [positions], [values], len(values)

    def finish(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Positions, ascending, and values."""
        self._drop()
        return torch.from_numpy(self._positions[0]), torch.from_numpy(self._values[0])


def _energy(values: torch.Tensor) -> float:
    wide = values.double().reshape(-1)
    return math.fsum(float(wide[part].square().sum()) for part in tiles(wide))
