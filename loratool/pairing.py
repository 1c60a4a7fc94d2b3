"""Two models laid beside each other: which tensor of the one is which of the other.

Headers only. The steps that compare a base with its fine-tune begin here.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from loratool.alignment import Alignment, align
from loratool.checkpoint import Checkpoint, LazyTensor
from loratool.dtypes import is_float
from loratool.errors import MismatchError
from loratool.families import FAMILIES, is_buffer, is_embedding
from loratool.files import file_content
from loratool.in_memory import in_memory, pieces_by_tensor
from loratool.json_files import parse_json
from loratool.reports import listed
from loratool.skeleton import (
    TASK_HEADS,
    Kind,
    Skeleton,
    architecture_of,
    build_skeleton,
    complete_config,
    is_diffusers,
    is_in_task_head,
    is_known,
    task_type,
)

_VOLATILE = ("transformers_version", "dtype", "torch_dtype")  # of a config
_HEADS = ("lm_head", "classifier", "score", "qa_outputs", "decoder", "predictions", "out_proj")


@dataclass(frozen=True)
class Selection:
    """What of two models is looked at, and how.

    Attributes:
        target: globs, one of which a tensor's or its module's name must match; () for all.
        exclude: globs that none may match.
        moves: names or prefixes (OLD, NEW) that are paired by hand.
        architecture: model class or type, where config.json does not say.
        lowrank_tables: whether changed embeddings are looked at as matrices.
        heads: whether the fine-tune's task decides what has to be kept whole.
    """

    target: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    moves: tuple[tuple[str, str], ...] = ()
    architecture: str = ""
    lowrank_tables: bool = False
    heads: bool = True

    def selects(self, name: str, is_new: bool) -> bool:
        """Whether a tensor is looked at; one that the base lacks can only be excluded."""
        wanted = is_new or not self.target or _matches(name, self.target)
        return wanted and not _matches(name, self.exclude)


def _matches(name: str, globs: tuple[str, ...]) -> bool:
    module = name.rpartition(".")[0]
    return any(fnmatchcase(name, glob) or fnmatchcase(module, glob) for glob in globs)


@dataclass(frozen=True)
class Change:
    """One tensor of the fine-tune beside the base's.

    Attributes:
        before: the base's, or None if it has none.
        after: the fine-tune's.
        kind: of module that it is the weight of.
        factored: whether both are a weight of one shape whose change can be low-rank factors.
        transposed: whether a matrix is stored as (in, out).
    """

    before: LazyTensor | None
    after: LazyTensor
    kind: Kind
    factored: bool
    transposed: bool

    @property
    def name(self) -> str:
        """The fine-tune's name of it, in memory."""
        return self.after.name


