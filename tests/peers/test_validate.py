"""validate finds what is wrong with an adapter before anything is merged."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import loratool
from loratool.errors import FormatError, InputError, MismatchError
from tests.models import Pair, Recipe, make_pair
from tests.peers.peft_side import PREFIX

Tensors = dict[str, torch.Tensor]
Q = f"{PREFIX}model.layers.0.self_attn.q_proj"
DOWN = f"{PREFIX}model.layers.1.mlp.down_proj"


@pytest.fixture
def adapter(adapter_of: Callable[..., Path], tmp_path: Path) -> Path:
    """A good adapter of rank 4 for the "llama" recipe, to be broken."""
    return Path(shutil.copytree(adapter_of("llama", 4), tmp_path / "adapter"))


@pytest.fixture
def base(pair_of: Callable[[str], Pair]) -> Path:
    return pair_of("llama").base


def edit(adapter: Path, change: Callable[[Tensors], Any]) -> None:
    path = adapter / "adapter_model.safetensors"
    tensors = {name: value.clone() for name, value in load_file(path).items()}
    change(tensors)
    save_file(tensors, path)


def configure(adapter: Path, **settings: Any) -> None:
    path = adapter / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **settings}))


def problems(adapter: Path, base: Path, **options: Any) -> list[dict[str, str]]:
    """The errors that validate lists; merging must refuse with the same ones."""
    report = loratool.validate(adapter, base, **options)
    found = [p for p in report.data["problems"] if p["severity"] == "error"]
    assert report.ok is (not found)
    if not options:
        check_merge_refuses(adapter, base, found)
    return found


def check_merge_refuses(adapter: Path, base: Path, found: list[dict[str, str]]) -> None:
    if not found:
        loratool.merge(base, [(adapter, 1.0)])
        return
    with pytest.raises(MismatchError) as caught:
        loratool.merge(base, [(adapter, 1.0)])
    for problem in found:
        assert problem["tensor"] in str(caught.value)
        assert problem["message"] in str(caught.value)


def test_a_good_adapter_fits(adapter: Path, base: Path) -> None:
    report = loratool.validate(adapter, base)
    assert report.ok and report.data["problems"] == []
    assert report.data["counts"] == {"low_rank": 15, "replaced": 6, "added": 0}


def test_an_adapter_of_another_size(adapter: Path, tmp_path: Path) -> None:
    recipe = Recipe("llama", "LlamaForCausalLM", "LlamaForCausalLM", {"hidden_size": 40})
    other = make_pair(recipe, tmp_path)
    found = problems(adapter, other.base)
    assert len(found) == 15 + 6
    q = next(p for p in found if p["tensor"] == "model.layers.0.self_attn.q_proj.weight")
    assert (q["expected"], q["found"]) == ("(40, 40)", "(32, 32)")


@pytest.mark.parametrize(("gone", "kept"), [("A", "B"), ("B", "A")])
def test_half_of_a_pair(gone: str, kept: str, adapter: Path, base: Path) -> None:
    edit(adapter, lambda tensors: tensors.pop(f"{Q}.lora_{gone}.weight"))
    (found,) = problems(adapter, base)
    assert found["tensor"] == f"{Q}.lora_{gone}.weight"
    assert found["message"] == f"missing, but lora_{kept} is there"


@pytest.mark.parametrize(
    "key",
    [
        f"{PREFIX}model.layers.0.mlp.gate.weight",
        f"{Q}.lora_C.weight",
        f"{Q}.lora_magnitude_vector",
        f"{PREFIX}model.layers.0.self_attn.q_proj.hada_w1_a",
        "model.layers.0.self_attn.q_proj.lora_A.weight",
        "diffusion_model.lora_A.weight",
    ],
)
def test_an_unexpected_key(key: str, adapter: Path, base: Path) -> None:
    edit(adapter, lambda tensors: tensors.update({key: torch.zeros(4, 32)}))
    (found,) = problems(adapter, base)
    assert found["tensor"] == key
    assert found["message"].startswith("unexpected key")


def test_ranks_of_the_two_halves_differ(adapter: Path, base: Path) -> None:
    edit(adapter, lambda tensors: tensors.update({f"{Q}.lora_A.weight": torch.zeros(3, 32)}))
    (found,) = problems(adapter, base)
    assert found["tensor"] == "model.layers.0.self_attn.q_proj"
    assert "different ranks" in found["message"]
    assert (found["expected"], found["found"]) == ("lora_B (32, 3)", "(32, 4)")


def test_the_config_gives_another_rank(adapter: Path, base: Path) -> None:
    configure(adapter, r=8, rank_pattern={"q_proj": 4, r"layers\.1\.mlp\.down_proj": 5})
    found = problems(adapter, base)
    ranks = {p["tensor"]: (p["expected"], p["found"]) for p in found}
    assert "model.layers.0.self_attn.q_proj" not in ranks
    assert ranks["model.layers.1.mlp.down_proj"] == ("5", "4")
    assert ranks["model.layers.0.mlp.down_proj"] == ("8", "4")
    assert all("another rank" in p["message"] for p in found)


@pytest.mark.parametrize("alpha", [math.inf, -math.inf, math.nan, "many", None])
def test_a_scale_that_is_not_finite(alpha: Any, adapter: Path, base: Path) -> None:
    configure(adapter, alpha_pattern={"layers.1.mlp.down_proj": alpha})
    (found,) = problems(adapter, base)
    assert found["tensor"] == "model.layers.1.mlp.down_proj"
    assert "scale is not finite" in found["message"]


def test_a_prefix_that_leads_nowhere(adapter: Path, base: Path) -> None:
    def rename(tensors: Tensors) -> None:
        for key in list(tensors):
            tensors[key.replace("model.layers", "decoder.blocks")] = tensors.pop(key)

    edit(adapter, rename)
    found = problems(adapter, base)
    assert {p["tensor"] for p in found if "base has no tensor" in p["message"]} >= {
        "decoder.blocks.0.self_attn.q_proj.weight", "decoder.blocks.1.mlp.down_proj.weight",
    }  # fmt: skip


def test_factors_of_integers(adapter: Path, base: Path) -> None:
    key = f"{Q}.lora_A.weight"
    edit(adapter, lambda tensors: tensors.update({key: torch.zeros(4, 32, dtype=torch.int32)}))
    (found,) = problems(adapter, base)
    assert (found["tensor"], found["found"]) == (key, "I32")


def test_convolution_factors(adapter: Path, base: Path) -> None:
    def grow(tensors: Tensors) -> None:
        tensors[f"{Q}.lora_A.weight"] = torch.zeros(4, 32, 3, 3)
        tensors[f"{Q}.lora_B.weight"] = torch.zeros(32, 4, 1, 1)

    edit(adapter, grow)
    (found,) = problems(adapter, base)
    assert "does not have the shape" in found["message"]
    assert (found["expected"], found["found"]) == ("(32, 32)", "(32, 32, 3, 3)")


def test_values_are_looked_at_only_when_asked(adapter: Path, base: Path) -> None:
    def spoil(tensors: Tensors) -> None:
        tensors[f"{Q}.lora_B.weight"][3, 1] = math.nan
        tensors[f"{PREFIX}model.norm.weight"][0] = math.inf

    edit(adapter, spoil)
    assert loratool.validate(adapter, base).ok
    found = problems(adapter, base, deep=True)
    assert {p["tensor"] for p in found} == {f"{Q}.lora_B.weight", f"{PREFIX}model.norm.weight"}
    assert all("NaN or Inf" in p["message"] for p in found)


def test_everything_is_listed_at_once(adapter: Path, base: Path) -> None:
    def spoil(tensors: Tensors) -> None:
        del tensors[f"{Q}.lora_A.weight"]
        tensors["strange"] = torch.zeros(1)
        tensors[f"{DOWN}.lora_A.weight"] = torch.zeros(4, 33)

    edit(adapter, spoil)
    configure(adapter, alpha_pattern={"layers.0.mlp.up_proj": math.inf})
    assert {p["tensor"] for p in problems(adapter, base)} == {
        f"{Q}.lora_A.weight", "strange", "model.layers.1.mlp.down_proj.weight",
        "model.layers.0.mlp.up_proj",
    }  # fmt: skip


def test_a_bottleneck_adapter_is_no_update_of_weights(adapter: Path, base: Path) -> None:
    settings = {"architecture": "bert", "config": {"reduction_factor": 16}, "model_name": "x"}
    (adapter / "adapter_config.json").write_text(json.dumps(settings))
    with pytest.raises(FormatError, match="bottleneck adapter of the adapters library"):
        loratool.validate(adapter, base)


@pytest.mark.parametrize("setting", ["use_dora", "lora_bias"])
def test_the_config_promises_what_the_weights_lack(setting: str, adapter: Path, base: Path) -> None:
    configure(adapter, **{setting: True})
    found = problems(adapter, base)
    assert len(found) == 15
    assert all(f"the config says {setting}, but there is no" in p["message"] for p in found)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"peft_type": None}, "peft_type is None"),
        ({"r": 0}, "r must be a whole number from 1 up, not 0"),
        ({"r": "four"}, "not 'four'"),
        ({"r": True}, "not True"),
        ({"rank_pattern": [4]}, "rank_pattern must map"),
        ({"rank_pattern": {"(": 4}}, r"rank_pattern: '\(' is no pattern"),
        ({"layer_replication": [[0, 2]]}, "layer_replication is set"),
        ({"alora_invocation_tokens": [1]}, "activated LoRA works only from"),
        ({"use_qalora": True}, "use_qalora is set: QA-LoRA's factors act on pooled inputs"),
        ({"arrow_config": {"top_k": 2}}, "Arrow routes every token"),
        ({"init_lora_weights": "pissa_niter_4"}, "belongs to a base whose weights"),
        ({"peft_type": "PROMPT_TUNING"}, "virtual tokens: it adds to the model's inputs"),
        ({"peft_type": "PREFIX_TUNING"}, "nothing to merge"),
        ({"peft_type": "P_TUNING"}, "P-tuning learns virtual tokens"),
        ({"peft_type": "VERA"}, "peft_type is 'VERA': loratool cannot merge that yet"),
    ],
)
def test_settings_that_cannot_be_are_refused(
    settings: dict[str, Any], message: str, adapter: Path, base: Path
) -> None:
    configure(adapter, **settings)
    with pytest.raises(FormatError, match=message):
        loratool.validate(adapter, base)


def test_missing_weights_are_named(adapter: Path, base: Path) -> None:
    (adapter / "adapter_model.safetensors").unlink()
    with pytest.raises(InputError, match=r"adapter_model\.safetensors: missing"):
        loratool.validate(adapter, base)
