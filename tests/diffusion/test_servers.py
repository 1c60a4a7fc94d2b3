"""What loratool.servers says of diffusers, tried in diffusers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from safetensors.torch import save_file

from tests.diffusion.pipelines import unet

MODULE = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
KOHYA = f"lora_unet_{MODULE.replace('.', '_')}"
Tensors = dict[str, torch.Tensor]


def factors(prefix: str = "unet.", ends: tuple[str, str] = ("lora_A", "lora_B")) -> Tensors:
    torch.manual_seed(0)
    return {
        f"{prefix}{MODULE}.{ends[0]}.weight": torch.randn(2, 4),
        f"{prefix}{MODULE}.{ends[1]}.weight": torch.randn(4, 2),
    }


def kohya() -> Tensors:
    names = (f"{KOHYA}.lora_down.weight", f"{KOHYA}.lora_up.weight")
    found = dict(zip(names, factors().values(), strict=True))
    return {**found, f"{KOHYA}.alpha": torch.tensor(1.0)}


def loaded(folder: Path, tensors: Tensors) -> Any:
    """A UNet with an adapter, loaded as a pipeline loads it."""
    save_file(tensors, folder / "pytorch_lora_weights.safetensors")
    model = unet("sd1")
    pipeline = diffusers.StableDiffusionPipeline
    state, alphas, metadata = pipeline.lora_state_dict(folder, return_lora_metadata=True)
    pipeline.load_lora_into_unet(state, network_alphas=alphas, unet=model, metadata=metadata)
    return model


def config(model: Any) -> Any:
    (found,) = model.peft_config.values()
    return found


def test_keys_of_components_and_of_kohya_are_loaded(tmp_path: Path) -> None:
    assert config(loaded(tmp_path, factors())).lora_alpha == 2
    assert config(loaded(tmp_path, kohya())).lora_alpha == 1


def test_peft_names_are_ignored(tmp_path: Path) -> None:
    assert not hasattr(loaded(tmp_path, factors("base_model.model.")), "peft_config")


def test_dora_of_kohya_is_ignored_and_that_of_peft_is_not(tmp_path: Path) -> None:
    assert not config(
        loaded(tmp_path, {**kohya(), f"{KOHYA}.dora_scale": torch.ones(4, 1)})
    ).use_dora
    magnitude = {f"unet.{MODULE}.lora_magnitude_vector": torch.ones(4)}
    assert config(loaded(tmp_path, {**factors(), **magnitude})).use_dora


def test_other_methods_are_refused(tmp_path: Path) -> None:
    names = [f"{KOHYA}.hada_{w}_{side}" for w in ("w1", "w2") for side in "ab"]
    loha = {name: torch.randn(4, 4) for name in names}
    with pytest.raises(ValueError, match="have not been correctly renamed"):
        loaded(tmp_path, {**loha, f"{KOHYA}.alpha": torch.tensor(1.0)})
    peft = {key.replace(KOHYA, f"unet.{MODULE}"): value for key, value in loha.items()}
    with pytest.raises(IndexError):
        loaded(tmp_path, peft)


def test_what_is_kept_whole_stays_after_unloading(tmp_path: Path) -> None:
    norm = torch.full((4,), 7.0)
    model = loaded(tmp_path, {**factors(), "unet.conv_norm_out.weight": norm})
    model.unload_lora()
    assert torch.equal(model.conv_norm_out.weight, norm)


def test_ranks_of_their_own_are_taken(tmp_path: Path) -> None:
    other = {key.replace("to_q", "to_k"): value for key, value in factors().items()}
    other = {k: v[:1] if "lora_A" in k else v[:, :1] for k, v in other.items()}
    other = {key: value.contiguous() for key, value in other.items()}
    found = loaded(tmp_path, {**factors(), **other})
    assert found.get_submodule(MODULE).scaling == {"default_0": 1.0}
    assert found.get_submodule(MODULE.replace("to_q", "to_k")).scaling == {"default_0": 1.0}
