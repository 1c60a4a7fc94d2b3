"""Inputs for a graph, made up from its own signature."""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from loratool.errors import FormatError, InputError, MismatchError
from loratool.json_files import read_json
from loratool.quiet import shorten
from loratool.reports import listed
from loratool_plugins.steps.bench.graphs import Graph, Input, type_name
from loratool_plugins.steps.bench.shapes import Extent

Array = np.ndarray[Any, np.dtype[Any]]
Feeds = dict[str, Array]

DEFAULT_VOCABULARY = 1000
_LEAST_ID = 10  # lower ones are often special
_FLOATS = frozenset(
    (onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16, onnx.TensorProto.DOUBLE)
)  # fmt: skip

# What the axes of inputs mean whatever they are called, by the input's name; None: not known.
_AXES: Mapping[str, tuple[str | None, ...]] = {
    "input_ids": ("batch", "sequence"),
    "decoder_input_ids": ("batch", "sequence"),
    "token_type_ids": ("batch", "sequence"),
    "position_ids": ("batch", "sequence"),
    "cache_position": ("sequence",),
    "attention_mask": ("batch", "total"),
    "decoder_attention_mask": ("batch", "total"),
    "encoder_attention_mask": ("batch", "source"),
    "inputs_embeds": ("batch", "sequence", None),
    "encoder_hidden_states": ("batch", "source", None),
    "pixel_values": ("batch", "channels", "height", "width"),
    "input_features": ("batch", "mels", "frames"),
}
_CACHE = ("batch", None, "past", None)
# A word in the name of an axis -> what it means; the first that fits.
_WORDS = (
    ("total", "total"), ("past", "past"), ("source", "source"), ("batch", "batch"),
    ("channel", "channels"), ("height", "height"), ("width", "width"), ("mel", "mels"),
    ("frame", "frames"), ("seq", "sequence"), ("token", "sequence"), ("len", "sequence"),
)  # fmt: skip


@dataclass(frozen=True)
class Making:
    """How inputs are made up.

    Attributes:
        vocabulary: ids are below this; None for what is known of the model.
        sizes: sizes of axes by their names, as the user gave them.
        given: inputs by their names, as the user gave them.
        seed: of random values.
    """

    vocabulary: int | None = None
    sizes: Mapping[str, int] = field(default_factory=dict)
    given: Mapping[str, Array] = field(default_factory=dict)
    seed: int = 0


