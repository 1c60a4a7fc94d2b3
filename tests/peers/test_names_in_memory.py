"""Models whose names on disk differ from those in memory, against PEFT and transformers."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Iterable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

import loratool
from loratool.in_memory import pieces_of
from loratool.skeleton import Skeleton
from tests.memory_models import TINY, change, loaded, opened, outputs, save_as_in_memory
from tests.models import distance
from tests.peers.conftest import FULL
from tests.peers.peft_side import PREFIX, load_strictly, settings

Tensors = dict[str, torch.Tensor]
Saved = Callable[[str], Path]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Saved:
    """Name of a tiny model -> the folder of a saved "base" and of "tuned", changed everywhere."""

    @cache
    def save(name: str) -> Path:
        folder = tmp_path_factory.mktemp(name)
        model = TINY[name].build()
        model.save_pretrained(folder / "base")
        change(model, seed=2)
        model.save_pretrained(folder / "tuned")
        return folder

    return save


# --- extract ------------------------------------------------------------------------------------


def peft_gives_the_fine_tune(name: str, base: Path, tuned: Path, adapter: Path) -> None:
    model = loaded(TINY[name], base)
    wanted = outputs(loaded(TINY[name], tuned))
    assert distance(outputs(model), wanted) > 1e-2
    assert distance(outputs(load_strictly(model, adapter)), wanted) < 1e-5


@pytest.mark.parametrize(
    ("name", "targets"),
    [
        ("vit", {"q_proj", "k_proj", "v_proj", "o_proj", "fc1", "fc2", "classifier"}),
        ("deit", {"q_proj", "k_proj", "v_proj", "o_proj", "fc1", "fc2", "classifier"}),
        ("beit", {"classifier"}),  # each layer has parameters of its own and is kept whole
        (
            "dinov2",
            {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
            | {"classifier"},
        ),
        ("mixtral", {"q_proj", "k_proj", "v_proj", "o_proj", "lm_head"}),
        (
            "qwen2_moe",
            {"q_proj", "k_proj", "v_proj", "o_proj", "lm_head"}
            | {"gate_proj", "up_proj", "down_proj", "shared_expert_gate"},
        ),
        ("qwen3_moe", {"q_proj", "k_proj", "v_proj", "o_proj", "lm_head"}),
        (
            "deepseek_v3",
            {"q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj", "lm_head"},
        ),
        ("gpt_oss", {"lm_head"}),  # its attention has parameters of its own
    ],
)
def test_peft_gives_the_outputs_of_the_fine_tune(
    name: str, targets: set[str], saved: Saved, tmp_path: Path
) -> None:
    base, tuned, adapter = saved(name) / "base", saved(name) / "tuned", tmp_path / "adapter"
    report = loratool.extract(base, tuned, rank=FULL).save(adapter)
    peft_gives_the_fine_tune(name, base, tuned, adapter)
    assert set(settings(adapter)["target_modules"]) == targets
    said = any("PEFT takes their names for those of experts" in note for note in report.notes)
    assert said == (name == "deepseek_v3")
    same(merged_by_us(base, adapter, tmp_path / "merged"), load_file(tuned / "model.safetensors"))


def test_the_base_may_lie_in_memory_layout_and_the_fine_tune_not(
    saved: Saved, tmp_path: Path
) -> None:
    base, tuned, adapter = tmp_path / "base", saved("mixtral") / "tuned", tmp_path / "adapter"
    save_as_in_memory(TINY["mixtral"].build(), base)
    loratool.extract(base, tuned, rank=FULL).save(adapter)
    peft_gives_the_fine_tune("mixtral", base, tuned, adapter)


@pytest.mark.parametrize("config", ["its own", "no class", "a strange class", "none"])
def test_a_base_without_a_head(config: str, saved: Saved, tmp_path: Path) -> None:
    base, tuned, adapter = tmp_path / "base", saved("vit") / "tuned", tmp_path / "adapter"
    bare = loaded(TINY["vit-bare"], saved("vit") / "base")
    bare.save_pretrained(base)
    full = base / "config.json"
    content = json.loads(full.read_text())
    if config == "no class":
        full.write_text(json.dumps({**content, "architectures": None}))
    elif config == "a strange class":
        full.write_text(json.dumps({**content, "architectures": ["ViTOfSomebody"]}))
    elif config == "none":
        full.unlink()
    extracted = loratool.extract(base, tuned, rank=FULL)
    assert set(extracted.dropped) == {"pooler.dense.weight", "pooler.dense.bias"}
    extracted.save(adapter)
    full.write_text(json.dumps(content))
    model = loaded(TINY["vit"], base)
    wanted = outputs(loaded(TINY["vit"], tuned))
    assert distance(outputs(load_strictly(model, adapter)), wanted) < 1e-5


def test_what_the_fine_tune_lacks_is_named_as_it_lies_in_the_base(
    saved: Saved, tmp_path: Path
) -> None:
    """A layer less: merging must leave its tensors out, under their names on disk."""
    model = loaded(TINY["mixtral"], saved("mixtral") / "tuned")
    model.model.layers = model.model.layers[:1]
    model.config.num_hidden_layers = 1
    model.save_pretrained(tmp_path / "tuned")
    adapter = loratool.extract(saved("mixtral") / "base", tmp_path / "tuned", rank=4)
    names = load_file(saved("mixtral") / "base" / "model.safetensors")
    assert set(adapter.dropped) == {name for name in names if name.startswith("model.layers.1.")}


def test_experts_can_be_left_out(saved: Saved, tmp_path: Path) -> None:
    base, tuned = saved("qwen3_moe") / "base", saved("qwen3_moe") / "tuned"
    adapter = loratool.extract(base, tuned, rank=4, exclude=["*.mlp.experts"])
    assert not any("experts" in name for name in adapter)
    adapter.save(tmp_path / "adapter")
    load_strictly(loaded(TINY["qwen3_moe"], base), tmp_path / "adapter")


# --- merge --------------------------------------------------------------------------------------


def factors(adapter: Path) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Module, as the adapter's file calls it -> A and B."""
    tensors = load_file(adapter / "adapter_model.safetensors")
    modules = sorted(
        key.removesuffix(".lora_A.weight") for key in tensors if key.endswith(".lora_A.weight")
    )
    return {
        module.removeprefix(PREFIX): (
            tensors[f"{module}.lora_A.weight"], tensors[f"{module}.lora_B.weight"],
        )
        for module in modules
    }  # fmt: skip


