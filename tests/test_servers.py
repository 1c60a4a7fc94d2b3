"""The facts about servers: complete, in docs/servers.md, and found in adapters written by hand."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import loratool
from fixtures.weights import ROOT
from loratool import plugins
from loratool.adapter import Adapter, LazyUpdate
from loratool.errors import UsageError
from loratool.opening import open_adapter
from loratool.readiness import readiness, ready_servers
from loratool.servers import SERVERS, Limit, Ranks, Server
from loratool.traits import PLACES, TRAITS
from tests.cli.tiny import done, llama, refused, save_model
from tests.cli.tiny import loratool as command
from tests.peft_files import random_factors, write_adapter

DOCS = (ROOT / "docs/servers.md").read_text(encoding="utf-8")
LIMITS = [(server.name, limit) for server in SERVERS.values() for limit in server.limits]


def called(limit: Limit, server: Server) -> str:
    """What a limit is about, for the table."""
    if limit.trait == "format":
        what = f"formats other than {' and '.join(server.formats)}"
        if limit.formats:
            what = f"the format {' or '.join(limit.formats)}"
        return what
    label = TRAITS[limit.trait].label
    words = {
        "settings": ", ".join(server.settings), "target_pattern": "target_modules as a pattern",
        "bias_setting": "a bias", "tokens": "tokens",
    }  # fmt: skip
    text = label.format("updates", tensors="tensors", names=words.get(limit.trait, ""))
    where = f" (names: `{limit.names}`)".replace("|", "\\|") if limit.names else ""
    return text + where + (f", in {' or '.join(limit.formats)}" if limit.formats else "")


def table(server: Server) -> Iterator[str]:
    """The lines of docs/servers.md that come from the data."""
    yield f"## {server.title}"
    yield (
        f"`--for {server.name}`. Read: {server.project}, {server.version}, on {server.read}. "
        f"Loads {' and '.join(server.formats)}; others become {server.write_as}."
    )
    yield "| what | it | how | read in |"
    yield "|---|---|---|---|"
    for limit in server.limits:
        how = f"{limit.why}; {limit.unless}" if limit.unless else limit.why
        yield f"| {called(limit, server)} | {limit.does} | {how} | `{limit.source}` |"
    if server.ranks is not None:
        yield f"| ranks | takes | {ranks_in_words(server.ranks)} | `{server.ranks.source}` |"
    if server.modules:
        yield f"Modules that it knows: {', '.join(f'`{name}`' for name in server.modules)}."


def ranks_in_words(ranks: Ranks) -> str:
    if ranks.choices:
        numbers = ", ".join(map(str, ranks.choices))
        return f"up to {ranks.default}; with `{ranks.flag}` up to one of {numbers}"
    if ranks.default is not None:
        return f"up to {ranks.default}; with `{ranks.flag}` up to any"
    if ranks.block > 1:
        return f"{ranks.least}, and multiples of {ranks.block}; else: {ranks.why}"
    return f"all; the largest is found from the first adapters, or set with `{ranks.flag}`"


@pytest.mark.parametrize("name", SERVERS)
def test_the_documentation_says_what_the_data_says(name: str) -> None:
    missing = [line for line in table(SERVERS[name]) if line not in DOCS.splitlines()]
    assert not missing, "\n".join(missing)


@pytest.mark.parametrize(("server", "limit"), LIMITS)
def test_limits_are_complete(server: str, limit: Limit) -> None:
    assert limit.trait in TRAITS and limit.why and limit.source
    assert limit.does != "takes" or limit.unless
    re.compile(limit.names)
    assert SERVERS[server].name == server
    assert re.fullmatch(r"\d{4}-\d\d-\d\d", SERVERS[server].read)


def test_every_trait_is_somewhere_a_limit() -> None:
    assert {limit.trait for _, limit in LIMITS} == set(TRAITS) >= set(PLACES)


def test_formats_and_cures_are_those_that_exist() -> None:
    known = set(plugins.names("adapter_formats"))
    for server in SERVERS.values():
        assert {server.write_as, *server.formats} <= known
        assert all(set(limit.formats) <= known for limit in server.limits)


def test_ranks() -> None:
    ranks = Ranks("", default=16, choices=(8, 16, 64))
    assert [ranks.setting(rank) for rank in (1, 16, 17, 64, 65)] == [8, 16, 64, 64, None]
    assert Ranks("").setting(1000) == 1000
    blocks = Ranks("", least=8, block=16)
    assert [blocks.allowed(rank) for rank in (1, 8, 9, 16, 17, 32)] == [8, 8, 16, 16, 32, 32]


# What adapters written by hand show; those of PEFT are in tests/peers/test_servers.py.

Q, V, NORM = ("model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.v_proj", "model.norm")
SHAPES = {f"model.layers.{n}.self_attn.{p}_proj": (16, 16) for n in range(2) for p in "qv"}


def written(folder: Path, rank: int = 8, **settings: Any) -> Path:
    return write_adapter(folder, random_factors(SHAPES, rank, seed=0), **settings)


def findings(adapter: Path, server: str, **options: Any) -> dict[str, dict[str, Any]]:
    report = loratool.validate(adapter, servers=[server], **options)
    return {f["rule"]: f for f in report.data["servers"][server]["findings"]}


def test_a_plain_adapter_is_ready(tmp_path: Path) -> None:
    adapter = written(tmp_path / "adapter", task_type="CAUSAL_LM")
    report = loratool.validate(adapter, servers=["vllm", "tensorrt-llm", "sglang", "lorax"])
    assert report.ok and report.status == 0
    assert all(result == {**result, "ready": True, "findings": [], "commands": []}
               for result in report.data["servers"].values())  # fmt: skip
    assert ready_servers(open_adapter(adapter)) == ["vllm", "tensorrt-llm", "sglang", "lorax"]
    assert loratool.inspect(adapter).data["ready_for"] == ready_servers(open_adapter(adapter))


def test_a_finding_says_all_that_one_needs(tmp_path: Path) -> None:
    whole = {"model.norm.weight": torch.ones(16), "lm_head.weight": torch.ones(32, 16)}
    adapter = written(tmp_path / "adapter", whole=whole, base_model_name_or_path="org/base")
    report = loratool.validate(adapter, servers=["vllm"])
    (finding,) = report.data["servers"]["vllm"]["findings"]
    assert finding["rule"] == "whole" and finding["does"] == "refuses"
    assert finding["count"] == 2 and finding["examples"] == ["lm_head.weight", "model.norm.weight"]
    assert finding["cure"] == f"loratool convert {adapter} --lora-only"
    assert f"loratool merge org/base {adapter}" in finding["note"]
    assert json.loads(json.dumps(report.data)) == report.data
    text = "\n".join(report.lines)
    assert f"error: {finding['message']}\n    cure: {finding['cure']}" in text
    assert "not ready for vllm" in text


def test_paths_are_quoted(tmp_path: Path) -> None:
    adapter = written(tmp_path / "my adapter", use_rslora=True)
    (command,) = loratool.validate(adapter, servers=["sglang"]).data["servers"]["sglang"][
        "commands"
    ]
    assert command.startswith(f"loratool rescale '{adapter}' --normalize -o ")


def test_what_hand_written_settings_lack(tmp_path: Path) -> None:
    adapter = written(tmp_path / "adapter")
    file = adapter / "adapter_config.json"
    settings = json.loads(file.read_text())
    del settings["target_modules"], settings["lora_alpha"]
    file.write_text(json.dumps(settings))
    found = findings(adapter, "vllm")
    assert found["settings"]["examples"] == ["lora_alpha", "target_modules"]
    assert "lora_alpha, target_modules" in found["settings"]["message"]
    assert findings(adapter, "tensorrt-llm")["settings"]["count"] == 1


def test_a_tensor_is_told_of_once(tmp_path: Path) -> None:
    """lm_head is no module of TensorRT-LLM's, and it lies outside its layers."""
    factors = random_factors({**SHAPES, "lm_head": (32, 16)}, 8, seed=0)
    adapter = write_adapter(tmp_path / "adapter", factors)
    assert list(findings(adapter, "tensorrt-llm")) == ["update"]


