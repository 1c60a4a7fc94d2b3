"""What config.json adds to names and shapes, and what names and shapes add to config.json."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
import torch
import transformers

from loratool.errors import InputError, UsageError
from loratool.skeleton import architecture_of, build_skeleton, complete_config, task_type
from tests.models import tiny_config

Shapes = dict[str, tuple[int, ...]]


def described(model_type: str, architecture: str) -> tuple[dict[str, Any], Shapes]:
    """config.json and all names in memory."""
    config = tiny_config(model_type)
    with torch.device("meta"):
        model = getattr(transformers, architecture)(config)
    shapes = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    return {**config.to_diff_dict(), "architectures": [architecture]}, shapes


@pytest.mark.parametrize(
    ("architecture", "task"),
    [
        ("BertForSequenceClassification", "SEQ_CLS"),
        ("RobertaForTokenClassification", "TOKEN_CLS"),
        ("DistilBertForQuestionAnswering", "QUESTION_ANS"),
        ("LlamaForCausalLM", "CAUSAL_LM"),
        ("GPT2LMHeadModel", "CAUSAL_LM"),
        ("T5ForConditionalGeneration", "SEQ_2_SEQ_LM"),
        ("BertForMaskedLM", None),
        ("BertModel", None),
        ("", None),
    ],
)
def test_the_class_tells_the_task(architecture: str, task: str | None) -> None:
    assert task_type(architecture) == task


@pytest.mark.parametrize(
    ("config", "name"),
    [
        ({"architectures": ["A", "B"]}, "A"),
        ({"architectures": []}, ""),
        ({"architectures": None}, ""),
        ({}, ""),
        (None, ""),
    ],
)
def test_the_first_architecture_counts(config: dict[str, Any] | None, name: str) -> None:
    assert architecture_of(config) == name


def test_other_families_are_built_by_transformers() -> None:
    config, shapes = described("t5", "T5ForConditionalGeneration")
    found = build_skeleton(config, shapes)
    block = "encoder.block.0.layer.0.SelfAttention"
    assert found.kinds["shared.weight"] == "embedding"
    assert found.kinds[f"{block}.relative_attention_bias.weight"] == "embedding"
    assert found.kinds[f"{block}.q.weight"] == "linear"
    assert found.kinds["encoder.final_layer_norm.weight"] == "other"
    assert found.tied == dict.fromkeys(
        ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight", "lm_head.weight"),
        "shared.weight",
    )


def test_saved_buffers_are_no_strange_names() -> None:
    config, shapes = described("electra", "ElectraForMaskedLM")
    shapes["electra.embeddings.position_ids"] = (1, 24)
    assert build_skeleton(config, shapes).kinds["generator_lm_head.weight"] == "linear"


def test_names_that_the_class_does_not_know_are_refused() -> None:
    config, shapes = described("electra", "ElectraForMaskedLM")
    shapes["electra.other.weight"] = (2, 2)
    with pytest.raises(InputError, match=r"electra\.other\.weight: ElectraForMaskedLM has"):
        build_skeleton(config, shapes)
    found = build_skeleton(config, shapes, strict=False)
    assert not found.pieces and not found.unused


def test_tensors_that_the_class_passes_over_are_known() -> None:
    """DeepSeek-V3 predicts several tokens by a layer that transformers does not build."""
    settings = {"num_hidden_layers": 61, "vocab_size": 8, "hidden_size": 8}
    config = {"model_type": "deepseek_v3", "architectures": ["DeepseekV3Model"], **settings}
    name = "model.layers.61.eh_proj.weight"
    assert build_skeleton(config, {name: (8, 16)}).unused == {name}


def test_groups_of_convolutions() -> None:
    settings = {"hidden_sizes": [8, 16, 16, 16], "depths": [1, 1, 1, 1], "num_channels": 3}
    config = {"model_type": "convnext", "architectures": ["ConvNextModel"], **settings}
    found = build_skeleton(config, {})
    depthwise = "encoder.stages.0.layers.0.dwconv.weight"
    assert found.kinds[depthwise] == found.kinds["embeddings.patch_embeddings.weight"] == "conv"
    assert found.groups[depthwise] == 8
    assert "embeddings.patch_embeddings.weight" not in found.groups


def test_an_unknown_class_is_named() -> None:
    config = {"model_type": "electra", "architectures": ["ElectraForMagic"]}
    with pytest.raises(InputError, match="no class 'ElectraForMagic'"):
        build_skeleton(config, {"a.weight": (2, 2)})


def test_an_unknown_family_is_told_by_names_and_says_so() -> None:
    shapes: Shapes = {
        "body.proj.weight": (4, 8), "body.proj.bias": (4,), "body.wte.weight": (9, 8),
        "body.conv.weight": (4, 4, 3), "scale": (4, 4),
    }  # fmt: skip
    found = build_skeleton(None, shapes)
    assert dict(found.kinds) == {
        "body.proj.weight": "linear", "body.proj.bias": "other", "body.wte.weight": "embedding",
        "body.conv.weight": "other", "scale": "other",
    }  # fmt: skip
    assert "unknown" in found.notes[0]


def test_the_families_need_no_transformers() -> None:
    code = (
        "import sys; from loratool.skeleton import build_skeleton, complete_config;"
        "shapes = {'model.layers.0.self_attn.q_proj.weight': (4, 4)};"
        "build_skeleton({'model_type': 'llama'}, shapes); complete_config({}, shapes);"
        "sys.exit('transformers' in sys.modules or 'torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


BERT: Shapes = {
    "bert.embeddings.word_embeddings.weight": (50, 8),
    "bert.encoder.layer.0.attention.self.query.weight": (8, 8),
    "bert.pooler.dense.weight": (8, 8),
    "classifier.weight": (3, 8),
}


def test_a_complete_config_stays() -> None:
    labels = {"0": "a", "1": "b", "2": "c"}
    config = {
        "model_type": "bert", "architectures": ["BertForSequenceClassification"],
        "id2label": labels, "vocab_size": 50,
    }  # fmt: skip
    assert complete_config(config, BERT) == (config, ())


def test_names_complete_an_empty_config() -> None:
    found, notes = complete_config({}, BERT)
    assert found is not None
    assert found["model_type"] == "bert"
    assert found["architectures"] == ["BertForSequenceClassification"]
    assert found["id2label"] == {"0": "LABEL_0", "1": "LABEL_1", "2": "LABEL_2"}
    assert found["label2id"] == {"LABEL_0": 0, "LABEL_1": 1, "LABEL_2": 2}
    assert len(notes) == 3


def test_the_related_model_knows_the_type_best() -> None:
    shapes: Shapes = {"model.layers.0.self_attn.q_proj.weight": (4, 4)}
    found, notes = complete_config({}, shapes, {"model_type": "mistral"})
    assert found is not None
    assert (found["model_type"], found["architectures"]) == ("mistral", ["MistralForCausalLM"])
    assert notes[0] == "config.json has no model_type: took 'mistral'"


def test_no_config_stays_none_unless_the_user_names_a_class() -> None:
    assert complete_config(None, BERT) == (None, ())
    found, _ = complete_config(None, BERT, architecture="BertForTokenClassification")
    assert found is not None
    assert found["architectures"] == ["BertForTokenClassification"]
    assert found["model_type"] == "bert"


def test_a_model_type_is_enough() -> None:
    found, _ = complete_config({}, BERT, architecture="bert")
    assert found is not None
    assert found["architectures"] == ["BertForSequenceClassification"]


def test_an_unknown_word_is_a_usage_error() -> None:
    with pytest.raises(UsageError, match="--architecture Magic: unknown; use a class such as"):
        complete_config({}, BERT, architecture="Magic")


def test_what_nobody_knows_is_asked_for() -> None:
    found, notes = complete_config({"vocab_size": 3}, {"a.weight": (2, 2)})
    assert found == {"vocab_size": 3}
    assert notes == ("config.json has no model_type: name it with --architecture",)


@pytest.mark.parametrize(
    "table",
    [
        "bert.embeddings.word_embeddings.weight",
        "model.embed_tokens.weight",
        "transformer.wte.weight",
        "shared.weight",
    ],
)
def test_the_vocabulary_is_what_the_embedding_has(table: str) -> None:
    config = {"model_type": "bert", "architectures": ["BertModel"], "vocab_size": 40}
    found, notes = complete_config(config, {table: (50, 8)})
    assert found is not None and found["vocab_size"] == 50
    assert notes == ("config.json says vocab_size 40, the embedding has 50",)
