"""Adapters as files of ONNX Runtime, for graphs with factors as optional inputs.

A file holds the two factors of every target in the graph's layout and type (`swappable.py`), the
adapter's scale and weight worked into the second. `onnxruntime.LoraAdapter` reads it, and
`loratool.runtime`.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import torch

from loratool.application import Part, bind_part, load_added
from loratool.binding import BoundUpdate
from loratool.checkpoint import Checkpoint
from loratool.errors import (
    InputError,
    MismatchError,
    Problem,
    VerificationError,
    grouped,
)
from loratool.lowrank import balanced
from loratool.quiet import shorten
from loratool.runtime import ADAPTER_SUFFIX
from loratool.updates import FACTORABLE, KIND_NAMES, NEED_BASE, LowRank
from loratool_plugins.exporters.onnx.preparation import Prepared
from loratool_plugins.exporters.onnx.swappable import Slot, adaptable, make_swappable
from loratool_plugins.exporters.onnx.weights import Graph

# The version that files are given where nobody asks for another one; ONNX Runtime ignores it.
_VERSION = 1
_FP32_BYTES = 4
_BFLOAT16 = ir.DataType.BFLOAT16


@dataclass(frozen=True)
class Swapped:
    """What a `--swappable` export has.

    Attributes:
        slots: the optional inputs of its graphs.
        parts: the adapters, bound to the tensors that the graphs are made of.
    """

    slots: Sequence[Slot] = ()
    parts: Sequence[Part] = ()


def add_slots(
    graphs: Sequence[Graph], prepared: Prepared, parts: Sequence[Part], max_rank: int | None = None
) -> Swapped:
    """Make the graphs of a base swappable for adapters; to be done before the graphs are saved.

    Args:
        graphs: as they were traced; changed in place.
        prepared: the model that they are of, without any of the adapters.
        parts: adapters bound to the base. Without any, the graphs get inputs for all weights that
            they multiply by and do nothing else with.
        max_rank: the largest rank that is allowed.

    Raises:
        MismatchError: an adapter has updates that are no plain LoRA, or of too high a rank, or of
            tensors that the graphs use in a way that nothing can be added to. All are listed, and
            the graphs are as they were.
    """
    adapter_names(parts)
    parts = [_rebound(part, prepared.tensors) for part in parts]
    _require({part.adapter.label: refusals(part, max_rank) for part in parts})
    known = adaptable(graphs)
    targets = targets_of(parts, known) if parts else adaptable(graphs, "linear")
    names: dict[str, list[str]] = {}
    for name, tensor in prepared.first_names.items():
        names.setdefault(tensor, []).append(name)
    return Swapped(make_swappable(graphs, targets, names), parts)


def _rebound(part: Part, tensors: Checkpoint) -> Part:
    """The adapter bound to a checkpoint under the names in memory, where these are others."""
    if all(name in tensors for name in part.binding.changed):
        return part
    return bind_part(part.adapter, part.weight, tensors)


def _require(problems: Mapping[str, Sequence[Problem]]) -> None:
    """Raise one MismatchError of everything that is wrong with adapters, by their labels."""
    lines = []
    for label, found in problems.items():
        if found:
            lines += [f"{label} cannot be switched per call:", *(f"  {t}" for t in grouped(found))]
    if lines:
        raise MismatchError("\n".join(lines))


def targets_of(parts: Sequence[Part], known: Collection[str]) -> list[str]:
    """The tensors that adapters change, for `make_swappable`.

    Args:
        parts: adapters bound to the base.
        known: tensors that the graphs have. Of a tied parameter that the base stores twice, only
            the copy in the graphs counts.
    """
    found: dict[str, None] = {}
    for part in parts:
        changed = part.binding.changed
        served = {id(bound.update) for name, bound in changed.items() if name in known}
        for name, bound in changed.items():
            if name in known or id(bound.update) not in served:
                found[name] = None
    return list(found)


def refusals(part: Part, max_rank: int | None = None) -> list[Problem]:
    """What of an adapter cannot be swapped in as factors, by headers only.

    Args:
        part: the adapter, bound to the base.
        max_rank: the largest rank that is allowed.
    """
    problems = [problem for bound in part.binding.changed.values() for problem in _refuse(bound)]
    for bound in part.binding.added.values():
        message = "the base lacks it, so that no graph of the base can take it"
        problems.append(Problem("error", bound.update.name, f"{message}: {_LEAVE_OUT}"))
    for bound in part.binding.changed.values():
        rank = bound.update.rank
        if bound.update.kind == "low_rank" and rank is not None:
            problems += _above(bound.update.name, rank, max_rank)
    return problems


_LEAVE_OUT = "leave it out (`loratool convert --lora-only`), or merge the adapter"


def _refuse(bound: BoundUpdate) -> Iterator[Problem]:
    update = bound.update
    kind = KIND_NAMES[update.kind]
    if update.kind == "low_rank":
        return
    if update.is_whole:
        message = f"{kind}: is set, not changed: {_LEAVE_OUT}"
    elif len(update.shape) < 2 or (update.kind == "ia3" and bound.tensor.endswith(".bias")):
        message = f"{kind} of a vector: only factors of matrices can be switched: {_LEAVE_OUT}"
    elif update.kind in FACTORABLE:
        base = " --base BASE" if update.kind in NEED_BASE else ""
        message = (
            f"{kind}: has no factors A and B alone: make plain LoRA of it first "
            f"(`loratool convert --to-lora{base}`)"
        )
    else:
        message = f"{kind}: only factors of matrices can be switched: {_LEAVE_OUT}"
    yield Problem("error", update.name, message)


def _above(name: str, rank: int, max_rank: int | None) -> Iterator[Problem]:
    if max_rank is not None and rank > max_rank:
        cure = f"cut it (`loratool rescale --rank {max_rank}`), or allow more"
        yield Problem("error", name, f"has rank {rank}, --max-rank allows {max_rank}: {cure}")


def adapter_names(parts: Sequence[Part]) -> list[str]:
    """What the adapters' files are called, after their folders or files.

    Raises:
        MismatchError: two of them have the same name.
    """
    names = [_name(part) for part in parts]
    for number, name in enumerate(names):
        if name in names[:number]:
            first = parts[names.index(name)].adapter.label
            raise MismatchError(
                f"{first} and {parts[number].adapter.label} are both called {name}: rename one"
            )
    return names


def _name(part: Part) -> str:
    """The folder's or file's name; of the Hub's `org/name@revision`, the middle part."""
    if part.adapter.path is None:
        return "adapter"
    path = Path(part.adapter.label).resolve()
    if part.adapter.label != str(part.adapter.path):
        path = path.with_name(path.name.partition("@")[0])
    return path.stem if part.adapter.path.is_file() else path.name


