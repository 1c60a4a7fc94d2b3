"""convert: the same adapter in another format, or as plain LoRA."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any, ClassVar

from loratool import plugins
from loratool.adapter import (
    Adapter,
    FormatOptions,
    LazyUpdate,
    Provenance,
    without_entries,
)
from loratool.checkpoint import Checkpoint
from loratool.dtypes import FLOAT_NAMES, parse_float_dtype
from loratool.engine import refusals
from loratool.errors import (
    InputError,
    MismatchError,
    Problem,
    UsageError,
    grouped,
    raise_problems,
    some,
)
from loratool.kinship import base_facts
from loratool.linalg import RankPolicy
from loratool.outcome import counted_kinds
from loratool.plugins import Operand, option, spelling_of
from loratool.reports import listed
from loratool.respelling import named_for
from loratool.skeleton import TASK_HEADS
from loratool.underneath import Underneath, weights_below
from loratool.updates import FACTORABLE, KIND_NAMES, NEED_BASE

if TYPE_CHECKING:
    from loratool.converting import Converter

# The last part of a convolution's name; in UNets of single files it does not say so.
_CONVOLUTION = re.compile(
    r"conv|(in_layers_2|out_layers_3|_0_op|skip_connection|input_blocks_0_0|_out_2)$"
)
# Without --rank and --energy: exact up to the largest rank that servers commonly take, and beyond
# it the smallest rank up to the same for this share of ||delta||^2.
_USUAL_RANK = 64
_USUAL_ENERGY = 0.999
_FACTORS = ("low_rank", "sparse", "experts")  # kinds of update that --lora-only keeps


@dataclass(frozen=True)
class Convert:
    """Write an adapter in another format, or make plain LoRA of it.

    Another format changes no value: factors pass through bit for bit, and what the format cannot
    carry is an error, or left out with --drop.

    --to-lora makes low-rank factors of every other kind of update. LoHa and LoKr, in factors
    themselves, are converted exactly where the rank allows it, and else cut optimally; full-size
    deltas, DoRA and IA3 are factorized, the last two against the weights of --base. The report says
    for each tensor what was lost. Without --rank and --energy: exact up to rank 64, else the
    smallest rank up to 64 that captures 99.9% of ||delta||^2. What is low-rank already stays as it
    is (`loratool rescale` cuts that).

    --lora-only leaves out what is not low-rank then (heads, norms, embeddings and biases that are
    kept whole), for servers that take nothing else.
    """

    operands: ClassVar[tuple[Operand, ...]] = (
        Operand("adapter", "adapter"),
        Operand(
            "base", "checkpoint", required=False, flag=True,
            help="the base model: resolves names, and DoRA and IA3 are relative to it",
        ),
    )  # fmt: skip
    output: ClassVar[str] = "{adapter}-{format_or_lora}"

    format: str | None = option(
        None, "adapter format to write (default: the adapter's own)", kind="adapter_formats"
    )
    to_lora: bool = option(False, "make plain low-rank updates of every other kind")
    rank: int | None = option(None, "with --to-lora: this rank at most")
    energy: float | None = option(
        None, "with --to-lora: the smallest rank that captures this share of ||delta||^2"
    )
    lora_only: bool = option(
        False, "leave out what is not a low-rank update (heads, norms, biases, embeddings)"
    )
    drop: bool = option(False, "leave out what the format cannot carry")
    alpha: float | None = option(None, "the adapter's alpha, where its files do not say it")
    enable_lora: str = option(
        "", "which parts of fused weights have an update, where its files do not say it",
        metavar="1,0,1",
    )  # fmt: skip
    fan_in_fan_out: bool = option(
        False, "the base stores adapted weights as (in, out), where its files do not say it"
    )
    dtype: str | None = option(
        None, "type of the factors that --to-lora makes (default: fp32)",
        choices=tuple(FLOAT_NAMES),
    )  # fmt: skip
    factorizer: str = option(
        "krylov", "with --to-lora: how whole matrices are factorized", kind="factorizers"
    )
    seed: int = option(0, "seed of the factorizer's random start")

    def __post_init__(self) -> None:
        # Wrong values are told before anything is opened.
        if self.format is None and not (self.to_lora or self.lora_only):
            raise UsageError(
                "nothing to do: give --format (another format), --to-lora or --lora-only, or "
                "several of them"
            )
        if not self.to_lora:
            for name in ("rank", "energy", "dtype"):
                if getattr(self, name) is not None:
                    raise UsageError(f"--{name} is for what --to-lora computes: add --to-lora")
        self._policy()
        if self.alpha is not None and not math.isfinite(self.alpha):
            raise UsageError(f"alpha must be a finite number, not {self.alpha:g}")
        self._slots()
        if self.dtype is not None:
            parse_float_dtype(self.dtype)
        if self.format is not None:
            plugins.create("adapter_formats", self.format)
        plugins.create("factorizers", self.factorizer)

    @property
    def format_or_lora(self) -> str:
        """What the output's name ends in."""
        return self.format.partition(":")[0] if self.format else "lora"

    def _policy(self) -> RankPolicy:
        if self.rank is None and self.energy is None:
            return RankPolicy(_USUAL_RANK, _USUAL_ENERGY)
        return RankPolicy(self.rank, self.energy)

    def _slots(self) -> tuple[bool, ...] | None:
        words = {"1": True, "true": True, "0": False, "false": False}
        if not self.enable_lora:
            return None
        try:
            slots = [words[word.strip().lower()] for word in self.enable_lora.split(",")]
        except KeyError:
            raise UsageError(
                f"--enable-lora {self.enable_lora}: write a 1 or a 0 for each part: 1,0,1"
            ) from None
        return tuple(slots)

    def run(self, adapter: Adapter, base: Checkpoint | None = None) -> Adapter:
        """Plan every update by headers; nothing is computed yet.

        Args:
            adapter: the adapter.
            base: the model that it is for; needed for DoRA, IA3, and unresolved names.

        Raises:
            MismatchError: the adapter's files contradict themselves, it does not fit the base, or
                the format cannot carry all of it; all complaints at once.
            InputError: the base is needed, or nothing is left to write.
        """
        told = FormatOptions(
            alpha=self.alpha,
            enable_lora=self._slots(),
            fan_in_fan_out=self.fan_in_fan_out or None,
            base=base,
        )
        adapter = adapter.reread(told)
        raise_problems(f"{adapter.label} cannot be converted:", adapter.problems)
        if base is not None:
            writer = plugins.create("adapter_formats", self.format or adapter.format)
            adapter = named_for(adapter, base, *spelling_of(writer))
        below = {} if base is None else weights_below(adapter, base)
        kept = {n: u for n, u in adapter.items() if base is None or n in below or not u.optional}
        planned, converter = dict(kept), None
        if self.to_lora and (chosen := _to_convert(kept)):
            _require_base(chosen, adapter, None if base is None else below)
            converter = self._converter(adapter)
            planned |= {n: converter.planned(u, below.get(n)) for n, u in chosen.items()}
        left_out: dict[str, LazyUpdate] = {}
        if self.lora_only:
            left_out = {n: u for n, u in planned.items() if u.kind not in _FACTORS}
            planned = {n: u for n, u in planned.items() if n not in left_out}
            if not planned:
                raise InputError(f"{adapter.label}: has no low-rank update: nothing would be left")
        bare = self._without_entries(planned, self.format or adapter.format)
        planned, kept = planned | bare, kept | bare
        changed = {n: KIND_NAMES[kept[n].kind] for n in planned if planned[n] is not kept[n]}
        result = replace(
            _without(adapter, left_out),
            updates=planned,
            format=self.format or adapter.format,
            settings=adapter.lasting_settings if changed or left_out else adapter.settings,
            base_name=adapter.base_name or (base.hub_name if base is not None else ""),
            base_config=adapter.base_config if base is None else base.config,
            files={},
            path=None,
        )
        faults = _grouped_convolutions(changed, below)
        result, dropped = self._fitting(result, adapter.label, faults)
        if bare:
            dropped = (
                *dropped,
                f"left out: the single entries of {some(list(bare))}: what they change is lost",
            )
        notes = (*adapter.notes, *dropped, *self._notes(kept, left_out, converter))
        return replace(
            result,
            notes=notes,
            provenance=self._provenance(adapter, result, converter, changed),
            facts=lambda: _facts(self, adapter, converter),
        )

    def _without_entries(
        self, planned: Mapping[str, LazyUpdate], format: str
    ) -> dict[str, LazyUpdate]:
        """The factors alone of updates whose single entries are to be left out."""
        writer = plugins.create("adapter_formats", format)
        if not (self.lora_only or (self.drop and "sparse" not in writer.carries)):
            return {}
        return {n: without_entries(u) for n, u in planned.items() if u.kind == "sparse"}

    def _converter(self, adapter: Adapter) -> Converter:
        from loratool.converting import Aim, Converter

        exact_up_to = _USUAL_RANK if self.energy is None else 0
        if self.energy is None and self.rank is not None:
            exact_up_to = self.rank
        return Converter(
            Aim(self._policy(), exact_up_to),
            plugins.create("factorizers", self.factorizer),
            self.seed,
            parse_float_dtype(self.dtype) if self.dtype else None,
            adapter.label,
        )

    def _fitting(
        self, result: Adapter, label: str, faults: Sequence[Problem]
    ) -> tuple[Adapter, tuple[str, ...]]:
        """The result as its format can carry it, and what was left out for that.

        Args:
            result: what was asked for.
            label: what errors call the adapter.
            faults: what no format can carry.

        Raises:
            MismatchError: the format cannot carry all of it, and --drop is not given.
            InputError: nothing is left.
        """
        writer = plugins.create("adapter_formats", result.format)
        heading = f"{label} cannot be written as {result.format.partition(':')[0]}:"
        problems = [*faults, *refusals(result, writer)]
        problems = [problem for problem in problems if problem.severity == "error"]
        if not problems:
            return result, ()
        faulty = {problem.tensor for problem in problems if problem.tensor in result}
        if not self.drop or len(faulty) < len({problem.tensor for problem in problems}):
            raise MismatchError("\n".join([heading, *(f"  {text}" for text in grouped(problems))]))
        updates = {name: u for name, u in result.items() if name not in faulty}
        if not updates:
            raise InputError(f"{heading} with --drop nothing is left to write")
        result = replace(result, updates=updates)
        raise_problems(heading, refusals(result, writer))
        return result, tuple(f"left out: {text}" for text in grouped(problems))

    def _notes(
        self,
        kept: Mapping[str, LazyUpdate],
        left_out: Mapping[str, LazyUpdate],
        converter: Converter | None,
    ) -> Iterator[str]:
        if left_out:
            kinds = ", ".join(counted_kinds(update.kind for update in left_out.values()))
            yield f"left out: {kinds} ({listed(list(left_out), 3)}): what they change is lost"
        if not self.to_lora:
            return
        if converter is None:
            yield "every update is plain LoRA already, or of a vector: nothing is computed"
        large = [n for n, u in kept.items() if u.kind == "low_rank" and u.rank and self._cuts(u)]
        if large:
            yield (
                f"{some(large)}: low-rank already, of a rank above {self.rank}: kept as it is "
                f"(`loratool rescale --rank {self.rank}` cuts it)"
            )
        whole = [n for n, update in kept.items() if update.is_whole and n not in left_out]
        if whole:
            yield (
                f"{some(whole)}: set, not changed: kept whole, which servers that take factors "
                "alone (vLLM) refuse"
            )

    def _cuts(self, update: LazyUpdate) -> bool:
        return self.rank is not None and (update.rank or 0) > self.rank

    def _provenance(
        self,
        adapter: Adapter,
        result: Adapter,
        converter: Converter | None,
        changed: Mapping[str, str],
    ) -> Provenance:
        name = result.format.partition(":")[0]
        what = f"Converted by loratool to the format {name}."
        if converter is not None:
            kinds = ", ".join(counted_kinds(adapter[n].kind for n in changed))
            what = f"Plain LoRA made by loratool of {kinds}."
        return Provenance(
            "Converting",
            "Converted",
            what,
            lambda: tuple(self._lines(adapter, result, converter, changed)),
            sources=changed,
            skipped="without effect",
            nothing=f"{adapter.label}: no update is left to write",
        )

    def _lines(
        self,
        adapter: Adapter,
        result: Adapter,
        converter: Converter | None,
        changed: Mapping[str, str],
    ) -> Iterator[str]:
        """What the report adds, after draining."""
        yield f"format: {adapter.format} -> {result.format.partition(':')[0]}"
        if converter is None:
            yield "no value was changed"
            return
        results = {name: c for name, c in converter.results.items() if name in result}
        if not results:
            return
        yield f"made low-rank: {', '.join(counted_kinds(adapter[n].kind for n in results))}"
        exact = [name for name, found in results.items() if found.method == "exact"]
        if exact:
            yield f"exact but for rounding: {len(exact)} of {len(results)}"
        if self.rank is None and self.energy is None and len(exact) < len(results):
            yield (
                f"rank: no --rank or --energy was given: the smallest up to {_USUAL_RANK} that "
                f"captures {_USUAL_ENERGY:.1%} of ||delta||^2"
            )
        errors = {name: found.relative_error for name, found in results.items()}
        name = max(errors, key=lambda name: errors[name])
        yield f"relative error of a delta: at most {errors[name]:.1e} ({name})"


