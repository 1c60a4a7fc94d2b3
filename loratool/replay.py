"""Replays a merge tile by tile, and counts what of it a merged tensor shows.

A hypothesis is a strength w and a way of merging. For each weight, with W the base's value, M the
merged one and D the delta of strength 1, it predicts the bits, P = round(W + w D), and bounds how
far any honest merge can be from the exact sum, whatever its order of additions:

    |M - (W + w D)| <= ulp(M) / 2 + 2 u |w D| + 2^-22 |w| ||b_i|| max_j ||a_j||

u is the unit roundoff of M's type, b_i a row of B and a_j a column of A. The first term is the last
rounding. The second lets the delta be rounded to M's type twice, as a product and after its
scaling. The third is a product in fp32: its terms and partial sums are each rounded by 2^-24
(Higham, "Accuracy and Stability of Numerical Algorithms", 2002, section 3.1; roundings of random
sign add up to less than ||b_i|| ||a_j|| 2^-24 times 2 among a billion weights, at any rank). A
weight outside the bound was not made by the hypothesis; chance has no part in it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch

from loratool.dtypes import dtype_name, torch_dtype
from loratool.errors import InputError
from loratool.exact import ExactDelta, exact_delta
from loratool.linalg import Workspace, is_finite, tiles
from loratool.residual import bit_patterns
from loratool.rounding import TILE_ELEMENTS, Nearest, round_to
from loratool.tally import Look, Support, Tally, Way, dot

_SAMPLE_ELEMENTS = 1 << 16
# Temporaries below 128 KiB come from memory that the process has; larger ones are page faults.
_SMALL_TILE = 12 << 10
_EXPONENT = 0x7FF << 52  # of a double's bits
_PRODUCT_ERROR = 2.0**-22
# A sum that was rounded to fp32 first may pass a half-way point by this.
_TIE_ERROR = 1 + 2.0**-10
# What a product of coarse factors may be off, by ||b_i|| ||a_j||: each rounded to the 8 bits of
# bf16, or to the 11 bits of fp16 and of the TF32 that GPUs multiply with.
_COARSE_ERROR = {"BF16": 2.0**-7}
_COARSE_ERROR_OTHERWISE = 2.0**-10
# From this many units in the last place on, rounding of weights that lie on a grid hides less than
# 0.4% of an update's mean (measured at strengths from 0.25 to 2.7; 1% from 4 units on, 6% from 2).
_VISIBLE_UNITS = 8


class Update(NamedTuple):
    """scale * b @ a: the delta at strength 1, in the orientation of the base's tensor.

    Attributes:
        b: (rows, r), any float dtype.
        a: (r, columns).
        scale: the adapter's.
    """

    b: torch.Tensor
    a: torch.Tensor
    scale: float


class Names(NamedTuple):
    """What errors call the two tensors."""

    base: str
    merged: str


class _Tile(NamedTuple):
    """One tile of a replay: flat fp64 buffers, masks, and columns of one number a row."""

    weight: torch.Tensor
    delta: torch.Tensor
    total: torch.Tensor
    merged: torch.Tensor
    half: torch.Tensor  # ulp(merged) / 2
    slack: torch.Tensor  # (rows, 1): the error of an fp32 product
    coarse: torch.Tensor  # (rows, 1): the error of a product of coarse factors
    predicted: torch.Tensor  # in the merged type
    changed: np.ndarray  # merged is not the base's
    informative: np.ndarray  # predicted is not the base's
    unequal: np.ndarray  # merged is not as predicted
    start: int


class Replay:
    """A merged tensor beside the base's, and the update that it should contain.

    Attributes:
        dtype: the type that the merged values were rounded to; the file's may be wider.
    """

    def __init__(
        self,
        base: torch.Tensor,
        merged: torch.Tensor,
        update: Update,
        workspace: Workspace,
        names: Names,
        dtype: str | None = None,
    ) -> None:
        """Look at a sample of the merged values for their precision; the rest comes later.

        Args:
            base: (rows, columns), any float dtype; never written, like all the others.
            merged: (rows, columns), any float dtype.
            update: its delta has the same shape.
            workspace: where to calculate.
            names: for errors.
            dtype: overrules what the sample says.
        """
        self._base, self._merged, self._update = base, merged, update
        self._workspace, self._names = workspace, names
        step = -(-base.numel() // _SAMPLE_ELEMENTS)
        self._sampled = slice(min(step // 2, base.shape[0] - 1), None, step)
        self.dtype = dtype or precision(merged[self._sampled])
        self._kind = torch_dtype(self.dtype)
        finfo = torch.finfo(self._kind)
        self._epsilon, self._smallest = finfo.eps, finfo.smallest_normal
        self._can_cast = not _holds(self._kind, base.dtype)
        factors = (update.b, update.a)
        self._can_round = any(not torch.equal(f.to(self._kind).to(f.dtype), f) for f in factors)

    @property
    def columns(self) -> int:
        """Of both tensors."""
        return int(self._base.shape[1])

    def sample(self) -> Replay:
        """The same on rows evenly spread, of about 65,536 weights; all of a smaller tensor."""
        if self._sampled.step == 1:
            return self
        b, a, scale = self._update
        update = Update(b[self._sampled], a, scale)
        tensors = (self._base[self._sampled], self._merged[self._sampled], update)
        return Replay(*tensors, self._workspace, self._names, self.dtype)

    def ways(self) -> list[Way]:
        """Every way that makes a difference here, those with the fewest roundings first."""
        roundings = [(False, False), (False, True), (True, False), (True, True)]
        return [
            Way(cast, factors, delta)
            for cast in ([False, True] if self._can_cast else [False])
            for factors, delta in (roundings if self._can_round else roundings[:2])
        ]

    def tally(self, strength: float, way: Way, look: Look = "replay") -> Tally:
        """Replay one hypothesis over the whole tensor, in one pass.

        Args:
            strength: how much of the update.
            way: how it was merged.
            look: what else to count.

        Raises:
            InputError: NaN or Inf in a tensor.
        """
        found = Tally(strength, way)
        delta = self._delta(strength, way)
        found.update = delta.squared_norm()
        if way.delta:
            found.noise += _benford_noise(self._epsilon) * found.update
        for tile in self._tiles(delta, way, TILE_ELEMENTS if look == "replay" else _SMALL_TILE):
            self._count(tile, found)
            if look == "limits":
                lows, highs = self._interval(tile)
                found.low = max(found.low, float(lows.max()))
                found.high = min(found.high, float(highs.min()))
            elif look == "squares":
                _count_squares(tile, found)
            elif look == "neighbours":
                self._count_neighbours(tile, found)
            found.noise += dot(tile.half, tile.half) / 3
            change = torch.sub(tile.merged, tile.weight, out=tile.total)
            found.along += dot(change, tile.delta)
            found.change += dot(change, change)
        if not math.isfinite(found.change):
            self._require_finite()
        if look == "limits":
            ends = (found.low * strength, found.high * strength)
            found.low, found.high = ends if strength > 0 else ends[::-1]
        return found

    def supported(self, strength: float, way: Way) -> Support:
        """The strengths that put the most weights within their bounds.

        Every weight allows an interval of strengths; the result is where most of them overlap. For
        samples: all intervals are held at once.

        Args:
            strength: about how strong; the errors of a product are those of this one.
            way: how it was merged.
        """
        small = self._tiles(self._delta(strength, way), way, _SMALL_TILE)
        intervals = [self._interval(tile) for tile in small]
        lows, highs = (torch.cat(ends) for ends in zip(*intervals, strict=True))
        low, high, missing = float(lows.max()), float(highs.min()), 0
        if low > high:
            low, high, missing = _deepest(lows, highs)
        low, high = sorted((low * strength, high * strength))
        return Support(low, high, missing)

    def _delta(self, strength: float, way: Way) -> ExactDelta:
        b, a, scale = self._update
        if way.factors:
            b, a = b.to(self._kind), a.to(self._kind)
        return exact_delta([(b, a, strength * scale)])

    def _tiles(self, delta: ExactDelta, way: Way, limit: int) -> Iterator[_Tile]:
        columns = max(1, self._base.shape[1])
        elements = min(self._base.shape[0], max(1, limit // columns)) * columns
        rounder, first_rounder = (Nearest(self.dtype, elements) for _ in range(2))
        zero = torch.zeros(1, dtype=torch.float64).expand(elements)
        reach = delta.left.norm(dim=1, keepdim=True) * delta.right.norm(dim=0).max()
        slack = reach * _PRODUCT_ERROR + self._smallest * self._epsilon
        coarse = reach * _COARSE_ERROR.get(self.dtype, _COARSE_ERROR_OTHERWISE)
        for rows in tiles(self._base, limit):
            before, after = self._base[rows], self._merged[rows]
            size = before.numel()
            w, d, t, m, h = (self._workspace.take(n, (size,), torch.float64) for n in "wdtmh")
            cast = self._cast(before)
            w.view(before.shape).copy_(cast if way.cast else before)
            delta.rows(rows, d.view(before.shape))
            added = d
            if way.delta:
                added = h.copy_(first_rounder.round(d, d, zero[:size]))
            predicted = rounder.round(torch.add(w, added, out=t), w, added)
            m.view(after.shape).copy_(after)
            bits = [bit_patterns(x.to(after.dtype)) for x in (cast, after, predicted)]
            yield _Tile(
                w, d, t, m, self._half_units(m, h), slack[rows], coarse[rows], predicted,
                differ(bits[1], bits[0]), differ(bits[2], bits[0]), differ(bits[1], bits[2]),
                rows.start * columns,
            )  # fmt: skip

    def _cast(self, values: torch.Tensor) -> torch.Tensor:
        if values.dtype == torch.float64:  # torch would round twice
            return round_to(values, self.dtype)
        return values.to(self._kind)

    def _half_units(self, values: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
        """ulp(values) / 2 in the merged type."""
        exponents = torch.bitwise_and(
            values.view(torch.int64), _EXPONENT, out=out.view(torch.int64)
        )
        return exponents.view(torch.float64).clamp_(min=self._smallest).mul_(self._epsilon / 2)

    def _count(self, tile: _Tile, found: Tally) -> None:
        changed, informative, unequal = tile.changed, tile.informative, tile.unequal
        size, told = changed.size, _number(informative)
        wrong = _number(unequal)
        found.elements += size
        found.informative += told
        found.equal += size - wrong
        found.same += size - _number(changed)
        if not wrong:
            found.agreeing += told
            found.reproduced += told
            return
        off = self._workspace.take("off", (size,), torch.float64)
        torch.sub(tile.merged, tile.total, out=off).abs_()
        outside = torch.gt(off, self._bound(tile)).numpy()
        found.agreeing += _number(informative & changed & ~outside)
        found.reproduced += _number(informative & ~unequal)
        if (count := _number(outside)) and found.first_outside < 0:
            found.first_outside = tile.start + int(outside.argmax())
        found.outside += count

    def _bound(self, tile: _Tile) -> torch.Tensor:
        bound = self._workspace.take("bound", tuple(tile.delta.shape), torch.float64)
        torch.abs(tile.delta, out=bound).mul_(self._epsilon).add_(tile.half, alpha=_TIE_ERROR)
        return bound.view(len(tile.slack), -1).add_(tile.slack).view(-1)

    def _count_neighbours(self, tile: _Tile, found: Tally) -> None:
        """What tells coarse products and rounding at random from changes."""
        found.whole.add(tile.merged - tile.weight, tile.delta, tile.merged.numel())
        off = (tile.merged - tile.total).abs_()
        coarse = self._bound(tile).view(len(tile.slack), -1).add_(tile.coarse).view(-1)
        found.coarse += int(torch.count_nonzero(off > coarse))
        unit = self._half_units(tile.total, torch.empty_like(off)).mul_(2)
        found.beyond += int(torch.count_nonzero(off > unit * _TIE_ERROR))
        chance = (tile.predicted.double() - tile.total).abs_().div_(unit)
        near = chance < 0.25
        for group, chances in zip((near, ~near), found.chances, strict=True):
            share = chance * group
            chances.far += _number(group.numpy() & tile.unequal)
            chances.expected += float(share.sum())
            chances.variance += float(share.sum()) - dot(share, share)

    def _interval(self, tile: _Tile) -> tuple[torch.Tensor, torch.Tensor]:
        """The strengths that put each weight within its bound, as shares of the replayed one.

        |x - t| <= c + epsilon |t| with x = R / S and c the rest of the bound over |S|. Where S is
        0 any strength will do.
        """
        size = tile.delta.abs()
        change = (tile.merged - tile.weight).mul_(tile.delta.sign())
        rest = tile.half * _TIE_ERROR
        rest = rest.view(len(tile.slack), -1).add_(tile.slack).view(-1)
        low, high = (change - rest).div_(size), (change + rest).div_(size)
        more, less = 1 + self._epsilon, 1 - self._epsilon
        low = torch.where(low > 0, low / more, low / less)
        return low, torch.where(high > 0, high / less, high / more)

    def _require_finite(self) -> None:
        for tensor, name, what in (
            (self._base, self._names.base, "repair the base"),
            (
                self._merged,
                self._names.merged,
                "no merge of finite weights gives that; merge again",
            ),
        ):
            if not is_finite(tensor):
                raise InputError(f"{name}: holds NaN or Inf: {what}")


def differ(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """Where values differ by their bits; -0 is 0."""
    found: np.ndarray = one != other
    if found.any():
        found &= ((one | other) << 1) != 0
    return found


def _count_squares(tile: _Tile, found: Tally) -> None:
    change = tile.merged - tile.weight
    for mask, moments in (
        (tile.delta.abs() >= 2 * _VISIBLE_UNITS * tile.half, found.visible),
        (torch.from_numpy(tile.informative), found.told),
    ):
        moments.add(change * mask, tile.delta * mask, int(torch.count_nonzero(mask)))


def _number(mask: np.ndarray) -> int:
    return int(np.count_nonzero(mask))


def _benford_noise(epsilon: float) -> float:
    """E[ulp(x)^2 / 12] / x^2 over significands distributed by Benford's law, up to 1 / x^2.

    ulp(x) = epsilon x / m with the significand m in [1, 2) of density 1 / (m ln 2), and E[m^-2] =
    3 / (8 ln 2).
    """
    return epsilon**2 * 3 / (8 * math.log(2)) / 12


def precision(values: torch.Tensor) -> str:
    """The dtype that holds these values: a narrower one than their own, if that is a wide float."""
    if not values.is_floating_point():
        return dtype_name(values.dtype)
    values = torch.where(values.isnan(), 0, values) if values.itemsize > 2 else values
    for kind in (torch.bfloat16, torch.float16, torch.float32):
        if kind.itemsize >= values.itemsize:
            break
        if values.itemsize > 2 and torch.equal(values.to(kind).to(values.dtype), values):
            return dtype_name(kind)
    return dtype_name(values.dtype)


def _holds(kind: torch.dtype, other: torch.dtype) -> bool:
    """Whether every number of the type `other` is one of the type `kind`."""
    if kind == other or (other.itemsize == 1 and kind.itemsize > 1):
        return True
    return kind.itemsize > other.itemsize > 1


def _deepest(lows: torch.Tensor, highs: torch.Tensor) -> tuple[float, float, int]:
    """Where most of the intervals [lows, highs] overlap, and how many do not."""
    low, high = lows.sort().values, highs.sort().values
    ended = torch.searchsorted(high, low)
    depth = torch.arange(1, len(low) + 1) - ended
    best = int(depth.argmax())
    return float(low[best]), float(high[ended[best]]), len(low) - int(depth[best])
