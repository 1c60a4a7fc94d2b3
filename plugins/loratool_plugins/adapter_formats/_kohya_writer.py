"""From updates to files in kohya's naming."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from loratool.adapter import Adapter, LazyUpdate
from loratool.checkpoint import LazyTensor
from loratool.diffusion.adapter_keys import canonical_module
from loratool.diffusion.kinds import is_table
from loratool.diffusion.kohya import spelled_alone
from loratool.dtypes import dtype_name
from loratool.errors import Problem
from loratool.updates import IA3, KIND_NAMES, Dense, DoRA, LoHa, LoKr, LowRank, Update, tensors_of
from loratool.writer import Spool, write_safetensors
from loratool_plugins.adapter_formats import _ours
from loratool_plugins.adapter_formats._fusing import Fold, Row, fused
from loratool_plugins.adapter_formats._kohya_reader import KEPT
from loratool_plugins.adapter_formats._products import product_parts
from loratool_plugins.adapter_formats._scales import TORCH_TYPES, alpha_of, fold, require_finite
from loratool_plugins.executors.serial import Serial

if TYPE_CHECKING:
    import torch

# What can be put together with updates of other modules.
_FUSABLE = ("low_rank", "dora", "dense")


@dataclass(frozen=True)
class Names:
    """How the modules of an adapter are called in kohya's naming.

    Attributes:
        rows: name -> the modules' rows that its rows are, in order.
        of: module -> name.
        problems: modules that cannot be named.
    """

    rows: Mapping[str, tuple[Row, ...]]
    of: Mapping[str, str]
    problems: tuple[Problem, ...] = ()

    def parts(self, name: str) -> tuple[str, ...]:
        """The modules whose rows a name stands for."""
        return tuple(dict.fromkeys(module for module, _, _ in self.rows[name]))


def names_of(adapter: Adapter) -> Names:
    """What the modules of an adapter are called, by headers only."""
    heights = {_module(name): update.shape[0] for name, update in adapter.items()}
    if adapter.naming:
        rows = {module: ((module, 0, height),) for module, height in heights.items()}
        return Names(rows, {module: module for module in heights})
    if adapter.layout:
        return _by_layout(adapter, heights)
    found = {module: canonical_module(module) for module in heights}
    problems = [
        Problem("error", module, "is no name of a diffusion model's; if it is of one, give --base")
        for module, name in found.items()
        if name is None
    ]
    known = {module: name for module, name in found.items() if name is not None}
    spelled = spelled_alone(known.values())
    if isinstance(spelled, str):
        first = next(iter(known))
        return Names({}, {}, (*problems, Problem("error", first, f"{spelled}: give --base")))
    of = {module: spelled[name] for module, name in known.items()}
    problems += _homonyms(of)
    return Names({of[m]: ((m, 0, heights[m]),) for m in known}, of, tuple(problems))


def _by_layout(adapter: Adapter, modules: Collection[str]) -> Names:
    of = {module: name for name, rows in adapter.layout.items() for module, _, _ in rows}
    problems = [
        Problem("error", module, "kohya's format has no name for this module")
        for module in modules
        if module not in of
    ]
    of = {module: of[module] for module in modules if module in of}
    used = set(of.values())
    rows = {name: rows for name, rows in adapter.layout.items() if name in used}
    return Names(rows, of, tuple(problems))


def _homonyms(of: Mapping[str, str]) -> Iterator[Problem]:
    owners: dict[str, str] = {}
    for module, name in of.items():
        if other := owners.get(name):
            yield Problem(
                "error", module, f"has the same name in kohya's format as {other}: {name}"
            )
        owners[name] = module


def refusals(adapter: Adapter) -> Iterator[Problem]:
    """What kohya's naming, and LyCORIS's forms of updates, cannot say."""
    for name, update in adapter.items():
        if name.rpartition(".")[2] not in ("weight", "bias"):
            yield _refused(update, "only weights and biases of modules have names there")
        elif update.embedding or is_table(_module(name)):
            yield _refused(update, "updates of embeddings' tables have no form there")
        elif update.kind == "ia3" and len(update.shape) == 1:
            yield _refused(update, "LyCORIS's IA3 scales weights and no biases")
    names = names_of(adapter)
    yield from names.problems
    for name in names.rows:
        yield from _fusing_problems(adapter, names, name)


def _fusing_problems(adapter: Adapter, names: Names, name: str) -> Iterator[Problem]:
    """Complaints about updates of what is one module in kohya's naming."""
    modules = names.parts(name)
    if len(names.rows[name]) == 1:
        return
    for leaf in ("weight", "bias"):
        found = [adapter[f"{m}.{leaf}"] for m in modules if f"{m}.{leaf}" in adapter]
        kinds = {update.kind for update in found}
        for update in found:
            if update.kind not in _FUSABLE:
                what = KIND_NAMES[update.kind]
                yield _refused(update, f"is one of the parts of {name}, and a {what} is not put "
                               "together with others; convert with --to-lora")  # fmt: skip
            elif len(kinds) > 1:
                yield _refused(update, f"is one of the parts of {name}, which have updates of "
                               "several kinds; convert with --to-lora")  # fmt: skip
            elif update.kind == "dora" and (len(found) < len(modules) or _many(update, modules)):
                yield _refused(update, f"is one of the parts of {name}, whose magnitudes have to "
                               "be known for all; convert with --to-lora")  # fmt: skip


