"""rescale on every linear kind of update that PEFT saves; PEFT loads what it writes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import loratool
from loratool.errors import LoratoolError
from tests.peers.experts import Mixture, save_base, save_random
from tests.peers.loading import Tensors, merged_by_peft
from tests.peers.test_peft_kinds import CASES, Net, made, merge

NOT_LINEAR = [name for name in CASES if name.startswith(("dora", "ia3"))]
NOT_WRITTEN = ["lokr of Conv1d", "trained rows alone"]
LINEAR = [name for name in CASES if name not in (*NOT_LINEAR, *NOT_WRITTEN)]


def merged(base: Path, adapter: Path, place: Path, weight: float = 1.0) -> Tensors:
    loratool.merge(base, [(adapter, weight)]).save(place)
    found: Tensors = load_file(place / "base.safetensors")
    return found


def agree(found: Tensors, wanted: Tensors, tolerance: float = 2e-6) -> None:
    assert found.keys() == wanted.keys()
    for key, value in wanted.items():
        torch.testing.assert_close(found[key], value, rtol=1e-5, atol=tolerance, msg=key)


@pytest.mark.parametrize("name", LINEAR)
def test_a_strength_is_a_weight(tmp_path: Path, name: str) -> None:
    made(CASES[name], tmp_path)
    base, out = tmp_path / "base.safetensors", tmp_path / "out"
    loratool.rescale(tmp_path / "adapter", by=-0.3).save(out)
    wanted = merge(tmp_path, -0.3)
    found = merged(base, out, tmp_path / "found")
    assert all(torch.equal(found[key], value) for key, value in wanted.items())
    assert any(not torch.equal(value, load_file(base)[key]) for key, value in wanted.items())
    agree(merged_by_peft(Net(), base, out), wanted)


@pytest.mark.parametrize("name", ["all kinds of modules", "bias of lora_B", "patterns"])
def test_a_layout_keeps_the_delta(tmp_path: Path, name: str) -> None:
    wanted = made(CASES[name], tmp_path)
    for number, options in enumerate(({"normalize": True}, {"alpha": 7.0, "keep_delta": True})):
        out = tmp_path / f"out{number}"
        loratool.rescale(tmp_path / "adapter", **options).save(out)  # type: ignore[arg-type]
        agree(merged_by_peft(Net(), tmp_path / "base.safetensors", out), wanted)


@pytest.mark.parametrize("name", ["all kinds of modules", "bias of lora_B"])
def test_a_rank_cuts_each_matrix_as_well_as_can_be(tmp_path: Path, name: str) -> None:
    wanted = made(CASES[name], tmp_path)
    base, out = tmp_path / "base.safetensors", tmp_path / "out"
    loratool.rescale(tmp_path / "adapter", rank=2).save(out)
    before, found = load_file(base), merged_by_peft(Net(), base, out)
    agree(merged(base, out, tmp_path / "found"), found)
    for key, value in wanted.items():
        if value.dim() < 2:
            torch.testing.assert_close(found[key], value)
            continue
        u, sigma, v = torch.linalg.svd((value - before[key]).flatten(1).double())
        best = (u[:, :2] * sigma[:2] @ v[:2]).float().view(value.shape)
        torch.testing.assert_close(found[key] - before[key], best, rtol=1e-4, atol=3e-6)


@pytest.mark.parametrize("name", NOT_LINEAR)
def test_what_is_not_linear_is_refused(tmp_path: Path, name: str) -> None:
    made(CASES[name], tmp_path)
    kind = "DoRA update" if name.startswith("dora") else "IA3 scaling"
    with pytest.raises(LoratoolError, match=rf"\.weight.*: {kind}: .*convert --to-lora"):
        loratool.rescale(tmp_path / "adapter", by=0.5)


@pytest.mark.parametrize("name", NOT_LINEAR)
def test_by_1_writes_any_kind_again(tmp_path: Path, name: str) -> None:
    wanted = made(CASES[name], tmp_path)
    loratool.rescale(tmp_path / "adapter", by=1).save(tmp_path / "out")
    agree(merged_by_peft(Net(), tmp_path / "base.safetensors", tmp_path / "out"), wanted)


@pytest.mark.parametrize(
    ("options", "weight"),
    [({"by": -0.3}, -0.3), ({"normalize": True}, 1.0), ({"alpha": 6.0}, 2.0),
     ({"alpha": 5.0, "keep_delta": True, "by": 2.0}, 2.0)],
    ids=str,
)  # fmt: skip
def test_experts(tmp_path: Path, options: dict[str, float], weight: float) -> None:
    base, adapter = save_base(tmp_path), save_random(tmp_path / "adapter")
    loratool.rescale(adapter, **options).save(tmp_path / "out")  # type: ignore[arg-type]
    wanted = merged(base, adapter, tmp_path / "wanted", weight)
    agree(merged(base, tmp_path / "out", tmp_path / "found"), wanted)
    agree(merged_by_peft(Mixture(), base, tmp_path / "out"), wanted)
    if options == {"by": -0.3}:
        found = load_file(tmp_path / "found" / "base.safetensors")
        assert all(torch.equal(found[key], value) for key, value in wanted.items())


def test_experts_of_a_lower_rank(tmp_path: Path) -> None:
    base, adapter = save_base(tmp_path), save_random(tmp_path / "adapter")
    loratool.rescale(adapter, rank=1).save(tmp_path / "out")
    whole, before = merged_by_peft(Mixture(), base, adapter), load_file(base)
    found = merged_by_peft(Mixture(), base, tmp_path / "out")
    for key in ("experts.square", "experts.wide"):
        u, sigma, v = torch.linalg.svd((whole[key] - before[key]).double(), full_matrices=False)
        best = u[..., :1] * sigma[..., None, :1] @ v[..., :1, :]
        torch.testing.assert_close(found[key] - before[key], best.float(), rtol=1e-4, atol=3e-6)
