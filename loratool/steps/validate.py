"""validate: does an adapter fit a base?"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from loratool.adapter import Adapter
from loratool.binding import Binding, bind
from loratool.checkpoint import Checkpoint
from loratool.errors import Problem
from loratool.linalg import is_finite
from loratool.plugins import Operand, option
from loratool.reports import Report, counted


@dataclass(frozen=True)
class Validate:
    """Check an adapter against a base: names, shapes, ranks, scales, dtypes. Headers only."""

    operands: ClassVar[tuple[Operand, ...]] = (
        Operand("adapter", "adapter"),
        Operand("base", "checkpoint", flag=True),
    )
    output: ClassVar[str] = ""

    deep: bool = option(False, "read the values too, and look for NaN and Inf")

    def run(self, adapter: Adapter, base: Checkpoint) -> Report:
        """List every problem at once.

        Returns:
            A report whose `ok` is False if any problem is an error.
        """
        binding = bind(adapter, base)
        problems = list(binding.problems)
        if self.deep:
            problems += _deep_problems(adapter)
        return _report(adapter, base, binding, problems)


def _deep_problems(adapter: Adapter) -> list[Problem]:
    found = []
    for update in adapter.values():
        for tensor in update.stored:
            value = tensor.read()
            if value.is_floating_point() and not is_finite(value):
                found.append(Problem("error", tensor.name, "holds NaN or Inf"))
    return found


def _report(
    adapter: Adapter, base: Checkpoint, binding: Binding, problems: list[Problem]
) -> Report:
    errors = [problem for problem in problems if problem.severity == "error"]
    warnings = len(problems) - len(errors)
    low_rank = sum(bound.update.kind == "low_rank" for bound in binding.changed.values())
    counts = {
        "low_rank": low_rank,
        "replaced": len(binding.changed) - low_rank,
        "added": len(binding.added),
    }
    verdict = "fits" if not errors else "does not fit"
    data: Mapping[str, Any] = {
        "kind": "validation",
        "ok": not errors,
        "adapter": adapter.label,
        "base": base.label,
        "counts": counts,
        "problems": [problem.as_json() for problem in problems],
    }
    lines = [
        *(f"error: {problem}" for problem in errors),
        f"{counted(low_rank, 'low-rank update')}, "
        f"{counted(counts['replaced'], 'tensor')} replaced, "
        f"{counts['added']} added",
        f"{counted(len(errors), 'error')}, {counted(warnings, 'warning')}",
    ]
    title = f"{adapter.label} {verdict} {base.label}"
    warned = (f"{problem}" for problem in problems if problem.severity == "warning")
    return Report(title, data, tuple(lines), notes=(*base.notes, *warned), status=int(bool(errors)))
