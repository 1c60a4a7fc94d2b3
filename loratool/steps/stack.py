"""stack: several adapters as one."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import TYPE_CHECKING, Any, ClassVar

from loratool import plugins
from loratool.adapter import Adapter, LazyUpdate, Provenance
from loratool.card import is_hub_name
from loratool.checkpoint import Checkpoint, LazyTensor
from loratool.dtypes import FLOAT_NAMES, itemsize, parse_float_dtype
from loratool.errors import InputError, MismatchError
from loratool.kinship import base_facts, require_same_digests
from loratool.linalg import RankPolicy
from loratool.naming import reference
from loratool.plugins import Operand, option
from loratool.reports import counted
from loratool.stack_plan import (
    LayerWeight,
    Share,
    StackPlan,
    parse_layer_weight,
    plan_stack,
)
from loratool.updates import LowRank

if TYPE_CHECKING:
    import torch

    from loratool.stacking import Stacker


@dataclass(frozen=True)
class Stack:
    """Combine several adapters into one: by default their exact weighted sum.

    Adapters that name their weights differently are brought to the first one's naming with --base.
    A weight of 0 leaves an adapter, or with --weights some of its tensors, out; what an adapter
    replaces whole (a head, an embedding) is not scaled by weights.

    This is the job of PEFT's add_weighted_adapter, and it agrees with it where that is right. PEFT
    0.21.2 is wrong where the first adapter uses rsLoRA (the result is sqrt(rank) times too large),
    where a module has fewer rows or columns than svd_rank (it breaks), where ranks differ by module
    (rank_pattern: the types that work on factors fail, or write what cannot be loaded), and for
    lora_bias and DoRA (biases and magnitudes are lost). loratool is right for rsLoRA and for all
    ranks and patterns, and refuses lora_bias and DoRA.
    """

    operands: ClassVar[tuple[Operand, ...]] = (
        Operand("adapters", "adapter", many=True),
        Operand(
            "base", "checkpoint", required=False, flag=True,
            help="the base model, where the adapters name its weights differently",
        ),
    )  # fmt: skip
    output: ClassVar[str] = "stacked"

    combiner: str = option(
        "total", "how to combine, with options: ties:density=0.5", kind="combiners"
    )
    weights: tuple[str, ...] = option(
        (),
        "multiply the weight of tensors or modules whose name matches, of one adapter if named; "
        "the last match counts",
        metavar="[ADAPTER:]GLOB=W",
    )
    rank: int | None = option(None, "recompress every update to this rank at most")
    energy: float | None = option(
        None, "recompress to the smallest rank that keeps this share of ||delta||^2"
    )
    ratio: float | None = option(
        None, "recompress to the singular values of at least the largest divided by this"
    )
    dtype: str | None = option(
        None, "type of the factors (default: the adapters', or fp32 where that keeps a sum exact)",
        choices=tuple(FLOAT_NAMES),
    )  # fmt: skip
    factorizer: str = option("krylov", "how dense combinations are factorized", kind="factorizers")
    seed: int = option(0, "seed of combiners and factorizers that draw random numbers")

    def __post_init__(self) -> None:
        # Wrong values are told before anything is opened.
        self._policy()
        self._layer_weights()
        plugins.create("combiners", self.combiner)
        plugins.create("factorizers", self.factorizer)

    def _policy(self) -> RankPolicy | None:
        if self.rank is self.energy is self.ratio is None:
            return None
        return RankPolicy(self.rank, self.energy, self.ratio)

    def _layer_weights(self) -> tuple[LayerWeight, ...]:
        return tuple(map(parse_layer_weight, self.weights))

    def run(
        self, adapters: Sequence[tuple[Adapter, float]], base: Checkpoint | None = None
    ) -> Adapter:
        """Compare headers and plan one update for each tensor; nothing is computed yet.

        Args:
            adapters: (adapter, weight) pairs.
            base: what their names are resolved to, if they differ.

        Raises:
            MismatchError: the adapters do not belong together.
            InputError: nothing is left, or a --weights option matches nothing.
            UsageError: a weight is not finite, or all of them are 0.
        """
        plan = plan_stack(adapters, base, self._layer_weights())
        from loratool.stacking import Stacker

        stacker = Stacker(
            plugins.create("combiners", self.combiner),
            self._policy(),
            plugins.create("factorizers", self.factorizer),
            self.seed,
            plan.names,
        )
        dtype, dtype_notes = _factor_dtype(self, plan, stacker)
        context = _context(plan)
        updates = _updates(plan, stacker, dtype, context)
        first = reference(plan.adapters)
        files = next((a.model_files for a in (first, *plan.adapters) if a.model_files), {})
        return Adapter(
            updates,
            model_files=files,
            model_config=first.model_config,
            dropped=tuple(dict.fromkeys(n for a in plan.adapters for n in a.dropped)),
            task_type=next((a.task_type for a in plan.adapters if a.task_type), None),
            base_name=_base_name(plan.adapters),
            context=context,
            kinds={name: kind for a in plan.adapters for name, kind in a.kinds.items()},
            tied=_tied(plan),
            moves=_moves(plan.adapters),
            settings={k: v for a in plan.adapters for k, v in a.lasting_settings.items()},
            rslora=len(plan.adapters) == 1 and first.rslora,
            short_targets=_short_targets(plan),
            naming=first.naming,
            layout={name: rows for a in plan.adapters for name, rows in a.layout.items()},
            format=_format(plan.adapters),
            base_digests=_base_digests(plan.adapters),
            notes=(*plan.notes, *_whole_notes(plan), *dtype_notes),
            provenance=_provenance(self, plan, stacker),
            facts=lambda: _facts(self, plan, stacker),
        )


def _format(adapters: Sequence[Adapter]) -> str:
    """The adapters' own format where it says their names; else PEFT."""
    formats = {adapter.format for adapter in adapters}
    is_named = any(adapter.naming or adapter.layout for adapter in adapters)
    return formats.pop() if is_named and len(formats) == 1 else "peft"


