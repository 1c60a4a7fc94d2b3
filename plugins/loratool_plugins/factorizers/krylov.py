"""The default factorizer: an adaptive block Krylov range finder.

Method: C. Musco and C. Musco, Randomized Block Krylov Methods for Stronger and Faster Approximate
Singular Value Decomposition, 2015 (arXiv 1504.05477). The subspace spanned by D X, (D D^T) D X, ...
for a random block X holds directions that capture nearly as much of D as the best ones do, after
few products with D. Every block is kept, and the best directions in their span are found by
Rayleigh and Ritz: they are the eigenvectors of Q^T D D^T Q, Q being the orthonormal basis.
"""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Literal

from loratool.devices import multiplies_bf16
from loratool.linalg import Factorization, FormedDelta, RankPolicy, Workspace
from loratool_plugins.factorizers import _spectral as spectral

if TYPE_CHECKING:
    import torch

# What a search takes at least: this many blocks beyond the rank, in half the shorter side. Where
# there is no room for them the whole Gram matrix costs less (measured: sides below about 150).
_LEAST_BLOCKS = 4
# bf16 rounds to within 2^-8. Blocks, delta and product are rounded, so an energy could be off by
# 6 * 2^-8 of the total; as roundings are mostly independent it is off by about 1e-5, and a share of
# the energy is sought with 1e-4 to spare.
_BF16_SLACK, _BF16_MARGIN = 2.0**-5, 1e-4
# fp32 sums are off by 1e-7, or 1e-5 where all terms are equal and rounded the same way.
_FP32_SLACK = 1e-5
# Where less than this is lost the delta is nearly of low rank, and bf16 directions would show.
_NEARLY_LOW_RANK = 1e-2
# The first blocks are all judged, later ones when the basis has grown by this factor: each
# judgement is an eigenproblem of the size of the basis.
_ALWAYS_JUDGED, _JUDGED_GROWTH = 8, 1.125

# Range of the ratio of successive gains, for extrapolating them.
_RATIOS = (0.25, 0.95)

_scratch = Workspace()


@dataclass(frozen=True)
class Krylov:
    """Truncated SVD by an adaptive block Krylov range finder.

    Blocks are added until two estimates of the energy still missing are below the tolerance (see
    `residual_bound` and `expected_gain`). A delta that needs a basis beyond half its shorter side
    is factorized through its Gram matrix instead. That the tolerance is met is measured, not
    proved; what is proved is the certificate's optimum_bound.

    With compute "bf16" the basis is found with bf16 copies of the delta and of the blocks, at
    half the cost; the energies and the factors come from a last product in fp32. Results are
    bit-identical for the same seed, kind of CPU, version of torch and number of intra-op threads:
    loratool always factorizes with one (torch.set_num_threads(1)).
    """

    compute: Literal["auto", "fp32", "bf16"] = field(
        default="auto",
        metadata={
            "help": "precision of the products that find the directions: fp32, bf16, or auto "
            "(bf16 if the CPU multiplies it natively)"
        },
    )
    tolerance: float = field(
        default=1e-3,
        metadata={"help": "share of the best energy of this rank that may be missing"},
    )

    def factorize(
        self, delta: torch.Tensor, policy: RankPolicy, generator: torch.Generator
    ) -> Factorization:
        """Factorize `delta` (out, in), fp32, which may be overwritten.

        Args:
            delta: the matrix.
            policy: how many singular values to keep.
            generator: source of the random start, on the CPU.

        Raises:
            InputError: `delta` is not a matrix, is empty, or holds NaN or Inf.
        """
        formed = spectral.measured(delta)
        if self.wants_rounded(policy, formed.values.device):
            formed = replace(formed, rounded=_bf16_copy(formed.values))
        return self.factorize_formed(formed, policy, generator)

    def factorize_formed(
        self, delta: FormedDelta, policy: RankPolicy, generator: torch.Generator
    ) -> Factorization:
        """As `factorize`, of a delta that was measured while it was formed.

        Raises:
            InputError: `delta` holds NaN or Inf.
        """
        target = spectral.prepare(delta)
        if target.total == 0:
            return spectral.zero_factorization(target.shape_of_delta)
        limit = policy.limit(target.shape)
        width = 16 if limit <= 16 else 32
        least = limit if policy.is_fixed else 1
        if target.shape[0] < 2 * (least + _LEAST_BLOCKS * width):
            return spectral.gram_factorization(target, policy)
        search = target if target.transposed else target.flipped()  # its tiles are whole rows
        space = Subspace(search, policy, self.tolerance)
        found = None
        with suppress(spectral.NoConvergenceError):  # the whole Gram matrix in fp64 may do
            if space.grow(width, generator):
                found = space.factorization()
        return found or spectral.gram_factorization(target, policy, space.steps)

    def wants_rounded(self, policy: RankPolicy, device: torch.device) -> bool:
        """Whether to find directions in bf16, which cannot see the last 1e-3 of the energy."""
        if policy.energy is not None and policy.energy > 1 - 10 * _BF16_MARGIN:
            return False
        return self.compute == "bf16" or (self.compute == "auto" and multiplies_bf16(device))


