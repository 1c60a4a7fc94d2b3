"""The activation factorizer: the error that counts is that of the outputs.

With C = E[x x^T] over a layer's inputs, the mean squared error of its outputs is
||(D - B A) C^(1/2)||_F^2. By the theorem of Eckart and Young, applied to D C^(1/2), it is least for
B = the leading eigenvectors of S = D C D^T, and then A = B^T D, as B B^T D C^(1/2) is the truncated
SVD of D C^(1/2). So neither a root nor an inverse of C is needed, and a singular C (dead inputs,
fewer tokens than inputs) is no special case.

Related: SVD-LLM (arXiv 2403.07378) and QERA (arXiv 2410.06040) reach the same minimum with a
Cholesky factor or the square root of C and its inverse; QERA's approximation for a diagonal C is
the scaling of columns that is used here for one.

Where earlier layers of the model that is built are not the fine-tune's any more, a layer is given x
instead of the fine-tune's y, and B A should give T = W y - W0 x for x (W = W0 + D). That is
reduced-rank regression (Izenman 1975) with the ridge lambda ||B A - D||_F^2 that keeps few samples
from saying more than they know: its solution without the bound on the rank is
M = D + W E[(y - x) x^T] R^-1 with R = C + lambda I, and with it the best approximation of M in the
metric of R, as above. AA-SVD (arXiv 2604.02119) compresses weights towards such targets.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from loratool.errors import InputError, UsageError
from loratool.linalg import Factorization, RankPolicy, SecondMoment, Weighted, tiles
from loratool_plugins.factorizers import _spectral as spectral
from loratool_plugins.factorizers.krylov import Krylov, expected_gain, residual_bound

if TYPE_CHECKING:
    from collections.abc import Callable

    import torch

    from loratool.linalg import Context

# A shorter side up to this is solved exactly: an fp64 eigenproblem of a second or less.
_EXACT_SIDE = 1024
# Below this share of tr(C) ||D||^2 the inputs do not feel the delta at all: only rounding is left.
_NOTHING = 1e-12


@dataclass(frozen=True)
class Activation:
    """Truncated SVD in the metric of the data, with `extract --calibrate`.

    Where no second moment is known every direction counts the same, C is the identity, and the
    result is the truncated SVD of the krylov factorizer. With a rank policy by energy or ratio,
    energies are those of D C^(1/2).
    """

    ridge: float = field(
        default=1.0,
        metadata={
            "help": "with --calibrate-on merged: weight of the distance from the difference of the "
            "weights, as a share of the inputs' mean square"
        },
    )

    def __post_init__(self) -> None:
        if not 0 < self.ridge < math.inf:
            raise UsageError(f"activation: ridge must be greater than 0, not {self.ridge:g}")

    def factorize(
        self, delta: torch.Tensor, policy: RankPolicy, generator: torch.Generator
    ) -> Factorization:
        """Factorize `delta` (out, in), fp32, which may be overwritten, with C the identity.

        Raises:
            InputError: `delta` is not a matrix, is empty, or holds NaN or Inf.
        """
        return Krylov().factorize(delta, policy, generator)

    def factorize_in(
        self,
        delta: torch.Tensor,
        policy: RankPolicy,
        generator: torch.Generator,
        context: Context,
    ) -> Factorization:
        """Factorize `delta` in the metric of the context's second moment, if it has one.

        The certificate's energy is the plain one, lower than that of the truncated SVD; what was
        minimised is in `weighted`.

        Args:
            delta: (out, in), or (in, out) if `context.transposed`; fp32, may be overwritten.
            policy: how many singular values of D C^(1/2) to keep.
            generator: source of the random start, on the CPU.
            context: where the delta comes from.

        Raises:
            InputError: as `factorize`.
        """
        moment = context.moment
        if moment is None:
            return self.factorize(delta, policy, generator)
        if moment.drift is None or not bool(moment.values.any()) or not bool(delta.any()):
            return self._fitted(delta, policy, generator, context, moment)
        return self._regressed(delta, policy, generator, context, moment)

    def _regressed(
        self,
        delta: torch.Tensor,
        policy: RankPolicy,
        generator: torch.Generator,
        context: Context,
        moment: SecondMoment,
    ) -> Factorization:
        """Fit to what the fine-tune gives for its own inputs.

        The certificate's energy is of `delta`, though that is not what is fitted: where earlier
        layers' losses are made good it may be below 0.
        """
        wanted, metric = _target(delta, context, moment, self.ridge)
        found = self._fitted(wanted.clone(), policy, generator, context, metric)
        total, missed = _distance(delta, None), _distance(delta, found)
        plain = Krylov().factorize(delta.clone(), RankPolicy(found.certificate.rank), generator)
        certificate = replace(
            found.certificate,
            total=total,
            captured=total - missed,
            optimum_bound=plain.certificate.optimum_bound,
            method=f"{found.certificate.method}-merged",
        )
        if (weighted := certificate.weighted) is not None:
            wanted.sub_(plain.b @ plain.a)
            rest = wanted.t() if context.transposed else wanted
            left = sum(
                float((_times(rest[rows].double(), metric.values) * rest[rows].double()).sum())
                for rows in tiles(rest, 1 << 20)
            )
            certificate = replace(
                certificate, weighted=replace(weighted, plain=weighted.total - left)
            )
        return replace(found, certificate=certificate)

    def _fitted(
        self,
        delta: torch.Tensor,
        policy: RankPolicy,
        generator: torch.Generator,
        context: Context,
        moment: SecondMoment,
    ) -> Factorization:
        """The best approximation of a matrix in the metric of a moment."""
        target = spectral.prepare(spectral.measured(delta))
        if target.total == 0:
            return spectral.zero_factorization((delta.shape[0], delta.shape[1]))
        if target.transposed != context.transposed:
            target = target.flipped()
        metric = _Metric.of(target, moment)
        if metric.total <= _NOTHING * metric.scale * target.total:
            found = self.factorize(delta, policy, generator)
            return _with_weighted(found, Weighted(0.0, 0.0, 0.0), found.certificate.optimum_bound)
        left, steps, method = metric.leading(policy, generator)
        # A second whitening takes the rounding of fp32 directions out of the basis.
        left, _ = spectral.whitened(spectral.whitened(left)[0])
        found = spectral.composed(
            target,
            left,
            target.image(left.float()).double(),
            RankPolicy(len(left)),
            method=f"activation-{method}",
            steps=steps,
            slack=0.0,
        )
        same_rank = RankPolicy(found.certificate.rank)
        plain = Krylov().factorize(delta, same_rank, generator)
        side = plain.a if context.transposed else plain.b.t()
        other, _ = spectral.whitened(spectral.whitened(side.double())[0])
        unit = 4.0**target.exponent
        weighted = Weighted(
            metric.total * unit, metric.captured(left) * unit, metric.captured(other) * unit
        )
        return _with_weighted(found, weighted, plain.certificate.optimum_bound)


def _target(
    delta: torch.Tensor, context: Context, moment: SecondMoment, ridge: float
) -> tuple[torch.Tensor, SecondMoment]:
    """M = D + W K as D lies, fp32, and the metric R; K = E[(y - x) x^T] R^-1 is of the inputs.

    Raises:
        InputError: R is not positive definite in fp64.
    """
    import torch

    assert moment.drift is not None
    metric = moment.values.clone()
    metric.diagonal().add_(ridge * float(metric.diagonal().mean()))
    root, failed = torch.linalg.cholesky_ex(metric)
    if int(failed):
        raise InputError(
            "the inputs' second moment cannot be inverted in fp64: give more samples, or a larger "
            f"ridge than {ridge:g} (--factorizer activation:ridge=...)"
        )
    change = torch.cholesky_solve(moment.drift.t(), root)  # K^T, as R is symmetric
    made = delta.clone()
    if context.transposed:
        for columns in tiles(change, 1 << 20):
            made[columns].add_((change[columns] @ context.after.double()).float())
    else:
        for rows in tiles(made, 1 << 20):
            made[rows].add_((context.after[rows].double() @ change.t()).float())
    return made, SecondMoment(metric, moment.count)


def _distance(delta: torch.Tensor, found: Factorization | None) -> float:
    """||delta - B A||_F^2, or ||delta||_F^2, in fp64."""
    total = 0.0
    for rows in tiles(delta, 1 << 20):
        rest = delta[rows].double()
        if found is not None:
            rest -= found.b[rows].double() @ found.a.double()
        total += float(rest.square().sum())
    return total


def _with_weighted(found: Factorization, weighted: Weighted, bound: float) -> Factorization:
    certificate = replace(found.certificate, weighted=weighted, optimum_bound=bound)
    return replace(found, certificate=certificate)


@dataclass(frozen=True)
class _Metric:
    """S = U C U^T of a target's unit matrix U (out, in) and a second moment.

    Attributes:
        target: with `matrix` as (out, in).
        moment: C, fp64: (in, in) or (in,).
        quick: C in fp32, for the products of a search.
        total: tr(S) = ||U C^(1/2)||_F^2.
        scale: tr(C).
    """

    target: spectral.Target
    moment: torch.Tensor
    quick: torch.Tensor
    total: float
    scale: float

    @classmethod
    def of(cls, target: spectral.Target, moment: SecondMoment) -> _Metric:
        """Measure a target in the metric of a moment."""
        values, quick = moment.values, moment.values.float()
        matrix, total = target.matrix, 0.0
        for rows in tiles(matrix, 1 << 20):
            tile = matrix[rows] * target.gain
            total += float((_times(tile, quick).double() * tile.double()).sum())
        scale = float(values.sum() if values.dim() == 1 else values.trace())
        return cls(target, values, quick, total, scale)

    def captured(self, left: torch.Tensor) -> float:
        """tr(left S left^T) for orthonormal rows `left` (k, out), fp64."""
        image = self.target.image(left.float()).double()
        return float((_times(image, self.moment) * image).sum())

    def leading(
        self, policy: RankPolicy, generator: torch.Generator
    ) -> tuple[torch.Tensor, int, str]:
        """The leading eigenvectors of S, as rows (k, out) in fp64; steps taken; and the method."""
        if self.moment.dim() == 1:
            return self._scaled(policy, generator)
        if min(self.target.shape) > _EXACT_SIDE:
            search = _Search(self._apply, self.target.shape, policy)
            if (found := search.run(self._start(generator, search.width), generator)) is not None:
                return found, search.steps, "krylov"
        return self._exact(policy), 0, "exact"

    def _scaled(
        self, policy: RankPolicy, generator: torch.Generator
    ) -> tuple[torch.Tensor, int, str]:
        """By the truncated SVD of U with its columns scaled by the roots of a diagonal C."""
        scaled = self.target.matrix * (self.moment.sqrt() * self.target.gain).float()
        found = Krylov().factorize(scaled.contiguous(), policy, generator)
        return found.b.t().double(), found.certificate.steps, "diagonal"

    def _exact(self, policy: RankPolicy) -> torch.Tensor:
        """By an fp64 eigenproblem of the shorter side."""
        out, columns = self.target.shape
        unit = self.target.matrix.double() * self.target.gain
        if out <= columns:
            values, vectors = spectral.eigenvectors(unit @ self.moment @ unit.t())
        else:
            own, basis = spectral.eigenvectors(self.moment)
            root = basis * own.clamp(min=0.0).sqrt()
            image = unit @ root
            values, vectors = spectral.eigenvectors(image.t() @ image)
            vectors = image @ vectors
        rank = self._choose(policy, values.flip(0).clamp(min=0.0)) or len(values)
        leading: torch.Tensor = vectors[:, -rank:].flip(1).t()
        return leading

    def _choose(self, policy: RankPolicy, energies: torch.Tensor) -> int | None:
        return policy.choose(energies, float(energies.sum()), self.target.shape)

    def _start(self, generator: torch.Generator, width: int) -> torch.Tensor:
        rows = spectral.random_rows(width, self.target.shape[1], generator)
        return (_times(rows, self.quick) @ self.target.matrix.t()).mul_(self.target.gain)

    def _apply(self, rows: torch.Tensor) -> torch.Tensor:
        """`rows` (k, out) times S / tr(S), in fp32."""
        image = _times(self.target.image(rows), self.quick)
        return (image @ self.target.matrix.t()).mul_(self.target.gain / self.total)


def _times(rows: torch.Tensor, moment: torch.Tensor) -> torch.Tensor:
    return rows * moment if moment.dim() == 1 else rows @ moment


def _combined(vectors: torch.Tensor, rank: int, basis: torch.Tensor) -> torch.Tensor:
    return vectors[:, :rank].t() @ basis.double()


class _Search:
    """An adaptive block Krylov search for the leading eigenvectors of S / tr(S).

    The krylov factorizer's method and rules for stopping (see there), on a matrix that is known by
    its products only.

    Attributes:
        width: rows of a block.
        steps: blocks in the basis so far.
    """

    def __init__(
        self,
        apply: Callable[[torch.Tensor], torch.Tensor],
        shape: tuple[int, int],
        policy: RankPolicy,
        tolerance: float = 1e-3,
    ) -> None:
        self.width = 16 if policy.limit(shape) <= 16 else 32
        self.steps = 0
        self._apply = apply
        self._shape = shape
        self._policy = policy
        self._tolerance = tolerance

    def run(self, block: torch.Tensor, generator: torch.Generator) -> torch.Tensor | None:
        """Search from a first block (width, out).

        Returns:
            The directions that the policy asks for, as rows (k, out) in fp64, good to about fp32;
            None if the basis would pass half of the shorter side.
        """
        import torch

        basis, images = torch.empty(0, self._shape[0]), torch.empty(0, self._shape[0])
        history: list[torch.Tensor] = []
        rank: int | None = None
        vectors = torch.empty(0, 0, dtype=torch.float64)
        while len(basis) + self.width <= min(self._shape) // 2:
            rows, outside = spectral.extension(block, basis, generator)
            if history and rank is not None and self._is_good(history, vectors, rank, outside):
                return _combined(vectors, rank, basis)
            block = self._apply(rows)
            basis, images = torch.cat([basis, rows]), torch.cat([images, block])
            self.steps += 1
            products = (basis @ images.t()).double()
            values, vectors = spectral.eigenvectors((products + products.t()) / 2)
            energies, vectors = values.flip(0).clamp_(min=0.0), vectors.flip(1)
            rank = self._policy.choose(energies, 1.0, self._shape)
            history.append(energies)
            if rank is not None:
                missed = 1.0 - float(energies.sum())
                if missed <= self._tolerance * float(energies[:rank].sum()):
                    return _combined(vectors, rank, basis)
        return None

    def _is_good(
        self, history: list[torch.Tensor], vectors: torch.Tensor, rank: int, outside: torch.Tensor
    ) -> bool:
        energies = history[-1]
        if rank >= len(energies):
            return False
        captured = float(energies[:rank].sum())
        past = [0.0, 0.0, *(float(known[:rank].sum()) for known in history)]
        if expected_gain(*past[-3:]) > self._tolerance / 2 * captured:
            return False
        ends = vectors[-len(outside) :, :rank]
        residual = float((ends * (outside @ ends)).sum())
        return residual_bound(energies, rank, residual) <= self._tolerance * captured
