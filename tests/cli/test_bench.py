"""loratool bench: a table for people, JSON for machines, a picture, one message on bad input."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from tests.cli.tiny import done, loratool, names, refused
from tests.onnx_graphs import write_text_model

QUICK = ("--warmups", "1", "--repeats", "3", "--threads", "1", "--shape", "2x4")


def test_the_table_has_a_row_for_each_model_and_nothing_is_written(tmp_path: Path) -> None:
    base = write_text_model(tmp_path / "base").parent
    merged = write_text_model(tmp_path / "merged", seed=1).parent
    before = names(tmp_path)
    found = done(loratool("bench", base, merged, *QUICK))
    assert names(tmp_path) == before
    starts = [line.split()[:3] for line in found.out.splitlines() if line.startswith(" ")]
    for row in (["base", "2x4"], ["merged", "2x4"], ["base", "again", "2x4"]):
        assert any(start[: len(row)] == row for start in starts)
    assert "merged against base" in found.out.splitlines()
    assert "equal to the reference's" in found.out


def test_json_and_a_picture(tmp_path: Path) -> None:
    base = write_text_model(tmp_path / "base")
    picture = tmp_path / "out.svg"
    data = done(loratool("bench", base, *QUICK, "--plot", picture, "--json")).data
    assert data["kind"] == "bench" and data["reference"] == "base"
    assert [m["name"] for m in data["results"][0]["models"]] == ["base", "base again"]
    assert "base again" in picture.read_text()


def test_paths_may_hold_what_weights_are_written_with(tmp_path: Path) -> None:
    one = write_text_model(tmp_path / "rank=8").parent
    data = done(loratool("bench", one, *QUICK, "--json")).data
    assert data["reference"] == "rank=8"


def test_bad_input_is_one_message(tmp_path: Path) -> None:
    base = write_text_model(tmp_path / "base").parent
    refused(loratool("bench", base, tmp_path / "none", *QUICK), "none: no such file or directory")
    refused(loratool("bench", base, "--shape", "big"), "--shape big", "16x256", status=2)
    refused(loratool("bench", base, "--strict"), "--strict says nothing of the CPU", status=2)
    refused(loratool("bench"), "Missing argument 'MODEL...'", status=2)
    refused(loratool("bench", base, "--plot", tmp_path / "a.pdf"), "--plot", status=2)


def test_help_imports_neither_torch_nor_onnxruntime() -> None:
    code = (
        "import sys; from loratool.cli.main import cli\n"
        "try: cli.main(['bench', '--help'])\n"
        "except SystemExit: pass\n"
        "heavy = {'torch', 'numpy', 'onnx', 'onnxruntime', 'transformers', 'matplotlib'}\n"
        "print('heavy:', sorted(heavy & set(sys.modules)))"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "MODEL..." in found.stdout
    assert found.stdout.splitlines()[-1] == "heavy: []"
