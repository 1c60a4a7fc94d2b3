"""extract: the difference of two checkpoints as a low-rank adapter."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from loratool import plugins
from loratool.adapter import MODEL_FILES, Adapter, LazyUpdate, Provenance
from loratool.alignment import Alignment, align, parse_moves
from loratool.card import is_hub_name
from loratool.checkpoint import Checkpoint, LazyTensor
from loratool.dtypes import FLOAT_NAMES, is_float, parse_float_dtype
from loratool.errors import InputError, MismatchError
from loratool.families import FAMILIES, is_buffer, is_embedding
from loratool.files import file_content
from loratool.in_memory import in_memory, pieces_by_tensor
from loratool.json_files import parse_json
from loratool.linalg import Factorizer, RankPolicy
from loratool.plugins import Operand, option
from loratool.reports import listed
from loratool.respelling import named_for
from loratool.skeleton import (
    TASK_HEADS,
    Skeleton,
    architecture_of,
    build_skeleton,
    complete_config,
    is_diffusers,
    is_in_task_head,
    is_known,
    task_type,
)

if TYPE_CHECKING:
    from loratool.delta import DeltaReader

_DEFAULT_RANK = 16
_VOLATILE = ("transformers_version", "dtype", "torch_dtype")  # of a config


@dataclass(frozen=True)
class Extract:
    """Turn the difference of two checkpoints into a LoRA adapter."""

    operands: ClassVar[tuple[Operand, ...]] = (
        Operand("base", "checkpoint"),
        Operand("finetuned", "checkpoint"),
    )
    output: ClassVar[str] = "{finetuned}-lora"

    rank: int | None = option(None, "rank of every update (default: 16, without --energy)")
    energy: float | None = option(
        None, "keep the smallest rank that captures this share of ||delta||^2; --rank caps it"
    )
    target: tuple[str, ...] = option(
        (), "only tensors whose name matches this glob", metavar="GLOB"
    )
    exclude: tuple[str, ...] = option((), "no tensor whose name matches this glob", metavar="GLOB")
    factorizer: str = option("krylov", "how to factorize", kind="factorizers")
    seed: int = option(0, "seed of the factorizer's random start")
    dtype: str | None = option(
        None, "type of the factors (default: bf16 for bf16 models, else fp32)",
        choices=tuple(FLOAT_NAMES),
    )  # fmt: skip
    lora_only: bool = option(
        False, "leave out what is not a low-rank update (heads, norms, biases, embeddings)"
    )
    embeddings: str = option(
        "whole", "keep changed embeddings whole, or extract them as low-rank updates",
        choices=("whole", "lowrank"),
    )  # fmt: skip
    map: tuple[str, ...] = option(
        (), "the fine-tune's name or prefix OLD is NEW in the base", metavar="OLD=NEW"
    )
    architecture: str = option("", "model class or type, where config.json does not say")
    base_name: str = option("", "the base's Hub id, for adapter_config.json and the card")
    format: str = option("peft", "adapter format to write", kind="adapter_formats")

    def __post_init__(self) -> None:
        rank_policy(self.rank, self.energy)  # a wrong value is told before anything is opened
        parse_moves(self.map)
        plugins.create("adapter_formats", self.format)

    def run(self, base: Checkpoint, finetuned: Checkpoint) -> Adapter:
        """Compare headers and plan one update for each tensor; nothing is computed yet.

        Raises:
            MismatchError: the two do not belong together.
            UsageError: an option's value makes no sense.
        """
        policy = rank_policy(self.rank, self.energy)
        dtype = parse_float_dtype(self.dtype) if self.dtype else None
        factorizer: Factorizer = plugins.create("factorizers", self.factorizer)
        plan = _plan(self, base, finetuned, policy)
        from loratool.delta import DeltaReader

        reader = DeltaReader(factorizer, policy, self.seed)
        low_rank, whole = _updates(self, plan, reader, policy, dtype)
        tensors = plan.finetuned
        tied = _tied_heads(plan, low_rank)
        updates = low_rank if self.lora_only else _in_order(tensors, {**low_rank, **whole})
        updates |= tied
        if not updates:
            raise InputError("no tensor is left to extract: check --target and --exclude")
        adapter = Adapter(
            updates,
            model_files={} if self.lora_only or plan.is_part else _model_files(plan),
            model_config=None if self.lora_only or plan.is_part else plan.config,
            dropped=() if self.lora_only else plan.dropped,
            task_type=plan.task,
            base_name=self._base_name(base),
            context={name: tensors[name] for name in tensors if name not in plan.buffers},
            kinds=plan.kinds,
            tied=plan.skeleton.tied,
            moves=plan.alignment.moves,
            settings={"ensure_weight_tying": True} if tied else {},
            left_out=whole if self.lora_only else {},
            notes=(*plan.notes, *_table_notes(self, plan)),
            format=self.format,
            provenance=_provenance(plan, self._base_name(base)),
            facts=lambda: _facts(self, policy, plan, reader),
        )
        writer = plugins.create("adapter_formats", self.format)
        return named_for(adapter, base, *plugins.spelling_of(writer))

    def _base_name(self, base: Checkpoint) -> str:
        named = str((base.config or {}).get("_name_or_path") or "")
        found = self.base_name or base.hub_name
        return found or (named if is_hub_name(named) else str(base.path or ""))


def _provenance(plan: _Plan, base_name: str) -> Provenance:
    architecture = architecture_of(plan.config) or "AutoModel"
    base = f" [{base_name}](https://huggingface.co/{base_name})" if is_hub_name(base_name) else ""
    return Provenance(
        "Extracting",
        "Extracted",
        f"The difference between a fine-tuned `{architecture}` and its base{base}, as a low-rank "
        "adapter extracted by loratool.",
    )


def rank_policy(rank: int | None, energy: float | None) -> RankPolicy:
    """What --rank and --energy mean together: rank 16 if neither is given."""
    return RankPolicy(_DEFAULT_RANK if rank is None and energy is None else rank, energy)


@dataclass(frozen=True)
class _Plan:
    """Both models as they are in memory, and what becomes of their tensors."""

    base: Checkpoint
    finetuned: Checkpoint
    alignment: Alignment
    config: Mapping[str, Any] | None
    skeleton: Skeleton
    task: str | None
    dropped: tuple[str, ...]
    buffers: tuple[str, ...]
    selected: tuple[str, ...]
    notes: tuple[str, ...] = field(default=())

    @property
    def is_part(self) -> bool:
        """Whether the fine-tune is a pipeline or a part of one, whose files no adapter carries."""
        return bool(self.base.components) or is_diffusers(self.config)

    @property
    def kinds(self) -> dict[str, str]:
        """Parameter -> kind; what PEFT cannot adapt is nothing that can be adapted."""
        kinds: dict[str, str] = dict(self.skeleton.kinds)
        return kinds | dict.fromkeys(self.skeleton.unreachable, "other")


def _plan(step: Extract, base: Checkpoint, finetuned: Checkpoint, policy: RankPolicy) -> _Plan:
    config, config_notes = complete_config(
        finetuned.config, _shapes(finetuned), base.config, step.architecture
    )
    skeleton = build_skeleton(config, _shapes(finetuned))
    on_disk, base_skeleton = base, _base_skeleton(base, config, skeleton)
    finetuned, base = in_memory(finetuned, skeleton), in_memory(base, base_skeleton)
    shapes = _shapes(finetuned)
    alignment = align(shapes, _shapes(base), parse_moves(step.map))
    _check_related(alignment, finetuned, base, skeleton)
    buffers = tuple(name for name, shape in shapes.items() if is_buffer(name, shape))
    parameters = [name for name in finetuned if name not in buffers]
    task = task_type(architecture_of(config))
    if step.lora_only and task in TASK_HEADS:
        task = None  # PEFT would ask for the head
    selected = tuple(
        name
        for name in parameters
        if is_in_task_head(name, task) or _is_selected(step, name, name not in alignment.pairs)
    )
    paired = set(alignment.pairs.values())
    components = {name.partition(".")[0] for name in paired} if base.components else set()
    gone = {
        name
        for name in base
        if name not in paired
        and alignment.name_here(name) not in skeleton.tied
        and (not components or name.partition(".")[0] in components)
    }
    dropped = tuple(
        tensor
        for tensor, users in pieces_by_tensor(base_skeleton, _shapes(on_disk)).items()
        if all(name in gone for name, _ in users)
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
    if policy.rank and (small := _smaller_than(policy.rank, selected, shapes, skeleton)):
        notes.append(
            f"rank {policy.rank} is more than {len(small)} matrices have ({small[0]}, ...): "
            "these get their full rank"
        )
    return _Plan(
        base, finetuned, alignment, config, skeleton, task, dropped, buffers, selected,
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


def _smaller_than(
    rank: int, names: tuple[str, ...], shapes: Mapping[str, tuple[int, ...]], skeleton: Skeleton
) -> list[str]:
    linear = [name for name in names if skeleton.kinds.get(name) in ("linear", "conv1d")]
    return [name for name in linear if min(shapes[name]) < rank]


def _is_selected(step: Extract, name: str, is_new: bool) -> bool:
    """Whether the globs select a tensor; one that the base lacks can only be excluded."""

    def matches(globs: tuple[str, ...]) -> bool:
        module = name.rpartition(".")[0]
        return any(fnmatchcase(name, glob) or fnmatchcase(module, glob) for glob in globs)

    return (is_new or not step.target or matches(step.target)) and not matches(step.exclude)


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
    heads = ("lm_head", "classifier", "score", "qa_outputs", "decoder", "predictions", "out_proj")
    is_head = any(part in heads for part in name.split(".")[-3:])
    return skeleton.kinds.get(name) == "embedding" or is_head


def _updates(
    step: Extract, plan: _Plan, reader: DeltaReader, policy: RankPolicy, dtype: str | None
) -> tuple[dict[str, LazyUpdate], dict[str, LazyUpdate]]:
    """The low-rank updates, and what has to be kept whole."""
    low_rank: dict[str, LazyUpdate] = {}
    whole: dict[str, LazyUpdate] = {}
    kinds = plan.kinds
    for name in plan.selected:
        tensor = plan.finetuned[name]
        other = plan.alignment.pairs.get(name)
        before = plan.base[other] if other else None
        kind = kinds.get(name, "other")
        twin = plan.finetuned.aliases.get(name) or plan.skeleton.tied.get(name)
        if twin in plan.finetuned:
            continue  # the same values again
        if before is not None and before.shape == tensor.shape and _is_factored(step, plan, name):
            low_rank[name] = _low_rank(plan, reader, policy, before, tensor, kind, dtype)
        else:
            load = _replacement(reader, before, tensor)
            whole[name] = LazyUpdate(name, "replacement", tensor.shape, tensor.dtype, load)
    return low_rank, whole


def _is_factored(step: Extract, plan: _Plan, name: str) -> bool:
    """Whether a tensor's change becomes factors, if it is in both models."""
    if is_in_task_head(name, plan.task) or not is_float(plan.finetuned[name].dtype):
        return False
    kind = plan.kinds.get(name, "other")
    if kind == "embedding":
        return step.embeddings == "lowrank" and not _why_whole(plan, name)
    if kind == "conv":  # PEFT's factors of a convolution in groups cannot be merged
        return name not in plan.skeleton.groups
    return kind in ("linear", "conv1d", "experts")


