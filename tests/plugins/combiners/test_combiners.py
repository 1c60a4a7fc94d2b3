"""Every combiner against its published formula, written out on dense matrices."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from loratool import plugins
from loratool.errors import InputError, UsageError
from loratool.linalg import RankPolicy
from loratool.updates import LowRank
from loratool_plugins.combiners import _elementwise as elementwise
from loratool_plugins.factorizers.exact import Exact
from tests.adapters import factors

law = settings(derandomize=True, deadline=None, max_examples=25)
FULL = RankPolicy(64)
ELEMENTWISE = ("ties", "dare_linear", "dare_ties", "magnitude_prune")
ALL = plugins.names("combiners")


def part(seed: int, shape: tuple[int, int], rank: int, scale: float = 1.0) -> LowRank:
    b, a = factors(seed, *shape, rank)
    return LowRank(a, b, scale)


@st.composite
def parts(draw: st.DrawFn, rank: int | None = None) -> tuple[list[LowRank], list[float]]:
    shape = draw(st.integers(1, 12)), draw(st.integers(1, 12))
    count = draw(st.integers(1, 4))
    scales = st.sampled_from([1.0, 2.0, 0.3])
    weights = st.sampled_from([1.0, 0.7, -0.4, 2.0])
    seeds = draw(st.lists(st.integers(0, 999), min_size=count, max_size=count, unique=True))
    made = [part(s, shape, rank or draw(st.integers(1, 4)), draw(scales)) for s in seeds]
    return made, [draw(weights) for _ in made]


def dense(update: LowRank) -> torch.Tensor:
    return update.scale * update.b.double() @ update.a.double()


def combine(
    spec: str,
    given_parts: Sequence[LowRank],
    weights: Sequence[float],
    policy: RankPolicy | None = None,
    seed: int = 0,
) -> LowRank:
    found: LowRank = plugins.create("combiners", spec).combine(
        given_parts, weights, policy, Exact(), torch.Generator().manual_seed(seed)
    )
    return found


def close(found: torch.Tensor, wanted: torch.Tensor, tolerance: float = 3e-6) -> None:
    assert found.shape == wanted.shape
    assert float((found - wanted).norm()) <= tolerance * max(1e-30, float(wanted.norm()) + 1.0)


# All combiners


def test_the_projects_combiners_are_registered() -> None:
    assert set(ALL) >= {"total", "linear", "tsv", "iso", *ELEMENTWISE}
    for name in ALL:
        cls = plugins.load("combiners", name)
        assert dataclasses.is_dataclass(cls) and cls.__dataclass_params__.frozen
        assert "arXiv" in cls.__doc__ or "Halko" in cls.__doc__
        assert all(field.metadata["help"] for field in dataclasses.fields(cls))


@pytest.mark.parametrize("name", ALL)
@given(drawn=parts())
@law
def test_the_certificate_is_the_error_against_the_combination(
    name: str, drawn: tuple[list[LowRank], list[float]]
) -> None:
    whole = combine(name, *drawn, policy=None)
    assert whole.certificate is not None
    assert whole.certificate.rank == whole.rank <= sum(p.rank for p in drawn[0])
    if name == "tsv":
        return  # a rank also says how much of each part it takes: tested below
    exact = dense(combine(name, *drawn, policy=FULL))
    for rank in (1, 3):
        found = combine(name, *drawn, policy=RankPolicy(rank))
        assert found.rank <= rank and found.certificate is not None
        error = float((dense(found) - exact).norm())
        told = found.certificate.relative_error * found.certificate.total**0.5
        assert error == pytest.approx(told, abs=1e-5 * (1e-3 + float(exact.norm())))


@pytest.mark.parametrize("name", ALL)
def test_the_same_seed_gives_the_same_bits(name: str) -> None:
    given_parts = [part(s, (300, 40), 3) for s in (1, 2, 3)]
    one, other = (combine(name, given_parts, [1.0, 0.5, -1.0]) for _ in range(2))
    assert torch.equal(one.a, other.a) and torch.equal(one.b, other.b)


@pytest.mark.parametrize("name", ALL)
def test_parts_are_not_written_to(name: str) -> None:
    made = part(1, (30, 20), 3, 2.0)
    before = made.a.clone(), made.b.clone()
    combine(name, [made, part(2, (30, 20), 3)], [0.5, 2.0])
    assert torch.equal(made.a, before[0]) and torch.equal(made.b, before[1])


@pytest.mark.parametrize("name", ALL)
def test_zero_parts_give_a_zero_update(name: str) -> None:
    zero = LowRank(torch.zeros(2, 5), torch.zeros(4, 2), 1.0)
    found = combine(name, [zero, zero], [1.0, 1.0])
    assert float(dense(found).norm()) == 0
    assert found.certificate is not None and found.certificate.relative_error == 0


@pytest.mark.parametrize("name", [name for name in ALL if not name.startswith("dare")])
def test_the_order_of_the_parts_does_not_matter(name: str) -> None:
    made = [part(s, (9, 7), r) for s, r in ((1, 2), (2, 3), (3, 1))]
    given_pairs = list(zip(made, [1.0, 0.5, -2.0], strict=True))
    wanted = dense(combine(name, *zip(*given_pairs, strict=True)))
    for order in itertools.permutations(given_pairs):
        close(dense(combine(name, *zip(*order, strict=True))), wanted)


# The sum


@given(drawn=parts())
@law
def test_total_and_linear_are_the_weighted_sum(drawn: tuple[list[LowRank], list[float]]) -> None:
    wanted = sum(w * dense(p) for p, w in zip(*drawn, strict=True))
    close(dense(combine("total", *drawn)), wanted, 1e-13)
    close(dense(combine("linear", *drawn)), wanted, 1e-13)


def test_total_folds_the_ratio_of_the_scales_into_b() -> None:
    one, other = part(1, (6, 5), 2, 0.5), part(2, (6, 5), 3, 2.0)
    found = combine("total", [one, other], [1.0, -1.0])
    assert found.scale == 0.5 and found.rank == 5
    assert torch.equal(found.b, torch.cat([one.b, -4 * other.b], dim=1).double())
    assert torch.equal(found.a, torch.cat([one.a, other.a]).double())


def test_linear_drops_directions_that_repeat() -> None:
    one = part(1, (20, 30), 3)
    twin = LowRank(one.a.flip(0), one.b.flip(1), 2.0)
    found = combine("linear", [one, twin], [1.0, 1.0])
    assert found.rank == 3
    close(dense(found), 3 * dense(one), 1e-13)


# Element by element


def trimmed(delta: torch.Tensor, density: float) -> torch.Tensor:
    """By a stable sort: of equal magnitudes the first stay."""
    flat = delta.reshape(-1)
    kept = flat.abs().sort(descending=True, stable=True).indices[: int(density * flat.numel())]
    mask = torch.zeros_like(flat)
    mask[kept] = 1
    return (flat * mask).view(delta.shape)


def elected(deltas: Sequence[torch.Tensor], weights: Sequence[float], by: str) -> torch.Tensor:
    """TIES' election and mean, one element after another."""
    result = torch.zeros_like(deltas[0])
    for place in itertools.product(*map(range, result.shape)):
        values = [float(delta[place]) for delta in deltas]
        signs = [math.copysign(1, v) if v else 0 for v in values]
        sign = 1 if math.fsum(values if by == "total" else signs) >= 0 else -1
        chosen = [w * v for v, w, s in zip(values, weights, signs, strict=True) if s == sign]
        result[place] = math.fsum(chosen) / len(chosen) if chosen else 0.0
    return result


