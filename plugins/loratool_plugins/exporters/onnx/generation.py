"""Greedy generation through an exported key-value cache, held against PyTorch.

ONNX Runtime generates; then PyTorch reads prompt and generated tokens in one pass. If at every
position the token that PyTorch finds likeliest is the one that was generated, greedy generation
with PyTorch gives the same tokens: the first, hence the second, and so on. One pass costs one
reading of the weights, and its logits, keys and values are what those of each step must equal.

Generation here goes on after an end-of-text token and applies no other rule of a generation config
(forced or suppressed tokens, penalties): these stand beside the graphs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from loratool.errors import VerificationError
from loratool.shell import position_limit
from loratool_plugins.exporters.onnx.comparing import (
    Array,
    Comparison,
    Tolerance,
    difference,
    run_session,
)
from loratool_plugins.exporters.onnx.inputs import Sizes, sample
from loratool_plugins.exporters.onnx.judging import Answer, judged
from loratool_plugins.exporters.onnx.references import Batch, References
from loratool_plugins.exporters.onnx.sessions import Arrays, Session

TOKENS = 16
# (batch, tokens of the prompt, tokens that an encoder reads).
PROMPTS = ((2, 7, 9), (3, 5, 12))


@dataclass(frozen=True)
class Generated:
    """What ONNX Runtime has generated from one batch of prompts.

    Attributes:
        prompt: int64 (batch, length), padding included.
        mask: bool (batch, length), where the prompt is no padding.
        tokens: the generated ones, int64 (batch, count).
        logits: of the prefill (batch, positions, vocabulary), then of each decode step, (batch, 1,
            vocabulary).
        prefill: the cache after the prompt, by output name.
        cache: the cache after the last step; without what is computed from an encoder's states.
        states: the encoder's, or None.
    """

    prompt: Array
    mask: Array
    tokens: Array
    logits: Sequence[Array]
    prefill: Arrays
    cache: Arrays
    states: Array | None = None


@dataclass(frozen=True)
class Generation:
    """How generation compares with PyTorch's.

    Attributes:
        comparison: `sequence` is the prompt's length. Differences are those of "prefill logits",
            "decode logits", "encoder states", and of every tensor of the cache.
        tokens: how many were generated in each row.
        ties: (row, step) where PyTorch prefers another token by less than the tolerance: which
            one is chosen is a matter of rounding there.
    """

    comparison: Comparison
    tokens: int
    ties: tuple[tuple[int, int], ...]

    @property
    def is_equal(self) -> bool:
        """Whether PyTorch generates the very same tokens."""
        return not self.ties


def prompts_for(cls: Any, config: Any, seed: int) -> list[dict[str, torch.Tensor]]:
    """Random prompts to generate from, of several shapes.

    Returns:
        The arguments of forward for each: those of a decoder are padded on the left; those of an
        encoder-decoder are the encoder's, padded on the right, and `decoder_input_ids`.
    """
    made = []
    for number, (batch, length, source) in enumerate(PROMPTS):
        sizes = Sizes(batch, length, source=source)
        inputs = sample(cls, config, "prefill", sizes, seed=seed + number)
        if config.is_encoder_decoder:
            tokens = inputs["decoder_input_ids"]
            start = getattr(config, "decoder_start_token_id", None)
            if isinstance(start, int):
                tokens[:, 0] = start
            inputs = {
                **sample(cls, config, "encoder", sizes, seed=seed + number),
                "decoder_input_ids": tokens,
            }
        made.append({name: v for name, v in inputs.items() if torch.is_tensor(v)})
    return made


def tokens_for(config: Any, prompt: Mapping[str, torch.Tensor]) -> int:
    """How many tokens to generate: 16, or fewer if the model's limit comes first."""
    length = prompt.get("decoder_input_ids", prompt.get("input_ids"))
    assert length is not None
    limit = position_limit(config) or getattr(config, "max_target_positions", None)
    return min(TOKENS, max(2, limit - length.shape[1])) if limit else TOKENS