def write_adapters(
    parts: Sequence[Part],
    slots: Sequence[Slot],
    folder: Path,
    max_rank: int | None = None,
) -> list[dict[str, Any]]:
    """Write a file for each adapter into a folder.

    Args:
        parts: adapters bound to the base, each with its weight.
        slots: the inputs that the graphs have.
        folder: an existing directory.
        max_rank: the largest rank that is allowed.

    Returns:
        What was written, for the manifest.

    Raises:
        MismatchError: an adapter has updates that are no plain LoRA, are of too high a rank, or
            have no inputs in the graph; everything that is in the way is listed. Nothing is
            written.
        InputError: a factor holds NaN or Inf, or overflows the graph's type.
        VerificationError: a file does not read back as what was written.
    """
    names = adapter_names(parts)
    _require(
        {part.adapter.label: [*refusals(part, max_rank), *_homeless(part, slots)] for part in parts}
    )
    return [
        write_adapter(part, slots, folder / f"{name}{ADAPTER_SUFFIX}", max_rank)
        for part, name in zip(parts, names, strict=True)
    ]


def write_adapter(
    part: Part,
    slots: Sequence[Slot],
    path: Path,
    max_rank: int | None = None,
) -> dict[str, Any]:
    """Write one adapter, whole or not at all; arguments and errors as of `write_adapters`."""
    arrays: dict[str, np.ndarray[Any, Any]] = {}
    ranks: list[int] = []
    for slot in slots:
        if (bound := part.binding.changed.get(slot.tensor)) is None:
            continue
        found = load_added(bound)
        if found is None:
            continue
        if not isinstance(found, LowRank):
            raise InputError(f"{bound.update.origin}: {bound.update.name}: is no plain LoRA")
        above = list(_above(bound.update.name, found.rank, max_rank))
        _require({part.adapter.label: above})
        label = f"{bound.update.origin or part.adapter.label}: {bound.update.name}"
        a, b = factors(found, part.weight, slot, label)
        arrays |= {slot.a: a, slot.b: b}
        ranks.append(found.rank)
    if not arrays:
        raise InputError(f"{part.adapter.label}: changes nothing: there are no factors to write")
    _export(arrays, path)
    return {
        "adapter": part.adapter.label,
        "file": path.name,
        "weight": part.weight,
        "targets": len(ranks),
        "ranks": [min(ranks, default=0), max(ranks, default=0)],
        "bytes": path.stat().st_size,
    }


