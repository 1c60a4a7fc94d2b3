"""What names and shapes do not tell about a model, from its config.

The families of `loratool.families` need nothing but that table. For any other model the class
named in config.json is built by transformers on the meta device: no weights, but an import of
seconds, so only when asked for.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, Literal

from loratool.conversion import find_stored, is_taken_for_experts
from loratool.diffusion.kinds import is_conv1d, is_table
from loratool.diffusion.layouts import ldm_pieces
from loratool.errors import InputError, UsageError
from loratool.families import (
    FAMILIES,
    Family,
    class_of_names,
    family_of_class,
    family_of_names,
    is_buffer,
    is_embedding,
)
from loratool.pieces import Piece

# "conv1d" is GPT-2's module of that name, a linear one that stores (in, out); "conv" are torch's
# convolutions of 1 to 3 dimensions, (out, in / groups, *kernel); "experts" are 3-D parameters that
# hold a matrix for each expert.
Kind = Literal["linear", "conv1d", "embedding", "conv", "experts", "other"]
Shapes = Mapping[str, tuple[int, ...]]

# Ends of the names of classes with a language modelling head.
_WITH_LM_HEAD = ("CausalLM", "LMHeadModel", "MaskedLM", "PreTraining", "DoubleHeadsModel")

# PEFT's task types by the end of the class name.
_TASKS = {
    "ForSequenceClassification": "SEQ_CLS",
    "ForTokenClassification": "TOKEN_CLS",
    "ForQuestionAnswering": "QUESTION_ANS",
    "ForCausalLM": "CAUSAL_LM",
    "LMHeadModel": "CAUSAL_LM",
    "ForConditionalGeneration": "SEQ_2_SEQ_LM",
}

# Modules that PEFT keeps whole for a task: all whose name ends so.
TASK_HEADS: Mapping[str, tuple[str, ...]] = {
    "SEQ_CLS": ("classifier", "score"),
    "TOKEN_CLS": ("classifier", "score"),
    "QUESTION_ANS": ("qa_outputs",),
}


@dataclass(frozen=True)
class Skeleton:
    """The modules of a model.

    Attributes:
        kinds: parameter name in memory -> what kind of module it is the weight of.
        tied: parameter -> the parameter that it shares its values with.
        notes: what had to be guessed.
        guessed: whether the kinds are guesses by name and shape.
        pieces: parameter or buffer in memory -> where its values lie in the checkpoint, if not
            simply under its name.
        unused: tensors of the checkpoint that the model does not have in memory.
        transposed_experts: parameters of the kind "experts" that are stored as (E, in, out) rather
            than (E, out, in).
        groups: weight of a convolution -> its number of groups, where that is more than 1.
        unreachable: linear weights that PEFT cannot adapt, because of their modules' names.
    """

    kinds: Mapping[str, Kind]
    tied: Mapping[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    guessed: bool = False
    pieces: Mapping[str, tuple[Piece, ...]] = field(default_factory=dict)
    unused: frozenset[str] = frozenset()
    transposed_experts: frozenset[str] = frozenset()
    groups: Mapping[str, int] = field(default_factory=dict)
    unreachable: frozenset[str] = frozenset()


def task_type(architecture: str) -> str | None:
    """PEFT's task type for a model class, or None where PEFT has none."""
    return next((task for end, task in _TASKS.items() if architecture.endswith(end)), None)


def is_in_task_head(name: str, task: str | None) -> bool:
    """Whether PEFT keeps the module of this parameter whole because of the task alone."""
    parts = name.split(".")
    modules = (".".join(parts[:end]) for end in range(1, len(parts)))
    return any(module.endswith(TASK_HEADS.get(task or "", ())) for module in modules)


def architecture_of(config: Mapping[str, Any] | None) -> str:
    """The class that a config names first, or ""."""
    names = (config or {}).get("architectures")
    return str(names[0]) if isinstance(names, list) and names else ""


def is_diffusers(config: Mapping[str, Any] | None) -> bool:
    """Whether this is the config of a diffusers model, or of a pipeline of several models.

    Their two-dimensional weights are linear modules' but for embedding tables, which have telling
    names, and none of them is needed by transformers.
    """
    return "_class_name" in (config or {})


