"""convert changes no value without --to-lora, and with it says what it lost of every tensor."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import loratool
from loratool import plugins
from loratool.adapter import Adapter, FormatOptions, LazyUpdate, Rereading
from loratool.checkpoint import Checkpoint, LazyTensor
from loratool.dtypes import dtype_name
from loratool.errors import InputError, MismatchError, Problem, UsageError
from loratool.steps.convert import Convert
from loratool.updates import (
    IA3,
    Added,
    Dense,
    DoRA,
    Experts,
    LoHa,
    LoKr,
    LowRank,
    Product,
    Replacement,
    Rows,
    Update,
    tensors_of,
)
from tests import updates as some
from tests.updates import Shape

common = settings(derandomize=True, deadline=None, max_examples=25)
linear = st.one_of(some.lohas(), some.lokrs(), some.sparses(), some.based())


def single(update: Update) -> Update:
    """The same update in fp32, as it would come from a file."""
    match update:
        case LoHa() | LoKr():
            return replace(update, one=_narrow(update.one), other=_narrow(update.other))
        case LowRank() | Experts():
            return replace(update, a=update.a.float(), b=update.b.float())
        case Dense():
            return replace(update, values=update.values.float())
        case DoRA():
            return replace(update, added=single(update.added), magnitude=update.magnitude.float())
        case IA3():
            return replace(update, factors=update.factors.float())
    return update


def _narrow(product: Product) -> Product:
    parts = (product.left, product.right, product.core)
    return Product(*(None if part is None else part.float() for part in parts))  # type: ignore[arg-type]


def lazy(name: str, update: Update, shape: Shape) -> LazyUpdate:
    dtype, rank = "F32", None
    if isinstance(update, Rows | Replacement):
        dtype = update.tensor.dtype
    else:
        dtype = dtype_name(tensors_of(update)[0][1].dtype)
    if isinstance(update, LowRank):
        rank = update.rank
    if isinstance(update, IA3) and len(shape) > 1:  # its file tells one dimension only
        shape = (shape[0], 0) if update.axis == 0 else (0, shape[1])
    rows = update.indices if isinstance(update, Rows) else ()
    return LazyUpdate(name, update.kind, shape, dtype, lambda: update, rank=rank, rows=rows)


def adapter_of(given: Mapping[str, tuple[Update, Shape]], **fields: Any) -> Adapter:
    updates = {name: lazy(name, update, shape) for name, (update, shape) in given.items()}
    return Adapter(updates, **fields)


def tensor(name: str, values: torch.Tensor) -> LazyTensor:
    return LazyTensor(name, dtype_name(values.dtype), tuple(values.shape), lambda: iter([values]))


def base_of(given: Mapping[str, tuple[Update, Shape]], seed: int = 0) -> Checkpoint:
    values = {
        n: some.randn(seed + i, *shape).float() for i, (n, (_, shape)) in enumerate(given.items())
    }
    return Checkpoint({name: tensor(name, value) for name, value in values.items()})


def loaded(adapter: Adapter) -> dict[str, Update]:
    found = {name: update.load() for name, update in adapter.items()}
    return {name: update for name, update in found.items() if update is not None}


def to_lora(adapter: Adapter, base: Checkpoint | None = None, **options: Any) -> Adapter:
    return Convert(to_lora=True, **options).run(adapter, base)


def low_rank(
    adapter: Adapter, base: Checkpoint | None = None, **options: Any
) -> dict[str, LowRank]:
    found = loaded(to_lora(adapter, base, **options))
    assert all(isinstance(update, LowRank) for update in found.values())
    return {name: update for name, update in found.items() if isinstance(update, LowRank)}


def error_of(found: LowRank, wanted: torch.Tensor) -> float:
    norm = float(wanted.norm())
    return float((some.delta(found, ()) - wanted).norm()) / norm if norm else 0.0


@pytest.fixture
def factors_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """The format "peft" carries low-rank updates and whole tensors alone."""
    format = plugins.load("adapter_formats", "peft")
    monkeypatch.setattr(format, "carries", frozenset({"low_rank", "replacement"}))
    monkeypatch.setattr(format, "refusals", lambda self, adapter: ())


# ---- laws of --to-lora


@common
@given(given=st.lists(linear, min_size=1, max_size=3), rank=st.integers(1, 6))
def test_the_error_that_is_stated_is_the_error(given: list[tuple[Added, Shape]], rank: int) -> None:
    named = {f"m{i}.weight": (single(u), shape) for i, (u, shape) in enumerate(given)}
    base = base_of(named)
    for options in ({"rank": rank}, {"rank": rank, "dtype": "bf16"}, {"energy": 0.7}, {}):
        found = low_rank(adapter_of(named), base, **options)
        for name, (update, shape) in named.items():
            wanted = some.delta(update, shape, base[name].read())
            certificate = found[name].certificate
            assert certificate is not None
            measured = error_of(found[name], wanted)
            assert abs(measured - certificate.relative_error) <= 5e-4
            assert math.isclose(certificate.total, float(wanted.square().sum()), rel_tol=1e-5)
            if "rank" in options:
                assert found[name].rank <= rank
            if "energy" in options:
                assert certificate.energy >= 0.7 - 1e-6


@common
@given(given=linear)
def test_a_second_conversion_changes_nothing(given: tuple[Added, Shape]) -> None:
    update, shape = given
    named = {"m.weight": (single(update), shape)}
    once = to_lora(adapter_of(named), base_of(named), rank=4)
    first = loaded(once)["m.weight"]
    assert isinstance(first, LowRank)
    for again in (to_lora(adapter_of({"m.weight": (first, shape)}), rank=1),):
        second = loaded(again)["m.weight"]
        assert second is first
        assert any("nothing is computed" in note for note in again.notes)


@common
@given(given=linear)
def test_a_rank_that_is_large_enough_is_exact(given: tuple[Added, Shape]) -> None:
    update, shape = given
    named = {"m.weight": (single(update), shape)}
    base = base_of(named)
    for options in ({}, {"rank": 64}):  # the small ones here are exact by default, too
        (found,) = low_rank(adapter_of(named), base, **options).values()
        wanted = some.delta(named["m.weight"][0], shape, base["m.weight"].read())
        assert found.certificate is not None and found.certificate.method == "exact"
        assert found.certificate.relative_error < 1e-6
        size = sum(float(part.norm()) for _, part in tensors_of(update)) + float(wanted.norm())
        assert float((some.delta(found, ()) - wanted).norm()) <= 1e-6 * (size + 10)


def test_an_exact_conversion_of_16_bit_factors_merges_to_the_same_weights() -> None:
    def half(product: Product) -> Product:
        right = None if product.right is None else product.right.bfloat16()
        return Product(product.left.bfloat16(), right)

    shape = (40, 48)
    loha = some.loha(1, shape, 2, 3, 16 / 3, tucker=False)
    lokr = LoKr(Product(some.randn(1, 4, 4)), some.product(2, 10, 3, 12), 0.3)
    named: dict[str, tuple[Update, Shape]] = {
        "loha.weight": (replace(loha, one=half(loha.one), other=half(loha.other)), shape),
        "lokr.weight": (replace(lokr, one=half(lokr.one), other=half(lokr.other)), shape),
    }
    base = base_of(named)
    for name, found in low_rank(adapter_of(named)).items():
        assert found.certificate is not None and found.certificate.relative_error == 0
        assert found.a.dtype == found.b.dtype == torch.float32
        assert found.rank == {"loha.weight": 6, "lokr.weight": 12}[name]
    converted = to_lora(adapter_of(named))
    one, other = (
        {n: t.read() for n, t in loratool.merge(base, [(a, 1.0)]).items()}
        for a in (adapter_of(named), converted)
    )
    for name, value in one.items():
        change = value - base[name].read()
        assert (value - other[name]).norm() <= 1e-6 * change.norm()


# ---- what rank is chosen


def test_without_a_rank_small_updates_are_exact_and_large_ones_lose_a_thousandth() -> None:
    decay = 0.5 ** torch.arange(100.0)
    values = torch.diag(decay) + 1e-6 * some.randn(0, 100, 100).float()
    named = {
        "small.weight": (single(some.loha(1, (90, 80), 8, 8, 0.5, tucker=False)), (90, 80)),
        "full.weight": (Dense(values.float()), (100, 100)),
        "flat.weight": (Dense(torch.eye(100)), (100, 100)),
    }
    adapter = to_lora(adapter_of(named))
    found = loaded(adapter)
    ranks = {n: u.rank for n, u in found.items() if isinstance(u, LowRank)}
    assert ranks == {"small.weight": 64, "full.weight": 5, "flat.weight": 64}
    lines = adapter.provenance.lines()
    assert "exact but for rounding: 1 of 3" in lines
    assert any("99.9%" in line and "64" in line for line in lines)
    assert any("at most 6.0e-01 (flat.weight)" in line for line in lines)
    assert adapter["small.weight"].rank == 64


def test_ranks_above_what_is_asked_for_are_told_where_nothing_is_computed() -> None:
    named: dict[str, tuple[Update, Shape]] = {
        "a.weight": (LowRank(some.randn(0, 6, 8), some.randn(1, 9, 6)), (9, 8)),
        "b.weight": (Dense(some.randn(2, 9, 8)), (9, 8)),
    }
    adapter = to_lora(adapter_of(named), rank=2)
    assert loaded(adapter)["a.weight"] is named["a.weight"][0]
    (note,) = [note for note in adapter.notes if "rescale" in note]
    assert "a.weight" in note and "rank above 2" in note


def test_a_seed_makes_the_bytes() -> None:
    named: dict[str, tuple[Update, Shape]] = {
        "m.weight": (Dense(some.randn(0, 500, 400).float()), (500, 400))
    }
    one, same, other = (
        low_rank(adapter_of(named), rank=4, seed=seed)["m.weight"] for seed in (0, 0, 1)
    )
    assert torch.equal(one.a, same.a) and torch.equal(one.b, same.b)
    assert not torch.equal(one.a, other.a)


def test_the_factors_get_the_type_that_is_asked_for() -> None:
    named = {"m.weight": (single(some.loha(1, (9, 8), 1, 2, 1.0, tucker=False)), (9, 8))}
    for text, dtype in (("fp16", torch.float16), ("fp64", torch.float64)):
        adapter = to_lora(adapter_of(named), dtype=text)
        found = loaded(adapter)["m.weight"]
        assert isinstance(found, LowRank) and found.a.dtype == found.b.dtype == dtype
        assert adapter["m.weight"].dtype == dtype_name(dtype)


def test_an_overflow_is_refused() -> None:
    named: dict[str, tuple[Update, Shape]] = {"m.weight": (Dense(torch.full((4, 5), 1e30)), (4, 5))}
    with pytest.raises(InputError, match=r"m\.weight.*overflow F16.*--dtype"):
        loaded(to_lora(adapter_of(named), dtype="fp16"))


# ---- what needs the base


def relative() -> dict[str, tuple[Update, Shape]]:
    added = LowRank(some.randn(0, 2, 8).float(), some.randn(1, 9, 2).float(), 0.5)
    return {
        "dora.weight": (DoRA(added, some.randn(2, 9).abs().float() + 1), (9, 8)),
        "ia3.weight": (IA3(some.randn(3, 9).float()), (9, 8)),
        "ia3.bias": (IA3(some.randn(3, 9).float()), (9,)),
        "gone.bias": (IA3(some.randn(3, 9).float()), (9,)),
    }


def with_base() -> tuple[Adapter, Checkpoint]:
    adapter = adapter_of(relative())
    updates = dict(adapter.updates)
    for name in ("ia3.bias", "gone.bias"):
        updates[name] = replace(updates[name], optional=True)
    shapes = {"dora.weight": (9, 8), "ia3.weight": (9, 8), "ia3.bias": (9,), "other.weight": (3, 3)}
    values = {n: some.randn(i, *shape).float() for i, (n, shape) in enumerate(shapes.items())}
    base = Checkpoint({name: tensor(name, value) for name, value in values.items()})
    return replace(adapter, updates=updates), base


def test_what_depends_on_the_base_is_refused_without_it_in_one_message() -> None:
    adapter = replace(adapter_of(relative()), base_name="org/base")
    with pytest.raises(InputError) as caught:
        to_lora(adapter)
    for word in ("1 DoRA update", "3 IA3 scalings", "dora.weight", "--base", "org/base"):
        assert word in str(caught.value)


@pytest.mark.usefixtures("factors_only")
def test_dora_and_ia3_become_low_rank_updates_of_the_base_given() -> None:
    adapter, base = with_base()
    result = to_lora(adapter, base, rank=9, drop=True)
    found = loaded(result)
    assert list(found) == ["dora.weight", "ia3.weight"]
    for name, update in found.items():
        assert isinstance(update, LowRank)
        given = relative()[name][0]
        assert isinstance(given, DoRA | IA3)
        wanted = some.delta(given, (9, 8), base[name].read())
        assert error_of(update, wanted) < 1e-6
    assert result["ia3.weight"].shape == (9, 8)
    facts = result.facts()
    assert facts["base"]["tensors"].keys() == {"dora.weight", "ia3.weight"}
    assert facts["base"]["tensors"]["dora.weight"] == base["dora.weight"].digest()


@pytest.mark.usefixtures("factors_only")
def test_a_scaled_bias_of_a_format_without_biases_is_refused() -> None:
    adapter, base = with_base()
    with pytest.raises(MismatchError) as caught:
        to_lora(adapter, base)
    assert "ia3.bias: the format has no full-size delta" in str(caught.value)
    assert "--drop" in str(caught.value) and "--to-lora" not in str(caught.value)
    assert "gone.bias" not in str(caught.value)


def test_a_scaled_bias_becomes_a_difference() -> None:
    adapter, base = with_base()
    adapter = replace(adapter, updates={n: u for n, u in adapter.items() if n != "dora.weight"})
    found = loaded(to_lora(adapter, base))["ia3.bias"]
    assert isinstance(found, Dense) and found.values.dtype == torch.float32
    bias, factors = base["ia3.bias"].read(), relative()["ia3.bias"][0].factors  # type: ignore[union-attr]
    torch.testing.assert_close(bias + found.values * found.scale, bias * factors)


@pytest.mark.usefixtures("factors_only")
def test_nan_in_the_base_is_named() -> None:
    adapter, base = with_base()
    broken = base["dora.weight"].read()
    broken[0, 0] = math.nan
    base = Checkpoint({**base, "dora.weight": tensor("dora.weight", broken)})
    with pytest.raises(InputError, match=r"dora\.weight: holds NaN or Inf: repair the base"):
        loaded(to_lora(adapter, base, drop=True))


@pytest.mark.parametrize("kind", ["loha", "dense"])
def test_nan_in_an_update_is_named(kind: str) -> None:
    update: Update = Dense(torch.full((9, 8), math.nan))
    if kind == "loha":
        update = single(some.loha(1, (9, 8), 1, 2, 1.0, tucker=False))
        update.one.left[0, 0] = math.inf  # type: ignore[union-attr]
    with pytest.raises(InputError, match=r"m\.weight: .* holds NaN or Inf: repair the adapter"):
        loaded(to_lora(adapter_of({"m.weight": (update, (9, 8))})))


def test_an_adapter_of_another_base_is_refused_with_all_complaints() -> None:
    adapter, base = with_base()
    wrong = Checkpoint({n: t for n, t in base.items() if n != "dora.weight"})
    with pytest.raises(MismatchError, match=r"does not fit(.|\n)*dora\.weight"):
        to_lora(adapter, wrong)


def test_the_base_tells_the_kernel_of_a_convolution() -> None:
    update = single(some.loha(1, (6, 5 * 3 * 2), 1, 2, 1.0, tucker=False))
    named = {"block.conv1.weight": (update, (6, 30))}
    with pytest.raises(InputError, match=r"kernel of its convolution.*--base"):
        to_lora(adapter_of(named))
    base = base_of({"block.conv1.weight": (update, (6, 5, 3, 2))})
    result = to_lora(adapter_of(named), base)
    assert result["block.conv1.weight"].shape == (6, 5, 3, 2)
    assert error_of(loaded(result)["block.conv1.weight"], some.delta(update, (6, 30))) < 1e-6  # type: ignore[arg-type]


# ---- formats


def every_kind() -> dict[str, tuple[Update, Shape]]:
    table = tensor("rows.weight", some.randn(7, 2, 4))
    return {
        "low.weight": (LowRank(some.randn(0, 2, 8), some.randn(1, 9, 2), 0.5), (9, 8)),
        "loha.weight": (some.loha(1, (9, 8), 1, 2, 1.0, tucker=False), (9, 8)),
        "lokr.weight": (LoKr(Product(some.randn(1, 3, 2)), some.product(2, 3, 1, 4)), (9, 8)),
        "dense.weight": (Dense(some.randn(2, 9, 8)), (9, 8)),
        "dense.bias": (Dense(some.randn(2, 9)), (9,)),
        "experts.gate": (Experts(some.randn(3, 4, 2, 5), some.randn(4, 4, 6, 2)), (4, 6, 5)),
        "rows.weight": (Rows((1, 3), table), (2, 4)),
        "head.weight": (Replacement(tensor("head.weight", some.randn(8, 3, 3))), (3, 3)),
    }


def test_without_to_lora_updates_pass_through_as_they_are() -> None:
    given = every_kind()
    kept = {name: given[name] for name in ("low.weight", "head.weight")}
    adapter = adapter_of(kept, settings={"r": 2})
    result = Convert(format="peft").run(adapter)
    assert all(result[name] is adapter[name] for name in kept)
    assert result.settings == adapter.settings and result.format == "peft"
    assert "no value was changed" in result.provenance.lines()


@pytest.mark.usefixtures("factors_only")
def test_what_the_format_cannot_carry_is_listed_by_kind_with_what_helps() -> None:
    with pytest.raises(MismatchError) as caught:
        Convert(format="peft").run(adapter_of(every_kind()))
    lines = str(caught.value).splitlines()
    assert "cannot be written as peft:" in lines[0]
    said = "\n".join(lines[1:])
    for name in ("loha.weight", "lokr.weight", "dense.weight"):
        (line,) = [line for line in lines if f"  {name}:" in line]
        assert "--to-lora" in line and "--drop" in line
    assert "low.weight" not in said and "head.weight" not in said
    assert "experts.gate: the format has no low-rank update of experts" in said


@pytest.mark.usefixtures("factors_only")
def test_drop_leaves_out_what_the_format_cannot_carry_and_says_so() -> None:
    result = Convert(format="peft", drop=True).run(adapter_of(every_kind()))
    assert list(result) == ["low.weight", "head.weight"]
    said = "\n".join(result.notes)
    for name in every_kind().keys() - result.keys():
        assert f"left out: {name}" in said
    result = Convert(format="peft", drop=True, to_lora=True).run(adapter_of(every_kind()))
    assert list(result) == [
        "low.weight", "loha.weight", "lokr.weight", "dense.weight", "head.weight"
    ]  # fmt: skip


@pytest.mark.usefixtures("factors_only")
def test_dropping_everything_is_refused() -> None:
    adapter = adapter_of({"dense.bias": every_kind()["dense.bias"]})
    with pytest.raises(InputError, match="nothing is left"):
        Convert(format="peft", drop=True).run(adapter)


def test_lora_only_keeps_factors_as_they_are_and_says_what_it_leaves_out() -> None:
    given = {n: given for n, given in every_kind().items() if n not in ("experts.gate",)}
    adapter = adapter_of(
        given,
        settings={"ensure_weight_tying": True, "r": 2},
        context={"head.weight": tensor("head.weight", some.randn(8, 3, 3))},
        task_type="SEQ_CLS",
        dropped=("old.weight",),
        model_config={"model_type": "bert"},
    )
    result = Convert(lora_only=True).run(adapter)
    assert list(result) == ["low.weight"] and result["low.weight"] is adapter["low.weight"]
    assert not (result.context or result.dropped or result.model_config)
    assert result.settings == {"ensure_weight_tying": True}
    assert result.task_type is None  # PEFT would look for the head
    (note,) = result.notes
    assert note.startswith("left out: ") and note.endswith(": what they change is lost")
    for kind in ("1 LoHa update", "1 table with replaced rows", "1 tensor kept whole"):
        assert kind in note
    both = Convert(lora_only=True, to_lora=True).run(adapter)
    assert list(both) == ["low.weight", "loha.weight", "lokr.weight", "dense.weight"]
    assert not any("set, not changed" in note for note in both.notes)


def test_lora_only_without_anything_to_leave_out_changes_nothing() -> None:
    adapter = adapter_of(
        {"low.weight": every_kind()["low.weight"]}, settings={"r": 2}, task_type="SEQ_CLS"
    )
    result = Convert(lora_only=True).run(adapter)
    assert result["low.weight"] is adapter["low.weight"] and result.notes == ()
    assert (result.settings, result.task_type) == (adapter.settings, "SEQ_CLS")


def test_lora_only_of_nothing_low_rank_is_refused() -> None:
    adapter = adapter_of({"head.weight": every_kind()["head.weight"]})
    with pytest.raises(InputError, match="has no low-rank update: nothing would be left"):
        Convert(lora_only=True).run(adapter)


def test_names_that_only_the_base_resolves_are_refused_by_a_format_of_other_names() -> None:
    adapter = adapter_of({"low.weight": every_kind()["low.weight"]}, naming="kohya")
    with pytest.raises(MismatchError, match=r"low\.weight: is a name of kohya.*--base"):
        Convert(format="peft").run(adapter)


def test_faulty_adapters_are_refused() -> None:
    adapter = adapter_of(every_kind(), problems=(Problem("error", "low.weight", "is faulty"),))
    with pytest.raises(MismatchError, match=r"cannot be converted(.|\n)*is faulty"):
        to_lora(adapter)


def test_facts_that_the_files_do_not_say_are_handed_to_the_format() -> None:
    given = adapter_of({"low.weight": every_kind()["low.weight"]})
    asked: list[FormatOptions] = []

    def read(options: FormatOptions) -> Adapter:
        asked.append(options)
        return given

    names = frozenset({"alpha", "enable_lora", "fan_in_fan_out"})
    silent = replace(given, rereading=Rereading(names, given.updates, read))
    Convert(format="peft", alpha=8.0, enable_lora="1,0,true", fan_in_fan_out=True).run(silent)
    assert asked == [FormatOptions(8.0, (True, False, True), True)]
    with pytest.raises(InputError, match="says itself what --alpha would say"):
        Convert(format="peft", alpha=8.0).run(given)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({}, "nothing to do"),
        ({"drop": True}, "nothing to do"),
        ({"format": "peft", "rank": 3}, "--rank"),
        ({"format": "peft", "energy": 0.5}, "--energy"),
        ({"format": "peft", "dtype": "bf16"}, "--dtype"),
        ({"to_lora": True, "rank": 0}, "at least 1"),
        ({"to_lora": True, "energy": 1.5}, "energy"),
        ({"to_lora": True, "enable_lora": "1,2"}, "--enable-lora 1,2"),
        ({"to_lora": True, "alpha": math.nan}, "finite"),
        ({"to_lora": True, "dtype": "int3"}, "int3"),
    ],
)
def test_options_that_make_no_sense(options: dict[str, Any], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        Convert(**options)


# ---- on disk


def test_a_saved_conversion_is_plain_lora_with_its_errors(tmp_path: Path) -> None:
    given = every_kind()
    named = {n: given[n] for n in ("low.weight", "loha.weight", "dense.weight", "head.weight")}
    base = base_of(named)
    head = named["head.weight"][0]
    assert isinstance(head, Replacement)
    adapter = adapter_of(named, context={"head.weight": head.tensor})
    report = loratool.convert(adapter, to_lora=True, rank=4).save(tmp_path / "lora")
    assert report.table is not None and report.table.columns[-1] == "made of"
    manifest = json.loads((tmp_path / "lora" / "loratool.json").read_text())
    tensors = manifest["tensors"]
    assert tensors["loha.weight"]["from"] == "LoHa update"
    assert tensors["loha.weight"]["relative_error"] < 1e-6
    assert "from" not in tensors["low.weight"]
    assert 0.1 < tensors["dense.weight"]["relative_error"] < 1
    assert manifest["options"] == {"to_lora": True, "rank": 4, "factorizer": "krylov", "seed": 0}
    opened = loratool.open_adapter(tmp_path / "lora")
    assert {u.kind for u in opened.values()} == {"low_rank", "replacement"}
    merged = loratool.merge(base, [(opened, 1.0)])
    wanted = loratool.merge(base, [(adapter, 1.0)])
    for name, error in (("low.weight", 1e-6), ("loha.weight", 1e-6), ("head.weight", 0.0)):
        one, other = merged[name].read(), wanted[name].read()
        assert (one - other).norm() <= error * (other - base[name].read()).norm()


def test_a_conversion_that_is_written_twice_is_the_same(tmp_path: Path) -> None:
    named = {"dense.weight": every_kind()["dense.weight"]}
    for number in (1, 2):
        loratool.convert(adapter_of(named), to_lora=True, rank=2).save(tmp_path / str(number))
    one, other = (
        (tmp_path / str(number) / "adapter_model.safetensors").read_bytes() for number in (1, 2)
    )
    assert one == other
