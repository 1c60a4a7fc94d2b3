"""Files and directories of this machine."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from loratool.errors import InputError
from loratool.refs import Ref


@dataclass(frozen=True)
class Local:
    """Paths that exist here."""

    def holds(self, ref: Ref) -> bool:
        """Whether the path exists."""
        return ref.path is not None

    def fetch(self, ref: Ref) -> Path:
        """The path itself."""
        if ref.path is None:
            raise InputError(f"{ref.text}: no such file or directory")
        return ref.path
