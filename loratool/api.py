"""The verbs as Python functions.

    adapter = loratool.extract("base", "finetuned", rank=16)     # lazy: headers only
    adapter.save("adapter")                                      # drains it
    loratool.merge("base", [(adapter, 1.0)]).save("merged")      # or takes it unsaved

Every input is a path or reference, or a checkpoint or adapter that is already open. A test holds
the signatures to the fields of the steps.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, TypeVar

from loratool import plugins
from loratool.adapter import Adapter
from loratool.checkpoint import Checkpoint
from loratool.engine import Drain, save_adapter, save_checkpoint
from loratool.inplace import complete
from loratool.ladder import Ladder
from loratool.opening import open_adapter, open_any, open_checkpoint
from loratool.reports import Report
from loratool.requantizing import RequantizedCheckpoint
from loratool.restoring import RestoredCheckpoint
from loratool.steps.compare import Compare
from loratool.steps.convert import Convert
from loratool.steps.diff import Diff
from loratool.steps.export import Export, LazyExport
from loratool.steps.extract import Extract
from loratool.steps.inspect import Inspect
from loratool.steps.merge import Merge, MergedCheckpoint
from loratool.steps.pull import Pull
from loratool.steps.push import Push
from loratool.steps.rescale import Rescale
from loratool.steps.stack import Stack
from loratool.steps.switch import Switch
from loratool.steps.unmerge import Unmerge
from loratool.steps.validate import Validate
from loratool.subtraction import SubtractedCheckpoint

CheckpointLike = str | Path | Checkpoint
AdapterLike = str | Path | Adapter


@dataclass(frozen=True)
class LazyAdapter(Adapter):
    """An adapter that is computed while it is saved or merged."""

    def save(
        self,
        path: str | Path,
        *,
        overwrite: bool = False,
        executor: str = "threads",
        format: str | None = None,
    ) -> Report:
        """Compute and write it; see `loratool.engine.save_adapter` for the errors."""
        return save_adapter(self, Path(path), Drain(executor, overwrite), format)


@dataclass(frozen=True)
class LazyLadder(Ladder):
    """Adapters of several ranks that are computed together while they are saved."""

    def save(
        self, path: str | Path, *, overwrite: bool = False, executor: str = "threads"
    ) -> Report:
        """Compute and write them; see `loratool.ladder.Ladder.write` for the errors."""
        return self.write(Path(path), Drain(executor, overwrite))


class _Saved(Checkpoint):
    def save(
        self, path: str | Path, *, overwrite: bool = False, executor: str = "threads"
    ) -> Report:
        """Compute and write it; see `loratool.engine.save_checkpoint` for the errors."""
        return save_checkpoint(self, Path(path), Drain(executor, overwrite))


@dataclass(frozen=True)
class LazyModel(_Saved, MergedCheckpoint):
    """A merged checkpoint that is computed while it is saved."""


@dataclass(frozen=True)
class LazyRequantized(_Saved, RequantizedCheckpoint):
    """A merged checkpoint in its base's scheme, computed while it is saved."""


@dataclass(frozen=True)
class LazyBase(_Saved, RestoredCheckpoint):
    """A base that is restored from a merged model while it is saved."""


@dataclass(frozen=True)
class LazyDifference(_Saved, SubtractedCheckpoint):
    """A merged model that adapters are subtracted from while it is saved."""


@dataclass(frozen=True)
class LazyOnnx(LazyExport):
    """An export that is done and verified while it is saved."""

    def save(self, path: str | Path, *, overwrite: bool = False) -> Report:
        """Export, verify and write it; see `loratool.steps.export.LazyExport.write`."""
        return self.write(Path(path), Drain(overwrite=overwrite))


