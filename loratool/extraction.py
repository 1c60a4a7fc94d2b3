"""How the change of one tensor becomes an update: planned by headers, computed when drained."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache
from typing import TYPE_CHECKING, Any

from loratool.adapter import LazyUpdate
from loratool.ahead import DigestsAhead
from loratool.delta import DeltaReader, Sample
from loratool.linalg import RankPolicy
from loratool.pairing import Change, Pair
from loratool.reports import counted, listed
from loratool.suspicion import Suspicion, is_recovered, suspicion_facts, suspicion_lines
from loratool.updates import LowRank, Sparse, Update, entries_of, matrix_shape, swapped

if TYPE_CHECKING:
    from loratool.calibrated import Calibration
    from loratool.representation import Advisor

Updates = dict[str, LazyUpdate]


@dataclass(frozen=True)
class Extraction:
    """What every update is made with.

    Attributes:
        pair: both models.
        reader: reads and factorizes.
        ahead: takes digests while nothing else can be done yet.
        policy: how many singular values are kept.
        dtype: safetensors name of the factors' type, or None for the usual one.
        calibration: what factors are fitted to, or None.
        sparse: how many entries are kept besides, or which share; None for none.
        advisor: sees the factors of truncated SVDs.
        is_precise: whether some factors may be kept in fp32, whatever the usual type is.
    """

    pair: Pair
    reader: DeltaReader
    ahead: DigestsAhead
    policy: RankPolicy
    dtype: str | None
    calibration: Calibration | None
    sparse: float | None
    advisor: Advisor
    is_precise: bool = False

    def updates(self) -> tuple[Updates, Updates]:
        """The low-rank updates, and what has to be kept whole."""
        low_rank: Updates = {}
        whole: Updates = {}
        for change in self.pair.changes():
            if change.factored:
                low_rank[change.name] = self._low_rank(change)
            else:
                whole[change.name] = self._replacement(change)
        return low_rank, whole

    def _low_rank(self, change: Change) -> LazyUpdate:
        after = change.after
        shape = swapped(after.shape) if change.transposed else after.shape
        experts = change.kind == "experts"
        sparse = None if experts else self.sparse
        matrix = (shape[-2], shape[-1]) if experts else matrix_shape(shape)
        load = self._experts if experts else self._factors
        return LazyUpdate(
            change.name,
            "experts" if experts else "sparse" if sparse is not None else "low_rank",
            shape,
            "F32" if self.is_precise else factor_dtype(change, self.dtype),
            lambda: load(change),
            rank=self.policy.limit(matrix) if self.policy.is_fixed else None,
            transposed=change.transposed,
            embedding=change.kind == "embedding",
            entries=0 if sparse is None else entries_of(sparse, after.numel),
        )

    def _factors(self, change: Change) -> Update | None:
        before, after, transposed = change.before, change.after, change.transposed
        assert before is not None  # of what is factored
        dtype = factor_dtype(change, self.dtype)
        found: LowRank | Sparse | None
        if self.calibration is not None:
            found = self.calibration.load(self.reader, change.name)
        else:
            found = self.reader.factorize(before, after, transposed, dtype)
            if not is_recovered(found):
                self.advisor.see(change.name, found, before, after)
        if self.sparse is not None:
            from loratool.sparse import with_entries

            found = with_entries(found, before, after, transposed, self.sparse, dtype)
        return found

    def _experts(self, change: Change) -> Update | None:
        assert change.before is not None  # of what is factored
        dtype = factor_dtype(change, self.dtype)
        return self.reader.factorize_experts(change.before, change.after, change.transposed, dtype)

    def _replacement(self, change: Change) -> LazyUpdate:
        tensor, before = change.after, change.before
        return LazyUpdate(
            tensor.name,
            "replacement",
            tensor.shape,
            tensor.dtype,
            lambda: self.reader.replace(before, tensor),
        )

    def notes(self, low_rank: Mapping[str, LazyUpdate], rank: int | None) -> tuple[str, ...]:
        """What headers tell that the user should hear.

        Args:
            low_rank: the low-rank updates.
            rank: that all of them were to have, if one was asked for.
        """
        calibrated = () if self.calibration is None else self.calibration.notes
        return (
            *self.pair.notes,
            *_table_notes(self.pair),
            *_rank_notes(self.pair, rank),
            *(_sparse_notes(low_rank) if self.sparse is not None else ()),
            *calibrated,
        )

    def lines(self) -> tuple[str, ...]:
        """What the report says after draining; no advice to those who follow it already."""
        calibrated = () if self.calibration is None else self.calibration.lines()
        suspicion = self._suspicion()
        # Of a merged LoRA only the rounding is beyond its rank; of what may be one, a line tells.
        silent = self.sparse is not None or suspicion is not None
        advice = () if silent else self.advisor.lines()
        may_be_both = suspicion is not None and suspicion.is_blind and self.sparse is None
        entries = self.advisor.entries() if may_be_both else 0.0
        otherwise = f"a sparse one, which `--rank 1 --sparse {entries:g}` keeps" if entries else ""
        return (
            *_noise_lines(self.reader.under_noise),
            *calibrated,
            *_choice_lines(self.reader),
            *suspicion_lines(suspicion, otherwise),
            *advice,
        )

    def _suspicion(self) -> Suspicion | None:
        return self.reader.suspicion() if self.calibration is None else None

    def facts(self) -> dict[str, Any]:
        """What the manifest says after draining."""
        reader, pair = self.reader, self.pair
        norms = {name: total**0.5 for name, total in sorted(reader.under_noise.items())}
        return {
            **({} if self.calibration is None else {"calibration": self.calibration.facts()}),
            **self.advisor.facts(),
            **suspicion_facts(self._suspicion()),
            **({"chosen_factorizer": choice.name} if (choice := reader.choice()) else {}),
            **({"under_noise": norms} if self.policy.floor is not None else {}),
            "duplicates": reader.duplicates(),
            "base": {"bytes": pair.base.nbytes, **reader.base_digests()},
            "finetuned": {"bytes": pair.finetuned.nbytes, **reader.tuned_digests()},
        }


def samples_of(pair: Pair) -> list[Sample]:
    """The matrices that can tell what kind of fine-tune it is."""
    return [
        (change.before, change.after, change.transposed)
        for change in pair.changes()
        if change.factored and change.kind != "experts" and change.before is not None
    ]


def _choice_lines(reader: DeltaReader) -> list[str]:
    choice = reader.choice()
    return [f"factorizer: {choice.name}, for {choice.reason}"] if choice else []


def factor_dtype(change: Change, dtype: str | None) -> str:
    """The type of a target's factors: the one asked for, or that of the base if it is bf16."""
    bf16 = change.before is not None and change.before.dtype == "BF16"
    return dtype or ("BF16" if bf16 else "F32")


