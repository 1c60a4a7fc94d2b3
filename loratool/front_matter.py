"""The metadata of a model card: the YAML between two lines of dashes at a README's start."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from loratool.errors import FormatError

_RULE = re.compile(r"---[ \t]*\r?\n?")


@dataclass(frozen=True)
class Card:
    """A README taken apart; `start + block + end` is its text.

    Attributes:
        metadata: what the block says.
        start: the opening rule, "" if there is no block.
        block: the YAML, as it stands there.
        end: the closing rule and everything after it; without a block, the whole text.
    """

    metadata: Mapping[str, Any]
    start: str
    block: str
    end: str

    @property
    def text(self) -> str:
        """The whole card."""
        return self.start + self.block + self.end


def parse_card(text: str, label: str) -> Card:
    """Take a README apart.

    Args:
        text: its content.
        label: how messages call it.

    Raises:
        FormatError: the metadata is no YAML, or no mapping, or does not end; naming the line.
    """
    lines = re.findall(r"[^\n]*\n|[^\n]+", text)
    first = next((n for n, line in enumerate(lines) if line.strip("\ufeff \t\r\n")), len(lines))
    if first == len(lines) or not _RULE.fullmatch(lines[first].lstrip("\ufeff")):
        return Card({}, "", "", text)
    last = next((n for n in range(first + 1, len(lines)) if _RULE.fullmatch(lines[n])), None)
    if last is None:
        raise FormatError(
            f"{label}:{first + 1}: the metadata that begins here does not end: close it with a "
            "line of three dashes"
        )
    block = "".join(lines[first + 1 : last])
    found = _load(block, label, first + 1)
    return Card(found, "".join(lines[: first + 1]), block, "".join(lines[last:]))


def completed(card: Card, values: Mapping[str, Any], label: str) -> str:
    """The card's text with metadata that it lacks; not a character of it is changed.

    Args:
        card: the card.
        values: what it should say; what it says already stays.
        label: how messages call it.

    Raises:
        FormatError: its metadata is written in a way that nothing can be added to.
    """
    missing = {key: value for key, value in values.items() if key not in card.metadata}
    if not missing:
        return card.text
    newline = "\r\n" if "\r\n" in card.text else "\n"
    added = dump(missing).replace("\n", newline)
    if not card.start:
        gap = "" if card.text.startswith(("\n", "\r\n")) or not card.text else newline
        return f"---{newline}{added}---{newline}{gap}{card.text}"
    text = card.start + card.block + added + card.end
    try:
        result = parse_card(text, label).metadata
    except FormatError:
        result = {}
    if result != {**card.metadata, **missing}:
        raise FormatError(
            f"{label}: write its metadata as lines of the form `key: value`, so that "
            f"{', '.join(missing)} can be added"
        )
    return text


def dump(values: Mapping[str, Any]) -> str:
    """Metadata as YAML lines."""
    import yaml

    text: str = yaml.safe_dump(
        dict(values), sort_keys=False, default_flow_style=False, allow_unicode=True, width=1000
    )
    return text


def _load(block: str, label: str, offset: int) -> dict[str, Any]:
    import yaml

    try:
        found = yaml.safe_load(block)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = offset + 1 + (mark.line if mark is not None else 0)
        problem = getattr(error, "problem", None) or "characters that YAML does not allow"
        raise FormatError(f"{label}:{line}: the metadata is not valid YAML: {problem}") from error
    except ValueError as error:  # a date that does not exist
        raise FormatError(f"{label}:{offset + 1}: the metadata is not valid: {error}") from error
    if found is None:
        return {}
    if not isinstance(found, dict):
        raise FormatError(f"{label}:{offset + 1}: the metadata must be lines `key: value`")
    return found