def extract(
    base: CheckpointLike,
    finetuned: CheckpointLike,
    *,
    rank: int | None = None,
    energy: float | None = None,
    ratio: float | None = None,
    noise_floor: bool = False,
    budget: str | None = None,
    weigh: str | None = None,
    max_rank: int | None = None,
    ranks: Sequence[int] | None = None,
    target: Sequence[str] = (),
    exclude: Sequence[str] = (),
    factorizer: str = "krylov",
    compute: str | None = None,
    device: str = "cpu",
    seed: int = 0,
    dtype: str | None = None,
    sparse: float | None = None,
    lora_only: bool = False,
    embeddings: str = "whole",
    map: Sequence[str] = (),
    architecture: str = "",
    base_name: str = "",
    format: str = "peft",
    calibrate: str = "",
    calibrate_on: str | None = None,
    moments: str = "full",
    calibration_samples: int = 128,
    calibration_length: int | None = None,
    tokenizer: str = "",
    refine: int | None = None,
    refine_loss: str | None = None,
    refine_rate: float = 0.03,
    refine_penalty: float = 0.0,
) -> LazyAdapter | LazyLadder:
    """The difference of two checkpoints as a LoRA adapter, lazily.

    Args:
        base: the base model.
        finetuned: the fine-tuned model.
        rank: rank of every update, at most where another option chooses; None for 16, or for no
            limit where one does.
        energy: keep the smallest rank that captures this share of ||delta||^2, in (0, 1].
        ratio: keep the singular values of at least the largest divided by this.
        noise_floor: keep those above the edge of the rounding noise of the fine-tune's type.
        budget: bytes of all weights of the adapter ("64MiB"): factors get what is left beside
            tensors that are kept whole, spent where they capture most.
        weigh: what that is: "energy" of all updates together (None), or "relative": the shares of
            each update's own energy, which all count the same.
        max_rank: the largest rank that these may choose; None for 256 with a budget, else for none.
        ranks: several ranks: one adapter for each, from one pass.
        target: only tensors whose name matches one of these globs.
        exclude: no tensor whose name matches one of these globs.
        factorizer: "krylov", "exact" or "activation", or another plugin's name, with options.
        compute: "fp32" or "bf16": the precision of the products that find directions; "auto" for
            bf16 where the processor multiplies it natively; None for the factorizer's own.
        device: where to compute, as torch names it: "cpu", "cuda", "cuda:1".
        seed: of the factorizer's random start.
        dtype: of the factors: "fp32", "bf16", ...; None for bf16 with bf16 models, else fp32.
        sparse: keep this many of the largest entries that low rank leaves out of each matrix, or
            below 1 this share of its entries.
        lora_only: leave out what is not a low-rank update.
        embeddings: "whole" to keep changed embeddings whole, "lowrank" to factorize them.
        map: "OLD=NEW": the fine-tune's name or prefix OLD is NEW in the base.
        architecture: model class or type, where config.json does not say.
        base_name: the base's Hub id.
        format: the adapter format to write.
        calibrate: a file of texts, token ids or images, or a folder of images: the error of the
            layers' outputs for these is made small, not that of the weights.
        calibrate_on: which model they are run through: "finetuned", "base", or "merged", the
            fine-tune beside the model that the factors make; None for "merged", or "finetuned"
            with diagonal moments or `sparse`.
        moments: "full" second moments of each layer's inputs, or their "diagonal".
        calibration_samples: how many of them are used at most.
        calibration_length: how many tokens of each; None for 512, or what the model takes.
        tokenizer: a directory with the tokenizer, if it is not the model's own.
        refine: train the factors by so many steps to answer as the fine-tune; None for not at all.
        refine_loss: "kl" or "mse"; None for "kl" where there are logits of classes.
        refine_rate: learning rate, as a share of each factor's root mean square.
        refine_penalty: weight of the distance from the extracted factors.

    Returns:
        The adapter; with `ranks`, all of them: `adapters` has each by its rank.

    Raises:
        InputError: a checkpoint cannot be read, the budget is too small, or there is no such
            device.
        MismatchError: the two do not belong together.
        UsageError: an option's value makes no sense.
    """
    step = Extract(
        rank, energy, ratio, noise_floor, budget, weigh, max_rank,
        None if ranks is None else ",".join(str(each) for each in ranks),
        tuple(target), tuple(exclude), factorizer, compute, device, seed, dtype, sparse,
        lora_only, embeddings, tuple(map), architecture, base_name, format, calibrate, calibrate_on,
        moments, calibration_samples, calibration_length, tokenizer, refine, refine_loss,
        refine_rate, refine_penalty,
    )  # fmt: skip
    found = step.run(_checkpoint(base), _checkpoint(finetuned))
    if isinstance(found, Ladder):
        return LazyLadder({r: _as(LazyAdapter, each) for r, each in found.adapters.items()})
    return _as(LazyAdapter, found)


