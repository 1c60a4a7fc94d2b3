"""Files of texts and of token ids, as lists of samples."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeGuard

import numpy as np

from loratool.errors import InputError
from loratool.quiet import shorten

ACCEPTED = (
    "give texts (.txt, .jsonl, .json), token ids (.npy, .safetensors, .jsonl, .json) or a folder "
    "of images"
)


@dataclass(frozen=True)
class Row:
    """The tokens of a sample.

    Attributes:
        ids: their numbers, at least one.
        segments: for each, which of several texts it belongs to, if that is known.
    """

    ids: list[int]
    segments: list[int] | None = None

    def cut(self, length: int) -> Row:
        """Its first tokens."""
        return Row(self.ids[:length], self.segments and self.segments[:length])


def read_samples(path: Path, pad: int | None = None) -> list[str] | list[Row]:
    """Read all samples of a file; at least one.

    Args:
        path: the file.
        pad: the token id that rows of arrays may end in for padding, where no mask tells.

    Raises:
        InputError: it is empty, of a kind that is not known, or not what its kind should be.
    """
    readers: Mapping[str, Callable[[Path], list[Any]]] = {
        ".txt": text_lines,
        ".jsonl": _json_lines,
        ".json": _json_list,
        ".npy": lambda path: _rows_of_arrays({"input_ids": _numpy(path)}, path, pad),
        ".safetensors": lambda path: _rows_of_arrays(_safetensors(path), path, pad),
    }
    reader = readers.get(path.suffix.lower())
    if reader is None:
        raise InputError(f"{path}: {path.suffix or 'this'} is no kind that is known; {ACCEPTED}")
    try:
        found = reader(path)
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror or error}") from error
    if not found:
        raise InputError(f"{path}: is empty; {ACCEPTED}")
    return found


def read_text(path: Path) -> str:
    """A file of UTF-8 text; InputError if it is not."""
    try:
        return path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: is not UTF-8 text ({error.reason} at {error.start})") from error


def text_lines(path: Path) -> list[Any]:
    """The lines of a file that are not empty."""
    return [line for line in read_text(path).splitlines() if line.strip()]


def _json_lines(path: Path) -> list[Any]:
    found = []
    for number, line in enumerate(read_text(path).split("\n"), 1):
        if line.strip():
            found.append((f"line {number}", _parsed(line, f"{path}: line {number}")))
    return _samples(found, path)


def _json_list(path: Path) -> list[Any]:
    content = _parsed(read_text(path), str(path))
    if not isinstance(content, list):
        raise InputError(f"{path}: must be a list of texts or of token ids")
    return _samples([(f"item {number}", item) for number, item in enumerate(content, 1)], path)


def _parsed(text: str, label: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{label}: is not valid JSON ({error})") from error


def _samples(items: Sequence[tuple[str, Any]], path: Path) -> list[Any]:
    """Texts or rows; all of one kind."""
    found: list[Any] = []
    for place, item in items:
        segments = item.get("token_type_ids") if isinstance(item, dict) else None
        value = item.get("input_ids", item.get("text")) if isinstance(item, dict) else item
        if isinstance(value, str) and not value.strip():
            continue
        if isinstance(value, str):
            found.append(value)
        elif _are_numbers(value) and (segments is None or _are_numbers(segments)):
            if segments is not None and len(segments) != len(value):
                raise InputError(f"{path}: {place}: other numbers of input_ids and token_type_ids")
            found.append(Row(value, segments))
        else:
            raise InputError(
                f'{path}: {place}: must be a text, a list of token ids, or an object with "text" '
                'or "input_ids"'
            )
        if isinstance(found[-1], str) != isinstance(found[0], str):
            raise InputError(f"{path}: {place}: texts and token ids in one file")
    return found


def _are_numbers(value: Any) -> TypeGuard[list[int]]:
    return isinstance(value, list) and bool(value) and all(type(item) is int for item in value)


def _numpy(path: Path) -> np.ndarray[Any, Any]:
    try:
        found = np.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, EOFError) as error:
        raise InputError(f"{path}: is no .npy file of numbers ({shorten(error)})") from error
    return np.asarray(found)


def _safetensors(path: Path) -> dict[str, np.ndarray[Any, Any]]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "numpy") as file:
            found = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, TypeError, ValueError) as error:
        raise InputError(f"{path}: cannot be read ({shorten(error)})") from error
    if "input_ids" not in found:
        names = ", ".join(list(found)[:4]) or "nothing"
        raise InputError(f"{path}: must hold a tensor input_ids; it holds {names}")
    return found


def _rows_of_arrays(
    arrays: Mapping[str, np.ndarray[Any, Any]], path: Path, pad: int | None
) -> list[Any]:
    """Rows of (n, length) integers, without the padding at their end."""
    ids = arrays["input_ids"]
    for name in ("input_ids", "attention_mask", "token_type_ids"):
        array = arrays.get(name, ids)
        if array.ndim != 2 or not np.issubdtype(array.dtype, np.integer):
            raise InputError(
                f"{path}: {name} must be integers of shape (samples, length), not {array.dtype} "
                f"of shape {array.shape}"
            )
        if array.shape != ids.shape:
            raise InputError(f"{path}: {name} has shape {array.shape}, input_ids {ids.shape}")
    mask, segments = arrays.get("attention_mask"), arrays.get("token_type_ids")
    is_real = mask != 0 if mask is not None else (ids >= 0) & (ids != (-1 if pad is None else pad))
    rows = []
    for number in range(len(ids)):
        places = np.flatnonzero(is_real[number])
        if not len(places):
            raise InputError(f"{path}: sample {number + 1}: holds nothing but padding")
        if mask is not None and len(places) != places[-1] - places[0] + 1:
            raise InputError(f"{path}: sample {number + 1}: has padding between its tokens")
        first = int(places[0]) if mask is not None else 0
        part = slice(first, int(places[-1]) + 1)
        rows.append(
            Row(
                [int(token) for token in ids[number, part]],
                None if segments is None else [int(s) for s in segments[number, part]],
            )
        )
    return rows
