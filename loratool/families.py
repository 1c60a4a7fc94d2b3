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
    r"|embed_positions|wte|wpe|shared|relative_attention_bias|embed_in|embeddings)"
)


@dataclass(frozen=True)
class Family:
    """What the names of one family mean.

    Attributes:
        model_type: config.json's name for it.
        signature: a pattern that one of its tensor names matches, and no other family's does.
        heads: (pattern of a tensor name, class): the first that matches tells the class.
        conv1d: modules that store their weight as (in, out), as a pattern.
        tied: the output head and the embedding that it shares a weight with.
        ties_by_default: whether they are tied when the config does not say.
    """

    model_type: str
    signature: str
    heads: tuple[tuple[str, str], ...]
    conv1d: str = ""
    tied: tuple[tuple[str, str], ...] = ()
    ties_by_default: bool = True


def _encoder(model_type: str, prefix: str, signature: str, lm_head: str) -> Family:
    """A BERT-like family; `lm_head` is the module of its masked-LM decoder."""
    return Family(
        model_type,
        signature,
        (
            (r"qa_outputs\.", f"{prefix}ForQuestionAnswering"),
            (r"(pre_)?classifier\.", f"{prefix}ForSequenceClassification"),
            (r"cls\.seq_relationship\.", f"{prefix}ForPreTraining"),
            (re.escape(lm_head.rpartition(".")[0] or lm_head), f"{prefix}ForMaskedLM"),
            (r".", f"{prefix}Model"),
        ),
        tied=((f"{lm_head}.weight", f"{model_type}.embeddings.word_embeddings.weight"),),
    )


def _decoder(model_type: str, prefix: str, signature: str, ties: bool = False) -> Family:
    """A Llama-like family."""
    return Family(
        model_type,
        signature,
        (
            (r"score\.", f"{prefix}ForSequenceClassification"),
            (r"(lm_head|model)\.", f"{prefix}ForCausalLM"),
            (r".", f"{prefix}Model"),
        ),
        tied=(("lm_head.weight", "model.embed_tokens.weight"),),
        ties_by_default=ties,
    )


_NEVER = r"(?!)"  # for families that names alone do not tell from another

FAMILIES = {
    family.model_type: family
    for family in (
        _encoder("bert", "Bert", r"(bert\.)?encoder\.layer\.0\.", "cls.predictions.decoder"),
        _encoder("roberta", "Roberta", r"roberta\.encoder\.layer\.0\.", "lm_head.decoder"),
        _encoder(
            "distilbert", "DistilBert", r"(distilbert\.)?transformer\.layer\.0\.", "vocab_projector"
        ),
        Family(
            "gpt2",
            r"(transformer\.)?h\.0\.attn\.c_attn\.",
            (
                (r"score\.", "GPT2ForSequenceClassification"),
                (r"(lm_head|transformer)\.", "GPT2LMHeadModel"),
                (r".", "GPT2Model"),
            ),
            conv1d=r"(.*\.)?(c_attn|c_proj|c_fc|q_attn)",
            tied=(("lm_head.weight", "transformer.wte.weight"),),
        ),
        _decoder("llama", "Llama", r"(model\.)?layers\.0\.self_attn\.q_proj\.weight"),
        _decoder("mistral", "Mistral", _NEVER),
        _decoder("qwen2", "Qwen2", r"(model\.)?layers\.0\.self_attn\.q_proj\.bias"),
        _decoder("qwen3", "Qwen3", r"(model\.)?layers\.0\.self_attn\.q_norm\."),
        _decoder("gemma", "Gemma", _NEVER, ties=True),
        _decoder("phi3", "Phi3", r"(model\.)?layers\.0\.self_attn\.qkv_proj\."),
    )
}


def is_embedding(module: str) -> bool:
    """Whether a module of this name holds an embedding table."""
    return _EMBEDDINGS.fullmatch(module) is not None


def family_of_names(names: Iterable[str]) -> Family | None:
    """The family that a checkpoint's tensor names belong to, if they tell.

    Where several match, the one with the longest match: Qwen has all that Llama has and more.
    """
    best: tuple[int, str] = (0, "")
    for name in names:
        for family in FAMILIES.values():
            if match := re.match(family.signature, name):
                best = max(best, (len(match[0]), family.model_type))
    return FAMILIES.get(best[1])


def class_of_names(family: Family, names: Iterable[str]) -> str:
    """The model class whose head a checkpoint of this family holds."""
    names = tuple(names)
    for pattern, name in family.heads:
        if any(re.match(pattern, tensor) for tensor in names):
            return name
    return ""


def family_of_class(architecture: str) -> Family | None:
    """The family of a class name such as BertForMaskedLM, or of a bare model type."""
    if architecture in FAMILIES:
        return FAMILIES[architecture]
    for family in FAMILIES.values():
        stem = family.heads[-1][1].removesuffix("Model")
        if re.fullmatch(rf"{stem}(For[A-Z]\w*|Model|LMHeadModel)", architecture):
            return family
    return None
