"""What updates add to a weight, row by row in fp64, with the same bits on every machine.

A weight of any shape is seen as a matrix: (out, in) as it is, a convolution's as (out, in times
kernel), experts' as (experts times rows, columns), a bias as (n, 1). Low-rank updates are one exact
product together, to which the sum of all single entries is added; what other kinds add is computed
element by element, in an order that is fixed.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Protocol

import torch

from loratool.exact import ExactDelta, exact_delta
from loratool.linalg import tiles
from loratool.rounding import TILE_ELEMENTS
from loratool.updates import (
    IA3,
    Added,
    Dense,
    DoRA,
    Experts,
    LoHa,
    LoKr,
    LowRank,
    Product,
    Sparse,
    matrix_shape,
)


class Delta(Protocol):
    """What is added to a weight that is seen as a matrix."""

    @property
    def needs_base(self) -> bool:
        """Whether it depends on the base's values: then it cannot be subtracted again."""
        ...

    @property
    def shape(self) -> tuple[int, int]:
        """(rows, columns)."""
        ...

    def rows(self, rows: slice, out: torch.Tensor, base: torch.Tensor | None = None) -> None:
        """Write some rows.

        Args:
            rows: which.
            out: (n, columns), fp64; overwritten.
            base: (n, columns), fp64; the base's values, needed if `needs_base`.
        """
        ...

    def squared_norm(self) -> float | None:
        """||delta||_F^2 where it can be had without computing all rows."""
        ...


def delta_of(
    parts: Sequence[tuple[Added, float]], shape: Sequence[int], base: torch.Tensor | None = None
) -> Delta:
    """The weighted sum of updates of one weight; the order of the parts changes no bit.

    Args:
        parts: at least one, in the orientation of the weight, with weights; those of kinds that
            are not linear with weight 1.
        shape: of the weight.
        base: the weight's values, of this shape; needed for DoRA with a magnitude a column.

    Raises:
        ValueError: the parts do not have the weight's size.
    """
    matrix = matrix_shape(shape, any(isinstance(update, Experts) for update, _ in parts))
    low_rank = [(u.added if isinstance(u, Sparse) else u, w) for u, w in parts]
    products = [(u.b, u.a, w * u.scale) for u, w in low_rank if isinstance(u, LowRank)]
    sparse = [(u, w) for u, w in parts if isinstance(u, Sparse)]
    experts = [(u, w) for u, w in parts if isinstance(u, Experts)]
    terms: list[Delta] = [exact_delta(products)] if products else []
    if sparse:
        terms[0] = _WithEntries(terms[0], *summed_entries(sparse))
    if experts:
        terms.append(_experts(experts))
    for update, weight in parts:
        if not isinstance(update, LowRank | Sparse | Experts):
            terms.append(_term(update, weight, matrix, shape, base))
    for term in terms:
        if term.shape != matrix:
            raise ValueError(f"a delta of {term.shape} for a weight of {tuple(shape)}")
    return terms[0] if len(terms) == 1 else _Sum(tuple(terms))


def _term(
    update: Added,
    weight: float,
    matrix: tuple[int, int],
    shape: Sequence[int],
    base: torch.Tensor | None,
) -> Delta:
    match update:
        case Dense():
            return _Values(update.values.reshape(matrix), weight * update.scale)
        case LoHa():
            return _Hadamard(_rows_of(update.one), _rows_of(update.other), weight * update.scale)
        case LoKr():
            other = _rows_of(update.other)
            return _Kronecker(_all_rows(_rows_of(update.one)), other, weight * update.scale)
        case IA3():
            return _Scaled(_along(update.factors, update.axis, matrix, shape) - 1, matrix, weight)
        case DoRA():
            added = delta_of([(update.added, 1.0)], shape)
            magnitude = _along(update.magnitude, update.axis, matrix, shape)
            norms = _column_norms(added, base, shape) if update.axis else None
            return _Normalized(added, magnitude, norms)
    raise TypeError(f"{type(update).__name__} is not added to a weight")


def _along(
    values: torch.Tensor, axis: int, matrix: tuple[int, int], shape: Sequence[int]
) -> torch.Tensor:
    """Values of rows as (rows, 1), of columns as (1, columns); inputs repeat along the kernel."""
    values = values.double().reshape(-1)
    if axis == 0:
        return values.reshape(matrix[0], 1)
    return values.repeat_interleave(math.prod(shape[2:])).reshape(1, matrix[1])


@dataclass(frozen=True)
class _Sum:
    """Several terms; with more than two, each element's are added from the least up."""

    terms: tuple[Delta, ...]

    @property
    def needs_base(self) -> bool:
        return any(term.needs_base for term in self.terms)

    @property
    def shape(self) -> tuple[int, int]:
        return self.terms[0].shape

    def rows(self, rows: slice, out: torch.Tensor, base: torch.Tensor | None = None) -> None:
        parts = torch.empty(len(self.terms), *out.shape, dtype=torch.float64)
        for term, part in zip(self.terms, parts, strict=True):
            term.rows(rows, part, base)
        if len(self.terms) > 2:
            parts = parts.sort(dim=0).values
        out.copy_(parts[0])
        for part in parts[1:]:
            out.add_(part)

    def squared_norm(self) -> None:
        return None


