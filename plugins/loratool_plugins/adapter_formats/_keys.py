"""How formats call the tensors of an adapter, and which calls them so: from a file's beginning."""

from __future__ import annotations

import io
import pickletools
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from loratool.errors import FormatError, InputError
from loratool.files import PICKLES, read_start
from loratool.safetensors_file import read_header

# What the keys of a format look like; no key looks like two of them.
STYLES: Mapping[str, re.Pattern[str]] = {
    name: re.compile(pattern)
    for name, pattern in {
        "peft": r".+\.lora_(([AB]|embedding_[AB])(\.[^.]+)?\.(weight|bias)|embedding_[AB]"
        r"|embedding_[AB]\.[^.]+|magnitude_vector(\.[^.]+)*)",
        "loralib": r"(.+\.)?lora_[AB]",
        "mlx": r"(.+\.)?lora_[ab]",
        "torchtune": r".+\.lora_[ab]\.weight",
        "kohya": r".+\.lora_(down|mid|up)\.weight",
        "lycoris": r".+\.(hada_(w[12]_[ab]|t[12])|lokr_(w[12](_[ab])?|t2))",
        "diffusers": r".+[._]lora\.(down|up)\.weight",
    }.items()
}

_START = 1 << 16
_LOCAL_HEADER = 30  # bytes of a zip entry's header before its name
_OLD_PICKLES = 4  # a legacy torch file: magic number, version, machine, state dict


def names_in(file: Path) -> tuple[str, ...]:
    """The names of a weight file's tensors; of a torch file every text in its pickle.

    Only the file's beginning is read, and nothing is unpickled.

    Raises:
        InputError: the file cannot be read.
        FormatError: its header is damaged.
    """
    if file.suffix not in PICKLES:
        return tuple(entry.name for entry in read_header(file).entries)
    try:
        return tuple(_texts(file))
    except OSError as error:
        raise InputError(f"{file}: cannot be read: {error.strerror}") from error


def _texts(file: Path) -> Iterator[str]:
    count = _START
    while True:
        raw = read_start(file, count)
        found, complete = _texts_of(raw)
        if complete or len(raw) < count:
            yield from found
            return
        count *= 4


def _texts_of(raw: bytes) -> tuple[list[str], bool]:
    """The texts in the pickles that the bytes begin with, and whether these end there."""
    is_zip = raw[:4] == b"PK\x03\x04"
    stream = io.BytesIO(raw)
    if is_zip:  # the pickle is the first entry, stored as it is
        sizes = raw[26:28], raw[28:30]
        stream.seek(_LOCAL_HEADER + sum(int.from_bytes(size, "little") for size in sizes))
    found: list[str] = []
    try:
        for _ in range(1 if is_zip else _OLD_PICKLES):
            found += (text for _, text, _ in pickletools.genops(stream) if isinstance(text, str))
    except Exception:  # cut off, or no pickle at all: the bytes may be anything
        return found, False
    return found, True


def styles_of(names: Iterable[str]) -> dict[str, str]:
    """The formats that names are of -> the first name of each."""
    found: dict[str, str] = {}
    for name in names:
        for style, pattern in STYLES.items():
            if style not in found and pattern.fullmatch(name):
                found[style] = name
    return found


def objection(file: Path, style: str, wanted: str) -> str:
    """Why a weight file is not of a style; "" if it is.

    Args:
        file: a safetensors or a torch file.
        style: one of `STYLES`.
        wanted: how its keys are described to people.

    """
    try:
        found = styles_of(names_in(file))
    except InputError as error:
        return str(error).removeprefix(f"{file}: ")
    return f"keys are not {wanted}" if style not in found else mixture(found)


def mixture(found: Mapping[str, str]) -> str:
    """What is wrong with a file whose keys are of these styles; "" for one style."""
    if len(found) < 2:
        return ""
    keys = " and ".join(f"{name} ({style})" for style, name in list(found.items())[:2])
    return f"holds keys of two formats, {keys}: separate them"


def require_one_style(file: Path, names: Iterable[str]) -> None:
    """Raise FormatError, naming one key of each, if a file holds keys of two formats."""
    if message := mixture(styles_of(names)):
        raise FormatError(f"{file}: {message}")