def _to_convert(updates: Mapping[str, LazyUpdate]) -> dict[str, LazyUpdate]:
    """What plain LoRA is made of; of vectors only what depends on the base."""
    return {
        name: update
        for name, update in updates.items()
        if update.kind in FACTORABLE and (len(update.shape) > 1 or update.kind in NEED_BASE)
    }


def _without(adapter: Adapter, left_out: Mapping[str, LazyUpdate]) -> Adapter:
    """The adapter less some updates, as one for the base's own class of model."""
    if not left_out:
        return adapter
    return replace(
        adapter,
        context={name: t for name, t in adapter.context.items() if name not in left_out},
        task_type=None if adapter.task_type in TASK_HEADS else adapter.task_type,
        model_files={},
        model_config=None,
        dropped=(),
    )


def _require_base(
    chosen: Mapping[str, LazyUpdate], adapter: Adapter, below: Mapping[str, Underneath] | None
) -> None:
    """Raise InputError if weights of the base are needed and not there.

    Args:
        chosen: what is converted.
        adapter: whose updates these are.
        below: the base's weights by update; None if no base was given.
    """
    relative = [update for update in chosen.values() if update.kind in NEED_BASE]
    if below is not None:
        if missing := [update.name for update in relative if update.name not in below]:
            raise InputError(
                f"{adapter.label}: {some(missing)}: shares its values with another tensor, and "
                "has none of its own in the base: leave it out of the adapter"
            )
        return
    named = f" (the adapter names {adapter.base_name})" if adapter.base_name else ""
    if relative:
        kinds = ", ".join(counted_kinds(update.kind for update in relative))
        raise InputError(
            f"{adapter.label}: {kinds} ({relative[0].name}, ...): what these add depends on the "
            f"weights of the base: give it with --base{named}"
        )
    unclear = [name for name, update in chosen.items() if _may_be_convolution(update)]
    if unclear:
        raise InputError(
            f"{adapter.label}: {some(unclear)}: does not say the kernel of its convolution: give "
            f"the base with --base{named}"
        )


