"""From updates to the tensors and the settings of PEFT's files."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loratool.adapter import Adapter, LazyUpdate
from loratool.checkpoint import LazyTensor
from loratool.errors import InputError, Problem
from loratool.updates import (
    IA3,
    Dense,
    DoRA,
    Experts,
    Kind,
    LoHa,
    LoKr,
    LowRank,
    Product,
    Replacement,
    Rows,
    Sparse,
    Update,
)
from loratool.writer import Spool
from loratool_plugins.adapter_formats import peft_config, peft_sparse
from loratool_plugins.adapter_formats._peft_dialects import PREFIX
from loratool_plugins.adapter_formats._products import product_parts
from loratool_plugins.adapter_formats.peft_config import usual_order
from loratool_plugins.adapter_formats.peft_layout import (
    Layout,
    is_inside,
    number,
    pattern,
    plan_layout,
)

if TYPE_CHECKING:
    import torch

CARRIES: frozenset[Kind] = frozenset(
    {"low_rank", "sparse", "experts", "dense", "loha", "lokr", "dora", "ia3", "rows", "replacement"}
)
# Kinds that a method of their own is for; all others are LoRA's.
_METHODS = {"loha": "LOHA", "lokr": "LOKR", "ia3": "IA3"}
_BESIDE_ANY = ("replacement",)


@dataclass
class Written:
    """What one update became.

    Attributes:
        tensors: key in the file -> spooled tensor.
        rank: of its factors; 0 if it has none.
        scale: of its factors.
        alpha: that gives this scale again.
        entries: key in the file of single entries -> spooled tensor.
    """

    tensors: dict[str, LazyTensor]
    rank: int = 0
    scale: float = 0.0
    alpha: float = 0.0
    entries: dict[str, LazyTensor] = field(default_factory=dict)


@dataclass
class Plan:
    """Everything that goes into the two files.

    Attributes:
        adapter: what is written.
        method: PEFT's name of the method.
        written: parameter -> what its update became.
        replaced: parameters that are kept whole.
    """

    adapter: Adapter
    method: str
    written: dict[str, Written] = field(default_factory=dict)
    replaced: set[str] = field(default_factory=set)

    def layout(self) -> Layout:
        """Where what is kept whole goes."""
        ranks = {name: entry.rank for name, entry in self.written.items()}
        modules = {n: rank for n, rank in ranks.items() if self._is_module(n)}
        return plan_layout(self.adapter, modules, self.replaced, beside=len(ranks) > len(modules))

    def _is_module(self, name: str) -> bool:
        """Whether an update is on a module's weight, not its bias, rows, or another parameter."""
        kind = self.adapter[name].kind
        return name.endswith(".weight") and kind not in ("dense", "rows", "experts")

    def _is_inside(self, name: str, layout: Layout) -> bool:
        """Whether a parameter is in a module that is kept whole."""
        if self._is_module(name):
            return name not in layout.low_rank
        return is_inside(name.rpartition(".")[0], layout.modules_to_save)

    def tensors(self, layout: Layout) -> Iterator[tuple[str, LazyTensor]]:
        """Every factor that is written."""
        for name, entry in self.written.items():
            if self._is_inside(name, layout):
                continue
            yield from entry.tensors.items()
            beneath = self.adapter[name].beneath
            if beneath is not None:
                yield f"{PREFIX}{name.removesuffix('.weight')}.base_layer.weight", beneath

    def entries(self, layout: Layout) -> dict[str, dict[str, LazyTensor]]:
        """The single entries that are written beside factors, by parameter."""
        return {
            name: entry.entries
            for name, entry in self.written.items()
            if entry.entries and not self._is_inside(name, layout)
        }

    def config(self, layout: Layout) -> dict[str, Any]:
        """adapter_config.json."""
        match self.method:
            case "LORA":
                return self._lora(layout)
            case "IA3":
                return self._ia3(layout)
            case "TRAINABLE_TOKENS":
                return self._rows_alone()
        return self._lycoris(layout)

    def _lora(self, layout: Layout) -> dict[str, Any]:
        alphas = {n: entry.alpha for n, entry in self.written.items() if n in layout.low_rank}
        kinds = {self.adapter[name].kind for name in self.written}
        parameters = {
            name: entry
            for name, entry in self.written.items()
            if entry.rank and not self._is_module(name) and not self._is_inside(name, layout)
        }
        config = layout.config(self.adapter, alphas)
        if parameters:
            config["target_parameters"] = list(parameters)  # in the order of their wrappers
            config = _with_parameters(config, parameters, bool(alphas))
        rows = {
            name.removesuffix(".weight"): list(self.adapter[name].rows)
            for name in self.written
            if self.adapter[name].kind == "rows"
        }
        config["use_dora"] = "dora" in kinds
        if "dense" in kinds:
            config["lora_bias"] = True
        if rows:
            config["trainable_token_indices"] = rows
        if self.adapter.settings.get("ensure_weight_tying"):
            config["ensure_weight_tying"] = True
        return config

    def _common(self, layout: Layout) -> dict[str, Any]:
        return {
            "peft_type": self.method,
            "task_type": self.adapter.task_type,
            "base_model_name_or_path": self.adapter.base_name or None,
            "inference_mode": True,
            "modules_to_save": list(layout.modules_to_save) or None,
        }

    def _lycoris(self, layout: Layout) -> dict[str, Any]:
        """LoHa's and LoKr's; how LoKr splits dimensions is taken over from where it was read."""
        ranks = {n.removesuffix(".weight"): self.written[n].rank for n in layout.low_rank}
        alphas = {n.removesuffix(".weight"): self.written[n].alpha for n in layout.low_rank}
        rank, alpha = _commonest(ranks.values()), _commonest(alphas.values())
        known = self.adapter.settings
        config = {
            **self._common(layout),
            "r": rank,
            "alpha": number(alpha),
            "rank_pattern": pattern({m: r for m, r in ranks.items() if r != rank}, ranks),
            "alpha_pattern": pattern(
                {m: number(a) for m, a in alphas.items() if a != alpha}, ranks
            ),
            "target_modules": layout.target_modules(self.adapter, ranks),
            "rank_dropout": 0.0,
            "module_dropout": 0.0,
            "use_effective_conv2d": any(
                "hada_t1" in key or "lokr_t2" in key
                for entry in self.written.values()
                for key in entry.tensors
            ),
            "init_weights": True,
        }
        if self.method == "LOKR":
            for key, default in (("decompose_both", False), ("decompose_factor", -1)):
                config[key] = known.get(key, default)
        return config

    def _ia3(self, layout: Layout) -> dict[str, Any]:
        modules = sorted(name.removesuffix(".weight") for name in layout.low_rank)
        inputs = [m for m in modules if self.adapter[f"{m}.weight"].shape[0] == 0]
        return {
            **self._common(layout),
            "target_modules": modules,
            "feedforward_modules": inputs,
            "fan_in_fan_out": any(self.adapter[n].transposed for n in layout.low_rank),
            "init_ia3_weights": True,
        }

    def _rows_alone(self) -> dict[str, Any]:
        (name, *_) = self.written
        return {
            "peft_type": self.method,
            "task_type": self.adapter.task_type,
            "base_model_name_or_path": self.adapter.base_name or None,
            "inference_mode": True,
            "target_modules": sorted(n.removesuffix(".weight") for n in self.written),
            "token_indices": list(self.adapter[name].rows),
            "init_weights": True,
        }


