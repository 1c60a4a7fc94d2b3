"""The laws of stacking: exact sums in any order, then merged as the parts would be."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import permutations
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import loratool
from loratool.adapter import Adapter, LazyUpdate
from loratool.checkpoint import Checkpoint, LazyTensor
from loratool.dtypes import dtype_name
from loratool.errors import InputError, MismatchError, UsageError
from loratool.kinship import require_distinct, require_same_base
from loratool.opening import open_adapter
from loratool.stack_plan import parse_layer_weight, short_names
from loratool.steps.stack import Stack
from loratool.updates import LowRank, Replacement, Update
from tests.adapters import config, factors, stored, write_adapter

law = settings(derandomize=True, deadline=None, max_examples=25)

SHAPES = {"up.weight": (10, 7), "down.weight": (7, 10), "square.weight": (8, 8)}
DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}
Deltas = dict[str, torch.Tensor]


def held(value: Update | None) -> Callable[[], Update | None]:
    return lambda: value


def lazy_tensor(name: str, tensor: torch.Tensor) -> LazyTensor:
    def blocks() -> Iterator[torch.Tensor]:
        yield tensor

    return LazyTensor(name, dtype_name(tensor.dtype), tuple(tensor.shape), blocks)


def adapter(updates: Mapping[str, LowRank | torch.Tensor | None], **fields: object) -> Adapter:
    """An adapter in memory: low-rank updates, and tensors that are replaced."""
    found = {}
    context = {}
    for name, update in updates.items():
        if isinstance(update, LowRank):
            shape = (update.b.shape[0], update.a.shape[1])
            dtype = dtype_name(update.a.dtype)
            found[name] = LazyUpdate(name, "low_rank", shape, dtype, held(update), rank=update.rank)
        elif update is not None:
            context[name] = tensor = lazy_tensor(name, update)
            found[name] = LazyUpdate(
                name, "replacement", tensor.shape, tensor.dtype, held(Replacement(tensor))
            )
    return Adapter(found, context=context, **fields)  # type: ignore[arg-type]


@st.composite
def parts(
    draw: st.DrawFn,
    least: int = 2,
    dtype: torch.dtype | None = None,
    scales: Sequence[float] = (1.0, 2.0, 16 / 3, 0.1),
) -> list[Adapter]:
    """Adapters of the same base with targets, ranks and scales of their own."""
    found = []
    for seed in range(draw(st.integers(least, 4))):
        own = dtype or draw(st.sampled_from([torch.float32, torch.bfloat16]))
        targets = draw(st.sets(st.sampled_from(sorted(SHAPES)), min_size=1))
        updates = {}
        for name in sorted(targets):
            rank = draw(st.integers(1, 5))
            b, a = factors(100 * seed + rank, *SHAPES[name], rank, own)
            updates[name] = LowRank(a, b * 2**-4, draw(st.sampled_from(scales)))
        found.append(adapter(updates))
    return found


weights = st.lists(st.sampled_from([1.0, 0.7, -0.3, 0.5, 2.0]), min_size=4, max_size=4)
exact_weights = st.lists(st.sampled_from([1.0, 0.5, -0.25, 2.0]), min_size=4, max_size=4)


def deltas(found: Adapter) -> Deltas:
    """Name -> the dense update, in fp64."""
    result = {}
    for name, update in found.items():
        low = update.load()
        assert isinstance(low, LowRank)
        result[name] = low.scale * low.b.double() @ low.a.double()
    return result


def weighted_sum(given: Sequence[tuple[Adapter, float]]) -> Deltas:
    total: Deltas = {}
    for one, weight in given:
        for name, delta in deltas(one).items():
            total[name] = total.get(name, torch.zeros_like(delta)) + weight * delta
    return total


def close(found: Deltas, wanted: Deltas, tolerance: float, size: float = 1.0) -> None:
    """The same within a share of a typical part's norm."""
    assert found.keys() == wanted.keys()
    for name, delta in wanted.items():
        assert float((found[name] - delta).norm()) <= tolerance * size, name


def size_of(given: Sequence[tuple[Adapter, float]]) -> float:
    return max(abs(w) * float(d.norm()) for a, w in given for d in deltas(a).values())


