"""Updates of parameters as updates of the tensors that these lie in.

A part of an update is one of its rows of B, or of one expert; several updates of parts of one
tensor are one update of it, with B in blocks and the A side by side. Both are exact: no value is
changed, only zeros are added.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from loratool.adapter import LazyUpdate
from loratool.checkpoint import LazyTensor
from loratool.pieces import Index, Piece
from loratool.updates import (
    IA3,
    KIND_NAMES,
    Dense,
    DoRA,
    Experts,
    Kind,
    LoHa,
    LoKr,
    LowRank,
    Product,
    Replacement,
    Sparse,
    Update,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

    import torch

Shape = tuple[int, ...]
Indices = tuple[Index, ...]


@dataclass(frozen=True)
class Share:
    """What an update does to a part of a tensor.

    Attributes:
        update: of a parameter.
        shape: the parameter's, as the model has it in memory.
        transposed: whether the update has to be transposed for that.
        part: which part of the parameter is meant; () is all.
        place: where that lies in the tensor; () is all.
        flipped: whether it lies there transposed.
    """

    update: LazyUpdate
    shape: Shape
    transposed: bool = False
    part: Indices = ()
    place: Indices = ()
    flipped: bool = False

    @property
    def is_plain(self) -> bool:
        """Whether it is the whole update for the whole tensor, as it is."""
        return not (self.part or self.place or self.flipped)

    def load(self) -> Update | None:
        """The part, as it lies in the tensor."""
        found = self.update.load()
        if found is None or (self.is_plain and not self.transposed):
            return found
        if isinstance(found, Replacement):
            return Replacement(_lazy_part(found.tensor, self.part, self.flipped))
        if self.transposed:
            found = _transposed(found)
        if self.part:
            found = _taken(found, self.part, self.shape)
        return _transposed(found) if self.flipped else found


def composed(share: Share, piece: Piece) -> Share | None:
    """A share of a parameter as one of the tensor that a piece of the parameter lies in.

    Args:
        share: of all of a parameter, or of some rows of its update and of the parameter.
        piece: of the parameter.

    Returns:
        None if the piece lies outside of the place.
    """
    if not share.place and not share.part:
        return replace(share, part=piece.part, place=piece.place, flipped=piece.transposed)
    own = _rows(share.part, slice(0, share.shape[0]))
    rows = _rows(share.place, slice(0, own.stop - own.start))
    within = _rows(piece.part, slice(0, rows.stop))
    there = _rows(piece.place[:1], slice(0, within.stop - within.start))
    if piece.transposed:
        raise ValueError("only rows of rows can be taken")
    low, high = max(rows.start, within.start), min(rows.stop, within.stop)
    if low >= high:
        return None
    start, at = own.start + low - rows.start, there.start + low - within.start
    part, place = slice(start, start + high - low), slice(at, at + high - low)
    return replace(share, part=(part,), place=(place, *piece.place[1:]))


def _rows(index: Indices, otherwise: slice | None) -> slice:
    """The rows that an index takes, all columns of them."""
    found = index[0] if len(index) == 1 else otherwise if not index else None
    if not isinstance(found, slice) or found.step is not None:
        raise ValueError("only rows of rows can be taken")
    return found


def complaint(shares: Sequence[Share], shape: Shape) -> str:
    """Why these cannot become one update of a tensor; "" if they can."""
    kinds = {share.update.kind for share in shares}
    if len(shares) == 1 and not (shares[0].part or shares[0].place):
        return ""
    whole = sum(_count(share.place, shape) for share in shares) == math.prod(shape)
    for kind in sorted(kinds):
        name = KIND_NAMES[kind]
        if kind in ("ia3", "rows"):
            return f"{name}: of a part of the base's tensor, which cannot be merged yet"
        if kind in ("dora", "replacement") and (len(kinds) > 1 or not whole):
            return f"{name}: of only a part of the base's tensor, which cannot be merged yet"
        if kind == "dora" and any(len(_short(share, shape)) > 1 for share in shares):
            return f"{name}: whose rows lie apart in the base, which cannot be merged yet"
        if kind == "dora" and any(share.update.axis for share in shares):
            return (
                f"{name}: with a magnitude for each column of several modules together, of which "
                "the base has only one, or which it has in pieces: that cannot be merged yet"
            )
    return ""


def joined(tensor: str, shape: Shape, shares: Sequence[Share]) -> LazyUpdate:
    """One update of a tensor, in the tensor's own orientation.

    Args:
        tensor: the base's name.
        shape: its shape.
        shares: without `complaint`; at least one.
    """
    first = shares[0].update

    rows = _reordered(shares, shape)

    def load() -> Update | None:
        if rows is not None:
            whole = first.load()
            return None if whole is None else rows_of(whole, rows)
        found = [(share.place, share.load()) for share in shares]
        present = [(place, update) for place, update in found if update is not None]
        if len(shares) == 1 and not shares[0].place:
            return present[0][1] if present else None
        return _fused(tensor, shape, present)

    kind = _kind(shares, shape)
    ranks = [share.update.rank or 0 for share in shares[: 1 if rows else None]]
    return LazyUpdate(
        first.name,
        kind,
        shape,
        first.dtype,
        load,
        rank=sum(ranks) or None,
        origin=first.origin,
        transposed=False,
        stored=tuple(t for share in shares for t in share.update.stored),
        beneath=first.beneath if len(shares) == 1 and shares[0].is_plain else None,
        optional=first.optional,
        rows=first.rows,
        embedding=first.embedding,
    )


def _reordered(shares: Sequence[Share], shape: Shape) -> list[Index] | None:
    """The rows of the one update whose rows, in another order, are the tensor's; else None."""
    first = shares[0]
    plain = all(
        share.update is first.update
        and len(share.part) == len(share.place) == 1
        and isinstance(share.part[0], slice)
        and not (share.flipped or share.transposed)
        for share in shares
    )
    if len(shares) < 2 or not plain or first.update.kind == "replacement":
        return None
    places = [(_rows(share.place, None), share.part[0]) for share in shares]
    places.sort(key=lambda item: item[0].start)
    stops = [0, *(place.stop for place, _ in places)]
    if [place.start for place, _ in places] != stops[:-1] or stops[-1] != shape[0]:
        return None
    return [part for _, part in places]


