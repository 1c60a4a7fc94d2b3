"""Random updates of every kind that can become low-rank, for tests and for hypothesis."""

from __future__ import annotations

import math

import torch
from hypothesis import strategies as st

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

Shape = tuple[int, ...]
F32 = torch.float32


def randn(seed: int, *shape: int) -> torch.Tensor:
    """Normal random numbers in fp64."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def product(seed: int, rows: int, rank: int, columns: int, kernel: Shape = ()) -> Product:
    """A matrix in factors; with a kernel, in the Tucker form of a convolution's weight."""
    left, right = randn(seed, rows, rank), randn(seed + 1, rank, columns)
    core = randn(seed + 2, rank, rank, *kernel) / rank if kernel else None
    return Product(left, right, core)


def loha(seed: int, shape: Shape, rank: int, other: int, scale: float, tucker: bool) -> LoHa:
    """A LoHa update of a weight of `shape`."""
    out, width, kernel = shape[0], shape[1], shape[2:]
    if tucker:
        sides = (
            product(seed, out, rank, width, kernel),
            product(seed + 3, out, other, width, kernel),
        )
    else:
        width *= math.prod(kernel)
        sides = product(seed, out, rank, width), product(seed + 3, out, other, width)
    return LoHa(*sides, scale)


@st.composite
def shapes(draw: st.DrawFn, top: int = 14) -> Shape:
    """Of linear and convolution weights."""
    kernel = draw(st.sampled_from([(), (), (3,), (2, 3)]))
    return (draw(st.integers(1, top)), draw(st.integers(1, top)), *kernel)


_SEEDS = st.integers(0, 10_000)
_RANKS = st.integers(1, 4)
_SCALES = st.sampled_from([1.0, 2.0, 16 / 3, 0.1, -0.7])


def sparse(
    seed: int, shape: Shape, rank: int, count: int, scale: float = 1.0, kind: torch.dtype = F32
) -> Sparse:
    """A low-rank update of a weight of `shape`, with single entries at random places."""
    rows, columns = matrix_shape(shape)
    added = LowRank(randn(seed, rank, columns).to(kind), randn(seed + 1, rows, rank).to(kind), 0.5)
    places = randn(seed + 2, rows * columns).argsort()[: min(count, rows * columns)].sort().values
    return Sparse(added, places, randn(seed + 3, len(places)).to(kind), scale)


@st.composite
def sparses(draw: st.DrawFn) -> tuple[Sparse, Shape]:
    """Low-rank updates with single entries."""
    shape = draw(shapes())
    count = draw(st.integers(0, math.prod(shape)))
    return sparse(draw(_SEEDS), shape, draw(_RANKS), count, draw(_SCALES)), shape


@st.composite
def lohas(draw: st.DrawFn) -> tuple[LoHa, Shape]:
    """LoHa updates, with and without a core."""
    shape = draw(shapes())
    tucker = len(shape) > 2 and draw(st.booleans())
    return loha(draw(_SEEDS), shape, draw(_RANKS), draw(_RANKS), draw(_SCALES), tucker), shape


@st.composite
def lokrs(draw: st.DrawFn) -> tuple[LoKr, Shape]:
    """LoKr updates whose matrices are whole, in factors, or with a core."""
    a, c, seed = draw(st.integers(1, 4)), draw(st.integers(1, 4)), draw(_SEEDS)
    b, d, *kernel = draw(shapes(5))
    one = product(seed, a, draw(_RANKS), c) if draw(st.booleans()) else Product(randn(seed, a, c))
    form = draw(st.sampled_from(["whole", "factors", "tucker"]))
    rank = draw(_RANKS)
    if form == "whole":
        other = Product(randn(seed + 5, b, d, *kernel))
    elif form == "tucker" and kernel:
        other = product(seed + 5, b, rank, d, tuple(kernel))
    else:
        other = product(seed + 5, b, rank, d * math.prod(kernel))
    return LoKr(one, other, draw(_SCALES)), (a * b, c * d, *kernel)


@st.composite
def based(draw: st.DrawFn) -> tuple[DoRA | IA3 | Dense, Shape]:
    """Updates that only the whole matrix tells: with axes both ways."""
    shape, seed = draw(shapes()), draw(_SEEDS)
    axis = draw(st.sampled_from([0, 1]))
    kind = draw(st.sampled_from(["dora", "ia3", "dense"]))
    if kind == "dense":
        return Dense(randn(seed, *shape), draw(_SCALES)), shape
    if kind == "ia3":
        return IA3(1 + randn(seed, shape[axis]), axis), shape
    rows, columns = matrix_shape(shape)
    added = LowRank(randn(seed, 2, columns), randn(seed + 1, rows, 2), draw(_SCALES))
    return DoRA(added, randn(seed + 2, shape[axis]).abs() + 0.1, axis), shape


def matrix(product: Product) -> torch.Tensor:
    """A matrix in factors as it is defined, (rows, columns times kernel), in fp64."""
    left = product.left.double()
    if product.right is None:
        return left.flatten(1)
    if product.core is None:
        return left @ product.right.double()
    core, right = product.core.double(), product.right.double()
    return torch.einsum("ij...,pi,jq->pq...", core, left, right).flatten(1)


def delta(update: Added, shape: Shape, base: torch.Tensor | None = None) -> torch.Tensor:
    """What the update adds, as it is defined: a matrix in fp64."""
    match update:
        case LowRank():
            return update.scale * update.b.double() @ update.a.double()
        case Dense():
            return update.scale * update.values.double().reshape(matrix_shape(shape))
        case Sparse():
            found = delta(update.added, shape)
            found.view(-1)[update.positions] += update.scale * update.values.double()
            return found
        case LoHa():
            return update.scale * matrix(update.one) * matrix(update.other)
        case LoKr():
            return update.scale * torch.kron(matrix(update.one), matrix(update.other))
    assert base is not None and not isinstance(update, Experts)
    weight = base.double()
    kernel = [1] * (len(shape) - 2)
    if isinstance(update, IA3):
        along = (-1, 1, *kernel) if update.axis == 0 else (1, -1, *kernel)
        return ((update.factors.double().view(along) - 1) * weight).flatten(1)
    changed = weight + delta(update.added, shape).view(shape)
    others = [dim for dim in range(len(shape)) if dim != update.axis]
    norms = changed.square().sum(dim=others, keepdim=True).sqrt()
    magnitude = update.magnitude.double().view(norms.shape)
    return (magnitude * changed / norms - weight).flatten(1)
