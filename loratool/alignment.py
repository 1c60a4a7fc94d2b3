"""Which name in one model is which name in another.

Equal names first; then one prefix added or removed ("bert.encoder..." against "encoder..."), the
one that matches the most tensors of equal shape; by hand where that is not enough.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from loratool.errors import MismatchError, UsageError

Shapes = Mapping[str, tuple[int, ...] | None]  # None: not known


@dataclass(frozen=True)
class Alignment:
    """How the names of one model ("here") stand for those of another ("there").

    Attributes:
        pairs: name here -> name there.
        prefix_here: what names here start with and names there do not ("" if nothing).
        prefix_there: what names there start with and names here do not ("" if nothing).
        moves: (OLD, NEW): names that were paired by hand.
    """

    pairs: Mapping[str, str]
    prefix_here: str = ""
    prefix_there: str = ""
    moves: tuple[tuple[str, str], ...] = ()

    def describe(self) -> str:
        """The prefix rule in words, or "" if names are equal."""
        if self.prefix_there:
            return f"names match with the prefix {self.prefix_there!r} added"
        if self.prefix_here:
            return f"names match with the prefix {self.prefix_here!r} removed"
        return ""

    def name_here(self, there: str) -> str:
        """The name here of a name there that may have no pair."""
        for old, new in self.moves:
            if there.startswith(new):
                return old + there.removeprefix(new)
        if self.prefix_there and there.startswith(self.prefix_there):
            return there.removeprefix(self.prefix_there)
        return self.prefix_here + there


def parse_moves(texts: Sequence[str]) -> tuple[tuple[str, str], ...]:
    """Read `OLD=NEW` options; UsageError if one has no equals sign."""
    moves = []
    for text in texts:
        old, sign, new = text.partition("=")
        if not sign:
            raise UsageError(f"--map {text}: write OLD=NEW (fine-tuned name or prefix = base's)")
        moves.append((old, new))
    return tuple(moves)


def align(
    here: Shapes,
    there: Shapes,
    moves: Sequence[tuple[str, str]] = (),
    option: str = "--map",
) -> Alignment:
    """Pair the names of two models; no name there gets two.

    Args:
        here: names and shapes of the one.
        there: names and shapes of the other.
        moves: (OLD, NEW): a name here that is, or starts with, OLD is there the same with NEW.
        option: what the user decides with where names match in several ways ("": nothing).

    Raises:
        MismatchError: two prefixes match equally many tensors, or a move leads nowhere or where
            another has led.
    """
    pairs = _by_hand(here, there, moves)
    taken = set(pairs.values())
    equal = {n: n for n in here if n in there and n not in pairs and n not in taken}
    free = [name for name in here if name not in pairs and name not in equal]
    candidates = _prefixes(free, there, taken.union(equal))
    ranked = sorted(candidates.items(), key=lambda item: (-_matching(item[1], here, there), item))
    # A prefix counts only if it explains more than equal names do: a stray head does not.
    if ranked and _matching(ranked[0][1], here, there) > len(equal):
        best, found = ranked[0]
        rivals = [
            prefix
            for prefix, other in ranked
            if _matching(other, here, there) == _matching(found, here, there)
        ]
        if len(rivals) > 1:
            raise MismatchError(_ambiguous(rivals, candidates, option))
        return Alignment({**pairs, **equal, **found}, *best, moves=tuple(moves))
    return Alignment({**pairs, **equal}, moves=tuple(moves))


def _by_hand(here: Shapes, there: Shapes, moves: Sequence[tuple[str, str]]) -> dict[str, str]:
    pairs: dict[str, str] = {}
    for old, new in moves:
        moved = {
            name: new + name.removeprefix(old)
            for name in here
            if name.startswith(old) and new + name.removeprefix(old) in there
        }
        if not moved:
            raise MismatchError(
                f"--map {old}={new}: no tensor {old}* of the fine-tune is a {new}* of the base"
            )
        pairs |= moved
    owners: dict[str, str] = {}
    for name, other in pairs.items():
        if other in owners:
            raise MismatchError(f"--map: {owners[other]} and {name} both become {other}")
        owners[other] = name
    return pairs


def _prefixes(
    free: Sequence[str], there: Shapes, taken: set[str]
) -> dict[tuple[str, str], dict[str, str]]:
    """(prefix here, prefix there) -> the pairs it would make."""
    found: dict[tuple[str, str], dict[str, str]] = defaultdict(dict)
    longer = defaultdict(list)
    for name in there:
        for tail in _tails(name):
            longer[tail].append(name)
    for name in free:
        for other in longer.get(name, ()):
            if other not in taken:
                found["", other.removesuffix(name)][name] = other
        for tail in _tails(name):
            if tail in there and tail not in taken:
                found[name.removesuffix(tail), ""][name] = tail
    return found


def _tails(name: str) -> list[str]:
    parts = name.split(".")
    return [".".join(parts[start:]) for start in range(1, len(parts))]


def _matching(pairs: Mapping[str, str], here: Shapes, there: Shapes) -> int:
    # Either way round: an update does not always say whether its weight is stored transposed.
    return sum(_may_be_equal(here[name], there[other]) for name, other in pairs.items())


def _may_be_equal(one: tuple[int, ...] | None, other: tuple[int, ...] | None) -> bool:
    return one is None or other is None or sorted(one) == sorted(other)


def _ambiguous(
    rivals: Sequence[tuple[str, str]],
    candidates: Mapping[tuple[str, str], Mapping[str, str]],
    option: str,
) -> str:
    lines = [f"names match in several ways{f'; choose with {option} OLD=NEW' if option else ''}:"]
    for prefix_here, prefix_there in rivals:
        name, other = next(iter(candidates[prefix_here, prefix_there].items()))
        choice = f": {option} {prefix_here}={prefix_there}" if option else ""
        lines.append(f"  {name} may be {other}{choice}")
    return "\n".join(lines)
