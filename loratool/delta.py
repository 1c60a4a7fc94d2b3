"""From two tensors to an update: the difference, whether there is one, and its factors.

Everything here touches values; the steps that plan it touch headers only.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from loratool.ahead import DigestsAhead
from loratool.checkpoint import LazyTensor
from loratool.devices import CPU, Staging
from loratool.digests import combine_digests
from loratool.errors import InputError
from loratool.linalg import (
    Context,
    Factorization,
    Factorizer,
    FormedDelta,
    FormedFactorizer,
    RankPolicy,
    SecondMoment,
    Workspace,
    is_finite,
    named_generator,
    squared_norm,
    tiles,
)
from loratool.updates import Experts, LowRank, Replacement

if TYPE_CHECKING:
    import torch

# Elements a tile of a delta while it is formed: two tensors in bf16, and their difference in fp32
# and in bf16, lie in the cache.
_TILE_ELEMENTS = 1 << 18


class DeltaReader:
    """Reads pairs of tensors, and remembers the digest of everything it has read.

    Tasks of several threads share one reader; each thread has its own buffers, reused from tensor
    to tensor because fresh large allocations cost more than the arithmetic.
    """

    def __init__(
        self,
        factorizer: Factorizer,
        policy: RankPolicy,
        seed: int,
        digests: DigestsAhead | None = None,
        device: str = CPU,
    ) -> None:
        """Bind what all tasks share.

        Args:
            factorizer: what factorizes; a `FormedFactorizer` for any device but the CPU.
            policy: how many singular values to keep.
            seed: of the random start.
            digests: where digests may be had already; None to take them when needed.
            device: where deltas are formed and factorized, as torch writes it.
        """
        self._device = device
        self._staging: Staging | None = None
        self._ahead = digests or DigestsAhead(())
        self._factorizer = factorizer
        self._policy = policy
        self._seed = seed
        self._digests: dict[str, dict[str, str]] = {"base": {}, "tuned": {}}
        self._matrices: set[str] = set()
        self._workspace = Workspace()

    def base_digests(self) -> dict[str, Any]:
        """Digests of the base's tensors that were read."""
        return _digest_facts(self._digests["base"])

    def tuned_digests(self) -> dict[str, Any]:
        """Digests of the fine-tuned model's tensors that were read."""
        return _digest_facts(self._digests["tuned"])

    def duplicates(self) -> list[list[str]]:
        """Names of fine-tuned matrices that hold the same values, grouped."""
        groups: dict[str, list[str]] = {}
        for name in sorted(self._matrices):
            groups.setdefault(self._digests["tuned"][name], []).append(name)
        return [names for names in groups.values() if len(names) > 1]

    def factorize(
        self,
        base: LazyTensor,
        tuned: LazyTensor,
        transposed: bool,
        dtype: str,
        moment: SecondMoment | None = None,
    ) -> LowRank | None:
        """Factorize tuned - base, or None if they are equal, be it in different types.

        Args:
            base: (out, in), or (in, out) if `transposed`; a convolution's (out, in, *kernel) is
                seen as (out, in * kernel).
            tuned: of the same shape.
            transposed: whether both are stored as (in, out).
            dtype: the factors' safetensors dtype.
            moment: of the matrix's inputs, for factorizers that use it.

        Raises:
            InputError: NaN or Inf in either, named.
        """
        from loratool.lowrank import rounded_factors

        if self._read(base, tuned):
            return None
        generator = named_generator(self._seed, tuned.name)
        try:
            found = self._factors(
                tuned.name, base.read(), tuned.read(), transposed, generator, moment
            )
        except InputError as error:
            raise _name_culprit(base, tuned, error) from error
        if base.dtype != tuned.dtype and found.certificate.total == 0:
            return None
        a, b = found.a, found.b
        if transposed:
            a, b = b.T.contiguous(), a.T.contiguous()
        return rounded_factors(a, b, found.certificate, dtype)

    def factorize_experts(
        self, base: LazyTensor, tuned: LazyTensor, transposed: bool, dtype: str
    ) -> Experts | None:
        """Factorize tuned - base expert by expert, or None if they are equal.

        All experts get the rank of the one that needs most; what the others do not need is zero.

        Args:
            base: (E, out, in), or (E, in, out) if `transposed`.
            tuned: of the same shape.
            transposed: whether both are stored as (E, in, out).
            dtype: the factors' safetensors dtype.

        Raises:
            InputError: NaN or Inf in either, named.
        """
        from loratool.experts import gathered
        from loratool.lowrank import rounded_factors

        if self._read(base, tuned):
            return None
        generator = named_generator(self._seed, tuned.name)
        experts: list[LowRank] = []
        for before, after in zip(matrices_of(base), matrices_of(tuned), strict=True):
            try:
                found = self._factors(tuned.name, before, after, transposed, generator)
            except InputError as error:
                raise _name_culprit(base, tuned, error) from error
            experts.append(rounded_factors(found.a, found.b, found.certificate, dtype))
        certificates = [u.certificate for u in experts if u.certificate is not None]
        if base.dtype != tuned.dtype and not any(c.total for c in certificates):
            return None
        update = gathered(experts)
        if transposed:
            update = update.transposed()
            update = replace(update, a=update.a.contiguous(), b=update.b.contiguous())
        return update

    def _factors(
        self,
        name: str,
        before: torch.Tensor,
        after: torch.Tensor,
        transposed: bool,
        generator: torch.Generator,
        moment: SecondMoment | None = None,
    ) -> Factorization:
        context = Context(name, before.flatten(1), after.flatten(1), transposed, moment)
        factorize_in = getattr(self._factorizer, "factorize_in", None)
        if factorize_in is None and isinstance(self._factorizer, FormedFactorizer):
            return self._formed_factors(self._factorizer, context, generator)
        delta = self._formed(context.before, context.after).values
        if factorize_in is None:
            return self._factorizer.factorize(delta, self._policy, generator)
        found: Factorization = factorize_in(delta, self._policy, generator, context)
        return found

    def _formed_factors(
        self, factorizer: FormedFactorizer, context: Context, generator: torch.Generator
    ) -> Factorization:
        import torch

        device = torch.device(self._device)
        rounded = factorizer.wants_rounded(self._policy, device)
        if device.type == "cpu":
            formed = self._formed(context.before, context.after, rounded)
            return factorizer.factorize_formed(formed, self._policy, generator)
        staging = self._staging = self._staging or Staging(device)
        with staging.stream():
            formed = self._formed_there(staging, context, rounded)
            found = factorizer.factorize_formed(formed, self._policy, generator)
            return replace(found, a=found.a.cpu(), b=found.b.cpu(), sigma=found.sigma.cpu())

    def replace(self, base: LazyTensor | None, tuned: LazyTensor) -> Replacement | None:
        """Keep `tuned` whole, or None if it equals `base`, be it in another type.

        Raises:
            InputError: NaN or Inf where the base has none.
        """
        if base is None:
            self._digest("tuned", tuned)
            _require_finite(tuned)
            return Replacement(tuned)
        if self._read(base, tuned):
            return None
        if base.shape != tuned.shape:
            _require_finite(tuned)
            return Replacement(tuned)
        norm, change = _change(base, tuned)
        if not math.isfinite(change):
            raise _name_culprit(base, tuned, InputError("NaN or Inf"))
        if change == 0 and base.dtype != tuned.dtype:
            return None
        return Replacement(tuned, change / norm if norm else math.inf)

    def _read(self, base: LazyTensor, tuned: LazyTensor) -> bool:
        """Digest both; whether they are the same tensor."""
        return self._digest("base", base) == self._digest("tuned", tuned)

    def _digest(self, side: str, tensor: LazyTensor) -> str:
        if side == "tuned" and len(tensor.shape) > 1:
            self._matrices.add(tensor.name)
        found = self._digests[side][tensor.name] = self._ahead.digest(tensor)
        return found

    def _formed(
        self, before: torch.Tensor, after: torch.Tensor, rounded: bool = False
    ) -> FormedDelta:
        """after - before in fp32, into this thread's buffers; exact for bf16 and fp16."""
        import torch

        shape = tuple(before.shape)
        delta = self._workspace.take("delta", shape, torch.float32)
        copy = self._workspace.take("rounded", shape, torch.bfloat16) if rounded else None
        energy = 0.0
        for rows in tiles(before, _TILE_ELEMENTS):
            tile = delta[rows]
            _subtract(after[rows], before[rows], tile)
            energy += squared_norm(tile)
            if copy is not None:
                copy[rows] = tile
        return FormedDelta(delta, energy, copy)

    def _formed_there(self, staging: Staging, context: Context, rounded: bool) -> FormedDelta:
        """As `_formed`, on another device."""
        import torch

        shape, device = tuple(context.before.shape), staging.device
        delta = self._workspace.take("delta", shape, torch.float32, device)
        for rows, (before, after) in staging.tiles(context.before, context.after):
            _subtract(after, before, delta[rows])
        copy = None
        if rounded:
            copy = self._workspace.take("rounded", shape, torch.bfloat16, device).copy_(delta)
        return FormedDelta(delta, squared_norm(delta), copy)


