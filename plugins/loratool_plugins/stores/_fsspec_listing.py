"""What lies at a URL, with lengths and what changes when a file does."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import datetime
from typing import Any

from loratool.errors import InputError
from loratool_plugins.stores._fsspec_errors import ReadError, reading
from loratool_plugins.stores._fsspec_http import list_web
from loratool_plugins.stores._fsspec_place import Listing, Place, RemoteFile, checked_name

# What stores call it, the surest first; only the first that a store has is used, since a listing
# and a question for one file may give times of different precision.
_STAMPS = (
    "ETag", "etag", "e_tag", "md5Hash", "md5", "Content-MD5", "Digest", "crc32c", "CRC", "sha",
    "VersionId", "version_id", "generation", "rev", "Last-Modified", "LastModified",
    "last_modified", "updated", "mtime", "modified", "modify", "created",
)  # fmt: skip
_MAX_FILES = 10_000
_MAX_DEPTH = 8


def list_place(place: Place) -> Listing:
    """All files at a place, by name.

    Raises:
        ReadError: nothing is there, or it cannot be read.
        InputError: a name that could mean something else, or too many of them.
    """
    with place.lock:
        with reading(place):
            place.fs.invalidate_cache()
        if place.is_web:
            return list_web(place, describe)
        return _list_directory(place)


def _list_directory(place: Place) -> Listing:
    with reading(place):
        info = place.fs.info(place.root)
    if info["type"] != "directory":
        name = place.root.rstrip("/").rpartition("/")[2]
        return Listing({checked_name(place, name): describe(place, info)}, single=True)
    files: dict[str, RemoteFile] = {}
    for name, info in _walk(place, place.root, "", _MAX_DEPTH):
        files[name] = describe(place, info)
        if len(files) > _MAX_FILES:
            raise _too_much(place)
    for name in files:
        if any(parent in files for parent in _parents(name)):
            raise InputError(
                f"{place.name}: {name} lies below what is a file itself; a directory cannot hold "
                "both: rename one of them there"
            )
    if not files:
        raise ReadError(f"{place.name}: nothing is there; check the URL", missing=True)
    return Listing(files)


def _walk(place: Place, path: str, inside: str, depth: int) -> Iterator[tuple[str, dict[str, Any]]]:
    with reading(place, inside.rstrip("/")):
        found = place.fs.ls(path, detail=True)
    for info in sorted(found, key=lambda info: str(info["name"])):
        relative = _below(info["name"], path)
        if not relative:  # an object store's mark of an empty directory
            continue
        if info["type"] == "directory":
            name = checked_name(place, inside + relative.removesuffix("/"))
            if depth == 0:
                raise _too_much(place)
            yield from _walk(place, info["name"], f"{name}/", depth - 1)
        elif info["type"] == "file":
            yield checked_name(place, inside + relative), info


def _below(name: str, path: str) -> str:
    """A name of a listing relative to the directory that was listed."""
    path = path.strip("/")
    return name.lstrip("/").removeprefix(path).removeprefix("/") if path else name.lstrip("/")


def _parents(name: str) -> Iterator[str]:
    while "/" in name:
        name = name.rpartition("/")[0]
        yield name


def _too_much(place: Place) -> InputError:
    return InputError(
        f"{place.name}: holds too much to be an adapter or a model; name a directory in it"
    )


def describe(place: Place, info: dict[str, Any]) -> RemoteFile:
    """What a store says of a file, in our words."""
    stamp = next((info[key] for key in _STAMPS if info.get(key)), "")
    if isinstance(stamp, datetime):  # or a number, from the same store
        stamp = stamp.timestamp()
    return RemoteFile(str(info["name"]), int(info["size"]), str(stamp), info)


def describe_again(place: Place, file: RemoteFile) -> RemoteFile:
    """What the store says of a file now.

    Raises:
        ReadError: it has gone, or cannot be read.
    """
    with place.lock, reading(place, file.path.rpartition("/")[2]):
        place.fs.invalidate_cache()
        info = place.fs.info(file.path)
        if info.get("size") is None:  # a server that says it only while sending
            info = {**info, "size": file.size}
        return describe(place, info)
