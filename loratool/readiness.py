"""Whether a server takes an adapter as it is: by headers, and the facts in `loratool.servers`."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from loratool import plugins
from loratool.adapter import Adapter
from loratool.checkpoint import Checkpoint
from loratool.cures import Cures
from loratool.errors import MismatchError
from loratool.reports import counted, listed
from loratool.respelling import named_for
from loratool.servers import SERVERS, Conduct, Limit, Server
from loratool.traits import FACTORS, PLACES, TRAITS, Cure, Subject
from loratool.updates import FACTORABLE, KIND_NAMES

_WORDS: dict[Conduct, str] = {
    "refuses": "refuses it",
    "ignores": "ignores it without an error",
    "misreads": "computes something else",
    "takes": "takes it",
}
_EXAMPLES = 3


@dataclass(frozen=True)
class Finding:
    """One thing that a server does not take, or takes on a condition.

    Attributes:
        rule: one of `loratool.traits.TRAITS`, or "rank", or "place": the format of the server has
            no place for it.
        does: what the server does.
        message: for people, in one line.
        names: of the parameters or settings that it is about.
        cure: the command that takes it away, or what to do when the server is started.
        kind: what kind of cure that is.
        note: what to know of the cure; "" if nothing.
    """

    rule: str
    does: Conduct
    message: str
    names: tuple[str, ...]
    cure: str
    kind: Cure
    note: str = ""

    @property
    def severity(self) -> Literal["error", "warning"]:
        """A condition is a warning; everything else is an error, for the results would be wrong."""
        return "warning" if self.kind == "start" else "error"

    def as_json(self) -> dict[str, Any]:
        """The finding as plain data."""
        return {
            "rule": self.rule,
            "severity": self.severity,
            "does": self.does,
            "message": self.message,
            "count": len(self.names),
            "examples": list(self.names[:_EXAMPLES]),
            "cure": self.cure,
            "note": self.note,
        }


@dataclass(frozen=True)
class Readiness:
    """What a server makes of an adapter.

    Attributes:
        server: which.
        findings: errors first.
        commands: those that lead from the adapter to one that the server takes as it is; () if it
            does already, or if only merging helps.
    """

    server: Server
    findings: tuple[Finding, ...]
    commands: tuple[str, ...]

    @property
    def is_ready(self) -> bool:
        """Whether nothing is refused, dropped or misread."""
        return all(finding.severity != "error" for finding in self.findings)

    def as_json(self) -> dict[str, Any]:
        """The result as plain data."""
        return {
            "ready": self.is_ready,
            "version": self.server.version,
            "read": self.server.read,
            "findings": [finding.as_json() for finding in self.findings],
            "commands": list(self.commands),
        }

    def lines(self) -> Iterator[str]:
        """The result for people."""
        server = self.server
        yield f"{server.title} {server.version}, as read in its sources on {server.read}:"
        for finding in self.findings:
            yield f"  {finding.severity}: {finding.message}"
            yield f"    cure: {finding.cure}" + (f" ({finding.note})" if finding.note else "")
        kinds = {finding.kind for finding in self.findings if finding.severity == "error"}
        if self.commands and (len(kinds) > 1 or len(self.commands) > 1):
            yield f"  all of it: {' && '.join(self.commands)}"
        yield f"  {'ready' if self.is_ready else 'not ready'} for {server.name}"


def readiness(adapter: Adapter, name: str, base: Checkpoint | None = None) -> Readiness:
    """Look an adapter over for one server, by headers alone.

    Args:
        adapter: with its files, for these are what a server reads.
        name: a key of `loratool.servers.SERVERS`.
        base: the model that it is for, for what only that can tell.
    """
    subject = Subject(adapter, SERVERS[name], base)
    cures = Cures(subject)
    found = [*_limit_findings(subject, cures), *_rank_findings(subject, cures)]
    found += _sparse_findings(subject, cures)
    told = {n for finding in found if finding.severity == "error" for n in finding.names}
    found += _place_findings(subject, cures, told)
    found.sort(key=lambda finding: finding.severity)  # "error" comes before "warning"
    kinds = {finding.kind for finding in found}
    return Readiness(subject.server, tuple(found), cures.all(kinds))


def ready_servers(adapter: Adapter) -> list[str]:
    """The servers that take an adapter as its files are."""
    if adapter.path is None or adapter.problems:
        return []
    return [name for name in SERVERS if readiness(adapter, name).is_ready]


def _limit_findings(subject: Subject, cures: Cures) -> Iterator[Finding]:
    """What the server's limits say; an update without a place is told of once."""
    seen: dict[str, set[str]] = {}
    placeless: set[str] = set()
    for limit in subject.server.limits:
        if limit.formats and subject.adapter.format not in limit.formats:
            continue
        known = seen.setdefault(limit.trait, set())
        found = TRAITS[limit.trait].find(subject)
        names = [n for n in found if n not in known and re.search(limit.names, n)]
        known.update(names)
        if limit.trait in PLACES:
            names = [name for name in names if name not in placeless]
            placeless.update(names if limit.does != "takes" else ())
        if names and (limit.does != "takes" or limit.unless):
            yield _finding(subject, limit, names, cures)


