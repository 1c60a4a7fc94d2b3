"""extract: the difference of two checkpoints as a low-rank adapter."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from loratool import plugins
from loratool.adapter import MODEL_FILES, Adapter, LazyUpdate, Provenance
from loratool.ahead import DigestsAhead
from loratool.alignment import parse_moves
from loratool.card import is_hub_name
from loratool.checkpoint import Checkpoint
from loratool.delta import DeltaReader
from loratool.devices import CPU, check_device
from loratool.dtypes import FLOAT_NAMES, parse_float_dtype
from loratool.errors import InputError, UsageError
from loratool.extraction import Extraction, factor_dtype, samples_of, tied_heads
from loratool.extraction_ranks import ladder, within_budget
from loratool.ladder import Ladder
from loratool.linalg import Factorizer, FormedFactorizer
from loratool.pairing import Pair, Selection, pair_models
from loratool.plugins import Operand, option
from loratool.rank_options import RankOptions
from loratool.respelling import named_for
from loratool.skeleton import architecture_of
from loratool.training import DEFAULT_RATE, MEASURES, Training

if TYPE_CHECKING:
    from loratool.calibrated import Calibration


@dataclass(frozen=True)
class Extract:
    """Turn the difference of two checkpoints into a LoRA adapter."""

    operands: ClassVar[tuple[Operand, ...]] = (
        Operand("base", "checkpoint"),
        Operand("finetuned", "checkpoint"),
    )
    output: ClassVar[str] = "{finetuned}-lora"

    rank: int | None = option(
        None, "rank of every update, and the most where another option chooses (default: 16)"
    )
    energy: float | None = option(
        None, "keep the smallest rank that captures this share of ||delta||^2; --rank caps it"
    )
    ratio: float | None = option(
        None, "keep the singular values of at least the largest divided by this"
    )
    noise_floor: bool = option(
        False, "keep the singular values above the rounding noise of the fine-tune's type"
    )
    budget: str | None = option(
        None, "bytes of all weights of the adapter, factors getting what is not kept whole, spent "
        "where they capture most", metavar="64MiB",
    )  # fmt: skip
    weigh: str | None = option(
        None, "what --budget captures most of: the energy of all updates together, or the shares "
        "of each update's own, which all count the same (default: energy)",
        choices=("energy", "relative"),
    )  # fmt: skip
    max_rank: int | None = option(
        None, "the largest rank that --energy, --ratio, --noise-floor or --budget may choose "
        "(default with --budget: 256)",
    )  # fmt: skip
    ranks: str | None = option(
        None, "write an adapter of each of these ranks in one pass: OUTPUT/rank-4, ...",
        metavar="4,8,16",
    )  # fmt: skip
    target: tuple[str, ...] = option(
        (), "only tensors whose name matches this glob", metavar="GLOB"
    )
    exclude: tuple[str, ...] = option((), "no tensor whose name matches this glob", metavar="GLOB")
    factorizer: str = option("krylov", "how to factorize", kind="factorizers")
    compute: str | None = option(
        None, "precision of the products that find directions; auto is bf16 where the processor "
        "multiplies it natively (default: the factorizer's own)",
        choices=("auto", "fp32", "bf16"),
    )  # fmt: skip
    device: str = option("cpu", "where to compute, as torch names it: cpu, cuda, cuda:1")
    seed: int = option(0, "seed of the factorizer's random start")
    dtype: str | None = option(
        None, "type of the factors (default: bf16 for bf16 models, else fp32)",
        choices=tuple(FLOAT_NAMES),
    )  # fmt: skip
    sparse: float | None = option(
        None,
        "keep this many of the largest entries that low rank leaves out of each matrix, or below "
        "1 this share of its entries, in a file of their own",
        metavar="K",
    )
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
    calibrate_on: str | None = option(
        None, "which model the inputs are run through; merged: the fine-tune beside the one that "
        "the factors make, so that each layer makes good what the earlier ones have lost (default: "
        "merged, or finetuned with --moments diagonal or --sparse)",
        choices=("merged", "finetuned", "base"),
    )  # fmt: skip
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
        self._check_cuts()
        self._ranks()  # a wrong value is told before anything is opened
        parse_moves(self.map)
        writer = plugins.create("adapter_formats", self.format)
        if self.sparse is not None:
            self._check_sparse(self.sparse, "sparse" in writer.carries)
        self._training()

    def run(self, base: Checkpoint, finetuned: Checkpoint) -> Adapter | Ladder:
        """Compare headers and plan one update for each tensor; nothing is computed yet.

        Returns:
            The adapter; with `ranks`, one for each.

        Raises:
            MismatchError: the two do not belong together.
            InputError: nothing is left to extract, or the budget is too small.
            UsageError: an option's value makes no sense.
        """
        options, factorizer = self._ranks(), self._made_factorizer()
        pair = pair_models(base, finetuned, self._selection())
        extraction = self._extraction(base, finetuned, pair, options, factorizer)
        low_rank, whole = extraction.updates()
        build = partial(self._adapter, self._base_name(base), extraction)
        if options.ladder:
            found = ladder(pair, extraction.reader, low_rank, whole, options, build)
            return Ladder({rank: self._named(a, base) for rank, a in found.adapters.items()})
        if options.budget is not None:
            adapter = within_budget(pair, extraction.reader, low_rank, whole, options, build)
        else:
            adapter = build(low_rank, whole, options.facts())
        if training := self._training():
            adapter = self._refined(adapter, training, pair, base, finetuned)
        return self._named(adapter, base)

    def _extraction(
        self,
        base: Checkpoint,
        finetuned: Checkpoint,
        pair: Pair,
        options: RankOptions,
        factorizer: Factorizer,
    ) -> Extraction:
        from loratool.representation import Advisor

        dtype = parse_float_dtype(self.dtype) if self.dtype else None
        ahead = DigestsAhead(pair.tensors())
        is_precise = dtype is None and getattr(factorizer, "is_precise", False)
        return Extraction(
            pair,
            DeltaReader(
                factorizer, options.policy, self.seed, options.noise_floor, ahead, self.device,
                samples_of(pair), "F32" if is_precise else "",
            ),
            ahead,
            options.policy,
            dtype,
            self._calibration(base, finetuned, pair, dtype),
            self.sparse,
            Advisor(self.seed),
            is_precise,
        )  # fmt: skip

    def _adapter(
        self,
        base_name: str,
        extraction: Extraction,
        low_rank: Mapping[str, LazyUpdate],
        whole: Mapping[str, LazyUpdate],
        asked: Mapping[str, Any],
    ) -> Adapter:
        """The adapter of these updates.

        Args:
            base_name: how the adapter calls its base.
            extraction: what made them.
            low_rank: the low-rank updates.
            whole: what low-rank updates cannot express.
            asked: what was asked for of ranks, for the manifest.
        """
        pair = extraction.pair
        low_rank, tensors = dict(low_rank), pair.finetuned
        tied = tied_heads(pair, low_rank)
        updates = low_rank if self.lora_only else _in_order(tensors, {**low_rank, **whole})
        updates |= tied
        if not updates:
            raise InputError("no tensor is left to extract: check --target and --exclude")
        options = {
            **asked,
            "factorizer": self._factorizer,
            "compute": self.compute,
            "device": self.device,
            "seed": self.seed,
            "sparse": self.sparse,
            "lora_only": self.lora_only,
            "embeddings": self.embeddings,
        }
        return Adapter(
            updates,
            model_files={} if self.lora_only or pair.is_part else _model_files(pair),
            model_config=None if self.lora_only or pair.is_part else pair.config,
            dropped=() if self.lora_only else pair.dropped,
            task_type=pair.task,
            base_name=base_name,
            context={name: tensors[name] for name in tensors if name not in pair.buffers},
            kinds=pair.kinds,
            tied=pair.skeleton.tied,
            moves=pair.alignment.moves,
            settings={"ensure_weight_tying": True} if tied else {},
            left_out=whole if self.lora_only else {},
            notes=(
                *extraction.notes(low_rank, asked["rank"]),
                *(_noise_notes(low_rank, pair) if self.noise_floor else ()),
            ),
            format=self.format,
            provenance=_provenance(base_name, extraction),
            facts=lambda: {"options": options, **extraction.facts()},
            while_drained=extraction.ahead.running,
        )

    def _named(self, adapter: Adapter, base: Checkpoint) -> Adapter:
        writer = plugins.create("adapter_formats", self.format)
        return named_for(adapter, base, *plugins.spelling_of(writer))

    def _ranks(self) -> RankOptions:
        return RankOptions(
            self.rank, self.energy, self.ratio, self.noise_floor, self.budget, self.weigh,
            self.max_rank, self.ranks,
        )  # fmt: skip

    def _made_factorizer(self) -> Factorizer:
        """The factorizer with --compute and for --device.

        Raises:
            InputError: there is no such device here.
            UsageError: it is no device, or the factorizer does not know these options.
        """
        found: Any = plugins.create("factorizers", self._factorizer)
        name = self._factorizer.partition(":")[0]
        if self.compute is not None:
            if not hasattr(found, "compute"):
                raise UsageError(f"--compute: {name} computes in one precision; leave it out")
            found = replace(found, compute=self.compute)
        if self.device != CPU and not isinstance(found, FormedFactorizer):
            raise UsageError(f"--device {self.device}: {name} computes on the CPU; leave it out")
        check_device(self.device)
        factorizer: Factorizer = found
        return factorizer

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
        if self.calibrate_on == "merged" and self.moments == "diagonal":
            raise UsageError(
                "--calibrate-on merged needs whole second moments: leave --moments diagonal out, "
                "or take --calibrate-on finetuned"
            )
        if self.calibrate_on == "merged" and self.sparse is not None:
            raise UsageError(
                "--calibrate-on merged fits factors that do not come near the difference of the "
                "weights, whose entries --sparse keeps: leave one out"
            )
        by_weights = ("noise_floor", "budget", "ranks")
        if self.calibrate and (given := [n for n in by_weights if getattr(self, n)]):
            flags = " and ".join(f"--{name.replace('_', '-')}" for name in given)
            raise UsageError(
                f"--calibrate measures by the layers' outputs, {flags} by the weights: leave one "
                "out"
            )
        if self.calibration_samples < 1 or (self.calibration_length or 1) < 1:
            raise UsageError("--calibration-samples and --calibration-length: at least 1")

    def _check_cuts(self) -> None:
        """--ranks and --budget cut factors by their singular values, which must be the delta's."""
        if not (self.ranks or self.budget):
            return
        found = plugins.create("factorizers", self._factorizer)
        if hasattr(found, "factorize_in") or hasattr(found, "choose"):
            flag = "--ranks" if self.ranks else "--budget"
            raise UsageError(
                f"{flag} cuts singular value decompositions, --factorizer {self._factorizer} may "
                "find others: leave one out"
            )

    def _calibration(
        self, base: Checkpoint, finetuned: Checkpoint, pair: Pair, dtype: str | None
    ) -> Calibration | None:
        if self._factorizer.partition(":")[0] != "activation":
            return None
        from loratool.calibrated import Calibration, Plan, Side
        from loratool.calibration import Limits

        in_one = self.moments == "diagonal" or self.sparse is not None
        sides: dict[str, Side] = {"base": "base", "finetuned": "finetuned", "merged": "merged"}
        plan = Plan(
            Path(self.calibrate),
            sides[self.calibrate_on or ("finetuned" if in_one else "merged")],
            self.moments == "diagonal",
            Limits(self.calibration_samples, self.calibration_length),
            Path(self.tokenizer) if self.tokenizer else None,
            self.lora_only,
        )
        changes = [(c, factor_dtype(c, dtype)) for c in pair.changes() if c.factored]
        return Calibration(plan, base, finetuned, pair, changes, self.architecture)

    def _training(self) -> Training | None:
        """What --refine and its companions mean together."""
        if self.refine is None:
            if (self.refine_loss, self.refine_rate, self.refine_penalty) != (None, DEFAULT_RATE, 0):
                raise UsageError("--refine-loss, -rate and -penalty are about --refine STEPS")
            return None
        if not self.calibrate:
            raise UsageError("--refine needs inputs to run the models on: --calibrate FILE")
        if self.sparse is not None:
            raise UsageError("--refine trains A and B alone: leave --sparse out, or it")
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

    def _check_sparse(self, wanted: float, has_place: bool) -> None:
        if not (0 < wanted < 1 or (1 <= wanted < math.inf and wanted == int(wanted))):
            raise UsageError(
                f"--sparse {wanted:g}: give a number of entries, or a share between 0 and 1 of all"
            )
        if not has_place:
            raise UsageError(
                f"--sparse: the format {self.format} has no place for single entries: extract "
                "without it, or leave --format out"
            )
        if self.ranks or self.budget:
            raise UsageError(
                "--sparse keeps what one rank leaves out: leave --ranks and --budget out, or it"
            )

    def _base_name(self, base: Checkpoint) -> str:
        named = str((base.config or {}).get("_name_or_path") or "")
        found = self.base_name or base.hub_name
        return found or (named if is_hub_name(named) else str(base.path or ""))


def _provenance(base_name: str, extraction: Extraction) -> Provenance:
    architecture = architecture_of(extraction.pair.config) or "AutoModel"
    link = f" [{base_name}](https://huggingface.co/{base_name})" if is_hub_name(base_name) else ""
    plain = Provenance(
        "Extracting",
        "Extracted",
        f"The difference between a fine-tuned `{architecture}` and its base{link}, as a low-rank "
        "adapter extracted by loratool.",
        lines=extraction.lines,
    )
    if extraction.policy.floor is None:
        return plain
    under_noise = extraction.reader.under_noise
    return replace(
        plain,
        skipped="without an update",
        nothing="base and fine-tune differ by no more than the rounding of their weights, if "
        "at all: without --noise-floor that is extracted, too",
        lost=lambda: sum(under_noise.values()),
    )


def _noise_notes(low_rank: Mapping[str, LazyUpdate], pair: Pair) -> list[str]:
    types = {pair.finetuned[name].dtype for name in low_rank if name in pair.finetuned}
    if not types or not types <= {"F32", "F64"}:
        return []
    return [
        "--noise-floor: the fine-tune is stored in fp32, whose rounding is about a "
        "ten-millionth of its weights: practically nothing lies under it"
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
