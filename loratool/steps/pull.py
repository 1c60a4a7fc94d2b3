"""pull: an adapter or a model from elsewhere, checked on arrival."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from loratool.adapter import Adapter, FormatOptions
from loratool.binding import bind
from loratool.checkpoint import Checkpoint
from loratool.errors import FormatError, InputError, MismatchError, raise_problems
from loratool.files import PICKLES, file_content, file_size, files_below, is_file, local
from loratool.json_files import MANIFEST, parse_json
from loratool.opening import Located, locate, open_any
from loratool.plugins import Operand, option
from loratool.refs import parse_ref
from loratool.reports import Report, counted, format_bytes, listed


@dataclass(frozen=True)
class Pull:
    """Download an adapter or a model: to a directory with -o, else to the cache.

    It is opened, and with --base compared with its base, by headers before the weights come.
    Lengths and digests are compared with what the store says and, where there is one, with the
    manifest. Pickle files stay away unless asked for.
    """

    operands: ClassVar[tuple[Operand, ...]] = (
        Operand("ref", "text"),
        Operand(
            "base", "checkpoint", required=False, flag=True,
            help="a base to check the adapter against, by headers",
        ),
    )  # fmt: skip
    output: ClassVar[str] = ""

    directory: str | None = option(
        None, "where to (default: the cache)", flag="output", short="o", metavar="DIR"
    )
    overwrite: bool = option(False, "replace a directory that is not empty")
    allow_pickle: bool = option(
        False, "bring pickle files, too; they are opened through weights_only"
    )

    def run(self, ref: str, base: Checkpoint | None = None) -> Report:
        """Download, now.

        Raises:
            InputError: it is not there, cannot be had, or is not what the store or the manifest
                says.
            FormatError: it holds neither an adapter nor a model, or only pickle files.
            MismatchError: its files contradict themselves, or it does not fit the base.
            OutputError: the output place is taken or too small.
        """
        from loratool.places import check_target

        if parse_ref(ref).path is not None:
            raise InputError(f"{ref}: is here already: a local path of that name")
        target = Path(self.directory) if self.directory else None
        if target is not None:
            check_target(target, self.overwrite)
        located = locate(ref)
        files, left = self._chosen(located)
        found = open_any(located)
        notes = [*found.notes, *_check(found, base)]
        if left:
            notes.append(f"{counted(len(left), 'pickle file')} left where it is: {listed(left, 4)}")
        if target is None:
            for path in files.values():
                local(path)
            _verify(files)
            place = located.path
        else:
            self._copy(files, target)
            place = target
        return _report(found, located, place, files, tuple(notes))

    def _chosen(self, located: Located) -> tuple[dict[str, Path], list[str]]:
        """The files to bring, by name, and the names of those that are not wanted."""
        if is_file(located.path):
            everything = {located.path.name: located.path}
        else:
            everything = {n: p for n, p in files_below(located.path).items() if not _is_hidden(n)}
        pickles = [name for name in everything if name.endswith(PICKLES)]
        if self.allow_pickle or not pickles:
            return everything, []
        if not any(name.endswith(".safetensors") for name in everything):
            raise FormatError(
                f"{located.ref.text}: its weights are pickle files ({listed(pickles, 3)}), which "
                "may hold code: bring them with --allow-pickle (they are opened through "
                "weights_only), or look for a revision with safetensors"
            )
        return {n: p for n, p in everything.items() if n not in pickles}, pickles

    def _copy(self, files: Mapping[str, Path], target: Path) -> None:
        from loratool.places import atomic_directory
        from loratool.writer import write_side_files

        needed = sum(map(file_size, files.values()))
        with atomic_directory(target, self.overwrite, needed) as folder:
            for path in files.values():
                local(path)
            _verify(files)
            write_side_files(files, folder)


def _is_hidden(name: str) -> bool:
    return any(part.startswith(".") for part in Path(name).parts)


def _check(found: Adapter | Checkpoint, base: Checkpoint | None) -> Iterator[str]:
    """What to know about what was opened; raises if it is not sound."""
    if isinstance(found, Adapter):
        raise_problems(f"{found.label} cannot be used:", found.problems)
        if base is not None:
            problems = bind(found.reread(FormatOptions(base=base)), base).problems
            raise_problems(f"{found.label} does not fit {base.label}:", problems)
            yield from (str(problem) for problem in problems)
    elif base is not None:
        raise MismatchError(f"{found.label}: is a model, not an adapter: leave --base out")


def _verify(files: Mapping[str, Path]) -> None:
    """Raise InputError unless the files have the digests that their manifest names."""
    from loratool.digests import file_digest

    if MANIFEST not in files:
        return
    known = parse_json(file_content(files[MANIFEST]), MANIFEST).get("files")
    for name, digest in (known if isinstance(known, dict) else {}).items():
        if name in files and file_digest(files[name]) != digest:
            raise InputError(
                f"{files[name]}: is not the file that {MANIFEST} beside it was written for (its "
                "digest differs): one of them was changed after the adapter was made"
            )


def _report(
    found: Adapter | Checkpoint,
    located: Located,
    place: Path,
    files: Mapping[str, Path],
    notes: tuple[str, ...],
) -> Report:
    kind = "adapter" if isinstance(found, Adapter) else "checkpoint"
    size = sum(map(file_size, files.values()))
    data = {
        "kind": "download",
        "ref": located.ref.text,
        "path": str(place),
        "what": kind,
        "files": {name: file_size(path) for name, path in files.items()},
        "bytes": size,
    }
    lines = (
        f"{'an' if kind == 'adapter' else 'a'} {kind}: {counted(len(found), 'tensor')}, "
        f"{counted(len(files), 'file')}, {format_bytes(size)}",
    )
    return Report(f"Pulled {located.ref.text} to {place}", data, lines, notes=notes)
