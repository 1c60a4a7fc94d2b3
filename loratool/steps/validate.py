"""validate: does an adapter fit a base? A server? And does a merged checkpoint contain it?"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from loratool.adapter import Adapter, FormatOptions
from loratool.binding import Binding, bind
from loratool.checkpoint import Checkpoint
from loratool.errors import Problem, UsageError
from loratool.finite import non_finite
from loratool.plugins import Operand, option
from loratool.reports import Report, counted
from loratool.servers import SERVERS
from loratool.updates import counted_kind


@dataclass(frozen=True)
class Validate:
    """Check an adapter against a base: names, shapes, ranks, scales, dtypes. Headers only.

    With --for, against what servers take, too: everything that one would refuse, drop or misread
    is named, with the command that cures it. That needs no base; with one it tells more.

    With --merged, the values are read and a merged model is proved, whoever made it: that it is
    the base with this adapter added, and nothing else. Exit status 0 if so; 1 if the adapter is
    there at another strength, or is not, or if there are other changes; 3 if that cannot be told,
    because rounding hides the adapter.
    """

    operands: ClassVar[tuple[Operand, ...]] = (
        Operand("adapter", "adapter"),
        Operand(
            "base",
            "checkpoint",
            flag=True,
            help="the base checkpoint (default: the one it names; with --for: none)",
        ),
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
    servers: tuple[str, ...] = option(
        (), "a server that is to load it; may be repeated", flag="for", choices=tuple(SERVERS)
    )

    def __post_init__(self) -> None:
        if not math.isfinite(self.weight) or self.weight == 0:
            raise UsageError(f"--weight: a merge at strength {self.weight:g} cannot be looked for")
        if unknown := [name for name in self.servers if name not in SERVERS]:
            raise UsageError(f"no server {unknown[0]!r} is known; known are {', '.join(SERVERS)}")

    @property
    def needs_base(self) -> bool:
        """Whether a base that is not given has to be found, without a merged model."""
        return not self.servers

    @property
    def reads_values(self) -> bool:
        """Whether tensors are read, and not only headers, without a merged model."""
        return self.deep

    def run(
        self,
        adapter: Adapter,
        base: Checkpoint | None = None,
        merged: Checkpoint | None = None,
    ) -> Report:
        """List every problem at once; without any, prove the merge if there is one.

        Returns:
            A report whose `ok` is False if any problem is an error, a server is not ready, or the
            merge is not proved.

        Raises:
            MismatchError: `merged` is of another architecture, or quantized.
            InputError: `merged` or `base` holds NaN or Inf in a tensor with an update.
            UsageError: a weight without a merged model; no base, where one is needed; servers and
                an adapter that has no files, or a merged model.
        """
        if merged is None and self.weight != 1:
            raise UsageError("--weight is the strength to look for in --merged REF: give that, too")
        if merged is not None and self.servers:
            raise UsageError("--merged is about a model, --for about an adapter: leave one out")
        if base is None:
            return self._without_base(adapter)
        adapter = adapter.reread(FormatOptions(base=base))
        binding = bind(adapter, base)
        problems = list(binding.problems)
        if self.deep or merged is not None:
            problems += non_finite(adapter)
        if merged is None or any(problem.severity == "error" for problem in problems):
            report = _report(adapter, base, binding, problems)
            return self._with_servers(report, adapter, base) if self.servers else report
        from loratool.containment import prove

        return prove(adapter, base, merged, binding, self.weight)

    def _without_base(self, adapter: Adapter) -> Report:
        """What servers make of an adapter, and what is wrong with its own files."""
        if not self.servers:
            raise UsageError("give the base (--base), or the servers that are to load it (--for)")
        problems = [*adapter.problems, *(non_finite(adapter) if self.deep else ())]
        errors = [problem for problem in problems if problem.severity == "error"]
        data: dict[str, Any] = {
            "kind": "validation",
            "ok": not errors,
            "adapter": adapter.label,
            "base": None,
            "counts": {"updates": len(adapter)},
            "problems": [problem.as_json() for problem in problems],
        }
        verdict = "is sound" if not errors else "is faulty"
        title = f"{adapter.label} {verdict} in itself; no base was looked at"
        lines = tuple(f"error: {problem}" for problem in errors)
        warned = (f"{problem}" for problem in problems if problem.severity == "warning")
        notes = (*adapter.notes, *warned)
        report = Report(title, data, lines, notes=notes, status=int(bool(errors)))
        return self._with_servers(report, adapter, None)

    def _with_servers(self, report: Report, adapter: Adapter, base: Checkpoint | None) -> Report:
        """The report with what each server makes of the adapter."""
        if adapter.path is None:
            raise UsageError("servers read an adapter's files: save it first, and validate these")
        from loratool.readiness import readiness

        results = {name: readiness(adapter, name, base) for name in dict.fromkeys(self.servers)}
        ready = all(result.is_ready for result in results.values())
        data = {
            **report.data,
            "ok": report.ok and ready,
            "servers": {name: result.as_json() for name, result in results.items()},
        }
        lines = (*report.lines, *(line for result in results.values() for line in result.lines()))
        return replace(report, data=data, lines=lines, status=int(not (report.ok and ready)))


def _report(
    adapter: Adapter, base: Checkpoint, binding: Binding, problems: list[Problem]
) -> Report:
    errors = [problem for problem in problems if problem.severity == "error"]
    warnings = len(problems) - len(errors)
    kinds = Counter(bound.update.kind for bound in binding.changed.values())
    others = {kind: n for kind, n in kinds.items() if kind not in ("low_rank", "replacement")}
    counts: dict[str, int] = {
        "low_rank": kinds["low_rank"],
        "replaced": kinds["replacement"],
        "added": len(binding.added),
        **{str(kind): number for kind, number in others.items()},
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
        ", ".join(
            [
                counted(kinds["low_rank"], "low-rank update"),
                *(counted_kind(kind, number) for kind, number in others.items()),
                f"{counted(kinds['replacement'], 'tensor')} replaced",
                f"{counts['added']} added",
            ]
        ),
        f"{counted(len(errors), 'error')}, {counted(warnings, 'warning')}",
    ]
    title = f"{adapter.label} {verdict} {base.label}"
    warned = (f"{problem}" for problem in problems if problem.severity == "warning")
    return Report(title, data, tuple(lines), notes=(*base.notes, *warned), status=int(bool(errors)))
