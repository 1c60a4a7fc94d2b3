"""NaN and Inf in an adapter, which headers do not show."""

from __future__ import annotations

from loratool.adapter import Adapter
from loratool.errors import InputError, Problem
from loratool.linalg import is_finite
from loratool.updates import Added, tensors_of


def non_finite(adapter: Adapter) -> list[Problem]:
    """Read every stored tensor, one after the other: an error for each that holds NaN or Inf."""
    found = []
    for update in adapter.values():
        for tensor in update.stored:
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
