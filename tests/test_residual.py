"""The residual code: whatever was lost comes back, and it is small."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from loratool.digests import TensorDigest
from loratool.dtypes import torch_dtype
from loratool.errors import FormatError
from loratool.exact import exact_delta
from loratool.merging import Survival, merged_blocks
from loratool.residual import Decoder, Encoder, bit_patterns, distance
from loratool.reversal import NotReversible, Reversal, WayBack, restored_blocks
from loratool.rounding import Stochastic

KINDS = {"BF16": "<u2", "F16": "<u2", "F32": "<u4", "F64": "<u8", "F8_E4M3": "<u1"}


def there_and_back(base, merged, predicted, dtype: str, cut: int) -> bytes:
    """Encode in tiles, decode in tiles; the coded residual."""
    encoder = Encoder(dtype, cut)
    tiles = [slice(at, at + cut) for at in range(0, base.size, cut)]
    for tile in tiles:
        encoder.add(base[tile], merged[tile], predicted[tile].copy())
    coded = encoder.finish()
    decoder = Decoder(coded, dtype, base.size, cut)
    found = predicted.copy()
    for tile in tiles:
        decoder.restore(merged[tile], found[tile])
    decoder.finish()
    assert np.array_equal(found, base)
    return coded


@pytest.mark.parametrize("dtype", KINDS)
@given(seed=st.integers(0, 10**6), size=st.integers(1, 400), cut=st.integers(1, 500))
@settings(max_examples=25, derandomize=True, deadline=None)
def test_any_bit_patterns_come_back(dtype: str, seed: int, size: int, cut: int) -> None:
    random = np.random.default_rng(seed)
    width = np.dtype(KINDS[dtype]).itemsize
    base, merged, predicted = (
        np.frombuffer(random.bytes(size * width), KINDS[dtype]).copy() for _ in range(3)
    )
    close = random.random(size) < 0.7  # as after a real merge, most of them agree
    predicted[close] = base[close]
    there_and_back(base, merged, predicted, dtype, cut)


def merge(base: torch.Tensor, parts, dtype: str, rounder=None) -> tuple[torch.Tensor, WayBack]:
    reversal = Reversal(dtype, tuple(base.shape), base.shape[-1])
    delta = exact_delta(parts)
    blocks = merged_blocks(base, delta, dtype, Survival(), "w", rounder, reversal)
    return torch.cat([block.clone() for block in blocks]), reversal.finish()


def unmerge(merged: torch.Tensor, parts, way: WayBack) -> torch.Tensor:
    return torch.cat([b.clone() for b in restored_blocks(merged, exact_delta(parts), way)])


def bits(tensor: torch.Tensor) -> bytes:
    return bit_patterns(tensor.contiguous()).tobytes()


def factors(rows: int, columns: int, size: float, seed: int = 0, rank: int = 4):
    generator = torch.Generator().manual_seed(seed)
    a = torch.randn(rank, columns, generator=generator)
    b = torch.randn(rows, rank, generator=generator) * size / rank**0.5
    return [(b, a, 1.0)]


@pytest.mark.parametrize("dtype", ["BF16", "F16"])
@pytest.mark.parametrize("size", [1e-6, 1e-2, 1.0, 1e4, 1e38])
def test_each_of_the_65536_patterns_comes_back(dtype: str, size: float) -> None:
    every = np.arange(65536, dtype=np.uint16).view(np.int16).reshape(256, 256)
    base = torch.from_numpy(every.copy()).view(torch_dtype(dtype))
    parts = factors(256, 256, size)
    merged, way = merge(base, parts, dtype)
    assert bits(unmerge(merged, parts, way)) == bits(base)
    assert way.kept >= int((~base.isfinite()).sum())
    if size == 1e38:
        assert way.kept > int((~base.isfinite()).sum()), "nothing overflowed"


@pytest.mark.parametrize("dtype", ["F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2"])
@given(
    seed=st.integers(0, 10**6),
    size=st.floats(1e-5, 10),
    rows=st.integers(1, 40),
    columns=st.integers(1, 40),
)
@settings(max_examples=15, derandomize=True, deadline=None)
def test_merge_then_unmerge_is_the_identity_on_bits(
    dtype: str, seed: int, size: float, rows: int, columns: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    base = torch.randn(rows, columns, generator=generator).to(torch_dtype(dtype))
    parts = factors(rows, columns, size, seed, rank=3) + factors(rows, columns, size, seed + 1)
    merged, way = merge(base, parts, dtype)
    assert bits(unmerge(merged, parts[::-1], way)) == bits(base)


@pytest.mark.parametrize("dtype", ["F32", "F16", "BF16"])
def test_stochastic_rounding_is_undone_too(dtype: str) -> None:
    base = torch.randn(64, 64, generator=torch.Generator().manual_seed(0)).to(torch_dtype(dtype))
    parts = factors(64, 64, 0.01)
    rounder = Stochastic(dtype, torch.Generator().manual_seed(7))
    merged, way = merge(base, parts, dtype, rounder)
    assert bits(merged) != bits(merge(base, parts, dtype)[0])
    assert bits(unmerge(merged, parts, way)) == bits(base)


@pytest.mark.parametrize("dtype", ["F32", "F16", "BF16"])
@pytest.mark.parametrize(("ratio", "most"), [(0.01, 0.1), (0.1, 0.5)])
def test_the_residual_is_small(dtype: str, ratio: float, most: float) -> None:
    generator = torch.Generator().manual_seed(0)
    base = (0.02 * torch.randn(512, 1024, generator=generator)).to(torch_dtype(dtype))
    parts = factors(512, 1024, 0.02 * ratio, rank=16)
    _, way = merge(base, parts, dtype)
    assert 8 * len(way.residual) / base.numel() <= most


def test_a_tie_and_a_crossed_binade_are_odd_places_that_come_back() -> None:
    base = torch.tensor([[0.99609375, 1.0, 1.0078125, -0.0]], dtype=torch.bfloat16)
    delta = torch.tensor([[0.00390625, 0.00390625, 0.00390625, 0.0]])
    parts = [(torch.ones(1, 1), delta, 1.0)]
    merged, way = merge(base, parts, "BF16")
    assert bits(unmerge(merged, parts, way)) == bits(base)


@pytest.fixture(scope="module")
def coded() -> tuple[bytes, int]:
    base = torch.randn(32, 32, generator=torch.Generator().manual_seed(0)).bfloat16()
    return merge(base, factors(32, 32, 0.5), "BF16")[1].residual, base.numel()


@given(at=st.integers(0, 10**4), value=st.integers(0, 255), cut=st.integers(0, 10**4))
@settings(max_examples=150, derandomize=True, deadline=None)
def test_a_damaged_residual_is_told_or_harmless(coded, at: int, value: int, cut: int) -> None:
    whole, elements = coded
    damaged = bytearray(whole[: len(whole) - cut % 3 * (cut % len(whole))])
    if damaged:
        damaged[at % len(damaged)] = value
    try:
        decoder = Decoder(bytes(damaged), "BF16", elements, elements)
        zeros = np.zeros(elements, np.uint16)
        decoder.restore(zeros, zeros.copy())
        decoder.finish()
    except FormatError:
        pass


def test_another_delta_or_tensor_does_not_lead_back() -> None:
    base = torch.randn(32, 32, generator=torch.Generator().manual_seed(0)).bfloat16()
    parts = factors(32, 32, 0.5)
    merged, way = merge(base, parts, "BF16")
    with pytest.raises(NotReversible):
        unmerge(merged, factors(32, 32, 0.5, seed=1), way)
    edited = merged.clone()
    edited[3, 4] += 1
    with pytest.raises(NotReversible):
        unmerge(edited, parts, way)


def test_the_way_back_keeps_both_digests() -> None:
    base = torch.randn(8, 8, generator=torch.Generator().manual_seed(0))
    merged, way = merge(base, factors(8, 8, 0.5), "F32")
    for tensor, digest in ((base, way.base), (merged, way.merged)):
        found = TensorDigest("F32", (8, 8))
        found.update(tensor)
        assert found.hexdigest() == digest


def test_distance_counts_the_numbers_between() -> None:
    one = torch.tensor([1.0, 1.0, -1.0, 0.0, -0.0, 1.0], dtype=torch.bfloat16)
    other = torch.tensor([1.0, 1.015625, -1.0078125, -0.0, 0.0, -1.0], dtype=torch.bfloat16)
    assert distance(one, other).tolist() == [0, 2, 1, 1, 1, 2 * 0x3F80 + 1]