def _with_parameters(
    config: dict[str, Any], parameters: Mapping[str, Written], has_modules: bool
) -> dict[str, Any]:
    """The ranks and alphas of parameters, beside those of modules if there are any."""
    rank = config["r"] if has_modules else _commonest(e.rank for e in parameters.values())
    alpha = config["lora_alpha"] if has_modules else _commonest(
        e.alpha for e in parameters.values()
    )  # fmt: skip
    ranks = {n: e.rank for n, e in parameters.items() if e.rank != rank}
    alphas = {n: number(e.alpha) for n, e in parameters.items() if e.alpha != alpha}
    return {
        **config,
        "r": rank,
        "lora_alpha": number(alpha),
        "rank_pattern": {**config["rank_pattern"], **pattern(ranks, parameters)},
        "alpha_pattern": {**config["alpha_pattern"], **pattern(alphas, parameters)},
    }


def _commonest(values: Iterable[Any]) -> Any:
    return Counter(values).most_common(1)[0][0]


def method_of(adapter: Adapter) -> str:
    """PEFT's name of the method that can hold an adapter's updates, without `refusals`."""
    kinds = {update.kind for update in adapter.values()}.difference(_BESIDE_ANY)
    found = sorted(_METHODS[kind] for kind in kinds if kind in _METHODS)
    if found:
        return found[0]
    alone = kinds == {"rows"} and not any(u.kind == "replacement" for u in adapter.values())
    return "TRAINABLE_TOKENS" if alone else "LORA"


