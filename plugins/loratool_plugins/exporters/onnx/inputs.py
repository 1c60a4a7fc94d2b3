"""Inputs of models: their names, and random ones to trace and to compare with."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers.cache_utils import Cache, DynamicCache, EncoderDecoderCache

from loratool.shell import position_limit

Feeds = dict[str, torch.Tensor]

# What a model's main input may be, beside token ids.
IMAGES, FEATURES, SAMPLES = "pixel_values", "input_features", "input_values"


@dataclass(frozen=True)
class Sizes:
    """The sizes of one sample.

    Attributes:
        batch: rows; rows of images where a model takes both texts and images are one more.
        sequence: tokens of a text, or of a prompt; of a decode step, 1.
        past: tokens that the cache holds already.
        source: tokens that the encoder of an encoder-decoder has read.
    """

    batch: int
    sequence: int
    past: int = 0
    source: int = 0


@dataclass(frozen=True)
class Layer:
    """One layer of a key-value cache.

    Attributes:
        key: heads and size of the keys.
        value: heads and size of the values.
    """

    key: tuple[int, int]
    value: tuple[int, int]

    def random(
        self, batch: int, length: int, dtype: torch.dtype, generator: torch.Generator
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Normally distributed keys and values, each (batch, heads, length, size)."""
        key, value = (
            torch.randn((batch, heads, length, size), generator=generator).to(dtype)
            for heads, size in (self.key, self.value)
        )
        return key, value


def accepts(cls: Any, name: str) -> bool:
    """Whether a model class takes an input."""
    return name in inspect.signature(cls.forward).parameters


def input_names(cls: Any, config: Any) -> tuple[str, ...]:
    """The inputs of a text model that is exported as one graph.

    token_type_ids is one where the model tells segments apart: without it, pairs of texts would
    be read as one.
    """
    names = ["input_ids", "attention_mask"]
    if (getattr(config, "type_vocab_size", 0) or 0) > 1:
        names.append("token_type_ids")
    return tuple(name for name in names if accepts(cls, name))


