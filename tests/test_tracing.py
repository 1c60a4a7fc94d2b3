"""Tensors without values: what they say of their elements is where torch finds them."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from loratool.boxes import UntraceableError
from loratool.pieces import Piece
from loratool.slicing import as_pieces
from loratool.tracing import Traced

Sources = Mapping[str, torch.Tensor]
Step = Callable[[Any, st.DataObject], Any]


def numbered(shapes: Sequence[Sequence[int]]) -> dict[str, torch.Tensor]:
    """Tensors of which no two elements are equal."""
    found, first = {}, 0
    for number, shape in enumerate(shapes):
        size = math.prod(shape)
        found[f"source{number}"] = torch.arange(first, first + size).reshape(*shape)
        first += size
    return found


def pieces_of(traced: Traced, sources: Sources) -> tuple[Piece, ...]:
    shapes = {name: tuple(value.shape) for name, value in sources.items()}
    return as_pieces(traced.blocks, tuple(traced.shape), shapes)


def assembled(traced: Traced, sources: Sources) -> torch.Tensor:
    """Put a tensor together from its pieces; every element exactly once."""
    found = torch.full(tuple(traced.shape), -1)
    for piece in pieces_of(traced, sources):
        value = sources[piece.tensor][piece.place]
        value = value.transpose(-1, -2) if piece.transposed else value
        before = found[piece.part]
        assert before.shape == value.shape
        assert (before == -1).all()
        found[piece.part] = value
    return found


def check(operation: Callable[..., Any], *shapes: Sequence[int]) -> tuple[Piece, ...]:
    """An operation finds the same elements on traced tensors as on real ones."""
    sources = numbered(shapes)
    traced = operation(*(Traced.source(name, value.shape) for name, value in sources.items()))
    wanted = operation(*sources.values())
    if isinstance(wanted, torch.Tensor):
        traced, wanted = [traced], [wanted]
    for one, other in zip(traced, wanted, strict=True):
        assert torch.equal(assembled(one, sources), other)
    return pieces_of(traced[0], sources)


SHAPES = st.lists(st.sampled_from([1, 2, 3, 4, 6]), min_size=1, max_size=4)


def _axis(tensor: Any, data: st.DataObject) -> int:
    return data.draw(st.integers(0, tensor.ndim - 1))


def _factors(number: int, data: st.DataObject) -> list[int]:
    found = []
    while number > 1:
        divisors = [d for d in range(2, number + 1) if number % d == 0]
        found.append(data.draw(st.sampled_from(divisors)))
        number //= found[-1]
    return [*found, 1][: data.draw(st.integers(len(found), len(found) + 1))]


STEPS: Mapping[str, Callable[[Any, st.DataObject], Callable[[Any], Any]]] = {
    "transpose": lambda t, data: _with_axes(t, data, lambda x, i, j: x.transpose(i, j)),
    "reshape": lambda t, data: _reshape(_factors(t.numel(), data)),
    "flatten": lambda t, data: lambda x: x.flatten(),
    "chunk": lambda t, data: _with_axis(t, data, lambda x, i: torch.chunk(x, 2, dim=i)[0]),
    "roll": lambda t, data: _with_axis(t, data, _swap_parts),
    "double": lambda t, data: _with_axis(t, data, lambda x, i: torch.cat([x, x], dim=i)),
    "stack": lambda t, data: _with_axis(t, data, lambda x, i: torch.stack([x, x], dim=i)),
    "last": lambda t, data: _with_axis(t, data, lambda x, i: x.unbind(i)[-1]),
    "squeeze": lambda t, data: lambda x: x.squeeze().unsqueeze(0),
    "every other": lambda t, data: lambda x: x[::2],
    "every third": lambda t, data: lambda x: x[min(1, len(x) - 1) :: 3],
}


def _reshape(shape: list[int]) -> Callable[[Any], Any]:
    return lambda tensor: tensor.reshape(shape)


def _with_axis(tensor: Any, data: st.DataObject, do: Callable[..., Any]) -> Callable[[Any], Any]:
    axis = _axis(tensor, data)
    return lambda value: do(value, axis)


def _with_axes(tensor: Any, data: st.DataObject, do: Callable[..., Any]) -> Callable[[Any], Any]:
    one, other = _axis(tensor, data), _axis(tensor, data)
    return lambda value: do(value, one, other)


def _swap_parts(tensor: Any, axis: int) -> Any:
    size = tensor.shape[axis]
    parts = torch.split(tensor, [size // 3, size - size // 3], dim=axis)
    return torch.cat(parts[::-1], dim=axis)


@given(shape=SHAPES, names=st.lists(st.sampled_from(list(STEPS)), max_size=6), data=st.data())
@settings(max_examples=150, deadline=None)
def test_any_sequence_of_moves_finds_the_elements(
    shape: list[int], names: list[str], data: st.DataObject
) -> None:
    sources = numbered([shape])
    value, traced = sources["source0"], Traced.source("source0", shape)
    for name in names:
        if not value.ndim or value.numel() > 500:
            break
        move = STEPS[name](value, data)
        value = move(value)
        try:
            traced = move(traced)
        except UntraceableError:
            assume(False)
    assert torch.equal(assembled(traced, sources), value)


def test_a_tensor_itself_is_one_piece() -> None:
    assert check(lambda x: x.contiguous(), (3, 4)) == (Piece("source0"),)


def test_experts_are_a_piece_each() -> None:
    found = check(lambda *experts: torch.stack(experts), (3, 4), (3, 4))
    assert found == (Piece("source0", (0,)), Piece("source1", (1,)))


def test_halves_are_rows() -> None:
    (found,) = check(lambda x: x.chunk(2)[1], (6, 4))
    assert found == Piece("source0", (), (slice(3, 6),))


def test_a_transpose_is_one_piece() -> None:
    assert check(lambda x: x.T, (3, 4)) == (Piece("source0", transposed=True),)
    swapped = check(lambda x: x.transpose(1, 2), (2, 3, 4))
    assert swapped == (Piece("source0", transposed=True),)


def test_alternating_rows_are_two_pieces() -> None:
    found = check(lambda x: torch.cat([x[::2], x[1::2]]), (6, 4))
    assert found == (
        Piece("source0", (slice(0, 3),), (slice(0, 5, 2),)),
        Piece("source0", (slice(3, 6),), (slice(1, 6, 2),)),
    )


def test_no_cost_depends_on_the_size() -> None:
    experts = [Traced.source(f"e{i}", (1 << 20, 1 << 20)) for i in range(256)]
    fused = torch.cat([torch.stack(experts), torch.stack(experts)], dim=1)
    shapes = {f"e{i}": (1 << 20, 1 << 20) for i in range(256)}
    pieces = as_pieces(fused.blocks, tuple(fused.shape), shapes)
    assert len(pieces) == 512
    assert pieces[-1] == Piece("e255", (255, slice(1 << 20, 1 << 21)))


@pytest.mark.parametrize(
    "operation",
    [
        lambda x: 2 * x,
        lambda x: x + x,
        lambda x: x.flip(0),
        lambda x: x.half(),
        lambda x: x[torch.tensor([1, 0])],
    ],
)
def test_what_calculates_or_scatters_is_refused(operation: Callable[[Any], Any]) -> None:
    with pytest.raises(UntraceableError, match=r"torch\.\w+"):
        operation(Traced.source("a", (2, 3)))


def test_a_reshape_that_breaks_rows_is_refused() -> None:
    pair = torch.cat([Traced.source("a", (1 << 15, 3)), Traced.source("b", (1 << 15, 3))], dim=1)
    with pytest.raises(UntraceableError, match="does not keep rows together"):
        pair.reshape(3, -1)


def test_a_tensor_in_too_many_places_is_refused() -> None:
    shape = (1 << 15, 1 << 15)
    traced = Traced.source("a", shape).T.reshape(-1)
    with pytest.raises(UntraceableError, match="more than 16384 places"):
        as_pieces(traced.blocks, (1 << 30,), {"a": shape})


def convert(operation: Any, tensors: dict[str, list[Any]], targets: list[str]) -> Any:
    """One of transformers' operations, as its converters call it."""
    model = SimpleNamespace(get_parameter=lambda name: torch.empty({"q": 4, "k": 2}[name], 4))
    return operation.convert(
        dict(tensors),
        source_patterns=list(tensors),
        target_patterns=targets,
        full_layer_name=targets[0],
        model=model,
        config=SimpleNamespace(num_attention_heads=2),
        missing_keys=None,
    )


