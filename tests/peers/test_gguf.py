"""GGUF models are read as transformers reads them, weight for weight and answer for answer."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch
import transformers
from gguf.constants import GGMLQuantizationType as Kind

import loratool
from loratool.opening import open_checkpoint
from loratool_plugins.checkpoint_formats._gguf_architectures import ARCHITECTURES
from tests.adapters import factors, write_adapter
from tests.gguf_files import MODELS, model_of, save_gguf

WRITABLE = ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "MXFP4", "TQ1_0", "TQ2_0", "BF16", "F16")
# What transformers does not load from GGUF at all.
_UNKNOWN_TO_TRANSFORMERS = ("gemma",)


@pytest.fixture(autouse=True)
def quiet(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.ERROR)


def loaded(file: Path) -> transformers.PreTrainedModel:
    model: transformers.PreTrainedModel = transformers.AutoModelForCausalLM.from_pretrained(
        file.parent, gguf_file=file.name, dtype=torch.float32
    )
    return model.eval()


def answers(model: transformers.PreTrainedModel) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(torch.tensor([[3, 17, 5, 40, 8, 22, 9, 31, 2, 60, 11]])).logits
    return found


def test_every_architecture_is_tested() -> None:
    assert MODELS.keys() == ARCHITECTURES.keys()


@pytest.mark.parametrize("architecture", MODELS)
def test_every_architecture_is_read_as_transformers_reads_it(
    architecture: str, tmp_path: Path
) -> None:
    model = model_of(architecture)
    file = save_gguf(tmp_path / "model.gguf", architecture, model, Kind.Q8_0)
    found = open_checkpoint(file)
    if architecture in _UNKNOWN_TO_TRANSFORMERS:
        return
    reference = loaded(file).state_dict()
    tied = {"lm_head.weight"} if model.config.tie_word_embeddings else set()
    assert found.keys() == reference.keys() - tied
    for name, tensor in found.items():
        assert tensor.dtype == "F32"
        assert torch.equal(tensor.read(), reference[name]), name
    assert found.quantized and set(found.quantized.values()) == {"GGUF Q8_0"}


@pytest.mark.parametrize("architecture", MODELS)
def test_the_config_and_the_weights_make_the_model_again(architecture: str, tmp_path: Path) -> None:
    """Through our own merge: the directory loads in transformers and answers as the source."""
    model = model_of(architecture)
    file = save_gguf(tmp_path / "model.gguf", architecture, model, Kind.F32)
    target = next(n for n in open_checkpoint(file) if n.endswith(("o_proj.weight", "c_fc.weight")))
    shape = open_checkpoint(file)[target].shape
    out, inner = shape[::-1] if architecture == "gpt2" else shape
    adapter = write_adapter(
        tmp_path / "adapter",
        {target.removesuffix(".weight"): factors(0, out, inner, 2)},
        fan_in_fan_out=architecture == "gpt2",
    )
    loratool.merge(file, [(adapter, 1.0)]).save(tmp_path / "merged")
    merged = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    with torch.no_grad():
        b, a = factors(0, out, inner, 2)
        delta = (b @ a).T if architecture == "gpt2" else b @ a
        model.get_parameter(target).add_(delta)
    assert type(merged) is type(model)
    assert merged.config.tie_word_embeddings == model.config.tie_word_embeddings
    assert merged.config.eos_token_id == 2 and merged.config.bos_token_id == 1
    torch.testing.assert_close(answers(merged), answers(model), rtol=2e-4, atol=2e-4)


@pytest.mark.parametrize("kind", WRITABLE)
def test_every_kind_is_dequantized_as_transformers_does(kind: str, tmp_path: Path) -> None:
    model = model_of("llama", hidden_size=256, intermediate_size=256, head_dim=64)
    file = save_gguf(tmp_path / "model.gguf", "llama", model, Kind[kind])
    reference = loaded(file).state_dict()
    found = open_checkpoint(file)
    for name, tensor in found.items():
        assert torch.equal(tensor.read().float(), reference[name]), name
    is_plain = kind in ("BF16", "F16")
    assert bool(found.quantized) != is_plain
    assert found["model.layers.0.self_attn.q_proj.weight"].dtype == (kind if is_plain else "F32")
