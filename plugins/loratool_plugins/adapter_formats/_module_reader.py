"""From the stored tensors of one module to its updates, as LyCORIS and its relatives have them.

Sources: the modules of lycoris-lora 4.1 (LoCon, LoHa, LoKr, full, norms, (IA)^3), whose forward
passes say what an adapter was trained as.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from loratool.adapter import LazyUpdate
from loratool.checkpoint import LazyTensor
from loratool.dtypes import is_float
from loratool.errors import InputError, Problem
from loratool.updates import IA3, Dense, DoRA, Kind, LoHa, LoKr, LowRank, Product, Update
from loratool_plugins.adapter_formats._products import flat, product

if TYPE_CHECKING:
    from loratool.updates import Linear

Parts = Mapping[str, LazyTensor]
Shape = tuple[int, ...]
Scale = Callable[[], float]  # reads a number from the file, perhaps


@dataclass(frozen=True)
class Module:
    """What a file holds for one module.

    Attributes:
        name: of the module, as updates are named.
        key: what its keys begin with, for messages.
        parts: its tensors by the rest of their keys: "down", "up", "mid", "bias" of low-rank
            updates, "dora_scale", and LyCORIS's names as they are.
        scale: what a delta of a rank is multiplied by; of one without factors, for None.
    """

    name: str
    key: str
    parts: Parts
    scale: Callable[[int | None], Scale]


@dataclass
class ModuleReader:
    """Makes updates of modules, collecting problems.

    Attributes:
        problems: everything that does not fit together.
        rows_only: whether magnitudes are always those of rows, as PEFT's are.
    """

    problems: list[Problem] = field(default_factory=list)
    rows_only: bool = False

    def updates(self, module: Module) -> list[LazyUpdate]:
        """The updates that a module's tensors make; none, after complaints, if they do not."""
        parts = module.parts
        for tensor in parts.values():
            if not is_float(tensor.dtype) and not tensor.name.endswith((".alpha", ".on_input")):
                self.complain(tensor.name, "must hold floats", "a float dtype", tensor.dtype)
                return []
        found: list[LazyUpdate] = []
        algorithms = [
            (any(part in parts for part in ("down", "up", "mid")), self._lora),
            (_begins("hada_", parts), self._loha),
            (_begins("lokr_", parts), self._lokr),
            ("diff" in parts, self._full),
            ("w_norm" in parts, self._norm),
            ("on_input" in parts or "weight" in parts, self._ia3),
        ]
        chosen = [read for is_there, read in algorithms if is_there]
        if len(chosen) > 1:
            shown = ", ".join(tensor.name for tensor in parts.values())
            self.complain(module.key, f"has updates of several methods: {shown}")
            return []
        for read in chosen:
            if (update := read(module)) is not None:
                found.append(update)
        magnitude = parts.get("dora_scale")
        if magnitude is not None and not any(update.kind == "dora" for update in found):
            if not chosen:
                self.complain(magnitude.name, "there, but no update that it belongs to")
            elif found:
                self.complain(magnitude.name, "does not go with this kind of update")
        return [*found, *self._biases(module, found)]

    def complain(self, name: str, message: str, expected: str = "", found: str = "") -> None:
        """Note what is wrong with a tensor or a module."""
        self.problems.append(Problem("error", name, message, expected, found))

    def _lora(self, module: Module) -> LazyUpdate | None:
        parts = module.parts
        if not self._has_all(module, ("down", "up")):
            return None
        down, up, mid = parts["down"], parts["up"], parts.get("mid")
        rank = up.shape[1] if len(up.shape) > 1 else 0
        if len(down.shape) != len(up.shape) or not 2 <= len(down.shape) <= 5 or not rank:
            message = "its factors are no matrices and no convolutions of one kind"
            self.complain(module.key, message, "equal dimensions", f"{down.shape}, {up.shape}")
            return None
        inner = down.shape[0]
        kernel = down.shape[2:]
        if mid is not None:
            if len(mid.shape) != len(down.shape) or mid.shape[0] != rank or mid.shape[1] != inner:
                self.complain(mid.name, "does not fit its factors", f"({rank}, {inner}, ...)",
                              f"{mid.shape}")  # fmt: skip
                return None
            kernel = mid.shape[2:]
        elif rank != inner:
            message = "its two factors have different ranks"
            self.complain(module.key, message, f"{inner}", f"{rank}")
            return None
        ones = (1,) * len(kernel)
        if up.shape[2:] != ones or (mid is not None and down.shape[2:] != ones):
            self.complain(module.key, "has a kernel where its convolution is 1x1", f"{ones}",
                          f"{up.shape[2:]}")  # fmt: skip
            return None
        shape = (up.shape[0], down.shape[1], *kernel)
        scale = module.scale(inner)

        def load() -> LowRank:
            from loratool.deltas import folded

            a, b = flat(down.read()), flat(up.read())
            if mid is not None:
                a = folded(Product(b, a, mid.read()))
            return LowRank(a, b, scale())

        stored = [down, up] if mid is None else [down, up, mid]
        return self._update(module, "low_rank", shape, stored, load, rank)

    def _loha(self, module: Module) -> LazyUpdate | None:
        parts = module.parts
        if not self._has_all(module, [f"hada_w{w}_{side}" for w in (1, 2) for side in "ab"]):
            return None
        cores = [name for name in ("hada_t1", "hada_t2") if name in parts]
        if len(cores) == 1:
            self._has_all(module, ("hada_t1", "hada_t2"))
            return None
        shapes = {self._shape_of(module, "hada", which) for which in ("w1", "w2")}
        if None in shapes or len(shapes) > 1:
            if None not in shapes:
                self.complain(module.key, "its two matrices do not have one shape", "", "")
            return None
        (shape,) = shapes
        assert shape is not None
        scale = module.scale(parts["hada_w1_b"].shape[0])

        def load() -> LoHa:
            return LoHa(product(parts, "hada", "w1"), product(parts, "hada", "w2"), scale())

        stored = [tensor for name, tensor in parts.items() if name.startswith("hada_")]
        return self._update(module, "loha", shape, stored, load)

    def _lokr(self, module: Module) -> LazyUpdate | None:
        parts = module.parts
        shapes = [self._shape_of(module, "lokr", which) for which in ("w1", "w2")]
        if "lokr_t1" in parts:
            self.complain(parts["lokr_t1"].name, "a core of w1 is known to no library")
            return None
        one, other = shapes
        if one is None or other is None:
            return None
        if len(one) > 2:
            self.complain(module.key, "w1 of a LoKr is a matrix", "(a, c)", f"{one}")
            return None
        shape = (one[0] * other[0], one[1] * other[1], *other[2:])
        # Where neither matrix is in factors there is no rank, and no scale.
        ranks = [parts[f"lokr_{w}_b"].shape[0] for w in ("w1", "w2") if f"lokr_{w}_b" in parts]
        scale = module.scale(ranks[0] if ranks else None)

        def load() -> LoKr:
            return LoKr(product(parts, "lokr", "w1"), product(parts, "lokr", "w2"), scale())

        stored = [tensor for name, tensor in parts.items() if name.startswith("lokr_")]
        return self._update(module, "lokr", shape, stored, load)

    def _shape_of(self, module: Module, family: str, which: str) -> Shape | None:
        """The shape of a matrix in factors or whole; None, after a complaint, if it has none."""
        parts = module.parts
        if (whole := parts.get(f"{family}_{which}")) is not None:
            return self._at_least_two(whole)
        names = (f"{family}_{which}_a", f"{family}_{which}_b")
        if not self._has_all(module, names):
            return None
        left, right = (parts[name] for name in names)
        if self._at_least_two(left) is None or self._at_least_two(right) is None:
            return None
        core = parts.get(f"{family}_t{which[1]}")
        if core is not None:
            (rank, out), (inner, columns) = left.shape[:2], right.shape[:2]
            if core.shape[:2] != (rank, inner) or len(left.shape) + len(right.shape) != 4:
                self.complain(core.name, "does not fit its factors", f"({rank}, {inner}, ...)",
                              f"{core.shape}")  # fmt: skip
                return None
            return (out, columns, *core.shape[2:])
        if left.shape[1] != right.shape[0] or len(left.shape) > 2:
            self.complain(module.key, f"the factors of {which} have different ranks",
                          f"{left.shape}", f"{right.shape}")  # fmt: skip
            return None
        return (left.shape[0], *right.shape[1:])

    def _at_least_two(self, tensor: LazyTensor) -> Shape | None:
        if len(tensor.shape) < 2 or not tensor.numel:
            self.complain(tensor.name, "is no matrix", "two dimensions", f"{tensor.shape}")
            return None
        return tensor.shape

    def _full(self, module: Module) -> LazyUpdate | None:
        diff = module.parts["diff"]
        return self._update(module, "dense", diff.shape, [diff], lambda: Dense(diff.read()))

    def _norm(self, module: Module) -> LazyUpdate | None:
        diff = module.parts["w_norm"]
        return self._update(module, "dense", diff.shape, [diff], lambda: Dense(diff.read()))

    def _ia3(self, module: Module) -> LazyUpdate | None:
        if not self._has_all(module, ("weight", "on_input")):
            return None
        weight, on_input = module.parts["weight"], module.parts["on_input"]
        if math.prod(weight.shape) != max(weight.shape, default=0) or on_input.numel != 1:
            message = "is no vector, or on_input no number"
            self.complain(weight.name, message, "one long dimension", f"{weight.shape}")
            return None
        axis = int(bool(on_input.read().item()))  # the shape depends on this one number
        number = weight.numel
        shape = (0, number) if axis else (number, 0)

        def load() -> IA3:
            return IA3(weight.read().double().reshape(-1) + 1, axis)

        return self._update(module, "ia3", shape, [weight], load)

    def _biases(self, module: Module, weights: Sequence[LazyUpdate]) -> list[LazyUpdate]:
        found = []
        for part in ("diff_b", "b_norm", "bias"):
            if (bias := module.parts.get(part)) is None:
                continue
            if len(bias.shape) != 1:
                self.complain(bias.name, "is no bias", "one dimension", f"{bias.shape}")
                continue
            scale = module.scale(weights[0].rank or 1) if part == "bias" and weights else _one
            found.append(
                LazyUpdate(
                    f"{module.name}.bias", "dense", bias.shape, bias.dtype, _dense(bias, scale),
                    origin=bias.origin, stored=(bias,),
                )
            )  # fmt: skip
        return found

    def _update(
        self,
        module: Module,
        kind: Kind,
        shape: Shape,
        stored: Sequence[LazyTensor],
        load: Callable[[], Update],
        rank: int | None = None,
    ) -> LazyUpdate | None:
        """An update of the module's weight, with its magnitude if it has one."""
        name = f"{module.name}.weight"
        update = LazyUpdate(
            name, kind, shape, stored[0].dtype, load,
            rank=rank, origin=stored[0].origin, stored=tuple(stored), transposed=False,
        )  # fmt: skip
        magnitude = module.parts.get("dora_scale")
        if magnitude is None or kind not in ("low_rank", "loha", "lokr"):
            return update
        axis = 0 if self.rows_only and magnitude.numel == shape[0] else _axis(magnitude, shape)
        if axis is None:
            message = "does not fit its update: neither a magnitude for each row nor for each input"
            self.complain(magnitude.name, message, f"({shape[0]}, 1) or (1, {shape[1]})",
                          f"{magnitude.shape}")  # fmt: skip
            return None

        def dora() -> DoRA:
            added = load()
            assert isinstance(added, LowRank | LoHa | LoKr)
            return DoRA(added, magnitude.read().reshape(-1), axis)

        return replace(update, kind="dora", load=dora, axis=axis, stored=(*stored, magnitude))

    def _has_all(self, module: Module, names: Sequence[str]) -> bool:
        missing = [name for name in names if name not in module.parts]
        for name in missing:
            there = next(module.parts[n].name for n in module.parts if n not in ("alpha",))
            self.complain(f"{module.key}.{_KEYS.get(name, name)}", f"missing, but {there} is there")
        return not missing