def expert_delta(a: torch.Tensor, b: torch.Tensor, experts: int, transposed: bool) -> torch.Tensor:
    """(E, out, in), or (E, in, out): A is (E r, in), expert slowest; B is (out, r E), fastest."""
    a = a.reshape(experts, -1, a.shape[1])
    b = b.reshape(b.shape[0], -1, experts)
    delta = torch.einsum("ore,eri->eoi", b, a)
    return delta.transpose(1, 2) if transposed else delta


def parameter_of(module: str, skeleton: Skeleton, wrapped: Mapping[str, str]) -> str:
    """The parameter in memory that factors belong to."""
    for end, parameter in wrapped.items():
        if module.endswith(end):
            return module.removesuffix(end) + parameter
    return f"{module}.weight"


def merged_by_pieces(
    disk: Tensors, skeleton: Skeleton, adapter: Path, wrapped: Mapping[str, str]
) -> Tensors:
    """A checkpoint with the adapter's deltas added where each parameter lies.

    Args:
        disk: the base's tensors.
        skeleton: of the base.
        adapter: PEFT's directory.
        wrapped: the end of a module's name in the file -> the end of the parameter's, where PEFT
            adapts a parameter and not a module.
    """
    config = settings(adapter)
    found = {name: value.clone() for name, value in disk.items()}
    for module, (a, b) in factors(adapter).items():
        parameter = parameter_of(module, skeleton, wrapped)
        scale = config["lora_alpha"] / config["r"]
        if skeleton.kinds[parameter] == "experts":
            transposed = parameter in skeleton.transposed_experts
            delta = scale * expert_delta(a, b, 4, transposed)
        else:
            delta = scale * (b @ a)
        add(found, skeleton, parameter, delta)
    return found


def add(disk: Tensors, skeleton: Skeleton, parameter: str, delta: torch.Tensor) -> None:
    """Add a delta of a parameter in memory to the tensors on disk."""
    for piece in pieces_of(skeleton, parameter):
        part = delta[piece.part]
        disk[piece.tensor][piece.place] += part.transpose(-1, -2) if piece.transposed else part


def same(found: Mapping[str, torch.Tensor], wanted: Mapping[str, torch.Tensor]) -> None:
    assert set(found) == set(wanted)
    for name, value in found.items():
        torch.testing.assert_close(value, wanted[name], rtol=1e-5, atol=1e-5, msg=name)


def random_factors(model: Any) -> None:
    generator = torch.Generator().manual_seed(3)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = torch.randn(parameter.shape, generator=generator)


def merged_by_peft(model: PreTrainedModel, adapter: Path, out: Path) -> Tensors:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        merged = PeftModel.from_pretrained(model, adapter).merge_and_unload()
    merged.save_pretrained(out)
    return dict(load_file(out / "model.safetensors"))


def merged_by_us(base: Path, adapter: Path, out: Path) -> Tensors:
    loratool.merge(base, [(adapter, 1.0)]).save(out)
    return dict(load_file(out / "model.safetensors"))


