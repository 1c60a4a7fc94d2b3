"""The registry: names without imports, strangers' plugins like ours, and none that breaks others.

Distributions are made here as they lie in site-packages: a module and a dist-info directory.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from textwrap import dedent

import pytest

from loratool import plugins
from loratool.errors import FormatError, InputError, PluginError, UsageError
from loratool.opening import locate, open_checkpoint
from tests.cli.tiny import done, entry, loratool, raw_safetensors, refused

Install = Callable[[str, str, Mapping[str, str]], None]

GREETING = """
    from dataclasses import dataclass
    from typing import ClassVar

    from loratool.plugins import Operand, option
    from loratool.reports import Report

    @dataclass(frozen=True)
    class Greet:
        '''Greet a checkpoint. This is told only in the long help.'''

        operands: ClassVar = (Operand("model", "checkpoint"),)
        output: ClassVar = ""

        word: str = option("hello", "what to say")
        loud: bool = option(True, "whether to shout")
        times: int | None = option(None, "how often")
        tags: tuple[str, ...] = option((), "what to add", flag="tag", metavar="TAG")

        def run(self, model):
            text = f"{self.word} {len(model)}" * (self.times or 1) + "".join(self.tags)
            return Report(text.upper() if self.loud else text, {"text": text})
"""


@pytest.fixture(autouse=True)
def fresh_registry() -> Iterator[None]:
    plugins._entries.cache_clear()
    yield
    plugins._entries.cache_clear()


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Install]:
    """Put a distribution on the path: its name, its module's code, its entry points."""
    monkeypatch.syspath_prepend(tmp_path / "site")
    before = set(sys.modules)

    def add(name: str, code: str, declared: Mapping[str, str]) -> None:
        info = tmp_path / "site" / f"{name}-1.0.dist-info"
        info.mkdir(parents=True)
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
        lines = [
            f"[loratool.{key.partition('/')[0]}]\n{key.partition('/')[2]} = {value}\n"
            for key, value in declared.items()
        ]
        (info / "entry_points.txt").write_text("".join(lines))
        (tmp_path / "site" / f"{name}.py").write_text(dedent(code))
        plugins._entries.cache_clear()

    yield add
    for module in set(sys.modules) - before:
        if str(tmp_path) in str(getattr(sys.modules[module], "__file__", "")):
            del sys.modules[module]


@pytest.fixture
def model(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "model.safetensors").write_bytes(raw_safetensors({"a": entry()}))
    return folder


def test_our_own_plugins_are_entry_points() -> None:
    assert {"extract", "validate", "merge", "export"} <= set(plugins.names("steps"))
    assert set(plugins.names("executors")) >= {"serial", "threads"}
    assert plugins.distribution("executors", "serial") == "loratool"


@pytest.mark.parametrize("kind", plugins.KINDS)
def test_every_plugin_is_a_documented_frozen_dataclass_with_documented_options(kind: str) -> None:
    for name in plugins.names(kind):
        cls = plugins.load(kind, name)
        assert (cls.__doc__ or "").strip()
        assert not cls.__doc__.startswith(f"{cls.__name__}(")
        assert cls.__dataclass_params__.frozen
        for field in dataclasses.fields(cls):
            assert not field.init or field.metadata["help"]


def test_an_unknown_kind_or_name_lists_the_known_ones() -> None:
    with pytest.raises(PluginError, match="unknown kind of plugin 'hats'; kinds are steps"):
        plugins.names("hats")
    with pytest.raises(PluginError, match="unknown executor 'magic'; known are serial, threads"):
        plugins.load("executors", "magic")


def test_listing_imports_nothing(install: Install) -> None:
    install("loud", "raise SystemExit('imported')", {"steps/loud": "loud:Loud"})
    assert "loud" in plugins.names("steps")
    assert "loud" not in sys.modules


def test_a_name_of_two_distributions_is_an_error_naming_both(install: Install) -> None:
    install("one", GREETING, {"steps/greet": "one:Greet"})
    install("two", GREETING, {"steps/greet": "two:Greet"})
    with pytest.raises(PluginError, match=r"'greet' is declared by (one, two|two, one)"):
        plugins.load("steps", "greet")
    text = done(loratool("plugins")).out
    assert "BROKEN" in text
    assert "one" in text
    assert "two" in text
    assert "broken" in done(loratool("--help")).out
    refused(loratool("greet", "x", "--word", "y"), "'greet' is declared by", "uninstall one")


def test_a_name_of_ours_taken_by_a_stranger_is_an_error(install: Install) -> None:
    install("taker", GREETING, {"steps/merge": "taker:Greet"})
    refused(loratool("merge", "a", "b"), "'merge' is declared by", "loratool", "taker")
    done(loratool("extract", "--help"))