def test_every_layer_or_none(tmp_path: Path) -> None:
    shapes = {name: shape for name, shape in SHAPES.items() if name != V}
    adapter = write_adapter(tmp_path / "adapter", random_factors(shapes, 8, seed=0))
    assert findings(adapter, "lorax")["layers"]["count"] == 1
    whole = written(tmp_path / "whole")
    assert "layers" not in findings(whole, "lorax")
    config = {"num_hidden_layers": 3, "model_type": "llama", "vocab_size": 32}
    tensors = llama()
    more = {k.replace("layers.1", "layers.2"): v.clone() for k, v in tensors.items()}
    base = save_model(tmp_path / "base", {**tensors, **more})
    (base / "config.json").write_text(json.dumps(config))
    assert findings(whole, "lorax", base=base)["layers"]["count"] == 4


def test_faults_of_the_adapter_itself_count(tmp_path: Path) -> None:
    adapter = written(tmp_path / "adapter")
    file = adapter / "adapter_model.safetensors"
    save_file({"strange": torch.ones(1)}, file)
    report = loratool.validate(adapter, servers=["vllm"])
    assert not report.ok and report.data["servers"]["vllm"]["ready"]
    assert "strange" in "\n".join(report.lines)
    assert ready_servers(open_adapter(adapter)) == []


