"""stack on every kind of update that can be combined, and by name on those that cannot."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import loratool
from loratool.adapter import Adapter, LazyUpdate
from loratool.errors import MismatchError
from loratool.interference import Collector, pairwise
from loratool.lowrank import weighted
from loratool.updates import IA3, Dense, DoRA, Experts, LoHa, LoKr, LowRank, Product, Rows
from tests import updates as some
from tests.lazy import Given, adapter_of, close, delta, experts, loaded, matrices, replacement, rows
from tests.updates import Shape, randn

law = settings(derandomize=True, deadline=None, max_examples=25)
COMBINERS = (
    "total", "linear", "ties:density=0.5", "dare_linear", "dare_ties:density=0.3",
    "magnitude_prune:density=0.4", "tsv", "iso",
)  # fmt: skip
WEIGHTS = (0.7, -0.5, 2.0)

Parts = Sequence[Mapping[str, Given]]


def stacked(parts: Parts, weights: Sequence[float] = WEIGHTS, **options: Any) -> dict[str, Any]:
    given = [(adapter_of(part), w) for part, w in zip(parts, weights, strict=False)]
    return dict(loaded(loratool.stack(given, **options)))


def low(seed: int, shape: Shape, rank: int = 2, scale: float = 1.5) -> LowRank:
    columns = math.prod(shape[1:])
    return LowRank(randn(seed, rank, columns), randn(seed + 1, shape[0], rank), scale)


# ---- shapes


@law
@given(
    shape=some.shapes(8), weights=st.permutations(WEIGHTS), ranks=st.permutations((1, 2, 3)),
    options=st.sampled_from([{}, {"combiner": "linear"}]),
)  # fmt: skip
def test_the_sum_for_weights_of_any_shape(
    shape: Shape, weights: list[float], ranks: list[int], options: dict[str, str]
) -> None:
    parts = [{"m.weight": (low(10 * r, shape, r, 0.5 * r), shape)} for r in ranks]
    (found,) = stacked(parts, weights, dtype="fp64", **options).values()
    wanted = sum(w * delta(*part["m.weight"]) for w, part in zip(weights, parts, strict=True))
    assert close(delta(found, shape), wanted, 1e-12)


@pytest.mark.parametrize("combiner", COMBINERS)
def test_a_convolution_is_combined_as_its_matrix(combiner: str) -> None:
    shape, matrix = (6, 3, 2, 2), (6, 12)
    parts = [{"m.weight": (low(s, shape), shape)} for s in (0, 10)]
    flat = [{"m.weight": (low(s, matrix), matrix)} for s in (0, 10)]
    (one,), (other,) = (stacked(p, combiner=combiner).values() for p in (parts, flat))
    assert torch.equal(one.a, other.a) and torch.equal(one.b, other.b)


def test_the_shape_with_the_kernel_wins() -> None:
    """Some formats know a convolution's weight as a matrix only."""
    parts = [adapter_of({"m.weight": (low(s, shape), shape)})
             for s, shape in ((0, (6, 12)), (10, (6, 3, 2, 2)))]  # fmt: skip
    (update,) = loratool.stack([(part, 1.0) for part in parts]).values()
    assert update.shape == (6, 3, 2, 2)
    other = adapter_of({"m.weight": (low(0, (6, 4, 3, 1)), (6, 4, 3, 1))})
    with pytest.raises(MismatchError, match="different bases"):
        loratool.stack([(parts[1], 1.0), (other, 1.0)])


def test_a_table_stays_one() -> None:
    updates = {
        "t.weight": LazyUpdate("t.weight", "low_rank", (20, 4), "F64", lambda: low(0, (20, 4)),
                               rank=2, embedding=True)
    }  # fmt: skip
    one = Adapter(updates)
    other = adapter_of({"t.weight": (low(9, (20, 4)), (20, 4))})
    found = loratool.stack([(other, 1.0), (one, 1.0)])
    assert found["t.weight"].embedding


# ---- experts


def some_experts(*seeds: int, ranks: Sequence[int] = (2, 2, 2)) -> list[dict[str, Given]]:
    shape = (3, 6, 5)
    return [
        {"e.up": (experts(seed, *shape, rank, 0.5 * rank, torch.float64), shape)}
        for seed, rank in zip(seeds, ranks, strict=False)
    ]


