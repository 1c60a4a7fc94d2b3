"""Third-party code, kept quiet."""

from __future__ import annotations

import io
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout

_MESSAGE_LIMIT = 240


@contextmanager
def quiet() -> Iterator[None]:
    """Keep warnings, logs and progress bars of other packages off the terminal inside the block."""
    sink = io.StringIO()
    with without_warnings(), redirect_stdout(sink), redirect_stderr(sink):
        yield


@contextmanager
def without_warnings() -> Iterator[None]:
    """Keep warnings and logs off the terminal inside the block; our own progress bar stays."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


def shorten(error: BaseException) -> str:
    """The first line of an exception's message, within a limit."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = lines[0] if lines else type(error).__name__
    return text if len(text) <= _MESSAGE_LIMIT else f"{text[:_MESSAGE_LIMIT]}..."
