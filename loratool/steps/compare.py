"""compare: how close adapters bring a base to a fine-tune, on inputs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from loratool.adapter import Adapter
from loratool.alignment import parse_moves
from loratool.checkpoint import Checkpoint
from loratool.dtypes import is_float
from loratool.errors import InputError, UsageError
from loratool.fidelity_report import Entry, Setting, fidelity_report
from loratool.plotting import check_picture
from loratool.plugins import Operand, option
from loratool.reports import Report, listed
from loratool.skeleton import complete_config
from loratool.stack_plan import short_names
from loratool.steps.export import in_class_of
from loratool.steps.merge import Merge
from loratool.steps.rescale import Rescale
from loratool.updates import FACTORED, Replacement, Rows

if TYPE_CHECKING:
    import torch

    from loratool.calibration import Inputs
    from loratool.engine import Drain
    from loratool.running import Model

# Types in which a fine-tune's own answers are rounded: what is closer than that is as good.
_COARSE = {"BF16": "bf16", "F16": "fp16"}
# Of a config, what says nothing about how answers are computed.
_IRRELEVANT = frozenset(
    (
        *("architectures", "dtype", "torch_dtype", "transformers_version", "_name_or_path"),
        *("id2label", "label2id", "use_cache", "vocab_size", "model_type", "problem_type"),
        *("finetuning_task", "quantization_config", "gradient_checkpointing"),
    )
)


@dataclass(frozen=True)
class Contender:
    """A model to be compared, and what it is called.

    Attributes:
        entry: what it is.
        model: opened; its weights are read or computed when it is run.
        keeps: the adapter whose whole tensors make it, for a rank 0.
    """

    entry: Entry
    model: Model
    keeps: Adapter | None = None


@dataclass(frozen=True)
class Trial:
    """Models that are ready to be compared; no weights are read yet.

    Attributes:
        setting: what they are compared on.
        reference: the fine-tune.
        contenders: the others.
        groups: the inputs, as many at a time as can be put aside.
        device: where to compute; None for the CPU.
        plot: the picture to draw, or None.
        notes: what the user should hear.
    """

    setting: Setting
    reference: Model
    contenders: Sequence[Contender]
    groups: Sequence[Inputs]
    device: torch.device | None
    plot: str | None
    notes: tuple[str, ...] = ()

    def measure(self, drain: Drain) -> Report:
        """Run all models, tell how close they are, and draw it if that was asked for.

        Raises:
            InputError: a model cannot be run after all, or gives NaN.
            OutputError: the picture cannot be written, or there is no room for temporary files.
        """
        from loratool.comparing import compare, weight_bytes

        contenders = list(_distinct(self.contenders))
        models = [contender.model for contender in contenders]
        size = len(self.groups) * sum(map(weight_bytes, (self.reference, *models)))
        drain.start("Comparing", size)
        tallies = compare(self.reference, models, self.groups, self.device, drain.progress)
        report = fidelity_report(self.setting, [c.entry for c in contenders], tallies)
        if self.plot:
            from loratool.plotting.fidelity import draw_fidelity

            draw_fidelity(report.data, Path(self.plot))
        return report


@dataclass(frozen=True)
class Compare:
    """Compare a base with adapters to the fine-tune that they should be, on inputs.

    Every model is run as it would be after a merge, and its answers are held against those of the
    fine-tune: KL divergence and agreement of the top class (of logits), cosine, and for each layer
    the relative error of what it hands on. Beside them stand the base as it is, rank 0 (the base
    with what an adapter keeps whole, such as a head, but without the rest), and the fine-tune
    itself, computed once more in its own type where that is not fp32: closer than that is as good.

    --inputs takes texts (.txt, .jsonl, .json), which the model's own tokenizer reads, token ids
    (.npy, .safetensors, .jsonl, .json) or a folder of images. --ranks cuts every adapter to lower
    ranks as `loratool rescale --rank` does, without writing anything.

    All is computed in fp32. Weights are loaded module by module and dropped again, once for each
    model; what the fine-tune answers is kept in a temporary file of at most 8 GiB (TMPDIR says
    where), beyond which the inputs are taken in several passes.
    """

    operands: ClassVar[tuple[Operand, ...]] = (
        Operand("base", "checkpoint"),
        Operand("finetuned", "checkpoint"),
        Operand("adapters", "adapter", many=True),
    )
    output: ClassVar[str] = ""
    measures: ClassVar[bool] = True
    has_tasks: ClassVar[bool] = False

    inputs: str | None = option(
        None, "texts, token ids or images to run the models on (required)", metavar="FILE"
    )
    tokenizer: str | None = option(
        None, "directory of the tokenizer or image processor (default: the model's)", metavar="DIR"
    )
    samples: int = option(128, "use at most so many samples, the first ones")
    length: int | None = option(
        None, "cut samples to so many tokens (default: 512, or the model's positions)"
    )
    ranks: str | None = option(
        None, "compare every adapter cut to these ranks, too", metavar="1,4,16"
    )
    architecture: str = option("", "model class or type, where config.json does not say")
    map: tuple[str, ...] = option(
        (), "the fine-tune's name or prefix OLD is NEW in the base", metavar="OLD=NEW"
    )
    device: str = option("cpu", "where to compute: cpu, cuda, cuda:1, ...")
    plot: str | None = option(
        None, "draw it, too, to this .svg or .png file, which is replaced", metavar="FILE"
    )

    def __post_init__(self) -> None:
        if not self.inputs:
            raise UsageError(
                "--inputs FILE is needed: texts (.txt, .jsonl), token ids (.npy, .safetensors, "
                ".json) or images to run the models on"
            )
        if self.samples < 1:
            raise UsageError(f"--samples must be at least 1, not {self.samples}")
        if self.length is not None and self.length < 1:
            raise UsageError(f"--length must be at least 1, not {self.length}")
        self._ranks()
        parse_moves(self.map)
        if self.plot:
            check_picture(self.plot)

    def _ranks(self) -> list[int]:
        """The ranks to cut to, ascending."""
        words = [] if self.ranks is None else self.ranks.split(",")
        if not all(word.strip().isdecimal() and int(word) > 0 for word in words):
            raise UsageError(f"--ranks {self.ranks}: write ranks from 1 up, as 1,4,16")
        return sorted({int(word) for word in words})

    def run(
        self,
        base: Checkpoint,
        finetuned: Checkpoint,
        adapters: Sequence[tuple[Adapter, float]],
    ) -> Trial:
        """Open every model, read the inputs, and try a few of them; no weights are read yet.

        Raises:
            InputError: a model cannot be run, the inputs cannot be used, or the device is absent.
            MismatchError: an adapter does not fit the base, or cannot be cut.
            UsageError: an option's value makes no sense, or an adapter's weight is 0.
        """
        if not adapters:
            raise UsageError("give at least one adapter")
        from loratool.calibration import Limits, read_inputs
        from loratool.comparing import divide
        from loratool.running import open_model

        device = _device(self.device)
        shapes = {name: tensor.shape for name, tensor in finetuned.items()}
        config, _ = complete_config(finetuned.config, shapes, base.config, self.architecture)
        tuned = finetuned if config is None else finetuned.with_config(config)
        reference = open_model(tuned, architecture=self.architecture)
        lineup = _Lineup(self, base, tuned, reference)
        contenders = list(lineup.contenders(adapters))
        owners = [finetuned, *lineup.merged, base]
        found = read_inputs(
            Path(str(self.inputs)),
            reference,
            Limits(self.samples, self.length, "--length"),
            owners,
            Path(self.tokenizer) if self.tokenizer else None,
        )
        groups = divide(reference, found)
        setting = Setting(
            base.label, finetuned.label, reference.shell.architecture, str(self.inputs), found
        )
        notes = (*base.notes, *finetuned.notes, *reference.notes, *lineup.notes, *found.notes)
        unique = tuple(dict.fromkeys(notes))
        return Trial(setting, reference, contenders, groups, device, self.plot, unique)


class _Lineup:
    """Opens the models that are compared.

    Attributes:
        notes: what the user should hear of them.
        merged: the merged models, whose tokenizers may read the inputs.
    """

    def __init__(
        self, step: Compare, base: Checkpoint, tuned: Checkpoint, reference: Model
    ) -> None:
        self._step = step
        self._base = base
        self._tuned = tuned
        self._reference = reference
        self._ranks = step._ranks()
        self._merge = Merge(architecture=step.architecture)
        self.notes: list[str] = []
        self.merged: list[Checkpoint] = []

    def contenders(self, adapters: Sequence[tuple[Adapter, float]]) -> Iterator[Contender]:
        """All models but the fine-tune that the others are compared with."""
        plain = self._plain()
        if plain is not None:
            yield Contender(Entry("base", rank=0), plain)
        names = _labels(adapters)
        later: list[Contender] = []
        for (adapter, weight), name in zip(adapters, names, strict=True):
            if weight == 0:
                raise UsageError(f"{adapter.label}: with a weight of 0 there is nothing to compare")
            merged = self._merge.merged(self._base, [(adapter, weight)])
            self.merged.append(merged)
            self.notes += self._config_notes(merged, name)
            self.notes += merged.notes
            if plain is None or any(update.is_whole for update in adapter.values()):
                below = in_class_of(merged, self._base, self._merge, [(adapter, weight)])
                entry = Entry("rank 0", (name,), 0)
                yield Contender(entry, self._opened(below, f"rank 0 of {name}"), adapter)
            later += self._cuts(adapter, weight, name)
            whole = Entry("adapter", (name,), rank_of(adapter))
            later.append(Contender(whole, self._opened(merged, name)))
        yield from later
        yield self._again()

    def _plain(self) -> Model | None:
        """The base as it is, if the fine-tune's class can be made of it."""
        try:
            model = self._opened(self._base, "base")
        except InputError as error:
            self.notes.append(f"the base cannot be compared as it is: {error}")
            return None
        return model

    def _cuts(self, adapter: Adapter, weight: float, name: str) -> Iterator[Contender]:
        most = rank_of(adapter)
        lower = [rank for rank in self._ranks if most is None or rank < most]
        if higher := [str(rank) for rank in self._ranks if most is not None and rank > most]:
            self.notes.append(
                f"{name}: has rank {most}: there is no cutting to {listed(higher, 8)}"
            )
        for rank in lower:
            cut = Rescale(rank=rank).run(adapter)
            merged = self._merge.merged(self._base, [(cut, weight)])
            model = self._opened(merged, f"{name} at rank {rank}")
            yield Contender(Entry("cut", (name,), rank), model)

    def _again(self) -> Contender:
        """The fine-tune once more, in its own type."""
        from loratool.running import open_model

        coarse = _COARSE.get(_main_dtype(self._tuned))
        if coarse is None:
            model = replace(self._reference, label="fine-tune itself")
            return Contender(Entry("finetuned"), model)
        from loratool.dtypes import parse_float_dtype, torch_dtype

        dtype = torch_dtype(parse_float_dtype(coarse))
        model = open_model(self._tuned, dtype, architecture=self._step.architecture)
        entry = Entry("finetuned", dtype=coarse)
        return Contender(entry, replace(model, label=entry.name))

    def _opened(self, checkpoint: Checkpoint, label: str) -> Model:
        """A model in the fine-tune's class."""
        from loratool.comparing import require_same_shapes
        from loratool.running import open_model

        moved = _moved(checkpoint, parse_moves(self._step.map), self._tuned)
        if self._tuned.config is not None:
            moved = moved.with_config(self._tuned.config)
        model = open_model(moved, architecture=self._step.architecture)
        model = replace(model, label=label)
        require_same_shapes(model, self._reference)
        return model

    def _config_notes(self, merged: Checkpoint, name: str) -> Iterator[str]:
        own, tuned = merged.config or {}, self._tuned.config or {}
        differing = sorted(
            key for key in own.keys() & tuned.keys() - _IRRELEVANT if own[key] != tuned[key]
        )
        if differing:
            yield (
                f"{name}: merged, its config.json would have another "
                f"{listed(differing, 4)} than the fine-tune's, with which it is compared"
            )