def _whole_notes(plan: StackPlan) -> Iterator[str]:
    for number, adapter in enumerate(plan.adapters):
        whole = [
            name
            for name, shares in plan.shares.items()
            for share in shares
            if share.number == number and share.update.kind == "replacement" and share.weight != 1
        ]
        if whole:
            yield (
                f"{adapter.label}: {counted(len(whole), 'tensor')} replaced whole ({whole[0]}, "
                "...): weights do not scale these"
            )


def _factor_dtype(step: Stack, plan: StackPlan, stacker: Stacker) -> tuple[str, tuple[str, ...]]:
    """The factors' dtype, and a note if it is wider than the adapters'."""
    if step.dtype:
        return parse_float_dtype(step.dtype), ()
    dtypes = {share.update.dtype for _, shares in plan.low_rank() for share in shares}
    if len(dtypes) != 1:
        return ("F64" if "F64" in dtypes else "F32"), ()
    common = dtypes.pop()
    if itemsize(common) >= 4:
        return common, ()
    if stacker.policy is not None or not getattr(stacker.combiner, "exact", False):
        return (common if itemsize(common) == 2 else "F32"), ()
    inexact = next((n for n, shares in plan.low_rank() if not _folds_exactly(plan, shares)), None)
    if inexact is None:
        return common, ()
    return "F32", (
        f"the weights times the scales are not powers of two apart ({inexact}, ...): factors are "
        f"written in fp32 to keep the sum exact; --dtype {_typed(common)} rounds them",
    )


def _typed(dtype: str) -> str:
    return next(text for text, name in FLOAT_NAMES.items() if name == dtype)


def _folds_exactly(plan: StackPlan, shares: Sequence[Share]) -> bool:
    """Whether all weights times scales are one number times powers of two."""
    if len(shares) == 1:
        return True
    factors = []
    for share in shares:
        if plan.adapters[share.number].path is None:
            return False  # only computing it would tell its scale
        found = share.update.load()  # maps the factors, reads none
        if isinstance(found, LowRank) and found.scale != 0:
            factors.append(abs(share.weight * found.scale))
    return all(math.frexp(factor / min(factors))[0] == 0.5 for factor in factors)


