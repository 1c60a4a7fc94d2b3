"""diff: what a fine-tune changed, and which rank would hold it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from loratool import plugins
from loratool.alignment import parse_moves
from loratool.checkpoint import Checkpoint
from loratool.errors import InputError, UsageError
from loratool.pairing import Change, Pair, Selection, pair_models
from loratool.plotting import check_picture
from loratool.plugins import Operand, option
from loratool.reports import Report

if TYPE_CHECKING:
    from loratool.engine import Drain


@dataclass(frozen=True)
class Comparison:
    """Two models laid beside each other; nothing is read yet.

    Attributes:
        step: what was asked for.
        pair: the models.
        changes: what is compared.
    """

    step: Diff
    pair: Pair
    changes: Sequence[Change]

    @property
    def notes(self) -> tuple[str, ...]:
        """What the user should hear."""
        return self.pair.notes

    def measure(self, drain: Drain) -> Report:
        """Read every tensor once, tell what differs, and draw it if that was asked for.

        Raises:
            InputError: a tensor holds NaN or Inf.
            OutputError: the picture cannot be written.
        """
        from loratool.difference_report import Told, difference_report
        from loratool.differences import DifferenceReader
        from loratool.engine import single_threaded_tasks

        step = self.step
        factorizer = None if step.quick else plugins.create("factorizers", step.factorizer)
        reader = DifferenceReader(factorizer, step.max_rank, step.seed)
        executor = plugins.create("executors", drain.executor)
        differences = []
        drain.start("Comparing", sum(map(_nbytes, self.changes)))
        with single_threaded_tasks():
            for found in executor.map(reader.measure, self.changes):
                drain.progress(found.name, _nbytes(found.change))
                differences.append(found)
        told = Told(self._command(), 0 if step.quick else step.max_rank, step.all)
        report = difference_report(self.pair, differences, told)
        if step.plot:
            from loratool.plotting.difference import draw_difference

            draw_difference(report.data, Path(step.plot))
        return report

    def _command(self) -> tuple[str, ...]:
        """The command that extracts the same tensors, but for its rank."""
        step = self.step
        words = ["loratool", "extract", _operand(self.pair.base), _operand(self.pair.finetuned)]
        for flag, values in (
            ("--target", step.target), ("--exclude", step.exclude), ("--map", step.map)
        ):  # fmt: skip
            for value in values:
                words += [flag, value]
        if step.architecture:
            words += ["--architecture", step.architecture]
        if step.embeddings != "whole":
            words += ["--embeddings", step.embeddings]
        return tuple(words)


@dataclass(frozen=True)
class Diff:
    """Show what a fine-tune changed: how much, where, and which rank would hold it.

    For every tensor: the relative norm of its change and the share of changed weights; for every
    matrix the largest singular values of the change, how many of them hold 50, 90 and 99% of its
    energy, and how many stand above the noise of rounding to the fine-tune's type. What lies beyond
    --max-rank is bounded, not guessed. It ends with what all this looks like (a merged LoRA, a
    sparse update, full fine-tuning) and with the command that extracts it at a fitting rank.
    """

    operands: ClassVar[tuple[Operand, ...]] = (
        Operand("base", "checkpoint"),
        Operand("finetuned", "checkpoint"),
    )
    output: ClassVar[str] = ""
    measures: ClassVar[bool] = True

    max_rank: int = option(128, "how many singular values of each matrix to find")
    quick: bool = option(False, "no singular values: norms and counts only")
    target: tuple[str, ...] = option(
        (), "only tensors whose name matches this glob", metavar="GLOB"
    )
    exclude: tuple[str, ...] = option((), "no tensor whose name matches this glob", metavar="GLOB")
    embeddings: str = option(
        "whole", "changed embeddings as extract would keep them: whole, or as low-rank updates",
        choices=("whole", "lowrank"),
    )  # fmt: skip
    map: tuple[str, ...] = option(
        (), "the fine-tune's name or prefix OLD is NEW in the base", metavar="OLD=NEW"
    )
    architecture: str = option("", "model class or type, where config.json does not say")
    factorizer: str = option("krylov", "how to find singular values", kind="factorizers")
    seed: int = option(0, "seed of the factorizer's random start")
    all: bool = option(False, "list every tensor that differs, not kinds of them")
    plot: str | None = option(
        None, "draw it, too, to this .svg or .png file, which is replaced", metavar="FILE"
    )

    def __post_init__(self) -> None:
        if self.max_rank < 1:
            raise UsageError(f"--max-rank must be at least 1, not {self.max_rank}")
        parse_moves(self.map)
        if self.plot:
            check_picture(self.plot)

    def run(self, base: Checkpoint, finetuned: Checkpoint) -> Comparison:
        """Compare headers; nothing is read yet.

        Raises:
            InputError: no tensor is left to compare.
            MismatchError: the two do not belong together.
        """
        if not self.quick:
            plugins.create("factorizers", self.factorizer)
        selection = Selection(
            self.target,
            self.exclude,
            parse_moves(self.map),
            self.architecture,
            lowrank_tables=self.embeddings == "lowrank",
        )
        pair = pair_models(base, finetuned, selection)
        changes = tuple(pair.changes())
        if not changes:
            raise InputError("no tensor is left to compare: check --target and --exclude")
        return Comparison(self, pair, changes)


def _nbytes(change: Change) -> int:
    return change.after.nbytes + (change.before.nbytes if change.before else 0)


def _operand(model: Checkpoint) -> Any:
    return model.hub_name or str(model.path or model.label)
