"""A base that is left out on the command line, because the adapters name it."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from functools import cache
from typing import TYPE_CHECKING, Any

import click

from loratool.adapter import Adapter
from loratool.checkpoint import Checkpoint
from loratool.cli.output import print_error
from loratool.errors import InputError
from loratool.plugins import Step
from loratool.refs import parse_weighted
from loratool.reports import format_bytes

if TYPE_CHECKING:
    from loratool.opening import Located

Refs = dict[str, list[tuple[str, float]]]
_UNASKED = 1 << 30  # more is not downloaded without a word of the user's


@cache
def located(text: str) -> Located:
    """`locate`, once a run for every reference."""
    from loratool.opening import locate

    return locate(text)


def without_base(cls: type[Step], refs: Refs) -> Refs:
    """The references of a step with a base and adapters, where the base may be left out.

    `merge ADAPTER...` is `merge BASE ADAPTER...` without the base.

    Raises:
        UsageError: of click: an operand is missing.
    """
    from loratool.opening import is_adapter

    operands = {operand.name: operand for operand in cls.operands}
    if "adapters" not in operands:
        return refs
    if not refs["base"]:
        raise click.UsageError("Missing argument 'BASE' or 'ADAPTER'.")
    text, weight = parse_weighted(refs["base"][0][0])
    if is_adapter(located(text)):
        return {"base": [], "adapters": [(text, weight), *refs["adapters"]]}
    if text != refs["base"][0][0]:
        raise click.UsageError(f"{text} is no adapter: a base has no weight")
    if operands["adapters"].required and not refs["adapters"]:
        raise click.UsageError("Missing argument 'ADAPTER'.")
    return refs


def open_named_base(inputs: Mapping[str, Any], is_read: bool, yes: bool) -> Checkpoint:
    """Open the base that the adapters among a step's inputs name, and ask before it is fetched.

    Args:
        inputs: the step's opened operands.
        is_read: whether the base's values will be read, and not only its headers.
        yes: do not ask.

    Raises:
        InputError: they name no base, or it is large and nobody can be asked.
        MismatchError: they name different ones.
    """
    from loratool.base_names import base_of
    from loratool.files import absent_bytes
    from loratool.opening import open_checkpoint

    adapters: list[Adapter] = [adapter for adapter, _ in inputs.get("adapters", ())]
    if isinstance(one := inputs.get("adapter"), Adapter):
        adapters.append(one)
    ref = base_of(adapters)
    base = open_checkpoint(ref)
    needed = absent_bytes(base.path) if is_read and base.path is not None else 0
    todo = f", {format_bytes(needed)} to download" if needed else ""
    print_error(f"base: {ref.text}, {format_bytes(base.nbytes)}{todo}", "Note")
    if needed and not yes:
        _ask(ref.text, needed)
    return base


def _ask(name: str, needed: int) -> None:
    if _is_a_person_there():
        click.confirm(f"Download {format_bytes(needed)}?", abort=True, err=True)
    elif needed > _UNASKED:
        raise InputError(
            f"{name}: {format_bytes(needed)} would be downloaded: agree by --yes, or give the base"
        )


def _is_a_person_there() -> bool:
    return sys.stdin.isatty() and sys.stderr.isatty()