@law
@given(seeds=st.lists(st.integers(0, 99), min_size=2, max_size=3, unique=True),
       ranks=st.permutations((1, 2, 3)))  # fmt: skip
def test_experts_are_summed_one_by_one(seeds: list[int], ranks: list[int]) -> None:
    parts = some_experts(*(7 * seed for seed in seeds), ranks=ranks)
    (found,) = stacked(parts, dtype="fp64").values()
    assert isinstance(found, Experts) and found.rank == sum(ranks[: len(parts)])
    wanted = sum(w * delta(*p["e.up"]) for w, p in zip(WEIGHTS, parts, strict=False))
    assert close(delta(found, (3, 6, 5)), wanted, 1e-12)
    assert found.certificate is not None and found.certificate.relative_error == 0


@pytest.mark.parametrize("combiner", [c for c in COMBINERS if not c.startswith("dare")])
def test_each_expert_is_what_it_would_be_alone(combiner: str) -> None:
    parts = some_experts(0, 50)
    (found,) = stacked(parts, combiner=combiner, rank=3).values()
    for number, matrix in enumerate(matrices(found)):
        alone: list[dict[str, Given]] = []
        for part in parts:
            update = part["e.up"][0]
            assert isinstance(update, Experts)
            alone.append({"m.weight": (update.expert(number), (6, 5))})
        (wanted,) = stacked(alone, combiner=combiner, rank=3).values()
        assert close(matrix, delta(wanted, (6, 5)), 1e-5)


@pytest.mark.parametrize("combiner", ["dare_linear:density=1", "dare_linear:density=1,on=factors"])
def test_random_combiners_take_experts(combiner: str) -> None:
    (found,) = stacked(some_experts(0, 50), combiner=combiner).values()
    assert isinstance(found, Experts)
    assert stacked(some_experts(0, 50), combiner=combiner)["e.up"].a.equal(found.a)


def test_experts_the_other_way_round_are_turned() -> None:
    """PEFT up to 0.18 took the middle dimension of their weights for the inputs."""
    one, other = experts(0, 3, 6, 5, 2, 1.0, torch.float64), experts(9, 3, 6, 5, 2)
    parts = [{"e.up": (one, (3, 6, 5))}, {"e.up": (other.transposed(), (3, 5, 6))}]
    (found,) = stacked(parts, (1.0, 1.0), dtype="fp64").values()
    assert close(delta(found, (3, 6, 5)), delta(one, ()) + delta(other, ()), 1e-12)


def test_square_experts_are_turned_by_what_their_files_say() -> None:
    one, other = (experts(seed, 3, 5, 5, 2, 1.0, torch.float64) for seed in (0, 9))

    def adapter(update: Experts, transposed: bool | None) -> Adapter:
        lazy = LazyUpdate("e.up", "experts", (3, 5, 5), "F64", lambda: update, rank=2,
                          transposed=transposed)  # fmt: skip
        return Adapter({"e.up": lazy})

    given = [(adapter(one, None), 1.0), (adapter(other.transposed(), True), 1.0)]
    stack = loratool.stack(given, dtype="fp64")
    wanted = delta(one, ()) + delta(other, ())
    assert close(delta(loaded(stack)["e.up"], ()), wanted, 1e-12)
    assert not stack["e.up"].transposed
    stack = loratool.stack(given[::-1], dtype="fp64")
    assert close(delta(loaded(stack)["e.up"], ()), wanted.mT, 1e-12)
    assert stack["e.up"].transposed


def test_the_interference_of_experts_is_that_of_all_of_them_together() -> None:
    one, other = experts(0, 3, 6, 5, 2), experts(9, 3, 6, 5, 2, -0.5)
    split = {n: [weighted(u.expert(e)) for e in range(3)] for n, u in ((0, one), (1, other))}
    collector = Collector(["one", "other"])
    collector.add("e.up", split)
    dense = [torch.stack(matrices(update)) for update in (one, other)]
    cosine = float((dense[0] * dense[1]).sum() / dense[0].norm() / dense[1].norm())
    assert collector.cosines()[0, 1] == pytest.approx(cosine, abs=1e-9)
    (pair,) = collector.data()
    angles = [pairwise(list(products))[0, 1] for products in zip(*split.values(), strict=True)]
    outputs = pair["tensors"]["e.up"]["outputs"]
    assert outputs["largest"] == max(found.outputs.largest for found in angles)
    assert outputs["shared"] == pytest.approx(sum(x.outputs.shared for x in angles) / 3)


