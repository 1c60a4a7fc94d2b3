"""ONNX files of tiny random models, made by every exporter that people use."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import torch
import transformers
from transformers.exporters.exporter_onnx import OnnxConfig, OnnxExporter

from loratool.adapter import Adapter
from loratool.checkpoint import Checkpoint
from loratool.quiet import quiet
from loratool.steps.merge import Merge
from loratool.updates import LowRank
from tests.lazy import adapter_of, lazy_tensor

VOCABULARY = 48
_SIZES = {
    "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24,
    "initializer_range": 0.3,
}  # fmt: skip
_TEXT = {"vocab_size": VOCABULARY, "max_position_embeddings": 32}


def bert(layers: int = 1) -> Any:
    sizes = {**_SIZES, **_TEXT, "num_hidden_layers": layers}
    return transformers.BertForMaskedLM(transformers.BertConfig(**sizes))


def llama(layers: int = 1, tied: bool = False) -> Any:
    sizes = {**_SIZES, **_TEXT, "num_hidden_layers": layers}
    config = transformers.LlamaConfig(
        **sizes, num_key_value_heads=1, head_dim=8, tie_word_embeddings=tied,
        use_cache=False,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config)


def gpt2() -> Any:
    config = transformers.GPT2Config(
        n_embd=16, n_layer=1, n_head=2, n_positions=32, vocab_size=VOCABULARY,
        initializer_range=0.3, use_cache=False, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    return transformers.GPT2LMHeadModel(config)


def vit() -> Any:
    config = transformers.ViTConfig(**_SIZES, image_size=8, patch_size=4, num_labels=3)
    return transformers.ViTForImageClassification(config)


def trained(build: Callable[[], Any], seed: int = 0) -> Any:
    """A model whose biases and norms are no longer zeros and ones."""
    model = fresh(build, seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def fresh(build: Callable[[], Any], seed: int = 0) -> Any:
    """A model as it is made: all biases zero, all norms one."""
    torch.manual_seed(seed)
    return build().eval()


def feeds_of(model: Any) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(5)
    if model.config.model_type == "vit":
        return {"pixel_values": torch.randn(2, 3, 8, 8, generator=generator)}
    mask = torch.ones(2, 7, dtype=torch.int64)
    mask[1, 5:] = 0
    feeds = {
        "input_ids": torch.randint(3, VOCABULARY, (2, 7), generator=generator),
        "attention_mask": mask,
    }
    if model.config.model_type == "bert":
        feeds["token_type_ids"] = torch.zeros_like(mask)
    return feeds


class _Logits(torch.nn.Module):
    def __init__(self, model: Any, names: list[str]) -> None:
        super().__init__()
        self.model = model
        self.names = names

    def forward(self, *values: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.model(**dict(zip(self.names, values, strict=True))).logits
        return logits


def export(model: Any, how: str, path: Path) -> None:
    """Export with fixed shapes, which is faster.

    Args:
        model: the model.
        how: "plain", "optimized", or the device of a fused graph, by transformers; "dynamo",
            "dynamo plain" or "script" by torch.
        path: the graph's file.
    """
    feeds = feeds_of(model)
    before = logging.root.manager.disable
    with quiet():
        if how in ("plain", "optimized", "cpu", "cuda"):
            settings = OnnxConfig(
                dynamic=False, optimize=how != "plain", opset_version=20,
                ort_fusions=how if how in ("cpu", "cuda") else None,
            )  # fmt: skip
            program = OnnxExporter().export(model, dict(feeds), settings).program
            ir.save(program, path, external_data=f"{path.name}.data", size_threshold_bytes=64)
        else:
            dynamo = how.startswith("dynamo")
            torch.onnx.export(
                _Logits(model, list(feeds)), tuple(feeds.values()), path,
                input_names=list(feeds), output_names=["logits"], dynamo=dynamo,
                opset_version=18 if dynamo else 17, verbose=False,
                **({"optimize": how == "dynamo", "external_data": True} if dynamo else {}),
            )  # fmt: skip
    logging.disable(before)


def checkpoint_of(model: Any) -> Checkpoint:
    """What `save_pretrained` would write: no tied name twice."""
    tensors = {
        name: lazy_tensor(name, tensor.detach().clone())
        for name, tensor in model.state_dict().items()
        if name not in model.all_tied_weights_keys
    }
    config = {**model.config.to_dict(), "architectures": [type(model).__name__]}
    return Checkpoint(tensors, config=config, shards=dict.fromkeys(tensors, "model.safetensors"))


def lora(checkpoint: Checkpoint, *endings: str, seed: int = 0) -> Adapter:
    """Random updates of rank 2 of every matrix whose name ends so."""
    generator = torch.Generator().manual_seed(seed)
    found = {}
    for name, tensor in checkpoint.items():
        if name.endswith(endings) and len(tensor.shape) == 2:
            # GPT-2 stores its layers the other way round.
            out, inner = reversed(tensor.shape) if ".c_" in name else tensor.shape
            a, b = (
                torch.randn(2, inner, generator=generator),
                torch.randn(out, 2, generator=generator),
            )
            found[name] = LowRank(0.3 * a, 0.3 * b, 1.0), (out, inner)
    return adapter_of(found)


@dataclass(frozen=True)
class Base:
    """A model, its checkpoint and its ONNX file."""

    model: Any
    checkpoint: Checkpoint
    path: Path

    def merged(self, *adapters: Adapter) -> Checkpoint:
        return Merge().merged(self.checkpoint, [(adapter, 1.0) for adapter in adapters])

    def outputs(self, merged: Checkpoint) -> np.ndarray:
        """What PyTorch computes with a merged checkpoint's values."""
        kept = {name: value.clone() for name, value in self.model.state_dict().items()}
        try:
            self.model.load_state_dict({n: t.read() for n, t in merged.items()}, strict=False)
            with torch.no_grad():
                return np.asarray(self.model(**feeds_of(self.model)).logits)
        finally:
            self.model.load_state_dict(kept)

    def run(self, path: Path) -> np.ndarray:
        """What ONNX Runtime computes with a graph."""
        options = ort.SessionOptions()
        options.intra_op_num_threads = 1
        options.log_severity_level = 3
        session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        feeds = {name: value.numpy() for name, value in feeds_of(self.model).items()}
        wanted = [entry.name for entry in session.get_inputs()]
        outputs = [entry.name for entry in session.get_outputs()]
        name = "logits" if "logits" in outputs else outputs[0]
        return np.asarray(session.run([name], {name: feeds[name] for name in wanted})[0])
