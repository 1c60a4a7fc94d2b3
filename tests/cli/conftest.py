"""One tiny base, its fine-tune and their adapter, for all tests of the command line."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cli.tiny import Tensors, done, finetuned, llama, loratool, save_model, unchanged


@pytest.fixture(scope="session")
def tensors() -> Tensors:
    return llama()


@pytest.fixture(scope="session")
def inputs(tmp_path_factory: pytest.TempPathFactory, tensors: Tensors) -> Iterator[Path]:
    """A directory with `base`, `tuned` and `adapter`, which no test may change."""
    folder = tmp_path_factory.mktemp("inputs")
    save_model(folder / "base", tensors)
    save_model(folder / "tuned", finetuned(tensors))
    done(loratool("extract", folder / "base", folder / "tuned", "-o", folder / "adapter"))
    with unchanged(folder):
        yield folder


@pytest.fixture
def base(inputs: Path) -> Path:
    return inputs / "base"


@pytest.fixture
def tuned(inputs: Path) -> Path:
    return inputs / "tuned"


@pytest.fixture
def adapter(inputs: Path) -> Path:
    return inputs / "adapter"