@dataclass(frozen=True)
class Pair:
    """Both models as they are in memory, and what belongs to what.

    Attributes:
        base: the base.
        finetuned: the fine-tune.
        selection: what was asked for.
        alignment: the fine-tune's names -> the base's.
        config: the fine-tune's, completed.
        skeleton: the fine-tune's.
        task: PEFT's task type that decides what is kept whole, or None.
        dropped: tensors of the base, by their names on disk, that the fine-tune has not.
        buffers: of the fine-tune; models compute them by themselves.
        selected: names in the fine-tune, in its order.
        notes: what the user should hear.
    """

    base: Checkpoint
    finetuned: Checkpoint
    selection: Selection
    alignment: Alignment
    config: Mapping[str, Any] | None
    skeleton: Skeleton
    task: str | None
    dropped: tuple[str, ...]
    buffers: tuple[str, ...]
    selected: tuple[str, ...]
    notes: tuple[str, ...] = ()

    @property
    def is_part(self) -> bool:
        """Whether the fine-tune is a pipeline or a part of one, whose files no adapter carries."""
        return bool(self.base.components) or is_diffusers(self.config)

    @property
    def kinds(self) -> dict[str, Kind]:
        """Parameter -> kind; what PEFT cannot adapt is nothing that can be adapted."""
        kinds: dict[str, Kind] = dict(self.skeleton.kinds)
        return kinds | dict.fromkeys(self.skeleton.unreachable, "other")

    def tied_tables(self) -> dict[str, str]:
        """Heads that share the values of embeddings -> these."""
        tied = self.skeleton.tied.items()
        return {head: source for head, source in tied if self.kinds.get(source) == "embedding"}

    def changes(self) -> Iterator[Change]:
        """What is selected, in the fine-tune's order, but for second names of the same values."""
        kinds = self.kinds
        for name in self.selected:
            twin = self.finetuned.aliases.get(name) or self.skeleton.tied.get(name)
            if twin in self.finetuned:
                continue
            after, other = self.finetuned[name], self.alignment.pairs.get(name)
            before = self.base[other] if other else None
            kind = kinds.get(name, "other")
            same = before is not None and before.shape == after.shape
            yield Change(
                before,
                after,
                kind,
                factored=same and self._is_factored(name, kind),
                transposed=kind == "conv1d" or name in self.skeleton.transposed_experts,
            )

    def tensors(self) -> Iterator[LazyTensor]:
        """The tensors of both models that changes are made of, in that order."""
        for change in self.changes():
            yield from (change.after,) if change.before is None else (change.before, change.after)

    def _is_factored(self, name: str, kind: Kind) -> bool:
        if is_in_task_head(name, self.task) or not is_float(self.finetuned[name].dtype):
            return False
        if kind == "embedding":
            return self.selection.lowrank_tables and not self.why_whole(name)
        if kind == "conv":  # PEFT's factors of a convolution in groups cannot be merged
            return name not in self.skeleton.groups
        return kind in ("linear", "conv1d", "experts")

    def why_whole(self, name: str) -> str:
        """Why PEFT cannot adapt an embedding by factors; "" if it can."""
        module = name.rpartition(".")[0]
        users = [n.rpartition(".")[0] for n, source in self.skeleton.tied.items() if source == name]
        if any(is_embedding(user) for user in users):
            return "several tables share these values"  # T5
        names = {user.rpartition(".")[2] for user in (module, *users)}
        if users and not names & {"embed_tokens", "lm_head"}:
            return f"PEFT does not know that {users[0]} shares its values"  # BERT
        if module.endswith("embed_positions"):
            return "looked up with an offset, which PEFT's factors are not"  # OPT, BART
        return ""


def pair_models(base: Checkpoint, finetuned: Checkpoint, selection: Selection) -> Pair:
    """Lay a fine-tune beside its base.

    Raises:
        InputError: transformers does not know the model.
        MismatchError: the two do not belong together.
    """
    config, config_notes = complete_config(
        finetuned.config, _shapes(finetuned), base.config, selection.architecture
    )
    skeleton = build_skeleton(config, _shapes(finetuned))
    on_disk, base_skeleton = base, _base_skeleton(base, config, skeleton)
    finetuned, base = in_memory(finetuned, skeleton), in_memory(base, base_skeleton)
    shapes = _shapes(finetuned)
    alignment = align(shapes, _shapes(base), selection.moves)
    _check_related(alignment, finetuned, base, skeleton)
    buffers = tuple(name for name, shape in shapes.items() if is_buffer(name, shape))
    parameters = [name for name in finetuned if name not in buffers]
    task = task_type(architecture_of(config))
    if not selection.heads and task in TASK_HEADS:
        task = None  # PEFT would ask for the head
    selected = tuple(
        name
        for name in parameters
        if is_in_task_head(name, task) or selection.selects(name, name not in alignment.pairs)
    )
    notes = [*base.notes, *finetuned.notes, *config_notes, *skeleton.notes]
    notes += _lost_settings(base, finetuned)
    notes += [_quantization_note(model) for model in (base, finetuned) if model.quantized]
    if words := alignment.describe():
        notes.append(f"{words} to the fine-tune's to get the base's")
    if buffers:
        notes.append(
            f"{len(buffers)} buffers of the fine-tune are left out ({buffers[0]}, ...): the model "
            "computes them by itself"
        )
    if excluded := len(parameters) - len(selected):
        notes.append(f"{excluded} tensors were not looked at (--target, --exclude)")
    if unreachable := sorted(skeleton.unreachable.intersection(selected)):
        notes.append(
            f"{len(unreachable)} linear weights are kept whole ({unreachable[0]}, ...): PEFT takes "
            "their names for those of experts"
        )
    dropped = _dropped(base, alignment, skeleton, on_disk, base_skeleton)
    return Pair(
        base, finetuned, selection, alignment, config, skeleton, task, dropped, buffers, selected,
        tuple(notes),
    )  # fmt: skip