@pytest.mark.parametrize("density", [0.05, 0.3, 0.5, 1.0])
@given(drawn=parts())
@law
def test_magnitude_prune_sums_the_largest_elements(
    density: float, drawn: tuple[list[LowRank], list[float]]
) -> None:
    wanted = sum(
        w * trimmed(dense(p).float(), density).double() for p, w in zip(*drawn, strict=True)
    )
    close(dense(combine(f"magnitude_prune:density={density}", *drawn, policy=FULL)), wanted)


@pytest.mark.parametrize("by", ["total", "frequency"])
@pytest.mark.parametrize("density", [0.2, 0.6, 1.0])
@given(drawn=parts())
@settings(law, max_examples=10)
def test_ties_trims_elects_and_averages(
    density: float, by: str, drawn: tuple[list[LowRank], list[float]]
) -> None:
    made, weights = drawn
    deltas = [trimmed(dense(p).float(), density).double() for p in made]
    found = combine(f"ties:density={density},sign={by}", made, weights, policy=FULL)
    close(dense(found), elected(deltas, weights, by))


@pytest.mark.parametrize("combiner", ["dare_linear", "dare_ties"])
@given(drawn=parts())
@settings(law, max_examples=10)
def test_dare_drops_by_its_own_random_streams_and_rescales(
    combiner: str, drawn: tuple[list[LowRank], list[float]]
) -> None:
    made, weights = drawn
    streams = elementwise.streams(torch.Generator().manual_seed(5), len(made))
    thinned = [
        dense(p) * elementwise.keep_mask(dense(p).shape, 0.4, stream) / 0.4
        for p, stream in zip(made, streams, strict=True)
    ]
    wanted = (
        sum(w * d for d, w in zip(thinned, weights, strict=True))
        if combiner == "dare_linear"
        else elected(thinned, weights, "total")
    )
    found = combine(f"{combiner}:density=0.4", made, weights, policy=FULL, seed=5)
    close(dense(found), wanted)