def refusals(adapter: Adapter) -> list[Problem]:
    """What PEFT's settings, which hold for a whole adapter, cannot say."""
    method = method_of(adapter)
    checks = {"LORA": _lora_refusals, "TRAINABLE_TOKENS": _rows_refusals}
    own = {kind for kind, name in _METHODS.items() if name == method}
    if method in checks:
        return checks[method](adapter)
    found = [
        _refusal(update, f"beside {method} PEFT can hold no other method; convert with --to-lora")
        for update in adapter.values()
        if update.kind not in own and update.kind not in _BESIDE_ANY
    ]
    if method == "IA3" and adapter.settings.get("peft_type") != "IA3":
        message = (
            "scales outputs and not their biases, which PEFT's IA3 scales, too; convert with "
            "--to-lora"
        )
        found += [
            _refusal(update, message)
            for name, update in adapter.items()
            if update.kind == "ia3" and len(update.shape) == 2 and update.shape[0]
            if f"{name.removesuffix('.weight')}.bias" not in adapter
        ]
    if method == "LOKR" and adapter.settings.get("peft_type") != "LOKR":
        message = (
            "how PEFT's LoKr splits dimensions into factors is one setting for all, which this "
            "adapter does not have: write it as lycoris, or convert with --to-lora"
        )
        found += [_refusal(update, message) for update in adapter.values() if update.kind == "lokr"]
    return found


def _lora_refusals(adapter: Adapter) -> list[Problem]:
    found = []
    dora = [u for u in adapter.values() if u.kind == "dora"]
    biases = {n for n, u in adapter.items() if u.kind == "dense" and len(u.shape) == 1}
    bare = [
        name
        for name, update in adapter.items()
        if update.kind in ("low_rank", "sparse", "dora")
        and f"{name.removesuffix('.weight')}.bias" not in biases
    ]
    for name, update in adapter.items():
        if update.kind == "dense" and name not in biases:
            found.append(_refusal(update, "PEFT has no full-size delta; convert with --to-lora"))
        elif update.kind == "dense" and f"{name.removesuffix('.bias')}.weight" not in adapter:
            message = "PEFT adds to biases only of modules with factors; leave it out (--drop)"
            found.append(_refusal(update, message))
        elif update.kind == "dora" and update.rank is None:
            message = "is DoRA of an update that is not low-rank; convert with --to-lora"
            found.append(_refusal(update, message))
        elif update.kind == "dora" and update.axis and not update.embedding:
            message = "has a magnitude for each column, PEFT's DoRA one for each row; convert with "
            found.append(_refusal(update, f"{message}--to-lora"))
        elif update.kind in ("low_rank", "sparse") and dora:
            message = (
                f"is plain LoRA, {dora[0].name} is DoRA: PEFT has one setting for all; convert "
                "with --to-lora"
            )
            found.append(_refusal(update, message))
        elif name in biases and bare:
            message = (
                "PEFT adds to the biases of all modules with factors or to none, and of "
                f"{bare[0]} there is none; leave it out (--drop)"
            )
            found.append(_refusal(update, message))
        elif update.kind == "experts" and (dora or biases):
            message = "PEFT's expert weights go with neither DoRA nor lora_bias"
            found.append(_refusal(update, message))
    return found


