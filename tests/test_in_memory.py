"""Checkpoints as models have them in memory: what transformers loads, bit by bit."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import conversion_mapping
from transformers.core_model_loading import ConversionOps, WeightConverter

from loratool.checkpoint import Checkpoint, LazyTensor
from loratool.errors import InputError
from loratool.in_memory import in_memory, pieces_by_tensor, pieces_of, shape_in_memory
from loratool.pieces import Index, Piece
from loratool.skeleton import Skeleton, build_skeleton
from tests.memory_models import TINY, loaded, opened, save_as_in_memory

Saved = Callable[[str], Path]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Saved:
    """Name of a tiny model -> where transformers has saved it."""

    @cache
    def save(name: str) -> Path:
        folder = tmp_path_factory.mktemp(name) / "model"
        TINY[name].build().save_pretrained(folder)
        return folder

    return save


def shapes_of(checkpoint: Checkpoint) -> dict[str, tuple[int, ...]]:
    return {name: tensor.shape for name, tensor in checkpoint.items()}


def same_as_loaded(name: str, folder: Path) -> None:
    checkpoint, skeleton = opened(folder)
    found = in_memory(checkpoint, skeleton)
    wanted = loaded(TINY[name], folder).state_dict()
    assert set(found) <= set(wanted)
    assert set(wanted) - set(found) <= set(skeleton.tied)
    for key, tensor in found.items():
        assert tensor.name == key
        assert tensor.shape == tuple(wanted[key].shape)
        assert torch.equal(tensor.read(), wanted[key])


@pytest.mark.parametrize("name", TINY)
def test_a_checkpoint_in_memory_is_what_transformers_loads(name: str, saved: Saved) -> None:
    same_as_loaded(name, saved(name))


@pytest.mark.parametrize("name", ["vit", "mixtral", "qwen3_moe", "dinov2", "inkling2"])
def test_names_in_memory_may_already_be_on_disk(name: str, tmp_path: Path) -> None:
    save_as_in_memory(TINY[name].build(), tmp_path / "model")
    checkpoint, skeleton = opened(tmp_path / "model")
    assert not skeleton.pieces
    assert in_memory(checkpoint, skeleton) is checkpoint
    same_as_loaded(name, tmp_path / "model")


def test_layouts_may_be_mixed_and_prefixes_missing(saved: Saved, tmp_path: Path) -> None:
    model = TINY["vit"].build()
    tensors = load_file(saved("vit") / "model.safetensors")
    old = "vit.encoder.layer.0.attention.attention.query.weight"
    tensors["vit.layers.0.attention.q_proj.weight"] = tensors.pop(old)
    tensors["embeddings.cls_token"] = tensors.pop("vit.embeddings.cls_token")
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    model.config.architectures = ["ViTForImageClassification"]
    model.config.save_pretrained(tmp_path)
    same_as_loaded("vit", tmp_path)


def test_kinds_are_by_names_in_memory(saved: Saved) -> None:
    _, vit = opened(saved("vit"))
    assert vit.kinds["vit.layers.0.attention.q_proj.weight"] == "linear"
    assert vit.kinds["vit.embeddings.patch_embeddings.projection.weight"] == "conv"
    assert vit.kinds["vit.embeddings.cls_token"] == "other"
    _, mixtral = opened(saved("mixtral"))
    assert mixtral.kinds["model.layers.0.mlp.experts.gate_up_proj"] == "experts"
    assert mixtral.kinds["model.layers.0.mlp.gate.weight"] == "other"
    assert not mixtral.transposed_experts
    _, gpt_oss = opened(saved("gpt_oss"))
    assert "model.layers.1.mlp.experts.down_proj" in gpt_oss.transposed_experts
    assert gpt_oss.kinds["model.layers.1.mlp.experts.down_proj_bias"] == "other"
    _, nemotron = opened(saved("nemotron_h"))
    assert nemotron.kinds["model.layers.0.mixer.conv1d.weight"] == "conv"
    assert nemotron.groups["model.layers.0.mixer.conv1d.weight"] > 1


def test_what_peft_cannot_adapt_is_known(saved: Saved) -> None:
    _, deepseek = opened(saved("deepseek_v3"))
    dense = "model.layers.0.mlp.gate_proj.weight"
    shared = "model.layers.1.mlp.shared_experts.down_proj.weight"
    assert {dense, shared} < deepseek.unreachable
    assert "model.layers.0.self_attn.o_proj.weight" not in deepseek.unreachable
    assert not opened(saved("qwen2_moe"))[1].unreachable


def test_experts_are_read_one_after_another(saved: Saved) -> None:
    checkpoint, skeleton = opened(saved("mixtral"))
    read: list[str] = []

    def recorded(tensor: LazyTensor) -> LazyTensor:
        def blocks() -> Iterator[torch.Tensor]:
            read.append(tensor.name)
            yield from tensor.blocks()

        return replace(tensor, blocks=blocks)

    watched = replace(checkpoint, tensors={n: recorded(t) for n, t in checkpoint.items()})
    experts = in_memory(watched, skeleton)["model.layers.0.mlp.experts.gate_up_proj"]
    assert experts.extent is None
    prefix = "model.layers.0.block_sparse_moe.experts"
    for expert, block in enumerate(experts.blocks()):
        assert block.shape == (1, *experts.shape[1:])
        assert sorted(read) == [f"{prefix}.{expert}.w1.weight", f"{prefix}.{expert}.w3.weight"]
        read.clear()


def test_what_is_only_renamed_stays_where_it_is(saved: Saved) -> None:
    checkpoint, skeleton = opened(saved("vit"))
    found = in_memory(checkpoint, skeleton)
    query = found["vit.layers.0.attention.q_proj.weight"]
    old = "vit.encoder.layer.0.attention.attention.query.weight"
    assert query.extent == checkpoint[old].extent
    assert found["classifier.weight"] is checkpoint["classifier.weight"]


def test_rows_of_a_fused_tensor_lie_in_its_file(saved: Saved) -> None:
    checkpoint, skeleton = opened(saved("dinov2"))
    up = in_memory(checkpoint, skeleton)["dinov2.encoder.layer.0.mlp.up_proj.weight"]
    assert up.extent is not None
    raw = up.extent.path.read_bytes()[up.extent.offset : up.extent.offset + up.extent.length]
    assert raw == up.read().numpy().tobytes()


def size(index: tuple[Index, ...], shape: tuple[int, ...]) -> int:
    full = (*index, *[slice(None)] * (len(shape) - len(index)))
    pairs = zip(full, shape, strict=True)
    return math.prod(len(range(*i.indices(n))) if isinstance(i, slice) else 1 for i, n in pairs)


@pytest.mark.parametrize("name", TINY)
def test_every_tensor_is_in_one_parameter(name: str, saved: Saved) -> None:
    checkpoint, skeleton = opened(saved(name))
    shapes = shapes_of(checkpoint)
    users = pieces_by_tensor(skeleton, shapes)
    assert list(users) == list(checkpoint)
    for tensor, found in users.items():
        assert sum(size(piece.place, shapes[tensor]) for _, piece in found) == math.prod(
            shapes[tensor]
        )
        for parameter, piece in found:
            assert piece in pieces_of(skeleton, parameter)
    for parameter, tensor_in_memory in in_memory(checkpoint, skeleton).items():
        pieces = pieces_of(skeleton, parameter)
        assert shape_in_memory(pieces, shapes) == tensor_in_memory.shape


def test_tensors_of_one_parameter_have_one_type(saved: Saved) -> None:
    checkpoint, skeleton = opened(saved("mixtral"))
    name = "model.layers.1.block_sparse_moe.experts.2.w3.weight"
    other = {**checkpoint.tensors, name: replace(checkpoint[name], dtype="BF16")}
    with pytest.raises(InputError, match=r"gate_up_proj: is made of .* of type BF16; store them"):
        in_memory(replace(checkpoint, tensors=other), skeleton)


def test_what_the_class_passes_over_is_left_out(saved: Saved) -> None:
    checkpoint, _ = opened(saved("deepseek_v3"))
    skeleton = Skeleton({}, unused=frozenset(["lm_head.weight"]))
    found = in_memory(checkpoint, skeleton)
    assert set(found) == set(checkpoint) - {"lm_head.weight"}
    assert "lm_head.weight" not in pieces_by_tensor(skeleton, shapes_of(checkpoint))


def edited(folder: Path, source: Path, edit: Callable[[dict[str, torch.Tensor]], Any]) -> Path:
    """A copy of a checkpoint with other tensors."""
    folder.mkdir()
    tensors = load_file(source / "model.safetensors")
    edit(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_bytes((source / "config.json").read_bytes())
    return folder


EXPERT = "model.layers.0.block_sparse_moe.experts.1.w1.weight"


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (
            lambda tensors: tensors.pop(EXPERT),
            r"MixtralForCausalLM: model\.layers\.0\.mlp\.experts\.gate_up_proj: "
            r"MergeModulelist\(dim=0\), Concatenate\(dim=1\) of .*experts\.0\.w1\.weight and 6 "
            r"more fails: .* cannot be joined; are tensors missing",
        ),
        (
            lambda tensors: [tensors.pop(EXPERT), tensors.pop(EXPERT.replace("w1", "w3"))],
            r"gate_up_proj the shape \(3, 96, 32\), but in the class it has \(4, 96, 32\)",
        ),
        (
            lambda tensors: tensors.update({EXPERT: torch.zeros(5, 32)}),
            r"gate_up_proj: .* fails: .*\(1, 5, 32\) cannot be joined",
        ),
        (
            lambda tensors: tensors.update({"model.other.weight": torch.zeros(2, 2)}),
            r"model\.other\.weight: MixtralForCausalLM has no parameter for it",
        ),
        (
            lambda tensors: tensors.update({"norm.weight": torch.zeros(32)}),
            r"norm\.weight: MixtralForCausalLM has one parameter for it and model\.norm\.weight",
        ),
    ],
)
def test_what_does_not_fit_is_refused_by_name(
    edit: Callable[[dict[str, torch.Tensor]], Any], message: str, saved: Saved, tmp_path: Path
) -> None:
    folder = edited(tmp_path / "model", saved("mixtral"), edit)
    with pytest.raises(InputError, match=message):
        opened(folder)


class Double(ConversionOps):  # type: ignore[misc]
    """An operation that no slicing can express."""

    def convert(
        self, input_dict: Any, source_patterns: Any, target_patterns: Any, **kwargs: Any
    ) -> Any:
        (tensors,) = input_dict.values()
        return {target_patterns[0]: 2 * tensors[0]}


def test_an_operation_that_calculates_is_refused_by_name(
    saved: Saved, monkeypatch: pytest.MonkeyPatch
) -> None:
    rule = WeightConverter("lm_head.weight", "lm_head.weight", operations=[Double()])
    monkeypatch.setattr(conversion_mapping, "get_model_conversion_mapping", lambda model: [rule])
    message = "GptOssForCausalLM: lm_head.weight: Double of lm_head.weight cannot be followed: "
    with pytest.raises(InputError, match=message + "torch.mul"):
        opened(saved("gpt_oss"))


def test_pieces_compare_by_value() -> None:
    assert Piece("a", (1,), (slice(0, 2),)) == Piece("a", (1,), (slice(0, 2),))


def test_the_model_is_built_once_for_all_adapters(tmp_path: Path) -> None:
    TINY["vit"].build().save_pretrained(tmp_path)
    _, first = opened(tmp_path)
    checkpoint, again = opened(tmp_path)
    assert again is first
    config = {**(checkpoint.config or {}), "num_labels": 3}
    shapes = {name: tensor.shape for name, tensor in checkpoint.items()}
    assert build_skeleton(config, shapes) is not first
