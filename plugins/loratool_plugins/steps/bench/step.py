"""bench: how fast ONNX models run, one beside the other."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from loratool.errors import UsageError
from loratool.plotting import check_picture
from loratool.plugins import Operand, option
from loratool_plugins.steps.bench.shapes import parse_shapes

if TYPE_CHECKING:
    from loratool_plugins.steps.bench.trial import Trial

# The keys of `sessions.PROVIDERS`, which imports ONNX Runtime.
_PROVIDERS = ("cpu", "cuda", "webgpu", "dml", "coreml")
_LEAST_REPEATS = 3


@dataclass(frozen=True)
class Bench:
    """Measure how fast ONNX models run in ONNX Runtime, one beside the other.

    MODELs are folders of ONNX graphs, or .onnx files. All of them are loaded into one process with
    the same options, and run on the same made-up inputs, in rounds: each model once, in random
    order, after warm-ups. What is told of each: median latency, throughput, and the ratio of its
    median to the first model's (or that of --against) with a 95% interval from a paired bootstrap.
    The reference runs in a second session, too: how far its own ratio is from 1 is the noise floor,
    and what lies within it is called no difference.

    Beside that: time and private memory of a load, in processes of their own; disk, in all and of
    files that no other model here needs; and whether nodes are the reference's. A folder of several
    graphs is measured graph by graph: those called prefill, decode, encoder or decoder against the
    reference's of that name; others, as math.onnx and code.onnx, are models of their own. A decode
    graph computes the one token after SEQUENCE others.
    """

    operands: ClassVar[tuple[Operand, ...]] = (Operand("models", "path", many=True),)
    output: ClassVar[str] = ""
    measures: ClassVar[bool] = True
    has_tasks: ClassVar[bool] = False

    against: str | None = option(
        None, "the model that the others are compared with (default: the first)", metavar="MODEL"
    )
    shape: tuple[str, ...] = option(
        ("1x128",), "batch and sequence of the inputs, and tokens in the cache; repeatable",
        metavar="BxS[+PAST]",
    )  # fmt: skip
    adapter: tuple[str, ...] = option(
        (), "an .onnx_adapter: models that take it are measured with it, too; repeatable",
        metavar="FILE",
    )  # fmt: skip
    provider: str = option("cpu", "where to run", choices=_PROVIDERS)
    strict: bool = option(False, "fail if the provider cannot be had, instead of using the CPU")
    threads: int = option(0, "threads of each operator; 0 for ONNX Runtime's choice")
    warmups: int = option(10, "rounds that do not count")
    repeats: int = option(20, "rounds that count")
    limit: float = option(
        60.0, "seconds for each model and shape: rounds that do not fit in are left out"
    )
    seed: int = option(0, "seed of inputs, order and intervals")
    vocab: int | None = option(
        None, "token ids are below this (default: what config.json or the graph says, or 1000)"
    )
    dim: tuple[str, ...] = option(
        (), "size of an axis that is called so in a graph; repeatable", metavar="NAME=SIZE"
    )
    inputs: str | None = option(
        None, "an .npz file of inputs that cannot be made up, by their names", metavar="FILE"
    )
    plot: str | None = option(
        None, "draw it, too, to this .svg or .png file, which is replaced", metavar="FILE"
    )

    def __post_init__(self) -> None:
        if not self.shape:
            raise UsageError("--shape: give at least one, as 1x128")
        parse_shapes(self.shape)
        self._sizes()
        for flag, value, least in (
            ("--threads", self.threads, 0), ("--warmups", self.warmups, 0),
            ("--repeats", self.repeats, _LEAST_REPEATS), ("--seed", self.seed, 0),
            ("--vocab", 1 if self.vocab is None else self.vocab, 1),
        ):  # fmt: skip
            if value < least:
                raise UsageError(f"{flag} must be at least {least}, not {value}")
        if not 0 < self.limit < float("inf"):
            raise UsageError(f"--limit must be a number of seconds above 0, not {self.limit}")
        if self.provider not in _PROVIDERS:
            raise UsageError(f"--provider {self.provider}: use one of {', '.join(_PROVIDERS)}")
        if self.strict and self.provider == "cpu":
            raise UsageError(
                "--strict says nothing of the CPU, which is always there: leave it out"
            )
        if len(set(self.adapter)) < len(self.adapter):
            raise UsageError("--adapter: a file is given twice: leave one out")
        if self.plot:
            check_picture(self.plot)

    def _sizes(self) -> dict[str, int]:
        """The sizes of axes that were given."""
        sizes: dict[str, int] = {}
        for text in self.dim:
            name, sign, size = text.rpartition("=")
            if not sign or not name or not size.isdecimal():
                raise UsageError(f"--dim {text}: write NAME=SIZE, as height=224")
            if sizes.setdefault(name, int(size)) != int(size):
                raise UsageError(f"--dim: {name} has two sizes: give one")
        return sizes

    def run(self, models: Sequence[str]) -> Trial:
        """Read all graphs, without weights, and see that all can be given the same inputs.

        Raises:
            InputError: there is no graph, weights are missing, or inputs cannot be made up.
            FormatError: a file is not what its name says.
            MismatchError: models take other inputs than the reference.
            UsageError: there is no model, or one is given twice.
        """
        if not models:
            raise UsageError("give at least one folder or .onnx file")
        from loratool_plugins.steps.bench.feeds import Making, read_arrays
        from loratool_plugins.steps.bench.lineup import line_up
        from loratool_plugins.steps.bench.rounds import Plan
        from loratool_plugins.steps.bench.sessions import Options
        from loratool_plugins.steps.bench.trial import Trial

        lineup = line_up(
            [Path(model) for model in models],
            None if self.against is None else Path(self.against),
            [Path(adapter) for adapter in self.adapter],
        )
        given = {} if self.inputs is None else read_arrays(Path(self.inputs))
        trial = Trial(
            lineup,
            tuple(parse_shapes(self.shape)),
            Making(self.vocab, self._sizes(), given, self.seed),
            Plan(self.warmups, self.repeats, self.limit, self.seed),
            Options(self.provider, self.threads),
            self.strict,
            self.plot,
        )
        trial.check()
        return trial
