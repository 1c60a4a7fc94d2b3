"""XLabs' LoRA files for Flux: factors lie in the processors of attentions."""

from __future__ import annotations

from loratool.diffusion.layouts import model_kind, single_file_modules
from loratool.diffusion.links import Rows, Shapes

# What follows "processor." -> the module in the layout of Flux's makers.
_DOUBLE = {
    "qkv_lora1": "img_attn.qkv",
    "qkv_lora2": "txt_attn.qkv",
    "proj_lora1": "img_attn.proj",
    "proj_lora2": "txt_attn.proj",
}
_SINGLE = {"qkv_lora": "linear1", "proj_lora": "linear2"}


def xlabs_modules(shapes: Shapes) -> dict[str, tuple[Rows, ...]]:
    """The names of XLabs' factors, without ".up.weight" and ".down.weight".

    Args:
        shapes: of the model's parameters by canonical names.

    Returns:
        Name ("double_blocks.0.processor.qkv_lora1") -> the canonical modules' rows that the rows of
        its B are, in order; {} unless the model is a Flux.
    """
    if model_kind(shapes) != "flux":
        return {}
    found: dict[str, tuple[Rows, ...]] = {}
    for name, rows in single_file_modules(shapes).items():
        block, _, inside = name.partition(".")
        number, _, module = inside.partition(".")
        processors = {"double_blocks": _DOUBLE, "single_blocks": _SINGLE}.get(block, {})
        for processor, wanted in processors.items():
            if module == wanted:
                # Of linear1 only queries, keys and values, and not what goes to the MLP.
                found[f"{block}.{number}.processor.{processor}"] = rows[:3]
    return found
