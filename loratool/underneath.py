"""The base's weights below an adapter's updates, as the updates see them.

An update is for a parameter in memory, or for several together in a naming that fuses them; the
base may store either in other tensors.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from loratool.adapter import Adapter
from loratool.binding import bind
from loratool.checkpoint import Checkpoint, LazyTensor
from loratool.errors import raise_problems
from loratool.in_memory import in_memory
from loratool.naming_schemes import in_the_bases_names
from loratool.pieces import Index, Piece
from loratool.targets import targets_of

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Underneath:
    """The base's weight below an update.

    Attributes:
        tensor: its values.
        transposed: whether these are stored as (in, out).
        groups: of a convolution.
    """

    tensor: LazyTensor
    transposed: bool = False
    groups: int = 1

    @property
    def shape(self) -> tuple[int, ...]:
        """Its shape as the module computes with it."""
        shape = self.tensor.shape
        return (*shape[:-2], *shape[:-3:-1]) if self.transposed else shape

    def read(self) -> torch.Tensor:
        """Its values as the module computes with them."""
        values = self.tensor.read()
        return values.mT if self.transposed else values


def weights_below(adapter: Adapter, base: Checkpoint) -> dict[str, Underneath]:
    """Update -> the base's weight below it; without what the base does not have.

    Raises:
        MismatchError: the adapter does not fit the base; all complaints at once.
    """
    binding = bind(adapter, base)
    raise_problems(f"{adapter.label} does not fit {base.label}:", binding.problems)
    targets = targets_of(base)
    skeleton = targets.skeleton
    parameters = {**base, **in_memory(base, replace(skeleton, pieces=targets.pieces))}
    stored = {bound.update.name: bound.transposed for bound in binding.changed.values()}
    parts: dict[str, list[_Part]] = {}
    for name, shares in in_the_bases_names(adapter, targets)[0].items():
        if (target := binding.alignment.pairs.get(name)) is None:
            continue
        is_stored = targets.where(target) == (Piece(target),)
        for share in shares:
            transposed = skeleton.kinds.get(target) == "conv1d"
            if is_stored and share.is_plain:
                transposed = stored.get(share.update.name, transposed)
            groups = skeleton.groups.get(target, 1)
            under = Underneath(parameters[target], transposed, groups)
            parts.setdefault(share.update.name, []).append(_Part(share.part, share.place, under))
    return {name: _together(name, found) for name, found in parts.items()}


@dataclass(frozen=True)
class _Part:
    """Some rows of an update, and the rows of a parameter that they are for.

    Attributes:
        rows: of the update; () is all.
        place: of the parameter; () is all.
        under: the parameter.
    """

    rows: tuple[Index, ...]
    place: tuple[Index, ...]
    under: Underneath


def _together(name: str, parts: Sequence[_Part]) -> Underneath:
    """The weight that parts of parameters make up, in the order of the update's rows."""
    first = parts[0].under
    if len(parts) == 1 and not parts[0].place:
        return first
    ordered = sorted(parts, key=lambda part: _start(part.rows))
    heights = [_height(part.place, part.under.shape[0]) for part in ordered]

    def blocks() -> Iterator[torch.Tensor]:
        for part in ordered:
            values = part.under.read()
            yield (values[part.place] if part.place else values).contiguous()

    shape = (sum(heights), *first.shape[1:])
    tensor = LazyTensor(name, first.tensor.dtype, shape, blocks, first.tensor.origin)
    return Underneath(tensor, groups=first.groups)


def _start(rows: tuple[Index, ...]) -> int:
    return rows[0].start or 0 if rows and isinstance(rows[0], slice) else 0


def _height(place: tuple[Index, ...], rows: int) -> int:
    index = place[0] if place else slice(None)
    return len(range(*index.indices(rows))) if isinstance(index, slice) else 1