def _updates(
    plan: StackPlan, stacker: Stacker, dtype: str, context: dict[str, LazyTensor]
) -> dict[str, LazyUpdate]:
    updates = {}
    for name, shares in plan.shares.items():
        first = shares[0].update
        if first.kind == "replacement":
            updates[name] = LazyUpdate(
                name,
                "replacement",
                first.shape,
                first.dtype,
                _replacement(name, shares, context),
                origin=first.origin,
            )
            continue
        updates[name] = LazyUpdate(
            name,
            "low_rank",
            first.shape,
            dtype,
            _combination(stacker, name, shares, dtype),
            rank=_rank(stacker, name, shares),
            transposed=_transposed(shares),
            beneath=next((s.update.beneath for s in shares if s.update.beneath), None),
        )
    return updates


def _combination(
    stacker: Stacker, name: str, shares: Sequence[Share], dtype: str
) -> Callable[[], Any]:
    return lambda: stacker.combine(name, shares, dtype)


def _replacement(
    name: str, shares: Sequence[Share], context: dict[str, LazyTensor]
) -> Callable[[], Any]:
    def load() -> Any:
        from loratool.stacking import replacement

        return replacement(name, shares, context)

    return load


def _rank(stacker: Stacker, name: str, shares: Sequence[Share]) -> int | None:
    """The largest rank that the result may have, where headers tell it.

    Raises:
        MismatchError: the combiner needs equal ranks, and two differ.
    """
    known = [(share, share.update.rank) for share in shares if share.update.rank is not None]
    equal = getattr(stacker.combiner, "needs_equal_ranks", False)
    if equal and known:
        one, rank = known[0]
        for other, other_rank in known[1:]:
            if other_rank != rank:
                raise MismatchError(
                    f"{name}: {one.label} has rank {rank} and {other.label} rank {other_rank}; "
                    "on=factors needs equal ranks: use on=deltas"
                )
    if len(known) < len(shares):
        return None
    largest = known[0][1] if equal else sum(rank for _, rank in known)
    shape = shares[0].update.shape
    if stacker.policy is not None:
        return min(largest, stacker.policy.limit((shape[0], shape[1])))
    is_sum = getattr(stacker.combiner, "exact", False) or equal
    return largest if is_sum else min(largest, *shape)


def _transposed(shares: Sequence[Share]) -> bool | None:
    """Whether the base stores the weight as (in, out), if one of the adapters knows."""
    known = [s.update.transposed for s in shares if s.update.transposed is not None]
    return any(known) if known else None


def _context(plan: StackPlan) -> dict[str, LazyTensor]:
    """The values that a format may need of whole modules, as far as the adapters know them.

    What the result replaces gets its value when it is loaded. What it leaves alone has the base's
    value, which an adapter knows that does not change it. Nobody knows the value of the rest.
    """
    if len(plan.adapters) == 1 and all(s.weight == 1 for ss in plan.shares.values() for s in ss):
        return dict(plan.adapters[0].context)
    context: dict[str, LazyTensor] = {}
    for adapter in plan.adapters:
        for name, tensor in adapter.context.items():
            shares = plan.shares.get(name, ())
            if shares and shares[0].update.kind == "replacement":
                context.setdefault(name, tensor)
            elif shares or name in adapter:
                context.setdefault(name, _unknown(tensor))
            elif name not in context or context[name].origin == "":
                context[name] = tensor
    return context


def _unknown(tensor: LazyTensor) -> LazyTensor:
    """Stands for a tensor that is needed only where a format cannot say what the result is."""

    def blocks() -> Iterator[torch.Tensor]:
        raise InputError(
            f"{tensor.name}: PEFT would keep the module whole that holds it, and its value is not "
            "known without the base: leave the module out with --weights"
        )
        yield

    return LazyTensor(tensor.name, tensor.dtype, tensor.shape, blocks)


