"""Digests taken ahead: a thread reads files while the caller is still importing or computing.

Importing torch takes a second of one core. Meanwhile another core can read the files (which also
brings them into the page cache) and digest them; torch is not needed for that.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager

from loratool.checkpoint import LazyTensor

# How long a thread that computes in the interpreter keeps others waiting, in seconds. The default
# of 5 ms is as long as digesting a whole matrix.
_SWITCH_INTERVAL = 0.0005


class DigestsAhead:
    """Digests of tensors, each taken once: by the thread that runs ahead, or by who is faster.

    Tensors that have to be computed are digested only when asked for.
    """

    def __init__(self, tensors: Iterable[LazyTensor]) -> None:
        """Args: tensors: in the order in which they will be needed; none is read yet."""
        self._tensors = [tensor for tensor in tensors if tensor.raw is not None]
        self._found: dict[int, Future[str]] = {}
        self._keys = {id(tensor) for tensor in self._tensors}
        self._lock = threading.Lock()
        self._stopped = threading.Event()

    def digest(self, tensor: LazyTensor) -> str:
        """The digest of a tensor; waits if it is just being taken."""
        if id(tensor) not in self._keys:
            return tensor.digest()
        self._take(tensor)
        return self._found[id(tensor)].result()

    @contextmanager
    def running(self) -> Iterator[None]:
        """Let the thread run ahead inside the block."""
        thread = threading.Thread(target=self._run, name="loratool-ahead", daemon=True)
        interval = sys.getswitchinterval()
        sys.setswitchinterval(_SWITCH_INTERVAL)
        thread.start()
        try:
            yield
        finally:
            self._stopped.set()
            thread.join()
            sys.setswitchinterval(interval)

    def _run(self) -> None:
        for tensor in self._tensors:
            if self._stopped.is_set():
                return
            self._take(tensor)

    def _take(self, tensor: LazyTensor) -> None:
        """Digest a tensor unless somebody has begun to; an error is kept for who asks."""
        with self._lock:
            if id(tensor) in self._found:
                return
            future = self._found[id(tensor)] = Future[str]()
        try:
            future.set_result(tensor.digest())
        except BaseException as error:
            future.set_exception(error)
