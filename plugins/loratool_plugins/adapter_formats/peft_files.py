"""PEFT's weight files, and those of programs that write nearly the same, under PEFT's own keys."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loratool.checkpoint import LazyTensor
from loratool.errors import InputError, Problem
from loratool.files import is_file
from loratool.safetensors_file import lazy_tensors, read_header
from loratool_plugins.adapter_formats import _peft_dialects as dialects
from loratool_plugins.adapter_formats.peft_config import FILE as CONFIG
from loratool_plugins.checkpoint_formats.torch import load_lazily

# PEFT's names, then torchtune's.
WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin", "adapter_model.pt", "adapter_0.pt")
# With bias="all" PEFT saves the biases of modules_to_save again, under the names of its wrapper.
_WRAPPED = re.compile(r"\.(modules_to_save\.[^.]+|original_module)(?=\.)")


@dataclass(frozen=True)
class Weights:
    """What a weight file holds.

    Attributes:
        file: the file.
        tensors: by PEFT's keys.
        metadata: of its safetensors header.
        notes: in what its keys or values are another program's.
        problems: what cannot be read.
        asks_for_base: whether the order of its rows takes the base's config.
    """

    file: Path
    tensors: Mapping[str, LazyTensor]
    metadata: Mapping[str, str]
    notes: tuple[str, ...] = ()
    problems: tuple[Problem, ...] = ()
    asks_for_base: bool = False


def open_weights(
    path: Path, settings: Mapping[str, Any], base: Mapping[str, Any] | None
) -> Weights:
    """Open the weights of an adapter directory.

    Args:
        path: the directory.
        settings: of adapter_config.json.
        base: the base's config.json, if that is known.

    Raises:
        InputError: there are none, or they cannot be read.
    """
    file = next((path / name for name in WEIGHTS if is_file(path / name)), None)
    if file is None:
        raise InputError(f"{path / WEIGHTS[0]}: missing, but {CONFIG} is there")
    metadata: Mapping[str, str] = {}
    if file.suffix == ".safetensors":
        header = read_header(file)
        tensors, metadata = lazy_tensors(file, header), header.metadata
    else:
        tensors = load_lazily(file)
    if dialects.is_torchtune(tensors):
        found, problems = dialects.torchtune_as_peft(tensors, base)
        note = f"{file}: has torchtune's names"
        return Weights(file, found, metadata, (note,), tuple(problems), asks_for_base=True)
    if out_of_order := dialects.magnitudes_out_of_order(tensors, settings):
        return _torchtune_export(file, tensors, metadata, out_of_order, base)
    return _renamed(file, tensors, metadata)


def _renamed(file: Path, tensors: Mapping[str, LazyTensor], metadata: Mapping[str, str]) -> Weights:
    """Keys as they are in memory become those of files; PEFT's own stay as they are."""
    keys = [k for k in tensors if (p := _WRAPPED.sub("", k)) == k or p not in tensors]
    prefixed = [key for key in keys if dialects.PREFIX in key]
    strange = [key for key in keys if prefixed and dialects.PREFIX not in key]
    found = dialects.renamed(prefixed or keys)
    kept = {new: tensors[old] for new, old in found.keys.items()}
    kept |= {key: tensors[key] for key in strange}  # one by one without the prefix: PEFT's no more
    notes = tuple(f"{file}: {change}" for change in found.changes)
    return Weights(file, kept, metadata, notes, found.problems)


def _torchtune_export(
    file: Path,
    tensors: Mapping[str, LazyTensor],
    metadata: Mapping[str, str],
    out_of_order: tuple[str, ...],
    base: Mapping[str, Any] | None,
) -> Weights:
    """torchtune's export for PEFT, whose DoRA magnitudes of q and k are not yet in order."""
    found = dict(tensors)
    problems = []
    for key in out_of_order:
        ordered = dialects.magnitude_in_order(key, tensors[key], base)
        if isinstance(ordered, Problem):
            problems.append(ordered)
        else:
            found[key] = ordered
    note = f"{file}: torchtune's magnitudes of q and k are put in transformers' order"
    weights = _renamed(file, found, metadata)
    return Weights(
        file,
        weights.tensors,
        metadata,
        (*weights.notes, note),
        (*weights.problems, *problems),
        asks_for_base=True,
    )
