"""The table of families says what transformers' classes say."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import Any

import pytest
import torch
import transformers

from loratool.families import (
    FAMILIES,
    class_of_names,
    family_of_class,
    family_of_names,
    is_embedding,
)
from loratool.skeleton import _from_transformers, build_skeleton
from tests.models import tiny_config

# Where names cannot tell: what they are taken for instead.
TAKEN_FOR_FAMILY: Mapping[str, str | None] = {
    "xlm-roberta": "roberta",
    "mistral": "llama",
    "gemma": "llama",
    "gemma2": "llama",
    "opt": None,
    "RobertaModel": "bert",  # the same modules, without the prefix that tells them apart
    "XLMRobertaModel": "bert",
}
TAKEN_FOR_CLASS: Mapping[str, str] = {
    "BertForMultipleChoice": "BertForSequenceClassification",
    "BertLMHeadModel": "BertForMaskedLM",
    "RobertaForCausalLM": "RobertaForMaskedLM",
    "XLMRobertaForCausalLM": "XLMRobertaForMaskedLM",
    "DistilBertForMultipleChoice": "DistilBertForSequenceClassification",
}


def classes(model_type: str) -> list[str]:
    """The classes that the table lists, and those that it takes for one of them."""
    listed = [name for _, name in FAMILIES[model_type].heads]
    others = [other for other, name in TAKEN_FOR_CLASS.items() if name in listed]
    return [name for name in listed + others if hasattr(transformers, name)]


ALL = [(model_type, name) for model_type in FAMILIES for name in classes(model_type)]


@cache
def described(
    model_type: str, architecture: str, tie: bool | None
) -> tuple[dict[str, Any], dict[str, tuple[int, ...]]]:
    """config.json, and the names and shapes that save_pretrained writes."""
    settings: dict[str, Any] = {} if tie is None else {"tie_word_embeddings": tie}
    config = tiny_config(model_type, **settings)
    with torch.device("meta"):
        model = getattr(transformers, architecture)(config)
    shapes = {
        name: tuple(value.shape)
        for name, value in model.state_dict().items()
        if name not in model.all_tied_weights_keys
    }
    return {**config.to_diff_dict(), "architectures": [architecture]}, shapes


def test_only_classes_that_transformers_lacks_are_left_out() -> None:
    listed = {name for family in FAMILIES.values() for _, name in family.heads}
    assert {name for name in listed if not hasattr(transformers, name)} == {
        "GemmaForQuestionAnswering",
        "Gemma2ForQuestionAnswering",
        "Phi3ForQuestionAnswering",
    }


@pytest.mark.parametrize(("model_type", "architecture"), ALL)
@pytest.mark.parametrize("tie", [None, True, False])
def test_names_tell_what_the_modules_are(
    model_type: str, architecture: str, tie: bool | None
) -> None:
    config, shapes = described(model_type, architecture, tie)
    by_names, by_modules = build_skeleton(config, shapes), _from_transformers(config, shapes)
    assert by_names.kinds == {name: by_modules.kinds[name] for name in shapes}
    assert by_names.tied == by_modules.tied
    assert by_names.notes == ()


@pytest.mark.parametrize(("model_type", "architecture"), ALL)
def test_names_tell_the_family(model_type: str, architecture: str) -> None:
    _, shapes = described(model_type, architecture, None)
    found = family_of_names(shapes)
    wanted = TAKEN_FOR_FAMILY.get(model_type, model_type)
    assert (found and found.model_type) == TAKEN_FOR_FAMILY.get(architecture, wanted)


@pytest.mark.parametrize(("model_type", "architecture"), ALL)
def test_names_tell_the_class(model_type: str, architecture: str) -> None:
    _, shapes = described(model_type, architecture, None)
    found = class_of_names(FAMILIES[model_type], shapes)
    assert found == TAKEN_FOR_CLASS.get(architecture, architecture)


@pytest.mark.parametrize(("model_type", "architecture"), ALL)
def test_a_class_tells_the_family(model_type: str, architecture: str) -> None:
    assert family_of_class(architecture) is FAMILIES[model_type]


@pytest.mark.parametrize(("model_type", "architecture"), ALL)
def test_without_a_config_names_still_tell_the_kinds(model_type: str, architecture: str) -> None:
    config, shapes = described(model_type, architecture, None)
    assert build_skeleton(None, shapes).kinds == build_skeleton(config, shapes).kinds


def test_model_types_name_families_too() -> None:
    assert all(family_of_class(name) is family for name, family in FAMILIES.items())
    assert family_of_class("BertJapaneseTokenizer") is None


@pytest.mark.parametrize(
    "name",
    [
        "model.decoder.layers.0.self_attn.q_proj.weight",  # BART
        "transformer.layer.0.rel_attn.q",  # XLNet
        "encoder.layer.0.attention.attention.query.weight",  # ViT
        "deberta.encoder.layer.0.attention.self.query_proj.weight",
        "gpt_neox.layers.0.attention.query_key_value.weight",
        "encoder.block.0.layer.0.SelfAttention.q.weight",
    ],
)
def test_other_families_are_not_mistaken(name: str) -> None:
    assert family_of_names([name]) is None


def test_strange_names_belong_to_no_family() -> None:
    assert family_of_names(["features.0.conv.weight"]) is None
    assert family_of_names([]) is None


@pytest.mark.parametrize(
    ("module", "answer"),
    [
        ("bert.embeddings.word_embeddings", True),
        ("shared", True),
        ("transformer.wte", True),
        ("embeddings.LayerNorm", False),
        ("model.layers.0.self_attn.q_proj", False),
        ("visual.embeddings_projection", False),
    ],
)
def test_tables_are_known_by_name(module: str, answer: bool) -> None:
    assert is_embedding(module) is answer