def _operations() -> dict[str, tuple[Any, list[tuple[int, ...]], list[str]]]:
    from transformers import core_model_loading as core

    return {
        "chunk": (core.Chunk(dim=0), [(6, 4)], ["q", "k"]),
        "split": (core.Split(dim=0), [(6, 4)], ["q", "k"]),
        "interleave": (core.Interleave(dim=1), [(2, 6, 4)], ["q"]),
        "interleave back": (core.Interleave(dim=0, inverse=True), [(6, 4)], ["q"]),
        "transpose": (core.Transpose(1, 2), [(2, 6, 4)], ["q"]),
        "rope": (core.PermuteForRope(), [(12, 4)], ["q"]),
        "rope of a bias": (core.PermuteForRope(), [(12,)], ["q"]),
        "convolution": (core.Conv3dToLinear(2, (2, 2, 2)), [(3, 2, 2, 2, 2)], ["q"]),
        "convolution back": (core.LinearToConv3d(2, (2, 2, 2)), [(3, 16)], ["q"]),
        "ernie": (core.ErnieFuseAndSplitTextVisionExperts(), [(3, 4)] * 4, ["q", "k"]),
    }


@pytest.mark.parametrize("name", _operations())
def test_operations_of_transformers(name: str) -> None:
    operation, shapes, targets = _operations()[name]

    def run(*tensors: Any) -> list[Any]:
        found = convert(operation, {"experts": list(tensors)}, targets)
        return [v[0] if isinstance(v, list) else v for v in found.values()]

    check(run, *shapes)


def test_a_chain_of_operations_of_transformers() -> None:
    from transformers.core_model_loading import Concatenate, MergeModulelist

    def run(*tensors: Any) -> Any:
        lists = {"gate": list(tensors[:2]), "up": list(tensors[2:])}
        merged = convert(MergeModulelist(dim=0), lists, ["gate_up"])
        return convert(Concatenate(dim=1), merged, ["gate_up"])["gate_up"]

    assert check(run, *[(3, 4)] * 4) == (
        Piece("source0", (0, slice(0, 3))),
        Piece("source1", (1, slice(0, 3))),
        Piece("source2", (0, slice(3, 6))),
        Piece("source3", (1, slice(3, 6))),
    )
