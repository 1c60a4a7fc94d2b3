"""What PyTorch makes of a checkpoint: the answers that an export is held to."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from loratool.checkpoint import Checkpoint
from loratool.engine import single_threaded_tasks
from loratool.errors import InputError, VerificationError
from loratool.quiet import quiet, shorten
from loratool.running import open_model, run
from loratool.shell import load_class
from loratool_plugins.exporters.onnx.sessions import Arrays
from loratool_plugins.exporters.onnx.stages import named_outputs

Batch = Mapping[str, Any]

# Weights of up to this many bytes in fp32 are loaded by transformers itself.
LOADED_WHOLE = 256 << 20
BY_TRANSFORMERS, STREAMED = "from_pretrained", "streamed"


@dataclass(frozen=True)
class References:
    """PyTorch's outputs, as fp32.

    Attributes:
        outputs: of each batch, by the names that an exported graph gives them.
        how: "from_pretrained" if transformers has loaded the checkpoint, so that errors of ours in
            names, ties and buffers would show; "streamed" if it was too large for that, so that
            names and ties are found by the code that the export found them with; "module" for a
            module of the user's.
    """

    outputs: Sequence[Arrays]
    how: str


def references_of(
    merged: Checkpoint,
    batches: Sequence[Batch],
    whole: int = LOADED_WHOLE,
    dtype: torch.dtype = torch.float32,
) -> References:
    """Run a checkpoint in PyTorch.

    Holds all of a small model; of a large one a few tensors, in one pass for all batches.

    Args:
        merged: the checkpoint, lazy; read once.
        batches: the arguments of each forward call.
        whole: up to how many bytes in fp32 a model is small.
        dtype: that is computed in, fp32 or fp64.

    Raises:
        VerificationError: a tensor that the model needs is missing, or PyTorch cannot run it.
    """
    if sum(4 * tensor.numel for tensor in merged.values()) <= whole:
        return References(_loaded(merged, batches, dtype), BY_TRANSFORMERS)
    try:
        with single_threaded_tasks():  # as they were written
            found = {
                number: arrays_of(outputs)
                for number, outputs in run(open_model(merged, dtype), batches)
            }
    except InputError as error:
        raise VerificationError(f"PyTorch cannot run what was exported: {error}") from error
    return References([found[number] for number in range(len(batches))], STREAMED)


def references_of_module(module: torch.nn.Module, batches: Sequence[Batch]) -> References:
    """Run a module that is in memory.

    Raises:
        VerificationError: it cannot be run on a batch.
    """
    return References(_run(module, batches), "module")


def arrays_of(outputs: Mapping[str, Any]) -> Arrays:
    """Outputs of transformers by the names of an exported graph, floats as fp32."""
    return {
        name: (value.float() if value.is_floating_point() else value).cpu().numpy()
        for name, value in named_outputs(dict(outputs)).items()
    }


def _loaded(merged: Checkpoint, batches: Sequence[Batch], dtype: torch.dtype) -> list[Arrays]:
    assert merged.config is not None  # the exporter has built a graph from it
    cls, config = load_class(merged.config)
    with single_threaded_tasks():  # as they were written
        tensors = {name: tensor.read() for name, tensor in merged.items()}
    try:
        with quiet():
            model, info = cls.from_pretrained(
                None,
                config=config,
                state_dict=tensors,
                dtype=dtype,
                output_loading_info=True,
            )
    except Exception as error:
        raise VerificationError(
            f"{merged.label}: transformers cannot load it: {shorten(error)}"
        ) from error
    del tensors
    if missing := sorted(info["missing_keys"]):
        raise VerificationError(f"{merged.label}: transformers finds no {', '.join(missing[:3])}")
    return _run(model, batches)


def _run(module: torch.nn.Module, batches: Sequence[Batch]) -> list[Arrays]:
    module.eval()
    try:
        with torch.inference_mode(), quiet():
            return [arrays_of(_named(module(**batch))) for batch in batches]
    except Exception as error:
        raise VerificationError(f"PyTorch cannot run the model: {shorten(error)}") from error


def _named(result: Any) -> Mapping[str, Any]:
    """What a module returns, by name; what has none is called as torch's exporter calls it."""
    if isinstance(result, Mapping):
        return result
    values = result if isinstance(result, tuple | list) else (result,)
    return {f"output_{i}" if i else "output": value for i, value in enumerate(values)}
