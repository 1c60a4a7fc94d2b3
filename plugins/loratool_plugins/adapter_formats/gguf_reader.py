"""From the tensors of a llama.cpp adapter to updates, collecting problems."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loratool.adapter import LazyUpdate, replacement
from loratool.checkpoint import LazyTensor
from loratool.dtypes import is_float
from loratool.errors import InputError, Problem
from loratool.files import local
from loratool.updates import Experts, LowRank, Update
from loratool_plugins.adapter_formats._experts import assembled
from loratool_plugins.adapter_formats._scales import unfold
from loratool_plugins.adapter_formats.gguf_layout import EXPERTS, TABLE, Names, layout_of
from loratool_plugins.checkpoint_formats._gguf_header import Entry, Header
from loratool_plugins.checkpoint_formats._gguf_values import Codec, Layout, can_dequantize

if TYPE_CHECKING:
    import torch

_SIDES = (".lora_a", ".lora_b")


@dataclass(frozen=True)
class Facts:
    """What loratool's metadata tells of single tensors, by llama.cpp's names.

    Attributes:
        scales: their scales, where they are not alpha / rank.
        folds: (factor, dtype): what was worked into lora_b, and the type that it had before.
        shared: layers whose experts' gate and up projections have the same lora_a.
    """

    scales: Mapping[str, float] = field(default_factory=dict)
    folds: Mapping[str, tuple[float, str]] = field(default_factory=dict)
    shared: frozenset[str] = frozenset()


def facts_of(ours: Mapping[str, Any]) -> Facts:
    """The metadata; TypeError or ValueError if it is not what loratool writes."""
    found = Facts(
        {str(n): float(s) for n, s in dict(ours.get("scales", {})).items()},
        {str(n): (float(f), str(t)) for n, (f, t) in dict(ours.get("folds", {})).items()},
        frozenset(map(str, ours.get("shared", ()))),
    )
    if any(f == 0 or not math.isfinite(f) or not is_float(t) for f, t in found.folds.values()):
        raise ValueError("a factor that cannot be")
    return found


@dataclass
class Reader:
    """Turns a file's tensors into updates.

    Attributes:
        header: of the file.
        names: the architecture's.
        alpha: of all; None for the scale 1.
        heads: the base's numbers of heads, as far as they are known.
        facts: what loratool's metadata tells.
    """

    header: Header
    names: Names
    alpha: float | None
    heads: Mapping[str, int]
    facts: Facts

    def __post_init__(self) -> None:
        self.problems: list[Problem] = []
        self.replaced: dict[str, LazyTensor] = {}  # parameter -> its new value
        self._without_heads: list[str] = []

    def updates(self) -> dict[str, LazyUpdate]:
        """Parameter -> update, in file order; experts last."""
        pairs: dict[str, dict[str, Entry]] = {}
        found: dict[str, LazyUpdate] = {}
        for entry in self.header.entries:
            tensor, side = entry.name[:-7], entry.name[-7:]
            if not can_dequantize(entry.kind):
                self._complain(entry.name, f"the gguf package cannot dequantize {entry.kind.name}")
            elif side in _SIDES:
                pairs.setdefault(tensor, {})[side] = entry
            elif entry.name.endswith("_norm.weight"):
                found |= self._norm(entry)
            else:
                message = "unexpected tensor: neither lora_a, lora_b nor a norm"
                self._complain(entry.name, message)
        layers: dict[str, dict[str, LazyUpdate]] = {}
        for tensor, sides in pairs.items():
            if (update := self._update(tensor, sides)) is None:
                continue
            if match := EXPERTS.fullmatch(tensor):
                layers.setdefault(match["layer"], {})[match["which"]] = update
            else:
                found[update.name] = update
        for layer, parts in layers.items():
            module = next(iter(parts.values())).name.rpartition(".")[0]
            experts, problem = assembled(module, parts, layer in self.facts.shared)
            found |= {update.name: update for update in experts}
            self.problems += [problem] if problem is not None else []
        self._complain_of_heads()
        return found

    def _complain(self, name: str, message: str, expected: str = "", found: str = "") -> None:
        self.problems.append(Problem("error", name, message, expected, found))

    def _complain_of_heads(self) -> None:
        if self._without_heads:
            count = len(self._without_heads) - 1
            message = (
                f"{'and ' + str(count) + ' more: ' if count else ''}the rows are interleaved by "
                "the model's heads, whose number the file does not say: give the base, with its "
                "config.json (--base)"
            )
            self._complain(self._without_heads[0], message)

    def _norm(self, entry: Entry) -> dict[str, LazyUpdate]:
        """A norm of mergekit's adapters, which replaces the base's; llama.cpp passes it over."""
        name = self._parameter(entry.name)
        if name is None:
            return {}
        shifted = Layout("shifted") if self.names.is_shifted(entry.name) else Layout()
        value = self.replaced[name] = _lazy(self.header.path, entry, shifted).renamed(name)
        return {name: replacement(value, _lazy(self.header.path, entry))}

    def _parameter(self, tensor: str) -> str | None:
        name = self.names.parameter(tensor)
        if name is None:
            self._complain(tensor, f"no {self.names.architecture} model has such a tensor")
        return name

    def _update(self, tensor: str, sides: Mapping[str, Entry]) -> LazyUpdate | None:
        for side, other in (_SIDES, _SIDES[::-1]):
            if side not in sides:
                self._complain(f"{tensor}{side}", f"missing, but {other[1:]} is there")
                return None
        name = self._parameter(tensor)
        if name is None:
            return None
        a, b = (sides[side] for side in _SIDES)
        if EXPERTS.fullmatch(tensor):
            return self._experts(tensor, name, a, b)
        table = tensor == TABLE
        rank = b.shape[-1]
        if len(a.shape) != 2 or len(b.shape) != 2 or a.shape[1 if table else 0] != rank or not rank:
            wanted = "(rows, r) and (columns, r)" if table else "(r, in) and (out, r)"
            self._complain(
                tensor, "lora_a and lora_b are no factors of one rank", wanted,
                f"{a.shape} and {b.shape}",
            )  # fmt: skip
            return None
        layout = layout_of(self.names, tensor, self.heads)
        if layout is None:
            self._without_heads.append(name)
            return None
        if layout.change == "heads" and b.shape[0] % (2 * layout.heads):
            message = "its rows are no such number of heads: is this its base?"
            self._complain(tensor, message, f"{layout.heads} heads", f"{b.shape[0]} rows")
            return None
        return self._low_rank(tensor, name, a, b, layout)

    def _low_rank(self, tensor: str, name: str, a: Entry, b: Entry, layout: Layout) -> LazyUpdate:
        left, right = _lazy(self.header.path, a), _lazy(self.header.path, b, layout)
        scale, restored = self._scale(tensor, b.shape[-1]), self._unfolded(tensor)
        table = tensor == TABLE

        def load() -> LowRank:
            one, other = left.read(), restored(right.read())
            return LowRank(other.T, one, scale) if table else LowRank(one, other, scale)

        shape = (a.shape[0], b.shape[0]) if table else (b.shape[0], a.shape[1])
        known = True if self.names.is_transposed(tensor) else False if table else None
        return LazyUpdate(
            name, "low_rank", shape, left.dtype, load,
            rank=b.shape[-1], origin=str(self.header.path), transposed=known, embedding=table,
            stored=(left, _lazy(self.header.path, b)),
        )  # fmt: skip

    def _experts(self, tensor: str, name: str, a: Entry, b: Entry) -> LazyUpdate | None:
        if len(a.shape) != 3 or len(b.shape) != 3 or a.shape[:2] != (b.shape[0], b.shape[2]):
            message = "lora_a and lora_b are no factors of the experts' weights"
            self._complain(
                tensor, message, "(E, r, in) and (E, out, r)", f"{a.shape} and {b.shape}"
            )
            return None
        left, right = _lazy(self.header.path, a), _lazy(self.header.path, b)
        scale, restored = self._scale(tensor, b.shape[-1]), self._unfolded(tensor)

        def load() -> Update:
            return Experts(left.read(), restored(right.read()), scale)

        return LazyUpdate(
            name, "experts", (*b.shape[:2], a.shape[2]), left.dtype, load,
            rank=b.shape[2], origin=str(self.header.path), transposed=False, stored=(left, right),
        )  # fmt: skip

    def _scale(self, tensor: str, rank: int) -> float:
        if tensor in self.facts.scales:
            return self.facts.scales[tensor]
        return 1.0 if self.alpha is None else self.alpha / rank

    def _unfolded(self, tensor: str) -> Callable[[torch.Tensor], torch.Tensor]:
        fold = self.facts.folds.get(tensor)
        return lambda b: b if fold is None else unfold(b, *fold)


def _lazy(path: Path, entry: Entry, layout: Layout | None = None) -> LazyTensor:
    """A tensor as it is stored, or, given what the converter did to it, as it was before."""
    codec = Codec(entry.kind, entry.shape, layout or Layout())

    def blocks() -> Iterator[torch.Tensor]:
        import torch

        try:
            with local(path).open("rb") as file:
                file.seek(entry.begin)
                raw = bytearray(file.read(entry.length))
        except OSError as error:
            raise InputError(f"{path}: cannot be read: {error.strerror}") from error
        if len(raw) < entry.length:
            raise InputError(f"{path}: became shorter while it was read")
        yield from codec.decode(torch.frombuffer(raw, dtype=torch.uint8))

    return LazyTensor(entry.name, codec.dtype, entry.shape, blocks, str(path))


def complain_of_base(reader: Reader, config: Mapping[str, Any], architecture: str | None) -> None:
    """Add a problem if the base is of another architecture than the adapter."""
    if architecture is not None and architecture != reader.names.architecture:
        reader.problems.append(
            replace(
                Problem("error", "general.architecture", "the adapter is for another architecture"),
                expected=f"{architecture} (the base is a {config.get('model_type')!r} model)",
                found=reader.names.architecture,
            )
        )