# Laws


@given(given_parts=parts(least=1), w=weights)
@law
def test_total_is_the_weighted_sum(given_parts: list[Adapter], w: list[float]) -> None:
    given = list(zip(given_parts, w, strict=False))
    found = loratool.stack(given)
    fp32 = 1e-7 * len(given)  # factors are rounded to fp32 once, unless folding is exact
    close(deltas(found), weighted_sum(given), fp32, size_of(given))
    close(deltas(loratool.stack(given, dtype="fp64")), weighted_sum(given), 1e-14, size_of(given))


@given(given_parts=parts(scales=(1.0, 0.5, 4.0)), w=exact_weights)
@law
def test_powers_of_two_fold_exactly(given_parts: list[Adapter], w: list[float]) -> None:
    given = list(zip(given_parts, w, strict=False))
    found = loratool.stack(given, dtype="fp32")
    close(deltas(found), weighted_sum(given), 1e-15, size_of(given))
    for update in found.values():
        low = update.load()
        assert isinstance(low, LowRank) and low.certificate is not None
        assert low.certificate.rounding == 0
        assert low.certificate.relative_error == 0


@given(given_parts=parts(), w=weights)
@law
def test_stacking_commutes(given_parts: list[Adapter], w: list[float]) -> None:
    given = list(zip(given_parts, w, strict=False))
    one = deltas(loratool.stack(given, dtype="fp64"))
    for order in list(permutations(given))[:6]:
        close(deltas(loratool.stack(order, dtype="fp64")), one, 1e-14, size_of(given))


@given(given_parts=parts(least=3), w=weights)
@law
def test_stacking_associates(given_parts: list[Adapter], w: list[float]) -> None:
    given = list(zip(given_parts, w, strict=False))

    def stack(given: Sequence[tuple[Adapter, float]]) -> Adapter:
        return loratool.stack(given, dtype="fp64")

    at_once = deltas(stack(given))
    left = stack([(stack(given[:2]), 1.0), *given[2:]])
    right = stack([given[0], (stack(given[1:]), 1.0)])
    for nested in (left, right):
        close(deltas(nested), at_once, 1e-14, size_of(given))


@given(given_parts=parts(least=1))
@law
def test_a_stack_of_one_is_itself(given_parts: list[Adapter]) -> None:
    one = given_parts[0]
    found = loratool.stack([(one, 1.0)])
    assert list(found) == list(one)
    for name, update in one.items():
        before, after = update.load(), found[name].load()
        assert isinstance(before, LowRank) and isinstance(after, LowRank)
        assert after.scale == before.scale
        assert after.a.dtype == before.a.dtype
        assert torch.equal(after.a, before.a) and torch.equal(after.b, before.b)


@given(given_parts=parts(), w=weights, rank=st.integers(1, 6))
@law
def test_a_recompressed_stack_is_as_far_off_as_it_says(
    given_parts: list[Adapter], w: list[float], rank: int
) -> None:
    given = list(zip(given_parts, w, strict=False))
    found = loratool.stack(given, rank=rank, dtype="fp32")
    wanted = weighted_sum(given)
    for name, update in found.items():
        low = update.load()
        assert isinstance(low, LowRank) and low.certificate is not None
        assert low.rank <= rank
        error = float((low.scale * low.b.double() @ low.a.double() - wanted[name]).norm())
        optimum = float(torch.linalg.svdvals(wanted[name])[rank:].norm())
        norm = float(wanted[name].norm())
        assert error == pytest.approx(low.certificate.relative_error * norm, abs=1e-6 * norm)
        assert error == pytest.approx(optimum, abs=1e-6 * norm)


# Merging


def base_of(dtype: torch.dtype, seed: int = 7) -> Checkpoint:
    generator = torch.Generator().manual_seed(seed)
    tensors = {
        name: torch.randn(shape, generator=generator).to(dtype) for name, shape in SHAPES.items()
    }
    return Checkpoint({name: lazy_tensor(name, tensor) for name, tensor in tensors.items()})


def merged(base: Checkpoint, given: Sequence[tuple[Adapter, float]]) -> dict[str, torch.Tensor]:
    found = loratool.merge(base, given)
    return {name: found[name].read().clone() for name in found}


