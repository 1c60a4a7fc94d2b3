"""Which graphs models are exported as, what goes in, and that they do what the models do."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from loratool.errors import InputError
from loratool.shell import Shell, build_shell
from loratool_plugins.exporters.onnx.inputs import Sizes
from loratool_plugins.exporters.onnx.stages import (
    graph_name,
    loosened,
    named_inputs,
    run,
    sample_of,
    stages_of,
)
from tests.models import build, tiny_config
from tests.plugins.exporters.onnx_runs import Graph, generate, generate_from, stages

_TINY = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
         "intermediate_size": 24}  # fmt: skip
_IMAGES = {**_TINY, "image_size": 8, "patch_size": 4}
_WHISPER = {
    "d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2,
    "decoder_attention_heads": 2, "encoder_ffn_dim": 24, "decoder_ffn_dim": 24, "vocab_size": 40,
    "max_source_positions": 10, "max_target_positions": 24, "num_mel_bins": 8, "pad_token_id": 0,
    "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 3, "init_std": 0.3,
    "suppress_tokens": None, "begin_suppress_tokens": None,
}  # fmt: skip
_CLIP = {
    "text_config": {**_TINY, "vocab_size": 40, "max_position_embeddings": 30, "eos_token_id": 2,
                    "bos_token_id": 1, "pad_token_id": 0},
    "vision_config": _IMAGES,
    "projection_dim": 12,
}  # fmt: skip


def config_of(model_type: str, architecture: str, settings: Mapping[str, Any]) -> dict[str, Any]:
    config = transformers.AutoConfig.for_model(model_type, **settings)
    return {**config.to_dict(), "model_type": model_type, "architectures": [architecture]}


def shell_of(model_type: str, architecture: str, **settings: Any) -> Shell:
    try:
        config = tiny_config(model_type, **settings)
    except KeyError:
        return build_shell(config_of(model_type, architecture, settings), torch.float32)
    content = {**config.to_dict(), "model_type": model_type, "architectures": [architecture]}
    return build_shell(content, torch.float32)


def mamba() -> Shell:
    settings = {"vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 1, "state_size": 4,
                "bos_token_id": 0, "eos_token_id": 0}  # fmt: skip
    return shell_of("mamba", "MambaForCausalLM", **settings)


@pytest.mark.parametrize(
    ("shell", "names"),
    [
        (lambda: shell_of("bert", "BertForMaskedLM"), ["model"]),
        (lambda: shell_of("llama", "LlamaForSequenceClassification"), ["model"]),
        (lambda: shell_of("llama", "LlamaForCausalLM"), ["prefill", "decode"]),
        (lambda: shell_of("t5", "T5ForConditionalGeneration"), ["encoder", "prefill", "decode"]),
        (lambda: shell_of("t5", "T5EncoderModel"), ["model"]),
        (
            lambda: shell_of("whisper", "WhisperForConditionalGeneration", **_WHISPER),
            ["encoder", "prefill", "decode"],
        ),
        (lambda: shell_of("vit", "ViTForImageClassification", **_IMAGES), ["model"]),
        (lambda: shell_of("clip", "CLIPModel", **_CLIP), ["model"]),
        (mamba, ["model"]),  # it keeps something else than keys and values
    ],
    ids=["bert", "llama-head", "llama", "t5", "t5-encoder", "whisper", "vit", "clip", "mamba"],
)
def test_which_graphs_a_model_is_exported_as(shell: Any, names: list[str]) -> None:
    assert [stage.name for stage in stages_of(shell())] == names


def test_without_a_cache_a_decoder_is_one_graph() -> None:
    (stage,) = stages_of(shell_of("gpt2", "GPT2LMHeadModel"), cache=False)
    assert (stage.name, stage.input_names) == ("model", ("input_ids", "attention_mask"))


def test_the_parameters_of_a_stage_are_those_of_the_shell() -> None:
    for shell in (
        shell_of("t5", "T5ForConditionalGeneration"),
        shell_of("llama", "LlamaForCausalLM"),
    ):
        own = dict(shell.model.named_parameters(remove_duplicate=False))
        made = stages_of(shell)
        name = next(iter(own))
        owner, _, leaf = name.rpartition(".")
        replaced = torch.nn.Parameter(torch.ones_like(own[name]), False)
        shell.model.get_submodule(owner)._parameters[leaf] = replaced
        for stage in made:
            found = dict(stage.module.named_parameters(remove_duplicate=False))
            assert found.keys() == own.keys()
            assert found.pop(name) is replaced
            assert all(value is own[key] for key, value in found.items())


def test_the_cache_has_the_layers_of_the_real_model() -> None:
    shell = shell_of("llama", "LlamaForCausalLM", num_hidden_layers=3, head_dim=24)
    _, decode = stages_of(shell)
    assert [layer.key for layer in decode.layers] == [(2, 24)] * 3
    shapes = {name: tuple(value.shape) for name, value in named_inputs(decode.inputs).items()}
    past = shapes["attention_mask"][1] - 1
    assert shapes["past_key_values.2.value"] == (2, 2, past, 24)
    assert shapes["input_ids"] == (2, 1)


def test_a_model_that_mixes_images_into_texts_is_refused() -> None:
    text = {**_TINY, "model_type": "llama", "vocab_size": 40, "num_key_value_heads": 2}
    vision = {**_IMAGES, "model_type": "clip_vision_model"}
    shell = shell_of(
        "llava", "LlavaForConditionalGeneration", text_config=text, vision_config=vision,
        image_token_index=5,
    )  # fmt: skip
    with pytest.raises(InputError, match=r"--module package\.module:function"):
        stages_of(shell)


@pytest.mark.parametrize("name", ["prefill", "decode"])
def test_prompts_are_padded_on_the_left_and_counted_without_the_padding(name: str) -> None:
    made = {stage.name: stage for stage in stages_of(shell_of("llama", "LlamaForCausalLM"))}
    inputs = sample_of(made[name], Sizes(3, 6, past=5), seed=3)
    mask, positions = inputs["attention_mask"], inputs["position_ids"]
    assert mask[0].all() and not mask[1:].all()
    assert (mask.diff(dim=1) >= 0).all()
    if name == "prefill":
        assert positions[0].tolist() == list(range(6))
        assert (positions[mask == 0] == 0).all()
        assert (inputs["input_ids"][mask == 0] == 0).all()
    assert (positions[:, -1] == mask.sum(1) - 1).all()
    again = sample_of(made[name], Sizes(3, 6, past=5), seed=3)
    for key, value in named_inputs(inputs).items():
        assert torch.equal(value, named_inputs(again)[key])


def test_loosened_axes_are_the_same_ones() -> None:
    for stage in stages_of(shell_of("llama", "LlamaForCausalLM")):
        assert stage.dynamic_shapes is not None
        shapes = loosened(stage).dynamic_shapes
        assert shapes is not None and shapes.keys() == stage.dynamic_shapes.keys()
        for name, shape in stage.dynamic_shapes.items():
            kept = [list(one) for one in (shape if isinstance(shape, list) else [shape])]
            loose = shapes[name] if isinstance(shapes[name], list) else [shapes[name]]
            assert [list(one) for one in loose] == kept


def test_names_of_the_cache() -> None:
    assert graph_name("past_key_values.layers.3.keys") == "past_key_values.3.key"
    assert graph_name("past_key_values.layers.3.values", output=True) == "present.3.value"
    crossed = "past_key_values.cross_attention_cache.layers.0.keys"
    assert graph_name(crossed) == "past_key_values.0.encoder.key"
    assert graph_name("logits", output=True) == "logits"


def test_a_decoder_generates_as_transformers_does_beyond_its_window(tmp_path: Path) -> None:
    config = tiny_config("mistral", sliding_window=4, num_hidden_layers=1, vocab_size=40,
                         max_position_embeddings=64, initializer_range=0.5)  # fmt: skip
    model = build("MistralForCausalLM", config)
    model.generation_config.eos_token_id = None
    prefill, decode = (Graph(stage, tmp_path, "cpu") for stage in stages(model))
    assert prefill.axes["input_ids"] == ("batch", "sequence")
    assert decode.axes["attention_mask"] == ("batch", "total")
    assert decode.axes["past_key_values.0.key"] == ("batch", 2, "past", 8)
    for ids in (
        torch.tensor([[5, 9, 11, 22, 7, 30, 3], [0, 0, 8, 31, 30, 12, 4], [0, 0, 0, 0, 0, 9, 6]]),
        torch.tensor([[17]]),
    ):
        mask = (ids != 0).long()
        expected = model.generate(ids, attention_mask=mask, max_new_tokens=16, do_sample=False)
        found = generate(prefill, decode, ids, 0, 16)
        assert found == expected[:, ids.shape[1] :].tolist()
        assert len({token for row in found for token in row}) > 3


def test_an_encoder_decoder_generates_as_transformers_does(tmp_path: Path) -> None:
    config = tiny_config("t5", num_layers=1, num_decoder_layers=1, vocab_size=40,
                         initializer_factor=2.0)  # fmt: skip
    model = build("T5ForConditionalGeneration", config)
    made = stages(model)
    encoder, prefill, decode = (Graph(stage, tmp_path) for stage in made)
    assert prefill.axes["encoder_hidden_states"] == ("batch", "source", 32)
    assert decode.axes["past_key_values.0.encoder.value"] == ("batch", 4, "source", 8)
    outputs = [output.name for output in decode.session.get_outputs()]
    assert outputs == ["logits", "present.0.decoder.key", "present.0.decoder.value"]
    inputs = sample_of(made[0], Sizes(3, 1, source=5), seed=1)
    model.generation_config.eos_token_id = None
    expected = model.generate(**inputs, max_new_tokens=16, do_sample=False)
    assert generate_from(encoder, prefill, decode, inputs, 0, 16) == expected[:, 1:].tolist()


def test_texts_and_images_vary_independently(tmp_path: Path) -> None:
    model = build("CLIPModel", transformers.CLIPConfig(**_CLIP))
    (stage,) = stages(model)
    graph = Graph(stage, tmp_path)
    assert graph.axes["pixel_values"] == ("images", 3, 8, 8)
    inputs = sample_of(stage, Sizes(4, 6), seed=2)
    found = graph(inputs)
    expected = run(stage, inputs)
    assert found["logits_per_image"].shape == (5, 4)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        if name.startswith(("logits", "text_embeds", "image_embeds")):
            np.testing.assert_allclose(found[name], value.numpy(), atol=1e-4)