# How the first libraries that had them called the sides.
_KEYS = {"down": "lora_down.weight", "up": "lora_up.weight", "mid": "lora_mid.weight"}


def number_of(
    tensor: LazyTensor | None, complain: Callable[[str, str, str, str], None]
) -> LazyTensor | None:
    """A tensor that should be one number; None, after a complaint, if it is not."""
    if tensor is None or tensor.numel == 1:
        return tensor
    complain(tensor.name, "is no number", "one value", f"{tensor.shape}")
    return None


def alpha_scale(alpha: LazyTensor | None, rank: int | None, told: float | None = None) -> Scale:
    """alpha / rank, read when it is needed; 1 where nothing is in factors.

    Args:
        alpha: a tensor of one number; None for a file that does not have it.
        rank: of the update.
        told: what alpha is in that case; None for the rank.
    """

    def scale() -> float:
        if rank is None:
            return 1.0
        if alpha is None:
            return 1.0 if told is None else told / rank
        value = float(alpha.read().double().reshape(()).item())
        if not math.isfinite(value):
            raise InputError(f"{alpha.origin}: {alpha.name}: is {value}: repair the adapter")
        return value / rank

    return scale


def _dense(bias: LazyTensor, scale: Scale) -> Callable[[], Linear]:
    return lambda: Dense(bias.read(), scale())


def _one() -> float:
    return 1.0


def _begins(start: str, parts: Parts) -> bool:
    return any(name.startswith(start) for name in parts)


def _axis(magnitude: LazyTensor, shape: Shape) -> int | None:
    """0 if each row has a magnitude, 1 if each input has; a matrix's inputs repeat by kernel."""
    stored, number = magnitude.shape, magnitude.numel
    if not stored or max(stored) != number:
        return None
    if stored[0] == shape[0] == number:
        return 0
    is_inputs = len(stored) > 1 and stored[0] == 1 and stored[1] == number
    fits = shape[1] == number if len(shape) > 2 else shape[1] % number == 0
    return 1 if is_inputs and fits else None
