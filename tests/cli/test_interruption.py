"""Runs that are stopped half-way, and runs that meet: never a half-written output."""

from __future__ import annotations

import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cli.tiny import Result, done, finish, loratool, names, refused, start, unchanged

# An executor that stops after two tensors until it is told to go on. It is registered as a
# stranger's plugin would be: by the metadata of a distribution on the path.
_PLUGIN = """
import os, pathlib, time
from dataclasses import dataclass

@dataclass(frozen=True)
class Stalling:
    folder: str = ""

    def map(self, function, tasks):
        folder = pathlib.Path(self.folder)
        for number, task in enumerate(tasks):
            yield function(task)
            if number == 1:
                (folder / f"{os.getpid()}.reached").touch()
                while not (folder / "go").exists():
                    time.sleep(0.01)
"""


@pytest.fixture
def stalling(tmp_path: Path) -> Iterator[Path]:
    """The directory of the plugin, where it leaves word of itself."""
    folder = tmp_path / "stalling"
    info = folder / "stalling-1.0.dist-info"
    info.mkdir(parents=True)
    (folder / "stalling.py").write_text(_PLUGIN)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: stalling\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[loratool.executors]\nstalling = stalling:Stalling\n")
    yield folder
    (folder / "go").touch()


def begin(stalling: Path, verb: str, inputs: Path, *options: object) -> subprocess.Popen[str]:
    """A run that has written a part of its output and waits."""
    second = "tuned" if verb == "extract" else "adapter"
    given = (verb, inputs / "base", inputs / second, *options)
    process = start(*given, "--executor", f"stalling:folder={stalling}", PYTHONPATH=stalling)
    deadline = time.monotonic() + 60
    while not (stalling / f"{process.pid}.reached").exists():
        if process.poll() is not None or time.monotonic() > deadline:
            process.kill()
            raise AssertionError(finish(process))
        time.sleep(0.01)
    return process


def release(stalling: Path, process: subprocess.Popen[str]) -> Result:
    (stalling / "go").touch()
    return finish(process)


@pytest.mark.parametrize(
    ("verb", "kind"),
    [("extract", signal.SIGINT), ("merge", signal.SIGINT), ("merge", signal.SIGTERM)],
)
def test_ctrl_c_and_terminate_leave_nothing(
    verb: str, kind: signal.Signals, inputs: Path, stalling: Path, tmp_path: Path
) -> None:
    place = tmp_path / "place"
    process = begin(stalling, verb, inputs, "-o", place / "new" / "out")
    assert names(place / "new")
    process.send_signal(kind)
    result = finish(process)
    assert result.status == 1
    assert result.err.strip() == "Error: interrupted; nothing was written"
    assert not place.exists()


def test_ctrl_c_keeps_the_output_that_was_to_be_replaced(
    inputs: Path, stalling: Path, tmp_path: Path
) -> None:
    place = tmp_path / "place"
    done(loratool("merge", inputs / "base", inputs / "adapter", "-o", place / "out"))
    with unchanged(place):
        process = begin(stalling, "merge", inputs, "-o", place / "out", "--overwrite")
        process.send_signal(signal.SIGINT)
        assert finish(process).status == 1


@pytest.mark.parametrize("verb", ["extract", "merge"])
def test_kill_leaves_no_output_and_the_next_run_cleans_up(
    verb: str, inputs: Path, stalling: Path, tmp_path: Path
) -> None:
    place = tmp_path / "place"
    place.mkdir()
    (place / "out.partial-mine").mkdir()
    process = begin(stalling, verb, inputs, "-o", place / "out")
    process.kill()
    assert finish(process).status == -signal.SIGKILL
    assert not (place / "out").exists()
    (leftover,) = set(names(place)) - {"out.partial-mine"}
    assert leftover.startswith(".out.partial-")
    # A run for another place leaves it alone; the next one for this place does not.
    done(loratool("merge", inputs / "base", inputs / "adapter", "-o", place / "other"))
    assert leftover in names(place)
    done(loratool("merge", inputs / "base", inputs / "adapter", "-o", place / "out"))
    assert names(place) == ["other", "out", "out.partial-mine"]


def test_two_runs_for_one_place_do_not_disturb_each_other(
    inputs: Path, stalling: Path, tmp_path: Path
) -> None:
    place = tmp_path / "place"
    first = begin(stalling, "merge", inputs, "-o", place / "out")
    second = begin(stalling, "merge", inputs, "-o", place / "out")
    assert len(names(place)) == 2
    results = [release(stalling, first), finish(second)]
    winner, loser = sorted(results, key=lambda result: result.status)
    done(winner)
    refused(loser, place / "out", "not empty")
    assert names(place) == ["out"]
    assert names(place / "out") == ["config.json", "model.safetensors"]


def test_two_runs_that_overwrite_one_place_both_succeed(
    inputs: Path, stalling: Path, tmp_path: Path
) -> None:
    place = tmp_path / "place"
    options = ("-o", place / "out", "--overwrite")
    first = begin(stalling, "merge", inputs, *options)
    second = begin(stalling, "merge", inputs, *options)
    done(loratool("merge", inputs / "base", inputs / "adapter", *options))
    assert len(names(place)) == 3
    done(release(stalling, first))
    done(finish(second))
    assert names(place) == ["out"]
    assert names(place / "out") == ["config.json", "model.safetensors"]
