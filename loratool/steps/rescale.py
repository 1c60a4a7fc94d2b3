"""rescale: the same adapter with another strength, alpha, rank, size or layout."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any, ClassVar

from loratool.adapter import Adapter, Provenance
from loratool.digests import combine_digests
from loratool.dtypes import FLOAT_NAMES, parse_float_dtype
from loratool.errors import InputError, UsageError, raise_grouped, raise_problems
from loratool.linalg import RankPolicy
from loratool.outcome import counted_kinds
from loratool.plugins import Operand, option
from loratool.reports import counted, format_bytes
from loratool.rescale_request import Request, sort
from loratool.shards import parse_size

if TYPE_CHECKING:
    from loratool.rescaling import Rescaler


# What of PEFT's settings stays true of a rescaled LoKr, whose tensors do not tell all of it.
_OF_LOKR = ("r", "rank_pattern", "decompose_both", "decompose_factor")


@dataclass(frozen=True)
class Rescale:
    """Change an adapter's strength, alpha, rank, size or layout. It needs no base.

    Every linear kind of update has a strength: low-rank updates of any weight, of experts, of
    biases (lora_bias, which follow the factors beside them), full-size deltas, LoHa and LoKr. A
    rank can be cut only of factors A and B; all experts of a weight keep one rank, so large that
    the limits hold for each. DoRA and IA3 depend on the base and have to be made plain LoRA first
    (`loratool convert --to-lora`). What is replaced whole stays as it is.

    First the delta is decided (--by, --alpha), then how much of it is kept (--rank, --energy,
    --ratio, --budget; together they all hold), then how it is written (--alpha with --keep-delta,
    --normalize, --balance, --dtype). Where nothing is cut and nothing has to be folded in, the
    factors stay as they are, byte for byte.
    """

    operands: ClassVar[tuple[Operand, ...]] = (Operand("adapter", "adapter"),)
    output: ClassVar[str] = "{adapter}-rescaled"

    by: float | None = option(
        None, "multiply the delta; a negative sign goes into B", metavar="FACTOR"
    )
    alpha: float | None = option(
        None, "another alpha for every update: changes the delta, unless --keep-delta"
    )
    keep_delta: bool = option(False, "with --alpha: divide B, so that the delta stays the same")
    rank: int | None = option(None, "keep at most this rank of every update")
    energy: float | None = option(
        None, "keep the smallest rank that captures this share of ||delta||^2"
    )
    ratio: float | None = option(
        None, "keep the singular values of at least the largest divided by this"
    )
    budget: str | None = option(
        None, "bytes of all factors together, spent where they capture most", metavar="20MiB"
    )
    normalize: bool = option(
        False, "one rank for all, alpha = rank, no patterns: what every server loads"
    )
    pad: int | None = option(
        None, "with --normalize: zeros up to this rank, for servers that take certain ranks only",
        metavar="RANK",
    )  # fmt: skip
    balance: bool = option(False, "make A and B equally long; the delta stays the same")
    dtype: str | None = option(
        None, "type of the factors (default: theirs)", choices=tuple(FLOAT_NAMES)
    )

    def __post_init__(self) -> None:
        if not self.asked():
            raise UsageError(
                "nothing to do: give --by or --alpha (the strength), --rank, --energy, --ratio or "
                "--budget (the rank), --normalize, --balance or --dtype (the layout)"
            )
        if self.by is not None and not (math.isfinite(self.by) and self.by != 0):
            raise UsageError(
                f"--by must be a finite number other than 0, not {self.by:g}: an adapter times 0 "
                "does nothing"
            )
        if self.alpha is not None and not (math.isfinite(self.alpha) and self.alpha > 0):
            raise UsageError(
                f"alpha must be a finite number above 0, not {self.alpha:g}; --by -1 turns the sign"
            )
        if self.keep_delta and self.alpha is None:
            raise UsageError("--keep-delta says what --alpha leaves alone: give --alpha, too")
        if self.alpha is not None and self.normalize:
            raise UsageError("--normalize makes alpha the rank: leave --alpha out")
        if self.pad is not None and (self.pad < 1 or not self.normalize or self.budget is not None):
            raise UsageError(
                f"--pad {self.pad}: is a rank from 1 up, goes with --normalize (one rank for all), "
                "and does not go with --budget"
            )
        if self.alpha is not None and not self.keep_delta:
            self._check_strength()
        if self.budget is not None:
            parse_size(self.budget)
        if self.dtype is not None:
            parse_float_dtype(self.dtype)
        self._policy()

    def asked(self) -> dict[str, Any]:
        """The options that were given."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return {n: v for n, v in values.items() if v is not None and v is not False}

    def _check_strength(self) -> None:
        """Raise UsageError if a changed alpha would not have one meaning."""
        if self.by is not None:
            raise UsageError(
                "--by and --alpha both set the strength: leave one out, or add --keep-delta to "
                "write the delta of --by under that alpha"
            )
        if cuts := {"rank", "energy", "ratio", "budget"} & self.asked().keys():
            raise UsageError(
                f"--alpha with --{min(cuts)}: another alpha changes the delta by the old rank or "
                "by the new one; give the strength with --by, or add --keep-delta to write the "
                "same delta under that alpha"
            )

    def _request(self, adapter: Adapter) -> Request:
        return Request(
            by=1.0 if self.by is None else self.by,
            alpha=self.alpha,
            keep_delta=self.keep_delta,
            rslora=adapter.rslora,
            policy=self._policy(),
            budget=parse_size(self.budget) if self.budget is not None else None,
            normalize=self.normalize,
            pad=self.pad or 0,
            balance=self.balance,
            dtype=parse_float_dtype(self.dtype) if self.dtype else None,
        )

    def _policy(self) -> RankPolicy | None:
        if self.rank is None and self.energy is None and self.ratio is None:
            return None
        return RankPolicy(self.rank, self.energy, self.ratio)

    def run(self, adapter: Adapter) -> Adapter:
        """Plan every update by headers; nothing is computed yet.

        Raises:
            MismatchError: the adapter's files contradict themselves, or it holds kinds of updates
                that cannot be rescaled so; all complaints at once.
            InputError: it has nothing that can be rescaled, or the budget is too small for any of
                it.
        """
        heading = f"{adapter.label} cannot be rescaled:"
        raise_problems(heading, adapter.problems)
        request = self._request(adapter)
        updates = sort(adapter, request)
        raise_grouped(heading, updates.problems)
        if updates.is_empty and not request.is_identity:
            raise InputError(
                f"{adapter.label}: has no low-rank updates or other deltas: nothing can be rescaled"
            )
        from loratool.rescaling import Rescaler

        rescaler = Rescaler(request, updates, adapter.label)
        return replace(
            adapter,
            updates={name: rescaler.planned(update) for name, update in adapter.items()},
            settings=_lasting(adapter),
            files={},
            notes=(*adapter.notes, *self._notes(adapter)),
            rslora=adapter.rslora and not self.normalize,
            provenance=Provenance(
                "Rescaling",
                "Rescaled",
                f"An adapter rescaled by loratool: {', '.join(self._words())}.",
                lambda: _lines(self, rescaler),
                skipped="left out",
                nothing=f"{adapter.label}: no update is left to write",
                lost=lambda: sum(rescaler.left_out.values()),
            ),
            facts=lambda: _facts(self, rescaler, adapter),
            path=None,
        )

    def _words(self) -> Iterator[str]:
        """What is done, for the model card."""
        if self.by is not None:
            yield f"strength times {self.by:g}"
        if self.alpha is not None:
            yield f"alpha {self.alpha:g}" + (" for the same delta" if self.keep_delta else "")
        if self.rank is not None:
            yield f"rank {self.rank} at most"
        if self.energy is not None:
            yield f"{self.energy:.4g} of the energy kept"
        if self.ratio is not None:
            yield f"singular values of at least the largest / {self.ratio:g}"
        if self.budget is not None:
            yield f"factors of {self.budget} at most"
        if self.normalize:
            least = f", padded to {self.pad}" if self.pad else ""
            yield f"one rank for all{least}, alpha = rank"
        if self.balance:
            yield "A and B equally long"
        if self.dtype is not None:
            yield f"{self.dtype} factors"

    def _notes(self, adapter: Adapter) -> Iterator[str]:
        whole = {name: update.kind for name, update in adapter.items() if update.is_whole}
        if not whole:
            return
        counts = " and ".join(counted_kinds(whole.values()))
        kept = f"{counts} ({next(iter(whole))}{', ...' * (len(whole) > 1)})"
        if self.by is not None or (self.alpha is not None and not self.keep_delta):
            yield f"{kept}: no strength can scale these"
        if self.normalize:
            yield f"{kept}: servers that take factors alone (vLLM) refuse such an adapter"


