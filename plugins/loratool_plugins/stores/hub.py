"""Models and adapters on the Hugging Face Hub, through huggingface_hub and its cache."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loratool.errors import InputError
from loratool.files import Mirror, add_mirror, bringing
from loratool.publication import Publication, Published, Publishing
from loratool.refs import Ref

if TYPE_CHECKING:
    from huggingface_hub.hf_api import RepoFile

# What opening a model or an adapter reads anyway: small files, brought at once.
_FIRST = ("adapter_config.json", "config.json", "loratool.json", "*.index.json")
_PIECE = 1 << 20
# Answers that may be another one soon, and how long to wait before asking again, in seconds.
_PASSING = {408, 429, 500, 502, 503, 504}
_WAITS = (0.5, 2.0)


@dataclass(frozen=True)
class Hub:
    """Repositories of models: `org/name[@revision][:subfolder]`.

    Cache, token (HF_TOKEN, `hf auth login`), HF_ENDPOINT, HF_HUB_OFFLINE and proxies are those of
    huggingface_hub. Opening brings configurations and reads headers by ranges; weights come, one
    file at a time, when they are read, and are checked against the digests that the Hub names.
    """

    def holds(self, ref: Ref) -> bool:
        """Whether it reads as a name on the Hub."""
        return ref.repo is not None

    def fetch(self, ref: Ref) -> Path:
        """The place of the repository, or its subfolder, in the cache, as a mirror.

        Raises:
            InputError: it does not exist, may not be read, or cannot be reached and is not cached.
        """
        from loratool_plugins.stores._hub_errors import explaining

        with explaining(ref):
            folder = self._mirrored(ref)
        return folder / ref.subfolder if ref.subfolder else folder

    def _mirrored(self, ref: Ref) -> Path:
        from huggingface_hub import snapshot_download

        from loratool_plugins.stores._hub_quiet import quietly

        if ref.repo is None:
            raise InputError(f"{ref.text}: is no name on the Hub")
        inside = f"{ref.subfolder}/" if ref.subfolder else ""
        first = [f"{inside}{name}" for name in (*_FIRST, "model/config.json")]
        with quietly(bars=False):
            folder = Path(snapshot_download(ref.repo, revision=ref.revision, allow_patterns=first))
        commit = folder.name
        files = _listing(ref.repo, commit)
        if files is not None:
            source = _Source(ref, commit, {file.path: file for file in files})
            sizes = {name: file.size for name, file in source.files.items()}
            name = f"{ref.repo}@{commit[:8]}"
            add_mirror(Mirror(name, folder, sizes, source.start, source.fetch))
        return folder

    def publish(self, publication: Publication, ref: Ref, how: Publishing) -> Published:
        """One commit with everything, or none; see `loratool_plugins.stores.hub_publish`."""
        from loratool_plugins.stores.hub_publish import publish

        return publish(publication, ref, how)


def _listing(repo: str, commit: str) -> list[RepoFile] | None:
    """All files of a commit; None where the Hub cannot be reached and the cache has to do."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import OfflineModeIsEnabled
    from huggingface_hub.hf_api import RepoFile
    from huggingface_hub.utils import httpx

    try:
        tree = HfApi().list_repo_tree(repo, revision=commit, recursive=True)
        return [entry for entry in tree if isinstance(entry, RepoFile)]
    except (OfflineModeIsEnabled, httpx.ConnectError, httpx.TimeoutException):
        return None


def _bar(advance: Callable[[int], None]) -> type[Any]:
    """What huggingface_hub is given as a progress bar: it draws nothing, and tells `advance`."""
    from huggingface_hub.utils import tqdm

    class Bar(tqdm):
        def __init__(self, *args: Any, **options: Any) -> None:
            advance(options.get("initial") or 0)
            super().__init__(*args, **{**options, "disable": True})  # type: ignore[no-untyped-call]

        def update(self, n: float | None = 1) -> bool | None:
            advance(int(n or 0))
            return None

    return Bar