@dataclass(frozen=True)
class _WithEntries:
    """A term, and single entries that are added to it.

    Attributes:
        term: what they are added to.
        positions: (k,) int64, ascending, all different: in the matrix, row by row.
        values: (k,) fp64.
    """

    term: Delta
    positions: torch.Tensor
    values: torch.Tensor
    needs_base: ClassVar[bool] = False

    @property
    def shape(self) -> tuple[int, int]:
        return self.term.shape

    def rows(self, rows: slice, out: torch.Tensor, base: torch.Tensor | None = None) -> None:
        self.term.rows(rows, out)
        start, stop, _ = rows.indices(self.shape[0])
        ends = torch.tensor([start, stop]) * self.shape[1]
        first, last = torch.searchsorted(self.positions, ends).tolist()
        if first == last:
            return
        places = self.positions[first:last] - ends[0]
        flat = out.view(-1)
        flat[places] = flat[places].add_(self.values[first:last])

    def squared_norm(self) -> None:
        return None


def summed_entries(parts: Sequence[tuple[Sparse, float]]) -> tuple[torch.Tensor, torch.Tensor]:
    """The weighted sum of the single entries of updates; their order changes no bit.

    Args:
        parts: updates of one weight, and weights.

    Returns:
        positions (k,) int64, ascending and all different, and values (k,) fp64. What several have
        at one place is added from the least up.
    """
    values = torch.cat([update.values.double() * (w * update.scale) for update, w in parts])
    positions = torch.cat([update.positions for update, _ in parts])
    if len(parts) == 1:
        return positions, values
    order = values.argsort(stable=True)
    order = order[positions[order].argsort(stable=True)]
    positions, values = positions[order], values[order]
    unique, counts = torch.unique_consecutive(positions, return_counts=True)
    starts = counts.cumsum(0) - counts
    total = values[starts]
    for place in range(1, int(counts.max()) if len(counts) else 0):
        more = counts > place
        total[more] += values[starts[more] + place]
    return unique, total


@dataclass(frozen=True)
class _Batched:
    """One exact product for each expert: (E, rows, K) by (E, K, columns)."""

    parts: tuple[ExactDelta, ...]
    needs_base: ClassVar[bool] = False

    @property
    def shape(self) -> tuple[int, int]:
        rows, columns = self.parts[0].shape
        return len(self.parts) * rows, columns

    def rows(self, rows: slice, out: torch.Tensor, base: torch.Tensor | None = None) -> None:
        size = self.parts[0].shape[0]
        start, stop, _ = rows.indices(self.shape[0])
        done = 0
        while start < stop:
            number, first = divmod(start, size)
            count = min(size - first, stop - start)
            self.parts[number].rows(slice(first, first + count), out[done : done + count])
            start, done = start + count, done + count

    def squared_norm(self) -> float:
        return sum(part.squared_norm() for part in self.parts)


def _experts(parts: Sequence[tuple[Experts, float]]) -> _Batched:
    numbers = range(len(parts[0][0].a))
    return _Batched(
        tuple(
            exact_delta([(u.b[number], u.a[number], w * u.scale) for u, w in parts])
            for number in numbers
        )
    )


@dataclass(frozen=True)
class _Values:
    """factor * values."""

    values: torch.Tensor
    factor: float = 1.0
    needs_base: ClassVar[bool] = False

    @property
    def shape(self) -> tuple[int, int]:
        rows, columns = self.values.shape
        return rows, columns

    def rows(self, rows: slice, out: torch.Tensor, base: torch.Tensor | None = None) -> None:
        out.copy_(self.values[rows])
        if self.factor != 1:
            out.mul_(self.factor)

    def squared_norm(self) -> float:
        total = 0.0
        for rows in tiles(self.values, TILE_ELEMENTS):
            total += float(self.values[rows].double().square().sum())
        return total * self.factor**2


@dataclass(frozen=True)
class _Hadamard:
    """factor * one o other."""

    one: Delta
    other: Delta
    factor: float
    needs_base: ClassVar[bool] = False

    @property
    def shape(self) -> tuple[int, int]:
        return self.one.shape

    def rows(self, rows: slice, out: torch.Tensor, base: torch.Tensor | None = None) -> None:
        self.one.rows(rows, out)
        other = torch.empty_like(out)
        self.other.rows(rows, other)
        out.mul_(other).mul_(self.factor)

    def squared_norm(self) -> None:
        return None


@dataclass(frozen=True)
class _Kronecker:
    """factor * kron(one, other): row i of it is row i // b of `one` with row i % b of `other`."""

    one: torch.Tensor
    other: Delta
    factor: float
    needs_base: ClassVar[bool] = False

    @property
    def shape(self) -> tuple[int, int]:
        rows, columns = self.other.shape
        return self.one.shape[0] * rows, self.one.shape[1] * columns

    def rows(self, rows: slice, out: torch.Tensor, base: torch.Tensor | None = None) -> None:
        size, columns = self.other.shape
        start, stop, _ = rows.indices(self.shape[0])
        done = 0
        while start < stop:
            number, first = divmod(start, size)
            count = min(size - first, stop - start)
            small = torch.empty(count, columns, dtype=torch.float64)
            self.other.rows(slice(first, first + count), small)
            part = out[done : done + count].view(count, -1, columns)
            torch.mul(self.one[number][None, :, None], small[:, None, :], out=part)
            start, done = start + count, done + count
        out.mul_(self.factor)

    def squared_norm(self) -> float | None:
        other = self.other.squared_norm()
        return None if other is None else other * float(self.one.square().sum()) * self.factor**2


