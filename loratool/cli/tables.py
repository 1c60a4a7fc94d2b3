"""Tables on a terminal, fitted to its width, and in files, in full."""

from __future__ import annotations

import sys
from collections.abc import Callable

from rich import box
from rich.cells import cell_len
from rich.console import Console
from rich.markup import escape
from rich.table import Table as RichTable

from loratool.reports import Table

# A name is shortened to this before columns are left out, and to the second at the worst.
_NAME_WIDTH, _LEAST_NAME_WIDTH = 24, 8
_GAP, _EDGES = 2, 2  # spaces between columns and around the table, as `_grid` draws it


def print_table(table: Table, printable: Callable[[str], str]) -> None:
    """Print a table to standard output.

    Args:
        table: what to print.
        printable: makes a cell's text fit for the output.
    """
    rows = tuple(tuple(map(printable, row)) for row in table.rows)
    shown = Table(table.columns, rows, table.optional)
    console = Console()
    if sys.stdout.isatty():
        shown = fitted(shown, console.width)
    else:  # nobody looks at a width: everything is told in full
        console.width = max(80, _total_width(shown))
    console.print(_grid(shown))


def fitted(table: Table, width: int) -> Table:
    """The table for `width` columns of text: optional columns dropped, then names shortened."""
    for heading in table.optional:
        if width - _width_beside(table) >= min(_NAME_WIDTH, _width(table, 0)):
            break
        table = _without(table, heading)
    room = width - _width_beside(table)
    if room < _LEAST_NAME_WIDTH:
        return table
    rows = tuple((_shortened(row[0], room), *row[1:]) for row in table.rows)
    return Table(table.columns, rows)


def _without(table: Table, heading: str) -> Table:
    kept = [place for place, column in enumerate(table.columns) if column != heading]
    rows = tuple(tuple(row[place] for place in kept) for row in table.rows)
    return Table(tuple(table.columns[place] for place in kept), rows, table.optional)


def _width(table: Table, place: int) -> int:
    return max(cell_len(cells[place]) for cells in (table.columns, *table.rows))


def _width_beside(table: Table) -> int:
    """What everything but the first column takes."""
    return _EDGES + sum(_GAP + _width(table, place) for place in range(1, len(table.columns)))


def _total_width(table: Table) -> int:
    return _width(table, 0) + _width_beside(table)


def _shortened(name: str, room: int) -> str:
    """The end of a name, which tells more than its beginning, if there is no room for all."""
    if cell_len(name) <= room:
        return name
    while cell_len(name) > room - 1:
        name = name[1:]
    return f"…{name}"


def _grid(table: Table) -> RichTable:
    grid = RichTable(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    for place, column in enumerate(table.columns):
        numeric = place > 0 and all(_is_number(row[place]) for row in table.rows)
        grid.add_column(column, justify="right" if numeric else "left", overflow="fold")
    for row in table.rows:
        grid.add_row(*map(escape, row))
    return grid


def _is_number(cell: str) -> bool:
    return not cell or cell[0].isdigit() or cell in ("-", "no update")
