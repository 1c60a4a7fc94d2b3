"""diffusers reads what loratool writes, and loratool merges what diffusers trains, alike."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.loaders.lora_conversion_utils import _convert_kohya_flux_lora_to_diffusers
from safetensors.torch import load_file, save_file

from loratool.adapter import Adapter, LazyUpdate
from loratool.diffusion.adapter_keys import parse_key
from loratool.diffusion.kohya import kohya_layout
from loratool.diffusion.layouts import canonical_shapes
from loratool.engine import Drain, save_adapter
from loratool.opening import open_adapter
from loratool.updates import LowRank
from tests import single_files
from tests.diffusion import pipelines
from tests.diffusion.adapters import (
    changed,
    converted,
    denoiser,
    difference,
    foreign,
    fused,
    merged,
    tensors,
    trained,
)

Saved = Callable[[str], Path]


@pytest.fixture(scope="module")
def base_of(tmp_path_factory: pytest.TempPathFactory) -> Saved:
    """Kind -> a saved pipeline."""

    @cache
    def save(kind: str) -> Path:
        return pipelines.save(kind, tmp_path_factory.mktemp(kind) / kind)

    return save


MIXED = {"rank_pattern": {"to_k": 3}, "alpha_pattern": {"to_q": 1}, "lora_alpha": 4}


@pytest.mark.parametrize("kind", ["sd1", "sdxl", "flux", "sd3"])
def test_mixed_ranks_and_alphas(kind: str, base_of: Saved, tmp_path: Path) -> None:
    base, source = base_of(kind), trained(kind, tmp_path / "lora", **MIXED)
    wanted = fused(kind, source)
    found = merged(base, source, tmp_path / "merged")
    assert difference(found, wanted) < 1e-5
    assert changed(found, base) == len(open_adapter(source)) > 20
    written = converted(source, "diffusers", tmp_path / "written")
    assert difference(fused(kind, written), wanted) < 1e-6
    assert set(map(parse_key, tensors(written))) == set(map(parse_key, tensors(source)))


SETTINGS: dict[str, dict[str, Any]] = {
    "rslora": {"use_rslora": True, "lora_alpha": 3},
    "dora": {"use_dora": True, "lora_alpha": 4},
    "bias": {"lora_bias": True, "lora_alpha": 3, "target_modules": ["to_out.0", "conv1"]},
    "default": {"lora_alpha": 7},
}


@pytest.mark.parametrize("name", SETTINGS)
def test_settings_of_peft(name: str, base_of: Saved, tmp_path: Path) -> None:
    base = base_of("sd1")
    source = trained("sd1", tmp_path / "lora", text=name != "bias", **SETTINGS[name])
    found = merged(base, source, tmp_path / "merged")
    written = converted(source, "diffusers", tmp_path / "written")
    assert difference(fused("sd1", written), found) < 1e-5
    theirs = fused("sd1", source)
    if name == "dora":  # of a text encoder, diffusers loses the magnitudes that it has written
        theirs = {key: value for key, value in theirs.items() if key.startswith("unet.")}
    assert difference(theirs, found) < 1e-5
    back = open_adapter(written)
    assert back.rslora == (name == "rslora") and not back.notes


@pytest.mark.parametrize("kind", ["sd1", "flux"])
def test_without_metadata_the_scale_is_one(kind: str, base_of: Saved, tmp_path: Path) -> None:
    source = trained(kind, tmp_path / "lora", metadata=False, lora_alpha=16)
    adapter = open_adapter(source)
    assert any("scale 1, as diffusers takes it" in note for note in adapter.notes)
    found = merged(base_of(kind), source, tmp_path / "merged")
    assert difference(found, fused(kind, source)) < 1e-5
    told = converted(source, "diffusers", tmp_path / "told", alpha=16.0)
    again = trained(kind, tmp_path / "again", lora_alpha=16)
    assert difference(merged(base_of(kind), told, tmp_path / "m"), fused(kind, again)) < 1e-5


@pytest.mark.parametrize("kind", ["sd1", "sdxl"])
@pytest.mark.parametrize("alpha", [2, 1])
def test_kohya_is_read_by_diffusers(kind: str, alpha: int, base_of: Saved, tmp_path: Path) -> None:
    """One alpha and rank for all: of others diffusers 0.42 forgets the patterns."""
    base, source = base_of(kind), trained(kind, tmp_path / "lora", lora_alpha=alpha)
    written = converted(source, "kohya", tmp_path / "kohya", base)
    wanted = fused(kind, source)
    assert difference(fused(kind, written), wanted) < 1e-5
    file = foreign(written, tmp_path / "foreign.safetensors")
    assert difference(merged(base, file, tmp_path / "merged"), wanted) < 1e-5


def test_kohyas_flux_is_read_by_diffusers(base_of: Saved, tmp_path: Path) -> None:
    """diffusers knows single blocks of the real height only; of double ones it takes any."""
    targets = ["to_q", "to_v", "attn.to_out.0", "add_q_proj", "norm1.linear"]
    regex = (
        rf"transformer_blocks\.\d+\.({'|'.join(targets)}|attn\.to_q|attn\.to_v|attn\.add_q_proj)"
    )
    source = trained("flux", tmp_path / "lora", target_modules=regex, lora_alpha=3)
    written = converted(source, "kohya", tmp_path / "kohya", base_of("flux"))
    wanted = fused("flux", source)
    assert difference(fused("flux", written), wanted) < 1e-5
    assert any("img_attn_qkv" in key for key in tensors(written))
    found = merged(base_of("flux"), written, tmp_path / "merged")
    assert difference(found, wanted) < 1e-5


def test_single_blocks_of_the_real_flux(tmp_path: Path) -> None:
    """Rows of linear1: queries, values and the MLP's, and zeros for keys, which have no update."""
    shapes = canonical_shapes(single_files.flux(3072, double=1, single=1))
    block = "transformer.single_transformer_blocks.0."
    layout = {
        name: tuple((row.module, row.start, row.stop) for row in rows)
        for name, rows in kohya_layout(shapes).items()
        if name == "lora_unet_single_blocks_0_linear1"
    }
    generator = torch.Generator().manual_seed(0)
    factors = {
        module: LowRank(
            torch.randn(rank, 4, generator=generator),
            torch.randn(height, rank, generator=generator),
            scale,
        )
        for module, height, rank, scale in (
            (f"{block}attn.to_q", 3072, 2, 1.0), (f"{block}attn.to_v", 3072, 1, 0.5),
            (f"{block}proj_mlp", 12288, 1, 3.0),
        )
    }  # fmt: skip
    updates = {
        f"{module}.weight": LazyUpdate(
            f"{module}.weight", "low_rank", (len(f.b), 4), "F32", lambda f=f: f, rank=f.rank
        )
        for module, f in factors.items()
    }
    adapter = Adapter(updates, layout=layout, format="kohya")
    save_adapter(adapter, tmp_path / "kohya", Drain("serial"))
    read = _convert_kohya_flux_lora_to_diffusers(load_file(tmp_path / "kohya" / "lora.safetensors"))
    for module, factor in factors.items():
        delta = read[f"{module}.lora_B.weight"].double() @ read[f"{module}.lora_A.weight"].double()
        wanted = factor.scale * factor.b.double() @ factor.a.double()
        torch.testing.assert_close(delta, wanted, rtol=1e-6, atol=1e-6)
    assert not read[f"{block}attn.to_k.lora_B.weight"].any()
    back = open_adapter(tmp_path / "kohya")
    assert back.keys() == adapter.keys()
    for name, update in back.items():
        found, known = update.load(), factors[name.removesuffix(".weight")]
        assert isinstance(found, LowRank) and found.scale == known.scale
        assert torch.equal(found.a, known.a) and torch.equal(found.b, known.b)


