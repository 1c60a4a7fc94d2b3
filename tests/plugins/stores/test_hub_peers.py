"""What transformers and PEFT publish, used by name."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file

from tests.cli.tiny import done
from tests.cli.tiny import loratool as run
from tests.hub_server import HubServer

PUBLISH = """
import sys, torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

torch.manual_seed(0)
config = LlamaConfig(
    vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
    intermediate_size=48, max_position_embeddings=24,
)
LlamaForCausalLM(config).push_to_hub("anna/llama", max_shard_size="60KB")
model = LlamaForCausalLM.from_pretrained("anna/llama")
settings = LoraConfig(target_modules=["q_proj", "up_proj"], init_lora_weights=False, r=2)
tuned = get_peft_model(model, settings)
tuned.push_to_hub("anna/adapter")
tuned.merge_and_unload().save_pretrained(sys.argv[1])
"""


def test_what_peft_pushed_is_pulled_merged_and_exported(hub: HubServer, tmp_path: Path) -> None:
    subprocess.run(
        [sys.executable, "-c", PUBLISH, str(tmp_path / "theirs")],
        env=hub.environment(tmp_path / "peft", token="hf_anna"),
        check=True,
        capture_output=True,
    )
    done(run("pull", "anna/adapter", "-o", tmp_path / "adapter", "--base", "anna/llama"))
    assert (tmp_path / "adapter" / "adapter_config.json").is_file()
    found = done(run("merge", "anna/adapter", "-o", tmp_path / "ours"))
    assert "base: anna/llama" in found.err
    shards = list((tmp_path / "ours").glob("model-*.safetensors"))
    assert len(shards) > 1
    ours = {name: value for file in shards for name, value in load_file(file).items()}
    theirs = load_file(tmp_path / "theirs" / "model.safetensors")
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        torch.testing.assert_close(ours[name], value, rtol=0, atol=1e-6)
    done(run("export", "anna/adapter", "-o", tmp_path / "onnx"))
    for name in ("prefill.onnx", "decode.onnx", "model.onnx.data"):
        assert (tmp_path / "onnx" / name).is_file()
