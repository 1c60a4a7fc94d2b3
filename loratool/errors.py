"""What can go wrong for a user, and the complaint that says so.

    LoratoolError                the inputs do not allow it: one message, exit status 1
    |-- InputError               a file, tensor or option value cannot be used
    |   |-- FormatError          a file is not what its name or header claims
    |   |-- UnsupportedError     a file is sound, but of a kind that loratool cannot use
    |   `-- MismatchError        two inputs do not belong together
    |-- OutputError              the output place is taken, too small or not writable
    |-- PluginError              a plugin is unknown, declared twice or fails to import
    `-- VerificationError        a result failed its own check; nothing was written

    UsageError                   an option has a value that no input could satisfy: exit status 2

Anything else that escapes is a bug of loratool and keeps its traceback.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal


class LoratoolError(Exception):
    """Base of every error that an input can cause."""


class InputError(LoratoolError):
    """A file, tensor or option value cannot be used."""


class FormatError(InputError):
    """A file is not what its name or header claims."""


class UnsupportedError(InputError):
    """A file is sound, but of a kind that loratool cannot use."""


class MismatchError(InputError):
    """Two inputs do not belong together."""


class OutputError(LoratoolError):
    """The output place is taken, too small or not writable."""


class PluginError(LoratoolError):
    """A plugin is unknown, declared twice or fails to import."""


class VerificationError(LoratoolError):
    """A result failed its own check."""


class UsageError(ValueError):
    """An option has a value that no input could satisfy."""


@dataclass(frozen=True)
class Problem:
    """One complaint about an input.

    Attributes:
        severity: "error" stops a merge; "warning" is worth knowing.
        tensor: the name of the tensor or setting that it is about.
        message: what is wrong and what to do, in one line.
        expected: what would be right, for machines ("" if it does not apply).
        found: what is there instead.
    """

    severity: Literal["error", "warning"]
    tensor: str
    message: str
    expected: str = ""
    found: str = ""

    def __str__(self) -> str:
        detail = f" (expected {self.expected}, found {self.found})" if self.expected else ""
        return f"{self.tensor}: {self.message}{detail}"

    def as_json(self) -> dict[str, Any]:
        """The complaint as plain data."""
        return asdict(self)


def raise_problems(heading: str, problems: Iterable[Problem]) -> None:
    """Raise one MismatchError that lists every error among `problems`; return if there is none."""
    errors = [problem for problem in problems if problem.severity == "error"]
    if errors:
        raise MismatchError("\n".join([heading, *(f"  {problem}" for problem in errors)]))


def grouped(problems: Iterable[Problem]) -> list[str]:
    """Complaints with the names that they are about, each complaint once."""
    names: dict[str, list[str]] = {}
    for problem in problems:
        names.setdefault(problem.message, []).append(problem.tensor)
    return [f"{some(tensors)}: {message}" for message, tensors in names.items()]


def raise_grouped(heading: str, problems: Iterable[Problem]) -> None:
    """As `raise_problems`, with complaints of several tensors told once."""
    errors = [problem for problem in problems if problem.severity == "error"]
    if errors:
        raise MismatchError("\n".join([heading, *(f"  {text}" for text in grouped(errors))]))


def some(names: Sequence[str]) -> str:
    """The first name, and how many more there are."""
    return names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} more"