def _shapes(checkpoint: Checkpoint) -> dict[str, tuple[int, ...]]:
    return {name: tensor.shape for name, tensor in checkpoint.items()}


def _base_skeleton(
    base: Checkpoint, config: Mapping[str, Any] | None, skeleton: Skeleton
) -> Skeleton:
    """How the base lies on disk: by its own config.json, or else as the fine-tune's class."""
    if config is None or skeleton.guessed or config.get("model_type") in FAMILIES:
        return skeleton  # as in memory
    found, _ = complete_config(base.config, _shapes(base), config)
    known = found if found and is_known(found) else config
    return build_skeleton(known, _shapes(base), strict=False)


def _dropped(
    base: Checkpoint,
    alignment: Alignment,
    skeleton: Skeleton,
    on_disk: Checkpoint,
    base_skeleton: Skeleton,
) -> tuple[str, ...]:
    """Tensors of the base, by their names on disk, all of whose parameters the fine-tune lacks."""
    paired = set(alignment.pairs.values())
    components = {name.partition(".")[0] for name in paired} if base.components else set()
    gone = {
        name
        for name in base
        if name not in paired
        and alignment.name_here(name) not in skeleton.tied
        and (not components or name.partition(".")[0] in components)
    }
    return tuple(
        tensor
        for tensor, users in pieces_by_tensor(base_skeleton, _shapes(on_disk)).items()
        if all(name in gone for name, _ in users)
    )


def _lost_settings(base: Checkpoint, finetuned: Checkpoint) -> list[str]:
    """A note on the settings of a pipeline that differ: an adapter carries none of them."""
    if not (base.components and finetuned.components):
        return []
    files = finetuned.side_files.items()
    there = {name: source for name, source in files if name.endswith("config.json")}
    lost = [
        name
        for name, source in there.items()
        if name not in base.side_files
        or _essence(source, name) != _essence(base.side_files[name], name)
    ]
    if not lost:
        return []
    return [
        f"the adapter does not carry settings in which the fine-tune differs: {listed(lost, 4)}"
    ]


def _essence(source: Path | bytes, name: str) -> dict[str, Any]:
    content = parse_json(file_content(source), name)
    return {k: v for k, v in content.items() if not k.startswith("_") and k not in _VOLATILE}


def _quantization_note(model: Checkpoint) -> str:
    return (
        f"{model.label}: is quantized: unless the other one was made from its values, the "
        "difference contains its quantization error, which is no low-rank update and is captured "
        "in part at best"
    )


def _check_related(
    alignment: Alignment, finetuned: Checkpoint, base: Checkpoint, skeleton: Skeleton
) -> None:
    """Raise MismatchError if the models are of different architectures."""
    linear = [n for n, kind in skeleton.kinds.items() if kind in ("linear", "conv1d")]
    paired = [name for name in linear if name in alignment.pairs]
    if not alignment.pairs or (linear and not paired):
        raise MismatchError(
            f"{finetuned.label} and {base.label} have no weights of the same name "
            f"({next(iter(finetuned))} against {next(iter(base))}): not a fine-tune of this base? "
            "--map OLD=NEW pairs names by hand"
        )
    wrong = []
    for name, other in alignment.pairs.items():
        here, there = finetuned[name].shape, base[other].shape
        if here != there and not _may_be_resized(name, here, there, skeleton):
            wrong.append(f"  {name}: {here} in the fine-tune, {there} in the base")
    if wrong:
        more = f"\n  and {len(wrong) - 5} more" if len(wrong) > 5 else ""
        raise MismatchError(
            f"{finetuned.label} is not a fine-tune of {base.label}: {len(wrong)} tensors differ "
            "in shape:\n" + "\n".join(wrong[:5]) + more
        )


def _may_be_resized(
    name: str, here: tuple[int, ...], there: tuple[int, ...], skeleton: Skeleton
) -> bool:
    """Embeddings and heads may have more or fewer rows: another vocabulary, other labels."""
    if len(here) != len(there) or here[1:] != there[1:]:
        return False
    is_head = any(part in _HEADS for part in name.split(".")[-3:])
    return skeleton.kinds.get(name) == "embedding" or is_head
