"""Factorizations kept on disk, largest singular values first, to be cut to smaller ranks later.

Where one rank depends on all matrices, or several ranks of each are wanted, every matrix is
factorized once, at the largest rank in question. Its singular values stay in memory; its factors,
which together may be larger than memory, wait in a file that has no name and is gone with its last
user, however that ends.
"""

from __future__ import annotations

import math
import os
import tempfile
import threading
import weakref
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO

import torch

from loratool.linalg import Certificate, Factorization


@dataclass(frozen=True)
class Stored:
    """One factorization on disk.

    Attributes:
        sigma: (r,) fp64, descending.
        certificate: of all r of them.
        rows: in: of A (r, in).
        columns: out: of B (out, r), which lies transposed.
        offset: where A starts in the file; B^T follows.
    """

    sigma: torch.Tensor
    certificate: Certificate
    rows: int
    columns: int
    offset: int


class FactorStore:
    """A temporary file of factorizations; several threads may use it."""

    def __init__(self, folder: Path | None) -> None:
        """Make the file.

        Args:
            folder: on whose disk it lies; None for the system's place for temporary files.
        """
        self._file: IO[bytes] = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115
        weakref.finalize(self, self._file.close)
        self._end = 0
        self._lock = threading.Lock()

    def add(self, found: Factorization) -> Stored:
        """Keep a factorization."""
        rank, inner = found.a.shape
        out = found.b.shape[0]
        size = 4 * rank * (inner + out)
        with self._lock:
            offset, self._end = self._end, self._end + size
        self._write(found.a, offset)
        self._write(found.b.t(), offset + 4 * rank * inner)
        return Stored(found.sigma, found.certificate, inner, out, offset)

    def load(self, stored: Stored, rank: int) -> Factorization:
        """The best approximation of at most this rank that a factorization holds."""
        full = len(stored.sigma)
        rank = min(rank, full)
        a = self._read(stored.offset, rank, stored.rows)
        b = self._read(stored.offset + 4 * full * stored.rows, rank, stored.columns)
        return Factorization(
            a, b.t(), stored.sigma[:rank], truncated(stored.certificate, stored.sigma, rank)
        )

    def _write(self, tensor: torch.Tensor, offset: int) -> None:
        view = tensor.float().contiguous().numpy().reshape(-1).view("uint8").data
        while len(view):
            done = os.pwrite(self._file.fileno(), view, offset)
            view, offset = view[done:], offset + done

    def _read(self, offset: int, rows: int, columns: int) -> torch.Tensor:
        tensor = torch.empty(rows, columns, dtype=torch.float32)
        view = tensor.numpy().reshape(-1).view("uint8").data
        while len(view):
            done = os.preadv(self._file.fileno(), [view], offset)
            if done == 0:
                raise AssertionError("the file of factors ends early")
            view, offset = view[done:], offset + done
        return tensor


def truncated(certificate: Certificate, sigma: torch.Tensor, rank: int) -> Certificate:
    """What is true of the leading `rank` components of a factorization.

    No matrix of that rank captures more than they do and all that the factorization missed:
    ||D_r||^2 <= ||(P D)_r||^2 + ||D - P D||^2 for its projection P (Ky Fan).

    Args:
        certificate: of all components, before rounding.
        sigma: (r,) fp64, descending.
        rank: how many are kept, at most r.
    """
    if rank >= len(sigma):
        return certificate
    captured = float(sigma[:rank].square().sum())
    missed = max(0.0, certificate.optimum_bound - certificate.captured)
    bound = min(captured + missed, certificate.optimum_bound)
    return replace(certificate, rank=rank, captured=captured, optimum_bound=bound)


def total_energy(parts: Iterable[Stored]) -> float:
    """||D||_F^2 of the matrices that a weight consists of."""
    return math.fsum(part.certificate.total for part in parts)


def energies(parts: Sequence[Stored]) -> list[float]:
    """The squared singular values of all matrices of a weight, added rank by rank."""
    total = torch.zeros(max(len(part.sigma) for part in parts), dtype=torch.float64)
    for part in parts:
        total[: len(part.sigma)] += part.sigma.square()
    return total.tolist()
