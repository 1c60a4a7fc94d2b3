"""The registry of everything that has alternatives, by kind and name.

A plugin is a frozen dataclass declared as an entry point in the group `loratool.KIND`; its name is
the entry point's name and its fields are its options. The project's own plugins are declared like
anybody else's. Listing names imports nothing.
"""

from __future__ import annotations

import dataclasses
import types
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import (
    TYPE_CHECKING,
    Any,
    ClassVar,
    Literal,
    Protocol,
    TypeVar,
    Union,
    get_args,
    get_origin,
    get_type_hints,
)

from loratool.adapter import Adapter, LazyUpdate
from loratool.checkpoint import Checkpoint
from loratool.errors import PluginError, Problem, UsageError
from loratool.linalg import Factorizer, RankPolicy
from loratool.publication import Publication, Published, Publishing
from loratool.refs import Ref
from loratool.updates import Kind, LowRank, Update

if TYPE_CHECKING:
    import torch

KINDS = (
    "steps",
    "adapter_formats",
    "checkpoint_formats",
    "factorizers",
    "combiners",
    "exporters",
    "stores",
    "executors",
)

T = TypeVar("T")
R = TypeVar("R")


@dataclasses.dataclass(frozen=True)
class Operand:
    """An input of a step.

    Attributes:
        name: the parameter of `run`; upper-cased on the command line.
        kind: what is opened for it; "any" for an adapter or else a checkpoint, "text" and "path"
            for nothing: the step gets what was typed.
        many: whether there may be several, each with a weight (`REF=0.7`) unless they are paths.
        required: whether at least one is needed.
        flag: whether it is given as `--name REF` instead of by position.
        help: one line for `--help`, for a flag.
    """

    name: str
    kind: Literal["checkpoint", "adapter", "any", "text", "path"]
    many: bool = False
    required: bool = True
    flag: bool = False
    help: str = ""


class Step(Protocol):
    """A verb: a frozen dataclass whose fields are its options.

    Attributes:
        operands: its inputs, in the order of `run`'s parameters.
        output: the default output directory, with names of operands and of the step's attributes
            in braces; "" if it writes nothing.
        has_tasks: (optional, True if absent) whether an executor runs its work.
        in_place: (optional, False if absent) whether it changes its first operand: its result has
            `apply(drain) -> Report`.
        measures: (optional, False if absent) whether its result reads values for a report: it has
            `notes` and `measure(drain) -> Report`.
        names_base: (optional, False if absent) whether the operand `base` may be left out where
            the adapters name their base.
        needs_base: (optional, True if absent) whether a base that is left out has to be found.
        reads_values: (optional, True if absent) whether the base's values are read.
    """

    operands: ClassVar[tuple[Operand, ...]]
    output: ClassVar[str]

    def run(self, *inputs: Any) -> Any:
        """Check headers and return a lazy Checkpoint, Adapter or export, or a Report."""
        ...


class CheckpointFormat(Protocol):
    """A way to store a model's tensors.

    A format that opens checkpoints with `written_as` set to its own name also has
    `write(checkpoint, folder, executor, progress)`, as `loratool.writer.write_checkpoint`.

    Attributes:
        refines: (optional, empty if absent) the formats whose files it recognises, too, and knows
            more of: where both could open a path, this one does.
    """

    def objection(self, path: Path) -> str:
        """Why the file or directory is not in this format, in a few words; "" if it is.

        By names and headers only.
        """
        ...

    def open(self, path: Path) -> Checkpoint:
        """Open it lazily. Raises InputError or FormatError naming the file."""
        ...


