"""What loralib's factors mean: which update each pair is, from names, shapes and what was told.

loralib's rules, as its modules compute: delta = alpha / r * B @ A, A (r, in), B (out, r), of an
Embedding transposed. MergedLinear has an A of r rows for each enabled slot of its output, one after
the other, and B's rows are those of the enabled slots alone. ConvLoRA multiplies A (r k, in k) by
B (out / groups k, r k) and takes the product's elements, in their order, for the weight's.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loratool.adapter import FormatOptions, LazyUpdate, replacement
from loratool.checkpoint import LazyTensor
from loratool.dtypes import is_float
from loratool.errors import FormatError, Problem
from loratool.families import is_embedding
from loratool.reports import counted
from loratool.updates import Dense, Kind, LowRank, Update
from loratool_plugins.adapter_formats._scales import unfold

if TYPE_CHECKING:
    import torch

DEFAULT_ALPHA = 1.0  # of every loralib module
_FACTOR = re.compile(r"(?:(?P<module>.+)\.)?lora_(?P<side>[AB])")
Shape = tuple[int, ...]


@dataclass(frozen=True)
class Facts:
    """What loratool's metadata tells of single modules.

    Attributes:
        known: whether there is any; then alpha is known, too.
        folds: module -> (alpha, dtype): what was worked into B, and the type that it had before.
        tables: modules that are embeddings.
        transposed: parameters that the base stores as (in, out).
    """

    known: bool = False
    folds: Mapping[str, tuple[float, str]] = field(default_factory=dict)
    tables: frozenset[str] = frozenset()
    transposed: frozenset[str] = frozenset()

    @classmethod
    def of(cls, ours: Mapping[str, Any], transposed: Iterable[str], label: str) -> Facts:
        """Raises FormatError if the metadata is not what loratool writes."""
        try:
            folds = {
                str(name): (float(alpha), str(dtype))
                for name, (alpha, dtype) in dict(ours.get("folds", {})).items()
            }
            tables = frozenset(map(str, ours.get("tables", ())))
        except (TypeError, ValueError) as error:
            raise FormatError(f"{label}: its metadata is not what loratool writes") from error
        if any(not math.isfinite(a) or a == 0 or not is_float(t) for a, t in folds.values()):
            raise FormatError(f"{label}: its metadata states an alpha that cannot be")
        return cls(bool(ours), folds, tables, frozenset(transposed))


@dataclass(frozen=True)
class Pair:
    """The two factors of a module as they are stored.

    Attributes:
        module: its name.
        a: (rows, in).
        b: (out, r).
        weight: the module's own weight, if the file holds that, too.
    """

    module: str
    a: LazyTensor
    b: LazyTensor
    weight: LazyTensor | None = None

    @property
    def name(self) -> str:
        """The parameter that they update."""
        return f"{self.module}.weight".removeprefix(".")

    @property
    def rank(self) -> int:
        """The columns of B."""
        return self.b.shape[1]

    @property
    def product(self) -> tuple[int, int]:
        """The shape of B @ A where it is one product."""
        return self.b.shape[0], self.a.shape[1]

    def update(
        self, kind: Kind, shape: Shape, load: Callable[[], Update], rank: int | None
    ) -> LazyUpdate:
        """An update that is made of them."""
        return LazyUpdate(
            self.name,
            kind,
            shape,
            self.a.dtype,
            load,
            rank=rank,
            origin=self.a.origin,
            stored=(self.a, self.b),
            beneath=self.weight,
        )


@dataclass
class Reader:
    """Turns stored tensors into updates, collecting problems.

    Attributes:
        tensors: what the file holds, by key.
        told: what a person or the base tells.
        facts: what loratool's metadata tells.
        replaced: parameter -> its new value.
    """

    tensors: Mapping[str, LazyTensor]
    told: FormatOptions
    facts: Facts

    def __post_init__(self) -> None:
        self.problems: list[Problem] = []
        self.replaced: dict[str, LazyTensor] = {}

    def updates(self) -> dict[str, LazyUpdate]:
        """Parameter -> update; what is no factor replaces the base's tensor."""
        sides: dict[str, dict[str, LazyTensor]] = {}
        others: dict[str, LazyTensor] = {}
        for key, tensor in self.tensors.items():
            if match := _FACTOR.fullmatch(key):
                sides.setdefault(match["module"] or "", {})[match["side"]] = tensor
            else:
                others[key] = tensor
        found: dict[str, LazyUpdate] = {}
        for pair in self._pairs(sides, others):
            if (update := self._update(pair)) is not None:
                found[update.name] = update
        for name, tensor in others.items():
            found[name] = self._replacement(name, tensor)
        if whole := [update.name for update in found.values() if update.beneath is not None]:
            message = (
                "the file holds the weight beside its factors: if it was saved after eval(), the "
                "update is in that weight already; save loralib.lora_state_dict(model) instead"
            )
            self.problems.append(Problem("warning", whole[0], message))
        return found

    def notes(self, path: Path) -> tuple[str, ...]:
        """What was assumed for want of anything that says it."""
        if self.facts.known or self.told.alpha is not None:
            return ()
        return (
            f"{path}: loralib's files do not say alpha: taken as its default 1, which makes the "
            "scale 1 / rank; if it was trained with another, convert it with --alpha first",
        )

    def _pairs(
        self, sides: Mapping[str, Mapping[str, LazyTensor]], others: dict[str, LazyTensor]
    ) -> Iterator[Pair]:
        """The complete pairs, each with its weight, which is taken out of the other tensors."""
        for module, found in sides.items():
            # A convolution lies inside loralib's module; the base has it in that one's place.
            for leaf in ("weight", "bias"):
                if (inner := f"{module}.conv.{leaf}") in others:
                    others[f"{module}.{leaf}"] = others.pop(inner)
            weight = others.pop(f"{module}.weight", None)
            if len(found) == 2:
                yield Pair(module, found["A"], found["B"], weight)
                continue
            (here,) = found
            missing = f"{module}.lora_{'B' if here == 'A' else 'A'}".removeprefix(".")
            self._complain(missing, f"missing, but lora_{here} is there")

    def _complain(self, name: str, message: str, expected: str = "", found: str = "") -> None:
        self.problems.append(Problem("error", name, message, expected, found))

    def _replacement(self, name: str, tensor: LazyTensor) -> LazyUpdate:
        value = self.replaced[name] = tensor.renamed(name)
        return replacement(value, tensor)

    def _update(self, pair: Pair) -> LazyUpdate | None:
        for tensor in (pair.a, pair.b):
            if len(tensor.shape) != 2 or not is_float(tensor.dtype) or not tensor.numel:
                shown = f"{tensor.dtype} {tensor.shape}"
                self._complain(tensor.name, "is no factor", "floats in two dimensions", shown)
                return None
        groups, rest = divmod(pair.a.shape[0], pair.rank)
        if rest or not groups:
            message = "lora_A and lora_B have different ranks"
            expected = f"a multiple of lora_B's {pair.rank} columns as rows of lora_A"
            self._complain(pair.module, message, expected, f"{pair.a.shape[0]}")
            return None
        shape = self._shape_in_base(pair.name)
        if shape is not None and len(shape) > 2:
            return self._convolution(pair, shape)
        out = _outputs(pair, shape)
        slots = self.told.enable_lora
        if groups == 1 and (out == pair.b.shape[0] or self._is_table(pair.module)):
            return self._plain(pair)
        if groups == 1 and out is None and (slots is None or sum(slots) != 1):
            return self._plain(pair)
        return self._merged(pair, groups, out)

    def _shape_in_base(self, name: str) -> Shape | None:
        """The shape of a parameter in the base, if that is known; prefixes may differ."""
        if (base := self.told.base) is None:
            return None
        if name in base:
            return base[name].shape
        ends = [n for n in base if n.endswith(f".{name}") or name.endswith(f".{n}")]
        return base[ends[0]].shape if len(ends) == 1 else None

    def _is_table(self, module: str) -> bool:
        return module in self.facts.tables or is_embedding(module)

    def _plain(self, pair: Pair) -> LazyUpdate:
        """Linear and Embedding: one product."""
        if not self._is_table(pair.module):
            return self._low_rank(pair, pair.product, pair.rank, pair.rank, lambda update: update)
        update = self._low_rank(
            pair, pair.product[::-1], pair.rank, pair.rank, lambda update: update.transposed()
        )
        return replace(update, transposed=False, embedding=True)

    def _merged(self, pair: Pair, groups: int, out: int | None) -> LazyUpdate | None:
        """MergedLinear: one product for each enabled slot of the output."""
        size, rest = divmod(pair.b.shape[0], groups)
        slots = self.told.enable_lora
        if slots is None and out == groups * size:
            slots = (True,) * groups
        if slots is None:
            message = (
                f"updates {counted(groups, 'slot')} of a fused weight (MergedLinear), and the "
                "file does not say which: give --enable-lora, for instance 1,0,1"
            )
            self._complain(pair.module, message)
            return None
        if rest or sum(slots) != groups:
            message = "--enable-lora does not fit its factors"
            self._complain(pair.module, message, f"{groups} enabled", f"{sum(slots)}")
            return None
        places = [number for number, enabled in enumerate(slots) if enabled]
        rows = size * len(slots)

        def place(update: LowRank) -> LowRank:
            return replace(update, b=placed(update.b, places, rows))

        return self._low_rank(pair, (rows, pair.a.shape[1]), pair.rank, pair.a.shape[0], place)

    def _convolution(self, pair: Pair, shape: Shape) -> LazyUpdate | None:
        """ConvLoRA: the product's elements, in their order, are the weight's."""
        rank, rest = divmod(pair.rank, shape[-1])
        if math.prod(pair.product) != math.prod(shape) or rest or pair.a.shape[0] != pair.rank:
            message = "B @ A does not have as many elements as the base's convolution"
            self._complain(pair.module, message, f"{shape}", f"{pair.product}")
            return None
        rows, rest = divmod(pair.product[0], shape[0])
        if rest or not rows:  # a row of the weight is not made of whole rows of the product
            return pair.update("dense", shape, lambda: self._viewed(pair, rank, shape), None)

        def spread(update: LowRank) -> LowRank:
            # A row of the weight is some rows of the product, one after the other.
            b = update.b.reshape(shape[0], rows * update.b.shape[1])
            return replace(update, a=_repeated(update.a, rows), b=b)

        return self._low_rank(pair, shape, rank, pair.rank * rows, spread)

    def _viewed(self, pair: Pair, rank: int, shape: Shape) -> Dense:
        from loratool.deltas import dense

        update = LowRank(pair.a.read(), pair.b.read(), self._scale(pair, rank))
        return Dense(dense(update, pair.product).view(shape))

    def _low_rank(
        self,
        pair: Pair,
        shape: Shape,
        alpha_rank: int,
        rank: int,
        change: Callable[[LowRank], LowRank],
    ) -> LazyUpdate:
        """A low-rank update.

        Args:
            pair: its factors.
            shape: of the weight.
            alpha_rank: what alpha is divided by.
            rank: of what `change` gives.
            change: from the factors as stored to those of the weight.
        """
        scale = self._scale(pair, alpha_rank)
        fold = self.facts.folds.get(pair.module)

        def load() -> Update:
            b = pair.b.read()
            return change(LowRank(pair.a.read(), b if fold is None else unfold(b, *fold), scale))

        known = True if pair.name in self.facts.transposed else self.told.fan_in_fan_out
        return replace(pair.update("low_rank", shape, load, rank), transposed=known)

    def _scale(self, pair: Pair, rank: int) -> float:
        told = DEFAULT_ALPHA if self.told.alpha is None else self.told.alpha
        alpha, _ = self.facts.folds.get(pair.module, (told, ""))
        return alpha / rank


