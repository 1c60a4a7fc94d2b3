"""Output is whole or not there: whatever happens in between, and whoever else is at work."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from loratool import places, plugins, writer
from loratool.checkpoint import Checkpoint, Extent, LazyTensor
from loratool.dtypes import dtype_name
from loratool.errors import InputError, OutputError
from loratool.opening import open_checkpoint
from loratool.places import atomic_directory
from loratool.writer import (
    Spool,
    copy_extent,
    write_checkpoint,
    write_safetensors,
    write_side_files,
)
from tests.cli.tiny import finetuned, llama, names, save_model, snapshot, unchanged

EXECUTORS = ("serial", *(f"threads:workers={count}" for count in (1, 2, 3, 4)))


class Bug(Exception):
    """What no code of ours expects."""


def lazy(name: str, value: torch.Tensor, rows: int = 1) -> LazyTensor:
    """A tensor that is computed block by block in one reused buffer."""

    def blocks() -> Iterator[torch.Tensor]:
        buffer = torch.empty_like(value[:rows])
        for start in range(0, len(value), rows):
            part = value[start : start + rows]
            yield buffer[: len(part)].copy_(part)

    whole = value.ndim == 0 or not len(value)
    made = (lambda: iter([value])) if whole else blocks
    return LazyTensor(name, dtype_name(value.dtype), tuple(value.shape), made, "memory")


def checkpoint(tensors: Mapping[str, torch.Tensor], files: int = 1) -> Checkpoint:
    found = {name: lazy(name, value) for name, value in tensors.items()}
    shards = {name: f"part-{number % files}.safetensors" for number, name in enumerate(found)}
    return Checkpoint(found, shards=dict(sorted(shards.items(), key=lambda item: item[1])))


def write(content: Checkpoint, folder: Path, executor: str = "serial") -> list[tuple[str, int]]:
    told: list[tuple[str, int]] = []
    folder.mkdir()
    made = plugins.create("executors", executor)
    write_checkpoint(content, folder, made, lambda name, size: told.append((name, size)))
    return told


def test_the_directory_appears_with_all_its_files_at_once(tmp_path: Path) -> None:
    target = tmp_path / "a" / "out"
    with atomic_directory(target, overwrite=False) as folder:
        (folder / "sub").mkdir()
        (folder / "sub" / "file").write_text("1")
        assert not target.exists()
        assert folder.parent == target.parent
    assert names(tmp_path / "a") == ["out"]
    assert (target / "sub" / "file").read_text() == "1"
    mask = os.umask(0)
    os.umask(mask)
    assert target.stat().st_mode & 0o777 == 0o777 & ~mask


@pytest.mark.parametrize("error", [Bug, KeyboardInterrupt, InputError, MemoryError])
def test_an_exception_leaves_nothing(error: type[BaseException], tmp_path: Path) -> None:
    with pytest.raises(error), atomic_directory(tmp_path / "new" / "out", False) as folder:
        (folder / "file").write_text("1")
        raise error
    assert names(tmp_path) == []


def test_parents_that_others_use_meanwhile_stay(tmp_path: Path) -> None:
    with pytest.raises(Bug), atomic_directory(tmp_path / "new" / "out", False):
        (tmp_path / "new" / "theirs").touch()
        raise Bug
    assert names(tmp_path / "new") == ["theirs"]


def test_the_old_output_stays_until_the_end(tmp_path: Path) -> None:
    target = tmp_path / "out"
    target.mkdir()
    (target / "old").write_text("old")
    with unchanged(tmp_path), pytest.raises(Bug), atomic_directory(target, overwrite=True):
        raise Bug
    with atomic_directory(target, overwrite=True) as folder:
        (folder / "new").write_text("new")
        assert names(target) == ["old"]
    assert names(target) == ["new"]
    assert names(tmp_path) == ["out"]


@pytest.mark.parametrize("works", [True, False])
def test_without_an_exchange_of_directories_two_renames_do(
    works: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on macOS; a failure in between brings the old output back."""
    target = tmp_path / "out"
    target.mkdir()
    (target / "old").write_text("old")
    monkeypatch.setattr(places, "_exchange", lambda one, other: False)
    rename = Path.rename

    def moody(path: Path, to: Path) -> Path:
        if to == target and not (works or path.name.endswith(".old")):
            raise OSError(errno.EIO, "broken disk")
        return rename(path, to)

    monkeypatch.setattr(Path, "rename", moody)
    if works:
        with atomic_directory(target, overwrite=True) as folder:
            (folder / "new").touch()
        assert names(target) == ["new"]
    else:
        with pytest.raises(OutputError, match="broken disk"):
            with atomic_directory(target, overwrite=True) as folder:
                (folder / "new").touch()
        assert names(target) == ["old"]
    assert names(tmp_path) == ["out"]