def _many(update: LazyUpdate, modules: Collection[str]) -> bool:
    """Whether magnitudes of columns would have to be put together."""
    return bool(update.axis) and len(modules) > 1


def _refused(update: LazyUpdate, message: str) -> Problem:
    return Problem("error", update.name, message)


def _module(name: str) -> str:
    return name.rpartition(".")[0]


def write(
    adapter: Adapter, results: Iterable[tuple[LazyUpdate, Update | None]], file: Path
) -> tuple[str, ...]:
    """Write one file; what should be known of it."""
    with Spool(file.parent) as spool:
        writer = Writer(adapter, spool)
        writer.add(results)
        return writer.write(file)


@dataclass
class Writer:
    """Collects the tensors of a file.

    Attributes:
        adapter: what is written.
        spool: where tensors wait.
        tensors: key -> spooled tensor.
        parts: parameter in kohya's naming -> the parameters that it is made of -> their columns.
        folds: parameter -> what was worked into its values (`_fusing.Fused`).
        rounded: updates whose scale had to be rounded.
    """

    adapter: Adapter
    spool: Spool
    tensors: dict[str, LazyTensor] = field(default_factory=dict)
    parts: dict[str, dict[str, tuple[int, int]]] = field(default_factory=dict)
    folds: dict[str, Fold] = field(default_factory=dict)
    rounded: list[str] = field(default_factory=list)

    @cached_property
    def names(self) -> Names:
        """What modules are called."""
        return names_of(self.adapter)

    def add(self, results: Iterable[tuple[LazyUpdate, Update | None]]) -> None:
        """Spool what is computed; parts of one module wait for each other."""
        waiting: dict[str, dict[str, Update | None]] = {}
        for update, found in results:
            module, _, leaf = update.name.rpartition(".")
            name = self.names.of[module]
            if len(self.names.rows[name]) == 1:
                if found is not None:
                    self._write(update.name, f"{name}.{leaf}", found, update)
                continue
            ready = waiting.setdefault(f"{name}.{leaf}", {})
            ready[module] = found
            wanted = {m for m in self.names.parts(name) if f"{m}.{leaf}" in self.adapter}
            if wanted == ready.keys():
                self._write_fused(f"{name}.{leaf}", waiting.pop(f"{name}.{leaf}"))

    def _write_fused(self, name: str, parts: Mapping[str, Update | None]) -> None:
        module, _, leaf = name.rpartition(".")
        present = {
            part: found
            for part in self.names.parts(module)
            if isinstance(found := parts.get(part), LowRank | Dense | DoRA)
        }
        if not present:
            return
        together = fused(present, self.names.rows[module])
        self.parts[name] = {f"{part}.{leaf}": c for part, c in together.columns.items()}
        self.folds |= {f"{part}.{leaf}": fold for part, fold in together.folds.items()}
        if not together.exact:
            self.rounded.append(name)
        self._write(name, name, together.update, self.adapter[f"{next(iter(present))}.{leaf}"])

    def _write(self, own: str, name: str, found: Update, update: LazyUpdate) -> None:
        """Spool one update's tensors.

        Args:
            own: the parameter, as `folds` calls it.
            name: in kohya's naming.
            found: its update.
            update: tells the kernel of a convolution.
        """
        module, _, leaf = name.rpartition(".")
        if isinstance(found, LowRank | Dense | LoHa | LoKr | DoRA | IA3):
            require_finite(own, *(tensor for _, tensor in tensors_of(found)))
        for key, tensor in self._tensors(own, leaf, found, update).items():
            self.tensors[f"{module}.{key}"] = self.spool.add(f"{module}.{key}", tensor)

    def _tensors(
        self, own: str, leaf: str, found: Update, update: LazyUpdate
    ) -> dict[str, torch.Tensor]:
        kernel = update.shape[2:]
        match found:
            case LowRank():
                return self._low_rank(own, found, kernel)
            case DoRA():
                parts = self._tensors(own, leaf, found.added, update)
                return {**parts, "dora_scale": _spread(found, update)}
            case Dense():
                key = {"weight": "diff", "bias": "diff_b"}[leaf]
                if self._is_norm(own):
                    key = {"weight": "w_norm", "bias": "b_norm"}[leaf]
                values = self._folded(own, found.values, found.scale)
                return {key: values.reshape(-1, *update.shape[1:])}
            case LoHa():
                rank = found.one.left.shape[1]
                return {
                    **product_parts("hada_w1", "hada_t1", found.one),
                    **product_parts("hada_w2", "hada_t2", found.other),
                    "alpha": self._alpha(own, found.scale, rank),
                }
            case LoKr():
                return self._lokr(own, found, kernel)
            case IA3():
                return self._ia3(found, update)
        raise TypeError(f"{own}: kohya's naming has no {type(found).__name__}")

    def _low_rank(
        self, own: str, found: LowRank, kernel: tuple[int, ...]
    ) -> dict[str, torch.Tensor]:
        import torch

        a, b = found.a, found.b
        scale = found.scale
        if scale == 0:  # LyCORIS takes an alpha of 0 for the rank
            b, scale = torch.zeros_like(b), 1.0
        if kernel:
            a = a.reshape(len(a), -1, *kernel)
            b = b.reshape(*b.shape, *(1 for _ in kernel))
        alpha = self._alpha(own, scale, found.rank)
        return {"lora_down.weight": a, "lora_up.weight": b, "alpha": alpha}

    def _lokr(self, own: str, found: LoKr, kernel: tuple[int, ...]) -> dict[str, torch.Tensor]:
        one, other = found.one, found.other
        ranks = [len(product.right) for product in (one, other) if product.right is not None]
        scale = found.scale
        if not ranks:
            one, scale = replace(one, left=self._folded(own, one.left, scale)), 1.0
        parts = {
            **product_parts("lokr_w1", "", one),
            **product_parts("lokr_w2", "lokr_t2", other),
            "alpha": self._alpha(own, scale, ranks[0] if ranks else 1),
        }
        if other.right is None and kernel:
            parts["lokr_w2"] = parts["lokr_w2"].reshape(len(other.left), -1, *kernel)
        return parts

    def _ia3(self, found: IA3, update: LazyUpdate) -> dict[str, torch.Tensor]:
        import torch

        stored = update.stored[0].shape if update.stored else ()
        shape = (1, -1, *(1 for _ in stored[2:])) if len(stored) > 2 else (-1,)
        values = found.factors.double() - 1
        kind = torch.float32 if torch.equal(values.float().double(), values) else torch.float64
        return {"weight": values.to(kind).reshape(shape), "on_input": torch.tensor(found.axis)}

    def _alpha(self, own: str, scale: float, rank: int) -> torch.Tensor:
        """The number that gives the scale again when it is divided by the rank."""
        import torch

        alpha = alpha_of(scale, rank)
        if alpha / rank != scale:
            self.rounded.append(own)
        narrow = torch.tensor(alpha, dtype=torch.float32)
        return narrow if float(narrow) == alpha else torch.tensor(alpha, dtype=torch.float64)

    def _folded(self, own: str, values: torch.Tensor, scale: float) -> torch.Tensor:
        """Values with a scale worked in that their form has no place for."""
        found = fold(values, scale, TORCH_TYPES)
        if scale not in (0, 1):
            kind = dtype_name(values.dtype)
            self.folds[own] = Fold(scale, scale, kind, kind)
        if not found.exact:
            self.rounded.append(own)
        return found.values

    def _is_norm(self, own: str) -> bool:
        """Whether a parameter is a normalisation's: its weight is no matrix, or so it is called."""
        module = _module(own)
        weight = self.adapter.get(f"{module}.weight")
        if weight is not None:
            return weight.kind == "dense" and len(weight.shape) == 1
        return "norm" in module.rpartition(".")[2].rpartition("_")[2]

    def write(self, file: Path) -> tuple[str, ...]:
        """Write the file, if there is anything to write; what should be known of it."""
        if not self.tensors:
            return ()
        settings = self.adapter.settings
        said = {k: v for k, v in settings.items() if isinstance(v, str) and KEPT.fullmatch(k)}
        rest = {key: value for key, value in settings.items() if key not in said}
        layout = {} if self.adapter.naming else self.names.rows
        text = _ours.text_of(
            replace(self.adapter, settings=rest, layout=layout),
            ("naming",),
            **({"parts": self.parts} if self.parts else {}),
            **({"folds": self.folds} if self.folds else {}),
        )
        metadata = {"format": "pt", **said, _ours.KEY: text}
        write_safetensors(file, self.tensors, metadata, Serial())
        return tuple(self._notes())

    def _notes(self) -> Iterator[str]:
        if self.rounded:
            count, first = len(self.rounded), self.rounded[0]
            yield f"{count} scales are no short numbers ({first}, ...): rounded to fp64"


def _spread(found: DoRA, update: LazyUpdate) -> torch.Tensor:
    """Magnitudes in the shape of a norm of the weight along its other dimensions."""
    ones = [1] * len(update.shape)
    if update.stored and update.stored[-1].numel == found.magnitude.numel():
        ones = [1] * len(update.stored[-1].shape)  # it may know the kernel, and factors not
    ones[found.axis] = -1
    return found.magnitude.reshape(ones)
