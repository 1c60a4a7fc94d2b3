"""What lycoris-lora trains and saves is merged as its own modules compute, and read back by it."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from lycoris import LycorisNetwork
from safetensors.torch import load_file

import loratool
from loratool.opening import open_adapter, open_checkpoint
from tests.adapter_forms import assert_same_bits
from tests.diffusion import pipelines
from tests.diffusion.adapters import converted, merged, tensors

logging.getLogger("LyCORIS").setLevel(logging.ERROR)
Tensors = dict[str, torch.Tensor]


def unet() -> Any:
    """A UNet of two resolutions with one attention each way."""
    return pipelines.build(
        diffusers.UNet2DConditionModel, block_out_channels=(4, 8), layers_per_block=1,
        norm_num_groups=2, sample_size=8, cross_attention_dim=16, attention_head_dim=2,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    )  # fmt: skip


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The UNet in a folder of its own."""
    folder = tmp_path_factory.mktemp("base") / "unet"
    unet().save_pretrained(folder)
    return folder


@pytest.fixture(autouse=True)
def presets() -> Iterator[None]:
    """lycoris keeps its settings in a class."""
    kept = {
        name: getattr(LycorisNetwork, name)
        for name in ("TARGET_REPLACE_MODULE", "TARGET_REPLACE_NAME", "LORA_PREFIX", "ENABLE_CONV")
    }
    yield
    for name, value in kept.items():
        setattr(LycorisNetwork, name, value)


def network(model: Any, **settings: Any) -> Any:
    """lycoris's network over a model, trained at random."""
    settings = dict(settings)
    LycorisNetwork.apply_preset(
        {
            "target_module": ["Linear", "Conv2d", *settings.pop("also", ())],
            "target_name": [], "enable_conv": True, "lora_prefix": "lycoris",
        }
    )  # fmt: skip
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        made = LycorisNetwork(model, **settings)
    made.apply_to()
    generator = torch.Generator().manual_seed(1)
    for name, parameter in made.named_parameters():
        if "dora_scale" in name:
            noise = 1 + 0.2 * torch.rand(parameter.shape, generator=generator)
            parameter.data *= noise
        elif "scalar" in name:
            parameter.data.fill_(0.7)
        elif name.endswith(("weight", "bias")) and settings["network_module"] == "full":
            parameter.data += 0.05 * torch.randn(parameter.shape, generator=generator)
        else:
            parameter.data.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    return made.eval()


def output(model: Any) -> torch.Tensor:
    """What a UNet makes of a fixed input."""
    generator = torch.Generator().manual_seed(2)
    sample = torch.randn(1, 4, 8, 8, generator=generator)
    text = torch.randn(1, 3, 16, generator=generator)
    with torch.no_grad():
        found: torch.Tensor = model(sample, 5, text).sample
    return found


def merged_output(base: Path, adapter: Path, folder: Path) -> torch.Tensor:
    loratool.merge(base, [(adapter, 1.0)]).save(folder, executor="serial")
    return output(unet().from_pretrained(folder).eval())


def values(folder: Path) -> Tensors:
    return {name: tensor.read() for name, tensor in open_checkpoint(folder).items()}


LOCON = {"network_module": "locon", "lora_dim": 3, "conv_lora_dim": 2, "alpha": 2, "conv_alpha": 1}
LOHA = {**LOCON, "network_module": "loha"}
LOKR = {**LOCON, "network_module": "lokr", "lora_dim": 1, "conv_lora_dim": 1, "factor": 2}
KINDS: dict[str, tuple[dict[str, Any], set[str]]] = {
    "locon": (LOCON, {"low_rank"}),
    "locon-tucker": ({**LOCON, "use_tucker": True}, {"low_rank"}),
    "locon-rs": ({**LOCON, "rs_lora": True}, {"low_rank"}),
    "locon-scalar": ({**LOCON, "use_scalar": True}, {"low_rank"}),
    "dora": ({**LOCON, "weight_decompose": True}, {"dora"}),
    "dora-columns": ({**LOCON, "weight_decompose": True, "wd_on_out": False}, {"dora"}),
    "dora-tucker": ({**LOCON, "weight_decompose": True, "use_tucker": True}, {"dora"}),
    "loha": (LOHA, {"loha"}),
    "loha-tucker": ({**LOHA, "use_tucker": True}, {"loha"}),
    "loha-dora": ({**LOHA, "weight_decompose": True}, {"dora"}),
    "loha-dora-columns": ({**LOHA, "weight_decompose": True, "wd_on_out": False}, {"dora"}),
    "lokr": (LOKR, {"lokr"}),
    "lokr-both": ({**LOKR, "decompose_both": True, "factor": 4}, {"lokr"}),
    "lokr-tucker": ({**LOKR, "use_tucker": True}, {"lokr"}),
    "lokr-whole": ({**LOKR, "full_matrix": True}, {"lokr"}),
    "lokr-dora": ({**LOKR, "weight_decompose": True}, {"dora"}),
    "full": ({"network_module": "full"}, {"dense"}),
    "norms": ({**LOCON, "train_norm": True, "also": ["GroupNorm", "LayerNorm"]},
              {"low_rank", "dense"}),
    "ia3": ({"network_module": "ia3"}, {"ia3"}),
    "ia3-inputs": ({"network_module": "ia3", "train_on_input": True}, {"ia3"}),
}  # fmt: skip


def load(model: Any, file: Path, settings: dict[str, Any]) -> None:
    """Put a file's updates around a model, as lycoris reads it."""
    if settings["network_module"] == "full":
        reader = LycorisNetwork(model, **settings)
        reader.load_weights(str(file))
        reader.apply_to()
        return
    result = network(model, **settings).load_state_dict(load_file(file), strict=False)
    assert not result.unexpected_keys
    assert not [key for key in result.missing_keys if not key.endswith("scalar")]


@pytest.mark.parametrize("kind", KINDS)
def test_what_lycoris_saves_is_merged_as_it_computes(kind: str, base: Path, tmp_path: Path) -> None:
    settings, kinds = KINDS[kind]
    model = unet()
    plain = output(model)
    made = network(model, **settings)
    wanted = output(model)
    change = float((wanted - plain).abs().max())
    close = 1e-4 * max(1.0, change)
    assert change > 1e-2
    file = tmp_path / "trained.safetensors"
    made.save_weights(file, None, {"ss_network_module": "lycoris.kohya"})
    adapter = open_adapter(file)
    assert not adapter.problems and not adapter.notes
    assert {update.kind for update in adapter.values()} == kinds
    assert float((merged_output(base, file, tmp_path / "merged") - wanted).abs().max()) < close

    written = converted(file, "lycoris", tmp_path / "written")
    assert_same_bits(values(tmp_path / "merged"), merged(base, written, tmp_path / "again"))
    assert open_adapter(written).settings["ss_network_module"] == "lycoris.kohya"
    assert not any("lora_mid" in key for key in tensors(written))  # worked into lora_down
    if settings["network_module"] == "locon":
        settings = {**settings, "use_tucker": False, "use_scalar": False}
    again = unet()
    load(again, written / "lycoris.safetensors", settings)
    assert float((output(again) - wanted).abs().max()) < close
