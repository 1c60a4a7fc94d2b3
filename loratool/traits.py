"""What an adapter may have that a server may not take: found by headers alone."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from loratool.adapter import Adapter, LazyUpdate
from loratool.checkpoint import Checkpoint
from loratool.files import is_file
from loratool.json_files import read_json
from loratool.servers import Server

# What takes something away: another format; `convert --to-lora`, `--lora-only` or `--drop`;
# `rescale --normalize`; a merge, where no adapter can do; or how the server is started.
Cure = Literal["format", "to_lora", "lora_only", "drop", "normalize", "merge", "start"]

FACTORS = ("low_rank", "sparse", "experts", "dora")  # kinds of update with a rank
_METHODS = ("loha", "lokr", "ia3", "dense")
_LAYER = re.compile(r"\.(\d+)\.")


@dataclass(frozen=True)
class Subject:
    """What is looked at.

    Attributes:
        adapter: with its files.
        server: to be loaded by this.
        base: the model that it is for, if it is known.
    """

    adapter: Adapter
    server: Server
    base: Checkpoint | None = None

    def of_kinds(self, *kinds: str) -> list[LazyUpdate]:
        """The updates of some kinds."""
        return [update for update in self.adapter.values() if update.kind in kinds]

    @property
    def on_modules(self) -> list[LazyUpdate]:
        """The updates in factors that are of modules' weights, not of other parameters."""
        found = self.of_kinds("low_rank", "sparse", "dora")
        return [update for update in found if update.name.endswith(".weight")]

    @property
    def settings(self) -> Mapping[str, Any]:
        """adapter_config.json of LoRA; {} of other formats and methods."""
        settings = self.adapter.settings
        is_lora = self.adapter.format == "peft" and settings.get("peft_type", "LORA") == "LORA"
        return settings if is_lora else {}


@dataclass(frozen=True)
class Trait:
    """Something that an adapter may have and a server may not take.

    Attributes:
        label: for people: "{}" and "{tensors}" stand for how many there are, "{names}" for which.
        cure: what takes it away.
        find: the names of the parameters, or settings, that have it.
    """

    label: str
    cure: Cure
    find: Callable[[Subject], Iterable[str]]


def _format(subject: Subject) -> list[str]:
    adapter = subject.adapter
    return [] if adapter.format in subject.server.formats else [adapter.label]


def _settings(subject: Subject) -> list[str]:
    settings = subject.settings
    wanted = subject.server.settings if settings else ()
    return [key for key in wanted if key not in settings]


def _target_pattern(subject: Subject) -> list[str]:
    targets = subject.settings.get("target_modules")
    plain = not isinstance(targets, str) or targets in ("all", "all-linear")
    return [] if plain else [f"target_modules is a pattern, {targets!r}"]


def _method(subject: Subject) -> list[str]:
    found = subject.of_kinds(*_METHODS)
    return [u.name for u in found if u.kind != "dense" or len(u.shape) > 1]


def _bias(subject: Subject) -> list[str]:
    return [u.name for u in subject.of_kinds("dense") if len(u.shape) == 1]


def _is_lone_bias(update: LazyUpdate, adapter: Adapter) -> bool:
    """Whether a tensor is a bias whose module is not kept whole with it."""
    module, _, leaf = update.name.rpartition(".")
    weight = adapter.get(f"{module}.weight")
    return leaf == "bias" and (weight is None or weight.kind != "replacement")


def _whole(subject: Subject) -> list[str]:
    found = subject.of_kinds("replacement")
    return [u.name for u in found if not _is_lone_bias(u, subject.adapter)]


def _whole_bias(subject: Subject) -> list[str]:
    found = subject.of_kinds("replacement")
    return [u.name for u in found if _is_lone_bias(u, subject.adapter)]


def _bias_setting(subject: Subject) -> list[str]:
    setting = subject.settings.get("bias") or "none"
    return [] if setting == "none" or _whole_bias(subject) else [f"bias: {setting}"]


def _added_tokens(subject: Subject) -> list[str]:
    """Tokens in added_tokens.json that the base does not have, as far as that is known."""
    path = subject.adapter.path
    file = path / "added_tokens.json" if path is not None else None
    if file is None or not is_file(file):
        return []
    config = (subject.base.config if subject.base is not None else None) or {}
    size = config.get("vocab_size")
    tokens = read_json(file).items()
    return [str(t) for t, n in tokens if not isinstance(size, int) or not n or n >= size]


def _embedding(subject: Subject) -> list[str]:
    return [u.name for u in subject.of_kinds("low_rank", "sparse", "dora") if u.embedding]


def _convolution(subject: Subject) -> list[str]:
    found = subject.of_kinds("low_rank", "sparse", "dora")
    return [update.name for update in found if len(update.shape) > 2]


def _experts(subject: Subject) -> list[str]:
    others = [u for u in subject.of_kinds("low_rank") if not u.name.endswith(".weight")]
    return [u.name for u in (*subject.of_kinds("experts"), *others)]


