"""Sums over positions against plain formulas, and their laws."""

from __future__ import annotations

import math

import pytest
import torch

from loratool import fidelity
from loratool.fidelity import Closeness, wilson
from tests.updates import randn


def closeness(found: torch.Tensor, expected: torch.Tensor, are_logits: bool = True) -> Closeness:
    sums = Closeness()
    sums.add(found, expected, are_logits)
    return sums


def test_the_means_are_those_of_plain_formulas() -> None:
    x, y = randn(0, 7, 5), randn(1, 7, 5)
    found = closeness(x, y)
    expected = torch.nn.functional.kl_div(
        x.log_softmax(-1), y.log_softmax(-1), log_target=True, reduction="batchmean"
    )
    assert found.kl == pytest.approx(float(expected), rel=1e-12)
    assert found.agreement == float((x.argmax(-1) == y.argmax(-1)).double().mean())
    cosine = torch.nn.functional.cosine_similarity(x, y).mean()
    assert found.cosine == pytest.approx(float(cosine), rel=1e-12)
    error = ((x - y).norm(dim=-1) / y.norm(dim=-1)).mean()
    assert found.error == pytest.approx(float(error), rel=1e-12)
    assert found.positions == 7 and found.classes == 5


def test_batches_add_up_and_tiles_do_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    x, y = randn(0, 40, 6), randn(1, 40, 6)
    whole = closeness(x, y)
    parts = Closeness()
    parts.add(x[:13], y[:13], True)
    parts.add(x[13:], y[13:], True)
    monkeypatch.setattr(fidelity, "_TILE", 18)
    tiled = closeness(x, y)
    for other in (parts, tiled):
        assert other.kl == pytest.approx(whole.kl, rel=1e-12)
        assert other.cosine == pytest.approx(whole.cosine, rel=1e-12)
        assert other.agreement == whole.agreement and other.positions == 40


def test_the_same_is_the_same_and_a_constant_does_not_change_probabilities() -> None:
    y = randn(0, 9, 4)
    same = closeness(y, y)
    assert (same.kl, same.error, same.agreement) == (0.0, 0.0, 1.0)
    assert same.cosine == pytest.approx(1)
    shifted = closeness(y + 3, y)
    assert shifted.kl == pytest.approx(0, abs=1e-12) and shifted.agreement == 1
    assert shifted.error > 0


def test_small_divergences_are_exact() -> None:
    """In fp32 a KL of 1e-12 would drown; to second order it is half the variance of the change."""
    y, change = randn(0, 1, 1000), 1e-6 * randn(1, 1, 1000)
    p = y.softmax(-1)
    expected = 0.5 * float((p * change**2).sum() - (p * change).sum() ** 2)
    assert closeness(y + change, y).kl == pytest.approx(expected, rel=1e-3)


def test_impossible_classes() -> None:
    y = torch.tensor([[1.0, 2.0, -math.inf]])
    x = torch.tensor([[1.5, 2.0, -math.inf]])
    both = closeness(x, y)
    assert both.kl == pytest.approx(closeness(x[:, :2], y[:, :2]).kl)
    assert both.cosine == pytest.approx(closeness(x[:, :2], y[:, :2]).cosine)
    assert closeness(y, x[:, :3].nan_to_num(neginf=0.0)).kl == math.inf


def test_vectors_have_no_probabilities_and_zero_is_like_zero() -> None:
    found = closeness(torch.zeros(2, 3), torch.zeros(2, 3), are_logits=False)
    assert (found.kl, found.agreement, found.interval) == (None, None, None)
    assert (found.cosine, found.error) == (1.0, 0.0)
    assert math.isnan(Closeness().cosine)


def test_the_interval_of_wilson() -> None:
    assert wilson(0, 0) == (0.0, 1.0)
    low, high = wilson(10, 10)
    assert low == pytest.approx(0.7225, abs=1e-4) and high == 1.0
    assert wilson(0, 10)[1] == pytest.approx(1 - low)
    # Newcombe (1998), table I: 81 of 263.
    assert wilson(81, 263) == pytest.approx((0.2553, 0.3662), abs=1e-4)
