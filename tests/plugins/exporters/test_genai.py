"""What onnxruntime-genai is told of an export."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import torch

from loratool_plugins.exporters.onnx.genai import GENAI_FILE, genai_config, objection
from loratool_plugins.exporters.onnx.stages import Stage
from tests.models import build, tiny_config
from tests.plugins.exporters.onnx_runs import program, stages


def decoder(**settings: Any) -> tuple[torch.nn.Module, tuple[Stage, ...]]:
    model = build("LlamaForCausalLM", tiny_config("llama", num_hidden_layers=1, **settings))
    return model, stages(model)


def test_the_pipeline_names_the_graphs_and_what_goes_in_and_out() -> None:
    model, made = decoder(eos_token_id=[2, 5])
    said = genai_config(model.config.to_dict(), {"top_k": 7}, made, "cuda")
    (prefill, decode) = said["model"]["decoder"]["pipeline"]
    assert prefill["prefill"]["filename"] == "prefill.onnx"
    assert prefill["prefill"]["inputs"] == ["input_ids", "attention_mask", "position_ids"]
    assert decode["decode"]["outputs"] == ["logits", "present.0.key", "present.0.value"]
    runs = [
        (stage["run_on_prompt"], stage["run_on_token_gen"])
        for stage in (prefill["prefill"], decode["decode"])
    ]
    assert runs == [(True, False), (False, True)]
    assert decode["decode"]["inputs"] == list(made[1].input_names)
    assert said["model"]["eos_token_id"] == [2, 5] and said["search"]["top_k"] == 7
    sizes = said["model"]["decoder"]
    assert (sizes["num_key_value_heads"], sizes["head_size"]) == (2, 8)
    assert sizes["session_options"]["provider_options"] == [{"cuda": {}}]
    assert json.loads(json.dumps(said)) == said


@pytest.mark.parametrize(
    ("model_type", "architecture", "words"),
    [
        ("bert", "BertModel", "not model"),
        ("t5", "T5ForConditionalGeneration", "not encoder, prefill, decode"),
    ],
)
def test_what_genai_cannot_run(model_type: str, architecture: str, words: str) -> None:
    assert words in objection(stages(build(architecture, tiny_config(model_type))))
    assert objection(decoder()[1]) == ""


def test_genai_generates_what_transformers_does(tmp_path: Path) -> None:
    genai = pytest.importorskip("onnxruntime_genai")
    model, made = decoder(max_position_embeddings=64, initializer_range=0.5)
    for stage in made:
        ir.save(program(stage, "cpu"), tmp_path / f"{stage.name}.onnx")
    said = genai_config(model.config.to_dict(), None, made)
    said["model"]["eos_token_id"] = 63
    (tmp_path / GENAI_FILE).write_text(json.dumps(said))
    loaded = genai.Model(str(tmp_path))
    for prompt in ([5, 9, 11, 22, 7], [17]):
        parameters = genai.GeneratorParams(loaded)
        parameters.set_search_options(max_length=len(prompt) + 16, do_sample=False)
        generator = genai.Generator(loaded, parameters)
        generator.append_tokens(np.array([prompt], np.int32))
        while not generator.is_done():
            generator.generate_next_token()
        generation: Any = model
        generation.generation_config.eos_token_id = 63
        expected = generation.generate(
            torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
            max_new_tokens=16, do_sample=False,
        )  # fmt: skip
        # genai leaves the end token out
        tokens = [token for token in expected[0].tolist() if token != 63]
        assert generator.get_sequence(0).tolist() == tokens
