"""Rounding cells: which deltas the rounding of a merge maps to the weights that came of it.

A weight W1 = round(W0 + D) does not tell D, but an interval that D lies in. Where D has low rank
there are far more intervals than unknowns, and the matrix of rank r that lies in all of them is
much closer to D than the best approximation of W1 - W0 is. It is sought by alternating between a
pull into the intervals and a projection to rank r.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, NamedTuple

from loratool.linalg import Workspace, squared_norm, tiles

if TYPE_CHECKING:
    import torch

Replay = Literal["sum", "delta, then sum"]

_TILE = 1 << 17  # elements: the four tiles of a step stay in the cache
# How far to go, in units of the violation, and how much of the last move to repeat.
_PULL, _MOMENTUM = 1.8, 0.9
# A violation so many times that of the start means that the fit runs away.
_RUNAWAY = 2.0
# The share of cells that may be empty in a replay that is true.
_LOST = 1e-5

_scratch = Workspace()


class Fit(NamedTuple):
    """left diag(sigma) right.

    Attributes:
        left: (out, r), fp32, orthonormal columns.
        sigma: (r,), fp32, descending.
        right: (r, in), fp32, orthonormal rows.
    """

    left: torch.Tensor
    sigma: torch.Tensor
    right: torch.Tensor

    def cut(self, rank: int) -> Fit:
        """Its leading `rank` singular values."""
        return Fit(self.left[:, :rank], self.sigma[:rank], self.right[:rank])


@dataclass(frozen=True)
class HeldOut:
    """Cells that a fit does not see, so that it can be asked to predict them.

    Attributes:
        places: (k,) int64, where they lie in the flattened matrix.
        low: (k,) fp32, lower ends.
        high: (k,) upper ends.
        asked: (k,) bool: those whose weight the merge has changed. The others would be predicted
            by no delta at all.
    """

    places: torch.Tensor
    low: torch.Tensor
    high: torch.Tensor
    asked: torch.Tensor

    @property
    def count(self) -> int:
        """How many predictions are asked for."""
        return int(self.asked.sum())

    def share(self, fit: Fit) -> float:
        """The share of them that a fit gets right."""
        columns = fit.right.shape[1]
        left = (fit.left * fit.sigma)[self.places // columns]
        right = fit.right.t().contiguous()[self.places % columns]
        values = (left * right).sum(dim=1)
        hits = (values >= self.low) & (values <= self.high) & self.asked
        return int(hits.sum()) / max(1, self.count)


class Cells:
    """The intervals of one matrix's delta, for one way of rounding, in units of 2^exponent.

    They lie in this thread's scratch: one object at a time.
    """

    def __init__(
        self, before: torch.Tensor, after: torch.Tensor, replay: Replay, exponent: int
    ) -> None:
        """Compute all intervals.

        Args:
            before: (out, in), the base's weights, in any float dtype.
            after: (out, in), the merged ones, bf16 or fp16.
            replay: whether the sum alone was rounded, or the delta before it.
            exponent: deltas are given and found divided by 2^exponent.
        """
        import torch

        shape = (after.shape[0], after.shape[1])
        self._before, self._after, self.replay = before, after, replay
        self._low = _scratch.take("low", shape, torch.float32)
        self._high = _scratch.take("high", shape, torch.float32)
        self._unit = 2.0**-exponent
        for rows in tiles(after, _TILE):
            low, high = _cells(before[rows], after[rows], replay)
            torch.mul(low, self._unit, out=self._low[rows])
            torch.mul(high, self._unit, out=self._high[rows])

    def hide(self, places: torch.Tensor) -> HeldOut:
        """Hide the cells at some `places` (k,) of the flattened matrix from `pull`."""
        low, high = self._low.view(-1), self._high.view(-1)
        before, after = self._before.reshape(-1)[places], self._after.reshape(-1)[places]
        asked = before.to(after.dtype) != after
        hidden = HeldOut(places, low[places], high[places], asked)
        low[places], high[places] = -math.inf, math.inf
        return hidden

    def show(self, hidden: HeldOut) -> None:
        """Let `pull` see hidden cells again."""
        self._low.view(-1)[hidden.places] = hidden.low
        self._high.view(-1)[hidden.places] = hidden.high

    def pull(self, now: Fit, left: torch.Tensor, right: torch.Tensor) -> Pull:
        """Where the cells pull the matrix `left` @ `right`, seen from `now`.

        Args:
            now: whose singular vectors the pull is projected to.
            left: (out, k), fp32.
            right: (k, in), fp32.
        """
        import torch

        columns = torch.empty_like(now.left)
        rows = torch.zeros_like(now.right)
        violation = 0.0
        step = max(1, _TILE // right.shape[1])
        shape = (min(step, left.shape[0]), right.shape[1])
        point = _scratch.take("point", shape, torch.float32)
        pulled = _scratch.take("pulled", shape, torch.float32)
        for part in tiles(self._low, _TILE):
            size = len(self._low[part])
            y, r = point[:size], pulled[:size]
            torch.mm(left[part], right, out=y)
            torch.clamp(y, self._low[part], self._high[part], out=r)
            r.sub_(y)
            violation += squared_norm(r)
            torch.mm(r, now.right.t(), out=columns[part])
            rows.addmm_(now.left[part].t(), r)
        return Pull(columns, rows, violation)


class Pull(NamedTuple):
    """clip(Y, cells) - Y for some Y, as far as a step needs it.

    Attributes:
        columns: (out, r), its product with the right singular vectors.
        rows: (r, in), the left singular vectors' product with it.
        violation: its ||.||_F^2.
    """

    columns: torch.Tensor
    rows: torch.Tensor
    violation: float


def could_be(replay: Replay, before: torch.Tensor, after: torch.Tensor) -> bool:
    """Whether as good as no cell is empty in a replay.

    Those of a rounded delta have gaps where a weight is small beside its change: some such weights,
    if the sum alone was rounded, come to lie in a gap. A few cells are lost to sums that were
    rounded to fp32 first.
    """
    empty, allowed = 0, _LOST * after.numel()
    for rows in tiles(after, _TILE):
        low, high = _cells(before[rows], after[rows], replay)
        empty += int((low > high).sum())
        if empty > allowed:
            return False
    return True


def _cells(
    before: torch.Tensor, after: torch.Tensor, replay: Replay
) -> tuple[torch.Tensor, torch.Tensor]:
    """The least and the largest fp32 delta that gives `after`; an empty cell has least > largest.

    Args:
        before: any shape and float dtype.
        after: of the same shape, bf16 or fp16.
        replay: what was rounded.
    """
    low, high = _rounding_to(after, before.float())
    if replay == "sum":
        return low, high
    # Every delta that rounds to one of the coarse deltas between these ends.
    least, most = _ceiling(low, after.dtype), _floor(high, after.dtype)
    return _rounding_to(least)[0], _rounding_to(most)[1]


def fitted(start: Fit, cells: Cells, steps: int) -> Fit:
    """Move a matrix into the cells, keeping its rank.

    Nesterov's method with restarts (O'Donoghue and Candes 2015, arXiv 1204.3982, section 3.2) on
    the manifold of matrices of rank r: the pull is projected to the tangent space at the present
    matrix and the sum cut back to rank r, through QR of thin factors (Vandereycken 2013, arXiv
    1209.3834, section 3.1). One pass over the cells a step.
    """
    import torch

    now = last = best = start
    momentum, pull, before, least, largest = 0.0, _PULL, math.inf, math.inf, math.inf
    for _ in range(steps):
        left = torch.cat([now.left * (now.sigma * (1 + momentum)), last.left], dim=1)
        right = torch.cat([now.right, last.right * (-momentum * last.sigma)[:, None]])
        if momentum == 0:
            left, right = now.left * now.sigma, now.right
        found = cells.pull(now, left, right)
        if found.violation == 0:
            break
        if not found.violation <= largest:  # or NaN
            now = last = best
            momentum, pull, before = 0.0, pull / 2, math.inf
            continue
        largest = min(largest, _RUNAWAY * found.violation) if now is start else largest
        if found.violation < least:
            best, least = now, found.violation
        moved = _moved(now, last, found, pull, momentum)
        momentum = 0.0 if found.violation > before else _MOMENTUM
        now, last, before = moved, now, found.violation
    return now


def _moved(now: Fit, last: Fit, found: Pull, pull: float, momentum: float) -> Fit:
    """now + momentum (now - last) + the pull in the tangent space, cut to the rank of `now`."""
    import torch

    rank = len(now.sigma)
    outside = found.columns - now.left @ (now.left.t() @ found.columns)
    left = [now.left, outside]
    right = [now.right, found.rows]
    core = torch.zeros(3 * rank, 3 * rank, dtype=torch.float64)
    one, two, three = slice(rank), slice(rank, 2 * rank), slice(2 * rank, None)
    core[one, one] = torch.diag(now.sigma.double() * (1 + momentum))
    core[one, two] = core[two, one] = pull * torch.eye(rank, dtype=torch.float64)
    if momentum:
        left.append(last.left)
        right.append(last.right)
        core[three, three] = torch.diag(last.sigma.double() * -momentum)
    else:
        core = core[: 2 * rank, : 2 * rank]
    columns, upper = torch.linalg.qr(torch.cat(left, dim=1).double())
    rows, lower = torch.linalg.qr(torch.cat(right).t().double())
    u, sigma, v = torch.linalg.svd(upper @ core @ lower.t())
    return Fit(
        (columns @ u[:, :rank]).float(),
        sigma[:rank].float(),
        (v[:rank] @ rows.t()).float(),
    )


def _rounding_to(
    values: torch.Tensor, before: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """The least and the largest fp32 number d for which `before` + d rounds to `values`.

    To nearest, ties to even. The half-way points are exact in fp32, and less `before` they are
    nearly always.

    Args:
        values: any shape, bf16 or fp16.
        before: of the same shape, fp32; 0 if None.
    """
    keys = _keys(values)
    middle = values.float().mul_(0.5)
    low = _numbers(keys - 1, values.dtype).float().mul_(0.5).add_(middle)
    high = _numbers(keys + 1, values.dtype).float().mul_(0.5).add_(middle)
    if before is not None:
        low.sub_(before)
        high.sub_(before)
    odd = keys.bitwise_and_(1)  # ties go to the neighbour
    return _numbers(_keys(low).add_(odd), low.dtype), _numbers(_keys(high).sub_(odd), low.dtype)


def _ceiling(values: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The least number of `dtype` that is not below each fp32 value."""
    rounded = values.to(dtype)
    return _numbers(_keys(rounded) + (rounded.float() < values), dtype)


def _floor(values: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The largest number of `dtype` that is not above each fp32 value."""
    rounded = values.to(dtype)
    return _numbers(_keys(rounded) - (rounded.float() > values).int(), dtype)


def _keys(values: torch.Tensor) -> torch.Tensor:
    """Floats of 16 or 32 bits as int32 in their order, neighbours 1 apart; both zeros are 0."""
    import torch

    narrow = values.itemsize == 2
    bits = values.contiguous().view(torch.int16 if narrow else torch.int32).int()
    sign = bits >> 31  # 0 or -1
    return (bits & (0x7FFF if narrow else 0x7FFF_FFFF)).bitwise_xor_(sign).sub_(sign)


def _numbers(keys: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The floats of `keys`."""
    import torch

    sign = keys >> 31
    size = (keys ^ sign).sub_(sign)
    if dtype == torch.float32:
        return size.bitwise_or_(sign.bitwise_and_(-0x8000_0000)).view(dtype)
    return size.bitwise_or_(sign.bitwise_and_(-0x8000)).to(torch.int16).view(dtype)
