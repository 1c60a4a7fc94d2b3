"""PEFT's adapter directory: adapter_config.json and adapter_model.safetensors."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from loratool.adapter import Adapter, LazyUpdate
from loratool.checkpoint import LazyTensor
from loratool.dtypes import is_float
from loratool.errors import FormatError, InputError, Problem
from loratool.families import is_embedding
from loratool.files import entries, is_dir, is_file
from loratool.json_files import MANIFEST, read_json
from loratool.safetensors_file import lazy_tensors, read_header
from loratool.updates import Kind, LowRank, Replacement, Update
from loratool.writer import Spool, write_file, write_safetensors
from loratool_plugins.adapter_formats.peft_layout import PREFIX, Layout, plan_layout
from loratool_plugins.checkpoint_formats.torch import load_lazily
from loratool_plugins.executors.serial import Serial

if TYPE_CHECKING:
    import torch

_CONFIG = "adapter_config.json"
_WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")
_OURS = "loratool"  # key of the safetensors metadata for what PEFT's files cannot say
_FACTOR = re.compile(r"(?P<module>.+)\.lora_(?P<side>[AB])\.weight")
# With bias="all" PEFT saves the biases of modules_to_save again, under the names of its wrapper.
_WRAPPED = re.compile(r"\.(modules_to_save\.[^.]+|original_module)(?=\.)")
# Settings that change what the weights mean; loratool merges none of them wrongly.
_UNSUPPORTED = (
    "use_dora", "lora_bias", "target_parameters", "trainable_token_indices", "layer_replication",
    "alora_invocation_tokens", "use_qalora", "use_bdlora", "kasa_config", "arrow_config",
)  # fmt: skip


@dataclass(frozen=True)
class Peft:
    """LoRA as the peft package saves it."""

    carries: ClassVar[frozenset[Kind]] = frozenset({"low_rank", "replacement"})

    def objection(self, path: Path) -> str:
        """Why it is no directory with PEFT's adapter_config.json."""
        if is_file(path):
            return "a file, not a directory"
        if not is_file(path / _CONFIG):
            return f"no {_CONFIG}"
        try:
            settings = read_json(path / _CONFIG)
        except FormatError:
            return ""  # opening it says what is wrong with the file
        return "" if "peft_type" in settings else f"peft_type is missing in {_CONFIG}"

    def refusals(self, adapter: Adapter) -> Iterable[Problem]:
        """Nothing: whatever of the kinds that it carries can be written."""
        return ()

    def open(self, path: Path) -> Adapter:
        """Open it by its headers; what is wrong inside is collected.

        Raises:
            InputError: a file is missing or cannot be read.
            FormatError: it is malformed, or of a kind that loratool cannot merge yet.
        """
        settings = read_json(path / _CONFIG)
        _require_supported(path, settings)
        weights, tensors, metadata = _open_weights(path)
        reader = _Reader(path, settings, tensors)
        updates = reader.updates()
        ours = _our_metadata(path, metadata)
        model = path / "model"
        config = read_json(model / "config.json") if is_file(model / "config.json") else None
        model_files = {}
        if is_dir(model):
            model_files = {file.name: file for file in entries(model) if is_file(file)}
        own = [file for file in (path / _CONFIG, weights, path / MANIFEST) if is_file(file)]
        return Adapter(
            updates,
            model_files=model_files,
            model_config=config,
            dropped=tuple(map(str, ours.get("dropped", ()))),
            task_type=settings.get("task_type"),
            base_name=str(settings.get("base_model_name_or_path") or ""),
            base_revision=str(settings.get("revision") or ""),
            tied=dict(ours.get("tied", {})),
            moves=tuple((str(old), str(new)) for old, new in ours.get("moves", ())),
            settings=settings,
            context=reader.replaced,
            rslora=bool(settings.get("use_rslora")),
            short_targets=_short_targets(settings, updates),
            files={
                **{file.name: file for file in own},
                **{f"model/{name}": file for name, file in model_files.items()},
            },
            problems=tuple(reader.problems),
            path=path,
        )

    def write(
        self, adapter: Adapter, results: Iterable[tuple[LazyUpdate, Update | None]], folder: Path
    ) -> None:
        """Write weights and config.

        Factors are spooled as they come: their ranks, and which modules have to be kept whole,
        are known only at the end.
        """
        with Spool(folder) as spool:
            factors: dict[str, LowRankEntry] = {}
            replaced: set[str] = set()
            for update, found in results:
                if isinstance(found, LowRank):
                    factors[update.name] = _spool_factors(spool, update, found, adapter.rslora)
                elif isinstance(found, Replacement):
                    replaced.add(update.name)
            if not factors and not replaced:
                return
            layout = plan_layout(adapter, {n: e.rank for n, e in factors.items()}, replaced)
            tensors = dict(_stored_tensors(adapter, layout, factors))
            if layout.placeholder:
                tensors |= _placeholder(spool, adapter, layout.placeholder)
            extra = {
                "dropped": list(adapter.dropped),
                "tied": dict(adapter.tied),
                "moves": [list(move) for move in adapter.moves],
            }
            metadata = {"format": "pt", _OURS: json.dumps(extra, sort_keys=True)}
            write_safetensors(folder / _WEIGHTS[0], tensors, metadata, Serial())
        alphas = {name: entry.alpha for name, entry in factors.items() if name in layout.low_rank}
        config = layout.config(adapter, alphas)
        write_file(folder / _CONFIG, (json.dumps(config, indent=2, sort_keys=True) + "\n").encode())