def validate(
    adapter: AdapterLike,
    base: CheckpointLike | None = None,
    merged: CheckpointLike | None = None,
    *,
    deep: bool = False,
    weight: float = 1.0,
    servers: Sequence[str] = (),
) -> Report:
    """Check an adapter against a base, or servers, by headers; the report lists every problem.

    Args:
        adapter: the adapter.
        base: the base model; not needed with `servers`.
        merged: a merged model, by anybody, to prove: the report tells whether it is the base with
            this adapter added and nothing else, and its `status` is 3 where that cannot be told.
        deep: read the values too, and look for NaN and Inf.
        weight: the strength that `merged` should have been merged at.
        servers: those that are to load it: "vllm", "tensorrt-llm", "sglang", "lorax", "llama.cpp"
            or "diffusers"; `data["servers"]` says what each refuses, drops or misreads, and which
            commands cure it.

    Raises:
        InputError: a file cannot be read, or holds NaN or Inf in what has to be compared.
        MismatchError: `merged` is of another architecture, or quantized.
        UsageError: a weight of 0, or one that is not finite, or one without `merged`; neither a
            base nor servers; servers with `merged`, or with an adapter that is not saved.
    """
    step = Validate(deep, weight, tuple(servers))
    opened_base = None if base is None else _checkpoint(base)
    opened = None if merged is None else _checkpoint(merged)
    return step.run(_adapter(adapter), opened_base, opened)


def merge(
    base: CheckpointLike,
    adapters: Sequence[tuple[AdapterLike, float]],
    *,
    dtype: str | None = None,
    max_shard_size: str | None = None,
    architecture: str = "",
    rounding: str = "nearest",
    seed: int = 0,
    reversible: bool = False,
    embed_adapter: bool = True,
    requantize: bool = False,
    force: bool = False,
) -> LazyModel | LazyRequantized:
    """The base with adapters worked into its weights, lazily.

    Args:
        base: the base model.
        adapters: (adapter, weight) pairs, in any order.
        dtype: of the merged model: "bf16", ...; None for the base's, and bf16 for what is
            quantized there.
        max_shard_size: start a new file beyond this size ("5GB"); None for the base's files.
        architecture: model class or type, where config.json does not say.
        rounding: "nearest", or "stochastic".
        seed: of stochastic rounding.
        reversible: keep a record from which `unmerge` restores the base's bits.
        embed_adapter: keep the adapters themselves in it, not only their digests.
        requantize: write a quantized base's tensors in its scheme again. Saving raises InputError
            where the update drowns in the error of that,
        force: unless this is set.

    Raises:
        InputError: a file cannot be read.
        MismatchError: an adapter does not fit the base; all complaints at once.
    """
    step = Merge(
        dtype, max_shard_size, architecture, rounding, seed, reversible, embed_adapter,
        requantize, force,
    )  # fmt: skip
    found = step.run(_checkpoint(base), _weighted(adapters))
    if isinstance(found, RequantizedCheckpoint):
        return _as(LazyRequantized, found)
    return _as(LazyModel, found)


