"""An adapter as a lazy, ordered mapping from parameter names to updates.

Names are the parameters' names in memory of the model class that the adapter was made for
("bert.encoder.layer.0.attention.self.query.weight"). Which tensor of which base that is, is the
business of `loratool.binding`. Nothing here imports torch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Protocol

from loratool.checkpoint import Checkpoint, LazyTensor
from loratool.dtypes import itemsize
from loratool.errors import InputError, Problem
from loratool.files import named
from loratool.updates import LINEAR, WHOLE, Kind, Replacement, Sparse, Update

# Files of a fine-tuned model that an adapter carries under model/.
MODEL_FILES = (
    "config.json", "generation_config.json", "tokenizer*", "special_tokens_map.json",
    "added_tokens.json", "additional_chat_templates/*", "vocab*", "merges.txt", "spiece.model",
    "*.tiktoken", "chat_template*",
    "preprocessor_config.json", "processor_config.json", "sentencepiece*",
)  # fmt: skip


@dataclass(frozen=True)
class LazyUpdate:
    """An update that is read or computed only when asked for.

    Attributes:
        name: the parameter that it changes.
        kind: what `load` gives (`loratool.updates`).
        shape: of the weight that it is for, as the module computes with it: (out, in), or
            (out, in, *kernel); for a replacement, of the new tensor.
        dtype: safetensors name of the factors' or the replacement's dtype.
        load: reads or computes it. None means that there is nothing to change after all: an
            extraction finds out only on reading that a tensor is the same in both models.
        rank: the rank, where headers tell it.
        origin: the file it comes from, for messages.
        transposed: whether the base stores this weight as (in, out) (GPT-2's Conv1D).
            None: the file does not say.
        stored: the tensors that it is made of as they lie in the file, for validation.
        beneath: the adapter's own copy of the tensor that a low-rank update is added to, which
            PEFT keeps for embeddings and heads; it must be the base's.
        optional: whether it is left out where the base has no such tensor (IA3 scales biases
            where there are any).
        rows: which rows of a table are replaced.
        embedding: whether it is for an embedding's table, which formats store in another way.
        axis: of DoRA, 1 if each column of the weight has a magnitude instead of each row.
        entries: how many single entries there are beside the factors, at most.
    """

    name: str
    kind: Kind
    shape: tuple[int, ...]
    dtype: str
    load: Callable[[], Update | None] = field(repr=False, compare=False)
    rank: int | None = None
    origin: str = ""
    transposed: bool | None = None
    stored: tuple[LazyTensor, ...] = ()
    beneath: LazyTensor | None = None
    optional: bool = False
    rows: tuple[int, ...] = ()
    embedding: bool = False
    axis: int = 0
    entries: int = 0

    @property
    def is_linear(self) -> bool:
        """Whether its delta does not depend on the base: it can be scaled, summed, subtracted."""
        return self.kind in LINEAR

    @property
    def is_whole(self) -> bool:
        """Whether it sets values instead of changing them."""
        return self.kind in WHOLE

    @property
    def nbytes(self) -> int:
        """Size of the delta, or of the new tensor, in bytes."""
        return math.prod(self.shape) * itemsize(self.dtype)


def replacement(value: LazyTensor, stored: LazyTensor) -> LazyUpdate:
    """The update that replaces a parameter.

    Args:
        value: the new value, under the parameter's name.
        stored: the tensor that it is made of as it lies in the file.
    """
    return LazyUpdate(
        value.name,
        "replacement",
        value.shape,
        value.dtype,
        lambda: Replacement(value),
        origin=stored.origin,
        stored=(stored,),
    )


def without_entries(update: LazyUpdate) -> LazyUpdate:
    """The low-rank part of an update with single entries; any other one as it is."""
    if update.kind != "sparse":
        return update

    def load() -> Update | None:
        found = update.load()
        return found.added if isinstance(found, Sparse) else found

    return replace(update, kind="low_rank", load=load, stored=(), entries=0)


@dataclass(frozen=True)
class Provenance:
    """How an adapter came to be, in the words of reports and of the model card.

    Attributes:
        doing: "Extracting", while it runs.
        done: "Extracted", when it is done.
        sentence: the model card's first sentence.
        lines: more lines for the report; called after draining.
        sources: update -> what it was made of, for the table ("LoHa update").
        skipped: what an update without anything to write is: "unchanged".
        nothing: the error if there is nothing to write at all.
        lost: ||delta||_F^2 of updates that are left out; called after draining.
    """

    doing: str
    done: str
    sentence: str
    lines: Callable[[], tuple[str, ...]] = tuple
    sources: Mapping[str, str] = field(default_factory=dict)
    skipped: str = "unchanged"
    nothing: str = "base and fine-tune are identical: there is nothing to extract"
    lost: Callable[[], float] = float


# Begins work of so many steps; what it returns is told of each.
Counter = Callable[[str, int], Callable[[str], None]]
# Runs independent tasks and gives their results in order.
Mapper = Callable[[Callable[..., Any], Iterable[Any]], Iterable[Any]]


@dataclass(frozen=True)
class FormatOptions:
    """What a person, or the base, tells of an adapter where its own files are silent.

    Attributes:
        alpha: the numerator of the scale alpha / rank.
        enable_lora: which slots of a fused weight have an update (loralib's MergedLinear).
        fan_in_fan_out: whether the base stores the adapted weights as (in, out).
        base: the model that it is for: its config, and the shapes of its tensors.
    """

    alpha: float | None = None
    enable_lora: tuple[bool, ...] | None = None
    fan_in_fan_out: bool | None = None
    base: Checkpoint | None = None

    def over(self, other: FormatOptions) -> FormatOptions:
        """These, and `other`'s where these say nothing."""
        pairs = ((f.name, getattr(self, f.name), getattr(other, f.name)) for f in fields(self))
        return FormatOptions(**{n: there if here is None else here for n, here, there in pairs})


@dataclass(frozen=True)
class Rereading:
    """How an adapter is read again once more is known of it.

    Attributes:
        options: the names of the `FormatOptions` that its meaning depends on.
        updates: the updates as they were read; when others take their place, this is void.
        read: reads it again.
    """

    options: frozenset[str]
    updates: Mapping[str, LazyUpdate]
    read: Callable[[FormatOptions], Adapter]


class Gathered(Protocol):
    """What updates need of one another, or have in common, and is computed before any of them."""

    @property
    def disk_bytes(self) -> int:
        """What it keeps on the disk at most until all updates are written."""
        ...

    def gather(
        self, folder: Path | None, executor: Any, progress: Callable[[str, int], None]
    ) -> None:
        """Compute it, once.

        Args:
            folder: on whose disk it may keep things; None for the system's temporary files.
            executor: an executor plugin, runs one task a tensor.
            progress: is told each tensor's name and bytes as it is done.
        """
        ...


_READ = Provenance("Writing", "Wrote", "An adapter written by loratool.")


@dataclass(frozen=True)
class Adapter(Mapping[str, LazyUpdate]):
    """Updates by parameter name, with what the base cannot know.

    Attributes:
        updates: parameter name to update, in order.
        model_files: the fine-tuned model's config.json, generation config and tokenizer: relative
            name to where its content is, or to the content itself.
        model_config: the parsed config.json among them, or None.
        dropped: names of base tensors that the fine-tuned model does not have.
        task_type: PEFT's name of the task ("SEQ_CLS"), or None.
        base_name: the base model's Hub id, as far as the adapter says; or a path, or "".
        base_revision: the base's revision on the Hub, or "".
        base_config: the base's config.json where it is known; formats that rearrange weights by
            the model's heads need it.
        context: the tensors of the fine-tuned model by the same names, for formats that can only
            store whole modules; of an adapter read from a file, those that it replaces.
        kinds: parameter name -> the kind of module in the fine-tuned model (`loratool.skeleton`).
        tied: names that the fine-tuned model ties to another parameter -> that parameter.
        moves: (OLD, NEW): parameters whose name is, or starts with, OLD are the base's NEW.
        settings: the adapter's own configuration file, as read.
        problems: what was already wrong with its files on opening.
        left_out: changes that were not asked for: measured and reported, never written.
        naming: "" if names are those of parameters; else whose names they are ("kohya"), to be
            resolved on binding (`loratool.binding`).
        layout: how kohya's names lie in the modules of a diffusion model, as far as it is known:
            name -> (module, its first row, the row after its last) of all rows in order.
        rslora: whether its format should state alpha for the scale alpha / sqrt(rank).
        short_targets: the last part of module names -> every module of the model that ends in it,
            where that is known: formats may name targets by it.
        base_digests: base tensor -> its digest, where the adapter's manifest tells it.
        files: the files that it was read from: name relative to `path` -> where; of an adapter
            that is one file, that file's name.
        format: the adapter format that it is written in where no other is asked for: the one that
            it was read in.
        rereading: how it is read again with what its files do not say; None if they say all.
        provenance: how it was made.
        gathered: what has to be computed before any update is; None where they are independent.
        while_drained: what runs beside the draining, as a context.
        facts: what its maker knows beyond the tensors (seed, digests, ...), for the manifest.
        path: where it was opened, a directory or a file, or None if it was computed.
        prepare: trains all updates together, telling its steps; None where they are not trained.
            The first update that is loaded does it otherwise.
    """

    updates: Mapping[str, LazyUpdate]
    model_files: Mapping[str, Path | bytes] = field(default_factory=dict)
    model_config: Mapping[str, Any] | None = None
    dropped: tuple[str, ...] = ()
    task_type: str | None = None
    base_name: str = ""
    base_revision: str = ""
    base_config: Mapping[str, Any] | None = field(default=None, repr=False)
    context: Mapping[str, LazyTensor] = field(default_factory=dict, repr=False)
    kinds: Mapping[str, str] = field(default_factory=dict, repr=False)
    tied: Mapping[str, str] = field(default_factory=dict)
    moves: tuple[tuple[str, str], ...] = ()
    settings: Mapping[str, Any] = field(default_factory=dict)
    problems: tuple[Problem, ...] = ()
    left_out: Mapping[str, LazyUpdate] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    naming: str = ""
    layout: Mapping[str, tuple[tuple[str, int, int], ...]] = field(default_factory=dict, repr=False)
    rslora: bool = False
    short_targets: Mapping[str, frozenset[str]] = field(default_factory=dict, repr=False)
    base_digests: Mapping[str, str] = field(default_factory=dict, repr=False)
    files: Mapping[str, Path] = field(default_factory=dict, repr=False)
    provenance: Provenance = _READ
    gathered: Gathered | None = field(default=None, repr=False, compare=False)
    facts: Callable[[], Mapping[str, Any]] = field(default=dict, repr=False, compare=False)
    while_drained: Callable[[], AbstractContextManager[None]] = field(
        default=nullcontext, repr=False, compare=False
    )
    format: str = "peft"
    rereading: Rereading | None = field(default=None, repr=False, compare=False)
    path: Path | None = None
    prepare: Callable[[Mapper, Counter], None] | None = field(
        default=None, repr=False, compare=False
    )

    def __getitem__(self, name: str) -> LazyUpdate:
        return self.updates[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.updates)

    def __len__(self) -> int:
        return len(self.updates)

    @property
    def label(self) -> str:
        """How messages call it."""
        return named(str(self.path)) if self.path is not None else "<computed adapter>"

    @property
    def lasting_settings(self) -> dict[str, Any]:
        """What of its configuration still holds when its updates are changed."""
        return {key: True for key in ("ensure_weight_tying",) if self.settings.get(key)}

    def reread(self, options: FormatOptions) -> Adapter:
        """The adapter read again with these facts; itself where its meaning does not need them.

        Raises:
            InputError: its files, or the caller, say already what an option says. A base may
                always be given.
        """
        given = {f.name for f in fields(options) if getattr(options, f.name) is not None}
        again = self.rereading
        if again is None or again.updates is not self.updates:
            wanted: frozenset[str] = frozenset()
        else:
            wanted = again.options
        if useless := sorted(given - wanted - {"base"}):
            flag = f"--{useless[0].replace('_', '-')}"
            raise InputError(f"{self.label}: says itself what {flag} would say: leave that out")
        return again.read(options) if again is not None and given & wanted else self
