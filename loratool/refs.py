"""References: `./dir`, `org/name@revision:subfolder`, `s3://bucket/dir`, `ref=0.7`."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from pathlib import Path

from loratool.errors import InputError, UsageError

_HUB_NAME = re.compile(
    r"(?P<id>[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(@(?P<revision>[^:\s]+))?(:(?P<subfolder>.+))?"
)
_URL = re.compile(r"[a-z][a-z0-9+.-]*(::[a-z][a-z0-9+.-]*)*://.+")
# What people copy from a browser, and how other tools write Hub references.
_HUB_PAGE = re.compile(
    r"(https://huggingface\.co|https://hf\.co|hf:/)/"
    r"(?P<id>[A-Za-z0-9][\w.-]*/[\w.-]+?)"
    r"((/tree/|@)(?P<revision>[^/\s]+)(/(?P<subfolder>.+?))?)?/?"
)


@dataclass(frozen=True)
class Ref:
    """Where something lies.

    Attributes:
        text: as the user wrote it.
        path: the local path of that name, if there is one.
        repo, revision, subfolder: the parts of a Hub reference, if it reads as one.
        url: the text itself if it is a URL of another store.
    """

    text: str
    path: Path | None
    repo: str | None = None
    revision: str | None = None
    subfolder: str | None = None
    url: str | None = None


def parse_ref(text: str | Path) -> Ref:
    """Read a reference; a local path of that name wins over the Hub.

    Raises:
        InputError: a local path that may not be looked at, or that cannot be a path.
    """
    text = str(text)
    if text and _exists(text):
        return Ref(text, Path(text))
    return parse_remote(text)


def parse_remote(text: str) -> Ref:
    """Read a reference that is no local path, even if there is one of that name."""
    match = _HUB_NAME.fullmatch(text) or _HUB_PAGE.fullmatch(text)
    if match is not None:
        return Ref(text, None, match["id"], match["revision"], match["subfolder"])
    return Ref(text, None, url=text if _URL.fullmatch(text) else None)


def shown(text: str) -> str:
    """A reference as messages and files may show it: without user and password."""
    return re.sub(r"//[^/@]*@", "//", text)


def could_be_remote(ref: Ref) -> bool:
    """Whether a local path has a name that would else be one on the Hub."""
    return ref.path is not None and _HUB_NAME.fullmatch(ref.text) is not None


def _exists(text: str) -> bool:
    try:
        return Path(text).exists()
    except OSError as error:  # an unreadable parent, a name that is too long
        raise InputError(f"{text}: cannot be read: {error.strerror}") from error


def parse_weighted(text: str) -> tuple[str, float]:
    """Split `REF=WEIGHT`; the weight is 1 if there is none.

    A path that itself holds an equals sign is taken as it is when it exists.

    Raises:
        UsageError: the weight is not a finite number, or nothing stands before it.
        InputError: as `parse_ref`.
    """
    head, sign, tail = text.rpartition("=")
    if not sign or _exists(text):
        return text, 1.0
    if not head:
        raise UsageError(f"{text!r}: name an adapter before the weight: PATH=WEIGHT")
    try:
        weight = float(tail)
    except ValueError:
        raise UsageError(
            f"{text}: {tail!r} after the equals sign is not a weight; write it like {head}=0.7"
        ) from None
    if not math.isfinite(weight):
        raise UsageError(f"{text}: the weight must be a finite number, not {tail}")
    return head, weight
