"""From updates to the file of tensors and settings that diffusers loads."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loratool.adapter import Adapter, LazyUpdate
from loratool.checkpoint import LazyTensor
from loratool.diffusion.adapter_keys import canonical_module
from loratool.diffusion.kinds import is_table
from loratool.errors import InputError, Problem
from loratool.updates import Dense, DoRA, LowRank, Update, tensors_of
from loratool.writer import Spool, write_safetensors
from loratool_plugins.adapter_formats import _diffusers_metadata as metadata
from loratool_plugins.adapter_formats import _ours, peft_writer
from loratool_plugins.adapter_formats._scales import alpha_of, require_finite
from loratool_plugins.adapter_formats.peft_layout import number, pattern
from loratool_plugins.executors.serial import Serial

if TYPE_CHECKING:
    import torch


# Settings of training that say nothing of what the factors mean.
_KEPT = ("lora_dropout", "init_lora_weights", "task_type", "peft_version")


def refusals(adapter: Adapter) -> Iterator[Problem]:
    """What PEFT's settings, of which each component has one set, cannot say."""
    by_component: dict[str, dict[str, LazyUpdate]] = {}
    for name, update in adapter.items():
        module, _, leaf = name.rpartition(".")
        found = canonical_module(module)
        if found is None:
            message = "is no name of a pipeline's; if it is of one, give the base with --base"
            yield Problem("error", name, message)
            continue
        if leaf not in ("weight", "bias"):
            yield Problem("error", name, "diffusers knows weights and biases of modules only")
        elif update.embedding or is_table(module):
            yield Problem("error", name, "diffusers loads no updates of embeddings' tables")
        by_component.setdefault(found.partition(".")[0], {})[name] = update
    for updates in by_component.values():
        yield from peft_writer.refusals(replace(adapter, updates=updates))


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
    """Collects the tensors of a file, and the ranks and alphas of every component.

    Attributes:
        adapter: what is written.
        spool: where tensors wait.
        tensors: key -> spooled tensor.
        names: canonical module -> its name in the adapter, where that is another.
        ranks: component -> the module's name in it -> rank.
        alphas: the same for alphas.
        scales: canonical module -> scale.
        rounded: modules whose scale no alpha gives exactly.
    """

    adapter: Adapter
    spool: Spool
    tensors: dict[str, LazyTensor] = field(default_factory=dict)
    names: dict[str, str] = field(default_factory=dict)
    ranks: dict[str, dict[str, int]] = field(default_factory=dict)
    alphas: dict[str, dict[str, float]] = field(default_factory=dict)
    scales: dict[str, float] = field(default_factory=dict)
    rounded: list[str] = field(default_factory=list)

    def add(self, results: Iterable[tuple[LazyUpdate, Update | None]]) -> None:
        """Spool what is computed; biases come last, since PEFT scales them as their weights."""
        biases: dict[str, Dense] = {}
        for update, found in results:
            module, _, leaf = update.name.rpartition(".")
            name = canonical_module(module)
            if found is None or name is None:
                continue
            if name != module:
                self.names[name] = module
            if isinstance(found, Dense) and leaf == "bias":
                biases[name] = found
            elif isinstance(found, LowRank | DoRA):
                self._weight(name, found, update)
            else:
                raise TypeError(f"{update.name}: diffusers has no {type(found).__name__}")
        for name, bias in biases.items():
            self._bias(name, bias)

    def _weight(self, name: str, found: LowRank | DoRA, update: LazyUpdate) -> None:
        require_finite(update.name, *(tensor for _, tensor in tensors_of(found)))
        added = found.added if isinstance(found, DoRA) else found
        assert isinstance(added, LowRank)
        kernel = update.shape[2:]
        ones = [1] * len(kernel)
        self._add(f"{name}.lora_A.weight", added.a.reshape(added.rank, -1, *kernel))
        self._add(f"{name}.lora_B.weight", added.b.reshape(-1, added.rank, *ones))
        if isinstance(found, DoRA):
            shape = (1, -1, *ones) if kernel else (-1,)
            # Without ".weight", as diffusers itself writes it, a text encoder's is not loaded.
            self._add(f"{name}.lora_magnitude_vector.weight", found.magnitude.reshape(shape))
        divisor = math.sqrt(added.rank) if self.adapter.rslora else float(added.rank)
        alpha = alpha_of(added.scale, divisor)
        if alpha / divisor != added.scale:
            self.rounded.append(name)
        component, own = _in_component(name)
        self.ranks.setdefault(component, {})[own] = added.rank
        self.alphas.setdefault(component, {})[own] = alpha
        self.scales[name] = added.scale

    def _bias(self, name: str, bias: Dense) -> None:
        require_finite(f"{name}.bias", bias.values)
        beside = self.scales.get(name, 0.0)
        if beside == 0 != bias.scale:
            raise InputError(f"{name}.bias: PEFT cannot add to it beside factors whose scale is 0")
        factor = 1.0 if bias.scale == beside else bias.scale / beside
        values = bias.values if factor == 1 else bias.values * factor
        self._add(f"{name}.lora_B.bias", values)

    def _add(self, key: str, tensor: torch.Tensor) -> None:
        self.tensors[key] = self.spool.add(key, tensor)

    def write(self, file: Path) -> tuple[str, ...]:
        """Write the file, if there is anything to write; what should be known of it."""
        if not self.tensors:
            return ()
        known = {key: value for key, value in self.adapter.settings.items() if key != metadata.KEY}
        more = {"names": self.names} if self.names else {}
        text = _ours.text_of(replace(self.adapter, settings=known), ("rslora",), **more)
        header = {
            "format": "pt",
            metadata.KEY: json.dumps(self._settings(), indent=2, sort_keys=True),
            _ours.KEY: text,
        }
        write_safetensors(file, self.tensors, header, Serial())
        if not self.rounded:
            return ()
        count, first = len(self.rounded), self.rounded[0]
        return (f"{count} scales are no short numbers ({first}, ...): rounded to fp64",)

    def _settings(self) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for component, ranks in self.ranks.items():
            values = self._of_component(component, ranks, self.alphas[component])
            found |= {f"{component}.{key}": value for key, value in values.items()}
        return found

    def _of_component(
        self, component: str, ranks: Mapping[str, int], alphas: Mapping[str, float]
    ) -> dict[str, Any]:
        rank = Counter(ranks.values()).most_common(1)[0][0]
        alpha = Counter(alphas.values()).most_common(1)[0][0]
        other_alphas = {m: number(a) for m, a in alphas.items() if a != alpha}
        keys = [key for key in self.tensors if key.startswith(f"{component}.")]
        return {
            **self._known(component),
            "r": rank,
            "lora_alpha": number(alpha),
            "rank_pattern": pattern({m: r for m, r in ranks.items() if r != rank}, ranks),
            "alpha_pattern": pattern(other_alphas, ranks),
            "target_modules": sorted(ranks),
            **({"use_dora": True} if any("_magnitude_" in key for key in keys) else {}),
            **({"lora_bias": True} if any(key.endswith("lora_B.bias") for key in keys) else {}),
            **({"use_rslora": True} if self.adapter.rslora else {}),
        }

    def _known(self, component: str) -> dict[str, Any]:
        """What the adapter's own settings say that its updates do not."""
        text = self.adapter.settings.get(metadata.KEY)
        if not isinstance(text, str):
            return {}
        found = metadata.settings_of({metadata.KEY: text}, Path(metadata.KEY)).get(component)
        values = {} if found is None else found.values
        return {key: value for key, value in values.items() if key in _KEPT}


def _in_component(name: str) -> tuple[str, str]:
    """A module's component, and its name there; CLIP's, with or without its `text_model`."""
    component, _, own = name.partition(".")
    return component, own.removeprefix("text_model.")
