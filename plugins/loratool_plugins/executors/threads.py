"""Tasks in threads of this process: torch releases the interpreter lock while it computes."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeVar

from loratool.errors import UsageError
from loratool.plugins import option

T = TypeVar("T")
R = TypeVar("R")


@dataclass(frozen=True)
class Threads:
    """As many tasks at a time as there are cores."""

    workers: int = option(0, "number of threads; 0 for one a core")

    def __post_init__(self) -> None:
        if self.workers < 0:
            raise UsageError(f"threads: workers must be 0 or more, not {self.workers}")

    def map(self, function: Callable[[T], R], tasks: Iterable[T]) -> Iterator[R]:
        """Yield function(task) in the order of the tasks.

        Results wait for their turn, so only a few tasks run ahead of the consumer: memory stays
        bounded by the number of workers.
        """
        workers = self.workers or _cores()
        pending: deque[Future[R]] = deque()
        pool = ThreadPoolExecutor(workers, "loratool", initializer=_use_one_core)
        try:
            for task in tasks:
                pending.append(pool.submit(function, task))
                if len(pending) > 2 * workers:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        finally:
            for future in pending:
                future.cancel()
            pool.shutdown(wait=True)


def _use_one_core() -> None:
    """OpenMP counts its threads for each thread that calls it: without this each has all cores."""
    import torch

    torch.set_num_threads(1)


def _cores() -> int:
    if hasattr(os, "sched_getaffinity"):  # Linux: the cores this process may use
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
