"""From two tensors to an update: the difference, whether there is one, and its factors.

Everything here touches values; the steps that plan it touch headers only.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch

from loratool.checkpoint import LazyTensor
from loratool.digests import combine_digests
from loratool.errors import InputError
from loratool.experts import gathered
from loratool.linalg import (
    Context,
    Factorization,
    Factorizer,
    RankPolicy,
    SecondMoment,
    Workspace,
    is_finite,
    named_generator,
    tiles,
)
from loratool.lowrank import rounded_factors
from loratool.updates import Experts, LowRank, Replacement


class DeltaReader:
    """Reads pairs of tensors, and remembers the digest of everything it has read.

    Tasks of several threads share one reader; each thread has its own buffers, reused from tensor
    to tensor because fresh large allocations cost more than the arithmetic.
    """

    def __init__(self, factorizer: Factorizer, policy: RankPolicy, seed: int) -> None:
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
        delta = self._delta(context.before, context.after)
        factorize_in = getattr(self._factorizer, "factorize_in", None)
        if factorize_in is None:
            return self._factorizer.factorize(delta, self._policy, generator)
        found: Factorization = factorize_in(delta, self._policy, generator, context)
        return found

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
        found = self._digests[side][tensor.name] = tensor.digest()
        return found

    def _delta(self, before: torch.Tensor, after: torch.Tensor) -> torch.Tensor:
        """after - before in fp32, into this thread's buffer; exact for bf16 and fp16."""
        delta = self._workspace.take("delta", tuple(before.shape), torch.float32)
        for rows in tiles(before):
            _subtract(after[rows], before[rows], delta[rows])
        return delta


def matrices_of(tensor: LazyTensor) -> Iterator[torch.Tensor]:
    """The matrices of a tensor (E, rows, columns), one after the other."""
    for block in tensor.blocks():
        if block.shape[1:] != tensor.shape[1:]:  # no whole matrices
            yield from tensor.read()
            return
        yield from block


def _subtract(one: torch.Tensor, other: torch.Tensor, out: torch.Tensor) -> None:
    """out = one - other, rounded to fp32 once, without temporaries for the usual types."""
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