def unmerge(
    merged: CheckpointLike,
    adapters: Sequence[tuple[AdapterLike, float]] = (),
    base: CheckpointLike | None = None,
    *,
    only: Sequence[str] = (),
) -> LazyBase | LazyModel | LazyDifference:
    """A merged model without its adapters, lazily: to the bit with a record, else approximately.

    Args:
        merged: the merged model.
        adapters: (adapter, weight) pairs to take out; with a record, none for all of the last
            merge.
        base: without a record: the base to compare the result with.
        only: take out only these, by their names in the record.

    Returns:
        The base; with adapters left, the base merged with these again; without a record, the
        merged model with the adapters subtracted.

    Raises:
        InputError: a file cannot be read, there is neither a record nor an adapter, or the record
            or the model was changed after the merge.
        MismatchError: an adapter was not merged, or with another weight.
    """
    opened = None if base is None else _checkpoint(base)
    found = Unmerge(tuple(only)).run(_checkpoint(merged), _weighted(adapters), opened)
    if isinstance(found, RestoredCheckpoint):
        return _as(LazyBase, found)
    if isinstance(found, MergedCheckpoint):
        return _as(LazyModel, found)
    return _as(LazyDifference, found)


def switch(merged: str | Path, to: Sequence[tuple[AdapterLike, float]]) -> Report:
    """Put other adapters in the place of the merged ones, in the model's own files, now.

    An earlier switch of this model that was killed half-way is completed first.

    Args:
        merged: a model that was merged with `reversible`.
        to: (adapter, weight) pairs.

    Raises:
        InputError: the model has no record, was changed after the merge, or shares its files.
        MismatchError: an adapter does not fit the base.
        OutputError: the place is not writable, too small, or in use.
    """
    complete(Path(merged))
    return Switch().run(_checkpoint(merged), _weighted(to)).apply(Drain())


def rescale(
    adapter: AdapterLike,
    *,
    by: float | None = None,
    alpha: float | None = None,
    keep_delta: bool = False,
    rank: int | None = None,
    energy: float | None = None,
    ratio: float | None = None,
    budget: str | None = None,
    normalize: bool = False,
    pad: int | None = None,
    balance: bool = False,
    dtype: str | None = None,
) -> LazyAdapter:
    """An adapter with another strength, alpha, rank, size or layout, lazily.

    Args:
        adapter: the adapter.
        by: multiply the delta by this; a negative sign goes into B.
        alpha: another alpha for every update, under the adapter's own convention.
        keep_delta: with `alpha`: divide B, so that the delta stays the same.
        rank: keep at most this rank of every update.
        energy: keep the smallest rank that captures this share of ||delta||^2, in (0, 1].
        ratio: keep the singular values of at least the largest divided by this.
        budget: bytes of all factors together ("20MiB"), spent where they capture most.
        normalize: one rank for all, alpha = rank, no patterns.
        pad: with `normalize`: zeros up to this rank.
        balance: make A and B equally long.
        dtype: of the factors: "fp16", ...; None for theirs.

    Raises:
        InputError: the adapter cannot be read or has nothing to rescale, or the budget is smaller
            than the least that can be written.
        MismatchError: the adapter's files contradict themselves, or it holds kinds of updates that
            have to be made plain LoRA first; all complaints at once.
        UsageError: an option's value makes no sense, or two contradict each other.
    """
    step = Rescale(
        by, alpha, keep_delta, rank, energy, ratio, budget, normalize, pad, balance, dtype
    )
    return _as(LazyAdapter, step.run(_adapter(adapter)))


