"""Whether saved ONNX graphs do what their checkpoint does."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import torch

from loratool.checkpoint import Checkpoint
from loratool.engine import single_threaded_tasks
from loratool.exporting import ExportJob
from loratool_plugins.exporters.onnx.comparing import Comparison, Tolerance, compare
from loratool_plugins.exporters.onnx.factory import filled
from loratool_plugins.exporters.onnx.generation import (
    describe_generation,
    prompts_for,
    tokens_for,
    verify_generation,
)
from loratool_plugins.exporters.onnx.inputs import Sizes
from loratool_plugins.exporters.onnx.judging import judged
from loratool_plugins.exporters.onnx.preparation import Prepared
from loratool_plugins.exporters.onnx.references import (
    Batch,
    References,
    references_of,
    references_of_module,
)
from loratool_plugins.exporters.onnx.sessions import (
    Arrays,
    Session,
    open_bounded,
    remark,
    require_device,
    shortfall,
)
from loratool_plugins.exporters.onnx.stages import named_inputs, sample_of
from loratool_plugins.exporters.onnx.stored import check_stored
from loratool_plugins.exporters.onnx.weights import Written

# Sizes of the inputs that are compared; none is a traced one.
_SIZES = (Sizes(2, 7, source=9), Sizes(3, 13, source=12))


@dataclass(frozen=True)
class Verification:
    """What was compared, and how far apart it was.

    Attributes:
        data: for the manifest.
        notes: what the user should hear.
    """

    data: Mapping[str, Any]
    notes: tuple[str, ...]


def verify_export(
    job: ExportJob,
    prepared: Prepared,
    folder: Path,
    written: Written,
    tolerance: Tolerance,
    seed: int,
    adapters: Mapping[str, Path],
) -> Verification:
    """Read the checkpoint again, and hold everything that was saved against it.

    The stored weights must be the checkpoint's bit by bit. A graph that reads its inputs in one go
    must give what PyTorch gives on padded random inputs of two shapes; a decoder must generate the
    tokens that PyTorch's generation gives, through the cache, on padded prompts of two shapes; a
    swappable one must do so as the base, and with each adapter as the base merged with it.

    Args:
        job: what was exported.
        prepared: its model.
        folder: where it was saved.
        written: where its weights lie.
        tolerance: how far outputs may be apart.
        seed: of the random inputs.
        adapters: the adapter files of a swappable export, by adapter, in the job's order.

    Raises:
        VerificationError: something is not what PyTorch makes of the checkpoint, or the device
            cannot be used and the job asks for it strictly.
    """
    options = job.options
    with single_threaded_tasks():  # as they were written
        compared = check_stored(written.blocks, prepared.tensors)
    sessions = {
        stage.name: open_bounded(folder / f"{stage.name}.onnx", options.device)
        for stage in prepared.stages
    }
    used = list(next(iter(sessions.values())).get_providers())
    if options.strict:
        require_device(options.device, used)
    missing = shortfall(options.device, used)
    found = _compare(job.merged, prepared, sessions, tolerance, seed, options.module)
    data: dict[str, Any] = {
        "providers": used,
        "device_used": not missing,
        "tolerance": tolerance.value,
        "relative": tolerance.relative,
        "seed": seed,
        "stored_bytes_compared": compared,
        **found,
    }
    merged = dict(zip(adapters, job.adapted, strict=True))
    if adapters:
        data["adapters"] = {
            label: _compare(
                merged[label], prepared, _adapted(sessions, path), tolerance, seed, options.module
            )
            for label, path in adapters.items()
        }
    rewritten = sorted({text for text in map(remark, sessions.values()) if text})
    if rewritten:
        data["rewritten_for_cpu"] = rewritten
    noisy = ""
    if found["noise"]:
        noisy = (
            f"PyTorch in fp32 misses the exact outputs by {found['noise']:.1e} of the largest value "
            "itself (fp64 tells): four times that was allowed"
        )
    return Verification(data, tuple(filter(None, (missing, *rewritten, noisy))))


def _compare(
    merged: Checkpoint,
    prepared: Prepared,
    sessions: Mapping[str, Session],
    tolerance: Tolerance,
    seed: int,
    module: str,
) -> dict[str, Any]:
    """Hold sessions against a checkpoint, in the way that its graphs are used."""

    def answer(batches: Sequence[Batch], dtype: torch.dtype) -> References:
        cast = [_in_type(batch, dtype) for batch in batches]
        if module:
            return references_of_module(filled(module, merged).to(dtype), cast)
        return references_of(merged, cast, dtype=dtype)

    if "prefill" in sessions:
        model: Any = prepared.shell.model
        prompts = prompts_for(type(model), model.config, seed)
        counts = [tokens_for(model.config, prompt) for prompt in prompts]
        results, held, how = verify_generation(sessions, prompts, answer, tolerance, counts)
        told = [describe_generation(result, held) for result in results]
        return {"reference": how, "noise": held.noise, "generation": told}
    (stage,) = prepared.stages
    samples = [sample_of(stage, sizes, seed + i) for i, sizes in enumerate(_SIZES)]

    def check(references: References, tolerance: Tolerance) -> list[Comparison]:
        found = []
        for sample, reference in zip(samples, references.outputs, strict=True):
            feed = {name: value.numpy() for name, value in named_inputs(sample).items()}
            found.append(compare(sessions[stage.name], feed, reference))
            found[-1].judge(f"{stage.name}.onnx", tolerance)
        return found

    comparisons, held, how = judged(check, answer, samples, tolerance)
    inputs = [_described(found, held) for found in comparisons]
    return {"reference": how, "noise": held.noise, "inputs": inputs}


def _in_type(sample: Mapping[str, Any], dtype: torch.dtype) -> Batch:
    return {
        name: value.to(dtype) if torch.is_tensor(value) and value.is_floating_point() else value
        for name, value in sample.items()
    }


def _described(found: Comparison, tolerance: Tolerance) -> dict[str, Any]:
    return {
        "batch": found.batch,
        "sequence": found.sequence,
        "max_difference": dict(found.differences),
        "allowed": {name: tolerance.limit(size) for name, size in found.largest.items()},
        "largest_value": dict(found.largest),
    }


@dataclass(frozen=True)
class _WithAdapter:
    """A session that is given an adapter's factors at every run."""

    session: Session
    factors: Arrays

    def get_inputs(self) -> Sequence[Any]:
        """The inputs without the factors."""
        return self.session.get_inputs()

    def get_outputs(self) -> Sequence[Any]:
        """The outputs."""
        return self.session.get_outputs()

    def get_providers(self) -> Sequence[str]:
        """The execution providers."""
        return self.session.get_providers()

    def run(self, names: Sequence[str] | None, feeds: Mapping[str, Any]) -> Sequence[Any]:
        """Compute outputs as the adapter makes them."""
        return self.session.run(names, {**feeds, **self.factors})


def _adapted(sessions: Mapping[str, Session], path: Path) -> dict[str, Session]:
    stored: Any = ort.AdapterFormat.read_adapter(str(path))
    factors = {name: np.array(value.numpy()) for name, value in stored.get_parameters().items()}
    return {name: _WithAdapter(session, factors) for name, session in sessions.items()}
