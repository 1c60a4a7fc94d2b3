"""The card that goes along: the user's own with its metadata completed, or else a new one."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loratool.adapter import Adapter
from loratool.card import is_unchanged
from loratool.checkpoint import Checkpoint
from loratool.disclosure import Machine, require_no_paths_in_text
from loratool.errors import FormatError, InputError, LoratoolError, UsageError
from loratool.files import file_content
from loratool.front_matter import Card, completed, parse_card
from loratool.publication_card import Subject, metadata, publication_card
from loratool.publication_files import CARD, Survey
from loratool.record import read_record
from loratool.refs import parse_remote
from loratool.reports import counted

_LICENSE = ("license", "license_name", "license_link")
_RELATION = re.compile(r"^base_model:[a-z]+:")

Licensed = Callable[[str], Mapping[str, str]]


@dataclass(frozen=True)
class Wishes:
    """What the user says of a publication.

    Attributes:
        target: the name under which others will find it.
        base: the base, to check an adapter against and to inherit its license.
        base_name: the base's name on the Hub.
        license: the license's identifier on the Hub.
    """

    target: str
    base: Checkpoint | None = None
    base_name: str = ""
    license: str = ""

    def __post_init__(self) -> None:
        if self.base_name and parse_remote(self.base_name).repo is None:
            raise UsageError(f"--base-name {self.base_name}: is no name on the Hub: org/name")
        if self.license and not re.fullmatch(r"[A-Za-z0-9][\w.+-]*", self.license):
            raise UsageError(
                f"--license {self.license!r}: give an identifier such as apache-2.0 or mit; "
                "https://huggingface.co/docs/hub/repositories-licenses lists them"
            )


@dataclass(frozen=True)
class Chosen:
    """A card, and what the user should hear about it."""

    text: str
    notes: tuple[str, ...]


def choose(
    path: Path,
    found: Survey,
    wishes: Wishes,
    machine: Machine,
    base: str,
    license_of: Licensed,
) -> Chosen:
    """The card that goes along with a publication.

    Args:
        path: where a card would lie.
        found: what is published.
        wishes: what the user says of it.
        machine: whose paths must not be told.
        base: the base's name on the Hub, or "".
        license_of: finds the license of a base by its name, where nothing else tells.

    Raises:
        FormatError: the user's card has metadata that cannot be read.
        InputError: it contradicts the options, or names a path of this machine.
    """
    label = str(path)
    own, inherited = _own_card(found, wishes, label)
    notes = []
    kept = Card({}, "", "", "")
    if own is not None:
        kept, gone = _without_paths(parse_card(own, label), label, machine, base)
        require_no_paths_in_text(label, kept.text, machine)
        if gone:
            lines = counted(gone, "line")
            notes.append(f"{CARD}: {lines} of its metadata left out: a path of this machine")
    terms = _license(wishes, kept, inherited, base, label, license_of)
    if not terms:
        notes.append("no license is stated: --license names one; --base inherits the base's")
    subject = _subject(found, wishes.target, base, terms)
    if own is None:
        return Chosen(publication_card(subject), tuple(notes))
    values = _missing(kept, metadata(subject), found)
    if values:
        notes.append(f"{CARD}: kept as you wrote it; added to its metadata: {', '.join(values)}")
    return Chosen(completed(kept, values, label), tuple(notes))


def _missing(card: Card, values: Mapping[str, Any], found: Survey) -> dict[str, Any]:
    """The metadata that a card lacks, as far as it would not contradict what it says."""
    missing = {key: value for key, value in values.items() if key not in card.metadata}
    if "base_model" in card.metadata and found.kind != "adapter":
        missing.pop("base_model_relation", None)  # its base may be another one, or several
    if "license" in card.metadata:
        missing = {key: value for key, value in missing.items() if key not in _LICENSE}
    return missing


def _own_card(found: Survey, wishes: Wishes, label: str) -> tuple[str | None, Mapping[str, str]]:
    """The card that the user wrote, if he did, and the license in one that is the base's."""
    path = found.files.get(CARD)
    theirs = _card_of(wishes.base)
    if path is None:
        return None, _license_in(theirs)
    raw = path.read_bytes()
    try:
        text = raw.decode()
    except UnicodeDecodeError as error:
        raise FormatError(f"{label}: is not UTF-8 text: {error}") from error
    if is_unchanged(text):
        return None, _license_in(theirs)
    if raw == theirs or _came_with_base(found, raw):  # a merge keeps the base's files
        return None, _license_in(raw)
    return text, _license_in(theirs)


def _card_of(base: Checkpoint | None) -> bytes:
    source = base.side_files.get(CARD) if base is not None else None
    return b"" if source is None else file_content(source)


def _came_with_base(found: Survey, card: bytes) -> bool:
    if not isinstance(found.opened, Checkpoint):
        return False
    from blake3 import blake3

    record = read_record(found.opened)
    recorded = record.side_files.get(CARD) if record is not None else None
    return recorded is not None and recorded.digest == blake3(card).hexdigest()


def _license(
    wishes: Wishes,
    kept: Card,
    inherited: Mapping[str, str],
    base: str,
    label: str,
    license_of: Licensed,
) -> Mapping[str, str]:
    stated = kept.metadata.get("license")
    if wishes.license:
        if stated not in (None, wishes.license):
            raise InputError(
                f"{label}: says the license is {stated!r}, --license says {wishes.license!r}: "
                "change one of them"
            )
        return {"license": wishes.license}
    if stated:
        return {"license": str(stated)}
    return inherited or (license_of(base) if base else {})


def _license_in(card: bytes) -> Mapping[str, str]:
    """The license that a stranger's card states; {} if it is none, or unreadable."""
    try:
        found = parse_card(card.decode("utf-8", "replace"), CARD).metadata
    except FormatError:
        return {}
    return {k: found[k] for k in _LICENSE if isinstance(found.get(k), str) and "license" in found}


def license_in_folder(folder: Path) -> Mapping[str, str]:
    """The license that the card of a model states, wherever it lies; {} if none can be had."""
    try:
        return _license_in(file_content(folder / CARD))
    except (LoratoolError, OSError):
        return {}


def _without_paths(card: Card, label: str, machine: Machine, base: str) -> tuple[Card, int]:
    """The card with its metadata's paths, as PEFT writes them, replaced or left out."""
    names_one = isinstance(card.metadata.get("base_model"), str)
    lines, gone = [], 0
    for line in card.block.splitlines(keepends=True):
        key, _, rest = line.strip().removeprefix("- ").strip().partition(": ")
        text = _RELATION.sub("", (rest or key).strip("\"' "))
        if not machine.is_path(text, "name_or_path" * (key == "base_model" and names_one)):
            lines.append(line)
        elif base and "base_model" in line:
            lines.append(line.replace(text, base))
        else:
            gone += 1
    return parse_card(card.start + "".join(lines) + card.end, label), gone


def _subject(found: Survey, target: str, base: str, terms: Mapping[str, str]) -> Subject:
    named = found.config.get("architectures")
    stated = found.manifest.get("architecture", "")
    architecture = str(named[0] if isinstance(named, list) and named else stated)
    opened = found.opened
    return Subject(
        found.kind,
        target,
        base,
        terms,
        architecture=architecture if architecture.isidentifier() else "",
        adapter=opened if isinstance(opened, Adapter) else None,
        manifest=found.manifest,
        reversible=isinstance(opened, Checkpoint) and bool(opened.record),
        graph=next((name for name in found.files if name.endswith(".onnx")), "model.onnx"),
    )