def rank_of(adapter: Adapter) -> int | None:
    """The largest rank of an adapter's factors; None if there are none, or it is not known yet."""
    ranks = [update.rank for update in adapter.values() if update.kind in FACTORED]
    known = [rank for rank in ranks if rank is not None]
    return max(known) if known and len(known) == len(ranks) else None


def _labels(adapters: Sequence[tuple[Adapter, float]]) -> list[str]:
    """What the adapters are called, with their weights where these are not 1.

    Raises:
        UsageError: two are the same.
    """
    distinct = {adapter.path or id(adapter): adapter for adapter, _ in adapters}
    names = dict(zip(distinct, short_names(list(distinct.values())), strict=True))
    found = [
        names[adapter.path or id(adapter)] + ("" if weight == 1 else f"={weight:g}")
        for adapter, weight in adapters
    ]
    if twice := [name for name in found if found.count(name) > 1]:
        raise UsageError(f"{twice[0]} is given twice with the same weight: leave one out")
    return found


def _main_dtype(checkpoint: Checkpoint) -> str:
    """The type that most bytes of a checkpoint's numbers are in."""
    sizes: dict[str, int] = {}
    for tensor in checkpoint.values():
        if is_float(tensor.dtype):
            sizes[tensor.dtype] = sizes.get(tensor.dtype, 0) + tensor.nbytes
    return max(sizes, key=lambda dtype: sizes[dtype], default="")