@dataclass(frozen=True)
class _Scaled:
    """weight * factors * base, factors being (rows, 1) or (1, columns)."""

    factors: torch.Tensor
    shape: tuple[int, int]
    weight: float
    needs_base: ClassVar[bool] = True

    def rows(self, rows: slice, out: torch.Tensor, base: torch.Tensor | None = None) -> None:
        factors = self.factors[rows] if self.factors.shape[0] == self.shape[0] else self.factors
        torch.mul(_given(base), factors, out=out)
        if self.weight != 1:
            out.mul_(self.weight)

    def squared_norm(self) -> None:
        return None


@dataclass(frozen=True)
class _Normalized:
    """magnitude * (base + added) / norm - base.

    Attributes:
        added: the delta.
        magnitude: (rows, 1) or (1, columns).
        norms: (1, columns); None for the norms of rows, which come with each tile.
    """

    added: Delta
    magnitude: torch.Tensor
    norms: torch.Tensor | None
    needs_base: ClassVar[bool] = True

    @property
    def shape(self) -> tuple[int, int]:
        return self.added.shape

    def rows(self, rows: slice, out: torch.Tensor, base: torch.Tensor | None = None) -> None:
        self.added.rows(rows, out)
        base = _given(base)
        out.add_(base)
        norms = self.norms
        magnitude = self.magnitude
        if norms is None:
            norms = _fixed_sum(out.square(), 1).sqrt_()
            magnitude = magnitude[rows]
        # What is zero everywhere stays so, whatever its magnitude.
        factors = torch.where(norms == 0, 1.0, magnitude / norms)
        out.mul_(factors).sub_(base)

    def squared_norm(self) -> None:
        return None


def _given(base: torch.Tensor | None) -> torch.Tensor:
    if base is None:
        raise AssertionError("this update needs the base's values")
    return base


def _column_norms(added: Delta, base: torch.Tensor | None, shape: Sequence[int]) -> torch.Tensor:
    """The norms of base + added over rows and kernel, for each input: (1, columns)."""
    weight = _given(base).reshape(added.shape)
    total = torch.zeros(1, added.shape[1], dtype=torch.float64)
    for rows in tiles(weight, TILE_ELEMENTS):
        tile = torch.empty(weight[rows].shape, dtype=torch.float64)
        added.rows(rows, tile)
        tile.add_(weight[rows])
        total.add_(_fixed_sum(tile.square_(), 0))
    kernel = math.prod(shape[2:])
    by_input = _fixed_sum(total.view(-1, kernel), 1)
    return by_input.sqrt().repeat_interleave(kernel).view(1, -1)


def _fixed_sum(values: torch.Tensor, dim: int) -> torch.Tensor:
    """The sum along a dimension, which is kept; its order does not depend on the machine."""
    while (size := values.shape[dim]) > 1:
        half = size // 2
        total = values.narrow(dim, 0, half) + values.narrow(dim, half, half)
        rest = values.narrow(dim, 2 * half, size - 2 * half)
        values = torch.cat([total, rest], dim) if size % 2 else total
    return values


def _rows_of(product: Product) -> Delta:
    """A matrix in factors; the core of a Tucker form is worked into the right one."""
    if product.right is None:
        return _Values(product.left.reshape(product.left.shape[0], -1))
    return exact_delta([(product.left, folded(product), 1.0)])


def folded(product: Product) -> torch.Tensor:
    """The right factor with the core worked in: (r, in), or (r, in * kernel), fp64 if there is one.

    Raises:
        ValueError: the matrix is not in factors.
    """
    if product.right is None:
        raise ValueError("the matrix is whole")
    if product.core is None:
        return product.right
    core, right = product.core, product.right
    rank, kernel = core.shape[0], math.prod(core.shape[2:])
    by_kernel = core.reshape(rank, core.shape[1], kernel).transpose(1, 2)  # (r, kernel, r)
    exact = exact_delta([(by_kernel.reshape(rank * kernel, -1), right, 1.0)])
    rows = _all_rows(exact).view(rank, kernel, -1)
    return rows.transpose(1, 2).reshape(rank, -1)


def _all_rows(delta: Delta) -> torch.Tensor:
    out = torch.empty(delta.shape, dtype=torch.float64)
    delta.rows(slice(None), out)
    return out


def dense(
    update: LowRank | Sparse | Experts | Dense | LoHa | LoKr, shape: Sequence[int]
) -> torch.Tensor:
    """The whole delta in fp64, of the weight's shape."""
    return _all_rows(delta_of([(update, 1.0)], shape)).view(tuple(shape))
