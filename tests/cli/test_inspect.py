"""loratool inspect: tables for terminals and files, JSON for machines, headers alone for models."""

from __future__ import annotations

import io
import json
import os
import pty
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from loratool.cli import output
from loratool.cli.tables import fitted
from loratool.reports import Table
from loratool.safetensors_file import build_header
from tests.adapters import factors, write_adapter
from tests.cli.test_commands import HEAVY, modules_after
from tests.cli.tiny import (
    PREFIX,
    UP,
    Tensors,
    done,
    llama,
    loratool,
    model_folder,
    refused,
    save_model,
    unchanged,
)


def test_an_adapter_and_a_checkpoint_are_told_apart(base: Path, adapter: Path) -> None:
    text = done(loratool("inspect", adapter)).out
    assert f"{adapter}: an adapter" in text
    assert "14 low-rank updates, 1 tensor kept whole" in text
    assert UP.removesuffix(".weight") in text
    text = done(loratool("inspect", base)).out
    assert f"{base}: a checkpoint" in text
    assert "architecture: LlamaForCausalLM, llama" in text
    assert "model.layers.*.mlp.up_proj.weight" in text


def test_54_parameters_against_80(tmp_path: Path) -> None:
    path = write_adapter(tmp_path / "a", {"layer": factors(0, 10, 8, 3)})
    text = done(loratool("inspect", path)).out
    assert "parameters: 54 against 80 of the whole matrices (67.50%)" in text
    assert "54/80" in text


def test_json_is_complete(base: Path, adapter: Path, tensors: Tensors) -> None:
    found = done(loratool("inspect", adapter, "--json"))
    assert found.err == ""
    assert len(found.data["updates"]) == 14
    assert found.data["of"] == "adapter"
    assert all(
        abs(sum(update["energies"]) - 1) < 1e-12 for update in found.data["updates"].values()
    )
    assert found.data == done(loratool("inspect", adapter, "--json", "--all")).data
    found = done(loratool("inspect", base, "--json"))
    assert found.data["tensors"].keys() == tensors.keys()
    deep = done(loratool("inspect", base, "--json", "--deep")).data
    assert deep["tensors"][UP]["norm"] == pytest.approx(float(tensors[UP].norm()), rel=1e-6)
    assert len(deep["digest"]) == 64


def test_a_checkpoint_is_read_by_headers_alone(tmp_path: Path) -> None:
    """20 GB that are holes: reading them would take longer than any test may."""
    folder = model_folder(tmp_path / "base")
    header = build_header([("m.weight", "F32", (50_000, 100_000))], {"format": "pt"})
    with (folder / "model.safetensors").open("wb") as file:
        file.write(header)
        file.truncate(len(header) + 20_000_000_000)
    assert "5,000,000,000 parameters (5.00B)" in done(loratool("inspect", folder)).out
    assert not modules_after("inspect", folder) & HEAVY


def test_all_lists_every_tensor(base: Path, adapter: Path, tensors: Tensors) -> None:
    text = done(loratool("inspect", base, "--all")).out
    assert all(name in text for name in tensors)


def test_quiet_prints_nothing(base: Path, adapter: Path) -> None:
    for path in (base, adapter):
        result = done(loratool("inspect", path, "-q"))
        assert result.out == result.err == ""


def test_problems_are_notes_and_the_status_is_0(adapter: Path, tmp_path: Path) -> None:
    bad = shutil.copytree(adapter, tmp_path / "bad")
    file = bad / "adapter_model.safetensors"
    save_file({**load_file(file), "stray\x1b[31m": torch.ones(1)}, file)
    result = done(loratool("inspect", bad))
    assert result.err.startswith("Note: error: ")
    assert r"stray\x1b[31m" in result.err
    assert "14 low-rank updates" in result.out


def test_what_cannot_be_read_is_refused(base: Path, adapter: Path, tmp_path: Path) -> None:
    empty = model_folder(tmp_path / "empty")
    bad = shutil.copytree(adapter, tmp_path / "bad")
    file = bad / "adapter_model.safetensors"
    model = save_model(tmp_path / "model", llama())
    weights = model / "model.safetensors"
    with unchanged(tmp_path):
        refused(loratool("inspect", tmp_path / "nowhere"), "no such file")
        refused(loratool("inspect", empty), empty, "holds no checkpoint")
        refused(loratool("inspect", tmp_path / "model" / "config.json"), "config.json")
        refused(loratool("inspect"), "Missing argument", status=2)
        refused(loratool("inspect", base, "-o", "x"), "-o", status=2)
    for path, whole in ((file, file.read_bytes()), (weights, weights.read_bytes())):
        path.write_bytes(whole[:-10])
        with unchanged(tmp_path):
            refused(loratool("inspect", path.parent), path, "truncated")
        path.write_bytes(whole)
    (bad / "loratool.json").write_text("{")
    with unchanged(tmp_path):
        refused(loratool("inspect", bad), bad / "loratool.json", "not valid JSON")
    settings = json.loads((bad / "adapter_config.json").read_text())
    (bad / "adapter_config.json").write_text(json.dumps({**settings, "use_qalora": True}))
    with unchanged(tmp_path):
        refused(loratool("inspect", bad), bad / "adapter_config.json", "use_qalora")


