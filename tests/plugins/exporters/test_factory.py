"""Modules that a function of the user's own makes."""

from __future__ import annotations

import textwrap
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from loratool.errors import InputError
from loratool_plugins.exporters.onnx.factory import check_names, make, refuse_adapters
from loratool_plugins.exporters.onnx.inputs import Sizes
from loratool_plugins.exporters.onnx.stages import run, sample_of
from tests.plugins.exporters.onnx_runs import Graph

_GOOD = """
import torch

class Net(torch.nn.Module):
    def __init__(self, size):
        super().__init__()
        self.first = torch.nn.Linear(size, 2 * size)
        self.second = torch.nn.Linear(2 * size, 3)
        self.second.bias = torch.nn.Parameter(torch.ones(3))
        self.register_buffer("scale", torch.tensor([2.0]))

    def forward(self, x, weights):
        return {"y": self.second(self.first(x).relu()) * self.scale * weights[..., None]}

def make(config):
    inputs = {"x": torch.randn(2, 7, config["size"]), "weights": torch.rand(2, 7)}
    axes = {0: "batch", 1: "steps"}
    return Net(config["size"]), inputs, {"x": axes, "weights": axes}

def simple(config):
    return torch.nn.Linear(4, 2), (torch.randn(3, 4),)
"""

Write = Callable[[str], str]


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Write:
    """Writes a module of its own name into the current directory, and returns that name."""
    monkeypatch.chdir(tmp_path)
    count = iter(range(9))

    def written(text: str) -> str:
        name = f"factory_{abs(hash(request.node.name))}_{next(count)}"
        (tmp_path / f"{name}.py").write_text(textwrap.dedent(text))
        return name

    return written


def test_a_module_is_had_without_its_weights_and_traced(write: Write, tmp_path: Path) -> None:
    shell, stage = make(f"{write(_GOOD)}:make", {"size": 5})
    assert shell.architecture == "Net"
    assert {tuple(value.stride()) for value in shell.model.parameters()} <= {(0, 0), (0,)}
    for module in shell.model.modules():
        for name, value in list(module._parameters.items()):
            if value is not None:
                module._parameters[name] = torch.nn.Parameter(torch.randn(value.shape), False)
    graph = Graph(stage, tmp_path)
    assert graph.axes == {"x": ("batch", "steps", 5), "weights": ("batch", "steps")}
    inputs = sample_of(stage, Sizes(4, 3), seed=1)
    assert inputs["x"].shape == (4, 7, 5)
    inputs = {name: value[:, :6] for name, value in inputs.items()}
    expected = run(stage, inputs)["y"]
    np.testing.assert_allclose(graph(inputs)["y"], expected.numpy(), atol=1e-5)
    assert expected.abs().max() > 1


def test_inputs_by_position_share_the_batch(write: Write) -> None:
    _, stage = make(f"{write(_GOOD)}:simple", None)
    assert stage.input_names == ("input",)
    assert stage.axes == {"input": {0: "batch"}}


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("return 3", r"must return \(module, inputs\)"),
        ("return 3, {}", "the module is of type int"),
        ("return torch.nn.ReLU(), {'x': 3}", "inputs are tensors"),
        ("return torch.nn.ReLU(), (torch.ones(2), torch.ones(2))", "takes 1 inputs, not 2"),
        ("return torch.nn.ReLU(), torch.ones(1, 4)", "of size 1: give inputs of 2 or more"),
        ("return torch.nn.ReLU(), torch.ones(2), {'y': {0: 'batch'}}", "is not an input"),
        ("return torch.nn.ReLU(), torch.ones(2), {'input': {3: 'batch'}}", "has no axis 3"),
        ("raise KeyError('size')", "raised KeyError: 'size'"),
    ],
)
def test_what_a_factory_must_return(write: Write, body: str, message: str) -> None:
    name = write(f"import torch\n\ndef make(config):\n    {body}\n")
    with pytest.raises(InputError, match=message):
        make(f"{name}:make", None)


def test_a_factory_that_is_not_there(write: Write) -> None:
    good, broken = write(_GOOD), write("import nothing_of_this_name\n")
    with pytest.raises(InputError, match="no module nowhere"):
        make("nowhere.models:make", None)
    with pytest.raises(InputError, match="has no function other"):
        make(f"{good}:other", None)
    with pytest.raises(InputError, match="cannot be imported: No module named 'nothing_of"):
        make(f"{broken}:make", None)
    with pytest.raises(InputError, match=r"as package\.module:function"):
        make("models.py", None)


def test_a_checkpoint_that_is_not_the_module_s(write: Write) -> None:
    shell, _ = make(f"{write(_GOOD)}:make", {"size": 5})
    shapes = {name: tuple(value.shape) for name, value in shell.model.named_parameters()}
    check_names("m:f", shell, {**shapes, "surplus": (1,)})
    with pytest.raises(InputError, match=r"no first\.weight; .*model\.first\.weight is not in"):
        renamed = {name: shape for name, shape in shapes.items() if name != "first.weight"}
        check_names("m:f", shell, {**renamed, "model.first.weight": (10, 5)})
    with pytest.raises(InputError, match=r"first\.weight has shape \(10, 5\) .* \(5, 10\)"):
        check_names("m:f", shell, {**shapes, "first.weight": (5, 10)})


def test_a_module_with_its_adapter_beside_it_is_refused() -> None:
    peft = pytest.importorskip("peft")
    model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.ReLU())
    wrapped = peft.get_peft_model(model, peft.LoraConfig(target_modules=["0"], r=2))
    for module in (wrapped, torch.nn.ModuleList([wrapped.base_model.model])):
        with pytest.raises(InputError, match=r"30% more matrix products.*merge_and_unload"):
            refuse_adapters("m:f", module)
    refuse_adapters("m:f", wrapped.merge_and_unload())