# ---- biases


def biases(*seeds: int) -> list[dict[str, Given]]:
    return [{"m.bias": (Dense(randn(seed, 50), 0.5 + seed), (50,))} for seed in seeds]


@pytest.mark.parametrize("combiner", ["total", "linear", "linear:on=factors", "tsv", "iso"])
def test_biases_are_summed_with_the_weights(combiner: str) -> None:
    parts = biases(0, 1, 2)
    (found,) = stacked(parts, combiner=combiner, dtype="fp64", rank=1).values()
    wanted = sum(w * delta(*p["m.bias"]) for w, p in zip(WEIGHTS, parts, strict=True))
    assert isinstance(found, Dense) and close(delta(found, (50,)), wanted, 1e-14)


@pytest.mark.parametrize("on", ["deltas", "factors"])
def test_biases_are_trimmed_and_elected_element_by_element(on: str) -> None:
    parts = biases(0, 1, 2)
    deltas = torch.stack([delta(*part["m.bias"]) for part in parts])
    kept = torch.zeros_like(deltas)
    for row, values in zip(kept, deltas, strict=True):
        largest = values.abs().topk(20).indices
        row[largest] = values[largest]
    (found,) = stacked(parts, combiner=f"magnitude_prune:density=0.4,on={on}").values()
    weights = torch.tensor(WEIGHTS, dtype=torch.float64)
    assert close(delta(found, (50,)), weights @ kept, 1e-6)
    (found,) = stacked(parts, combiner=f"ties:density=0.4,on={on}").values()
    agree = kept.sign() == torch.where(kept.sum(dim=0) >= 0, 1.0, -1.0)
    wanted = (weights[:, None] * kept * agree).sum(dim=0) / agree.sum(dim=0).clamp(min=1)
    assert close(delta(found, (50,)), wanted, 1e-6)


def test_biases_are_dropped_at_random() -> None:
    parts = [{"m.bias": (Dense(torch.ones(4000)), (4000,))}]
    (found,) = stacked(parts, (1.0,), combiner="dare_linear:density=0.25").values()
    assert set(found.values.tolist()) == {0.0, 4.0}
    assert 0.2 < float((found.values != 0).float().mean()) < 0.3
    (again,) = stacked(parts, (1.0,), combiner="dare_linear:density=0.25").values()
    assert torch.equal(found.values, again.values)


def test_sums_of_16_bit_biases_are_fp32() -> None:
    parts = [{"m.bias": (Dense(randn(s, 5).bfloat16()), (5,))} for s in (0, 1)]
    (found,) = stacked(parts).values()
    assert found.values.dtype == torch.float32
    (found,) = stacked(parts, dtype="bf16").values()
    assert found.values.dtype == torch.bfloat16


# ---- rows


def test_rows_are_put_together() -> None:
    parts = [{"t.weight": (rows((3, 1), seed=s), (2, 4))} for s in (0,)]
    parts += [{"t.weight": (rows((7,), seed=5), (1, 4))}]
    given = [(adapter_of(parts[0]), 1.0), (adapter_of(parts[1]), 0.5)]
    stack = loratool.stack(given)
    assert stack["t.weight"].rows == (3, 1, 7) and stack["t.weight"].shape == (3, 4)
    found = loaded(stack)["t.weight"]
    assert isinstance(found, Rows) and found.indices == (3, 1, 7)
    wanted = torch.cat([randn(0, 2, 4), randn(5, 1, 4)]).float()
    assert torch.equal(found.tensor.read(), wanted)
    (note,) = [note for note in stack.notes if "weights do not scale" in note]
    assert "1 table with replaced rows (t.weight, ...)" in note


