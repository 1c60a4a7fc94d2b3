"""What MLX's factors mean: which update each pair is, from names, shapes and the config.

mlx_lm's rules, as its layers compute: delta = scale * (a @ b)^T for a linear layer, a (in, r),
b (r, out); scale * a @ b for an embedding, a (V, r), b (r, D); and for the experts of a switch
layer scale * b[e] @ a[e], a (E, r, in), b (E, out, r). `scale` is not divided by the rank. DoRA's
`m` holds the norms of the rows. Its modules are called as transformers' are, but for the experts:
`switch_mlp.gate_proj`, `.up_proj` and `.down_proj`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from loratool.adapter import LazyUpdate, replacement
from loratool.checkpoint import LazyTensor
from loratool.dtypes import is_float
from loratool.errors import Problem
from loratool.families import is_embedding
from loratool.updates import DoRA, Experts, Kind, LowRank, Update
from loratool_plugins.adapter_formats._experts import DOWN, GATE_UP, assembled
from loratool_plugins.adapter_formats._scales import unfold

DEFAULT_SCALE = 20.0  # of every mlx_lm layer
SWITCH = "switch_mlp"
_PART = re.compile(r"(?P<module>.+)\.(?P<part>lora_[ab]|m)")
_SWITCH = re.compile(rf"(?P<mlp>.+)\.{SWITCH}\.(?P<which>gate|up|down)_proj")
_EXPERTS = re.compile(rf"(?P<mlp>.+)\.experts\.({GATE_UP}|{DOWN})")
_SPARSE = ("mixtral", "phimoe", "minimax")  # MLX calls these models' MLPs block_sparse_moe

Load = Callable[[], LowRank]


@dataclass(frozen=True)
class Facts:
    """What loratool's metadata tells of single modules, by MLX's names.

    Attributes:
        ranks: before the factors were padded with zeros to the rank of all.
        folds: (factor, dtype): what was worked into b, and the type that it had before.
        scales: the scales, where they are not the config's.
        shared: experts whose gate and up projections have the same a.
        tables: modules that are embeddings.
    """

    ranks: Mapping[str, int] = field(default_factory=dict)
    folds: Mapping[str, tuple[float, str]] = field(default_factory=dict)
    scales: Mapping[str, float] = field(default_factory=dict)
    shared: frozenset[str] = frozenset()
    tables: frozenset[str] = frozenset()


def experts_of(mlp: str) -> str:
    """transformers' name of the module that holds the experts: it calls all such layers `mlp`."""
    return re.sub(r"\.block_sparse_moe$", ".mlp", mlp) + ".experts"


def switch_of(update: LazyUpdate, model_type: str) -> str | None:
    """MLX's name of the module that holds a parameter's experts; None if it is no such parameter.

    It is the one that the update was read from, if that was MLX's.
    """
    match = _EXPERTS.fullmatch(update.name)
    if match is None:
        return None
    for tensor in update.stored:
        if found := _SWITCH.fullmatch(tensor.name.rpartition(".")[0]):
            return f"{found['mlp']}.{SWITCH}"
    sparse = re.sub(r"\.mlp$", ".block_sparse_moe", match["mlp"])
    return f"{sparse if model_type in _SPARSE else match['mlp']}.{SWITCH}"


