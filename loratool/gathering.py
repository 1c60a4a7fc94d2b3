"""Every matrix factorized once, before any rank is chosen; then cut as often as wanted.

A budget for the whole adapter needs the singular values of all matrices first, and adapters of
several ranks come from the same factors. Everything here touches values; what plans it touches
headers only.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from loratool.adapter import LazyUpdate
from loratool.budget import allocate
from loratool.delta import DeltaReader, experts_update, low_rank_update
from loratool.dtypes import itemsize
from loratool.errors import InputError
from loratool.factor_store import FactorStore, Stored, energies, total_energy
from loratool.linalg import Factorization, RankPolicy
from loratool.pairing import Change
from loratool.plugins import Executor
from loratool.reports import counted, format_bytes
from loratool.updates import Replacement, Update, elements_a_rank, matrix_shape


@dataclass(frozen=True)
class Target:
    """A weight whose change is factorized.

    Attributes:
        name: of the parameter.
        decompose: factorizes it, matrix by matrix, at the largest rank in question.
        assemble: makes an update of factors of some rank.
        cost: bytes that one rank of it takes in the adapter, of all copies.
        copies: how many weights of the model share it.
        cap: the largest rank in question.
        elements: of its factors for each rank.
        nbytes: of the weight, for progress.
    """

    name: str
    decompose: Callable[[], Iterator[Factorization]]
    assemble: Callable[[Iterator[Factorization]], Update | None]
    cost: int
    copies: int
    cap: int
    elements: int
    nbytes: int


def target_of(
    change: Change,
    update: LazyUpdate,
    reader: DeltaReader,
    policy: RankPolicy,
    copies: int = 1,
    budget: int | None = None,
) -> Target:
    """Plan the factorization of a change, by headers.

    Args:
        change: of a weight that both models have.
        update: what is to be made of it.
        reader: reads and factorizes.
        policy: how many singular values are in question.
        copies: how many weights of the model share it: the adapter stores its factors for each.
        budget: bytes that all factors may take.
    """
    before, after = change.before, change.after
    assert before is not None  # of what is factored
    experts = update.kind == "experts"
    shape = update.shape
    elements = elements_a_rank(update.kind, shape)
    cost = copies * elements * itemsize(update.dtype)
    cap = policy.limit((shape[-2], shape[-1]) if experts else matrix_shape(shape))
    cap = cap if budget is None else max(1, min(cap, budget // cost))
    assembled = experts_update if experts else low_rank_update
    return Target(
        change.name,
        lambda: reader.decompose(
            before, after, change.transposed, experts, replace(policy, rank=cap)
        ),
        lambda parts: assembled(
            parts, change.transposed, update.dtype, before.dtype == after.dtype
        ),
        cost,
        copies,
        cap,
        elements,
        update.nbytes,
    )


class Gathering:
    """The factors of all targets, and what is kept whole beside them.

    Tasks of several threads share it. Whoever writes an adapter gathers first, with an executor;
    where an update is asked for before that, everything is gathered then and there, with the
    factors among the system's temporary files.

    Attributes:
        whole: the updates that are kept whole, by name; each is looked at once.
    """

    def __init__(self, targets: Sequence[Target], whole: Mapping[str, LazyUpdate]) -> None:
        """Nothing is read yet."""
        self._targets = {target.name: target for target in targets}
        self.whole = whole
        self._found: dict[str, list[Stored]] = {}
        self._replaced: dict[str, Update | None] = {}
        self._store: FactorStore | None = None
        self._lock = threading.Lock()
        self._is_done = False

    @property
    def disk_bytes(self) -> int:
        """What the factors take on the disk at most, while they are needed."""
        return sum(4 * target.cap * target.elements for target in self._targets.values())

    def gather(
        self,
        folder: Path | None = None,
        executor: Executor | None = None,
        progress: Callable[[str, int], None] = lambda name, size: None,
    ) -> None:
        """Read and factorize everything, once.

        Args:
            folder: on whose disk the factors wait; None for the system's temporary files.
            executor: runs one task a tensor; None for one after the other.
            progress: is told each tensor's name and bytes as it is done.

        Raises:
            InputError: NaN or Inf, named.
        """
        with self._lock:
            if self._is_done:
                return
            self._store = FactorStore(folder)
            names = [*self._targets, *self.whole]
            run = map if executor is None else executor.map
            for name, size in run(self._task, names):
                progress(name, size)
            self._is_done = True

    def _task(self, name: str) -> tuple[str, int]:
        target, store = self._targets.get(name), self._store
        if target is None:
            update = self.whole[name]
            self._replaced[name] = update.load()
            return name, update.nbytes
        assert store is not None
        if found := [store.add(part) for part in target.decompose()]:
            self._found[name] = found
        return name, target.nbytes

    def update(self, name: str, rank: int) -> Update | None:
        """The update of a target, cut to a rank; None where nothing has changed, or for rank 0."""
        self.gather()
        found, store = self._found.get(name), self._store
        if found is None or store is None or rank == 0:
            return None
        parts = (store.load(part, rank) for part in found)
        return self._targets[name].assemble(parts)

    def replacement(self, name: str) -> Update | None:
        """What is kept whole of a tensor; None where nothing has changed."""
        self.gather()
        return self._replaced[name]

    def changed(self) -> dict[str, Sequence[Stored]]:
        """The targets that have an update, in their order."""
        self.gather()
        found = ((name, self._found.get(name)) for name in self._targets)
        return {
            name: parts
            for name, parts in found
            if parts and any(part.certificate.captured for part in parts)
        }

    def replaced(self) -> dict[str, Replacement]:
        """What is kept whole."""
        self.gather()
        return {n: u for n, u in self._replaced.items() if isinstance(u, Replacement)}

    def target(self, name: str) -> Target:
        """One of the targets."""
        return self._targets[name]


@dataclass
class Budget:
    """The ranks that a budget of bytes leaves, decided when the first one is asked for.

    Attributes:
        gathering: of the factors.
        size: bytes of all weights of the adapter.
        whole_bytes: bytes that tensors of these names take, kept whole beside factors of those.
        relative: whether each matrix counts by the share of its own update that is captured.
        label: what errors call the adapter.
        left_out: targets that get no rank -> ||delta||_F^2; filled when the ranks are decided.
        kept: bytes of what is kept whole; likewise.
        spent: bytes of all factors; likewise.
        exhausted: targets that use all the singular values that were computed; likewise.
    """

    gathering: Gathering
    size: int
    whole_bytes: Callable[[Sequence[str], Sequence[str]], int]
    relative: bool
    label: str
    left_out: dict[str, float] = field(default_factory=dict)
    kept: int = 0
    spent: int = 0
    exhausted: tuple[str, ...] = ()
    _ranks: Mapping[str, int] | None = None
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def update(self, name: str) -> Update | None:
        """The update of a target, of the rank that the budget leaves it; None for rank 0.

        Raises:
            InputError: what is kept whole leaves too little of the budget.
        """
        return self.gathering.update(name, self.rank(name))

    def rank(self, name: str) -> int:
        """The rank of a target; 0 for none.

        Raises:
            InputError: what is kept whole leaves too little of the budget.
        """
        self.gathering.gather()
        with self._lock:
            if self._ranks is None:
                self._ranks = self._decide()
            return self._ranks.get(name, 0)

    def _decide(self) -> dict[str, int]:
        changed = self.gathering.changed()
        spectra = {name: energies(parts) for name, parts in changed.items()}
        totals = {name: total_energy(parts) for name, parts in changed.items()}
        targets = {name: self.gathering.target(name) for name in changed}
        costs = {name: target.cost for name, target in targets.items()}
        replaced = self.gathering.replaced()
        self.kept = self.whole_bytes(list(changed), list(replaced))
        least = sum(costs.values())
        if self.kept + least > self.size:
            raise InputError(
                f"{self.label}: a budget of {format_bytes(self.size)} is too small: "
                f"{format_bytes(self.kept)} are for {counted(len(replaced), 'changed tensor')} "
                "that low-rank factors cannot express, and rank 1 of every update takes "
                f"{format_bytes(least)}; --lora-only leaves the former out"
            )
        weights = {
            name: target.copies / (totals[name] if self.relative else 1.0)
            for name, target in targets.items()
        }
        ranks = allocate(spectra, costs, self.size - self.kept, weights)
        self.left_out.update({n: totals[n] for n, rank in ranks.items() if rank == 0})
        self.spent = sum(costs[name] * rank for name, rank in ranks.items())
        self.exhausted = tuple(n for n, rank in ranks.items() if rank == targets[n].cap)
        return ranks
