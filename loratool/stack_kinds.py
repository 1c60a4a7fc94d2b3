"""Which updates of one weight can be combined into one: headers only."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from loratool.adapter import LazyUpdate
from loratool.errors import Problem
from loratool.updates import (
    FACTORED,
    KIND_NAMES,
    NEED_BASE,
    Experts,
    Kind,
    Update,
    swapped,
)

# What an update does to a weight, for messages.
_DOES: Mapping[Kind, str] = {
    "low_rank": "adds a low-rank update to it",
    "sparse": "adds a low-rank update and single entries to it",
    "experts": "adds low-rank updates of experts to it",
    "dense": "adds a full-size delta to it",
    "rows": "replaces rows of it",
    "replacement": "replaces it whole",
}


@dataclass(frozen=True)
class Share:
    """What one adapter contributes to one tensor.

    Attributes:
        number: which adapter it is, from 0.
        label: what errors call it.
        name: what `--weights` and reports call it.
        update: its update.
        weight: the adapter's weight times the layer's; not 0.
    """

    number: int
    label: str
    name: str
    update: LazyUpdate
    weight: float


def is_vector(update: LazyUpdate) -> bool:
    """Whether it is a delta of a vector, a bias, which is summed without any factors."""
    return update.kind == "dense" and len(update.shape) < 2


def problems_of(name: str, shares: Sequence[Share]) -> Iterator[Problem]:
    """What stands in the way of one update of the tensor `name`."""
    alien = [s for s in shares if s.update.kind not in _DOES or _is_whole_matrix(s.update)]
    for share in alien:
        kind = share.update.kind
        base = " --base BASE" if kind in NEED_BASE else ""
        yield Problem(
            "error",
            name,
            f"{KIND_NAMES[kind]} of {share.label}: has no factors A and B that could be combined "
            f"with others: make plain LoRA of it first (`loratool convert --to-lora{base}`)",
        )
    if alien:
        return
    first, *others = shares
    for other in others:
        if message := _contradiction(name, first, other):
            yield Problem("error", name, message)
            return
    yield from _common_rows(name, shares)


def _is_whole_matrix(update: LazyUpdate) -> bool:
    return update.kind == "dense" and not is_vector(update)


def _contradiction(name: str, one: Share, other: Share) -> str:
    """Why two shares cannot become one update; "" if they can."""
    kinds = {one.update.kind, other.update.kind}
    if len(kinds) > 1 and kinds != {"low_rank", "sparse"}:
        first, second = sorted((one, other), key=lambda share: share.update.kind)
        return (
            f"{first.label} {_DOES[first.update.kind]} and {second.label} "
            f"{_DOES[second.update.kind]}: leave one out with --weights '{second.name}:{name}=0'"
        )
    if one.update.kind == "rows" and one.update.shape[1:] != other.update.shape[1:]:
        return (
            f"{one.label} replaces rows of {one.update.shape[1]} columns, {other.label} of "
            f"{other.update.shape[1]}"
        )
    stored = one.update.stored and other.update.stored
    if one.update.kind == "replacement" and stored and one.update.shape != other.update.shape:
        return different_replacements(name, one, other)
    return ""


def _common_rows(name: str, shares: Sequence[Share]) -> Iterator[Problem]:
    owners: dict[int, Share] = {}
    for share in shares:
        for row in share.update.rows:
            if (other := owners.setdefault(row, share)) is not share:
                yield Problem(
                    "error",
                    name,
                    f"{other.label} and {share.label} both replace row {row}: leave one out with "
                    f"--weights '{share.name}:{name}=0'",
                )
                return


def different_replacements(name: str, one: Share, other: Share) -> str:
    """What to tell a user whose adapters replace one tensor by different ones."""
    module = name.rpartition(".")[0] or name
    return (
        f"{one.label} and {other.label} both replace it whole, by different tensors, which cannot "
        f"be combined: leave one out with --weights '{other.name}:{module}=0'"
    )


def oriented(shares: Sequence[Share]) -> list[Share]:
    """Experts' updates brought to the first one's orientation; all others as they are."""
    first = shares[0].update
    return [replace(share, update=_like(share.update, first)) for share in shares]


def _like(update: LazyUpdate, first: LazyUpdate) -> LazyUpdate:
    if update.kind != "experts" or first.kind != "experts":
        return update
    square = first.shape == swapped(first.shape)
    flipped = square and bool(update.transposed) != bool(first.transposed)
    if update.shape == first.shape and not flipped:
        return update

    def load() -> Update | None:
        found = update.load()
        return found.transposed() if isinstance(found, Experts) else found

    return replace(update, load=load, shape=first.shape, transposed=first.transposed)


def widest(shares: Sequence[Share]) -> tuple[int, ...]:
    """The weight's shape from the update that knows most of it: a convolution's with its kernel."""
    return max((share.update.shape for share in shares), key=len)


def is_factored(shares: Sequence[Share]) -> bool:
    """Whether a tensor's updates have factors A and B."""
    return shares[0].update.kind in FACTORED