def _lone_experts(subject: Subject) -> list[str]:
    names = _experts(subject)
    number = Counter(name.rpartition(".")[0] for name in names)
    return [name for name in names if number[name.rpartition(".")[0]] == 1]


def _update(subject: Subject) -> list[str]:
    return [u.name for u in subject.on_modules]


def _kind_of_module(name: str) -> str:
    return name.removesuffix(".weight").rpartition(".")[2]


def _module(subject: Subject) -> list[str]:
    known = subject.server.modules
    return [u.name for u in subject.on_modules if _kind_of_module(u.name) not in known]


def _lone(subject: Subject) -> list[str]:
    """Updates without the one that they are packed with."""
    found = []
    for update in subject.on_modules:
        kind = _kind_of_module(update.name)
        partner = subject.server.partners.get(kind)
        other = f"{update.name.removesuffix(f'{kind}.weight')}{partner}.weight"
        if partner is not None and other not in subject.adapter:
            found.append(update.name)
    return found


def _layers(subject: Subject) -> list[str]:
    """Updates of kinds of modules that some layers have none of.

    Without a base the highest layer with any update counts as the last.
    """
    layers: dict[str, set[int]] = {}
    names: dict[str, list[str]] = {}
    for update in subject.on_modules:
        if match := _LAYER.search(update.name):
            kind = update.name[match.end() :]
            layers.setdefault(kind, set()).add(int(match[1]))
            names.setdefault(kind, []).append(update.name)
    if not layers:
        return []
    config = (subject.base.config if subject.base is not None else None) or {}
    known = config.get("num_hidden_layers") or config.get("n_layer")
    number = known if isinstance(known, int) else max(map(max, layers.values())) + 1
    return [n for kind, found in layers.items() if len(found) < number for n in names[kind]]


def _ranks(subject: Subject) -> list[str]:
    """Updates of another rank than the config's r."""
    rank = subject.settings.get("r", 8)
    if not subject.settings:
        return []
    found = subject.of_kinds(*FACTORS)
    return [u.name for u in found if u.rank is not None and u.rank != rank]


def _alphas(subject: Subject) -> list[str]:
    """Updates that alpha_pattern gives another alpha than lora_alpha; PEFT's rule of matching."""
    settings = subject.settings
    patterns: Mapping[str, Any] = settings.get("alpha_pattern") or {}
    return [
        update.name
        for update in subject.of_kinds(*FACTORS)
        if _by_pattern(patterns, update.name, settings.get("lora_alpha"))
        != settings.get("lora_alpha")
    ]


def _by_pattern(patterns: Mapping[str, Any], name: str, default: Any) -> Any:
    module = name.removesuffix(".weight")
    matching = (v for p, v in patterns.items() if re.match(rf"(.*\.)?({p})$", module))
    return next(matching, default)


def _rslora(subject: Subject) -> list[str]:
    if not subject.settings.get("use_rslora"):
        return []
    return [update.name for update in subject.of_kinds(*FACTORS)]


def _names_of(*kinds: str) -> Callable[[Subject], list[str]]:
    return lambda subject: [update.name for update in subject.of_kinds(*kinds)]


TRAITS: Mapping[str, Trait] = {
    "format": Trait("format {format}, not {servers}", "format", _format),
    "settings": Trait("adapter_config.json does not say {names}", "format", _settings),
    "target_pattern": Trait("{names}", "format", _target_pattern),
    "method": Trait("{} by another method than LoRA", "to_lora", _method),
    "dora": Trait("{} of DoRA", "to_lora", _names_of("dora")),
    "bias": Trait("{} of biases beside factors", "lora_only", _bias),
    "whole": Trait("{tensors} kept whole", "lora_only", _whole),
    "whole_bias": Trait("biases: {tensors} kept whole", "lora_only", _whole_bias),
    "bias_setting": Trait("adapter_config.json says {names}, and no bias is there", "format",
                          _bias_setting),
    "rows": Trait("{tensors} with replaced rows", "lora_only", _names_of("rows")),
    "tokens": Trait("added_tokens.json lies beside it, with {names}", "format", _added_tokens),
    "embedding": Trait("{} of embeddings", "merge", _embedding),
    "convolution": Trait("{} of convolutions", "merge", _convolution),
    "experts": Trait("{} of experts in one tensor", "merge", _experts),
    "lone_experts": Trait("{} of only one of an expert's two tensors", "merge", _lone_experts),
    "update": Trait("{} of modules outside numbered layers", "merge", _update),
    "module": Trait("{} of other modules", "merge", _module),
    "lone": Trait("{} without those that they are packed with", "merge", _lone),
    "layers": Trait("{} of kinds of modules that some layers have none of", "merge", _layers),
    "ranks": Trait("{} of another rank than r", "normalize", _ranks),
    "alphas": Trait("{} with an alpha of their own", "normalize", _alphas),
    "rslora": Trait("{} scaled by alpha / sqrt(rank)", "normalize", _rslora),
}  # fmt: skip
# Where an update is: a server that has no place for one says nothing more of it.
PLACES = ("embedding", "convolution", "lone_experts", "experts", "update", "module", "lone",
           "layers")  # fmt: skip