def build_skeleton(
    config: Mapping[str, Any] | None, shapes: Shapes, strict: bool = True
) -> Skeleton:
    """Tell linear weights, embeddings and tied tensors of a model apart.

    Args:
        config: its config.json, if it has one.
        shapes: its tensors' names and shapes.
        strict: whether transformers must know all of the tensors; otherwise those that it does not
            know are taken for what they are called.

    Raises:
        InputError: transformers does not know the class, or a tensor.
    """
    if is_diffusers(config):
        return Skeleton(_diffusion_kinds(shapes))
    model_type = (config or {}).get("model_type")
    family = FAMILIES.get(str(model_type)) if model_type else family_of_names(shapes)
    if family is not None:
        return Skeleton(_kinds_by_name(shapes, family), _tied(family, config, shapes))
    if config and architecture_of(config) and model_type:
        text = json.dumps(dict(config), sort_keys=True)
        return _remembered(text, tuple(shapes.items()), strict)
    if ldm_pieces(shapes):
        return Skeleton(_diffusion_kinds(shapes))
    note = "the model's family is unknown: linear weights were told by their names and shapes"
    return Skeleton(_kinds_by_name(shapes, None), notes=(note,), guessed=True)


def is_known(config: Mapping[str, Any]) -> bool:
    """Whether the class that a config names can be built."""
    if config.get("model_type") in FAMILIES:
        return True
    import transformers

    return hasattr(transformers, architecture_of(config) or "no class")


def _kinds_by_name(shapes: Shapes, family: Family | None) -> dict[str, Kind]:
    def kind(name: str, shape: tuple[int, ...]) -> Kind:
        module, _, leaf = name.rpartition(".")
        if leaf != "weight" or len(shape) != 2:
            return "other"
        if is_embedding(module):
            return "embedding"
        if family and family.conv1d and re.fullmatch(family.conv1d, module):
            return "conv1d"
        return "linear"

    return {name: kind(name, shape) for name, shape in shapes.items()}


def _diffusion_kinds(shapes: Shapes) -> dict[str, Kind]:
    kinds = _kinds_by_name(shapes, None)
    kinds |= {name: "conv" for name, shape in shapes.items() if _is_plain_convolution(name, shape)}
    for name, kind in kinds.items():
        if kind == "linear":
            module = name.removesuffix(".weight")
            kinds[name] = (
                "embedding" if is_table(module) else "conv1d" if is_conv1d(module) else "linear"
            )
    return kinds


def _is_plain_convolution(name: str, shape: tuple[int, ...]) -> bool:
    """Whether a weight is a convolution's that is not depthwise; other groups are not used."""
    if not name.endswith(".weight") or len(shape) not in (4, 5):
        return False
    return shape[1] > 1 or shape[0] == 1


def _tied(family: Family, config: Mapping[str, Any] | None, shapes: Shapes) -> dict[str, str]:
    if not (config or {}).get("tie_word_embeddings", family.ties_by_default):
        return {}
    architecture = architecture_of(config) or class_of_names(family, shapes)
    has_head = architecture.endswith(_WITH_LM_HEAD)
    return {head: source for head, source in family.tied if has_head and source in shapes}


@lru_cache(maxsize=4)
def _remembered(
    config: str, shapes: tuple[tuple[str, tuple[int, ...]], ...], strict: bool
) -> Skeleton:
    """Built once for all adapters that are bound to a base: large models take seconds."""
    return _from_transformers(json.loads(config), dict(shapes), strict)


def _from_transformers(config: Mapping[str, Any], shapes: Shapes, strict: bool = True) -> Skeleton:
    """Build the class on the meta device and look at its modules."""
    import torch
    import transformers

    architecture = architecture_of(config)
    cls = getattr(transformers, architecture, None)
    if cls is None:
        raise InputError(f"config.json: transformers has no class {architecture!r}")
    known = without_tags(config)
    settings = {k: v for k, v in known.items() if k not in ("model_type", "transformers_version")}
    with torch.device("meta"):
        model = cls(transformers.AutoConfig.for_model(config["model_type"], **settings))
    stored = find_stored(model, shapes)
    strange = [name for name in stored.strange if not is_buffer(name, shapes[name])]
    if strange and strict:
        more = f" (and {len(strange) - 1} more)" if len(strange) > 1 else ""
        raise InputError(f"{strange[0]}: {architecture} has no parameter for it{more}")
    modules = dict(model.named_modules(remove_duplicate=False))
    kinds: dict[str, Kind] = {}
    groups: dict[str, int] = {}
    transposed, unreachable = set(), set()
    for name, parameter in model.named_parameters(remove_duplicate=False):
        path = name.rpartition(".")[0]
        module = modules[path]
        kind = kinds[name] = _kind(name, parameter, module)
        if kind == "conv" and module.groups > 1:
            groups[name] = module.groups
        elif kind == "experts" and getattr(module, "is_transposed", False):
            transposed.add(name)
        elif kind == "linear" and is_taken_for_experts(model.config.model_type, path):
            unreachable.add(name)
    return Skeleton(
        kinds,
        dict(getattr(model, "all_tied_weights_keys", None) or {}),
        pieces=stored.pieces,
        unused=stored.unused,
        transposed_experts=frozenset(transposed),
        groups=groups,
        unreachable=frozenset(unreachable),
    )


