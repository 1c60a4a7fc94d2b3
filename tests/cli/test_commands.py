"""What a person and a script see of the command line: help, reports, JSON, notes, plugins."""

from __future__ import annotations

import dataclasses
import errno
import json
import shutil
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from loratool import plugins
from loratool.safetensors_file import build_header
from tests.cli.tiny import (
    NORM,
    PREFIX,
    UP,
    Tensors,
    done,
    finetuned,
    loratool,
    model_folder,
    names,
    refused,
    save_model,
)

VERBS = plugins.names("steps")
HEAVY = {"torch", "numpy", "transformers", "safetensors", "onnx", "onnxruntime", "huggingface_hub"}
# A step may be a plugin as any other; what has alternatives is imported when it is used.
ALTERNATIVES = {f"loratool_plugins.{kind}" for kind in plugins.KINDS if kind != "steps"}


def modules_after(*arguments: object) -> set[str]:
    """The modules that a command has imported, in a process of its own: top-level ones, and kinds
    of plugins."""
    code = (
        "import sys\n"
        "from loratool.cli.main import main\n"
        "try: main()\n"
        "except SystemExit as stop: assert not stop.code, stop.code\n"
        "found = {name.partition('.')[0] for name in sys.modules}\n"
        "found |= {'.'.join(n.split('.')[:2]) for n in sys.modules if n[:9] == 'loratool_'}\n"
        "print('|'.join(found), file=sys.stderr)"
    )
    command = [sys.executable, "-c", code, *map(str, arguments)]
    finished = subprocess.run(command, capture_output=True, text=True, check=True)
    return set(finished.stderr.splitlines()[-1].split("|"))


def test_help_imports_nothing_heavy() -> None:
    found = modules_after("--help")
    assert "click" in found
    assert not found & {*HEAVY, *ALTERNATIVES, "rich"}


def test_the_help_of_the_verbs_imports_nothing_heavy() -> None:
    for verb in VERBS:
        assert not modules_after(verb, "--help") & {*HEAVY, *ALTERNATIVES, "rich"}


def test_validate_imports_no_torch_for_safetensors(base: Path, adapter: Path) -> None:
    found = modules_after("validate", adapter, "--base", base)
    assert "loratool_plugins" in found
    assert not found & HEAVY


def test_validate_reads_headers_only(tmp_path: Path) -> None:
    """A base of 20 GB that are holes: reading them would take longer than any test may."""
    name, shape = "model.layers.0.mlp.up_proj", (50_000, 100_000)
    base, adapter = model_folder(tmp_path / "base"), model_folder(tmp_path / "adapter", None)
    header = build_header([(f"{name}.weight", "F32", shape)], {"format": "pt"})
    with (base / "model.safetensors").open("wb") as file:
        file.write(header)
        file.truncate(len(header) + 4 * shape[0] * shape[1])
    factors = {"A": torch.zeros(1, shape[1]), "B": torch.zeros(shape[0], 1)}
    save_file(
        {f"{PREFIX}{name}.lora_{side}.weight": value for side, value in factors.items()},
        adapter / "adapter_model.safetensors",
    )
    settings = {"peft_type": "LORA", "r": 1, "lora_alpha": 1, "target_modules": ["up_proj"]}
    (adapter / "adapter_config.json").write_text(json.dumps(settings))
    assert "1 low-rank update," in done(loratool("validate", adapter, "--base", base)).out
    assert not modules_after("validate", adapter, "--base", base) & HEAVY


def test_help_lists_the_verbs_in_whole_sentences() -> None:
    text = done(loratool("--help")).out
    for verb in (*VERBS, "plugins"):
        assert f"  {verb} " in text
    assert "..." not in text.partition("Commands:")[2]
    assert done(loratool("-h")).out == text


