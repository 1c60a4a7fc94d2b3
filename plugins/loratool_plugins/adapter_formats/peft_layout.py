"""How PEFT represents a set of updates: which keys, and which settings make it load them.

PEFT's rules, as peft 0.21 applies them:
* a tensor outside the factors is kept whole if its module is in modules_to_save, and then *all* of
  the module's tensors must be there, tied ones included;
* modules_to_save matches every module whose name *ends with* an entry, without regard to dots;
* task types with a head add the head's names to modules_to_save by themselves;
* with bias="all" biases are loaded into the base, a LoRA target's as `base_layer.bias`;
* any other key that names a tensor of the base is loaded into the base as well;
* a head that is tied to an embedding needs its own key; ensure_weight_tying keeps the two one, and
  works (without it: warns) only where one of them is called embed_tokens or lm_head.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from loratool.adapter import Adapter
from loratool.errors import InputError
from loratool.skeleton import TASK_HEADS
from loratool_plugins.adapter_formats._peft_dialects import PREFIX


@dataclass(frozen=True)
class Layout:
    """What goes into the two files.

    Attributes:
        low_rank: parameter -> rank, for every pair of factors that is written.
        whole: key in the file -> the parameter whose tensor it holds.
        modules_to_save: modules that are kept whole.
        biases: whether biases outside those modules are replaced.
        tied: whether PEFT must tie a head to an embedding that is kept whole.
        placeholder: a weight to put a zero update on, if there is no other target.
    """

    low_rank: Mapping[str, int]
    whole: Mapping[str, str]
    modules_to_save: tuple[str, ...]
    biases: bool
    tied: bool
    placeholder: str | None

    def config(self, adapter: Adapter, alphas: Mapping[str, float]) -> dict[str, Any]:
        """adapter_config.json."""
        ranks = {name.removesuffix(".weight"): rank for name, rank in self.low_rank.items()}
        scales = {name.removesuffix(".weight"): alphas[name] for name in self.low_rank}
        if self.placeholder:
            module = self.placeholder.removesuffix(".weight")
            ranks, scales = {module: 1}, {module: 1.0}
        rank = Counter(ranks.values()).most_common(1)[0][0] if ranks else 1
        alpha = Counter(scales.values()).most_common(1)[0][0] if ranks else 1.0
        config: dict[str, Any] = {
            "peft_type": "LORA",
            "task_type": adapter.task_type,
            "base_model_name_or_path": adapter.base_name or None,
            "r": rank,
            "lora_alpha": number(alpha),
            "lora_dropout": 0.0,
            "bias": "all" if self.biases else "none",
            "fan_in_fan_out": any(adapter[name].transposed for name in self.low_rank)
            or adapter.kinds.get(self.placeholder or "") == "conv1d",
            "inference_mode": True,
            "init_lora_weights": True,
            "modules_to_save": list(self.modules_to_save) or None,
            "rank_pattern": pattern({m: r for m, r in ranks.items() if r != rank}, ranks),
            "alpha_pattern": pattern(
                {m: number(a) for m, a in scales.items() if a != alpha}, ranks
            ),
            "target_modules": self.target_modules(adapter, ranks),
            "use_dora": False,
            "use_rslora": adapter.rslora,
        }
        if self.tied:
            config["ensure_weight_tying"] = True
        return config

    def target_modules(self, adapter: Adapter, ranks: Mapping[str, int]) -> list[str]:
        """The targets, by the last part of their names where that means them and nothing else."""
        if not adapter.kinds:  # the model is not known, only what the adapter says of it
            return _known_short_names(ranks, adapter.short_targets)
        modules = {name.rpartition(".")[0] for name in _in_memory(adapter)}
        others = {parent for module in modules for parent in _with_parents(module)} - set(ranks)
        return _short_names(ranks, others)


def plan_layout(
    adapter: Adapter, ranks: Mapping[str, int], replaced: Iterable[str], beside: bool = False
) -> Layout:
    """Decide where every change goes.

    Args:
        adapter: for its context (all tensors of the fine-tuned model), kinds, task and ties.
        ranks: parameter -> rank of its factors.
        replaced: parameters that are kept whole.
        beside: whether PEFT has other targets than modules' weights.
    """
    sources = _in_memory(adapter)
    changed = set(replaced)
    replaced = {name for name, source in sources.items() if source in changed}
    in_place = {name for name in changed if _is_loaded_in_place(name, adapter, replaced)}
    saved = {n.rpartition(".")[0] for n in replaced if not in_place.intersection((n, sources[n]))}
    if "" in saved:
        bare = next(name for name in sorted(replaced - in_place) if "." not in name)
        raise InputError(f"{bare}: PEFT cannot keep a parameter of the model itself; --exclude it")
    saved = _as_peft_matches(saved, sources, TASK_HEADS.get(adapter.task_type or "", ()))
    inside = [name for name in sources if is_inside(name.rpartition(".")[0], saved)]
    low_rank = {name: rank for name, rank in ranks.items() if name not in inside}
    placeholder = None if low_rank or beside else _any_linear(adapter, inside)
    whole = {PREFIX + name: sources[name] for name in inside}
    in_place.difference_update(inside)
    # A bias under both its names: loaded with low_cpu_mem_usage, the two are no longer one.
    twins = {n for n in replaced if n.endswith("bias") and sources[n] in in_place}
    for name in sorted(in_place | twins.difference(inside)):
        module, _, leaf = name.rpartition(".")
        is_target = f"{module}.weight" in (*low_rank, placeholder)
        whole[f"{PREFIX}{module}.base_layer.{leaf}" if is_target else PREFIX + name] = sources[name]
    return Layout(
        low_rank,
        whole,
        modules_to_save=tuple(sorted(saved)),
        biases=any(name.endswith("bias") for name in in_place),
        tied=_must_tie(adapter, saved, inside),
        placeholder=placeholder,
    )


def _in_memory(adapter: Adapter) -> dict[str, str]:
    """Every parameter of the fine-tuned model in memory -> the tensor that holds its values."""
    tied = {name: source for name, source in adapter.tied.items() if source in adapter.context}
    return {name: name for name in adapter.context} | tied


def _is_loaded_in_place(name: str, adapter: Adapter, replaced: set[str]) -> bool:
    """Whether PEFT should load a tensor into the base model itself.

    So it does with biases: of linear modules whose weight stays, and bare ones. A table that is
    tied to other tables (T5) has no other way: PEFT makes linear modules of them.
    """
    module, _, leaf = name.rpartition(".")
    if leaf != "bias":
        twins = [twin for twin, source in adapter.tied.items() if source == name]
        return any(adapter.kinds.get(twin) == "embedding" for twin in twins)
    weight = f"{module}.weight"
    linear = adapter.kinds.get(weight) in ("linear", "conv1d")
    bare = weight not in adapter.context and weight not in adapter.tied
    return bare or (linear and weight not in replaced)


def _as_peft_matches(
    saved: Iterable[str], names: Iterable[str], heads: tuple[str, ...]
) -> set[str]:
    """The modules that PEFT keeps whole if told to keep `saved`."""
    found = set(saved)
    modules = {parent for name in names for parent in _with_parents(name.rpartition(".")[0])}
    while extra := {
        module
        for module in modules
        if module.endswith((*found, *heads)) and not is_inside(module, found)
    }:
        found |= extra
    return {m for m in found if not any(m.startswith(f"{other}.") for other in found)}


def _must_tie(adapter: Adapter, saved: Iterable[str], inside: Iterable[str]) -> bool:
    """Whether PEFT has to be told that an embedding and a head are one.

    It knows them by these names only; other heads get a copy of the embedding.
    """
    known = any(module.rpartition(".")[2] in ("embed_tokens", "lm_head") for module in saved)
    return known and any(name.endswith(".weight") and name in adapter.tied for name in inside)


def _with_parents(module: str) -> list[str]:
    parts = module.split(".")
    return [".".join(parts[: end + 1]) for end in range(len(parts))]


def is_inside(module: str, saved: Iterable[str]) -> bool:
    """Whether a module is one of `saved`, or within one."""
    return any(module == other or module.startswith(f"{other}.") for other in saved)


def _any_linear(adapter: Adapter, inside: list[str]) -> str | None:
    linear = (n for n, kind in adapter.kinds.items() if kind in ("linear", "conv1d"))
    return next((n for n in linear if n in adapter.context and n not in inside), None)


def _known_short_names(targets: Iterable[str], known: Mapping[str, frozenset[str]]) -> list[str]:
    left = set(targets)
    found = [name for name, modules in known.items() if modules <= left]
    covered = {module for name in found for module in known[name]}
    return sorted({*found, *(left - covered)})


def _short_names(targets: Iterable[str], others: set[str]) -> list[str]:
    """Last components where they mean the targets and nothing else, else full names."""
    short: dict[str, list[str]] = {}
    for module in targets:
        short.setdefault(module.rpartition(".")[2], []).append(module)
    found: list[str] = []
    for last, modules in short.items():
        ambiguous = any(other == last or other.endswith(f".{last}") for other in others)
        found += modules if ambiguous else [last]
    return sorted(found)


def pattern(values: Mapping[str, Any], modules: Iterable[str]) -> dict[str, Any]:
    """Full names as pattern keys: PEFT reads them as regular expressions, dots included."""
    modules = tuple(modules)

    def key(module: str) -> str:
        matching = [m for m in modules if re.match(rf"(.*\.)?({module})$", m)]
        return module if matching == [module] else f"^{re.escape(module)}"

    return {key(module): value for module, value in values.items()}


def number(value: float) -> float | int:
    """Whole numbers without a point, as PEFT writes them."""
    return int(value) if float(value).is_integer() else value