def test_a_row_that_two_replace_is_named() -> None:
    parts = [{"t.weight": (rows((3, 1)), (2, 4))}, {"t.weight": (rows((1,)), (1, 4))}]
    with pytest.raises(MismatchError, match=r"t\.weight: .* both replace row 1: leave one out"):
        stacked(parts)


# ---- what does not go together


OTHERS: dict[str, tuple[Given, str]] = {
    "h.weight": ((LoHa(some.product(0, 4, 2, 3), some.product(5, 4, 2, 3)), (4, 3)), "LoHa update"),
    "k.weight": ((LoKr(Product(randn(0, 2, 2)), Product(randn(1, 2, 2))), (4, 4)), "LoKr update"),
    "d.weight": ((Dense(randn(2, 4, 3)), (4, 3)), "full-size delta"),
    "o.weight": ((DoRA(low(0, (6, 5)), randn(2, 6)), (6, 5)), "DoRA update"),
    "i.weight": ((IA3(randn(3, 6)), (6, 0)), "IA3 scaling"),
}


def test_kinds_without_factors_are_refused_all_at_once() -> None:
    part = {name: given for name, (given, _) in OTHERS.items()}
    with pytest.raises(MismatchError) as caught:
        stacked([part, {"m.weight": (low(0, (6, 5)), (6, 5))}])
    lines = str(caught.value).splitlines()
    assert lines[0] == "the adapters cannot be combined:" and len(lines) == 6
    for line, (name, (_, kind)) in zip(lines[1:], OTHERS.items(), strict=True):
        assert line.startswith(f"  {name}: {kind} of <computed adapter>: has no factors A and B")
        relative = name[0] in "oi"
        assert line.endswith(f"`loratool convert --to-lora{' --base BASE' * relative}`)")


def test_what_has_the_weight_0_is_not_in_the_way() -> None:
    part = {"h.weight": OTHERS["h.weight"][0], "m.weight": (low(0, (6, 5)), (6, 5))}
    found = loratool.stack([(adapter_of(part), 1.0)], weights=["h.weight=0"])
    assert list(found) == ["m.weight"]


@pytest.mark.parametrize(
    ("one", "other", "words"),
    [
        ((low(0, (6, 5)), (6, 5)), (replacement("m", randn(0, 6, 5)), (6, 5)),
         "adds a low-rank update to it and .* replaces it whole"),
        ((rows((1,)), (1, 5)), (low(0, (6, 5)), (6, 5)),
         "adds a low-rank update to it and .* replaces rows of it"),
        ((experts(0, 2, 3, 4, 1), (2, 3, 4)), (low(0, (2, 3, 4)), (2, 3, 4)),
         "adds low-rank updates of experts to it and .* adds a low-rank update to it"),
        ((Dense(randn(0, 6)), (6,)), (replacement("m", randn(0, 6)), (6,)),
         "adds a full-size delta to it and .* replaces it whole"),
        ((rows((1,), 4), (1, 4)), (rows((2,), 5), (1, 5)), "rows of 4 columns, .* of 5"),
        ((experts(0, 2, 3, 4, 1), (2, 3, 4)), (experts(0, 3, 3, 4, 1), (3, 3, 4)),
         "different bases"),
    ],
)  # fmt: skip
def test_kinds_that_differ_are_named(one: Given, other: Given, words: str) -> None:
    with pytest.raises(MismatchError, match=words):
        stacked([{"m": one}, {"m": other}])


def test_a_table_that_only_one_ties_to_the_head() -> None:
    def adapter(seed: int, tie: bool) -> Adapter:
        update = LazyUpdate("t.weight", "low_rank", (20, 4), "F64", lambda: low(seed, (20, 4)),
                            rank=2, embedding=True)  # fmt: skip
        return Adapter({"t.weight": update}, settings={"ensure_weight_tying": True} if tie else {})

    both = loratool.stack([(adapter(0, True), 1.0), (adapter(1, True), 1.0)])
    assert both.settings == {"ensure_weight_tying": True}
    with pytest.raises(MismatchError, match=r"t\.weight: .*ensure_weight_tying.* changes it alone"):
        loratool.stack([(adapter(0, True), 1.0), (adapter(1, False), 1.0)])
