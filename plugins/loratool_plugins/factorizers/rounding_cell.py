"""Recovers a LoRA that was merged into bf16 or fp16 weights, from what rounding has left of it.

Truncated SVD takes the rounding noise for a part of the change. But rounding is no noise: every
merged weight confines its own change to an interval, its rounding cell (`_cells`), and all of them
together tell the adapter several times better. Whether there was one at all is asked of cells that
the fit has not seen: it must predict how the weights in them came out.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, NamedTuple

from loratool.linalg import Factorization, RankPolicy, squared_norm, tiles
from loratool.suspicion import RECOVERED, gates, is_coarse
from loratool_plugins.factorizers._cells import Cells, Fit, Replay, could_be, fitted
from loratool_plugins.factorizers.krylov import Krylov

if TYPE_CHECKING:
    import torch

    from loratool.linalg import Context

# Merged LoRA: 0.64 (at |delta|/|W| = 0.03%) to 0.98 of the held-out cells; full fine-tunes at most
# 0.44. Twice the rank: 0.5 to 0.94.
_ACCEPTED = 0.6
_HELD_OUT, _MOST_HELD_OUT = 0.05, 1 << 17
# So many predictions tell 0.6 from 0.44 by five standard deviations.
_LEAST_ASKED = 250
# Steps that tell ranks apart, and more for a fit that comes so close.
_TRIAL_STEPS, _MANY_STEPS, _CLOSE = 20, 60, 0.5
# Ranks beyond the best one are not tried once the share has fallen by this much.
_WORSE = 0.03
# A drop between neighbouring singular values of a fit that may be its true rank.
_GAP = 1.5
# Of the smaller side: a larger rank has as many unknowns as there are cells.
_LARGEST_SHARE = 0.25


@dataclass(frozen=True)
class RoundingCell:
    """Recovery of a merged and rounded LoRA; truncated SVD (krylov) where there was none.

    The method of a certificate tells which it was, its details why. Needs two more fp32 copies of
    the largest matrix than krylov does.
    """

    steps: int = field(
        default=50, metadata={"help": "steps of the last fit; more than 100 change little"}
    )

    # The factors hold more than the weights' own type could keep.
    is_precise = True

    def factorize(
        self, delta: torch.Tensor, policy: RankPolicy, generator: torch.Generator
    ) -> Factorization:
        """Factorize `delta` as krylov does: without the weights there are no cells.

        Raises:
            InputError: `delta` is not a matrix, is empty, or holds NaN or Inf.
        """
        return refused(Krylov().factorize(delta, policy, generator), "only the delta is known")

    def factorize_in(
        self,
        delta: torch.Tensor,
        policy: RankPolicy,
        generator: torch.Generator,
        context: Context,
    ) -> Factorization:
        """Recover the adapter that was merged, or factorize `delta` as krylov does.

        Args:
            delta: (out, in), fp32, which may be overwritten.
            policy: how many singular values to keep; no larger rank is tried.
            generator: source of random numbers, on the CPU.
            context: the weights before and after.

        Raises:
            InputError: `delta` is not a matrix, is empty, or holds NaN or Inf.
        """
        plain = Krylov().factorize(delta, policy, generator)
        if plain.certificate.total == 0:
            return plain
        found = self.recovered(plain, policy, generator, context)
        return refused(plain, found.reason, found.held_out) if isinstance(found, Refusal) else found

    def recovered(
        self,
        plain: Factorization,
        policy: RankPolicy,
        generator: torch.Generator,
        context: Context,
    ) -> Factorization | Refusal:
        """The adapter that was merged, or why there was none.

        Args:
            plain: the best approximation of the delta for `policy`.
            policy: how many singular values to keep; no larger rank is tried.
            generator: source of random numbers.
            context: the weights before and after.
        """
        if not is_coarse(context.after):
            kind = str(context.after.dtype).removeprefix("torch.")
            return Refusal(f"{kind} weights: only what was rounded to bf16 or fp16 has such cells")
        shape = (context.after.shape[0], context.after.shape[1])
        largest = max(1, min(policy.limit(shape), int(_LARGEST_SHARE * min(shape))))
        start = _start(plain, largest, generator, context)
        total = start.certificate.total
        ranks = _candidates(context.after, total, start.sigma, largest)
        if not ranks:
            return Refusal(
                f"no LoRA of rank {largest} or less: more than rounding is left; if its rank is "
                "larger, so must --rank be"
            )
        exponent = math.frexp(math.sqrt(total))[1]
        trials = _Trials(_as_fit(start, exponent), context, exponent, generator)
        if trials.asked < _LEAST_ASKED:
            return Refusal("too few weights have changed to tell")
        best = trials.best(ranks)
        if best.held_out < _ACCEPTED:
            return Refusal("held-out weights came out otherwise than predicted", best.held_out)
        fit = trials.finished(best, self.steps)
        if not all(bool(part.isfinite().all()) for part in fit):
            return Refusal("the fit does not converge", best.held_out)
        return _factorization(fit, exponent, policy, context, start, best, self.steps)


class Refusal(NamedTuple):
    """Why a matrix is not recovered.

    Attributes:
        reason: in a few words.
        held_out: share of the held-out cells predicted, if it came to that.
    """

    reason: str
    held_out: float | None = None


def refused(plain: Factorization, reason: str, held_out: float | None = None) -> Factorization:
    """A plain factorization that says why it is nothing better."""
    facts: dict[str, Any] = {"refused": reason}
    if held_out is not None:
        facts["held_out"] = held_out
    certificate = replace(
        plain.certificate,
        method=f"{plain.certificate.method} (not a rounded LoRA)",
        details={**plain.certificate.details, "recovery": facts},
    )
    return replace(plain, certificate=certificate)


class Trial(NamedTuple):
    """A fit of one rank that has not seen the held-out cells.

    Attributes:
        fit: the matrix found.
        held_out: share of the held-out cells that it predicts.
        replay: how the merge is taken to have rounded.
        steps: of the fit.
    """

    fit: Fit
    held_out: float
    replay: Replay
    steps: int

    @property
    def rank(self) -> int:
        """Its rank."""
        return len(self.fit.sigma)


class _Trials:
    """Fits of one matrix that are judged by the same held-out cells."""

    def __init__(
        self, start: Fit, context: Context, exponent: int, generator: torch.Generator
    ) -> None:
        import torch

        self._start = start
        self._context = context
        self._exponent = exponent
        size = context.after.numel()
        count = min(int(_HELD_OUT * size), _MOST_HELD_OUT)
        self._places = torch.randint(0, size, (count,), generator=generator)
        self._use("sum")

    def _use(self, replay: Replay) -> None:
        """Replay a merge in one of two ways; the same cells are held out of both."""
        before, after = self._context.before, self._context.after
        self._replay = replay
        self._cells = Cells(before, after, replay, self._exponent)
        self._held_out = self._cells.hide(self._places)

    @property
    def asked(self) -> int:
        """How many predictions a trial is judged by."""
        return self._held_out.count

    def best(self, ranks: list[int]) -> Trial:
        """The rank and the way of rounding that predict the held-out cells best.

        Args:
            ranks: which to try, ascending.
        """
        best = self._trial(self._start.cut(ranks[0]))
        for rank in ranks[1:]:
            found = self._trial(self._start.cut(rank))
            if found.held_out > best.held_out:
                best = found
            elif found.held_out < best.held_out - _WORSE and best.held_out >= _ACCEPTED:
                break
        best = self._between(best)
        if _CLOSE <= best.held_out < _ACCEPTED:
            best = self._trial(self._start.cut(best.rank), _MANY_STEPS)
        if best.held_out >= _CLOSE:
            best = self._other_replay(best)
        return best

    def _other_replay(self, best: Trial) -> Trial:
        """The better of a trial and its like in which the delta was rounded first."""
        before, after = self._context.before, self._context.after
        if not could_be("delta, then sum", before, after):
            return best
        self._use("delta, then sum")
        found = self._trial(self._start.cut(best.rank), best.steps)
        return found if found.held_out > best.held_out else best

    def _between(self, best: Trial) -> Trial:
        """Look for a rank between powers of two, where the singular values tell."""
        half = best.rank // 2
        drops = best.fit.sigma[half:-1] / best.fit.sigma[half + 1 :]
        if len(drops) == 0 or float(drops.max()) < _GAP:
            return best
        found = self._trial(self._start.cut(half + 1 + int(drops.argmax())))
        return found if found.held_out > best.held_out else best

    def _trial(self, start: Fit, steps: int = _TRIAL_STEPS) -> Trial:
        fit = fitted(start, self._cells, steps)
        return Trial(fit, self._held_out.share(fit), self._replay, steps)

    def finished(self, best: Trial, steps: int) -> Fit:
        """The best trial, continued with all cells."""
        if best.replay != self._replay:
            self._use(best.replay)
        self._cells.show(self._held_out)
        return fitted(best.fit, self._cells, steps)


def _start(
    plain: Factorization, largest: int, generator: torch.Generator, context: Context
) -> Factorization:
    """Where fits of any rank begin: the best approximation of rank `largest`."""
    if plain.certificate.rank >= largest:
        return plain
    delta = context.after.float() - context.before.float()
    return Krylov().factorize(delta, RankPolicy(largest), generator)


def _candidates(after: torch.Tensor, total: float, sigma: torch.Tensor, largest: int) -> list[int]:
    """Powers of two, and the largest rank, that leave no more than rounding."""
    passed = {g.rank for g in gates(after, total, sigma.square().tolist()) if g.passed}
    powers = [2**n for n in range(largest.bit_length())]
    return sorted(passed & {*powers, largest, min(largest, len(sigma))})


def _as_fit(found: Factorization, exponent: int) -> Fit:
    """Balanced factors taken apart again, in units of 2^exponent."""
    root = found.sigma.sqrt()
    return Fit(
        left=(found.b.double() / root).float(),
        sigma=(found.sigma * 2.0**-exponent).float(),
        right=(found.a.double() / root[:, None]).float(),
    )


def _factorization(
    fit: Fit,
    exponent: int,
    policy: RankPolicy,
    context: Context,
    plain: Factorization,
    best: Trial,
    steps: int,
) -> Factorization:
    """Balanced factors with what they are, as any others, against the delta."""
    sigma = fit.sigma.double() * 2.0**exponent
    total = plain.certificate.total
    shape = (context.after.shape[0], context.after.shape[1])
    rank = policy.choose(sigma.square(), total, shape) or len(sigma)
    sigma = sigma[:rank]
    root = sigma.sqrt()
    b = (fit.left[:, :rank].double() * root).float()
    a = (fit.right[:rank].double() * root[:, None]).float()
    lost = 0.0
    for rows in tiles(context.after):
        change = context.after[rows].float() - context.before[rows].float()
        lost += squared_norm(change.addmm_(b[rows], a, alpha=-1))
    facts = {"rank": best.rank, "held_out": best.held_out, "replay": best.replay}
    return Factorization(
        a=a,
        b=b,
        sigma=sigma,
        certificate=replace(
            plain.certificate,
            rank=rank,
            captured=max(0.0, total - lost),
            rounding=max(0.0, lost - total),  # of a change below the rounding of the merge
            method=RECOVERED,
            steps=best.steps + steps,
            details={"recovery": facts},
        ),
        is_precise=True,
    )
