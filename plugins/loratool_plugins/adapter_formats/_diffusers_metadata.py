"""What diffusers says of its adapters beside their tensors: PEFT's settings of each component.

They lie in the safetensors header as JSON under `lora_adapter_metadata`, every key with its
component before it: {"unet.r": 4, "unet.lora_alpha": 8, "text_encoder.r": 4, ...}.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from loratool.errors import FormatError
from loratool_plugins.adapter_formats.peft_config import Settings, check_settings

KEY = "lora_adapter_metadata"
Complain = Callable[[str, str, str, str], None]


def settings_of(
    metadata: Mapping[str, str], file: Path, method: str = "LORA"
) -> dict[str, Settings]:
    """Component -> its settings; {} if the file has none.

    Args:
        metadata: of the safetensors header.
        file: for messages.
        method: PEFT's name of the method, where the settings do not say it.

    Raises:
        FormatError: they are no JSON object, or say what loratool cannot merge.
    """
    text = metadata.get(KEY)
    if text is None:
        return {}
    try:
        content = json.loads(text)
    except (ValueError, RecursionError):
        content = None
    if not isinstance(content, dict):
        raise FormatError(f"{file}: {KEY} in its header is not a JSON object")
    by_component: dict[str, dict[str, Any]] = {}
    for key, value in content.items():
        component, dot, name = key.partition(".")
        if not dot:
            raise FormatError(f"{file}: {KEY}: {key!r} does not begin with a component's name")
        by_component.setdefault(component, {})[name] = value
    return {
        component: check_settings(file, {"peft_type": method, **values})
        for component, values in by_component.items()
    }


def scale_of(settings: Settings, module: str, own: str, complain: Complain) -> float:
    """alpha / rank by PEFT's rules.

    Args:
        settings: of the component.
        module: its canonical name, for messages.
        own: the name that the module has in its component.
        complain: is told what is wrong.
    """

    def named(_: str, message: str, expected: str, found: str) -> None:
        complain(module, message, expected, found)

    return settings.scale(own, named)
