"""Interference from factors, against dense matrices and known angles."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from loratool.interference import Collector, pairwise
from loratool.lowrank import Product
from tests.adapters import factors

law = settings(derandomize=True, deadline=None, max_examples=40)


def dense(part: Product) -> torch.Tensor:
    return part.factor * part.b.double() @ part.a.double()


def basis(matrix: torch.Tensor) -> torch.Tensor:
    u, sigma, _ = torch.linalg.svd(matrix.double(), full_matrices=False)
    return u[:, sigma > 1e-6 * sigma[0]]


@given(
    seeds=st.lists(st.integers(0, 999), min_size=2, max_size=4, unique=True),
    ranks=st.lists(st.integers(1, 5), min_size=4, max_size=4),
    shape=st.tuples(st.integers(1, 12), st.integers(1, 12)),
    sign=st.sampled_from([1.0, -0.3]),
)
@law
def test_every_figure_is_that_of_the_dense_matrices(
    seeds: list[int], ranks: list[int], shape: tuple[int, int], sign: float
) -> None:
    parts = [
        Product(*factors(s, *shape, r), sign if s % 2 else 2.0)
        for s, r in zip(seeds, ranks, strict=False)
    ]
    found = pairwise(parts)
    assert len(found) == math.comb(len(parts), 2)
    for (i, j), interference in found.items():
        one, other = dense(parts[i]), dense(parts[j])
        cosine = float((one * other).sum() / one.norm() / other.norm())
        assert interference.cosine == pytest.approx(cosine, abs=1e-9)
        for spaces, left, right in (
            (interference.outputs, parts[i].b, parts[j].b),
            (interference.inputs, parts[i].a.T, parts[j].a.T),
        ):
            cosines = torch.linalg.svdvals(basis(left).T @ basis(right)).clamp(max=1)
            assert spaces.largest == pytest.approx(float(cosines[0]), abs=1e-6)
            assert spaces.shared == pytest.approx(float(cosines.square().mean()), abs=1e-6)
            product = (left.double().T @ right.double()).norm() / left.norm() / right.norm()
            assert spaces.product == pytest.approx(float(product), rel=1e-5, abs=1e-9)


def test_known_angles() -> None:
    eye = torch.eye(4)
    angle = math.pi / 6
    turned = math.cos(angle) * eye[:, :1] + math.sin(angle) * eye[:, 1:2]
    one = Product(torch.cat([eye[:, :1], eye[:, 2:3]], dim=1), eye[:2])
    other = Product(torch.cat([turned, eye[:, 3:]], dim=1), eye[2:], 5.0)
    found = pairwise([one, other])[0, 1]
    assert found.outputs.largest == pytest.approx(math.cos(angle), abs=1e-6)
    assert found.outputs.shared == pytest.approx(math.cos(angle) ** 2 / 2, abs=1e-6)
    assert found.inputs.largest == found.inputs.shared == found.cosine == 0


def test_a_part_against_itself_and_its_opposite() -> None:
    one = Product(*factors(1, 20, 15, 4), 2.0)
    found = pairwise([one, one, one._replace(factor=-1.0)])
    assert found[0, 1].cosine == pytest.approx(1)
    assert found[0, 2].cosine == pytest.approx(-1)
    assert found[0, 2].outputs.shared == pytest.approx(1, abs=1e-9)


def test_zero_and_dependent_parts() -> None:
    one = Product(*factors(1, 6, 5, 2))
    zero = Product(torch.zeros(6, 3), torch.randn(3, 5, generator=torch.Generator().manual_seed(0)))
    found = pairwise([one, zero])[0, 1]
    assert (found.cosine, found.outputs.largest, found.outputs.product) == (0, 0, 0)
    twice = Product(torch.cat([one.b, one.b], dim=1), torch.cat([one.a, one.a]))
    assert pairwise([one, twice])[0, 1].outputs.shared == pytest.approx(1, abs=1e-6)


def test_the_report_says_what_the_signs_mean() -> None:
    b, a = factors(1, 20, 15, 2)
    parts = {0: [Product(b, a)], 1: [Product(b, a, 0.5)], 2: [Product(b, a, -1.0)]}
    collector = Collector(["math", "code", "prose"])
    for tensor in ("x.weight", "w.weight"):
        collector.add(tensor, parts)
    collector.add("alone.weight", {1: parts[1]})
    text = "\n".join(collector.lines())
    assert "math and code: +1.000 (they add up)" in text
    assert "math and prose: -1.000 (they cancel in part)" in text
    assert "x.weight: +1.000 (math and code; 100% of the output directions shared" in text
    assert "alone" not in text
    first = collector.data()[0]
    assert first["parts"] == ["math", "code"] and list(first["tensors"]) == ["w.weight", "x.weight"]
    assert Collector(["math"]).lines() == ()


def test_the_overall_cosine_weighs_tensors_by_their_size() -> None:
    b, a = factors(1, 20, 15, 2)
    collector = Collector(["math", "code"])
    collector.add("large", {0: [Product(b, a, 10.0)], 1: [Product(b, a, 10.0)]})
    collector.add("small", {0: [Product(b, a, 0.1)], 1: [Product(b, a, -0.1)]})
    assert collector.cosines()[0, 1] == pytest.approx(1, abs=3e-4)
    opposed = Collector(["math", "code"])
    opposed.add("one", {0: [Product(b, a)], 1: [Product(b, a)]})
    opposed.add("two", {0: [Product(b, a)], 1: [Product(b, a, -1.0)]})
    assert opposed.cosines()[0, 1] == pytest.approx(0, abs=1e-12)