def test_an_adapter_in_an_unknown_dtype_is_no_traceback(adapter: Path, tmp_path: Path) -> None:
    bad = shutil.copytree(adapter, tmp_path / "bad")
    file = bad / "adapter_model.safetensors"
    key = f"{PREFIX}{UP.removesuffix('.weight')}.lora_A.weight"
    tensors = load_file(file)
    save_file({**tensors, key: tensors[key].to(torch.int64)}, file)
    assert "factors must be floats" in done(loratool("inspect", bad)).err


# ---- tables


TABLE = Table(
    ("name", "shape", "size", "bar"),
    (("model.layers.10.mlp.up_proj.weight", "4096x4096", "32.0 MiB", "█████"),
     ("head", "1x1", "4 B", "▏")),
    optional=("bar", "shape"),
)  # fmt: skip


@pytest.mark.parametrize(
    ("width", "columns", "name"),
    [
        (64, ("name", "shape", "size", "bar"), "model.layers.10.mlp.up_proj.weight"),
        (60, ("name", "shape", "size", "bar"), "…l.layers.10.mlp.up_proj.weight"[-30:]),
        (50, ("name", "shape", "size"), "….layers.10.mlp.up_proj.weight"[-27:]),
        (40, ("name", "size"), "….layers.10.mlp.up_proj.weight"[-28:]),
        (20, ("name", "size"), "….weight"),
        (10, ("name", "size"), "model.layers.10.mlp.up_proj.weight"),
    ],
)  # fmt: skip
def test_columns_then_names_give_way(width: int, columns: tuple[str, ...], name: str) -> None:
    found = fitted(TABLE, width)
    assert found.columns == columns
    assert found.rows[0][0].lstrip("…").endswith(name.lstrip("…")[1:])
    assert found.rows[1][0] == "head"
    if width >= 20:
        longest = [max(map(len, cells)) for cells in zip(found.columns, *found.rows, strict=True)]
        assert sum(longest) + 2 * len(longest) <= width


def test_wide_letters_are_counted_as_wide() -> None:
    found = fitted(Table(("n", "x"), (("名" * 30, "1"),)), 30)
    assert found.rows[0][0] == "…" + "名" * 12  # 25 columns


def run_in_terminal(columns: int, *arguments: object) -> list[str]:
    """What a terminal of this width is sent, line by line, without colours."""
    code = "from loratool.cli.main import main; main()"
    leader, follower = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-c", code, *map(str, arguments)],
        stdout=follower,
        stderr=subprocess.DEVNULL,
        env={**os.environ, "COLUMNS": str(columns), "TERM": "xterm", "PYTHONIOENCODING": "utf-8"},
    )
    os.close(follower)
    sent = b""
    with open(leader, "rb", buffering=0) as file:  # noqa: PTH123
        while True:
            try:
                chunk = file.read(65536)
            except OSError:  # how Linux tells that the other side is closed
                break
            if not chunk:
                break
            sent += chunk
    assert process.wait(60) == 0
    return re.sub(r"\x1b\[[\d;?]*[a-zA-Z]|\r", "", sent.decode()).splitlines()


@pytest.mark.parametrize("columns", [60, 80])
def test_a_table_keeps_to_the_terminal_s_width(columns: int, base: Path, adapter: Path) -> None:
    for path in (base, adapter):
        lines = run_in_terminal(columns, "inspect", path)
        end = next(number for number, line in enumerate(lines) if str(path) in line)
        table = [line for line in lines[:end] if line.strip()]
        assert len(table) > 10
        assert max(map(len, table)) <= columns
        assert any("█" in line for line in table)
        assert len(table) == 2 + len([line for line in table if "proj" in line or "." in line])


def test_names_are_whole_where_there_is_no_terminal(tmp_path: Path) -> None:
    name = f"model.{'x' * 180}.weight"
    save_file({name: torch.ones(2, 2)}, tmp_path / "m.safetensors")
    assert name in done(loratool("inspect", tmp_path / "m.safetensors")).out


class _Stream(io.StringIO):
    def __init__(self, encoding: str) -> None:
        super().__init__()
        self._encoding = encoding

    @property
    def encoding(self) -> str:  # type: ignore[override]
        return self._encoding


@pytest.mark.parametrize(
    ("encoding", "text"), [("utf-8", "██▌ ▁█ …é"), ("ascii", "### _# ...\\xe9")]
)
def test_bars_become_plain_where_the_encoding_has_none(
    encoding: str, text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdout", _Stream(encoding))
    assert output._printable("██▌ ▁█ …é") == text
