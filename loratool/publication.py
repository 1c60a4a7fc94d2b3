"""What is published, how, and what came of it: the words that `push` and the stores share."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

Kind = Literal["adapter", "model", "onnx"]


@dataclass(frozen=True)
class Publication:
    """The files that are to be somewhere else, and nothing besides.

    Attributes:
        kind: what they are.
        files: name in the destination -> where the content is, or the content itself.
        notes: what the user should hear.
    """

    kind: Kind
    files: Mapping[str, Path | bytes]
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Publishing:
    """How to publish.

    Attributes:
        message: of the commit.
        private: whether a new repository is private; None for the account's default.
        revision: the branch; "" for the main one.
        tag: put on the commit afterwards; "" for none.
        pull_request: propose the change instead of making it.
        dry_run: only say what would be done.
        force: replace even what is of another kind.
    """

    message: str = ""
    private: bool | None = None
    revision: str = ""
    tag: str = ""
    pull_request: bool = False
    dry_run: bool = False
    force: bool = False


@dataclass(frozen=True)
class Published:
    """What was done, or with `dry_run` would be.

    Attributes:
        url: where a person sees it.
        commit: its identifier; "" if nothing changed, or where the store has none.
        sent: name -> bytes of the files that are new or changed.
        removed: names of files that the publication has no more.
        unchanged: how many files were there already.
        created: whether the place is new.
        notes: what the user should hear.
        new: those of `sent` that were not there before.
    """

    url: str
    commit: str = ""
    sent: Mapping[str, int] = field(default_factory=dict)
    removed: tuple[str, ...] = ()
    unchanged: int = 0
    created: bool = False
    notes: tuple[str, ...] = ()
    new: frozenset[str] = frozenset()
