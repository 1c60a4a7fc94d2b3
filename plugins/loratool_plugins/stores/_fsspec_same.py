"""Whether a file in a store is the one that would be sent: by its digest, or else its content."""

from __future__ import annotations

import base64
import binascii
import hashlib
import re
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from loratool.files import file_content, file_size, local
from loratool_plugins.stores._fsspec_errors import writing
from loratool_plugins.stores._fsspec_place import Place, RemoteFile

_SMALL = 8 << 20
_PIECE = 1 << 20
# Parts of uploads to S3: of the AWS tools, boto3, s3fs and others.
_PARTS = tuple(mib << 20 for mib in (5, 8, 10, 16, 25, 32, 50, 64, 100, 128, 256, 512, 1024))
_ETAG = re.compile(r'"?(?P<md5>[0-9a-f]{32})(-(?P<parts>\d+))?"?')


def is_same(place: Place, there: RemoteFile, content: Path | bytes) -> bool:
    """Whether a remote file has this content; False where that is not known cheaply.

    Raises:
        OutputError: it cannot be read.
        InputError: the content cannot.
    """
    size = len(content) if isinstance(content, bytes) else file_size(content)
    if size != there.size:
        return False
    if (digest := _md5(there)) is not None:
        return digest == _digest(content).hex()
    found = _ETAG.fullmatch(str(there.info.get("ETag", "")))
    if found is not None:
        count = int(found["parts"] or 0)
        if count == 0 and found["md5"] == _digest(content).hex():
            return True
        # Encrypted objects have an ETag that is no digest: their content decides, if it is small.
        if count and _is_multipart(content, size, count, found["md5"]):
            return True
    if size > _SMALL:
        return False
    with place.lock, writing(place, there.path.rpartition("/")[2]):
        return bool(place.fs.cat_file(there.path) == file_content(content))


def _md5(there: RemoteFile) -> str | None:
    """The MD5 as Google (base64) or Azure (bytes) tells it."""
    found = there.info.get("md5Hash")
    if found is None:
        settings = there.info.get("content_settings")
        found = settings.get("content_md5") if isinstance(settings, dict) else None
    if isinstance(found, bytes | bytearray):
        return bytes(found).hex()
    try:
        return base64.b64decode(found, validate=True).hex() if isinstance(found, str) else None
    except binascii.Error:
        return None


def _is_multipart(content: Path | bytes, size: int, count: int, digest: str) -> bool:
    """Whether a digest of the digests of so many parts is that of the content, for usual sizes."""
    for part in _PARTS:
        if -(-size // part) == count:
            digests = b"".join(_part_digests(content, part))
            if hashlib.md5(digests, usedforsecurity=False).hexdigest() == digest:
                return True
    return False


def _digest(content: Path | bytes) -> bytes:
    return next(_part_digests(content, 1 << 62), hashlib.md5(usedforsecurity=False).digest())


def _part_digests(content: Path | bytes, part: int) -> Iterator[bytes]:
    """The MD5 of each so many bytes."""
    digest, filled = hashlib.md5(usedforsecurity=False), 0
    for piece in _pieces(content):
        digest.update(piece)
        filled += len(piece)
        if filled == part:
            yield digest.digest()
            digest, filled = hashlib.md5(usedforsecurity=False), 0
    if filled:
        yield digest.digest()


def _pieces(content: Path | bytes) -> Iterator[bytes]:
    if isinstance(content, bytes):
        yield from (content[i : i + _PIECE] for i in range(0, len(content), _PIECE))
        return
    with local(content).open("rb") as file:
        yield from iter(partial(file.read, _PIECE), b"")
