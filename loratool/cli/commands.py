"""Turns a step's operands and fields into a click command, and runs it."""

from __future__ import annotations

import dataclasses
import inspect
import os
import re
import string
import types
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Union, get_args, get_origin, get_type_hints

import click

from loratool import plugins
from loratool.adapter import Adapter
from loratool.checkpoint import Checkpoint
from loratool.cli.named_base import located, open_named_base, without_base
from loratool.cli.output import ProgressBar, print_error, print_report
from loratool.errors import OutputError, PluginError
from loratool.files import watched_by
from loratool.plugins import Operand, Step
from loratool.refs import parse_ref, parse_weighted
from loratool.reports import Report


def step_command(name: str) -> click.Command:
    """The command of a registered step.

    Raises:
        PluginError: the step cannot be had, or does not say what a command needs to know.
    """
    cls = plugins.load("steps", name)
    try:
        parameters: list[click.Parameter] = [
            _operand(operand, _may_lack(cls, operand)) for operand in cls.operands
        ]
        hints = get_type_hints(cls)
        parameters += [_option(field, hints[field.name]) for field in dataclasses.fields(cls)]
        parameters += _common_options(cls)
    except Exception as error:  # a stranger's class: it must not break the other verbs
        source = plugins.distribution("steps", name)
        raise PluginError(f"the step {name!r} of {source} is no command: {error!r}") from error

    def run(**values: Any) -> None:
        _run(cls, values)

    help_text = inspect.cleandoc(cls.__doc__ or "")
    paragraph = " ".join(help_text.partition("\n\n")[0].split())
    short = f"{paragraph.partition('. ')[0].rstrip('.')}."
    return click.Command(name, params=parameters, callback=run, help=help_text, short_help=short)


def broken_command(name: str, error: PluginError) -> click.Command:
    """Stands for a step that cannot be had: says why, whatever it is called with."""

    def run(**_: Any) -> None:
        raise error

    return click.Command(
        name,
        params=[click.Argument(["ignored"], nargs=-1, metavar="")],
        callback=run,
        help=str(error),
        short_help="(broken: `loratool plugins` says why)",
        context_settings={"ignore_unknown_options": True},
    )


def _may_lack(cls: type[Step], operand: Operand) -> bool:
    """Whether an operand may be left out because adapters name their base."""
    names_base = getattr(cls, "names_base", False)
    return names_base and operand.name in ("base", "adapters")


def _operand(operand: Operand, may_lack: bool) -> click.Parameter:
    required = operand.required and not may_lack
    several = ("..." if operand.kind == "path" else "[=WEIGHT]...") * operand.many
    if operand.flag:
        return click.Option(
            [f"--{operand.name}"],
            required=required,
            multiple=operand.many,
            metavar="REF" + "[=WEIGHT]" * operand.many,
            help=_sentence(
                operand.help
                or f"the {operand.name} {operand.kind}" + may_lack * " (default: the one it names)"
            ),
        )
    label = operand.name.removesuffix("s").upper() + several
    return click.Argument(
        [operand.name],
        nargs=-1 if operand.many else 1,
        required=required and operand.name != "base",
        metavar=label if required else f"[{label}]",
    )


def _option(field: dataclasses.Field[Any], hint: Any) -> click.Option:
    flag = "--" + field.metadata.get("flag", field.name.replace("_", "-"))
    default = field.default
    if field.default_factory is not dataclasses.MISSING:
        default = field.default_factory()
    settings: dict[str, Any] = {
        "help": _sentence(field.metadata.get("help", "")),
        "metavar": field.metadata.get("metavar"),
    }
    if default is dataclasses.MISSING:
        settings["required"] = True
    else:
        settings["default"] = default
        settings["show_default"] = default not in (None, "", (), False)
    inner, many = _value_type(hint)
    if inner is bool:
        names = f"{flag}/--no-{flag.removeprefix('--')}" if default is True else flag
        return click.Option([names, field.name], is_flag=True, **settings)
    choices = field.metadata.get("choices")
    settings["type"] = click.Choice(choices) if choices else inner
    if kind := field.metadata.get("kind"):
        settings["metavar"] = "|".join(plugins.names(kind))
    names = [flag, *(f"-{letter}" for letter in field.metadata.get("short", ""))]
    return click.Option([*names, field.name], multiple=many, **settings)


