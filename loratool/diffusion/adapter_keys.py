"""Keys of diffusers' LoRA files, old and new: which module, and which side of its update.

Since 0.22 diffusers writes PEFT's `MODULE.lora_A.weight`; before that, `MODULE.lora.down.weight`,
and before that the factors lay in attention processors: `attn1.processor.to_q_lora.down.weight`.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Literal

from loratool.diffusion.text import canonical_name

Side = Literal["A", "B", "B.bias", "magnitude", "alpha"]

_COMPONENTS = re.compile(r"(unet|transformer(_\d+)?|text_encoder(_\d+)?|prior|controlnet)\.")
# What names inside a component begin with; no two components share one.
_INSIDE = (
    ("unet", r"(down_blocks|mid_block|up_blocks|conv_in|conv_out|time_embedding|add_embedding)\."),
    ("transformer", r"((single_)?transformer_blocks|time_text_embed|context_embedder|x_embedder"
     r"|pos_embed|norm_out|proj_out)\."),
    ("text_encoder", r"text_model\."),
)  # fmt: skip
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
        own: what the key itself calls the module, without its component.
    """

    module: str
    side: Side
    own: str = field(default="", compare=False)


def parse_key(key: str) -> AdapterKey | None:
    """Read a key of a diffusers LoRA file; None if it is not of this format.

    The keys of the oldest files, and of some trainers, have no component.
    """
    full = with_component(key)
    if full is None:
        return None
    if found := _PROCESSOR.fullmatch(full):
        is_text = full.startswith("text_encoder")
        part = (_CLIP_PARTS if is_text else _UNET_PARTS)[found["part"]]
        module = f"{found['attention']}.{part}"
        return _key(module, "A" if found["way"] == "down" else "B")
    for ending, side in _SIDES:
        found = re.fullmatch(rf"(?P<module>.+?){ending}", full)
        if found:
            return _key(found["module"], side)
    return None


def canonical_module(name: str) -> str | None:
    """The canonical name of a module; None if its name does not tell its component."""
    full = with_component(name)
    return None if full is None else canonical_name(full)


def _key(module: str, side: Side) -> AdapterKey:
    """A key of a module, whose name is cleared of the processor of an attention."""
    name = module.replace(".processor.", ".")
    return AdapterKey(canonical_name(name), side, name.partition(".")[2])


def has_component(name: str) -> bool:
    """Whether a name begins with a component's."""
    return _COMPONENTS.match(name) is not None


def with_component(name: str) -> str | None:
    """A name that says which component it is in, as far as it does or its beginning tells."""
    if has_component(name):
        return name
    found = (component for component, inside in _INSIDE if re.match(inside, name))
    component = next(found, None)
    return None if component is None else f"{component}.{name}"