def _kind(shares: Sequence[Share], shape: Shape) -> Kind:
    kinds = {share.update.kind for share in shares}
    if "sparse" in kinds and kinds <= {"low_rank", "sparse"}:
        return "dense" if any(_is_of_expert(share) for share in shares) else "sparse"
    if kinds <= {"low_rank", "experts"}:
        indexed = any(share.place and isinstance(share.place[0], int) for share in shares)
        whole = any(s.update.kind == "experts" and not _is_one_expert(s.part) for s in shares)
        return "experts" if indexed or whole else "low_rank"
    if len(kinds) == 1 and (kinds <= {"dora", "replacement"} or len(shares) == 1):
        (kind,) = kinds
        return "dense" if kind == "lokr" and shares[0].part else kind
    return "dense"


def _is_of_expert(share: Share) -> bool:
    return any(isinstance(index, int) for index in (*share.part[:1], *share.place[:1]))


def _is_one_expert(part: Indices) -> bool:
    return bool(part) and isinstance(part[0], int)


def _count(place: Indices, shape: Shape) -> int:
    sizes = []
    for axis, size in enumerate(shape):
        index = place[axis] if axis < len(place) else slice(None)
        sizes.append(len(range(*index.indices(size))) if isinstance(index, slice) else 1)
    return math.prod(sizes)


def _short(share: Share, shape: Shape) -> Indices:
    """The place without trailing dimensions that are taken whole."""
    found = list(share.place)
    while found and found[-1] in (slice(None), slice(0, shape[len(found) - 1])):
        found.pop()
    return tuple(found)


def _transposed(update: Update) -> Update:
    if isinstance(update, LowRank | Sparse | Experts | Dense | LoHa | LoKr | DoRA | IA3):
        return update.transposed()
    raise TypeError(f"{type(update).__name__} cannot be transposed")


def _lazy_part(tensor: LazyTensor, part: Indices, flipped: bool) -> LazyTensor:
    shape: list[int] = []
    for axis, size in enumerate(tensor.shape):
        index = part[axis] if axis < len(part) else slice(None)
        if isinstance(index, slice):
            shape.append(len(range(*index.indices(size))))
    if flipped:
        shape[-2:] = shape[:-3:-1]

    def blocks() -> Iterator[torch.Tensor]:
        values = tensor.read()[part] if part else tensor.read()
        yield (values.mT if flipped else values).contiguous()

    return LazyTensor(tensor.name, tensor.dtype, tuple(shape), blocks, tensor.origin)


