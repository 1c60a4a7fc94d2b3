"""NaN and Inf in an adapter, which headers do not show."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from loratool.adapter import Adapter
from loratool.checkpoint import LazyTensor
from loratool.errors import InputError, Problem
from loratool.linalg import is_finite
from loratool.updates import Added, tensors_of


def non_finite(adapter: Adapter) -> list[Problem]:
    """Read every stored tensor, one after the other: an error for each that holds NaN or Inf.

    Among them are the copies of the base's tensors that low-rank updates are added to. Places of
    single entries, which headers do not show either, must be in their weights.
    """
    stored = [tensor for update in adapter.values() for tensor in update.stored]
    beneath = [update.beneath for update in adapter.values() if update.beneath is not None]
    return [*non_finite_tensors([*stored, *beneath]), *_misplaced(adapter)]


def _misplaced(adapter: Adapter) -> Iterator[Problem]:
    for update in adapter.values():
        if update.kind != "sparse" or not update.stored:
            continue
        try:
            update.load()
        except InputError as error:
            yield Problem("error", update.name, str(error))


def non_finite_tensors(tensors: Iterable[LazyTensor]) -> list[Problem]:
    """The same for any tensors, each read once."""
    found = []
    for tensor in {tensor.name: tensor for tensor in tensors}.values():
        value = tensor.read()
        if value.is_floating_point() and not is_finite(value):
            found.append(Problem("error", tensor.name, "holds NaN or Inf"))
    return found


def require_sound(origin: str, update: Added) -> None:
    """Raise InputError if an update cannot be calculated with: NaN, Inf, or nothing in it.

    Args:
        origin: what the error calls it.
        update: of any kind that is added to a weight.
    """
    for part, values in tensors_of(update):
        if not values.numel():
            raise InputError(f"{origin}: {part} is empty: repair the file")
        if not is_finite(values):
            raise InputError(f"{origin}: {part} holds NaN or Inf: repair it")
