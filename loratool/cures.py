"""The commands that make an adapter one that a server takes."""

from __future__ import annotations

import re
import shlex
from collections.abc import Collection
from dataclasses import dataclass

from loratool.traits import FACTORS, Cure, Subject
from loratool.updates import NEED_BASE

CONVERTED_RANK = 64  # the largest rank that `convert --to-lora` makes without --rank


@dataclass(frozen=True)
class Cures:
    """Writes commands for one adapter and one server.

    Attributes:
        subject: both of them.
    """

    subject: Subject

    def one(self, cure: Cure) -> str:
        """The command for one cure, of the adapter as it is; `cure` is not "start"."""
        match cure:
            case "merge":
                return self._merge
            case "normalize":
                return self._rescale(self._adapter, {cure})
            case "format" | "drop":
                return self._convert(self._adapter, {cure}, self.subject.server.write_as)
        return self._convert(self._adapter, {cure}, None)

    def note(self, cure: Cure) -> str:
        """What to know of a cure; "" if nothing."""
        if cure == "merge":
            return "and serve the merged model: no adapter can be served so"
        if cure in ("lora_only", "drop"):
            return f"what is left out is lost; served merged it is not: {self._merge}"
        return ""

    def all(self, cures: Collection[Cure]) -> tuple[str, ...]:
        """The commands for several, one after the other; () if only merging helps."""
        cures = set(cures) - {"start"}
        if not cures or "merge" in cures:
            return ()
        server = self.subject.server
        to = server.write_as if cures & {"format", "drop"} else None
        uniform = any(limit.trait == "ranks" and limit.does != "takes" for limit in server.limits)
        is_remade = "to_lora" in cures or (to == "peft" != self.subject.adapter.format)
        if is_remade and uniform:
            cures.add("normalize")  # its ranks and alphas may differ, which headers do not tell
        late = to if to != "peft" else None  # other formats have no patterns to take away
        steps: list[tuple[str, str]] = []  # (verb or format, what the output is called)
        if cures & {"to_lora", "lora_only"} or (to is not None and late is None):
            steps.append(("convert", "lora"))
        if "normalize" in cures:
            steps.append(("rescale", "normalized"))
        if late is not None:
            steps.append(("write", late))
        found, path = [], self._adapter
        for number, (verb, end) in enumerate(steps, 1):
            target = self._named(server.name if number == len(steps) else f"{server.name}-{end}")
            match verb:
                case "convert":
                    command = self._convert(
                        path, cures - {"drop"} if late else cures, None if late else to
                    )
                case "rescale":
                    command = self._rescale(path, cures)
                case _:
                    command = self._convert(path, cures & {"drop"}, late)
            found.append(f"{command} -o {target}")
            path = target
        return tuple(found)

    @property
    def _merge(self) -> str:
        return f"loratool merge {self._base} {self._adapter}"

    @property
    def _adapter(self) -> str:
        return shlex.quote(self.subject.adapter.label)

    def _named(self, end: str) -> str:
        """What a result is called: after the adapter, beside it if it lies here."""
        adapter = self.subject.adapter
        start = adapter.label.rstrip("/")
        if start != str(adapter.path).rstrip("/"):  # it comes from elsewhere
            start = re.split("[@:]", start.rpartition("/")[2])[0]
        return shlex.quote(f"{start.removesuffix('.safetensors').removesuffix('.gguf')}-{end}")

    @property
    def _base(self) -> str:
        """What the user calls the base, as far as that is known."""
        base = self.subject.base
        named = self.subject.adapter.base_name if base is None else base.label
        return shlex.quote(named) if named else "BASE"

    def _convert(self, path: str, cures: Collection[Cure], to: str | None) -> str:
        adapter = self.subject.adapter
        words = ["loratool convert", path]
        flags: tuple[Cure, ...] = ("to_lora", "lora_only", "drop")
        words += [f"--{cure.replace('_', '-')}" for cure in flags if cure in cures]
        words += [f"--format {to}"] if to is not None else []
        relative = "to_lora" in cures and any(u.kind in NEED_BASE for u in adapter.values())
        named_by_base = {"gguf", "diffusers"} & {to, adapter.format}
        renamed = to is not None and (bool(named_by_base) or adapter.naming != "")
        return " ".join([*words, *([f"--base {self._base}"] if relative or renamed else [])])

    def _rescale(self, path: str, cures: Collection[Cure]) -> str:
        words = ["loratool rescale", path, "--normalize"]
        known = [u.rank for u in self.subject.of_kinds(*FACTORS) if u.rank is not None]
        rank = max([*known, CONVERTED_RANK if "to_lora" in cures else 1])
        ranks = self.subject.server.ranks
        if ranks is None:
            return " ".join(words)
        if ranks.setting(rank) is None:
            rank = ranks.choices[-1]
            words.append(f"--rank {rank}")
        padded = ranks.allowed(rank)
        if padded != rank or ("to_lora" in cures and ranks.block > 1):
            words.append(f"--pad {padded}")
        return " ".join(words)
