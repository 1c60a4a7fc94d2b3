"""Diffusers folders: a model of several components, each in a folder of its name, or one of them.

A tensor is called COMPONENT.NAME, as diffusers' LoRA files call it; one component alone keeps its
own names.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

from loratool.checkpoint import MODEL_INDEX, Checkpoint, LazyTensor
from loratool.errors import FormatError, InputError
from loratool.files import entries, is_dir, is_file
from loratool.json_files import read_json
from loratool_plugins.checkpoint_formats import directory, safetensors, torch

_STEM = "diffusion_pytorch_model"
_SUFFIXES = (".safetensors", ".bin")
_STEMS = {".safetensors": (_STEM, "model"), ".bin": (_STEM, "pytorch_model")}
_READERS = {".safetensors": safetensors.open_files, ".bin": torch.open_files}
# Classes of a pipeline's parts that hold settings and no weights.
_SETTINGS = re.compile(r".*(Scheduler|Tokenizer\w*|Processor\w*|Extractor\w*)")


@dataclass(frozen=True)
class Diffusers:
    """A folder with a model_index.json, or with one diffusers model; opening reads headers only."""

    # A folder may hold a single-file checkpoint, too.
    refines: ClassVar[frozenset[str]] = frozenset({"safetensors", "torch"})

    def objection(self, path: Path) -> str:
        """Why there is neither a model_index.json nor weights as diffusers calls them."""
        if is_file(path):
            return "a file, not a directory"
        if is_file(path / MODEL_INDEX):
            return ""
        named = is_dir(path) and any(
            file.name.startswith(_STEM) and file.suffix in _SUFFIXES for file in entries(path)
        )
        return "" if named else f"no {MODEL_INDEX}, no {_STEM}*"

    def open(self, path: Path) -> Checkpoint:
        """Open it by its headers.

        Raises:
            InputError: a file cannot be read.
            FormatError: a component is missing, has no weights or several that could be meant, a
                header lies, or index and files disagree; all components' complaints at once.
        """
        directory.require_no_switch(path)
        if not is_file(path / MODEL_INDEX):
            found = _find(path)
            opened = found.open(path)
            return replace(opened, notes=(*opened.notes, *_left_out({path.name: found.variants})))
        index = read_json(path / MODEL_INDEX)
        return _joined(path, index, *_open_components(path, index))


@dataclass(frozen=True)
class _Found:
    """The weights of one component, their suffix, and the names of variants beside them."""

    weights: directory.WeightFiles
    suffix: str
    variants: tuple[str, ...] = ()

    def open(self, folder: Path) -> Checkpoint:
        return _READERS[self.suffix](self.weights, folder)


def _open_components(
    path: Path, index: Mapping[str, Any]
) -> tuple[dict[str, Checkpoint], dict[str, tuple[str, ...]]]:
    """Component -> its weights, and -> the variants that are left out."""
    opened: dict[str, Checkpoint] = {}
    variants: dict[str, tuple[str, ...]] = {}
    complaints: list[str] = []
    for name, library, cls in _listed(path, index):
        folder = path / name
        try:
            if not is_dir(folder):
                raise FormatError(
                    f"{folder}: missing, but {MODEL_INDEX} names it ({library}, {cls}); download it"
                )
            if _SETTINGS.fullmatch(cls) and not is_file(folder / "config.json"):
                continue
            found = _find(folder)
            opened[name] = found.open(folder)
            variants[name] = found.variants
        except (FormatError, InputError) as error:
            complaints.append(str(error))
    if len(complaints) > 1:
        lines = "".join(f"\n  {complaint}" for complaint in complaints)
        raise FormatError(f"{path}: {len(complaints)} components cannot be opened:{lines}")
    if complaints:
        raise FormatError(complaints[0])
    if not opened:
        raise FormatError(f"{path / MODEL_INDEX}: names no component that holds weights")
    return opened, variants


def _listed(path: Path, index: Mapping[str, Any]) -> Iterator[tuple[str, str, str]]:
    """(name, library, class) of every part of a pipeline; absent ones are [null, null]."""
    for name, value in index.items():
        if name.startswith("_") or not isinstance(value, list) or len(value) != 2:
            continue
        library, cls = value
        if not isinstance(library, str) or not isinstance(cls, str):
            continue
        if not name.isidentifier():
            raise FormatError(f"{path / MODEL_INDEX}: {name!r} is not the name of a component")
        yield name, library, cls


def _find(folder: Path) -> _Found:
    """The weights that diffusers would load from a component's folder.

    Raises:
        FormatError: there are none, or several variants and no main weights; or an index lies.
    """
    variants = {suffix: _variants(folder, suffix) for suffix in _SUFFIXES}
    for suffix in _SUFFIXES:
        for stem in _STEMS[suffix]:
            if found := directory.usual_weights(folder, stem + suffix):
                return _Found(found, suffix, tuple(variants[suffix]))
    for suffix, there in variants.items():
        if len(there) > 1:
            raise FormatError(
                f"{folder}: holds the variants {', '.join(there)} and no main weights: move all "
                "but one of them out of the folder"
            )
        for variant, stem in there.items():
            usual, index = f"{stem}.{variant}{suffix}", f"{stem}{suffix}.index.{variant}.json"
            older = f"{stem}{suffix}.{variant}.index.json"
            for name in (index, older):
                if found := directory.usual_weights(folder, usual, name):
                    return _Found(found, suffix)
    expected = " or ".join(f"{stem}{s}" for s in _SUFFIXES for stem in _STEMS[s])
    raise FormatError(f"{folder}: holds no weights ({expected}); download them")


def _variants(folder: Path, suffix: str) -> dict[str, str]:
    """Variant ("fp16") -> stem of its file names."""
    stems, shard = "|".join(_STEMS[suffix]), r"-\d{5}-of-\d{5}"
    regex = re.compile(
        rf"(?P<stem>{stems})(\.(?P<variant>[^.]+?)({shard})?|{shard}\.(?P<older>[^.]+))"
        rf"{re.escape(suffix)}"
    )
    matches = (regex.fullmatch(file.name) for file in entries(folder) if is_file(file))
    return {found["variant"] or found["older"]: found["stem"] for found in matches if found}


def _left_out(variants: Mapping[str, tuple[str, ...]]) -> tuple[str, ...]:
    there = [f"{name} ({', '.join(names)})" for name, names in variants.items() if names]
    if not there:
        return ()
    return (f"variants beside the main weights are left out: {', '.join(there)}",)


def _joined(
    path: Path,
    index: Mapping[str, Any],
    opened: Mapping[str, Checkpoint],
    variants: Mapping[str, tuple[str, ...]],
) -> Checkpoint:
    side_files = directory.side_files(path)
    for name, _, _ in _listed(path, index):
        side_files |= {f"{name}/{n}": file for n, file in directory.side_files(path / name).items()}
    tensors: dict[str, LazyTensor] = {}
    shards: dict[str, str] = {}
    aliases: dict[str, str] = {}
    metadata: dict[str, Mapping[str, str]] = {}
    index_files: dict[str, Path | bytes] = {}
    for component, found in opened.items():
        for name, tensor in found.items():
            tensors[f"{component}.{name}"] = tensor.renamed(f"{component}.{name}")
            shards[f"{component}.{name}"] = f"{component}/{found.shards[name]}"
        aliases |= {f"{component}.{n}": f"{component}.{of}" for n, of in found.aliases.items()}
        metadata |= {f"{component}/{file}": m for file, m in found.metadata.items()}
        index_files |= {f"{component}/{n}": file for n, file in found.index_files.items()}
    return Checkpoint(
        tensors,
        config=index,
        side_files=side_files,
        shards=shards,
        metadata=metadata,
        aliases=aliases,
        notes=(*_left_out(variants), *(note for found in opened.values() for note in found.notes)),
        path=path,
        index_files=index_files,
        record=directory.record_files(path),
        components={name: found.config for name, found in opened.items()},
    )
