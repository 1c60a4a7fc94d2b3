"""The kinds of update that an adapter can hold for one weight.

Shapes are those of the weight as its module computes with it, (out, in) or (out, in, *kernel);
`transposed()` gives the update for a base that stores it as (in, out) (GPT-2's Conv1D). A matrix of
shape (out, in) stands for a convolution's weight with in = channels times kernel. Nothing here
imports torch; the deltas are computed in `loratool.deltas`.

Two properties of a kind decide what can be done with it: a *linear* one has a delta that does not
depend on the base, so it can be scaled, summed and subtracted again; the others change the base's
own weights.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar, Literal

from loratool.checkpoint import LazyTensor
from loratool.linalg import Certificate

if TYPE_CHECKING:
    import torch

Kind = Literal[
    "low_rank", "sparse", "experts", "dense", "loha", "lokr", "dora", "ia3", "rows", "replacement"
]  # fmt: skip

# What a person calls them.
KIND_NAMES: dict[Kind, str] = {
    "low_rank": "low-rank update",
    "sparse": "low-rank and sparse update",
    "experts": "low-rank update of experts",
    "dense": "full-size delta",
    "loha": "LoHa update",
    "lokr": "LoKr update",
    "dora": "DoRA update",
    "ia3": "IA3 scaling",
    "rows": "table with replaced rows",
    "replacement": "tensor kept whole",
}
LINEAR: frozenset[str] = frozenset({"low_rank", "sparse", "experts", "dense", "loha", "lokr"})
WHOLE: frozenset[str] = frozenset({"rows", "replacement"})  # set values, whatever the base has
NEED_BASE: frozenset[str] = frozenset({"dora", "ia3"})  # their deltas depend on the base's values
# What is made of factors A and B, whose rank can be cut.
FACTORED: frozenset[str] = frozenset({"low_rank", "sparse", "experts"})
# What everybody calls LoRA.
LORA: frozenset[str] = FACTORED | {"dora"}
# What plain low-rank updates can be made of, where it is for more than a vector.
FACTORABLE: frozenset[str] = frozenset({"sparse", "dense", "loha", "lokr", "dora", "ia3"})
_PLURAL = re.compile(r"(update|delta|scaling|table|tensor)\b")


def counted_kind(kind: Kind, number: int) -> str:
    """How many there are of a kind: "2 tables with replaced rows"."""
    name = KIND_NAMES[kind]
    return f"{number} {name}" if number == 1 else f"{number} " + _PLURAL.sub(r"\1s", name, count=1)


def matrix_shape(shape: Sequence[int], experts: bool = False) -> tuple[int, int]:
    """As what matrix a weight is seen: (out, in * kernel), experts' rows below one another."""
    if len(shape) < 2:
        return math.prod(shape), 1
    rows = math.prod(shape[:-1]) if experts else shape[0]
    return rows, math.prod(shape) // max(1, rows)


def swapped(shape: Sequence[int]) -> tuple[int, ...]:
    """The shape with its last two dimensions the other way round."""
    return (*shape[:-2], *shape[:-3:-1])


def elements_a_rank(kind: Kind, shape: Sequence[int]) -> int:
    """How many elements the factors of a weight of `shape` have for each rank."""
    if kind == "experts":
        return shape[0] * sum(shape[1:])
    return sum(matrix_shape(shape))


def entries_of(wanted: float, elements: int) -> int:
    """How many of a matrix's elements a number, or below 1 a share, means: at least one."""
    number = round(wanted * elements) if wanted < 1 else int(wanted)
    return max(1, min(number, elements))


@dataclass(frozen=True)
class LowRank:
    """delta = scale * B @ A (Hu et al., 2021, "LoRA", section 4.1).

    Attributes:
        a: (r, in).
        b: (out, r).
        scale: alpha / r, or alpha / sqrt(r) for rsLoRA.
        certificate: what its maker measured of its error, if it was extracted just now.
    """

    kind: ClassVar[Kind] = "low_rank"
    a: torch.Tensor
    b: torch.Tensor
    scale: float = 1.0
    certificate: Certificate | None = None

    @property
    def rank(self) -> int:
        """Number of columns of B."""
        return int(self.a.shape[0])

    def transposed(self) -> LowRank:
        """The update of the transposed weight."""
        return replace(self, a=self.b.T, b=self.a.T)


