"""What PEFT makes of an adapter directory, with everything that it would pass over an error."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from peft.utils import save_and_load
from safetensors.torch import load_file
from transformers import AutoConfig, PreTrainedModel

from tests.models import Pair, load

PREFIX = "base_model.model."


def on_base(pair: Pair, adapter: Path) -> PreTrainedModel:
    """The fine-tune's class with the base's weights, as the model card says to load it."""
    config = AutoConfig.from_pretrained(adapter / "model")
    return load(pair.recipe.tuned, pair.base, config=config, ignore_mismatched_sizes=True)


def load_strictly(model: PreTrainedModel, adapter: Path, **options: Any) -> Any:
    """`PeftModel.from_pretrained`; a warning, a missing or an unexpected key is a failure."""
    results = []

    def recording(*args: Any, **kwargs: Any) -> Any:
        result = save_and_load.set_peft_model_state_dict(*args, **kwargs)
        results.append(result)
        return result

    with (
        warnings.catch_warnings(),
        mock.patch("peft.peft_model.set_peft_model_state_dict", recording),
    ):
        warnings.simplefilter("error")
        warnings.simplefilter("ignore", FutureWarning)  # between peft and transformers
        # One setting for all targets, where an untied GPT-2 has both kinds: PEFT sets it right.
        warnings.filterwarnings("ignore", "fan_in_fan_out is set to True but the target module")
        # PEFT looks for the patterns of parameters among modules, yet applies them.
        warnings.filterwarnings("ignore", r".*_pattern keys did not match any targeted module")
        # It adds to the layer's outputs all the same; only PEFT's merge needs a bias.
        warnings.filterwarnings("ignore", "`lora_bias=True` was passed but the targeted layer")
        loaded = PeftModel.from_pretrained(model, adapter, **options)
    (result,) = results
    assert result.unexpected_keys == []
    assert [k for k in result.missing_keys if ".lora_" in k or "modules_to_save" in k] == []
    assert lora_modules(loaded) == factored_modules(adapter)
    return loaded.eval()


def lora_modules(model: Any) -> set[str]:
    """The modules on which PEFT put factors."""
    return {
        name.removeprefix(PREFIX)
        for name, module in model.named_modules()
        if isinstance(module, LoraLayer)
    }


def factored_modules(adapter: Path) -> set[str]:
    """The modules for which the file holds factors."""
    ends = (".lora_A.weight", ".lora_embedding_A")
    keys = load_file(adapter / "adapter_model.safetensors")
    return {
        key.removeprefix(PREFIX).removesuffix(end)
        for key in keys
        for end in ends
        if key.endswith(end)
    }


def settings(adapter: Path) -> dict[str, Any]:
    """adapter_config.json."""
    found: dict[str, Any] = json.loads((adapter / "adapter_config.json").read_text())
    return found


def by_hand(pair: Pair, adapter: Path, base: PreTrainedModel) -> PreTrainedModel:
    """The fine-tune with every factored weight replaced by base + B A.

    `base` is the fine-tune's class with the base's weights.
    """
    model = pair.load_tuned()
    before = {name: value.detach().clone() for name, value in base.named_parameters()}
    for module, delta in deltas(model, adapter).items():
        model.get_submodule(module).weight.data = before[f"{module}.weight"] + delta
    return model


def deltas(model: PreTrainedModel, adapter: Path) -> dict[str, torch.Tensor]:
    """Module -> B A as the file has it, in the orientation of the module's weight."""
    tensors = load_file(adapter / "adapter_model.safetensors")
    found = {}
    for module in factored_modules(adapter):
        a = tensors[f"{PREFIX}{module}.lora_A.weight"].double()
        b = tensors[f"{PREFIX}{module}.lora_B.weight"].double()
        is_conv1d = type(model.get_submodule(module)).__name__ == "Conv1D"
        found[module] = ((b @ a).T if is_conv1d else b @ a).float()
    return found