def convert(
    adapter: AdapterLike,
    base: CheckpointLike | None = None,
    *,
    format: str | None = None,
    to_lora: bool = False,
    rank: int | None = None,
    energy: float | None = None,
    lora_only: bool = False,
    drop: bool = False,
    alpha: float | None = None,
    enable_lora: str = "",
    fan_in_fan_out: bool = False,
    dtype: str | None = None,
    factorizer: str = "krylov",
    seed: int = 0,
) -> LazyAdapter:
    """An adapter in another format, or as plain LoRA, lazily.

    Another format changes no value. `to_lora` makes low-rank updates of every other kind, exactly
    where the rank allows it, and says for each what was lost.

    Args:
        adapter: the adapter.
        base: the model that it is for: resolves names, and DoRA and IA3 are relative to it.
        format: the adapter format to write; None for the adapter's own.
        to_lora: make plain low-rank updates of every other kind.
        rank: of these, at most; with neither this nor `energy`: exact up to rank 64, else the
            smallest rank up to 64 that captures 99.9% of ||delta||^2.
        energy: keep the smallest rank that captures this share of ||delta||^2, in (0, 1].
        lora_only: leave out what is not a low-rank update.
        drop: leave out what the format cannot carry.
        alpha: the adapter's alpha, where its files do not say it.
        enable_lora: "1,0,1": which parts of fused weights have an update, where its files do not
            say it.
        fan_in_fan_out: the base stores adapted weights as (in, out), where its files do not say it.
        dtype: of the factors that are made: "bf16", ...; None for fp32.
        factorizer: of whole matrices, with options.
        seed: of the factorizer's random start.

    Raises:
        InputError: a file cannot be read, the base is needed, an option tells what the adapter says
            itself, or nothing is left.
        MismatchError: the adapter's files contradict themselves, it does not fit the base, or the
            format cannot carry all of it; all complaints at once.
        UsageError: an option's value makes no sense, or there is nothing to do.
    """
    step = Convert(
        format, to_lora, rank, energy, lora_only, drop, alpha, enable_lora, fan_in_fan_out, dtype,
        factorizer, seed,
    )  # fmt: skip
    opened = None if base is None else _checkpoint(base)
    return _as(LazyAdapter, step.run(_adapter(adapter), opened))


def inspect(
    ref: AdapterLike | Checkpoint,
    *,
    deep: bool = False,
    all: bool = False,
    plot: str | None = None,
) -> Report:
    """What an adapter or a checkpoint is made of; `data` is always complete.

    Args:
        ref: the adapter or checkpoint.
        deep: read a checkpoint's values, too: norms and digests.
        all: list every module in the report's table, not only the largest.
        plot: draw it, too, to this .svg or .png file, which is replaced; a checkpoint: with `deep`.

    Raises:
        InputError: it cannot be read, or matplotlib is missing.
        FormatError: no format recognises it.
        OutputError: the picture cannot be written.
        UsageError: a picture of a checkpoint without `deep`, or with another suffix.
    """
    opened = ref if isinstance(ref, Adapter | Checkpoint) else open_any(ref)
    return Inspect(deep, all, plot).run(opened)


def diff(
    base: CheckpointLike,
    finetuned: CheckpointLike,
    *,
    max_rank: int = 128,
    quick: bool = False,
    target: Sequence[str] = (),
    exclude: Sequence[str] = (),
    embeddings: str = "whole",
    map: Sequence[str] = (),
    architecture: str = "",
    factorizer: str = "krylov",
    seed: int = 0,
    all: bool = False,
    plot: str | None = None,
) -> Report:
    """What a fine-tune changed, read now; `data` has every tensor's numbers.

    Args:
        base: the base model.
        finetuned: the fine-tuned model.
        max_rank: how many singular values of each matrix to find.
        quick: no singular values: norms and counts only.
        target: only tensors whose name matches one of these globs.
        exclude: no tensor whose name matches one of these globs.
        embeddings: "lowrank" to find those of changed embeddings, too.
        map: "OLD=NEW": the fine-tune's name or prefix OLD is NEW in the base.
        architecture: model class or type, where config.json does not say.
        factorizer: "krylov" or "exact", or another plugin's name, with options.
        seed: of the factorizer's random start.
        all: list every tensor in the report's table, not kinds of them.
        plot: draw it, too, to this .svg or .png file, which is replaced.

    Raises:
        InputError: a checkpoint cannot be read, a tensor holds NaN or Inf, or matplotlib is
            missing.
        MismatchError: the two do not belong together.
        OutputError: the picture cannot be written.
        UsageError: an option's value makes no sense.
    """
    step = Diff(
        max_rank, quick, tuple(target), tuple(exclude), embeddings, tuple(map), architecture,
        factorizer, seed, all, plot,
    )  # fmt: skip
    return step.run(_checkpoint(base), _checkpoint(finetuned)).measure(Drain())