@dataclass(frozen=True)
class Sparse:
    """delta = added + scale * (`values` at `positions`, 0 elsewhere).

    Attributes:
        added: what single entries correct, with a scale of its own.
        positions: (k,) int64, ascending and all different: places in the weight as a matrix
            (out, in), or (out, in * kernel), row by row.
        values: (k,), any float dtype.
        scale: of the values.
        certificate: of factors and entries together, if they were extracted just now.
    """

    kind: ClassVar[Kind] = "sparse"
    added: LowRank
    positions: torch.Tensor
    values: torch.Tensor
    scale: float = 1.0
    certificate: Certificate | None = None

    @property
    def rank(self) -> int:
        """Of the low-rank part."""
        return self.added.rank

    @property
    def shape(self) -> tuple[int, int]:
        """Of the delta, as a matrix."""
        return int(self.added.b.shape[0]), int(self.added.a.shape[1])

    def transposed(self) -> Sparse:
        """The update of the transposed weight."""
        rows, columns = self.shape
        places = self.positions % columns * rows + self.positions // columns
        order = places.argsort()
        return replace(
            self,
            added=self.added.transposed(),
            positions=places[order],
            values=self.values[order],
        )


@dataclass(frozen=True)
class Experts:
    """One low-rank delta for each expert of a 3-D weight (E, out, in).

    Attributes:
        a: (E, r, in).
        b: (E, out, r).
        scale: of all.
        certificate: of all of them together, if its maker measured that.
    """

    kind: ClassVar[Kind] = "experts"
    a: torch.Tensor
    b: torch.Tensor
    scale: float = 1.0
    certificate: Certificate | None = None

    @property
    def rank(self) -> int:
        """Rank of each expert's delta."""
        return int(self.a.shape[1])

    def expert(self, number: int) -> LowRank:
        """The update of one expert."""
        return LowRank(self.a[number], self.b[number], self.scale)

    def transposed(self) -> Experts:
        """The update of a weight that is stored as (E, in, out)."""
        return replace(self, a=self.b.mT, b=self.a.mT)


@dataclass(frozen=True)
class Dense:
    """delta = scale * values, of any shape: a full-size difference, or a bias's.

    Attributes:
        values: the difference.
        scale: what it is multiplied by.
    """

    kind: ClassVar[Kind] = "dense"
    values: torch.Tensor
    scale: float = 1.0

    def transposed(self) -> Dense:
        """The update of the transposed weight."""
        return replace(self, values=self.values.mT)


@dataclass(frozen=True)
class Product:
    """A matrix in factors, as LoHa and LoKr have it: left @ right, or whole.

    With a core t (r, r, *kernel) it is the Tucker form of a convolution's weight,
    w[p, q, k] = sum_ij t[i, j, k] left[p, i] right[j, q]; as a matrix, (out, in * kernel).

    Attributes:
        left: (out, r), or the whole matrix (out, in).
        right: (r, in); None if `left` is whole.
        core: (r, r, *kernel) or None.
    """

    left: torch.Tensor
    right: torch.Tensor | None = None
    core: torch.Tensor | None = None

    def transposed(self) -> Product:
        """The transposed matrix; ValueError for the Tucker form, which no linear weight has."""
        if self.core is not None:
            raise ValueError("the weight of a convolution is not stored transposed")
        if self.right is None:
            return Product(self.left.T)
        return Product(self.right.T, self.left.T)


