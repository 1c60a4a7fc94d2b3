"""Laws of fingerprints: what is read off an arrangement of them makes the same of real values."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from loratool.checkpoint import LazyTensor
from loratool.dtypes import dtype_name
from loratool.errors import InputError
from loratool.shell import Shell
from loratool_plugins.exporters.onnx.fingerprints import Fingerprints, lazily, stamp
from loratool_plugins.exporters.onnx.origins import Origin, assemble

Shape = tuple[int, ...]
Arrays = list[np.ndarray[Any, Any]]


def shell_of(shapes: Sequence[Shape], dtype: torch.dtype = torch.float32) -> Shell:
    module = torch.nn.Module()
    for number, shape in enumerate(shapes):
        values = torch.zeros((), dtype=dtype).expand(shape)
        module.register_parameter(f"p{number}", torch.nn.Parameter(values, requires_grad=False))
    return Shell("Test", module, {})


def stamped(shell: Shell) -> Fingerprints:
    return stamp(shell, {name: name for name in shell.model.state_dict()})


def prints_of(shell: Shell) -> Arrays:
    return [value.detach().to(torch.float32).numpy() for value in shell.model.parameters()]


def real(shapes: Sequence[Shape], dtype: torch.dtype) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        f"p{number}": torch.randn(shape, generator=generator).to(dtype)
        for number, shape in enumerate(shapes)
    }


def lazy(name: str, tensor: torch.Tensor) -> LazyTensor:
    return LazyTensor(
        name, dtype_name(tensor.dtype), tuple(tensor.shape), lambda: iter(torch.split(tensor, 3))
        if tensor.ndim
        else iter([tensor]),
    )  # fmt: skip


def assembled(origin: Origin, tensors: dict[str, torch.Tensor]) -> np.ndarray[Any, Any]:
    made = {name: lazy(name, tensor) for name, tensor in tensors.items()}
    pieces = list(assemble(origin, made, torch.float32))
    return torch.cat(pieces).reshape(origin.shape).numpy()


def check(
    shapes: Sequence[Shape],
    arrange: Callable[[Arrays], np.ndarray[Any, Any]],
    dtype: torch.dtype = torch.float32,
) -> Origin:
    """The law: the same arrangement of real values."""
    shell = shell_of(shapes, dtype)
    prints = stamped(shell)
    origin = prints.identify(arrange(prints_of(shell)))
    assert origin is not None
    tensors = real(shapes, dtype)
    wanted = arrange([value.to(torch.float32).numpy() for value in tensors.values()])
    assert np.array_equal(assembled(origin, tensors), wanted)
    return origin


SIZES = st.integers(1, 9)
TYPES = st.sampled_from([torch.float32, torch.float16, torch.bfloat16])


@given(st.lists(SIZES, max_size=2).map(tuple), TYPES)
def test_a_tensor_as_it_lies(shape: Shape, dtype: torch.dtype) -> None:
    assert check([(3, 5), shape, (4,)], lambda values: values[1], dtype).is_direct


@given(SIZES, SIZES, TYPES)
def test_a_transposed_matrix(rows: int, columns: int, dtype: torch.dtype) -> None:
    shapes = [(rows, columns), (columns, rows), (rows,)]
    check(shapes, lambda values: values[1].T, dtype)
    check(shapes, lambda values: np.ascontiguousarray(values[0].T), dtype)


def test_a_square_matrix_and_its_transpose_are_told_apart() -> None:
    same = check([(6, 6)], lambda values: values[0])
    turned = check([(6, 6)], lambda values: values[0].T)
    assert same.is_direct
    assert not turned.is_direct


@given(st.lists(SIZES, min_size=2, max_size=4), SIZES)
def test_transposes_side_by_side(outs: list[int], inner: int) -> None:
    shapes = [(out, inner) for out in outs]
    origin = check(shapes, lambda values: np.concatenate([v.T for v in values], axis=1))
    assert origin.keys == tuple(f"p{number}" for number in range(len(outs)))


@given(st.lists(SIZES, min_size=1, max_size=4), st.integers(0, 3), st.integers(1, 5))
def test_biases_with_zeros_between(lengths: list[int], at: int, zeros: int) -> None:
    def arrange(values: Arrays) -> np.ndarray[Any, Any]:
        place = min(at, len(values))
        return np.concatenate([*values[:place], np.zeros(zeros, np.float32), *values[place:]])

    check([(length,) for length in lengths], arrange)


@pytest.mark.parametrize("shape", [(4, 3, 3), (3, 4, 4), (2, 3, 3, 4), (5, 2, 3, 3)])
def test_permutations_of_experts_and_convolutions(shape: Shape) -> None:
    axes = list(range(len(shape)))
    check([shape], lambda values: values[0])
    check([shape], lambda values: np.swapaxes(values[0], 1, 2))
    check([shape], lambda values: np.moveaxis(values[0], 0, axes[-1]))


def test_axes_of_size_1_may_come_and_go() -> None:
    check([(7, 1, 5)], lambda values: values[0].reshape(7, 5))
    check([(7,)], lambda values: values[0].reshape(1, 7, 1))
    check([()], lambda values: values[0].reshape(1))


def test_what_is_computed_from_a_parameter_is_no_arrangement() -> None:
    shell = shell_of([(6, 4), (6,)])
    prints = stamped(shell)
    matrix, vector = prints_of(shell)
    assert prints.identify(1 + vector) is None
    assert prints.identify(matrix * 2) is None
    assert prints.identify(matrix[1:]) is None
    assert prints.identify(matrix * vector[:, None]) is None
    assert prints.identify(np.full(3, 0.5, np.float32)) is None
    assert prints.identify(np.arange(3)) is None
    assert prints.identify(np.zeros(5, np.float32)) is None


def test_tied_parameters_share_one_fingerprint_and_memory_is_that_of_an_axis() -> None:
    shell = shell_of([(1000, 1000), (1000, 1000)])
    prints = stamp(shell, {"p0": "table", "p1": "table"})
    first, second = shell.model.parameters(), shell.model.state_dict()["p1"]
    value = next(iter(first))
    assert value.data_ptr() == second.data_ptr()
    assert value.untyped_storage().nbytes() == 1000 * 4
    assert prints.identify(value.detach().numpy().T) is not None


def test_more_parameters_than_numbers_are_refused() -> None:
    with pytest.raises(InputError, match="too many parameters"):
        stamped(shell_of([(1,)] * 16000))


def test_packing_copies_no_weights() -> None:
    from transformers.exporters import onnxruntime_fusions as fusions

    shell = shell_of([(3000, 2000), (1000, 2000)])
    prints = stamped(shell)
    with lazily(prints):
        packed = fusions.np.concatenate([v.T for v in prints_of(shell)], axis=1)
        kept = fusions.np.ascontiguousarray(packed)
    assert fusions.np is np
    assert kept.shape == (2000, 4000)
    assert 0 in kept.strides
    origin = prints.identify(kept)
    assert origin is not None
    assert origin.keys == ("p0", "p1")