@pytest.mark.parametrize("verb", VERBS)
def test_the_help_of_a_verb_shows_every_field_and_operand_of_its_step(verb: str) -> None:
    text = done(loratool(verb, "--help")).out
    step = plugins.load("steps", verb)
    for field in dataclasses.fields(step):
        assert f"--{field.metadata.get('flag', field.name.replace('_', '-'))}" in text
        words = " ".join(text.split())
        assert field.metadata["help"][1:] in words
    for operand in step.operands:
        assert f"--{operand.name} REF" in text or operand.name.upper().rstrip("S") in text
    for option in ("--json", "-q, --quiet", "-h, --help"):
        assert option in text
    chosen = any(field.metadata.get("short") == "o" for field in dataclasses.fields(step))
    assert ("-o, --output DIR" in text) == (bool(step.output) or chosen)
    works = bool(step.output) or any(hasattr(step, n) for n in ("in_place", "measures"))
    assert ("--executor" in text) == (works and getattr(step, "has_tasks", True))
    assert "{" not in text


def test_the_help_says_where_output_goes() -> None:
    for verb, place in (("extract", "FINETUNED-lora"), ("merge", "BASE-merged")):
        assert f"(default: {place})" in done(loratool(verb, "--help")).out


def test_version() -> None:
    assert version("loratool") in done(loratool("--version")).out


def test_no_arguments_is_a_usage_error_with_help() -> None:
    result = loratool()
    assert result.status == 2
    assert "Commands:" in result.out + result.err


def test_plugins_lists_every_plugin_of_every_kind() -> None:
    lines = done(loratool("plugins")).out.splitlines()
    for kind in plugins.KINDS:
        assert kind in lines
        for name in plugins.names(kind):
            assert any(line.split()[:2] == [name, "loratool"] for line in lines)
    assert not any("BROKEN" in line for line in lines)


