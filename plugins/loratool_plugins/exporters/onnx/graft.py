"""A merged ONNX model out of the base's: its graph, with other values where adapters change them.

Nothing is traced and no model code is run. The base's initializers are matched to the checkpoint's
tensors by content (`matching`); those that adapters change are written to a file of their own, and
everything else stays what it is: the nodes, and the base's external data.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import onnx
import torch
from onnx import TensorProto

from loratool.checkpoint import Checkpoint, LazyTensor
from loratool.digests import TensorDigest, combine_digests, file_digest
from loratool.dtypes import dtype_name
from loratool.engine import run_facts
from loratool.errors import MismatchError, Problem, VerificationError, some
from loratool.plugins import Executor
from loratool.reports import Report, counted, format_bytes, format_share
from loratool.skeleton import build_skeleton
from loratool.writer import tensor_bytes
from loratool_plugins.exporters.onnx.base_graph import (
    BaseGraph,
    Initializer,
    all_graphs,
    open_graph,
)
from loratool_plugins.exporters.onnx.grafts import Names, Shared, Workplace, adding
from loratool_plugins.exporters.onnx.loading import loads
from loratool_plugins.exporters.onnx.matching import Layout, Library
from loratool_plugins.exporters.onnx.origins import Origin, assemble
from loratool_plugins.exporters.onnx.placement import Placed, place
from loratool_plugins.exporters.onnx.quantized_weights import QuantizedWeight, quantized_weights

_ALIGNMENT = 64
# Initializers inside the graph's file that are larger than this move to the shared file.
_INLINE_BYTES = 1024
# If more than this share of the weights that should match do not, the graph is another model's.
_MOST_FOREIGN = 0.1
_SHOWN = 4
_CURE = "export the merged model instead (leave --graft out)"


@dataclass(frozen=True)
class Patch:
    """An initializer of the grafted graph with values of its own.

    Attributes:
        name: in the grafted graph.
        initializer: the base's, whose place or some of whose uses it takes.
        origin: what it is made of.
        uses: numbers of the uses that take it; None for all, under the old name.
        offset: of its values in the data file.
    """

    name: str
    initializer: Initializer
    origin: Origin
    uses: frozenset[int] | None
    offset: int

    @property
    def nbytes(self) -> int:
        """Size of its values."""
        return self.initializer.numel * self.initializer.dtype.itemsize


@dataclass(frozen=True)
class Graft:
    """What is to be written; nothing of it was computed.

    Attributes:
        graph: the base's.
        base: tensors that the graph was exported from.
        merged: the same, merged.
        changed: the tensors that differ.
        patches: the initializers that get other values, in the order of the data file.
        matched: initializers that were recognised, and how many hold weights at all.
        share: of the graph's weights, by elements, that were recognised.
        notes: what the user should hear.
    """

    graph: BaseGraph = field(repr=False)
    base: Mapping[str, LazyTensor] = field(repr=False)
    merged: Mapping[str, LazyTensor] = field(repr=False)
    changed: tuple[str, ...]
    patches: tuple[Patch, ...]
    matched: tuple[int, int]
    share: float
    notes: tuple[str, ...] = ()

    @property
    def nbytes(self) -> int:
        """Bytes of the data file."""
        return self.patches[-1].offset + self.patches[-1].nbytes if self.patches else 0


def plan_graft(path: Path, base: Checkpoint, merged: Checkpoint) -> Graft:
    """Find out what of an ONNX file changes when its checkpoint is merged with adapters.

    Every initializer is compared with the checkpoint at some dozens of places; those that change
    are compared whole when they are written.

    Args:
        path: the base's ONNX file.
        base: the checkpoint that it was exported from, under the names that `merged` has.
        merged: the same with adapters.

    Raises:
        InputError: the file cannot be read or is damaged.
        MismatchError: it is not of this base; or something that the adapters change is not in it,
            or cannot be told from something else; all complaints at once.
    """
    graph = open_graph(path)
    base = _as_merged(base, merged)
    tensors, changed = _changes(base, merged)
    floats = [i for i in graph.initializers.values() if i.is_float]
    library = Library(tensors)
    layouts = {i.name: found for i in floats if (found := library.match(i)) is not None}
    problems = [*_class_problems(base, merged, layouts), *_shape_problems(tensors, merged, changed)]
    present = {name for layout in layouts.values() for name in layout.names}
    share, foreign = _foreign(floats, layouts, tensors, present)
    if foreign and share < 1 - _MOST_FOREIGN:
        raise MismatchError(_other_checkpoint(path, base, share, foreign))
    placement = place(graph, layouts, changed)
    problems += placement.problems
    # A tensor may have the values of an initializer, and yet every use of that be another's.
    placed = {n for groups in placement.placed.values() for group in groups for n in group.names}
    told = {problem.tensor for problem in problems}
    quantized = list(quantized_weights(graph))
    problems += [
        _missing(tensors[name], quantized) for name in changed if name not in placed | told
    ]
    if problems:
        lines = (f"  {problem}" for problem in problems)
        raise MismatchError("\n".join([f"{path}: cannot be grafted:", *lines]))
    patches = tuple(_patches(graph, placement.placed))
    notes = tuple(_notes(patches, foreign))
    weights = [i for i in floats if i.numel > 1]
    return Graft(
        graph, tensors, {name: merged[name] for name in changed}, changed, patches,
        (sum(i.name in layouts for i in weights), len(weights)), share, notes,
    )  # fmt: skip


def _as_merged(base: Checkpoint, merged: Checkpoint) -> Checkpoint:
    """The base's tensors under the names of a merged model whose class has other prefixes.

    Tensors that nothing was done to show how names are changed.
    """
    found = {id(tensor.blocks): name for name, tensor in merged.items()}
    names = {n: found[id(t.blocks)] for n, t in base.items() if id(t.blocks) in found}
    added = {("", new.removesuffix(old)) for old, new in names.items() if new.endswith(old)}
    removed = {(old.removesuffix(new), "") for old, new in names.items() if old.endswith(new)}
    rules = sorted(added | removed)
    for name in (name for name in base if name not in names):
        spellings = (new + name.removeprefix(old) for old, new in rules if name.startswith(old))
        names[name] = next((s for s in (name, *spellings) if s in merged), name)
    return replace(base, tensors={names[n]: t.renamed(names[n]) for n, t in base.items()})


def _changes(base: Checkpoint, merged: Checkpoint) -> tuple[dict[str, LazyTensor], tuple[str, ...]]:
    """The base's tensors, and the names of those that a merge changes.

    A tensor that nothing is done to is the base's own. One that the merge adds, and that the base
    ties to another, counts as a second name of that.
    """
    tensors = {name: tensor for name, tensor in base.items() if name in merged}
    added = [name for name in merged if name not in base]
    if added and base.config is not None:
        shapes = {name: tensor.shape for name, tensor in base.items()}
        tied = {**build_skeleton(base.config, shapes).tied, **base.aliases}
        tensors |= {n: base[tied[n]].renamed(n) for n in added if tied.get(n) in base}
    changed = tuple(n for n in tensors if n not in base or not _is_same(merged[n], base[n]))
    return tensors, changed


def _is_same(one: LazyTensor, other: LazyTensor) -> bool:
    return one.blocks is other.blocks and one.dtype == other.dtype


def _class_problems(
    base: Checkpoint, merged: Checkpoint, layouts: Mapping[str, Layout]
) -> Iterator[Problem]:
    """Tensors that the merged model has and the base has not."""
    shapes = {name: tensor.shape for name, tensor in base.items()}
    for name in merged:
        if name in base:
            continue
        tied = build_skeleton(base.config, shapes).tied if base.config is not None else {}
        if tied.get(name) not in base:
            yield Problem(
                "error", name,
                "the adapter adds it: the base has no such tensor, so that its graph has no place "
                f"for it; {_CURE}",
            )  # fmt: skip


def _shape_problems(
    tensors: Mapping[str, LazyTensor], merged: Mapping[str, LazyTensor], changed: Collection[str]
) -> Iterator[Problem]:
    for name in changed:
        old, new = tensors[name].shape, merged[name].shape
        if old != new:
            yield Problem(
                "error", name, f"the merge changes its shape, and a graph's shapes are fixed; "
                f"{_CURE}", str(list(old)), str(list(new)),
            )  # fmt: skip


def _missing(tensor: LazyTensor, quantized: Sequence[QuantizedWeight]) -> Problem:
    holder = next((weight for weight in quantized if weight.may_hold(tensor.shape)), None)
    if holder is not None and len(tensor.shape) > 1:
        reason = (
            "the adapter changes it, but the graph holds weights of this shape quantized only "
            f"({holder.scheme}: {holder.node}), where no update fits exactly: graft the base's "
            "unquantized ONNX file, and quantize the result as the base was"
        )
    elif len(tensor.shape) < 2 and not bool(tensor.read().any()):
        reason = (
            f"the base's is zero, and exporters leave zeros out: the graph does not add it; {_CURE}"
        )
    else:
        reason = (
            "the adapter changes it, but no initializer of the graph has its values, as they are, "
            f"turned, cast or beside others; {_CURE}"
        )
    return Problem("error", tensor.name, reason)


def _foreign(
    floats: Sequence[Initializer],
    layouts: Mapping[str, Layout],
    tensors: Mapping[str, LazyTensor],
    present: Collection[str],
) -> tuple[float, list[tuple[Initializer, str]]]:
    """Matrices that have the shape of a tensor which the graph lacks, but other values.

    Returns:
        The share of the elements of weights that were recognised, and these matrices with the
        first such tensor. What no tensor has the shape of is a constant of the graph.
    """
    lacking: dict[tuple[int, ...], list[str]] = {}
    for name, tensor in tensors.items():
        if name not in present and len(tensor.shape) > 1:
            lacking.setdefault(tuple(sorted(tensor.shape)), []).append(name)
    found, known = [], 0
    for initializer in floats:
        if initializer.name in layouts:
            known += initializer.numel
        elif names := lacking.get(tuple(sorted(initializer.shape))):
            found.append((initializer, names[0]))
    unknown = sum(initializer.numel for initializer, _ in found)
    return (known / (known + unknown) if known + unknown else 0.0), found


def _other_checkpoint(
    path: Path, base: Checkpoint, share: float, foreign: Sequence[tuple[Initializer, str]]
) -> str:
    shown = ", ".join(f"{i.name} (of the shape of {name})" for i, name in foreign[:_SHOWN])
    more = f" and {len(foreign) - _SHOWN} more" if len(foreign) > _SHOWN else ""
    return (
        f"{path}: was exported from another checkpoint than {base.label}: only "
        f"{format_share(share)} of its weights are there; the first that are not: {shown}{more}; "
        "give the ONNX file of this base, or the base of this ONNX file"
    )


def _patches(graph: BaseGraph, placed: Mapping[str, Sequence[Placed]]) -> Iterator[Patch]:
    """Initializers with new values, and where they go."""
    taken = {value for node in graph.model.graph.node for value in (*node.input, *node.output)}
    taken |= set(graph.initializers)
    offset = 0
    for name, groups in placed.items():
        initializer = graph.initializers[name]
        for group in groups:
            whole = len(group.uses) == len(initializer.uses)
            new = name if whole else _free_name(group, taken)
            taken.add(new)
            uses = None if whole else frozenset(use.number for use in group.uses)
            patch = Patch(new, initializer, group.layout.origin(group.names), uses, offset)
            yield patch
            offset = math.ceil((offset + patch.nbytes) / _ALIGNMENT) * _ALIGNMENT


def _free_name(group: Placed, taken: Collection[str]) -> str:
    name = wanted = next(name for name in group.names if name is not None)
    number = 0
    while name in taken:
        number += 1
        name = f"{wanted}.{number}"
    return name


def _notes(patches: Sequence[Patch], foreign: Sequence[tuple[Initializer, str]]) -> Iterator[str]:
    if split := [patch.name for patch in patches if patch.uses is not None]:
        yield (
            f"{some(split)}: the base's graph holds it once with other tensors that have the same "
            "values; it is an initializer of its own now"
        )
    if foreign:
        names = [initializer.name for initializer, _ in foreign]
        yield (
            f"{some(names)}: has the shape of a tensor of the checkpoint but other values, and "
            "stays as it is; was the graph exported from this very checkpoint?"
        )


def write_graft(
    graft: Graft,
    target: Path,
    name: str,
    executor: Executor,
    progress: Callable[[str], None] = lambda text: None,
    overwrite: bool = False,
    link: bool = False,
    facts: Mapping[str, Any] | None = None,
) -> Report:
    """Write a graft into a folder that may hold others of the same base.

    What is written is read back and compared; the graph is loaded by ONNX Runtime. To be called
    inside `single_threaded_tasks`.

    Args:
        graft: what to write.
        target: the folder: new, empty, or with grafts of the same base.
        name: of the graph: NAME.onnx and NAME.data.
        executor: runs one task an initializer.
        progress: is told each initializer's name as it is written.
        overwrite: whether a graph of this name may be replaced.
        link: whether the base's data may come as a hard link: no bytes, but `onnx.load` refuses
            files with several names, the base's own among them. ONNX Runtime does not.
        facts: what else the manifest says of this graph (its adapters).

    Raises:
        MismatchError: an initializer is not what the base's tensors give, or the folder holds
            grafts of another base.
        InputError: a value is beyond the range of the graph's type.
        OutputError: the folder holds something else, or cannot be written.
        VerificationError: what was written is not what was computed.
        UsageError: a graph cannot be called so.
    """
    started = time.monotonic()
    names = Names(name)
    shared = _shared(graft.graph)
    with adding(target, names, shared, overwrite, link, graft.nbytes) as (place, tell):
        digests = _write_data(graft, place.folder / names.data, executor, progress)
        model = _grafted(graft, names.data)
        (place.folder / names.graph).write_bytes(model.SerializeToString(deterministic=True))
        loaded = _check(graft, place, names)
        data = _entry(graft, place, names, digests, loaded) | dict(facts or {})
        data["run"] = {
            **run_facts(), "onnx": version("onnx"), "seconds": round(time.monotonic() - started, 2)
        }  # fmt: skip
        tell(data)
    return _report(graft, target, names, data, place)


def _external_name(number: int) -> str:
    """What the base's external files are called in a folder of grafts."""
    return "base.onnx.data" if number == 0 else f"base.onnx.{number}.data"


