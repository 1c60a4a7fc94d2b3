"""What adapter_config.json says, and what of it loratool cannot merge."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loratool.errors import FormatError

FILE = "adapter_config.json"
READ_TYPES = ("LORA", "LOHA", "LOKR", "IA3", "TRAINABLE_TOKENS")

_NO_WEIGHTS = "it adds to the model's inputs, not to its weights, so there is nothing to merge"
# Methods that are no update of weights, and why.
_NOT_MERGEABLE = {
    "PROMPT_TUNING": f"prompt tuning learns virtual tokens: {_NO_WEIGHTS}",
    "MULTITASK_PROMPT_TUNING": f"prompt tuning learns virtual tokens: {_NO_WEIGHTS}",
    "P_TUNING": f"P-tuning learns virtual tokens: {_NO_WEIGHTS}",
    "CPT": f"context-aware prompt tuning learns virtual tokens: {_NO_WEIGHTS}",
    "PREFIX_TUNING": "prefix tuning learns keys and values that are put before every layer's own: "
    "no weight changes, so there is nothing to merge",
    "CARTRIDGE": "a cartridge is a trained KV cache: no weight changes, so there is nothing to "
    "merge",
    "ADAPTION_PROMPT": "an adaption prompt is attended to beside the layer's input: no weight "
    "changes, so there is nothing to merge",
    "XLORA": "X-LoRA mixes its adapters anew for every token: no one set of weights does the same",
    "POLY": "Poly mixes its adapters by task: no one set of weights does the same",
}
# Settings that change what a LoRA's weights mean, and what to say; "" where it is only not done.
_UNSUPPORTED = {
    "alora_invocation_tokens": "an activated LoRA works only from its invocation tokens on: merged "
    "weights would change all tokens",
    "arrow_config": "Arrow routes every token to other adapters: no one set of weights does the "
    "same",
    "layer_replication": "",
    "use_qalora": "QA-LoRA's factors act on pooled inputs, which no plain weight does",
    "use_bdlora": "",
    "kasa_config": "",
    "monteclora_config": "",
    "velora_config": "",
}
# Ways to start that change the base's weight. PEFT's own conversion on saving undoes them, and
# sets init_lora_weights to true.
_CHANGED_BASE = ("pissa", "olora", "corda", "lora_ga", "loftq")


@dataclass(frozen=True)
class Settings:
    """The parsed file.

    Attributes:
        path: the file, for messages.
        values: its content.
    """

    path: Path
    values: Mapping[str, Any]

    def __getitem__(self, key: str) -> Any:
        return self.values.get(key)

    @property
    def method(self) -> str:
        """PEFT's name of the method."""
        return str(self.values.get("peft_type"))

    def rank(self, module: str) -> Any:
        """The rank of a module's update, by PEFT's patterns."""
        return self._by_pattern("rank_pattern", module, self.values.get("r", 8))

    def scale(self, module: str, complain: Callable[[str, str, str, str], None]) -> float:
        """alpha / r, or alpha / sqrt(r) for rsLoRA; 0 after a complaint if that is no number."""
        rank = self.rank(module)
        key = "lora_alpha" if self.method == "LORA" else "alpha"
        alpha = self._by_pattern("alpha_pattern", module, self.values.get(key, 8))
        try:
            scale = alpha / (math.sqrt(rank) if self.values.get("use_rslora") else rank)
        except (TypeError, ValueError, ZeroDivisionError):
            scale = math.nan
        if not math.isfinite(scale):
            complain(module, "its scale is not finite", "alpha / r", f"{alpha} / {rank}")
            return 0.0
        return float(scale)

    def _by_pattern(self, key: str, module: str, default: Any) -> Any:
        for pattern, value in (self.values.get(key) or {}).items():
            try:
                if matches_module(pattern, module):
                    return value
            except re.error as error:
                raise FormatError(
                    f"{self.path}: {key}: {pattern!r} is no pattern ({error})"
                ) from error
        return default

    def matches(self, key: str, module: str) -> bool:
        """Whether a setting like target_modules names a module: a regex, or a list of ends."""
        wanted = self.values.get(key)
        if isinstance(wanted, str):
            return re.fullmatch(wanted, module) is not None
        return any(module == end or module.endswith(f".{end}") for end in wanted or ())

    def indices(self, module: str) -> tuple[int, ...]:
        """The rows of a table that are trained."""
        if self.method == "TRAINABLE_TOKENS":
            found = self.values.get("token_indices")
        else:
            found = self.values.get("trainable_token_indices")
        if isinstance(found, dict):
            ends = [v for n, v in found.items() if module == n or module.endswith(f".{n}")]
            found = ends[0] if ends else None
        if not isinstance(found, list) or not all(isinstance(n, int) and n >= 0 for n in found):
            return ()
        return tuple(found)


def matches_module(pattern: str, module: str) -> bool:
    """PEFT's rule for the keys of rank_pattern and alpha_pattern."""
    return re.match(rf"(.*\.)?({pattern})$", module) is not None


def is_of_adapters_library(values: Mapping[str, Any]) -> bool:
    """Whether it is a file of the same name by the adapters library."""
    return "peft_type" not in values and {"config", "model_name"} <= values.keys()


def check_settings(path: Path, values: Mapping[str, Any]) -> Settings:
    """Refuse by name what loratool does not merge.

    Raises:
        FormatError: such a method or setting, or a malformed one.
    """
    if is_of_adapters_library(values):
        raise FormatError(
            f"{path}: is a bottleneck adapter of the adapters library: it adds layers with a "
            "nonlinearity between the model's own, which no weight of the model can hold"
        )
    method = values.get("peft_type")
    if method in _NOT_MERGEABLE:
        raise FormatError(f"{path}: {_NOT_MERGEABLE[method]}")
    if method not in READ_TYPES:
        raise FormatError(
            f"{path}: peft_type is {method!r}: loratool cannot merge that yet, only "
            f"{', '.join(READ_TYPES)}"
        )
    for key, why in _UNSUPPORTED.items():
        if values.get(key):
            reason = why or "loratool cannot merge that yet"
            raise FormatError(f"{path}: {key} is set: {reason}")
    start = values.get("init_lora_weights")
    if isinstance(start, str) and start.lower().startswith(_CHANGED_BASE):
        raise FormatError(
            f"{path}: init_lora_weights is {start!r}: this adapter belongs to a base whose weights "
            "that start has changed, and merged into the original it would be wrong; save it with "
            "PEFT's path_initial_model_for_weight_conversion, which makes a plain LoRA of it"
        )
    if method in ("LORA", "LOHA", "LOKR"):
        rank = values.get("r", 8)
        if not isinstance(rank, int) or isinstance(rank, bool) or rank < 1:
            raise FormatError(f"{path}: r must be a whole number from 1 up, not {rank!r}")
    for key in ("rank_pattern", "alpha_pattern"):
        if not isinstance(values.get(key) or {}, dict):
            raise FormatError(f"{path}: {key} must map module patterns to numbers")
    return Settings(path, values)


def usual_order(name: str) -> int:
    """The order of the parameters in transformers' expert modules."""
    return 1 if name.startswith("down") else 0