def _bf16_copy(delta: torch.Tensor) -> torch.Tensor:
    """A matrix in bf16, in this thread's scratch."""
    import torch

    shape = (delta.shape[0], delta.shape[1])
    rounded = _scratch.take("rounded", shape, torch.bfloat16, delta.device)
    return rounded.copy_(delta)


@dataclass(frozen=True)
class Judgement:
    """What a subspace holds at one moment; energies in units of the target's.

    Attributes:
        energies: (c,) fp64, descending: squared singular values of Q^T U, the Ritz values.
        vectors: (c, c) fp64, on the CPU like `energies`: their directions in the basis, as columns.
        rank: how many the policy asks for; None if the subspace is too small to tell.
        missed: energy outside the subspace, ||U||_F^2 - ||Q^T U||_F^2.
    """

    energies: torch.Tensor
    vectors: torch.Tensor
    rank: int | None
    missed: float

    def captured(self, rank: int) -> float:
        """Energy of the best `rank` directions."""
        return float(self.energies[:rank].sum())


class Subspace:
    """The Krylov subspace of one target U while it grows: Q and Q^T U.

    Attributes:
        size: vectors in the basis so far, c.
        steps: blocks in it.
    """

    def __init__(self, target: spectral.Target, policy: RankPolicy, tolerance: float) -> None:
        import torch

        rows, columns = target.shape
        self.size = 0
        self.steps = 0
        self._target = target
        self._policy = policy
        self._tolerance = tolerance
        self._capacity = min(rows, columns) // 2
        device = target.device
        self._basis = _scratch.take("basis", (self._capacity, rows), torch.float32, device)
        self._images = _scratch.take("images", (self._capacity, columns), torch.float32, device)
        self._products = _scratch.take("products", (self._capacity,) * 2, torch.float64)
        self._judgements: list[Judgement] = []
        self._judged_size = 0

    def grow(self, width: int, generator: torch.Generator) -> bool:
        """Add blocks of `width` vectors until the subspace is good enough.

        Returns:
            False if it still is not when the basis would pass half the shorter side.
        """
        start = spectral.random_rows(width, self._target.shape[1], generator)
        block = self._target.start(start.to(self._target.device))
        while self.size + width <= self._capacity:
            rows, outside = spectral.extension(block, self._basis[: self.size], generator)
            if self.size and self.size == self._judged_size and self._has_converged(outside):
                return True
            block = self._append(rows)
            if self._is_due():
                self._judge()
                if self._holds_everything():
                    return True
        return False

    def _append(self, rows: torch.Tensor) -> torch.Tensor:
        """Take orthonormal `rows` (k, rows) into the basis; return `rows` U U^T."""
        old, new = self.size, self.size + len(rows)
        self._basis[old:new] = rows
        self._images[old:new], block = self._target.round_trip(rows)
        products = (self._images[old:new] @ self._images[:new].t()).cpu()
        self._products[old:new, :new] = products
        self._products[:old, old:new] = products[:, :old].t()
        self.size = new
        self.steps += 1
        return block

    def _is_due(self) -> bool:
        """Whether the subspace has grown enough to be judged again."""
        return self.steps <= _ALWAYS_JUDGED or self.size >= _JUDGED_GROWTH * self._judged_size

    def _judge(self) -> None:
        """Find the Ritz values and vectors, and the rank in question."""
        products = self._products[: self.size, : self.size]
        values, vectors = spectral.eigenvectors(products)
        energies = values.flip(0).clamp_(min=0.0)
        margin = 0.0 if self._target.rounded is None else _BF16_MARGIN
        total = self._target.total
        rank = self._policy.choose(energies, total, self._target.shape, margin)
        missed = max(0.0, total - float(energies.sum()))
        self._judgements.append(Judgement(energies, vectors.flip(1), rank, missed))
        self._judged_size = self.size

    def _holds_everything(self) -> bool:
        """Whether too little lies outside the subspace to matter, whatever it is.

        Never said of bf16 energies: roundings of equal numbers do not average out.
        """
        now = self._judgements[-1]
        if now.rank is None or self._target.rounded is not None:
            return False
        return now.missed <= self._tolerance * now.captured(now.rank)

    def _has_converged(self, outside: torch.Tensor) -> bool:
        """Whether both estimates of the energy still missing are small at the rank in question.

        Args:
            outside: (k, k) fp64, on the CPU, Gram matrix of what the next block adds to the basis.
        """
        now = self._judgements[-1]
        if now.rank is None or now.rank == self.size:
            return False
        captured = now.captured(now.rank)
        history = [0.0, 0.0, *(past.captured(now.rank) for past in self._judgements)]
        if expected_gain(*history[-3:]) > self._tolerance / 2 * captured:
            return False
        ends = now.vectors[-len(outside) :, : now.rank]
        residual = float((ends * (outside @ ends)).sum())
        return residual_bound(now.energies, now.rank, residual) <= self._tolerance * captured

    def factorization(self) -> Factorization | None:
        """Factors from the best directions found, through one exact product.

        Returns:
            None if the exact product does not confirm the share of the energy that is wanted.
        """
        now = self._judgements[-1]
        mixture = now.vectors[:, : now.rank].t().float().to(self._target.device)
        best = mixture @ self._basis[: self.size]
        left, _ = spectral.whitened(best.double())
        right = self._target.image(left.float()).double()
        captured = float(right.square().sum())
        target = self._target
        capped = now.rank == self._policy.limit(target.shape)
        if captured < self._policy.wanted(target.total) and not capped:
            return None
        fast = target.rounded is not None
        if fast and target.total - captured < _NEARLY_LOW_RANK * target.total:
            # Half a step of subspace iteration in fp32 takes the rounding out of the directions.
            target, left = (
                replace(target.flipped(), rounded=None),
                spectral.whitened(spectral.whitened(right)[0])[0],
            )
            right = target.image(left.float()).double()
        return spectral.composed(
            target,
            left,
            right,
            self._policy,
            method="krylov-bf16" if fast else "krylov-fp32",
            steps=self.steps,
            slack=_FP32_SLACK,
            missed=now.missed + (_BF16_SLACK * target.total if fast else 0.0),
        )


