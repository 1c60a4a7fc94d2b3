"""Tiny random models of every kind that the tests need, and what to compare of them.

A `Recipe` names a base's class and a fine-tune's class of one config; `make_pair` saves both, the
fine-tune starting from the base's weights and then changed wherever a selection of names says.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import PreTrainedModel

transformers.logging.disable_progress_bar()

Selection = Callable[[str], bool]

_SMALL_BERT = {
    "vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
    "intermediate_size": 48, "max_position_embeddings": 24, "initializer_range": 0.2,
}  # fmt: skip
_SMALL_LLAMA = {
    "vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "intermediate_size": 48, "max_position_embeddings": 24,
    "initializer_range": 0.2, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
CONFIGS: Mapping[str, Mapping[str, Any]] = {
    "bert": _SMALL_BERT,
    "roberta": {**_SMALL_BERT, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2},
    "distilbert": {
        "vocab_size": 64, "dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 48,
        "max_position_embeddings": 24, "initializer_range": 0.2,
    },
    "gpt2": {
        "vocab_size": 64, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 24,
        "initializer_range": 0.2, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
    },
    "llama": _SMALL_LLAMA,
    "mistral": _SMALL_LLAMA,
    "qwen2": _SMALL_LLAMA,
    "qwen3": {**_SMALL_LLAMA, "head_dim": 8},
    "gemma": {**_SMALL_LLAMA, "head_dim": 8},
    "gemma2": {**_SMALL_LLAMA, "head_dim": 8},
    "phi3": _SMALL_LLAMA,
    "xlm-roberta": {**_SMALL_BERT, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2},
    "electra": {**_SMALL_BERT, "embedding_size": 16},
    "t5": {
        "vocab_size": 64, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4,
        "decoder_start_token_id": 0,
    },
    "opt": {
        "vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
        "ffn_dim": 48, "max_position_embeddings": 24, "word_embed_proj_dim": 32, "init_std": 0.2,
        "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
    },
}  # fmt: skip


def tiny_config(model_type: str, **settings: Any) -> transformers.PretrainedConfig:
    """A config of a few thousand parameters."""
    return transformers.AutoConfig.for_model(model_type, **{**CONFIGS[model_type], **settings})


def build(
    architecture: str, config: transformers.PretrainedConfig, seed: int = 0
) -> PreTrainedModel:
    """A random model for inference; the same one for the same seed."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model: PreTrainedModel = getattr(transformers, architecture)(config)
    return model.eval()


def everything(name: str) -> bool:
    """Select every parameter."""
    return True


def perturb(model: PreTrainedModel, select: Selection = everything, seed: int = 1) -> None:
    """Change the selected parameters in place, by an amount that shows in the outputs."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            change = torch.randn(parameter.shape, generator=generator)
            if select(name):
                parameter += 0.1 * change


@dataclass(frozen=True)
class Recipe:
    """A base and the fine-tune made of it.

    Attributes:
        model_type: of both.
        base: class name of the base.
        tuned: class name of the fine-tune.
        settings: config values that differ from the tiny default, for both.
    """

    model_type: str
    base: str
    tuned: str
    settings: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Pair:
    """A saved base and fine-tune."""

    base: Path
    tuned: Path
    recipe: Recipe

    def load_tuned(self) -> PreTrainedModel:
        """The fine-tune, ready for inference."""
        return load(self.recipe.tuned, self.tuned)


def make_pair(
    recipe: Recipe,
    folder: Path,
    select: Selection = everything,
    prepare: Callable[[PreTrainedModel], object] = lambda model: None,
    tuned_settings: Mapping[str, Any] | None = None,
) -> Pair:
    """Save a base and a fine-tune of it.

    Args:
        recipe: the classes.
        folder: gets "base" and "tuned".
        select: which of the fine-tune's parameters differ from the base's. A head that the base
            lacks is random in any case.
        prepare: is given the fine-tune before it is changed (to resize its vocabulary).
        tuned_settings: config values of the fine-tune alone.
    """
    pair = Pair(folder / "base", folder / "tuned", recipe)
    config = tiny_config(recipe.model_type, **recipe.settings)
    base = build(recipe.base, config)
    perturb(base, seed=2)  # no bias is zero and no norm is one
    base.save_pretrained(pair.base)
    with torch.random.fork_rng():
        torch.manual_seed(3)
        tuned = load(recipe.tuned, pair.base, **(tuned_settings or {}))
        prepare(tuned)
    perturb(tuned, select)
    tuned.save_pretrained(pair.tuned)
    return pair


def load(architecture: str, path: Path, **settings: Any) -> PreTrainedModel:
    """`from_pretrained` in fp32 for inference, without its talk of new heads."""
    level = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    try:
        model = getattr(transformers, architecture).from_pretrained(path, **settings)
    finally:
        transformers.logging.set_verbosity(level)
    loaded: PreTrainedModel = model.float().eval()
    return loaded


def outputs(model: Any, vocabulary: int = 60) -> torch.Tensor:
    """All output tensors for a padded batch, flattened into one vector."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, vocabulary, (3, 7), generator=generator)
    mask = torch.ones_like(ids)
    mask[1, 5:] = 0
    mask[2, 3:] = 0
    ids = ids * mask
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        inputs = {"input_ids": ids, "attention_mask": mask}
        if getattr(model.config, "is_encoder_decoder", False):
            inputs["decoder_input_ids"] = ids
        found = model(**inputs)
    tensors = [value for value in found.to_tuple() if isinstance(value, torch.Tensor)]
    assert tensors
    return torch.cat([value.flatten() for value in tensors])


