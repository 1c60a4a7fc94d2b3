"""Devices: told when absent, and the way of tensors to them, run on the CPU."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from subprocess import run

import pytest
import torch

from loratool.ahead import DigestsAhead
from loratool.checkpoint import LazyTensor
from loratool.delta import DeltaReader
from loratool.devices import Staging, check_device
from loratool.dtypes import dtype_name
from loratool.errors import InputError, UsageError
from loratool.linalg import Context, RankPolicy
from loratool.steps.extract import Extract
from loratool_plugins.factorizers.krylov import Krylov


def test_the_cpu_is_always_there_and_needs_no_torch() -> None:
    code = "import sys; from loratool.devices import check_device; check_device('cpu'); "
    done = run([sys.executable, "-c", code + "print('torch' in sys.modules)"], capture_output=True)
    assert done.stdout.split() == [b"False"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="has what is to be absent")
def test_an_absent_device_is_one_clear_error() -> None:
    with pytest.raises(
        InputError, match=r"--device cuda: cannot be used here .*leave --device out"
    ):
        check_device("cuda")


@pytest.mark.parametrize("name", ["toaster", "meta", "cuda:x"])
def test_what_is_no_device_is_told(name: str) -> None:
    with pytest.raises(UsageError, match=f"--device {name}"):
        check_device(name)


def test_rows_arrive_in_order_whatever_the_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("loratool.devices._STAGED_ELEMENTS", 64)
    staging = Staging(torch.device("cpu"))
    for rows, dtype in ((5, torch.bfloat16), (40, torch.float32), (3, torch.bfloat16)):
        one, other = (torch.randn(rows, 24).to(dtype) for _ in range(2))
        there = torch.empty(2, rows, 24, dtype=dtype)
        kept = []
        with staging.stream():
            for part, (first, second) in staging.tiles(one, other):
                there[0, part], there[1, part] = first, second
                kept.append((part, first))
        assert torch.equal(there[0], one) and torch.equal(there[1], other)
        assert all(torch.equal(one[part], tile) for part, tile in kept)  # buffers are not shared


@pytest.mark.parametrize("dtypes", [(torch.bfloat16, torch.bfloat16), (torch.float32, torch.half)])
def test_a_delta_formed_over_there_is_the_delta_formed_here(
    dtypes: tuple[torch.dtype, torch.dtype], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("loratool.devices._STAGED_ELEMENTS", 1000)
    before, after = (torch.randn(70, 90).to(dtype) for dtype in dtypes)
    reader = DeltaReader(Krylov(), RankPolicy(4), seed=0)
    context = Context("w", before, after, False)
    here = reader._formed(before, after, rounded=True)
    values, rounded = here.values.clone(), here.rounded
    assert rounded is not None
    rounded = rounded.clone()
    there = reader._formed_there(Staging(torch.device("cpu")), context, rounded=True)
    assert torch.equal(there.values, values)
    assert there.rounded is not None and torch.equal(there.rounded, rounded)
    assert there.energy == pytest.approx(here.energy, rel=1e-6)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_the_factors_of_a_gpu_are_those_of_the_cpu() -> None:
    left, right = torch.randn(700, 12), torch.randn(12, 600)
    before = torch.randn(700, 600)
    after = before + left @ right / 10 + 1e-3 * torch.randn(700, 600)
    products = []
    for device in ("cpu", "cuda"):
        reader = DeltaReader(Krylov(), RankPolicy(8), seed=0, device=device)
        found = reader.factorize(lazy("w", before), lazy("w", after), False, "F32")
        assert found is not None and found.certificate is not None
        products.append(found.b @ found.a)
        kept = found.certificate.captured / found.certificate.optimum_bound
        assert kept > 0.9
    assert (products[0] - products[1]).norm() < 0.02 * products[0].norm()


def lazy(name: str, value: torch.Tensor) -> LazyTensor:
    def blocks() -> Iterator[torch.Tensor]:
        yield value

    return LazyTensor(name, dtype_name(value.dtype), tuple(value.shape), blocks, "file")


def test_extract_says_what_a_factorizer_cannot_do() -> None:
    with pytest.raises(UsageError, match="--compute: exact computes in one precision"):
        Extract(factorizer="exact", compute="bf16").run(*[None] * 2)  # type: ignore[arg-type]


def test_digests_ahead_are_the_digests(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    from loratool.safetensors_file import lazy_tensors, read_header

    path = tmp_path / "x.safetensors"
    save_file({"a": torch.randn(30, 40), "b": torch.randn(7).bfloat16(), "c": torch.empty(0)}, path)
    tensors = list(lazy_tensors(path, read_header(path)).values())
    plain = [lazy(t.name, t.read()).digest() for t in tensors]
    ahead = DigestsAhead(tensors)
    assert [ahead.digest(tensor) for tensor in tensors] == plain  # nobody runs ahead
    ahead = DigestsAhead(tensors)
    with ahead.running():
        assert [ahead.digest(tensor) for tensor in reversed(tensors)] == plain[::-1]


def test_an_error_met_ahead_reaches_who_asks() -> None:
    def raw() -> memoryview:
        raise InputError("became shorter")

    tensor = LazyTensor("w", "F32", (2, 2), lambda: iter(()), "file", raw=raw)
    ahead = DigestsAhead([tensor])
    with ahead.running(), pytest.raises(InputError, match="became shorter"):
        ahead.digest(tensor)
