"""extract: the difference of two checkpoints as a low-rank adapter."""

from __future__ import annotations

from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from loratool import plugins
from loratool.adapter import MODEL_FILES, Adapter, LazyUpdate, Provenance
from loratool.alignment import parse_moves
from loratool.card import is_hub_name
from loratool.checkpoint import Checkpoint
from loratool.dtypes import FLOAT_NAMES, parse_float_dtype
from loratool.errors import InputError, UsageError
from loratool.linalg import Factorizer, RankPolicy
from loratool.pairing import Change, Pair, Selection, pair_models
from loratool.plugins import Operand, option
from loratool.respelling import named_for
from loratool.skeleton import (
    architecture_of,
)
from loratool.training import DEFAULT_RATE, MEASURES, Training
from loratool.updates import matrix_shape, swapped

if TYPE_CHECKING:
    from loratool.calibrated import Calibration
    from loratool.delta import DeltaReader
    from loratool.updates import Experts, LowRank

_DEFAULT_RANK = 16


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
    calibrate: str = option(
        "", "fit the factors to the inputs in this file: texts, token ids or images "
        "(--factorizer activation, --refine)", metavar="FILE",
    )  # fmt: skip
    calibrate_on: str = option(
        "finetuned", "which model the inputs are run through", choices=("finetuned", "base")
    )
    moments: str = option(
        "full", "the whole second moment of each layer's inputs, or its diagonal",
        choices=("full", "diagonal"),
    )  # fmt: skip
    calibration_samples: int = option(128, "use at most so many samples, the first ones")
    calibration_length: int | None = option(
        None, "cut samples to so many tokens (default: 512, or what the model takes)"
    )
    tokenizer: str = option("", "a directory with the tokenizer, if not the model's", metavar="DIR")
    refine: int | None = option(
        None, "train the factors by so many steps to answer --calibrate's inputs as the fine-tune",
        metavar="STEPS",
    )  # fmt: skip
    refine_loss: str | None = option(
        None, "what is made small: KL divergence of logits, or mean squared error of logits or, "
        "without any, of hidden states (default: kl where there are logits of classes)",
        choices=MEASURES,
    )  # fmt: skip
    refine_rate: float = option(
        DEFAULT_RATE, "learning rate, as a share of each factor's root mean square"
    )
    refine_penalty: float = option(
        0.0, "weight of ||BA - B0A0||^2 / ||B0A0||^2, the distance from the extracted factors"
    )

    def __post_init__(self) -> None:
        self._check_calibration()
        rank_policy(self.rank, self.energy)  # a wrong value is told before anything is opened
        parse_moves(self.map)
        plugins.create("adapter_formats", self.format)
        self._training()

    def run(self, base: Checkpoint, finetuned: Checkpoint) -> Adapter:
        """Compare headers and plan one update for each tensor; nothing is computed yet.

        Raises:
            MismatchError: the two do not belong together.
            UsageError: an option's value makes no sense.
        """
        policy = rank_policy(self.rank, self.energy)
        dtype = parse_float_dtype(self.dtype) if self.dtype else None
        factorizer: Factorizer = plugins.create("factorizers", self._factorizer)
        pair = pair_models(base, finetuned, self._selection())
        from loratool.delta import DeltaReader

        reader = DeltaReader(factorizer, policy, self.seed)
        calibration = self._calibration(base, finetuned, pair, dtype)
        low_rank, whole = _updates(pair, reader, policy, dtype, calibration)
        tensors = pair.finetuned
        tied = _tied_heads(pair, low_rank)
        updates = low_rank if self.lora_only else _in_order(tensors, {**low_rank, **whole})
        updates |= tied
        if not updates:
            raise InputError("no tensor is left to extract: check --target and --exclude")
        adapter = Adapter(
            updates,
            model_files={} if self.lora_only or pair.is_part else _model_files(pair),
            model_config=None if self.lora_only or pair.is_part else pair.config,
            dropped=() if self.lora_only else pair.dropped,
            task_type=pair.task,
            base_name=self._base_name(base),
            context={name: tensors[name] for name in tensors if name not in pair.buffers},
            kinds=pair.kinds,
            tied=pair.skeleton.tied,
            moves=pair.alignment.moves,
            settings={"ensure_weight_tying": True} if tied else {},
            left_out=whole if self.lora_only else {},
            notes=(
                *pair.notes,
                *_table_notes(pair),
                *_rank_notes(pair, policy),
                *_notes_of(calibration),
            ),
            format=self.format,
            provenance=_provenance(pair, self._base_name(base), calibration),
            facts=lambda: _facts(self, policy, pair, reader, calibration),
        )
        if training := self._training():
            adapter = self._refined(adapter, training, pair, base, finetuned)
        writer = plugins.create("adapter_formats", self.format)
        return named_for(adapter, base, *plugins.spelling_of(writer))

    @property
    def _factorizer(self) -> str:
        # Refining starts from the SVD: on rxnfp it gets further from there (benchmarks/refine.py).
        fits = self.calibrate and self.refine is None and self.factorizer == "krylov"
        return "activation" if fits else self.factorizer

    def _check_calibration(self) -> None:
        name = self._factorizer.partition(":")[0]
        if name == "activation" and not self.calibrate:
            raise UsageError(
                "--factorizer activation fits to inputs: name them by --calibrate FILE"
            )
        if self.calibrate and name != "activation" and self.refine is None:
            raise UsageError(f"--calibrate: the factorizer {name} uses no inputs; leave one out")
        if self.calibration_samples < 1 or (self.calibration_length or 1) < 1:
            raise UsageError("--calibration-samples and --calibration-length: at least 1")

    def _calibration(
        self, base: Checkpoint, finetuned: Checkpoint, pair: Pair, dtype: str | None
    ) -> Calibration | None:
        if self._factorizer.partition(":")[0] != "activation":
            return None
        from loratool.calibrated import Calibration, Plan
        from loratool.calibration import Limits

        plan = Plan(
            Path(self.calibrate),
            "base" if self.calibrate_on == "base" else "finetuned",
            self.moments == "diagonal",
            Limits(self.calibration_samples, self.calibration_length),
            Path(self.tokenizer) if self.tokenizer else None,
        )
        changes = [(c, _dtype_of(c, dtype)) for c in pair.changes() if c.factored]
        return Calibration(plan, base, finetuned, changes, self.architecture)

    def _training(self) -> Training | None:
        """What --refine and its companions mean together."""
        if self.refine is None:
            if (self.refine_loss, self.refine_rate, self.refine_penalty) != (None, DEFAULT_RATE, 0):
                raise UsageError("--refine-loss, -rate and -penalty are about --refine STEPS")
            return None
        if not self.calibrate:
            raise UsageError("--refine needs inputs to run the models on: --calibrate FILE")
        return Training(
            self.refine, self.refine_loss, self.refine_rate, self.refine_penalty, self.seed
        )

    def _refined(
        self,
        adapter: Adapter,
        training: Training,
        pair: Pair,
        base: Checkpoint,
        finetuned: Checkpoint,
    ) -> Adapter:
        from loratool.calibration import Limits, read_inputs
        from loratool.refinement import refined
        from loratool.running import open_model
        from loratool.steps.merge import Merge

        tuned = finetuned.with_config(pair.config) if pair.config else finetuned
        teacher = open_model(tuned, architecture=self.architecture)
        file, folder = Path(self.calibrate), Path(self.tokenizer) if self.tokenizer else None
        limits = Limits(self.calibration_samples, self.calibration_length)
        inputs = read_inputs(file, teacher, limits, (finetuned, base), folder)
        merge = Merge(architecture=self.architecture)

        def merged(part: Adapter) -> Checkpoint:
            return merge.merged(base, [(part, 1.0)])

        return refined(adapter, pair.changes(), teacher, inputs, file, merged, training)

    def _selection(self) -> Selection:
        return Selection(
            self.target,
            self.exclude,
            parse_moves(self.map),
            self.architecture,
            lowrank_tables=self.embeddings == "lowrank",
            heads=not self.lora_only,
        )

    def _base_name(self, base: Checkpoint) -> str:
        named = str((base.config or {}).get("_name_or_path") or "")
        found = self.base_name or base.hub_name
        return found or (named if is_hub_name(named) else str(base.path or ""))


