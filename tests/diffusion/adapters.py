"""Adapters of tiny pipelines: trained and fused by diffusers, and bases in both layouts."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers.training_utils import _collate_lora_metadata
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from safetensors.torch import load_file, save_file

import loratool
from loratool.diffusion.layouts import single_file_modules
from loratool.diffusion.text import canonical_name
from loratool.engine import Drain, save_adapter
from loratool.opening import open_adapter, open_checkpoint
from loratool.steps.convert import Convert
from tests.diffusion import pipelines
from tests.single_files import UNET, State

# The denoiser's modules that are trained, and the text encoder's.
_UNET = (
    r"(mid_block|down_blocks\.[01]|up_blocks\.[01])\.(attentions|resnets)\.[01]\."
    r".*(to_q|to_k|to_out\.0|ff\.net\.2|proj_in|conv1|conv_shortcut)"
)
TARGETS: Mapping[str, str | list[str]] = {
    "unet": _UNET,
    "transformer": [
        "to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "proj_mlp", "ff.net.2",
        "norm_out.linear", "norm1.linear",
    ],
}  # fmt: skip
TEXT = ("q_proj", "out_proj", "fc1")
_TEXT_PREFIX = {
    "sd1": "cond_stage_model.transformer.", "sdxl": "conditioner.embedders.0.transformer.",
}  # fmt: skip


def denoiser(kind: str) -> str:
    """The component of a pipeline that is no encoder."""
    return "transformer" if kind in ("flux", "sd3") else "unet"


def randomize(model: torch.nn.Module, seed: int) -> None:
    """Give every parameter of an adapter a random value."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            noise = torch.randn(parameter.shape, generator=generator)
            is_magnitude = "magnitude" in name
            parameter.data.copy_(
                parameter.data * (1 + 0.2 * noise) if is_magnitude else 0.3 * noise
            )


def trained(
    kind: str,
    folder: Path,
    text: bool = True,
    metadata: bool = True,
    seed: int = 0,
    **settings: Any,
) -> Path:
    """What diffusers saves of a pipeline with PEFT's adapters in it."""
    pipeline, name = pipelines.pipeline(kind), denoiser(kind)
    config = {"r": 2, "lora_alpha": 2, "target_modules": TARGETS[name], **settings}
    models = {name: getattr(pipeline, name)}
    models[name].add_adapter(LoraConfig(**config))
    if text:
        models["text_encoder"] = pipeline.text_encoder
        config = {**config, "target_modules": list(TEXT), "rank_pattern": {}, "alpha_pattern": {}}
        pipeline.text_encoder.add_adapter(LoraConfig(**config))
    for number, model in enumerate(models.values()):
        randomize(model, seed + number)
    layers = {f"{n}_lora_layers": get_peft_model_state_dict(m) for n, m in models.items()}
    more = _collate_lora_metadata(models) if metadata else {}
    pipeline.save_lora_weights(folder, **layers, **more)
    return folder


def fused(kind: str, adapter: Path, **settings: Any) -> dict[str, torch.Tensor]:
    """The parameters of a pipeline into which diffusers has put an adapter."""
    pipeline = pipelines.pipeline(kind)
    pipeline.load_lora_weights(adapter, **settings)
    pipeline.fuse_lora(components=[denoiser(kind), "text_encoder"])
    return {
        f"{component}.{name.replace('.base_layer', '')}": value
        for component, model in pipeline.components.items()
        if isinstance(model, torch.nn.Module)
        for name, value in model.state_dict().items()
        if "lora_" not in name
    }


def merged(base: Path, adapter: Path, folder: Path) -> dict[str, torch.Tensor]:
    """The parameters of a base into which loratool has put an adapter."""
    loratool.merge(base, [(adapter, 1.0)]).save(folder, executor="serial")
    return {name: tensor.read() for name, tensor in open_checkpoint(folder).items()}


def difference(one: Mapping[str, torch.Tensor], other: Mapping[str, torch.Tensor]) -> float:
    """The largest absolute difference of any parameter that both know."""
    names = one.keys() & other.keys()
    assert len(names) > 50
    return max(float((one[name].float() - other[name].float()).abs().max()) for name in names)


def changed(one: Mapping[str, torch.Tensor], base: Path) -> int:
    """How many parameters are not the base's."""
    return sum(not torch.equal(t.read(), one[n]) for n, t in open_checkpoint(base).items())


def converted(source: Path, form: str, folder: Path, base: Path | None = None, **more: Any) -> Path:
    """An adapter in another format."""
    adapter = Convert(format=form, **more).run(
        open_adapter(source), None if base is None else open_checkpoint(base)
    )
    save_adapter(adapter, folder, Drain("serial"))
    return folder


def tensors(folder: Path) -> State:
    """The tensors of the one file of weights in an adapter's directory."""
    (file,) = folder.glob("*.safetensors")
    found: State = load_file(file)
    return found


def foreign(source: Path, file: Path, metadata: Mapping[str, str] | None = None) -> Path:
    """The same tensors in a file that does not know that loratool has written it."""
    save_file(tensors(source), file, metadata=dict(metadata or {}))
    return file


def single_file(kind: str, folder: Path, file: Path) -> Path:
    """A pipeline's denoiser and first text encoder as its makers' code stores them."""
    state = {
        canonical_name(name): tensor.read() for name, tensor in open_checkpoint(folder).items()
    }
    shapes = {name: tuple(tensor.shape) for name, tensor in state.items()}
    made: State = {}
    for name, rows in single_file_modules(shapes).items():
        for leaf in ("weight", "bias"):
            parts = [state.get(f"{row.module}.{leaf}") for row in rows]
            if all(part is not None for part in parts):
                cut = [p[r.start : r.stop] for p, r in zip(parts, rows, strict=True)]  # type: ignore[index]
                made[f"{UNET}{name}.{leaf}"] = torch.cat(cut).contiguous()
    start = _TEXT_PREFIX.get(kind, "text_encoders.clip_l.transformer.")
    for name, tensor in state.items():
        if name.startswith("text_encoder."):
            made[start + name.removeprefix("text_encoder.")] = tensor.contiguous()
    save_file(made, file)
    return file
