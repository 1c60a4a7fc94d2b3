"""What mlx_lm itself trains, loads and fuses is what loratool reads, writes and merges."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from loratool.opening import open_adapter
from tests.adapter_forms import Tensors, convert, merged, save_base
from tests.models import Pair
from tests.peft_files import random_factors, write_adapter

mx = pytest.importorskip("mlx.core")
nn = pytest.importorskip("mlx.nn")
models = pytest.importorskip("mlx_lm.models.llama")
layers = pytest.importorskip("mlx_lm.models.switch_layers")
tuner = pytest.importorskip("mlx_lm.tuner.utils")
utils = pytest.importorskip("mlx.utils")


def to_torch(value: Any) -> torch.Tensor:
    return torch.from_numpy(np.array(value.astype(mx.float32)))


def llama(base: Path) -> Any:
    """The model of a directory in MLX."""
    config = json.loads((base / "config.json").read_text())
    config["rope_theta"] = 10000.0
    config["rope_scaling"] = None
    model = models.Model(models.ModelArgs.from_dict(config))
    model.load_weights(list(model.sanitize(mx.load(str(base / "model.safetensors"))).items()))
    return model


def fused(model: Any) -> Tensors:
    """All weights after MLX has worked the adapter into them."""
    found = [(n, m.fuse()) for n, m in model.named_modules() if hasattr(m, "fuse")]
    model.update_modules(utils.tree_unflatten(found))
    return {name: to_torch(value) for name, value in utils.tree_flatten(model.parameters())}


def compare(found: Tensors, wanted: Tensors, least: int, off: float = 2e-5) -> None:
    assert len(found.keys() & wanted.keys()) >= least
    for name, value in found.items():
        if name in wanted:
            torch.testing.assert_close(value, wanted[name], atol=off, rtol=1e-5, msg=name)


KEYS = {
    "usual": ["self_attn.q_proj", "self_attn.v_proj", "mlp.down_proj"],
    "all": None,
    "tables": ["self_attn.k_proj", "model.embed_tokens", "lm_head"],
}


def trained(model: Any, folder: Path, kind: str, keys: list[str] | None, layer_count: int) -> None:
    """Give a model random factors and save them as mlx_lm's training does."""
    parameters = {"rank": 4, "scale": 3.0, "dropout": 0.0, "keys": keys}
    model.freeze()
    tuner.linear_to_lora_layers(model, layer_count, dict(parameters), use_dora=kind == "dora")
    mx.random.seed(0)
    changed = [
        (name, value + 0.1 * mx.random.normal(value.shape))
        for name, value in utils.tree_flatten(model.trainable_parameters())
    ]
    model.load_weights(changed, strict=False)
    folder.mkdir()
    mx.save_safetensors(
        str(folder / "adapters.safetensors"),
        dict(utils.tree_flatten(model.trainable_parameters())),
    )
    config = {
        "fine_tune_type": kind, "num_layers": layer_count, "lora_parameters": parameters,
        "model": "org/base", "seed": 0,
    }  # fmt: skip
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=4))


@pytest.mark.parametrize("kind", ["lora", "dora"])
@pytest.mark.parametrize("case", KEYS)
def test_what_mlx_trains_merges_as_mlx_fuses(
    case: str, kind: str, pair_of: Callable[[str], Pair], tmp_path: Path
) -> None:
    base = pair_of("llama").base
    model = llama(base)
    trained(model, tmp_path / "adapter", kind, KEYS[case], 1)
    adapter = open_adapter(tmp_path / "adapter")
    assert adapter.base_name == "org/base"
    assert not adapter.problems
    found = merged(base, tmp_path / "adapter", tmp_path / "merged")
    wanted = fused(model)
    compare(found, wanted, least=20)
    plain = load_file(base / "model.safetensors")
    assert sum(not torch.equal(plain[n], v) for n, v in found.items()) == len(adapter)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_mlx_loads_what_is_written(
    dtype: torch.dtype, pair_of: Callable[[str], Pair], tmp_path: Path
) -> None:
    base = pair_of("llama").base
    shapes = {f"model.layers.{n}.self_attn.q_proj": (32, 32) for n in range(2)}
    factors = random_factors({**shapes, "lm_head": (64, 32)}, 4, 0)
    factors |= random_factors({"model.layers.1.mlp.up_proj": (48, 32)}, 2, 1)
    typed = {name: (a.to(dtype), b.to(dtype)) for name, (a, b) in factors.items()}
    source = write_adapter(
        tmp_path / "peft", typed, alpha=8, rank_pattern={"up_proj": 2},
        alpha_pattern={"model.layers.1.self_attn.q_proj": 6, "lm_head": 2},
    )  # fmt: skip
    path = convert(source, "mlx", tmp_path / "mlx")
    found = merged(base, path, tmp_path / "merged")
    model = llama(base)
    tuner.load_adapters(model, str(path))
    # MLX multiplies in the factors' own type.
    compare(found, fused(model), least=20, off=2e-5 if dtype == torch.float32 else 5e-3)


