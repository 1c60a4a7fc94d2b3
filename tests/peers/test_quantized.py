"""Quantized checkpoints against those who wrote them: bitsandbytes and transformers."""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import pytest
import torch
import transformers
from bitsandbytes.backends.default.ops import _dequantize_4bit_compute
from bitsandbytes.backends.utils import _get_4bit_code
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

import loratool
from loratool.opening import open_checkpoint
from loratool.quantized import four_bit
from tests.adapters import factors, write_adapter
from tests.models import build, tiny_config
from tests.quantized_files import FP8, fp8_model

WIDE = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "head_dim": 16}
SCHEMES: dict[str, dict[str, Any]] = {
    "nf4": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
    "nf4 double": {
        "load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True,
    },
    "fp4": {"load_in_4bit": True, "bnb_4bit_quant_type": "fp4"},
    "nf4 in bf16": {
        "load_in_4bit": True, "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_quant_storage": torch.bfloat16,
    },
    "int8": {"load_in_8bit": True},
}  # fmt: skip
MODULE = "model.layers.0.mlp.gate_proj"  # (96, 64)


@pytest.fixture(autouse=True)
def quiet(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.ERROR)


Saved = tuple[Path, transformers.PreTrainedModel]


@pytest.fixture(scope="session")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Saved]:
    """Scheme, and a model's type -> the directory that transformers saves, and the model."""

    @cache
    def make(scheme: str, model_type: str = "llama") -> Saved:
        folder = tmp_path_factory.mktemp(scheme.replace(" ", "-"))
        names = {"llama": "LlamaForCausalLM", "gpt2": "GPT2LMHeadModel"}
        settings = WIDE if model_type == "llama" else {"n_embd": 64, "n_head": 4, "n_inner": 128}
        build(names[model_type], tiny_config(model_type, **settings)).save_pretrained(folder / "0")
        model = AutoModelForCausalLM.from_pretrained(
            folder / "0", quantization_config=BitsAndBytesConfig(**SCHEMES[scheme])
        )
        model.save_pretrained(folder / "model")
        return folder / "model", model

    return make


def dequantized(module: Any) -> torch.Tensor:
    """What bitsandbytes makes of a layer's weight, in fp32."""
    weight = module.weight
    if isinstance(module, bnb.nn.Linear8bitLt):
        return bnb.functional.int8_vectorwise_dequant(weight.data, weight.SCB)
    state = weight.quant_state
    absmax = state.absmax
    if state.nested:
        absmax = bnb.functional.dequantize_blockwise(absmax, state.state2) + state.offset
    # Its own kernel for AVX512 is wrong where rows are no multiple of the block (0.50.2).
    codes = weight.data.view(torch.uint8).reshape(-1)
    table = _get_4bit_code(state.quant_type, codes.device)
    plain = _dequantize_4bit_compute.__wrapped__
    return plain(codes, absmax, table, state.blocksize, state.shape, torch.float32)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_values_are_those_of_bitsandbytes_to_the_bit(
    scheme: str, saved: Callable[..., Saved]
) -> None:
    path, model = saved(scheme)
    found = open_checkpoint(path)
    plain = open_checkpoint(path.parent / "0")
    assert {n: t.shape for n, t in found.items()} == {n: t.shape for n, t in plain.items()}
    modules = {
        f"{name}.weight": module
        for name, module in model.named_modules()
        if isinstance(module, bnb.nn.Linear4bit | bnb.nn.Linear8bitLt)
    }
    assert found.quantized.keys() == modules.keys() and len(modules) == 14
    for name, module in modules.items():
        assert torch.equal(found[name].read(), dequantized(module)), name
        if isinstance(module, bnb.nn.Linear4bit) and module.in_features == 64:
            state = module.weight.quant_state
            state.dtype = torch.float32
            theirs = bnb.functional.dequantize_4bit(module.weight.data, state)
            assert torch.equal(found[name].read(), theirs), name


@pytest.mark.parametrize("scheme", ["nf4 double", "int8"])
def test_what_is_transposed_for_quantization_comes_back_as_it_was(
    scheme: str, saved: Callable[..., Saved]
) -> None:
    """GPT-2's Conv1D stores (in, out), its quantized layers (out, in)."""
    path, model = saved(scheme, "gpt2")
    found = open_checkpoint(path)
    plain = open_checkpoint(path.parent / "0")
    assert {n: t.shape for n, t in found.items()} == {n: t.shape for n, t in plain.items()}
    name = "transformer.h.0.attn.c_proj"  # square: its shape tells nothing
    assert torch.equal(found[f"{name}.weight"].read().T, dequantized(model.get_submodule(name)))


