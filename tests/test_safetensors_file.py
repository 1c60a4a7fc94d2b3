"""The safetensors layout: what we write the reference implementation reads, and the reverse."""

from __future__ import annotations

import json
import math
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from loratool.dtypes import itemsize
from loratool.errors import FormatError, InputError
from loratool.safetensors_file import build_header, lazy_tensors, read_header

DTYPES = (
    "F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2", "F8_E4M3FNUZ", "F8_E5M2FNUZ", "F8_E8M0",
    "C64", "I64", "I32", "I16", "I8", "U64", "U32", "U16", "U8", "BOOL",
)  # fmt: skip
TORCH = (
    torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn,
    torch.float8_e5m2, torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool,
)  # fmt: skip
SHAPES = st.lists(st.integers(0, 5), max_size=4).map(tuple)
TEXT = st.text(max_size=12)
# Each example overwrites the same file.
FILES = settings(
    suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=150
)


def write(path: Path, header: bytes, data: bytes = b"") -> Path:
    path.write_bytes(header + data)
    return path


def raw(header: Any, data: bytes) -> bytes:
    encoded = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(encoded)) + encoded + data


@FILES
@given(
    tensors=st.lists(
        st.tuples(TEXT, st.sampled_from(DTYPES), SHAPES), max_size=6, unique_by=lambda t: t[0]
    ),
    metadata=st.dictionaries(TEXT, TEXT, max_size=3),
)
def test_headers_come_back_and_the_reference_reads_the_same(
    tensors: list[tuple[str, str, tuple[int, ...]]], metadata: dict[str, str], tmp_path: Path
) -> None:
    tensors = [tensor for tensor in tensors if tensor[0] != "__metadata__"]
    header = build_header(tensors, metadata)
    assert len(header) % 64 == 0
    size = sum(math.prod(shape) * itemsize(dtype) for _, dtype, shape in tensors)
    path = write(tmp_path / "x.safetensors", header, bytes(size))
    found = read_header(path)
    assert found.data_start == len(header)
    assert found.metadata == metadata
    assert {e.name: (e.dtype, e.shape) for e in found.entries} == {
        name: (dtype, shape) for name, dtype, shape in tensors
    }
    assert sum(e.end - e.begin for e in found.entries) == size
    # Empty tensors share their offset with a neighbour; all others keep the order.
    filled = [e.name for e in found.entries if e.end > e.begin]
    assert filled == [name for name, _, shape in tensors if math.prod(shape)]
    with safe_open(path, framework="pt") as file:
        assert sorted(file.keys()) == sorted(name for name, _, _ in tensors)
        assert (file.metadata() or {}) == metadata
        for name, dtype, shape in tensors:
            view = file.get_slice(name)
            assert (view.get_dtype(), tuple(view.get_shape())) == (dtype, shape)


@FILES
@given(
    shapes=st.dictionaries(TEXT, st.tuples(st.sampled_from(TORCH), SHAPES), max_size=5),
    seed=st.integers(0, 1000),
)
def test_values_are_those_that_the_reference_wrote(
    shapes: dict[str, tuple[torch.dtype, tuple[int, ...]]], seed: int, tmp_path: Path
) -> None:
    shapes.pop("__metadata__", None)
    generator = torch.Generator().manual_seed(seed)
    tensors = {
        name: (torch.randn(shape, generator=generator) * 50).to(dtype)
        for name, (dtype, shape) in shapes.items()
    }
    path = tmp_path / "x.safetensors"
    save_file(tensors, path)
    found = lazy_tensors(path, read_header(path))
    assert found.keys() == tensors.keys()
    for name, value in tensors.items():
        read = found[name].read()
        assert (read.dtype, read.shape) == (value.dtype, value.shape)
        assert bits(read) == bits(value)
        assert found[name].nbytes == value.numel() * value.itemsize
        if value.numel():
            assert next(found[name].blocks()).data_ptr() == read.data_ptr(), "mapped, not copied"
    reference = load_file(path)
    assert all(bits(found[name].read()) == bits(reference[name]) for name in tensors)


def bits(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def reference_accepts(path: Path) -> bool:
    try:
        with safe_open(path, framework="pt") as file:
            file.keys()
    except SafetensorError:
        return False
    return True


HONEST = raw(
    {
        "__metadata__": {"format": "pt"},
        "a": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]},
        "b.weight": {"dtype": "BF16", "shape": [4], "data_offsets": [24, 32]},
        "c": {"dtype": "U8", "shape": [0, 7], "data_offsets": [32, 32]},
    },
    bytes(32),
)
LETTERS = st.sampled_from(b'0123456789{}[]",: -.eE\\abF\x00\xff')