def _taken(update: Update, index: Indices, shape: Shape) -> Update:
    """The part of an update of a weight; `index` is of the weight (E, ...) or (out, in, ...)."""
    match update:
        case Experts():
            a, b = update.a[index[0]], update.b[index[0]]
            rows, columns = (*index[1:], slice(None), slice(None))[:2]
            b, a = b[..., rows, :], a[..., columns]
            if isinstance(index[0], int):
                return LowRank(a, b, update.scale)
            return Experts(a, b, update.scale)
        case Dense():
            return Dense(update.values.reshape(shape)[index], update.scale)
        case LowRank():
            a = update.a
            if len(index) > 1:
                a = a.reshape(-1, *shape[1:])[(slice(None), *index[1:])].reshape(len(a), -1)
            return _trimmed(LowRank(a, update.b[index[0]], update.scale))
        case Sparse():
            added = _taken(update.added, index, shape)
            assert isinstance(added, LowRank)
            positions, kept, _ = _taken_places(update.positions, index, shape)
            return Sparse(added, positions, update.values[kept], update.scale)
        case DoRA() if len(index) == 1 and isinstance(index[0], slice):
            return _trimmed(rows_of(update, index))
        case LoHa() | LoKr():
            from loratool.deltas import dense

            return Dense(dense(update, shape)[index])
    raise TypeError(f"no part can be taken of {type(update).__name__}")


def cut_rows(update: LazyUpdate, name: str, rows: Sequence[slice]) -> LazyUpdate:
    """Some rows of an update as one of the parameter `name`, which has these rows, in this order.

    When it is loaded, a LoKr may turn out dense (`rows_of`), and a low-rank update of a smaller
    rank, or none at all, where these rows are zero.
    """
    if is_whole(update, rows):
        return replace(update, name=name)
    height = sum(row.stop - row.start for row in rows)

    def load() -> Update | None:
        found = update.load()
        part = None if found is None else _trimmed(rows_of(found, rows))
        if isinstance(part, Sparse) and not len(part.values):
            part = part.added
        return None if isinstance(part, LowRank) and not part.b.count_nonzero() else part

    return replace(update, name=name, shape=(height, *update.shape[1:]), load=load, stored=())


def is_whole(update: LazyUpdate, rows: Sequence[slice]) -> bool:
    """Whether an update has just these rows, or scales inputs, which are those of any rows."""
    is_of_columns = update.kind == "ia3" and len(update.shape) == 2 and not update.shape[0]
    return is_of_columns or (len(rows) == 1 and rows[0] == slice(0, update.shape[0]))


def rows_of(update: Update, rows: Sequence[Index]) -> Update:
    """Some rows of an update: an update of a weight that has these rows, in this order.

    Args:
        update: of a weight (out, ...).
        rows: slices of its rows; all of them, in whatever order, for DoRA with a magnitude for
            each column.

    Returns:
        An update of the same kind, but for a LoKr whose blocks the rows cut: a dense one.

    Raises:
        TypeError: this kind has no rows of its own.
    """
    match update:
        case LowRank():
            return LowRank(update.a, _cut(update.b, rows), update.scale)
        case Sparse():
            return _rows_of_sparse(update, rows)
        case Dense():
            return replace(update, values=_cut(update.values, rows))
        case LoHa():
            return replace(update, one=_left(update.one, rows), other=_left(update.other, rows))
        case LoKr():
            return _rows_of_kronecker(update, rows)
        case DoRA():
            added = rows_of(update.added, rows)
            assert isinstance(added, LowRank | Dense | LoHa | LoKr)
            magnitude = update.magnitude if update.axis else _cut(update.magnitude, rows)
            return DoRA(added, magnitude, update.axis)
        case IA3():
            return update if update.axis else IA3(_cut(update.factors, rows))
        case Replacement() if len(rows) == 1:
            return Replacement(_lazy_part(update.tensor, tuple(rows), flipped=False))
    raise TypeError(f"no rows can be taken of {type(update).__name__}")