def _value_type(hint: Any) -> tuple[type, bool]:
    """The type of one value, and whether the option may be repeated."""
    if get_origin(hint) in (Union, types.UnionType):
        hint = next(arg for arg in get_args(hint) if arg is not type(None))
    if get_origin(hint) is tuple:
        return get_args(hint)[0], True
    return hint, False


def _sentence(text: str) -> str:
    return f"{text[:1].upper()}{text[1:]}." if text else ""


def _output_label(output: str) -> str:
    """For people: "{base}-merged" is BASE-merged."""
    return re.sub(r"\{(\w+)\}", lambda match: match[1].upper(), output)


def _common_options(cls: type[Step]) -> list[click.Parameter]:
    options: list[click.Parameter] = []
    if cls.output:
        options += [
            click.Option(
                ["-o", "--output"],
                metavar="DIR",
                help=f"Where to write (default: {_output_label(cls.output)}).",
            ),
            click.Option(
                ["--overwrite"], is_flag=True, help="Replace a directory that is not empty."
            ),
        ]
    if _has_tasks(cls):
        options += [
            click.Option(
                ["--executor"],
                default="threads",
                show_default=True,
                metavar="|".join(plugins.names("executors")),
                help="How tasks are run, with options: threads:workers=4.",
            ),
        ]
    if getattr(cls, "names_base", False):
        options += [
            click.Option(["--yes"], is_flag=True, help="Download a base without asking."),
        ]
    options += [
        click.Option(["--json", "as_json"], is_flag=True, help="Print the report as JSON."),
        click.Option(["-q", "--quiet"], is_flag=True, help="Print warnings and errors only."),
    ]
    return options


def _has_tasks(cls: type[Step]) -> bool:
    """Whether an executor runs the work of a step."""
    works = cls.output or getattr(cls, "in_place", False) or getattr(cls, "measures", False)
    return bool(works) and getattr(cls, "has_tasks", True)


def _run(cls: type[Any], values: dict[str, Any]) -> None:
    located.cache_clear()
    with ProgressBar(bool(values["quiet"] or values["as_json"])) as bar, watched_by(bar):
        report = _report(cls, values, bar)
    print_report(report, bool(values["as_json"]), bool(values["quiet"]))
    if not report.ok:
        raise click.exceptions.Exit(report.status)


def _report(cls: type[Any], values: dict[str, Any], bar: ProgressBar) -> Report:
    step = cls(**{field.name: values[field.name] for field in dataclasses.fields(cls)})
    refs = {operand.name: _refs(operand, values[operand.name]) for operand in cls.operands}
    if getattr(cls, "names_base", False):
        refs = without_base(cls, refs)
    target = _target(step, values, refs)
    # Before any long work; a graft joins others, and finds out itself whether it may.
    if target is not None and not getattr(step, "graft", ""):
        _check_place(target, bool(values["overwrite"]), [r for rs in refs.values() for r in rs])
    if "executor" in values:
        plugins.create("executors", values["executor"])
    if getattr(cls, "in_place", False):
        _complete(refs[cls.operands[0].name][0][0])
    inputs = {operand.name: _open(operand, refs[operand.name]) for operand in cls.operands}
    is_needed = getattr(step, "needs_base", True) or inputs.get("merged") is not None
    if getattr(cls, "names_base", False) and inputs["base"] is None and is_needed:
        is_read = getattr(step, "reads_values", True) or inputs.get("merged") is not None
        inputs["base"] = open_named_base(inputs, is_read, bool(values["yes"]))
    result = step.run(*inputs.values())
    if isinstance(result, Report):
        return result
    if getattr(cls, "in_place", False):
        return _apply(result, values, bar)
    if getattr(cls, "measures", False):
        return _measure(result, values, bar)
    if target is not None:
        return _save(result, target, values, bar)
    raise AssertionError(f"{cls.__name__} has no place for its result")