@settings(FILES, max_examples=600)
@given(
    edits=st.lists(st.tuples(st.integers(0, len(HONEST) - 1), LETTERS), max_size=4),
    cut=st.integers(0, len(HONEST)) | st.just(len(HONEST)),
)
def test_a_damaged_file_is_a_format_error_or_what_the_reference_accepts(
    edits: list[tuple[int, int]], cut: int, tmp_path: Path
) -> None:
    damaged = bytearray(HONEST)
    for position, letter in edits:
        damaged[position] = letter
    path = write(tmp_path / "x.safetensors", bytes(damaged[:cut]))
    try:
        header = read_header(path)
    except FormatError as error:
        assert str(path) in str(error)
        assert len(str(error)) < 1000
    else:
        assert reference_accepts(path)
        for tensor in lazy_tensors(path, header).values():
            assert tensor.read().shape == tensor.shape


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["dtype", "shape", "data_offsets", "x"]), inner, max_size=3
        )
    ),
    max_leaves=8,
)
LIES = st.fixed_dictionaries(
    {},
    optional={
        "dtype": st.sampled_from(["F32", "U8", "F99", ""]) | VALUES,
        "shape": st.lists(st.integers(-2, 9) | st.integers(), max_size=3) | VALUES,
        "data_offsets": st.lists(st.integers(-2, 40), max_size=3) | VALUES,
        "more": VALUES,
    },
)


@settings(FILES, max_examples=500)
@given(header=st.dictionaries(st.sampled_from(["a", "b", "__metadata__"]), LIES | VALUES))
def test_a_lying_header_is_a_format_error_or_what_the_reference_accepts(
    header: dict[str, Any], tmp_path: Path
) -> None:
    path = write(tmp_path / "x.safetensors", raw(header, bytes(36)))
    try:
        read_header(path)
    except FormatError as error:
        assert str(path) in str(error)
    else:
        assert reference_accepts(path)


@FILES
@given(data=st.binary(max_size=200))
def test_any_bytes_are_a_format_error(data: bytes, tmp_path: Path) -> None:
    path = write(tmp_path / "x.safetensors", data)
    try:
        read_header(path)
    except FormatError:
        return
    assert reference_accepts(path)


@pytest.mark.parametrize("constant", [math.nan, math.inf, -math.inf])
def test_numbers_that_are_no_json_are_refused(constant: float, tmp_path: Path) -> None:
    entry = {"dtype": "U8", "shape": [], "data_offsets": [0, 1], "more": constant}
    path = write(tmp_path / "x.safetensors", raw({"a": entry}, b"x"))
    assert not reference_accepts(path)
    with pytest.raises(FormatError, match="not valid JSON"):
        read_header(path)


def test_metadata_of_null_is_none_as_in_the_reference(tmp_path: Path) -> None:
    path = write(tmp_path / "x.safetensors", raw({"__metadata__": None}, b""))
    assert reference_accepts(path)
    assert read_header(path).metadata == {}


def test_tensors_at_odd_offsets_are_read(tmp_path: Path) -> None:
    header = {
        "a": {"dtype": "U8", "shape": [3], "data_offsets": [0, 3]},
        "b": {"dtype": "F64", "shape": [], "data_offsets": [3, 11]},
    }
    path = write(tmp_path / "x.safetensors", raw(header, b"abc" + struct.pack("<d", 1.5)))
    assert path.stat().st_size % 8
    found = lazy_tensors(path, read_header(path))
    assert found["b"].read().item() == 1.5
    assert found["a"].read().tolist() == list(b"abc")


def test_reading_a_view_never_changes_the_file(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    save_file({"a": torch.ones(4)}, path)
    before = path.read_bytes()
    lazy_tensors(path, read_header(path))["a"].read().add_(1)
    assert path.read_bytes() == before


def test_a_file_that_becomes_shorter_is_an_input_error(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    save_file({"a": torch.ones(4)}, path)
    tensors = lazy_tensors(path, read_header(path))
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size - 1)
    with pytest.raises(InputError, match="became shorter"):
        tensors["a"].read()
    path.unlink()
    fresh = lazy_tensors(write(path, HONEST), read_header(path))
    path.unlink()
    with pytest.raises(InputError, match="cannot be mapped"):
        fresh["a"].read()


def test_an_unreadable_file_is_an_input_error(tmp_path: Path) -> None:
    for path, reason in ((tmp_path / "none", "No such file"), (tmp_path, "Is a directory")):
        with pytest.raises(InputError, match=reason) as caught:
            read_header(path)
        assert str(path) in str(caught.value)