def read_arrays(path: Path) -> dict[str, Array]:
    """The arrays of an .npz file.

    Raises:
        InputError: it cannot be read.
        FormatError: it is none, or holds other things than arrays of numbers.
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            if isinstance(file, np.ndarray):
                raise FormatError(f"{path}: holds one array: write several by numpy.savez")
            return {name: file[name] for name in file.files}
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror or error}") from error
    except (ValueError, EOFError) as error:
        raise FormatError(f"{path}: is no .npz file of arrays ({shorten(error)})") from error


def config_of(graph: Graph) -> dict[str, Any]:
    """The config.json beside a graph, its text model's values first; {} without one.

    Raises:
        FormatError: it is not JSON.
    """
    place = graph.path.parent / "config.json"
    if not place.is_file():
        return {}
    config = read_json(place)
    parts = [config.get(key) for key in ("vision_config", "audio_config", "text_config")]
    nested = {k: v for part in parts if isinstance(part, dict) for k, v in part.items()}
    return {**nested, **config}


def vocabulary_of(graphs: Sequence[Graph]) -> int | None:
    """A number that ids have to be below for all graphs; None if nothing tells it."""
    found = [graph.vocabulary for graph in graphs]
    found += [size for g in graphs if isinstance(size := config_of(g).get("vocab_size"), int)]
    return min((size for size in found if size), default=None)


def make_feeds(graph: Graph, extent: Extent, making: Making) -> Feeds:
    """Values for every input that a graph needs; the same for graphs with the same inputs.

    Ids are random, attention masks all ones, token types zeros, positions counted on from the
    past, and everything of floating point random.

    Args:
        graph: whose inputs.
        extent: how large they are.
        making: how they are made.

    Raises:
        InputError: a value cannot be made up, or an axis is fixed to another size; all at once.
        MismatchError: an array that was given is of another type or shape.
    """
    config = config_of(graph)
    feeds: Feeds = {}
    complaints = []
    for needed in graph.needed:
        if needed.name in making.given:
            feeds[needed.name] = _given(graph, needed, making.given[needed.name])
            continue
        sizes, unknown = _sizes(needed, extent, making, config)
        if unknown:
            complaints.append(f"{needed.text}: {unknown}")
            continue
        values = _values(needed, sizes, extent, making)
        if values is None:
            complaints.append(
                f"{needed.text}: what it means is not known: give an array of that name by "
                "--inputs FILE.npz"
            )
            continue
        feeds[needed.name] = values
    if complaints:
        told = "\n  ".join(complaints)
        raise InputError(f"{graph.path}: these inputs cannot be made up:\n  {told}")
    return feeds


def require_same_inputs(graph: Graph, reference: Graph) -> None:
    """Raise MismatchError if two graphs cannot be given the same inputs."""
    own = {needed.name: needed for needed in graph.needed}
    others = {needed.name: needed for needed in reference.needed}
    complaints = []
    if missing := sorted(others.keys() - own.keys()):
        complaints.append(f"it does not take {listed(missing, 4)}")
    if surplus := sorted(own.keys() - others.keys()):
        complaints.append(f"it also needs {listed(surplus, 4)}")
    for name in sorted(own.keys() & others.keys()):
        one, other = own[name], others[name]
        same_type = one.dtype == other.dtype or {one.dtype, other.dtype} <= _FLOATS
        if not same_type or len(one.shape) != len(other.shape):
            complaints.append(f"it takes {one.text} instead of {other.text}")
    if complaints:
        raise MismatchError(
            f"{graph.path}: has other inputs than {reference.path}, so their times cannot be "
            f"compared: {'; '.join(complaints)}"
        )


def _given(graph: Graph, needed: Input, array: Array) -> Array:
    dtype = _numpy_type(needed.dtype)
    fits = len(needed.shape) == array.ndim and all(
        not isinstance(size, int) or size == found
        for size, found in zip(needed.shape, array.shape, strict=True)
    )
    if not fits or not np.can_cast(array.dtype, dtype, "same_kind"):
        raise MismatchError(
            f"--inputs: {needed.name} is {array.dtype} {array.shape}, and {graph.path} takes "
            f"{needed.text}"
        )
    return np.ascontiguousarray(array, dtype)


def _sizes(
    needed: Input, extent: Extent, making: Making, config: Mapping[str, Any]
) -> tuple[tuple[int, ...], str]:
    """The size of each axis; or what is not known of them, in words."""
    roles = _roles(needed)
    known = _known_sizes(extent, config)
    sizes: list[int] = []
    for place, (axis, role) in enumerate(zip(needed.shape, roles, strict=True)):
        wanted = known.get(role) if role else None
        if isinstance(axis, int):
            if role in ("batch", "sequence", "total") and wanted != axis:
                return (), f"axis {place} is fixed to {axis}, and --shape asks for {wanted}"
            sizes.append(axis)
        elif axis is not None and axis in making.sizes:
            sizes.append(making.sizes[axis])
        elif wanted is not None:
            sizes.append(wanted)
        else:
            name = axis or f"axis {place}"
            way = f"--dim {axis}=SIZE" if axis else "--inputs FILE.npz"
            return (), f"the size of {name} is not known: give it by {way}"
    return tuple(sizes), ""


def _roles(needed: Input) -> list[str | None]:
    """What each axis of an input means; None where that is not known."""
    rank = len(needed.shape)
    if _is_cache(needed.name) and rank == 4:
        if ".encoder." in needed.name:
            return ["batch", None, "source", None]
        return list(_CACHE)
    table = _AXES.get(needed.name, ())
    roles: list[str | None] = list(table) if len(table) == rank else [None] * rank
    for place, axis in enumerate(needed.shape):
        if roles[place] is None and isinstance(axis, str):
            text = axis.lower()
            roles[place] = next((role for word, role in _WORDS if word in text), None)
            if "past" in text and "+" in text:
                roles[place] = "total"
    if rank and roles[0] is None and rank != 1 and not isinstance(needed.shape[0], int):
        roles[0] = "batch"
    return roles


def _is_cache(name: str) -> bool:
    return name.startswith(("past_key_values.", "past_key_", "past_value_", "past."))


def _known_sizes(extent: Extent, config: Mapping[str, Any]) -> dict[str, int]:
    side = config.get("image_size")
    height, width = side if isinstance(side, list) and len(side) == 2 else (side, side)
    positions = config.get("max_source_positions")
    found = {
        "batch": extent.batch,
        "sequence": extent.sequence,
        "past": extent.past,
        "total": extent.total,
        "source": extent.source,
        "channels": config.get("num_channels", 3),
        "height": height,
        "width": width,
        "mels": config.get("num_mel_bins"),
        "frames": 2 * positions if isinstance(positions, int) else None,
    }
    return {role: size for role, size in found.items() if isinstance(size, int)}


def _values(needed: Input, sizes: tuple[int, ...], extent: Extent, making: Making) -> Array | None:
    """Values of an input; None if its meaning is not known."""
    name, dtype = needed.name, _numpy_type(needed.dtype)
    # By name, so that it does not matter which other inputs a graph has.
    generator = np.random.default_rng((making.seed, zlib.crc32(name.encode())))
    if needed.dtype in _FLOATS:
        if name.endswith("mask"):
            return np.ones(sizes, dtype)
        return generator.standard_normal(sizes, np.float32).astype(dtype)
    if dtype is None:
        return None
    if dtype == np.bool_:
        if name == "use_cache_branch":
            return np.full(sizes, extent.past > 0)
        return np.ones(sizes, dtype) if name.endswith("mask") else None
    if name.endswith("mask"):
        return np.ones(sizes, dtype)
    if name == "token_type_ids":
        return np.zeros(sizes, dtype)
    if name in ("position_ids", "cache_position"):
        positions = np.arange(extent.past, extent.past + sizes[-1], dtype=dtype)
        return np.ascontiguousarray(np.broadcast_to(positions, sizes))
    if name.endswith("input_ids"):
        end = making.vocabulary or DEFAULT_VOCABULARY
        return generator.integers(min(_LEAST_ID, end - 1), end, sizes).astype(dtype)
    return None


def _numpy_type(dtype: int) -> Any:
    """numpy's type; None where it has none."""
    if type_name(dtype) == "bfloat16":
        return None
    return onnx.helper.tensor_dtype_to_np_dtype(dtype)
