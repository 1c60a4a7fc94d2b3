"""Digests that identify tensors: BLAKE3 of dtype, shape and bytes.

Two tensors with the same digest hold the same values in the same type and shape, wherever they
are stored.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import blake3

if TYPE_CHECKING:
    import torch


class TensorDigest:
    """Collects a tensor's blocks in order."""

    def __init__(self, dtype: str, shape: tuple[int, ...]) -> None:
        self._hash = blake3.blake3(f"{dtype}{list(shape)}".encode())

    def update(self, block: torch.Tensor) -> None:
        """Add the next block."""
        import torch

        if block.numel():
            self.update_bytes(block.contiguous().reshape(-1).view(torch.uint8).numpy().data)

    def update_bytes(self, content: memoryview) -> None:
        """Add the bytes of the next block; other threads run meanwhile."""
        self._hash.update(content)

    def hexdigest(self) -> str:
        """The digest so far, as 64 hexadecimal digits."""
        return str(self._hash.hexdigest())


def file_digest(path: Path) -> str:
    """BLAKE3 of a file's bytes, as 64 hexadecimal digits."""
    found = blake3.blake3()
    found.update_mmap(path)
    return str(found.hexdigest())


def combine_digests(digests: dict[str, str]) -> str:
    """One digest for named tensors, independent of their order."""
    text = "".join(f"{name}\0{digest}\n" for name, digest in sorted(digests.items()))
    return str(blake3.blake3(text.encode()).hexdigest())
