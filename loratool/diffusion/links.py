"""Two layouts of one model: which module of the one is which of the other.

A link says it of one module and everything inside; the deepest link that fits a name counts.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from loratool.pieces import Piece

Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True)
class Link:
    """A module in a single-file layout, and what diffusers makes of it.

    Attributes:
        single: its name in the single file ("double_blocks.0.img_attn.qkv").
        parts: the modules, or the parameters, that its rows are in diffusers' layout, in order.
        swapped: whether the halves of the only part's rows are the other way round.
    """

    single: str
    parts: tuple[str, ...]
    swapped: bool = False


@dataclass(frozen=True)
class Rows:
    """Some of the rows of a module's parameters: `start` up to `stop`."""

    module: str
    start: int
    stop: int

    @property
    def count(self) -> int:
        """How many they are."""
        return self.stop - self.start


def link(single: str, *parts: str, swapped: bool = False) -> Link:
    """A link, written shorter."""
    return Link(single, parts, swapped)


def below(link: Link, single: str, part: str) -> Link:
    """A link between modules inside others."""
    inside = tuple(f"{part}{name}" for name in link.parts)
    return Link(f"{single}{link.single}", inside, link.swapped)


def split(name: str, known: Mapping[str, Link]) -> tuple[Link, str] | None:
    """The deepest link that a name in a single file is inside of, and the rest of the name."""
    end = len(name)
    while end > 0:
        if found := known.get(name[:end]):
            return found, name[end:]
        end = name.rfind(".", 0, end)
    return None


def pieces_of(
    links: Iterable[Link], shapes: Shapes, prefix: str, component: str
) -> dict[str, tuple[Piece, ...]]:
    """Where the parameters of a component lie in a single file.

    Args:
        links: from the names in the file, without `prefix`, to those in the component.
        shapes: of all tensors of the file.
        prefix: what the component's tensors start with.
        component: what their canonical names start with.

    Returns:
        Canonical name -> its pieces; what has no link, or cannot be split as it says, is left out.
    """
    known = {link.single: link for link in links}
    found: dict[str, tuple[Piece, ...]] = {}
    for name, shape in shapes.items():
        if not name.startswith(prefix):
            continue
        if (place := split(name.removeprefix(prefix), known)) is None:
            continue
        link, rest = place
        if len(link.parts) == 1 and not link.swapped:
            found[component + link.parts[0] + rest] = (Piece(name),)
            continue
        beside = shapes.get(f"{prefix}{link.single}.weight", ())
        heights = _heights(link, shape, beside)
        if heights is None:
            continue
        if link.swapped:
            half, whole = heights[0], sum(heights)
            found[component + link.parts[0] + rest] = (
                Piece(name, (slice(0, half),), (slice(half, whole),)),
                Piece(name, (slice(half, whole),), (slice(0, half),)),
            )
            continue
        start = 0
        for part, height in zip(link.parts, heights, strict=True):
            found[component + part + rest] = (Piece(name, (), (slice(start, start + height),)),)
            start += height
    return found


def _heights(link: Link, shape: tuple[int, ...], weight: tuple[int, ...]) -> tuple[int, ...] | None:
    """How many rows each part has; None if the shape does not allow it.

    Queries, keys and values are of one height; what comes fourth is the rest, and then each of the
    three is as high as the module's input is wide.
    """
    if not shape:
        return None
    count = 2 if link.swapped else len(link.parts)
    if count == 4:
        width = weight[1] if len(weight) == 2 else 0
        rest = shape[0] - 3 * width
        return (width, width, width, rest) if width and rest > 0 else None
    return None if shape[0] % count else (shape[0] // count,) * count


def rows_of(link: Link, shapes: Shapes, component: str) -> tuple[Rows, ...] | None:
    """The rows of a single file's module as rows of a component's modules, in order.

    Args:
        link: which are meant.
        shapes: of all canonical parameters.
        component: what the component's canonical names start with.

    Returns:
        None if the component lacks one of them.
    """
    found = []
    for part in link.parts:
        shape = shapes.get(f"{component}{part}.weight")
        if not shape:
            return None
        found.append(Rows(component + part, 0, shape[0]))
    if not link.swapped:
        return tuple(found)
    (whole,) = found
    half = whole.stop // 2
    return Rows(whole.module, half, whole.stop), Rows(whole.module, 0, half)


def numbers(names: Iterable[str], before: str) -> list[int]:
    """The numbers that follow `before` in names, sorted: "before.3.after" has 3."""
    found = set()
    for name in names:
        if name.startswith(before):
            number = name.removeprefix(before).partition(".")[0]
            if number.isdigit():
                found.add(int(number))
    return sorted(found)


def assembled_shape(pieces: Sequence[Piece], shapes: Shapes) -> tuple[int, ...]:
    """The shape of a parameter that pieces make up."""
    found: tuple[int, ...] = ()
    rows = 0
    for piece in pieces:
        shape = shapes[piece.tensor]
        kept = []
        for axis, size in enumerate(shape):
            index = piece.place[axis] if axis < len(piece.place) else slice(None)
            if isinstance(index, slice):
                kept.append(len(range(*index.indices(size))))
        if piece.transposed:
            kept[-2:] = kept[:-3:-1]
        found = tuple(kept)
        rows += kept[0] if kept else 0
    return (rows, *found[1:]) if found else ()
