"""The files of adapters of diffusion models: where they lie, and which format their keys are of.

One file of weights holds everything: tensors, and what else is said in the safetensors header.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from loratool.checkpoint import LazyTensor
from loratool.diffusion.adapter_keys import parse_key
from loratool.errors import FormatError, InputError
from loratool.files import PICKLES, entries, is_dir, is_file
from loratool.json_files import MANIFEST
from loratool.safetensors_file import lazy_tensors, read_header
from loratool_plugins.adapter_formats import _keys, _ours
from loratool_plugins.checkpoint_formats.torch import load_lazily

Family = Literal["kohya", "lycoris", "diffusers"]

_WANTED: Mapping[Family, str] = {
    "kohya": "*.lora_down.weight and *.lora_up.weight",
    "lycoris": "LyCORIS's (*.hada_*, *.lokr_*, *.diff, *.w_norm, *.on_input)",
    "diffusers": "COMPONENT.*.lora_A.weight and COMPONENT.*.lora_B.weight",
}
_OTHERS = ("loralib", "mlx", "torchtune")  # whose keys go with none of these
_USUAL = "pytorch_lora_weights.safetensors"
# Methods whose keys are known, to say what they are, and that loratool does not merge.
REFUSED: Mapping[str, str] = {
    r"oft_(blocks|diag|vec)|rescale": "OFT and BOFT, which rotate weights",
    r"(a[12]|b[12]|bm)\.weight": "GLoRA, which scales and shifts weights and biases",
    r"lambda_layer|lambda_base|[pq](_base)?_layer\.weight": "T-LoRA, whose rank changes with time",
}
_LYCORIS = re.compile(
    r".+\.(hada_(w[12]_[ab]|t[12])|lokr_(w[12](_[ab])?|t[12])|diff(_b)?|[wb]_norm|on_input|"
    + "|".join(REFUSED)
    + ")"
)
_DOWN_UP = re.compile(r".+\.lora_(down|mid|up)\.weight")
# Keys that name sides as PEFT does, or as diffusers did.
_A_B = re.compile(
    r".+(\.lora_[AB](\.[^.]+)?\.(weight|bias)|\.lora_magnitude_vector(\.weight)?"
    r"|[._]lora(_linear_layer)?\.(down|up)\.weight)"
)
# What sd-scripts and ComfyUI's trainers put before names.
_PREFIX = re.compile(
    r"(lora_(unet|transformer|te\d?)|lycoris)_|(model\.)?diffusion_model\.|text_encoders\."
)


@dataclass(frozen=True)
class Content:
    """What a file holds.

    Attributes:
        file: where it lies.
        tensors: by key.
        metadata: of the safetensors header.
        ours: loratool's part of the metadata, parsed.
        model_files: files under model/ beside it.
    """

    file: Path
    tensors: Mapping[str, LazyTensor]
    metadata: Mapping[str, str] = field(default_factory=dict)
    ours: Mapping[str, object] = field(default_factory=dict)
    model_files: Mapping[str, Path] = field(default_factory=dict)

    @property
    def files(self) -> dict[str, Path]:
        """All files that belong to the adapter, by name."""
        found = {self.file.name: self.file}
        manifest = self.file.parent / MANIFEST
        if self.model_files or is_file(manifest):
            found |= {f"model/{name}": file for name, file in self.model_files.items()}
            found |= {MANIFEST: manifest} if is_file(manifest) else {}
        return found


def objection(path: Path, family: Family) -> str:
    """Why a path holds no adapter of a family, in a few words; "" if it does."""
    file = _weight_file(path)
    if isinstance(file, str):
        return file
    try:
        keys = _keys.names_in(file)
    except InputError as error:
        return str(error).removeprefix(f"{file}: ")
    found = _families(keys)
    # LyCORIS has kohya's keys, too.
    own = "lycoris" if "lycoris" in found else next(iter(found), None)
    if own is None:
        return f"keys are not {_WANTED[family]}"
    mixed = [(name, key) for name, key in _keys.styles_of(keys).items() if name in _OTHERS]
    mixed += found.items() if "diffusers" in found else [(own, found[own])]
    if len(mixed) > 1:
        names = " and ".join(f"{key} ({name})" for name, key in mixed)
        return f"holds keys of two formats, {names}: separate them"
    return "" if own == family else f"keys are not {_WANTED[family]}"


def read(path: Path) -> Content:
    """Open the file of an adapter.

    Raises:
        InputError: it cannot be read.
        FormatError: it is malformed.
    """
    file = _weight_file(path)
    if isinstance(file, str):
        raise FormatError(f"{path}: {file}")
    if file.suffix in PICKLES:
        return Content(file, load_lazily(file))
    header = read_header(file)
    ours = _ours.parsed(header.metadata.get(_ours.KEY), str(file))
    models = _ours.model_files(path)[0] if is_dir(path) else {}
    return Content(file, lazy_tensors(file, header), header.metadata, ours, models)


def _weight_file(path: Path) -> Path | str:
    """The file of weights that a path means, or why there is none."""
    suffixes = (".safetensors", *PICKLES)
    if is_file(path):
        return path if path.suffix in suffixes else "no .safetensors file, and none of torch's"
    if not is_dir(path):
        return "not there"
    if is_file(path / "adapter_config.json"):
        return "adapter_config.json is of another format"
    if is_file(path / _USUAL):
        return path / _USUAL
    found = [file for file in entries(path) if file.suffix in suffixes and is_file(file)]
    if len(found) > 1:
        return "several files of weights: name the one that you mean"
    return found[0] if found else "no file of weights"


def _families(keys: Iterable[str]) -> dict[Family, str]:
    """The families that keys are of -> the first key of each."""
    found: dict[Family, str] = {}
    for key in keys:
        if (family := _family(key)) is not None:
            found.setdefault(family, key)
    return found


def _family(key: str) -> Family | None:
    if key.startswith("base_model.model."):
        return None  # a file of PEFT's, without its directory
    if _LYCORIS.fullmatch(key):
        return "lycoris"
    if _DOWN_UP.fullmatch(key):
        return "kohya"
    if not _A_B.fullmatch(key):
        return None
    if _PREFIX.match(key):
        return "kohya"
    return "diffusers" if parse_key(key) is not None else None
