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
from loratool.reports import Report, Table, counted, format_bytes, listed
from loratool.shards import safetensors_name

if TYPE_CHECKING:
    import torch

_LISTED = 10


@dataclass
class Loss:
    """What requantization does to one tensor, once it was computed.

    Attributes:
        scheme: in words.
        elements: the tensor's.
        error: ||Q(W + d) - (W + d)||_F, Q being quantization and what it is read as again.
        update: ||d||_F.
    """

    scheme: str
    elements: int
    error: float = 0.0
    update: float = 0.0

    @property
    def drowns(self) -> bool:
        """Whether the update is not larger than the error made in writing it."""
        return self.update > 0 and self.error >= self.update

    @property
    def words(self) -> str:
        """Both norms, for people."""
        return f"error {self.error:.3g}, update {self.update:.3g}"


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
        worst = sorted(drowned, key=lambda name: -drowned[name].error / drowned[name].update)
        lines = [f"  {name}: {drowned[name].words}" for name in worst[:_LISTED]]
        if len(worst) > _LISTED:
            lines.append(f"  and {len(worst) - _LISTED} more")
        touched = sum(loss.update > 0 for loss in self.losses.values())
        raise InputError(
            f"--requantize: the update drowns in {len(drowned)} of {counted(touched, 'tensor')}: "
            "the error of writing W + d in the base's scheme again, ||Q(W + d) - (W + d)||, is not "
            "smaller than the update ||d||, so that what is written would hold more of the one "
            "than of the other. Leave --requantize out to write bf16, or do it anyway with "
            "--force\n" + "\n".join(lines)
        )

    def report(self, target: Path | str) -> Report:
        """What was done; call it after draining."""
        error = math.hypot(*(loss.error for loss in self.losses.values()))
        update = math.hypot(*(loss.update for loss in self.losses.values()))
        lines = [
            ", ".join(f"{counted(n, 'tensor')} {what}" for what, n in self.counts.items() if n),
            f"requantization error ||Q(W + d) - (W + d)||: {error:.4g}, beside the update's norm "
            f"||d||: {update:.4g}{_ratio(error, update)}",
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
            (name, loss.scheme, f"{loss.error:.4g}", f"{loss.update:.4g}", _factor(loss))
            for name, loss in self.losses.items()
        )
        columns = ("tensor", "scheme", "error", "update", "error / update")
        data = {
            "kind": "requantized",
            "error": error,
            "update": update,
            "drowned": drowned,
            "counts": dict(self.counts),
            "bytes": self.nbytes,
            "tensors": {name: _facts(loss) for name, loss in self.losses.items()},
        }
        table = Table(columns, rows, optional=("scheme",))
        return Report(f"Merged {target}", data, tuple(lines), table, tuple(notes))


def _ratio(error: float, update: float) -> str:
    return f" ({error / update:.3g} of it)" if update else ""


def _factor(loss: Loss) -> str:
    return f"{loss.error / loss.update:.3g}" if loss.update else "no update"


def _facts(loss: Loss) -> dict[str, Any]:
    return {"scheme": loss.scheme, "error": loss.error, "update": loss.update}


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
        if self._added is not None:
            update = math.sqrt(self._added.survival.wanted)
        else:
            update = _distance(self._before.blocks(), merged)
        if update == 0:
            return {part: self._as_it_is(part) for part in self._form.pieces}
        found = dict(self._form.encode(merged))
        if self._loss is not None:
            self._loss.update = update
            self._loss.error = _distance(self._form.decode(found), merged)
        return found

    def _as_it_is(self, part: str) -> torch.Tensor:
        content = self._form.pieces[part].read().reshape(-1)
        if part not in self._form.sizes:
            return content
        padded = content.new_full(self._form.sizes[part], ord(" "))
        padded[: len(content)] = content
        return padded


def _distance(blocks: Iterator[torch.Tensor], values: torch.Tensor) -> float:
    """||blocks - values||_F, in fp64 and block by block."""
    flat, done, total = values.reshape(-1), 0, 0.0
    for block in blocks:
        part = block.reshape(-1).double()
        total += float((part - flat[done : done + len(part)]).square_().sum())
        done += len(part)
    return math.sqrt(total)
