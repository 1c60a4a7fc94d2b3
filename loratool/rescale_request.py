"""What a rescaling asks of every update, and which updates cannot do it: headers only."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from loratool.adapter import LazyUpdate, without_entries
from loratool.errors import Problem
from loratool.linalg import RankPolicy
from loratool.updates import FACTORED, KIND_NAMES, NEED_BASE


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

    def strength(self, scale: float, rank: int) -> float:
        """What the product B A of an update is multiplied by in the delta that is asked for."""
        if self.alpha is None or self.keep_delta:
            return scale * self.by
        return self._alpha_scale(self.alpha, rank)

    def scale(self, scale: float, rank: int) -> float:
        """The scale that an update is written under.

        Args:
            scale: its own.
            rank: the result's.
        """
        if self.normalize:
            return 1.0
        if self.alpha is None:
            return scale * abs(self.by)  # a negative sign goes into B
        return self._alpha_scale(self.alpha, rank)

    def _alpha_scale(self, alpha: float, rank: int) -> float:
        return alpha / (math.sqrt(rank) if self.rslora else rank)

    @property
    def asks_for_factors(self) -> bool:
        """Whether it is about A and B, which not every update has."""
        cuts = self.policy is not None or self.budget is not None
        return (
            cuts or self.normalize or self.balance or (self.alpha is not None and self.keep_delta)
        )

    @property
    def is_identity(self) -> bool:
        """Whether it leaves every update as it is."""
        plain = self.by == 1 and self.alpha is None and self.dtype is None
        return plain and not self.asks_for_factors


@dataclass(frozen=True)
class Sorted:
    """The updates of an adapter by what a rescaling does to them.

    Attributes:
        factored: those with factors A and B, without the single entries that some have besides.
        beside: changes of a bias beside such factors -> whose scale they share.
        others: further linear ones.
        entries: names of those with factors that have single entries besides.
        problems: what cannot be rescaled as it is asked.
    """

    factored: Mapping[str, LazyUpdate]
    beside: Mapping[str, LazyUpdate] = field(default_factory=dict)
    others: Mapping[str, LazyUpdate] = field(default_factory=dict)
    entries: frozenset[str] = frozenset()
    problems: tuple[Problem, ...] = ()

    @property
    def is_empty(self) -> bool:
        """Whether there is nothing that can be rescaled."""
        return not (self.factored or self.others)


def sort(updates: Mapping[str, LazyUpdate], request: Request) -> Sorted:
    """Decide from the kinds of updates what is done to each; what is set whole stays as it is."""
    factored = {n: without_entries(u) for n, u in updates.items() if u.kind in FACTORED}
    beside: dict[str, LazyUpdate] = {}
    others: dict[str, LazyUpdate] = {}
    for name, update in updates.items():
        if not update.is_linear or update.kind in FACTORED:
            continue
        weight = factored.get(f"{name.removesuffix('bias')}weight")
        if len(update.shape) < 2 and name.endswith("bias") and weight is not None:
            beside[name] = weight
        else:
            others[name] = update
    problems = [*_not_linear(updates, request), *_without_factors(others, request)]
    entries = frozenset(name for name, update in updates.items() if update.kind == "sparse")
    return Sorted(factored, beside, others, entries, tuple(problems))


def _not_linear(updates: Mapping[str, LazyUpdate], request: Request) -> Iterator[Problem]:
    if request.is_identity:
        return
    for name, update in updates.items():
        if update.kind in NEED_BASE:
            yield Problem(
                "error",
                name,
                f"{KIND_NAMES[update.kind]}: depends on the base's weights and cannot be rescaled: "
                "make plain LoRA of it first (`loratool convert --to-lora --base BASE`)",
            )


def _without_factors(updates: Mapping[str, LazyUpdate], request: Request) -> Iterator[Problem]:
    for name, update in updates.items():
        kind = KIND_NAMES[update.kind]
        if request.asks_for_factors and len(update.shape) > 1:
            yield Problem(
                "error",
                name,
                f"{kind}: has no factors A and B, so that only --by, --alpha and --dtype can "
                "change it: make plain LoRA of it first (`loratool convert --to-lora`)",
            )
        elif update.kind == "dense" and request.alpha is not None and not request.keep_delta:
            yield Problem("error", name, f"{kind}: has no alpha: --by changes its strength")