def test_json_of_every_verb_is_alone_on_standard_output(
    base: Path, tuned: Path, adapter: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    report = done(loratool("extract", base, tuned, "--rank", 99, "-o", out, "--json"))
    assert report.data["totals"]["low_rank"] == 14
    assert report.data["tensors"][UP]["rank"] == 2
    assert report.err.startswith("Note: ")
    assert json.loads((out / "loratool.json").read_text()) == report.data
    report = done(loratool("validate", adapter, "--base", base, "--json"))
    assert report.data["ok"] is True
    assert report.data["problems"] == []
    report = done(loratool("merge", base, adapter, "-o", tmp_path / "merged", "--json"))
    assert 0.99 < report.data["survived"] <= 1.0
    assert report.err == ""


def test_json_of_an_export(base: Path, adapter: Path, tmp_path: Path) -> None:
    out = tmp_path / "onnx"
    report = done(loratool("export", base, adapter, "--no-cache", "-o", out, "--json"))
    assert report.data["verification"]
    assert report.data["graphs"].keys() == {"model"}
    assert (out / "model.onnx").is_file()
    assert names(tmp_path) == ["onnx"]


def test_json_of_an_unfit_adapter_lists_its_problems(
    base: Path, adapter: Path, tmp_path: Path
) -> None:
    bad = tmp_path / "bad"
    bad.mkdir()
    (bad / "adapter_config.json").write_bytes((adapter / "adapter_config.json").read_bytes())
    stored = load_file(adapter / "adapter_model.safetensors")
    stored[f"{PREFIX}{UP.removesuffix('.weight')}.lora_A.weight"] = torch.zeros(2, 5)
    save_file({**stored, "stray": torch.ones(1)}, bad / "adapter_model.safetensors")
    report = loratool("validate", bad, "--base", base, "--json")
    assert report.status == 1
    assert report.err == ""
    assert report.data["ok"] is False
    found = {problem["tensor"]: problem for problem in report.data["problems"]}
    assert found[UP]["expected"] == "(24, 16)"
    assert found[UP]["found"] == "(24, 5)"
    assert "stray" in found


def test_json_holds_no_infinity(base: Path, tmp_path: Path, tensors: Tensors) -> None:
    """The relative norm of a change from zero is not finite; JSON knows no such number."""
    zero = save_model(tmp_path / "zero", {**tensors, NORM: torch.zeros(16)})
    out = tmp_path / "out"

    def refuse(text: str) -> None:
        raise AssertionError(text)

    report = done(loratool("extract", zero, base, "-o", out, "--json"))
    for text in (report.out, (out / "loratool.json").read_text()):
        data = json.loads(text, parse_constant=refuse)
        assert data["tensors"][NORM]["relative_norm"] is None


def test_quiet_prints_only_what_is_wrong(
    base: Path, tuned: Path, adapter: Path, tmp_path: Path
) -> None:
    for verb, *given in (
        ("extract", base, tuned, "-o", tmp_path / "a"),
        ("validate", adapter, "--base", base),
        ("merge", base, adapter, "-o", tmp_path / "b"),
    ):
        result = done(loratool(verb, *given, "--quiet"))
        assert (result.out, result.err) == ("", "")
    refused(loratool("merge", base, adapter, "-o", tmp_path / "b", "-q"), "not empty")
    other = save_model(tmp_path / "other", {UP: torch.ones(2, 3)})
    result = loratool("validate", adapter, "--base", other, "-q")
    assert result.status == 1
    assert "does not fit" in result.out


def test_warnings_are_told_even_when_quiet(adapter: Path, tmp_path: Path, tensors: Tensors) -> None:
    plain = shutil.copytree(adapter, tmp_path / "plain")
    shutil.rmtree(plain / "model")
    bare = {name: value for name, value in tensors.items() if name != NORM}
    base = save_model(tmp_path / "base", bare)
    for verb, *given in (
        ("validate", plain, "--base", base),
        ("merge", base, plain, "-o", tmp_path / "out"),
    ):
        result = done(loratool(verb, *given, "-q"))
        assert result.out == ""
        assert result.err.startswith(f"Note: {NORM}: the base has no such tensor: it is added")
        assert len(result.err.splitlines()) == 1


def test_a_full_disk_behind_standard_output_is_told(
    base: Path, adapter: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(message: str, err: bool = False) -> None:
        if not err:
            raise OSError(errno.ENOSPC, "No space left on device")
        print(message, file=sys.stderr)

    monkeypatch.setattr("loratool.cli.output.click.echo", full)
    refused(loratool("validate", adapter, "--base", base), "standard output: No space left")


def test_the_report_of_an_extraction_names_every_update(
    base: Path, tuned: Path, tmp_path: Path, tensors: Tensors
) -> None:
    text = done(loratool("extract", base, tuned, "-o", tmp_path / "out")).out
    assert f"Extracted {tmp_path / 'out'}" in text
    for name in tensors:
        assert (name in text) == ("_proj" in name)
    assert "energy captured: 99.99%" in text


def test_a_legacy_torch_file_is_noted_once(
    base: Path, adapter: Path, tmp_path: Path, tensors: Tensors
) -> None:
    old = model_folder(tmp_path / "old")
    torch.save(tensors, old / "pytorch_model.bin", _use_new_zipfile_serialization=False)
    for verb, *given in (
        ("validate", adapter, "--base", old),
        ("merge", old, adapter, "-o", tmp_path / "merged"),
        ("extract", old, save_model(tmp_path / "t", finetuned(tensors)), "-o", tmp_path / "a"),
    ):
        notes = done(loratool(verb, *given)).err.splitlines()
        assert len(notes) == 1
        assert notes[0].startswith(f"Note: {old / 'pytorch_model.bin'}: a legacy torch file")


def test_a_single_file_is_a_checkpoint(base: Path, adapter: Path, tmp_path: Path) -> None:
    file = base / "model.safetensors"
    done(loratool("validate", adapter, "--base", file))
    done(loratool("merge", file, adapter, "-o", tmp_path / "out"))
    assert "model.safetensors" in names(tmp_path / "out")
