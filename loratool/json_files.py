"""JSON files: configurations that are read, and the manifest that loratool writes."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from loratool.errors import FormatError, InputError
from loratool.files import local
from loratool.reports import to_json

MANIFEST = "loratool.json"


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file; InputError or FormatError naming the file otherwise."""
    try:
        raw = local(path).read_bytes()
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from error
    return parse_json(raw, str(path))


def parse_json(raw: bytes, label: str) -> dict[str, Any]:
    """A JSON object from UTF-8 bytes; FormatError naming `label` otherwise."""
    try:
        content = json.loads(raw.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise FormatError(f"{label}: is not valid JSON ({error})") from error
    if not isinstance(content, dict):
        raise FormatError(f"{label}: is not a JSON object")
    return content


def manifest(data: Mapping[str, Any]) -> bytes:
    """A manifest's bytes."""
    return f"{to_json(data, indent=1)}\n".encode()
