"""Which files of a folder are an adapter, a model or an ONNX model, and which only lie there."""

from __future__ import annotations

import mmap
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path, PurePosixPath
from typing import Any

from loratool.adapter import MODEL_FILES, Adapter
from loratool.checkpoint import RECORD, Checkpoint
from loratool.errors import FormatError, InputError
from loratool.files import PICKLES
from loratool.json_files import MANIFEST, read_json
from loratool.opening import open_any
from loratool.publication import Kind

CARD = "README.md"
# Settings that a folder beside adapter_config.json may hold; a config.json would mislead loaders.
_BESIDE_ADAPTER = tuple(
    n for n in MODEL_FILES if n not in ("config.json", "generation_config.json")
)
_LEGAL = ("LICENSE*", "NOTICE*", "USE_POLICY*")
_MODEL_SETTINGS = (
    *MODEL_FILES, "*processor_config.json", "modules.json", "config_sentence_transformers.json",
    "sentence_bert_config.json", "[0-9]*_*/config.json", *_LEGAL,
)  # fmt: skip
_GRAPHS = ("*.onnx",)
_GRAPH_DATA = ("*.onnx.data", "*.onnx_data", "*.onnx_data_*")
_DATA_NAME = re.compile(rb"[\w.-]+\.onnx[._]data[\w.]*")


@dataclass(frozen=True)
class Survey:
    """What lies in a folder.

    Attributes:
        kind: what it is.
        files: the files that belong to it, by their names in the folder.
        strays: the names of everything else, folders with a slash.
        opened: the adapter or the model; None for ONNX.
        config: the model's config.json, or {}.
        manifest: what loratool recorded when it made it, or {}.
    """

    kind: Kind
    files: Mapping[str, Path]
    strays: tuple[str, ...]
    opened: Adapter | Checkpoint | None
    config: Mapping[str, Any]
    manifest: Mapping[str, Any]


def survey(folder: Path) -> Survey:
    """Find out what a folder is, and which of its files belong to that.

    Raises:
        InputError: it is no folder, or nothing that can be published: nothing known, weights in
            pickle files, missing external data, or a file that is a link to elsewhere.
        FormatError: a file is malformed.
    """
    if not folder.is_dir():
        raise InputError(f"{folder}: is no directory of this machine; name the one to be sent")
    there = {path.relative_to(folder).as_posix(): path for path in sorted(_walk(folder))}
    if _is_onnx(there):
        kind: Kind = "onnx"
        opened = None
        names = _onnx_files(folder, there)
    else:
        found = open_any(folder)
        opened = found
        if isinstance(found, Adapter):
            kind, names = "adapter", _adapter_files(folder, found, there)
        else:
            kind, names = "model", _model_files(folder, found, there)
    names |= {CARD} & there.keys()
    files = {name: there[name] for name in sorted(names)}
    for name, path in files.items():
        _require_inside(folder, name, path)
    return Survey(
        kind,
        files,
        _strays(folder, files),
        opened,
        config=_settings(folder / ("model/config.json" if kind == "adapter" else "config.json")),
        manifest=_settings(folder / MANIFEST),
    )


def _walk(folder: Path) -> Iterator[Path]:
    """Every file below a folder but hidden ones; links to folders are followed no further."""
    for path in folder.iterdir():
        if path.name.startswith("."):
            continue
        if path.is_file():
            yield path
        elif path.is_dir() and (not path.is_symlink() or path.name in ("model", RECORD)):
            yield from _walk(path)


def _settings(file: Path) -> Mapping[str, Any]:
    return read_json(file) if file.is_file() else {}


def _matching(there: Iterable[str], patterns: Iterable[str], prefix: str = "") -> set[str]:
    """The names that match a pattern, part by part: a star is never a slash."""
    wanted = [PurePosixPath(prefix + pattern).parts for pattern in patterns]
    return {
        name
        for name in there
        for parts in wanted
        if len(parts) == len(PurePosixPath(name).parts)
        and all(map(fnmatchcase, PurePosixPath(name).parts, parts))
    }


def _adapter_files(folder: Path, adapter: Adapter, there: Iterable[str]) -> set[str]:
    own = {name for name in adapter.files if not name.startswith("model/")}
    _require_no_pickles(folder, own)
    beside = _matching(there, (*_BESIDE_ADAPTER, *_LEGAL))
    return own | beside | _matching(there, MODEL_FILES, "model/")