def compare(
    base: CheckpointLike,
    finetuned: CheckpointLike,
    adapters: Sequence[tuple[AdapterLike, float]],
    *,
    inputs: str | Path | None = None,
    tokenizer: str | Path | None = None,
    samples: int = 128,
    length: int | None = None,
    ranks: Sequence[int] | None = None,
    architecture: str = "",
    map: Sequence[str] = (),
    device: str = "cpu",
    plot: str | Path | None = None,
) -> Report:
    """How close adapters bring a base to a fine-tune, on inputs, computed now.

    `data["models"]` has a model each: the base, rank 0, every adapter and what it is cut to, and
    the fine-tune itself, with `kl`, `agreement`, `cosine`, `relative_error` and `layer_errors`.

    Args:
        base: the base model.
        finetuned: the fine-tuned model, which all others are compared with.
        adapters: (adapter, weight) pairs, each of which is compared by itself.
        inputs: file of texts or token ids, or folder of images, to run the models on; needed.
        tokenizer: directory of the tokenizer or image processor; None for the model's own.
        samples: how many samples to use, at most.
        length: tokens of each, at most; None for 512, or the model's positions if fewer.
        ranks: compare every adapter cut to these ranks, too.
        architecture: model class or type, where config.json does not say.
        map: "OLD=NEW": the fine-tune's name or prefix OLD is NEW in the base.
        device: where to compute: "cpu", "cuda", ...
        plot: draw it, too, to this .svg or .png file, which is replaced.

    Raises:
        InputError: a model cannot be run, the inputs cannot be used, or the device or matplotlib
            is absent.
        MismatchError: an adapter does not fit the base, or cannot be cut.
        OutputError: the picture cannot be written, or temporary files have no room.
        UsageError: an option's value makes no sense.
    """
    step = Compare(
        None if inputs is None else str(inputs),
        None if tokenizer is None else str(tokenizer),
        samples,
        length,
        None if ranks is None else ",".join(str(rank) for rank in ranks),
        architecture,
        tuple(map),
        device,
        None if plot is None else str(plot),
    )
    opened = _checkpoint(base), _checkpoint(finetuned)
    return step.run(*opened, _weighted(adapters)).measure(Drain())


def bench(
    models: Sequence[str | Path],
    *,
    against: str | Path | None = None,
    shape: Sequence[str] = ("1x128",),
    adapter: Sequence[str | Path] = (),
    provider: str = "cpu",
    strict: bool = False,
    threads: int = 0,
    warmups: int = 10,
    repeats: int = 20,
    limit: float = 60.0,
    seed: int = 0,
    vocab: int | None = None,
    dim: Sequence[str] = (),
    inputs: str | Path | None = None,
    plot: str | Path | None = None,
) -> Report:
    """How fast ONNX models run in ONNX Runtime, one beside the other, measured now.

    `data["models"]` has a model each: `load_seconds`, `private_bytes`, `disk_bytes`, `own_bytes`,
    `graphs`. `data["results"]` has a graph and shape each, with a `noise_floor` and, for every
    model, `median`, `throughput`, `ratio`, `ratio_interval`, `verdict` and all `seconds`.

    Args:
        models: folders of ONNX graphs, or .onnx files.
        against: the model that the others are compared with; None for the first.
        shape: "BATCHxSEQUENCE", or "BATCHxSEQUENCE+PAST" for a graph with a cache.
        adapter: .onnx_adapter files: models that take one are measured with it, too.
        provider: where to run: "cpu", "cuda", ...
        strict: fail if the provider cannot be had, instead of using the CPU.
        threads: of each operator; 0 for ONNX Runtime's choice.
        warmups: rounds that do not count.
        repeats: rounds that count, at least 3.
        limit: seconds for each model and shape; rounds that do not fit in are left out.
        seed: of inputs, order and intervals.
        vocab: token ids are below this; None for what config.json or the graph says, or 1000.
        dim: "NAME=SIZE": size of an axis that is called so in a graph.
        inputs: an .npz file of inputs that cannot be made up.
        plot: draw it, too, to this .svg or .png file, which is replaced.

    Raises:
        InputError: there is no graph, weights are missing, inputs cannot be made up, or ONNX
            Runtime refuses something.
        MismatchError: models take other inputs than the reference.
        OutputError: the picture cannot be written.
        UsageError: an option's value makes no sense.
    """
    step = plugins.load("steps", "bench")(
        None if against is None else str(against),
        tuple(shape),
        tuple(str(file) for file in adapter),
        provider,
        strict,
        threads,
        warmups,
        repeats,
        limit,
        seed,
        vocab,
        tuple(dim),
        None if inputs is None else str(inputs),
        None if plot is None else str(plot),
    )
    report: Report = step.run([str(model) for model in models]).measure(Drain())
    return report


