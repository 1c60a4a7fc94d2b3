"""Devices other than the CPU: is it there, and how tensors get to it.

A thread that works for a device has a stream and staging buffers of its own there. While one
thread's stream computes, another thread's copies: so copies and computing overlap without a stream
having to wait for another.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from loratool.errors import InputError, UsageError
from loratool.linalg import tiles

if TYPE_CHECKING:
    import torch

CPU = "cpu"
# Elements a staging buffer: large enough for the full speed of a bus.
_STAGED_ELEMENTS = 1 << 22
# Buffers a thread: one is filled while the other is on its way.
_BUFFERS = 2


def check_device(name: str) -> None:
    """Check that a device can be used; torch is imported for others than the CPU only.

    Args:
        name: as torch writes it: "cpu", "cuda", "cuda:1", "xpu", ...

    Raises:
        UsageError: torch knows no such kind of device, or none that holds values.
        InputError: this machine, or this torch, has none, or it has no fp64.
    """
    if name == CPU:
        return
    import torch

    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UsageError(f"--device {name}: {_first_line(error)}") from error
    if device.type == "meta":
        raise UsageError("--device meta: holds no values")
    try:
        torch.ones(1, dtype=torch.float64, device=device).add_(1).cpu()
    except (RuntimeError, AssertionError, NotImplementedError, TypeError) as error:
        raise InputError(
            f"--device {name}: cannot be used here ({_first_line(error)}); leave --device out to "
            "work on the CPU"
        ) from error


def multiplies_bf16(device: torch.device) -> bool:
    """Whether a device has products of bf16: by its kind and flags, never by timing."""
    import torch

    if device.type == "cpu":
        flags = torch.cpu.get_capabilities()
        return any(flags.get(flag, False) for flag in ("avx512_bf16", "amx_bf16"))
    if device.type == "cuda":
        with torch.cuda.device(device):
            return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    return False


class Staging(threading.local):
    """Copies to one device, in this thread's stream, through buffers that are used again and again.

    On CUDA the buffers are pinned, so a copy runs while the next buffer is filled; elsewhere copies
    are finished when they return.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._is_cuda = device.type == "cuda"
        self._buffers: dict[torch.dtype, list[tuple[torch.Tensor, Any]]] = {}
        self._stream: Any = None

    @contextmanager
    def stream(self) -> Iterator[None]:
        """Let all work inside the block go through this thread's stream."""
        if not self._is_cuda:
            yield
            return
        import torch

        if self._stream is None:
            self._stream = torch.cuda.Stream(self.device)  # type: ignore[no-untyped-call]
        with torch.cuda.stream(self._stream):
            yield
            self._stream.synchronize()

    def tiles(self, *sources: torch.Tensor) -> Iterator[tuple[slice, tuple[torch.Tensor, ...]]]:
        """Rows of matrices of one shape on the device, tile by tile.

        Args:
            sources: on the CPU; views of memory maps, maybe.

        Yields:
            Which rows, and these rows of every source.
        """
        for rows in tiles(sources[0], _STAGED_ELEMENTS):
            yield rows, tuple(self._copied(source[rows], n) for n, source in enumerate(sources))

    def _copied(self, source: torch.Tensor, place: int) -> torch.Tensor:
        """A copy on the device, in the order of this thread's stream."""
        import torch

        buffers = self._buffers.setdefault(source.dtype, [])
        while len(buffers) < _BUFFERS * (place + 1):
            buffers.append((self._buffer(source), None))
        # The buffers of a place take turns.
        first = _BUFFERS * place
        buffer, sent = buffers[first]
        if buffer.numel() < source.numel():
            buffer = self._buffer(source)
        elif sent is not None:
            sent.synchronize()
        staged = buffer[: source.numel()].view(source.shape).copy_(source)
        copied = staged.to(self.device, non_blocking=self._is_cuda, copy=True)
        if self._is_cuda:
            sent = torch.cuda.Event()  # type: ignore[no-untyped-call]
            sent.record(self._stream)
        buffers[first : first + _BUFFERS] = [*buffers[first + 1 : first + _BUFFERS], (buffer, sent)]
        return copied

    def _buffer(self, source: torch.Tensor) -> torch.Tensor:
        import torch

        size = max(_STAGED_ELEMENTS, source.numel())
        return torch.empty(size, dtype=source.dtype, pin_memory=self._is_cuda)


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