def _require_supported(path: Path, settings: Mapping[str, Any]) -> None:
    kind = settings.get("peft_type")
    if kind != "LORA":
        raise FormatError(
            f"{path / _CONFIG}: peft_type is {kind!r}: loratool cannot merge that yet, only LORA"
        )
    for key in _UNSUPPORTED:
        if settings.get(key):
            raise FormatError(f"{path / _CONFIG}: {key} is set: loratool cannot merge that yet")
    rank = settings.get("r")
    if not isinstance(rank, int) or isinstance(rank, bool) or rank < 1:
        raise FormatError(f"{path / _CONFIG}: r must be a whole number from 1 up, not {rank!r}")
    for key in ("rank_pattern", "alpha_pattern"):
        if not isinstance(settings.get(key) or {}, dict):
            raise FormatError(f"{path / _CONFIG}: {key} must map module patterns to numbers")


def _open_weights(path: Path) -> tuple[Path, dict[str, LazyTensor], Mapping[str, str]]:
    for name in _WEIGHTS:
        file = path / name
        if not is_file(file):
            continue
        if file.suffix == ".safetensors":
            header = read_header(file)
            return file, lazy_tensors(file, header), header.metadata
        return file, load_lazily(file), {}
    raise InputError(f"{path / _WEIGHTS[0]}: missing, but {_CONFIG} is there")


def _our_metadata(path: Path, metadata: Mapping[str, str]) -> dict[str, Any]:
    try:
        found = json.loads(metadata.get(_OURS, "{}"))
    except json.JSONDecodeError:
        found = None
    if not isinstance(found, dict):
        raise FormatError(f"{path / _WEIGHTS[0]}: its {_OURS} metadata is not a JSON object")
    return found


def _short_targets(
    settings: Mapping[str, Any], updates: Mapping[str, LazyUpdate]
) -> dict[str, frozenset[str]]:
    """The modules behind each plain entry of target_modules: PEFT adapted all that end in it."""
    targets = settings.get("target_modules")
    if not isinstance(targets, list) or any(
        settings.get(key) for key in ("layers_to_transform", "exclude_modules")
    ):
        return {}
    modules = [n.removesuffix(".weight") for n, u in updates.items() if u.kind == "low_rank"]
    found = {
        str(target): frozenset(m for m in modules if m == target or m.endswith(f".{target}"))
        for target in targets
        if "." not in str(target)
    }
    return {target: matching for target, matching in found.items() if matching}


