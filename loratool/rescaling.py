"""From an update's factors to factors of another strength, scale, rank, layout or type.

Everything here touches values; the step that plans it touches headers only. An expert's matrix is
treated as any other, but all experts of a weight get one rank.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from loratool.adapter import LazyUpdate
from loratool.dtypes import torch_dtype
from loratool.errors import InputError
from loratool.experts import gathered, matrices
from loratool.finite import require_sound
from loratool.linalg import Certificate, RankPolicy, is_finite
from loratool.lowrank import balanced, compress, exact_certificate, padded, rounded_factors
from loratool.rank_choice import Factors, RankChoice
from loratool.rescale_request import Request, Sorted
from loratool.scaling import Unfactored, in_dtype, rank_of, rounding, times, under_scale
from loratool.updates import KIND_NAMES, Dense, Experts, LoHa, LoKr, LowRank, Sparse, tensors_of


@dataclass(frozen=True)
class Rescaled:
    """What became of one update.

    Attributes:
        rank: of the result; 0 if it has no factors A and B.
        scale: of the result.
        strength: the delta asked for, as a multiple of the delta that was; None if that was 0.
        certificate: its error, against the delta asked for.
        nbytes: of both factors, or of all its tensors.
    """

    rank: int
    scale: float
    strength: float | None
    certificate: Certificate
    nbytes: int


class Rescaler:
    """Computes the linear updates of one adapter; tasks of several threads share it.

    Attributes:
        results: name -> what became of an update, as they are computed.
        left_out: updates that the budget gives no rank -> ||delta||_F^2 of the delta asked for.
    """

    def __init__(self, request: Request, updates: Sorted, label: str) -> None:
        """Check what headers show.

        Args:
            request: what to do.
            updates: of the adapter, without problems.
            label: what errors call the adapter.

        Raises:
            InputError: the budget is smaller than the least that can be written.
        """
        self._request = request
        self._sorted = updates
        self._label = label
        beside = {weight.name for weight in updates.beside.values()} | updates.entries
        self._ranks = RankChoice(request, updates.factored, label, kept=beside)
        self.results: dict[str, Rescaled] = {}
        self.left_out: dict[str, float] = {}

    @property
    def energy(self) -> float:
        """Share of the squared norm of all factors together that is kept, left-out ones counted."""
        certificates = [result.certificate for result in self.results.values() if result.rank]
        total = sum(c.total for c in certificates) + sum(self.left_out.values())
        return sum(c.captured for c in certificates) / total if total > 0 else 1.0

    def planned(self, update: LazyUpdate) -> LazyUpdate:
        """The update that is computed when it is loaded; its rank is told where headers tell it."""
        result = replace(update, dtype=self._dtype(update), stored=())
        if update.name in self._sorted.factored:
            factors, rank = self._sorted.factored[update.name], self._ranks.planned(update)
            if update.name in self._sorted.entries:
                return replace(result, load=lambda: self._sparse(update, factors), rank=rank)
            return replace(result, load=lambda: self._factors(factors), rank=rank)
        if (weight := self._sorted.beside.get(update.name)) is not None:
            return replace(result, load=lambda: self._bias(update, weight))
        if update.name in self._sorted.others:
            return replace(result, load=lambda: self._other(update))
        return update

    def _dtype(self, update: LazyUpdate) -> str:
        return self._request.dtype or update.dtype

    def _origin(self, update: LazyUpdate) -> str:
        return f"{update.origin or self._label}: {update.name}"

    def _factors(self, update: LazyUpdate) -> Factors | None:
        found = self._ranks.read(update)
        if found is None:
            return None
        if self._ranks.is_left_out(update.name):
            self.left_out[update.name] = self._ranks.totals[update.name]
            return None
        policy = self._ranks.policy(update.name, found)
        parts = self._parts(update, matrices(found), policy)
        result = gathered(parts) if isinstance(found, Experts) else parts[0]
        strength = self._request.strength(found.scale, found.rank)
        self.results[update.name] = Rescaled(
            result.rank,
            result.scale,
            strength / found.scale if found.scale else None,
            result.certificate or Certificate(result.rank, 0, 0),
            result.a.nbytes + result.b.nbytes,
        )
        return result

    def _sparse(self, update: LazyUpdate, factors: LazyUpdate) -> Factors | Sparse | None:
        """Factors with single entries beside them, which are as strong as the factors."""
        found, result = update.load(), self._factors(factors)
        if not isinstance(found, Sparse) or not isinstance(result, LowRank):
            return result
        require_sound(self._origin(update), found)
        done = self.results[update.name]
        # A scale of 0 tells no ratio: what is beside it then stays as it is.
        strength = 1.0 if done.strength is None else done.strength
        scale, values, certificate = found.scale * strength, found.values, done.certificate
        if self._request.dtype is not None:
            values = values.to(torch_dtype(self._request.dtype))
            lost = (found.values.double() - values.double()).square().sum()
            certificate = replace(
                certificate, rounding=certificate.rounding + float(lost) * scale**2
            )
            if not is_finite(values):
                raise InputError(
                    f"{self._origin(update)}: its single entries overflow {self._dtype(update)}: "
                    "choose a wider --dtype"
                )
        self.results[update.name] = replace(done, certificate=certificate)
        return Sparse(result, found.positions, values, scale, certificate)

    def _parts(
        self, update: LazyUpdate, found: Sequence[LowRank], policy: RankPolicy | None
    ) -> list[LowRank]:
        """Each matrix as it is asked for; all are cut, and to one rank, or none."""
        if policy is None:
            return [self._uncut(update, part) for part in found]
        cuts = [compress([self._ranks.whole(part)], policy) for part in found]
        rank = max(cut.certificate.rank for cut in cuts)
        if rank >= found[0].rank:
            return [self._uncut(update, part) for part in found]
        scale = abs(self._request.scale(found[0].scale, rank)) or 1.0
        root = math.sqrt(scale)
        return [
            self._rounded(update, *padded(cut.a / root, cut.b / root, rank), cut.certificate, scale)
            for cut in cuts
        ]

    def _uncut(self, update: LazyUpdate, found: LowRank) -> LowRank:
        """A matrix at its own rank: its factors untouched where they can be."""
        request, whole = self._request, self._ranks.whole(found)
        certificate = exact_certificate([whole], found.rank)
        scale = request.scale(found.scale, found.rank)
        fold = whole.factor / scale if scale else 1.0
        if fold == 1 and not (request.normalize or request.balance or request.dtype):
            return LowRank(found.a, found.b, scale, certificate)
        a, b = found.a.double(), found.b.double() * fold
        if request.balance:
            a, b = balanced(a, b)
        return self._rounded(update, a, b, certificate, scale)

    def _rounded(
        self,
        update: LazyUpdate,
        a: torch.Tensor,
        b: torch.Tensor,
        certificate: Certificate,
        scale: float,
    ) -> LowRank:
        """Factors of the type asked for, padded where all get one rank.

        Raises:
            InputError: they overflow that type.
        """
        if self._request.normalize:
            rank = self._ranks.common()
            a, b = padded(a, b, rank)
            certificate = replace(certificate, rank=rank)
        result = rounded_factors(a, b, certificate, self._dtype(update), scale)
        if not (is_finite(result.a) and is_finite(result.b)):
            remedy = "" if self._request.balance else ", or add --balance"
            raise InputError(
                f"{self._origin(update)}: its factors overflow {self._dtype(update)}: choose a "
                f"wider --dtype{remedy}"
            )
        return result

    def _bias(self, update: LazyUpdate, weight: LazyUpdate) -> Unfactored | None:
        """What is added to a bias, whose strength is that of the factors beside it."""
        found, beside = update.load(), self._ranks.read(weight)
        if not isinstance(found, Dense) or beside is None:
            return self._other(update)
        require_sound(self._origin(update), found)
        request, rank, strength = self._request, beside.rank, found.scale * self._request.by
        if request.alpha is not None and request.keep_delta:
            written = self._factors(weight)
            rank = rank if written is None else written.rank
        elif request.alpha is not None:
            strength = request.strength(beside.scale, rank)
            strength *= found.scale / beside.scale if beside.scale else 1.0
        wanted = Dense(found.values, strength)
        scale = abs(request.scale(found.scale, rank)) or 1.0
        result = under_scale(wanted, scale, torch_dtype(self._dtype(update)))
        return self._finished(
            update, wanted, result, strength / found.scale if found.scale else None
        )

    def _other(self, update: LazyUpdate) -> Unfactored | None:
        """An update without factors A and B."""
        found = update.load()
        if not isinstance(found, Dense | LoHa | LoKr):
            return None
        require_sound(self._origin(update), found)
        factor = self._request.by
        if self._request.alpha is not None and not self._request.keep_delta:
            factor = self._by_alpha(update, found)
        wanted = times(found, factor)
        dtype = self._request.dtype
        result = wanted if dtype is None else in_dtype(wanted, dtype)
        return self._finished(update, wanted, result, factor if found.scale else None)

    def _by_alpha(self, update: LazyUpdate, found: Unfactored) -> float:
        """What another alpha multiplies a delta by."""
        rank = rank_of(found)
        if rank is None:
            raise InputError(
                f"{self._origin(update)}: {KIND_NAMES[found.kind]}: neither of its matrices is in "
                "factors, so that its scale tells no alpha: change it with --by"
            )
        if found.scale == 0:
            raise InputError(f"{self._origin(update)}: its scale is 0: --alpha cannot change it")
        return self._request.strength(found.scale, rank) / found.scale

    def _finished(
        self, update: LazyUpdate, wanted: Unfactored, result: Unfactored, strength: float | None
    ) -> Unfactored:
        """The result, noted down with its error."""
        values = [tensor for _, tensor in tensors_of(result)]
        if not all(map(is_finite, values)):
            raise InputError(
                f"{self._origin(update)}: overflows {self._dtype(update)}: choose a wider --dtype"
            )
        lossless = Certificate(0, 0, 0, method="exact")
        self.results[update.name] = Rescaled(
            0,
            result.scale,
            strength,
            lossless if result is wanted else rounding(wanted, result, update.shape),
            sum(tensor.nbytes for tensor in values),
        )
        return result
