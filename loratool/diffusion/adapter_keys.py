"""Keys of diffusers' LoRA files, old and new: which module, and which side of its update.

Since 0.22 diffusers writes PEFT's `MODULE.lora_A.weight`; before that, `MODULE.lora.down.weight`,
and before that the factors lay in attention processors: `attn1.processor.to_q_lora.down.weight`.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

from loratool.diffusion.text import canonical_name

Side = Literal["A", "B", "B.bias", "magnitude", "alpha"]

_COMPONENTS = re.compile(r"(unet|transformer(_\d+)?|text_encoder(_\d+)?|prior|controlnet)\.")
_SIDES: tuple[tuple[str, Side], ...] = (
    (r"\.lora_A(\.[^.]+)??\.weight", "A"),
    (r"\.lora_B(\.[^.]+)??\.weight", "B"),
    (r"\.lora_B(\.[^.]+)??\.bias", "B.bias"),
    (r"\.lora_magnitude_vector(\.weight)?", "magnitude"),
    (r"\.lora(_linear_layer)?\.down\.weight", "A"),
    (r"\.lora(_linear_layer)?\.up\.weight", "B"),
    (r"\.alpha", "alpha"),
)
_PROCESSOR = re.compile(
    r"(?P<attention>.+?)(\.processor)?\.to_(?P<part>q|k|v|out)_lora\.(?P<way>down|up)\.weight"
)
# How the parts of an attention are called: in UNets, and in CLIP.
_UNET_PARTS = {"q": "to_q", "k": "to_k", "v": "to_v", "out": "to_out.0"}
_CLIP_PARTS = {"q": "q_proj", "k": "k_proj", "v": "v_proj", "out": "out_proj"}


@dataclass(frozen=True)
class AdapterKey:
    """What a key of an adapter's file stands for.

    Attributes:
        module: the canonical name of the module ("unet.mid_block...attn1.to_q").
        side: which tensor of its update it is.
    """

    module: str
    side: Side


def parse_key(key: str) -> AdapterKey | None:
    """Read a key of a diffusers LoRA file; None if it is not of this format.

    A key without a component is of a UNet: the oldest files hold nothing else.
    """
    is_bare = _COMPONENTS.match(key) is None
    full = f"unet.{key}" if is_bare else key
    if found := _PROCESSOR.fullmatch(full):
        is_text = full.startswith("text_encoder")
        part = (_CLIP_PARTS if is_text else _UNET_PARTS)[found["part"]]
        module = f"{found['attention']}.{part}"
        return AdapterKey(_canonical(module), "A" if found["way"] == "down" else "B")
    for ending, side in _SIDES:
        found = re.fullmatch(rf"(?P<module>.+?){ending}", full)
        if found and not (is_bare and side == "alpha"):  # kohya's keys have one, too
            return AdapterKey(_canonical(found["module"]), side)
    return None


def _canonical(module: str) -> str:
    """Without the processor of an attention, and with CLIP's `text_model`."""
    return canonical_name(module.replace(".processor.", "."))