def test_the_same_distribution_seen_twice_is_no_conflict(
    install: Install, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install("one", GREETING, {"steps/greet": "one:Greet"})
    monkeypatch.syspath_prepend(tmp_path / "second")
    (tmp_path / "second").mkdir()
    (tmp_path / "site" / "one-1.0.dist-info").rename(tmp_path / "kept")
    for place in ("site", "second"):
        info = tmp_path / place / "one-1.0.dist-info"
        info.mkdir()
        for file in (tmp_path / "kept").iterdir():
            (info / file.name).write_bytes(file.read_bytes())
    plugins._entries.cache_clear()
    assert plugins.load("steps", "greet").__name__ == "Greet"


BROKEN = {
    "missing module": ("import no_such_module", "no_such_module"),
    "syntax": ("def (", "SyntaxError"),
    "missing class": ("x = 1", "Greet"),
    "not a class": ("Greet = 3", "not a dataclass"),
    "not a dataclass": ("class Greet: pass", "not a dataclass"),
    "crash": ("1 / 0", "division by zero"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_plugin_that_fails_to_import_is_reported_and_breaks_nothing_else(
    case: str, install: Install, model: Path
) -> None:
    code, word = BROKEN[case]
    kinds = ("steps", "checkpoint_formats", "adapter_formats", "stores", "factorizers", "executors")
    # "aaa" is tried before our own formats and stores.
    install("bad", code, {f"{kind}/aaa": "bad:Greet" for kind in kinds})
    assert list(open_checkpoint(model)) == ["a"]
    lines = done(loratool("plugins")).out.splitlines()
    broken = [line for line in lines if line.split()[:2] == ["aaa", "bad"]]
    assert len(broken) == len(kinds)
    assert all("BROKEN" in line and word in line for line in broken)
    text = done(loratool("--help")).out
    assert "  extract " in text
    assert "broken: `loratool plugins` says why" in " ".join(text.split())
    refused(loratool("aaa", "--any", "thing"), "'aaa' of bad", word)
    assert word in " ".join(done(loratool("aaa", "--help")).out.split())
    refused(loratool("validate", model, "--base", model), "holds no adapter", "'aaa' of bad")


def test_what_no_plugin_can_open_names_the_broken_ones(install: Install, tmp_path: Path) -> None:
    declared = {"checkpoint_formats/odd": "bad:Odd", "stores/far": "bad:Far"}
    install("bad", "import no_such_module", declared)
    with pytest.raises(FormatError, match=r"(?s)holds no checkpoint.*tried:.*'odd' of bad"):
        open_checkpoint(tmp_path)
    with pytest.raises(InputError, match=r"(?s)no such file.*'far' of bad"):
        locate("far/far/away")


def test_a_strangers_step_is_a_command(install: Install, model: Path) -> None:
    install("polite", GREETING, {"steps/greet": "polite:Greet"})
    assert "greet     Greet a checkpoint." in done(loratool("--help")).out
    text = done(loratool("greet", "--help")).out
    assert "told only in the long help" in text
    for option in ("--word TEXT", "--loud / --no-loud", "--times INTEGER", "--tag TAG"):
        assert option in text
    assert done(loratool("greet", model)).out == "HELLO 1\n"
    given = ("--word", "hi", "--no-loud", "--times", 2, "--tag", "!", "--tag", "?")
    assert done(loratool("greet", model, *given)).out == "hi 1hi 1!?\n"
    assert done(loratool("greet", model, "--json")).data == {"text": "hello 1"}
    refused(loratool("greet", model / "nowhere"), "no such file")


@pytest.mark.parametrize(
    "code",
    [
        "@dataclass\nclass Greet:\n    x: int = 0",  # no operands
        "@dataclass\nclass Greet:\n    operands: ClassVar = ()\n    output: ClassVar = ''\n"
        "    x: 'Missing' = 0",
    ],
)
def test_a_step_that_cannot_become_a_command_breaks_no_other(code: str, install: Install) -> None:
    head = "from dataclasses import dataclass\nfrom typing import ClassVar\n"
    install("odd", head + code, {"steps/greet": "odd:Greet"})
    assert "  extract " in done(loratool("--help")).out
    refused(loratool("greet"), "'greet' of odd is no command")


def test_a_step_cannot_hide_the_list_of_plugins(install: Install) -> None:
    install("polite", GREETING, {"steps/plugins": "polite:Greet"})
    assert done(loratool("--help")).out.count("  plugins ") == 1
    assert "executors" in done(loratool("plugins")).out


OPTIONS = """
    from dataclasses import dataclass

    @dataclass(frozen=True)
    class Thing:
        '''A thing.'''

        count: int
        share: float | None = None
        on: bool = False
        text: str = ""
"""


def test_options_of_a_plugin_are_converted_by_their_types(install: Install) -> None:
    install("things", OPTIONS, {"executors/thing": "things:Thing"})
    made = plugins.create("executors", "thing:count=3,share=0.5,on=true,text=a=b:c")
    assert (made.count, made.share, made.on, made.text) == (3, 0.5, True, "a=b:c")
    made = plugins.create("executors", "thing:count=-1,on=false")
    assert (made.count, made.share, made.on) == (-1, None, False)


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ("thing", "thing needs count"),
        ("thing:", "thing needs count"),
        ("thing:count", "no option 'count'"),
        ("thing:size=3", "no option 'size'; options of thing are: count, on, share, text"),
        ("thing:count=x", "count is a number, not 'x'"),
        ("thing:count=1.5", "count is a number"),
        ("thing:count=1,share=much", "share is a number"),
        ("thing:count=1,on=yes", "on is true or false"),
    ],
)
def test_wrong_options_of_a_plugin_are_usage_errors(
    spec: str, words: str, install: Install
) -> None:
    install("things", OPTIONS, {"executors/thing": "things:Thing"})
    with pytest.raises(UsageError) as caught:
        plugins.create("executors", spec)
    assert words in str(caught.value)


@pytest.mark.parametrize("workers", [0, 1, 4])
def test_executors_keep_the_order_and_pass_the_first_error_on(workers: int) -> None:
    for spec in ("serial", f"threads:workers={workers}"):
        executor = plugins.create("executors", spec)
        assert list(executor.map(lambda n: n * n, range(50))) == [n * n for n in range(50)]
        assert list(executor.map(lambda n: n, [])) == []
        seen = []
        with pytest.raises(ZeroDivisionError):
            for value in executor.map(lambda n: 6 // (3 - n), range(100)):
                seen.append(value)
        assert seen == [2, 3, 6]


def test_threads_run_only_a_few_tasks_ahead() -> None:
    begun: list[int] = []
    results = plugins.create("executors", "threads:workers=2").map(begun.append, range(100))
    next(results)
    results.close()
    assert len(begun) <= 8
