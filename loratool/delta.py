"""From two tensors to an update: the difference, whether there is one, and its factors.

Everything here touches values; the steps that plan it touch headers only.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from loratool.ahead import DigestsAhead
from loratool.checkpoint import LazyTensor
from loratool.devices import CPU, Staging
from loratool.digests import combine_digests
from loratool.errors import InputError
from loratool.linalg import (
    Certificate,
    Choice,
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
from loratool.suspicion import Suspicion, in_any_order, suspected
from loratool.tiling import difference
from loratool.updates import Experts, LowRank, Replacement

if TYPE_CHECKING:
    import torch

# Elements a tile of a delta while it is formed: two tensors in bf16, and their difference in fp32
# and in bf16, lie in the cache.
_TILE_ELEMENTS = 1 << 18
# Matrices that are looked at for what kind of fine-tune it is.
_SAMPLES = 3
# Certificate.method of factorizers that find the singular values of the delta itself.
_PLAIN_METHODS = ("krylov", "gram")

Sample = tuple[LazyTensor, LazyTensor, bool]  # base, fine-tune, whether they are transposed


class DeltaReader:
    """Reads pairs of tensors, and remembers the digest of everything it has read.

    Tasks of several threads share one reader; each thread has its own buffers, reused from tensor
    to tensor because fresh large allocations cost more than the arithmetic.

    Attributes:
        under_noise: fine-tuned tensor -> ||delta||_F^2, of those that hold no update that can be
            told from rounding.
    """

    def __init__(
        self,
        factorizer: Factorizer,
        policy: RankPolicy,
        seed: int,
        noise_floor: bool = False,
        digests: DigestsAhead | None = None,
        device: str = CPU,
        samples: Sequence[Sample] = (),
        precise: str = "",
    ) -> None:
        """Bind what all tasks share; nothing is read yet.

        Args:
            factorizer: what factorizes; a `FormedFactorizer` for any device but the CPU.
            policy: how many singular values to keep.
            seed: of the random start.
            noise_floor: whether singular values under the edge of the rounding noise are dropped.
            digests: where digests may be had already; None to take them when needed.
            device: where deltas are formed and factorized, as torch writes it.
            samples: the matrices from which some may be taken to see what fine-tune it is.
            precise: the dtype of factors that are worth more than the one asked for, if another.
        """
        self._samples = {sample[1].name: sample for sample in samples}
        self._precise = precise
        self._choice: Choice | None = None
        self._choosing = threading.Lock()
        self._spectra: dict[str, tuple[float, list[float]]] = {}
        self._suspicion: Suspicion | None = None
        self._looked_at = 0
        self._device = device
        self._staging: Staging | None = None
        self._ahead = digests or DigestsAhead(())
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

    def choice(self) -> Choice | None:
        """What the factorizer has chosen; None if it does not choose, or had no occasion to."""
        return self._choice

    def suspicion(self) -> Suspicion | None:
        """Whether a few of the matrices that were factorized look like a merged, rounded LoRA.

        Reads these again. The same whatever the order of work was.
        """
        if self._looked_at == len(self._spectra):
            return self._suspicion
        names = [name for name in self._spectra if name in self._samples]
        chosen = in_any_order(names)[:_SAMPLES]
        tuned = {name: self._samples[name][1] for name in names}
        self._looked_at = len(self._spectra)
        self._suspicion = suspected(
            ((name, tuned[name].read().flatten(1), *self._spectra[name]) for name in chosen),
            weights=sum(tensor.numel for tensor in tuned.values()),
        )
        return self._suspicion

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
        return low_rank_update(parts, transposed, dtype, base.dtype == tuned.dtype, self._precise)

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
        return experts_update(parts, transposed, dtype, base.dtype == tuned.dtype, self._precise)

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
                raise culprit(base, tuned, error) from error
            if not experts:
                self._remember(tuned.name, found)
            totals += found.certificate.total
            is_noise &= found.certificate.captured == 0
            yield found
        if self._noise_floor and is_noise and totals > 0:
            self.under_noise[tuned.name] = totals

    def _remember(self, name: str, found: Factorization) -> None:
        # Where recovery was tried, or decided against, there is nothing left to suspect.
        untried = self._choice is None and "recovery" not in found.certificate.details
        if untried and found.certificate.method.startswith(_PLAIN_METHODS):
            energies = found.sigma.double().square().tolist()
            self._spectra[name] = (found.certificate.total, energies)

    def _chosen(self) -> Factorizer:
        """The factorizer, or the one that it has chosen by samples, which it is asked once."""
        choose = getattr(self._factorizer, "choose", None)
        if choose is None:
            return self._factorizer
        with self._choosing:
            if self._choice is None:
                self._choice = choose(self._changed(), self._policy, self._seed)
            return self._choice.factorizer

    def _changed(self) -> Iterator[tuple[torch.Tensor, Context]]:
        """Deltas of samples that are not zero, in an order that depends on names alone."""
        for name in in_any_order(self._samples):
            base, tuned, transposed = self._samples[name]
            if self._read(base, tuned):
                continue
            context = Context(name, base.read().flatten(1), tuned.read().flatten(1), transposed)
            delta = self._formed(context.before, context.after).values
            if not is_finite(delta):
                raise culprit(base, tuned)
            if delta.any():
                yield delta, context

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
        factorizer = self._chosen()
        factorize_in = getattr(factorizer, "factorize_in", None)
        if factorize_in is None and isinstance(factorizer, FormedFactorizer):
            return self._formed_factors(factorizer, context, policy, generator)
        delta = self._formed(context.before, context.after).values
        policy, edge = self._above_noise(policy, delta, context.after)
        found: Factorization = (
            factorizer.factorize(delta, policy, generator)
            if factorize_in is None
            else factorize_in(delta, policy, generator, context)
        )
        return silenced(found) if float(found.sigma[0]) < edge else found

    def _above_noise(
        self, policy: RankPolicy, delta: torch.Tensor, after: torch.Tensor
    ) -> tuple[RankPolicy, float]:
        """The policy for one delta, and what its largest singular value must reach."""
        if not self._noise_floor:
            return policy, 0.0
        from loratool.noise import rounding_noise

        noise = rounding_noise(delta, after)
        if not math.isfinite(noise.total):  # the factorizer says so
            return policy, 0.0
        return replace(policy, floor=noise.floor), noise.edge

    def _formed_factors(
        self,
        factorizer: FormedFactorizer,
        context: Context,
        policy: RankPolicy,
        generator: torch.Generator,
    ) -> Factorization:
        import torch

        device = torch.device(self._device)
        rounded = factorizer.wants_rounded(policy, device)
        if device.type == "cpu":
            formed = self._formed(context.before, context.after, rounded)
            policy, edge = self._above_noise(policy, formed.values, context.after)
            found = factorizer.factorize_formed(formed, policy, generator)
            return silenced(found) if float(found.sigma[0]) < edge else found
        staging = self._staging = self._staging or Staging(device)
        with staging.stream():
            formed = self._formed_there(staging, context, rounded)
            values = formed.values.cpu() if self._noise_floor else formed.values
            policy, edge = self._above_noise(policy, values, context.after)
            found = factorizer.factorize_formed(formed, policy, generator)
            found = replace(found, a=found.a.cpu(), b=found.b.cpu(), sigma=found.sigma.cpu())
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
            raise culprit(base, tuned)
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
            difference(after[rows], before[rows], tile)
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
            difference(after, before, delta[rows])
        copy = None
        if rounded:
            copy = self._workspace.take("rounded", shape, torch.bfloat16, device).copy_(delta)
        return FormedDelta(delta, squared_norm(delta), copy)


def low_rank_update(
    parts: Iterable[Factorization],
    transposed: bool,
    dtype: str,
    same_type: bool,
    precise: str = "",
) -> LowRank | None:
    """The update of a matrix, from what `DeltaReader.decompose` found of it.

    Args:
        parts: at most one.
        transposed: whether the weight is stored as (in, out).
        dtype: the factors' safetensors dtype.
        same_type: whether both models store it in one type; if not, a zero delta is no update.
        precise: the dtype of factors that are worth more than `dtype`, if another.

    Returns:
        None if there is nothing to write.
    """
    from loratool.lowrank import rounded_factors

    found = list(parts)  # to the end, for what the reader notes there
    if not found or _is_nothing([part.certificate for part in found], same_type):
        return None
    a, b = found[0].a, found[0].b
    if transposed:
        a, b = b.T.contiguous(), a.T.contiguous()
    dtype = precise if precise and found[0].is_precise else dtype
    return rounded_factors(a, b, found[0].certificate, dtype)


def experts_update(
    parts: Iterable[Factorization],
    transposed: bool,
    dtype: str,
    same_type: bool,
    precise: str = "",
) -> Experts | None:
    """The update of the experts of a weight; for the arguments see `low_rank_update`."""
    from loratool.experts import gathered
    from loratool.lowrank import rounded_factors

    matrices = list(parts) if precise else parts  # one type for all
    if precise and any(found.is_precise for found in matrices):
        dtype = precise
    experts = [rounded_factors(found.a, found.b, found.certificate, dtype) for found in matrices]
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
    import torch

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


def culprit(
    base: LazyTensor | None, tuned: LazyTensor, error: InputError | None = None
) -> InputError:
    """Say which of two tensors holds NaN or Inf.

    Args:
        base: the one that the base has, if any.
        tuned: the fine-tune's.
        error: what to say if none of them does; None if that is an overflow.
    """
    for tensor in filter(None, (base, tuned)):
        if not all(is_finite(block) for block in tensor.blocks()):
            return InputError(
                f"{tensor.origin}: {tensor.name}: holds NaN or Inf; repair it, or leave it out "
                "with --exclude"
            )
    why = error or "its difference from the base overflows"
    return InputError(f"{tuned.origin}: {tuned.name}: {why}")