def _moved(
    checkpoint: Checkpoint, moves: Sequence[tuple[str, str]], tuned: Checkpoint
) -> Checkpoint:
    """The base's tensors under the fine-tune's names, where the user says how they differ."""

    def name_of(name: str) -> str:
        for old, new in moves:
            moved = old + name.removeprefix(new)
            if name.startswith(new) and moved in tuned:
                return moved
        return name

    if not moves:
        return checkpoint
    tensors = {name_of(n): tensor.renamed(name_of(n)) for n, tensor in checkpoint.items()}
    aliases = {name_of(name): name_of(other) for name, other in checkpoint.aliases.items()}
    return replace(checkpoint, tensors=tensors, aliases=aliases)


def _device(name: str) -> torch.device | None:
    """The device of a name; None for the CPU.

    Raises:
        UsageError: there are no such devices.
        InputError: there is none here.
    """
    import torch

    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UsageError(f"--device {name}: write cpu, cuda, cuda:1, mps, ...") from error
    if device.type == "cpu":
        return None
    try:
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise InputError(
            f"--device {name}: there is none that torch {torch.__version__} can use here"
        ) from error
    return device


def _distinct(contenders: Sequence[Contender]) -> Iterator[Contender]:
    """The contenders, with one rank 0 for all adapters that keep the same tensors whole.

    Of an adapter that is being computed it shows only now whether it keeps any: where it does not,
    its rank 0 is the base.
    """
    has_base = any(contender.entry.role == "base" for contender in contenders)
    several = sum(contender.keeps is not None for contender in contenders) > 1
    groups: dict[Any, list[Contender]] = {}
    for number, contender in enumerate(contenders):
        adapter = contender.keeps
        key: Any = number
        if adapter is not None and (several or adapter.path is None):
            values = _whole_values(adapter)
            if has_base and not values:
                continue
            key = values
        groups.setdefault(key, []).append(contender)
    for first, *others in groups.values():
        names = (*first.entry.adapters, *(n for c in others for n in c.entry.adapters))
        yield replace(first, entry=replace(first.entry, adapters=names))


def _whole_values(adapter: Adapter) -> frozenset[tuple[str, ...]]:
    """What an adapter keeps whole: names and digests; of rows, their numbers as well."""
    found = [(name, update.load()) for name, update in adapter.items() if update.is_whole]
    return frozenset(
        (name, value.tensor.digest(), str(getattr(value, "indices", "")))
        for name, value in found
        if isinstance(value, Replacement | Rows)
    )