def _why_whole(plan: _Plan, name: str) -> str:
    """Why PEFT cannot adapt an embedding by factors; "" if it can."""
    module = name.rpartition(".")[0]
    users = [n.rpartition(".")[0] for n, source in plan.skeleton.tied.items() if source == name]
    if any(is_embedding(user) for user in users):
        return "several tables share these values"  # T5
    names = {user.rpartition(".")[2] for user in (module, *users)}
    if users and not names & {"embed_tokens", "lm_head"}:
        return f"PEFT does not know that {users[0]} shares its values"  # BERT
    if module.endswith("embed_positions"):
        return "looked up with an offset, which PEFT's factors are not"  # OPT, BART
    return ""


def _low_rank(
    plan: _Plan,
    reader: DeltaReader,
    policy: RankPolicy,
    base: LazyTensor,
    tuned: LazyTensor,
    kind: str,
    dtype: str | None,
) -> LazyUpdate:
    name, shape = tuned.name, tuned.shape
    transposed = kind == "conv1d" or name in plan.skeleton.transposed_experts
    if transposed:
        shape = (*shape[:-2], *shape[:-3:-1])
    dtype = dtype or ("BF16" if base.dtype == "BF16" else "F32")
    rows = shape[-2] if kind == "experts" else shape[0]
    columns = shape[-1] if kind == "experts" else math.prod(shape[1:])
    return LazyUpdate(
        name,
        "experts" if kind == "experts" else "low_rank",
        shape,
        dtype,
        _factors(reader, base, tuned, transposed, kind, dtype),
        rank=policy.limit((rows, columns)) if policy.rank else None,
        transposed=transposed,
        embedding=kind == "embedding",
    )


