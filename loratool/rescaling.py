"""From an update's factors to factors of another strength, scale, rank, layout or type.

Everything here touches values; the step that plans it touches headers only.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

import torch

from loratool.adapter import LazyUpdate
from loratool.budget import allocate
from loratool.dtypes import itemsize
from loratool.errors import InputError
from loratool.linalg import Certificate, Factorization, RankPolicy, is_finite
from loratool.lowrank import (
    Product,
    balanced,
    compress,
    exact_certificate,
    padded,
    rounded_factors,
    singular_values,
)
from loratool.reports import format_bytes
from loratool.updates import LowRank


@dataclass(frozen=True)
class Request:
    """What is asked of every update.

    Attributes:
        by: the delta is multiplied by this.
        alpha: what the result's alpha is to be, or None.
        keep_delta: whether `alpha` leaves the delta as it is.
        rslora: whether alpha means the scale alpha / sqrt(rank), not alpha / rank.
        policy: how many singular values are kept.
        budget: bytes of all factors together; with `normalize`, of all at one rank.
        normalize: whether all get one rank and the scale 1.
        pad: the least rank that `normalize` gives, by zeros.
        balance: whether A and B get equal norms.
        dtype: safetensors name of the factors' type, or None for theirs.
    """

    by: float = 1.0
    alpha: float | None = None
    keep_delta: bool = False
    rslora: bool = False
    policy: RankPolicy | None = None
    budget: int | None = None
    normalize: bool = False
    pad: int = 0
    balance: bool = False
    dtype: str | None = None

    def strength(self, found: LowRank) -> float:
        """What B A is multiplied by in the delta that is asked for."""
        if self.alpha is None or self.keep_delta:
            return found.scale * self.by
        return self._alpha_scale(self.alpha, found.rank)

    def scale(self, found: LowRank, rank: int) -> float:
        """The scale that the result of this rank is written under."""
        if self.normalize:
            return 1.0
        if self.alpha is None:
            return found.scale * abs(self.by)  # a negative sign goes into B
        return self._alpha_scale(self.alpha, rank)

    def _alpha_scale(self, alpha: float, rank: int) -> float:
        return alpha / (math.sqrt(rank) if self.rslora else rank)

    def whole(self, found: LowRank) -> Product:
        """The delta that is asked for."""
        return Product(found.b, found.a, self.strength(found))


@dataclass(frozen=True)
class Rescaled:
    """What became of one update.

    Attributes:
        rank: of the result.
        scale: of the result.
        strength: the delta asked for, as a multiple of the delta that was; None if that was 0.
        certificate: its error, against the delta asked for.
        nbytes: of both factors.
    """

    rank: int
    scale: float
    strength: float | None
    certificate: Certificate
    nbytes: int


class Rescaler:
    """Computes the low-rank updates of one adapter.

    Tasks of several threads share it. Where the rank of one update depends on all of them, the
    first task gathers the singular values of all, and the others wait for it.

    Attributes:
        results: name -> what became of an update, as they are computed.
        left_out: updates that the budget gives no rank -> ||delta||_F^2 of the delta asked for.
    """

    def __init__(self, request: Request, updates: Mapping[str, LazyUpdate], label: str) -> None:
        """Check what headers show.

        Args:
            request: what to do.
            updates: the low-rank updates by name; at least one.
            label: what errors call the adapter.

        Raises:
            InputError: the budget is smaller than the least that can be written.
        """
        self._request = request
        self._updates = updates
        self._label = label
        self._policy = request.policy
        if request.budget is not None:
            self._check_budget(request.budget)
            if request.normalize:
                self._policy = self._uniform_policy(request.budget)
        self._gathers = self._needs_all()
        self._lock = threading.Lock()
        self._ranks: Mapping[str, int] | None = None
        self.results: dict[str, Rescaled] = {}
        self.left_out: dict[str, float] = {}
        self._totals: dict[str, float] = {}

    @property
    def energy(self) -> float:
        """Share of the squared norm of the whole adapter that is kept, left-out updates counted."""
        certificates = [result.certificate for result in self.results.values()]
        total = sum(c.total for c in certificates) + sum(self.left_out.values())
        return sum(c.captured for c in certificates) / total if total > 0 else 1.0

    def planned(self, update: LazyUpdate) -> LazyUpdate:
        """The update that is computed when it is loaded; its rank is told where headers tell it."""
        rank = None if self._gathers else self._capped(update.rank)
        if self._request.normalize and not self._gathers:
            rank = self._common_rank()
        return replace(
            update,
            load=lambda: self._load(update),
            dtype=self._dtype(update),
            rank=rank,
            stored=(),
        )

    def _dtype(self, update: LazyUpdate) -> str:
        return self._request.dtype or update.dtype

    def _cost(self, update: LazyUpdate) -> int:
        """Bytes that one rank of it takes."""
        return sum(update.shape) * itemsize(self._dtype(update))

    def _check_budget(self, budget: int) -> None:
        costs = {name: self._cost(update) for name, update in self._updates.items()}
        smallest = min(costs, key=lambda name: costs[name])
        least, what = costs[smallest], f"of the smallest update ({smallest})"
        if self._request.normalize:
            least, what = sum(costs.values()), "of every update"
        if budget < least:
            raise InputError(
                f"{self._label}: a budget of {format_bytes(budget)} is too small: rank 1 {what} "
                f"takes {format_bytes(least)}"
            )

    def _uniform_policy(self, budget: int) -> RankPolicy:
        """With `normalize` a budget means the largest rank that all updates can have."""
        cap = budget // sum(map(self._cost, self._updates.values()))
        if self._policy is None:
            return RankPolicy(cap)
        return replace(self._policy, rank=min(cap, self._policy.rank or cap))

    def _needs_all(self) -> bool:
        """Whether one update's rank depends on the singular values of all."""
        if not self._request.normalize:
            return self._request.budget is not None
        return any(self._capped(update.rank) is None for update in self._updates.values())

    def _capped(self, rank: int | None) -> int | None:
        """What the policy leaves of a rank, where that takes no singular values to tell."""
        if self._policy is None or rank is None:
            return rank
        if not self._policy.is_fixed or self._policy.rank is None:
            return None
        return min(rank, self._policy.rank)

    def _common_rank(self) -> int:
        """The rank that `normalize` gives all updates."""
        ranks: Iterable[int] = (
            self._chosen_ranks().values()
            if self._gathers
            else (self._capped(update.rank) or 1 for update in self._updates.values())
        )
        return max(self._request.pad, *ranks)

    def _chosen_ranks(self) -> Mapping[str, int]:
        with self._lock:
            if self._ranks is None:
                self._ranks = self._choose_ranks()
            return self._ranks

    def _choose_ranks(self) -> dict[str, int]:
        energies: dict[str, list[float]] = {}
        ranks: dict[str, int] = {}
        for name, update in self._updates.items():
            found = self._found(update)
            if found is None:
                continue
            known = singular_values([self._request.whole(found)]).square()
            total = self._totals[name] = float(known.sum())
            chosen = None
            if (policy := self._cutting(found)) is not None:
                shape = (found.b.shape[0], found.a.shape[1])
                chosen = policy.choose(known, total, shape)
            energies[name] = known[:chosen].tolist()
            ranks[name] = chosen or found.rank
        if self._request.budget is not None and not self._request.normalize:
            costs = {name: self._cost(self._updates[name]) for name in energies}
            ranks = allocate(energies, costs, self._request.budget)
        if not any(ranks.values()):
            raise InputError(f"{self._label}: all its updates are zero: no rank is worth its bytes")
        return ranks

    def _found(self, update: LazyUpdate) -> LowRank | None:
        """The update's factors, or None where an extraction found nothing.

        Raises:
            InputError: they cannot be calculated with.
        """
        found = update.load()
        if not isinstance(found, LowRank):
            return None
        for side, factor in (("A", found.a), ("B", found.b)):
            if not factor.numel():
                raise InputError(f"{self._origin(update)}: lora_{side} is empty: repair the file")
            if not is_finite(factor):
                raise InputError(f"{self._origin(update)}: lora_{side} holds NaN or Inf: repair it")
        return found

    def _origin(self, update: LazyUpdate) -> str:
        return f"{update.origin or self._label}: {update.name}"

    def _cutting(self, found: LowRank) -> RankPolicy | None:
        """The policy, unless its rank alone shows that it leaves an update whole."""
        policy = self._policy
        if policy is None or (policy.is_fixed and (policy.rank or 0) >= found.rank):
            return None
        return policy

    def _load(self, update: LazyUpdate) -> LowRank | None:
        found = self._found(update)
        if found is None:
            return None
        policy = self._cutting(found)
        if self._gathers:
            rank = self._chosen_ranks()[update.name]
            if rank == 0:
                self.left_out[update.name] = self._totals[update.name]
                return None
            policy = RankPolicy(rank) if rank < found.rank else None
        whole = self._request.whole(found)
        cut = compress([whole], policy) if policy is not None else None
        if cut is None or cut.certificate.rank >= found.rank:
            certificate = exact_certificate([whole], found.rank)
            result = self._kept(update, found, whole, certificate)
        else:
            certificate = cut.certificate
            result = self._cut(update, found, cut)
        self.results[update.name] = Rescaled(
            result.rank,
            result.scale,
            whole.factor / found.scale if found.scale else None,
            result.certificate or certificate,
            result.a.nbytes + result.b.nbytes,
        )
        return result

    def _kept(
        self, update: LazyUpdate, found: LowRank, whole: Product, certificate: Certificate
    ) -> LowRank:
        """The update at its own rank: its factors untouched where they can be."""
        request = self._request
        scale = request.scale(found, found.rank)
        fold = whole.factor / scale if scale else 1.0
        if fold == 1 and not (request.normalize or request.balance or request.dtype):
            return LowRank(found.a, found.b, scale, certificate)
        a, b = found.a.double(), found.b.double() * fold
        if request.balance:
            a, b = balanced(a, b)
        return self._rounded(update, a, b, certificate, scale)

    def _cut(self, update: LazyUpdate, found: LowRank, cut: Factorization) -> LowRank:
        """The update at a lower rank, in balanced factors."""
        scale = abs(self._request.scale(found, cut.certificate.rank)) or 1.0
        root = math.sqrt(scale)
        return self._rounded(update, cut.a / root, cut.b / root, cut.certificate, scale)

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
            rank = self._common_rank()
            a, b = padded(a, b, rank)
            certificate = replace(certificate, rank=rank)
        dtype = self._dtype(update)
        result = rounded_factors(a, b, certificate, dtype, scale)
        if not (is_finite(result.a) and is_finite(result.b)):
            remedy = "" if self._request.balance else ", or add --balance"
            raise InputError(
                f"{self._origin(update)}: its factors overflow {dtype}: choose a wider --dtype"
                + remedy
            )
        return result