def factors(
    update: LowRank, weight: float, slot: Slot, label: str
) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """An update of a tensor as it is stored, in the layout of a slot.

    Factors in 16 bits are balanced first: with all of the scale in one of them, the values of the
    other would be among the few that are close to zero.

    Args:
        update: of the tensor, as the checkpoint stores it.
        weight: of the adapter.
        slot: what it is for.
        label: what errors call it.

    Returns:
        A (rows, r) and B (r, columns), C-contiguous, with weight and scale in B.

    Raises:
        InputError: the factors overflow the type.
    """
    a, b = (update.a.T, update.b.T) if slot.turned else (update.b, update.a)
    a, b = a.double(), b.double() * (weight * update.scale)
    if slot.dtype.itemsize < _FP32_BYTES:
        b, a = balanced(b, a)
    return _cast(a, slot.dtype, label), _cast(b, slot.dtype, label)


def _cast(factor: torch.Tensor, dtype: ir.DataType, label: str) -> np.ndarray[Any, Any]:
    with np.errstate(over="ignore"):
        values = factor.contiguous().numpy().astype(dtype.numpy())
    if not np.isfinite(values).all():
        name = dtype.name.lower()
        raise InputError(f"{label}: its factors overflow {name}: export with --dtype fp32")
    return values


def _homeless(part: Part, slots: Sequence[Slot]) -> list[Problem]:
    """Updates that the graph has no inputs for."""
    homes = {slot.tensor for slot in slots}
    wanted = targets_of([part], homes)
    return [
        Problem("error", name, "the graph has no inputs for its factors: export it with this one")
        for name in wanted
        if name not in homes
    ]


def _export(arrays: Mapping[str, np.ndarray[Any, Any]], path: Path) -> None:
    """Write a file beside its place, read it back, and put it there."""
    draft = path.with_name(f".{path.name}")
    values = {name: _value(array) for name, array in arrays.items()}
    written = ort.AdapterFormat()
    written.set_adapter_version(_VERSION)
    written.set_model_version(_VERSION)
    written.set_parameters(values)
    try:
        written.export_adapter(str(draft))
        _check(draft, path.name, arrays)
        with draft.open("rb") as file:
            os.fsync(file.fileno())
        draft.replace(path)
    finally:
        draft.unlink(missing_ok=True)


def _value(array: np.ndarray[Any, Any]) -> ort.OrtValue:
    if array.dtype == _BFLOAT16.numpy():  # numpy has no such type of its own
        bits = array.view(np.uint16)
        return ort.OrtValue.ortvalue_from_numpy_with_onnx_type(bits, _BFLOAT16.value)
    return ort.OrtValue.ortvalue_from_numpy(array)


def _check(draft: Path, name: str, arrays: Mapping[str, np.ndarray[Any, Any]]) -> None:
    """Have ONNX Runtime read a file.

    Raises:
        VerificationError: it refuses it, or finds other values.
    """
    try:
        ort.LoraAdapter().Load(str(draft))
        found = ort.AdapterFormat.read_adapter(str(draft)).get_parameters()
    except Exception as error:
        raise VerificationError(
            f"{name}: ONNX Runtime does not read it back: {shorten(error)}"
        ) from error
    for key, array in arrays.items():
        stored = found.get(key)
        if stored is None or tuple(stored.shape()) != array.shape or not _equal(stored, array):
            raise VerificationError(f"{name}: {key} does not read back as it was written")


def _equal(stored: Any, array: np.ndarray[Any, Any]) -> bool:
    """Whether the values are the same; numpy cannot take bf16 out again: its type is compared."""
    if stored.data_type() == "tensor(bfloat16)":
        return bool(array.dtype == _BFLOAT16.numpy())
    return np.array_equal(stored.numpy(), array)