def matches_module(pattern: str, module: str) -> bool:
    """PEFT's rule for the keys of rank_pattern and alpha_pattern."""
    return re.match(rf"(.*\.)?({pattern})$", module) is not None


@dataclass
class _Reader:
    """Turns the stored tensors into updates, collecting problems."""

    path: Path
    settings: Mapping[str, Any]
    tensors: Mapping[str, LazyTensor]

    def __post_init__(self) -> None:
        self.problems: list[Problem] = []
        self.replaced: dict[str, LazyTensor] = {}  # parameter -> its new value

    def updates(self) -> dict[str, LazyUpdate]:
        """Parameter name -> update, in file order."""
        pairs: dict[str, dict[str, LazyTensor]] = {}
        found: dict[str, LazyUpdate] = {}
        for key, tensor in self.tensors.items():
            name = key.removeprefix(PREFIX)
            if name == key:
                self._complain(key, f"unexpected key: PEFT's keys start with {PREFIX!r}")
            elif (plain := _WRAPPED.sub("", key)) != key and plain in self.tensors:
                continue
            elif match := _FACTOR.fullmatch(name):
                pairs.setdefault(match["module"], {})[match["side"]] = tensor
            elif (parameter := self._kept_whole(name)) is not None:
                found[parameter] = self._replacement(parameter, tensor)
            else:
                self._complain(key, "unexpected key: neither a factor nor in modules_to_save")
        for module, sides in pairs.items():
            if (update := self._low_rank(module, sides)) is None:
                continue
            found[update.name] = replace(update, beneath=self.replaced.pop(update.name, None))
        return found

    def _complain(self, name: str, message: str, expected: str = "", found: str = "") -> None:
        self.problems.append(Problem("error", name, message, expected, found))

    def _kept_whole(self, name: str) -> str | None:
        """The parameter that a key outside lora_A and lora_B replaces, if PEFT would load it."""
        module, _, leaf = name.rpartition(".")
        if ".lora_" in f".{name}":
            return None
        if module.endswith(".base_layer"):
            return f"{module.removesuffix('.base_layer')}.{leaf}"
        saved = self.settings.get("modules_to_save") or ()
        parents = [module[: match.start()] for match in re.finditer(r"\.", module)] + [module]
        if any(parent.endswith(str(end)) for parent in parents for end in saved):
            return name
        is_bias = leaf == "bias" and self.settings.get("bias") in ("all", "lora_only")
        is_table = leaf == "weight" and (is_embedding(module) or module.endswith("lm_head"))
        return name if is_bias or is_table else None

    def _replacement(self, name: str, tensor: LazyTensor) -> LazyUpdate:
        value = self.replaced[name] = tensor.renamed(name)
        return LazyUpdate(
            name,
            "replacement",
            tensor.shape,
            tensor.dtype,
            lambda: Replacement(value),
            origin=tensor.origin,
            stored=(tensor,),
        )

    def _low_rank(self, module: str, sides: Mapping[str, LazyTensor]) -> LazyUpdate | None:
        for side, other in (("A", "B"), ("B", "A")):
            if side not in sides:
                key = f"{PREFIX}{module}.lora_{side}.weight"
                self._complain(key, f"missing, but lora_{other} is there")
                return None
        a, b = sides["A"], sides["B"]
        if len(a.shape) != 2 or len(b.shape) != 2:
            message = "convolution factors cannot be merged yet; 2-D ones can"
            self._complain(f"{module}.lora_A", message, "2 dimensions", f"{a.shape}, {b.shape}")
            return None
        self._check_factors(module, a, b)
        scale = self._scale(module)
        return LazyUpdate(
            f"{module}.weight",
            "low_rank",
            (b.shape[0], a.shape[1]),
            a.dtype,
            _factor_loader(a, b, scale),
            rank=a.shape[0],
            origin=a.origin,
            transposed=True if self.settings.get("fan_in_fan_out") else None,
            stored=(a, b),
        )

    def _check_factors(self, module: str, a: LazyTensor, b: LazyTensor) -> None:
        rank = self._pattern("rank_pattern", module, self.settings["r"])
        if a.shape[0] != b.shape[1]:
            message = "lora_A and lora_B have different ranks"
            self._complain(module, message, f"lora_B ({b.shape[0]}, {a.shape[0]})", f"{b.shape}")
        elif a.shape[0] != rank:
            self._complain(module, "the config gives it another rank", f"{rank}", f"{a.shape[0]}")
        for tensor in (a, b):
            if not is_float(tensor.dtype):
                self._complain(tensor.name, "factors must be floats", "a float", tensor.dtype)

    def _scale(self, module: str) -> float:
        """alpha / r, or alpha / sqrt(r) for rsLoRA, with PEFT's patterns."""
        rank = self._pattern("rank_pattern", module, self.settings["r"])
        alpha = self._pattern("alpha_pattern", module, self.settings.get("lora_alpha", 8))
        try:
            scale = alpha / (math.sqrt(rank) if self.settings.get("use_rslora") else rank)
        except (TypeError, ValueError, ZeroDivisionError):
            scale = math.nan
        if not math.isfinite(scale):
            self._complain(module, "its scale is not finite", "alpha / r", f"{alpha} / {rank}")
            return 0.0
        return float(scale)

    def _pattern(self, key: str, module: str, default: Any) -> Any:
        for pattern, value in (self.settings.get(key) or {}).items():
            try:
                if matches_module(pattern, module):
                    return value
            except re.error as error:
                raise FormatError(
                    f"{self.path / _CONFIG}: {key}: {pattern!r} is no pattern ({error})"
                ) from error
        return default


