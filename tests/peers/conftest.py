"""Pairs of tiny models and the adapters extracted from them, made once a session."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

import pytest
import torch

import loratool
from tests.models import RECIPES, Pair, make_pair

FULL = 64  # at least the rank of every tiny matrix


@pytest.fixture(autouse=True, scope="session")
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def pair_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Pair]:
    """Name of a recipe -> its saved pair, everything changed."""

    @cache
    def make(name: str) -> Pair:
        return make_pair(RECIPES[name], tmp_path_factory.mktemp(name))

    return make


@pytest.fixture(scope="session")
def adapter_of(
    pair_of: Callable[[str], Pair], tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., Path]:
    """Name of a recipe and a rank -> its saved adapter."""

    @cache
    def make(name: str, rank: int = FULL) -> Path:
        pair = pair_of(name)
        path = tmp_path_factory.mktemp(f"{name}-{rank}") / "adapter"
        loratool.extract(pair.base, pair.tuned, rank=rank).save(path)
        return path

    return make