def as_checkpoint(tensors: Mapping[str, torch.Tensor]) -> Checkpoint:
    return Checkpoint({name: lazy_tensor(name, tensor) for name, tensor in tensors.items()})


def units_apart(
    one: Mapping[str, torch.Tensor], other: Mapping[str, torch.Tensor], *sizes: Mapping
) -> float:
    """The largest difference in units in the last place of the larger of weight and results."""
    worst = 0.0
    for name, left in one.items():
        right = other[name]
        bits = -math.log2(torch.finfo(left.dtype).eps)
        largest = torch.stack([t[name].double().abs() for t in (one, other, *sizes)]).amax(dim=0)
        unit = 2.0 ** (largest.log2().floor() - bits)
        worst = max(worst, float(((left.double() - right.double()).abs() / unit).max()))
    return worst


@pytest.mark.parametrize("dtype", DTYPES)
@given(given_parts=parts(scales=(1.0, 0.5, 4.0)), w=exact_weights)
@law
def test_stack_then_merge_is_merging_all_at_once_to_the_bit_where_folding_is_exact(
    dtype: str, given_parts: list[Adapter], w: list[float]
) -> None:
    given = list(zip(given_parts, w, strict=False))
    base = base_of(DTYPES[dtype])
    at_once = merged(base, given)
    for order in (given, given[::-1]):
        stacked = merged(base, [(loratool.stack(order, dtype="fp32"), 1.0)])
        assert all(torch.equal(stacked[name], at_once[name]) for name in at_once)


@pytest.mark.parametrize("dtype", DTYPES)
@given(given_parts=parts(), w=weights)
@law
def test_stack_then_merge_is_merging_all_at_once_within_a_unit_in_the_last_place(
    dtype: str, given_parts: list[Adapter], w: list[float]
) -> None:
    given = list(zip(given_parts, w, strict=False))
    base = base_of(DTYPES[dtype])
    at_once = merged(base, given)
    stacked = merged(base, [(loratool.stack(given), 1.0)])
    before = {name: base[name].read() for name in base}
    # In fp32 the rounding of a factor is as large as that of the result, times the delta's size.
    largest = (
        {name: torch.full_like(before[name].double(), size_of(given)) for name in before}
        if dtype == "F32"
        else before
    )
    assert units_apart(stacked, at_once, largest) <= 1


@pytest.mark.parametrize("dtype", DTYPES)
@given(given_parts=parts(), w=weights)
@law
def test_merging_several_at_once_does_not_depend_on_their_order(
    dtype: str, given_parts: list[Adapter], w: list[float]
) -> None:
    given = list(zip(given_parts, w, strict=False))
    base = base_of(DTYPES[dtype])
    first = merged(base, given)
    for order in list(permutations(given))[1:6]:
        found = merged(base, order)
        assert all(torch.equal(found[name], first[name]) for name in first)


@pytest.mark.parametrize("dtype", ["BF16", "F16"])
@given(given_parts=parts(), w=weights)
@law
def test_merging_one_after_another_is_within_a_unit_a_merge(
    dtype: str, given_parts: list[Adapter], w: list[float]
) -> None:
    given = list(zip(given_parts, w, strict=False))
    at_once = merged(base_of(DTYPES[dtype]), given)
    steps = [{name: t.read() for name, t in base_of(DTYPES[dtype]).items()}]
    for one in given:
        steps.append(merged(as_checkpoint(steps[-1]), [one]))
    assert units_apart(steps[-1], at_once, *steps) <= len(given)


# Options


def two() -> tuple[Adapter, Adapter]:
    """Two adapters on all targets, in fp32."""
    made = []
    for seed in (1, 2):
        updates = {}
        for name, shape in SHAPES.items():
            b, a = factors(seed, *shape, 3)
            updates[name] = LowRank(a, b, 2.0)
        made.append(adapter(updates))
    return made[0], made[1]


