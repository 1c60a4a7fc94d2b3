"""Grafts on ONNX files of tiny models, made by every exporter, beside merged models in PyTorch."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer

from loratool.checkpoint import Checkpoint
from loratool.errors import InputError, MismatchError, OutputError, UsageError
from loratool.reports import Report
from loratool_plugins.executors.serial import Serial
from loratool_plugins.exporters.onnx.base_graph import open_graph
from loratool_plugins.exporters.onnx.graft import plan_graft, write_graft
from loratool_plugins.exporters.onnx.grafts import check_name, graph_name
from tests.cli.tiny import done, loratool
from tests.lazy import adapter_of, lazy_tensor, replacement
from tests.peft_files import random_factors, write_adapter
from tests.plugins.exporters import graft_bases as graphs
from tests.plugins.exporters.graft_bases import Base

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


def test_what_is_not_touched_lies_once(make_base: Callable[[str], Base], tmp_path: Path) -> None:
    base = make_base("bert fused for the cpu")
    target = tmp_path / "grafts"
    sizes = {}
    for name, seed in (("math", 1), ("code", 2)):
        adapter = graphs.lora(base.checkpoint, "query.weight", seed=seed)
        merged = base.merged(adapter)
        graft(base, merged, target, name)
        np.testing.assert_allclose(
            base.run(target / f"{name}.onnx"), base.outputs(merged), atol=1e-4
        )
        sizes[name] = (target / f"{name}.data").stat().st_size
    names = {path.name for path in target.iterdir()}
    assert names == {
        "base.onnx.data", "math.onnx", "math.data", "code.onnx", "code.data",
        "loratool.json",
    }  # fmt: skip
    # One packed matrix of 16 x 48 in fp32.
    assert sizes == {"math": 16 * 48 * 4, "code": 16 * 48 * 4}
    manifest = json.loads((target / "loratool.json").read_text())
    assert set(manifest["graphs"]) == {"math", "code"}
    assert len(manifest["graphs"]["math"]["tensors"]) == 1


def test_a_failed_graft_leaves_a_folder_as_it_was(
    make_base: Callable[[str], Base], tmp_path: Path
) -> None:
    base = make_base("bert fused for the cpu")
    target = tmp_path / "grafts"
    merged = base.merged(graphs.lora(base.checkpoint, "query.weight"))
    graft(base, merged, target)
    before = snapshot(target)
    plan = plan_graft(base.path, base.checkpoint, merged)

    def fail(name: str) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_graft(plan, target, "code", Serial(), fail)
    with pytest.raises(OutputError, match=r"math\.onnx: exists; choose another --name"):
        write_graft(plan, target, "math", Serial())
    with pytest.raises(UsageError, match="cannot be that of a graph"):
        write_graft(plan, target, "../code", Serial())
    assert snapshot(target) == before
    with pytest.raises(KeyboardInterrupt):
        write_graft(plan, tmp_path / "new", "code", Serial(), fail)
    assert not (tmp_path / "new").exists()


def test_a_graph_is_replaced_if_wanted(make_base: Callable[[str], Base], tmp_path: Path) -> None:
    base = make_base("bert fused for the cpu")
    for seed in (1, 2):
        merged = base.merged(graphs.lora(base.checkpoint, "query.weight", seed=seed))
        graft(base, merged, tmp_path / "grafts", overwrite=True)
    found = base.run(tmp_path / "grafts" / "math.onnx")
    np.testing.assert_allclose(found, base.outputs(merged), atol=1e-4)


def test_foreign_folders_are_left_alone(make_base: Callable[[str], Base], tmp_path: Path) -> None:
    base, other = make_base("bert fused for the cpu"), make_base("vit by torchscript")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("mine")
    merged = base.merged(graphs.lora(base.checkpoint, "query.weight"))
    with pytest.raises(OutputError, match="holds no grafts"):
        graft(base, merged, tmp_path / "mine")
    graft(base, merged, tmp_path / "grafts")
    before = snapshot(tmp_path / "grafts")
    wrong = other.merged(graphs.lora(other.checkpoint, "q_proj.weight"))
    with pytest.raises(MismatchError, match="grafts of another base"):
        graft(other, wrong, tmp_path / "grafts", "code")
    assert snapshot(tmp_path / "grafts") == before


def test_the_base_may_be_linked(make_base: Callable[[str], Base], tmp_path: Path) -> None:
    base = make_base("llama plain")
    merged = base.merged(graphs.lora(base.checkpoint, "q_proj.weight"))
    report = graft(base, merged, tmp_path / "grafts", link=True)
    shared = tmp_path / "grafts" / "base.onnx.data"
    assert shared.samefile(base.path.parent / "model.onnx.data")
    assert any("hard link" in note for note in report.notes)
    found = base.run(tmp_path / "grafts" / "math.onnx")
    np.testing.assert_allclose(found, base.outputs(merged), atol=1e-4)
    shutil.rmtree(tmp_path / "grafts")


def snapshot(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# Models as they are made: exporters keep the zeros of all biases and the ones of all norms once.
@pytest.fixture(scope="module")
def fresh_bases(tmp_path_factory: pytest.TempPathFactory) -> list[Base]:
    folder = tmp_path_factory.mktemp("fresh")
    made = []
    builds: dict[str, Callable[[], Any]] = {
        "cpu": lambda: graphs.bert(layers=2),
        "cuda": lambda: graphs.llama(layers=2, tied=True),
        "script": graphs.vit,
    }
    for how, build in builds.items():
        model = graphs.fresh(build)
        path = folder / f"{how}.onnx"
        graphs.export(model, how, path)
        made.append(Base(model, graphs.checkpoint_of(model), path))
    return made


def test_equal_constants_are_told_apart(fresh_bases: list[Base], tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    for base in fresh_bases:
        vectors = [name for name, tensor in base.checkpoint.items() if len(tensor.shape) == 1]
        for number, name in enumerate(vectors):
            shape = base.checkpoint[name].shape
            values = torch.randn(shape, generator=generator)
            merged = base.merged(adapter_of({name: (replacement(name, values), shape)}))
            target = tmp_path / base.path.stem
            graft(base, merged, target, f"graph{number}")
            found = base.run(target / f"graph{number}.onnx")
            np.testing.assert_allclose(found, base.outputs(merged), atol=1e-4, err_msg=name)
            assert nodes(target / f"graph{number}.onnx") == nodes(base.path)


def test_one_side_of_a_tied_embedding(fresh_bases: list[Base], tmp_path: Path) -> None:
    base = next(base for base in fresh_bases if base.path.stem == "cuda")
    both = base.merged(graphs.lora(base.checkpoint, "embed_tokens.weight"))
    graft(base, both, tmp_path / "grafts", "both")
    found = base.run(tmp_path / "grafts" / "both.onnx")
    np.testing.assert_allclose(found, base.outputs(both), atol=1e-4)
    head = torch.randn(graphs.VOCABULARY, 16, generator=torch.Generator().manual_seed(3))
    name = "lm_head.weight"
    untied = replace(base.checkpoint, tensors={**base.checkpoint, name: lazy_tensor(name, head)})
    graft(base, untied, tmp_path / "grafts", "head")
    found = base.run(tmp_path / "grafts" / "head.onnx")
    with torch.no_grad():
        hidden = base.model.model(**graphs.feeds_of(base.model)).last_hidden_state
        np.testing.assert_allclose(found, (hidden @ head.T).numpy(), atol=1e-4)


def test_what_cannot_be_told_is_an_error(fresh_bases: list[Base], tmp_path: Path) -> None:
    base = next(base for base in fresh_bases if base.path.stem == "cuda")
    bare = tmp_path / "bare.onnx"
    model = onnx.load(base.path)
    for node in model.graph.node:  # nothing says which layer a node is of
        del node.metadata_props[:]
    onnx.save(model, bare)
    name = "model.layers.1.input_layernorm.weight"
    values = torch.full((16,), 2.0)
    merged = base.merged(adapter_of({name: (replacement(name, values), (16,))}))
    with pytest.raises(MismatchError, match=rf"{name}: 4 other tensors have the same values"):
        plan_graft(bare, base.checkpoint, merged)


def test_what_the_graph_lacks_is_listed(make_base: Callable[[str], Base], tmp_path: Path) -> None:
    base = make_base("bert fused for the cpu")
    names = ("bert.pooler.dense.weight", "bert.pooler.dense.bias")
    more = {name: lazy_tensor(name, torch.randn(16)) for name in names}
    whole = replace(base.checkpoint, tensors={**base.checkpoint, **more})
    changed = {name: lazy_tensor(name, torch.randn(16)) for name in names}
    merged = replace(whole, tensors={**whole.tensors, **changed})
    with pytest.raises(MismatchError) as caught:
        plan_graft(base.path, whole, merged)
    assert all(f"{name}: the adapter changes it, but no" in str(caught.value) for name in names)


def test_a_new_head_does_not_fit(make_base: Callable[[str], Base]) -> None:
    base = make_base("bert fused for the cpu")
    name = "classifier.weight"
    new = {**base.checkpoint, name: lazy_tensor(name, torch.randn(3, 16))}
    with pytest.raises(MismatchError, match=r"classifier.weight: the adapter adds it.*--graft out"):
        plan_graft(base.path, base.checkpoint, replace(base.checkpoint, tensors=new))


def test_the_onnx_file_of_another_checkpoint(make_base: Callable[[str], Base]) -> None:
    base = make_base("bert fused for the cpu")
    other = graphs.checkpoint_of(graphs.trained(graphs.bert, seed=9))
    merged = replace(base, checkpoint=other).merged(graphs.lora(other, "query.weight"))
    with pytest.raises(MismatchError, match=r"another checkpoint.*only 0.*%.*the first that are"):
        plan_graft(base.path, other, merged)


def test_a_difference_anywhere_is_found(make_base: Callable[[str], Base], tmp_path: Path) -> None:
    base = make_base("llama plain")
    name = "model.layers.0.mlp.down_proj.weight"
    values = base.checkpoint[name].read().clone()
    for place in range(8, values.numel()):  # between the places that are looked at
        values.view(-1)[place] += 1
        tensors = {**base.checkpoint, name: lazy_tensor(name, values)}
        almost = replace(base, checkpoint=replace(base.checkpoint, tensors=tensors))
        merged = almost.merged(graphs.lora(almost.checkpoint, name))
        try:
            plan = plan_graft(base.path, almost.checkpoint, merged)
        except MismatchError:  # it was one of these places
            values.view(-1)[place] -= 1
            continue
        with pytest.raises(MismatchError, match="differs from it in places"):
            write_graft(plan, tmp_path / "grafts", "math", Serial())
        assert not (tmp_path / "grafts").exists()
        return
    raise AssertionError("every place was looked at")


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("text", "is not an ONNX model"),
        ("cut", "is not an ONNX model, or is truncated"),
        ("large", "an ONNX file holds 2 GiB at most"),
        ("old", "version 11 of the ONNX operators"),
        ("absent", r"model.onnx.data: cannot be read: No such file.*keeps .* there"),
        ("short", r"model.onnx.data: has 100 bytes, but .* lies at .* truncated"),
        ("outside", r"'\.\./model.onnx.data', outside of the model's folder"),
        ("linked outside", "outside of the model's folder"),
        ("length", r"needs \d+ bytes, and its external data has 12"),
    ],
)
def test_faults_of_the_base_are_named(
    make_base: Callable[[str], Base], tmp_path: Path, fault: str, message: str
) -> None:
    source = make_base("llama plain").path
    folder = tmp_path / "base"
    folder.mkdir()
    path, data = folder / "model.onnx", folder / "model.onnx.data"
    shutil.copy(source, path)
    shutil.copy(source.parent / data.name, data)
    model = onnx.load(path, load_external_data=False)
    first = next(proto for proto in model.graph.initializer if proto.external_data)
    if fault == "text":
        path.write_text("weights")
    elif fault == "cut":
        path.write_bytes(path.read_bytes()[:-1000])
    elif fault == "large":
        os.truncate(path, (1 << 31) + 5)
    elif fault == "old":
        model.opset_import[0].version = 11
    elif fault == "absent":
        data.unlink()
    elif fault == "short":
        os.truncate(data, 100)
    elif fault == "outside":
        data.rename(tmp_path / data.name)
        first.external_data[0].value = f"../{data.name}"
    elif fault == "linked outside":
        data.rename(tmp_path / "elsewhere")
        data.symlink_to(tmp_path / "elsewhere")
    elif fault == "length":
        next(entry for entry in first.external_data if entry.key == "length").value = "12"
    if fault in ("old", "outside", "length"):
        path.write_bytes(model.SerializeToString())
    with pytest.raises(InputError, match=message) as caught:
        open_graph(path)
    assert str(tmp_path) in str(caught.value)


@pytest.mark.parametrize(
    ("labels", "name"),
    [
        (("./adapters/math",), "math"),
        (("org/math lora", "code"), "math-lora+code"),
        ((), "model"),
        (("base",), "base-graph"),
    ],
)
def test_graphs_are_called_by_their_adapters(labels: tuple[str, ...], name: str) -> None:
    assert graph_name(labels) == name
    check_name(name)


def test_a_class_whose_names_have_a_prefix(make_base: Callable[[str], Base]) -> None:
    base = make_base("bert fused for the cpu")
    short = {
        name.removeprefix("bert."): tensor.renamed(name.removeprefix("bert."))
        for name, tensor in base.checkpoint.items()
    }
    merged = base.merged(graphs.lora(base.checkpoint, "query.weight"))
    plan = plan_graft(base.path, replace(base.checkpoint, tensors=short), merged)
    assert plan.changed == tuple(n for n in base.checkpoint if n.endswith("query.weight"))


def test_quantized_weights_are_refused(make_base: Callable[[str], Base], tmp_path: Path) -> None:
    base = make_base("llama fused for cuda")
    quantizer = MatMulNBitsQuantizer(onnx.load(base.path), block_size=16, is_symmetric=True)
    quantizer.process()
    path = tmp_path / "int4.onnx"
    onnx.save(quantizer.model.model, path)
    merged = base.merged(graphs.lora(base.checkpoint, "q_proj.weight", "up_proj.weight"))
    with pytest.raises(MismatchError) as caught:
        plan_graft(path, base.checkpoint, merged)
    text = str(caught.value)
    for name in ("self_attn.q_proj.weight", "mlp.up_proj.weight"):
        assert f"{name}: the adapter changes it, but the graph holds weights of this shape" in text
    assert "MatMulNBits, 4 bits, blocks of 16, symmetric" in text


def test_two_adapters_from_the_command_line(
    make_base: Callable[[str], Base], tmp_path: Path
) -> None:
    base = make_base("llama fused for cuda")
    base.model.save_pretrained(tmp_path / "llama")
    for seed, name in enumerate(("math", "code")):
        module = "model.layers.0.self_attn.q_proj"
        factors = random_factors({module: (16, 16)}, 2, seed, 0.5)
        adapter = write_adapter(tmp_path / name, factors)
        words = [
            "export",
            tmp_path / "llama",
            adapter,
            "--graft",
            base.path,
            "-o",
            tmp_path / "out",
        ]
        done(loratool(*words))
        a, b = factors[module]
        with torch.no_grad():
            weight = base.checkpoint[f"{module}.weight"].read() + b @ a
        tensors = {**base.checkpoint, f"{module}.weight": lazy_tensor(module, weight)}
        expected = base.outputs(replace(base.checkpoint, tensors=tensors))
        np.testing.assert_allclose(base.run(tmp_path / "out" / f"{name}.onnx"), expected, atol=1e-4)
    found = loratool(*words)
    assert found.status == 1
    assert "code.onnx: exists; choose another --name" in found.err
