"""Files in kohya's naming: sd-scripts', LyCORIS's, ComfyUI's trainers', and loratool's own."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from loratool.adapter import Adapter, FormatOptions, LazyUpdate, Rereading
from loratool.checkpoint import LazyTensor
from loratool.diffusion.adapter_keys import parse_key
from loratool.diffusion.kohya import kohya_spelling
from loratool.dtypes import is_float
from loratool.errors import FormatError, Problem
from loratool.parts import is_whole, rows_of
from loratool.reports import counted
from loratool.updates import Dense, DoRA, LoKr, LowRank, Product, Update
from loratool_plugins.adapter_formats import _diffusion_files as files
from loratool_plugins.adapter_formats import _ours
from loratool_plugins.adapter_formats._diffusers_metadata import scale_of, settings_of
from loratool_plugins.adapter_formats._fusing import Fold
from loratool_plugins.adapter_formats._module_reader import (
    Module,
    ModuleReader,
    Scale,
    alpha_scale,
    number_of,
)
from loratool_plugins.adapter_formats._scales import unfold
from loratool_plugins.adapter_formats.peft_config import Settings

# The ends of keys -> which part of a module's update the tensor is.
_ENDS = {
    r"lora_down\.weight": "down", r"lora_up\.weight": "up", r"lora_mid\.weight": "mid",
    r"lora_A(\.[^.]+)?\.weight": "down", r"lora_B(\.[^.]+)?\.weight": "up",
    r"lora_B(\.[^.]+)?\.bias": "bias", r"lora_magnitude_vector(\.weight)?": "dora_scale",
    r"lora\.down\.weight": "down", r"lora\.up\.weight": "up",
    r"alpha|dora_scale|hada_(?:w[12]_[ab]|t[12])|lokr_(?:w[12](?:_[ab])?|t[12])|diff|diff_b"
    r"|w_norm|b_norm|weight|on_input": "",
}  # fmt: skip
_KEY = tuple(
    (re.compile(rf"(?P<module>.+?)\.(?P<part>{end})"), part) for end, part in _ENDS.items()
)
_FUSED = re.compile(r".*(double_blocks.*qkv|single_blocks.*linear1|joint_blocks.*qkv)")
# Metadata that comes back when the adapter is written again; hashes of the file's bytes do not.
KEPT = re.compile(r"ss_.*|modelspec\.(?!hash).*")


def read_adapter(path: Path, told: FormatOptions | None = None) -> Adapter:
    """Open a file in kohya's naming by its headers; what is wrong inside is collected.

    Raises:
        InputError: it cannot be read.
        FormatError: it is malformed, or of a method that loratool does not merge.
    """
    content = files.read(path)
    _refuse_methods(content)
    reader = _Reader(content, told or FormatOptions())
    updates = reader.updates()
    facts = _ours.restored(content.ours, str(content.file))
    for name in ("transposed", "naming"):
        facts.pop(name, None)
    known = {key: value for key, value in content.metadata.items() if KEPT.fullmatch(key)}
    facts["settings"] = {**facts["settings"], **known}
    found, layout = _as_it_was(updates, content, facts.pop("layout"))
    notes = [*reader.notes(path)]
    if content.ours.get("layout") and not layout:
        notes.append(f"{path}: was changed since loratool wrote it: its names are taken as kohya's")
    naming = "" if layout or reader.is_canonical else "kohya"
    rereading = None
    if reader.without_alpha:

        def again(more: FormatOptions) -> Adapter:
            return read_adapter(path, more.over(told or FormatOptions()))

        rereading = Rereading(frozenset({"alpha"}), found, again)
    return Adapter(
        found,
        **facts,
        naming=naming,
        layout=layout,
        model_files=content.model_files,
        model_config=_ours.model_files(path)[1] if content.model_files else None,
        problems=tuple(reader.problems),
        notes=tuple(notes),
        files=content.files,
        rereading=rereading,
        path=path,
    )


def _refuse_methods(content: files.Content) -> None:
    """Raise FormatError, naming the method, for keys of what loratool does not merge."""
    for key in content.tensors:
        for pattern, method in files.REFUSED.items():
            if re.fullmatch(rf".+\.({pattern})", key):
                raise FormatError(
                    f"{content.file}: {key}: is of {method}: loratool cannot merge that yet"
                )


@dataclass
class _Reader:
    """Sorts the tensors of a file by module.

    Attributes:
        content: of the file.
        told: what a person tells of it.
        problems: what does not fit.
        without_alpha: modules with factors and no alpha.
        is_canonical: whether names are diffusers' own.
        settings: PEFT's of each component, where diffusers has written the file.
    """

    content: files.Content
    told: FormatOptions
    problems: list[Problem] = field(default_factory=list)
    without_alpha: list[str] = field(default_factory=list)
    is_canonical: bool = False
    settings: Mapping[str, Settings] = field(default_factory=dict)

    def updates(self) -> dict[str, LazyUpdate]:
        """Parameter -> update, in the file's order."""
        keys: dict[str, dict[str, LazyTensor]] = {}
        for key, tensor in self.content.tensors.items():
            if (found := _parsed(key)) is None:
                self._complain(key, "unexpected key: no part of an update that is known")
                continue
            module, part = found
            if part in keys.setdefault(module, {}):
                self._complain(key, f"is there twice: {keys[module][part].name} is the same")
            keys[module][part] = tensor
        names = self._names(keys)
        if self.is_canonical:  # diffusers has LyCORIS's updates, too, with PEFT's settings
            self.settings = settings_of(self.content.metadata, self.content.file, "LOKR")
        reader = ModuleReader(self.problems)
        updates: dict[str, LazyUpdate] = {}
        for key, parts in keys.items():
            tensors = Module(names[key], key, parts, self._scales(key, names[key], parts))
            for update in reader.updates(tensors):
                if update.name in updates:
                    self._complain(key, f"{update.name} has a second update")
                updates[update.name] = update
        return updates

    def _names(self, keys: Iterable[str]) -> dict[str, str]:
        """How updates call the modules of a file."""
        canonical = {key: _canonical(key) for key in keys}
        spelled = [key for key, name in canonical.items() if name is None]
        self.is_canonical = bool(canonical) and not spelled
        if self.is_canonical:
            return {key: name for key, name in canonical.items() if name is not None}
        for key, name in canonical.items():
            if name is not None:
                self._complain(key, f"is named as diffusers does, and {spelled[0]} is not")
        return {key: kohya_spelling(key) for key in keys}

    def _scales(self, key: str, name: str, parts: Mapping[str, LazyTensor]) -> Any:
        component, _, own = name.partition(".")
        if (settings := self.settings.get(component)) is not None:
            value = scale_of(settings, name, own, self._complain)
            return lambda rank: lambda: value
        alpha = number_of(parts.get("alpha"), self._complain)
        has_rank = {"down", "hada_w1_b", "lokr_w1_b", "lokr_w2_b"} & parts.keys()
        if has_rank and "alpha" not in parts:
            self.without_alpha.append(key)

        def scale(rank: int | None) -> Scale:
            return alpha_scale(alpha, rank, self.told.alpha)

        return scale

    def _complain(self, name: str, message: str, expected: str = "", found: str = "") -> None:
        self.problems.append(Problem("error", name, message, expected, found))

    def notes(self, path: Path) -> Iterator[str]:
        """What was assumed, and what other programs take otherwise."""
        if self.without_alpha and self.told.alpha is None:
            yield (
                f"{path}: {counted(len(self.without_alpha), 'module')} without alpha "
                f"({self.without_alpha[0]}, ...): taken as the rank, which makes the scale 1; if "
                "it was trained with another, convert it with --alpha first"
            )
        if _was_split(self.content.metadata) and any(map(_FUSED.match, self.content.tensors)):
            yield (
                f"{path}: was trained by sd-scripts with split_qkv: in training its fused modules "
                "(qkv, linear1) had 3 or 4 times the strength that the file states; merged as the "
                "file states it, which is what sd-scripts, diffusers and ComfyUI do"
            )