def test_weights_by_layer_multiply_and_the_last_match_counts() -> None:
    one, other = two()
    rules = ["*=0.5", "square.weight=3", "#2:up=0", "#1:down=-1"]
    found = deltas(loratool.stack([(one, 0.5), (other, 2.0)], weights=rules, dtype="fp64"))
    first, second = deltas(one), deltas(other)
    assert torch.allclose(
        found["square.weight"], 1.5 * first["square.weight"] + 6 * second["square.weight"]
    )
    assert torch.allclose(found["up.weight"], 0.25 * first["up.weight"])
    assert torch.allclose(found["down.weight"], -0.5 * first["down.weight"] + second["down.weight"])


def test_a_weight_of_zero_leaves_out() -> None:
    one, other = two()
    found = loratool.stack([(one, 1.0), (other, 0.0)], weights=["up=0"])
    assert list(found) == ["down.weight", "square.weight"]
    assert any("its weight is 0" in note for note in found.notes)
    assert torch.equal(deltas(found)["down.weight"], deltas(one)["down.weight"])
    with pytest.raises(UsageError, match="every weight is 0"):
        loratool.stack([(one, 0.0), (other, 0.0)])
    with pytest.raises(InputError, match="every tensor has the weight 0"):
        loratool.stack([(one, 1.0)], weights=["*=0"])


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        ("up", "write GLOB=W"), ("=1", "write GLOB=W"), (":up=1", "write GLOB=W"),
        ("up=", "'' is not a number"), ("up=x", "'x' is not a number"), ("up=inf", "finite"),
        ("up=nan", "finite"),
    ],
)  # fmt: skip
def test_malformed_layer_weights_are_told_at_once(rule: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        Stack(weights=(rule,))


def test_layer_weights_that_concern_nothing_are_errors() -> None:
    one, other = two()
    with pytest.raises(InputError, match=r"'upp' matches no tensor .*up\.weight"):
        loratool.stack([(one, 1.0), (other, 1.0)], weights=["upp=0.5"])
    with pytest.raises(InputError, match="no adapter is called 'math'; they are #1, #2"):
        loratool.stack([(one, 1.0), (other, 1.0)], weights=["math:up=0.5"])
    assert parse_layer_weight("a:b:c=0.5").adapter == "a:b"


@pytest.mark.parametrize("weight", [math.nan, math.inf])
def test_weights_are_finite(weight: float) -> None:
    with pytest.raises(UsageError, match="finite"):
        loratool.stack([(two()[0], weight)])


def test_the_dtype_keeps_a_sum_exact(tmp_path: Path) -> None:
    paths = [
        write_adapter(tmp_path / str(seed), {"m": factors(seed, 6, 5, 2, torch.bfloat16)})
        for seed in (1, 2)
    ]
    exact = loratool.stack([(paths[0], 1.0), (paths[1], -0.5)])
    assert exact["m.weight"].dtype == "BF16"
    assert not any("fp32" in note for note in exact.notes)
    inexact = loratool.stack([(paths[0], 0.7), (paths[1], 0.3)])
    assert inexact["m.weight"].dtype == "F32"
    assert any("--dtype bf16" in note for note in inexact.notes)
    rounded = loratool.stack([(paths[0], 0.7), (paths[1], 0.3)], dtype="bf16")
    assert rounded["m.weight"].dtype == "BF16"
    low = rounded["m.weight"].load()
    assert isinstance(low, LowRank) and low.certificate is not None
    assert 1e-5 < low.certificate.relative_error < 1e-2


def test_a_scale_that_overflows_says_so() -> None:
    large = torch.full((4, 1), 60000.0).half()
    one = adapter({"m.weight": LowRank(torch.ones(1, 4).half(), large, 1.0)})
    other = adapter({"m.weight": LowRank(torch.ones(1, 4).half(), large * 0.5, 1.0)})
    with pytest.raises(InputError, match=r"m\.weight: the factors overflow F16"):
        loratool.stack([(one, 4.0), (other, 1.0)], dtype="fp16")["m.weight"].load()


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("side", ["A", "B"])
def test_not_finite_factors_are_named(value: float, side: str, tmp_path: Path) -> None:
    b, a = factors(1, 6, 5, 2)
    (a if side == "A" else b)[1, 1] = value
    bad = write_adapter(tmp_path / "bad", {"m": (b, a)})
    good = write_adapter(tmp_path / "good", {"m": factors(2, 6, 5, 2)})
    with pytest.raises(InputError, match=rf"bad.*m\.weight: lora_{side} holds NaN or Inf"):
        loratool.stack([(good, 1.0), (bad, 1.0)])["m.weight"].load()


def test_the_file_states_the_scale_exactly(tmp_path: Path) -> None:
    paths = [
        write_adapter(tmp_path / "rs", {"m": factors(1, 9, 8, 3)}, use_rslora=True, lora_alpha=5),
        write_adapter(
            tmp_path / "patterns",
            {"m": factors(2, 9, 8, 4), "n": factors(3, 9, 8, 2)},
            alpha_pattern={"n": 7},
        ),
    ]
    given = [(open_adapter(path), weight) for path, weight in zip(paths, (0.7, -0.3), strict=True)]
    lazy = loratool.stack(given)
    lazy.save(tmp_path / "out")
    written = open_adapter(tmp_path / "out")
    assert config(tmp_path / "out")["use_rslora"] is False
    for name in lazy:
        before, after = lazy[name].load(), written[name].load()
        assert isinstance(before, LowRank) and isinstance(after, LowRank)
        assert after.scale == before.scale > 0
    close(deltas(written), weighted_sum(given), 1e-7, size_of(given))
    manifest = json.loads((tmp_path / "out" / "loratool.json").read_text())
    assert [part["name"] for part in manifest["parts"]] == ["rs", "patterns"]
    assert manifest["options"]["combiner"] == "total"
    (pair,) = manifest["interference"]
    assert pair["parts"] == ["rs", "patterns"] and set(pair["tensors"]) == {"m.weight"}


def test_any_executor_writes_the_same_bytes(tmp_path: Path) -> None:
    one, other = two()
    for number, executor in enumerate(("serial", "threads:workers=3")):
        lazy = loratool.stack([(one, 0.7), (other, 0.3)], combiner="dare_ties:density=0.5")
        lazy.save(tmp_path / str(number), executor=executor)
    files = [(tmp_path / n / "adapter_model.safetensors").read_bytes() for n in "01"]
    assert files[0] == files[1]


# What adapters carry besides low-rank updates


def test_what_one_adapter_replaces_is_kept_and_not_scaled() -> None:
    low, _ = two()
    head = torch.randn(3, 4)
    other = adapter({"head.weight": head, "norm.weight": None})
    found = loratool.stack([(low, 0.5), (other, 0.5)])
    replaced = found["head.weight"].load()
    assert isinstance(replaced, Replacement) and torch.equal(replaced.tensor.read(), head)
    assert torch.equal(found.context["head.weight"].read(), head)
    assert any("weights do not scale these" in note for note in found.notes)


def test_equal_replacements_are_one_and_different_ones_an_error(tmp_path: Path) -> None:
    head = torch.randn(3, 4)
    paths = {
        name: write_adapter(
            tmp_path / name, {"m": factors(seed, 6, 5, 2)}, whole, modules_to_save=["head"]
        )
        for seed, (name, whole) in enumerate(
            [
                ("one", {"head.weight": head}), ("same", {"head.weight": head}),
                ("other", {"head.weight": head + 1}), ("wider", {"head.weight": torch.ones(5, 4)}),
            ]
        )
    }  # fmt: skip
    loratool.stack([(paths["one"], 1.0), (paths["same"], 1.0)]).save(tmp_path / "out")
    assert torch.equal(stored(tmp_path / "out")["base_model.model.head.weight"], head)
    with pytest.raises(MismatchError, match=r"head\.weight: .*one and .*wider both replace it"):
        loratool.stack([(paths["one"], 1.0), (paths["wider"], 1.0)])
    conflict = loratool.stack([(paths["one"], 1.0), (paths["other"], 1.0)])
    with pytest.raises(MismatchError, match=r"head\.weight: .*one and .*other .*'other:head=0'"):
        conflict.save(tmp_path / "conflict")
    assert not (tmp_path / "conflict").exists()
    solved = loratool.stack([(paths["one"], 1.0), (paths["other"], 1.0)], weights=["other:head=0"])
    solved.save(tmp_path / "solved")
    assert torch.equal(stored(tmp_path / "solved")["base_model.model.head.weight"], head)


def test_an_extraction_that_finds_a_tensor_unchanged_does_not_replace_it() -> None:
    head = torch.randn(3, 4)
    changed, unchanged = adapter({"head.weight": head}), adapter({"head.weight": head + 1})
    silent = unchanged["head.weight"]
    updates = {"head.weight": LazyUpdate(silent.name, silent.kind, silent.shape, "F32", held(None))}
    found = loratool.stack([(Adapter(updates, context=unchanged.context), 1.0), (changed, 1.0)])
    replaced = found["head.weight"].load()
    assert isinstance(replaced, Replacement) and torch.equal(replaced.tensor.read(), head)
    assert torch.equal(found.context["head.weight"].read(), head)


def test_an_update_and_a_replacement_of_one_tensor_are_an_error() -> None:
    low, _ = two()
    whole = adapter({"up.weight": torch.zeros(SHAPES["up.weight"])})
    with pytest.raises(MismatchError, match=r"up\.weight: .*low-rank update.* replaces it whole"):
        loratool.stack([(low, 1.0), (whole, 1.0)])


def test_one_task_and_one_class() -> None:
    one, other = two()
    known = Adapter(other.updates, task_type="SEQ_CLS")
    assert loratool.stack([(one, 1.0), (known, 1.0)]).task_type == "SEQ_CLS"
    generator = Adapter(one.updates, task_type="CAUSAL_LM")
    with pytest.raises(MismatchError, match=r"different tasks .*CAUSAL_LM and SEQ_CLS"):
        loratool.stack([(generator, 1.0), (known, 1.0)])
    models = [
        Adapter(a.updates, model_config={"architectures": [c], "model_type": "bert"})
        for a, c in ((one, "BertModel"), (other, "BertForMaskedLM"))
    ]
    with pytest.raises(MismatchError, match="different model classes"):
        loratool.stack([(m, 1.0) for m in models])


def test_configs_and_names_of_bases_that_differ_are_noted() -> None:
    one, other = two()
    given = [
        Adapter(a.updates, model_config={"model_type": "bert", "x": x}, base_name=f"org/{x}")
        for x, a in enumerate((one, other))
    ]
    found = loratool.stack([(a, 1.0) for a in given])
    assert found.model_config == {"model_type": "bert", "x": 0}
    assert found.base_name == "org/0"
    assert any("model/config.json differs" in note for note in found.notes)
    assert any("org/0" in note and "org/1" in note for note in found.notes)


# Kinship


def test_one_adapter_given_twice(tmp_path: Path) -> None:
    path = write_adapter(tmp_path / "one", {"m": factors(1, 6, 5, 2)})
    copy = write_adapter(tmp_path / "copy", {"m": factors(1, 6, 5, 2)}, lora_alpha=7)
    other = write_adapter(tmp_path / "other", {"m": factors(2, 6, 5, 2)})
    (tmp_path / "link").symlink_to(path)
    opened = open_adapter(path)
    with pytest.raises(MismatchError, match="given twice"):
        require_distinct([opened, open_adapter(other), open_adapter(tmp_path / "link")])
    with pytest.raises(MismatchError, match=r"one and .*copy hold the same tensors"):
        require_distinct([opened, open_adapter(copy)])
    lazy = two()[0]
    with pytest.raises(MismatchError, match="given twice"):
        require_distinct([lazy, lazy])
    require_distinct([opened, open_adapter(other), *two()])


def test_adapters_of_different_bases() -> None:
    one, other = two()
    known = Adapter(one.updates, base_digests={"up.weight": "a" * 64, "x": "b" * 64})
    same = Adapter(other.updates, base_digests={"up.weight": "a" * 64, "y": "c" * 64})
    different = Adapter(other.updates, base_digests={"x": "d" * 64})
    require_same_base([known, same, other])
    found = loratool.stack([(known, 1.0), (same, 1.0)])
    assert dict(found.base_digests) == {**known.base_digests, **same.base_digests}
    assert found.facts()["base"]["tensors"] == dict(sorted(found.base_digests.items()))
    with pytest.raises(MismatchError, match="different bases: x has the digest bbbb"):
        loratool.stack([(known, 1.0), (different, 1.0)])
    b, a = factors(1, 9, 7, 2)
    larger = adapter({"up.weight": LowRank(a, b)})
    with pytest.raises(MismatchError, match=r"up\.weight has the shape \(10, 7\).*\(9, 7\)"):
        loratool.stack([(one, 1.0), (larger, 1.0)])


def test_names_tell_adapters_apart(tmp_path: Path) -> None:
    paths = [tmp_path / "run1" / "adapter", tmp_path / "run2" / "adapter", tmp_path / "math"]
    opened = [
        open_adapter(write_adapter(path, {"m": factors(seed, 6, 5, 2)}))
        for seed, path in enumerate(paths)
    ]
    assert short_names([opened[0], opened[2], two()[0]]) == ["adapter", "math", "#3"]
    names = short_names(opened)
    assert names[:2] == ["run1/adapter", "run2/adapter"]
    found = loratool.stack([(a, 1.0) for a in opened], weights=["run1/adapter:m=0"])
    close(deltas(found), weighted_sum([(a, 1.0) for a in opened[1:]]), 1e-7, 10)


# Namings


def prefixed(prefix: str, seed: int, **fields: object) -> Adapter:
    updates = {}
    for name, shape in SHAPES.items():
        b, a = factors(seed, *shape, 2)
        updates[f"{prefix}{name}"] = LowRank(a, b)
    return adapter(updates, **fields)


def test_differently_prefixed_adapters_need_the_base() -> None:
    bare, inside = prefixed("", 1), prefixed("model.", 2)
    with pytest.raises(MismatchError, match=r"name the same weights differently.*--base"):
        loratool.stack([(bare, 1.0), (inside, 1.0)])
    for order, prefix in (([bare, inside], ""), ([inside, bare], "model.")):
        found = loratool.stack([(a, 0.5) for a in order], base_of(torch.float32))
        assert list(found) == [f"{prefix}{name}" for name in SHAPES]
        total = weighted_sum([(bare, 0.5), (prefixed("", 2), 0.5)])
        close(deltas(found), {f"{prefix}{n}": d for n, d in total.items()}, 1e-6, 1.0)


def test_the_first_adapter_with_a_model_names_the_result() -> None:
    head = torch.randn(3, 4)
    bare = prefixed("", 1)
    updates = prefixed("model.", 2).updates
    whole = adapter({"score.weight": head})
    classifier = Adapter(
        {**updates, **whole.updates},
        context=whole.context,
        model_config={"model_type": "llama"},
        moves=(("model.up", "up"),),
    )
    found = loratool.stack([(bare, 0.5), (classifier, 0.5)], base_of(torch.float32))
    assert set(found) == {*(f"model.{name}" for name in SHAPES), "score.weight"}
    assert found.model_config == {"model_type": "llama"}
    assert found.moves == (("model.up", "up"),)
    assert any("prefix" in note for note in found.notes)
    at_once = merged(base_of(torch.float32), [(bare, 0.5), (classifier, 0.5)])
    stacked = merged(base_of(torch.float32), [(found, 1.0)])
    assert all(torch.equal(at_once[name], stacked[name]) for name in at_once)


def test_names_without_the_prefix_keep_theirs() -> None:
    base = base_of(torch.float32)
    head = lazy_tensor("head.weight", torch.zeros(6, 5))
    b, a = factors(3, 6, 5, 2)
    given = [
        Adapter({**prefixed(prefix, seed).updates, **adapter({"head.weight": LowRank(a, b)})})
        for seed, prefix in ((1, "model."), (2, ""))
    ]
    found = loratool.stack([(g, 1.0) for g in given], Checkpoint({**base, "head.weight": head}))
    assert list(found) == [*(f"model.{name}" for name in SHAPES), "head.weight"]
    assert torch.allclose(deltas(found)["head.weight"], 2 * (b @ a).double(), atol=1e-6)


def test_an_adapter_that_does_not_fit_the_base_is_refused() -> None:
    b, a = factors(1, 9, 7, 2)
    with pytest.raises(MismatchError, match="does not fit"):
        loratool.stack([(adapter({"up.weight": LowRank(a, b)}), 1.0)], base_of(torch.float32))