def stack(
    adapters: Sequence[tuple[AdapterLike, float]],
    base: CheckpointLike | None = None,
    *,
    combiner: str = "total",
    weights: Sequence[str] = (),
    rank: int | None = None,
    energy: float | None = None,
    ratio: float | None = None,
    dtype: str | None = None,
    factorizer: str = "krylov",
    seed: int = 0,
) -> LazyAdapter:
    """Several adapters as one, lazily: by default their exact weighted sum.

    Args:
        adapters: (adapter, weight) pairs; a weight of 0 leaves an adapter out.
        base: the base model, where the adapters name its weights differently.
        combiner: "total", or another plugin's name, with options ("ties:density=0.5").
        weights: "GLOB=W" or "ADAPTER:GLOB=W": multiply the weight of matching tensors or modules,
            of all adapters or of one; the last match counts. An adapter is called by the last part
            of its path (by more parts where that is not unique), a computed one #1, #2, ... by its
            position.
        rank: recompress every update to this rank at most.
        energy: recompress to the smallest rank that keeps this share of ||delta||^2, in (0, 1].
        ratio: recompress to the singular values of at least the largest divided by this.
        dtype: of the factors: "fp32", "bf16", ...; None for the adapters', or fp32 where that keeps
            a sum exact.
        factorizer: how dense combinations are factorized, with options.
        seed: of combiners and factorizers that draw random numbers.

    Raises:
        InputError: a file cannot be read, or nothing is left.
        MismatchError: the adapters do not belong together, or hold kinds of updates that have to be
            made plain LoRA first.
        UsageError: an option's value makes no sense.
    """
    step = Stack(combiner, tuple(weights), rank, energy, ratio, dtype, factorizer, seed)
    opened = None if base is None else _checkpoint(base)
    return _as(LazyAdapter, step.run(_weighted(adapters), opened))


def export(
    base: CheckpointLike,
    adapters: Sequence[tuple[AdapterLike, float]] = (),
    *,
    device: str = "cpu",
    dtype: str | None = None,
    fuse: bool = True,
    cache: bool = True,
    link: bool = False,
    graft: str = "",
    name: str = "",
    swappable: bool = False,
    max_rank: int = 64,
    module: str = "",
    strict: bool = False,
    exporter: str = "onnx",
    architecture: str = "",
) -> LazyOnnx:
    """The base with adapters merged on the fly, as ONNX, lazily.

    Args:
        base: the base model.
        adapters: (adapter, weight) pairs, in any order.
        device: what it is to run on: "cpu", "cuda", "webgpu" or "dml".
        dtype: "fp32", "fp16" or "bf16"; None for fp32 on the CPU and fp16 elsewhere.
        fuse: use ONNX Runtime's fused operators for the device, or standard ones alone.
        cache: give decoders a key-value cache: one graph for the prompt, one for each token.
        link: point the graph into the merged .safetensors, written beside it.
        graft: an ONNX model of the base that the change is put onto, without tracing.
        name: of the grafted graph; "" for the adapters'.
        swappable: export the base, with the adapters beside it to switch at every request.
        max_rank: largest rank of an adapter of a swappable export.
        module: a function that gives any torch module, as "package.module:function".
        strict: fail if the device cannot be used here to verify the result.
        exporter: the exporter plugin, with options ("onnx:opset=21").
        architecture: model class or type, where config.json does not say.

    Raises:
        InputError: a file cannot be read, or the model's class is not known.
        MismatchError: an adapter does not fit the base; all complaints at once.
        UsageError: options contradict each other.
    """
    step = Export(
        device=device, dtype=dtype, fuse=fuse, cache=cache, link=link, graft=graft, name=name,
        swappable=swappable, max_rank=max_rank, module=module,
        strict=strict, exporter=exporter, architecture=architecture,
    )  # fmt: skip
    return _as(LazyOnnx, step.run(_checkpoint(base), _weighted(adapters)))