def test_what_cannot_be_asked(tmp_path: Path) -> None:
    adapter = written(tmp_path / "adapter")
    with pytest.raises(UsageError, match="give the base"):
        loratool.validate(adapter)
    with pytest.raises(UsageError, match="no server 'vlm' is known"):
        loratool.validate(adapter, servers=["vlm"])
    with pytest.raises(UsageError, match="save it first"):
        loratool.validate(loratool.rescale(adapter, by=2), servers=["vllm"])
    base = save_model(tmp_path / "base", llama())
    with pytest.raises(UsageError, match="--merged is about a model"):
        loratool.validate(adapter, base, base, servers=["vllm"])


# On the command line.


def test_no_base_is_looked_for(tmp_path: Path) -> None:
    adapter = written(tmp_path / "adapter", base_model_name_or_path="/nowhere/base")
    result = done(command("validate", adapter, "--for", "vllm"))
    assert "base:" not in result.err and "ready for vllm" in result.out
    refused(command("validate", adapter), "nowhere")


def test_with_a_base_both_are_told(tmp_path: Path) -> None:
    base = save_model(tmp_path / "base", llama())
    adapter = written(tmp_path / "adapter")
    result = done(command("validate", adapter, "--base", base, "--for", "vllm", "--for", "lorax"))
    assert f"{adapter} fits {base}" in result.out
    assert "ready for vllm" in result.out and "ready for lorax" in result.out


def test_the_exit_status_is_that_of_the_worst(tmp_path: Path) -> None:
    adapter = written(tmp_path / "adapter", use_rslora=True)
    for flags, status in ((("vllm",), 0), (("sglang",), 1), (("vllm", "sglang"), 1)):
        words = [word for server in flags for word in ("--for", server)]
        assert command("validate", adapter, *words).status == status
        result = command("validate", adapter, *words, "--json")
        assert result.data["ok"] is (status == 0) and set(result.data["servers"]) == set(flags)
    assert command("validate", adapter, "--for", "somewhere").status == 2


@pytest.mark.parametrize(
    ("path", "called", "output"),
    [
        ("a/lora", "a/lora", "a/lora-sglang"),
        ("a/lora.safetensors", "a/lora.safetensors", "a/lora-sglang"),
        ("/cache/1", "org/lora@v2:math", "lora-sglang"),
        ("/cache/2", "s3://bucket/lora", "lora-sglang"),
    ],
)
def test_what_results_are_called(
    path: str, called: str, output: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {"use_rslora": True, "r": 8, "lora_alpha": 8, "target_modules": []}
    updates = {
        f"{module}.weight": LazyUpdate(
            f"{module}.weight", "low_rank", (16, 16), "F32", lambda: None, rank=8
        )
        for module in (Q, V)
    }
    adapter = Adapter(updates, settings=settings, path=Path(path))
    monkeypatch.setattr(Adapter, "label", called)
    (command,) = readiness(adapter, "sglang").commands
    assert command == f"loratool rescale {called} --normalize -o {output}"
