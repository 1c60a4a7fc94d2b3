"""How kohya's sd-scripts and programs after them name the modules of an adapter.

A module's path is written with underscores for dots and a prefix for its component, so that only
the model's own names tell which module is meant. UNets of Stable Diffusion 1 and 2 go by diffusers'
names, XL's by those of single files, and both occur for both; Flux and Stable Diffusion 3 go by
their makers' names, in which queries, keys and values are one module.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field

from loratool.diffusion.layouts import model_kind, single_file_modules
from loratool.diffusion.links import Rows, Shapes

Targets = Mapping[str, tuple[Rows, ...]]

_DENOISER = "lora_unet_"  # that of a transformer, too
_LYCORIS = "lycoris_"  # lycoris names the one model that it wraps so, whichever it is
# Component -> prefixes that it has been seen with, the one that sd-scripts writes first.
_PREFIXES = {
    "unet": (_DENOISER, _LYCORIS),
    "transformer": (_DENOISER, "lora_transformer_", _LYCORIS),
    "text_encoder": ("lora_te1_", "lora_te_", _LYCORIS),
    "text_encoder_2": ("lora_te2_", _LYCORIS),
    "text_encoder_3": ("lora_te3_", _LYCORIS),
}
_T5_OF_FLUX = ("lora_te3_", _LYCORIS)  # though it is the second text encoder
# What dotted names of modules start with -> the prefix of underscored ones.
_DOTTED = {
    "model.diffusion_model.": _DENOISER,
    "diffusion_model.": _DENOISER,
    "text_encoders.clip_l.transformer.": "lora_te1_",
    "text_encoders.clip_g.transformer.": "lora_te2_",
    "text_encoders.t5xxl.transformer.": "lora_te3_",
}
# Modules that Stable Diffusion XL's UNet has, and those of 1 and 2 do not.
_SDXL = re.compile(
    r"unet\.(add_embedding\.|up_blocks\.0\.attentions\."
    r"|.*\.attentions\.\d+\.transformer_blocks\.[1-9])"
)
_BY_SINGLE_FILE = ("sdxl", "flux", "sd3")  # kinds whose denoiser goes by the names of single files


@dataclass(frozen=True)
class KohyaModules:
    """What underscored names can mean in one model.

    Attributes:
        targets: name -> the canonical modules' rows that the rows of its B are, in order.
        ambiguous: names that may mean several modules -> each of these.
    """

    targets: Targets = field(default_factory=dict)
    ambiguous: Mapping[str, tuple[tuple[Rows, ...], ...]] = field(default_factory=dict)


def kohya_modules(shapes: Shapes) -> KohyaModules:
    """All the names that the modules of a model are known by.

    Args:
        shapes: of its parameters by canonical names (`layouts.canonical_shapes`).
    """
    meanings: dict[str, dict[tuple[Rows, ...], None]] = {}
    kind = model_kind(shapes)
    for name, rows in _all_names(shapes, kind):
        meanings.setdefault(name, {})[rows] = None
    return KohyaModules(
        {name: next(iter(found)) for name, found in meanings.items() if len(found) == 1},
        {name: tuple(found) for name, found in meanings.items() if len(found) > 1},
    )


def kohya_layout(shapes: Shapes) -> dict[str, tuple[Rows, ...]]:
    """The names that sd-scripts writes for the modules of a model.

    Every module stands under one name; those of one fused name are written together. Which
    convention that is depends on the kind of the model; an unknown kind goes by diffusers' names.

    Args:
        shapes: of its parameters by canonical names.

    Returns:
        Name -> the canonical modules' rows that the rows of its B are, in order; without the names
        that would mean several modules.
    """
    kind = model_kind(shapes)
    ambiguous = kohya_modules(shapes).ambiguous
    found: dict[str, tuple[Rows, ...]] = {}
    covered: set[str] = set()
    if kind in _BY_SINGLE_FILE:
        for name, rows in single_file_modules(shapes).items():
            found[_DENOISER + _underscored(name)] = rows
            covered.update(row.module for row in rows)
    for whole in _modules(shapes):
        component, _, path = whole.module.partition(".")
        if whole.module not in covered and (prefixes := _prefixes(component, kind)):
            is_only_encoder = component == "text_encoder" and kind in ("sd1", "sd2")
            prefix = "lora_te_" if is_only_encoder else prefixes[0]
            found[prefix + _underscored(path)] = (whole,)
    return {name: rows for name, rows in found.items() if name not in ambiguous}


def spelled_alone(modules: Collection[str]) -> dict[str, str] | str:
    """The names that sd-scripts writes for modules of a model that is not at hand.

    Only Stable Diffusion 1 and 2 go by their own names; all later models by their makers', which
    cannot be told from some of the modules.

    Args:
        modules: canonical names.

    Returns:
        Module -> its name; or why there is none.
    """
    components = {module.partition(".")[0] for module in modules}
    if components - {"unet", "text_encoder"} or any(map(_SDXL.match, modules)):
        return "is of a model whose modules kohya's format calls by its makers' names"
    prefixes = {"unet": _DENOISER, "text_encoder": "lora_te_"}
    found = {}
    for module in modules:
        component, _, path = module.partition(".")
        found[module] = prefixes[component] + _underscored(path)
    return found


def kohya_spelling(module: str) -> str:
    """The underscored name of a module that a file names with dots, as ComfyUI's trainers do.

    "diffusion_model.double_blocks.0.img_attn.qkv" becomes
    "lora_unet_double_blocks_0_img_attn_qkv"; names that are underscored already stay.
    """
    for start, prefix in _DOTTED.items():
        if module.startswith(start):
            return prefix + _underscored(module.removeprefix(start))
    return _underscored(module)


def _all_names(shapes: Shapes, kind: str | None) -> Iterator[tuple[str, tuple[Rows, ...]]]:
    for whole in _modules(shapes):
        component, _, path = whole.module.partition(".")
        # Trained with transformers 5.6 or later, CLIP's names lack their first part.
        for spelling in dict.fromkeys((path, path.removeprefix("text_model."))):
            for prefix in _prefixes(component, kind):
                yield prefix + _underscored(spelling), (whole,)
    for name, rows in single_file_modules(shapes).items():
        yield _DENOISER + _underscored(name), rows


def _prefixes(component: str, kind: str | None) -> tuple[str, ...]:
    if component == "text_encoder_2" and kind == "flux":
        return _T5_OF_FLUX
    return _PREFIXES.get(component, ())


def _modules(shapes: Shapes) -> Iterator[Rows]:
    """All rows of every module that has a weight."""
    for name, shape in shapes.items():
        module, _, leaf = name.rpartition(".")
        if leaf == "weight" and shape:
            yield Rows(module, 0, shape[0])


def _underscored(path: str) -> str:
    return path.replace(".", "_")