def _may_be_convolution(update: LazyUpdate) -> bool:
    """Whether a matrix is for a module that is called as convolutions are."""
    module = update.name.removesuffix(".weight").lower()
    return len(update.shape) == 2 and _CONVOLUTION.search(module.rpartition(".")[2]) is not None


def _grouped_convolutions(changed: Iterable[str], below: Mapping[str, Underneath]) -> list[Problem]:
    """Complaints about low-rank updates of convolutions in groups, where the base tells of them.

    The factors that libraries train for these let every group see all inputs, which the weight of
    such a convolution does not.
    """
    return [
        Problem(
            "error",
            name,
            f"is for a convolution in {below[name].groups} groups, which plain LoRA has no form "
            "for that can be merged: leave it out (--drop)",
        )
        for name in changed
        if name in below and below[name].groups > 1
    ]


def _facts(step: Convert, adapter: Adapter, converter: Converter | None) -> dict[str, Any]:
    """For the manifest; call it after draining."""
    given = {field.name: getattr(step, field.name) for field in fields(step)}
    read = converter.digests if converter is not None else {}
    return {
        **adapter.facts(),
        **base_facts({**adapter.base_digests, **read}),
        "options": {n: v for n, v in given.items() if v is not None and v is not False and v != ""},
        "converted": {
            "from": adapter.format,
            "kinds": dict(Counter(u.kind for u in adapter.values())),
        },
    }
