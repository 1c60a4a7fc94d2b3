"""What differs between two tensors, in numbers: norms, changed weights, spectra, rounding.

Everything here touches values, each of them once: one pass over both tensors, tile by tile, forms
the difference and counts, and a factorizer finds the largest singular values of what it has formed.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch

from loratool.checkpoint import LazyTensor
from loratool.delta import block_pairs, culprit, matrices_of
from loratool.linalg import (
    Factorizer,
    RankPolicy,
    Workspace,
    named_generator,
    tiles,
)
from loratool.measures import block_energy
from loratool.noise import rounding_noise
from loratool.pairing import Change
from loratool.spectra import Spectrum, summed
from loratool.suspicion import gates, is_coarse, merged_rank
from loratool.tiling import difference
from loratool.updates import matrix_shape

# Sides up to this many times the rank that is asked for are factorized whole: it costs no more.
_WHOLE_SIDES = 2


@dataclass(frozen=True)
class Difference:
    """One tensor of the fine-tune beside the base's.

    Attributes:
        change: the two tensors.
        elements: of the fine-tune's.
        changed: how many of them differ; all of them where the base has none of this shape.
        base_energy: ||W0||_F^2; None where the base has none of this shape.
        energy: ||W1 - W0||_F^2, or ||W1||_F^2 where the base has none of this shape.
        spectrum: of W1 - W0; of experts: what a rank common to all keeps. None of what is no
            matrix, has not changed or was not looked at.
        rounding: expected energy of the rounding errors in W1 - W0; known with the spectrum.
        edge: the largest singular value that rounding errors alone would have; likewise.
        merged_rank: the rank of a merged LoRA, if that and rounding would explain all of the
            difference; None for experts, as what they have in common says nothing of one of them.
        is_blind: whether rounding to bf16 or fp16 alone would explain it, so that it may be the
            rest of a merged LoRA; False for experts.
    """

    change: Change
    elements: int
    changed: int
    base_energy: float | None
    energy: float
    spectrum: Spectrum | None = None
    rounding: float = 0.0
    edge: float = 0.0
    merged_rank: int | None = None
    is_blind: bool = False

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
            counts = _Counts()
            for one, other in block_pairs(before, after):
                for part in tiles(one):
                    counts.add(one[part], other[part])
            found = counts.difference(change)
        if not math.isfinite(found.energy):
            raise culprit(before, after)
        return found

    def _matrices(self, change: Change, before: LazyTensor, after: LazyTensor) -> Difference:
        """Compare two weights, a matrix of each at a time."""
        counts = _Counts()
        spectra: list[Spectrum] = []
        noises: list[float] = []
        edges: list[float] = []
        merged, is_blind = None, False
        generator = named_generator(self._seed, change.name)
        for one, other in _matrix_pairs(change, before, after):
            former = counts.changed
            delta = self._workspace.take("delta", tuple(one.shape), torch.float32)
            for rows in tiles(one):
                counts.add(one[rows], other[rows], delta[rows])
            if not math.isfinite(counts.energy):
                raise culprit(before, after)
            if self._factorizer is None:
                continue
            if counts.changed == former:
                spectra.append(Spectrum((), 0.0, min(one.shape)))
                continue
            noise = rounding_noise(delta, other)
            noises.append(noise.energy)
            edges.append(noise.edge)
            spectra.append(self._spectrum(delta, generator))
            if change.kind != "experts":
                merged, is_blind = _judged(other, spectra[-1], edges[-1])
        if not noises:
            return counts.difference(change)
        return replace(
            counts.difference(change),
            spectrum=summed(spectra),
            rounding=math.fsum(noises),
            edge=math.hypot(*edges),
            merged_rank=merged,
            is_blind=is_blind,
        )

    def _spectrum(self, delta: torch.Tensor, generator: torch.Generator) -> Spectrum:
        """The largest singular values of `delta` (rows, columns), which is overwritten."""
        assert self._factorizer is not None
        side = min(delta.shape)
        rank = side if side <= _WHOLE_SIDES * self._max_rank else self._max_rank
        found = self._factorizer.factorize(delta, RankPolicy(rank), generator)
        sigma = tuple(value for value in found.sigma.tolist() if value > 0)
        return Spectrum(sigma, found.certificate.total if sigma else 0.0, side)


def _judged(after: torch.Tensor, spectrum: Spectrum, edge: float) -> tuple[int | None, bool]:
    """The rank of a merged LoRA, if it looks like one, and whether the change is too small."""
    found = gates(after, spectrum.total, [value * value for value in spectrum.sigma])
    is_blind = is_coarse(after) and any(gate.is_blind for gate in found)
    return merged_rank(found, spectrum.sigma, int(spectrum.above(edge).low)), is_blind


class _Counts:
    """Sums over the values of two tensors."""

    def __init__(self) -> None:
        self.elements = self.changed = 0
        self.base_energy = self.energy = 0.0

    def add(
        self, before: torch.Tensor, after: torch.Tensor, delta: torch.Tensor | None = None
    ) -> None:
        """Take in tiles of one shape; `delta` gets their difference in fp32."""
        self.elements += after.numel()
        self.base_energy += block_energy(before)
        if before.dtype == after.dtype and torch.equal(before, after):
            if delta is not None:
                delta.zero_()
            return
        is_wide = torch.float64 in (before.dtype, after.dtype)
        change = torch.empty(after.shape, dtype=torch.float64 if is_wide else torch.float32)
        difference(after, before, change)
        self.changed += int(torch.count_nonzero(change))
        self.energy += block_energy(change)
        if delta is not None:
            delta.copy_(change)

    def difference(self, change: Change) -> Difference:
        energy = self.energy if self.changed else 0.0
        return Difference(change, self.elements, self.changed, self.base_energy, energy)


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


def shape_of(difference: Difference) -> tuple[int, int]:
    """(out, in) of the matrix, or of every matrix, that factors of a difference make."""
    shape = difference.change.after.shape
    return (shape[-2], shape[-1]) if difference.change.kind == "experts" else matrix_shape(shape)
