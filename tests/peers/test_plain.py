"""Low-rank factors made of what PEFT's and LyCORIS' modules hold are what those modules merge."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from lycoris.modules.loha import LohaModule
from lycoris.modules.lokr import LokrModule
from peft import IA3Config, LoHaConfig, LoKrConfig, LoraConfig, get_peft_model
from peft.tuners.lora.conversion import _convert_module_to_lora
from torch import nn

from loratool import plain, plugins
from loratool.linalg import RankPolicy, named_generator
from loratool.updates import IA3, DoRA, LoHa, LoKr, LowRank, Product

Given = LoHa | LoKr | DoRA | IA3
MODULES = {
    "linear": lambda: nn.Linear(24, 30),
    "conv1d": lambda: nn.Conv1d(12, 20, 3),
    "conv2d": lambda: nn.Conv2d(12, 20, (3, 2)),
    "1x1": lambda: nn.Conv2d(24, 20, 1),
}


def low_rank(update: Given, weight: torch.Tensor, rank: int, exact_up_to: int = 0) -> LowRank:
    tools = plain.Tools(plugins.create("factorizers", "exact"), named_generator(0, "w"))
    aim = plain.Aim(RankPolicy(rank), exact_up_to)
    return plain.low_rank(update, weight.shape, aim, tools, weight)


def check(update: Given, weight: torch.Tensor, delta: torch.Tensor) -> None:
    """Exact at full rank; at others as good as the best, and said so."""
    wanted = delta.detach().double().flatten(1)
    full = min(wanted.shape)
    for found in (low_rank(update, weight, full, full), low_rank(update, weight, full)):
        assert (product_of(found) - wanted).norm() <= 1e-5 * wanted.norm()
    sigma = torch.linalg.svdvals(wanted)
    for rank in (1, 3, full - 1):
        found = low_rank(update, weight, rank)
        measured = float((product_of(found) - wanted).norm() / wanted.norm())
        best = float((sigma[rank:].square().sum() / sigma.square().sum()).sqrt())
        assert found.rank <= rank and found.certificate is not None
        assert math.isclose(measured, best, rel_tol=1e-4, abs_tol=1e-4)
        assert math.isclose(found.certificate.relative_error, best, rel_tol=1e-4, abs_tol=1e-4)


def product_of(found: LowRank) -> torch.Tensor:
    return found.scale * found.b.double() @ found.a.double()


def randomized(module: nn.Module) -> None:
    generator = torch.Generator().manual_seed(1)
    for parameter in module.parameters():
        parameter.data.normal_(generator=generator)


def whole_or_factors(module: Any, name: str, tucker: bool, key: str | None = None) -> Product:
    def tensor(end: str) -> torch.Tensor | None:
        found = getattr(module, f"{name}{end}", None)
        if key is not None and found is not None:
            found = found[key] if key in found else None  # noqa: SIM401  (a ParameterDict)
        return None if found is None else found.detach()

    if (whole := tensor("")) is not None:
        return Product(whole)
    left, right = tensor("_a"), tensor("_b")
    assert left is not None and right is not None
    if not tucker:
        return Product(left, right)
    core = tensor_of_core(module, name, key)
    return Product(left.T, right, core)


def tensor_of_core(module: Any, name: str, key: str | None) -> torch.Tensor:
    found = getattr(module, {"hada_w1": "hada_t1", "hada_w2": "hada_t2"}.get(name, "lokr_t2"))
    core: torch.Tensor = found if key is None else found[key]
    return core.detach()


# ---- LyCORIS


@pytest.mark.parametrize("tucker", [False, True])
@pytest.mark.parametrize("kind", ["linear", "conv1d", "conv2d", "1x1"])
def test_loha_of_lycoris(kind: str, tucker: bool) -> None:
    layer = MODULES[kind]()
    module = LohaModule("w", layer, lora_dim=3, alpha=2, use_tucker=tucker)
    randomized(module)
    one, other = (whole_or_factors(module, f"hada_w{n}", module.tucker) for n in (1, 2))
    update = LoHa(one, other, float(module.scale))
    check(update, layer.weight.detach(), module.get_weight(layer.weight.shape))


@pytest.mark.parametrize("both", [False, True])
@pytest.mark.parametrize("tucker", [False, True])
@pytest.mark.parametrize("rank", [1, 3, 50])
@pytest.mark.parametrize("kind", ["linear", "conv1d", "conv2d"])
def test_lokr_of_lycoris(kind: str, rank: int, tucker: bool, both: bool) -> None:
    layer = MODULES[kind]()
    options = {"use_tucker": tucker, "decompose_both": both, "factor": 4}
    module = LokrModule("w", layer, lora_dim=rank, alpha=2, **options)
    randomized(module)
    has_core = module.tucker and not module.use_w2
    update = LoKr(
        whole_or_factors(module, "lokr_w1", False),
        whole_or_factors(module, "lokr_w2", has_core),
        float(module.scale),
    )
    check(update, layer.weight.detach(), module.get_weight(layer.weight.shape))


@pytest.mark.parametrize("on_out", [True, False])
@pytest.mark.parametrize("kind", ["linear", "conv2d"])
def test_decomposed_weights_of_lycoris(kind: str, on_out: bool) -> None:
    layer = MODULES[kind]()
    module = LohaModule("w", layer, lora_dim=2, weight_decompose=True, wd_on_out=on_out)
    randomized(module)
    weight = layer.weight.detach()
    one, other = (whole_or_factors(module, f"hada_w{n}", False) for n in (1, 2))
    magnitude = module.dora_scale.detach().abs().flatten()
    module.dora_scale.data.abs_()
    update = DoRA(LoHa(one, other, float(module.scale)), magnitude, 0 if on_out else 1)
    merged = module.apply_weight_decompose(weight + module.get_weight(weight.shape))
    check(update, weight, merged - weight)


# ---- PEFT


class Model(nn.Module):
    def __init__(self, kind: str) -> None:
        super().__init__()
        self.layer = MODULES[kind]()


def adapted(kind: str, config: Any) -> Any:
    """A module of PEFT with random parameters."""
    torch.manual_seed(0)
    model = get_peft_model(Model(kind), config)
    module = model.base_model.model.layer
    randomized(module)
    return module


@pytest.mark.parametrize("effective", [False, True])
@pytest.mark.parametrize("kind", ["linear", "conv2d"])
def test_loha_of_peft(kind: str, effective: bool) -> None:
    config = LoHaConfig(
        r=3, alpha=2, target_modules=["layer"], use_effective_conv2d=effective, init_weights=False
    )
    module = adapted(kind, config)
    tucker = effective and kind != "linear"
    one, other = (whole_or_factors(module, f"hada_w{n}", tucker, "default") for n in (1, 2))
    update = LoHa(one, other, module.scaling["default"])
    check(update, module.weight.detach(), module.get_delta_weight("default"))


@pytest.mark.parametrize(
    ("kind", "rank", "effective"),
    [
        *((kind, rank, False) for kind in ("linear", "conv2d") for rank in (1, 2, 50)),
        *(("conv2d", rank, True) for rank in (1, 2)),
        # PEFT 0.21.2 mixes up the dimensions of a whole second matrix of a 1-D convolution, and
        # fails on some Tucker forms.
        *(("conv1d", rank, False) for rank in (1, 2)),
        ("conv1d", 2, True),
    ],
)
def test_lokr_of_peft(kind: str, rank: int, effective: bool) -> None:
    config = LoKrConfig(
        r=rank, alpha=2, target_modules=["layer"], use_effective_conv2d=effective,
        decompose_factor=4, decompose_both=True, init_weights=False,
    )  # fmt: skip
    module = adapted(kind, config)
    core = "default" in module.lokr_t2
    one = whole_or_factors(module, "lokr_w1", False, "default")
    other = whole_or_factors(module, "lokr_w2", core, "default")
    if other.core is not None and kind == "conv1d":  # PEFT adds a dimension for its einsum
        other = Product(other.left, other.right, other.core.flatten(2))
    update = LoKr(one, other, module.scaling["default"])
    check(update, module.weight.detach(), module.get_delta_weight("default"))


@pytest.mark.parametrize("kind", ["linear", "conv2d"])
def test_dora_of_peft(kind: str) -> None:
    config = LoraConfig(r=2, lora_alpha=3, target_modules=["layer"], use_dora=True)
    module = adapted(kind, config)
    magnitude = module.lora_magnitude_vector["default"].weight
    magnitude.data.abs_()
    weight = module.weight.detach().clone()
    a, b = (getattr(module, f"lora_{side}")["default"].weight.detach() for side in "AB")
    added = LowRank(a.flatten(1), b.flatten(1), module.scaling["default"])
    module.merge(adapter_names=["default"])
    update = DoRA(added, magnitude.detach().flatten())
    check(update, weight, module.get_base_layer().weight - weight)


@pytest.mark.parametrize("feedforward", [False, True])
def test_ia3_of_peft(feedforward: bool) -> None:
    config = IA3Config(
        target_modules=["layer"], feedforward_modules=["layer"] if feedforward else []
    )
    module = adapted("linear", config)
    weight, bias = module.weight.detach().clone(), module.bias.detach().clone()
    factors = module.ia3_l["default"].detach().flatten().clone()
    module.merge()
    update = IA3(factors, int(feedforward))
    check(update, weight, module.get_base_layer().weight - weight)
    if not feedforward:
        found = plain.changed_vector(update, bias).values
        wanted = (module.get_base_layer().bias - bias).double()
        assert (found - wanted).norm() <= 1e-6 * wanted.norm()


def test_it_agrees_with_the_conversion_of_peft_and_says_how_good_it_is() -> None:
    config = LoHaConfig(r=4, alpha=3, target_modules=["layer"], init_weights=False)
    module = adapted("linear", config)
    one, other = (whole_or_factors(module, f"hada_w{n}", False, "default") for n in (1, 2))
    update = LoHa(one, other, module.scaling["default"])
    for rank in (2, 5, 16):
        a, b, _ = _convert_module_to_lora(module, rank)
        found = low_rank(update, module.weight.detach(), rank, rank)
        theirs = b.double() @ a.double()
        assert (product_of(found) - theirs).norm() <= 1e-5 * theirs.norm()
