"""The graphs that a model is exported as.

A model that reads its inputs in one go is one graph, "model". A decoder is two, which share their
weights: "prefill" reads a prompt and returns the first logits and the cache, "decode" takes one
more token and the cache. An encoder-decoder has an "encoder" before them.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import onnx_ir as ir
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers.cache_utils import Cache, DynamicLayer, EncoderDecoderCache
from transformers.exporters.exporter_onnx import use_experts_implementation
from transformers.exporters.utils import apply_patches, get_leaf_tensors, is_multimodal
from transformers.modeling_outputs import BaseModelOutput

from loratool.errors import InputError
from loratool.quiet import quiet, shorten
from loratool.shell import Shell, position_limit
from loratool_plugins.exporters.onnx.inputs import (
    FEATURES,
    IMAGES,
    SAMPLES,
    Layer,
    Sizes,
    accepts,
    hidden_size,
    sample,
)

WAY_OUT = (
    "write a Python function that returns the module, and give --module package.module:function"
)

# Sizes that are not those of anything else in a model are less likely to be taken for it.
_TRACED = Sizes(batch=2, sequence=11, past=9, source=13)
_FLAGS = ("use_cache",)


@dataclass(frozen=True)
class Stage:
    """One graph of a model, before it is traced.

    Attributes:
        name: "model", "encoder", "prefill" or "decode": the graph's file is NAME.onnx.
        module: what is traced. Its parameters are the shell's own, by the shell's names.
        inputs: what to trace it with: forward's arguments.
        dynamic_shapes: the axes of each input tensor that vary, as torch.export takes them; None
            if they are to be found out (slower).
        axes: graph input -> the names of its axes that vary.
        sizes: of `inputs`; None for a module of the user's own.
        layers: of the key-value cache, those of cross-attention after those of self-attention.
    """

    name: str
    module: torch.nn.Module
    inputs: Mapping[str, Any]
    dynamic_shapes: Mapping[str, Any] | None
    axes: Mapping[str, Mapping[int, str]]
    sizes: Sizes | None
    layers: tuple[Layer, ...] = ()

    @property
    def input_names(self) -> tuple[str, ...]:
        """What the graph's inputs are called."""
        return tuple(named_inputs(self.inputs))


def stages_of(shell: Shell, cache: bool = True) -> tuple[Stage, ...]:
    """The graphs that a model is exported as.

    Args:
        shell: the model.
        cache: whether a model that generates gets a key-value cache. Without one it is a single
            graph, which reads all tokens again for each that it adds.

    Raises:
        InputError: the model's inputs are of a kind that is not known here.
    """
    model: Any = shell.model
    cls, config = type(model), model.config
    if model.can_generate() and is_multimodal(model):
        raise InputError(
            f"{shell.architecture}: puts images or sounds between the tokens of a text, which is "
            f"not exported by itself; {WAY_OUT}"
        )
    if cls.main_input_name not in ("input_ids", IMAGES, FEATURES, SAMPLES):
        raise InputError(
            f"{shell.architecture}: its input {cls.main_input_name} is of no known kind; {WAY_OUT}"
        )
    if not (cache and model.can_generate() and accepts(cls, "past_key_values")):
        return (_stage("model", model, model, ()),)
    if config.is_encoder_decoder:
        layers = cache_layers(shell, _Prefill(model))
        if layers:
            return (
                _stage("encoder", model, _Encoder(model), ()),
                _stage("prefill", model, _Prefill(model), ()),
                _stage("decode", model, _Decode(model), layers),
            )
    elif layers := cache_layers(shell, model):
        return (_stage("prefill", model, model, ()), _stage("decode", model, model, layers))
    return (_stage("model", model, model, ()),)


def loosened(stage: Stage) -> Stage:
    """The same stage with axes that torch.export may relate to each other as it finds them.

    For models of which it says with named axes that constraints are violated (a UserError): it
    cannot prove then what the model needs of an axis for all of its sizes. An axis that cannot vary
    is an error still.
    """
    free = torch.export.Dim.DYNAMIC

    def loosen(shape: Any) -> Any:
        if isinstance(shape, Mapping):
            return dict.fromkeys(shape, free)
        return [loosen(one) for one in shape]

    shapes = stage.dynamic_shapes or {}
    return replace(stage, dynamic_shapes={name: loosen(shape) for name, shape in shapes.items()})