def _rows_refusals(adapter: Adapter) -> list[Problem]:
    rows = {update.rows for update in adapter.values()}
    if len(rows) == 1:
        return []
    message = "PEFT's trainable tokens have one list of rows for all tables; this has several"
    return [_refusal(update, message) for update in adapter.values()]


def _refusal(update: LazyUpdate, message: str) -> Problem:
    return Problem("error", update.name, message)


def spool_all(
    adapter: Adapter, results: Iterable[tuple[LazyUpdate, Update | None]], spool: Spool
) -> Plan:
    """Append every update's tensors as they come."""
    plan = Plan(adapter, method_of(adapter))
    kept: dict[str, LazyTensor] = {}
    biases: dict[str, Dense] = {}
    for update, found in results:
        if isinstance(found, Replacement):
            plan.replaced.add(update.name)
            kept[update.name] = found.tensor.renamed(update.name)
        elif isinstance(found, Dense):
            biases[update.name] = found
        elif found is not None and not (update.kind == "ia3" and update.optional):
            plan.written[update.name] = _spooled(spool, adapter, update, found, plan.method)
    for name, bias in biases.items():
        plan.written[name] = _spooled_bias(spool, plan, name, bias)
    # An adapter of another format has no context; what it replaces is all that is known of it.
    plan.adapter = replace(adapter, context={**kept, **adapter.context})
    return plan


def _spooled_bias(spool: Spool, plan: Plan, name: str, bias: Dense) -> Written:
    """PEFT multiplies a bias by the scale of the factors beside it."""
    module = name.removesuffix(".bias")
    beside = plan.written[f"{module}.weight"].scale
    if beside == 0 != bias.scale:
        raise InputError(f"{name}: PEFT cannot add to it beside factors whose scale is 0")
    values = bias.values if bias.scale == beside else _folded(bias.values, bias.scale / beside)
    key = f"{PREFIX}{module}.lora_B.bias"
    return Written({key: spool.add(key, values)})


def _folded(values: torch.Tensor, factor: float) -> torch.Tensor:
    """A product in the type of the values where that holds it exactly, else in fp32 at least."""
    product = values.double() * factor
    own = product.to(values.dtype)
    if values.itemsize >= 4 or bool((own.double() == product).all()):
        return own
    return product.float()


def _spooled(
    spool: Spool, adapter: Adapter, update: LazyUpdate, found: Update, method: str
) -> Written:
    entries: dict[str, LazyTensor] = {}
    if isinstance(found, Sparse):
        entries, found = peft_sparse.spooled(spool, update.name, found), found.added
    parts, rank, scale = _parts(adapter, update, found, method)
    divisor = math.sqrt(rank) if adapter.rslora and method == "LORA" else float(rank or 1)
    tensors = {key: spool.add(key, value) for key, value in parts.items()}
    return Written(tensors, rank, scale, alpha_of(scale, divisor), entries)