def sample_inputs(cls: Any, config: Any, batch: int, sequence: int, seed: int = 0) -> Feeds:
    """Random inputs of a text model that is exported as one graph.

    Each is int64 (batch, sequence), with padding on the right of all rows but one. Sequences are
    kept within half of the model's limit: some models count positions from an offset.
    """
    generator = torch.Generator().manual_seed(seed)
    sequence = _within_limit(config, sequence)
    ids, mask = _text(config, batch, sequence, generator)
    _end(ids, mask, config)
    segments = torch.zeros_like(ids)
    segments[:, sequence // 2 :] = 1
    made = {"input_ids": ids, "attention_mask": mask, "token_type_ids": segments}
    return {name: made[name] for name in input_names(cls, config)}


def sample(
    cls: Any,
    config: Any,
    stage: str,
    sizes: Sizes,
    layers: Sequence[Layer] = (),
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> dict[str, Any]:
    """Random inputs of one stage, as its module's forward takes them.

    Texts are padded, so that no mask is all ones: on the right where a model reads them in one go,
    on the left where it goes on writing them. Positions are counted from the mask then, as
    transformers' generate() does.

    Args:
        cls: the model's class.
        config: its config.
        stage: "model", "encoder", "prefill" or "decode".
        sizes: of the sample. Sequences are kept within half of the model's limit.
        layers: of the cache, for a decode stage.
        dtype: of images, features and caches.
        seed: of the values.

    Returns:
        Tensors by name, a Cache as past_key_values, and the flag use_cache for a decoder.
    """
    generator = torch.Generator().manual_seed(seed)
    if config.is_encoder_decoder and stage in ("prefill", "decode"):
        return _decoder_of_two(cls, config, stage, sizes, layers, dtype, generator)
    if stage in ("prefill", "decode"):
        return _decoder(cls, config, stage, sizes, layers, dtype, generator)
    return _reader(cls, config, stage, sizes, dtype, generator)


def _reader(
    cls: Any,
    config: Any,
    stage: str,
    sizes: Sizes,
    dtype: torch.dtype,
    generator: torch.Generator,
) -> dict[str, Any]:
    """Inputs of a model that reads its inputs in one go, or of an encoder."""
    made: dict[str, Any] = {}
    main = cls.main_input_name
    batch = sizes.batch
    if main == "input_ids":
        length = sizes.source if stage == "encoder" else sizes.sequence
        seed = int(torch.randint(1 << 31, (), generator=generator))
        made |= sample_inputs(cls, config, batch, length, seed)
        if accepts(cls, IMAGES) and _vision(config) is not None:
            made[IMAGES] = _images(_vision(config), batch + 1, dtype, generator)
    elif main == IMAGES:
        made[IMAGES] = _images(_vision(config), batch, dtype, generator)
    elif main == FEATURES:
        made[FEATURES] = _features(config, batch, dtype, generator)
    elif main == SAMPLES:
        made[SAMPLES] = torch.randn((batch, 1600 + 16 * sizes.sequence), generator=generator)
        made[SAMPLES] = made[SAMPLES].to(dtype)
    else:
        raise ValueError(f"samples of {main} are not known")
    if config.is_encoder_decoder and stage == "model" and _wants_decoder_tokens(cls):
        length = _within_limit(config, max(2, sizes.sequence // 2))
        made["decoder_input_ids"] = _tokens(config, batch, length, generator)
    return made


def _wants_decoder_tokens(cls: Any) -> bool:
    """Whether an encoder-decoder needs tokens for its decoder; heads give it the encoder's."""
    heads = ("Classification", "QuestionAnswering")
    return accepts(cls, "decoder_input_ids") and not cls.__name__.endswith(heads)


def _decoder(
    cls: Any,
    config: Any,
    stage: str,
    sizes: Sizes,
    layers: Sequence[Layer],
    dtype: torch.dtype,
    generator: torch.Generator,
) -> dict[str, Any]:
    """Inputs of a decoder with a cache."""
    past = _within_limit(config, sizes.past) if stage == "decode" else 0
    sequence = _within_limit(config, sizes.sequence)
    ids, mask = _text(config, sizes.batch, past + sequence, generator, left=True)
    made: dict[str, Any] = {"input_ids": ids[:, past:]}
    if accepts(cls, "attention_mask"):
        made["attention_mask"] = mask
    if accepts(cls, "position_ids"):
        positions = (mask.cumsum(-1) - 1).masked_fill(mask == 0, 0)
        made["position_ids"] = positions[:, past:]
    # A model given no cache would make one that drops what lies outside of a sliding window.
    filled = layers if stage == "decode" else ()
    made["past_key_values"] = _cache(filled, sizes.batch, past, dtype, generator)
    return {**made, "use_cache": True}


def _decoder_of_two(
    cls: Any,
    config: Any,
    stage: str,
    sizes: Sizes,
    layers: Sequence[Layer],
    dtype: torch.dtype,
    generator: torch.Generator,
) -> dict[str, Any]:
    """Inputs of an encoder-decoder's decoder; layers are those of self- and of cross-attention."""
    text = cls.main_input_name == "input_ids"
    source = _within_limit(config, sizes.source) if text else source_length(config)
    made: dict[str, Any] = {}
    if text:
        made["encoder_attention_mask"] = _text(config, sizes.batch, source, generator)[1]
    if stage == "prefill":
        shape = (sizes.batch, source, hidden_size(config))
        made["encoder_hidden_states"] = torch.randn(shape, generator=generator).to(dtype)
    length = _within_limit(config, sizes.sequence)
    made["decoder_input_ids"] = _tokens(config, sizes.batch, length, generator)
    if stage == "decode":
        half = len(layers) // 2
        past = _within_limit(config, sizes.past)
        made["past_key_values"] = EncoderDecoderCache(
            _cache(layers[:half], sizes.batch, past, dtype, generator),
            _cache(layers[half:], sizes.batch, source, dtype, generator),
        )
    return made


def _cache(
    layers: Sequence[Layer],
    batch: int,
    length: int,
    dtype: torch.dtype,
    generator: torch.Generator,
) -> Cache:
    """A cache that holds `length` tokens, all of them in sliding layers too."""
    cache = DynamicCache()
    for index, layer in enumerate(layers):
        cache.update(*layer.random(batch, length, dtype, generator), index)
    return cache


def _text(
    config: Any, batch: int, sequence: int, generator: torch.Generator, left: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """Random tokens and their mask, each int64 (batch, sequence); all rows but one are padded."""
    ids = _tokens(config, batch, sequence, generator)
    mask = torch.ones_like(ids)
    for row in range(1, batch):
        kept = max(1, sequence - 2 * row)
        mask[row, slice(0, sequence - kept) if left else slice(kept, None)] = 0
    ids[mask == 0] = _pad(config.get_text_config())
    return ids, mask


def _end(ids: torch.Tensor, mask: torch.Tensor, config: Any) -> None:
    """Put the end token after each text and nowhere else: some heads look for it."""
    text = config.get_text_config()
    end = getattr(text, "eos_token_id", None)
    if isinstance(end, int) and 0 <= end < text.vocab_size and end != _pad(text):
        ids[ids == end] = next(token for token in range(3) if token not in (end, _pad(text)))
        ids[torch.arange(len(ids)), mask.sum(1) - 1] = end


def _tokens(config: Any, batch: int, length: int, generator: torch.Generator) -> torch.Tensor:
    """Random tokens without padding, int64 (batch, length)."""
    text = config.get_text_config()
    pad = _pad(text)
    ids = torch.randint(0, text.vocab_size, (batch, length), generator=generator)
    ids[ids == pad] = (pad + 1) % text.vocab_size
    return ids


def _pad(text: Any) -> int:
    pad = getattr(text, "pad_token_id", None)
    return pad if isinstance(pad, int) and 0 <= pad < text.vocab_size else 0


def _within_limit(config: Any, length: int) -> int:
    limit = position_limit(config)
    return min(length, max(1, limit // 2)) if limit else length


def _vision(config: Any) -> Any:
    """The config that describes a model's images, or None."""
    for part in (config, getattr(config, "vision_config", None)):
        if part is not None and getattr(part, "image_size", None):
            return part
    return None


def _images(
    vision: Any, batch: int, dtype: torch.dtype, generator: torch.Generator
) -> torch.Tensor:
    """Random images, (batch, channels, height, width)."""
    size = vision.image_size
    height, width = size if isinstance(size, list | tuple) else (size, size)
    shape = (batch, getattr(vision, "num_channels", 3), height, width)
    return torch.randn(shape, generator=generator).to(dtype)


def source_length(config: Any) -> int:
    """How many states the encoder of an audio model gives."""
    return int(config.max_source_positions)


def hidden_size(config: Any) -> int:
    """The size of an encoder's states."""
    return int(getattr(config, "d_model", None) or config.hidden_size)


def _features(
    config: Any, batch: int, dtype: torch.dtype, generator: torch.Generator
) -> torch.Tensor:
    """Random spectrograms, (batch, mel bins, frames): two frames for each state of the encoder."""
    shape = (batch, config.num_mel_bins, 2 * source_length(config))
    return torch.randn(shape, generator=generator).to(dtype)
