"""NaN and Inf in an adapter, which headers do not show."""

from __future__ import annotations

from loratool.adapter import Adapter
from loratool.errors import Problem
from loratool.linalg import is_finite


def non_finite(adapter: Adapter) -> list[Problem]:
    """Read every stored tensor, one after the other: an error for each that holds NaN or Inf."""
    found = []
    for update in adapter.values():
        for tensor in update.stored:
            value = tensor.read()
            if value.is_floating_point() and not is_finite(value):
                found.append(Problem("error", tensor.name, "holds NaN or Inf"))
    return found
