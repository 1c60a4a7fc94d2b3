"""Where the values of a graph's initializer come from, and how they are put together."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch

from loratool.checkpoint import LazyTensor
from loratool.errors import InputError

# Elements of an initializer that are laid out at a time.
_PIECE = 4 << 20


@dataclass(frozen=True)
class Part:
    """A tensor of the checkpoint, turned, as one stretch of an initializer.

    Attributes:
        key: the tensor's name in the checkpoint; None for zeros.
        permutation: axis of the initializer -> axis of the tensor, as `numpy.transpose` takes them;
            () for zeros.
        length: extent along the axis in which the parts follow each other.
    """

    key: str | None
    permutation: tuple[int, ...]
    length: int


@dataclass(frozen=True)
class Origin:
    """An initializer as tensors of a checkpoint side by side.

    Attributes:
        shape: of the initializer.
        axis: along which the parts follow each other; 0 where there is but one.
        parts: in their order. A part may have axes of size 1 less or more than the initializer:
            its permuted tensor is reshaped then, which does not move a value.
    """

    shape: tuple[int, ...]
    axis: int
    parts: tuple[Part, ...]

    @property
    def keys(self) -> tuple[str, ...]:
        """The tensors that it is made of."""
        return tuple(part.key for part in self.parts if part.key is not None)

    @property
    def is_direct(self) -> bool:
        """Whether it is one tensor as it lies in the checkpoint."""
        (first, *more) = self.parts
        return not more and first.permutation == tuple(sorted(first.permutation))


def assemble(
    origin: Origin, tensors: Mapping[str, LazyTensor], dtype: torch.dtype
) -> Iterator[torch.Tensor]:
    """The values of an initializer in row-major order.

    A tensor that goes in as it lies is streamed; of others the parts of one initializer are held,
    in the type that they are stored in.

    Args:
        origin: what it is made of.
        tensors: the checkpoint, or as much of it as is needed.
        dtype: that the values are cast to.

    Yields:
        One-dimensional tensors of bounded size, which together are the whole initializer.

    Raises:
        InputError: a value is beyond the range of `dtype`.
    """
    for piece, key in _pieces(origin, tensors):
        cast = piece.to(dtype)
        if dtype == torch.float16 and bool(cast.isinf().any()) and not bool(piece.isinf().any()):
            origin_file = tensors[key].origin if key else ""
            raise InputError(
                f"{origin_file or 'checkpoint'}: {key} has values beyond the range of fp16; "
                "export as fp32"
            )
        yield cast


def _pieces(
    origin: Origin, tensors: Mapping[str, LazyTensor]
) -> Iterator[tuple[torch.Tensor, str | None]]:
    """Pieces before they are cast, and the tensor that each is of (or the first of several)."""
    if origin.is_direct:
        key = origin.parts[0].key
        assert key is not None
        for block in tensors[key].blocks():
            for piece in torch.split(block.reshape(-1), _PIECE):
                yield piece, key
        return
    turned = [_turned(part, origin, tensors) for part in origin.parts]
    if origin.axis == 0:
        for part, values in zip(origin.parts, turned, strict=True):
            for piece in _rows(values):
                yield _laid_out(piece).reshape(-1), part.key
        return
    per_row = sum(values[:1].numel() for values in turned)
    step = max(1, _PIECE // max(1, per_row))
    for start in range(0, origin.shape[0], step):
        rows = [_laid_out(values[start : start + step]) for values in turned]
        yield torch.cat(rows, dim=origin.axis).reshape(-1), next(iter(origin.keys), None)


def _turned(part: Part, origin: Origin, tensors: Mapping[str, LazyTensor]) -> torch.Tensor:
    """A part in the initializer's orientation, as a view where it can be one."""
    shape = list(origin.shape)
    shape[origin.axis] = part.length
    if part.key is None:
        return torch.zeros(()).expand(shape)
    return tensors[part.key].read().permute(part.permutation).reshape(shape)


def _rows(values: torch.Tensor) -> Iterator[torch.Tensor]:
    if not values.ndim:
        yield values
        return
    step = max(1, _PIECE // max(1, values[:1].numel()))
    for start in range(0, values.shape[0], step):
        yield values[start : start + step]


def _laid_out(rows: torch.Tensor) -> torch.Tensor:
    """Some rows in row-major order.

    Rows of a transpose are columns of what it is a view of. torch is five times faster at turning
    these once they lie together.
    """
    if rows.ndim == 2 and rows.stride(0) == 1 and rows.stride(1) > 1:
        return rows.T.contiguous().T.contiguous()
    return rows.contiguous()
