"""Updates of several modules as one of the module that holds all their rows.

B stands in blocks and the A one below the other; where all have one A, they share it. No value is
changed but for scales that differ, which are worked into B; what is needed to take the parts out
again as they were is told.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, NamedTuple

from loratool.dtypes import dtype_name
from loratool.updates import Dense, DoRA, LowRank
from loratool_plugins.adapter_formats._scales import TORCH_TYPES, fold

if TYPE_CHECKING:
    import torch

Row = tuple[str, int, int]  # a module, its first row and the one after the last


class Fold(NamedTuple):
    """What was done to an update's values so that they could be written.

    Attributes:
        factor: what was worked into B, or into a full delta.
        scale: the update's own.
        dtype: the type that these values had.
        other: the type that A had.
    """

    factor: float
    scale: float
    dtype: str
    other: str


@dataclass(frozen=True)
class Fused:
    """What became of the parts.

    Attributes:
        update: of all rows; those of modules without an update are zero.
        columns: module -> the first of its columns of B, and the one after the last.
        folds: module -> what was worked into its values, and how it was before.
        exact: whether this could be done without rounding.
    """

    update: LowRank | Dense | DoRA
    columns: Mapping[str, tuple[int, int]]
    folds: Mapping[str, Fold]
    exact: bool = True


def fused(parts: Mapping[str, LowRank | Dense | DoRA], rows: Sequence[Row]) -> Fused:
    """Put updates together.

    Args:
        parts: module -> its update; all of one kind, with magnitudes of rows and of every module.
        rows: of the whole, in order.
    """
    first = next(iter(parts.values()))
    if isinstance(first, DoRA):
        found = fused({name: _added(part) for name, part in parts.items()}, rows)
        magnitude = first.magnitude
        if first.axis == 0:
            own = {name: part.magnitude for name, part in parts.items() if isinstance(part, DoRA)}
            magnitude = _assembled(own, rows)
        assert isinstance(found.update, LowRank)
        return replace(found, update=DoRA(found.update, magnitude, first.axis))
    scales = (part.scale for part in parts.values() if not isinstance(part, DoRA) and part.scale)
    scale = next(scales, 1.0)
    values, exact = _with_one_scale(parts, scale)
    if isinstance(first, Dense):
        whole = _assembled(values, rows)
        none = dict.fromkeys(parts, (0, 0))
        return Fused(Dense(whole, scale), none, _folds(parts, scale, whole, whole), exact)
    factors = {name: part.a for name, part in parts.items() if isinstance(part, LowRank)}
    a, columns = _joined(factors)
    b = _blocks(values, rows, columns, len(a))
    return Fused(LowRank(a, b, scale), columns, _folds(parts, scale, b, a), exact)


def _added(part: LowRank | Dense | DoRA) -> LowRank:
    if isinstance(part, DoRA) and isinstance(part.added, LowRank):
        return part.added
    raise TypeError(f"{type(part).__name__} cannot be put together with DoRA of low rank")


def _with_one_scale(parts: Mapping[str, Any], scale: float) -> tuple[dict[str, torch.Tensor], bool]:
    """What is scaled of each part, so that one scale does for all; and whether that is exact."""
    values, exact = {}, True
    for name, part in parts.items():
        found = fold(_values(part), part.scale / scale, TORCH_TYPES)
        values[name], exact = found.values, exact and found.exact
    return values, exact


def _values(part: LowRank | Dense) -> torch.Tensor:
    return part.values if isinstance(part, Dense) else part.b


def _folds(
    parts: Mapping[str, Any], scale: float, values: torch.Tensor, other: torch.Tensor
) -> dict[str, Fold]:
    """How the parts were that are not as they were."""
    found = {}
    for name, part in parts.items():
        own = _values(part).dtype
        a = part.a.dtype if isinstance(part, LowRank) else own
        as_it_was = part.scale == scale and own == values.dtype and a == other.dtype
        if part.scale and not as_it_was:
            factor = part.scale / scale
            found[name] = Fold(factor, part.scale, dtype_name(own), dtype_name(a))
    return found


def _joined(
    factors: Mapping[str, torch.Tensor],
) -> tuple[torch.Tensor, dict[str, tuple[int, int]]]:
    """All A one below the other, or one for all if they are equal; and where each one is."""
    import torch

    first, *others = factors.values()
    if all(first.dtype == other.dtype and torch.equal(first, other) for other in others):
        return first, dict.fromkeys(factors, (0, len(first)))
    columns, done = {}, 0
    for name, a in factors.items():
        columns[name] = (done, done + len(a))
        done += len(a)
    kind = _common_type(factors.values())
    return torch.cat([a.to(kind) for a in factors.values()]), columns


def _blocks(
    values: Mapping[str, torch.Tensor],
    rows: Sequence[Row],
    columns: Mapping[str, tuple[int, int]],
    rank: int,
) -> torch.Tensor:
    import torch

    height = sum(stop - start for _, start, stop in rows)
    b = torch.zeros(height, rank, dtype=_common_type(values.values()))
    done = 0
    for name, start, stop in rows:
        if name in values:
            first, last = columns[name]
            b[done : done + stop - start, first:last] = values[name][start:stop]
        done += stop - start
    return b


def _assembled(values: Mapping[str, torch.Tensor], rows: Sequence[Row]) -> torch.Tensor:
    """The rows of all modules, one below the other; zeros for those that are not there."""
    import torch

    first = next(iter(values.values()))
    kind = _common_type(values.values())
    blocks = [
        values[name][start:stop].to(kind)
        if name in values
        else torch.zeros(stop - start, *first.shape[1:], dtype=kind)
        for name, start, stop in rows
    ]
    return torch.cat(blocks)


def _common_type(tensors: Iterable[torch.Tensor]) -> torch.dtype:
    """The narrowest type that holds the values of all."""
    import torch

    kinds = {tensor.dtype for tensor in tensors}
    found = kinds.pop()
    for kind in kinds:
        if kind.itemsize == found.itemsize == 1:  # torch promotes no two 8-bit floats
            return torch.float16
        found = torch.promote_types(found, kind)
    return found