def _moved(graph: BaseGraph) -> list[Initializer]:
    """Initializers inside the base's file that are better shared."""
    return [
        found
        for found in graph.initializers.values()
        if not found.location and found.is_float and found.data.numel() >= _INLINE_BYTES
    ]


def _places_of_moved(moved: Iterable[Initializer]) -> dict[str, int]:
    """Initializer -> its offset in the shared file."""
    places, offset = {}, 0
    for initializer in moved:
        places[initializer.name] = offset
        offset = math.ceil((offset + initializer.data.numel()) / _ALIGNMENT) * _ALIGNMENT
    return places


def _shared(graph: BaseGraph) -> Shared:
    """The base's files that a folder of grafts holds once."""
    files: dict[str, Path | Callable[[Path], None]] = {
        _external_name(number): file for number, file in enumerate(graph.files.values())
    }
    moved = _moved(graph)

    def write(path: Path) -> None:
        places = _places_of_moved(moved)
        with path.open("xb") as file:
            for initializer in moved:
                file.seek(places[initializer.name])
                file.write(tensor_bytes(initializer.data))

    if moved:
        files[_external_name(len(graph.files))] = write
    return Shared(file_digest(graph.path), files)


def _write_data(
    graft: Graft, path: Path, executor: Executor, progress: Callable[[str], None]
) -> dict[str, str]:
    """Write the data file, and read it back; initializer -> digest of its values."""
    digests: dict[str, str] = {}
    handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666)
    try:
        os.truncate(handle, graft.nbytes)

        def write(patch: Patch) -> tuple[Patch, str]:
            _require_same(graft, patch)
            return patch, _write(graft, patch, handle)

        for patch, digest in executor.map(write, graft.patches):
            digests[patch.name] = digest
            progress(patch.name)
        os.fsync(handle)
    finally:
        os.close(handle)
    if graft.patches:
        _read_back(graft, path, digests)
    return digests