def generate(
    sessions: Mapping[str, Session], inputs: Mapping[str, Any], count: int = TOKENS
) -> Generated:
    """Choose the likeliest token `count` times, the prompt's cache being read and grown.

    Args:
        sessions: "prefill" and "decode", and "encoder" where there is one.
        inputs: as `prompts_for` gives them.
        count: how many tokens.

    Raises:
        VerificationError: a graph has an input that nothing gives, or gives no logits, or NaN.
    """
    given = {name: np.asarray(value) for name, value in inputs.items()}
    states = None
    if "encoder" in sessions:
        states = run_session(sessions["encoder"], given)["last_hidden_state"]
        prompt = given["decoder_input_ids"]
        fixed = {"encoder_hidden_states": states}
        if "attention_mask" in given:
            fixed["encoder_attention_mask"] = given["attention_mask"]
        mask, token_name = np.ones_like(prompt), "decoder_input_ids"
        feed = {**fixed, token_name: prompt}
    else:
        prompt, fixed, token_name = given["input_ids"], {}, "input_ids"
        mask = given.get("attention_mask", np.ones_like(prompt))
        feed = {**given, "attention_mask": mask, "position_ids": positions(mask)}
    cache: Arrays = {}
    logits: list[Array] = []
    tokens: list[Array] = []
    prefill: Arrays = {}
    grown = mask
    while True:
        found = run_session(sessions["decode" if logits else "prefill"], {**feed, **_past(cache)})
        if "logits" not in found:
            raise VerificationError("a graph of the decoder returns no logits")
        logits.append(found["logits"].astype(np.float32))
        if np.isnan(logits[-1][:, -1]).any():
            raise VerificationError("logits: ONNX Runtime gives NaN")
        tokens.append(logits[-1][:, -1].argmax(-1)[:, None].astype(prompt.dtype))
        latest = {name: value for name, value in found.items() if name.startswith("present.")}
        cache = {**cache, **latest}
        prefill = prefill or cache
        if len(tokens) == count:
            break
        grown = np.concatenate([grown, np.ones_like(tokens[-1])], 1)
        place = positions(grown)[:, -1:]
        feed = {**fixed, token_name: tokens[-1], "attention_mask": grown, "position_ids": place}
    written = np.concatenate(tokens, 1)
    return Generated(prompt, mask == 1, written, logits, prefill, latest, states)


def batch_for(inputs: Mapping[str, torch.Tensor], generated: Generated) -> Batch:
    """What PyTorch reads in one pass: the prompt and all generated tokens but the last."""
    added = torch.from_numpy(generated.tokens[:, :-1])
    if generated.states is not None:
        tokens = torch.cat([inputs["decoder_input_ids"], added], 1)
        return {**inputs, "decoder_input_ids": tokens, "use_cache": True}
    mask = _extended(generated)
    made: dict[str, Any] = {
        **inputs,
        "input_ids": torch.cat([inputs["input_ids"], added], 1),
        "use_cache": True,
    }
    if "attention_mask" in inputs:
        made["attention_mask"] = torch.from_numpy(mask.astype(np.int64))
    if "position_ids" in inputs:
        made["position_ids"] = torch.from_numpy(positions(mask.astype(np.int64)))
    return made


def positions(mask: Array) -> Array:
    """The positions of tokens, counted where the mask is 1, as transformers' generate counts."""
    counted: Array = np.where(mask == 0, 0, mask.cumsum(-1) - 1)
    return counted


def compare_generation(
    generated: Generated,
    inputs: Mapping[str, torch.Tensor],
    reference: Arrays,
    tolerance: Tolerance,
) -> Generation:
    """Hold what was generated against PyTorch's outputs for `batch_for`.

    Raises:
        VerificationError: logits, states or the cache differ from PyTorch's by more than is
            allowed, or PyTorch prefers another token by more than that.
    """
    batch, length = generated.prompt.shape
    expected = reference["logits"]
    found: dict[str, tuple[float, float]] = {}
    source = None
    if generated.states is not None and "attention_mask" in inputs:
        source = inputs["attention_mask"].numpy() == 1
    if generated.states is not None and "encoder_last_hidden_state" in reference:
        pair = [generated.states, reference["encoder_last_hidden_state"]]
        one, other = (each if source is None else each[source] for each in pair)
        found["encoder states"] = difference("encoder states", one, other)
    first, steps = generated.logits[0], np.concatenate(generated.logits[1:], 1)
    seen = generated.mask[:, length - first.shape[1] :]
    at_prompt = expected[:, length - first.shape[1] : length]
    found["prefill logits"] = difference("prefill logits", first[seen], at_prompt[seen])
    found["decode logits"] = difference("decode logits", steps, expected[:, length:])
    whole = _extended(generated)
    for when, cache, end in (
        ("after the prompt", generated.prefill, length),
        ("at the end", generated.cache, whole.shape[1]),
    ):
        for name, value in cache.items():
            if name not in reference:
                raise VerificationError(f"{name}: PyTorch's cache has no such tensor")
            crossed = ".encoder." in name
            other = reference[name] if crossed else _first(reference[name], end, whole.shape[1])
            kept = source if crossed else whole[:, :end]
            key = f"{name} {when}"
            found[key] = _cache_difference(key, value, other, kept)
    comparison = Comparison(
        batch,
        length,
        {name: apart for name, (apart, _) in found.items()},
        {name: largest for name, (_, largest) in found.items()},
    )
    comparison.judge("generation", tolerance)
    largest = max(found["prefill logits"][1], found["decode logits"][1])
    ties = _ties(generated, expected[:, length - 1 :], 2 * tolerance.limit(largest))
    return Generation(comparison, generated.tokens.shape[1], ties)


