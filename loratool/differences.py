"""What differs between two tensors, in numbers: norms, changed weights, spectra, rounding.

Everything here touches values, each of them once: one pass over both tensors, tile by tile, forms
the difference and counts, and a factorizer finds the largest singular values of what it has formed.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from loratool.checkpoint import LazyTensor
from loratool.delta import block_pairs, matrices_of
from loratool.errors import InputError
from loratool.linalg import (
    Factorizer,
    RankPolicy,
    Workspace,
    is_finite,
    named_generator,
    squared_norm,
    tiles,
)
from loratool.measures import block_energy
from loratool.pairing import Change
from loratool.spectra import Spectrum, summed
from loratool.updates import matrix_shape

# dtype -> (bits of the fraction, exponent of the smallest normal number).
_FORMATS = {
    "F64": (52, -1022),
    "F32": (23, -126),
    "BF16": (7, -126),
    "F16": (10, -14),
    "F8_E4M3": (3, -6),
    "F8_E5M2": (2, -14),
}
# Sides up to this many times the rank that is asked for are factorized whole: it costs no more.
_WHOLE_SIDES = 2
# Of a merge of rank r: what is left beyond r is rounding, up to this factor; r is small, and the
# next singular value is smaller by this factor.
_ROUNDING_ALONE, _SMALL_RANK, _GAP = 1.2, 0.25, 1.3


@dataclass(frozen=True)
class Difference:
    """One tensor of the fine-tune beside the base's.

    Attributes:
        change: the two tensors.
        elements: of the fine-tune's.
        changed: how many of them differ; all of them where the base has none of this shape.
        base_energy: ||W0||_F^2; None where the base has none of this shape.
        energy: ||W1 - W0||_F^2, or ||W1||_F^2 where the base has none of this shape.
        rounding: expected energy of the rounding errors of W1 in its own type.
        spectrum: of W1 - W0; of experts: what a rank common to all keeps. None of what is no
            matrix, has not changed or was not looked at.
        edge: the largest singular value that rounding errors alone would have.
    """

    change: Change
    elements: int
    changed: int
    base_energy: float | None
    energy: float
    rounding: float = 0.0
    spectrum: Spectrum | None = None
    edge: float = 0.0

    @property
    def name(self) -> str:
        """The fine-tune's name of it, in memory."""
        return self.change.name

    @property
    def is_new(self) -> bool:
        """Whether the base has no such tensor."""
        return self.change.before is None

    @property
    def is_resized(self) -> bool:
        """Whether the base's has another shape."""
        before = self.change.before
        return before is not None and before.shape != self.change.after.shape

    @property
    def is_changed(self) -> bool:
        """Whether any value differs."""
        return self.changed > 0

    @property
    def relative(self) -> float | None:
        """||W1 - W0||_F / ||W0||_F; None where there is no W0 to compare with."""
        if self.base_energy is None:
            return None
        if self.energy == 0:
            return 0.0
        return math.sqrt(self.energy / self.base_energy) if self.base_energy else math.inf

    @property
    def merged_rank(self) -> int | None:
        """The rank r of a merged LoRA, if that and rounding would explain all of the difference."""
        if self.spectrum is None or self.change.kind == "experts":
            return None  # what experts have in common says nothing of one of them
        shape = matrix_shape(self.change.after.shape)
        return merged_rank(self.spectrum, self.rounding, self.edge, shape)


class DifferenceReader:
    """Measures pairs of tensors; tasks of several threads share one."""

    def __init__(self, factorizer: Factorizer | None, max_rank: int, seed: int) -> None:
        """Say how spectra are found.

        Args:
            factorizer: finds singular values; None for no spectra at all.
            max_rank: how many of them, where there are many more.
            seed: of the factorizer's random start.
        """
        self._factorizer = factorizer
        self._max_rank = max_rank
        self._seed = seed
        self._workspace = Workspace()

    def measure(self, change: Change) -> Difference:
        """Compare the two tensors of a change.

        Raises:
            InputError: NaN or Inf in either, named.
        """
        before, after = change.before, change.after
        if before is None or before.shape != after.shape:
            found = Difference(change, after.numel, after.numel, None, _energy(after))
        elif change.factored:
            found = self._matrices(change, before, after)
        else:
            counts = _Counts(after.dtype)
            for one, other in block_pairs(before, after):
                for part in tiles(one):
                    counts.add(one[part], other[part])
            found = counts.difference(change, None)
        if not math.isfinite(found.energy):
            raise InputError(_culprit(change))
        return found

    def _matrices(self, change: Change, before: LazyTensor, after: LazyTensor) -> Difference:
        """Compare two weights, a matrix of each at a time."""
        counts = _Counts(after.dtype)
        spectra: list[Spectrum] = []
        generator = named_generator(self._seed, change.name)
        edges = []
        for one, other in _matrix_pairs(change, before, after):
            former = counts.energy, counts.rounding, counts.changed
            delta = self._workspace.take("delta", tuple(one.shape), torch.float32)
            for rows in tiles(one):
                counts.add(one[rows], other[rows], delta[rows])
            if not math.isfinite(counts.energy):
                raise InputError(_culprit(change))
            edges.append(noise_edge(counts.rounding - former[1], (one.shape[0], one.shape[1])))
            if self._factorizer is not None:
                energy = counts.energy - former[0]
                is_same = counts.changed == former[2]
                spectra.append(self._spectrum(delta, energy, is_same, generator))
        spectrum = summed(spectra) if spectra and counts.changed else None
        return counts.difference(change, spectrum, math.hypot(*edges))

    def _spectrum(
        self, delta: torch.Tensor, energy: float, is_zero: bool, generator: torch.Generator
    ) -> Spectrum:
        """The largest singular values of `delta` (rows, columns), which is overwritten."""
        assert self._factorizer is not None
        side = min(delta.shape)
        if is_zero:
            return Spectrum((), 0.0, side)
        rank = side if side <= _WHOLE_SIDES * self._max_rank else self._max_rank
        found = self._factorizer.factorize(delta, RankPolicy(rank), generator)
        sigma = tuple(value for value in found.sigma.tolist() if value > 0)
        return Spectrum(sigma, found.certificate.total if sigma else 0.0, side)