def old_keys(source: Path, file: Path) -> Path:
    """The same adapter with the keys of diffusers before 0.22."""
    renamed = {}
    for key, value in tensors(source).items():
        way = "down" if ".lora_A." in key else "up"
        module = key.partition(".lora_")[0]
        if key.startswith("text_encoder."):
            module = f"{module.removesuffix('.fc1')}.fc1" if module.endswith("fc1") else module
            renamed[f"{module}.lora_linear_layer.{way}.weight"] = value
            continue
        attention, _, part = module.removesuffix(".0").rpartition(".")
        if part in ("to_q", "to_k", "to_v", "to_out"):
            renamed[f"{attention}.processor.{part}_lora.{way}.weight"] = value
        else:
            renamed[f"{module}.lora.{way}.weight"] = value
    save_file(renamed, file)
    return file


@pytest.mark.parametrize("bare", [False, True])
def test_keys_of_attention_processors(bare: bool, base_of: Saved, tmp_path: Path) -> None:
    """The oldest files hold a UNet alone, whose keys name no component."""
    source = trained("sd1", tmp_path / "lora", text=not bare, metadata=False)
    file = old_keys(source, tmp_path / "old.safetensors")
    if bare:
        state = {key.removeprefix("unet."): value for key, value in load_file(file).items()}
        save_file(state, file)
    assert any("processor.to_q_lora.down" in key for key in load_file(file))
    found = merged(base_of("sd1"), file, tmp_path / "merged")
    assert difference(found, fused("sd1", source)) < 1e-5


def test_alphas_beside_flux_keys(base_of: Saved, tmp_path: Path) -> None:
    source = trained("flux", tmp_path / "lora", text=False, metadata=False)
    state = tensors(source)
    modules = {key.partition(".lora_")[0] for key in state}
    state |= {f"{module}.alpha": torch.tensor(5.0) for module in modules}
    file = tmp_path / "pytorch_lora_weights.safetensors"
    save_file(state, file)
    assert not open_adapter(file).notes
    found = merged(base_of("flux"), file, tmp_path / "merged")
    assert difference(found, fused("flux", tmp_path)) < 1e-5


@pytest.mark.parametrize("kind", ["sd1", "sdxl", "flux"])
def test_of_a_unet_or_transformer_alone(kind: str, base_of: Saved, tmp_path: Path) -> None:
    """PEFT's own directory of one component becomes a file for the pipeline."""
    source = trained(kind, tmp_path / "lora", text=False, lora_alpha=5)
    component = base_of(kind) / denoiser(kind)
    peft = converted(source, "peft", tmp_path / "peft")
    assert difference(merged(base_of(kind), peft, tmp_path / "m"), fused(kind, source)) < 1e-5
    assert changed(merged(component, peft, tmp_path / "c"), component) == len(open_adapter(peft))
    written = converted(peft, "diffusers", tmp_path / "written", component)
    assert difference(fused(kind, written), fused(kind, source)) < 1e-6