def test_what_appears_meanwhile_is_not_replaced(tmp_path: Path) -> None:
    target = tmp_path / "out"
    with pytest.raises(OutputError, match="not empty"), atomic_directory(target, False):
        target.mkdir()
        (target / "theirs").touch()
    assert names(target) == ["theirs"]
    assert names(tmp_path) == ["out"]


def test_everything_is_synced_before_it_appears(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "out"
    synced: list[tuple[int, bool]] = []

    def record(handle: int) -> None:
        synced.append((os.fstat(handle).st_ino, target.exists()))

    monkeypatch.setattr(places.os, "fsync", record)
    with atomic_directory(target, overwrite=False) as folder:
        (folder / "sub").mkdir()
        (folder / "sub" / "file").touch()
    inside = [target, target / "sub", target / "sub" / "file"]
    assert set(synced[:-1]) == {(path.stat().st_ino, False) for path in inside}
    assert synced[-1] == (tmp_path.stat().st_ino, True)


def test_leftovers_of_dead_runs_go_and_those_of_living_ones_stay(tmp_path: Path) -> None:
    (tmp_path / ".out.partial-dead").mkdir()
    (tmp_path / ".out.partial-dead" / "half").touch()
    (tmp_path / ".other.partial-dead").mkdir()
    (tmp_path / ".out.partial-file").touch()
    (tmp_path / ".out.partial-link").symlink_to(".other.partial-dead")
    others = {".other.partial-dead", ".out.partial-file", ".out.partial-link"}
    with atomic_directory(tmp_path / "out", overwrite=False) as first:
        assert set(names(tmp_path)) == {first.name, *others}
        with atomic_directory(tmp_path / "out", overwrite=True) as second:
            assert {first.name, second.name, *others} == set(names(tmp_path))
            (second / "second").touch()
        with pytest.raises(OutputError, match="not empty"):
            with atomic_directory(tmp_path / "out", overwrite=False):
                raise AssertionError
        shutil.rmtree(tmp_path / "out")
        (first / "first").touch()
    assert set(names(tmp_path)) == {"out", *others}
    assert names(tmp_path / "out") == ["first"]


@pytest.mark.parametrize("name", ["out[1]", "*", "a b", "ä", "-x", "~"])
def test_odd_names_are_only_names(name: str, tmp_path: Path) -> None:
    (tmp_path / ".other.partial-1").mkdir()
    (tmp_path / f".{name}.partial-1").mkdir()
    with atomic_directory(tmp_path / name, overwrite=False) as folder:
        (folder / "file").touch()
    assert names(tmp_path) == sorted([".other.partial-1", name])


def test_a_directory_that_a_run_took_for_a_leftover_is_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another run may come between the making of the directory and its lock."""
    lock, make = places._lock, places.tempfile.mkdtemp
    made: list[Path] = []

    def note(**given: object) -> str:
        made.append(Path(make(**given)))
        return str(made[-1])

    def late(handle: int, wait: bool) -> bool:
        if wait and len(made) < 3:
            made[-1].rmdir()
        return lock(handle, wait)

    monkeypatch.setattr(places.tempfile, "mkdtemp", note)
    monkeypatch.setattr(places, "_lock", late)
    with atomic_directory(tmp_path / "out", overwrite=False) as folder:
        assert folder == made[2]
        (folder / "file").touch()
    assert len(made) == 3
    assert names(tmp_path / "out") == ["file"]


def test_places_without_locks_are_used_without(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """NFS locks no directories: then nobody's leftovers are removed."""

    def refuse(*_: object) -> None:
        raise OSError(errno.EBADF, "Bad file descriptor")

    monkeypatch.setattr(places.fcntl, "flock", refuse)
    (tmp_path / ".out.partial-1").mkdir()
    with atomic_directory(tmp_path / "out", overwrite=False) as folder:
        (folder / "file").touch()
    assert names(tmp_path) == [".out.partial-1", "out"]


def test_an_error_of_the_system_that_is_a_bug_keeps_its_type(tmp_path: Path) -> None:
    for error in (OSError("no errno"), OSError(errno.EBADF, "Bad file descriptor")):
        with pytest.raises(OSError, match=str(error.args[-1])) as caught:
            with atomic_directory(tmp_path / "out", overwrite=False):
                raise error
        assert caught.value is error


@pytest.mark.parametrize("name", ["../x", "/x", "a/../../x", "..", "", ".", "a\0b"])
def test_names_cannot_leave_the_folder(name: str, tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    with unchanged(tmp_path), pytest.raises(InputError, match="inside its directory"):
        write_side_files({name: b"x"}, folder)
    content = Checkpoint({"a": lazy("a", torch.ones(1))}, shards={"a": name})
    with unchanged(tmp_path), pytest.raises(InputError, match="inside its directory"):
        serial = plugins.create("executors", "serial")
        write_checkpoint(content, folder, serial, lambda name, size: None)


def test_side_files_are_written_and_copied(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.write_bytes(bytes(range(256)) * 4096)
    folder = tmp_path / "folder"
    folder.mkdir()
    write_side_files({"sub/copy": source, "config.json": b"{}"}, folder)
    assert (folder / "sub" / "copy").read_bytes() == source.read_bytes()
    assert (folder / "config.json").read_bytes() == b"{}"
    with pytest.raises(InputError, match="gone: cannot be read: No such file"):
        write_side_files({"x": tmp_path / "gone"}, folder)


def test_a_side_file_never_replaces_weights(tmp_path: Path) -> None:
    """An adapter's model/ may hold anything."""
    content = checkpoint({"a": torch.ones(2)})
    evil = Checkpoint(
        content.tensors, shards=content.shards, side_files={"part-0.safetensors": b""}
    )
    with pytest.raises(InputError, match=r"part-0\.safetensors: is the name of a side file"):
        write(evil, tmp_path / "out")


@pytest.mark.parametrize("files", [1, 3])
@pytest.mark.parametrize("executor", EXECUTORS)
def test_every_executor_writes_the_same_bytes(executor: str, files: int, tmp_path: Path) -> None:
    content = checkpoint(finetuned(llama()), files)
    told = write(content, tmp_path / "out", executor)
    assert told == [(name, content[name].nbytes) for name in content.shards]
    write(content, tmp_path / "wanted")
    assert snapshot(tmp_path / "out") == snapshot(tmp_path / "wanted")


def test_what_is_written_comes_back(tmp_path: Path) -> None:
    tensors = {
        "rows": torch.arange(12.0).reshape(4, 3),
        "half": torch.arange(5).bfloat16(),
        "scalar": torch.tensor(3),
        "empty": torch.empty(0, 2),
        "bool": torch.tensor([True, False, True]),
        "eight": torch.arange(4.0).to(torch.float8_e4m3fn),
    }
    write(checkpoint(tensors), tmp_path / "out")
    found = load_file(tmp_path / "out" / "part-0.safetensors")
    assert found.keys() == tensors.keys()
    for name, value in tensors.items():
        assert (found[name].dtype, found[name].shape) == (value.dtype, value.shape)
        assert torch.equal(found[name].double(), value.double())


@pytest.mark.parametrize("files", [1, 3])
def test_a_checkpoint_that_nothing_changed_is_copied_file_by_file(
    files: int, tmp_path: Path
) -> None:
    base = save_model(tmp_path / "base", llama(), files)
    opened = open_checkpoint(base)
    told = write(opened, tmp_path / "out")
    weights = [name for name in names(base) if name.endswith(".safetensors")]
    assert sorted(name for name, _ in told) == sorted(opened)
    assert sum(size for _, size in told) == opened.nbytes
    for name in weights:
        assert (tmp_path / "out" / name).read_bytes() == (base / name).read_bytes()


@pytest.mark.parametrize("change", ["order", "name", "missing", "metadata"])
def test_a_file_that_changed_in_any_way_is_written_anew(change: str, tmp_path: Path) -> None:
    tensors = {name: torch.full((2,), float(ord(name))) for name in "abc"}
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    opened = open_checkpoint(tmp_path / "model.safetensors")
    found = dict(opened.tensors)
    metadata = {"model.safetensors": {"format": "pt"}}
    if change == "order":
        found = dict(reversed(found.items()))
    elif change == "name":
        found["d"] = found.pop("c").renamed("d")
        tensors["d"] = tensors.pop("c")
    elif change == "missing":
        del found["b"], tensors["b"]
    else:
        metadata["model.safetensors"]["more"] = "yes"
    shards = dict.fromkeys(found, "model.safetensors")
    write(Checkpoint(found, shards=shards, metadata=metadata), tmp_path / "out")
    again = open_checkpoint(tmp_path / "out")
    assert list(again) == list(found)
    assert again.metadata == metadata
    for name, value in tensors.items():
        assert torch.equal(again[name].read(), value)


@pytest.mark.parametrize("error", [errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, None])
def test_bytes_are_copied_with_or_without_the_help_of_the_kernel(
    error: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> int:
        raise OSError(error, "not here")

    if error is None:
        monkeypatch.delattr(writer.os, "copy_file_range", raising=False)
    else:
        monkeypatch.setattr(writer.os, "copy_file_range", refuse, raising=False)
    monkeypatch.setattr(writer, "_COPY_CHUNK", 1000)
    content = bytes(range(256)) * 50
    (tmp_path / "source").write_bytes(content)
    with (tmp_path / "copy").open("wb") as file:
        copy_extent(Extent(tmp_path / "source", 7, 9000), file.fileno(), 3)
        with pytest.raises(InputError, match="became shorter"):
            copy_extent(Extent(tmp_path / "source", 12_000, 9000), file.fileno(), 0)
    copied = (tmp_path / "copy").read_bytes()
    assert copied[800:9003] == content[804:9007]


def test_a_tensor_whose_blocks_end_too_early_is_a_bug(tmp_path: Path) -> None:
    short = LazyTensor("a", "F32", (4,), lambda: iter([torch.ones(3)]))
    with pytest.raises(AssertionError, match="a: 4 bytes missing"):
        serial = plugins.create("executors", "serial")
        write_safetensors(tmp_path / "x.safetensors", {"a": short}, {}, serial)


def test_a_spool_holds_tensors_until_their_header_is_known(tmp_path: Path) -> None:
    values = {"a": torch.arange(6.0).reshape(2, 3).T, "b": torch.empty(0), "c": torch.ones(3)}
    with Spool(tmp_path) as spool:
        spooled = {name: spool.add(name, value) for name, value in values.items()}
        order = {name: spooled[name] for name in ("c", "a", "b")}
        serial = plugins.create("executors", "serial")
        write_safetensors(tmp_path / "x.safetensors", order, {}, serial)
    assert names(tmp_path) == ["x.safetensors"]
    found = load_file(tmp_path / "x.safetensors")
    assert all(torch.equal(found[name], value) for name, value in values.items())
    with pytest.raises(Bug), Spool(tmp_path):
        raise Bug
    assert names(tmp_path) == ["x.safetensors"]