def test_dare_keeps_the_share_and_the_mean() -> None:
    made = LowRank(torch.ones(1, 1000), torch.ones(500, 1), 1.0)
    (rows,) = [elementwise.Rows.of_product(made)]
    for density in (0.1, 0.5, 0.9):
        thin = elementwise.dropped(density, torch.Generator().manual_seed(1))([rows])
        found = elementwise.combined([rows], [1.0], thin, elementwise.weighted_sum)
        assert float((found != 0).float().mean()) == pytest.approx(density, abs=0.003)
        assert float(found.mean()) == pytest.approx(1.0, rel=0.01)
    (one, other) = elementwise.streams(torch.Generator().manual_seed(1), 2)
    masks = [elementwise.keep_mask((100, 100), 0.5, stream) for stream in (one, other)]
    assert 0.45 < float((masks[0] == masks[1]).float().mean()) < 0.55


@pytest.mark.parametrize("tile", [1, 7, 64, 1 << 20])
def test_tiles_change_nothing(tile: int, monkeypatch: pytest.MonkeyPatch) -> None:
    made = [LowRank(torch.eye(12), torch.randint(-3, 4, (40, 12)).float(), 1.0) for _ in range(3)]
    wanted = [dense(combine(name, made, [1.0, 0.5, -1.0], FULL)) for name in ELEMENTWISE]
    monkeypatch.setattr(elementwise, "_TILE_ELEMENTS", tile)
    for name, before in zip(ELEMENTWISE, wanted, strict=True):
        assert torch.equal(dense(combine(name, made, [1.0, 0.5, -1.0], FULL)), before)


EXTREMES = [0.0, -0.0, 1e-45, -1e-45, 1.0, -1.0, 1.0000001, 3e38, -3e38, 2.0, 0.5]


@given(
    values=st.lists(
        st.one_of(st.sampled_from(EXTREMES), st.floats(-10, 10, width=32)), min_size=1, max_size=60
    ),
    density=st.floats(0.01, 1.0),
)
@settings(law, max_examples=200)
def test_the_largest_elements_are_found_exactly(values: list[float], density: float) -> None:
    tensor = torch.tensor(values, dtype=torch.float32)[:, None]
    (thin,) = elementwise.largest(density)([elementwise.Rows.of_tensor(tensor)])
    found = tensor.clone()
    for rows in found.split(7):
        thin(rows)
    assert torch.equal(found, trimmed(tensor, density))


# On factors


@pytest.mark.parametrize("name", ["linear", *ELEMENTWISE])
def test_on_factors_needs_equal_ranks(name: str) -> None:
    combiner = plugins.create("combiners", f"{name}:on=factors")
    assert combiner.needs_equal_ranks
    assert not plugins.create("combiners", name).needs_equal_ranks
    unequal = [part(1, (6, 5), 2), part(2, (6, 5), 3)]
    with pytest.raises(InputError, match=r"needs equal ranks, not 2, 3: use on=deltas"):
        combine(f"{name}:on=factors", unequal, [1.0, 1.0])


@given(drawn=parts(rank=3))
@law
def test_linear_on_factors_is_the_product_of_sums(
    drawn: tuple[list[LowRank], list[float]],
) -> None:
    pairs = list(zip(*drawn, strict=True))
    roots = [math.sqrt(abs(w * p.scale)) for p, w in pairs]
    a = sum(math.copysign(r, w) * p.a.double() for (p, w), r in zip(pairs, roots, strict=True))
    b = sum(r * p.b.double() for (p, _), r in zip(pairs, roots, strict=True))
    found = combine("linear:on=factors", *drawn)
    assert found.rank == 3
    close(dense(found), b @ a, 1e-13)


@given(drawn=parts(rank=3))
@law
def test_ties_on_factors_works_on_a_and_b_apart(drawn: tuple[list[LowRank], list[float]]) -> None:
    made, weights = drawn
    roots = [math.sqrt(abs(w * p.scale)) for p, w in zip(*drawn, strict=True)]
    on_a = [math.copysign(r, w) for r, w in zip(roots, weights, strict=True)]
    a = elected([trimmed(p.a, 0.5).double() for p in made], on_a, "total")
    b = elected([trimmed(p.b, 0.5).double() for p in made], roots, "total")
    close(dense(combine("ties:density=0.5,on=factors", made, weights)), b @ a)