def test_a_full_fine_tune_replaces_tensors(pair_of: Callable[[str], Pair], tmp_path: Path) -> None:
    pair = pair_of("llama")
    tuned = load_file(pair.tuned / "model.safetensors")
    chosen = {n: v for n, v in tuned.items() if "layers.1." in n}
    folder = tmp_path / "adapter"
    folder.mkdir()
    save_file(chosen, folder / "adapters.safetensors")
    config = {"fine_tune_type": "full", "num_layers": 1, "lora_parameters": None}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    found = merged(pair.base, folder, tmp_path / "merged")
    assert all(torch.equal(found[n], v) for n, v in chosen.items())
    again = convert(folder, "mlx", tmp_path / "again")
    model = llama(pair.base)
    tuner.load_adapters(model, str(again))
    compare(found, fused(model), least=20)


class Moe(nn.Module):  # type: ignore[misc, name-defined]
    """A layer with experts, and no other weights."""

    def __init__(self, number: int, width: int, inner: int) -> None:
        super().__init__()
        self.layers = [Layer(number, width, inner)]


class Layer(nn.Module):  # type: ignore[misc, name-defined]
    def __init__(self, number: int, width: int, inner: int) -> None:
        super().__init__()
        self.mlp = Block(number, width, inner)


class Block(nn.Module):  # type: ignore[misc, name-defined]
    def __init__(self, number: int, width: int, inner: int) -> None:
        super().__init__()
        self.switch_mlp = layers.SwitchGLU(width, inner, number)


def moe_base(model: Any, folder: Path) -> Path:
    """The same weights as transformers has them in memory."""
    parts = {n: to_torch(v) for n, v in utils.tree_flatten(model.parameters())}
    switch = "layers.0.mlp.switch_mlp"
    return save_base(folder, _joined(parts, switch))


def _joined(parts: Tensors, switch: str) -> Tensors:
    gate, up = (parts[f"{switch}.{which}_proj.weight"] for which in ("gate", "up"))
    return {
        "layers.0.mlp.experts.gate_up_proj": torch.cat([gate, up], dim=1),
        "layers.0.mlp.experts.down_proj": parts[f"{switch}.down_proj.weight"],
    }


@pytest.mark.parametrize("old", [False, True])
@pytest.mark.parametrize("which", [("gate", "up", "down"), ("up",), ("down", "gate")])
def test_experts_merge_as_mlx_fuses(which: tuple[str, ...], old: bool, tmp_path: Path) -> None:
    mx.random.seed(1)
    model = Moe(3, 8, 6)
    base = moe_base(model, tmp_path / "base")
    trained(model, tmp_path / "adapter", "lora", [f"mlp.switch_mlp.{w}_proj" for w in which], -1)
    if old:  # as mlx_lm had it first: (E r, in)
        file = tmp_path / "adapter" / "adapters.safetensors"
        state = load_file(file)
        save_file({n: v.flatten(0, 1) if "lora_a" in n else v for n, v in state.items()}, file)
    wanted = _joined(fused(model), "layers.0.mlp.switch_mlp")
    assert not open_adapter(tmp_path / "adapter").problems
    compare(merged(base, tmp_path / "adapter", tmp_path / "merged"), wanted, least=2)
    again = convert(tmp_path / "adapter", "mlx", tmp_path / "again")
    compare(merged(base, again, tmp_path / "twice"), wanted, least=2)
    mx.random.seed(1)
    fresh = Moe(3, 8, 6)
    tuner.load_adapters(fresh, str(again))
    compare(_joined(fused(fresh), "layers.0.mlp.switch_mlp"), wanted, least=2)
