"""What must not leave this machine with a file: its paths, and access tokens."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loratool.errors import InputError
from loratool.refs import parse_remote

Place = tuple[str | int, ...]

# Environment variables that hold an access token of the Hub.
_TOKEN_VARIABLES = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HUGGINGFACE_HUB_TOKEN")
_SHORTEST_SECRET = 6
_TOKEN = re.compile(rb"\b(?:hf|api_org)_[A-Za-z0-9]{16,}\b")
_DRIVE = re.compile(r"[A-Za-z]:[\\/]")
# Keys whose values name a model or a file: whatever is no name on the Hub is a path.
_NAMES_A_MODEL = re.compile(r"(^|_)name_or_path$")
_NAMES_A_FILE = re.compile(r"(^|_)(path|dir|directory|folder|file|cache)s?$")
_ANY_PATH = re.compile(r"/[^/\n<>|*?\"]+(/[^/\n<>|*?\"]+)+/?")
_EVERYBODYS = r"(?:/home/|/Users/|[A-Za-z]:\\+Users\\+)[\w.@+-]+|file:///?[\w.~/%+-]+"
_ESCAPED = re.compile(r"\\[nrt]")  # in JSON, letters that stand for blanks
_STARTS = ("/home/", "/Users/", ":\\", "file://")
_PATH_END = r"(?:[/\\][^\s\"'`<>|(),;]*)?"


@dataclass(frozen=True)
class Machine:
    """How paths of this machine are recognised.

    Attributes:
        roots: directories whose names tell something: the user's home, where the work is done.
    """

    roots: tuple[str, ...]

    @classmethod
    def around(cls, *folders: Path) -> Machine:
        """This machine, with the places that matter for these folders."""
        places = [Path.home(), Path.cwd()]
        for folder in folders:
            for path in (folder.absolute(), folder.resolve()):
                places += [path, *path.parents]
        home = str(Path.home())
        known = {str(place) for place in places if len(place.parts) > 2 or str(place) == home}
        return cls(tuple(sorted(known - {"/"}, key=lambda root: (-len(root), root))))

    def paths_in(self, text: str) -> list[str]:
        """The paths of this machine that a text mentions."""
        if not any(start in text for start in (*self.roots, *_STARTS)):  # vocabularies are long
            return []
        return [match[0].rstrip(".") for match in self._pattern().finditer(text)]

    def is_path(self, text: str, key: str = "") -> bool:
        """Whether a setting's value is, or mentions, a path of this machine.

        Args:
            text: the value.
            key: the setting's name.
        """
        if _NAMES_A_MODEL.search(key):
            return bool(text) and not is_model_name(text)
        if text.startswith(("file://", "~/", "~\\", "\\\\")) or _DRIVE.match(text):
            return True
        is_absolute = text.startswith("/") and bool(text.strip("/"))
        if is_absolute and (
            _NAMES_A_FILE.search(key) or _ANY_PATH.fullmatch(text) or _exists(text)
        ):
            return True
        return bool(self.paths_in(text))

    def _pattern(self) -> re.Pattern[str]:
        roots = "|".join(re.escape(root) for root in self.roots)
        known = rf"(?:{roots})(?![\w-]){_PATH_END}|" if roots else ""
        return re.compile(rf"(?<![\w.~/\\-])(?:{known}(?:{_EVERYBODYS}){_PATH_END})")


def is_model_name(name: str) -> bool:
    """Whether a name can be one on the Hub: org/name, or an old one such as gpt2.

    Relative paths may look like names: what exists here under that name is a path.
    """
    if _exists(name):
        return False
    return parse_remote(name).repo is not None or bool(re.fullmatch(r"[A-Za-z0-9][\w.-]*", name))


def _exists(text: str) -> bool:
    try:
        return Path(text).exists()
    except (OSError, ValueError):
        return False


def strings_in(value: Any, place: Place = ()) -> Iterator[tuple[Place, str]]:
    """All strings in plain data, with where they are; a mapping's keys stand at their place."""
    if isinstance(value, str):
        yield place, value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield (*place, str(key)), str(key)
            yield from strings_in(item, (*place, str(key)))
    elif isinstance(value, list | tuple):
        for number, item in enumerate(value):
            yield from strings_in(item, (*place, number))


def place_text(place: Place) -> str:
    """A place for people: `auto_map.AutoModel`, `files[0]`."""
    parts = (f"[{part}]" if isinstance(part, int) else f".{part}" for part in place)
    return "".join(parts).removeprefix(".")


def without_paths(value: Any, machine: Machine) -> tuple[Any, list[tuple[Place, str]]]:
    """Plain data without settings that are paths of this machine.

    Settings are left out; elements of lists and keys are not, because their neighbours would mean
    something else: those remain, and are found by `strings_in`.

    Returns:
        The data, and what was left out.
    """
    gone: list[tuple[Place, str]] = []

    def clean(value: Any, place: Place) -> Any:
        if isinstance(value, list):
            return [clean(item, (*place, number)) for number, item in enumerate(value)]
        if not isinstance(value, Mapping):
            return value
        kept = {}
        for key, item in value.items():
            if isinstance(item, str) and machine.is_path(item, str(key)):
                gone.append(((*place, key), item))
            else:
                kept[key] = clean(item, (*place, key))
        return kept

    return clean(value, ()), gone


def require_no_paths(label: str, value: Any, machine: Machine) -> None:
    """Refuse plain data that mentions a path of this machine.

    Raises:
        InputError: naming `label`, the place and the path.
    """
    for place, text in strings_in(value):
        key = next((str(part) for part in reversed(place) if isinstance(part, str)), "")
        is_key = bool(place) and place[-1] == text
        if machine.is_path(text, "" if is_key else key):
            raise InputError(
                f"{label}: {place_text(place)}: names a path of this machine, {text[:200]!r}: "
                "change it there"
            )


def require_no_paths_in_text(label: str, text: str, machine: Machine) -> None:
    """Refuse prose or code that mentions a path of this machine.

    Raises:
        InputError: naming `label`, the line and the path.
    """
    text = _ESCAPED.sub(" ", text.replace("\\/", "/"))
    for path in machine.paths_in(text):
        line = text.count("\n", 0, text.index(path)) + 1
        raise InputError(f"{label}:{line}: names a path of this machine, {path!r}: change it there")


def known_secrets() -> tuple[str, ...]:
    """The access tokens that the environment holds."""
    return tuple(filter(None, (os.environ.get(name, "").strip() for name in _TOKEN_VARIABLES)))


def require_no_secrets(label: str, content: bytes, secrets: Iterable[str] = ()) -> None:
    """Refuse a file that holds an access token, one of `secrets` or any that looks like one.

    Raises:
        InputError: naming `label` and the line, never the token.
    """
    wanted = [s.encode() for s in secrets if len(s) >= _SHORTEST_SECRET]
    starts = [at for secret in wanted if (at := content.find(secret)) >= 0]
    starts += [m.start() for m in _TOKEN.finditer(content) if len(set(m[0])) > 8]
    if starts:
        line = content.count(b"\n", 0, min(starts)) + 1
        raise InputError(
            f"{label}:{line}: holds an access token: take it out, and revoke it if anybody else "
            "has seen the file"
        )


def as_json(value: Any) -> bytes:
    """A configuration's bytes, with its settings in their order."""
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()
