"""Quantized checkpoints read as plain ones: codes and scales become values, lazily.

A quantized checkpoint stores a weight as codes with companions (scales, tables, a description).
What is recognised here, by names, types, shapes and config.json, is shown as the plain weight that
it stands for, in fp32, and decoded tile by tile when it is read. What is not recognised is refused:
adding an update to codes would give nonsense. One module a scheme; GGUF is a file format of its own
and its plugin does the same.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from loratool.checkpoint import Checkpoint, LazyTensor, Stored
from loratool.errors import FormatError, UnsupportedError
from loratool.families import FAMILIES, Family, family_of_names
from loratool.quantized import eight_bit, four_bit, fp8
from loratool.quantized.scheme import Found
from loratool.quantized.unsupported import refusal
from loratool.reports import counted, listed

_SETTINGS = "quantization_config"
_SHOWN = 12
_KINDS = 4


def dequantized(checkpoint: Checkpoint) -> Checkpoint:
    """The plain checkpoint that a quantized one stands for; itself if nothing is quantized.

    Raises:
        UnsupportedError: it is quantized in a way that loratool cannot read.
        FormatError: companions are missing, or shapes contradict each other; all at once.
    """
    settings = _settings(checkpoint)
    if sentence := refusal(checkpoint, settings):
        raise UnsupportedError(f"{checkpoint.label}: {sentence}")
    conv1d = _conv1d(checkpoint)
    found: dict[str, Found] = {}
    hidden: set[str] = set()
    problems: list[str] = []
    for scheme in (four_bit, eight_bit, fp8):
        result = scheme.find(checkpoint, settings, conv1d)
        found |= result.tensors
        hidden |= result.hidden
        problems += result.problems
    if problems:
        more = f"\n  and {len(problems) - _SHOWN} more" if problems[_SHOWN:] else ""
        lines = "\n".join(f"  {problem}" for problem in problems[:_SHOWN])
        raise FormatError(
            f"{checkpoint.label}: its quantized weights cannot be read:\n{lines}{more}"
        )
    if not found:
        return checkpoint
    tensors = {
        name: _plain(name, tensor, found.get(name))
        for name, tensor in checkpoint.items()
        if name not in hidden
    }
    words = {name: found[name].words for name in tensors if name in found}
    return replace(
        _without_settings(checkpoint),
        tensors=tensors,
        shards={name: checkpoint.shards[name] for name in tensors if name in checkpoint.shards},
        aliases={n: t for n, t in checkpoint.aliases.items() if n in tensors and t in tensors},
        index_files={},
        quantized=words,
        stored=Stored(checkpoint, {name: found[name].form for name in words}),
    )


def notes_of(checkpoint: Checkpoint) -> tuple[str, ...]:
    """What the user should hear about a checkpoint that is quantized."""
    if not checkpoint.quantized:
        return ()
    return (
        f"{checkpoint.label}: {len(checkpoint.quantized)} of {counted(len(checkpoint), 'tensor')} "
        f"are quantized ({schemes(checkpoint)}): read as the values that the codes stand for",
    )


def schemes(checkpoint: Checkpoint) -> str:
    """The schemes of a quantized checkpoint, the most common first, for people."""
    counts = Counter(checkpoint.quantized.values()).most_common()
    return listed([f"{words} ({counted(count, 'tensor')})" for words, count in counts], _KINDS)


def _settings(checkpoint: Checkpoint) -> Mapping[str, Any]:
    """What config.json says of the quantization; early compressed-tensors in another key."""
    config = checkpoint.config or {}
    found = config.get(_SETTINGS) or config.get("compression_config")
    return found if isinstance(found, dict) else {}


def _without_settings(checkpoint: Checkpoint) -> Checkpoint:
    kept = {
        key: value
        for key, value in (checkpoint.config or {}).items()
        if key not in (_SETTINGS, "compression_config")
    }
    if checkpoint.config is None or kept == checkpoint.config:
        return checkpoint
    return checkpoint.with_config(kept)


def _conv1d(checkpoint: Checkpoint) -> Family | None:
    """The family, if it stores some plain weights as (in, out), which quantizers turn around."""
    model_type = (checkpoint.config or {}).get("model_type")
    family = FAMILIES.get(str(model_type)) if model_type else family_of_names(checkpoint)
    return family if family is not None and family.conv1d else None


def _plain(name: str, tensor: LazyTensor, found: Found | None) -> LazyTensor:
    if found is None:
        return tensor
    return LazyTensor(name, "F32", found.shape, found.form.blocks, tensor.origin)