def _finding(subject: Subject, limit: Limit, names: Sequence[str], cures: Cures) -> Finding:
    trait = TRAITS[limit.trait]
    what = _called(trait.label, names, subject)
    message = f"{what}: {subject.server.title} {_WORDS[limit.does]}: {limit.why}"
    if limit.does != "takes":
        cure, note = cures.one(trait.cure), cures.note(trait.cure)
        return Finding(limit.trait, limit.does, message, tuple(names), cure, trait.cure, note)
    cure = limit.unless
    if trait.cure == "normalize":  # nothing is lost by that
        cure = f"{cure}; or {cures.one('normalize')}"
    return Finding(limit.trait, limit.does, message, tuple(names), cure, "start")


def _called(label: str, names: Sequence[str], subject: Subject) -> str:
    """What a finding is about: "2 updates of DoRA (a.weight, b.weight)"."""
    words = label.format(
        counted(len(names), "update"),
        tensors=counted(len(names), "tensor"),
        names=listed(list(names), _EXAMPLES),
        format=subject.adapter.format,
        servers=" or ".join(subject.server.formats),
    )
    is_counted = "{}" in label or "{tensors}" in label
    return f"{words} ({listed(list(names), 2)})" if is_counted else words


def _sparse_findings(subject: Subject, cures: Cures) -> Iterator[Finding]:
    """Single entries beside factors lie in a file of loratool's, which no server reads."""
    names = tuple(update.name for update in subject.of_kinds("sparse"))
    if names:
        what = f"{counted(len(names), 'update')} with single entries ({listed(list(names), 2)})"
        message = f"{what}: {subject.server.title} {_WORDS['ignores']}: it reads the factors alone"
        cure, note = cures.one("to_lora"), cures.note("to_lora")
        yield Finding("sparse", "ignores", message, names, cure, "to_lora", note)


def _rank_findings(subject: Subject, cures: Cures) -> Iterator[Finding]:
    """What the server says to the ranks."""
    ranks, title = subject.server.ranks, subject.server.title
    known = {u.name: u.rank for u in subject.of_kinds(*FACTORS) if u.rank is not None}
    if ranks is None or not known:
        return
    wrong = [name for name, rank in known.items() if ranks.allowed(rank) != rank]
    if wrong:
        what = f"{counted(len(wrong), 'update')} of rank {_span(known[n] for n in wrong)}"
        message = f"{what} ({listed(wrong, 2)}): {title} {_WORDS['misreads']}: {ranks.why}"
        cure = cures.one("normalize")
        yield Finding("rank", "misreads", message, tuple(wrong), cure, "normalize")
    highest = max(known.values())
    above = tuple(name for name, rank in known.items() if rank == highest)
    what = f"rank {highest} of {counted(len(above), 'update')} ({listed(list(above), 2)})"
    setting = ranks.setting(highest)
    if setting is None:
        message = f"{what}: {title} refuses it: {ranks.choices[-1]} is the largest that it can have"
        yield Finding("rank", "refuses", message, above, cures.one("normalize"), "normalize")
    elif ranks.default is not None and highest > ranks.default:
        message = f"{what}: {title} takes it if it is started so, and else up to {ranks.default}"
        cure = f"start it with {ranks.flag.replace('RANK', str(setting))}"
        yield Finding("rank", "takes", message, above, cure, "start")


def _span(values: Iterable[int]) -> str:
    found = sorted(set(values))
    return ", ".join(map(str, found)) if len(found) < 4 else f"{found[0]} to {found[-1]}"


def _place_findings(subject: Subject, cures: Cures, told: Collection[str]) -> Iterator[Finding]:
    """What the server's format has no place for, where the adapter is in another one.

    Args:
        subject: what is looked at.
        cures: for it.
        told: names that something is wrong with already.
    """
    server, adapter, base = subject.server, subject.adapter, subject.base
    known = server.write_as in plugins.names("adapter_formats")
    if adapter.format in server.formats or not known:
        return
    writer: plugins.AdapterFormat = plugins.create("adapter_formats", server.write_as)
    homeless: dict[tuple[str, Cure], list[str]] = {}
    for name, update in adapter.items():
        if name not in told and update.kind not in writer.carries:
            convertible = update.kind in FACTORABLE and len(update.shape) > 1
            cure: Cure = "to_lora" if convertible else "lora_only"
            message = f"loratool's {server.write_as} files have no {KIND_NAMES[update.kind]}"
            homeless.setdefault((message, cure), []).append(name)
    for name, message in () if base is None else _refused(adapter, base, writer):
        homeless.setdefault((message, "drop"), []).append(name)
    for (message, cure), names in homeless.items():
        what = f"{counted(len(names), 'update')} ({listed(names, 2)})"
        yield Finding(
            "place", "refuses", f"{what}: {message}", tuple(names), cures.one(cure), cure,
            cures.note(cure),
        )  # fmt: skip


def _refused(
    adapter: Adapter, base: Checkpoint, writer: plugins.AdapterFormat
) -> Iterator[tuple[str, str]]:
    """What a format cannot write of updates that it carries, in this base: name and reason."""
    try:
        named = named_for(adapter, base, *plugins.spelling_of(writer))
    except MismatchError:
        return  # it does not fit the base, which is told anyway
    for problem in writer.refusals(replace(named, base_config=base.config)):
        found = named.get(problem.tensor)
        if problem.severity == "error" and found is not None and found.kind in writer.carries:
            yield problem.tensor, problem.message
