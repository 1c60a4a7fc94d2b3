"""What the tensors of one update amount to: norms, singular values, or why they cannot be had.

Everything here touches values. Nothing needs the base: DoRA and IA3, which do, have no norm here.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from loratool.adapter import LazyUpdate
from loratool.experts import matrices
from loratool.linalg import is_finite
from loratool.lowrank import singular_values, weighted
from loratool.measures import measure
from loratool.scaling import rank_of, squared_norm
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
    Replacement,
    Rows,
    Sparse,
    matrix_shape,
    tensors_of,
)


@dataclass(frozen=True)
class MeasuredUpdate:
    """An update that is added to a weight, as it lies in its file.

    Attributes:
        scale: what its delta is multiplied by; None if it has none, or cannot be loaded.
        rank: of its factors; None if it has none.
        parameters: elements of its tensors.
        norm: ||delta||_F; None where it depends on the base, or cannot be had.
        experts: the singular values of each matrix of a low-rank update, or of experts; fp64,
            descending. Single entries beside the factors are not in them.
        entries: how many single entries it has beside its factors.
        fault: why its delta cannot be had, "" otherwise.
        digests: stored tensor -> its digest.
    """

    scale: float | None = None
    rank: int | None = None
    parameters: int = 0
    norm: float | None = None
    experts: tuple[tuple[float, ...], ...] = ()
    entries: int = 0
    fault: str = ""
    digests: dict[str, str] = field(default_factory=dict)

    @property
    def sigma(self) -> tuple[float, ...]:
        """The delta's singular values, descending; empty if it has no factors A and B.

        Of experts: at each place the root of the sum of all experts' squares, which is what a
        common rank keeps or loses.
        """
        if len(self.experts) == 1:
            return self.experts[0]
        count = max(map(len, self.experts), default=0)
        return tuple(math.hypot(*(s[k] for s in self.experts if k < len(s))) for k in range(count))

    @property
    def energies(self) -> list[float]:
        """Share of ||delta||_F^2 of each singular value; all 0 for a zero delta."""
        sigma = self.sigma
        top = sigma[0] if sigma else 0.0
        if top == 0:
            return [0.0 for _ in sigma]
        squares = [(value / top) ** 2 for value in sigma]
        return [square / math.fsum(squares) for square in squares]


def measure_update(update: LazyUpdate) -> MeasuredUpdate:
    """Read an update, and measure it row by row or through its factors."""
    digests = {tensor.name: measure(tensor).digest for tensor in update.stored}
    found = update.load()
    if found is None or isinstance(found, Rows | Replacement):
        return MeasuredUpdate(fault="there is nothing to change", digests=digests)
    added = found.added if isinstance(found, DoRA | Sparse) else found
    scale = None if isinstance(added, IA3) else added.scale
    rank = rank_of(found)
    parameters = sum(tensor.numel() for _, tensor in tensors_of(found))
    fault = misfit(found, update.shape) or _fault(found)
    if fault or isinstance(found, DoRA | IA3):
        return MeasuredUpdate(scale, rank, parameters, fault=fault, digests=digests)
    if isinstance(found, LowRank | Experts):
        parts = [singular_values([weighted(part)]).tolist() for part in matrices(found)]
        norm = math.hypot(*(value for sigma in parts for value in sigma))
        spectra = tuple(map(tuple, parts))
        return MeasuredUpdate(scale, rank, parameters, norm, spectra, digests=digests)
    norm = math.sqrt(squared_norm([(found, 1.0)], update.shape))
    if isinstance(found, Sparse):
        spectrum = tuple(singular_values([weighted(found.added)]).tolist())
        number = found.values.numel()
        return MeasuredUpdate(
            scale, rank, parameters, norm, (spectrum,), entries=number, digests=digests
        )
    return MeasuredUpdate(scale, rank, parameters, norm, digests=digests)


def _fault(update: Added) -> str:
    for part, values in tensors_of(update):
        if not values.numel():
            is_factor = isinstance(update, LowRank | Experts)
            return "its factors are empty" if is_factor else f"{part} is empty"
        if values.is_floating_point() and not is_finite(values):
            return "holds NaN or Inf"
    return ""


def misfit(update: Added, shape: Sequence[int]) -> str:
    """Why the tensors of an update make no delta of a weight of `shape`; "" if they do."""
    match update:
        case LowRank():
            if update.a.shape[0] != update.b.shape[1]:
                return "lora_A and lora_B have different ranks"
        case Experts():
            number, rank, _ = update.a.shape
            if update.b.shape[0] != number or update.b.shape[2] != rank:
                return "lora_A and lora_B have different ranks or numbers of experts"
        case LoHa():
            sizes = {_size(update.one), _size(update.other)}
            if None in sizes or len(sizes) > 1 or sizes != {matrix_shape(shape)}:
                return "its two matrices do not make one of the weight's shape"
        case LoKr():
            one, other = _size(update.one), _size(update.other)
            if one is None or other is None or _kron(one, other) != matrix_shape(shape):
                return "its two matrices do not make one of the weight's shape"
        case Dense():
            if update.values.numel() != math.prod(shape):
                return "its values do not have the weight's shape"
        case DoRA() | Sparse():
            return misfit(update.added, shape)
    return ""


def _kron(one: tuple[int, int], other: tuple[int, int]) -> tuple[int, int]:
    return one[0] * other[0], one[1] * other[1]


def _size(product: Product) -> tuple[int, int] | None:
    """The rows and columns of a matrix; None if its tensors do not go together."""
    rows = int(product.left.shape[0])
    if product.right is None:
        return rows, product.left.numel() // max(1, rows)
    columns, kernel = int(product.right.shape[1]), 1
    sides = (int(product.left.shape[1]), int(product.right.shape[0]))
    if product.core is not None:
        kernel = math.prod(product.core.shape[2:])
        return (rows, columns * kernel) if tuple(product.core.shape[:2]) == sides else None
    return (rows, columns) if sides[0] == sides[1] else None
