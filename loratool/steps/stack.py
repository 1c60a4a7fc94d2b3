"""stack: several adapters as one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import TYPE_CHECKING, Any, ClassVar

from loratool import plugins
from loratool.adapter import Adapter, Provenance
from loratool.checkpoint import Checkpoint
from loratool.dtypes import FLOAT_NAMES, parse_float_dtype
from loratool.kinship import base_facts, require_same_digests
from loratool.linalg import RankPolicy
from loratool.naming import reference
from loratool.plugins import Operand, option
from loratool.reports import counted
from loratool.stack_plan import LayerWeight, StackPlan, parse_layer_weight, plan_stack
from loratool.stack_result import (
    base_digests_of,
    base_name_of,
    context_of,
    format_of,
    moves_of,
    settings_of,
    short_targets_of,
    tied_of,
    whole_notes,
)
from loratool.stack_updates import combined_updates, dtypes_of

if TYPE_CHECKING:
    from loratool.stacking import Stacker


@dataclass(frozen=True)
class Stack:
    """Combine several adapters into one: by default their exact weighted sum.

    Adapters that name their weights differently are brought to the first one's naming with --base.
    A weight of 0 leaves an adapter, or with --weights some of its tensors, out; what an adapter
    replaces whole (a head, an embedding) is not scaled by weights.

    Low-rank updates of weights of any shape are combined as matrices, those of experts expert by
    expert, and changes of biases (lora_bias) as the combiner treats vectors: by default the
    weighted sum. Replaced rows of a table are put together; two values for one row are refused.
    Full-size deltas, LoHa, LoKr, DoRA and IA3 have to be made plain LoRA first (`loratool convert
    --to-lora`).

    This is the job of PEFT's add_weighted_adapter, and it agrees with it where that is right. PEFT
    0.21.2 is wrong where the first adapter uses rsLoRA (the result is sqrt(rank) times too large),
    where a module has fewer rows or columns than svd_rank (it breaks), where ranks differ by module
    (rank_pattern: the types that work on factors fail, or write what cannot be loaded), and for
    lora_bias and DoRA (biases and magnitudes are lost), and it refuses target_parameters.
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
        dtypes = dtypes_of(plan, stacker, parse_float_dtype(self.dtype) if self.dtype else None)
        context = context_of(plan)
        updates = combined_updates(plan, stacker, dtypes, context)
        first = reference(plan.adapters)
        files = next((a.model_files for a in (first, *plan.adapters) if a.model_files), {})
        return Adapter(
            updates,
            model_files=files,
            model_config=first.model_config,
            dropped=tuple(dict.fromkeys(n for a in plan.adapters for n in a.dropped)),
            task_type=next((a.task_type for a in plan.adapters if a.task_type), None),
            base_name=base_name_of(plan.adapters),
            context=context,
            kinds={name: kind for a in plan.adapters for name, kind in a.kinds.items()},
            tied=tied_of(plan),
            moves=moves_of(plan.adapters),
            settings=settings_of(plan),
            rslora=len(plan.adapters) == 1 and first.rslora,
            short_targets=short_targets_of(plan),
            naming=first.naming,
            layout={name: rows for a in plan.adapters for name, rows in a.layout.items()},
            format=format_of(plan.adapters),
            base_digests=base_digests_of(plan.adapters),
            notes=(*plan.notes, *whole_notes(plan), *dtypes.notes),
            provenance=_provenance(self, plan, stacker),
            facts=lambda: _facts(self, plan, stacker),
        )


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
