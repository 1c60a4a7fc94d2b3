"""Updates under names that several adapters have in common: those of one of them.

Where some adapters use the names that transformers gives a model's weights in memory, and others
those on disk, the names in memory are the common ones, since PEFT needs them today. Updates of
several tensors that are one parameter in memory become one update, without changing a value.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property

from loratool.adapter import Adapter, LazyUpdate
from loratool.alignment import Alignment
from loratool.binding import Binding
from loratool.errors import Problem, raise_problems
from loratool.parts import Share, complaint, joined
from loratool.pieces import Piece
from loratool.targets import Targets


@dataclass(frozen=True)
class CommonNames:
    """How weights are called in common.

    Attributes:
        target: how the names of the adapter that gives the names stand for the base's.
        targets: the base's names.
        in_memory: whether tensors of other names in memory go by those.
    """

    target: Alignment
    targets: Targets
    in_memory: bool = False

    @cached_property
    def _owners(self) -> Mapping[str, tuple[tuple[str, Piece], ...]]:
        """Tensor of the base -> the parameters in memory that it holds parts of."""
        found: dict[str, list[tuple[str, Piece]]] = {}
        if self.in_memory:
            for parameter, pieces in self.targets.pieces.items():
                for piece in pieces:
                    found.setdefault(piece.tensor, []).append((parameter, piece))
        return {tensor: tuple(owners) for tensor, owners in found.items()}

    @cached_property
    def _known(self) -> Mapping[str, str]:
        """The base's name -> that of the adapter that gives the names."""
        pairs = ((self._moved(there), there, here) for here, there in self.target.pairs.items())
        return {moved: here for moved, there, here in pairs if moved == there}

    def _moved(self, there: str) -> str:
        """The name in memory of a tensor that is all of a parameter there; else its own."""
        owners = self._owners.get(there, ())
        return next((name for name, piece in owners if piece == Piece(there)), there)

    def name(self, source: Alignment, name: str) -> str:
        """The common name of what an adapter calls `name`; its own where the base lacks it."""
        there = source.pairs.get(name) or _name_there(source, name)
        moved = self._moved(there)
        if moved not in self.targets.shapes or (source is self.target and moved == there):
            return name
        return self._known.get(moved) or self.target.name_here(moved)

    def updates(self, adapter: Adapter, binding: Binding) -> dict[str, LazyUpdate]:
        """An adapter's updates by their common names; fewer than there were if some become one.

        Raises:
            MismatchError: updates of one parameter cannot become one.
        """
        found: dict[str, LazyUpdate] = {}
        shares: dict[str, list[Share]] = {}
        for name, update in adapter.items():
            there = binding.alignment.pairs.get(name, "")
            owners = self._owners.get(there, ())
            if owners and self._moved(there) == there:
                for parameter, piece in owners:
                    share = self._share(update, there, piece, binding)
                    shares.setdefault(parameter, []).append(share)
                continue
            common = self.name(binding.alignment, name)
            transposed = binding.transposed.get(name, update.transposed)
            found[common] = replace(update, name=common, transposed=transposed)
        problems = []
        for parameter, parts in shares.items():
            shape = self.targets.shapes[parameter]
            common = self._known.get(parameter) or self.target.name_here(parameter)
            message = complaint(parts, shape)
            if common in found:
                message = f"is a part of {common}, which the adapter changes by that name, too"
            if message:
                problems.append(Problem("error", parts[0].update.name, message))
            else:
                found[common] = replace(joined(parameter, shape, parts), name=common)
        raise_problems(f"{adapter.label} cannot be named as others are:", problems)
        return found

    def _share(self, update: LazyUpdate, tensor: str, piece: Piece, binding: Binding) -> Share:
        """What an update of a tensor does to the parameter that holds a piece of it."""
        return Share(
            update,
            self.targets.shapes[tensor],
            transposed=binding.transposed.get(update.name, False),
            part=piece.place,
            place=piece.part,
            flipped=piece.transposed,
        )


def _name_there(alignment: Alignment, name: str) -> str:
    for old, new in alignment.moves:
        if name.startswith(old):
            return new + name.removeprefix(old)
    return alignment.prefix_there + name.removeprefix(alignment.prefix_here)


def renaming(names: CommonNames, source: Alignment) -> Callable[[str], str]:
    """From one adapter's names to the common ones."""
    return lambda name: names.name(source, name)
