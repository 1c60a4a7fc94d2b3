"""Files and directories of this machine."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from loratool.errors import InputError, UsageError
from loratool.publication import Publication, Published, Publishing
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

    def publish(self, publication: Publication, ref: Ref, how: Publishing) -> Published:
        """Not done: `cp` does it."""
        raise UsageError(f"{ref.text}: is a path of this machine; give org/name or a URL")
