"""What loratool.servers says of diffusers, tried in diffusers."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any

import diffusers
import peft
import pytest
import torch
from safetensors.torch import save_file

import loratool
from tests.cli.tiny import done
from tests.cli.tiny import loratool as command
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
    """A UNet with an adapter of these tensors."""
    save_file(tensors, folder / "pytorch_lora_weights.safetensors")
    return load(folder)


def load(folder: Path) -> Any:
    """A UNet with an adapter, loaded as a pipeline loads it."""
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


CASES = {
    "plain": peft.LoraConfig(r=4, lora_alpha=6, target_modules=["to_q", "conv_in"]),
    "patterns": peft.LoraConfig(
        r=4, lora_alpha=6, use_rslora=True, target_modules=["to_q", "to_k"],
        rank_pattern={"to_k": 2}, alpha_pattern={"to_q": 3},
    ),
    "LoHa": peft.LoHaConfig(r=2, alpha=3, target_modules=["to_q", "to_k"]),
    "DoRA": peft.LoraConfig(r=4, use_dora=True, target_modules=["to_q"]),
    "a norm": peft.LoraConfig(r=4, target_modules=["to_q"], modules_to_save=["conv_norm_out"]),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_what_is_cured_is_what_peft_merges(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    classes = {"unet": ["diffusers", "UNet2DConditionModel"]}
    unet("sd1").save_pretrained("base/unet")
    index = {"_class_name": "StableDiffusionPipeline", **classes}
    Path("base/model_index.json").write_text(json.dumps(index))
    model = peft.get_peft_model(unet("sd1"), CASES[name])
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if parameter.requires_grad and "modules_to_save" not in key:
                noise = 0.1 * torch.randn(parameter.shape)
                parameter.copy_(parameter + noise if "magnitude" in key else noise)
    model.save_pretrained("adapter")
    result = loratool.validate("adapter", servers=["diffusers"]).data["servers"]["diffusers"]
    with_base = loratool.validate("adapter", "base/unet", servers=["diffusers"])
    assert not result["ready"] and with_base.data["servers"]["diffusers"]["findings"] == [
        {**f, "cure": f["cure"].replace("BASE", "base/unet"),
         "note": f["note"].replace("BASE", "base/unet")}
        for f in result["findings"]
    ]  # fmt: skip
    for line in result["commands"]:
        done(command(*shlex.split(line.replace("BASE", "base"))[1:]))
    assert loratool.validate("adapter-diffusers", "base", servers=["diffusers"]).ok
    found = load(Path("adapter-diffusers"))
    found.fuse_lora()
    found.unload_lora()
    wanted = model.merge_and_unload().state_dict()
    for key, value in found.state_dict().items():
        torch.testing.assert_close(value, wanted[key], rtol=1e-5, atol=1e-6, msg=key)
