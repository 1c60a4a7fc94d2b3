"""What verification finds in exported graphs, and that it agrees with transformers."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper
from onnxruntime.transformers import float16
from transformers import GenerationConfig

from loratool.checkpoint import Checkpoint
from loratool.errors import VerificationError
from loratool.opening import open_checkpoint
from loratool_plugins.exporters.onnx import sessions
from loratool_plugins.exporters.onnx.comparing import TOLERANCES, compare, difference
from loratool_plugins.exporters.onnx.generation import (
    Generation,
    describe_generation,
    generate,
    prompts_for,
    verify_generation,
)
from loratool_plugins.exporters.onnx.origins import Origin, Part, assemble
from loratool_plugins.exporters.onnx.references import references_of, references_of_module
from loratool_plugins.exporters.onnx.sessions import PieceSession, Session, open_bounded
from loratool_plugins.exporters.onnx.stages import named_inputs
from loratool_plugins.exporters.onnx.stored import check_stored
from loratool_plugins.exporters.onnx.weights import Block
from tests.models import build, perturb, tiny_config
from tests.plugins.exporters.verified_graphs import trace_stages

FP32 = TOLERANCES["fp32"]
ARCHITECTURES = {"llama": "LlamaForCausalLM", "t5": "T5ForConditionalGeneration"}


@dataclass(frozen=True)
class Exported:
    """A random model, as transformers saves it and as graphs.

    Attributes:
        model: itself, in fp32.
        checkpoint: what was saved.
        graphs: stage -> file.
    """

    model: Any
    checkpoint: Checkpoint
    graphs: Mapping[str, Path]

    def sessions(self, **other: Path) -> dict[str, Session]:
        return {name: open_bounded(path) for name, path in {**self.graphs, **other}.items()}

    def prompts(self, seed: int = 0) -> list[dict[str, torch.Tensor]]:
        return prompts_for(type(self.model), self.model.config, seed)

    def verify(self, **other: Path) -> list[Generation]:
        def answer(batches: Any, dtype: torch.dtype) -> Any:
            return references_of(self.checkpoint, batches, dtype=dtype)

        return verify_generation(self.sessions(**other), self.prompts(), answer, FP32)[0]


@pytest.fixture(scope="module")
def make(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Exported]:
    """Each model is traced once."""
    made: dict[str, Exported] = {}

    def get(kind: str) -> Exported:
        if kind not in made:
            folder = tmp_path_factory.mktemp(kind)
            settings = {"num_layers": 1} if kind == "t5" else {}
            model = build(ARCHITECTURES[kind], tiny_config(kind, **settings))
            perturb(model)
            model.save_pretrained(folder / "model")
            checkpoint = open_checkpoint(folder / "model")
            made[kind] = Exported(model, checkpoint, trace_stages(model, folder))
        return made[kind]

    return get


@pytest.fixture
def llama(make: Callable[[str], Exported]) -> Exported:
    return make("llama")


def by_transformers(model: Any, inputs: Mapping[str, torch.Tensor], count: int) -> np.ndarray:
    """The tokens of transformers' own greedy generation, which no end of text stops."""
    start = inputs.get("decoder_input_ids", inputs["input_ids"])
    config = GenerationConfig(
        max_new_tokens=count, do_sample=False, eos_token_id=None, pad_token_id=0,
        decoder_start_token_id=0,
    )  # fmt: skip
    given = {name: value for name, value in inputs.items() if name != "position_ids"}
    found = model.generate(**given, generation_config=config)
    return np.asarray(found[:, start.shape[1] :])