def pull(
    ref: str,
    base: CheckpointLike | None = None,
    *,
    directory: str | None = None,
    overwrite: bool = False,
    allow_pickle: bool = False,
) -> Report:
    """Download an adapter or a model, now, and check it; `data["path"]` says where it is.

    Args:
        ref: a name on the Hub, or a URL.
        base: a base to check the adapter against, by headers.
        directory: where to; None for the cache.
        overwrite: replace a directory that is not empty.
        allow_pickle: bring pickle files, too.

    Raises:
        InputError: it is not there, cannot be had, or is not what the store or its manifest says.
        FormatError: it holds neither an adapter nor a model, or only pickle files.
        MismatchError: its files contradict themselves, or it does not fit the base.
        OutputError: the output place is taken or too small.
    """
    opened = None if base is None else _checkpoint(base)
    return Pull(directory, overwrite, allow_pickle).run(ref, opened)


def push(
    folder: str | Path,
    target: str,
    base: str | Path | None = None,
    *,
    private: bool = False,
    public: bool = False,
    revision: str = "",
    tag: str = "",
    message: str = "",
    pr: bool = False,
    dry_run: bool = False,
    license: str = "",
    base_name: str = "",
    force: bool = False,
) -> Report:
    """Publish an adapter, a model or an ONNX folder; `data` names the URL and the commit.

    Args:
        folder: a directory of this machine.
        target: "org/name" on the Hub, or a URL of another store.
        base: the base, to check an adapter against and to inherit its license.
        private: make a new repository private.
        public: make a new repository public, whatever the account's default.
        revision: the branch, created where it is missing; "" for the main one.
        tag: put on the commit.
        message: of the commit.
        pr: propose the change as a pull request.
        dry_run: show what would be sent, and send nothing.
        license: its identifier on the Hub, for the card.
        base_name: the base's Hub id.
        force: replace what is of another kind, a card that others wrote, a tag elsewhere.

    Raises:
        InputError: there is nothing that can be published, or a file holds an access token or a
            path of this machine that cannot be taken out.
        MismatchError: the adapter is faulty, or does not fit the base.
        OutputError: the place cannot be written, or holds something else; nothing was changed.
        UsageError: options contradict each other, or mean nothing there.
    """
    step = Push(
        private, public, revision, tag, message, pr, dry_run, license, base_name, force
    )  # fmt: skip
    return step.run(str(folder), target, None if base is None else str(base))


def _checkpoint(source: CheckpointLike) -> Checkpoint:
    return source if isinstance(source, Checkpoint) else open_checkpoint(source)


def _adapter(source: AdapterLike) -> Adapter:
    return source if isinstance(source, Adapter) else open_adapter(source)


def _weighted(adapters: Sequence[tuple[AdapterLike, float]]) -> list[tuple[Adapter, float]]:
    return [(_adapter(adapter), weight) for adapter, weight in adapters]


T = TypeVar("T")


def _as(cls: type[T], value: Any) -> T:
    """The same fields as an instance of a subclass that can save itself."""
    return cls(**{field.name: getattr(value, field.name) for field in fields(value)})
