"""Pure tensor mathematics: the types of a factorization and the products that must be exact.

No I/O and no global state. torch is imported by the functions that use it.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, runtime_checkable

import blake3

from loratool.errors import UsageError

if TYPE_CHECKING:
    import torch


# A share of the energy closer to 1 than this cannot be told from 1 in fp32.
_SHARE_RESOLUTION = 1e-6


@dataclass(frozen=True)
class RankPolicy:
    """How many singular values to keep.

    Where several are given, the one that keeps the fewest decides.

    Attributes:
        rank: keep at most this many (None: no limit but the matrix).
        energy: keep the fewest that capture at least this share of ||D||_F^2 (None: all of them
            up to `rank`).
        ratio: keep those of at least sigma_1 / ratio (None: however small).
        floor: keep those of at least this share of ||D||_F (None: however small).
    """

    rank: int | None = 16
    energy: float | None = None
    ratio: float | None = None
    floor: float | None = None

    def __post_init__(self) -> None:
        if self.rank is None and self.is_fixed:
            raise UsageError("a rank, an energy, a ratio or a floor is needed")
        if self.rank is not None and self.rank < 1:
            raise UsageError(f"the rank must be at least 1, not {self.rank}")
        if self.energy is not None and not 0 < self.energy <= 1:
            raise UsageError(f"the energy must lie in (0, 1], not {self.energy}")
        if self.ratio is not None and not self.ratio >= 1:
            raise UsageError(f"the ratio must be at least 1, not {self.ratio}")
        if self.floor is not None and not self.floor >= 0:
            raise UsageError(f"the floor must be at least 0, not {self.floor}")

    @property
    def is_fixed(self) -> bool:
        """Whether the rank is known before any singular value is."""
        return self.energy is None and self.ratio is None and self.floor is None

    def limit(self, shape: tuple[int, int]) -> int:
        """The largest rank that this policy allows for a matrix of `shape`."""
        return min(shape) if self.rank is None else min(self.rank, *shape)

    def wanted(self, total: float, margin: float = 0.0) -> float:
        """The energy to capture, as far as fp32 can tell it from the whole; 0 if none is set."""
        share = 0.0 if self.energy is None else min(self.energy + margin, 1 - _SHARE_RESOLUTION)
        return share * total

    def choose(
        self, energies: torch.Tensor, total: float, shape: tuple[int, int], margin: float = 0.0
    ) -> int | None:
        """How many of the leading squared singular values of a matrix to keep, at least 1.

        Args:
            energies: (k,) fp64, descending; those that are known.
            total: ||D||_F^2.
            shape: (out, in) of the matrix.
            margin: added to the energy asked for.

        Returns:
            The number, or None if `energies` has too few to tell.
        """
        known = len(energies)
        counts = [self.limit(shape)]
        if self.energy is not None:
            short = int((energies.cumsum(0) < self.wanted(total, margin)).sum())
            if short < known:
                counts.append(short + 1)
        for least in self._least_energies(energies, total):
            large = int((energies >= least).sum())
            if large < known:
                counts.append(max(1, large))
        smallest = min(counts)
        return smallest if smallest <= known else None

    def _least_energies(self, energies: torch.Tensor, total: float) -> Iterator[float]:
        """What a squared singular value must be at least to be kept."""
        if self.ratio is not None and len(energies):
            yield float(energies[0]) / self.ratio**2
        if self.floor is not None:
            yield self.floor**2 * total


@dataclass(frozen=True)
class SecondMoment:
    """What a matrix is given: C = E[x x^T], so that E ||D x||^2 = ||D C^(1/2)||_F^2.

    Attributes:
        values: (in, in), fp64, symmetric and positive semidefinite; or (in,), its diagonal.
        count: how many vectors it is the mean of.
        drift: (in, in), fp64: E[(y - x) x^T], y being what the fine-tune's matrix is given where
            the model that is built gives x; None where x is all that counts.
    """

    values: torch.Tensor
    count: int
    drift: torch.Tensor | None = None


@dataclass(frozen=True)
class Weighted:
    """Energies in the metric of a second moment C: of D C^(1/2) instead of D.

    Attributes:
        total: ||D C^(1/2)||_F^2, the mean squared change of the outputs.
        captured: the part of it that the factors capture.
        plain: the part that the truncated SVD of the same rank captures.
    """

    total: float
    captured: float
    plain: float


@dataclass(frozen=True)
class Certificate:
    """What a factorization says of its own error.

    Attributes:
        rank: number of columns kept.
        total: ||D||_F^2, accumulated in fp64.
        captured: the part of `total` that the kept directions capture, in fp64.
        rounding: squared norm of what rounding the factors to their dtype added, in fp64.
        optimum_bound: an upper bound of the energy that *any* matrix of this rank captures.
        method: the numeric path taken ("krylov", "gram", ...) for the manifest.
        steps: block steps taken, 0 where that means nothing.
        details: more for the manifest, plain values.
        weighted: the same in the metric of the data, where the factors were made for that.
    """

    rank: int
    total: float
    captured: float
    rounding: float = 0.0
    optimum_bound: float = 0.0
    method: str = ""
    steps: int = 0
    details: Mapping[str, Any] = field(default_factory=dict)
    weighted: Weighted | None = None

    @property
    def energy(self) -> float:
        """Share of ||D||_F^2 captured, in [0, 1]; 1 for a zero delta."""
        return min(1.0, self.captured / self.total) if self.total > 0 else 1.0

    @property
    def relative_error(self) -> float:
        """||D - B A||_F / ||D||_F; 0 for a zero delta."""
        if self.total <= 0:
            return 0.0
        lost = max(0.0, self.total - self.captured) + self.rounding
        return float((lost / self.total) ** 0.5)


@dataclass(frozen=True)
class Factorization:
    """D ~ U diag(sigma) V^T, kept as a balanced pair of factors.

    Attributes:
        a: (r, in), fp32: sqrt(sigma) V^T.
        b: (out, r), fp32: U sqrt(sigma).
        sigma: (r,), fp64, descending.
        certificate: its error.
        is_precise: whether it is closer to the truth than factors of the weights' own type can be.
    """

    a: torch.Tensor
    b: torch.Tensor
    sigma: torch.Tensor
    certificate: Certificate
    is_precise: bool = False


@dataclass(frozen=True)
class Context:
    """Where a delta comes from, for factorizers that use more than its values.

    Attributes:
        name: of the fine-tune's tensor, for messages.
        before: (out, in), the base's values in their own dtype, lying as the delta does.
        after: the fine-tune's, likewise.
        transposed: whether the delta lies as (in, out), so that its inputs are along axis 0.
        moment: of its inputs, where it was collected.
    """

    name: str
    before: torch.Tensor
    after: torch.Tensor
    transposed: bool
    moment: SecondMoment | None = None


@dataclass(frozen=True)
class FormedDelta:
    """A delta with what was measured of it while it was formed, tile by tile, in the cache.

    Attributes:
        values: (out, in), fp32, contiguous. Scratch: it may be overwritten.
        energy: ||values||_F^2, as `squared_norm` gives it: not finite if a value is not.
        rounded: the same in bf16, or None.
    """

    values: torch.Tensor
    energy: float
    rounded: torch.Tensor | None = None


class Factorizer(Protocol):
    """A plugin of kind "factorizers": pure, deterministic for a given generator.

    One that uses more than the delta also has `factorize_in(delta, policy, generator, context)`,
    which is called instead where a `Context` is known. One that can use what is measured while a
    delta is formed is a `FormedFactorizer`, too. One that leaves the work to another has
    `choose(samples, policy, seed) -> Choice`, which is asked once a model. One that may set
    `Factorization.is_precise` says so (`is_precise`).
    """

    def factorize(
        self, delta: torch.Tensor, policy: RankPolicy, generator: torch.Generator
    ) -> Factorization:
        """Factorize `delta` (out, in), fp32, contiguous. It may be overwritten: it is scratch.

        A zero delta gives rank 1 with zero factors. Raises InputError on NaN or Inf.
        """
        ...


class Choice(NamedTuple):
    """What a factorizer that chooses has chosen for a model.

    Attributes:
        name: of the factorizer.
        factorizer: which does the work.
        reason: why, for people.
    """

    name: str
    factorizer: Factorizer
    reason: str


@runtime_checkable
class FormedFactorizer(Protocol):
    """A factorizer that takes a delta with what was measured of it, which spares it passes."""

    def wants_rounded(self, policy: RankPolicy, device: torch.device) -> bool:
        """Whether it would use a copy of the delta in bf16."""
        ...

    def factorize_formed(
        self, delta: FormedDelta, policy: RankPolicy, generator: torch.Generator
    ) -> Factorization:
        """As `Factorizer.factorize`; all products are made on the delta's device.

        The factors may lie there or on the CPU.
        """
        ...


class Workspace(threading.local):
    """Large scratch tensors that live from call to call, one set a thread.

    A fresh allocation of many megabytes is a page fault every 4 KiB, which costs several times the
    arithmetic done in it. Two threads never share a buffer, whichever Workspace they use.
    """

    def __init__(self) -> None:
        self._buffers: dict[tuple[str, torch.dtype, torch.device | None], torch.Tensor] = {}

    def take(
        self,
        name: str,
        shape: tuple[int, ...],
        dtype: torch.dtype,
        device: torch.device | None = None,
    ) -> torch.Tensor:
        """A contiguous tensor of `shape`, on the CPU if no device is named; contents undefined.

        It is valid until the same thread takes the same name and dtype again.
        """
        import torch

        size = math.prod(shape)
        key = (name, dtype, device)
        buffer = self._buffers.get(key)
        if buffer is None or buffer.numel() < size:
            self._buffers.pop(key, None)
            buffer = self._buffers[key] = torch.empty(size, dtype=dtype, device=device)
        return buffer[:size].view(shape)


def tiles(tensor: torch.Tensor, elements: int = 1 << 18) -> Iterator[slice]:
    """Ranges along axis 0 of at most about `elements` elements, or of one row."""
    rows = tensor.shape[0]
    step = max(1, elements * rows // max(1, tensor.numel()))
    return (slice(start, start + step) for start in range(0, rows, step))


def is_finite(tensor: torch.Tensor) -> bool:
    """Whether a tensor of any shape and float dtype holds neither NaN nor Inf; tile by tile."""
    flat = tensor.reshape(-1)

    def finite(tile: torch.Tensor) -> bool:
        tile = tile.float() if tile.itemsize == 1 else tile  # torch cannot test fp8
        return bool(tile.isfinite().all())

    return all(finite(flat[part]) for part in tiles(flat))


def same_values(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether two tensors of one shape hold equal numbers, whatever their types; tile by tile."""
    one, other = one.reshape(-1), other.reshape(-1)
    return all(bool((one[part].double() == other[part].double()).all()) for part in tiles(one))


def named_generator(seed: int, name: str) -> torch.Generator:
    """Random numbers that depend on a seed and a tensor's name, not on the order of work."""
    import torch

    digest = blake3.blake3(f"{seed}\0{name}".encode()).digest(8)
    return torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)


def squared_norm(tensor: torch.Tensor) -> float:
    """||tensor||_F^2 for an fp32 tensor of any shape, good to about 1e-7.

    Each run of 512 elements is summed in fp32 and the runs in fp64: twenty times faster than fp64
    throughout, while one fp32 sum over millions of elements would be wrong in the third digit.
    NaN, Inf and fp32 overflow show as a result that is not finite.
    """
    import torch

    flat = tensor.reshape(-1)
    whole = flat.numel() // _RUN * _RUN
    runs = torch.linalg.vector_norm(flat[:whole].view(-1, _RUN), dim=1).double()
    rest = flat[whole:].double()
    return float(runs @ runs + rest @ rest)


_RUN = 512