def tied_heads(pair: Pair, low_rank: Updates) -> Updates:
    """The same updates again for heads that share the values of embeddings.

    PEFT loads them, for it takes the two for one only as long as nothing adapts them. The table's
    update in `low_rank` becomes one that is computed once.
    """
    heads = {}
    for head, source in pair.tied_tables().items():
        if source in low_rank:
            once = cache(low_rank[source].load)  # the factors are small beside the table
            found = low_rank[source] = replace(low_rank[source], load=once)
            heads[head] = replace(found, name=head, embedding=False, transposed=False)
    return heads


def _table_notes(pair: Pair) -> list[str]:
    if not pair.selection.lowrank_tables:
        return []
    tables = [n for n in pair.selected if pair.kinds.get(n) == "embedding"]
    return [f"{name}: kept whole: {why}" for name in tables if (why := pair.why_whole(name))]


def _rank_notes(pair: Pair, rank: int | None) -> list[str]:
    linear = [n for n in pair.selected if pair.skeleton.kinds.get(n) in ("linear", "conv1d")]
    small = [n for n in linear if rank and min(pair.finetuned[n].shape) < rank]
    if not small:
        return []
    return [
        f"rank {rank} is more than {len(small)} matrices have ({small[0]}, ...): "
        "these get their full rank"
    ]


def _sparse_notes(low_rank: Mapping[str, LazyUpdate]) -> list[str]:
    found = [name for name, update in low_rank.items() if update.kind == "experts"]
    if not found:
        return []
    return [f"--sparse: {listed(found, 2)}: experts in one tensor get no single entries"]


def _noise_lines(under: Mapping[str, float]) -> tuple[str, ...]:
    """What is said of matrices that hold nothing but noise."""
    if not under:
        return ()
    return (
        f"{counted(len(under), 'update')} left out, which cannot be told from rounding: "
        f"{listed(sorted(under), 3)}",
    )
