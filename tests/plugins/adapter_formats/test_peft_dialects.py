"""Files that are PEFT's but for their keys, or the order of their values."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch

from loratool.checkpoint import LazyTensor
from loratool.dtypes import dtype_name
from loratool_plugins.adapter_formats import _peft_dialects as dialects

PREFIX = dialects.PREFIX


def lazy(values: torch.Tensor, name: str = "x") -> LazyTensor:
    return LazyTensor(name, dtype_name(values.dtype), tuple(values.shape), lambda: iter([values]))


@pytest.mark.parametrize(
    ("key", "plain"),
    [
        ("base_model.model.m.q_proj.lora_A.weight", "m.q_proj.lora_A.weight"),
        ("base_model.model.m.q_proj.lora_B.bias", "m.q_proj.lora_B.bias"),
        ("base_model.model.m.q_proj.lora_A.default.weight", "m.q_proj.lora_A.weight"),
        ("base_model.model.m.q_proj.lora_B.mine.bias", "m.q_proj.lora_B.bias"),
        ("base_model.model.m.wte.lora_embedding_A", "m.wte.lora_embedding_A"),
        ("base_model.model.m.wte.lora_embedding_A.default", "m.wte.lora_embedding_A"),
        ("base_model.model.m.x.lora_magnitude_vector", "m.x.lora_magnitude_vector"),
        ("base_model.model.m.x.lora_magnitude_vector.weight", "m.x.lora_magnitude_vector"),
        ("base_model.model.m.x.lora_magnitude_vector.default.weight", "m.x.lora_magnitude_vector"),
        ("base_model.model.m.x.lora_magnitude_vector.default", "m.x.lora_magnitude_vector"),
        ("base_model.model.score.modules_to_save.default.weight", "score.weight"),
        ("base_model.model.score.modules_to_save.default.out_proj.bias", "score.out_proj.bias"),
        ("base_model.model.lm_head.weight", "lm_head.weight"),
        ("base_model.model.m.x.hada_w1_a.default", "m.x.hada_w1_a"),
        ("base_model.model.m.x.lokr_w2.default", "m.x.lokr_w2"),
        ("base_model.model.m.x.ia3_l.default", "m.x.ia3_l"),
        ("m.q_proj.lora_A.weight", "m.q_proj.lora_A.weight"),
        ("module.base_model.model.m.q_proj.lora_A.default.weight", "m.q_proj.lora_A.weight"),
        ("_orig_mod.base_model.model._orig_mod.m.x.lora_A.weight", "m.x.lora_A.weight"),
        ("base_model.model.m._fsdp_wrapped_module.x.lora_A.weight", "m.x.lora_A.weight"),
    ],
)
def test_keys_are_those_that_peft_saves(key: str, plain: str) -> None:
    found = dialects.renamed([key])
    assert found.keys == {PREFIX + plain: key}
    assert not found.problems
    assert bool(found.changes) == (key != PREFIX + plain and "vector.weight" not in key)


def test_copies_of_the_base_are_left_out() -> None:
    keys = ["base_model.model.score.original_module.weight", "base_model.model.x.lora_A.weight"]
    assert dialects.renamed(keys).left_out == (keys[0],)


def test_two_adapters_in_one_file_are_a_problem() -> None:
    keys = [f"base_model.model.x.lora_A.{name}.weight" for name in ("one", "two")]
    (problem,) = dialects.renamed(keys).problems
    assert problem.tensor == keys[1]
    assert "lora_A.one.weight" in problem.message


def test_what_peft_has_in_memory_becomes_what_it_saves() -> None:
    from peft import LoraConfig, get_peft_model, get_peft_model_state_dict

    model = torch.nn.ModuleDict(
        {
            "lin": torch.nn.Linear(4, 4),
            "wte": torch.nn.Embedding(5, 4),
            "head": torch.nn.Linear(4, 2),
        }
    )
    config = LoraConfig(
        target_modules=["lin", "wte"], modules_to_save=["head"], use_dora=True, lora_bias=False
    )
    peft = get_peft_model(model, config)
    saved = get_peft_model_state_dict(peft)
    trained = [name for name, value in peft.named_parameters() if value.requires_grad]
    assert dialects.renamed(trained).keys.keys() == saved.keys()


LLAMA = {"model_type": "llama", "num_attention_heads": 4, "num_key_value_heads": 2}


def test_torchtunes_own_file_is_put_in_order() -> None:
    """Against torchtune's own conversion: (heads, half, 2) to (heads, 2, half)."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(rows, 3, generator=generator) for rows in (32, 16, 16))
    m = torch.randn(32, generator=generator)
    a = torch.randn(3, 32, generator=generator)
    tensors = {
        "layers.1.attn.q_proj.lora_a.weight": a,
        "layers.1.attn.q_proj.lora_b.weight": q,
        "layers.1.attn.q_proj.magnitude": m,
        "layers.0.attn.k_proj.lora_b.weight": k,
        "layers.0.attn.v_proj.lora_b.weight": v,
        "layers.0.attn.output_proj.lora_a.weight": a,
        "layers.11.mlp.w1.lora_a.weight": a,
        "layers.11.mlp.w2.lora_a.weight": a,
        "layers.11.mlp.w3.lora_a.weight": a,
        "output.lora_b.weight": v,
    }
    assert dialects.is_torchtune(tensors)
    found, problems = dialects.torchtune_as_peft({n: lazy(t) for n, t in tensors.items()}, LLAMA)
    assert not problems

    def ordered(values: torch.Tensor, heads: int) -> torch.Tensor:
        size = len(values) // heads
        pairs = values.view(heads, size // 2, 2, -1).transpose(1, 2)
        return pairs.reshape(values.shape)

    layers = f"{PREFIX}model.layers."
    wanted = {
        f"{layers}1.self_attn.q_proj.lora_A.weight": a,
        f"{layers}1.self_attn.q_proj.lora_B.weight": ordered(q, 4),
        f"{layers}1.self_attn.q_proj.lora_magnitude_vector": ordered(m, 4),
        f"{layers}0.self_attn.k_proj.lora_B.weight": ordered(k, 2),
        f"{layers}0.self_attn.v_proj.lora_B.weight": v,
        f"{layers}0.self_attn.o_proj.lora_A.weight": a,
        f"{layers}11.mlp.gate_proj.lora_A.weight": a,
        f"{layers}11.mlp.down_proj.lora_A.weight": a,
        f"{layers}11.mlp.up_proj.lora_A.weight": a,
        f"{PREFIX}lm_head.lora_B.weight": v,
    }
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name].read(), value) for name, value in wanted.items())