@pytest.mark.parametrize("kind", list(ARCHITECTURES))
def test_generation_is_that_of_transformers(make: Callable[[str], Exported], kind: str) -> None:
    exported = make(kind)
    results = exported.verify()
    sessions_ = exported.sessions()
    for inputs, result in zip(exported.prompts(), results, strict=True):
        tokens = generate(sessions_, inputs, 16).tokens
        assert (tokens == by_transformers(exported.model, inputs, 16)).all()
        assert result.is_equal and result.tokens == 16
        told = describe_generation(result, FP32)
        assert json.loads(json.dumps(told)) == told
        assert all(told["max_difference"][name] <= limit for name, limit in told["allowed"].items())
        assert {"prefill logits", "decode logits"} < told["max_difference"].keys()
        assert ("encoder states" in told["max_difference"]) == (kind == "t5")


def test_prompts_are_padded_and_of_several_shapes(llama: Exported) -> None:
    shapes = [tuple(prompt["input_ids"].shape) for prompt in llama.prompts()]
    assert shapes == [(2, 7), (3, 5)]
    assert all(not prompt["attention_mask"][1:, 0].any() for prompt in llama.prompts())


def changed(path: Path, folder: Path, change: Callable[[onnx.ModelProto], None]) -> Path:
    """A copy of a graph, with its weights inside, after a change."""
    model = onnx.load(path)
    change(model)
    onnx.save(model, folder / path.name)
    return folder / path.name


def weight(model: onnx.ModelProto, end: str) -> Any:
    return next(tensor for tensor in model.graph.initializer if tensor.name.endswith(end))


def bypass(model: onnx.ModelProto, name: str, made: str) -> None:
    """Let all nodes read a constant of zeros or ones in the place of an input."""
    for node in model.graph.node:
        node.input[:] = [made if use == name else use for use in node.input]


def test_a_wrong_weight_is_found(llama: Exported, tmp_path: Path) -> None:
    def change(model: onnx.ModelProto) -> None:
        tensor = weight(model, "layers.1.mlp.up_proj.weight")
        values = numpy_helper.to_array(tensor).copy()
        values[5, 3] += 0.05
        tensor.CopyFrom(numpy_helper.from_array(values, tensor.name))

    path = changed(llama.graphs["decode"], tmp_path, change)
    with pytest.raises(VerificationError, match=r"decode logits differs from PyTorch by"):
        llama.verify(decode=path)


def test_a_transposed_square_weight_is_found(llama: Exported, tmp_path: Path) -> None:
    def change(model: onnx.ModelProto) -> None:
        tensor = weight(model, "layers.0.self_attn.o_proj.weight")
        values = numpy_helper.to_array(tensor).T.copy()
        tensor.CopyFrom(numpy_helper.from_array(values, tensor.name))

    path = changed(llama.graphs["prefill"], tmp_path, change)
    with pytest.raises(VerificationError, match=r"prefill logits differs"):
        llama.verify(prefill=path)


@pytest.mark.parametrize("stage", ["prefill", "decode"])
def test_a_mask_that_is_not_looked_at_is_found(llama: Exported, tmp_path: Path, stage: str) -> None:
    def change(model: onnx.ModelProto) -> None:
        zero = onnx.helper.make_node("Sub", ["attention_mask", "attention_mask"], ["none"])
        one = numpy_helper.from_array(np.array(1), "one")
        bypass(model, "attention_mask", "all")
        model.graph.initializer.append(one)
        model.graph.node.insert(0, onnx.helper.make_node("Add", ["none", "one"], ["all"]))
        model.graph.node.insert(0, zero)

    path = changed(llama.graphs[stage], tmp_path, change)
    with pytest.raises(VerificationError, match=rf"{stage} logits differs"):
        llama.verify(**{stage: path})


def test_a_decode_graph_that_ignores_the_past_is_found(llama: Exported, tmp_path: Path) -> None:
    def change(model: onnx.ModelProto) -> None:
        name = "past_key_values.1.value"
        bypass(model, name, "nothing")
        model.graph.node.insert(0, onnx.helper.make_node("Sub", [name, name], ["nothing"]))

    path = changed(llama.graphs["decode"], tmp_path, change)
    with pytest.raises(VerificationError, match=r"decode logits differs"):
        llama.verify(decode=path)