def _factors(
    reader: DeltaReader,
    base: LazyTensor,
    tuned: LazyTensor,
    transposed: bool,
    kind: str,
    dtype: str,
) -> Callable[[], Any]:
    if kind == "experts":
        return lambda: reader.factorize_experts(base, tuned, transposed, dtype)
    return lambda: reader.factorize(base, tuned, transposed, dtype)


def _tied_heads(plan: _Plan, low_rank: dict[str, LazyUpdate]) -> dict[str, LazyUpdate]:
    """The same updates again for heads that share the values of embeddings.

    PEFT loads them, for it takes the two for one only as long as nothing adapts them.
    """
    heads = {}
    for head, source in plan.skeleton.tied.items():
        if source in low_rank and plan.kinds.get(source) == "embedding":
            once = cache(low_rank[source].load)  # the factors are small beside the table
            found = low_rank[source] = replace(low_rank[source], load=once)
            heads[head] = replace(found, name=head, embedding=False, transposed=False)
    return heads


def _table_notes(step: Extract, plan: _Plan) -> list[str]:
    if step.embeddings == "whole":
        return []
    tables = [n for n in plan.selected if plan.kinds.get(n) == "embedding"]
    return [f"{name}: kept whole: {why}" for name in tables if (why := _why_whole(plan, name))]


def _replacement(
    reader: DeltaReader, base: LazyTensor | None, tuned: LazyTensor
) -> Callable[[], Any]:
    return lambda: reader.replace(base, tuned)


def _in_order(finetuned: Checkpoint, updates: dict[str, LazyUpdate]) -> dict[str, LazyUpdate]:
    return {name: updates[name] for name in finetuned if name in updates}


def _model_files(plan: _Plan) -> dict[str, Any]:
    completed = plan.finetuned.with_config(plan.config) if plan.config else plan.finetuned
    return {
        name: content
        for name, content in completed.side_files.items()
        if any(fnmatchcase(name, pattern) for pattern in MODEL_FILES)
    }


def _facts(step: Extract, policy: RankPolicy, plan: _Plan, reader: DeltaReader) -> dict[str, Any]:
    return {
        "options": {
            "rank": policy.rank,
            "energy": policy.energy,
            "factorizer": step.factorizer,
            "seed": step.seed,
            "lora_only": step.lora_only,
            "embeddings": step.embeddings,
        },
        "duplicates": reader.duplicates(),
        "base": {"bytes": plan.base.nbytes, **reader.base_digests()},
        "finetuned": {"bytes": plan.finetuned.nbytes, **reader.tuned_digests()},
    }
