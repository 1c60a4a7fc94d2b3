"""From the keys of PEFT's weight file to updates, collecting problems."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from loratool.adapter import LazyUpdate, replacement
from loratool.checkpoint import LazyTensor
from loratool.dtypes import is_float
from loratool.errors import Problem
from loratool.families import is_embedding
from loratool.updates import (
    IA3,
    Dense,
    Kind,
    LoHa,
    LoKr,
    LowRank,
    Rows,
    Update,
)
from loratool_plugins.adapter_formats._peft_dialects import (
    PREFIX,
    Order,
    expert_order,
)
from loratool_plugins.adapter_formats._products import product
from loratool_plugins.adapter_formats.loralib_layout import placed
from loratool_plugins.adapter_formats.peft_config import Settings, usual_order
from loratool_plugins.adapter_formats.peft_values import (
    dora_loader,
    embedding_loader,
    expert_loader,
    factor_loader,
    kernel_of,
    matrix_size,
    whole_matrix,
)

if TYPE_CHECKING:
    pass

# What PEFT's layers are made of: (key after the module's name, part).
_PART = re.compile(
    r"(?P<module>.+?)\.(?P<part>lora_[AB]\.weight|lora_B\.bias|lora_magnitude_vector(\.weight)?"
    r"|lora_embedding_[AB]|hada_(w[12]_[ab]|t[12])|lokr_(w[12](_[ab])?|t2)|ia3_l"
    r"|(token_adapter\.)?trainable_tokens_delta)"
)
_TOKENS = re.compile(r"(.+\.)?token_adapter\.(base_layer|original_module)\..+")

# Method -> how its keys begin.
_KEYS_OF = {
    "LORA": ("lora", "trainable"),
    "LOHA": ("hada",),
    "LOKR": ("lokr",),
    "IA3": ("ia3",),
    "TRAINABLE_TOKENS": ("trainable",),
}

Parts = dict[str, LazyTensor]

_DIMENSIONS = (2, 3, 4, 5)  # of the factors of matrices, and of convolutions


@dataclass
class Reader:
    """Turns the stored tensors into updates.

    Attributes:
        settings: the adapter's configuration.
        tensors: the file's, by key.
    """

    settings: Settings
    tensors: Mapping[str, LazyTensor]

    def __post_init__(self) -> None:
        self.problems: list[Problem] = []
        self.notes: list[str] = []
        self.replaced: dict[str, LazyTensor] = {}  # parameter -> its new value

    def updates(self) -> dict[str, LazyUpdate]:
        """Parameter name -> update, in file order."""
        modules: dict[str, Parts] = {}
        found: dict[str, LazyUpdate] = {}
        for key, tensor in self.tensors.items():
            name = key.removeprefix(PREFIX)
            if name == key:
                self._complain(key, f"unexpected key: PEFT's keys start with {PREFIX!r}")
            elif match := _PART.fullmatch(name):
                part = match["part"].removeprefix("token_adapter.")
                if part.partition("_")[0] in _KEYS_OF[self.settings.method]:
                    modules.setdefault(match["module"], {})[part] = tensor
                else:
                    self._complain(key, f"unexpected key: peft_type is {self.settings.method}")
            elif _TOKENS.fullmatch(name):
                continue  # the table below trained rows, which is the base's
            elif (parameter := self._kept_whole(name)) is not None:
                found[parameter] = self._replacement(parameter, tensor)
            else:
                self._complain(key, "unexpected key: neither a factor nor in modules_to_save")
        for module, parts in modules.items():
            for update in self._of_module(module, parts):
                beneath = self.replaced.pop(update.name, None) if not update.is_whole else None
                if update.is_whole and update.name in self.replaced:
                    self.replaced.pop(update.name)
                found[update.name] = replace(update, beneath=beneath)
        return found

    def _complain(self, name: str, message: str, expected: str = "", found: str = "") -> None:
        self.problems.append(Problem("error", name, message, expected, found))

    def _kept_whole(self, name: str) -> str | None:
        """The parameter that a key outside the factors replaces, if PEFT would load it."""
        module, _, leaf = name.rpartition(".")
        if ".lora_" in f".{name}":
            return None
        if module.endswith(".base_layer"):
            return f"{module.removesuffix('.base_layer')}.{leaf}"
        saved = self.settings["modules_to_save"] or ()
        parents = [module[: match.start()] for match in re.finditer(r"\.", module)] + [module]
        if any(parent.endswith(str(end)) for parent in parents for end in saved):
            return name
        is_bias = leaf == "bias" and self.settings["bias"] in ("all", "lora_only")
        is_table = leaf == "weight" and (is_embedding(module) or module.endswith("lm_head"))
        return name if is_bias or is_table else None

    def _replacement(self, name: str, tensor: LazyTensor) -> LazyUpdate:
        value = self.replaced[name] = tensor.renamed(name)
        return replacement(value, tensor)

    def _of_module(self, module: str, parts: Parts) -> list[LazyUpdate]:
        """The updates that one module's tensors make; none, after complaints, if they do not."""
        for tensor in parts.values():
            if not is_float(tensor.dtype):
                self._complain(tensor.name, "factors must be floats", "a float", tensor.dtype)
        if not all(tensor.numel for tensor in parts.values()):
            self._complain(module, "its factors are empty")
            return []
        if set(parts) == {"trainable_tokens_delta"}:
            return self._tokens(module, parts["trainable_tokens_delta"])
        if "trainable_tokens_delta" in parts:
            message = "has trained rows and an update of all rows: loratool cannot merge both"
            self._complain(module, message)
            return []
        match self.settings.method:
            case "LOHA":
                return self._loha(module, parts)
            case "LOKR":
                return self._lokr(module, parts)
            case "IA3":
                return self._ia3(module, parts["ia3_l"])
        return self._lora(module, parts)

    # LoRA

    def _lora(self, module: str, parts: Parts) -> list[LazyUpdate]:
        embedding = any(part.startswith("lora_embedding") for part in parts)
        keys = (
            ("lora_embedding_A", "lora_embedding_B")
            if embedding
            else ("lora_A.weight", "lora_B.weight")
        )
        if not self._has_all(module, parts, keys):
            return []
        a, b = (parts[key] for key in keys)
        if (slots := self.settings["enable_lora"]) and not embedding:
            return self._merged(module, a, b, slots)
        if len(a.shape) != len(b.shape) or len(a.shape) not in ((2,) if embedding else _DIMENSIONS):
            self._complain(module, "lora_A and lora_B are no factors", "", f"{a.shape}, {b.shape}")
            return []
        if self.settings["target_parameters"] and not embedding and self._parameter(module):
            return self._experts(module, a, b)
        rank = a.shape[0]
        if not self._check_rank(module, a, b, rank):
            return []
        scale = self.settings.scale(module, self._complain)
        if b.shape[2:] != (1,) * (len(b.shape) - 2):
            self._complain(module, "lora_B of a convolution is 1x1", "1s", f"{b.shape}")
            return []
        shape = (a.shape[1], b.shape[0]) if embedding else (b.shape[0], *a.shape[1:])
        factors = embedding_loader(a, b, scale) if embedding else factor_loader(a, b, scale)
        load: Callable[[], Update] = factors
        kind: Kind = "low_rank"
        stored = [a, b]
        magnitude = parts.get("lora_magnitude_vector.weight", parts.get("lora_magnitude_vector"))
        if magnitude is not None and not self.settings["use_dora"]:
            self._complain(magnitude.name, "unexpected key: the config does not say use_dora")
        elif magnitude is not None:
            axis = 1 if embedding else 0
            if magnitude.numel != shape[axis]:
                self._complain(
                    module, "its magnitudes do not fit", f"{shape[axis]}", f"{magnitude.numel}"
                )
                return []
            kind, load = "dora", dora_loader(factors, magnitude, axis)
            stored.append(magnitude)
        elif self.settings["use_dora"]:
            self._complain(module, "the config says use_dora, but there is no magnitude vector")
        if self.settings["lora_bias"] and "lora_B.bias" not in parts:
            self._complain(module, "the config says lora_bias, but there is no lora_B.bias")
        update = self._update(f"{module}.weight", kind, shape, a, load, stored, rank)
        if self.settings["fan_in_fan_out"] and not embedding:
            update = replace(update, transposed=True)
        elif embedding:
            update = replace(update, transposed=False, embedding=True)
        return [update, *self._lora_bias(module, parts.get("lora_B.bias"), shape[0], scale)]

    def _merged(self, module: str, a: LazyTensor, b: LazyTensor, slots: object) -> list[LazyUpdate]:
        """An old MergedLinear: one product for each enabled part of a fused weight."""
        if not isinstance(slots, list) or not any(slots):
            self._complain(module, "enable_lora is no list that enables a part", "", f"{slots}")
            return []
        places = [number for number, enabled in enumerate(slots) if enabled]
        rank, groups = b.shape[1], len(places)
        height, rest = divmod(b.shape[0], groups)
        if rest or a.shape[0] != groups * rank or rank != self.settings.rank(module):
            message = "its factors are not those of the parts that enable_lora names"
            expected = f"lora_A of {groups} * {self.settings.rank(module)} rows"
            self._complain(module, message, expected, f"{a.shape}, {b.shape}")
            return []
        scale = self.settings.scale(module, self._complain)
        rows = height * len(slots)

        def load() -> LowRank:
            whole = placed(b.read().reshape(-1, rank), places, rows)
            return LowRank(a.read().reshape(groups * rank, -1), whole, scale)

        shape = (rows, a.shape[1])
        update = self._update(f"{module}.weight", "low_rank", shape, a, load, [a, b], groups * rank)
        known = True if self.settings["fan_in_fan_out"] else None
        return [replace(update, transposed=known)]

    def _check_rank(self, module: str, a: LazyTensor, b: LazyTensor, rank: int) -> bool:
        wanted = self.settings.rank(module)
        if rank != b.shape[1]:
            message = "lora_A and lora_B have different ranks"
            if len(b.shape) > 2 and b.shape[1] and rank % b.shape[1] == 0:
                message = (
                    "lora_B is grouped, lora_A is not: every group of the convolution would have "
                    "to see all inputs, which its weight does not; PEFT cannot merge it either"
                )
            self._complain(module, message, f"lora_B ({b.shape[0]}, {rank})", f"{b.shape}")
            return False
        if rank != wanted:
            self._complain(module, "the config gives it another rank", f"{wanted}", f"{rank}")
        return True

    def _lora_bias(
        self, module: str, bias: LazyTensor | None, rows: int, scale: float
    ) -> list[LazyUpdate]:
        if bias is None:
            return []
        if bias.shape != (rows,):
            self._complain(bias.name, "does not fit lora_B", f"({rows},)", f"{bias.shape}")
            return []

        def load() -> Update:
            return Dense(bias.read(), scale)

        return [self._update(f"{module}.bias", "dense", bias.shape, bias, load, [bias])]

    # Experts

    def _parameter(self, module: str) -> str | None:
        """The parameter behind a wrapper of `target_parameters`; None for an ordinary module.

        PEFT wraps a module once for each parameter: the innermost wrapper, with most `.base_layer`
        in its name, has the parameter that comes first in the module. Which that is, the file does
        not say; binding looks at the shapes.
        """
        bare = module.replace(".base_layer", "")
        inside = [
            str(target).rpartition(".")[2]
            for target in self.settings["target_parameters"] or ()
            if f".{bare}".endswith("." + str(target).rpartition(".")[0]) or "." not in str(target)
        ]
        names = sorted(dict.fromkeys(inside), key=usual_order)
        depth = module.count(".base_layer")
        if not names or depth >= len(names):
            return None
        return f"{bare}.{names[len(names) - 1 - depth]}"

    def _experts(self, module: str, a: LazyTensor, b: LazyTensor) -> list[LazyUpdate]:
        name = self._parameter(module) or module
        rank = self.settings.rank(name)
        whole = isinstance(rank, int) and rank > 0 and len(a.shape) == 2
        if not whole or a.shape[0] % rank or b.shape[1] != a.shape[0]:
            self._complain(
                name, "its factors are no multiple of the rank", f"{rank} * experts", f"{a.shape}"
            )
            return []
        number = a.shape[0] // rank
        scale = self.settings.scale(name, self._complain)
        if number == 1:
            shape: tuple[int, ...] = (b.shape[0], a.shape[1])
            factors = factor_loader(a, b, scale)
            return [self._update(name, "low_rank", shape, a, factors, [a, b], rank)]
        shape = (number, b.shape[0], a.shape[1])
        load = expert_loader(a, b, number, scale, self._expert_order())
        update = self._update(name, "experts", shape, a, load, [a, b], rank)
        return [replace(update, transposed=self._experts_transposed())]

    def _expert_order(self) -> Order:
        """Whether lora_B's columns are in unsloth's former order."""
        found = expert_order(self.settings.values)
        if found.fault:
            self._complain(str(self.settings.path), found.fault)
        if not found.told and found.order != "rank_major" and not self.notes:
            self.notes.append(
                f"{self.settings.path}: unsloth wrote it and says no lora_B_layout: each expert's "
                "columns of lora_B are taken to lie side by side, as it wrote them then"
            )
        return found.order

    def _experts_transposed(self) -> bool | None:
        """What PEFT took the middle dimension of an expert weight for: up to 0.18, the inputs."""
        version = re.match(r"(\d+)\.(\d+)", str(self.settings["peft_version"] or "0.18"))
        return (version is not None and (int(version[1]), int(version[2])) < (0, 19)) or None

    # LoHa, LoKr, IA3, trained rows

    def _loha(self, module: str, parts: Parts) -> list[LazyUpdate]:
        names = [f"hada_{w}_{side}" for w in ("w1", "w2") for side in "ab"]
        if not self._has_all(module, parts, names) or not self._fit(module, parts, "hada"):
            return []
        tucker = "hada_t1" in parts
        left, right = parts["hada_w1_a"], parts["hada_w1_b"]
        kernel = kernel_of(parts["hada_t1"]) if tucker else right.shape[2:]
        out = left.shape[1] if tucker else left.shape[0]
        shape = (out, right.shape[1], *kernel)
        scale = self.settings.scale(module, self._complain)

        def load() -> Update:
            return LoHa(product(parts, "hada", "w1"), product(parts, "hada", "w2"), scale)

        stored = list(parts.values())
        return [self._update(f"{module}.weight", "loha", shape, left, load, stored)]

    def _lokr(self, module: str, parts: Parts) -> list[LazyUpdate]:
        for w in ("w1", "w2"):
            halves = [f"lokr_{w}_a", f"lokr_{w}_b"]
            if f"lokr_{w}" not in parts and not self._has_all(module, parts, halves):
                return []
        if not self._fit(module, parts, "lokr"):
            return []
        shapes = []
        for w in ("w1", "w2"):
            if f"lokr_{w}" in parts:
                shapes.append(parts[f"lokr_{w}"].shape)
                continue
            left, right = parts[f"lokr_{w}_a"], parts[f"lokr_{w}_b"]
            if w == "w2" and "lokr_t2" in parts:
                shapes.append((left.shape[1], right.shape[1], *kernel_of(parts["lokr_t2"])))
            else:
                shapes.append((left.shape[0], *right.shape[1:]))
        one, other = shapes
        shape = (one[0] * other[0], one[1] * other[1], *other[2:])
        scale = self.settings.scale(module, self._complain)

        def load() -> Update:
            return LoKr(product(parts, "lokr", "w1"), product(parts, "lokr", "w2"), scale)

        stored = list(parts.values())
        if len(other) == 3 and "lokr_w2" in parts:
            return [self._lokr_of_line(module, shape, parts, scale)]
        return [self._update(f"{module}.weight", "lokr", shape, stored[0], load, stored)]

    def _lokr_of_line(
        self, module: str, shape: tuple[int, ...], parts: Parts, scale: float
    ) -> LazyUpdate:
        """PEFT's update of a Conv1d with a whole w2, which is no Kronecker product of matrices.

        PEFT multiplies w1 along the last two dimensions of w2 (b, d, k) and reshapes: that is what
        the adapter was trained with, so that is what has to be merged.
        """

        def load() -> Update:
            import torch

            other = parts["lokr_w2"].read().double()
            one = whole_matrix(product(parts, "lokr", "w1"))
            return Dense(torch.kron(one, other).reshape(shape), scale)

        stored = list(parts.values())
        return self._update(f"{module}.weight", "dense", shape, stored[0], load, stored)

    def _ia3(self, module: str, factors: LazyTensor) -> list[LazyUpdate]:
        number = factors.numel
        on_inputs = self.settings.matches("feedforward_modules", module)
        if math.prod(factors.shape) != max(factors.shape, default=0):
            self._complain(factors.name, "is no vector", "one long dimension", f"{factors.shape}")
            return []
        axis = int(on_inputs)
        shape = (0, number) if on_inputs else (number, 0)

        def load() -> Update:
            return IA3(factors.read().reshape(-1), axis)

        weight = self._update(f"{module}.weight", "ia3", shape, factors, load, [factors])
        if self.settings["fan_in_fan_out"]:
            weight = replace(weight, transposed=True)
        if on_inputs:
            return [weight]
        bias = self._update(f"{module}.bias", "ia3", (number,), factors, load, [factors])
        return [weight, replace(bias, optional=True)]

    def _tokens(self, module: str, rows: LazyTensor) -> list[LazyUpdate]:
        indices = self.settings.indices(module)
        number = rows.shape[0] if len(rows.shape) == 2 else -1
        if len(indices) != number or len(set(indices)) != len(indices):
            self._complain(
                rows.name, "the config does not say which rows these are, each once",
                "a table with as many rows", f"{rows.shape}, {len(indices)} indices",
            )  # fmt: skip
            return []

        def load() -> Update:
            return Rows(indices, rows)

        update = self._update(f"{module}.weight", "rows", rows.shape, rows, load, [rows])
        return [replace(update, rows=indices)]

    # What they share

    def _fit(self, module: str, parts: Parts, family: str) -> bool:
        """Whether the tensors of both matrices go together; complains of those that do not."""
        sizes = []
        for which in ("w1", "w2"):
            size = matrix_size(parts, family, which)
            if size is None:
                shapes = [f"{t.shape}" for key, t in parts.items() if which in key or "_t" in key]
                message = f"the tensors of {family}_{which} do not go together"
                self._complain(module, message, "matrices", ", ".join(shapes))
                return False
            sizes.append(size)
        if family == "hada" and sizes[0] != sizes[1]:
            message = "its two matrices have different shapes"
            self._complain(module, message, f"{sizes[0]}", f"{sizes[1]}")
            return False
        return True

    def _has_all(self, module: str, parts: Parts, names: tuple[str, ...] | list[str]) -> bool:
        missing = [name for name in names if name not in parts]
        for name in missing:
            there = next(iter(parts)).removesuffix(".weight")
            self._complain(f"{PREFIX}{module}.{name}", f"missing, but {there} is there")
        return not missing

    def _update(
        self,
        name: str,
        kind: Kind,
        shape: tuple[int, ...],
        first: LazyTensor,
        load: Callable[[], Update | None],
        stored: list[LazyTensor],
        rank: int | None = None,
    ) -> LazyUpdate:
        return LazyUpdate(
            name,
            kind,
            shape,
            first.dtype,
            load,
            rank=rank,
            origin=first.origin,
            stored=tuple(stored),
        )
