"""diffusers' LoRA files, of all its ages: which update each module has, and with what scale."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from loratool.adapter import Adapter, FormatOptions, LazyUpdate, Rereading
from loratool.checkpoint import LazyTensor
from loratool.diffusion.adapter_keys import Side, parse_key
from loratool.errors import Problem
from loratool.reports import counted
from loratool_plugins.adapter_formats import _diffusers_metadata as metadata
from loratool_plugins.adapter_formats import _diffusion_files as files
from loratool_plugins.adapter_formats import _ours
from loratool_plugins.adapter_formats._module_reader import (
    Module,
    ModuleReader,
    Scale,
    alpha_scale,
    number_of,
)
from loratool_plugins.adapter_formats.peft_config import Settings

_PARTS: Mapping[Side, str] = {
    "A": "down", "B": "up", "B.bias": "bias", "magnitude": "dora_scale", "alpha": "alpha",
}  # fmt: skip


def read_adapter(path: Path, told: FormatOptions | None = None) -> Adapter:
    """Open a file by its headers; what is wrong inside is collected.

    Raises:
        InputError: it cannot be read.
        FormatError: it is malformed, or of a method that loratool does not merge.
    """
    content = files.read(path)
    settings = metadata.settings_of(content.metadata, content.file)
    reader = _Reader(content, settings, told or FormatOptions())
    updates = reader.updates()
    facts = _ours.restored(content.ours, str(content.file))
    for name in ("transposed", "naming"):
        facts.pop(name, None)
    if (text := content.metadata.get(metadata.KEY)) is not None and not facts["settings"]:
        facts["settings"] = {metadata.KEY: text}
    facts["rslora"] = any(found["use_rslora"] for found in settings.values())
    updates = _as_they_were(updates, content.ours.get("names"))
    rereading = None
    if reader.without_alpha:

        def again(more: FormatOptions) -> Adapter:
            return read_adapter(path, more.over(told or FormatOptions()))

        rereading = Rereading(frozenset({"alpha"}), updates, again)
    return Adapter(
        updates,
        **facts,
        model_files=content.model_files,
        model_config=_ours.model_files(path)[1] if content.model_files else None,
        problems=tuple(reader.problems),
        notes=tuple(reader.notes(path)),
        files=content.files,
        rereading=rereading,
        path=path,
    )


def _as_they_were(updates: Mapping[str, LazyUpdate], names: Any) -> dict[str, LazyUpdate]:
    """The updates under the names that they had before loratool wrote them in this format."""
    known = names if isinstance(names, Mapping) else {}
    found = {}
    for name, update in updates.items():
        module, _, leaf = name.rpartition(".")
        own = f"{known.get(module, module)}.{leaf}"
        found[own] = replace(update, name=own)
    return found


@dataclass
class _Reader:
    """Sorts the tensors of a file by module.

    Attributes:
        content: of the file.
        settings: of each component, as far as the file has them.
        told: what a person tells of it.
        problems: what does not fit.
        without_alpha: modules whose scale nothing tells.
    """

    content: files.Content
    settings: Mapping[str, Settings]
    told: FormatOptions
    problems: list[Problem] = field(default_factory=list)
    without_alpha: list[str] = field(default_factory=list)

    def updates(self) -> dict[str, LazyUpdate]:
        """Parameter -> update, in the file's order."""
        modules: dict[str, dict[str, LazyTensor]] = {}
        own: dict[str, str] = {}
        for key, tensor in self.content.tensors.items():
            if (found := parse_key(key)) is None:
                self._complain(key, "unexpected key: no part of an update that is known")
                continue
            parts, part = modules.setdefault(found.module, {}), _PARTS[found.side]
            if part in parts:
                self._complain(key, f"is there twice: {parts[part].name} is the same")
            parts[part] = tensor
            own[found.module] = found.own
        reader = ModuleReader(self.problems, rows_only=True)
        updates: dict[str, LazyUpdate] = {}
        for name, parts in modules.items():
            settings = self.settings.get(name.partition(".")[0])
            if settings is not None and not self._agrees(name, own[name], parts, settings):
                continue
            scale = self._scales(name, own[name], parts, settings)
            for update in reader.updates(Module(name, name, parts, scale)):
                updates[update.name] = update
        return updates

    def _agrees(
        self, name: str, own: str, parts: Mapping[str, LazyTensor], settings: Settings
    ) -> bool:
        """Whether a module's tensors are those that its settings make PEFT load."""
        count = len(self.problems)
        if "dora_scale" in parts and not settings["use_dora"]:
            self._complain(
                parts["dora_scale"].name, "unexpected key: its metadata says no use_dora"
            )
        if "bias" in parts and not settings["lora_bias"]:
            self._complain(parts["bias"].name, "unexpected key: its metadata says no lora_bias")
        up = parts.get("up")
        if up is not None and len(up.shape) > 1 and up.shape[1] != settings.rank(own):
            message = "its metadata gives it another rank"
            self._complain(name, message, f"{settings.rank(own)}", f"{up.shape[1]}")
        return len(self.problems) == count

    def _scales(
        self, name: str, own: str, parts: Mapping[str, LazyTensor], settings: Settings | None
    ) -> Any:
        alpha = number_of(parts.get("alpha"), self._complain)
        if settings is None:
            if "alpha" not in parts:
                self.without_alpha.append(name)
            return lambda rank: alpha_scale(alpha, rank, self.told.alpha)
        value = metadata.scale_of(settings, name, own, self._complain)

        def scale(rank: int | None) -> Scale:
            return lambda: value

        return scale

    def _complain(self, name: str, message: str, expected: str = "", found: str = "") -> None:
        self.problems.append(Problem("error", name, message, expected, found))

    def notes(self, path: Path) -> Iterator[str]:
        """What was assumed for want of anything that says it."""
        if self.without_alpha and self.told.alpha is None:
            yield (
                f"{path}: neither {metadata.KEY} in the header nor alpha for "
                f"{counted(len(self.without_alpha), 'module')} ({self.without_alpha[0]}, ...): "
                "scale 1, as diffusers takes it; if it was trained with another alpha, convert it "
                "with --alpha first"
            )