ATTENTION = ["q_proj", "v_proj"]
# gate_up_proj is declared first, so it is wrapped first and lies inside.
EXPERTS = {
    "experts.base_layer": "experts.gate_up_proj",
    "experts": "experts.down_proj",
    "mlp.gate": "mlp.gate.weight",
}


@pytest.mark.parametrize(
    ("name", "modules", "parameters"),
    [
        ("vit", ATTENTION, []),
        ("dinov2", [*ATTENTION, "gate_proj", "up_proj", "down_proj"], []),
        ("mixtral", ATTENTION, ["experts.gate_up_proj", "experts.down_proj", "gate.weight"]),
        ("qwen2_moe", ATTENTION, ["experts.gate_up_proj", "experts.down_proj"]),
        ("qwen3_moe", ATTENTION, ["experts.gate_up_proj", "experts.down_proj"]),
        ("gpt_oss", ATTENTION, ["experts.gate_up_proj", "experts.down_proj"]),
    ],
)
@pytest.mark.parametrize("layout", ["on disk", "in memory"])
def test_adapters_merge_as_peft_merges_them(
    name: str, modules: list[str], parameters: list[str], layout: str, saved: Saved, tmp_path: Path
) -> None:
    base = saved(name) / "base"
    if layout == "in memory":
        base = tmp_path / "base"
        save_as_in_memory(TINY[name].build(), base)
    config = LoraConfig(r=4, lora_alpha=6, target_modules=modules, target_parameters=parameters)
    model = get_peft_model(loaded(TINY[name], base), config)
    random_factors(model)
    model.save_pretrained(tmp_path / "adapter")
    model = loaded(TINY[name], base)
    wanted = merged_by_peft(model, tmp_path / "adapter", tmp_path / "merged")
    if layout == "in memory":  # transformers writes the layout that it has read
        assert set(wanted) == set(load_file(base / "model.safetensors"))
    checkpoint, skeleton = opened(base)
    disk = {key: tensor.read() for key, tensor in checkpoint.items()}
    same(merged_by_pieces(disk, skeleton, tmp_path / "adapter", EXPERTS), wanted)
    same(merged_by_us(base, tmp_path / "adapter", tmp_path / "ours"), wanted)


def test_one_parameter_alone_is_not_nested(saved: Saved, tmp_path: Path) -> None:
    base = saved("mixtral") / "base"
    config = LoraConfig(r=4, target_modules=[], target_parameters=["experts.gate_up_proj"])
    model = get_peft_model(loaded(TINY["mixtral"], base), config)
    model.save_pretrained(tmp_path / "adapter")
    assert list(factors(tmp_path / "adapter")) == [f"model.layers.{i}.mlp.experts" for i in (0, 1)]


# --- adapters made with transformers 4 ----------------------------------------------------------


def save_old_adapter(
    disk: Mapping[str, torch.Tensor],
    adapter: Path,
    targets: Iterable[str],
    **options: Any,
) -> dict[str, torch.Tensor]:
    """An adapter on matrices as they lie on disk; returns its deltas by name on disk."""
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 6, "target_modules": list(targets)}
    config |= options
    generator = torch.Generator().manual_seed(4)
    tensors, deltas = {}, {}
    for name, value in disk.items():
        module = name.removesuffix(".weight")
        leaf = module.rpartition(".")[2]
        if value.ndim != 2 or leaf not in config["target_modules"]:
            continue
        rank = options.get("rank_pattern", {}).get(leaf, 4)
        alpha = options.get("alpha_pattern", {}).get(leaf, 6)
        a = torch.randn(rank, value.shape[1], generator=generator)
        b = torch.randn(value.shape[0], rank, generator=generator)
        tensors[f"{PREFIX}{module}.lora_A.weight"] = a
        tensors[f"{PREFIX}{module}.lora_B.weight"] = b
        divisor = rank**0.5 if options.get("use_rslora") else rank
        deltas[name] = alpha / divisor * (b @ a)
    adapter.mkdir()
    save_file(tensors, adapter / "adapter_model.safetensors", {"format": "pt"})
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    return deltas


MIXTRAL = [*ATTENTION, "w1", "w2", "w3"]
QWEN = [*ATTENTION, "gate_proj", "up_proj", "down_proj"]


def old_and_merged(
    name: str, targets: list[str], saved: Saved, tmp_path: Path, **options: Any
) -> tuple[Tensors, Tensors, Tensors]:
    """The base, an old adapter's deltas, and PEFT's merge of it: all by names on disk."""
    base = saved(name) / "base"
    disk = dict(load_file(base / "model.safetensors"))
    deltas = save_old_adapter(disk, tmp_path / "adapter", targets, **options)
    model = loaded(TINY[name], base)
    return disk, deltas, merged_by_peft(model, tmp_path / "adapter", tmp_path / "merged")


