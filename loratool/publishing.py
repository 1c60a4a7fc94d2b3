"""Prepares a folder for publication: checked, described, and without anything of this machine."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loratool.adapter import Adapter, FormatOptions
from loratool.binding import bind
from loratool.card_choice import Licensed, Wishes, choose
from loratool.checkpoint import RECORD, Checkpoint
from loratool.disclosure import (
    Machine,
    as_json,
    is_model_name,
    known_secrets,
    place_text,
    require_no_paths,
    require_no_paths_in_text,
    require_no_secrets,
    without_paths,
)
from loratool.errors import FormatError, InputError, Problem, raise_problems
from loratool.finite import non_finite, non_finite_tensors
from loratool.publication import Publication
from loratool.publication_files import CARD, Survey, mapped, survey
from loratool.record import BLOBS, FILE, Record, read_record
from loratool.refs import parse_remote
from loratool.reports import listed
from loratool.safetensors_file import lazy_tensors, read_header

_ADAPTER_CONFIG = "adapter_config.json"
_BASE = "base_model_name_or_path"
_WEIGHTS = (".safetensors", ".onnx", ".data", ".onnx_data", ".bin", ".gguf")
# JSON files of words, any of which may look like a path.
_WORDS = re.compile(r"(^|/)(tokenizer|vocab[^/]*|added_tokens|special_tokens_map)\.json$")
_NAMED_STRAYS = 8


def prepare(folder: Path, wishes: Wishes, license_of: Licensed = lambda base: {}) -> Publication:
    """Check what lies in a folder and collect what is to be published of it.

    Args:
        folder: an adapter, a model, or an ONNX model.
        wishes: what the user says of it.
        license_of: finds the license of a base by its name, where nothing else tells.

    Raises:
        InputError: there is nothing that can be published, or a file holds an access token or a
            path of this machine that cannot be taken out.
        FormatError: a file is malformed.
        MismatchError: the adapter is faulty, or does not fit the base; all complaints at once.
    """
    try:
        return _prepare(folder, wishes, license_of)
    except OSError as error:
        raise InputError(f"{error.filename or folder}: cannot be read: {error.strerror}") from error


def _prepare(folder: Path, wishes: Wishes, license_of: Licensed) -> Publication:
    found = survey(folder)
    _validate(folder, found, wishes.base)
    for name, path in found.files.items():
        _require_no_secrets(folder, name, path)
    machine = Machine.around(folder)
    cleaner = _Cleaner(folder, machine, _base_name(found, wishes))
    files = {name: cleaner.clean(name, path) for name, path in found.files.items() if name != CARD}
    if isinstance(found.opened, Checkpoint):
        _check_record(found.opened, machine)
    card = choose(folder / CARD, found, wishes, machine, cleaner.base, license_of)
    files[CARD] = card.text.encode()
    notes = [*cleaner.notes, *card.notes]
    if found.strays:
        notes.append(f"not sent: {listed(found.strays, _NAMED_STRAYS)}")
    return Publication(found.kind, dict(sorted(files.items())), tuple(notes))


def _validate(folder: Path, found: Survey, base: Checkpoint | None) -> None:
    if isinstance(found.opened, Adapter):
        adapter = found.opened.reread(FormatOptions(base=base))
        problems = bind(adapter, base).problems if base is not None else adapter.problems
        raise_problems(f"{folder}: is not published:", [*problems, *_not_finite(adapter, found)])
        if not adapter:
            raise InputError(f"{folder}: the adapter changes nothing; there is nothing to publish")


def _not_finite(adapter: Adapter, found: Survey) -> list[Problem]:
    """Tensors with NaN or Inf: of updates, and whatever else lies in the files."""
    problems = non_finite(adapter)
    known = {problem.tensor for problem in problems}
    known.update(tensor.name for update in adapter.values() for tensor in update.stored)
    files = [path for name, path in found.files.items() if name.endswith(".safetensors")]
    tensors = (t for path in files for t in lazy_tensors(path, read_header(path)).values())
    return [*problems, *non_finite_tensors(t for t in tensors if t.name not in known)]


def _base_name(found: Survey, wishes: Wishes) -> str:
    """The base's name on the Hub, or ""."""
    named = wishes.base_name or (wishes.base.hub_name if wishes.base is not None else "")
    if named:
        return parse_remote(named).repo or named
    if not isinstance(found.opened, Adapter):
        return ""
    name = found.opened.base_name
    return (parse_remote(name).repo or name) if name and is_model_name(name) else ""


