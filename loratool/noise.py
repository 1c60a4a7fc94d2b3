"""What rounding a fine-tune to its type adds to its difference from the base.

A fine-tune is trained in more bits than it is stored in. Its last rounding adds to every weight an
error of up to half a unit in the last place (ulp), which is no update: as a matrix it has nearly
full rank, and its singular values end at an edge. Nothing below that edge can be told from it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import torch

from loratool.linalg import tiles

# Where the largest singular value of noise still lies once in a thousand times: the 99.9% quantile
# of the Tracy-Widom law of order 1.
_RARE = 3.27
# Steps of the searches for one number: each halves, or divides by 1.6, where it may lie.
_HALVINGS, _SECTIONS = 60, 40


@dataclass(frozen=True)
class Noise:
    """The rounding noise in one difference, as far as its singular values depend on it.

    Attributes:
        rows: (out,) fp64, the expected squared norm of the noise in each row.
        columns: (in,) fp64, in each column.
        total: ||D||_F^2 of the difference that it is in.
    """

    rows: torch.Tensor
    columns: torch.Tensor
    total: float

    @property
    def energy(self) -> float:
        """Expected ||noise||_F^2."""
        return float(self.rows.sum())

    @cached_property
    def edge(self) -> float:
        """What one singular value of the noise in a thousand matrices passes, as a rule.

        Where noise ends for large matrices, and what the largest value varies by around that: for
        equal variances v its square is v (mu + s TW), mu = (sqrt(out) + sqrt(in))^2 and
        s = (sqrt(out) + sqrt(in)) (1 / sqrt(out) + 1 / sqrt(in))^(1/3) (Johnstone, 2001, "On the
        distribution of the largest eigenvalue in principal components analysis").
        """
        long, short = math.sqrt(len(self.rows)), math.sqrt(len(self.columns))
        spread = (1 / long + 1 / short) ** (1 / 3) / (long + short)
        return noise_edge(self.rows, self.columns) * math.sqrt(1 + _RARE * spread)

    @property
    def floor(self) -> float:
        """The edge as a share of ||D||_F; 0 for a zero difference."""
        return self.edge / math.sqrt(self.total) if self.total > 0 else 0.0


def rounding_noise(delta: torch.Tensor, after: torch.Tensor) -> Noise:
    """The noise that rounding the fine-tune to its type has left in a difference.

    Rounding errors that are spread over a whole cell have the variance ulp^2 / 12. Where an update
    is much smaller than the ulp, most weights stay as they are, and the few that flip are almost
    nothing but error: there the noise is the difference itself. So the variance in all weights of
    one binade, which have one ulp, is taken as the smaller of ulp^2 / 12 and their mean squared
    difference. The base counts as exact, since training starts from its values as they are stored.

    On simulated fine-tunes the edge is right to 2% where at least 95% of the update survived the
    rounding, and too low, so that too much is kept, where less did.

    Args:
        delta: (out, in), fine-tune minus base, fp32.
        after: (out, in), the fine-tune's values in the type that they were rounded to.
    """
    format = torch.finfo(after.dtype)
    least, greatest = math.frexp(format.smallest_normal)[1], math.frexp(format.max)[1]
    counts = torch.zeros(greatest - least + 1, dtype=torch.float64)
    energies = torch.zeros_like(counts)
    for part, binades in _binades(after, least, greatest):
        squares = delta[part].reshape(-1).double().square_()
        counts += torch.bincount(binades.reshape(-1), minlength=len(counts))
        energies += torch.bincount(binades.reshape(-1), squares, len(counts))
    steps = torch.arange(least, greatest + 1, dtype=torch.float64) - 1
    spread = (format.eps * 2.0**steps).square() / 12
    variances = torch.minimum(spread, energies / counts.clamp(min=1))
    rows = torch.zeros(delta.shape[0], dtype=torch.float64)
    columns = torch.zeros(delta.shape[1], dtype=torch.float64)
    for part, binades in _binades(after, least, greatest):
        tile = variances[binades]
        rows[part] = tile.sum(dim=1)
        columns += tile.sum(dim=0)
    return Noise(rows, columns, float(energies.sum()))


def _binades(
    values: torch.Tensor, least: int, greatest: int
) -> Iterator[tuple[slice, torch.Tensor]]:
    """Rows of a matrix and their exponents, counted from `least`, which subnormals share."""
    for part in tiles(values):
        tile = values[part]
        tile = tile if tile.dtype == torch.float64 else tile.float()
        yield part, torch.frexp(tile).exponent.clamp_(least, greatest).sub_(least)


def noise_edge(rows: torch.Tensor, columns: torch.Tensor) -> float:
    """The largest singular value of large random matrices of independent entries of mean 0.

    The variance of entry (i, j) is taken as rows[i] columns[j] / sum: weights differ in size by
    rows and by columns, and the edge of a noise of the same energy can be several times higher
    then. Above the spectrum the traces p, q > 0 of the resolvent (with the sign turned) solve
    x p = sum_i r_i / (1 - r_i q) and x q = sum_j c_j / (1 - c_j p) for variances r_i c_j (Hachem,
    Loubaton and Najim, 2007, "Deterministic equivalents for certain functionals of large random
    matrices"). Both sides times q and p equal the same s, so that x = s / (p(s) q(s)), and the
    squared edge is the least such x. Equal variances v give v (sqrt(out) + sqrt(in))^2. Where a few
    rows hold most of the noise of a small matrix it is up to 7% too high.

    Args:
        rows: (out,) fp64, expected squared norms of the rows.
        columns: (in,) fp64, of the columns; of the same sum.
    """
    total = float(rows.sum())
    if total <= 0:
        return 0.0
    r, c = rows / rows.max(), columns / columns.max()
    scale = float(rows.max()) * float(columns.max()) / total

    def squared(logarithm: float) -> float:
        s = math.exp(logarithm)
        return s / (_solved(r, s) * _solved(c, s))

    low, high = math.log(1e-3), math.log(10.0 * max(len(rows), len(columns)))
    golden = (math.sqrt(5) - 1) / 2
    left, right = high - golden * (high - low), low + golden * (high - low)
    at_left, at_right = squared(left), squared(right)
    for _ in range(_SECTIONS):
        if at_left < at_right:
            high, right, at_right = right, left, at_left
            left = high - golden * (high - low)
            at_left = squared(left)
        else:
            low, left, at_left = left, right, at_right
            right = low + golden * (high - low)
            at_right = squared(right)
    return math.sqrt(scale * min(at_left, at_right))


def _solved(shares: torch.Tensor, s: float) -> float:
    """The q in (0, 1) at which sum_i share_i q / (1 - share_i q) is s; the largest share is 1."""
    low, high = 0.0, 1.0
    for _ in range(_HALVINGS):
        q = (low + high) / 2
        scaled = shares * q
        if float((scaled / (1 - scaled)).sum()) < s:
            low = q
        else:
            high = q
    return (low + high) / 2