def scaled(deltas: Tensors, factor: Callable[[str], float]) -> Tensors:
    return {name: factor(name.split(".")[-2]) * delta for name, delta in deltas.items()}


@pytest.mark.parametrize(
    ("name", "targets", "options"),
    [
        ("vit", ["query", "value"], {}),
        ("mixtral", [*MIXTRAL, "gate"], {}),
        ("mixtral", ["w1"], {}),
        ("mixtral", MIXTRAL, {"use_rslora": True}),
        ("mixtral", MIXTRAL, {"rank_pattern": {"w1": 2, "w3": 3}, "alpha_pattern": {"w2": 18}}),
        ("qwen2_moe", QWEN, {}),
        ("qwen3_moe", [*QWEN, "gate"], {}),
        ("deepseek_v3", QWEN, {}),
    ],
)
def test_old_adapters_merge_as_they_were_trained(
    name: str, targets: list[str], options: dict[str, Any], saved: Saved, tmp_path: Path
) -> None:
    base = saved(name) / "base"
    disk = dict(load_file(base / "model.safetensors"))
    deltas = save_old_adapter(disk, tmp_path / "adapter", targets, **options)
    assert deltas
    same(merged_by_us(base, tmp_path / "adapter", tmp_path / "ours"), plus(disk, deltas))


def plus(disk: Tensors, deltas: Tensors) -> Tensors:
    return {name: value + deltas.get(name, 0.0) for name, value in disk.items()}


@pytest.mark.parametrize(
    ("name", "targets"),
    [("mixtral", MIXTRAL), ("mixtral", [*MIXTRAL, "gate"]), ("qwen3_moe", [*QWEN, "gate"])],
)
def test_where_peft_merges_old_expert_adapters_as_they_were_trained(
    name: str, targets: list[str], saved: Saved, tmp_path: Path
) -> None:
    """Fused, ranks and alpha double and B is block-diagonal; each expert gets its own s B A."""
    disk, deltas, merged = old_and_merged(name, targets, saved, tmp_path)
    same(merged, plus(disk, deltas))


@pytest.mark.parametrize(
    ("options", "factor"),
    [
        # alpha / sqrt(r) with both doubled is sqrt(2) times as much.
        ({"use_rslora": True}, lambda leaf: 2**0.5 if leaf in ("w1", "w3") else 1.0),
        # The pattern is not carried over to the fused parameter: 6 instead of 18.
        (
            {"alpha_pattern": {"w1": 18, "w3": 18}},
            lambda leaf: 1 / 3 if leaf in ("w1", "w3") else 1.0,
        ),
    ],
)
def test_where_peft_merges_old_expert_adapters_wrongly(
    options: dict[str, Any], factor: Callable[[str], float], saved: Saved, tmp_path: Path
) -> None:
    disk, deltas, merged = old_and_merged("mixtral", MIXTRAL, saved, tmp_path, **options)
    same(merged, plus(disk, scaled(deltas, factor)))


@pytest.mark.parametrize(
    ("name", "targets", "lost"),
    [
        # The conversion knows the families that share Qwen2-MoE's classes, and not itself.
        ("qwen2_moe", QWEN, lambda name: ".experts." in name),
        # A dense layer's and shared experts' modules are taken for experts.
        (
            "deepseek_v3",
            QWEN,
            lambda name: ".mlp." in name and ".experts." not in name,
        ),
    ],
)
def test_what_peft_drops_of_old_expert_adapters_without_a_word(
    name: str, targets: list[str], lost: Callable[[str], bool], saved: Saved, tmp_path: Path
) -> None:
    disk, deltas, merged = old_and_merged(name, targets, saved, tmp_path)
    assert any(lost(key) for key in deltas)
    same(merged, plus(disk, {key: d for key, d in deltas.items() if not lost(key)}))


@pytest.mark.parametrize(
    ("name", "targets", "options", "error"),
    [
        ("vit", ["query", "value"], {}, "not found in the base model"),
        ("mixtral", [*ATTENTION, "w1"], {}, "without also targeting w3"),
        ("mixtral", MIXTRAL, {"rank_pattern": {"w1": 2, "w3": 2}}, "size mismatch"),
        ("mixtral", MIXTRAL, {"rank_pattern": {"w2": 2}}, "size mismatch"),
    ],
)
def test_old_adapters_that_peft_does_not_load(
    name: str,
    targets: list[str],
    options: dict[str, Any],
    error: str,
    saved: Saved,
    tmp_path: Path,
) -> None:
    with pytest.raises((ValueError, RuntimeError), match=error):
        old_and_merged(name, targets, saved, tmp_path, **options)
