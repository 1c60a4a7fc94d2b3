"""What huggingface_hub says by itself: bars belong on a terminal, its warnings nowhere.

Its warnings of retries name signed addresses; what comes of a retry is told in one message.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager

from huggingface_hub.utils import (
    are_progress_bars_disabled,
    disable_progress_bars,
    enable_progress_bars,
)


@contextmanager
def quietly(*, bars: bool = False) -> Iterator[None]:
    """No warnings inside the block, and no progress bars unless `bars`."""
    logger = logging.getLogger("huggingface_hub")
    level, hides = logger.level, not bars and not are_progress_bars_disabled()
    logger.setLevel(logging.ERROR)
    if hides:
        disable_progress_bars()
    try:
        yield
    finally:
        logger.setLevel(level)
        if hides:
            enable_progress_bars()
