"""inspect of every kind of update: names, shapes, norms; and of files that nobody should have."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

import loratool
from loratool.adapter import LazyUpdate
from loratool.errors import LoratoolError
from loratool.update_measures import measure_update
from loratool.updates import IA3, Dense, DoRA, Experts, LoHa, LoKr, LowRank, Product
from tests import updates as some
from tests.adapters import PREFIX
from tests.lazy import Given, adapter_of, delta, experts, matrices, replacement, rows
from tests.updates import randn

common = settings(derandomize=True, deadline=None, max_examples=30)

KINDS: dict[str, Given] = {
    "m.weight": (LowRank(randn(0, 2, 5), randn(1, 6, 2), 1.5), (6, 5)),
    "conv.weight": (LowRank(randn(2, 2, 12), randn(3, 4, 2), 1.5), (4, 3, 2, 2)),
    "e.gate_up": (experts(4, 3, 6, 5, 2, 0.5), (3, 6, 5)),
    "m.bias": (Dense(randn(5, 6), 1.5), (6,)),
    "h.weight": (LoHa(some.product(6, 4, 2, 3), some.product(8, 4, 2, 3), 2.0), (4, 3)),
    "k.weight": (LoKr(Product(randn(7, 2, 3)), some.product(9, 2, 1, 2), 0.3), (4, 6)),
    "d.weight": (DoRA(LowRank(randn(0, 2, 5), randn(1, 6, 2), 2.0), randn(2, 6)), (6, 5)),
    "i.weight": (IA3(randn(3, 6)), (6, 0)),
    "t.weight": (rows((1, 3)), (2, 4)),
    "r.weight": (replacement("r.weight", randn(0, 3, 3)), (3, 3)),
}


def inspected(found: dict[str, Given]) -> Any:
    report = loratool.inspect(adapter_of(found))
    json.dumps(report.data, allow_nan=False)
    return report


def test_every_kind_is_told_by_its_name() -> None:
    report = inspected(KINDS)
    assert report.lines[1] == (
        "2 low-rank updates, 1 low-rank update of experts, 1 full-size delta, 1 LoHa update, "
        "1 LoKr update, 1 DoRA update, 1 IA3 scaling, 1 table with replaced rows, "
        "1 tensor kept whole"
    )
    assert report.table is not None
    kinds = {row[0]: row[1] for row in report.table.rows}
    assert kinds == {
        "m": "low-rank", "conv": "low-rank convolution 2x2", "e.gate_up": "low-rank 3 experts",
        "m.bias": "full-size vector", "h": "LoHa", "k": "LoKr", "d": "DoRA",
        "i": "IA3 of outputs",
    }  # fmt: skip
    shapes = {row[0]: row[2:4] for row in report.table.rows}
    assert shapes["conv"] == ("4x3x2x2", "2")
    assert shapes["e.gate_up"] == ("3x6x5", "2")
    assert shapes["i"] == ("6x?", "-")
    assert "kept whole: 17 parameters (r.weight, t.weight: 2 rows)" in report.lines
    assert "1 DoRA update: 28 parameters: what these add depends on the base" in report.lines
    assert any(line.startswith("1 LoHa update: 28 parameters, norm ") for line in report.lines)


def test_the_numbers_of_every_kind() -> None:
    data = inspected(KINDS).data
    total = 0.0
    for name, (update, shape) in KINDS.items():
        if name[0] in "dtri":
            continue
        norm = float(delta(update, shape).norm())
        total += norm**2
        found = data["updates"][name]
        assert math.isclose(found["norm"], norm, rel_tol=1e-6), name
        assert found["shape"] == list(shape)
        assert found["dense_parameters"] == math.prod(shape)
    assert math.isclose(data["norm"], math.sqrt(total), rel_tol=1e-6)
    assert data["without_norm"] == 2
    assert data["counts"] == {"low_rank": 2, "replaced": 1, "others": 6, "dropped": 0}
    assert {kind: found["updates"] for kind, found in data["kinds"].items()} == {
        "low_rank": 2, "experts": 1, "dense": 1, "loha": 1, "lokr": 1, "dora": 1, "ia3": 1,
        "rows": 1, "replacement": 1,
    }  # fmt: skip
    ranks = {name: found["rank"] for name, found in data["updates"].items()}
    assert ranks == {
        "m.weight": 2, "conv.weight": 2, "e.gate_up": 2, "m.bias": None, "h.weight": 2,
        "k.weight": 1, "d.weight": 2, "i.weight": None,
    }  # fmt: skip
    assert data["updates"]["h.weight"]["alpha"] == 4.0
    assert data["updates"]["d.weight"]["norm"] is None
    assert data["rows"]["t.weight"]["rows"] == [1, 3]
    assert data["replaced"].keys() == {"r.weight"}
    parameters = {kind: found["parameters"] for kind, found in data["kinds"].items()}
    assert parameters["experts"] == 3 * 2 * 11
    assert sum(parameters.values()) == data["parameters"] + data["replaced_parameters"]


def test_experts_are_summed_up_one_by_one() -> None:
    update = KINDS["e.gate_up"][0]
    assert isinstance(update, Experts)
    found = inspected({"e.gate_up": KINDS["e.gate_up"]}).data
    facts = found["updates"]["e.gate_up"]
    sigmas = [torch.linalg.svdvals(m)[:2].numpy() for m in matrices(update)]
    np.testing.assert_allclose(
        [expert["norm"] for expert in facts["experts"]], [np.linalg.norm(s) for s in sigmas]
    )
    np.testing.assert_allclose(facts["sigma"], np.sqrt((np.stack(sigmas) ** 2).sum(axis=0)))
    assert math.isclose(sum(facts["energies"]), 1, rel_tol=1e-12)
    assert found["singular_values"] == 6


def test_an_adapter_of_plain_updates_has_no_column_for_kinds() -> None:
    table = inspected({"m.weight": KINDS["m.weight"]}).table
    assert table is not None and "kind" not in table.columns


@common
@given(found=st.one_of(some.lohas(), some.lokrs()))
def test_norms_of_products_are_those_of_the_whole_matrix(found: Any) -> None:
    update, shape = found
    lazy = LazyUpdate("m", update.kind, shape, "F64", lambda: update)
    norm = measure_update(lazy).norm
    assert norm is not None
    assert math.isclose(norm, float(delta(update, shape).norm()), rel_tol=1e-6)


@pytest.mark.parametrize(
    ("update", "shape", "fault"),
    [
        (LoHa(some.product(0, 4, 2, 3), some.product(0, 4, 2, 5)), (4, 3), "do not make one"),
        (LoHa(Product(randn(0, 4, 2), randn(0, 3, 3)), some.product(0, 4, 2, 3)), (4, 3), "do not"),
        (LoKr(Product(randn(0, 2, 2)), Product(randn(0, 2, 2))), (4, 5), "do not make one"),
        (Dense(randn(0, 4)), (5,), "do not have the weight's shape"),
        (Dense(torch.empty(0)), (0,), "the delta is empty"),
        (LowRank(randn(0, 2, 5), randn(0, 6, 3)), (6, 5), "different ranks"),
        (Experts(randn(0, 2, 1, 5), randn(0, 3, 6, 1)), (3, 6, 5), "numbers of experts"),
        (DoRA(LowRank(randn(0, 2, 5), randn(0, 6, 3)), randn(0, 6)), (6, 5), "different ranks"),
        (IA3(torch.tensor([math.inf])), (1, 0), "holds NaN or Inf"),
    ],
)
def test_tensors_that_do_not_go_together_are_told(update: Any, shape: Any, fault: str) -> None:
    report = inspected({"m.weight": (update, shape)})
    assert fault in report.notes[0] and report.notes[0].startswith("error: m.weight: ")
    assert report.data["updates"]["m.weight"]["norm"] is None


METHODS = ("LORA", "LOHA", "LOKR", "IA3", "TRAINABLE_TOKENS")
PARTS = (
    "lora_A.weight", "lora_B.weight", "lora_B.bias", "lora_magnitude_vector", "lora_embedding_A",
    "lora_embedding_B", "hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "hada_t1", "hada_t2",
    "lokr_w1", "lokr_w2", "lokr_w1_a", "lokr_w1_b", "lokr_w2_a", "lokr_w2_b", "lokr_t2", "ia3_l",
    "token_adapter.trainable_tokens_delta", "trainable_tokens_delta", "weight", "bias",
)  # fmt: skip
DTYPES = (
    torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.int64, torch.uint8,
    torch.bool, torch.float8_e4m3fn,
)  # fmt: skip
_OF_METHOD = {
    "LORA": PARTS[:6] + PARTS[-4:], "LOHA": PARTS[6:12], "LOKR": PARTS[12:19], "IA3": PARTS[19:20],
    "TRAINABLE_TOKENS": PARTS[20:22],
}  # fmt: skip


@settings(
    derandomize=True, deadline=None, max_examples=150,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)  # fmt: skip
@given(data=st.data())
def test_no_file_makes_it_crash(data: st.DataObject, tmp_path: Path) -> None:
    method = data.draw(st.sampled_from(METHODS))
    sizes = st.lists(st.sampled_from([0, 1, 2, 2, 3, 4]), max_size=4)
    dtypes = st.sampled_from(DTYPES) if data.draw(st.booleans()) else st.just(torch.float32)
    tensors = {}
    for module in ("m", "embed_tokens"):
        for part in data.draw(st.sets(st.sampled_from(_OF_METHOD[method]), max_size=6)):
            shape, dtype = data.draw(sizes), data.draw(dtypes)
            tensors[f"{PREFIX}{module}.{part}"] = torch.ones(shape).to(dtype)
    config = {
        "peft_type": method,
        "r": data.draw(st.sampled_from([0, 1, 2, 3])),
        "target_parameters": data.draw(st.sampled_from([None, ["m.w"], ["w", "v"]])),
        "use_dora": data.draw(st.booleans()),
        "lora_bias": data.draw(st.booleans()),
        "trainable_token_indices": {"embed_tokens": [0, 2]},
        "token_indices": [1, 0],
        "feedforward_modules": data.draw(st.sampled_from([[], ["m"]])),
        "modules_to_save": ["m"],
    }
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    try:
        report = loratool.inspect(tmp_path, all=True)
    except LoratoolError:
        return
    json.dumps(report.data)