def _notes_of(calibration: Calibration | None) -> tuple[str, ...]:
    return () if calibration is None else calibration.notes


def _provenance(pair: Pair, base_name: str, calibration: Calibration | None) -> Provenance:
    architecture = architecture_of(pair.config) or "AutoModel"
    base = f" [{base_name}](https://huggingface.co/{base_name})" if is_hub_name(base_name) else ""
    return Provenance(
        "Extracting",
        "Extracted",
        f"The difference between a fine-tuned `{architecture}` and its base{base}, as a low-rank "
        "adapter extracted by loratool.",
        lines=tuple if calibration is None else calibration.lines,
    )


def rank_policy(rank: int | None, energy: float | None) -> RankPolicy:
    """What --rank and --energy mean together: rank 16 if neither is given."""
    return RankPolicy(_DEFAULT_RANK if rank is None and energy is None else rank, energy)


def _updates(
    pair: Pair,
    reader: DeltaReader,
    policy: RankPolicy,
    dtype: str | None,
    calibration: Calibration | None,
) -> tuple[dict[str, LazyUpdate], dict[str, LazyUpdate]]:
    """The low-rank updates, and what has to be kept whole."""
    low_rank: dict[str, LazyUpdate] = {}
    whole: dict[str, LazyUpdate] = {}
    for change in pair.changes():
        if change.factored:
            low_rank[change.name] = _low_rank(change, reader, policy, dtype, calibration)
        else:
            whole[change.name] = _replacement(change, reader)
    return low_rank, whole