# Singular vectors


def polar(matrix: torch.Tensor) -> torch.Tensor:
    left, sigma, right = torch.linalg.svd(matrix, full_matrices=False)
    kept = sigma > 1e-9 * sigma[0]
    polar: torch.Tensor = left[:, kept] @ right[kept]
    return polar


def tsv(made: Sequence[LowRank], weights: Sequence[float], kept: int) -> torch.Tensor:
    """TSV-M on dense matrices."""
    spectra = []
    for one in made:
        u, sigma, v = torch.linalg.svd(dense(one), full_matrices=False)
        k = min(kept, int((sigma > 1e-9 * sigma[0]).sum()))
        spectra.append((u[:, :k], sigma[:k], v[:k]))
    left = polar(torch.cat([u for u, _, _ in spectra], dim=1))
    right = polar(torch.cat([v for _, _, v in spectra]).T)
    sigma = torch.cat([w * s for (_, s, _), w in zip(spectra, weights, strict=True)])
    product: torch.Tensor = (left * sigma) @ right.T
    return product


@given(drawn=parts())
@law
def test_tsv_makes_singular_vectors_orthogonal(drawn: tuple[list[LowRank], list[float]]) -> None:
    close(dense(combine("tsv", *drawn)), tsv(*drawn, kept=64), 1e-9)


@pytest.mark.parametrize("rank", [3, 4, 6])
def test_tsv_takes_the_same_share_of_every_part(rank: int) -> None:
    made = [part(seed, (40, 30), 5) for seed in (1, 2, 3)]
    weights = [1.0, 0.5, -2.0]
    found = combine("tsv", made, weights, RankPolicy(rank))
    assert found.rank <= rank
    close(dense(found), tsv(made, weights, rank // 3), 1e-9)


def test_tsv_of_orthogonal_parts_is_their_sum() -> None:
    vectors = factors(1, 20, 15, 6)
    left, right = torch.linalg.qr(vectors[0])[0], torch.linalg.qr(vectors[1].T)[0].T
    made = [LowRank(right[:3], left[:, :3], 2.0), LowRank(right[3:], left[:, 3:], 1.0)]
    close(dense(combine("tsv", made, [1.0, 0.5])), dense(made[0]) + 0.5 * dense(made[1]), 1e-6)


@given(drawn=parts())
@law
def test_iso_flattens_the_spectrum_of_the_sum(drawn: tuple[list[LowRank], list[float]]) -> None:
    total = sum(w * dense(p) for p, w in zip(*drawn, strict=True))
    u, sigma, v = torch.linalg.svd(total, full_matrices=False)
    kept = sigma > 1e-9 * sigma[0]
    wanted = sigma[kept].mean() * u[:, kept] @ v[kept]
    close(dense(combine("iso", *drawn)), wanted, 1e-6)
    found = torch.linalg.svdvals(dense(combine("iso", *drawn)))[: int(kept.sum())]
    assert torch.allclose(found, found[:1], rtol=1e-9)


# Options


@pytest.mark.parametrize("name", ELEMENTWISE)
@pytest.mark.parametrize("density", ["0", "-0.5", "1.5", "nan", "inf"])
def test_density_lies_between_0_and_1(name: str, density: str) -> None:
    with pytest.raises(UsageError, match=rf"{name}: density must lie in \(0, 1\], not"):
        plugins.create("combiners", f"{name}:density={density}")


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("ties:on=weights", "on is one of deltas, factors, not 'weights'"),
        ("linear:on=", "on is one of deltas, factors"),
        ("ties:sign=most", "sign is one of total, frequency, not 'most'"),
        ("dare_ties:sign=most", "sign is one of total, frequency, not 'most'"),
        ("dare_linear:sign=total", "no option 'sign'"),
        ("ties:density=half", "density is a number, not 'half'"),
        ("iso:rank=3", "no option 'rank'"),
    ],
)
def test_other_options_are_refused(spec: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        plugins.create("combiners", spec)


@pytest.mark.parametrize("name", ALL)
def test_twice_the_weights_is_twice_the_result(name: str) -> None:
    made = [part(s, (12, 10), 3) for s in (1, 2, 3)]
    once, twice = (dense(combine(name, made, [w, w / 2, -w])) for w in (1.0, 2.0))
    close(twice, 2 * once)
