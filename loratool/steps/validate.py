"""validate: does an adapter fit a base? And does a merged checkpoint contain it?"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from loratool.adapter import Adapter, FormatOptions
from loratool.binding import Binding, bind
from loratool.checkpoint import Checkpoint
from loratool.errors import Problem, UsageError
from loratool.finite import non_finite
from loratool.plugins import Operand, option
from loratool.reports import Report, counted


@dataclass(frozen=True)
class Validate:
    """Check an adapter against a base: names, shapes, ranks, scales, dtypes. Headers only.

    With --merged, the values are read and a merged model is proved, whoever made it: that it is
    the base with this adapter added, and nothing else. Exit status 0 if so; 1 if the adapter is
    there at another strength, or is not, or if there are other changes; 3 if that cannot be told,
    because rounding hides the adapter.
    """

    operands: ClassVar[tuple[Operand, ...]] = (
        Operand("adapter", "adapter"),
        Operand("base", "checkpoint", flag=True),
        Operand(
            "merged",
            "checkpoint",
            required=False,
            flag=True,
            help="a merged model: does it contain the adapter, and nothing else?",
        ),
    )
    output: ClassVar[str] = ""
    names_base: ClassVar[bool] = True

    deep: bool = option(False, "read the values too, and look for NaN and Inf")
    weight: float = option(1.0, "the strength that --merged should have been merged at")

    def __post_init__(self) -> None:
        if not math.isfinite(self.weight) or self.weight == 0:
            raise UsageError(f"--weight: a merge at strength {self.weight:g} cannot be looked for")

    @property
    def reads_values(self) -> bool:
        """Whether tensors are read, and not only headers, without a merged model."""
        return self.deep

    def run(self, adapter: Adapter, base: Checkpoint, merged: Checkpoint | None = None) -> Report:
        """List every problem at once; without any, prove the merge if there is one.

        Returns:
            A report whose `ok` is False if any problem is an error or the merge is not proved.

        Raises:
            MismatchError: `merged` is of another architecture, or quantized.
            InputError: `merged` or `base` holds NaN or Inf in a tensor with an update.
            UsageError: a weight without a merged model.
        """
        if merged is None and self.weight != 1:
            raise UsageError("--weight is the strength to look for in --merged REF: give that, too")
        adapter = adapter.reread(FormatOptions(base=base))
        binding = bind(adapter, base)
        problems = list(binding.problems)
        if self.deep or merged is not None:
            problems += non_finite(adapter)
        if merged is None or any(problem.severity == "error" for problem in problems):
            return _report(adapter, base, binding, problems)
        from loratool.containment import prove

        return prove(adapter, base, merged, binding, self.weight)


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