class AdapterFormat(Protocol):
    """A way to store an adapter.

    Attributes:
        carries: the kinds of update that it can hold (`loratool.updates`).
        refines: (optional) as of a `CheckpointFormat`.
        namings: (optional, empty if absent) unresolved names (`Adapter.naming`) that it can write.
        canonical: (optional, False if absent) whether it calls the modules of diffusion models as
            diffusers does ("unet.conv_in"), or by names that these tell.
        library: (optional, "peft" if absent) the Hub's name of the library that loads it.
        usage: (optional) Markdown for the model card: how it is loaded, ADAPTER standing for the
            directory; PEFT's way if absent.
        whole_bytes: (optional) `whole_bytes(adapter, targets, kept)`: bytes of all tensors that it
            stores besides the factors of `targets` where the updates `kept` are kept whole; those
            of the latter if absent.
    """

    carries: ClassVar[frozenset[Kind]]

    def objection(self, path: Path) -> str:
        """Why the file or directory is not in this format, in a few words; "" if it is.

        By names and headers only.
        """
        ...

    def open(self, path: Path) -> Adapter:
        """Open it lazily, collecting what is wrong in `Adapter.problems`."""
        ...

    def refusals(self, adapter: Adapter) -> Iterable[Problem]:
        """What of an adapter it cannot hold although it carries the kind; by headers only."""
        ...

    def write(
        self, adapter: Adapter, results: Iterable[tuple[LazyUpdate, Update | None]], folder: Path
    ) -> tuple[str, ...] | None:
        """Write it into an existing, empty folder.

        Returns:
            What the user should hear of how it was written, if anything.

        Args:
            adapter: what to write; its `updates` are not read, `results` are.
            results: the adapter's updates in order, as they are computed; None where there is
                nothing to change.
            folder: where to write.
        """
        ...


class Combiner(Protocol):
    """A way to make one update of several, pure and deterministic for a given generator.

    Attributes:
        exact: (optional, False if absent) whether, without a policy, the result is the weighted sum
            but for rounding: its factors then get a dtype that keeps it so.
        needs_equal_ranks: (optional, False if absent) whether all parts must have one rank, which
            the result has too; checked by headers.
        combine_vectors: (optional, the weighted sum if absent) combines deltas of a vector, such as
            a bias: given the vectors (n,) in fp64, a weight for each and the generator, it returns
            the result (n,).
    """

    def combine(
        self,
        parts: Sequence[LowRank],
        weights: Sequence[float],
        policy: RankPolicy | None,
        factorizer: Factorizer,
        generator: torch.Generator,
    ) -> LowRank:
        """Combine updates of one tensor.

        Args:
            parts: at least one, all of one shape (out, in), each with its own rank and scale.
            weights: a weight for each.
            policy: the result's rank; None for the combiner's own choice.
            factorizer: makes factors of a dense matrix.
            generator: source of random numbers.

        Returns:
            Factors in fp32 or fp64 with a certificate of what was lost against the combination.
        """
        ...


class Store(Protocol):
    """A place that references point to."""

    def holds(self, ref: Ref) -> bool:
        """Whether this store can resolve the reference."""
        ...

    def fetch(self, ref: Ref) -> Path:
        """The local path of what the reference points to.

        Its files may come only when they are read: see `loratool.files`.

        Raises:
            InputError: it is not there, or cannot be had.
        """
        ...

    def publish(self, publication: Publication, ref: Ref, how: Publishing) -> Published:
        """Put files where the reference points to, all of them at once or none.

        Raises:
            OutputError: the place cannot be written, or holds something else.
            UsageError: the store has nothing that an option of `how` could mean.
        """
        ...


class Executor(Protocol):
    """A way to run independent tasks."""

    def map(self, function: Callable[[T], R], tasks: Iterable[T]) -> Iterator[R]:
        """Yield function(task) in the order of the tasks; the first exception ends it."""
        ...


def option(default: Any, help: str, **extra: Any) -> Any:
    """A dataclass field that is an option: its help, and what the command line needs to know.

    Args:
        default: the default value.
        help: one line for `--help`.
        extra: `flag` (another name than the field's), `short` (a letter), `metavar`, `choices` (a
            tuple of allowed values), `kind` (values are names of this plugin kind).
    """
    return dataclasses.field(default=default, metadata={"help": help, **extra})


