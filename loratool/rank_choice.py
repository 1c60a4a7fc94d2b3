"""Which rank each update of an adapter gets; all experts of a weight get one."""

from __future__ import annotations

import threading
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import replace

import torch

from loratool.adapter import LazyUpdate
from loratool.budget import allocate
from loratool.dtypes import itemsize
from loratool.errors import InputError
from loratool.experts import matrices
from loratool.finite import require_sound
from loratool.linalg import RankPolicy
from loratool.lowrank import Product, singular_values
from loratool.reports import format_bytes
from loratool.rescale_request import Request
from loratool.updates import Experts, LowRank, elements_a_rank

Factors = LowRank | Experts


class RankChoice:
    """The ranks that a request leaves of updates with factors A and B.

    Tasks of several threads share it. Where the rank of one update depends on all of them, the
    first task gathers the singular values of all, and the others wait for it.

    Attributes:
        totals: name -> ||delta||_F^2 of the delta asked for, of what was gathered.
    """

    def __init__(
        self,
        request: Request,
        updates: Mapping[str, LazyUpdate],
        label: str,
        kept: Collection[str] = (),
    ) -> None:
        """Check what headers show.

        Args:
            request: what to do.
            updates: those with factors, by name.
            label: what errors call the adapter.
            kept: names of updates that a budget must not leave out.

        Raises:
            InputError: the budget is smaller than the least that can be written.
        """
        self._request = request
        self._updates = updates
        self._label = label
        self._kept = kept
        self._policy = request.policy
        if request.budget is not None and updates:
            self._check_budget(request.budget)
            if request.normalize:
                self._policy = self._uniform_policy(request.budget)
        self._gathers = self._needs_all()
        self._lock = threading.Lock()
        self._ranks: Mapping[str, int] | None = None
        self.totals: dict[str, float] = {}

    def planned(self, update: LazyUpdate) -> int | None:
        """The rank of the result, where headers tell it."""
        if self._gathers:
            return None
        return self.common() if self._request.normalize else self._capped(update.rank)

    def common(self) -> int:
        """The rank that `normalize` gives all updates."""
        ranks: Iterable[int] = (
            self._chosen_ranks().values()
            if self._gathers
            else (self._capped(update.rank) or 1 for update in self._updates.values())
        )
        return max(self._request.pad, *ranks)

    def policy(self, name: str, found: Factors) -> RankPolicy | None:
        """What to cut the matrices of an update by that is not left out; None to leave it whole."""
        if self._gathers:
            rank = self._chosen_ranks()[name]
        elif self._cutting(found) is None or isinstance(found, LowRank):
            return self._cutting(found)
        else:
            rank = self._chosen(found, self._spectra(found)) or found.rank
        return RankPolicy(rank) if rank < found.rank else None

    def is_left_out(self, name: str) -> bool:
        """Whether the budget gives an update no rank at all."""
        return self._gathers and self._chosen_ranks()[name] == 0

    def whole(self, part: LowRank) -> Product:
        """The delta that is asked for of a matrix."""
        return Product(part.b, part.a, self._request.strength(part.scale, part.rank))

    def read(self, update: LazyUpdate) -> Factors | None:
        """The update's factors, or None where an extraction found nothing.

        Raises:
            InputError: they cannot be calculated with.
        """
        found = update.load()
        if not isinstance(found, LowRank | Experts):
            return None
        require_sound(f"{update.origin or self._label}: {update.name}", found)
        return found

    def _cost(self, update: LazyUpdate) -> int:
        """Bytes that one rank of it takes."""
        dtype = self._request.dtype or update.dtype
        return elements_a_rank(update.kind, update.shape) * itemsize(dtype)

    def _check_budget(self, budget: int) -> None:
        costs = {name: self._cost(update) for name, update in self._updates.items()}
        smallest = min(costs, key=lambda name: costs[name])
        least, what = costs[smallest], f"of the smallest update ({smallest})"
        if self._request.normalize:
            least, what = sum(costs.values()), "of every update"
        elif self._kept:
            least = sum(costs[name] for name in self._kept)
            what = "of every update with a bias's beside it"
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

    def _cutting(self, found: Factors) -> RankPolicy | None:
        """The policy, unless its rank alone shows that it leaves an update whole."""
        policy = self._policy
        if policy is None or (policy.is_fixed and (policy.rank or 0) >= found.rank):
            return None
        return policy

    def _chosen_ranks(self) -> Mapping[str, int]:
        with self._lock:
            if self._ranks is None:
                self._ranks = self._choose_ranks()
            return self._ranks

    def _choose_ranks(self) -> dict[str, int]:
        energies: dict[str, list[float]] = {}
        ranks: dict[str, int] = {}
        for name, update in self._updates.items():
            found = self.read(update)
            if found is None:
                continue
            spectra = self._spectra(found)
            known = summed(spectra)
            self.totals[name] = float(known.sum())
            chosen = self._chosen(found, spectra)
            energies[name] = known[:chosen].tolist()
            ranks[name] = chosen or found.rank
        if self._request.budget is not None and not self._request.normalize:
            ranks = self._allocated(energies, self._request.budget)
        if not any(ranks.values()):
            raise InputError(f"{self._label}: all its updates are zero: no rank is worth its bytes")
        return ranks

    def _allocated(self, energies: Mapping[str, Sequence[float]], budget: int) -> dict[str, int]:
        """Ranks within a budget; those that must be kept have their first one in any case."""
        costs = {name: self._cost(self._updates[name]) for name in energies}
        first = {name: int(name in self._kept) for name in energies}
        left = budget - sum(costs[name] for name in energies if first[name])
        rest = {name: values[first[name] :] for name, values in energies.items()}
        found = allocate(rest, costs, left)
        return {name: rank + first[name] for name, rank in found.items()}

    def _spectra(self, found: Factors) -> list[torch.Tensor]:
        """The squared singular values of each matrix, in the strength that is asked for."""
        return [singular_values([self.whole(part)]).square() for part in matrices(found)]

    def _chosen(self, found: Factors, spectra: Sequence[torch.Tensor]) -> int | None:
        """The rank that the policy leaves of an update; None for all of it.

        It is that of the expert that needs most.
        """
        policy = self._cutting(found)
        if policy is None:
            return None
        first = matrices(found)[0]
        shape = (first.b.shape[0], first.a.shape[1])
        ranks = [policy.choose(known, float(known.sum()), shape) for known in spectra]
        return None if None in ranks else max(rank for rank in ranks if rank is not None)


def summed(spectra: Sequence[torch.Tensor]) -> torch.Tensor:
    """The sum of vectors of several lengths, the shorter ones filled up with zeros."""
    total = spectra[0].new_zeros(max(map(len, spectra)))
    for spectrum in spectra:
        total[: len(spectrum)] += spectrum
    return total
