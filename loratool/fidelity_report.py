"""How close models are to a fine-tune, for people and for machines."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from loratool.reports import Report, Table, counted, format_share

if TYPE_CHECKING:
    from loratool.calibration import Inputs
    from loratool.fidelity import Closeness, Tally

Role = Literal["base", "rank 0", "cut", "adapter", "finetuned"]


@dataclass(frozen=True)
class Entry:
    """One of the models that are compared with the fine-tune.

    Attributes:
        role: the base as it is; the base with what adapters keep whole, but nothing else of them;
            with an adapter cut to a lower rank; with an adapter; or the fine-tune once more.
        adapters: what the adapters are called; several share what they keep whole.
        rank: the largest of the adapter's updates; None if that is not known.
        dtype: what it is computed in.
    """

    role: Role
    adapters: tuple[str, ...] = ()
    rank: int | None = None
    dtype: str = "fp32"

    @property
    def name(self) -> str:
        """How it is called in tables and pictures."""
        if self.role == "finetuned":
            return f"fine-tune in {self.dtype}" if self.dtype != "fp32" else "fine-tune itself"
        if self.role in ("base", "rank 0"):
            return self.role
        return self.adapters[0]


@dataclass(frozen=True)
class Setting:
    """What the models were compared on.

    Attributes:
        base: the base's label.
        finetuned: the fine-tune's label.
        architecture: the class that all of them were run in.
        file: of the inputs.
        inputs: the samples.
    """

    base: str
    finetuned: str
    architecture: str
    file: str
    inputs: Inputs


def fidelity_report(setting: Setting, entries: Sequence[Entry], tallies: Sequence[Tally]) -> Report:
    """Tell how close each model is.

    Args:
        setting: what was compared.
        entries: the models.
        tallies: what was found of each.
    """
    main, *_ = tallies[0].answers
    models = [_facts(e, t, main) for e, t in zip(entries, tallies, strict=True)]
    if sum(entry.role == "rank 0" for entry in entries) > 1:
        for facts in models:
            if facts["role"] == "rank 0":
                facts["name"] += f" of {', '.join(facts['adapters'])}"
    for entry, facts in zip(entries, models, strict=True):
        facts["gap_closed"] = _gap_closed(facts, _rank_0(entry, entries, models))
    inputs = setting.inputs
    data = {
        "kind": "fidelity",
        "base": setting.base,
        "finetuned": setting.finetuned,
        "architecture": setting.architecture,
        "inputs": {
            "file": setting.file,
            "kind": inputs.kind,
            "samples": inputs.count,
            "tokens": inputs.tokens,
        },
        "output": main,
        "positions": tallies[0].answers[main].positions,
        "classes": tallies[0].answers[main].classes,
        "layers": list(tallies[0].layers),
        "models": models,
    }
    names = list(dict.fromkeys(n for e in entries if e.role == "adapter" for n in e.adapters))
    return Report(
        f"{', '.join(names)} against {setting.finetuned}",
        data,
        tuple(_lines(data)),
        _table(data),
    )


def _facts(entry: Entry, tally: Tally, main: str) -> dict[str, Any]:
    outputs = {name: _closeness(found) for name, found in tally.answers.items()}
    return {
        "name": entry.name,
        "role": entry.role,
        "adapters": list(entry.adapters),
        "rank": entry.rank,
        "dtype": entry.dtype,
        **outputs[main],
        "outputs": outputs,
        "layer_errors": [found.error for found in tally.layers.values()],
    }


def _closeness(found: Closeness) -> dict[str, Any]:
    return {
        "kl": found.kl,
        "agreement": found.agreement,
        "agreement_interval": None if found.interval is None else list(found.interval),
        "cosine": found.cosine,
        "relative_error": found.error,
    }


def _rank_0(
    entry: Entry, entries: Sequence[Entry], models: Sequence[Mapping[str, Any]]
) -> Mapping[str, Any] | None:
    """What an adapter's gain is measured from: what it keeps whole alone, or else the base."""
    if entry.role not in ("cut", "adapter"):
        return None
    own = [m for e, m in zip(entries, models, strict=True) if _is_below(e, entry)]
    plain = [m for e, m in zip(entries, models, strict=True) if e.role == "base"]
    return next(iter((*own, *plain)), None)


def _is_below(one: Entry, other: Entry) -> bool:
    return one.role == "rank 0" and other.adapters[0] in one.adapters


def _gap_closed(facts: Mapping[str, Any], below: Mapping[str, Any] | None) -> float | None:
    """1 - KL / KL of rank 0; of vectors, the same with their relative errors."""
    if below is None:
        return None
    key = "kl" if facts["kl"] is not None else "relative_error"
    return 1 - facts[key] / below[key] if below[key] else None


def _table(data: Mapping[str, Any]) -> Table:
    has_logits = data["models"][0]["kl"] is not None
    columns = ["model", "rank"]
    columns += ["KL", "gap closed", "top-1 agreement (95%)"] if has_logits else ["gap closed"]
    columns += ["cosine", "relative error", "last layer"]
    rows = []
    for facts in data["models"]:
        row = [facts["name"], "-" if facts["rank"] is None else str(facts["rank"])]
        gap = "-" if facts["gap_closed"] is None else _share(facts["gap_closed"])
        if has_logits:
            low, high = facts["agreement_interval"]
            agreement = f"{format_share(facts['agreement'])} ({100 * low:.1f} to {100 * high:.1f}%)"
            row += [_number(facts["kl"]), gap, agreement]
        else:
            row += [gap]
        errors = facts["layer_errors"]
        last = _number(errors[-1]) if errors else "-"
        rows.append((*row, f"{facts['cosine']:.5f}", _number(facts["relative_error"]), last))
    return Table(tuple(columns), tuple(rows), ("last layer", "relative error", "cosine"))


def _lines(data: Mapping[str, Any]) -> list[str]:
    inputs = data["inputs"]
    tokens = "" if inputs["tokens"] is None else f", {counted(inputs['tokens'], 'token')}"
    lines = [
        f"{counted(inputs['samples'], 'sample')} of {inputs['kind']}{tokens}; {data['output']} of "
        f"{data['classes']} at {counted(data['positions'], 'position')}, in "
        f"{data['architecture']}",
    ]
    measured = "KL(fine-tune || model), in nats" if data["models"][0]["kl"] is not None else ""
    explained = [measured] if measured else []
    explained.append("relative error: ||x - y|| / ||y|| of what a position gets, its mean")
    lines.append("; ".join(explained))
    last = [facts for facts in data["models"] if facts["role"] in ("adapter", "cut")]
    best = max(last, key=lambda facts: facts["gap_closed"] or 0.0, default=None)
    if best is not None and best["gap_closed"] is not None:
        what = "KL" if best["kl"] is not None else "error"
        rank = "" if best["rank"] is None else f" at rank {best['rank']}"
        verb = "closes" if best["gap_closed"] >= 0 else "widens"
        lines.append(
            f"{best['name']}{rank} {verb} {_share(abs(best['gap_closed']))} of the gap in {what} "
            "that rank 0 leaves"
        )
    return lines


def _share(share: float) -> str:
    """A share that may be negative, which is never rounded up to 100%."""
    return format_share(share) if share >= 0 else f"-{abs(100 * share):.2f}%"


def _number(value: float) -> str:
    """Three digits; 0 for nothing at all."""
    if value == 0:
        return "0"
    return f"{value:.1e}" if value < 1e-3 else f"{value:#.3g}"
