"""Grafts on ONNX files of tiny models from every exporter, beside the merged model in PyTorch."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from loratool.checkpoint import Checkpoint
from loratool.reports import Report
from loratool_plugins.executors.serial import Serial
from loratool_plugins.exporters.onnx.graft import plan_graft, write_graft
from tests.plugins.exporters import onnx_graphs as graphs
from tests.plugins.exporters.onnx_graphs import Base

# name -> how the model is built, whether it is trained, and by which exporter.
_BASES: dict[str, tuple[Callable[[], Any], str]] = {
    "bert fused for the cpu": (graphs.bert, "cpu"),
    "bert by torch": (graphs.bert, "dynamo"),
    "llama fused for cuda": (graphs.llama, "cuda"),
    "llama plain": (graphs.llama, "plain"),
    "gpt2 optimized": (graphs.gpt2, "optimized"),
    "vit by torch, not optimized": (graphs.vit, "dynamo plain"),
    "vit by torchscript": (graphs.vit, "script"),
}
_LINEAR = (
    "query.weight", "value.weight", "key.weight", "dense.weight", "q_proj.weight", "v_proj.weight",
    "up_proj.weight", "down_proj.weight", "c_attn.weight", "c_fc.weight", "classifier.weight",
)  # fmt: skip


@pytest.fixture(scope="module")
def make_base(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Base]:
    """Each model is exported once for all tests."""
    made: dict[str, Base] = {}

    def make(kind: str) -> Base:
        if kind not in made:
            build, how = _BASES[kind]
            model = graphs.trained(build)
            path = tmp_path_factory.mktemp("base") / "model.onnx"
            graphs.export(model, how, path)
            made[kind] = Base(model, graphs.checkpoint_of(model), path)
        return made[kind]

    return make


@pytest.fixture(params=list(_BASES))
def base(request: pytest.FixtureRequest, make_base: Callable[[str], Base]) -> Base:
    return make_base(request.param)


def graft(
    base: Base, merged: Checkpoint, target: Path, name: str = "math", **options: Any
) -> Report:
    plan = plan_graft(base.path, base.checkpoint, merged)
    return write_graft(plan, target, name, Serial(), **options)


def nodes(path: Path) -> list[bytes]:
    """The nodes of a graph, with initializers called by their first use."""
    model = onnx.load(path, load_external_data=False)
    weights = {proto.name for proto in model.graph.initializer}
    for node in model.graph.node:
        node.input[:] = ["weight" if name in weights else name for name in node.input]
    return [node.SerializeToString(deterministic=True) for node in model.graph.node]


def test_computes_what_the_merged_model_does(base: Base, tmp_path: Path) -> None:
    merged = base.merged(graphs.lora(base.checkpoint, *_LINEAR))
    graft(base, merged, tmp_path / "grafts")
    found = base.run(tmp_path / "grafts" / "math.onnx")
    expected = base.outputs(merged)
    np.testing.assert_allclose(found, expected, atol=1e-4)
    assert np.abs(expected - base.outputs(base.checkpoint)).max() > 1e-2
    assert nodes(tmp_path / "grafts" / "math.onnx") == nodes(base.path)
