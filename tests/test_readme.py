"""What README.md shows is what happens."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from fixtures.weights import ROOT, fetch

README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    fetch()
    folder = tmp_path_factory.mktemp("readme")
    (folder / ".cache").symlink_to(ROOT / ".cache")
    return folder


def run(command: list[str], folder: Path) -> str:
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(
        command,
        cwd=folder,
        env={**os.environ, "PATH": path},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout
    return done.stdout


def normalized(text: str) -> str:
    """Numbers may differ from CPU to CPU; white space and empty lines do not count."""
    lines = [" ".join(re.sub(r"[\d.e+-]*\d", "N", line).split()) for line in text.splitlines()]
    return "\n".join(line for line in lines if line)


def matches(found: str, shown: str) -> bool:
    """Whether the output is what is shown; a line of dots stands for any lines."""
    pattern = re.escape(normalized(shown)).replace(r"\.\.\.", r"(.*\n)*?.*")
    return re.fullmatch(pattern, normalized(found)) is not None


def test_the_commands_print_what_the_readme_shows(folder: Path) -> None:
    session = "".join(blocks("console"))
    commands = re.split(r"^\$ ", session, flags=re.MULTILINE)[1:]
    settings = ""
    shown = 0
    for entry in commands:
        command, _, expected = entry.partition("\n")
        if not expected.strip():
            settings += f"{command}\n"
            continue
        found = run(["bash", "-ec", settings + command], folder)
        assert matches(found, expected), found
        shown += 1
    assert shown == 14


def test_the_python_example_runs(folder: Path) -> None:
    (example,) = blocks("python")
    assert "of the energy" in run([sys.executable, "-c", example], folder)


def test_the_comparison_can_fail() -> None:
    assert matches("a 1\nb 2\nc 3\n", "a 7\n...\nc 9")
    assert not matches("a 1\nb 2\nc 3\n", "a 7\n...\nd 9")


def test_the_table_of_verbs_is_complete() -> None:
    from loratool import plugins

    named = set(re.findall(r"^\| `loratool (\w+)", README, re.MULTILINE))
    assert named == {*plugins.names("steps"), "plugins"}


def test_the_two_commands_come_first() -> None:
    assert README.index("make demo") < README.index("make test") < README.index("## ")
