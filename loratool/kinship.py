"""How several adapters relate: whether they are different ones, and made for one base.

Headers decide wherever they can; bytes are compared only where headers are equal, and only up to
the first difference.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from itertools import combinations
from typing import TYPE_CHECKING, Any

from loratool.adapter import Adapter, LazyUpdate
from loratool.checkpoint import LazyTensor
from loratool.errors import MismatchError
from loratool.updates import matrix_shape, swapped

if TYPE_CHECKING:
    import torch


def require_distinct(adapters: Sequence[Adapter]) -> None:
    """Refuse an adapter that is given twice, or that is a copy of another.

    Two adapters are the same if they lie in the same place or store the same tensors, byte for
    byte. Those that are computed are compared by identity alone.

    Raises:
        MismatchError: naming both.
    """
    for one, other in combinations(adapters, 2):
        if _same_place(one, other):
            also = f", also as {other.label}" if other.label != one.label else ""
            raise MismatchError(
                f"{one.label} is given twice{also}: give it once, with the sum of the weights"
            )
        if _same_tensors(_stored(one), _stored(other)):
            raise MismatchError(
                f"{one.label} and {other.label} hold the same tensors: they are one adapter; give "
                "it once, with the sum of the weights"
            )


def require_same_base(adapters: Sequence[Adapter]) -> None:
    """Refuse adapters that were made for different bases.

    What tells is, where two of them know it: the digests of the base's tensors in their manifests,
    the copies of base tensors that they carry, and the shapes of their updates.

    Raises:
        MismatchError: naming both, and the first tensor that disagrees.
    """
    for one, other in combinations(adapters, 2):
        require_same_digests(one.label, one.base_digests, other.label, other.base_digests)
        for name in one:
            if name in other:
                _require_same_target(name, one, other)


def require_same_digests(
    label: str, digests: Mapping[str, str], other_label: str, other_digests: Mapping[str, str]
) -> None:
    """Refuse two adapters whose records of the base's tensors contradict each other.

    Raises:
        MismatchError: naming both, and the first tensor that disagrees.
    """
    for name, digest in digests.items():
        if other_digests.get(name, digest) != digest:
            raise MismatchError(
                f"{label} and {other_label} were made for different bases: {name} has the digest "
                f"{digest[:12]}... in the one's base and {other_digests[name][:12]}... in the "
                "other's"
            )


def base_facts(digests: Mapping[str, str]) -> dict[str, Any]:
    """What a manifest says of the base's tensors, as an extraction does; {} if nothing is known."""
    from loratool.digests import combine_digests

    if not digests:
        return {}
    tensors = dict(sorted(digests.items()))
    return {"base": {"digest": combine_digests(tensors), "tensors": tensors}}


def _require_same_target(name: str, one: Adapter, other: Adapter) -> None:
    left, right = one[name], other[name]
    if not are_of_one_weight(left, right):
        raise MismatchError(
            f"{one.label} and {other.label} were made for different bases: {name} has the shape "
            f"{left.shape} in the one and {right.shape} in the other (out, in)"
        )
    here, there = left.beneath, right.beneath
    if here is None or there is None:
        return
    if here.shape != there.shape or (here.dtype == there.dtype and not same_bytes(here, there)):
        raise MismatchError(
            f"{one.label} and {other.label} were made for different bases: their copies of the "
            f"base's {name} differ"
        )


def are_of_one_weight(one: LazyUpdate, other: LazyUpdate) -> bool:
    """Whether the shapes of two updates can be those of one weight, as far as they tell.

    A convolution's weight may be known as a matrix, and experts' either way round.
    """
    kinds = {one.kind, other.kind}
    if kinds & {"ia3", "rows", "replacement"} or ("experts" in kinds and len(kinds) > 1):
        return True
    here, there = _trimmed(one.shape), _trimmed(other.shape)
    if kinds == {"experts"}:
        return there in (here, swapped(here))
    if min(len(here), len(there)) == 2:
        return math.prod(here) == math.prod(there) and matrix_shape(here) == matrix_shape(there)
    return here == there


def _trimmed(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Without the ones that a kernel may end in: some formats give every kernel two dimensions."""
    while len(shape) > 2 and shape[-1] == 1:
        shape = shape[:-1]
    return shape


def _same_place(one: Adapter, other: Adapter) -> bool:
    if one is other:
        return True
    if one.path is None or other.path is None:
        return False
    return one.path.resolve() == other.path.resolve()


def _stored(adapter: Adapter) -> dict[str, LazyTensor]:
    return {tensor.name: tensor for update in adapter.values() for tensor in update.stored}


def _same_tensors(one: Mapping[str, LazyTensor], other: Mapping[str, LazyTensor]) -> bool:
    if not one or one.keys() != other.keys():
        return False
    pairs = [(one[name], other[name]) for name in one]
    if any(left.dtype != right.dtype or left.shape != right.shape for left, right in pairs):
        return False
    return all(same_bytes(left, right) for left, right in pairs)


def same_bytes(one: LazyTensor, other: LazyTensor) -> bool:
    """Whether two tensors of one dtype and shape hold the same bits, NaN included."""
    import torch

    return all(torch.equal(*pair) for pair in _aligned(one, other))


def _aligned(
    one: LazyTensor, other: LazyTensor, size: int = 1 << 20
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """The bytes of both, a piece at a time."""
    left, right = _as_bytes(one.read()), _as_bytes(other.read())
    for start in range(0, max(len(left), len(right)), size):
        yield left[start : start + size], right[start : start + size]


def _as_bytes(tensor: torch.Tensor) -> torch.Tensor:
    import torch

    return tensor.contiguous().reshape(-1).view(torch.uint8)