class _Counts:
    """Sums over the values of two tensors."""

    def __init__(self, dtype: str) -> None:
        self.elements = self.changed = 0
        self.base_energy = self.energy = self.rounding = 0.0
        self._dtype = dtype

    def add(
        self, before: torch.Tensor, after: torch.Tensor, delta: torch.Tensor | None = None
    ) -> None:
        """Take in tiles of one shape; `delta` gets their difference in fp32."""
        self.elements += after.numel()
        self.base_energy += block_energy(before)
        self.rounding += rounding_energy(after, self._dtype)
        if before.dtype == after.dtype and torch.equal(before, after):
            if delta is not None:
                delta.zero_()
            return
        if before.dtype != after.dtype or before.dtype == torch.float64:
            one, other = before.double(), after.double()
        else:  # exact for bf16 and fp16, rounded once for fp32
            one, other = before.float(), after.float()
        self.changed += int(torch.count_nonzero(one != other))
        difference = other.sub_(one) if other is not after else other - one
        self.energy += block_energy(difference)
        if delta is not None:
            delta.copy_(difference)

    def difference(
        self, change: Change, spectrum: Spectrum | None, edge: float = 0.0
    ) -> Difference:
        return Difference(
            change,
            self.elements,
            self.changed,
            self.base_energy,
            self.energy if self.changed else 0.0,
            self.rounding,
            spectrum,
            edge,
        )


def rounding_energy(values: torch.Tensor, dtype: str) -> float:
    """Expected energy of the errors of rounding to `values`: sum of ulp^2 / 12.

    Args:
        values: of any shape and float type.
        dtype: the safetensors name of the type that they were rounded to.
    """
    bits, smallest = _FORMATS.get(dtype, _FORMATS["F32"])
    powers = values.float().contiguous().view(torch.int32).bitwise_and(0x7F800000)
    units = powers.view(torch.float32).clamp_(min=2.0 ** max(smallest, -126))
    return squared_norm(units) * 4.0**-bits / 12


def noise_edge(rounding: float, shape: tuple[int, int]) -> float:
    """The largest singular value of independent errors: their deviation x (sqrt m + sqrt n).

    The edge of the Marchenko-Pastur law (1967) for a matrix (m, n) whose entries have the variance
    `rounding` / (m n).
    """
    rows, columns = shape
    return math.sqrt(rounding / (rows * columns)) * (math.sqrt(rows) + math.sqrt(columns))


def merged_rank(
    spectrum: Spectrum, rounding: float, edge: float, shape: tuple[int, int]
) -> int | None:
    """The rank r of a merged LoRA, if that and rounding would explain all of a difference.

    What lies beyond r then has the energy of the rounding errors outside of a matrix of rank r. The
    first rank that leaves no more may be too low where the errors are as large as the update, and
    the number of values above their edge too high where weights differ in size; the widest gap
    between two values from the one to the other decides.

    Args:
        spectrum: of the difference.
        rounding: expected energy of the rounding errors.
        edge: their largest singular value.
        shape: of the matrix.

    Returns:
        None if it is not so, if r is no small rank, or if no gap shows where the update ends.
    """
    smallest = 1e-6 * spectrum.total  # what fp32 cannot tell
    most = min(len(spectrum.sigma), int(_SMALL_RANK * spectrum.count))
    rows, columns = shape

    def explains(rank: int) -> bool:
        outside = rounding * (1 - rank / rows) * (1 - rank / columns)
        tail = spectrum.total - spectrum.captured(rank).low
        return tail <= max(_ROUNDING_ALONE * outside, smallest)

    first = next((rank for rank in range(1, most + 1) if explains(rank)), None)
    if first is None:
        return None
    last = max(first, min(most, int(spectrum.above(edge).low)))
    best = max(range(first, last + 1), key=lambda rank: _gap(spectrum, rank))
    return best if _gap(spectrum, best) >= _GAP else None


def _gap(spectrum: Spectrum, rank: int) -> float:
    """By how much the next singular value is smaller."""
    rest = spectrum.sigma[rank:]
    return spectrum.sigma[rank - 1] / rest[0] if rest else math.inf


def _matrix_pairs(
    change: Change, before: LazyTensor, after: LazyTensor
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """The matrices (rows, columns) of both: of experts one after the other."""
    if change.kind == "experts":
        yield from zip(matrices_of(before), matrices_of(after), strict=True)
    else:
        yield before.read().flatten(1), after.read().flatten(1)


def _energy(tensor: LazyTensor) -> float:
    return math.fsum(block_energy(block) for block in tensor.blocks())


def _culprit(change: Change) -> str:
    """Which of the two tensors holds NaN or Inf."""
    for tensor in filter(None, (change.before, change.after)):
        if not all(is_finite(block) for block in tensor.blocks()):
            return (
                f"{tensor.origin}: {tensor.name}: holds NaN or Inf; repair it, or leave it out "
                "with --exclude"
            )
    return f"{change.after.origin}: {change.name}: its difference from the base overflows"


def shape_of(difference: Difference) -> tuple[int, int]:
    """(out, in) of the matrix, or of every matrix, that factors of a difference make."""
    shape = difference.change.after.shape
    return (shape[-2], shape[-1]) if difference.change.kind == "experts" else matrix_shape(shape)