def _parsed(key: str) -> tuple[str, str] | None:
    """The module of a key, and which part of its update it is."""
    for pattern, part in _KEY:
        if found := pattern.fullmatch(key):
            return found["module"], part or found["part"]
    return None


def _canonical(module: str) -> str | None:
    """The canonical name of a module that a file names as diffusers does; else None."""
    if "." not in module or kohya_spelling(module).startswith(("lora_unet_", "lora_te")):
        return None
    parsed = parse_key(f"{module}.lora_A.weight")
    return None if parsed is None else parsed.module


def _was_split(metadata: Mapping[str, str]) -> bool:
    """Whether sd-scripts trained queries, keys and values each with factors of their own."""
    try:
        arguments = json.loads(metadata.get("ss_network_args", "{}"))
    except ValueError:
        return False
    return isinstance(arguments, dict) and arguments.get("split_qkv") in ("True", True)


# What loratool itself has written


def _as_it_was(
    updates: Mapping[str, LazyUpdate], content: files.Content, layout: Mapping[str, Any]
) -> tuple[dict[str, LazyUpdate], dict[str, Any]]:
    """The updates under the names, and in the parts, that they had before loratool wrote them.

    Returns:
        Them and the layout; the updates as they are, and {}, where the file does not have what it
        says that it has.
    """
    if not layout:
        return dict(updates), {}
    try:
        found = dict(_separated(updates, content.ours, layout))
    except (KeyError, TypeError, ValueError):
        return dict(updates), {}
    return found, dict(layout)