def _factor_loader(a: LazyTensor, b: LazyTensor, scale: float) -> Callable[[], Update]:
    return lambda: LowRank(a.read(), b.read(), scale)


@dataclass(frozen=True)
class LowRankEntry:
    """Spooled factors."""

    a: LazyTensor
    b: LazyTensor
    rank: int
    alpha: float


def _spool_factors(spool: Spool, update: LazyUpdate, found: LowRank, rslora: bool) -> LowRankEntry:
    module = PREFIX + update.name.removesuffix(".weight")
    a = spool.add(f"{module}.lora_A.weight", found.a)
    b = spool.add(f"{module}.lora_B.weight", found.b)
    divisor = math.sqrt(found.rank) if rslora else float(found.rank)
    return LowRankEntry(a, b, found.rank, _alpha(found.scale, divisor))


def _alpha(scale: float, divisor: float) -> float:
    """The alpha that gives exactly this scale when divided again, where a double can."""
    alpha = scale * divisor
    neighbours = (alpha, math.nextafter(alpha, -math.inf), math.nextafter(alpha, math.inf))
    return next((value for value in neighbours if value / divisor == scale), alpha)


def _stored_tensors(
    adapter: Adapter, layout: Layout, factors: Mapping[str, LowRankEntry]
) -> Iterator[tuple[str, LazyTensor]]:
    for name in layout.low_rank:
        entry = factors[name]
        yield entry.a.name, entry.a
        yield entry.b.name, entry.b
        if (beneath := adapter[name].beneath) is not None:
            yield f"{PREFIX}{name.removesuffix('.weight')}.base_layer.weight", beneath
    for key, name in layout.whole.items():
        yield key, adapter.context[name]


def _placeholder(spool: Spool, adapter: Adapter, name: str) -> dict[str, LazyTensor]:
    """A zero update of rank 1: PEFT loads no adapter without a target."""
    import torch

    rows, columns = adapter.context[name].shape
    if adapter.kinds.get(name) == "conv1d":
        rows, columns = columns, rows
    module = PREFIX + name.removesuffix(".weight")
    zeros: list[tuple[str, torch.Tensor]] = [
        (f"{module}.lora_A.weight", torch.zeros(1, columns)),
        (f"{module}.lora_B.weight", torch.zeros(rows, 1)),
    ]
    return {key: spool.add(key, value) for key, value in zeros}
