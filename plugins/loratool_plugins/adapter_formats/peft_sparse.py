"""sparse.safetensors: the single entries beside the factors of a PEFT adapter.

PEFT does not know the file. For each parameter it holds `NAME.gaps`, the places of the entries
(`loratool.gaps`), `NAME.values`, one for each, and `NAME.scale` if that is not 1. Which parameters
these are is said by the metadata of the adapter's weights, so that a file that is missing is told.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loratool.adapter import LazyUpdate
from loratool.checkpoint import LazyTensor
from loratool.dtypes import is_float, itemsize
from loratool.errors import FormatError, InputError, Problem
from loratool.files import is_file
from loratool.safetensors_file import lazy_tensors, read_header
from loratool.updates import LowRank, Sparse, Update, matrix_shape
from loratool.writer import Spool, write_safetensors
from loratool_plugins.executors.serial import Serial

if TYPE_CHECKING:
    import torch

FILE = "sparse.safetensors"
KEY = "sparse"  # in what loratool keeps in the metadata of the weights

_GAP_TYPES = ("U8", "U16")
_PARTS = ("gaps", "values", "scale")

Parts = Mapping[str, LazyTensor]


def spooled(spool: Spool, name: str, update: Sparse) -> dict[str, LazyTensor]:
    """Append the single entries of an update: the tensors by their keys in the file."""
    from loratool.gaps import encoded

    if not len(update.positions):
        return {}
    parts: dict[str, torch.Tensor] = {
        f"{name}.gaps": encoded(update.positions),
        f"{name}.values": update.values,
    }
    if update.scale != 1:
        import torch

        parts[f"{name}.scale"] = torch.tensor([update.scale], dtype=torch.float64)
    return {key: spool.add(key, value) for key, value in parts.items()}


def write(folder: Path, tensors: Parts) -> None:
    """Write the file; the widest types come first, so that every tensor lies aligned."""
    order = sorted(tensors, key=lambda key: -itemsize(tensors[key].dtype))
    write_safetensors(
        folder / FILE, {key: tensors[key] for key in order}, {"format": "pt"}, Serial()
    )


def with_entries(
    path: Path, updates: Mapping[str, LazyUpdate], said: Mapping[str, Any], weights: Path
) -> tuple[dict[str, LazyUpdate], list[Problem]]:
    """The updates of an adapter with their single entries, and what is wrong with these.

    Args:
        path: the adapter's directory.
        updates: made of its factors.
        said: what the metadata of its weights keeps for loratool.
        weights: the file that says it.

    Raises:
        InputError: the file is missing, or cannot be read.
        FormatError: it, or what is said of it, is malformed.
    """
    file, names = path / FILE, said.get(KEY, [])
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise FormatError(f"{weights}: its loratool metadata is not what loratool writes")
    if not names:
        return dict(updates), _unexplained(file, weights)
    if not is_file(file):
        raise InputError(
            f"{file}: missing: by {weights.name} it holds the single entries of {len(names)} "
            f"updates ({names[0]}, ...): get the whole adapter again"
        )
    found, problems = _by_name(lazy_tensors(file, read_header(file)), names)
    result = dict(updates)
    for name in names:
        problem = _problem(name, found.get(name, {}), updates.get(name))
        if problem is not None:
            problems.append(problem)
        else:
            result[name] = _with_parts(updates[name], found[name])
    return result, problems


def _unexplained(file: Path, weights: Path) -> list[Problem]:
    if not is_file(file):
        return []
    message = (
        f"lies beside weights that say nothing of it: if {weights.name} was written anew by "
        "another program, remove it"
    )
    return [Problem("error", str(file), message)]


def _by_name(
    tensors: Mapping[str, LazyTensor], names: Sequence[str]
) -> tuple[dict[str, dict[str, LazyTensor]], list[Problem]]:
    """Parameter -> its tensors by part; problems with keys that are of none."""
    found: dict[str, dict[str, LazyTensor]] = {}
    problems = []
    known = set(names)
    for key, tensor in tensors.items():
        name, _, part = key.rpartition(".")
        if name in known and part in _PARTS:
            found.setdefault(name, {})[part] = tensor
        else:
            problems.append(Problem("error", f"{FILE}: {key}", "unexpected key"))
    return found, problems


def _problem(name: str, parts: Parts, update: LazyUpdate | None) -> Problem | None:
    """What headers show to be wrong with the single entries of an update."""

    def problem(part: str, message: str, expected: str = "", found: str = "") -> Problem:
        return Problem("error", f"{FILE}: {name}.{part}", message, expected, found)

    for part in ("gaps", "values"):
        if part not in parts:
            return problem(part, "missing")
    gaps, values, scale = parts["gaps"], parts["values"], parts.get("scale")
    if update is None or update.kind != "low_rank":
        return problem("gaps", "there are no factors of LoRA beside it")
    if gaps.dtype not in _GAP_TYPES or len(gaps.shape) != 1:
        wanted = f"a vector of {' or '.join(_GAP_TYPES)}"
        return problem("gaps", "holds no gaps", wanted, f"{gaps.dtype} {gaps.shape}")
    if not is_float(values.dtype) or len(values.shape) != 1:
        return problem("values", "holds no values", "floats", f"{values.dtype} {values.shape}")
    if scale is not None and (scale.dtype, scale.shape) != ("F64", (1,)):
        return problem("scale", "is no scale", "F64 (1,)", f"{scale.dtype} {scale.shape}")
    if not 0 < values.numel <= min(gaps.numel, math.prod(update.shape)):
        most = min(gaps.numel, math.prod(update.shape))
        return problem("values", "are not as many as there are places", f"1 to {most}",
                       str(values.numel))  # fmt: skip
    return None


def _with_parts(update: LazyUpdate, parts: Parts) -> LazyUpdate:
    stored = (*update.stored, *(parts[part] for part in _PARTS if part in parts))
    return replace(update, kind="sparse", load=_loader(update, parts), stored=stored)


def _loader(update: LazyUpdate, parts: Parts) -> Callable[[], Update | None]:
    def load() -> Update | None:
        from loratool.gaps import decoded

        added = update.load()
        if not isinstance(added, LowRank):
            raise TypeError(f"{update.name}: single entries beside {type(added).__name__}")
        positions, values = decoded(parts["gaps"].read()), parts["values"].read()
        scale = float(parts["scale"].read()) if "scale" in parts else 1.0
        for message in _faults(update, positions, values, scale):
            raise FormatError(f"{parts['gaps'].origin}: {update.name}.{message}")
        return Sparse(added, positions, values, scale)

    return load


def _faults(
    update: LazyUpdate, positions: torch.Tensor, values: torch.Tensor, scale: float
) -> Iterator[str]:
    """What is wrong with the contents."""
    rows, columns = matrix_shape(update.shape)
    if len(positions) != len(values):
        yield f"gaps: tells {len(positions)} places, but there are {len(values)} values"
    elif int(positions[-1]) >= rows * columns:
        yield f"gaps: tells place {int(positions[-1])} of a weight of {rows} x {columns} elements"
    if not math.isfinite(scale):
        yield f"scale: is {scale}"
