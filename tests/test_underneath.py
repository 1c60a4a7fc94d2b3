"""What lies below an update in a base, whatever names and layouts either has."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from loratool.adapter import Adapter, LazyUpdate
from loratool.opening import open_checkpoint
from loratool.steps.convert import Convert
from loratool.underneath import weights_below
from loratool.updates import DoRA, LowRank
from tests import updates as some
from tests.diffusion import pipelines
from tests.memory_models import TINY

QKV = "lora_unet_double_blocks_0_img_attn_qkv.weight"


def dora(name: str, shape: tuple[int, int]) -> tuple[LazyUpdate, DoRA]:
    out, width = shape
    added = LowRank(some.randn(1, 2, width), some.randn(2, out, 2), 0.1)
    update = DoRA(added, some.randn(3, out).abs() + 1)
    return LazyUpdate(name, "dora", shape, "F64", lambda: update, rank=2), update


def test_a_fused_name_of_kohya_is_for_the_rows_of_several_modules(tmp_path: Path) -> None:
    pipelines.save("flux", tmp_path / "flux")
    base = open_checkpoint(tmp_path / "flux")
    block = "transformer.transformer_blocks.0.attn."
    wanted = torch.cat([base[f"{block}to_{letter}.weight"].read() for letter in "qkv"])
    lazy, _ = dora(QKV, (wanted.shape[0], wanted.shape[1]))
    adapter = Adapter({QKV: lazy}, naming="kohya")
    (under,) = weights_below(adapter, base).values()
    assert under.shape == tuple(wanted.shape) and torch.equal(under.read(), wanted)
    assert not under.transposed and under.groups == 1


def test_parameters_are_put_together_as_they_are_in_memory(tmp_path: Path) -> None:
    model = TINY["dinov2"].build()
    model.save_pretrained(tmp_path)
    base = open_checkpoint(tmp_path)
    names = [f"dinov2.encoder.layer.0.mlp.{part}_proj.weight" for part in ("gate", "up", "down")]
    parameters = dict(model.named_parameters())
    updates = {name: dora(name, tuple(parameters[name].shape))[0] for name in names}  # type: ignore[arg-type]
    for name, under in weights_below(Adapter(updates), base).items():
        assert name not in base or "down" in name
        assert torch.equal(under.read(), parameters[name])


def test_a_conv1d_is_turned_to_what_the_module_computes_with(tmp_path: Path) -> None:
    name = "transformer.h.0.attn.c_attn.weight"
    stored = some.randn(0, 8, 24).float()
    save_file({name: stored}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
    lazy, update = dora(name, (24, 8))
    base = open_checkpoint(tmp_path)
    (under,) = weights_below(Adapter({name: lazy}), base).values()
    assert under.transposed and torch.equal(under.read(), stored.T)
    found = Convert(to_lora=True, rank=8).run(Adapter({name: lazy}), base)[name].load()
    assert isinstance(found, LowRank)
    wanted = some.delta(update, (24, 8), stored.T)
    assert (some.delta(found, ()) - wanted).norm() <= 1e-6 * wanted.norm()
    assert load_file(tmp_path / "model.safetensors")[name].shape == (8, 24)