def test_a_cache_whose_keys_are_swapped_is_found(llama: Exported, tmp_path: Path) -> None:
    """The logits of that graph are right, those of the next step would not be."""

    def change(model: onnx.ModelProto) -> None:
        for node in model.graph.node:
            swap = {"present.0.key": "present.1.key", "present.1.key": "present.0.key"}
            node.output[:] = [swap.get(name, name) for name in node.output]
            node.input[:] = [swap.get(name, name) for name in node.input]

    path = changed(llama.graphs["prefill"], tmp_path, change)
    with pytest.raises(VerificationError, match=r"differs from PyTorch"):
        llama.verify(prefill=path)


def test_nan_is_found(llama: Exported, tmp_path: Path) -> None:
    def change(model: onnx.ModelProto) -> None:
        tensor = weight(model, "norm.weight")
        values = np.full_like(numpy_helper.to_array(tensor), np.nan)
        tensor.CopyFrom(numpy_helper.from_array(values, tensor.name))

    path = changed(llama.graphs["decode"], tmp_path, change)
    with pytest.raises(VerificationError, match=r"ONNX Runtime gives NaN"):
        llama.verify(decode=path)


def test_a_token_within_the_tolerance_is_a_tie_and_said(llama: Exported) -> None:
    """The reference gets the logits of the second best token raised to those of the best."""

    def answer(batches: Any, dtype: torch.dtype) -> Any:
        found = references_of(llama.checkpoint, batches)
        logits = found.outputs[0]["logits"]
        last = logits[1, -1]
        second = last.argsort()[-2]
        last[second] = last.max() + 1e-6
        return found

    prompts = llama.prompts()[:1]
    wide = replace(FP32, value=0.5, relative=True)
    (result,), _, how = verify_generation(llama.sessions(), prompts, answer, wide)
    assert (result.ties, result.is_equal, how) == (((1, 15),), False, "from_pretrained")


def test_half_precision_in_pieces(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, llama: Exported
) -> None:
    monkeypatch.setattr(sessions, "SMALL", 0)
    monkeypatch.setattr(sessions, "PIECE", 20_000)
    graphs = {}
    for name, path in llama.graphs.items():
        half = float16.convert_float_to_float16(onnx.load(path), disable_shape_infer=True)
        graphs[name] = tmp_path / path.name
        onnx.save(half, graphs[name])
    opened = {name: open_bounded(path) for name, path in graphs.items()}
    assert all(isinstance(session, PieceSession) for session in opened.values())

    def answer(batches: Any, dtype: torch.dtype) -> Any:
        return references_of(llama.checkpoint, batches, whole=0, dtype=dtype)

    results, _, how = verify_generation(opened, llama.prompts(), answer, TOLERANCES["fp16"])
    assert how == "streamed"
    assert max(result.comparison.differences["decode logits"] for result in results) > 1e-5


@pytest.mark.parametrize("kind", list(ARCHITECTURES))
def test_streamed_references_are_those_of_transformers(
    make: Callable[[str], Exported], kind: str
) -> None:
    exported = make(kind)
    batches = [{**prompt, "use_cache": True} for prompt in exported.prompts()]
    loaded = references_of(exported.checkpoint, batches)
    streamed = references_of(exported.checkpoint, batches, whole=0)
    whole = references_of_module(exported.model, batches)
    assert (loaded.how, streamed.how, whole.how) == ("from_pretrained", "streamed", "module")
    for one, other, third in zip(loaded.outputs, streamed.outputs, whole.outputs, strict=True):
        assert one.keys() == other.keys() and "present.0" in " ".join(one)
        for name, value in one.items():
            np.testing.assert_allclose(other[name], value, atol=1e-5)
            np.testing.assert_allclose(third[name], value, atol=1e-5)