def verify_generation(
    sessions: Mapping[str, Session],
    prompts: Sequence[Mapping[str, torch.Tensor]],
    answer: Answer,
    tolerance: Tolerance,
    counts: Sequence[int] = (),
) -> tuple[list[Generation], Tolerance, str]:
    """Generate from several batches of prompts, and hold that against PyTorch.

    Args:
        sessions: "prefill" and "decode", and "encoder" where there is one.
        prompts: as `prompts_for` gives them.
        answer: runs PyTorch on batches, all in one pass (`references_of`).
        tolerance: how far logits and caches may be apart.
        counts: how many tokens for each; 16 if it is not said.

    Returns:
        One result a batch, the tolerance that held, and how PyTorch was run.

    Raises:
        VerificationError: they are not what PyTorch gives.
    """
    generated = [
        generate(sessions, inputs, count)
        for inputs, count in zip(prompts, counts or [TOKENS] * len(prompts), strict=True)
    ]
    batches = [batch_for(inputs, made) for inputs, made in zip(prompts, generated, strict=True)]

    def check(references: References, tolerance: Tolerance) -> list[Generation]:
        return [
            compare_generation(made, inputs, outputs, tolerance)
            for made, inputs, outputs in zip(generated, prompts, references.outputs, strict=True)
        ]

    return judged(check, answer, batches, tolerance)


def describe_generation(found: Generation, tolerance: Tolerance) -> dict[str, Any]:
    """A generation as plain data; of the cache's tensors the one nearest to its limit."""
    compared = found.comparison

    def share(name: str) -> float:
        allowed = tolerance.limit(compared.largest[name])
        return compared.differences[name] / allowed if allowed else 0.0

    caches = [name for name in compared.differences if name.startswith("present.")]
    told = [name for name in compared.differences if name not in caches]
    if caches:
        told.append(max(caches, key=share))
    return {
        "batch": compared.batch,
        "prompt": compared.sequence,
        "tokens": found.tokens,
        "equal": found.is_equal,
        "ties": [list(place) for place in found.ties],
        "max_difference": {name: compared.differences[name] for name in told},
        "allowed": {name: tolerance.limit(compared.largest[name]) for name in told},
        "largest_value": {name: compared.largest[name] for name in told},
    }


def _extended(generated: Generated) -> Array:
    """The mask of the prompt and of the generated tokens but the last."""
    return np.concatenate([generated.mask, np.ones_like(generated.tokens[:, :-1], bool)], 1)


def _past(cache: Arrays) -> Arrays:
    """A cache that was returned, as the next step takes it."""
    return {name.replace("present.", "past_key_values.", 1): value for name, value in cache.items()}


def _first(values: Array, end: int, total: int) -> Array:
    """Keys or values of the first `end` of `total` tokens; a window has dropped some of them."""
    held = values.shape[2]
    return values[:, :, : held - (total - end)]


def _cache_difference(
    name: str, found: Array, expected: Array, kept: Array | None
) -> tuple[float, float]:
    """As `difference`, of the last tokens that both hold, (batch, heads, tokens, size)."""
    if found.shape[:2] != expected.shape[:2] or found.shape[3:] != expected.shape[3:]:
        raise VerificationError(
            f"{name} has shape {found.shape} in ONNX Runtime and {expected.shape} in PyTorch"
        )
    count = min(found.shape[2], expected.shape[2])
    one, other = (np.moveaxis(each[:, :, -count:], 2, 1) for each in (found, expected))
    if kept is not None:
        seen = kept[:, -count:]
        one, other = one[seen], other[seen]
    return difference(name, one, other)


def _ties(generated: Generated, expected: Array, allowed: float) -> tuple[tuple[int, int], ...]:
    """Where PyTorch's likeliest token is another one, but hardly likelier."""
    ties = []
    best = expected.argmax(-1)
    for row, step in zip(*np.nonzero(best != generated.tokens), strict=True):
        logits = expected[row, step]
        gap = float(logits[best[row, step]] - logits[generated.tokens[row, step]])
        if not gap <= allowed:
            raise VerificationError(
                f"generation: token {step + 1} of row {row + 1} is "
                f"{generated.tokens[row, step]}, PyTorch chooses {best[row, step]}, whose logit is "
                f"higher by {gap:.1e}; allowed is {allowed:.1e}"
            )
        ties.append((int(row), int(step)))
    return tuple(ties)
