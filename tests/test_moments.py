"""Second moments collected while a model is run, against those of hooks on the whole model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from loratool.calibration import Inputs, read_inputs
from loratool.errors import InputError
from loratool.linalg import SecondMoment
from loratool.moments import can_be_watched, collect
from loratool.opening import open_checkpoint
from loratool.running import Model, open_model, whole_model
from tests.memory_models import TINY
from tests.models import build, perturb, tiny_config

ROWS = [[5, 9, 2, 7, 11], [4, 8], [3, 3, 3, 40, 41, 42, 43], [6]]


def prepared(reference: Any, folder: Path) -> tuple[Model, Inputs]:
    """A saved model, and padded token ids or images for it."""
    reference.save_pretrained(folder / "model")
    model = open_model(open_checkpoint(folder / "model"))
    if hasattr(reference.config, "image_size"):
        images = torch.randn(3, 3, 16, 16, generator=torch.Generator().manual_seed(0))
        return model, Inputs(({"pixel_values": images},), ((0, 1, 2),), "images")
    (folder / "ids.json").write_text(json.dumps(ROWS))
    return model, read_inputs(folder / "ids.json", model)


def watched(model: Model) -> list[str]:
    return [name for name, found in model.shell.model.named_modules() if can_be_watched(found)]


def collected(model: Model, inputs: Inputs, **options: Any) -> dict[str, SecondMoment]:
    found: dict[str, SecondMoment] = {}
    collect(model, inputs, watched(model), found.__setitem__, **options)
    return found


def expected(model: Model, rows: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """E[x x^T] of every linear module, sample by sample without any padding."""
    whole = whole_model(model)
    totals: dict[str, Any] = {}

    def hook(name: str) -> Any:
        def add(module: Any, inputs: Any) -> None:
            x = inputs[0].double().flatten(0, -2)
            total, count = totals.get(name, (0, 0))
            totals[name] = (total + x.t() @ x, count + len(x))

        return add

    for name in watched(model):
        module = whole.get_submodule(name)
        if not isinstance(module, torch.nn.Conv2d):
            module.register_forward_pre_hook(hook(name))
    with torch.no_grad():
        for row in rows:
            whole(**row)
    return {name: total / count for name, (total, count) in totals.items()}


@pytest.mark.parametrize(
    ("model_type", "architecture"),
    [
        ("bert", "BertForMaskedLM"),
        ("gpt2", "GPT2LMHeadModel"),
        ("llama", "LlamaModel"),
        ("t5", "T5ForConditionalGeneration"),
    ],
)
def test_moments_are_those_of_tokens_without_padding(
    tmp_path: Path, model_type: str, architecture: str
) -> None:
    reference = build(architecture, tiny_config(model_type, pad_token_id=0))
    perturb(reference)
    model, inputs = prepared(reference, tmp_path)
    rows = [{"input_ids": torch.tensor([row])} for row in ROWS]
    if model_type == "t5":
        for row in rows:
            ids = row["input_ids"]
            row["decoder_input_ids"] = torch.cat([torch.zeros_like(ids[:, :1]), ids[:, :-1]], 1)
    wanted = expected(model, rows)
    for name, moment in collected(model, inputs).items():
        # of heads that are asked for the last token only, the moment is of these
        if name == "lm_head" and model_type == "gpt2":
            continue
        torch.testing.assert_close(moment.values, wanted[name], rtol=1e-4, atol=1e-5)
        assert torch.equal(moment.values, moment.values.t())
    for name, moment in collected(model, inputs, diagonal=True).items():
        if name in wanted and moment.count == sum(map(len, ROWS)):
            torch.testing.assert_close(moment.values, wanted[name].diagonal(), rtol=1e-4, atol=1e-5)


def test_layers_that_stand_in_several_places(tmp_path: Path) -> None:
    """ALBERT calls one layer again and again: the sum is over all calls."""
    config = transformers.AlbertConfig(
        vocab_size=64, hidden_size=32, embedding_size=16, num_hidden_layers=3,
        num_attention_heads=4, intermediate_size=48, max_position_embeddings=24,
        initializer_range=0.2,
    )  # fmt: skip
    reference = build("AlbertModel", config)
    perturb(reference)
    model, inputs = prepared(reference, tmp_path)
    wanted = expected(model, [{"input_ids": torch.tensor([row])} for row in ROWS])
    found = collected(model, inputs)
    for name, value in wanted.items():
        torch.testing.assert_close(found[name].values, value, rtol=1e-4, atol=1e-5)
    inner = next(name for name in found if name.endswith("query"))
    assert found[inner].count == 3 * sum(map(len, ROWS))


def test_a_convolution_is_given_patches(tmp_path: Path) -> None:
    reference = TINY["vit"].build()
    model, inputs = prepared(reference, tmp_path)
    name = next(n for n in watched(model) if n.endswith("projection"))
    moment = collected(model, inputs)[name]
    images = inputs.batches[0]["pixel_values"]
    weight = dict(model.shell.model.named_modules())[name].weight
    size = weight.shape[-1]
    delta = torch.randn(weight.shape, generator=torch.Generator().manual_seed(1))
    change = torch.nn.functional.conv2d(images, delta, stride=size)
    mean = float(change.double().square().sum(1).mean())
    flat = delta.flatten(1).double()
    assert float((flat @ moment.values @ flat.t()).trace()) == pytest.approx(mean, rel=1e-5)


def test_modules_that_are_given_the_same_share_one(tmp_path: Path) -> None:
    reference = build("LlamaModel", tiny_config("llama"))
    model, inputs = prepared(reference, tmp_path)
    found = collected(model, inputs)
    layer = "layers.0.self_attn"
    query = found[f"{layer}.q_proj"]
    assert query is found[f"{layer}.k_proj"] and query is found[f"{layer}.v_proj"]
    assert query is not found[f"{layer}.o_proj"]
    assert found["layers.1.mlp.gate_proj"] is found["layers.1.mlp.up_proj"]


def test_modules_that_are_never_called_are_named(tmp_path: Path) -> None:
    reference = build("BertForMaskedLM", tiny_config("bert", pad_token_id=0))
    model, inputs = prepared(reference, tmp_path)
    spare = torch.nn.Module()
    spare.register_module("linear", torch.nn.Linear(1, 1, bias=False))
    model.shell.model.add_module("spare", spare)
    del spare.linear._parameters["weight"]  # nothing to load
    assert collect(model, inputs, ["spare.linear"], lambda *_: None) == {"spare.linear"}


def test_what_is_not_finite_is_told(tmp_path: Path) -> None:
    reference = build("LlamaModel", tiny_config("llama"))
    with torch.no_grad():
        reference.layers[0].self_attn.o_proj.weight[0, 0] = float("nan")
    model, inputs = prepared(reference, tmp_path)
    with pytest.raises(InputError, match=r"layers\.0\.mlp\.gate_proj is given NaN or Inf"):
        collected(model, inputs)
