"""From two tensors to an update: the difference, whether there is one, and its factors.

Everything here touches values; the steps that plan it touch headers only.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch

from loratool.checkpoint import LazyTensor
from loratool.digests import combine_digests
from loratool.errors import InputError
from loratool.experts import gathered
from loratool.linalg import (
    Certificate,
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
from loratool.noise import rounding_noise
from loratool.updates import Experts, LowRank, Replacement


class DeltaReader:
    """Reads pairs of tensors, and remembers the digest of everything it has read.

    Tasks of several threads share one reader; each thread has its own buffers, reused from tensor
    to tensor because fresh large allocations cost more than the arithmetic.

    Attributes:
        under_noise: fine-tuned tensor -> ||delta||_F^2, of those that hold no update that can be
            told from rounding.
    """

    def __init__(
        self, factorizer: Factorizer, policy: RankPolicy, seed: int, noise_floor: bool = False
    ) -> None:
        """Nothing is read yet.

        Args:
            factorizer: computes the factors.
            policy: how many singular values are kept.
            seed: of the factorizer's random start.
            noise_floor: whether singular values under the edge of the rounding noise are dropped.
        """
        self._factorizer = factorizer
        self._policy = policy
        self._seed = seed
        self._noise_floor = noise_floor
        self._digests: dict[str, dict[str, str]] = {"base": {}, "tuned": {}}
        self._matrices: set[str] = set()
        self._workspace = Workspace()
        self.under_noise: dict[str, float] = {}

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
        parts = self.decompose(base, tuned, transposed, experts=False, moment=moment)
        return low_rank_update(parts, transposed, dtype, base.dtype == tuned.dtype)

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
        parts = self.decompose(base, tuned, transposed, experts=True)
        return experts_update(parts, transposed, dtype, base.dtype == tuned.dtype)

    def decompose(
        self,
        base: LazyTensor,
        tuned: LazyTensor,
        transposed: bool,
        experts: bool,
        policy: RankPolicy | None = None,
        moment: SecondMoment | None = None,
    ) -> Iterator[Factorization]:
        """Factorize each matrix of tuned - base, one after the other; none if the two are equal.

        A matrix that lies under the noise floor gives zero factors.

        Args:
            base: as for `factorize`, or for `factorize_experts`.
            tuned: of the same shape.
            transposed: whether both are stored transposed; the factors are those of what is stored.
            experts: whether the first axis counts matrices.
            policy: how many singular values to keep; None for the reader's own.
            moment: of the matrix's inputs, for factorizers that use it.

        Raises:
            InputError: NaN or Inf in either, named.
        """
        if self._read(base, tuned):
            return
        generator = named_generator(self._seed, tuned.name)
        pairs = (
            zip(matrices_of(base), matrices_of(tuned), strict=True)
            if experts
            else iter([(base.read(), tuned.read())])
        )
        totals, is_noise = 0.0, True
        for before, after in pairs:
            try:
                found = self._factors(
                    tuned.name,
                    before,
                    after,
                    transposed,
                    generator,
                    policy or self._policy,
                    moment,
                )
            except InputError as error:
                raise _name_culprit(base, tuned, error) from error
            totals += found.certificate.total
            is_noise &= found.certificate.captured == 0
            yield found
        if self._noise_floor and is_noise and totals > 0:
            self.under_noise[tuned.name] = totals

    def _factors(
        self,
        name: str,
        before: torch.Tensor,
        after: torch.Tensor,
        transposed: bool,
        generator: torch.Generator,
        policy: RankPolicy,
        moment: SecondMoment | None = None,
    ) -> Factorization:
        context = Context(name, before.flatten(1), after.flatten(1), transposed, moment)
        delta = self._delta(context.before, context.after)
        edge = 0.0
        if self._noise_floor:
            noise = rounding_noise(delta, context.after)
            if math.isfinite(noise.total):  # else the factorizer says so
                policy, edge = replace(policy, floor=noise.floor), noise.edge
        factorize_in = getattr(self._factorizer, "factorize_in", None)
        found: Factorization = (
            self._factorizer.factorize(delta, policy, generator)
            if factorize_in is None
            else factorize_in(delta, policy, generator, context)
        )
        return silenced(found) if float(found.sigma[0]) < edge else found

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


def low_rank_update(
    parts: Iterable[Factorization], transposed: bool, dtype: str, same_type: bool
) -> LowRank | None:
    """The update of a matrix, from what `DeltaReader.decompose` found of it.

    Args:
        parts: at most one.
        transposed: whether the weight is stored as (in, out).
        dtype: the factors' safetensors dtype.
        same_type: whether both models store it in one type; if not, a zero delta is no update.

    Returns:
        None if there is nothing to write.
    """
    found = list(parts)  # to the end, for what the reader notes there
    if not found or _is_nothing([part.certificate for part in found], same_type):
        return None
    a, b = found[0].a, found[0].b
    if transposed:
        a, b = b.T.contiguous(), a.T.contiguous()
    return rounded_factors(a, b, found[0].certificate, dtype)


def experts_update(
    parts: Iterable[Factorization], transposed: bool, dtype: str, same_type: bool
) -> Experts | None:
    """The update of the experts of a weight; for the arguments see `low_rank_update`."""
    experts = [rounded_factors(found.a, found.b, found.certificate, dtype) for found in parts]
    certificates = [u.certificate for u in experts if u.certificate is not None]
    if not experts or _is_nothing(certificates, same_type):
        return None
    update = gathered(experts)
    if transposed:
        update = update.transposed()
        update = replace(update, a=update.a.contiguous(), b=update.b.contiguous())
    return update


def _is_nothing(certificates: Sequence[Certificate], same_type: bool) -> bool:
    """Whether factors hold no update: of equal values in other types, or of noise alone."""
    if any(certificate.captured for certificate in certificates):
        return False
    return not same_type or any(certificate.total for certificate in certificates)


def silenced(found: Factorization) -> Factorization:
    """A factorization of rank 1 that captures nothing."""
    certificate = replace(found.certificate, rank=1, captured=0.0)
    a, b, sigma = (torch.zeros_like(x) for x in (found.a[:1], found.b[:, :1], found.sigma[:1]))
    return Factorization(a, b, sigma, certificate)


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