def _require_same(graft: Graft, patch: Patch) -> None:
    """Raise MismatchError unless the base's tensors give the base's initializer, to the bit."""
    stored, done = patch.initializer.data, 0
    for piece in assemble(patch.origin, graft.base, patch.initializer.dtype):
        new = piece.contiguous().view(torch.uint8)
        if not _equal(new, stored[done : done + new.numel()]):
            raise MismatchError(
                f"{graft.graph.path}: {patch.initializer.name}: looks like "
                f"{some(patch.origin.keys)} of the base, but differs from it in places: the graph "
                "was exported from another version of the checkpoint; give that one"
            )
        done += new.numel()
    if done != stored.numel():
        raise AssertionError(f"{patch.name}: {done} of {stored.numel()} bytes came")


def _equal(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether bytes are equal; eight at a time where they lie so that it can be done."""
    if one.numel() % 8 == 0 and other.data_ptr() % 8 == 0 and other.storage_offset() % 8 == 0:
        return torch.equal(one.view(torch.int64), other.view(torch.int64))
    return torch.equal(one, other)


def _write(graft: Graft, patch: Patch, handle: int) -> str:
    """Write an initializer's values; their digest."""
    digest = _digest(patch)
    tensors = {**graft.base, **graft.merged}
    offset = patch.offset
    for piece in assemble(patch.origin, tensors, patch.initializer.dtype):
        content = tensor_bytes(piece)
        digest.update_bytes(content)
        done = 0
        while done < len(content):
            done += os.pwrite(handle, content[done:], offset + done)
        offset += done
    if offset != patch.offset + patch.nbytes:
        raise AssertionError(f"{patch.name}: {offset - patch.offset} of {patch.nbytes} bytes came")
    return digest.hexdigest()


def _digest(patch: Patch) -> TensorDigest:
    return TensorDigest(dtype_name(patch.initializer.dtype), patch.initializer.shape)


def _read_back(graft: Graft, path: Path, digests: Mapping[str, str]) -> None:
    """Raise VerificationError unless a file holds what was computed."""
    with path.open("rb") as file:
        for patch in graft.patches:
            digest, left = _digest(patch), patch.nbytes
            file.seek(patch.offset)
            while left and (content := file.read(min(left, 1 << 24))):
                digest.update_bytes(memoryview(content))
                left -= len(content)
            if digest.hexdigest() != digests[patch.name]:
                raise VerificationError(
                    f"{path.name}: {patch.name} is not what was written; is the disk in order?"
                )


def _grafted(graft: Graft, data: str) -> onnx.ModelProto:
    """The base's model with references to the shared files and to the data file."""
    model = onnx.ModelProto()
    model.CopyFrom(graft.graph.model)
    locations = {
        location: _external_name(number) for number, location in enumerate(graft.graph.files)
    }
    inside = _external_name(len(locations))
    moved = _places_of_moved(_moved(graft.graph))
    whole = {patch.name: patch for patch in graft.patches if patch.uses is None}
    for graph in all_graphs(model.graph):
        for proto in graph.initializer:
            if proto.name in whole:
                patch = whole[proto.name]
                _refer(proto, data, patch.offset, patch.nbytes)
            elif proto.data_location == TensorProto.EXTERNAL:
                for entry in proto.external_data:
                    if entry.key == "location":
                        entry.value = locations[entry.value]
            elif proto.name in moved:
                size = graft.graph.initializers[proto.name].data.numel()
                _refer(proto, inside, moved[proto.name], size)
    _split(model, [patch for patch in graft.patches if patch.uses is not None], data)
    return model


def _refer(proto: TensorProto, location: str, offset: int, length: int) -> None:
    """Let an initializer take its values from a file."""
    for name in ("raw_data", "float_data", "int32_data", "int64_data", "double_data",
                 "uint64_data", "external_data"):  # fmt: skip
        proto.ClearField(name)
    proto.data_location = TensorProto.EXTERNAL
    for key, value in (("location", location), ("offset", offset), ("length", length)):
        entry = proto.external_data.add()
        entry.key, entry.value = key, str(value)


def _split(model: onnx.ModelProto, patches: Sequence[Patch], data: str) -> None:
    """Give some uses of an initializer one of their own."""
    names = {number: patch.name for patch in patches for number in patch.uses or ()}
    number = 0
    for graph in all_graphs(model.graph):
        for node in graph.node:
            for index, name in enumerate(node.input):
                if name:
                    if number in names:
                        node.input[index] = names[number]
                    number += 1
        number += len(graph.output)
    for patch in patches:
        proto = model.graph.initializer.add()
        proto.name = patch.name
        proto.data_type = patch.initializer.proto.data_type
        proto.dims.extend(patch.initializer.shape)
        _refer(proto, data, patch.offset, patch.nbytes)
    _drop_unused(model, {patch.initializer.name for patch in patches})


def _drop_unused(model: onnx.ModelProto, names: Collection[str]) -> None:
    """Remove initializers whose every use was given another one."""
    used = {name for g in all_graphs(model.graph) for node in g.node for name in node.input}
    used |= {output.name for g in all_graphs(model.graph) for output in g.output}
    for graph in all_graphs(model.graph):
        kept = [p for p in graph.initializer if p.name not in names or p.name in used]
        if len(kept) < len(graph.initializer):
            del graph.initializer[:]
            graph.initializer.extend(kept)


def _check(graft: Graft, place: Workplace, names: Names) -> str:
    """Open what was written as anybody would; what ONNX Runtime says of it."""
    path = place.folder / names.graph
    if not place.complete:
        return "not tried: the file system has no hard links"
    found = open_graph(path)
    for patch in graft.patches:
        if found.initializers[patch.name].location != names.data:
            raise VerificationError(f"{path.name}: {patch.name} does not refer to {names.data}")
    return loads(path, graft.graph.path)


def _entry(
    graft: Graft, place: Workplace, names: Names, digests: Mapping[str, str], loaded: str
) -> dict[str, Any]:
    files = {name: place.folder / name for name in (names.graph, names.data)}
    return {
        "loratool": version("loratool"),
        "files": {name: path.stat().st_size for name, path in files.items()},
        "digests": {names.graph: file_digest(files[names.graph])},
        "values": combine_digests(dict(digests)),
        "tensors": list(graft.changed),
        "initializers": {
            patch.name: {"bytes": patch.nbytes, "of": list(patch.origin.keys)}
            for patch in graft.patches
        },
        "split": [patch.name for patch in graft.patches if patch.uses is not None],
        "recognised": {"initializers": list(graft.matched), "share": graft.share},
        "onnxruntime": loaded,
    }


def _report(
    graft: Graft, target: Path, names: Names, data: Mapping[str, Any], place: Workplace
) -> Report:
    known, weights = graft.matched
    size = sum(data["files"].values())
    lines = [
        f"{names.graph}: {counted(len(graft.patches), 'initializer')} of "
        f"{counted(len(graft.changed), 'changed tensor')}, {format_bytes(size)}",
        f"recognised in {graft.graph.path.name}: {known} of {counted(weights, 'weight')} "
        "(every byte of what changes was compared, some dozens of places of the rest)",
        *(f"{name}: {how}" for name, how in place.shared.items()),
        f"ONNX Runtime on the CPU: {data['onnxruntime']}",
    ]
    notes = list(graft.notes)
    if "linked" in place.shared.values():
        notes.append(
            "the base's data is a hard link: onnx.load refuses files with several names, here and "
            f"beside {graft.graph.path.name}; ONNX Runtime takes them"
        )
    return Report(f"Grafted {target / names.graph}", dict(data), tuple(lines), notes=tuple(notes))