def test_a_checkpoint_that_lacks_a_tensor_is_no_reference(llama: Exported) -> None:
    tensors = {n: t for n, t in llama.checkpoint.items() if "up_proj" not in n}
    part = replace(llama.checkpoint, tensors=tensors)
    for whole in (0, 1 << 30):
        with pytest.raises(VerificationError, match=r"up_proj"):
            references_of(part, llama.prompts(), whole)


def write_stored(folder: Path, tensors: Mapping[str, Any], origin: Origin) -> Block:
    path = folder / "model.onnx.data"
    content = b"".join(v.numpy().tobytes() for v in assemble(origin, tensors, torch.float16))
    path.write_bytes(bytes(64) + content)
    return Block(path, origin, torch.float16, 64, len(content))


def square_origin(checkpoint: Checkpoint, *turns: tuple[int, int]) -> Origin:
    """Square matrices side by side, each turned or not."""
    names = [name for name in checkpoint if "q_proj.weight" in name]
    parts = tuple(Part(name, turn, 32) for name, turn in zip(names, turns, strict=True))
    return Origin((32, 64), 1, parts)


def test_stored_weights_are_compared_as_they_are_turned(llama: Exported, tmp_path: Path) -> None:
    right = square_origin(llama.checkpoint, (1, 0), (1, 0))
    stored = write_stored(tmp_path, llama.checkpoint, right)
    assert check_stored([stored], llama.checkpoint) == 32 * 64 * 2
    wrong = replace(stored, origin=square_origin(llama.checkpoint, (1, 0), (0, 1)))
    with pytest.raises(VerificationError, match=r"model\.onnx\.data: .*q_proj\.weight is not what"):
        check_stored([wrong], llama.checkpoint)


def test_stored_weights_that_are_cut_off_or_changed(llama: Exported, tmp_path: Path) -> None:
    origin = square_origin(llama.checkpoint, (1, 0), (1, 0))
    stored = write_stored(tmp_path, llama.checkpoint, origin)
    content = stored.path.read_bytes()
    stored.path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(VerificationError, match=r"is not what the checkpoint gives"):
        check_stored([stored], llama.checkpoint)
    stored.path.write_bytes(content[:-2])
    with pytest.raises(VerificationError, match=r"ends before .*q_proj\.weight does"):
        check_stored([stored], llama.checkpoint)
    stored.path.write_bytes(b"")
    with pytest.raises(VerificationError, match=r"ends before .*q_proj\.weight does"):
        check_stored([stored], llama.checkpoint)


def test_only_unpadded_places_are_compared(llama: Exported) -> None:
    """A prefill's outputs have one place a token on the second or third axis."""
    inputs = {**llama.prompts()[0], "use_cache": True}
    (reference,) = references_of(llama.checkpoint, [inputs]).outputs
    padded = inputs["attention_mask"].numpy() == 0
    reference["logits"][padded] += 7
    np.moveaxis(reference["present.0.key"], 2, 1)[padded] += 7
    session = open_bounded(llama.graphs["prefill"])
    found = compare(session, named_inputs({n: v for n, v in inputs.items() if n != "use_cache"}),
                    reference)  # fmt: skip
    found.judge("prefill", FP32)
    assert (found.batch, found.sequence) == (2, 7)
    reference["present.1.key"][0, 0, -1] += 7
    with pytest.raises(VerificationError, match=r"present\.1\.key differs from PyTorch by 7"):
        compare(session, named_inputs(llama.prompts()[0]), reference).judge("prefill", FP32)


def test_equal_infinities_are_no_difference_and_others_are() -> None:
    some, other = np.array([1.0, -np.inf]), np.array([1.5, -np.inf])
    assert difference("y", some, other) == (0.5, 1.5)
    assert difference("y", some, np.array([1.0, 2.0]))[0] == np.inf
    assert difference("y", some, np.array([1.0, np.inf]))[0] == np.inf
    with pytest.raises(VerificationError, match="y: PyTorch gives NaN"):
        difference("y", some, np.array([1.0, np.nan]))