@dataclass(frozen=True)
class _Source:
    """The files of one commit.

    Attributes:
        ref: what was asked for.
        commit: its hash.
        files: what the Hub says of them, by name.
    """

    ref: Ref
    commit: str
    files: dict[str, RepoFile]

    def start(self, name: str, count: int) -> bytes:
        """The first bytes of a file, by a range request."""
        from huggingface_hub.errors import HfHubHTTPError
        from huggingface_hub.utils import httpx

        from loratool_plugins.stores._hub_errors import explained

        for wait in (*_WAITS, None):
            try:
                return self._start(name, min(count, self.files[name].size))
            except Exception as error:
                passing = isinstance(error, httpx.TransportError) or (
                    isinstance(error, HfHubHTTPError)
                    and error.response is not None
                    and error.response.status_code in _PASSING
                )
                if wait is None or not passing:
                    raise explained(error, self.ref, name) from error
                time.sleep(wait)
        raise AssertionError("unreachable")

    def _start(self, name: str, count: int) -> bytes:
        from huggingface_hub import constants, hf_hub_url
        from huggingface_hub.utils import build_hf_headers, get_session, hf_raise_for_status

        if count == 0:
            return b""
        url = hf_hub_url(str(self.ref.repo), name, revision=self.commit)
        span = {"Range": f"bytes=0-{count - 1}", "Accept-Encoding": "identity"}
        data = bytearray()
        with get_session().stream(
            "GET",
            url,
            headers={**build_hf_headers(), **span},
            follow_redirects=True,
            timeout=constants.HF_HUB_DOWNLOAD_TIMEOUT,
        ) as response:
            hf_raise_for_status(response)
            self._check_length(name, response.headers.get("Content-Range", ""))
            for piece in response.iter_bytes():
                data += piece
                if len(data) >= count:  # a server without ranges would send everything
                    break
        if len(data) < count:
            raise self._lied(name, f"ended after {len(data)} bytes")
        return bytes(data[:count])

    def _check_length(self, name: str, content_range: str) -> None:
        total = content_range.rpartition("/")[2]
        if total.isdigit() and int(total) != self.files[name].size:
            raise self._lied(name, f"is {total} bytes long")

    def fetch(self, name: str) -> None:
        """Bring a file to the cache, and compare it with what the Hub says of it."""
        from huggingface_hub import hf_hub_download

        from loratool_plugins.stores._hub_errors import explaining

        with explaining(self.ref, name):
            bar = _bar(bringing(name, self.files[name].size))
            found = hf_hub_download(str(self.ref.repo), name, revision=self.commit, tqdm_class=bar)
        path = Path(found)
        if wrong := self._wrong(name, path):
            path.resolve().unlink(missing_ok=True)
            path.unlink(missing_ok=True)
            raise self._lied(name, wrong)

    def _wrong(self, name: str, path: Path) -> str:
        file = self.files[name]
        if (length := path.stat().st_size) != file.size:
            return f"is {length} bytes long"
        if file.lfs is not None:
            digest, wanted = hashlib.sha256(), file.lfs.sha256
        else:  # git's digest of a blob
            digest, wanted = hashlib.sha1(b"blob %d\0" % length), file.blob_id
        with path.open("rb") as opened:
            for piece in iter(partial(opened.read, _PIECE), b""):
                digest.update(piece)
        found = digest.hexdigest()
        return "" if found == wanted else f"has the digest {found[:12]}..."

    def _lied(self, name: str, found: str) -> InputError:
        file = self.files[name]
        wanted = file.lfs.sha256 if file.lfs is not None else file.blob_id
        return InputError(
            f"{self.ref.text}: {name} {found}, but the Hub lists {file.size} bytes with the digest "
            f"{wanted[:12]}...: it was damaged on the way or is wrong there; try again"
        )