def _lasting(adapter: Adapter) -> dict[str, Any]:
    """What stays true of the adapter's own settings, and the updates themselves do not say."""
    lasting = ("peft_type", *(_OF_LOKR if adapter.settings.get("peft_type") == "LOKR" else ()))
    kept = {key: adapter.settings[key] for key in lasting if key in adapter.settings}
    return {**kept, **adapter.lasting_settings}


def _base_facts(adapter: Adapter) -> dict[str, Any]:
    """What is known of the base, for the manifest."""
    if not adapter.base_digests:
        return {}
    digests = dict(sorted(adapter.base_digests.items()))
    return {"base": {"digest": combine_digests(digests), "tensors": digests}}


def _lines(step: Rescale, rescaler: Rescaler) -> tuple[str, ...]:
    """What the report adds, after draining."""
    results = rescaler.results
    if not results:
        return ()
    factored = [result for result in results.values() if result.rank]
    scales = _span(result.scale for result in factored or results.values())
    ranks = f"rank {_span(result.rank for result in factored)}, " if factored else ""
    lines = [f"{ranks}scale {scales}"]
    strengths = [r.strength for r in results.values() if r.strength is not None]
    if step.alpha is not None and not step.keep_delta and strengths:
        lines.append(f"another alpha: the delta is now {_span(strengths)} times what it was")
    if step.budget is not None:
        spent = format_bytes(sum(result.nbytes for result in factored))
        lines.append(f"factors: {spent} of the {format_bytes(parse_size(step.budget))} allowed")
    if left_out := sorted(rescaler.left_out):
        lines.append(
            f"{counted(len(left_out), 'update')} left out, since the budget captures more "
            f"elsewhere: {', '.join(left_out[:3])}" + (", ..." if len(left_out) > 3 else "")
        )
    errors = {name: result.certificate.relative_error for name, result in results.items()}
    worst = max(errors, key=lambda name: errors[name])
    if errors[worst] == 0:
        return (*lines, "the delta is exactly the one asked for")
    error = f"{errors[worst]:.1e} ({worst})"
    return (*lines, f"relative error against the delta asked for: at most {error}")


def _facts(step: Rescale, rescaler: Rescaler, adapter: Adapter) -> dict[str, Any]:
    """For the manifest; call it after draining."""
    norms = {name: math.sqrt(total) for name, total in sorted(rescaler.left_out.items())}
    return {
        **_base_facts(adapter),
        **adapter.facts(),
        "options": step.asked(),
        "rescaled": {"energy": rescaler.energy, "left_out": norms},
    }


def _span(values: Iterable[float]) -> str:
    found = sorted(values)
    low, high = f"{found[0]:g}", f"{found[-1]:g}"
    return low if low == high else f"{low} to {high}"