def _model_files(folder: Path, model: Checkpoint, there: Iterable[str]) -> set[str]:
    if model.components:
        raise InputError(
            f"{folder}: is a model of several components ({', '.join(model.components)}), which "
            "cannot be published yet; huggingface_hub's `hf upload` sends the folder as it is"
        )
    on_disk = model.stored.checkpoint if model.stored else model  # with its own index
    weights = set(on_disk.shards.values())
    _require_no_pickles(folder, weights)
    code = _code_files(model.config or {})
    record = {f"{RECORD}/{name}" for name in model.record}
    settings = _matching(there, _MODEL_SETTINGS)
    return weights | {*on_disk.index_files} | settings | (code & {*there}) | record


def _code_files(config: Mapping[str, Any]) -> set[str]:
    """The Python files that a model brings along, as its config names them."""
    mapped = config.get("auto_map")
    values = mapped.values() if isinstance(mapped, dict) else ()
    names = (item for value in values for item in (value if isinstance(value, list) else [value]))
    modules = (name.partition(".")[0] for name in names if isinstance(name, str))
    return {f"{module}.py" for module in modules if "--" not in module}


def _is_onnx(there: Iterable[str]) -> bool:
    names = {*there}
    weights = _matching(names, ("*.safetensors", "pytorch_model*.bin", "adapter_config.json"))
    return bool(_matching(names, _GRAPHS)) and not weights


def _onnx_files(folder: Path, there: Mapping[str, Path]) -> set[str]:
    graphs, data = _matching(there, _GRAPHS), _matching(there, _GRAPH_DATA)
    for graph in sorted(graphs):
        with mapped(there[graph]) as content:
            named = {match.decode() for match in _DATA_NAME.findall(content)}
        # What follows a name in the file may look like a part of it.
        if missing := sorted(n for n in named if not any(map(n.startswith, data))):
            raise InputError(f"{folder / missing[0]}: missing, but {graph} names it: export again")
    sizes = _settings(folder / MANIFEST).get("files")
    for name, size in sizes.items() if isinstance(sizes, dict) else ():
        if name not in there or there[name].stat().st_size != size:
            raise FormatError(
                f"{folder / name}: is not the file that {MANIFEST} tells of ({size} bytes): "
                "export again"
            )
    return graphs | data | _matching(there, (*_MODEL_SETTINGS, MANIFEST))


@contextmanager
def mapped(path: Path) -> Iterator[mmap.mmap | bytes]:
    """A file's content, which is read only where it is looked at."""
    with path.open("rb") as file:
        if os.fstat(file.fileno()).st_size == 0:
            yield b""
            return
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
            yield content


def _require_no_pickles(folder: Path, weights: Iterable[str]) -> None:
    for name in sorted(weights):
        if name.endswith(PICKLES):
            advice = (
                "`loratool rescale DIR --by 1` writes the same adapter as safetensors"
                if name.startswith("adapter_model")
                else "load the model and save it again with transformers: it writes safetensors"
            )
            raise InputError(
                f"{folder / name}: is a pickle, which can run code where it is loaded, and is not "
                f"published: {advice}"
            )


def _require_inside(folder: Path, name: str, path: Path) -> None:
    """Refuse a link that leaves the folder; huggingface_hub's cache keeps its files in `blobs`."""
    real, home = path.resolve(), folder.resolve()
    if real.is_relative_to(home):
        return
    if home.parent.name == "snapshots" and real.parent == home.parent.parent / "blobs":
        return
    raise InputError(
        f"{folder / name}: is, or lies behind, a link that leaves the folder: put a copy in its "
        "place"
    )


def _strays(folder: Path, files: Mapping[str, Path]) -> tuple[str, ...]:
    """What is left out, a whole folder as one."""

    def inside(place: Path, prefix: str) -> Iterator[str]:
        for path in sorted(place.iterdir()):
            name = prefix + path.name
            if name in files:
                continue
            if any(file.startswith(f"{name}/") for file in files):
                yield from inside(path, f"{name}/")
            else:
                yield f"{name}/" if path.is_dir() else name

    return tuple(inside(folder, ""))