def _separated(
    updates: Mapping[str, LazyUpdate], ours: Mapping[str, Any], layout: Mapping[str, Any]
) -> Iterator[tuple[str, LazyUpdate]]:
    """Parameter -> its update; ValueError, KeyError or TypeError if something does not fit."""
    for name, update in updates.items():
        spelled, _, leaf = name.rpartition(".")
        rows = layout[spelled]
        height = sum(stop - start for _, start, stop in rows)
        if update.kind != "ia3" and height != update.shape[0]:
            raise ValueError(f"{name}: {height} rows")
        parts = ours.get("parts", {}).get(name)
        modules = list(dict.fromkeys(module for module, _, _ in rows))
        if parts is None and len(modules) > 1:
            raise ValueError(f"{name}: its parts are not known")
        for module in modules:
            parameter = f"{module}.{leaf}"
            if parts is not None and parameter not in parts:
                continue
            columns = None if parts is None else parts[parameter]
            fold = ours.get("folds", {}).get(parameter)
            own = _own_part(update, _source_rows(rows, module), columns, fold)
            yield parameter, replace(own, name=parameter)


def _source_rows(rows: Any, module: str) -> list[slice]:
    """Where the rows of a module lie in a fused one, in the module's order."""
    found, done = [], 0
    for name, start, stop in rows:
        if name == module:
            found.append((start, slice(done, done + stop - start)))
        done += stop - start
    return [place for _, place in sorted(found, key=lambda item: item[0])]


def _own_part(update: LazyUpdate, rows: list[slice], columns: Any, fold: Any) -> LazyUpdate:
    """Some rows of an update, without the columns of its neighbours and what was worked into it."""
    if columns is None and fold is None and is_whole(update, rows):
        return update
    rank = update.rank or 0
    first, last = (int(column) for column in columns or (0, rank))
    if rank and not 0 <= first < last <= rank:
        raise ValueError(f"{update.name}: columns {columns}")
    before = None if fold is None else Fold(*fold)
    if before is not None and not (before.factor and is_float(before.dtype)):
        raise ValueError(f"{update.name}: {fold}")

    def load() -> Update | None:
        found = update.load()
        if found is None:
            return None
        return _own(rows_of(found, rows), slice(first, last), before)

    height = sum(row.stop - row.start for row in rows)
    shape = update.shape if is_whole(update, rows) else (height, *update.shape[1:])
    rank = last - first if rank else 0
    return replace(update, shape=shape, load=load, rank=rank or None, stored=())


def _own(found: Update, columns: slice, fold: Fold | None) -> Update:
    """Some columns of a low-rank update, and values as they were before a scale was worked in."""
    match found:
        case LowRank():
            a, b = found.a[columns], found.b[:, columns]
            if fold is None:
                return LowRank(a, b, found.scale)
            a = unfold(a, 1.0, fold.other)
            return LowRank(a, unfold(b, fold.factor, fold.dtype), fold.scale)
        case DoRA():
            added = _own(found.added, columns, fold)
            assert isinstance(added, LowRank)
            return replace(found, added=added)
        case Dense() if fold is not None:
            return Dense(unfold(found.values, fold.factor, fold.dtype), fold.scale)
        case LoKr() if fold is not None:
            one = Product(unfold(found.one.left, fold.factor, fold.dtype))
            return LoKr(one, found.other, fold.scale)
    return found
