"""HTTP servers: what they list, or else which of the usual names they have; ranges, or not."""

from __future__ import annotations

import html
import json
import re
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from urllib.parse import quote, unquote, urljoin, urlsplit, urlunsplit

from loratool.errors import InputError
from loratool_plugins.stores._fsspec_errors import ReadError, reading
from loratool_plugins.stores._fsspec_place import Listing, Place, RemoteFile, checked_name

# What a server without listings is asked for.
_INDEXES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
USUAL_NAMES = (
    "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin", "sparse.safetensors",
    "config.json", "model.safetensors", *_INDEXES, "pytorch_model.bin", "generation_config.json",
    "loratool.json",
    "README.md", "tokenizer.json", "tokenizer_config.json", "tokenizer.model",
    "special_tokens_map.json", "added_tokens.json", "chat_template.jinja", "vocab.txt",
    "vocab.json", "merges.txt", "spiece.model", "preprocessor_config.json", "model/config.json",
    "model/tokenizer.json", "model/tokenizer_config.json",
)  # fmt: skip
_AT_ONCE = 8
_MAX_DEPTH = 4
_MAX_FILES = 10_000
_MAX_INDEX = 64 << 20
_PIECE = 1 << 20

Describe = Callable[[Place, dict[str, Any]], RemoteFile]


def list_web(place: Place, describe: Describe) -> Listing:
    """The files at a URL, by its listing or else by asking for the usual names.

    Raises:
        InputError: nothing is there, it may not be read, or names what it should not.
    """
    failure: ReadError | None = None
    if not urlsplit(place.root).path.endswith("/"):
        found = _probe(place, place.root)
        if isinstance(found, dict):
            name = unquote(urlsplit(place.root).path.rpartition("/")[2])
            return Listing({checked_name(place, name): describe(place, found)}, single=True)
        failure = found
    base = _directory(place.root)
    try:
        names = list(_links(place, base, "", _MAX_DEPTH))
    except ReadError as error:
        names, failure = [], error if error.again or not failure else failure
    paths = dict(names) or {name: base + quote(name) for name in USUAL_NAMES}
    files, refused = _describe_all(place, paths, describe)
    if not names:
        paths = {name: base + quote(name) for name in _shards(place, files)}
        more, _ = _describe_all(place, paths, describe)
        files |= more
    if files:
        return Listing(files)
    raise _nothing(place, [error for error in (*refused, failure) if error is not None])


def _nothing(place: Place, failures: list[ReadError]) -> InputError:
    for error in failures:
        if not error.missing:
            return error
    return ReadError(
        f"{place.name}: the server lists no files there, and has none of the usual names "
        "(adapter_config.json, config.json, model.safetensors, ...); check the URL, or give that "
        "of a file",
        missing=True,
    )


def _directory(url: str) -> str:
    parts = urlsplit(url)
    return urlunsplit(parts._replace(path=f"{parts.path.rstrip('/')}/", query="", fragment=""))


def _probe(place: Place, url: str) -> dict[str, Any] | ReadError | None:
    """What the server says of a file; None for a page, which stands for a directory or nothing."""
    try:
        with reading(place):
            info: dict[str, Any] = place.fs.info(url)
    except ReadError as error:
        return error
    is_page = info.get("mimetype") in ("text/html", "application/xhtml+xml")
    if is_page and not urlsplit(url).path.endswith((".html", ".htm")):
        return None
    if info.get("size") is None:
        with reading(place):
            info["size"] = sum(map(len, _stream(place, url, {}, None)))
    return info


def _describe_all(
    place: Place, paths: dict[str, str], describe: Describe
) -> tuple[dict[str, RemoteFile], list[ReadError]]:
    """The files that are there, by name, and why others are not."""
    with ThreadPoolExecutor(_AT_ONCE) as pool:
        found = list(pool.map(lambda url: _probe(place, url), paths.values()))
    files = {
        name: describe(place, info)
        for name, info in zip(paths, found, strict=True)
        if isinstance(info, dict)
    }
    errors = [error for error in found if isinstance(error, ReadError)]
    for error in errors:
        if error.again:  # else a file would be missing because of a bad moment
            raise error
    return files, errors


def _links(place: Place, base: str, inside: str, depth: int) -> Iterator[tuple[str, str]]:
    """Names and URLs of the files that a page of links, and those below it, list."""
    with reading(place):
        links = place.fs.ls(base, detail=False)
    for count, link in enumerate(sorted(links)):
        if count >= _MAX_FILES:
            raise InputError(f"{place.name}: lists too many files; name a directory in it")
        relative = html.unescape(link[len(base) :]) if link.startswith(base) else ""
        if "?" in relative or "#" in relative or not urljoin(base, relative).startswith(base):
            continue  # another order of the same list, or a link to elsewhere
        relative = re.sub(r"^(\./)+", "", relative)
        if not relative or re.match(r"[a-z]+:", relative):
            continue
        name = inside + unquote(relative)
        if not relative.endswith("/"):
            yield checked_name(place, name), base + relative
        elif depth:
            checked_name(place, name.removesuffix("/"))
            yield from _links(place, base + relative, name, depth - 1)


def _shards(place: Place, files: dict[str, RemoteFile]) -> Iterable[str]:
    """The files that an index names and that were not asked for yet."""
    for name in _INDEXES:
        file = files.get(name)
        if file is None or file.size > _MAX_INDEX:
            continue
        raw = b"".join(web_pieces(place, file, 0, file.size))
        try:
            weight_map = json.loads(raw)["weight_map"]
            named = {str(shard) for shard in weight_map.values()}
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            continue  # whoever opens it says what is wrong
        for shard in sorted(named - files.keys()):
            yield checked_name(place, shard)


def web_pieces(place: Place, file: RemoteFile, begin: int, end: int) -> Iterator[bytes]:
    """Bytes begin to end of a file, as they come; from a server without ranges, all are skimmed.

    Raises:
        ReadError: the server's words, or a length that is not the one listed.
    """
    name = file.path.rpartition("/")[2]
    headers = {"Range": f"bytes={begin}-{end - 1}"}
    with reading(place, unquote(name)):
        yield from _stream(place, file.path, headers, file.size, begin, end)


def _stream(
    place: Place,
    url: str,
    headers: dict[str, str],
    size: int | None,
    begin: int = 0,
    end: int | None = None,
) -> Iterator[bytes]:
    headers = {**place.fs.kwargs.get("headers", {}), "Accept-Encoding": "identity", **headers}
    # The size spares fsspec asking for it; with a block size of 0 the file is a plain stream.
    with place.fs.open(url, block_size=0, size=1, headers=headers) as stream:
        _check_length(place, stream.r, size)
        position = _first_byte(stream.r)
        if position > begin:
            raise ReadError(f"{place.name}: the server sends other bytes than were asked for")
        while (end is None or position < end) and (piece := stream.read(_PIECE)):
            wanted = piece[max(0, begin - position) : None if end is None else end - position]
            position += len(piece)
            if wanted:
                yield wanted


def _first_byte(response: Any) -> int:
    found = re.match(r"bytes (\d+)-", response.headers.get("Content-Range", ""))
    return int(found[1]) if found and response.status == 206 else 0


def _check_length(place: Place, response: Any, size: int | None) -> None:
    if response.status == 206:
        length = response.headers.get("Content-Range", "").rpartition("/")[2]
    else:
        length = response.headers.get("Content-Length", "")
    if size is not None and length.isdigit() and int(length) != size:
        raise ReadError(
            f"{place.name}: {unquote(response.url.name)} is {length} bytes long, but {size} were "
            "announced: it was changed, or the server is wrong; run it again"
        )
