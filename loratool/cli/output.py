"""What a person sees: progress while it runs, a report at the end, one message on error."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import click

from loratool import plugins
from loratool.errors import PluginError
from loratool.files import named
from loratool.reports import Report, to_json

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

_SMALL_FILE = 1 << 20  # no bar for files that are here at once
# Control characters but the newline, and lone surrogates, which no encoding can write.
_UNPRINTABLE = re.compile("[\x00-\x09\x0b-\x1f\x7f-\x9f\ud800-\udfff]")
# What stands for block characters where they cannot be written.
_PLAIN = {
    **dict(zip(map(ord, "▁▂▃▄▅▆▇█"), "_.-:=+*#", strict=True)),
    **dict.fromkeys(map(ord, "▏▎▍"), ""),
    **dict.fromkeys(map(ord, "▌▋▊▉"), "#"),
    ord("…"): "...",
}


def print_error(message: str, kind: str = "Error") -> None:
    """One message on standard error."""
    click.echo(f"{kind}: {_printable(named(message))}", err=True)


def _printable(text: str) -> str:
    """Names come from strangers' files: what a terminal would obey, or not show, is escaped.

    Bars become plain characters where the output's encoding has no block characters.
    """
    text = _UNPRINTABLE.sub(lambda match: repr(match[0])[1:-1], text)
    encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
    try:
        text.encode(encoding)
    except UnicodeEncodeError:
        return text.translate(_PLAIN).encode(encoding, "backslashreplace").decode(encoding)
    return text


def print_report(report: Report, as_json: bool, quiet: bool) -> None:
    """The report on standard output, its notes on standard error."""
    for note in report.notes:
        print_error(note, "Note")
    if as_json:
        click.echo(to_json(report.data, indent=2))
        return
    if quiet and report.ok:
        return
    if report.table is not None and report.table.rows:
        from loratool.cli.tables import print_table

        print_table(report.table, _printable)
    click.echo(_printable(report.title))
    for line in report.lines:
        click.echo(f"  {_printable(line)}")


def print_plugins() -> None:
    """Every registered plugin: kind, name, distribution, and whether it can be imported."""
    for kind in plugins.KINDS:
        click.echo(kind)
        names = plugins.names(kind)
        width = max(map(len, names), default=0) + 2
        for name in names:
            try:
                state = (plugins.load(kind, name).__doc__ or "").strip().partition("\n")[0]
            except PluginError as error:
                state = f"BROKEN: {error}"
            click.echo(f"  {name:<{width}}{plugins.distribution(kind, name):<12}{state}")


class ProgressBar:
    """A progress bar on a terminal, silence elsewhere."""

    def __init__(self, quiet: bool) -> None:
        self._progress: Progress | None = None
        self._task: TaskID | None = None
        self._quiet = quiet or not sys.stderr.isatty()

    def __enter__(self) -> ProgressBar:
        return self

    def __exit__(self, *_: Any) -> None:
        if self._progress is not None:
            self._progress.stop()

    def start(self, what: str, size: int) -> None:
        """Begin: `size` bytes are to be worked on (0: unknown)."""
        if not self._quiet:
            self._task = self._shown().add_task(what, total=size or None, tensor="")

    def count(self, what: str, total: int) -> Callable[[str], None]:
        """Begin work of so many steps: see `loratool.engine.Drain`."""
        if self._quiet:
            return lambda text: None
        progress = self._shown()
        task = progress.add_task(what, total=total, tensor="", steps=True)

        def advance(text: str) -> None:
            progress.update(task, advance=1, tensor=text)

        return advance

    def begin(self, name: str, size: int) -> Callable[[int], None]:
        """A file begins to come from elsewhere: see `loratool.files.Watcher`."""
        if self._quiet or size < _SMALL_FILE:
            return lambda count: None
        progress = self._shown()
        task = progress.add_task("Downloading", total=size, tensor=name)

        def advance(count: int) -> None:
            progress.update(task, advance=count)
            progress.update(task, visible=not progress.tasks[int(task)].finished)

        return advance

    def _shown(self) -> Progress:
        if self._progress is not None:
            return self._progress
        from rich.console import Console
        from rich.progress import (
            BarColumn,
            DownloadColumn,
            Progress,
            Task,
            TextColumn,
            TimeRemainingColumn,
        )
        from rich.text import Text

        class SizeColumn(DownloadColumn):
            """Bytes, or steps."""

            def render(self, task: Task) -> Text:
                if not task.fields.get("steps"):
                    return super().render(task)
                return Text(f"{task.completed:.0f}/{task.total:.0f}", style="progress.download")

        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            SizeColumn(binary_units=True),
            TimeRemainingColumn(),
            TextColumn("{task.fields[tensor]}", style="dim"),
            console=Console(stderr=True),
            transient=True,
        )
        self._progress.start()
        return self._progress

    def advance(self, name: str, size: int) -> None:
        """One more tensor is done."""
        if self._progress is not None and self._task is not None:
            self._progress.update(self._task, advance=size, tensor=name)
