"""From two tensors to an update: exact differences, found equality, honest certificates."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from loratool.checkpoint import LazyTensor
from loratool.delta import DeltaReader
from loratool.dtypes import dtype_name
from loratool.errors import InputError
from loratool.linalg import RankPolicy
from loratool.updates import LowRank, Replacement
from loratool_plugins.factorizers.exact import Exact


def lazy(name: str, value: torch.Tensor) -> LazyTensor:
    def blocks() -> Iterator[torch.Tensor]:
        yield value

    return LazyTensor(name, dtype_name(value.dtype), tuple(value.shape), blocks, "file")


def reader(rank: int = 4) -> DeltaReader:
    return DeltaReader(Exact(), RankPolicy(rank), seed=0)


def pair(dtype: torch.dtype, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    base = torch.randn(24, 40, generator=generator).to(dtype)
    tuned = (base.float() + 0.1 * torch.randn(24, 40, generator=generator)).to(dtype)
    return base, tuned


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("factors", ["F32", "BF16"])
def test_the_certificate_holds_for_the_factors_as_written(dtype: torch.dtype, factors: str) -> None:
    base, tuned = pair(dtype)
    found = reader().factorize(lazy("w", base), lazy("w", tuned), False, factors)
    assert isinstance(found, LowRank) and found.certificate is not None
    delta = tuned.double() - base.double()
    error = (delta - found.b.double() @ found.a.double()).norm() / delta.norm()
    assert found.certificate.relative_error == pytest.approx(float(error), rel=1e-3)
    assert found.certificate.total == pytest.approx(float(delta.square().sum()), rel=1e-6)


def test_a_transposed_weight_gives_the_transposed_update() -> None:
    base, tuned = pair(torch.float32)
    plain = reader().factorize(lazy("w", base), lazy("w", tuned), False, "F32")
    turned = reader().factorize(lazy("w", base.T), lazy("w", tuned.T), True, "F32")
    assert plain is not None and turned is not None
    assert turned.b.shape == plain.b.shape
    assert torch.allclose(turned.b @ turned.a, plain.b @ plain.a, atol=1e-5)


def test_equal_tensors_need_no_update() -> None:
    base, _ = pair(torch.bfloat16)
    assert reader().factorize(lazy("w", base), lazy("w", base.clone()), False, "F32") is None
    assert reader().replace(lazy("w", base), lazy("w", base.clone())) is None


def test_the_same_values_in_another_dtype_need_no_update() -> None:
    """A merge writes the base's type: nothing of a replacement by equal values would be left."""
    base, _ = pair(torch.bfloat16)
    assert reader().factorize(lazy("w", base), lazy("w", base.float()), False, "F32") is None
    assert reader().replace(lazy("w", base), lazy("w", base.float())) is None


def test_replacements_say_how_much_changed() -> None:
    base, tuned = pair(torch.float32)
    found = reader().replace(lazy("w", base), lazy("w", tuned))
    assert isinstance(found, Replacement)
    expected = float((tuned - base).norm() / base.norm())
    assert found.relative_norm == pytest.approx(expected, rel=1e-5)
    new = reader().replace(None, lazy("head", tuned))
    assert new is not None and new.relative_norm is None


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("side", ["base", "tuned"])
def test_nan_and_inf_are_named(bad: float, side: str) -> None:
    base, tuned = pair(torch.float32)
    (base if side == "base" else tuned)[3, 4] = bad
    for work in (
        lambda: reader().factorize(lazy("layer.w", base), lazy("layer.w", tuned), False, "F32"),
        lambda: reader().replace(lazy("layer.w", base), lazy("layer.w", tuned)),
    ):
        with pytest.raises(InputError, match=r"file: layer\.w: holds NaN or Inf"):
            work()


def test_digests_name_what_was_read() -> None:
    base, tuned = pair(torch.float32)
    one, other = reader(), reader()
    one.factorize(lazy("w", base), lazy("w", tuned), False, "F32")
    other.replace(lazy("w", base), lazy("w", tuned))
    assert one.base_digests() == other.base_digests() != one.tuned_digests()


def test_matrices_that_hold_the_same_values_are_recognised() -> None:
    base, tuned = pair(torch.float32)
    found = reader()
    for name in ("head", "embedding"):
        found.replace(lazy(name, base), lazy(name, tuned))
    found.replace(lazy("other", base), lazy("other", base + 1))
    assert found.duplicates() == [["embedding", "head"]]
