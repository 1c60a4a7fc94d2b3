"""Tensors put aside in a temporary file, which takes disk instead of memory."""

from __future__ import annotations

import tempfile
from collections.abc import Hashable
from types import TracebackType
from typing import Any

import numpy as np
import torch

from loratool.errors import OutputError


class Spool:
    """Holds tensors by key, as fp32, until it is closed; a context manager.

    Raises:
        OutputError: on `put`, where the place for temporary files is full.
    """

    def __init__(self) -> None:
        self._file = tempfile.TemporaryFile()  # noqa: SIM115
        self._places: dict[Hashable, tuple[int, tuple[int, ...]]] = {}
        self._end = 0

    def __enter__(self) -> Spool:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:  # fmt: skip
        self._file.close()

    def put(self, key: Hashable, values: torch.Tensor) -> None:
        """Put a tensor aside."""
        array: Any = values.detach().to("cpu", torch.float32).contiguous().numpy()
        try:
            self._file.write(memoryview(array.reshape(-1)).cast("B"))
            self._file.flush()
        except OSError as error:
            place = tempfile.gettempdir()
            raise OutputError(
                f"{place}: what the models are compared with does not fit here "
                f"({error.strerror}); set TMPDIR to a larger place, or use fewer samples"
            ) from error
        self._places[key] = (self._end, array.shape)
        self._end += array.nbytes

    def get(self, key: Hashable) -> torch.Tensor:
        """A tensor, mapped from the file: it is read where it is looked at."""
        start, shape = self._places[key]
        if 0 in shape:
            return torch.empty(shape)
        return torch.from_numpy(np.memmap(self._file, np.float32, "c", start, shape))
