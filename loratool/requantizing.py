"""A merged model written back in the scheme that its base was quantized in, and what that costs.

Values are never added to codes: the base is dequantized, the update added exactly, and the sum
quantized anew. The rounding of that is as coarse as the codes are, and may be larger than the whole
update; it is measured against it, tensor by tensor, while the model is written. What no adapter
touches keeps its codes, bit for bit.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING, Any

from loratool.application import Applied, Part, Trace
from loratool.checkpoint import Checkpoint, Form, LazyTensor, Stored
from loratool.errors import InputError, MismatchError, UsageError
from loratool.linalg import tiles
from loratool.reports import Report, Table, counted, format_bytes, format_share, listed
from loratool.shards import safetensors_name

if TYPE_CHECKING:
    import torch

_LISTED = 10
_LEAST_SURVIVAL = 0.5


@dataclass
class Loss:
    """What requantization does to one tensor, once it was computed.

    Attributes:
        scheme: in words.
        elements: the tensor's.
        error: ||Q(W + d) - (W + d)||_F, Q being quantization and what it is read as again.
        update: ||d||_F.
        survived: <Q(W + d) - W, d> / ||d||_F^2, the share of the update that is left.
    """

    scheme: str
    elements: int
    error: float = 0.0
    update: float = 0.0
    survived: float = 1.0

    @property
    def drowns(self) -> bool:
        """Whether what is written holds more error than update, or less than half of the update.

        W lies on the grid of the codes. An update of less than half their distance is rounded away
        whole, and the error that makes is never larger than the update: it shows in the share that
        is left. It is where new scales move the grid that the error is larger.
        """
        return self.update > 0 and (self.error >= self.update or self.survived < _LEAST_SURVIVAL)

    @property
    def words(self) -> str:
        """The norms and the share, for people."""
        return (
            f"error {self.error:.3g}, update {self.update:.3g}, of which {_share(self.survived)} "
            "is left"
        )


@dataclass(frozen=True)
class RequantizedCheckpoint(Checkpoint):
    """The stored tensors of a merged model in its base's scheme, computed while they are read.

    Attributes:
        losses: tensor -> what requantization does to it.
        counts: how many tensors were updated, and how many keep their codes.
        force: whether it is written even where updates drown.
    """

    losses: Mapping[str, Loss] = field(default_factory=dict)
    counts: Mapping[str, int] = field(default_factory=dict)
    force: bool = False

    def beside(self, folder: Path) -> AbstractContextManager[Callable[[str], None]]:
        """Writes nothing; at the end, raises InputError where updates drown."""
        return self._judged()

    @contextmanager
    def _judged(self) -> Iterator[Callable[[str], None]]:
        yield lambda name: None
        drowned = {name: loss for name, loss in self.losses.items() if loss.drowns}
        if not drowned or self.force:
            return
        worst = sorted(drowned, key=lambda name: drowned[name].survived)
        lines = [f"  {name}: {drowned[name].words}" for name in worst[:_LISTED]]
        if len(worst) > _LISTED:
            lines.append(f"  and {len(worst) - _LISTED} more")
        touched = sum(loss.update > 0 for loss in self.losses.values())
        raise InputError(
            f"--requantize: the update drowns in {len(drowned)} of {counted(touched, 'tensor')}: "
            "the error of writing W + d in the base's scheme again, ||Q(W + d) - (W + d)||, is as "
            "large as the update ||d||, or rounds more than half of it away. Leave --requantize "
            "out to write bf16, or do it anyway with --force\n" + "\n".join(lines)
        )

    def report(self, target: Path | str) -> Report:
        """What was done; call it after draining."""
        error = math.hypot(*(loss.error for loss in self.losses.values()))
        update = math.hypot(*(loss.update for loss in self.losses.values()))
        kept = sum(loss.survived * loss.update**2 for loss in self.losses.values())
        share = kept / update**2 if update else None
        lines = [
            ", ".join(f"{counted(n, 'tensor')} {what}" for what, n in self.counts.items() if n),
            f"requantization error ||Q(W + d) - (W + d)||: {error:.4g}, beside the update's norm "
            f"||d||: {update:.4g}{_ratio(error, update)}",
            *([] if share is None else [f"share of the update that survived: {_share(share)}"]),
            f"size: {format_bytes(self.nbytes)}",
        ]
        drowned = [name for name, loss in self.losses.items() if loss.drowns]
        notes = list(self.notes)
        if drowned:
            notes.append(
                f"{counted(len(drowned), 'tensor')} ({drowned[0]}, ...): the update drowns in the "
                "requantization error: written all the same, as --force says"
            )
        rows = tuple(
            (
                name,
                loss.scheme,
                f"{loss.error:.4g}",
                f"{loss.update:.4g}",
                f"{loss.error / loss.update:.3g}" if loss.update else "no update",
                _share(loss.survived),
            )
            for name, loss in self.losses.items()
        )
        columns = ("tensor", "scheme", "error", "update", "error / update", "survived")
        data = {
            "kind": "requantized",
            "error": error,
            "update": update,
            "survived": share,
            "drowned": drowned,
            "counts": dict(self.counts),
            "bytes": self.nbytes,
            "tensors": {name: _facts(loss) for name, loss in self.losses.items()},
        }
        table = Table(columns, rows, optional=("scheme",))
        return Report(f"Merged {target}", data, tuple(lines), table, tuple(notes))


def _share(share: float) -> str:
    return format_share(max(0.0, share))


def _ratio(error: float, update: float) -> str:
    return f" ({error / update:.3g} of it)" if update else ""


def _facts(loss: Loss) -> dict[str, Any]:
    return {
        "scheme": loss.scheme,
        "error": loss.error,
        "update": loss.update,
        "survived": loss.survived,
    }


def requantized(
    base: Checkpoint, parts: Sequence[Part], applied: Applied, force: bool
) -> RequantizedCheckpoint:
    """Plan the merged model in the base's scheme; nothing is computed yet.

    Args:
        base: the quantized base.
        parts: the adapters bound to it.
        applied: the merged tensors, of the types that the base shows.
        force: whether to write it even where updates drown.

    Raises:
        UsageError: the base is not quantized.
        MismatchError: the scheme of a touched tensor cannot be written, or the adapters make
            another model of it; all at once.
    """
    if base.stored is None:
        raise UsageError(f"--requantize: {base.label} is not quantized: leave it out")
    stored = base.stored
    changed = {n: t for n, t in applied.tensors.items() if n in base and t is not base[n]}
    _require_possible(base, stored, parts, changed)
    losses = {
        name: Loss(base.quantized[name], base[name].numel)
        for name in changed
        if name in base.quantized
    }
    written: dict[str, LazyTensor] = {}
    for name, tensor in changed.items():
        form = stored.forms.get(name)
        if form is None:
            written[name] = tensor
            continue
        added = None if applied.changes[name].whole else applied.traces.get(name)
        encoding = _Encoding(tensor, base[name], form, losses.get(name), added)
        written |= {piece.name: encoding.lazy(part) for part, piece in form.pieces.items()}
    source = stored.checkpoint
    plain = source.written_as == "safetensors"
    rename = safetensors_name if plain else str
    side_files = dict(source.side_files)
    notes = [note for part in parts for note in part.notes()]
    for part in parts:
        own = {n: c for n, c in part.adapter.model_files.items() if n != "config.json"}
        side_files |= own if plain else {}
        if own and not plain:
            notes.append(
                f"{part.adapter.label}: its {listed(sorted(own), 4)} cannot be put into "
                f"{listed(list(dict.fromkeys(source.shards.values())), 1)}: left out"
            )
    return RequantizedCheckpoint(
        {name: written.get(name, tensor) for name, tensor in source.items()},
        config=source.config,
        side_files=side_files,
        shards={name: rename(file) for name, file in source.shards.items()},
        metadata={rename(file): found for file, found in source.metadata.items()},
        notes=(*base.notes, *notes),
        index_files=source.index_files,
        headers=source.headers,
        written_as=source.written_as,
        stored=source.stored,
        losses=losses,
        counts={
            "updated": len(changed),
            "as they are in the base, bit for bit": len(base) - len(changed),
        },
        force=force,
    )


def _require_possible(
    base: Checkpoint, stored: Stored, parts: Sequence[Part], changed: Mapping[str, LazyTensor]
) -> None:
    wrong = []
    for part in parts:
        others = [
            *(f"adds {name}" for name in part.binding.added),
            *(f"leaves out {name}" for name in part.binding.dropped),
            *(
                f"replaces {name} by another shape"
                for name, bound in part.binding.changed.items()
                if bound.update.kind == "replacement" and bound.update.shape != base[name].shape
            ),
        ]
        if others:
            more = f" (and {len(others) - 1} more changes)" if others[1:] else ""
            wrong.append(f"{part.adapter.label} {others[0]}{more}: that makes another model of it")
    wrong += [
        f"{name}: {stored.forms[name].obstacle}"
        for name in changed
        if name in stored.forms and stored.forms[name].obstacle
    ]
    if wrong:
        more = f"\n  and {len(wrong) - _LISTED} more" if wrong[_LISTED:] else ""
        raise MismatchError(
            f"{base.label} cannot be written in its own scheme again; leave --requantize out to "
            "write bf16:\n" + "\n".join(f"  {line}" for line in wrong[:_LISTED]) + more
        )


class _Encoding:
    """The stored pieces of one merged tensor: computed for the first, kept until each was read."""

    def __init__(
        self,
        tensor: LazyTensor,
        before: LazyTensor,
        form: Form,
        loss: Loss | None,
        added: Trace | None,
    ) -> None:
        self._tensor = tensor
        self._before = before
        self._form = form
        self._loss = loss
        self._added = added
        self._lock = Lock()
        self._ready: dict[str, torch.Tensor] = {}

    def lazy(self, part: str) -> LazyTensor:
        """One piece."""
        piece = self._form.pieces[part]
        shape = self._form.sizes.get(part, piece.shape)

        def blocks() -> Iterator[torch.Tensor]:
            with self._lock:
                if part not in self._ready:
                    self._ready = self._compute()
                found = self._ready.pop(part)
            yield found.view(shape)

        return LazyTensor(piece.name, piece.dtype, shape, blocks, self._tensor.origin)

    def _compute(self) -> dict[str, torch.Tensor]:
        merged = self._tensor.read()
        before = self._before.read()
        if self._added is not None:
            squared = self._added.survival.wanted
        else:
            squared = _compared(iter([merged]), merged, before)[2]
        if squared == 0:
            return {part: self._as_it_is(part) for part in self._form.pieces}
        found = dict(self._form.encode(merged))
        if self._loss is not None:
            error, kept, _ = _compared(self._form.decode(found), merged, before)
            self._loss.error, self._loss.update = math.sqrt(error), math.sqrt(squared)
            self._loss.survived = kept / squared
        return found

    def _as_it_is(self, part: str) -> torch.Tensor:
        content = self._form.pieces[part].read().reshape(-1)
        if part not in self._form.sizes:
            return content
        padded = content.new_full(self._form.sizes[part], ord(" "))
        padded[: len(content)] = content
        return padded


def _compared(
    blocks: Iterator[torch.Tensor], merged: torch.Tensor, before: torch.Tensor
) -> tuple[float, float, float]:
    """||Q - M||^2, <Q - W, M - W> and ||M - W||^2, in fp64 and block by block.

    Args:
        blocks: Q, in any blocks.
        merged: M.
        before: W.
    """
    wanted, old, done = merged.reshape(-1), before.reshape(-1), 0
    error = kept = squared = 0.0
    for block in blocks:
        for part in tiles(flat := block.reshape(-1)):
            place = slice(done, done + len(flat[part]))
            q, m, w = flat[part].double(), wanted[place].double(), old[place].double()
            error += float((q - m).square_().sum())
            kept += float((q - w) @ (m - w))
            squared += float((m - w).square_().sum())
            done = place.stop
    return error, kept, squared
