"""Turns a step's operands and fields into a click command, and runs it."""

from __future__ import annotations

import dataclasses
import types
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Union, get_args, get_origin, get_type_hints

import click

from loratool import plugins
from loratool.adapter import Adapter
from loratool.checkpoint import Checkpoint
from loratool.cli.output import ProgressBar, print_error, print_report
from loratool.plugins import Operand, Step
from loratool.refs import parse_weighted
from loratool.reports import Report


def step_command(name: str) -> click.Command:
    """The command of a registered step."""
    cls = plugins.load("steps", name)
    parameters: list[click.Parameter] = [_operand(operand) for operand in cls.operands]
    hints = get_type_hints(cls)
    parameters += [_option(field, hints[field.name]) for field in dataclasses.fields(cls)]
    parameters += _common_options(cls)

    def run(**values: Any) -> None:
        _run(cls, values)

    help_text = (cls.__doc__ or "").strip()
    return click.Command(name, params=parameters, callback=run, help=help_text)


def _operand(operand: Operand) -> click.Parameter:
    if operand.flag:
        return click.Option(
            [f"--{operand.name}"],
            required=operand.required,
            metavar="REF",
            help=f"The {operand.name} {operand.kind}: a path or a reference.",
        )
    label = operand.name.removesuffix("s").upper() + "[=WEIGHT]..." * operand.many
    return click.Argument(
        [operand.name],
        nargs=-1 if operand.many else 1,
        required=operand.required,
        metavar=label if operand.required else f"[{label}]",
    )


def _option(field: dataclasses.Field[Any], hint: Any) -> click.Option:
    flag = "--" + field.name.replace("_", "-")
    settings: dict[str, Any] = {
        "help": _sentence(field.metadata["help"]),
        "default": field.default,
        "show_default": field.default not in (None, "", (), False),
        "metavar": field.metadata.get("metavar"),
    }
    inner, many = _value_type(hint)
    if inner is bool:
        return click.Option([flag, field.name], is_flag=True, **settings)
    choices = field.metadata.get("choices")
    settings["type"] = click.Choice(choices) if choices else inner
    if kind := field.metadata.get("kind"):
        settings["metavar"] = "|".join(plugins.names(kind))
    return click.Option([flag, field.name], multiple=many, **settings)


def _value_type(hint: Any) -> tuple[type, bool]:
    """The type of one value, and whether the option may be repeated."""
    if get_origin(hint) in (Union, types.UnionType):
        hint = next(arg for arg in get_args(hint) if arg is not type(None))
    if get_origin(hint) is tuple:
        return get_args(hint)[0], True
    return hint, False


def _sentence(text: str) -> str:
    return text[0].upper() + text[1:] + "."


def _common_options(cls: type[Step]) -> list[click.Parameter]:
    options: list[click.Parameter] = []
    if cls.output:
        options += [
            click.Option(
                ["-o", "--output"],
                metavar="DIR",
                help=f"Where to write (default: {cls.output.upper()}).",
            ),
            click.Option(
                ["--overwrite"], is_flag=True, help="Replace a directory that is not empty."
            ),
            click.Option(
                ["--executor"],
                default="threads",
                show_default=True,
                metavar="|".join(plugins.names("executors")),
                help="How tasks are run.",
            ),
        ]
    options += [
        click.Option(["--json", "as_json"], is_flag=True, help="Print the report as JSON."),
        click.Option(["-q", "--quiet"], is_flag=True, help="Print warnings and errors only."),
    ]
    return options


def _run(cls: type[Any], values: dict[str, Any]) -> None:
    step = cls(**{field.name: values[field.name] for field in dataclasses.fields(cls)})
    target = _target(cls, values)
    overwrite = bool(values.get("overwrite"))
    if target is not None:
        from loratool.writer import check_target

        check_target(target, overwrite)  # before any long work
    inputs = [_open(operand, values[operand.name]) for operand in cls.operands]
    result = step.run(*inputs)
    if isinstance(result, Report):
        report = result
    elif target is not None:
        report = _save(result, target, overwrite, values)
    else:
        raise AssertionError(f"{cls.__name__} has no place for its result")
    print_report(report, bool(values["as_json"]), bool(values["quiet"]))
    if not report.ok:
        raise click.exceptions.Exit(1)


def _open(operand: Operand, value: Any) -> Any:
    from loratool.opening import open_adapter, open_checkpoint

    if not operand.many:
        return open_checkpoint(value) if operand.kind == "checkpoint" else open_adapter(value)
    weighted = [parse_weighted(text) for text in value]
    return [(open_adapter(ref), weight) for ref, weight in weighted]


def _target(cls: type[Step], values: Mapping[str, Any]) -> Path | None:
    if not cls.output:
        return None
    if values["output"]:
        return Path(values["output"])
    names = {
        operand.name: Path(values[operand.name]).absolute().name
        for operand in cls.operands
        if not operand.many
    }
    return Path(cls.output.format(**names))


def _save(result: Any, target: Path, overwrite: bool, values: Mapping[str, Any]) -> Report:
    from loratool.engine import Drain, save_adapter, save_checkpoint

    quiet = bool(values["quiet"] or values["as_json"])
    for note in getattr(result, "notes", ()):
        print_error(note, "Note")
    with ProgressBar(quiet) as bar:
        drain = Drain(values["executor"], overwrite, bar.start, bar.advance)
        if isinstance(result, Adapter):
            return _told(save_adapter(result, target, drain))
        if isinstance(result, Checkpoint):
            save_checkpoint(result, target, drain)
            return _told(result.report(target))  # type: ignore[attr-defined]
        report: Report = result.save(target, drain)
        return report


def _told(report: Report) -> Report:
    """The report without notes that were printed before the work began."""
    return dataclasses.replace(report, notes=())