@dataclass
class Reader:
    """Turns stored tensors into updates, collecting problems.

    Attributes:
        tensors: what the file holds, by key.
        scale: the config's.
        rank: the config's, if it has one.
        dora: whether the config says that the layers are DoRA's.
        whole: whether it says that the tensors replace the model's.
        facts: what loratool's metadata tells.
    """

    tensors: Mapping[str, LazyTensor]
    scale: float
    rank: int | None
    dora: bool
    whole: bool
    facts: Facts

    def __post_init__(self) -> None:
        self.problems: list[Problem] = []
        self.replaced: dict[str, LazyTensor] = {}  # parameter -> its new value

    def updates(self) -> dict[str, LazyUpdate]:
        """Parameter -> update, in file order; experts last."""
        modules: dict[str, dict[str, LazyTensor]] = {}
        found: dict[str, LazyUpdate] = {}
        factored = {key.rpartition(".")[0] for key in self.tensors if key.endswith(".lora_a")}
        for key, tensor in self.tensors.items():
            match = None if self.whole else _PART.fullmatch(key)
            if match is None or (match["part"] == "m" and match["module"] not in factored):
                found[key] = self._replacement(key, tensor)
            else:
                modules.setdefault(match["module"], {})[match["part"]] = tensor
        switches: dict[str, dict[str, LazyUpdate]] = {}
        for module, parts in modules.items():
            update = self._update(module, parts)
            if update is None:
                continue
            if match := _SWITCH.fullmatch(module):
                switches.setdefault(match["mlp"], {})[match["which"]] = update
            else:
                found[update.name] = update
        for mlp, parts_of in switches.items():
            shared = mlp in self.facts.shared
            assembled_of, problem = assembled(experts_of(mlp), parts_of, shared)
            found |= {update.name: update for update in assembled_of}
            self.problems += [problem] if problem is not None else []
        return found

    def _complain(self, name: str, message: str, expected: str = "", found: str = "") -> None:
        self.problems.append(Problem("error", name, message, expected, found))

    def _replacement(self, name: str, tensor: LazyTensor) -> LazyUpdate:
        if not is_float(tensor.dtype):
            message = "is quantized: what replaces a tensor must be floats"
            self._complain(name, message, "a float", tensor.dtype)
        value = self.replaced[name] = tensor.renamed(name)
        return replacement(value, tensor)

    def _update(self, module: str, parts: Mapping[str, LazyTensor]) -> LazyUpdate | None:
        for part, other in (("lora_a", "lora_b"), ("lora_b", "lora_a")):
            if part not in parts:
                self._complain(f"{module}.{part}", f"missing, but {other} is there")
                return None
        for tensor in parts.values():
            if not is_float(tensor.dtype) or not tensor.numel:
                shown = f"{tensor.dtype} {tensor.shape}"
                self._complain(tensor.name, "is no factor", "floats", shown)
                return None
        a, b = parts["lora_a"], parts["lora_b"]
        if len(b.shape) == 3:
            return self._switch(module, a, b, parts.get("m"))
        if len(a.shape) != 2 or len(b.shape) != 2 or a.shape[1] != b.shape[0]:
            message = "lora_a and lora_b are no factors of one rank"
            self._complain(module, message, "(in, r) and (r, out)", f"{a.shape} and {b.shape}")
            return None
        if not self._check_rank(module, a.shape[1]):
            return None
        return self._matrix(module, a, b, parts.get("m"))

    def _check_rank(self, module: str, rank: int) -> bool:
        """Complains of another rank than the config's; whether the module's own can be had."""
        if self.rank is not None and rank != self.rank:
            message = "the config gives it another rank"
            self._complain(module, message, f"{self.rank}", f"{rank}")
        if not 0 < self.facts.ranks.get(module, rank) <= rank:
            self._complain(module, "its metadata give it a rank that it cannot have")
            return False
        return True

    def _matrix(
        self, module: str, a: LazyTensor, b: LazyTensor, magnitude: LazyTensor | None
    ) -> LazyUpdate | None:
        table = module in self.facts.tables or is_embedding(module)
        rows = a.shape[0] if table else b.shape[1]
        shape = (rows, b.shape[1] if table else a.shape[0])
        rank = self.facts.ranks.get(module, a.shape[1])
        factors = self._factors(module, a, b, rank, table)
        load: Callable[[], Update] = factors
        kind: Kind = "low_rank"
        stored = [a, b]
        if (magnitude is None) is self.dora:
            message = "the config says dora, but there is no m"
            self._complain(module, message if self.dora else "has an m, but the config says lora")
            return None
        if magnitude is not None:
            if magnitude.shape != (rows,):
                self._complain(magnitude.name, "does not fit", f"({rows},)", f"{magnitude.shape}")
                return None
            norms = magnitude
            kind, load = "dora", lambda: DoRA(factors(), norms.read())
            stored.append(magnitude)
        return LazyUpdate(
            f"{module}.weight", kind, shape, a.dtype, load,
            rank=rank, origin=a.origin, stored=tuple(stored),
            transposed=False if table else None, embedding=table,
        )  # fmt: skip

    def _factors(self, module: str, a: LazyTensor, b: LazyTensor, rank: int, table: bool) -> Load:
        scale = self.facts.scales.get(module, self.scale)
        fold = self.facts.folds.get(module)

        def load() -> LowRank:
            left, right = a.read()[:, :rank], b.read()[:rank]
            right = right if fold is None else unfold(right, *fold)
            return LowRank(right, left, scale) if table else LowRank(left.T, right.T, scale)

        return load

    def _switch(
        self, module: str, a: LazyTensor, b: LazyTensor, magnitude: LazyTensor | None
    ) -> LazyUpdate | None:
        """One projection of all experts; older files have a as (E r, in)."""
        number, rows, rank = b.shape
        if a.shape[0] not in (number, number * rank) or a.numel != number * rank * a.shape[-1]:
            message = "lora_a and lora_b are no factors of the experts' weights"
            self._complain(module, message, "(E, r, in) and (E, out, r)", f"{a.shape}, {b.shape}")
            return None
        if magnitude is not None or self.dora:
            self._complain(module, "DoRA of experts does not exist in MLX")
            return None
        if _SWITCH.fullmatch(module) is None:
            self._complain(module, f"experts are understood as {SWITCH}.gate/up/down_proj only")
            return None
        if not self._check_rank(module, rank):
            return None
        kept = self.facts.ranks.get(module, rank)
        scale = self.facts.scales.get(module, self.scale)
        fold = self.facts.folds.get(module)
        width = a.shape[-1]

        def load() -> Experts:
            left = a.read().reshape(number, rank, width)[:, :kept]
            right = b.read()[:, :, :kept]
            return Experts(left, right if fold is None else unfold(right, *fold), scale)

        return LazyUpdate(
            module, "experts", (number, rows, width), a.dtype, load,
            rank=kept, origin=a.origin, stored=(a, b), transposed=False,
        )  # fmt: skip


def facts_of(ours: Mapping[str, Any]) -> Facts:
    """The metadata; TypeError or ValueError if it is not what loratool writes."""
    found = Facts(
        {str(n): int(r) for n, r in dict(ours.get("ranks", {})).items()},
        {str(n): (float(f), str(t)) for n, (f, t) in dict(ours.get("folds", {})).items()},
        {str(n): float(s) for n, s in dict(ours.get("scales", {})).items()},
        frozenset(map(str, ours.get("shared", ()))),
        frozenset(map(str, ours.get("tables", ()))),
    )
    if any(f == 0 or not math.isfinite(f) or not is_float(t) for f, t in found.folds.values()):
        raise ValueError("a factor that cannot be")
    return found