@pytest.mark.parametrize(
    ("config", "word"),
    [
        (None, "give the base"),
        ({"model_type": "llama"}, "give the base"),
        ({**LLAMA, "model_type": "mamba"}, "give the base"),
        ({**LLAMA, "num_attention_heads": 5}, "is this its base"),
    ],
)
def test_the_order_of_rows_takes_the_base(config: Mapping[str, Any] | None, word: str) -> None:
    tensors = {"layers.1.attn.q_proj.lora_b.weight": lazy(torch.zeros(32, 3))}
    found, (problem,) = dialects.torchtune_as_peft(tensors, config)
    assert not found
    assert word in problem.message


def test_models_that_torchtune_leaves_in_order() -> None:
    b = torch.randn(32, 3)
    tensors = {"layers.1.attn.q_proj.lora_b.weight": lazy(b)}
    found, problems = dialects.torchtune_as_peft(tensors, {"model_type": "qwen2"})
    assert not problems
    assert torch.equal(next(iter(found.values())).read(), b)


def test_keys_that_are_not_torchtunes() -> None:
    assert dialects.torchtune_key("layers.0.attn.q_proj.weight") is None
    assert dialects.torchtune_key("layers.0.attn.kv_cache.lora_a.weight") is None
    assert not dialects.is_torchtune(["model.layers.0.self_attn.q_proj.lora_a"])


def test_magnitudes_of_torchtunes_export() -> None:
    keys = [f"{PREFIX}m.{m}_proj.lora_magnitude_vector.weight" for m in ("q", "v")]
    assert dialects.magnitudes_out_of_order(keys, {"r": 8}) == (keys[0],)
    assert dialects.magnitudes_out_of_order(keys, {"peft_version": "0.18.0"}) == ()


@pytest.mark.parametrize(
    ("settings", "order", "told"),
    [
        ({}, "rank_major", False),
        ({"auto_mapping": {"unsloth_fixed": True}}, "grouped_by_expert", False),
        ({"auto_mapping": {"base_model_class": "X"}}, "rank_major", False),
        ({"unsloth_version": "2026.1"}, "grouped_by_expert", False),
        ({"unsloth_version": "2026.9", "lora_B_layout": "rank_major"}, "rank_major", True),
        ({"lora_B_layout": "grouped_by_expert"}, "grouped_by_expert", True),
    ],
)
def test_whose_order_experts_have(settings: dict[str, Any], order: str, told: bool) -> None:
    found = dialects.expert_order(settings)
    assert (found.order, found.told, found.fault) == (order, told, "")
    assert "'sideways'" in dialects.expert_order({"lora_B_layout": "sideways"}).fault


def test_columns_of_experts() -> None:
    generator = torch.Generator().manual_seed(0)
    parts = torch.randn(3, 5, 2, generator=generator)  # (E, out, r)
    grouped = torch.cat(list(parts), dim=1)
    peft = torch.stack([parts[e, :, r] for r in range(2) for e in range(3)], dim=1)
    assert torch.equal(dialects.by_expert(grouped, 3, "grouped_by_expert"), parts)
    assert torch.equal(dialects.by_expert(peft, 3, "rank_major"), parts)
