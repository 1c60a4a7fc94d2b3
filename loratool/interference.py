"""How the parts of a combination get in each other's way, computed from their factors alone.

Two updates of one tensor, D1 and D2, interfere where they read the same input directions (row
spaces of A) and write the same output directions (column spaces of B). Everything follows from the
small Gram matrices of the factors, at cost (out + in) R^2 for R the sum of the ranks.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import numpy as np

from loratool.lowrank import Product, grams

Array = np.ndarray[Any, np.dtype[Any]]

# Cosines below this are called independent in words; unrelated updates of real models are below.
_INDEPENDENT = 0.05
_PAIRS_SHOWN, _TENSORS_SHOWN = 6, 5
# Eigenvalues of a Gram matrix below this share of the largest are taken for 0.
_ABSENT = 1e-12


@dataclass(frozen=True)
class Subspaces:
    """How two subspaces of one space lie to each other.

    Attributes:
        largest: cosine of the smallest principal angle (Björck and Golub, 1973); 1 if they share a
            direction, 0 if they are orthogonal.
        shared: mean squared cosine of the principal angles; the share of the smaller subspace that
            lies in the larger one.
        product: ||X1^T X2||_F / (||X1||_F ||X2||_F) of the factors X as they are (B, or A
            transposed).
    """

    largest: float
    shared: float
    product: float


@dataclass(frozen=True)
class Interference:
    """How two updates of one tensor lie to each other.

    Attributes:
        inner: <D1, D2> = tr(D1^T D2), weights included.
        norms: ||D1||_F and ||D2||_F.
        outputs: the column spaces of both B.
        inputs: the row spaces of both A.
    """

    inner: float
    norms: tuple[float, float]
    outputs: Subspaces
    inputs: Subspaces

    @property
    def cosine(self) -> float:
        """<D1, D2> / (||D1|| ||D2||), in [-1, 1]; 0 if one of them is zero."""
        return _cosine(self.inner, *self.norms)


def pairwise(parts: Sequence[Product]) -> dict[tuple[int, int], Interference]:
    """The interference of every two of several updates of one tensor.

    Args:
        parts: products of one shape (out, in), their factors being weight times scale.

    Returns:
        (i, j), i < j -> their interference.
    """
    blocks = _gram_blocks(parts)
    factors = np.array([part.factor for part in parts])
    inner = ((blocks[0] * blocks[1]).sum(axis=(-2, -1)) * factors * factors[:, None]).tolist()
    norms = [math.sqrt(max(0.0, inner[i][i])) for i in range(len(parts))]
    white, ranks = _whitening(blocks)
    pairs = list(combinations(range(len(parts)), 2))
    one, other = ([pair[side] for pair in pairs] for side in (0, 1))
    products = blocks[:, one, other]
    turned = white[:, one].swapaxes(-1, -2)
    cosines = np.linalg.svd(turned @ products @ white[:, other], compute_uv=False).clip(max=1.0)
    smaller = np.minimum(ranks[:, one], ranks[:, other]).clip(min=1)
    lengths = np.trace(_own(blocks), axis1=-2, axis2=-1)
    with np.errstate(invalid="ignore"):  # 0 / 0
        product = np.square(products).sum(axis=(-2, -1)) / (lengths[:, one] * lengths[:, other])
    shared = np.square(cosines).sum(axis=-1) / smaller
    table = np.stack([cosines[..., 0], shared, product], axis=-1).tolist()
    return {
        (i, j): Interference(inner[i][j], (norms[i], norms[j]), _spaces(outputs), _spaces(inputs))
        for (i, j), outputs, inputs in zip(pairs, *table, strict=True)
    }


def _spaces(values: Sequence[float]) -> Subspaces:
    largest, shared, product = (value if math.isfinite(value) else 0.0 for value in values)
    return Subspaces(largest, shared, math.sqrt(product))


def _gram_blocks(parts: Sequence[Product]) -> Array:
    """B_i^T B_j and A_i A_j^T as one array (2, parts, parts, r, r), r being the largest rank.

    Smaller ranks are filled up with zeros, which add no direction. In numpy, which takes fewer
    microseconds than torch for a call on matrices as small as these.
    """
    ranks = [part.a.shape[0] for part in parts]
    count, rank = len(ranks), max(ranks)
    blocks: Array = grams(parts).numpy()
    if min(ranks) < rank:
        places = np.array([i * rank + k for i in range(count) for k in range(ranks[i])])
        filled = np.zeros((2, count * rank, count * rank))
        filled[:, places[:, None], places] = blocks
        blocks = filled
    return blocks.reshape(2, count, rank, count, rank).swapaxes(2, 3)


def _own(blocks: Array) -> Array:
    """The Gram matrix of each part with itself: (2, parts, r, r)."""
    every = np.arange(blocks.shape[1])
    own: Array = blocks[:, every, every]
    return own


def _whitening(blocks: Array) -> tuple[Array, Array]:
    """Matrices W (2, parts, r, r) that make X W orthonormal, and how many columns they have.

    Directions shorter than 1e-6 of a factor's longest count as absent: a Gram matrix tells no more.
    Their columns are zero.
    """
    values, vectors = np.linalg.eigh(_own(blocks))
    present = values > _ABSENT * values[..., -1:]
    scales = present / np.sqrt(np.where(present, values, 1.0))
    return vectors * scales[..., None, :], present.sum(axis=-1)


def together(found: Sequence[Interference]) -> Interference:
    """The interference of updates of several matrices, experts', each seen as one update.

    Of the angles: the largest cosine of all, and the means of the other figures.
    """
    if len(found) == 1:
        return found[0]
    norms = (math.hypot(*(x.norms[0] for x in found)), math.hypot(*(x.norms[1] for x in found)))
    outputs, inputs = (_mean([getattr(x, side) for x in found]) for side in ("outputs", "inputs"))
    return Interference(math.fsum(x.inner for x in found), norms, outputs, inputs)


def _mean(spaces: Sequence[Subspaces]) -> Subspaces:
    shared, product = (
        math.fsum(getattr(space, key) for space in spaces) / len(spaces)
        for key in ("shared", "product")
    )
    return Subspaces(max(space.largest for space in spaces), shared, product)


def _cosine(inner: float, norm: float, other_norm: float) -> float:
    if norm == 0 or other_norm == 0:
        return 0.0
    return max(-1.0, min(1.0, inner / norm / other_norm))


class Collector:
    """Gathers interference tensor by tensor, from any thread, and reports it.

    Args:
        names: what to call the parts.
    """

    def __init__(self, names: Sequence[str]) -> None:
        self._names = tuple(names)
        self._found: dict[str, dict[tuple[int, int], Interference]] = {}

    def add(self, tensor: str, parts: Mapping[int, Sequence[Product]]) -> None:
        """Compute the interference in one tensor.

        Args:
            tensor: its name.
            parts: number of a part -> its update: one product, or one for each expert.
        """
        if len(parts) < 2:
            return
        numbers = list(parts)
        matrices = [pairwise(products) for products in zip(*parts.values(), strict=True)]
        self._found[tensor] = {
            (numbers[i], numbers[j]): together([found[i, j] for found in matrices])
            for i, j in matrices[0]
        }

    def cosines(self) -> dict[tuple[int, int], float]:
        """Pair of parts -> the cosine over all tensors that both change, together."""
        sums: dict[tuple[int, int], list[float]] = {}
        for tensor in sorted(self._found):  # not in the order of threads: sums would differ
            for pair, found in self._found[tensor].items():
                terms = (found.inner, found.norms[0] ** 2, found.norms[1] ** 2)
                total = sums.setdefault(pair, [0.0, 0.0, 0.0])
                sums[pair] = [old + new for old, new in zip(total, terms, strict=True)]
        return {
            pair: _cosine(inner, math.sqrt(one), math.sqrt(other))
            for pair, (inner, one, other) in sorted(sums.items())
        }

    def lines(self) -> tuple[str, ...]:
        """The findings for people; none if no two parts change the same tensor."""
        cosines = self.cosines()
        if not cosines:
            return ()
        lines = [
            "interference, as the cosine of two weighted updates (1: they add up, 0: independent, "
            "-1: they cancel):"
        ]
        ranked = sorted(cosines, key=lambda pair: (-abs(cosines[pair]), pair))
        for pair in ranked[:_PAIRS_SHOWN]:
            lines.append(f"  {self._pair(pair)}: {cosines[pair]:+.3f} ({_words(cosines[pair])})")
        if len(ranked) > _PAIRS_SHOWN:
            lines.append(f"  and {len(ranked) - _PAIRS_SHOWN} weaker pairs: --json lists them")
        lines.append("  strongest in:")
        for tensor, pair, found in self._strongest():
            lines.append(
                f"    {tensor}: {found.cosine:+.3f} ({self._pair(pair)}; "
                f"{found.outputs.shared:.0%} of the output directions shared, "
                f"{found.inputs.shared:.0%} of the inputs')"
            )
        return tuple(lines)

    def _strongest(self) -> list[tuple[str, tuple[int, int], Interference]]:
        every = [
            (tensor, pair, found)
            for tensor, pairs in self._found.items()
            for pair, found in pairs.items()
        ]
        every.sort(key=lambda item: (-abs(item[2].cosine), item[0], item[1]))
        return every[:_TENSORS_SHOWN]

    def _pair(self, pair: tuple[int, int]) -> str:
        return f"{self._names[pair[0]]} and {self._names[pair[1]]}"

    def data(self) -> list[dict[str, Any]]:
        """The findings for machines: one entry a pair of parts."""
        return [
            {
                "parts": [self._names[i], self._names[j]],
                "cosine": cosine,
                "tensors": {
                    tensor: _plain(pairs[i, j])
                    for tensor, pairs in sorted(self._found.items())
                    if (i, j) in pairs
                },
            }
            for (i, j), cosine in self.cosines().items()
        ]


def _words(cosine: float) -> str:
    if abs(cosine) < _INDEPENDENT:
        return "nearly independent"
    return "they add up" if cosine > 0 else "they cancel in part"


def _plain(found: Interference) -> dict[str, Any]:
    return {
        "cosine": found.cosine,
        "outputs": vars(found.outputs),
        "inputs": vars(found.inputs),
    }