def distance(left: torch.Tensor, right: torch.Tensor) -> float:
    """The largest difference, as a share of the largest value."""
    assert left.shape == right.shape
    gap = float((left - right).abs().max() / right.abs().max())
    assert math.isfinite(gap)
    return gap


RECIPES: Mapping[str, Recipe] = {
    "bert-classifier": Recipe("bert", "BertForMaskedLM", "BertForSequenceClassification"),
    "bert-mlm": Recipe("bert", "BertForMaskedLM", "BertForMaskedLM"),
    "bert-mlm-untied": Recipe(
        "bert", "BertForMaskedLM", "BertForMaskedLM", {"tie_word_embeddings": False}
    ),
    "bert-bare-base": Recipe("bert", "BertModel", "BertForSequenceClassification"),
    "bert-bare-tuned": Recipe("bert", "BertForMaskedLM", "BertModel"),
    "bert-bare": Recipe("bert", "BertModel", "BertModel"),
    "bert-pretraining": Recipe("bert", "BertForPreTraining", "BertForPreTraining"),
    "bert-tokens": Recipe("bert", "BertForMaskedLM", "BertForTokenClassification"),
    "bert-answers": Recipe("bert", "BertForMaskedLM", "BertForQuestionAnswering"),
    "distilbert-classifier": Recipe(
        "distilbert", "DistilBertForMaskedLM", "DistilBertForSequenceClassification"
    ),
    "distilbert-mlm": Recipe("distilbert", "DistilBertForMaskedLM", "DistilBertForMaskedLM"),
    "roberta-classifier": Recipe(
        "roberta", "RobertaForMaskedLM", "RobertaForSequenceClassification"
    ),
    "roberta-mlm": Recipe("roberta", "RobertaForMaskedLM", "RobertaForMaskedLM"),
    "llama": Recipe("llama", "LlamaForCausalLM", "LlamaForCausalLM"),
    "llama-tied": Recipe(
        "llama", "LlamaForCausalLM", "LlamaForCausalLM", {"tie_word_embeddings": True}
    ),
    "llama-biases": Recipe(
        "llama", "LlamaForCausalLM", "LlamaForCausalLM",
        {"attention_bias": True, "mlp_bias": True},
    ),
    "llama-classifier": Recipe("llama", "LlamaForCausalLM", "LlamaForSequenceClassification"),
    "llama-bare": Recipe("llama", "LlamaModel", "LlamaModel"),
    "llama-bare-base": Recipe("llama", "LlamaModel", "LlamaForSequenceClassification"),
    "mistral": Recipe("mistral", "MistralForCausalLM", "MistralForCausalLM"),
    "qwen2": Recipe("qwen2", "Qwen2ForCausalLM", "Qwen2ForCausalLM"),
    "qwen3": Recipe("qwen3", "Qwen3ForCausalLM", "Qwen3ForCausalLM", {"tie_word_embeddings": True}),
    "gemma": Recipe("gemma", "GemmaForCausalLM", "GemmaForCausalLM"),
    "phi3": Recipe("phi3", "Phi3ForCausalLM", "Phi3ForCausalLM"),
    "gpt2": Recipe("gpt2", "GPT2LMHeadModel", "GPT2LMHeadModel"),
    "gpt2-classifier": Recipe("gpt2", "GPT2LMHeadModel", "GPT2ForSequenceClassification"),
    "gpt2-untied": Recipe(
        "gpt2", "GPT2LMHeadModel", "GPT2LMHeadModel", {"tie_word_embeddings": False}
    ),
    "gpt2-bare": Recipe("gpt2", "GPT2Model", "GPT2Model"),
    "opt": Recipe("opt", "OPTForCausalLM", "OPTForCausalLM"),
    "electra-classifier": Recipe(
        "electra", "ElectraForMaskedLM", "ElectraForSequenceClassification"
    ),
    "t5": Recipe("t5", "T5ForConditionalGeneration", "T5ForConditionalGeneration"),
}  # fmt: skip
