"""The names by which adapters can mean the weights of a base, and where these lie.

A weight can be known by the name of its tensor, by its name in memory where transformers gives it
another one, and by diffusers' name where the base is a single file in its makers' layout.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property

from loratool.checkpoint import Checkpoint
from loratool.diffusion.kohya import KohyaModules, kohya_modules
from loratool.diffusion.layouts import canonical_pieces
from loratool.diffusion.links import assembled_shape
from loratool.in_memory import shape_in_memory
from loratool.pieces import Piece
from loratool.skeleton import Skeleton, build_skeleton

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Targets:
    """What can be changed in a base.

    Attributes:
        skeleton: of its model.
        shapes: every name of a parameter -> its shape.
        pieces: names that are not simply a tensor's -> where their values lie.
        canonical: parameters of a diffusion model by diffusers' names -> their shapes.
    """

    skeleton: Skeleton
    shapes: Mapping[str, Shape]
    pieces: Mapping[str, tuple[Piece, ...]] = field(default_factory=dict)
    canonical: Mapping[str, Shape] = field(default_factory=dict)

    def where(self, name: str) -> tuple[Piece, ...]:
        """The pieces of a parameter."""
        return self.pieces.get(name, (Piece(name),))

    @cached_property
    def kohya(self) -> KohyaModules:
        """What underscored names mean here."""
        return kohya_modules(self.canonical)


def targets_of(base: Checkpoint) -> Targets:
    """All names of a base's parameters, by headers only.

    Raises:
        InputError: transformers does not know the class, or not all of the tensors.
    """
    shapes = {name: tensor.shape for name, tensor in base.items()}
    skeleton = build_skeleton(base.config, shapes)
    pieces = dict(skeleton.pieces)
    known: dict[str, Shape] = {n: shape_in_memory(p, shapes) for n, p in pieces.items()}
    found = canonical_pieces(shapes, base.components)
    canonical = {name: assembled_shape(places, shapes) for name, places in found.items()}
    for name, places in found.items():
        if places != (Piece(name),):
            pieces[name] = places
            known[name] = canonical[name]
    return Targets(skeleton, {**shapes, **known}, pieces, canonical)
