"""inspect: what an adapter or a checkpoint is made of."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from loratool.adapter import Adapter
from loratool.checkpoint import Checkpoint
from loratool.errors import UsageError
from loratool.opening import format_of
from loratool.plotting import check_picture
from loratool.plugins import Operand, option
from loratool.reports import Report

_LISTED = 20


@dataclass(frozen=True)
class Inspect:
    """Show what an adapter or a checkpoint is made of. It needs no base.

    An adapter: its base, kinds of updates, ranks, alpha and scale, parameters, norms, and how the
    energy of low-rank updates is spread over the singular values (of experts: what a rank common to
    all of them keeps). What DoRA and IA3 add depends on the base, and has no norm here. A
    checkpoint, by headers alone: architecture, files, types and largest tensors. --json is always
    complete.
    """

    operands: ClassVar[tuple[Operand, ...]] = (Operand("ref", "any"),)
    output: ClassVar[str] = ""

    deep: bool = option(False, "read a checkpoint's values, too: norms and digests")
    all: bool = option(False, f"list every tensor, not only the {_LISTED} largest")

    plot: str | None = option(
        None, "draw it, too, to this .svg or .png file, which is replaced; a checkpoint: with "
        "--deep", metavar="FILE",
    )  # fmt: skip

    def __post_init__(self) -> None:
        if self.plot:
            check_picture(self.plot)

    def run(self, ref: Adapter | Checkpoint) -> Report:
        """Describe an adapter, or a checkpoint.

        Raises:
            InputError: a file cannot be read.
            FormatError: an adapter's manifest is not JSON.
            OutputError: the picture cannot be written.
            UsageError: a picture of a checkpoint's headers is asked for.
        """
        if self.plot and isinstance(ref, Checkpoint) and not self.deep:
            raise UsageError(
                "--plot: headers alone make no picture of a checkpoint: add --deep, which reads "
                "its values"
            )
        report = self._report(ref)
        if self.plot:
            from loratool.plotting.inspection import draw_inspection

            draw_inspection(report.data, Path(self.plot))
        return report

    def _report(self, ref: Adapter | Checkpoint) -> Report:
        limit = None if self.all else _LISTED
        if isinstance(ref, Adapter):
            from loratool.adapter_report import adapter_report

            return adapter_report(ref, _format("adapter_formats", ref.path), limit)
        from loratool.checkpoint_report import checkpoint_report

        return checkpoint_report(
            ref, _format("checkpoint_formats", ref.path), deep=self.deep, limit=limit
        )


def _format(kind: str, path: Path | None) -> str | None:
    """The name of the plugin that opens a path; None for what was computed."""
    return None if path is None else format_of(kind, path)