@dataclass(frozen=True)
class LoHa:
    """delta = scale * one o other, the elementwise product of two low-rank matrices.

    Source: Hyeon-Woo et al., 2022, "FedPara", proposition 1.

    Attributes:
        one: (out, in).
        other: (out, in).
        scale: alpha / r.
    """

    kind: ClassVar[Kind] = "loha"
    one: Product
    other: Product
    scale: float = 1.0

    def transposed(self) -> LoHa:
        """The update of the transposed weight."""
        return replace(self, one=self.one.transposed(), other=self.other.transposed())


@dataclass(frozen=True)
class LoKr:
    """delta = scale * kron(one, other).

    Source: Edalati et al., 2022, "KronA", section 3; Yeh et al., 2024, "LyCORIS", section 3.

    Attributes:
        one: (a, c).
        other: (b, d); the delta is (a * b, c * d).
        scale: alpha / r, or 1 where neither matrix is in factors.
    """

    kind: ClassVar[Kind] = "lokr"
    one: Product
    other: Product
    scale: float = 1.0

    def transposed(self) -> LoKr:
        """The update of the transposed weight."""
        return replace(self, one=self.one.transposed(), other=self.other.transposed())


Linear = LowRank | Sparse | Experts | Dense | LoHa | LoKr


@dataclass(frozen=True)
class DoRA:
    """W' = m (W + delta) / ||W + delta||, the norm of every row (Liu et al., 2024, "DoRA", eq. 5).

    Attributes:
        added: the delta, with its scale.
        magnitude: m, (out,) for norms of rows, (in,) for norms of columns.
        axis: 0 where each row of the weight has a magnitude, 1 where each column has.
    """

    kind: ClassVar[Kind] = "dora"
    added: LowRank | Dense | LoHa | LoKr
    magnitude: torch.Tensor
    axis: int = 0

    def transposed(self) -> DoRA:
        """The update of the transposed weight."""
        return DoRA(self.added.transposed(), self.magnitude, 1 - self.axis)


@dataclass(frozen=True)
class IA3:
    """W' = W scaled by rows or columns (Liu et al., 2022, "(IA)^3", section 3.3).

    Attributes:
        factors: (out,) for rows, (in,) for columns; of a bias, one an element.
        axis: 0 if the outputs are scaled, 1 if the inputs are.
    """

    kind: ClassVar[Kind] = "ia3"
    factors: torch.Tensor
    axis: int = 0

    def transposed(self) -> IA3:
        """The update of the transposed weight."""
        return IA3(self.factors, 1 - self.axis)


@dataclass(frozen=True)
class Rows:
    """Some rows of a table are replaced (PEFT's trainable tokens).

    Attributes:
        indices: which rows, all different.
        tensor: (len(indices), columns), their new values.
    """

    kind: ClassVar[Kind] = "rows"
    indices: tuple[int, ...]
    tensor: LazyTensor


@dataclass(frozen=True)
class Replacement:
    """The whole tensor is replaced; a weight cannot scale it.

    Attributes:
        tensor: the new value.
        relative_norm: ||new - old||_F / ||old||_F where there is an old one, for reports.
    """

    kind: ClassVar[Kind] = "replacement"
    tensor: LazyTensor
    relative_norm: float | None = None


Added = Linear | DoRA | IA3  # what is worked into a weight of the base
Update = Added | Rows | Replacement


def tensors_of(update: Added) -> list[tuple[str, torch.Tensor]]:
    """The tensors that an update is made of, by what a person calls them."""
    match update:
        case LowRank() | Experts():
            return [("lora_A", update.a), ("lora_B", update.b)]
        case Sparse():
            factors = tensors_of(update.added)
            if not update.values.numel():
                return factors
            return [*factors, ("the single entries", update.values)]
        case Dense():
            return [("the delta", update.values)]
        case LoHa() | LoKr():
            return [*_parts("the first matrix", update.one), *_parts("the second", update.other)]
        case DoRA():
            return [*tensors_of(update.added), ("the magnitude", update.magnitude)]
        case IA3():
            return [("the scaling", update.factors)]


def _parts(name: str, product: Product) -> list[tuple[str, torch.Tensor]]:
    found = (product.left, product.right, product.core)
    return [(name, tensor) for tensor in found if tensor is not None]