def _parts(
    adapter: Adapter, update: LazyUpdate, found: Update, method: str
) -> tuple[dict[str, torch.Tensor], int, float]:
    """The tensors by key, the rank and the scale of one update."""
    module = f"{PREFIX}{update.name.removesuffix('.weight')}"
    match found:
        case LowRank() if not update.name.endswith(".weight"):
            key = _wrapper(adapter, update.name)
            return (
                {f"{key}.lora_A.weight": found.a, f"{key}.lora_B.weight": found.b},
                (found.rank),
                found.scale,
            )
        case LowRank():
            return _lora_parts(module, update, found), found.rank, found.scale
        case DoRA(added=LowRank() as added):
            parts = _lora_parts(module, update, added)
            shape = (1, -1, *(1 for _ in update.shape[2:])) if len(update.shape) > 2 else (-1,)
            parts[f"{module}.lora_magnitude_vector"] = found.magnitude.reshape(shape)
            return parts, added.rank, added.scale
        case Experts():
            key = _wrapper(adapter, update.name)
            a = found.a.reshape(-1, found.a.shape[-1])
            b = found.b.permute(1, 2, 0).reshape(found.b.shape[1], -1)
            return {f"{key}.lora_A.weight": a, f"{key}.lora_B.weight": b}, found.rank, found.scale
        case LoHa():
            parts = {
                **product_parts(f"{module}.hada_w1", f"{module}.hada_t1", found.one),
                **product_parts(f"{module}.hada_w2", f"{module}.hada_t2", found.other),
            }
            return parts, _rank(found.one), found.scale
        case LoKr():
            parts = {
                **product_parts(f"{module}.lokr_w1", "", found.one),
                **product_parts(f"{module}.lokr_w2", f"{module}.lokr_t2", found.other),
            }
            if found.other.right is None and len(update.shape) > 2:
                whole = parts[f"{module}.lokr_w2"]
                parts[f"{module}.lokr_w2"] = whole.reshape(whole.shape[0], -1, *update.shape[2:])
            settings = peft_config.Settings(Path(peft_config.FILE), adapter.settings)
            rank = int(settings.rank(update.name.removesuffix(".weight")))
            return parts, rank, found.scale
        case IA3():
            stored = update.stored[0].shape if update.stored else ()
            shape = stored if len(stored) > 1 else ((1, -1) if found.axis else (-1, 1))
            return {f"{module}.ia3_l": found.factors.reshape(shape)}, 0, 1.0
        case Rows():
            inner = "" if method == "TRAINABLE_TOKENS" else "token_adapter."
            return {f"{module}.{inner}trainable_tokens_delta": found.tensor.read()}, 0, 1.0
    raise TypeError(f"{update.name}: PEFT holds no {type(found).__name__} of this kind")


def _lora_parts(module: str, update: LazyUpdate, found: LowRank) -> dict[str, torch.Tensor]:
    if update.embedding:
        return {
            f"{module}.lora_embedding_A": found.b.T,
            f"{module}.lora_embedding_B": found.a.T,
        }
    a, b = found.a, found.b
    if len(update.shape) > 2:
        a = a.reshape(found.rank, *update.shape[1:])
        b = b.reshape(-1, found.rank, *(1 for _ in update.shape[2:]))
    return {f"{module}.lora_A.weight": a, f"{module}.lora_B.weight": b}


def _wrapper(adapter: Adapter, name: str) -> str:
    """The key of a parameter's wrapper: the first parameter of a module is wrapped innermost."""
    module, _, leaf = name.rpartition(".")
    others = [
        other.rpartition(".")[2]
        for other, update in adapter.items()
        if other.rpartition(".")[0] == module and not other.endswith((".weight", ".bias"))
        and update.kind in ("experts", "low_rank", "sparse")
    ]  # fmt: skip
    inside = sorted(others, key=usual_order)
    depth = len(inside) - 1 - inside.index(leaf)
    return f"{PREFIX}{module}{'.base_layer' * depth}"


def _rank(product: Product) -> int:
    return int(product.left.shape[1])


def alpha_of(scale: float, divisor: float) -> float:
    """The alpha that gives exactly this scale when divided again, where a double can."""
    alpha = scale * divisor
    neighbours = (alpha, math.nextafter(alpha, -math.inf), math.nextafter(alpha, math.inf))
    return next((value for value in neighbours if value / divisor == scale), alpha)
