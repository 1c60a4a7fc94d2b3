"""Where output goes: never over something by accident, whole or not at all, named after inputs."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest

from loratool import places, writer
from tests.cli.tiny import Result, done, loratool, names, refused, snapshot, unchanged

Verb = Callable[..., Result]


def extract(inputs: Path, output: Path, *options: str) -> Result:
    return loratool("extract", inputs / "base", inputs / "tuned", "-o", output, *options)


def merge(inputs: Path, output: Path, *options: str) -> Result:
    return loratool("merge", inputs / "base", inputs / "adapter", "-o", output, *options)


def export(inputs: Path, output: Path, *options: str) -> Result:
    return loratool("export", inputs / "base", inputs / "adapter", "-o", output, *options)


class Disk(NamedTuple):
    total: int
    used: int
    free: int


@pytest.mark.parametrize("verb", [extract, merge, export])
def test_a_folder_with_something_in_it_is_left_alone(
    verb: Verb, inputs: Path, tmp_path: Path
) -> None:
    taken = tmp_path / "taken"
    taken.mkdir()
    (taken / "precious.txt").write_text("mine")
    with unchanged(tmp_path):
        refused(verb(inputs, taken), taken, "not empty", "--overwrite")


@pytest.mark.parametrize("verb", [extract, merge])
def test_overwrite_replaces_it(verb: Verb, inputs: Path, tmp_path: Path) -> None:
    taken = tmp_path / "taken"
    taken.mkdir()
    (taken / "old.txt").write_text("old")
    done(verb(inputs, taken, "--overwrite"))
    assert not (taken / "old.txt").exists()
    assert list(taken.glob("*.safetensors"))
    assert list(tmp_path.iterdir()) == [taken]


def test_overwrite_keeps_the_old_output_when_the_run_fails(inputs: Path, tmp_path: Path) -> None:
    taken = tmp_path / "taken"
    done(merge(inputs, taken))
    with unchanged(tmp_path):
        result = loratool("extract", inputs / "base", inputs / "base", "-o", taken, "--overwrite")
        refused(result, "identical")


def test_an_empty_folder_is_used(inputs: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    done(merge(inputs, tmp_path / "out"))
    assert (tmp_path / "out" / "model.safetensors").is_file()


def test_missing_parents_are_created(inputs: Path, tmp_path: Path) -> None:
    done(merge(inputs, tmp_path / "a" / "b" / "out"))
    assert names(tmp_path / "a") == ["b"]
    assert names(tmp_path / "a" / "b") == ["out"]


def test_a_link_is_followed(inputs: Path, tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "real" / "old.txt").write_text("old")
    (tmp_path / "link").symlink_to("real")
    done(merge(inputs, tmp_path / "link", "--overwrite"))
    assert (tmp_path / "link").is_symlink()
    assert names(tmp_path / "real") == ["config.json", "model.safetensors"]
    assert names(tmp_path) == ["link", "real"]


@pytest.mark.parametrize("overwrite", [(), ("--overwrite",)])
@pytest.mark.parametrize("verb", [extract, merge, export])
def test_a_file_is_never_replaced(
    verb: Verb, overwrite: tuple[str, ...], inputs: Path, tmp_path: Path
) -> None:
    file = tmp_path / "file"
    file.write_text("mine")
    (tmp_path / "dangling").symlink_to("nowhere")
    with unchanged(tmp_path):
        refused(verb(inputs, file, *overwrite), file, "not a directory")
        refused(verb(inputs, tmp_path / "dangling", *overwrite), "not a directory")
        refused(verb(inputs, file / "out", *overwrite), file, "not a directory")
    assert (tmp_path / "dangling").is_symlink()


def test_overwrite_never_removes_an_input(inputs: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(inputs, tmp_path / "inputs")
    with unchanged(copy):
        for place in (copy, copy / "base", copy / "adapter", copy / "base" / ".." / "base"):
            refused(merge(copy, place, "--overwrite"), place, "input", "choose another -o")
        file = copy / "tuned" / "model.safetensors"
        result = loratool("extract", copy / "base", file, "-o", copy / "tuned", "--overwrite")
        refused(result, "holds the input")


def test_overwrite_never_removes_where_one_works(
    inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "work").mkdir()
    (tmp_path / "work" / "file").touch()
    monkeypatch.chdir(tmp_path / "work")
    with unchanged(tmp_path):
        for place in (Path(), tmp_path, Path("..")):
            refused(merge(inputs, place, "--overwrite"), "would remove", tmp_path / "work")
    monkeypatch.chdir("/")
    monkeypatch.setenv("HOME", str(tmp_path))
    with unchanged(tmp_path):
        refused(merge(inputs, tmp_path, "--overwrite"), "would remove", tmp_path)


def test_a_mount_point_is_refused(
    inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mounted = tmp_path / "mounted"
    mounted.mkdir()
    monkeypatch.setattr(Path, "is_mount", lambda path: path == mounted)
    refused(merge(inputs, mounted), mounted, "mount point", "below it")


@pytest.mark.parametrize("verb", [extract, merge, export])
def test_a_disk_too_small_is_noticed_before_writing(
    verb: Verb, inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(places.shutil, "disk_usage", lambda path: Disk(10**9, 10**9, 1000))
    with unchanged(tmp_path):
        result = verb(inputs, tmp_path / "new" / "out")
        refused(result, tmp_path, "needed", "1000 B are free", "nothing was written")


def test_a_disk_that_becomes_full_is_told(
    inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> int:
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr(writer.os, "pwrite", full)
    with unchanged(tmp_path):
        refused(merge(inputs, tmp_path / "new" / "out"), tmp_path / "new" / "out", "No space left")


def test_a_place_that_cannot_be_written_is_told(
    inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def denied(*_: object, **__: object) -> str:
        raise PermissionError(13, os.strerror(13), str(tmp_path))

    monkeypatch.setattr(places.tempfile, "mkdtemp", denied)  # root may write everywhere
    with unchanged(tmp_path):
        refused(merge(inputs, tmp_path / "a" / "out"), tmp_path / "a" / "out", "Permission denied")
    refused(merge(inputs, tmp_path / ("x" * 300)), "x" * 300, "File name too long")


def test_an_input_that_disappears_is_named(
    inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy = shutil.copytree(inputs, tmp_path / "inputs")
    monkeypatch.chdir(tmp_path)

    def vanish(*_: object) -> int:
        raise FileNotFoundError(2, os.strerror(2), "inputs/base/model.safetensors")

    monkeypatch.setattr(writer.os, "pwrite", vanish)
    with unchanged(tmp_path):
        refused(merge(copy, Path("out")), "inputs/base/model.safetensors", "cannot be read")


def test_default_names_come_from_the_inputs(
    inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(inputs, "in")
    assert "Extracted tuned-lora\n" in done(loratool("extract", "in/base", "in/tuned/")).out
    assert "Merged base-merged\n" in done(loratool("merge", "in/base", "tuned-lora=1")).out
    with unchanged(tmp_path):
        refused(loratool("merge", "in/base", "tuned-lora"), "base-merged", "not empty")
    assert names(Path()) == ["base-merged", "in", "tuned-lora"]
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    done(loratool("extract", "../in/base", "../in/tuned/model.safetensors"))
    done(loratool("extract", tmp_path / "in" / "base", "../in/base/../tuned"))
    assert names(Path()) == ["model-lora", "tuned-lora"]
    monkeypatch.chdir(tmp_path / "in" / "tuned")
    done(loratool("extract", "../base", "."))
    assert (tmp_path / "in" / "tuned" / "tuned-lora").is_dir()


@pytest.mark.parametrize("executor", ["serial", "threads:workers=1", "threads:workers=3"])
def test_the_executor_changes_no_byte(executor: str, inputs: Path, tmp_path: Path) -> None:
    done(extract(inputs, tmp_path / "adapter", "--executor", executor))
    found, wanted = snapshot(tmp_path / "adapter"), snapshot(inputs / "adapter")
    assert found.keys() == wanted.keys()
    for name in wanted.keys() - {"loratool.json"}:
        assert found[name] == wanted[name], name
    done(merge(inputs, tmp_path / "one", "--executor", executor))
    done(merge(inputs, tmp_path / "other"))
    assert snapshot(tmp_path / "one") == snapshot(tmp_path / "other")
