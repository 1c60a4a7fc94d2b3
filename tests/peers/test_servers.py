"""Adapters that PEFT saved: what servers make of them, and that every cure cures.

No server runs here: what each of them does is what its sources say (docs/servers.md).
"""

from __future__ import annotations

import json
import shlex
import shutil
import warnings
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file

import loratool
from loratool.servers import SERVERS
from tests.cli.tiny import done
from tests.cli.tiny import loratool as command
from tests.models import build, tiny_config

ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
ON_PEFT = ("vllm", "tensorrt-llm", "sglang", "lorax")


def lora(r: int = 8, **options: Any) -> peft.PeftConfig:
    options = {"target_modules": ATTENTION, "lora_alpha": 6, "task_type": "CAUSAL_LM", **options}
    return peft.LoraConfig(r=r, **options)


def on_all(rules: set[str], *servers: str) -> dict[str, set[str]]:
    """The same rules broken on several servers: without names, on all that are for text."""
    return dict.fromkeys(servers or (*ON_PEFT, "llama.cpp"), rules)


# name: (model, adapter, server -> the rules that it breaks beside the format's)
CASES: Mapping[str, tuple[str, peft.PeftConfig, Mapping[str, set[str]]]] = {
    "plain": ("llama", lora(), {}),
    "rsLoRA": ("llama", lora(use_rslora=True), {"sglang": {"rslora"}}),
    "ranks": (
        "llama", lora(16, rank_pattern={"v_proj": 8}),
        {"tensorrt-llm": {"ranks"}, "sglang": {"ranks"}, "lorax": {"ranks"}},
    ),
    "alphas": (
        "llama", lora(alpha_pattern={"layers.1.self_attn.v_proj": 3}),
        {"tensorrt-llm": {"alphas"}, "sglang": {"alphas"}, "lorax": {"alphas"}},
    ),
    "ranks and rsLoRA": (
        "llama", lora(use_rslora=True, rank_pattern={"v_proj": 2}, alpha_pattern={"k_proj": 2}),
        {
            "tensorrt-llm": {"ranks", "alphas"}, "sglang": {"ranks", "alphas", "rslora"},
            "lorax": {"ranks", "alphas", "rank"},
        },
    ),
    "a pattern that says nothing": ("llama", lora(alpha_pattern={"lm_head": 3, "q_proj": 6}), {}),
    "a small rank": ("llama", lora(3), {"lorax": {"rank"}}),
    "an odd rank": ("llama", lora(20), {"lorax": {"rank"}}),
    "a huge rank": ("llama", lora(520), {"vllm": {"rank"}, "lorax": {"rank"}}),
    "DoRA": ("llama", lora(use_dora=True), on_all({"dora"})),
    "LoHa": (
        "llama", peft.LoHaConfig(r=2, alpha=3, target_modules=ATTENTION),
        on_all({"method"}, *SERVERS),
    ),
    "LoKr": (
        "llama", peft.LoKrConfig(r=2, alpha=3, target_modules=ATTENTION),
        on_all({"method"}, *SERVERS),
    ),
    "IA3": (
        "llama", peft.IA3Config(target_modules=["q_proj", "k_proj", "v_proj"],
                                feedforward_modules=[]),
        on_all({"method"}, *SERVERS),
    ),
    "a head": (
        "llama", lora(modules_to_save=["lm_head"]),
        on_all({"whole"}),
    ),
    "a norm": (
        "llama", lora(modules_to_save=["norm"]),
        on_all({"whole"}),
    ),
    "norms in layers": (
        "llama", lora(modules_to_save=["input_layernorm"]),
        on_all({"whole"}),
    ),
    "biases": (
        "qwen2", lora(bias="all"), on_all({"whole_bias"}),
    ),
    "biases that are not there": ("llama", lora(bias="all"), {"vllm": {"bias_setting"}}),
    "biases of lora_B": (
        "qwen2", lora(target_modules=ATTENTION[:3], lora_bias=True),
        on_all({"bias"}),
    ),
    "trained rows": (
        "llama", lora(trainable_token_indices={"embed_tokens": [3, 7]}),
        {**on_all({"rows"}), "diffusers": {"rows"}},
    ),
    "an embedding": (
        "llama", lora(target_modules=[*ATTENTION, "embed_tokens"]),
        {"tensorrt-llm": {"embedding"}, "lorax": {"embedding"}},
    ),
    "a head's factors": (
        "llama", lora(target_modules=[*ATTENTION, "lm_head"]), {"tensorrt-llm": {"update"}},
    ),
    "one layer": (
        "llama", lora(layers_to_transform=[1]), {"lorax": {"layers"}},
    ),
    "q alone": ("llama", lora(target_modules=["q_proj"]), {"sglang": {"lone"}}),
    "q and v": ("llama", lora(target_modules=["q_proj", "v_proj"]), {}),
    "a pattern of targets": (
        "llama", lora(target_modules=r".*self_attn\.[qkvo]_proj"),
        {"sglang": {"target_pattern"}},
    ),
    "GPT-2": (
        "gpt2", lora(target_modules=["c_attn"], fan_in_fan_out=True),
        {"tensorrt-llm": {"module"}, "sglang": {"update"}},
    ),
    "a classifier": (
        "llama-classifier", lora(task_type="SEQ_CLS"),
        on_all({"whole"}, "tensorrt-llm", "sglang", "lorax", "llama.cpp"),
    ),
    "experts": (
        "mixtral",
        lora(target_parameters=["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]),
        on_all({"experts"}, "tensorrt-llm", "sglang", "lorax"),
    ),
    "one side of experts": (
        "mixtral", lora(target_parameters=["mlp.experts.down_proj"]),
        {
            **on_all({"experts"}, "tensorrt-llm", "sglang", "lorax"),
            "vllm": {"lone_experts"},
        },
    ),
}  # fmt: skip
_EXPERTS = {"num_local_experts": 3, "num_experts_per_tok": 2}
MODELS: Mapping[str, tuple[str, str, Mapping[str, Any]]] = {
    # name: (model type, class, settings)
    "llama": ("llama", "LlamaForCausalLM", {}),
    "llama-classifier": ("llama", "LlamaForSequenceClassification", {"num_labels": 3}),
    "qwen2": ("qwen2", "Qwen2ForCausalLM", {}),
    "gpt2": ("gpt2", "GPT2LMHeadModel", {}),
    "mixtral": ("mixtral", "MixtralForCausalLM", _EXPERTS),
}  # fmt: skip


def config(kind: str, **settings: Any) -> transformers.PretrainedConfig:
    if kind != "mixtral":
        return tiny_config(kind, **settings)
    return transformers.MixtralConfig(
        vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, intermediate_size=16, **settings,
    )  # fmt: skip


Make = Callable[[str], Path]


@pytest.fixture(scope="module")
def folder_of(tmp_path_factory: pytest.TempPathFactory) -> Make:
    """Name of a case -> a directory with its base and adapter, as transformers and PEFT save."""

    @cache
    def make(name: str) -> Path:
        folder = tmp_path_factory.mktemp("case")
        kind, architecture, settings = MODELS[CASES[name][0]]
        with warnings.catch_warnings(), torch.random.fork_rng():
            warnings.simplefilter("ignore")
            model = build(architecture, config(kind, **settings))
            model.save_pretrained(folder / "base")
            torch.manual_seed(0)
            adapted = peft.get_peft_model(model, CASES[name][1])
            with torch.no_grad():
                for key, parameter in adapted.named_parameters():
                    if parameter.requires_grad:
                        noise = torch.randn(parameter.shape) * 0.1
                        start = any(w in key for w in ("magnitude", "ia3", "token"))
                        parameter.copy_(parameter + noise if start else noise)
            adapted.save_pretrained(folder / "adapter")
        return folder

    return make


def broken(adapter: Path | str, server: str, base: Path | None = None) -> set[str]:
    """The rules of a server that an adapter breaks."""
    report = loratool.validate(adapter, base, servers=[server])
    result = report.data["servers"][server]
    assert (
        report.ok
        is result["ready"]
        is not any(finding["severity"] == "error" for finding in result["findings"])
    )
    assert all(finding["cure"] and finding["count"] for finding in result["findings"])
    return {f["rule"] for f in result["findings"] if f["severity"] == "error"}


@pytest.mark.parametrize("name", CASES)
def test_what_servers_do_not_take(folder_of: Make, name: str) -> None:
    adapter = folder_of(name) / "adapter"
    for server in SERVERS:
        beside = {"format"} if server in ("llama.cpp", "diffusers") else set()
        found = broken(adapter, server)
        if server == "diffusers":  # its files have no place for more: tests/diffusion
            found.discard("place")
        assert found == CASES[name][2].get(server, set()) | beside, server


def runs(line: str, base: Path) -> None:
    """Run a command line as it was printed."""
    words = [str(base) if word == "BASE" else word for word in shlex.split(line)]
    assert words[0] == "loratool"
    done(command(*words[1:]))


ERRORS = [(name, server) for name in CASES for server in ON_PEFT if CASES[name][2].get(server)]


@pytest.mark.parametrize(("name", "server"), ERRORS)
def test_every_cure_cures(
    folder_of: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, server: str
) -> None:
    base = folder_of(name) / "base"
    monkeypatch.chdir(tmp_path)
    (tmp_path / "adapter").symlink_to(folder_of(name) / "adapter")
    result = loratool.validate("adapter", servers=[server]).data["servers"][server]
    for number, finding in enumerate(f for f in result["findings"] if f["severity"] == "error"):
        line = finding["cure"]
        runs(f"{line} -o cured-{number}", base)
        if not line.startswith("loratool merge"):
            assert finding["rule"] not in broken(f"cured-{number}", server)
    if any(f["cure"].startswith("loratool merge") for f in result["findings"]):
        assert result["commands"] == []
        return
    for line in result["commands"]:
        runs(line, base)
    assert broken(f"adapter-{server}", server) == set()
    assert loratool.validate(f"adapter-{server}", base).ok


LOSSLESS = ["ranks and rsLoRA", "a small rank", "an odd rank", "LoHa", "LoKr"]


@pytest.mark.parametrize("name", LOSSLESS)
def test_cures_without_loss_lose_nothing(
    folder_of: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    base = folder_of(name) / "base"
    monkeypatch.chdir(tmp_path)
    (tmp_path / "adapter").symlink_to(folder_of(name) / "adapter")
    result = loratool.validate("adapter", servers=["lorax"]).data["servers"]["lorax"]
    for line in result["commands"]:
        runs(line, base)
    wanted, found = (merged(base, f"adapter{end}", tmp_path) for end in ("", "-lorax"))
    for key, value in wanted.items():
        torch.testing.assert_close(found[key], value, rtol=1e-4, atol=1e-5, msg=key)


def merged(base: Path, adapter: str, folder: Path) -> dict[str, torch.Tensor]:
    loratool.merge(base, [(adapter, 1.0)]).save(folder / f"{adapter}-merged")
    found: dict[str, torch.Tensor] = load_file(folder / f"{adapter}-merged/model.safetensors")
    return found


def test_what_is_cured_is_what_the_servers_compute(folder_of: Make, tmp_path: Path) -> None:
    """alpha / r of the config times B A, which the simplest server computes, is PEFT's delta."""
    folder = folder_of("ranks and rsLoRA")
    loratool.rescale(folder / "adapter", normalize=True).save(tmp_path / "normal")
    settings = json.loads((tmp_path / "normal/adapter_config.json").read_text())
    scale = settings["lora_alpha"] / settings["r"]
    tensors = load_file(tmp_path / "normal/adapter_model.safetensors")
    model = transformers.AutoModelForCausalLM.from_pretrained(folder / "base")
    theirs = peft.PeftModel.from_pretrained(model, folder / "adapter")
    checked = 0
    for name, module in theirs.named_modules():
        if isinstance(module, peft.tuners.lora.LoraLayer):
            a, b = (tensors[f"{name}.lora_{side}.weight"] for side in "AB")
            delta = module.get_delta_weight("default")
            torch.testing.assert_close(scale * b @ a, delta, rtol=1e-5, atol=1e-6)
            checked += 1
    assert checked == 8


@pytest.mark.parametrize(
    "name", ["plain", "rsLoRA", "ranks and rsLoRA", "a head's factors", "an embedding", "biases"]
)
def test_llama_cpp_gets_a_file_of_its_own(
    folder_of: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    base = folder_of(name) / "base"
    monkeypatch.chdir(tmp_path)
    (tmp_path / "adapter").symlink_to(folder_of(name) / "adapter")
    report = loratool.validate("adapter", base, servers=["llama.cpp"])
    for line in report.data["servers"]["llama.cpp"]["commands"]:
        assert "BASE" not in line
        runs(line, base)
    assert broken("adapter-llama.cpp", "llama.cpp", base) == set()
    assert [file.name for file in Path("adapter-llama.cpp").glob("*.gguf")] == ["adapter.gguf"]


@pytest.mark.parametrize("format", ["gguf", "mlx"])
@pytest.mark.parametrize("name", ["ranks and rsLoRA", "DoRA"])
def test_other_formats_become_ones_that_servers_load(
    folder_of: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, format: str, name: str
) -> None:
    if (format, name) == ("gguf", "DoRA"):
        pytest.skip("GGUF has no DoRA")
    base = folder_of(name) / "base"
    monkeypatch.chdir(tmp_path)
    loratool.convert(folder_of(name) / "adapter", base, format=format).save("adapter")
    for server in ("vllm", "sglang", "lorax"):
        assert "format" in broken("adapter", server)
        report = loratool.validate("adapter", base, servers=[server])
        for line in report.data["servers"][server]["commands"]:
            runs(line, base)
        assert broken(f"adapter-{server}", server) == set()


def test_a_base_tells_what_llama_cpp_has_no_place_for(
    folder_of: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = folder_of("plain") / "base"
    monkeypatch.chdir(tmp_path)
    model = build("LlamaForSequenceClassification", config("llama", num_labels=3))
    adapted = peft.get_peft_model(model, lora(target_modules=["q_proj", "score"], task_type=None))
    adapted.save_pretrained("adapter")
    assert "place" not in broken("adapter", "llama.cpp")
    assert broken("adapter", "llama.cpp", base) >= {"format", "place"}


def test_ranks_above_the_default_are_a_matter_of_starting(folder_of: Make) -> None:
    adapter = folder_of("an odd rank") / "adapter"
    data = loratool.validate(adapter, servers=["vllm", "tensorrt-llm"]).data["servers"]
    (finding,) = data["vllm"]["findings"]
    assert (finding["rule"], finding["severity"]) == ("rank", "warning")
    assert finding["cure"] == "start it with --max-lora-rank 32"
    assert data["tensorrt-llm"]["findings"] == [] and data["vllm"]["ready"]


def test_conditions_are_warnings(folder_of: Make) -> None:
    def warned(name: str) -> dict[str, str]:
        report = loratool.validate(folder_of(name) / "adapter", servers=["vllm"])
        assert report.ok
        findings = report.data["servers"]["vllm"]["findings"]
        return {finding["rule"]: finding["cure"] for finding in findings}

    assert "0.32 or newer" in warned("alphas")["alphas"]
    assert "loratool rescale" in warned("alphas")["alphas"]
    assert "--enable-mixed-moe-lora-format" in warned("experts")["experts"]
    assert "as a classifier" in warned("a classifier")["whole"]


def test_added_tokens_beside_the_adapter(
    folder_of: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(folder_of("plain") / "adapter", "adapter")
    Path("adapter/added_tokens.json").write_text(json.dumps({"<old>": 5, "<new>": 64}))
    assert broken("adapter", "sglang") == {"tokens"}
    assert broken("adapter", "sglang", folder_of("plain") / "base") == {"tokens"}
    data = loratool.validate("adapter", servers=["sglang"]).data["servers"]["sglang"]
    runs(data["commands"][0], folder_of("plain") / "base")
    assert broken("adapter-sglang", "sglang") == set()
    Path("adapter/added_tokens.json").write_text(json.dumps({"<old>": 5}))
    assert broken("adapter", "sglang", folder_of("plain") / "base") == set()
