"""The model that a base and updates make, whose tensors are computed when they are read.

What a merge of the extracted adapter would give, for running it while its updates are still being
made: a tensor asks for its update when its values are wanted.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import TYPE_CHECKING

from loratool.checkpoint import Checkpoint, LazyTensor
from loratool.deltas import delta_of
from loratool.merging import Survival, merged_blocks
from loratool.pairing import Change, Pair
from loratool.running import Model
from loratool.updates import Experts, LowRank

if TYPE_CHECKING:
    import torch

UpdateOf = Callable[[Change], LowRank | Experts | None]


def built_model(pair: Pair, tuned: Model, shell: Model, update_of: UpdateOf, heads: bool) -> Model:
    """The fine-tune's class with the base's weights and what updates add to them.

    Args:
        pair: both models.
        tuned: the fine-tune, opened for running.
        shell: the same, opened once more: two that run at a time need two shells.
        update_of: makes, or has made, the update of what is factorized; None where there is none.
        heads: whether the adapter carries what is not factorized; if not, it is the base's.

    Returns:
        A model that shares `shell`'s shell. What the base lacks is the fine-tune's.
    """
    changes = {change.name: change for change in pair.changes()}

    def tensor(name: str) -> LazyTensor:
        own = tuned.tensors[name]
        twin = pair.finetuned.aliases.get(name) or pair.skeleton.tied.get(name)
        if name not in changes and twin in changes:
            return tensor(twin).renamed(name)
        change, other = changes.get(name), pair.alignment.pairs.get(name)
        before = pair.base[other] if other is not None else None
        if change is not None and change.factored:
            return _updated(change, update_of)
        if before is None or before.shape != own.shape or name in pair.buffers:
            return own
        return own if change is not None and heads else before.renamed(name)

    tensors = {name: tensor(name) for name in tuned.tensors}
    checkpoint = Checkpoint(tensors, config=tuned.tensors.config, aliases=tuned.tensors.aliases)
    return replace(shell, tensors=checkpoint, label=f"{tuned.label} as it is built")


def _updated(change: Change, update_of: UpdateOf) -> LazyTensor:
    """The base's tensor with an update, rounded to its type as in a merge."""
    before = change.before
    assert before is not None  # of what is factored
    base: LazyTensor = before

    def blocks() -> Iterator[torch.Tensor]:
        update = update_of(change)
        if update is None:
            yield from base.blocks()
            return
        update = update.transposed() if change.transposed else update
        delta = delta_of([(update, 1.0)], base.shape)
        name = f"{base.origin}: {base.name}"
        yield from merged_blocks(base.read(), delta, base.dtype, Survival(), name)

    return LazyTensor(change.name, base.dtype, base.shape, blocks, base.origin)