def _rows_of_sparse(update: Sparse, rows: Sequence[Index]) -> Sparse:
    import torch

    added = rows_of(update.added, rows)
    assert isinstance(added, LowRank)
    done, found = 0, []
    for row in rows:
        positions, kept, shape = _taken_places(update.positions, (row,), update.shape)
        found.append((positions + done, update.values[kept]))
        done += math.prod(shape)
    positions, values = (torch.cat(parts) for parts in zip(*found, strict=True))
    return Sparse(added, positions, values, update.scale)


def _taken_places(
    positions: torch.Tensor, index: Indices, shape: Shape
) -> tuple[torch.Tensor, torch.Tensor, Shape]:
    """Where places in a weight lie in a part of it.

    Args:
        positions: (k,), ascending.
        index: slices that take the part.
        shape: of the weight.

    Returns:
        (n,) the places in the part, ascending; (k,) whether each lies in it; the part's shape.
    """
    kept, numbers = positions >= 0, positions * 0
    sizes = []
    for size, stride, (start, count) in _axes(index, shape):
        here = positions // stride % size - start
        kept &= (here >= 0) & (here < count)
        numbers = numbers * count + here
        sizes.append(count)
    return numbers[kept], kept, tuple(sizes)


def _placed(positions: torch.Tensor, place: Indices, shape: Shape) -> torch.Tensor:
    """Where places in a part of a weight lie in the weight."""
    numbers, left = positions * 0, positions
    for _, stride, (start, count) in reversed(list(_axes(place, shape))):
        numbers = numbers + (left % count + start) * stride
        left = left // count
    return numbers


def _axes(index: Indices, shape: Shape) -> Iterator[tuple[int, int, tuple[int, int]]]:
    """Size, stride, and what slices take (start, count) of every dimension of a weight."""
    for axis, size in enumerate(shape):
        taken = index[axis] if axis < len(index) else slice(None)
        if not isinstance(taken, slice) or taken.step not in (None, 1):
            raise ValueError("only blocks of a weight can be taken")
        start, stop, _ = taken.indices(size)
        yield size, math.prod(shape[axis + 1 :]), (start, stop - start)


def _trimmed(update: Update) -> Update:
    """The same without the columns of B that are zero, of which the first stays in any case.

    What was put together of several modules' updates is so again what each of them was.
    """
    if isinstance(update, DoRA):
        added = _trimmed(update.added)
        assert isinstance(added, LowRank | Dense | LoHa | LoKr)
        return replace(update, added=added)
    if isinstance(update, Sparse):
        added = _trimmed(update.added)
        assert isinstance(added, LowRank)
        return replace(update, added=added)
    if not isinstance(update, LowRank):
        return update
    used = (update.b != 0).any(dim=0)
    if used.all():
        return update
    used[0] |= not used.any()
    return LowRank(update.a[used], update.b[:, used], update.scale)


def _cut(values: torch.Tensor, rows: Sequence[Index]) -> torch.Tensor:
    import torch

    return values[rows[0]] if len(rows) == 1 else torch.cat([values[row] for row in rows])


def _left(product: Product, rows: Sequence[Index]) -> Product:
    return replace(product, left=_cut(product.left, rows))