@pytest.mark.parametrize(
    ("scheme", "model_type"), [*((s, "llama") for s in SCHEMES), ("nf4 double", "gpt2")]
)
def test_a_requantized_model_is_loaded_by_transformers(
    scheme: str, model_type: str, saved: Callable[..., Saved], tmp_path: Path
) -> None:
    path, _ = saved(scheme, model_type)
    gpt2 = model_type == "gpt2"
    module = "transformer.h.0.mlp.c_fc" if gpt2 else MODULE
    b, a = factors(0, 128 if gpt2 else 96, 64, 2)
    adapter = write_adapter(tmp_path / "adapter", {module: (b, a)}, fan_in_fan_out=gpt2)
    out = tmp_path / "merged"
    report = loratool.merge(path, [(adapter, 1.0)], requantize=True).save(out)
    before, after = open_checkpoint(path), open_checkpoint(out)
    assert after.quantized == before.quantized
    loaded = AutoModelForCausalLM.from_pretrained(out)
    for name, layer in loaded.named_modules():
        if isinstance(layer, bnb.nn.Linear4bit | bnb.nn.Linear8bitLt):
            ours = after[f"{name}.weight"].read()
            assert torch.equal(ours.T if gpt2 else ours, dequantized(layer)), name
            if name != module:
                assert torch.equal(ours, before[f"{name}.weight"].read()), name
    wanted = before[f"{module}.weight"].read() + ((b @ a).T if gpt2 else b @ a)
    error = float((after[f"{module}.weight"].read().double() - wanted.double()).norm())
    facts = report.data["tensors"][f"{module}.weight"]
    assert facts["error"] == pytest.approx(error, rel=1e-3)
    assert facts["update"] == pytest.approx(float((b @ a).norm()), rel=1e-5)
    assert error < 0.2 * float(wanted.norm())


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("nested", [True, False])
def test_values_are_quantized_as_bitsandbytes_does(kind: str, nested: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    value = torch.randn(300, 96, generator=generator)
    codes, state = bnb.functional.quantize_4bit(
        value, blocksize=64, compress_statistics=nested, quant_type=kind
    )
    description = {"shape": [300, 96], "quant_type": kind, "blocksize": 64}
    blocks = four_bit.Blocks(kind, 300, 96, 64, 256 if nested else 0, 0.0, description)
    tables = {"table": state.code}
    if nested:
        tables["nested_table"] = state.state2.code
    found = four_bit.encoded(value, tables, blocks)
    assert torch.equal(found["codes"], codes.view(-1))
    if not nested:
        assert torch.equal(found["absmax"], state.absmax)
        return
    assert torch.equal(found["nested_absmax"], state.state2.absmax)
    # Where a maximum lies half way between two levels, one of them is as good as the other.
    assert (found["absmax"].int() - state.absmax.int()).abs().max() <= 1
    assert (found["absmax"] == state.absmax).float().mean() > 0.99


def test_rows_are_quantized_as_bitsandbytes_does() -> None:
    from loratool.quantized import eight_bit

    value = torch.randn(40, 64, generator=torch.Generator().manual_seed(0))
    value[3] = 0
    codes, maxima, _ = bnb.functional.int8_vectorwise_quant(value)
    found = eight_bit.encoded(value)
    assert torch.equal(found[1], maxima)
    rows = [row for row in range(40) if row != 3]  # 0 / 0 there
    assert torch.equal(found[0][rows], codes[rows])
    assert not found[0][3].any()


# ---- fp8


def test_fp8_blocks_are_those_of_transformers(tmp_path: Path) -> None:
    """transformers reads no cut-off blocks on a CPU: sizes that are multiples of 8."""
    path = fp8_model(tmp_path / "model", {**FP8, "weight_block_size": [8, 8]})
    found = open_checkpoint(path)
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    for name, value in model.state_dict().items():
        assert torch.equal(found[name].read().float(), value), name


@pytest.mark.parametrize("scale_fmt", ["float", "ue8m0"])
def test_values_are_put_into_fp8_blocks_as_transformers_does(scale_fmt: str) -> None:
    from types import SimpleNamespace

    from transformers.integrations.finegrained_fp8 import Fp8Quantize

    from loratool.quantized import fp8

    value = torch.randn(64, 96, generator=torch.Generator().manual_seed(0))
    settings = SimpleNamespace(weight_block_size=[16, 16], scale_fmt=scale_fmt)
    theirs = Fp8Quantize(SimpleNamespace(quantization_config=settings)).convert({"a.weight": value})
    codes, scales = theirs["a.weight"], theirs["a.weight_scale_inv"]
    grid = fp8.Grid(1, 64, 96, 16, 16)
    ours = fp8.encoded(value, codes.dtype, scales.dtype, grid)
    torch.testing.assert_close(ours[1][0].float(), scales.float(), rtol=3e-7, atol=0)
    differing = ours[0].view(torch.uint8) != codes.view(torch.uint8)
    assert differing.float().mean() < 1e-3, "half-way numbers only: their scale is rounded twice"


def test_a_requantized_fp8_model_is_loaded_by_transformers(tmp_path: Path) -> None:
    path = fp8_model(tmp_path / "model", {**FP8, "weight_block_size": [8, 8]})
    module = "model.layers.0.mlp.up_proj"
    adapter = write_adapter(tmp_path / "adapter", {module: factors(0, 24, 16, 2)})
    loratool.merge(path, [(adapter, 1.0)], requantize=True).save(tmp_path / "merged")
    found = open_checkpoint(tmp_path / "merged")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    for name, value in model.state_dict().items():
        assert torch.equal(found[name].read().float(), value), name