def matrices_of(tensor: LazyTensor) -> Iterator[torch.Tensor]:
    """The matrices of a tensor (E, rows, columns), one after the other."""
    for block in tensor.blocks():
        if block.shape[1:] != tensor.shape[1:]:  # no whole matrices
            yield from tensor.read()
            return
        yield from block


def _subtract(one: torch.Tensor, other: torch.Tensor, out: torch.Tensor) -> None:
    """out = one - other, rounded to fp32 once, without temporaries for the usual types."""
    import torch

    if torch.float64 in (one.dtype, other.dtype):
        out.copy_(one.double() - other.double())
        return
    out.copy_(one)
    out.sub_(other.float() if other.itemsize == 1 else other)  # torch cannot calculate in fp8


def _change(before: LazyTensor, after: LazyTensor) -> tuple[float, float]:
    """||before||_F and ||after - before||_F, accumulated in fp64 tile by tile."""
    norm = change = 0.0
    for one, other in block_pairs(before, after):
        for part in tiles(one):
            old, new = one[part].double(), other[part].double()
            norm += float(old.square().sum())
            change += float((new - old).square().sum())
    return math.sqrt(norm), math.sqrt(change)


def block_pairs(one: LazyTensor, other: LazyTensor) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """The values of two tensors of one shape as pairs of vectors of the same length."""
    import torch

    blocks = other.blocks()
    waiting = torch.empty(0)
    for block in one.blocks():
        left = block.reshape(-1)
        while len(left):
            if not len(waiting):
                waiting = next(blocks).reshape(-1)
            size = min(len(left), len(waiting))
            yield left[:size], waiting[:size]
            left, waiting = left[size:], waiting[size:]


def _digest_facts(digests: dict[str, str]) -> dict[str, Any]:
    return {"digest": combine_digests(digests), "tensors": dict(sorted(digests.items()))}


def _require_finite(tensor: LazyTensor) -> None:
    if not all(is_finite(block) for block in tensor.blocks()):
        raise InputError(f"{tensor.origin}: {tensor.name}: holds NaN or Inf; repair it first")


def _name_culprit(base: LazyTensor, tuned: LazyTensor, error: InputError) -> InputError:
    """Say which of the two tensors holds NaN or Inf."""
    for tensor in (base, tuned):
        if not all(is_finite(block) for block in tensor.blocks()):
            return InputError(
                f"{tensor.origin}: {tensor.name}: holds NaN or Inf; repair it, or leave it out "
                "with --exclude"
            )
    return InputError(f"{tuned.origin}: {tuned.name}: {error}")