def sample_of(stage: Stage, sizes: Sizes, seed: int) -> dict[str, Any]:
    """Inputs of a stage in other sizes than those that it is traced with.

    Those of a module of the user's own are what it was given, turned by `seed` places and repeated
    along the axes that vary; everything else is random.

    Args:
        stage: the stage.
        sizes: of the sample; the sequence of a decode step is 1 whatever they say.
        seed: of the values.

    Returns:
        What the stage's module takes.
    """
    if stage.sizes is None:
        lengths = {"batch": sizes.batch, "sequence": sizes.sequence, "source": sizes.source}
        return {
            name: _turned(value, stage.axes.get(name, {}), lengths, seed)
            for name, value in stage.inputs.items()
        }
    model = _whole(stage)
    if stage.name == "decode":
        sizes = replace(sizes, sequence=1)
    return sample(
        type(model), model.config, stage.name, sizes, stage.layers, _dtype_of(model), seed
    )


def run(stage: Stage, inputs: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """What PyTorch gives for a stage, by the names of the graph's outputs.

    Caches among `inputs` are grown in place.
    """
    with torch.inference_mode(), quiet():
        return named_outputs(stage.module(**inputs))


def _turned(
    value: torch.Tensor, axes: Mapping[int, str], lengths: Mapping[str, int], seed: int
) -> torch.Tensor:
    for axis, meaning in axes.items():
        size = value.shape[axis]
        chosen = (torch.arange(lengths.get(meaning, size)) + seed) % size
        value = value.index_select(axis, chosen)
    return value


def _whole(stage: Stage) -> Any:
    """The model that a stage is of."""
    return stage.module.whole if isinstance(stage.module, _Part) else stage.module


def _stage(name: str, model: Any, module: torch.nn.Module, layers: tuple[Layer, ...]) -> Stage:
    sizes = Sizes(_TRACED.batch, 1 if name == "decode" else _TRACED.sequence, _TRACED.past,
                  _TRACED.source)  # fmt: skip
    inputs = sample(type(model), model.config, name, sizes, layers, _dtype_of(model))
    axes = _axes(name, inputs, model.config)
    return Stage(name, module, inputs, _shapes(inputs, axes, model.config), axes, sizes, layers)


def _dtype_of(model: torch.nn.Module) -> torch.dtype:
    return next(
        (value.dtype for value in model.parameters() if value.is_floating_point()), torch.float32
    )


# Wrappers -----------------------------------------------------------------------------------------


class _Part(torch.nn.Module):
    """Some of what a model does, with all of its parameters under the names that they have in it.

    The tables of parameters, buffers and modules are the model's own, so that one which is replaced
    there is replaced here.
    """

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self._model = (model,)  # in a tuple, so that it does not become a module of this one
        self._parameters = model._parameters
        self._buffers = model._buffers
        self._modules = model._modules
        self.training = model.training
        self.config = model.config

    @property
    def whole(self) -> Any:
        """The model that this is a part of."""
        return self._model[0]


class _Encoder(_Part):
    """The encoder of an encoder-decoder."""

    def forward(self, **inputs: torch.Tensor) -> dict[str, torch.Tensor]:
        """The encoder's states, (batch, source, size)."""
        encoder = self.whole.get_encoder()
        return {"last_hidden_state": encoder(**inputs).last_hidden_state}


class _Prefill(_Part):
    """The decoder of an encoder-decoder, given the encoder's states and the first tokens."""

    def forward(
        self,
        encoder_hidden_states: torch.Tensor,
        decoder_input_ids: torch.Tensor,
        encoder_attention_mask: torch.Tensor | None = None,
    ) -> dict[str, Any]:
        """Logits, and the cache with keys and values of the encoder's states, computed once."""
        masks = {} if encoder_attention_mask is None else {"attention_mask": encoder_attention_mask}
        found = self.whole(
            encoder_outputs=BaseModelOutput(last_hidden_state=encoder_hidden_states),
            decoder_input_ids=decoder_input_ids,
            use_cache=True,
            **masks,
        )
        return {"logits": found.logits, "past_key_values": found.past_key_values}


class _Decode(_Part):
    """The decoder of an encoder-decoder, given its cache and one more token."""

    def forward(
        self,
        decoder_input_ids: torch.Tensor,
        past_key_values: EncoderDecoderCache,
        encoder_attention_mask: torch.Tensor | None = None,
    ) -> dict[str, Any]:
        """Logits, and the grown part of the cache."""
        masks = {} if encoder_attention_mask is None else {"attention_mask": encoder_attention_mask}
        layer: Any = past_key_values.cross_attention_cache.layers[0]
        # The cache holds what is needed of the encoder's states; only their shape is looked at.
        shape = (layer.keys.shape[0], layer.keys.shape[2], hidden_size(self.config))
        states = layer.keys.new_zeros(1, 1, 1).expand(shape)
        found = self.whole(
            encoder_outputs=BaseModelOutput(last_hidden_state=states),
            decoder_input_ids=decoder_input_ids,
            past_key_values=past_key_values,
            use_cache=True,
            **masks,
        )
        grown = {"self_attention_cache": found.past_key_values.self_attention_cache}
        return {"logits": found.logits, "past_key_values": grown}


# The cache ----------------------------------------------------------------------------------------


def cache_layers(shell: Shell, module: torch.nn.Module) -> tuple[Layer, ...]:
    """The layers of the cache that a prefill returns.

    Found by running it on shapes alone: nothing is computed.

    Returns:
        Layers of self-attention and then, of an encoder-decoder, as many of cross-attention; () if
        the model keeps anything else than keys and values, or nothing.

    Raises:
        InputError: the model cannot be run.
    """
    model: Any = shell.model
    sizes = Sizes(batch=2, sequence=3, source=5)
    inputs = sample(type(model), model.config, "prefill", sizes, dtype=_dtype_of(model))
    inputs.pop("past_key_values", None)  # the model's own cache shows of what kinds its layers are
    try:
        with (
            quiet(),
            torch.no_grad(),
            apply_patches("dynamo"),
            use_experts_implementation(model, "batched_mm"),  # others compute to find out shapes
            FakeTensorMode(allow_non_fake_inputs=True) as mode,
        ):
            fakes = {
                name: mode.from_tensor(value) if torch.is_tensor(value) else value
                for name, value in inputs.items()
            }
            found = module(**fakes)
    except Exception as error:
        raise InputError(
            f"{shell.architecture}: does not run on sample inputs: {shorten(error)}; {WAY_OUT}"
        ) from error
    cache = found.get("past_key_values")
    if not isinstance(cache, Cache):
        return ()
    halves = (
        (cache.self_attention_cache, cache.cross_attention_cache)
        if isinstance(cache, EncoderDecoderCache)
        else (cache,)
    )
    layers: list[Any] = [layer for half in halves for layer in half.layers]
    if not all(isinstance(layer, DynamicLayer) and layer.keys is not None for layer in layers):
        return ()
    return tuple(
        Layer(
            (int(layer.keys.shape[1]), int(layer.keys.shape[3])),
            (int(layer.values.shape[1]), int(layer.values.shape[3])),
        )
        for layer in layers
    )


# Names --------------------------------------------------------------------------------------------

_CACHE = re.compile(
    r"past_key_values\.(?:(?P<half>self|cross)_attention_cache\.)?layers\.(?P<layer>\d+)\.(?P<what>key|value)s"
)
_HALVES = {"self": "decoder.", "cross": "encoder.", None: ""}


def graph_name(path: str, output: bool = False) -> str:
    """What the tensor at a path of forward's arguments or results is called in the graph.

    Keys and values are `past_key_values.N.key` and so on as inputs, `present.N.key` as outputs;
    those of encoder-decoders are `past_key_values.N.decoder.key`, and `.encoder.key` where they
    come from the encoder's states.
    """
    if not (match := _CACHE.fullmatch(path)):
        return path
    prefix = "present" if output else "past_key_values"
    return f"{prefix}.{match['layer']}.{_HALVES[match['half']]}{match['what']}"


def named_inputs(inputs: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """Forward's arguments as the graph takes them: tensors by the graph's names."""
    leaves = get_leaf_tensors(dict(inputs))
    return {graph_name(path): tensor for path, tensor in leaves.items()}


def named_outputs(result: Any) -> dict[str, torch.Tensor]:
    """Forward's results as the graph gives them: tensors by the graph's names."""
    leaves = get_leaf_tensors(result)
    return {graph_name(path, output=True): tensor for path, tensor in leaves.items()}


def name_graph(program: ir.Model, stage: Stage) -> None:
    """Call a traced graph's inputs, outputs and axes by their meaning.

    The sizes of inner values, which are computed from those of the inputs, are renamed with them.

    Raises:
        InputError: an input of the stage is not one of the graph, or an axis is fixed in it.
    """
    graph = program.graph
    for value in graph.inputs:
        value.name = graph_name(str(value.name).removeprefix("input."))
    for value in graph.outputs:
        value.name = graph_name(str(value.name).removeprefix("output."), output=True)
    found = {str(value.name): value for value in graph.inputs}
    label = f"{type(stage.module).__name__.lstrip('_')} ({stage.name})"
    if lost := [name for name in stage.input_names if name not in found]:
        raise InputError(f"{label}: {lost[0]} is not an input of the traced graph; {WAY_OUT}")
    symbols: dict[str, str] = {}
    for name, axes in stage.axes.items():
        for axis, meaning in axes.items():
            dimension = (found[name].shape or ())[axis]
            if isinstance(dimension, int):
                raise InputError(f"{label}: the {meaning} axis of {name} is fixed at {dimension}")
            symbols.setdefault(str(dimension), meaning)

    def rename(dimension: int | ir.SymbolicDim) -> int | ir.SymbolicDim:
        if isinstance(dimension, int) or dimension.value is None:
            return dimension  # an unknown size stays one: the same name means the same size
        text = dimension.value
        if text not in symbols:
            text = re.sub(r"\w+", lambda word: symbols.get(word[0], word[0]), text)
        return ir.SymbolicDim(symbols.get(text, text))

    for value in _values(graph):
        if value.shape is not None and not value.is_initializer():
            value.shape = ir.Shape([rename(dimension) for dimension in value.shape])


def _values(graph: ir.Graph) -> Iterator[ir.Value]:
    yield from graph.inputs
    for node in graph.all_nodes():
        yield from node.outputs


# Axes ---------------------------------------------------------------------------------------------


def _axes(stage: str, inputs: Mapping[str, Any], config: Any) -> dict[str, dict[int, str]]:
    """Graph input -> its axes that vary, by what they mean."""
    two = config.is_encoder_decoder
    text = "encoder_attention_mask" in inputs or "input_ids" in inputs
    read = "source" if two and stage in ("encoder", "model") else "sequence"
    token = {} if stage == "decode" else {1: read}
    tokens = {0: "batch", **token}
    source = {1: "source"} if text else {}
    known: dict[str, dict[int, str]] = {
        "input_ids": tokens,
        "position_ids": tokens,
        "token_type_ids": tokens,
        "attention_mask": {0: "batch", 1: "total" if stage == "decode" else read},
        "decoder_input_ids": {0: "batch"} if stage == "decode" else {0: "batch", 1: "sequence"},
        "encoder_attention_mask": {0: "batch", **source},
        "encoder_hidden_states": {0: "batch", **source},
        IMAGES: {0: "images" if "input_ids" in inputs else "batch"},
        FEATURES: {0: "batch"},
        SAMPLES: {0: "batch", 1: "samples"},
    }
    made = {}
    for name in named_inputs(inputs):
        if name in known:
            made[name] = known[name]
        else:
            crossed = ".encoder." in name
            length = {} if crossed and not text else {2: "source" if crossed else "past"}
            made[name] = {0: "batch", **length}
    return made


def _shapes(
    inputs: Mapping[str, Any], axes: Mapping[str, Mapping[int, str]], config: Any
) -> dict[str, Any]:
    """The axes as torch.export takes them: for each argument, a cache's tensors in their order."""
    # A named axis must satisfy guards that torch.export cannot prove where queries are grouped or
    # convolutions have strides.
    free = torch.export.Dim.DYNAMIC
    symbols: dict[str, Any] = {
        "past": free,
        "total": free,
        "sequence": torch.export.Dim("sequence", max=position_limit(config)),
    }
    symbols["samples"] = free
    for name in ("batch", "source", "images"):
        symbols[name] = torch.export.Dim(name)

    def shape_of(name: str) -> dict[int, Any]:
        return {axis: symbols[meaning] for axis, meaning in axes[name].items()}

    made: dict[str, Any] = {}
    for argument, value in inputs.items():
        if isinstance(value, Cache):
            made[argument] = [shape_of(name) for name in named_inputs({argument: value})]
        elif argument not in _FLAGS:
            made[argument] = shape_of(argument)
    return made
