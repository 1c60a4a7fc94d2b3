"""switch: another adapter in place of the merged ones, in the model's own files."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from loratool import plugins
from loratool.adapter import Adapter
from loratool.checkpoint import Checkpoint, LazyTensor
from loratool.engine import Drain, single_threaded_tasks
from loratool.errors import InputError, UsageError
from loratool.files import file_content
from loratool.inplace import commit, config_name, require_own_files, staged
from loratool.plugins import Operand
from loratool.record import read_record
from loratool.recording import adapter_digests
from loratool.reports import Report
from loratool.restoring import RestoredCheckpoint, restore
from loratool.safetensors_file import whole_file
from loratool.steps.merge import MergedCheckpoint
from loratool.steps.unmerge import merge_again
from loratool.writer import index_files, weight_files, write_side_files, write_weight_file


@dataclass(frozen=True)
class PlannedSwitch:
    """A switch that is done when it is applied.

    Attributes:
        merged: the model as it is.
        restored: its base.
        switched: the model as it will be; None if it is so already.
    """

    merged: Checkpoint
    restored: RestoredCheckpoint
    switched: MergedCheckpoint | None

    @property
    def notes(self) -> tuple[str, ...]:
        """What the user should hear before it begins."""
        return () if self.switched is None else self.switched.notes

    def apply(self, drain: Drain) -> Report:
        """Write the files that differ anew, and rename them over the old ones.

        Raises:
            InputError: the model was changed since it was merged, or shares files with others.
            OutputError: the place is not writable, too small, or in use.
        """
        if self.merged.path is None:
            raise UsageError("only a merged model that lies on disk can be switched")
        if self.switched is None:
            return Report(f"{self.merged.path} holds that already", {"kind": "switched"})
        folder = self.merged.path.resolve()
        files = weight_files(self.switched)
        kept = [f for f, ts in files.items() if _lies_at(self.switched.as_stored(ts), folder / f)]
        written = {file: tensors for file, tensors in files.items() if file not in kept}
        size = sum(tensor.nbytes for tensors in written.values() for tensor in tensors.values())
        require_own_files(folder, [*written, config_name(folder)])
        with staged(folder, size) as place:
            drain.start("Switching", size)
            with single_threaded_tasks():
                self._write(place, files, kept, drain)
            index = index_files(self.switched, files)
            write_side_files({**index, **self._changed_side_files(folder)}, place)
            commit(folder, self._removed(folder, {*files, *index}))
        report = self.switched.report(folder)
        taken = ", ".join(f"{a.name}={a.weight:g}" for a in self.restored.source.adapters)
        lines = (f"taken out: {taken}", f"{len(written)} of {len(files)} weight files written anew")
        data = {**report.data, "kind": "switched", "files_written": sorted(written)}
        return Report(f"Switched {self.merged.path}", data, (*lines, *report.lines), report.table)

    def _write(
        self,
        place: Path,
        files: dict[str, dict[str, LazyTensor]],
        kept: Sequence[str],
        drain: Drain,
    ) -> None:
        assert self.switched is not None
        assert self.switched.recorder is not None
        executor = plugins.create("executors", drain.executor)
        with self.switched.recorder.writing(place) as recording:

            def progress(name: str, size: int) -> None:
                recording.see(name)
                drain.progress(name, size)

            for file, tensors in files.items():
                if file in kept:
                    for name in tensors:
                        recording.carry(name)
                else:
                    write_weight_file(self.switched, file, tensors, place, executor, progress)

    def _changed_side_files(self, folder: Path) -> dict[str, Path | bytes]:
        assert self.switched is not None
        return {
            name: source
            for name, source in self.switched.side_files.items()
            if source != folder / name and not _holds(folder / name, source)
        }

    def _removed(self, folder: Path, weights: set[str]) -> list[str]:
        """Old weight files, and what only the adapters that are taken out brought along."""
        assert self.switched is not None
        old = {*self.merged.shards.values(), *self.merged.index_files} - weights
        for adapter in self.restored.adapters:
            for name, source in adapter.model_files.items():
                if name not in self.switched.side_files and _holds(folder / name, source):
                    old.add(name)
        return sorted(old)


@dataclass(frozen=True)
class Switch:
    """Put other adapters in the place of those merged into a model, in its own files.

    The model must carry the record of a --reversible merge. Its base is restored and merged with
    the new adapters in one pass over the weight files that are touched; a kill half-way leaves the
    old model, the new one, or a state that the next call completes.
    """

    operands: ClassVar[tuple[Operand, ...]] = (
        Operand("merged", "checkpoint"),
        Operand("to", "adapter", many=True, flag=True, help="the adapter to merge instead"),
    )
    output: ClassVar[str] = ""
    in_place: ClassVar[bool] = True

    def run(self, merged: Checkpoint, to: Sequence[tuple[Adapter, float]]) -> PlannedSwitch:
        """Plan the switch; nothing is computed or changed yet.

        Raises:
            InputError: the model has no record, or it was changed.
            MismatchError: an adapter does not fit the base.
        """
        if merged.quantized:
            raise InputError(
                f"{merged.label}: is quantized: its weights cannot be changed in place without "
                "losing more than an adapter holds; merge the other adapter into the base anew"
            )
        record = read_record(merged)
        if record is None:
            raise InputError(
                f"{merged.label}: has no record to restore the base from: only what was merged "
                "with --reversible can be switched"
            )
        if not to:
            raise UsageError("name the adapter to switch to: --to ADAPTER; to take out what is "
                             "merged, use unmerge")  # fmt: skip
        restored = restore(merged, record, [adapter for adapter, _ in to])
        wanted = [(adapter_digests(adapter), weight) for adapter, weight in to]
        if wanted == [(dict(a.tensors), a.weight) for a in record.adapters]:
            return PlannedSwitch(merged, restored, None)
        return PlannedSwitch(merged, restored, merge_again(restored, to))


def _lies_at(tensors: dict[str, LazyTensor], path: Path) -> bool:
    found = whole_file(tensors)
    return found is not None and found[0].resolve() == path


def _holds(path: Path, content: Path | bytes) -> bool:
    """Whether a file holds this content."""
    if not path.is_file():
        return False
    return path.read_bytes() == file_content(content)
