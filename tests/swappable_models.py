"""Tiny models as ONNX graphs with factors as optional inputs, and PEFT adapters for them."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import torch
from peft import LoraConfig, get_peft_model
from transformers.exporters.exporter_onnx import OnnxConfig, OnnxExporter

from loratool.application import Part, bind_part
from loratool.opening import open_adapter, open_checkpoint
from loratool.quiet import quiet
from loratool_plugins.exporters.onnx.inputs import sample_inputs
from loratool_plugins.exporters.onnx.origins import Origin
from loratool_plugins.exporters.onnx.origins import Part as Stretch
from loratool_plugins.exporters.onnx.weights import Graph
from tests.models import build, tiny_config

Arrays = dict[str, np.ndarray[Any, Any]]


@dataclass(frozen=True)
class Base:
    """A saved model, and its graph before factors are added."""

    model: Any
    folder: Path
    graph: Graph
    feeds: Arrays

    @property
    def tied(self) -> dict[str, list[str]]:
        """Tensor -> the names of all parameters that are it, in the model's order."""
        names: dict[int, list[str]] = {}
        for name, parameter in self.model.named_parameters(remove_duplicate=False):
            names.setdefault(id(parameter), []).append(name)
        return {group[0]: group for group in names.values()}


def make_base(
    architecture: str, model_type: str, folder: Path, fusions: str | None = None, **settings: Any
) -> Base:
    """Save a model of one layer and export it; optimised where it is fused."""
    layers = "n_layer" if model_type == "gpt2" else "num_hidden_layers"
    model = build(architecture, tiny_config(model_type, **{layers: 1, **settings}))
    model.save_pretrained(folder)
    model.config.use_cache = False
    feeds = sample_inputs(type(model), model.config, 2, 11)
    axes = {0: torch.export.Dim("batch"), 1: torch.export.Dim("sequence", max=24)}
    shapes = dict.fromkeys(feeds, axes)
    fused = {"ort_fusions": fusions} if fusions else {}
    config = OnnxConfig(
        dynamic=True, dynamic_shapes=shapes, optimize=bool(fusions), opset_version=20, **fused
    )
    with quiet():
        graph = OnnxExporter().export(model, dict(feeds), config).program
    arrays = {name: feed.numpy() for name, feed in feeds.items()}
    return Base(model, folder, Graph("model", graph, origins_of(graph, model)), arrays)


def origins_of(graph: ir.Model, model: Any) -> dict[str, Origin]:
    """What the graph's matrices are made of, found by their values."""
    matrices = {}
    for name, tensor in model.named_parameters():
        if tensor.dim() == 2:
            matrices[name] = tensor.detach().numpy()
    found = {}
    for name, value in graph.graph.initializers.items():
        array = value.const_value.numpy() if value.const_value is not None else np.zeros(())
        is_matrix = array.ndim == 2 and array.dtype == np.float32
        if is_matrix and (origin := _origin(array, matrices)) is not None:
            found[name] = origin
    return found


def _origin(array: np.ndarray[Any, Any], matrices: Arrays) -> Origin | None:
    for name, matrix in matrices.items():
        for permutation in ((0, 1), (1, 0)):
            if np.array_equal(matrix.transpose(permutation), array):
                return Origin(array.shape, 0, (Stretch(name, permutation, array.shape[0]),))
    parts, done = [], 0
    while done < array.shape[1]:
        rest = array[:, done:]
        name = next((n for n, m in matrices.items() if _begins(rest, m.T)), None)
        if name is None:
            return None
        parts.append(Stretch(name, (1, 0), len(matrices[name])))
        done += len(matrices[name])
    return Origin(array.shape, 1, tuple(parts))


def _begins(rest: np.ndarray[Any, Any], matrix: np.ndarray[Any, Any]) -> bool:
    return len(rest) == len(matrix) and np.array_equal(rest[:, : matrix.shape[1]], matrix)


@dataclass(frozen=True)
class Trained:
    """An adapter as PEFT saved it, and what PEFT makes of the sample inputs with it."""

    folder: Path
    expected: np.ndarray[Any, Any]


def make_adapter(base: Base, folder: Path, targets: Sequence[str], **settings: Any) -> Trained:
    """Save random factors on a copy of the base, and run them unmerged."""
    seed = sum(folder.name.encode())
    with torch.random.fork_rng(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(seed)
        fresh = type(base.model).from_pretrained(base.folder)
        config = LoraConfig(target_modules=list(targets), **{"r": 4, "lora_alpha": 6, **settings})
        model = get_peft_model(fresh, config).eval()
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_" in name:
                    parameter.copy_(0.3 * torch.randn_like(parameter))
            feeds = {name: torch.from_numpy(feed) for name, feed in base.feeds.items()}
            expected = model(**feeds).logits.numpy()
        model.save_pretrained(folder)
    return Trained(folder, expected)


def bound(base: Base, trained: Trained | Path, weight: float = 1.0) -> Part:
    """The adapter bound to the base, as a merge does it."""
    folder = trained if isinstance(trained, Path) else trained.folder
    return bind_part(open_adapter(str(folder)), weight, open_checkpoint(str(base.folder)))


def session(path: Path) -> Any:
    """A session on one thread of the CPU."""
    options = ort.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = 1
    return ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def difference(one: np.ndarray[Any, Any], other: np.ndarray[Any, Any], feeds: Arrays) -> float:
    """The largest difference on tokens that are no padding, as a share of the largest value."""
    mask = feeds["attention_mask"] == 1
    return float(np.abs(one[mask] - other[mask]).max() / np.abs(other[mask]).max())