def without_tags(value: Any) -> Any:
    """A config's values; transformers writes an infinity as {"__float__": "Infinity"}."""
    if isinstance(value, list):
        return [without_tags(item) for item in value]
    if not isinstance(value, Mapping):
        return value
    if set(value) == {"__float__"}:
        return float(value["__float__"])
    return {key: without_tags(item) for key, item in value.items()}


def _kind(name: str, parameter: Any, module: Any) -> Kind:
    """What a parameter is in the module that holds it."""
    import torch

    if parameter.ndim == 3 and getattr(module, "num_experts", None) == parameter.shape[0]:
        return "experts"
    if not f".{name}".endswith(".weight"):
        return "other"
    if type(module).__name__ == "Conv1D":
        return "conv1d"
    if isinstance(module, torch.nn.Linear):
        return "linear"
    if isinstance(module, torch.nn.Conv1d | torch.nn.Conv2d | torch.nn.Conv3d):
        return "conv"
    return "embedding" if isinstance(module, torch.nn.Embedding) else "other"


def complete_config(
    config: Mapping[str, Any] | None,
    shapes: Shapes,
    other: Mapping[str, Any] | None = None,
    architecture: str = "",
) -> tuple[dict[str, Any] | None, tuple[str, ...]]:
    """Fill in what transformers needs and a config.json leaves out.

    Args:
        config: as read, or None.
        shapes: the tensors it describes.
        other: the config of a related model, for its model_type.
        architecture: the user's word: a class name or a model type.

    Returns:
        The completed config (None if there was none and nothing is known), and notes on what was
        filled in.

    Raises:
        UsageError: `architecture` names nothing that loratool or transformers knows, or is given
            for a diffusers model.
    """
    if config is None and not architecture:
        return None, ()
    if config is not None and is_diffusers(config):
        if architecture:
            raise UsageError(f"--architecture {architecture}: a diffusers model tells its class")
        return dict(config), ()
    found, notes = dict(config or {}), []
    family = family_of_names(shapes)
    if architecture:
        chosen = _family_by_word(architecture)
        found["model_type"], family = chosen.model_type, chosen
        if architecture != chosen.model_type:
            found["architectures"] = [architecture]
    if not found.get("model_type"):
        guess = (other or {}).get("model_type") or (family and family.model_type)
        if guess:
            found["model_type"] = guess
            notes.append(f"config.json has no model_type: took {guess!r}")
        else:
            notes.append("config.json has no model_type: name it with --architecture")
    family = FAMILIES.get(str(found.get("model_type")), family)
    if not architecture_of(found) and family is not None:
        found["architectures"] = [class_of_names(family, shapes)]
        notes.append(f"config.json names no architecture: took {found['architectures'][0]}")
    return _complete_sizes(found, shapes, notes), tuple(notes)


def _family_by_word(architecture: str) -> Family:
    family = family_of_class(architecture)
    if family is None:
        raise UsageError(
            f"--architecture {architecture}: unknown; use a class such as "
            f"BertForSequenceClassification or one of {', '.join(FAMILIES)}"
        )
    return family


def _complete_sizes(config: dict[str, Any], shapes: Shapes, notes: list[str]) -> dict[str, Any]:
    """Correct the number of labels and the vocabulary to what the tensors have."""
    if architecture_of(config).endswith("Classification"):
        heads = ("classifier.weight", "score.weight", "classifier.out_proj.weight")
        rows = next((shapes[name][0] for name in heads if name in shapes), None)
        labels = config.get("id2label")
        if rows is not None and rows != (len(labels) if labels else 2):
            config["id2label"] = {str(i): f"LABEL_{i}" for i in range(rows)}
            config["label2id"] = {f"LABEL_{i}": i for i in range(rows)}
            notes.append(f"config.json names other labels than the head's {rows}: numbered them")
        config.pop("num_labels", None)  # follows from id2label
    tables = ("word_embeddings.weight", "embed_tokens.weight", "wte.weight", "shared.weight")
    vocabulary = next((s[0] for n, s in shapes.items() if n.endswith(tables)), None)
    if vocabulary is not None and config.get("vocab_size", vocabulary) != vocabulary:
        notes.append(
            f"config.json says vocab_size {config['vocab_size']}, the embedding has {vocabulary}"
        )
        config["vocab_size"] = vocabulary
    return config
