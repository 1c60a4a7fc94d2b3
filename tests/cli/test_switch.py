"""switch: in the model's own files, and never half-way."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from loratool.inplace import complete
from loratool.opening import open_checkpoint
from tests.cli.tiny import done, llama, loratool, names, refused, save_model, snapshot, unchanged
from tests.peft_files import random_factors, write_adapter

# Touches one of the three files only: the tensors are dealt out in turn.
SHAPES = {f"model.layers.{layer}.self_attn.q_proj": (16, 16) for layer in range(2)}

_KILLED_AT_RENAME = """
import os, pathlib, sys
left = int(sys.argv.pop(1))
rename = pathlib.Path.rename
def counting(self, target):
    global left
    left -= 1
    if left < 0:
        os._exit(9)
    return rename(self, target)
pathlib.Path.rename = counting
from loratool.cli.main import main
main()
"""


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A base, the adapters a and b, and the base with a merged: returns the latter."""
    base = save_model(tmp_path / "base", llama(), files=3)
    for seed, name in enumerate("ab"):
        write_adapter(tmp_path / name, random_factors(SHAPES, 2, seed))
    merged = tmp_path / "merged"
    done(loratool("merge", base, tmp_path / "a", "--reversible", "-o", merged))
    return merged


@pytest.fixture
def wanted(model: Path, tmp_path: Path) -> Path:
    """The base with b merged at 0.5."""
    out = tmp_path / "wanted"
    done(loratool("merge", tmp_path / "base", f"{tmp_path}/b=0.5", "--reversible", "-o", out))
    return out


def test_it_equals_unmerging_and_merging(model: Path, wanted: Path, tmp_path: Path) -> None:
    before = {path.name: path.stat().st_ino for path in model.glob("*.safetensors")}
    result = done(loratool("switch", model, "--to", f"{tmp_path}/b=0.5"))
    assert "taken out: a=1" in result.out
    assert snapshot(model) == snapshot(wanted)
    after = {path.name: path.stat().st_ino for path in model.glob("*.safetensors")}
    kept = [name for name in before if before[name] == after[name]]
    assert kept, "files that no update touches stay where they are"
    done(loratool("unmerge", model, "-o", tmp_path / "out"))
    assert snapshot(tmp_path / "out") == snapshot(tmp_path / "base")


def test_the_same_again_changes_nothing(model: Path, tmp_path: Path) -> None:
    with unchanged(model):
        assert "already" in done(loratool("switch", model, "--to", tmp_path / "a")).out


def test_json(model: Path, tmp_path: Path) -> None:
    data = done(loratool("switch", model, "--to", tmp_path / "b", "--json")).data
    assert data["kind"] == "switched" and data["files_written"]


def test_files_of_the_adapter_that_goes_go_too_but_not_the_users(tmp_path: Path) -> None:
    base = save_model(tmp_path / "base", llama())
    for seed, name in enumerate("ab"):
        write_adapter(tmp_path / name, random_factors(SHAPES, 2, seed))
    (tmp_path / "a/model").mkdir()
    (tmp_path / "a/model/tokenizer.json").write_text("{}")
    model = tmp_path / "model"
    done(loratool("merge", base, tmp_path / "a", "--reversible", "-o", model))
    (model / "NOTES.md").write_text("mine")
    done(loratool("switch", model, "--to", tmp_path / "b"))
    assert "tokenizer.json" not in names(model)
    assert (model / "NOTES.md").read_text() == "mine"


@pytest.mark.parametrize("renames", range(8))
def test_a_kill_leaves_the_old_model_the_new_one_or_none(
    renames: int, model: Path, wanted: Path, tmp_path: Path
) -> None:
    old = snapshot(model)
    arguments = ["switch", model, "--to", f"{tmp_path}/b=0.5"]
    code = [sys.executable, "-c", _KILLED_AT_RENAME, str(renames), *map(str, arguments)]
    killed = subprocess.run(code, capture_output=True, text=True)
    assert killed.returncode in (0, 9), killed.stderr
    if killed.returncode == 0:
        assert snapshot(model) == snapshot(wanted)
        return
    if not (model / ".loratool-switch/commit.json").exists():
        files = {n: d for n, d in snapshot(model).items() if not n.startswith(".loratool-switch")}
        assert files == old
        open_checkpoint(model)
    else:
        refused(loratool("unmerge", model, "-o", tmp_path / "out"), model, "interrupted")
        mixed = {name: old[name] for name in old if snapshot(model).get(name) != old[name]}
        new = snapshot(wanted)
        if mixed and any(snapshot(model).get(name) != new[name] for name in new):
            assert "config.json" not in names(model), "a loader would take it for a model"
    result = done(loratool(*arguments))
    assert snapshot(model) == snapshot(wanted)
    assert ".loratool-switch" not in names(model), result


def test_completing_needs_no_adapter(model: Path, wanted: Path, tmp_path: Path) -> None:
    code = [sys.executable, "-c", _KILLED_AT_RENAME, "3", "switch", str(model)]
    killed = subprocess.run([*code, "--to", f"{tmp_path}/b=0.5"], capture_output=True, text=True)
    assert killed.returncode == 9
    assert complete(model)
    assert snapshot(model) == snapshot(wanted)
    assert not complete(model)


@pytest.mark.parametrize("how", ["symlink", "hard link", "config"])
def test_shared_files_are_refused(how: str, model: Path, tmp_path: Path) -> None:
    file = model / ("config.json" if how == "config" else _touched(model))
    if how == "symlink":
        file.rename(tmp_path / "blob")
        file.symlink_to(tmp_path / "blob")
    else:
        os.link(file, tmp_path / "twin")
    with unchanged(tmp_path):
        result = loratool("switch", model, "--to", tmp_path / "b")
        refused(result, file, "link" if how == "symlink" else "2 hard links")


def _touched(model: Path) -> str:
    base = model.with_name("base")
    files = sorted(path.name for path in model.glob("*.safetensors"))
    return next(n for n in files if (base / n).read_bytes() != (model / n).read_bytes())


def test_an_edited_model_stays_as_it_is(model: Path, tmp_path: Path) -> None:
    file = model / _touched(model)
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    with unchanged(tmp_path):
        refused(loratool("switch", model, "--to", tmp_path / "b"), "changed after the merge")


def test_what_was_never_merged(model: Path, tmp_path: Path) -> None:
    with unchanged(tmp_path):
        refused(loratool("switch", tmp_path / "base", "--to", tmp_path / "b"), "has no record")
        refused(loratool("switch", model, "--to", tmp_path / "nothing"), "no such file")
        refused(loratool("switch", model), "--to", status=2)