def expected_gain(oldest: float, before: float, now: float) -> float:
    """Energy that further steps will add if the gains go on shrinking as they did.

    Args:
        oldest: energy captured two judgements ago.
        before: one judgement ago.
        now: at the last judgement.

    Returns:
        The sum of the geometric series of gains, its ratio held to [0.25, 0.95].
    """
    smallest, largest = _RATIOS
    ratio = (now - before) / (before - oldest) if before > oldest else largest
    ratio = min(max(ratio, smallest), largest)
    return max(now - before, 0.0) * ratio / (1 - ratio)


def residual_bound(energies: torch.Tensor, rank: int, residual: float) -> float:
    """Bound of the energy that directions outside the subspace could add at `rank`.

    For every w > 0 the coupling S between the Ritz vectors and the rest costs at most
    ||S||_F^2 / w + sum_i max(0, theta_{r+1}^2 + w - theta_i^2), i <= r, provided that nothing
    outside has more energy than theta_{r+1}^2. The minimum over w lies at sqrt(||S||_F^2 / k)
    for some number k of terms that are not 0, or where a term becomes 0.

    Args:
        energies: (c,) fp64, Ritz values theta^2, descending, c > rank.
        rank: r.
        residual: ||S||_F^2, the squared residuals of the first r Ritz vectors.
    """
    import torch

    if residual <= 0:
        return 0.0
    gaps = energies[:rank] - energies[rank]
    counts = torch.arange(1, rank + 1, dtype=torch.float64)
    widths = torch.cat([(residual / counts).sqrt(), gaps[gaps > 0]])
    added = (widths[:, None] - gaps).clamp_(min=0.0).sum(dim=1)
    return float((residual / widths + added).min())
