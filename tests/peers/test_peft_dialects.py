"""Adapters that are PEFT's but for keys or orders merge as PEFT's own do."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import loratool
from loratool.errors import LoratoolError
from loratool.opening import open_adapter
from tests.peers.test_peft_kinds import CASES, made, merge

Tensors = dict[str, torch.Tensor]
PREFIX = "base_model.model."


def rename(folder: Path, change: Callable[[str], str]) -> None:
    file = folder / "adapter" / "adapter_model.safetensors"
    tensors = load_file(file)
    save_file({change(key): value for key, value in tensors.items()}, file)


def configure(folder: Path, **settings: object) -> None:
    file = folder / "adapter" / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **settings}))


@pytest.mark.parametrize(
    ("change", "word"),
    [
        (lambda key: key.replace(".weight", ".default.weight"), "carry the adapter's name"),
        (lambda key: key.removeprefix(PREFIX), "lack the prefix"),
        (lambda key: f"module.{key}", "names of wrappers"),
    ],
)
def test_keys_as_in_memory(change: Callable[[str], str], word: str, tmp_path: Path) -> None:
    made(CASES["dora"], tmp_path)
    wanted = merge(tmp_path)
    rename(tmp_path, change)
    assert any(word in note for note in open_adapter(tmp_path / "adapter").notes)
    found = merge(tmp_path, place="again")
    assert all(torch.equal(found[key], value) for key, value in wanted.items())


def test_one_key_without_the_prefix_is_no_dialect(tmp_path: Path) -> None:
    made(CASES["rslora"], tmp_path)
    rename(tmp_path, lambda key: key.removeprefix(PREFIX) if "square.lora_A" in key else key)
    with pytest.raises(LoratoolError, match="unexpected key"):
        merge(tmp_path)


def test_an_old_merged_linear(tmp_path: Path) -> None:
    """Queries and values of a fused weight that is stored as (in, out)."""
    made(CASES["Conv1D"], tmp_path)
    base = load_file(tmp_path / "base.safetensors")["fused.weight"]  # (18, 24)
    a, b = torch.randn(8, 18), torch.randn(16, 4, 1)
    key = f"{PREFIX}fused"
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    save_file({f"{key}.lora_A.weight": a, f"{key}.lora_B.weight": b}, file)
    configure(tmp_path, enable_lora=[True, False, True], r=4, lora_alpha=8)
    delta = torch.zeros(24, 18)
    delta[:8] = 2 * b[:8, :, 0] @ a[:4]
    delta[16:] = 2 * b[8:, :, 0] @ a[4:]
    found = merge(tmp_path)["fused.weight"]
    torch.testing.assert_close(found, base + delta.T, rtol=1e-5, atol=1e-5)
    configure(tmp_path, enable_lora=[True, True, True])
    with pytest.raises(LoratoolError, match="enable_lora"):
        merge(tmp_path)


def test_torchtune_s_own_file(tmp_path: Path) -> None:
    heads, size, width = 2, 4, 8
    torch.manual_seed(0)
    base = {f"model.layers.0.self_attn.{m}_proj.weight": torch.randn(8, width) for m in "qv"}
    (tmp_path / "base").mkdir()
    save_file(base, tmp_path / "base" / "model.safetensors")
    config = {
        "model_type": "llama", "architectures": ["LlamaForCausalLM"], "num_attention_heads": heads,
        "num_key_value_heads": heads, "hidden_size": width,
    }  # fmt: skip
    (tmp_path / "base" / "config.json").write_text(json.dumps(config))
    a, b = torch.randn(2, width), torch.randn(heads * size, 2)
    pairs = b.reshape(heads, 2, size // 2, 2).transpose(1, 2).reshape(heads * size, 2)
    state = {
        "layers.0.attn.q_proj.lora_a.weight": a, "layers.0.attn.q_proj.lora_b.weight": pairs,
        "layers.0.attn.v_proj.lora_a.weight": a, "layers.0.attn.v_proj.lora_b.weight": b,
    }  # fmt: skip
    (tmp_path / "adapter").mkdir()
    torch.save(state, tmp_path / "adapter" / "adapter_0.pt")
    settings = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": ["q_proj"]}
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps(settings))
    assert any("give the base" in p.message for p in open_adapter(tmp_path / "adapter").problems)
    loratool.merge(tmp_path / "base", [(tmp_path / "adapter", 1.0)]).save(tmp_path / "merged")
    found = load_file(tmp_path / "merged" / "model.safetensors")
    for name, value in base.items():
        torch.testing.assert_close(found[name], value + b @ a, rtol=1e-5, atol=1e-5)


def test_unsloth_s_former_order_of_experts(tmp_path: Path) -> None:
    torch.manual_seed(0)
    base = torch.randn(3, 6, 5)
    save_file({"m.experts.down_proj": base}, tmp_path / "base.safetensors")
    a, b = torch.randn(3 * 2, 5), torch.randn(6, 3 * 2)
    (tmp_path / "adapter").mkdir()
    key = f"{PREFIX}m.experts.lora"
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    save_file({f"{key}_A.weight": a, f"{key}_B.weight": b}, file)
    settings = {
        "peft_type": "LORA", "r": 2, "lora_alpha": 2, "peft_version": "0.21.2",
        "target_parameters": ["experts.down_proj"], "lora_B_layout": "grouped_by_expert",
    }  # fmt: skip
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps(settings))
    by_expert = b.reshape(6, 3, 2).permute(1, 0, 2) @ a.reshape(3, 2, 5)
    found = merge(tmp_path)["m.experts.down_proj"]
    torch.testing.assert_close(found, base + by_expert, rtol=1e-5, atol=1e-5)
    configure(tmp_path, lora_B_layout="rank_major")
    by_rank = b.reshape(6, 2, 3).permute(2, 0, 1) @ a.reshape(3, 2, 5)
    found = merge(tmp_path, place="again")["m.experts.down_proj"]
    torch.testing.assert_close(found, base + by_rank, rtol=1e-5, atol=1e-5)
    configure(tmp_path, lora_B_layout="sideways")
    with pytest.raises(LoratoolError, match="sideways"):
        merge(tmp_path, place="never")