@cache
def _entries(kind: str) -> Mapping[str, tuple[EntryPoint, ...]]:
    if kind not in KINDS:
        raise PluginError(f"unknown kind of plugin {kind!r}; kinds are {', '.join(KINDS)}")
    found: dict[str, tuple[EntryPoint, ...]] = {}
    for entry in entry_points(group=f"loratool.{kind}"):
        known = found.get(entry.name, ())
        # The same distribution may be listed twice when it is installed in two places.
        if any(other.value == entry.value for other in known):
            continue
        found[entry.name] = (*known, entry)
    return found


def spelling_of(format: AdapterFormat) -> tuple[Collection[str], bool]:
    """What an adapter format says of the names that it writes: its `namings` and `canonical`."""
    return getattr(format, "namings", ()), getattr(format, "canonical", False)


def names(kind: str) -> tuple[str, ...]:
    """The names of all plugins of a kind, sorted; imports nothing."""
    return tuple(sorted(_entries(kind)))


def distribution(kind: str, name: str) -> str:
    """The distributions that declare a plugin, for `loratool plugins`."""
    return ", ".join(entry.dist.name if entry.dist else "?" for entry in _entries(kind)[name])


def load(kind: str, name: str) -> type[Any]:
    """Import a plugin's class.

    Raises:
        PluginError: no such name, a name declared by two distributions, a failing import, or
            something that is no dataclass.
    """
    entries = _entries(kind).get(name, ())
    if not entries:
        raise PluginError(f"unknown {_singular(kind)} {name!r}; known are {', '.join(names(kind))}")
    if len(entries) > 1:
        raise PluginError(
            f"the {_singular(kind)} {name!r} is declared by {distribution(kind, name)}: "
            "uninstall one of them"
        )
    try:
        found: type[Any] = entries[0].load()
    except Exception as error:
        raise PluginError(
            f"the {_singular(kind)} {name!r} of {distribution(kind, name)} "
            f"cannot be imported: {type(error).__name__}: {error}"
        ) from error
    if not (isinstance(found, type) and dataclasses.is_dataclass(found)):
        raise PluginError(
            f"the {_singular(kind)} {name!r} of {distribution(kind, name)} is not a dataclass"
        )
    return found


def create(kind: str, spec: str) -> Any:
    """Make a plugin from `NAME` or `NAME:key=value,...`.

    Raises:
        PluginError: the plugin cannot be had.
        UsageError: it has no such option, lacks one, or the value is of the wrong type.
    """
    name, _, rest = spec.partition(":")
    cls = load(kind, name)
    fields = {field.name for field in dataclasses.fields(cls)}
    hints = get_type_hints(cls)
    values: dict[str, Any] = {}
    for item in filter(None, rest.split(",")):
        key, sign, text = item.partition("=")
        if not sign or key not in fields:
            known = ", ".join(sorted(fields)) or "none"
            raise UsageError(f"{spec}: no option {key!r}; options of {name} are: {known}")
        values[key] = _convert(spec, key, text, hints[key])
    missing = [
        field.name
        for field in dataclasses.fields(cls)
        if field.name not in values
        and field.default is dataclasses.MISSING
        and field.default_factory is dataclasses.MISSING
    ]
    if missing:
        raise UsageError(f"{spec}: {name} needs {missing[0]}: write {name}:{missing[0]}=...")
    return cls(**values)


def _convert(spec: str, key: str, text: str, hint: Any) -> Any:
    if get_origin(hint) in (Union, types.UnionType):  # int | None
        hint = next(arg for arg in get_args(hint) if arg is not type(None))
    if hint is bool:
        if text not in ("true", "false"):
            raise UsageError(f"{spec}: {key} is true or false, not {text!r}")
        return text == "true"
    for kind in (int, float):
        if hint is kind:
            try:
                return kind(text)
            except ValueError:
                raise UsageError(f"{spec}: {key} is a number, not {text!r}") from None
    return text


def _singular(kind: str) -> str:
    return kind.removesuffix("s").replace("_", " ")