def _base_name(adapters: Sequence[Adapter]) -> str:
    names = [adapter.base_name for adapter in adapters if adapter.base_name]
    return next((name for name in names if is_hub_name(name)), next(iter(names), ""))


def _tied(plan: StackPlan) -> dict[str, str]:
    tied: dict[str, str] = {}
    for adapter in plan.adapters:
        for name, twin in adapter.tied.items():
            for share in plan.shares.get(name, ()):
                if name not in plan.adapters[share.number].tied:
                    raise MismatchError(
                        f"{name}: {adapter.label} ties it to {twin}, and {share.label} changes it "
                        f"alone: leave it out with --weights '{share.name}:{name}=0'"
                    )
            if tied.setdefault(name, twin) != twin:
                raise MismatchError(
                    f"{name}: {adapter.label} ties it to {twin}, another adapter to {tied[name]}"
                )
    return tied


def _moves(adapters: Sequence[Adapter]) -> tuple[tuple[str, str], ...]:
    moves: dict[str, str] = {}
    for adapter in adapters:
        for old, new in adapter.moves:
            if moves.setdefault(old, new) != new:
                raise MismatchError(
                    f"{adapter.label}: its {old}* is the base's {new}*, another adapter's "
                    f"{moves[old]}*: give the base with --base"
                )
    return tuple(moves.items())


def _short_targets(plan: StackPlan) -> dict[str, frozenset[str]]:
    """The short names that mean the same modules to all who know them, and no others of ours."""
    ours = [name.removesuffix(".weight") for name, _ in plan.low_rank()]
    found: dict[str, set[frozenset[str]]] = {}
    for adapter in plan.adapters:
        for short, modules in adapter.short_targets.items():
            found.setdefault(short, set()).add(modules)
    agreed = {short: next(iter(sets)) for short, sets in found.items() if len(sets) == 1}
    return {
        short: modules
        for short, modules in agreed.items()
        if all(m in modules for m in ours if f".{m}".endswith(f".{short}"))
    }


def _base_digests(adapters: Sequence[Adapter]) -> dict[str, str]:
    return {name: digest for a in adapters for name, digest in a.base_digests.items()}


def _provenance(step: Stack, plan: StackPlan, stacker: Stacker) -> Provenance:
    terms = ", ".join(f"{w:g} {n}" for w, n in zip(plan.weights, plan.names, strict=True))

    def lines() -> tuple[str, ...]:
        is_sum = getattr(stacker.combiner, "exact", False)
        of = "the exact weighted sum" if is_sum else f"`{step.combiner}`"
        return (f"energy and errors are those against {of}", *stacker.interference.lines())

    return Provenance(
        "Stacking",
        "Stacked",
        f"{counted(len(plan.adapters), 'adapter')} ({terms}) combined by loratool: "
        f"`{step.combiner}`.",
        lines,
        nothing="no adapter changes anything: there is nothing to stack",
    )


def _facts(step: Stack, plan: StackPlan, stacker: Stacker) -> dict[str, Any]:
    """For the manifest; after draining, when computed adapters know the base's digests too."""
    records = [
        (a.label, a.base_digests or a.facts().get("base", {}).get("tensors", {}))
        for a in plan.adapters
    ]
    for (label, digests), (other_label, others) in combinations(records, 2):
        require_same_digests(label, digests, other_label, others)
    return {
        "options": {
            "combiner": step.combiner,
            "weights": list(step.weights),
            "rank": step.rank,
            "energy": step.energy,
            "ratio": step.ratio,
            "factorizer": step.factorizer,
            "seed": step.seed,
        },
        "parts": [
            {"name": name, "weight": weight}
            for name, weight in zip(plan.names, plan.weights, strict=True)
        ],
        "interference": stacker.interference.data(),
        **base_facts({name: digest for _, own in records for name, digest in own.items()}),
    }
