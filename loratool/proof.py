"""Whether a merged tensor is the base's with an update added: what a replay says, judged.

The rules for low-rank updates, in this order; `loratool.replay` explains the bound and the counts.

1. The merged tensor is the base's, bit for bit, or its rounding to the merged type. If a weight is
   then outside the bound, the update would have shown: "not applied". Otherwise a merge may give
   just these bits: "cannot be told".
2. No weight is outside the bound at the expected strength. If at least 16 weights changed where the
   replay changes them, and agree with it: "applied". A change that has nothing to do with the
   update agrees with its sign half of the time at best, so that 16 agree by chance once in 65,536
   tensors. Fewer are "cannot be told"; they count in the evidence of the whole model.
3. The same at another strength, the one that most weights of a sample allow: "another strength".
   Strengths closer than about 1% in bf16, or 0.1% in fp16, are within each other's bound.
4. All weights are an upper or lower neighbour of the exact sum, the farther one as often as
   rounding at random makes it (5 standard deviations in each of two groups, a chance of 1e-6), and
   their mean is at the strength (within 4, 6e-5): rounded stochastically, else as 2 and 3.
5. All weights are as near as a product of factors with 8 or 11 bits (TF32) brings them; at least
   one in a thousand is not the replay's, and either ten times more than are outside the bound, or
   one in a hundred is outside; and the excess over rounding is 1e-5 of the update's energy at most
   (TF32 makes 1e-7), give or take 5 standard deviations of the rounding: a coarse product, else as
   2 and 3. Edited weights are few, or further off.
6. More than half of the informative weights agree, by 4 standard deviations (3e-5), at one of the
   two strengths: "other changes", as after a merge some weights were edited. Where something as
   large as the update was added instead, less than half agree. With nine in ten it is contained.
7. Else least squares give the strength, over the weights whose update is at least eight units in
   the last place. What else was changed is taken as independent of the update: the standard error
   is about ||R - w D|| / (||D|| sqrt(n)), which holds for rounding and for another low-rank update,
   the cosine of random matrices being 1 / sqrt(n). At the expected strength within 4 of them,
   or more than 8 from zero and explaining 10% of the change: "other changes". Else "not applied".
   If fewer than 64 weights are that large, the informative ones serve, and no strength is told
   because rounding biases it; with fewer than 16 of them, "other changes" is all there is to say.

Rules 1 to 3 know no chance: a tensor merged in any of the ways of `loratool.replay` passes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch

from loratool.dtypes import dtype_name, is_float, torch_dtype
from loratool.errors import InputError
from loratool.linalg import is_finite, tiles
from loratool.replay import Names, Replay, differ, precision
from loratool.reports import format_share
from loratool.residual import bit_patterns
from loratool.rounding import round_to
from loratool.tally import Moments, Tally, Way

Verdict = Literal["applied", "another strength", "not applied", "other changes", "cannot be told"]

EVIDENCE = 16
STOCHASTIC = "by stochastic rounding"
COARSE = "by a product of rounded factors"
_AGREEMENT = 0.9
_REPRODUCED = 0.99
_SIGNIFICANT = 8
_AT_STRENGTH = 4
_CHANCE = 5
_EXPLAINS = 0.1
_COARSE_ENERGY = 1e-5
_COARSE_SHARE = 1e-3
_COARSE_OUTSIDE = 1e-2
_COARSE_TIMES = 10
_LEAST_SQUARES_BIAS = 0.005  # through rounding, see `loratool.replay`
_FEWEST_VISIBLE = 64
_ENOUGH_VISIBLE = 4096  # of a sample
_PROBE = 1 << 16


@dataclass(frozen=True)
class Strength:
    """How strongly an update was applied.

    Attributes:
        value: the expected strength, or else the roundest number that fits.
        low: with `high`, what else would fit: hard limits for a merge, two standard errors beside
            other changes. NaN where too few weights tell.
    """

    value: float
    low: float = math.nan
    high: float = math.nan

    @property
    def is_limited(self) -> bool:
        """Whether limits are known."""
        return math.isfinite(self.low) and math.isfinite(self.high)

    def as_json(self) -> dict[str, float]:
        """Plain data."""
        return {"value": self.value, "low": self.low, "high": self.high}

    def __str__(self) -> str:
        if not self.is_limited:
            return f"{self.value:.6g}"
        error = max(self.value - self.low, self.high - self.value)
        return f"{self.value:.6g} (±{error:.2g})"


@dataclass(frozen=True)
class Finding:
    """The verdict on one tensor.

    Attributes:
        verdict: in short.
        reason: in words.
        strength: of the update, where it is known.
        way: how it was merged, in words, where that is known.
        contained: whether the update is in the tensor at the expected strength, whatever else is.
        tally: the counts behind it, at the strength found or else at the expected one.
    """

    verdict: Verdict
    reason: str
    strength: Strength | None = None
    way: str = ""
    contained: bool = False
    tally: Tally | None = None

    def as_json(self) -> dict[str, Any]:
        """Plain data, with what was counted."""
        found: dict[str, Any] = {
            "verdict": self.verdict,
            "reason": self.reason,
            "contained": self.contained,
        }
        if self.strength is not None:
            found["strength"] = self.strength.as_json()
        if self.way:
            found["way"] = self.way
        if tally := self.tally:
            found |= {
                "weights": tally.elements,
                "changed": tally.elements - tally.same,
                "informative": tally.informative,
                "agreeing": tally.agreeing,
                "reproduced": tally.reproduced,
                "outside": tally.outside,
                "explained": tally.explained,
                "residual": tally.residual,
                "rounding_noise": tally.noise,
            }
        return found


def prove_update(replay: Replay, expected: float, stochastic: bool = False) -> Finding:
    """Judge a low-rank update by the rules above.

    Args:
        replay: the tensor, its base and the update.
        expected: the strength that it should have been merged at, not 0.
        stochastic: whether the model's other tensors were rounded stochastically; too few weights
            to tell are then no contradiction.

    Raises:
        InputError: NaN or Inf in a tensor.
    """
    sample = replay.sample()
    other = None
    if _is_elsewhere(sample, expected):  # spares a pass
        other = _at_another_strength(replay, sample, expected)
        if other is not None and _is_merge(other):
            return _merged(other, sample, expected)
    first = _best(replay, sample, expected)
    if first.same == first.elements and not (stochastic and 0 < first.outside < EVIDENCE):
        return _unchanged(first)
    if first.update == 0:
        return Finding("other changes", "changed, but the update is zero", tally=first)
    if not first.outside:
        return _merged(first, sample, expected)
    other = other or _at_another_strength(replay, sample, expected)
    if other is not None and _is_merge(other) and other.equal > first.equal:
        return _merged(other, sample, expected)
    if (loose := _loosely_merged(replay, sample, expected, stochastic)) is not None:
        return loose
    agreeing = [t for t in (first, other) if t is not None and _mostly_agrees(t)]
    edited = _edited(agreeing[0], replay, sample, expected) if agreeing else None
    if edited is not None and edited.contained:
        return edited
    otherwise = _otherwise(replay, sample, first)
    return edited if edited is not None and not otherwise.contained else otherwise


def _is_elsewhere(sample: Replay, expected: float) -> bool:
    """Whether a sample was changed, and by something else than the update as expected."""
    trial = _trials(sample, expected)[0]
    changed = trial.same < trial.elements and trial.update > 0
    return bool(trial.outside) and changed and not _mostly_agrees(trial)


def _is_merge(tally: Tally) -> bool:
    return not tally.outside and tally.agreeing >= EVIDENCE


def _best(replay: Replay, sample: Replay, strength: float) -> Tally:
    """The tally of the way that explains the tensor best, chosen by the sample."""
    trials = _trials(sample, strength)
    found = trials[0] if sample is replay else replay.tally(strength, trials[0].way)
    for trial in trials[1:]:
        if not found.outside or trial.outside:
            break
        if trial.way.start != found.way.start:  # the bound is another one
            other = replay.tally(strength, trial.way)
            found = min(found, other, key=lambda tally: tally.outside)
    return found


def _trials(sample: Replay, strength: float) -> list[Tally]:
    """The ways on a sample, the best first."""
    trials: list[Tally] = []
    hopeless: set[Way] = set()
    for way in sample.ways():
        if way.start in hopeless:
            continue
        trial = sample.tally(strength, way)
        trials.append(trial)
        if trial.equal == trial.elements:
            break
        if trial.outside and not _mostly_agrees(trial):
            hopeless.add(way.start)
    return sorted(
        trials,
        key=lambda trial: (
            trial.outside > 0,
            0 if trial.way.start in hopeless else -trial.reproduced,
        ),
    )


def _unchanged(tally: Tally) -> Finding:
    if tally.outside:
        would = f"{tally.outside:,} of {tally.elements:,} weights would show the update"
        return Finding("not applied", f"the base's weights; {would}", tally=tally)
    if tally.update == 0:
        return Finding("cannot be told", "the update is zero", tally=tally)
    reason = "the base's weights; rounding would hide the update"
    return Finding("cannot be told", reason, tally=tally)


def _merged(tally: Tally, sample: Replay, expected: float) -> Finding:
    if tally.agreeing < EVIDENCE:
        reason = f"only {tally.agreeing} weights tell, and agree; rounding hides the rest"
        return Finding("cannot be told", reason, tally=tally)
    share = format_share(tally.reproduced / tally.informative)
    reason = f"{share} of {tally.informative:,} changed weights reproduced to the bit"
    return _applied(tally, expected, reason, describe(tally, sample.dtype), _limits(sample, tally))


def _applied(tally: Tally, expected: float, reason: str, way: str, strength: Strength) -> Finding:
    if tally.strength == expected:
        return Finding("applied", reason, strength, way, True, tally)
    return Finding("another strength", reason, strength, way, False, tally)


def describe(tally: Tally, dtype: str) -> str:
    """The way of a merge in words, where its replay tells it from the others."""
    if tally.reproduced < _REPRODUCED * tally.informative:
        return "the product's sums rounded in another order, as PEFT does it in fp32"
    cast, factors, delta = tally.way
    words = "rounded once: loratool's way, and PEFT's by default"
    if delta:
        words = "delta rounded first: PEFT's way with safe_merge, or on a GPU"
    if factors:
        words = "factors rounded first"
    if factors and delta:
        words = "factors and delta rounded first: PEFT's way without autocast_adapter_dtype"
    return f"{words}; base rounded to {dtype} before" if cast else words


def _limits(sample: Replay, tally: Tally) -> Strength:
    support = sample.supported(tally.strength, tally.way)
    if support.low <= 0 <= support.high:  # the sample happens to hold no weight that tells
        return Strength(tally.strength)
    low, high = min(support.low, tally.strength), max(support.high, tally.strength)
    return Strength(tally.strength, low, high)


def _at_another_strength(replay: Replay, sample: Replay, expected: float) -> Tally | None:
    """The tally at the strength that most weights allow, if that is another one."""
    supports = [sample.supported(expected, way) for way in _starts(replay)]
    low, high, _ = min(supports, key=lambda support: support.missing)
    found = None
    for _ in range(2):
        value = roundest(low, high, expected)
        if value in (0, expected):
            return found
        found = _best(replay, sample, value)
        if not found.outside or not _mostly_agrees(found):
            return found
        # A sample leaves more room than a strength that is no round number may need.
        every = replay.tally(value, found.way, "limits")
        low, high = every.low, every.high
        if low > high:
            return found
    return found


def _starts(replay: Replay) -> list[Way]:
    """The ways that have bounds of their own."""
    return [way for way in replay.ways() if way == way.start]


def roundest(low: float, high: float, expected: float) -> float:
    """The number in [low, high] with the fewest digits; `expected`, 1 and -1 before all others."""
    if not (math.isfinite(low) and math.isfinite(high)):
        return expected
    for value in (expected, 1.0, -1.0):
        if low <= value <= high:
            return value
    middle = (low + high) / 2
    rounded = (round(middle, digits) for digits in range(12))
    return next((value for value in rounded if low <= value <= high and value), middle)


def _loosely_merged(
    replay: Replay, sample: Replay, expected: float, stochastic: bool
) -> Finding | None:
    """Rules 4 and 5: the sample proposes, the whole tensor decides."""
    for way in _starts(replay):
        trial = sample.tally(expected, way, "neighbours")
        for strength in (expected, *_other_strength(trial)):
            if strength != expected:
                trial = sample.tally(strength, way, "neighbours")
            if not (_is_stochastic(trial) or _is_near(trial)):
                continue
            whole = trial if sample is replay else replay.tally(strength, way, "neighbours")
            words = COARSE if _is_coarse(whole) else ""
            words = STOCHASTIC if _is_stochastic(whole) else words
            fit = whole.whole
            if words and _SIGNIFICANT * fit.error < 1:
                spread = _strength(fit, strength, strength)
                reason = f"every weight is as near as can be {words}"
                return _applied(whole, expected, reason, words, spread)
            if words and stochastic:
                reason = "too few weights tell how they were rounded"
                return Finding("cannot be told", reason, tally=whole)
    return None


def _other_strength(tally: Tally) -> list[float]:
    """The strength of least squares, if it is another one and clearly not 0."""
    fit = tally.whole
    margin = _AT_STRENGTH * fit.error
    if abs(fit.value - 1) <= margin or abs(fit.value) <= _SIGNIFICANT * fit.error:
        return []
    low, high = sorted(tally.strength * end for end in (fit.value - margin, fit.value + margin))
    return [roundest(low, high, tally.strength)]


def _is_stochastic(tally: Tally) -> bool:
    fit = tally.whole
    by_chance = all(abs(chances.deviation) <= _CHANCE for chances in tally.chances)
    return not tally.beyond and by_chance and abs(fit.value - 1) <= _AT_STRENGTH * fit.error


def _is_near(tally: Tally) -> bool:
    # (x^2 - 1/12) of a rounding error x, uniform in half a unit, has a variance of 0.8 / 12^2.
    spread = _CHANCE * math.sqrt(0.8 / tally.elements) * tally.noise
    excess = tally.residual - tally.noise
    return not tally.coarse and excess <= _COARSE_ENERGY * tally.update + spread


def _is_coarse(tally: Tally) -> bool:
    wrong = tally.informative - tally.reproduced
    often = wrong >= _COARSE_TIMES * tally.outside
    often |= tally.outside >= _COARSE_OUTSIDE * tally.informative
    return _is_near(tally) and often and wrong >= _COARSE_SHARE * tally.informative


def _mostly_agrees(tally: Tally) -> bool:
    half = tally.informative / 2
    return tally.agreeing >= max(EVIDENCE, half + _AT_STRENGTH * math.sqrt(half / 2))


def _edited(tally: Tally, replay: Replay, sample: Replay, expected: float) -> Finding:
    row, column = divmod(tally.first_outside, replay.columns)
    reason = (
        f"{tally.outside:,} of {tally.elements:,} weights are not what a merge gives, the first at "
        f"[{row}, {column}]"
    )
    way, strength = describe(tally, replay.dtype), _limits(sample, tally)
    contained = tally.strength == expected and tally.agreeing >= _AGREEMENT * tally.informative
    return Finding("other changes", reason, strength, way, contained, tally)


def _otherwise(replay: Replay, sample: Replay, first: Tally) -> Finding:
    """Rule 7."""
    expected, way = first.strength, first.way.start
    tally = sample.tally(expected, way, "squares")
    if tally.visible.count < _ENOUGH_VISIBLE and sample is not replay:
        tally = replay.tally(expected, way, "squares")
    if tally.visible.count < _FEWEST_VISIBLE:
        return _barely_visible(tally)
    fit = tally.visible
    share = f"{fit.explained:.1%} of the change"
    at_expected = abs(fit.value - 1) <= _AT_STRENGTH * fit.error + _LEAST_SQUARES_BIAS
    contained = at_expected and _SIGNIFICANT * fit.error < 1
    if contained or (_is_significant(fit) and fit.explained >= _EXPLAINS):
        strength = _strength(fit, expected if contained else fit.value * expected, expected)
        reason = f"the update at strength {strength} is {share}"
        return Finding("other changes", reason, strength, "", contained, first)
    return Finding("not applied", f"something else was added: the update is {share}", tally=first)


def _barely_visible(tally: Tally) -> Finding:
    fit = tally.told
    reason = (
        f"of {tally.informative:,} weights that the update would change, {tally.agreeing:,} did so"
    )
    partly = tally.informative < EVIDENCE
    partly |= abs(fit.value) > _AT_STRENGTH * fit.error and fit.explained >= _EXPLAINS
    return Finding("other changes" if partly else "not applied", reason, tally=tally)


def _is_significant(fit: Moments) -> bool:
    return abs(fit.value) > _SIGNIFICANT * fit.error


def _strength(fit: Moments, value: float, unit: float) -> Strength:
    error = abs(unit) * (2 * fit.error + _LEAST_SQUARES_BIAS * abs(fit.value))
    return Strength(value, fit.value * unit - error, fit.value * unit + error)


@dataclass(frozen=True)
class Difference:
    """Where two tensors differ.

    Attributes:
        count: number of values.
        first: flat index of the first.
    """

    count: int
    first: int


def difference(
    found: torch.Tensor, expected: torch.Tensor, via: str | None, names: Names
) -> Difference | None:
    """Compare values after the conversions that a merge may do; None if they are equal.

    Args:
        found: the merged tensor, of any shape and dtype.
        expected: what it should hold, of the same shape and any dtype.
        via: a dtype that `expected` may have been rounded to first, or None.
        names: for errors; `base` is that of `expected`.

    Raises:
        InputError: NaN or Inf where there should be a number.
    """
    one, other = found.reshape(-1), expected.reshape(-1)
    held = precision(one[:_PROBE])
    count, first = 0, -1
    for part in tiles(one):
        values, wanted = one[part], other[part]
        wrong = _unlike(values, wanted, held)
        if via is not None and wrong.any():
            wrong &= _unlike(values, converted(wanted, via), held)
        if wrong.any():
            if is_finite(wanted) and not is_finite(values):
                raise InputError(f"{names.merged}: holds NaN or Inf, the base does not")
            if first < 0:
                first = part.start + int(wrong.argmax())
            count += int(np.count_nonzero(wrong))
    return Difference(count, first) if count else None


def _unlike(values: torch.Tensor, wanted: torch.Tensor, held: str) -> np.ndarray:
    """Where values are neither those wanted, nor these as the merged model holds them."""
    stored = dtype_name(values.dtype)
    wrong = differ(bit_patterns(values), bit_patterns(converted(wanted, stored)))
    if wrong.any() and held != stored:
        narrow = converted(converted(wanted, held), stored)
        wrong &= differ(bit_patterns(values), bit_patterns(narrow))
    if wrong.any() and is_float(stored):
        wrong &= ~(values.float().isnan() & wanted.float().isnan()).numpy()
    return wrong


def converted(values: torch.Tensor, dtype: str) -> torch.Tensor:
    """Values in another dtype, rounded once."""
    kind = torch_dtype(dtype)
    once = values.dtype == torch.float64 or kind.itemsize == 1  # torch would round twice, or clamp
    if once and values.is_floating_point() and is_float(dtype):
        return round_to(values.double(), dtype)
    return values.to(kind)