def _outputs(pair: Pair, shape: Shape | None) -> int | None:
    """How many outputs the base's matrix has, whichever way it is stored; None if not known."""
    if shape is None or len(shape) != 2 or pair.a.shape[1] not in shape:
        return None
    return shape[0] if shape[1] == pair.a.shape[1] else shape[1]


def _repeated(a: torch.Tensor, times: int) -> torch.Tensor:
    """A block-diagonal matrix of equal blocks (r, in): (times * r, times * in)."""
    rank, width = a.shape
    whole = a.new_zeros(times, rank, times, width)
    for number in range(times):
        whole[number, :, number] = a
    return whole.view(times * rank, times * width)


def placed(b: torch.Tensor, places: Sequence[int], rows: int) -> torch.Tensor:
    """B of several products as one: group i's rows in slot places[i], in columns of its own.

    Args:
        b: (groups * size, r).
        places: the slot of each group.
        rows: of the result, slots * size.

    Returns:
        (rows, groups * r), zero elsewhere.
    """
    rank = b.shape[1]
    size = b.shape[0] // len(places)
    whole = b.new_zeros(rows, len(places) * rank)
    for group, slot in enumerate(places):
        block = b[group * size : (group + 1) * size]
        whole[slot * size : (slot + 1) * size, group * rank : (group + 1) * rank] = block
    return whole
