"""A real quantized base: SmolLM2-135M-Instruct as GGUF, most of it Q4_1."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file

import loratool
from fixtures.weights import SMOLLM2, fetch
from loratool.checkpoint import Checkpoint
from loratool.errors import InputError
from loratool.opening import open_checkpoint
from loratool_plugins.checkpoint_formats._gguf_header import read_header
from tests.adapters import factors, write_adapter

LAYER = "model.layers.12"
SHAPES = {f"{LAYER}.self_attn.q_proj": (576, 576), f"{LAYER}.mlp.down_proj": (576, 1536)}
# "What is the capital of France?", as the model's tokenizer and chat template have it.
PROMPT = [1, 4093, 198, 1780, 314, 260, 3575, 282, 4649, 47, 2, 198, 1, 520, 9531, 198]
PARIS = 7042


@pytest.fixture(scope="module", autouse=True)
def two_threads() -> Iterator[None]:
    fetch()
    logging.getLogger("transformers").setLevel(logging.ERROR)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def base() -> Checkpoint:
    return open_checkpoint(SMOLLM2)


@pytest.fixture(scope="module")
def adapter(base: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An update of rank 4 on two matrices, a tenth of their size."""
    modules = {}
    for number, (module, (rows, columns)) in enumerate(SHAPES.items()):
        b, a = factors(number, rows, columns, 4)
        norm = float(base[f"{module}.weight"].read().norm())
        modules[module] = (b * (0.1 * norm / float((b @ a).norm())), a)
    return write_adapter(tmp_path_factory.mktemp("smollm2") / "adapter", modules)


def beginning(folder: Path, layers: int = 2) -> Path:
    """The file's first layers, without its vocabulary, which takes others seconds to read."""
    header = read_header(SMOLLM2)
    writer = gguf.GGUFWriter(folder / "model.gguf", "llama")
    for key, value in header.metadata.items():
        if key.startswith("llama."):
            number = layers if key == "llama.block_count" else value
            is_float = isinstance(value, float)
            (writer.add_float32 if is_float else writer.add_uint32)(key, number)
    data = np.memmap(SMOLLM2, mode="r")
    for entry in header.entries:
        parts = entry.name.split(".")
        if parts[0] != "blk" or int(parts[1]) < layers:
            raw = np.array(data[entry.begin : entry.begin + entry.length])
            rows = raw.reshape(*entry.shape[:-1], -1)
            values = rows.view(np.float32) if entry.kind.name == "F32" else rows
            writer.add_tensor(entry.name, values, raw_dtype=entry.kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return folder / "model.gguf"


def test_its_weights_are_those_that_transformers_reads(base: Checkpoint, tmp_path: Path) -> None:
    file = beginning(tmp_path)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, gguf_file=file.name, dtype=torch.float32
    )
    state = model.state_dict()
    assert sum(name.startswith("model.layers.") for name in state) == 18
    for name, value in state.items():
        if name != "lm_head.weight":
            assert torch.equal(base[name].read(), value), name
    assert set(base.quantized.values()) == {"GGUF Q4_1", "GGUF Q8_0"}
    assert len(base) == 272 and len(base.quantized) == 211


def test_an_update_is_found_and_merged_and_the_model_answers_as_in_pytorch(
    base: Checkpoint, adapter: Path, tmp_path: Path
) -> None:
    tuned = loratool.merge(base, [(adapter, 1.0)])  # a perturbed copy, in bf16
    found = loratool.extract(
        base, tuned, rank=4, target=[f"{LAYER}.*q_proj.weight", f"{LAYER}.*down_proj.weight"],
        lora_only=True,
    )  # fmt: skip
    report = found.save(tmp_path / "found")
    assert report.data["totals"]["energy"] > 0.99
    loratool.merge(base, [(tmp_path / "found", 1.0)]).save(tmp_path / "merged")
    merged = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "merged", dtype=torch.float32
    ).eval()
    stored = load_file(tmp_path / "merged" / "model.safetensors")
    factor = load_file(tmp_path / "found" / "adapter_model.safetensors")
    state = {}
    for name, tensor in base.items():
        value = tensor.read()
        module = name.removesuffix(".weight")
        if module in SHAPES:
            b, a = (factor[f"base_model.model.{module}.lora_{side}.weight"] for side in "BA")
            value = (value.double() + b.double() @ a.double()).float()
        state[name] = value.bfloat16().float() if name in base.quantized else value
        if module in SHAPES:  # but for the last bit, where fp32's rounding of B @ A decides
            assert (stored[name].float() == state[name]).float().mean() > 0.9999
            torch.testing.assert_close(stored[name].float(), state[name], rtol=2**-7, atol=0)
    with torch.device("meta"):
        reference = transformers.LlamaForCausalLM(merged.config).eval()
    reference.load_state_dict(state, strict=False, assign=True)
    reference.tie_weights()
    reference.model.rotary_emb = merged.model.rotary_emb  # no weight, and still on meta
    tokens = torch.tensor([PROMPT])
    with torch.no_grad():
        one = merged.generate(tokens, max_new_tokens=7, do_sample=False)
        other = reference.generate(tokens, max_new_tokens=7, do_sample=False)
    assert torch.equal(one, other)
    assert PARIS in one[0, len(PROMPT) :].tolist()


def test_requantized_it_is_the_same_file_but_for_what_was_touched(
    base: Checkpoint, adapter: Path, tmp_path: Path
) -> None:
    report = loratool.merge(base, [(adapter, 2.0)], requantize=True).save(tmp_path / "merged")
    written = tmp_path / "merged" / SMOLLM2.name
    assert written.stat().st_size == SMOLLM2.stat().st_size
    after = open_checkpoint(written)
    assert base.stored is not None and after.stored is not None
    touched = ("blk.12.attn_q.weight", "blk.12.ffn_down.weight")
    for name, piece in base.stored.checkpoint.items():
        same = torch.equal(piece.read(), after.stored.checkpoint[name].read())
        assert same == (name not in touched), name
    assert {facts["scheme"] for facts in report.data["tensors"].values()} == {"GGUF Q4_1"}
    assert 0.3 < report.data["error"] / report.data["update"] < 0.5
    with pytest.raises(InputError, match="drowns in 2 of 2 tensors"):
        loratool.merge(base, [(adapter, 0.1)], requantize=True).save(tmp_path / "no")
    assert not (tmp_path / "no").exists()
