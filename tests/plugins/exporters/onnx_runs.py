"""Stages of tiny random models, exported and run in ONNX Runtime."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import torch
from transformers.exporters.exporter_onnx import OnnxConfig, OnnxExporter

from loratool.quiet import quiet
from loratool.shell import Shell
from loratool_plugins.exporters.onnx.stages import Stage, name_graph, named_inputs, stages_of

Arrays = dict[str, np.ndarray[Any, np.dtype[Any]]]


def stages(model: torch.nn.Module) -> tuple[Stage, ...]:
    """The stages of a model that has its weights."""
    return stages_of(Shell(type(model).__name__, model, {}))


def program(stage: Stage, fusions: Any = None) -> ir.Model:
    """A stage's graph, with its names."""
    shapes = None if stage.dynamic_shapes is None else dict(stage.dynamic_shapes)
    settings = OnnxConfig(dynamic=True, dynamic_shapes=shapes, ort_fusions=fusions)
    with quiet():
        found: ir.Model = OnnxExporter().export(stage.module, dict(stage.inputs), settings).program  # type: ignore[arg-type]
    name_graph(found, stage)
    return found


class Graph:
    """A stage in ONNX Runtime."""

    def __init__(self, stage: Stage, folder: Path, fusions: Any = None) -> None:
        path = folder / f"{stage.name}.onnx"
        ir.save(program(stage, fusions), path)
        options = ort.SessionOptions()
        options.intra_op_num_threads = 1
        options.log_severity_level = 3
        self.session = ort.InferenceSession(str(path), options, ["CPUExecutionProvider"])
        self.axes = {value.name: tuple(value.shape) for value in self.session.get_inputs()}

    def __call__(self, inputs: dict[str, Any]) -> Arrays:
        feed = {name: np.asarray(value) for name, value in named_inputs(inputs).items()}
        names = [output.name for output in self.session.get_outputs()]
        return dict(zip(names, self.session.run(None, feed), strict=True))


def generate(prefill: Graph, decode: Graph, ids: torch.Tensor, pad: int, count: int) -> list[Any]:
    """Greedy tokens of a decoder for prompts padded on the left, as lists of `count`."""
    mask = (ids != pad).long()
    positions = (mask.cumsum(-1) - 1).masked_fill(mask == 0, 0)
    feed = {"input_ids": ids, "attention_mask": mask, "position_ids": positions}
    found = prefill({name: feed[name] for name in prefill.axes})
    tokens = []
    for _ in range(count):
        token = torch.tensor(found["logits"][:, -1].argmax(-1))[:, None]
        tokens.append(token)
        mask = torch.cat([mask, torch.ones_like(token)], 1)
        positions = (mask.sum(-1) - 1)[:, None]
        feed = {"input_ids": token, "attention_mask": mask, "position_ids": positions}
        feed |= _past(found)
        found = decode({name: feed[name] for name in decode.axes})
    return torch.cat(tokens, 1).tolist()


def generate_from(
    encoder: Graph, prefill: Graph, decode: Graph, inputs: dict[str, Any], start: int, count: int
) -> list[Any]:
    """Greedy tokens of an encoder-decoder, as lists of `count`."""
    states = torch.tensor(encoder(inputs)["last_hidden_state"])
    token = torch.full((len(states), 1), start)
    feed: dict[str, Any] = {"encoder_hidden_states": states, "decoder_input_ids": token}
    masks = {"encoder_attention_mask": inputs.get("attention_mask")}
    found = prefill({name: (feed | masks)[name] for name in prefill.axes})
    crossed = {name: value for name, value in _past(found).items() if ".encoder." in name}
    tokens = []
    for _ in range(count):
        token = torch.tensor(found["logits"][:, -1].argmax(-1))[:, None]
        tokens.append(token)
        feed = {"decoder_input_ids": token, **masks, **crossed, **_past(found)}
        found = decode({name: feed[name] for name in decode.axes})
    return torch.cat(tokens, 1).tolist()


def _past(found: Arrays) -> dict[str, torch.Tensor]:
    return {
        name.replace("present", "past_key_values"): torch.tensor(value)
        for name, value in found.items()
        if name.startswith("present.")
    }