def _low_rank(
    change: Change,
    reader: DeltaReader,
    policy: RankPolicy,
    dtype: str | None,
    calibration: Calibration | None,
) -> LazyUpdate:
    before, after = change.before, change.after
    assert before is not None  # of what is factored
    shape = swapped(after.shape) if change.transposed else after.shape
    experts = change.kind == "experts"
    dtype = _dtype_of(change, dtype)
    factorize = reader.factorize_experts if experts else reader.factorize

    def load() -> LowRank | Experts | None:
        if calibration is not None and not experts:
            return calibration.load(reader, change.name)
        return factorize(before, after, change.transposed, dtype)

    matrix = (shape[-2], shape[-1]) if experts else matrix_shape(shape)
    return LazyUpdate(
        change.name,
        "experts" if experts else "low_rank",
        shape,
        dtype,
        load,
        rank=policy.limit(matrix) if policy.rank else None,
        transposed=change.transposed,
        embedding=change.kind == "embedding",
    )


def _dtype_of(change: Change, dtype: str | None) -> str:
    """The type of a target's factors."""
    bf16 = change.before is not None and change.before.dtype == "BF16"
    return dtype or ("BF16" if bf16 else "F32")


def _replacement(change: Change, reader: DeltaReader) -> LazyUpdate:
    tensor = change.after
    return LazyUpdate(
        tensor.name,
        "replacement",
        tensor.shape,
        tensor.dtype,
        lambda: reader.replace(change.before, tensor),
    )


def _tied_heads(pair: Pair, low_rank: dict[str, LazyUpdate]) -> dict[str, LazyUpdate]:
    """The same updates again for heads that share the values of embeddings.

    PEFT loads them, for it takes the two for one only as long as nothing adapts them.
    """
    heads = {}
    for head, source in pair.skeleton.tied.items():
        if source in low_rank and pair.kinds.get(source) == "embedding":
            once = cache(low_rank[source].load)  # the factors are small beside the table
            found = low_rank[source] = replace(low_rank[source], load=once)
            heads[head] = replace(found, name=head, embedding=False, transposed=False)
    return heads


def _table_notes(pair: Pair) -> list[str]:
    if not pair.selection.lowrank_tables:
        return []
    tables = [n for n in pair.selected if pair.kinds.get(n) == "embedding"]
    return [f"{name}: kept whole: {why}" for name in tables if (why := pair.why_whole(name))]


def _rank_notes(pair: Pair, policy: RankPolicy) -> list[str]:
    linear = [n for n in pair.selected if pair.skeleton.kinds.get(n) in ("linear", "conv1d")]
    rank = policy.rank
    small = [n for n in linear if rank and min(pair.finetuned[n].shape) < rank]
    if not small:
        return []
    return [
        f"rank {rank} is more than {len(small)} matrices have ({small[0]}, ...): "
        "these get their full rank"
    ]


def _in_order(finetuned: Checkpoint, updates: dict[str, LazyUpdate]) -> dict[str, LazyUpdate]:
    return {name: updates[name] for name in finetuned if name in updates}


def _model_files(pair: Pair) -> dict[str, Any]:
    completed = pair.finetuned.with_config(pair.config) if pair.config else pair.finetuned
    return {
        name: content
        for name, content in completed.side_files.items()
        if any(fnmatchcase(name, pattern) for pattern in MODEL_FILES)
    }


def _facts(
    step: Extract,
    policy: RankPolicy,
    pair: Pair,
    reader: DeltaReader,
    calibration: Calibration | None,
) -> dict[str, Any]:
    return {
        **({"calibration": calibration.facts()} if calibration is not None else {}),
        "options": {
            "rank": policy.rank,
            "energy": policy.energy,
            "factorizer": step._factorizer,
            "seed": step.seed,
            "lora_only": step.lora_only,
            "embeddings": step.embeddings,
        },
        "duplicates": reader.duplicates(),
        "base": {"bytes": pair.base.nbytes, **reader.base_digests()},
        "finetuned": {"bytes": pair.finetuned.nbytes, **reader.tuned_digests()},
    }
