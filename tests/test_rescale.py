"""rescale does what was asked for, says exactly how well, and touches nothing else."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import loratool
from loratool.adapter import Adapter, LazyUpdate
from loratool.dtypes import dtype_name
from loratool.errors import InputError, MismatchError, UsageError
from loratool.linalg import RankPolicy
from loratool.lowrank import balanced, compress, decompose, singular_values, weighted
from loratool.steps.rescale import Rescale
from loratool.updates import LowRank
from tests.adapters import Factors, config, factors, stored, write_adapter

common = settings(derandomize=True, deadline=None, max_examples=40)
scales = st.sampled_from([1.0, 2.0, 16 / 3, 0.1, -0.7])
dtypes = st.sampled_from([torch.float64, torch.float32, torch.bfloat16, torch.float16])
strengths = st.floats(-8, 8).filter(lambda value: abs(value) > 1e-3)


@st.composite
def updates(draw: st.DrawFn, exact: bool = False) -> LowRank:
    out, inner, rank = (draw(st.integers(1, top)) for top in (14, 11, 6))
    dtype = torch.float64 if exact else draw(dtypes)
    b, a = factors(draw(st.integers(0, 10_000)), out, inner, rank, dtype)
    return LowRank(a, b, draw(scales))


@st.composite
def adapters(draw: st.DrawFn, exact: bool = False) -> Adapter:
    found = draw(st.lists(updates(exact), min_size=1, max_size=4))
    return adapter_of(
        {f"m{i}.weight": update for i, update in enumerate(found)}, rslora=draw(st.booleans())
    )


def adapter_of(found: Mapping[str, LowRank | None], **fields: Any) -> Adapter:
    def lazy(name: str, update: LowRank | None) -> LazyUpdate:
        assert update is not None
        shape = (update.b.shape[0], update.a.shape[1])
        dtype = dtype_name(update.a.dtype)
        return LazyUpdate(name, "low_rank", shape, dtype, lambda: update, rank=update.rank)

    return Adapter({name: lazy(name, update) for name, update in found.items()}, **fields)


def loaded(adapter: Adapter) -> dict[str, LowRank]:
    found = {name: update.load() for name, update in adapter.items()}
    return {name: update for name, update in found.items() if isinstance(update, LowRank)}


def delta(update: LowRank) -> torch.Tensor:
    return update.scale * update.b.double() @ update.a.double()


def rescaled(adapter: Adapter, **options: Any) -> dict[str, LowRank]:
    return loaded(Rescale(**options).run(adapter))


def close(one: torch.Tensor, other: torch.Tensor, tolerance: float = 1e-13) -> bool:
    return bool((one - other).norm() <= tolerance * max(one.norm(), other.norm()))


def error(found: torch.Tensor, wanted: torch.Tensor) -> float:
    norm = float(wanted.norm())
    return float((found - wanted).norm()) / norm if norm else 0.0


# ---- laws


@common
@given(adapter=adapters(), a=strengths, b=strengths)
def test_by_a_then_by_b_is_by_ab(adapter: Adapter, a: float, b: float) -> None:
    twice = rescaled(Rescale(by=a).run(adapter), by=b)
    once = rescaled(adapter, by=a * b)
    for name, update in loaded(adapter).items():
        assert torch.equal(twice[name].a, once[name].a)
        assert torch.equal(twice[name].b, once[name].b)
        assert math.isclose(twice[name].scale, once[name].scale, rel_tol=1e-15)
        assert close(delta(once[name]), a * b * delta(update))
        assert math.copysign(1, once[name].scale) == math.copysign(1, update.scale)


@common
@given(adapter=adapters())
def test_by_1_keeps_the_factors_and_by_minus_1_twice_as_well(adapter: Adapter) -> None:
    for found in (
        rescaled(adapter, by=1.0),
        rescaled(Rescale(by=-1.0).run(adapter), by=-1.0),
    ):
        for name, update in loaded(adapter).items():
            assert torch.equal(found[name].a, update.a)
            assert torch.equal(found[name].b, update.b)
            assert found[name].scale == update.scale


@common
@given(update=updates(exact=True))
def test_recompression_at_full_rank_keeps_the_product(update: LowRank) -> None:
    found = compress([weighted(update)], None)
    assert close(found.b @ found.a, delta(update))
    assert found.certificate.relative_error < 1e-6


@common
@given(adapter=adapters(), rank=st.integers(6, 20))
def test_a_rank_that_cuts_nothing_keeps_the_bytes(adapter: Adapter, rank: int) -> None:
    found = rescaled(adapter, rank=rank)
    for name, update in loaded(adapter).items():
        assert torch.equal(found[name].a, update.a)
        assert torch.equal(found[name].b, update.b)


@common
@given(update=updates(exact=True), rank=st.integers(1, 5))
def test_the_squared_error_of_truncation_is_the_sum_of_dropped_squares(
    update: LowRank, rank: int
) -> None:
    sigma = torch.linalg.svdvals(delta(update))
    (found,) = rescaled(adapter_of({"m.weight": update}), rank=rank).values()
    dropped = float(sigma[rank:].square().sum()) if rank < update.rank else 0.0
    total = float(sigma.square().sum())
    lost = float((delta(update) - delta(found)).square().sum())
    assert abs(lost - dropped) <= 1e-13 * total
    assert found.certificate is not None
    assert abs(found.certificate.relative_error**2 * total - dropped) <= 1e-12 * total


@common
@given(update=updates())
def test_singular_values_are_those_of_the_dense_matrix(update: LowRank) -> None:
    exact = torch.linalg.svdvals(delta(update))
    for sigma in (singular_values([weighted(update)]), decompose([weighted(update)])[1]):
        assert len(sigma) <= len(exact)
        assert torch.allclose(sigma, exact[: len(sigma)], rtol=0, atol=1e-12 * float(exact[0]))
        energies = sigma.square() / sigma.square().sum()
        assert math.isclose(float(energies.sum()), 1, rel_tol=1e-12)


@common
@given(adapter=adapters(exact=True))
def test_normalize_keeps_the_delta_at_one_rank_and_scale_1(adapter: Adapter) -> None:
    step = Rescale(normalize=True).run(adapter)
    assert not step.rslora
    before, after = loaded(adapter), loaded(step)
    ranks = {update.rank for update in after.values()}
    assert ranks == {max(update.rank for update in before.values())}
    assert {update.rank for update in step.values()} == ranks
    for name, update in before.items():
        assert after[name].scale == 1
        assert close(delta(after[name]), delta(update))


@common
@given(adapter=adapters(exact=True), pad=st.integers(1, 12), rank=st.sampled_from([None, 2]))
def test_pad_gives_all_at_least_a_rank(adapter: Adapter, pad: int, rank: int | None) -> None:
    plain = loaded(Rescale(normalize=True, rank=rank).run(adapter))
    step = Rescale(normalize=True, rank=rank, pad=pad).run(adapter)
    found = loaded(step)
    wanted = max(pad, *(update.rank for update in plain.values()))
    assert {update.rank for update in found.values()} == {wanted}
    assert {update.rank for update in step.values()} == {wanted}
    for name, update in plain.items():
        assert found[name].scale == 1
        assert torch.equal(delta(found[name]), delta(update))


@common
@given(adapter=adapters(exact=True))
def test_balance_keeps_the_delta_and_makes_both_sides_equally_long(adapter: Adapter) -> None:
    found = rescaled(adapter, balance=True)
    for name, update in loaded(adapter).items():
        a, b = found[name].a, found[name].b
        assert close(delta(found[name]), delta(update))
        assert torch.allclose(a.norm(dim=1), b.norm(dim=0), rtol=1e-12)
        assert math.isclose(float(a.norm()), float(b.norm()), rel_tol=1e-12)
        assert found[name].scale == update.scale


@common
@given(adapter=adapters(), alpha=st.floats(0.1, 64))
def test_alpha_alone_multiplies_the_delta(adapter: Adapter, alpha: float) -> None:
    found = rescaled(adapter, alpha=alpha)
    for name, update in loaded(adapter).items():
        divisor = math.sqrt(update.rank) if adapter.rslora else update.rank
        assert found[name].scale == alpha / divisor
        assert torch.equal(found[name].a, update.a) and torch.equal(found[name].b, update.b)
        wanted = alpha / divisor / update.scale * delta(update)
        assert close(delta(found[name]), wanted)


@common
@given(adapter=adapters(exact=True), alpha=st.floats(0.1, 64))
def test_keep_delta_writes_the_same_delta_under_another_alpha(
    adapter: Adapter, alpha: float
) -> None:
    found = rescaled(adapter, alpha=alpha, keep_delta=True)
    for name, update in loaded(adapter).items():
        divisor = math.sqrt(update.rank) if adapter.rslora else update.rank
        assert found[name].scale == alpha / divisor
        assert torch.equal(found[name].a, update.a)
        assert close(delta(found[name]), delta(update))


@common
@given(update=updates(), power=st.integers(-3, 3), rslora=st.booleans())
def test_keep_delta_is_exact_where_the_ratio_is_a_power_of_two(
    update: LowRank, power: int, rslora: bool
) -> None:
    divisor = math.sqrt(update.rank) if rslora else update.rank
    update = LowRank(update.a, update.b, 3 / divisor)
    adapter = adapter_of({"m.weight": update}, rslora=rslora)
    (found,) = rescaled(adapter, alpha=3 * 2.0**power, keep_delta=True).values()
    assert torch.equal(delta(found), delta(update))
    assert found.certificate is not None
    assert found.certificate.relative_error == 0


@common
@given(
    adapter=adapters(),
    options=st.fixed_dictionaries(
        {"by": strengths},
        optional={
            "rank": st.integers(1, 5),
            "energy": st.floats(0.5, 1),
            "ratio": st.floats(1, 50),
            "budget": st.integers(40, 4000).map(lambda size: f"{size}B"),
            "balance": st.just(True),
            "normalize": st.just(True),
            "dtype": st.sampled_from(["fp32", "fp16", "bf16"]),
        },
    ),
)
def test_every_combination_states_its_error(adapter: Adapter, options: dict[str, Any]) -> None:
    size = {name: sum(u.shape) for name, u in adapter.items()}
    width = {"fp32": 4, "fp16": 2, "bf16": 2}.get(options.get("dtype", ""), 8)
    if "budget" in options and int(options["budget"][:-1]) < width * sum(size.values()):
        del options["budget"]
    step = Rescale(**options).run(adapter)
    before, after = loaded(adapter), loaded(step)
    for name, found in after.items():
        wanted = options["by"] * delta(before[name])
        assert found.certificate is not None
        stated = found.certificate.relative_error
        assert abs(error(delta(found), wanted) - stated) <= 1e-6 + 1e-9 * stated
        assert found.rank <= options.get("rank", 6) or "rank" not in options
        assert step[name].dtype == dtype_name(found.a.dtype) == dtype_name(found.b.dtype)
        if "normalize" in options:
            assert found.scale == 1
        else:
            assert found.rank <= before[name].rank
    if "normalize" in options:
        assert len({found.rank for found in after.values()}) == 1
    if "budget" in options:
        spent = sum(found.a.nbytes + found.b.nbytes for found in after.values())
        assert spent <= int(options["budget"][:-1])


# ---- ranks


def three() -> Adapter:
    """Updates whose singular values are known."""

    def diagonal(*sigma: float) -> LowRank:
        b = torch.eye(12, len(sigma), dtype=torch.float64) * torch.tensor(sigma).double()
        return LowRank(torch.eye(len(sigma), 8, dtype=torch.float64), b, 1.0)

    return adapter_of(
        {
            "a.weight": diagonal(8.0, 4.0, 2.0, 1.0),
            "b.weight": diagonal(3.0, 3.0, 0.1),
            "c.weight": diagonal(0.05, 0.01),
        }
    )


def ranks(adapter: Adapter, **options: Any) -> list[int]:
    return [update.rank for update in rescaled(adapter, **options).values()]


@pytest.mark.parametrize(
    ("options", "wanted"),
    [
        ({"rank": 3}, [3, 3, 2]),
        ({"rank": 1}, [1, 1, 1]),
        ({"energy": 0.7}, [1, 2, 1]),
        ({"energy": 0.9}, [2, 2, 1]),
        ({"ratio": 2}, [2, 2, 1]),
        ({"ratio": 4}, [3, 2, 1]),
        ({"ratio": 4, "rank": 2}, [2, 2, 1]),
        ({"ratio": 30, "energy": 0.9}, [2, 2, 1]),
        ({"energy": 1}, [4, 3, 2]),
        ({"rank": 2, "normalize": True}, [2, 2, 2]),
        ({"ratio": 4, "normalize": True}, [3, 3, 3]),
        ({"normalize": True}, [4, 4, 4]),
        ({"budget": "160B"}, [1]),  # 160 bytes a rank
        ({"budget": "799B"}, [2, 2]),
        ({"budget": "800B"}, [3, 2]),
        ({"budget": "960B"}, [4, 2]),
        ({"budget": "960B", "rank": 3}, [3, 3]),
        ({"budget": "960B", "energy": 0.7}, [1, 2, 1]),
        ({"budget": "960B", "normalize": True}, [2, 2, 2]),
        ({"budget": "9KiB"}, [4, 3, 2]),
        ({"budget": "240B", "dtype": "fp32"}, [2, 1]),
        ({"budget": "240B", "dtype": "fp32", "by": -3.0}, [2, 1]),
    ],
)  # fmt: skip
def test_ranks_of_known_singular_values(options: dict[str, Any], wanted: list[int]) -> None:
    assert ranks(three(), **options) == wanted


def test_ranks_are_told_by_headers_where_they_can_be() -> None:
    def told(**options: Any) -> list[int | None]:
        return [update.rank for update in Rescale(**options).run(three()).values()]

    assert told(by=2.0) == [4, 3, 2]
    assert told(rank=3) == [3, 3, 2]
    assert told(rank=3, normalize=True, dtype="fp16") == [3, 3, 3]
    assert told(budget="960B", normalize=True) == [2, 2, 2]
    for options in ({"energy": 0.5}, {"budget": "1KiB"}, {"ratio": 2.0, "normalize": True}):
        assert told(**options) == [None, None, None]


def test_nothing_is_read_before_it_is_asked_for() -> None:
    def fail() -> None:
        raise AssertionError("read")

    update = LazyUpdate("m.weight", "low_rank", (5, 4), "F32", fail, rank=2)
    for options in ({"by": 2.0}, {"budget": "1KiB"}, {"energy": 0.5, "normalize": True}):
        found = Rescale(**options).run(Adapter({"m.weight": update}))
        with pytest.raises(AssertionError, match="read"):
            found["m.weight"].load()


def test_the_scale_is_kept_when_the_rank_is_not() -> None:
    update = LowRank(*reversed(factors(0, 9, 7, 4)), -2.0)
    for rslora in (False, True):
        adapter = adapter_of({"m.weight": update}, rslora=rslora)
        (found,) = rescaled(adapter, rank=2, by=3.0).values()
        assert found.scale == 6
        assert math.isclose(float(found.a.norm()), float(found.b.norm()), rel_tol=1e-6)
        (found,) = rescaled(adapter, rank=2, alpha=5.0, keep_delta=True).values()
        assert found.scale == 5 / (math.sqrt(2) if rslora else 2)


def test_padding_is_zeros() -> None:
    found = rescaled(three(), normalize=True)["c.weight"]
    assert not found.a[2:].any() and not found.b[:, 2:].any()
    assert found.certificate is not None
    assert found.certificate.rank == 4
    assert found.certificate.relative_error == 0


def test_components_that_are_zero_on_one_side_are_left_alone() -> None:
    a, b = torch.ones(2, 3), torch.tensor([[4.0, 0.0]])
    new_a, new_b = balanced(a, b)
    assert torch.equal(new_a @ torch.ones(3).double(), new_a.sum(dim=1))
    assert torch.equal(new_a[1], a[1].double())
    assert torch.equal(new_b[:, 1], b[:, 1].double())
    assert torch.allclose(new_b @ new_a, (b @ a).double())


def test_a_zero_update_stays_one_and_takes_no_budget() -> None:
    zero = LowRank(torch.ones(3, 5), torch.zeros(4, 3), 1.0)
    adapter = adapter_of({"z.weight": zero, "m.weight": LowRank(*reversed(factors(1, 6, 5, 2)))})
    for options in ({"rank": 1}, {"energy": 0.5}, {"normalize": True}, {"balance": True}):
        assert not delta(rescaled(adapter, **options)["z.weight"]).any()
    assert set(rescaled(adapter, budget="1KiB")) == {"m.weight"}
    with pytest.raises(InputError, match="all its updates are zero"):
        rescaled(adapter_of({"z.weight": zero}), budget="1KiB")


def test_a_scale_of_zero_stays_a_delta_of_zero() -> None:
    b, a = factors(0, 5, 4, 3)
    adapter = adapter_of({"m.weight": LowRank(a, b, 0.0)})
    for options in ({"by": 2.0}, {"rank": 1}, {"normalize": True},
                    {"alpha": 2.0, "keep_delta": True}):  # fmt: skip
        (found,) = rescaled(adapter, **options).values()
        assert not delta(found).any()


def test_an_extraction_that_finds_nothing_passes_through() -> None:
    b, a = factors(0, 6, 5, 3)
    nothing = LazyUpdate("n.weight", "low_rank", (4, 4), "F32", lambda: None)
    some = LazyUpdate("m.weight", "low_rank", (6, 5), "F32", lambda: LowRank(a, b))
    for options in ({"by": 2.0}, {"rank": 1}, {"normalize": True}, {"budget": "1KiB"}):
        found = Rescale(**options).run(Adapter({"n.weight": nothing, "m.weight": some}))
        assert found["n.weight"].load() is None
        assert isinstance(found["m.weight"].load(), LowRank)


# ---- files


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    modules: dict[str, Factors] = {
        "layers.0.up_proj": factors(1, 10, 8, 3),
        "layers.1.up_proj": factors(2, 10, 8, 3),
        "layers.1.down_proj": factors(3, 8, 10, 2),
    }
    path = write_adapter(
        tmp_path / "adapter",
        modules,
        {"norm.weight": torch.ones(8), "lm_head.weight": torch.ones(3, 8)},
        lora_alpha=6,
        alpha_pattern={"layers.1.up_proj": 12},
        target_modules=["up_proj", "layers.1.down_proj"],
        modules_to_save=["norm", "lm_head"],
        task_type="CAUSAL_LM",
        base_model_name_or_path="org/base",
    )
    (path / "model").mkdir()
    (path / "model" / "config.json").write_text('{"model_type": "llama"}')
    base = {"digest": "", "tensors": {"layers.0.up_proj.weight": "0123"}}
    (path / "loratool.json").write_text(json.dumps({"base": base}))
    return path


def test_by_changes_alpha_alone(folder: Path, tmp_path: Path) -> None:
    report = loratool.rescale(folder, by=0.5).save(tmp_path / "out")
    before, after = stored(folder), stored(tmp_path / "out")
    assert before.keys() == after.keys()
    assert all(torch.equal(value, after[name]) for name, value in before.items())
    found = config(tmp_path / "out")
    assert found["lora_alpha"] == 3
    assert found["alpha_pattern"] == {"layers.1.up_proj": 6}
    assert found["rank_pattern"] == {"layers.1.down_proj": 2}
    assert sorted(found["target_modules"]) == ["layers.1.down_proj", "up_proj"]
    assert found["modules_to_save"] == ["lm_head", "norm"]
    assert (found["task_type"], found["base_model_name_or_path"]) == ("CAUSAL_LM", "org/base")
    assert (tmp_path / "out" / "model" / "config.json").read_text() == '{"model_type": "llama"}'
    assert "the delta is exactly the one asked for" in report.lines
    assert any("2 tensors kept whole" in note and "scale" in note for note in report.notes)


def test_the_manifest_says_what_was_asked_and_what_is_known_of_the_base(
    folder: Path, tmp_path: Path
) -> None:
    loratool.rescale(folder, by=0.5, rank=2, dtype="fp16").save(tmp_path / "out")
    manifest = json.loads((tmp_path / "out" / "loratool.json").read_text())
    assert manifest["options"] == {"by": 0.5, "rank": 2, "dtype": "fp16"}
    assert manifest["base"]["tensors"] == {"layers.0.up_proj.weight": "0123"}
    assert len(manifest["base"]["digest"]) == 64
    assert manifest["rescaled"]["left_out"] == {}
    assert manifest["rescaled"]["energy"] < 1
    again = loratool.rescale(tmp_path / "out", by=2)
    assert again.base_digests == {"layers.0.up_proj.weight": "0123"}
    card = (tmp_path / "out" / "README.md").read_text()
    assert "rescaled by loratool: strength times 0.5, rank 2 at most, fp16 factors." in card
    assert str(tmp_path) not in card


def test_a_changed_adapter_has_no_path_and_no_files(folder: Path) -> None:
    found = loratool.rescale(folder, by=2)
    assert found.path is None
    assert found.files == {} and found.settings == {"peft_type": "LORA"}
    assert found["layers.0.up_proj.weight"].stored == ()
    assert found["norm.weight"].stored


def test_normalized_files_have_no_patterns(folder: Path, tmp_path: Path) -> None:
    report = loratool.rescale(folder, normalize=True, by=2).save(tmp_path / "out")
    found = config(tmp_path / "out")
    assert found["r"] == found["lora_alpha"] == 3
    assert found["rank_pattern"] == found["alpha_pattern"] == {}
    assert found["use_rslora"] is False
    opened, was = loratool.open_adapter(tmp_path / "out"), loratool.open_adapter(folder)
    assert not opened.problems
    for name, update in loaded(was).items():
        assert close(delta(loaded(opened)[name]), 2 * delta(update), 1e-6)
    assert any("vLLM" in note for note in report.notes)


def test_updates_that_the_budget_leaves_out_are_named_and_counted(
    folder: Path, tmp_path: Path
) -> None:
    out = loratool.rescale(folder, budget="100B")
    report = out.save(tmp_path / "out")
    opened = loratool.open_adapter(tmp_path / "out")
    assert not opened.problems
    (name,) = loaded(opened)
    assert name == "layers.1.up_proj.weight"  # it has twice the others' scale
    assert config(tmp_path / "out")["target_modules"] == ["layers.1.up_proj"]
    assert set(report.data["rescaled"]["left_out"]) == {
        "layers.0.up_proj.weight", "layers.1.down_proj.weight",
    }  # fmt: skip
    was = {name: float(delta(u).square().sum()) for name, u in loaded(
        loratool.open_adapter(folder)).items()}  # fmt: skip
    kept = float(delta(loaded(opened)[name]).square().sum()) / sum(was.values())
    assert math.isclose(report.data["rescaled"]["energy"], kept, rel_tol=1e-5)
    text = "\n".join(report.lines)
    assert "2 updates left out" in text
    assert f"{kept:.2%} of ||delta||^2" in text
    assert "72 B of the 100 B allowed" in text


@pytest.mark.parametrize(
    "options",
    [{"budget": "300B"}, {"energy": 0.8, "normalize": True}, {"alpha": 7.0, "keep_delta": True},
     {"rank": 2, "balance": True, "dtype": "bf16"}],
)  # fmt: skip
def test_executors_write_the_same_bytes(
    options: dict[str, Any], folder: Path, tmp_path: Path
) -> None:
    files = []
    for number, executor in enumerate(("serial", "threads:workers=3", "threads:workers=2")):
        out = tmp_path / str(number)
        loratool.rescale(folder, **options).save(out, executor=executor)
        files.append((out / "adapter_model.safetensors").read_bytes())
    assert len(set(files)) == 1


def test_rescaling_merges_without_being_saved(folder: Path, tmp_path: Path) -> None:
    """An adapter times -1 takes the adapter out, to the bit."""
    from safetensors.torch import load_file, save_file

    base = {
        "layers.0.up_proj.weight": torch.randn(10, 8),
        "layers.1.up_proj.weight": torch.randn(10, 8),
        "layers.1.down_proj.weight": torch.randn(8, 10),
        "norm.weight": torch.zeros(8),
        "lm_head.weight": torch.zeros(3, 8),
    }
    (tmp_path / "base").mkdir()
    save_file(base, tmp_path / "base" / "model.safetensors")
    for name in ("norm.weight", "lm_head.weight"):
        plain = stored(folder)
        del plain[f"base_model.model.{name}"]
        save_file(plain, folder / "adapter_model.safetensors")
    adapter, opposite = loratool.open_adapter(folder), loratool.rescale(folder, by=-1)
    merged = loratool.merge(tmp_path / "base", [(adapter, 1.0), (opposite, 1.0)])
    merged.save(tmp_path / "merged")
    found = load_file(tmp_path / "merged" / "model.safetensors")
    assert all(torch.equal(found[name], value) for name, value in base.items())


# ---- errors


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({}, "nothing to do"),
        ({"by": 0.0}, "other than 0"),
        ({"by": math.nan}, "finite"),
        ({"by": math.inf}, "finite"),
        ({"alpha": 0.0}, "above 0"),
        ({"alpha": -4.0}, "above 0.*--by -1"),
        ({"alpha": math.nan}, "above 0"),
        ({"keep_delta": True}, "--alpha"),
        ({"keep_delta": True, "by": 2.0}, "--alpha"),
        ({"alpha": 8.0, "by": 2.0}, "both set the strength"),
        ({"alpha": 8.0, "rank": 2}, "--alpha with --rank.*--keep-delta"),
        ({"alpha": 8.0, "budget": "1MiB"}, "--alpha with --budget"),
        ({"alpha": 8.0, "normalize": True}, "--normalize makes alpha the rank"),
        ({"alpha": 8.0, "normalize": True, "keep_delta": True}, "--normalize makes alpha"),
        ({"by": 2.0, "pad": 4}, "goes with --normalize"),
        ({"normalize": True, "pad": 0}, "from 1 up"),
        ({"normalize": True, "pad": 4, "budget": "1MiB"}, "does not go with --budget"),
        ({"rank": 0}, "rank must be at least 1"),
        ({"energy": 0.0}, "energy"),
        ({"energy": 1.5}, "energy"),
        ({"ratio": 0.5}, "ratio"),
        ({"budget": "much"}, "not a size"),
        ({"budget": "0"}, "not a size"),
        ({"budget": ""}, "not a size"),
        ({"dtype": "int8"}, "unknown dtype"),
    ],
)
def test_options_that_make_no_sense(options: dict[str, Any], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        Rescale(**options)


def test_a_budget_below_the_least_is_refused_before_anything_is_read(folder: Path) -> None:
    with pytest.raises(InputError, match=r"budget of 71 B is too small: rank 1 .* takes 72 B"):
        loratool.rescale(folder, budget="71B")
    with pytest.raises(InputError, match=r"rank 1 of every update takes 216 B"):
        loratool.rescale(folder, budget="215B", normalize=True)


def test_an_adapter_without_factors_is_refused(tmp_path: Path) -> None:
    path = write_adapter(
        tmp_path / "a", {}, {"norm.weight": torch.ones(3)}, modules_to_save=["norm"]
    )
    with pytest.raises(InputError, match=f"{path}: has no low-rank updates"):
        loratool.rescale(path, by=2)


def test_an_adapter_with_problems_is_refused_with_all_of_them(folder: Path) -> None:
    found = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**found, "rank_pattern": {}}))
    with pytest.raises(MismatchError, match=r"cannot be rescaled:\n.*layers.1.down_proj"):
        loratool.rescale(folder, by=2)


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("options", [{"by": 2.0}, {"rank": 1}, {"budget": "1KiB"}])
def test_values_that_are_not_finite_are_named(
    value: float, options: dict[str, Any], tmp_path: Path
) -> None:
    b, a = factors(0, 6, 5, 3)
    b[2, 1] = value
    path = write_adapter(tmp_path / "a", {"good": factors(1, 6, 5, 3), "bad": (b, a)})
    with pytest.raises(InputError, match=r"adapter_model.*bad.weight: lora_B holds NaN or Inf"):
        loratool.rescale(path, **options).save(tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_factors_that_overflow_are_refused_and_balanced_ones_are_not(tmp_path: Path) -> None:
    b, a = factors(0, 6, 5, 2)
    path = write_adapter(tmp_path / "a", {"m": (1e6 * b, 1e-6 * a)})
    with pytest.raises(InputError, match=r"m.weight: its factors overflow F16.*--balance"):
        loratool.rescale(path, dtype="fp16").save(tmp_path / "out")
    assert not (tmp_path / "out").exists()
    loratool.rescale(path, dtype="fp16", balance=True).save(tmp_path / "out")
    found = loaded(loratool.open_adapter(tmp_path / "out"))["m.weight"]
    assert error(delta(found), b.double() @ a.double()) < 1e-3


def test_a_file_of_another_precision_on_each_side_keeps_both(tmp_path: Path) -> None:
    b, a = factors(0, 6, 5, 2)
    path = write_adapter(tmp_path / "a", {"m": (b, a.to(torch.bfloat16))})
    loratool.rescale(path, by=2).save(tmp_path / "out")
    after = stored(tmp_path / "out")
    assert {value.dtype for value in after.values()} == {torch.float32, torch.bfloat16}


def test_one_implementation_of_rank_policies() -> None:
    """What rescale keeps is what RankPolicy chooses."""
    for policy in (RankPolicy(2), RankPolicy(None, 0.9), RankPolicy(None, None, 4.0)):
        options = {"rank": policy.rank, "energy": policy.energy, "ratio": policy.ratio}
        for name, update in loaded(three()).items():
            energies = singular_values([weighted(update)]).square()
            wanted = policy.choose(energies, float(energies.sum()), (12, 8))
            assert rescaled(three(), **options)[name].rank == min(wanted or 99, update.rank)