def _refs(operand: Operand, value: Any) -> list[tuple[str, float]]:
    """What was given for an operand: references with weights."""
    if operand.many and operand.kind == "path":
        return [(text, 1.0) for text in value]
    if operand.many:
        return [parse_weighted(text) for text in value]
    return [] if value is None else [(value, 1.0)]


def _check_place(target: Path, overwrite: bool, refs: list[tuple[str, float]]) -> None:
    """Raise OutputError if `target` is taken, or if replacing it would remove an input."""
    from loratool.places import check_target

    check_target(target, overwrite)
    place = target.resolve()
    for ref, _ in refs:
        path = parse_ref(ref).path
        if path is not None and place in (path.resolve(), *path.resolve().parents):
            raise OutputError(f"{target}: is or holds the input {ref}; choose another -o")


def _open(operand: Operand, refs: list[tuple[str, float]]) -> Any:
    from loratool.opening import Located, open_adapter, open_any, open_checkpoint

    if operand.kind in ("text", "path"):
        typed = [text for text, _ in refs]
        return typed if operand.many else next(iter(typed), None)
    openers: dict[str, Callable[[Located], Any]] = {
        "checkpoint": open_checkpoint, "adapter": open_adapter, "any": open_any,
    }  # fmt: skip
    opener = openers[operand.kind]
    if operand.many:
        return [(opener(located(ref)), weight) for ref, weight in refs]
    return opener(located(refs[0][0])) if refs else None


def _complete(ref: str) -> None:
    """Finish an earlier run that was killed while it changed its operand in place."""
    from loratool.inplace import complete

    path = parse_ref(ref).path
    if path is not None and complete(path):
        print_error(f"{path}: an interrupted switch was completed first", "Note")


def _target(
    step: Step, values: Mapping[str, Any], refs: Mapping[str, list[tuple[str, float]]]
) -> Path | None:
    if not step.output:
        return None
    if values["output"]:
        return Path(values["output"])
    names = {name: _short_name(given[0][0]) for name, given in refs.items() if given}
    if "adapters" in names:  # name it, where the base was left out
        names.setdefault("base", names["adapters"])
    for _, name, _, _ in string.Formatter().parse(step.output):
        if name and name not in names:
            names[name] = str(getattr(step, name))
    return Path(step.output.format(**names))


def _short_name(ref: str) -> str:
    """What an output is named after: the last part of a path or of a Hub name."""
    parsed = parse_ref(ref)
    path = Path(os.path.normpath(Path(parsed.path or parsed.repo or ref).absolute()))
    return (path.stem if path.is_file() else path.name) or "model"


def _apply(result: Any, values: Mapping[str, Any], bar: ProgressBar) -> Report:
    """Change an operand in place."""
    from loratool.engine import Drain

    for note in result.notes:
        print_error(note, "Note")
    drain = Drain(values["executor"], start=bar.start, progress=bar.advance, alone=True)
    report: Report = result.apply(drain)
    return report


def _measure(result: Any, values: Mapping[str, Any], bar: ProgressBar) -> Report:
    """Read values, and write nothing but a report."""
    from loratool.engine import Drain

    for note in result.notes:
        print_error(note, "Note")
    executor = values.get("executor", "serial")
    drain = Drain(executor, start=bar.start, progress=bar.advance, count=bar.count)
    report: Report = result.measure(drain)
    return report


def _save(result: Any, target: Path, values: Mapping[str, Any], bar: ProgressBar) -> Report:
    from loratool.engine import Drain, save_adapter, save_checkpoint

    for note in getattr(result, "notes", ()):
        print_error(note, "Note")
    executor = values.get("executor", "serial")
    drain = Drain(executor, bool(values["overwrite"]), bar.start, bar.advance, True, bar.count)
    if isinstance(result, Adapter):
        return _told(save_adapter(result, target, drain))
    if isinstance(result, Checkpoint):
        return _told(save_checkpoint(result, target, drain))
    report: Report = result.write(target, drain)
    return report


def _told(report: Report) -> Report:
    """The report without notes that were printed before the work began."""
    return dataclasses.replace(report, notes=())
