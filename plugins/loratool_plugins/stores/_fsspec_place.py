"""A URL that fsspec has opened, and what is known of the files there."""

from __future__ import annotations

import re
import threading
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

from loratool.errors import InputError

# loratool keeps what it reads by itself, and notices changes, which these do not.
_CACHES = ("simplecache", "filecache", "blockcache", "cached")
_WEB = ("http", "https")
_LOCAL = ("file", "local")
# Readers that several threads may use although they are not asynchronous.
_THREAD_SAFE = ("memory", *_LOCAL)
_CONNECT_SECONDS, _SILENCE_SECONDS = 30, 60
_STRANGE = re.compile(r"[\\\x00-\x1f\x7f]")


@dataclass(frozen=True)
class RemoteFile:
    """A file that lies elsewhere.

    Attributes:
        path: what its file system calls it.
        size: its bytes.
        stamp: what changes with its content (an ETag, a digest, a time); "" if the store has none.
        info: all that the store says of it.
    """

    path: str
    size: int
    stamp: str
    info: Mapping[str, Any]


@dataclass(frozen=True)
class Listing:
    """What lies at a place.

    Attributes:
        files: name -> file.
        single: whether the place is a file itself; `files` then holds just that one.
    """

    files: Mapping[str, RemoteFile]
    single: bool = False


@dataclass(frozen=True)
class Place:
    """A URL, opened.

    Attributes:
        name: the URL as messages show it: without user, password and query.
        url: the URL without caches in front.
        protocol: "s3".
        fs: the fsspec file system.
        root: what it calls the place.
        lock: held while the file system is used.
    """

    name: str
    url: str
    protocol: str
    fs: Any
    root: str
    lock: AbstractContextManager[Any]

    @property
    def is_web(self) -> bool:
        """Whether it is an HTTP server, which has no directories and may have no listings."""
        return self.protocol in _WEB

    @property
    def is_local(self) -> bool:
        """Whether it is a path of this machine."""
        return self.protocol in _LOCAL


def protocols(url: str) -> list[str]:
    """The protocols of a URL, of a chain the outermost first."""
    return [part.partition("://")[0] for part in url.split("::")]


def is_known(url: str) -> bool:
    """Whether fsspec has heard of all protocols of a URL; their packages may be missing."""
    import fsspec

    known = {*fsspec.available_protocols(), *fsspec.registry}
    return all(protocol in known for protocol in protocols(url))


def shown(url: str) -> str:
    """A URL without what may be secret in it."""
    url = re.sub(r"(?<=://)[^/?#]*@", "", url)
    return re.sub(r"(https?://[^?#\s]*)[?#]\S*", r"\1", url)


def connect(url: str) -> Place:
    """Open a URL; nothing is asked of the store yet.

    Raises:
        ImportError: the package that speaks the protocol is not installed.
    """
    from fsspec.core import url_to_fs

    first, *rest = url.split("::")
    while rest and first in _CACHES:
        first, *rest = rest
    url = "::".join([first, *(part for part in rest if part not in _CACHES)])
    protocol = protocols(url)[0]
    options: dict[str, Any] = {}
    if rest:
        options["skip_instance_cache"] = True  # else an archive's table is never read again
    if protocol in _WEB:
        options["client_kwargs"] = _web_client(protocol)
    fs, root = url_to_fs(url, **options)
    free = getattr(fs, "async_impl", False) or protocol in _THREAD_SAFE
    return Place(shown(url), url, protocol, fs, root, nullcontext() if free else threading.RLock())


def _web_client(protocol: str) -> dict[str, Any]:
    """How aiohttp is to connect: through proxies, and for as long as bytes come."""
    import aiohttp
    from fsspec.config import conf

    timeout = aiohttp.ClientTimeout(
        total=None, sock_connect=_CONNECT_SECONDS, sock_read=_SILENCE_SECONDS
    )
    configured = conf.get(protocol, {}).get("client_kwargs", {})
    return {"timeout": timeout, "trust_env": True, **configured}


def checked_name(place: Place, name: str) -> str:
    """A name of a listing, if it can only mean a file below the place.

    Raises:
        InputError: it could mean something else.
    """
    parts = name.split("/")
    if _STRANGE.search(name) or any(p in ("", ".", "..") or len(p.encode()) > 255 for p in parts):
        raise InputError(
            f"{place.name}: lists a file of the name {name!r}, which could end up anywhere: "
            "nothing was read; have it removed there, or use another place"
        )
    return name