def _rows_of_kronecker(update: LoKr, rows: Sequence[Index]) -> LoKr | Dense:
    """Rows of kron(one, other) are rows of `one` where they are whole blocks of `other`'s."""
    from loratool.deltas import dense

    height = update.other.left.shape[0]
    blocks = [
        slice(row.start // height, row.stop // height)
        for row in rows
        if isinstance(row, slice) and not (row.start % height or row.stop % height)
    ]
    if len(blocks) == len(rows):
        return replace(update, one=_left(update.one, blocks))
    shape = (update.one.left.shape[0] * height, _width(update.one) * _width(update.other))
    return Dense(_cut(dense(update, shape), rows))


def _width(product: Product) -> int:
    """The columns of the matrix; of a convolution's, inputs times kernel."""
    if product.right is None:
        return math.prod(product.left.shape[1:])
    kernel = () if product.core is None else product.core.shape[2:]
    return math.prod((*product.right.shape[1:], *kernel))


def _fused(tensor: str, shape: Shape, found: Sequence[tuple[Indices, Update]]) -> Update | None:
    if not found:
        return None
    updates = [update for _, update in found]
    if all(isinstance(update, LowRank | Experts) for update in updates):
        return _fused_factors(shape, found)
    if all(isinstance(update, LowRank | Sparse) for update in updates) and not any(
        _is_of_experts(place, update) for place, update in found
    ):
        return _fused_sparse(shape, found)
    if all(isinstance(update, DoRA) for update in updates):
        return _fused_dora(shape, found)
    if all(isinstance(update, Replacement) for update in updates):
        return Replacement(_assembled(tensor, shape, found))
    return _fused_dense(shape, found)


def _fused_factors(shape: Shape, found: Sequence[tuple[Indices, Any]]) -> LowRank | Experts:
    """B in blocks, the A side by side; for experts, one such pair each."""
    import torch

    if not any(_is_of_experts(place, update) for place, update in found):
        shape = (shape[0], math.prod(shape[1:]))
        rank = sum(update.rank for _, update in found)
        a = torch.zeros(rank, shape[1], dtype=torch.float64)
        b = torch.zeros(shape[0], rank, dtype=torch.float64)
        done = 0
        for place, update in found:
            rows, columns = (*place, slice(None), slice(None))[:2]
            part = slice(done, done + update.rank)
            a[part, columns] = update.a.double()
            b[rows, part] = update.b.double() * update.scale
            done += update.rank
        return LowRank(a, b)
    number = shape[0]
    by_expert: list[list[tuple[Indices, LowRank]]] = [[] for _ in range(number)]
    for place, update in found:
        first, rest = (place[0], place[1:]) if place else (slice(None), ())
        if isinstance(first, int):
            by_expert[first].append((rest, update))
        else:
            for count, expert in enumerate(range(*first.indices(number))):
                by_expert[expert].append((rest, update.expert(count)))
    pairs = [_fused_factors(shape[1:], parts) for parts in by_expert]
    rank = max(pair.rank for pair in pairs)
    a = torch.zeros(number, rank, shape[2], dtype=torch.float64)
    b = torch.zeros(number, shape[1], rank, dtype=torch.float64)
    for expert, pair in enumerate(pairs):
        a[expert, : pair.rank], b[expert, :, : pair.rank] = pair.a, pair.b
    return Experts(a, b)


def _fused_sparse(shape: Shape, found: Sequence[tuple[Indices, Any]]) -> Sparse:
    """The factors in one product, and all single entries where they are in the whole."""
    import torch

    parts = [(p, u.added if isinstance(u, Sparse) else u) for p, u in found]
    added = _fused_factors(shape, parts)
    assert isinstance(added, LowRank)
    sparse = [(place, update) for place, update in found if isinstance(update, Sparse)]
    places = [_placed(update.positions, place, shape) for place, update in sparse]
    values = [update.values.double() * update.scale for _, update in sparse]
    positions, order = torch.cat(places).sort()
    return Sparse(added, positions, torch.cat(values)[order])


def _is_of_experts(place: Indices, update: Update) -> bool:
    return isinstance(update, Experts) or (bool(place) and isinstance(place[0], int))


def _fused_dora(shape: Shape, found: Sequence[tuple[Indices, Any]]) -> DoRA:
    import torch

    added = _fused(shape=shape, tensor="", found=[(place, update.added) for place, update in found])
    assert isinstance(added, LowRank | Dense)
    magnitude = torch.empty(shape[0], dtype=torch.float64)
    for place, update in found:
        magnitude[place[0]] = update.magnitude.double()
    return DoRA(added, magnitude)


def _fused_dense(shape: Shape, found: Sequence[tuple[Indices, Any]]) -> Dense:
    import torch

    from loratool.deltas import dense

    values = torch.zeros(shape, dtype=torch.float64)
    for place, update in found:
        target = values[place]
        target.copy_(dense(update, target.shape))
    return Dense(values)


def _assembled(tensor: str, shape: Shape, found: Sequence[tuple[Indices, Any]]) -> LazyTensor:
    first: LazyTensor = found[0][1].tensor

    def blocks() -> Iterator[torch.Tensor]:
        import torch

        from loratool.dtypes import torch_dtype

        values = torch.empty(shape, dtype=torch_dtype(first.dtype))
        for place, update in found:
            values[place] = update.tensor.read()
        yield values

    return LazyTensor(tensor, first.dtype, shape, blocks, first.origin)
