"""Model families whose names on disk and in memory agree, as data.

With them a checkpoint's names and shapes tell all that loratool must know about its modules, and
transformers (seconds to import) is not needed. A test holds this table to transformers' classes.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

# Modules that hold an embedding table, in any of the families below.
_EMBEDDINGS = re.compile(
    r"(.*\.)?(word_embeddings|position_embeddings|token_type_embeddings|embed_tokens"
    r"|embed_positions|wte|wpe|shared|relative_attention_bias|embed_in|embeddings"
    r"|token_embedding|position_embedding)"
)

# Buffers that older versions of transformers saved and today's compute; (pattern, dimensions).
_BUFFERS = (
    (re.compile(r"(.*\.)?position_ids"), 2),
    (re.compile(r"(.*\.)?inv_freq"), 1),
    (re.compile(r"(.*\.)?(attn|attention)\.bias"), 4),
    (re.compile(r"(.*\.)?(attn|attention)\.masked_bias"), 0),
)


@dataclass(frozen=True)
class Family:
    """What the names of one family mean.

    Attributes:
        model_type: config.json's name for it.
        signature: a pattern that one of its tensor names matches, and none of a family further
            down the table.
        heads: (patterns of tensor names, class): the first whose patterns are all found tells the
            class.
        conv1d: modules that store their weight as (in, out), as a pattern.
        tied: parameters of the output head and what they share their values with.
        ties_by_default: whether they are tied when the config does not say.
    """

    model_type: str
    signature: str
    heads: tuple[tuple[tuple[str, ...], str], ...]
    conv1d: str = ""
    tied: tuple[tuple[str, str], ...] = ()
    ties_by_default: bool = True


_ANY = (".",)
_NEVER = r"(?!)"  # for families that names alone do not tell from another


def _bert(model_type: str, prefix: str, signature: str) -> Family:
    """A family whose masked-LM head is `cls.predictions`."""
    table = f"{model_type}.embeddings.word_embeddings.weight"
    return Family(
        model_type,
        signature,
        (
            ((r"qa_outputs\.",), f"{prefix}ForQuestionAnswering"),
            # Token classifiers have no pooler; multiple choice has the names of a classifier.
            ((r"classifier\.", rf"{model_type}\.pooler\."), f"{prefix}ForSequenceClassification"),
            ((r"classifier\.",), f"{prefix}ForTokenClassification"),
            ((r"cls\.seq_relationship\.", r"cls\.predictions\."), f"{prefix}ForPreTraining"),
            ((r"cls\.seq_relationship\.",), f"{prefix}ForNextSentencePrediction"),
            ((r"cls\.predictions\.",), f"{prefix}ForMaskedLM"),
            (_ANY, f"{prefix}Model"),
        ),
        tied=(
            ("cls.predictions.decoder.weight", table),
            ("cls.predictions.decoder.bias", "cls.predictions.bias"),
        ),
    )


def _roberta(model_type: str, prefix: str, signature: str) -> Family:
    """A family whose modules lie in `roberta` and whose masked-LM head is `lm_head`."""
    return Family(
        model_type,
        signature,
        (
            ((r"qa_outputs\.",), f"{prefix}ForQuestionAnswering"),
            ((r"classifier\.out_proj\.",), f"{prefix}ForSequenceClassification"),
            ((r"classifier\.", r"roberta\.pooler\."), f"{prefix}ForMultipleChoice"),
            ((r"classifier\.",), f"{prefix}ForTokenClassification"),
            ((r"lm_head\.",), f"{prefix}ForMaskedLM"),
            (_ANY, f"{prefix}Model"),
        ),
        tied=(
            ("lm_head.decoder.weight", "roberta.embeddings.word_embeddings.weight"),
            ("lm_head.decoder.bias", "lm_head.bias"),
        ),
    )


def _decoder(model_type: str, prefix: str, signature: str, ties: bool = False) -> Family:
    """A Llama-like family; some question answering classes call their model `transformer`."""
    return Family(
        model_type,
        signature.replace("LAYER", r"((model|transformer)\.)?layers\.0"),
        (
            ((r"qa_outputs\.",), f"{prefix}ForQuestionAnswering"),
            ((r"score\.bias",), f"{prefix}ForTokenClassification"),
            ((r"score\.",), f"{prefix}ForSequenceClassification"),
            ((r"(lm_head|model)\.",), f"{prefix}ForCausalLM"),
            (_ANY, f"{prefix}Model"),
        ),
        tied=(("lm_head.weight", "model.embed_tokens.weight"),),
        ties_by_default=ties,
    )


# Families with more tensors than another come before it: Qwen has all that Llama has.
FAMILIES = {
    family.model_type: family
    for family in (
        _roberta("roberta", "Roberta", r"roberta\.encoder\.layer\.0\.attention\.self\.query\."),
        _roberta("xlm-roberta", "XLMRoberta", _NEVER),
        _bert("bert", "Bert", r"(bert\.)?encoder\.layer\.0\.attention\.self\.query\."),
        Family(
            "distilbert",
            r"(distilbert\.)?transformer\.layer\.0\.attention\.q_lin\.",
            (
                ((r"qa_outputs\.",), "DistilBertForQuestionAnswering"),
                ((r"pre_classifier\.",), "DistilBertForSequenceClassification"),
                ((r"classifier\.",), "DistilBertForTokenClassification"),
                ((r"vocab_projector\.",), "DistilBertForMaskedLM"),
                (_ANY, "DistilBertModel"),
            ),
            tied=(("vocab_projector.weight", "distilbert.embeddings.word_embeddings.weight"),),
        ),
        Family(
            "gpt2",
            r"(transformer\.)?h\.0\.attn\.c_attn\.",
            (
                ((r"qa_outputs\.",), "GPT2ForQuestionAnswering"),
                ((r"classifier\.",), "GPT2ForTokenClassification"),
                ((r"score\.",), "GPT2ForSequenceClassification"),
                ((r"multiple_choice_head\.",), "GPT2DoubleHeadsModel"),
                ((r"(lm_head|transformer)\.",), "GPT2LMHeadModel"),
                (_ANY, "GPT2Model"),
            ),
            conv1d=r"(.*\.)?(c_attn|c_proj|c_fc|q_attn)",
            tied=(("lm_head.weight", "transformer.wte.weight"),),
        ),
        Family(
            "opt",
            _NEVER,  # BART has all these names
            (
                ((r"qa_outputs\.",), "OPTForQuestionAnswering"),
                ((r"score\.",), "OPTForSequenceClassification"),
                ((r"(lm_head|model)\.",), "OPTForCausalLM"),
                (_ANY, "OPTModel"),
            ),
            tied=(("lm_head.weight", "model.decoder.embed_tokens.weight"),),
        ),
        _decoder("phi3", "Phi3", r"LAYER\.self_attn\.qkv_proj\."),
        _decoder("qwen3", "Qwen3", r"LAYER\.self_attn\.q_norm\."),
        _decoder("qwen2", "Qwen2", r"LAYER\.self_attn\.q_proj\.bias"),
        _decoder("llama", "Llama", r"LAYER\.self_attn\.q_proj\.weight"),
        _decoder("mistral", "Mistral", _NEVER),
        _decoder("gemma", "Gemma", _NEVER, ties=True),
        _decoder("gemma2", "Gemma2", _NEVER, ties=True),
    )
}


def is_embedding(module: str) -> bool:
    """Whether a module of this name holds an embedding table."""
    return _EMBEDDINGS.fullmatch(module) is not None


def is_buffer(name: str, shape: tuple[int, ...]) -> bool:
    """Whether a tensor is no parameter, but a buffer that the model's class computes by itself."""
    return any(len(shape) == size and regex.fullmatch(name) for regex, size in _BUFFERS)


def family_of_names(names: Iterable[str]) -> Family | None:
    """The first family of the table that a checkpoint's tensor names can belong to, if any."""
    names = tuple(names)
    for family in FAMILIES.values():
        if any(re.match(family.signature, name) for name in names):
            return family
    return None


def class_of_names(family: Family, names: Iterable[str]) -> str:
    """The model class whose head a checkpoint of this family holds."""
    names = tuple(names)
    for patterns, name in family.heads:
        if all(any(re.match(pattern, tensor) for tensor in names) for pattern in patterns):
            return name
    return ""


def family_of_class(architecture: str) -> Family | None:
    """The family of a class name such as BertForMaskedLM, or of a bare model type."""
    if architecture in FAMILIES:
        return FAMILIES[architecture]
    for family in FAMILIES.values():
        stem = family.heads[-1][1].removesuffix("Model")
        if re.fullmatch(rf"{stem}(For[A-Z]\w*|Model|LMHeadModel|DoubleHeadsModel)", architecture):
            return family
    return None
