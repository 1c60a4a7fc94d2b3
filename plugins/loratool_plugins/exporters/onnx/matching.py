"""Which tensors of a checkpoint an initializer is made of, found by looking at the values.

No names and no model code: exporters rename weights, transpose them, cast them, and put several
side by side. A tensor is recognised by its first values in every order of its axes, then by some
dozens of values all over it. Only these are read, so a whole model takes as long as opening it;
whether every byte agrees is left to those who are about to replace it.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property

import torch

from loratool.checkpoint import LazyTensor
from loratool.dtypes import is_float
from loratool_plugins.exporters.onnx.base_graph import Initializer
from loratool_plugins.exporters.onnx.origins import Origin, Part

# Values at the beginning by which a tensor is looked up, and values all over it that must agree.
_LEAD = 8
_SAMPLES = 64
# Tensors that one initializer is made of; more are not tried.
_MOST_PARTS = 512
_MOST_AXES = 4

Permutation = tuple[int, ...]


@dataclass(frozen=True)
class Piece:
    """A stretch of an initializer.

    Attributes:
        choices: tensor -> the order of its axes, for every tensor that has these values as far as
            was looked; {} for zeros that belong to no tensor.
        length: extent along the axis in which the pieces follow each other.
    """

    choices: Mapping[str, Permutation]
    length: int


@dataclass(frozen=True)
class Layout:
    """An initializer as pieces side by side; as `Origin`, with a choice of tensors for each."""

    shape: tuple[int, ...]
    axis: int
    pieces: tuple[Piece, ...]

    @property
    def names(self) -> frozenset[str]:
        """All tensors that it may be made of."""
        return frozenset(name for piece in self.pieces for name in piece.choices)

    def origin(self, names: tuple[str | None, ...]) -> Origin:
        """The origin for one choice of tensors, one a piece; None for zeros."""
        parts = (
            Part(name, piece.choices[name] if name is not None else (), piece.length)
            for name, piece in zip(names, self.pieces, strict=True)
        )
        return Origin(self.shape, self.axis, tuple(parts))


@dataclass(frozen=True)
class _Print:
    """A tensor as far as it was looked at.

    Attributes:
        shape: without axes of size 1, whose positions in the tensor are `axes`.
        places: coordinates of the samples along these axes, (samples, axes).
        values: there.
        leads: order of the axes (of `shape`) -> the first values in that order.
    """

    name: str
    shape: tuple[int, ...]
    axes: tuple[int, ...]
    rank: int
    places: torch.Tensor
    values: torch.Tensor
    leads: Mapping[Permutation, torch.Tensor]

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    def permutation(self, order: Permutation) -> Permutation:
        """The order of all axes of the tensor; those of size 1 come last, where they do no harm."""
        if order == tuple(sorted(order)):
            return tuple(range(self.rank))
        kept = tuple(self.axes[axis] for axis in order)
        return kept + tuple(axis for axis in range(self.rank) if axis not in kept)


def _print_of(tensor: LazyTensor) -> _Print:
    axes = tuple(axis for axis, size in enumerate(tensor.shape) if size != 1)
    shape = tuple(tensor.shape[axis] for axis in axes)
    values = tensor.read().reshape(shape)
    places = _places(shape)
    leads = {order: _first(values.permute(order)) for order in _orders(len(shape))}
    samples = values[tuple(places.unbind(1))] if shape else values.reshape(1)
    return _Print(tensor.name, shape, axes, len(tensor.shape), places, samples.clone(), leads)


def _orders(axes: int) -> Iterator[Permutation]:
    if axes <= _MOST_AXES:
        yield from itertools.permutations(range(axes))
        return
    yield tuple(range(axes))
    yield (*range(1, axes), 0)  # the output channels last


def _places(shape: tuple[int, ...]) -> torch.Tensor:
    """Coordinates all over a tensor of a shape; the same ones every time."""
    numel = math.prod(shape)
    if numel <= _SAMPLES:
        flat = torch.arange(numel)
    else:
        generator = torch.Generator().manual_seed(numel)
        flat = torch.randint(numel, (_SAMPLES,), generator=generator)
        flat[0] = numel - 1
    return torch.stack(torch.unravel_index(flat, shape), 1) if shape else flat.view(1, 1)


def _first(values: torch.Tensor) -> torch.Tensor:
    """The first few values in row-major order, without laying out the rest."""
    count = min(_LEAD, values.numel())
    while values.ndim > 1 and values.shape[1:].numel() >= count:
        values = values[0]
    rows = math.ceil(count / max(1, values.shape[1:].numel())) if values.ndim else 1
    return (values[:rows] if values.ndim else values).reshape(-1)[:count].clone()


def _bits(values: torch.Tensor) -> bytes:
    return values.contiguous().view(torch.uint8).numpy().tobytes()


@dataclass(frozen=True)
class Library:
    """The floating-point tensors of a checkpoint, to be recognised in initializers.

    Attributes:
        tensors: by name.
    """

    tensors: Mapping[str, LazyTensor]
    _tables: dict[torch.dtype, _Table] = field(default_factory=dict, init=False, repr=False)

    @cached_property
    def _prints(self) -> tuple[_Print, ...]:
        floats = (t for t in self.tensors.values() if is_float(t.dtype) and t.numel)
        return tuple(_print_of(tensor) for tensor in floats)

    def _table(self, dtype: torch.dtype) -> _Table:
        if dtype not in self._tables:
            self._tables[dtype] = _Table.of(self._prints, dtype)
        return self._tables[dtype]

    def match(self, initializer: Initializer) -> Layout | None:
        """What a floating-point initializer is made of; None if the tensors do not tell."""
        if not initializer.numel:
            return None
        table = self._table(initializer.dtype)
        values = initializer.values
        flat = values.reshape(-1)
        found = _Search(table, flat, flat.numel(), 1, values.ndim <= 1).run()
        if found is not None and _is_likely(found, table, initializer.shape):
            return _along_rows(found, table, initializer.shape)
        if values.ndim < 2:
            return None
        columns = values.shape[-1]
        rows = flat.numel() // columns
        found = _Search(table, flat, rows, columns, False).run()
        return None if found is None else _along_columns(found, table, rows, columns)


@dataclass(frozen=True)
class _Run:
    """Values one after the other: tensor -> order of its axes (of `_Print.shape`)."""

    choices: Mapping[str, Permutation]
    numel: int


def _is_likely(runs: list[_Run], table: _Table, shape: tuple[int, ...]) -> bool:
    """Whether runs are no coincidence: a mask of zeros is no row of zero biases."""
    axes = sum(size != 1 for size in shape)
    return axes < 2 or all(len(table.prints[n].shape) > 1 for run in runs for n in run.choices)


@dataclass(frozen=True)
class _Table:
    """Prints in one type, by the bytes of their first values; `lengths` of these, longest first."""

    prints: Mapping[str, _Print]
    values: Mapping[str, bytes]
    by_lead: Mapping[bytes, list[tuple[str, Permutation]]]
    lengths: tuple[int, ...]

    @classmethod
    def of(cls, prints: tuple[_Print, ...], dtype: torch.dtype) -> _Table:
        by_lead: dict[bytes, list[tuple[str, Permutation]]] = {}
        for found in prints:
            for order, lead in found.leads.items():
                by_lead.setdefault(_bits(lead.to(dtype)), []).append((found.name, order))
        lengths = sorted({len(lead) for lead in by_lead}, reverse=True)
        samples = {found.name: _bits(found.values.to(dtype)) for found in prints}
        named = {found.name: found for found in prints}
        return cls(named, samples, by_lead, tuple(lengths))


@dataclass
class _Search:
    """Runs of tensors that an initializer's values are, one after the other.

    Attributes:
        table: the tensors.
        flat: the values as they lie.
        rows: with `columns`: position p of the runs is value (p % rows) * columns + p // rows, so
            that for `columns` > 1 the values are read column by column; for 1, as they lie.
        gaps: whether zeros may lie in between.
    """

    table: _Table
    flat: torch.Tensor
    rows: int
    columns: int
    gaps: bool
    dead: set[int] = field(default_factory=set)

    def run(self) -> list[_Run] | None:
        return self._from(0, 0)

    def _at(self, positions: torch.Tensor) -> torch.Tensor:
        if self.columns == 1:
            return self.flat[positions]
        return self.flat[(positions % self.rows) * self.columns + positions // self.rows]

    def _from(self, start: int, depth: int) -> list[_Run] | None:
        """The runs from a position to the end; None if there are none."""
        total = self.flat.numel()
        if start == total:
            return []
        if start in self.dead or depth > _MOST_PARTS:
            return None
        for run in itertools.chain(self._runs(start), self._gap(start)):
            rest = self._from(start + run.numel, depth + 1)
            if rest is not None:
                return [run, *rest]
        self.dead.add(start)
        return None

    def _runs(self, start: int) -> Iterator[_Run]:
        """Tensors that begin here, those of one size together, the largest first."""
        left = self.flat.numel() - start
        lead = _bits(self._at(torch.arange(start, start + min(_LEAD, left))))
        by_size: dict[int, dict[str, Permutation]] = {}
        for length in self.table.lengths:
            if length > len(lead):
                continue
            for name, order in self.table.by_lead.get(lead[:length], ()):
                size = self.table.prints[name].numel
                fits = size <= left and (self.columns == 1 or size % self.rows == 0)
                known = by_size.get(size, {})
                if fits and name not in known and self._agrees(name, order, start):
                    by_size.setdefault(size, {})[name] = order
        for size in sorted(by_size, reverse=True):
            yield _Run(by_size[size], size)

    def _agrees(self, name: str, order: Permutation, start: int) -> bool:
        found = self.table.prints[name]
        at = torch.zeros(len(found.places), dtype=torch.int64)
        for axis in order:
            at = at * found.shape[axis] + found.places[:, axis]
        return _bits(self._at(at + start)) == self.table.values[name]

    def _gap(self, start: int) -> Iterator[_Run]:
        """Zeros that belong to no tensor, up to the next other value."""
        if not self.gaps or bool(self.flat[start] != 0):
            return
        others = self.flat[start:].nonzero()
        size = int(others[0]) if len(others) else self.flat.numel() - start
        if size < self.flat.numel():  # zeros alone are a sign of nothing
            yield _Run({}, size)


def _along_rows(runs: list[_Run], table: _Table, shape: tuple[int, ...]) -> Layout:
    """Runs in the order in which the values lie, as a layout."""
    numel = math.prod(shape)
    columns = shape[-1] if len(shape) > 1 else 1
    if any(run.numel % columns for run in runs):
        columns = 1
    pieces = (
        Piece(
            {name: table.prints[name].permutation(order) for name, order in run.choices.items()},
            run.numel // columns,
        )
        for run in runs
    )
    if len(runs) == 1:
        return Layout(shape, 0, (Piece(next(pieces).choices, shape[0] if shape else 1),))
    return Layout((numel // columns, columns) if columns > 1 else (numel,), 0, tuple(pieces))


def _along_columns(runs: list[_Run], table: _Table, rows: int, columns: int) -> Layout | None:
    """Runs in the order of the columns, as a layout; None where a tensor cannot be turned so."""
    pieces = []
    for run in runs:
        choices = {}
        for name, order in run.choices.items():
            found = table.prints[name]
            if (turned := _turned(order, found.shape, run.numel // rows)) is not None:
                choices[name] = found.permutation(turned)
        if not choices:
            return None
        pieces.append(Piece(choices, run.numel // rows))
    return Layout((rows, columns), 1, tuple(pieces))


def _turned(order: Permutation, shape: tuple[int, ...], first: int) -> Permutation | None:
    """The order of axes that exchanges rows and columns, if `first` is where rows end."""
    for split in range(len(order) + 1):
        if math.prod(shape[axis] for axis in order[:split]) == first:
            return order[split:] + order[:split]
    return None