@dataclass
class _Cleaner:
    """Takes paths of this machine out of files, or refuses files that it cannot change."""

    folder: Path
    machine: Machine
    base: str

    def __post_init__(self) -> None:
        self.notes: list[str] = []

    def clean(self, name: str, path: Path) -> Path | bytes:
        """The file itself if there is nothing in it, else its content without paths."""
        label = str(self.folder / name)
        if name.endswith(".safetensors"):
            header = dict(read_header(path).metadata)
            require_no_paths(f"{label}: __metadata__", _unfolded(header), self.machine)
            require_no_secrets(
                f"{label}: __metadata__", json.dumps(header).encode(), known_secrets()
            )
            return path
        if name.endswith(_WEIGHTS):
            if name.endswith(".onnx"):
                self._check_graph(label, path)
            return path
        raw = path.read_bytes()
        if name.endswith(".json") and not _WORDS.search(name):
            return self._clean_json(name, label, raw, path)
        try:
            require_no_paths_in_text(label, raw.decode(), self.machine)
        except UnicodeDecodeError:
            self._check_bytes(label, raw)
        return path

    def _clean_json(self, name: str, label: str, raw: bytes, path: Path) -> Path | bytes:
        before = _parsed(raw, label)
        if name == f"{RECORD}/{FILE}":
            require_no_paths(label, before, self.machine)
            return path
        after, gone = without_paths(before, self.machine)
        if isinstance(after, dict) and name.rpartition("/")[2] == _ADAPTER_CONFIG:
            self._name_base(name, after, before.get(_BASE))
        require_no_paths(label, after, self.machine)
        for place, _ in gone:
            if place != (_BASE,):
                self.notes.append(f"{name}: {place_text(place)}: left out: a path of this machine")
        return path if after == before else as_json(after)

    def _name_base(self, name: str, config: dict[str, Any], named: Any) -> None:
        """Let the configuration name the base as others can find it."""
        if name == _ADAPTER_CONFIG and self.base:
            config[_BASE] = self.base
        elif isinstance(named, str) and named and not is_model_name(named):
            config[_BASE] = None
            if name == _ADAPTER_CONFIG:
                self.notes.append(
                    f"{name}: {_BASE} is null now, since it was a path of this machine: whoever "
                    "loads the adapter has to name the base; give it with --base-name org/name"
                )

    def _check_graph(self, label: str, path: Path) -> None:
        with mapped(path) as content:
            self._check_bytes(label, content)

    def _check_bytes(self, label: str, content: Any) -> None:
        for root in self.machine.roots:
            at = content.find(f"{root}/".encode())
            if at >= 0:
                raise InputError(
                    f"{label}: names a path of this machine, {root!r}, at byte {at}: write the "
                    "file anew without it"
                )


def _parsed(raw: bytes, label: str) -> Any:
    try:
        return json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise FormatError(f"{label}: is not valid JSON ({error})") from error


def _unfolded(value: Any) -> Any:
    """Plain data with the texts in it that are JSON themselves, as trainers write into headers."""
    if isinstance(value, dict):
        return {key: _unfolded(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_unfolded(item) for item in value]
    if isinstance(value, str) and value[:1] in ("{", "["):
        try:
            return _unfolded(json.loads(value))
        except (ValueError, RecursionError):
            return value
    return value


def _check_record(model: Checkpoint, machine: Machine) -> None:
    """Refuse the record of a merge whose packed copies of the base's files name paths."""
    record = read_record(model)
    if record is None:
        return
    import zstandard

    for name, content in _packed(record, zstandard.ZstdDecompressor()):
        try:
            label = f"{record.path / BLOBS}: {name} of the base"
            require_no_paths_in_text(label, content.decode("utf-8", "replace"), machine)
            require_no_secrets(label, content, known_secrets())
        except InputError as error:
            raise InputError(f"{error}, and merge again; or merge without --reversible") from None


def _packed(record: Record, decompressor: Any) -> Iterator[tuple[str, bytes]]:
    import zstandard

    for name, file in {**record.side_files, **record.weight_files}.items():
        if file.content is not None:
            try:
                yield name, decompressor.decompress(record.read_blob(file.content))
            except zstandard.ZstdError as error:
                raise FormatError(f"{record.path}: {name}: cannot be unpacked: {error}") from error


def _require_no_secrets(folder: Path, name: str, path: Path) -> None:
    if not name.endswith(_WEIGHTS):
        require_no_secrets(str(folder / name), path.read_bytes(), known_secrets())
