"""How transformers turns the tensors of a checkpoint into the parameters of a model in memory.

transformers 5 renames many tensors when it loads them, joins those of experts, and takes fused ones
apart, by rules that are its own data. Here the same rules are applied to tensors without values
(`loratool.tracing`), which shows where each parameter lies in the checkpoint.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

from loratool.boxes import UntraceableError
from loratool.errors import InputError
from loratool.pieces import Piece

Shapes = Mapping[str, tuple[int, ...]]

# Modules of older classes that transformers 5 has as parameters; by the class whose conversion a
# model shares. PEFT takes every target of such a name for one of them.
_TAKEN_FOR_EXPERTS = {
    "mixtral": ("gate", "w1", "w2", "w3"),
    "qwen2_moe": ("gate", "gate_proj", "up_proj", "down_proj"),
}


@dataclass(frozen=True)
class Stored:
    """How a model lies in a checkpoint.

    Attributes:
        pieces: parameter or buffer in memory -> its pieces, where it does not lie under its own
            name as it is.
        unused: tensors of the checkpoint that the class passes over on purpose.
        strange: tensors that it does not know.
    """

    pieces: Mapping[str, tuple[Piece, ...]]
    unused: frozenset[str]
    strange: tuple[str, ...]


def find_stored(model: Any, shapes: Shapes) -> Stored:
    """Find how a model would be loaded from a checkpoint, as its `from_pretrained` does it.

    Args:
        model: a transformers model on the meta device.
        shapes: the checkpoint's names and shapes; its layout may be the one on disk or, name by
            name, the one in memory.

    Raises:
        InputError: a parameter does not consist of slices of tensors, or its tensors do not fit
            together.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import (
        WeightConverter,
        WeightRenaming,
        dot_natural_key,
        rename_source_key,
    )

    state = model.state_dict()
    rules = get_model_conversion_mapping(model)
    renamings = [rule for rule in rules if isinstance(rule, WeightRenaming)]
    converters = [rule for rule in rules if isinstance(rule, WeightConverter)]
    converter_of = {pattern: rule for rule in converters for pattern in rule.source_patterns}
    prefix = model.base_model_prefix
    pieces: dict[str, tuple[Piece, ...]] = {}
    joined: dict[str, Any] = {}  # a converter's first target -> the converter with its tensors
    strange: list[str] = []
    owners: dict[str, str] = {}
    for name in sorted(shapes, key=dot_natural_key):
        target, pattern = rename_source_key(name, renamings, converters, prefix, state)
        if target not in state and name in state:
            target, pattern = rename_source_key(name, [], [], prefix, state)
        if target not in state:
            strange.append(name)
        elif pattern is not None:
            if target not in joined:
                joined[target] = deepcopy(converter_of[pattern])
            joined[target].add_tensor(target, name, pattern, name)
        elif target in owners:
            raise InputError(
                f"{name}: {_name(model)} has one parameter for it and {owners[target]}: {target}"
            )
        else:
            owners[target] = name
            if target != name:
                pieces[target] = (Piece(name),)
    for target, rule in joined.items():
        for parameter, found in _converted(model, state, target, rule, shapes).items():
            if parameter in owners:
                raise InputError(
                    f"{parameter}: is in the checkpoint both as {owners[parameter]} and as "
                    f"{found[0].tensor}"
                )
            if parameter not in state:
                strange += sorted({piece.tensor for piece in found})
            elif found != (Piece(parameter),):
                pieces[parameter] = found
    unused = frozenset(name for name in strange if _is_passed_over(model, name, renamings))
    return Stored(pieces, unused, tuple(name for name in strange if name not in unused))


def is_taken_for_experts(model_type: str, module: str) -> bool:
    """Whether PEFT, loading an adapter, takes a module of this model for experts or their router.

    peft 0.21 turns such targets into `target_parameters`, for the sake of adapters made with
    transformers 4. A linear module of the same name (a shared expert's, a dense layer's) then gets
    no update, without a word.
    """
    from transformers import conversion_mapping

    shared = getattr(conversion_mapping, "_MODEL_TO_CONVERSION_PATTERN", {})
    family = "mixtral" if model_type == "mixtral" else shared.get(model_type, "")
    return module.rpartition(".")[2] in _TAKEN_FOR_EXPERTS.get(family, ())


def _converted(
    model: Any, state: Mapping[str, Any], target: str, rule: Any, shapes: Shapes
) -> dict[str, tuple[Piece, ...]]:
    """Run a converter's operations on the tensors that it has collected by name."""
    from loratool.slicing import as_pieces
    from loratool.tracing import Traced

    names = [name for collected in rule.collected_tensors.values() for name in collected]
    for pattern, collected in rule.collected_tensors.items():
        rule.collected_tensors[pattern] = [Traced.source(name, shapes[name]) for name in collected]
    operations = ", ".join(repr(operation) for operation in rule.operations)
    what = f"{_name(model)}: {target}: {operations} of {names[0]}"
    if len(names) > 1:
        what += f" and {len(names) - 1} more"
    try:
        found = rule.convert(target, model=model, config=model.config)
        tensors = {name: v[0] if isinstance(v, list) else v for name, v in found.items()}
        pieces = {
            name: as_pieces(tensor.blocks, tuple(tensor.shape), shapes)
            for name, tensor in tensors.items()
        }
    except UntraceableError as error:
        raise InputError(f"{what} cannot be followed: {error}") from error
    except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError) as error:
        raise InputError(
            f"{what} fails: {error}; are tensors missing, or is config.json another model's?"
        ) from error
    for name, tensor in tensors.items():
        if name in state and state[name].shape != tensor.shape:
            raise InputError(
                f"{what} gives {name} the shape {tuple(tensor.shape)}, but in the class it has "
                f"{tuple(state[name].shape)}; are tensors missing, or is config.json another "
                "model's?"
            )
    return pieces


def _is_passed_over(model: Any, name: str, renamings: Any) -> bool:
    """Whether the class says that tensors of this name are to be ignored."""
    from transformers.core_model_loading import apply_renamings

    patterns = model._keys_to_ignore_on_load_unexpected or ()
    names = (name, apply_renamings(name, renamings))
    return any(re.search(pattern, word) for pattern in patterns for word in names)


def _name(model: Any) -> str:
    return type(model).__name__
