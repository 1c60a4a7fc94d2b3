"""A Hub on loopback that the real huggingface_hub client talks to, with faults on demand.

    with HubServer() as hub:
        hub.add_user("anna", token="hf_write")
        hub.add_repo("anna/base", {"config.json": b"{}"})
        hub.fail("GET", r"\\.safetensors", cut_after=1000)
        hf_hub_download("anna/base", "config.json", endpoint=hub.url, cache_dir=tmp_path)
        assert hub.log.bytes_sent("config.json") == 2

It speaks HTTP/1.1 for model repositories, without Xet. As on the real Hub, LFS objects come from
and go to another origin, the CDN (here: another port): `/resolve/` redirects to it with a signed
address, and the client sends it no token. A CDN address contains the `/resolve/...` path that led
to it, so that one pattern describes a file wherever it is fetched from.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import socket
import struct
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Literal, Self
from urllib.parse import parse_qs, quote, unquote, urlencode, urlsplit

from tests.hub_repos import (
    LFS_SIZE,
    Commit,
    HubError,
    Repo,
    Repos,
    User,
    commit_json,
    entry_json,
    model_json,
    preupload_json,
    refs_json,
    tree_json,
    user_json,
)

_CHUNK = 64 * 1024
_PACE = 0.02  # seconds that a piece of a slow body takes, if it has more than one byte


@dataclass
class Request:
    """One request, as the log keeps it. The counts are of bodies, without headers.

    A count can be ahead of what the other side has read by what lies in the sockets' buffers.
    """

    method: str
    path: str  # unquoted, without the query
    query: str
    host: Literal["hub", "cdn"]
    range: str | None
    token: str | None
    status: int = 0  # 0: no answer was sent
    bytes_sent: int = 0
    bytes_received: int = 0

    @property
    def target(self) -> str:
        return f"{self.path}?{self.query}" if self.query else self.path

    def __str__(self) -> str:
        wanted = f" [{self.range}]" if self.range else ""
        return f"{self.method} {self.host}:{self.target}{wanted} -> {self.status}"


class RequestLog:
    """All requests of a server, in the order in which they began."""

    def __init__(self) -> None:
        self._requests: list[Request] = []

    def __iter__(self) -> Iterator[Request]:
        return iter(tuple(self._requests))

    def __len__(self) -> int:
        return len(self._requests)

    def add(self, request: Request) -> None:
        self._requests.append(request)

    def mark(self) -> int:
        """A moment, to be given as `since`."""
        return len(self._requests)

    def find(self, method: str = "", path: str = "", *, since: int = 0) -> list[Request]:
        """The requests of a method (any: "") whose path has a match of a regular expression."""
        return [
            request
            for request in self._requests[since:]
            if method in ("", request.method) and re.search(path, request.target)
        ]

    def bytes_sent(self, path: str = "", *, since: int = 0) -> int:
        return sum(it.bytes_sent for it in self.find(path=path, since=since))

    def bytes_received(self, path: str = "", *, since: int = 0) -> int:
        return sum(it.bytes_received for it in self.find(path=path, since=since))


@dataclass
class Fault:
    """What goes wrong with the requests of a method and a path; see `HubServer.fail`."""

    method: str = ""
    path: str = ""
    times: int | None = 0
    status: int | None = None
    code: str | None = None
    message: str = ""
    headers: Mapping[str, str | None] = field(default_factory=dict)
    hang_up: Literal["", "before", "after"] = ""
    cut_after: int | None = None
    reset: bool = False
    bytes_per_second: float | None = None
    wrong_bytes: bool = False
    extra_length: int = 0
    ignore_range: bool = False

    @property
    def spoils_content(self) -> bool:
        """Whether it concerns the body of an answer, and so waits for one that has a body."""
        wanted = (self.wrong_bytes, self.extra_length, self.ignore_range, self.bytes_per_second)
        return self.method == "GET" and (any(wanted) or self.cut_after is not None)

    def meets(self, request: Request) -> bool:
        met = self.method == request.method and re.search(self.path, request.target)
        return bool(met) and self.times != 0


_NO_FAULT = Fault()


class HubServer:
    """A Hub at `url`, from `with` until the end of the block.

    Args:
        lfs_size: Files of at least this many bytes are LFS objects, as are all `*.safetensors`,
            `*.bin`, ... (`hub_repos.LFS_PATTERNS`).
        page_size: How many entries a page of a tree or of a list of commits has.
        part_size: LFS objects larger than this are uploaded in parts of this size.
    """

    def __init__(
        self, *, lfs_size: int = LFS_SIZE, page_size: int = 1000, part_size: int | None = None
    ) -> None:
        self.repos = Repos(lfs_size)
        self.page_size = page_size
        self.part_size = part_size
        self.log = RequestLog()
        self.lock = threading.RLock()
        self.stopping = threading.Event()
        self._faults: list[Fault] = []
        self._servers = (_Server(self, "hub"), _Server(self, "cdn"))
        self.url, self.cdn_url = (server.url for server in self._servers)
        self.cdn_url = self.cdn_url.replace("127.0.0.1", "localhost")  # another host

    def __enter__(self) -> Self:
        for server in self._servers:
            server.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def stop(self) -> None:
        """Close the ports and all connections: from now on, connections are refused."""
        self.stopping.set()
        for server in self._servers:
            server.stop()

    # What the Hub holds

    def add_user(
        self, name: str, *, token: str, write: bool = True, organizations: Iterable[str] = ()
    ) -> User:
        """A user, who writes to their own namespace and their organizations' if `write`."""
        with self.lock:
            user = User(name, token, write, tuple(organizations))
            self.repos.users[token] = user
            return user

    def add_repo(
        self,
        repo_id: str,
        files: Mapping[str, bytes] | None = None,
        *,
        private: bool = False,
        gated: bool = False,
        readers: Iterable[str] = (),
    ) -> Repo:
        """A repository with one commit of exactly these files.

        Args:
            repo_id: Its name, with the namespace: "anna/base".
            files: The files of its first commit.
            private: Whether others cannot see it.
            gated: Whether others see all but the contents of its files.
            readers: Users who may see it and have its files all the same.
        """
        with self.lock:
            repo = self.repos.create(repo_id, private=private, gated=gated)
            repo.readers.update(readers)
            blobs = {path: self.repos.store(path, it) for path, it in (files or {}).items()}
            repo.record(blobs, "main", "initial commit")
            return repo

    def commit(
        self,
        repo_id: str,
        files: Mapping[str, bytes | None],
        *,
        message: str = "change",
        revision: str = "main",
    ) -> str:
        """Write these files, and delete those that are None: the new commit's hash.

        A branch that does not exist yet starts at `main`.
        """
        with self.lock:
            repo = self.repos.repos[repo_id]
            known = revision in repo.branches or revision.startswith("refs/pr/")
            parent = repo.resolve(revision if known else "main")
            blobs = {path: blob for path, blob in parent.blobs.items() if path not in files}
            for path, content in files.items():
                if content is not None:
                    blobs[path] = self.repos.store(path, content)
            return repo.record(blobs, revision, message, parent=parent).oid

    def files(self, repo_id: str, revision: str = "main") -> dict[str, bytes]:
        """The files of a revision, path -> content."""
        with self.lock:
            blobs = self.repos.repos[repo_id].resolve(revision).blobs
            return {path: blob.content for path, blob in blobs.items()}

    def commits(self, repo_id: str, revision: str = "main") -> list[Commit]:
        """The commits of a revision, newest first."""
        with self.lock:
            return list(self.repos.repos[repo_id].resolve(revision).history())

    # How it misbehaves

    def fail(
        self,
        method: str,
        path: str,
        *,
        times: int | None = 1,
        status: int | None = None,
        code: str | None = None,
        message: str = "",
        headers: Mapping[str, str | None] | None = None,
        hang_up: Literal["", "before", "after"] = "",
        cut_after: int | None = None,
        reset: bool = False,
        bytes_per_second: float | None = None,
        wrong_bytes: bool = False,
        extra_length: int = 0,
        ignore_range: bool = False,
    ) -> Fault:
        """Let requests go wrong; where several faults meet a request, the first one is taken.

        Faults of the content of an answer (`cut_after`, `bytes_per_second`, `wrong_bytes`,
        `extra_length`, `ignore_range` of a GET) wait for an answer that has content: a redirect
        does not use them up.

        Args:
            method: Of the requests.
            path: A regular expression that is searched in the path (unquoted) with its query.
            times: How many requests go wrong; None: all.
            status: Answer this status instead.
            code: The X-Error-Code with it, e.g. "EntryNotFound".
            message: The X-Error-Message with it.
            headers: Set these headers of the answer, whatever is true; None takes one away.
            hang_up: Close the connection without an answer, "before" or "after" doing what was
                asked.
            cut_after: Close the connection after so many bytes of the body: of the answer to a
                GET, of the request for a PUT or POST.
            reset: Close by a reset (RST), which the client sees as another error than an end.
            bytes_per_second: Send (GET) or read (PUT, POST) no faster than this.
            wrong_bytes: Change the last byte of the body.
            extra_length: Announce so many bytes more than are sent (less, if negative).
            ignore_range: Answer 200 and everything where a range is asked for.
        """
        fault = Fault(
            method, path, times, status, code, message, headers or {}, hang_up, cut_after,
            reset, bytes_per_second, wrong_bytes, extra_length, ignore_range,
        )  # fmt: skip
        with self.lock:
            self._faults.append(fault)
        return fault

    def heal(self) -> None:
        """Forget all faults."""
        with self.lock:
            self._faults.clear()

    def take_fault(self, request: Request, *, content: bool) -> Fault:
        """The first fault that meets a request, used up by one time."""
        with self.lock:
            for fault in self._faults:
                if fault.spoils_content == content and fault.meets(request):
                    if fault.times is not None:
                        fault.times -= 1
                    return fault
            return _NO_FAULT

    # Who calls it

    def environment(self, folder: Path, token: str | None = None) -> dict[str, str]:
        """The whole environment for a process that takes this for the Hub.

        The process keeps its cache and its settings in `folder` and sees no proxies.
        """
        own = {
            "HF_ENDPOINT": self.url,
            "HF_HOME": str(folder / "hf-home"),
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "HF_HUB_DISABLE_UPDATE_CHECK": "1",
            "NO_PROXY": "127.0.0.1,localhost",
        }
        if token is not None:
            own["HF_TOKEN"] = token
        foreign = re.compile(r"(?i)(.*_proxy|hf_.*|hugging.*|transformers_.*)$")
        return {key: it for key, it in os.environ.items() if not foreign.match(key)} | own


# The Hub's API: each function answers one kind of call


@dataclass
class Call:
    """A request that was received whole, and what its address says."""

    hub: HubServer
    params: Mapping[str, str]
    query: Mapping[str, str]
    body: bytes
    token: str | None

    @property
    def user(self) -> User | None:
        return self.hub.repos.user(self.token)

    @property
    def json(self) -> Any:
        return json.loads(self.body or b"{}")

    def readable(self) -> Repo:
        return self.hub.repos.readable(self.params["repo"], self.user)

    def commit(self) -> Commit:
        return self.readable().resolve(self.params.get("rev") or "main")

    def writable(self, *, member: bool = True) -> tuple[Repo, User]:
        return self.hub.repos.writable(self.params["repo"], self.user, member=member)

    def asks(self, name: str) -> bool:
        return self.query.get(name, "").lower() in ("1", "true")


@dataclass
class Answer:
    """A status, headers and a body; of a `ranged` body, a part can be asked for."""

    status: int = 200
    body: bytes = b""
    headers: dict[str, str] = field(default_factory=dict)
    ranged: bool = False


def _json(value: Any, status: int = 200) -> Answer:
    return Answer(status, json.dumps(value).encode(), {"Content-Type": "application/json"})


def _error(error: HubError) -> Answer:
    answer = _json({"error": error.message}, error.status)
    named = {
        "X-Error-Code": error.code,
        "X-Error-Message": error.message,
        "X-Repo-Commit": error.commit,
    }
    answer.headers |= {name: it for name, it in named.items() if it}
    return answer


def _whoami(call: Call) -> Answer:
    if call.user is None:
        raise HubError(401, None, "Invalid username or password.")
    return _json(user_json(call.user))


def _validate_yaml(call: Call) -> Answer:
    return _json({"errors": [], "warnings": []})


def _create_repo(call: Call) -> Answer:
    asked = call.json
    namespace = asked.get("organization") or (call.user.name if call.user else "")
    call.hub.repos.writer(call.user, namespace)
    repo_id = f"{namespace}/{asked['name']}"
    private = asked.get("visibility") == "private" or bool(asked.get("private"))
    url = f"{call.hub.url}/{repo_id}"
    try:
        call.hub.repos.create_as_hub(repo_id, private=private)
    except HubError as error:
        return _json({"error": error.message, "url": url}, error.status)
    return _json({"url": url, "name": repo_id})


def _delete_repo(call: Call) -> Answer:
    asked = call.json
    namespace = asked.get("organization") or (call.user.name if call.user else "")
    repo, _ = call.hub.repos.writable(f"{namespace}/{asked['name']}", call.user)
    del call.hub.repos.repos[repo.id]
    return _json({})


def _model(call: Call) -> Answer:
    return _json(model_json(call.readable(), call.commit(), with_blobs=call.asks("blobs")))


def _page(call: Call, items: list[Any], path: str) -> Answer:
    """A page of items, with a Link to the next one."""
    start = int(call.query.get("cursor", 0))
    end = start + call.hub.page_size
    answer = _json(items[start:end])
    if end < len(items):
        query = urlencode({**call.query, "cursor": end})
        answer.headers["Link"] = f'<{call.hub.url}{quote(path, safe="/%")}?{query}>; rel="next"'
    return answer


def _tree(call: Call) -> Answer:
    commit, folder = call.commit(), (call.params["path"] or "").strip("/")
    recursive, expand = call.asks("recursive"), call.asks("expand")
    entries = tree_json(commit, folder, recursive=recursive, expand=expand)
    path = f"/api/models/{call.params['repo']}/tree/{commit.oid}/{quote(folder)}".rstrip("/")
    return _page(call, entries, path)


def _paths_info(call: Call) -> Answer:
    commit, form = call.commit(), parse_qs(call.body.decode())
    expand = form.get("expand", [""])[0].lower() == "true"
    known = {*commit.blobs, *commit.folders()}
    wanted = [path.strip("/") for path in form.get("paths", [])]
    return _json([entry_json(commit, path, expand=expand) for path in wanted if path in known])


def _refs(call: Call) -> Answer:
    return _json(refs_json(call.readable(), pulls=call.asks("include_prs")))


def _commits(call: Call) -> Answer:
    commit = call.commit()
    path = f"/api/models/{call.params['repo']}/commits/{commit.oid}"
    return _page(call, [commit_json(it) for it in commit.history()], path)


def _create_branch(call: Call) -> Answer:
    repo, _ = call.writable()
    start = repo.resolve(call.json.get("startingPoint") or "main")
    return _create_ref(repo.branches, call.params["name"], start)


def _create_tag(call: Call) -> Answer:
    repo, _ = call.writable()
    return _create_ref(repo.tags, call.json["tag"], repo.resolve(call.params["name"]))


def _create_ref(names: dict[str, str], name: str, commit: Commit) -> Answer:
    if name in names:
        raise HubError(409, None, f"Reference already exists: {name}")
    names[name] = commit.oid
    return _json({})


def _delete_branch(call: Call) -> Answer:
    if call.params["name"] == "main":
        raise HubError(403, None, "Cannot delete the main branch")
    return _delete_ref(call.writable()[0].branches, call.params["name"])


def _delete_tag(call: Call) -> Answer:
    return _delete_ref(call.writable()[0].tags, call.params["name"])


def _delete_ref(names: dict[str, str], name: str) -> Answer:
    if names.pop(name, None) is None:
        raise HubError(404, "RevisionNotFound", f"Reference does not exist: {name}")
    return _json({})


def _preupload(call: Call) -> Answer:
    repo, _ = call.writable(member=not call.asks("create_pr"))
    return _json(preupload_json(call.hub.repos, repo.resolve(call.params["rev"]), call.json))


def _commit(call: Call) -> Answer:
    create_pr, url = call.asks("create_pr"), f"{call.hub.url}/{call.params['repo']}"
    repo, user = call.writable(member=not create_pr)
    lines = [json.loads(line) for line in call.body.splitlines() if line.strip()]
    revision = call.params["rev"]
    commit, target = call.hub.repos.apply(repo, revision, lines, user, create_pr)
    answer = {"success": True, "commitOid": commit.oid, "hookOutput": ""}
    answer["commitUrl"] = f"{url}/commit/{commit.oid}"
    if create_pr:
        answer["pullRequestUrl"] = f"{url}/discussions/{target.removeprefix('refs/pr/')}"
    return _json(answer)


def _lfs_batch(call: Call) -> Answer:
    call.writable(member=False)  # the client does not say here whether it wants a pull request
    asked = call.json
    in_parts = "multipart" in asked.get("transfers", ())
    objects = [_lfs_object(call, it["oid"], it["size"], in_parts) for it in asked["objects"]]
    return _json({"transfer": "multipart" if in_parts else "basic", "objects": objects})


def _lfs_object(call: Call, oid: str, size: int, in_parts: bool) -> dict[str, Any]:
    """Where to send an object to: nowhere, if it is known."""
    hub, answer = call.hub, {"oid": oid, "size": size}
    if oid in hub.repos.lfs:
        return answer
    upload: dict[str, Any] = {"href": f"{hub.cdn_url}/upload/{oid}?{_signature(oid)}"}
    if in_parts and hub.part_size is not None and size > hub.part_size:
        header = {"chunk_size": str(hub.part_size)}
        for number in range(1, -(-size // hub.part_size) + 1):
            header[str(number)] = f"{hub.cdn_url}/upload/{oid}/{number}?{_signature(oid)}"
        upload = {"href": f"{hub.url}/api/complete/{oid}?{_signature(oid)}", "header": header}
    verify = {"href": f"{hub.url}/{call.params['repo']}.git/info/lfs/objects/verify"}
    return {**answer, "actions": {"upload": upload, "verify": verify}}


def _lfs_verify(call: Call) -> Answer:
    call.writable(member=False)
    content = call.hub.repos.lfs.get(call.json["oid"])
    if content is None or len(content) != call.json["size"]:
        raise HubError(400, None, "The object was not uploaded, or not whole")
    return _json({})


def _lfs_upload(call: Call) -> Answer:
    _require_signature(call, oid := call.params["oid"])
    if (number := call.params["part"]) is not None:
        call.hub.repos.parts[oid, int(number)] = call.body
    else:
        call.hub.repos.upload(oid, call.body)
    return Answer(headers={"ETag": f'"{hashlib.sha256(call.body).hexdigest()}"'})


def _lfs_complete(call: Call) -> Answer:
    _require_signature(call, oid := call.params["oid"])
    call.hub.repos.complete(oid, (it["partNumber"] for it in call.json["parts"]))
    return _json({})


def _resolve(call: Call) -> Answer:
    """A file: its content, or for an LFS object the address of its content."""
    commit, path = call.commit(), call.params["path"] or ""
    call.hub.repos.downloadable(call.params["repo"], call.user)
    blob = commit.blob(path)
    headers = {"X-Repo-Commit": commit.oid, "ETag": f'"{blob.etag}"'}
    if not blob.lfs:
        headers["Content-Type"] = "text/plain; charset=utf-8"
        return Answer(200, blob.content, headers, ranged=True)
    where = f"/cdn/{call.params['repo']}/resolve/{commit.oid}/{quote(path)}"
    headers |= {
        "Location": f"{call.hub.cdn_url}{where}?oid={blob.sha256}&{_signature(blob.sha256)}",
        "X-Linked-Size": str(len(blob.content)),
        "X-Linked-ETag": f'"{blob.sha256}"',
        "Accept-Ranges": "bytes",
    }
    return Answer(302, b"Found. Redirecting to the CDN", headers)


def _cdn(call: Call) -> Answer:
    """The content of an LFS object, for whoever has a signed address."""
    _require_signature(call, oid := call.query.get("oid", ""))
    content = call.hub.repos.lfs[oid]
    headers = {"ETag": f'"{oid}"', "Content-Type": "application/octet-stream"}
    return Answer(200, content, headers, ranged=True)


def _signature(oid: str) -> str:
    return f"signature={hashlib.sha1(f'signed {oid}'.encode()).hexdigest()[:16]}"


def _require_signature(call: Call, oid: str) -> None:
    if f"signature={call.query.get('signature', '')}" != _signature(oid):
        raise HubError(403, None, "The signature is wrong")


_REPO = r"(?P<repo>[^/]+/[^/]+?)"
_REV = r"(?P<rev>refs/(?:heads|tags|pr)/[^/]+|[^/]+)"
_PATH = r"(?:/(?P<path>.*))?"
_NAME = r"(?P<name>[^/]+)"

_ROUTES: tuple[tuple[str, str, str, Callable[[Call], Answer]], ...] = (
    ("hub", "GET", "/api/whoami-v2", _whoami),
    ("hub", "POST", "/api/validate-yaml", _validate_yaml),
    ("hub", "POST", "/api/repos/create", _create_repo),
    ("hub", "DELETE", "/api/repos/delete", _delete_repo),
    ("hub", "GET", f"/api/models/{_REPO}", _model),
    ("hub", "GET", f"/api/models/{_REPO}/revision/{_REV}", _model),
    ("hub", "GET", f"/api/models/{_REPO}/tree/{_REV}{_PATH}", _tree),
    ("hub", "POST", f"/api/models/{_REPO}/paths-info/{_REV}", _paths_info),
    ("hub", "GET", f"/api/models/{_REPO}/refs", _refs),
    ("hub", "GET", f"/api/models/{_REPO}/commits/{_REV}", _commits),
    ("hub", "POST", f"/api/models/{_REPO}/branch/{_NAME}", _create_branch),
    ("hub", "DELETE", f"/api/models/{_REPO}/branch/{_NAME}", _delete_branch),
    ("hub", "POST", f"/api/models/{_REPO}/tag/{_NAME}", _create_tag),
    ("hub", "DELETE", f"/api/models/{_REPO}/tag/{_NAME}", _delete_tag),
    ("hub", "POST", f"/api/models/{_REPO}/preupload/{_REV}", _preupload),
    ("hub", "POST", f"/api/models/{_REPO}/commit/{_REV}", _commit),
    ("hub", "POST", f"/{_REPO}\\.git/info/lfs/objects/batch", _lfs_batch),
    ("hub", "POST", f"/{_REPO}\\.git/info/lfs/objects/verify", _lfs_verify),
    ("hub", "POST", r"/api/complete/(?P<oid>\w+)", _lfs_complete),
    ("hub", "GET", f"/{_REPO}/resolve/{_REV}{_PATH}", _resolve),
    ("cdn", "PUT", r"/upload/(?P<oid>\w+)(?:/(?P<part>\d+))?", _lfs_upload),
    ("cdn", "GET", "/cdn/.*", _cdn),
)


def _respond(host: str, method: str, path: str, call: Call) -> Answer:
    """The answer of the function that serves this path; a HEAD is answered as a GET."""
    served = "GET" if method == "HEAD" else method
    for its_host, its_method, pattern, function in _ROUTES:
        match = re.fullmatch(pattern, path) if (its_host, its_method) == (host, served) else None
        if match is not None:
            found = match.groupdict()
            call.params = {name: it and unquote(it) for name, it in found.items()}
            return function(call)
    raise HubError(404, None, f"Nothing serves {method} {path}")


# HTTP


class _HangUp(Exception):
    """The connection is to be closed now."""


class _Server(ThreadingHTTPServer):
    """One port of a Hub: the Hub itself or its CDN."""

    daemon_threads = True
    block_on_close = False
    request_queue_size = 64

    def __init__(self, hub: HubServer, host: Literal["hub", "cdn"]) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.hub = hub
        self.host = host
        self.url = f"http://127.0.0.1:{self.server_address[1]}"
        self._connections: set[socket.socket] = set()
        self._thread = threading.Thread(target=self.serve_forever, args=(0.01,), daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        if self._thread.is_alive():
            self.shutdown()
            self._thread.join()
        self.server_close()
        for connection in tuple(self._connections):
            with suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
            self.shutdown_request(connection)

    def process_request(self, request: Any, client_address: Any) -> None:
        self._connections.add(request)
        super().process_request(request, client_address)

    def shutdown_request(self, request: Any) -> None:
        self._connections.discard(request)
        super().shutdown_request(request)

    def handle_error(self, request: Any, client_address: Any) -> None:
        if not self.hub.stopping.is_set():
            super().handle_error(request, client_address)


class _Handler(BaseHTTPRequestHandler):
    """Reads a request, asks `_respond` and writes the answer, each with its faults."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: _Server

    def serve(self) -> None:
        url = urlsplit(self.path)
        token = self.headers.get("Authorization", "").removeprefix("Bearer ") or None
        request = Request(
            self.command, unquote(url.path), url.query, self.server.host,
            self.headers.get("Range"), token,
        )  # fmt: skip
        hub = self.server.hub
        hub.log.add(request)
        fault = hub.take_fault(request, content=False)
        try:
            body = b"".join(self._received(request, fault))
            if fault.hang_up == "before":
                raise _HangUp
            query = {key: values[-1] for key, values in parse_qs(url.query).items()}
            call = Call(hub, {}, query, body, token)
            answer = self._answer(call, url.path, fault)
            if fault.hang_up == "after":
                raise _HangUp
            self._send(request, answer, fault)
        except _HangUp:
            self._close(reset=fault.reset)
        except ConnectionError:
            self.close_connection = True

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = serve

    def _answer(self, call: Call, path: str, fault: Fault) -> Answer:
        try:
            if fault.status is not None:
                raise HubError(fault.status, fault.code, fault.message or "A fault was asked for")
            with call.hub.lock:
                return _respond(self.server.host, self.command, path, call)
        except HubError as error:
            return _error(error)

    # The request's body

    def _received(self, request: Request, fault: Fault) -> Iterator[bytes]:
        limit = fault.cut_after if self.command in ("PUT", "POST") else None
        size = _chunk_size(fault) if limit is None else min(_chunk_size(fault), limit or 1)
        for piece in self._pieces(size):
            request.bytes_received += len(piece)
            if limit is not None and request.bytes_received >= limit:
                request.bytes_received = limit
                raise _HangUp
            self._pace(fault, len(piece))
            yield piece

    def _pieces(self, size: int) -> Iterator[bytes]:
        if self.headers.get("Transfer-Encoding", "").lower() == "chunked":
            while length := int(self.rfile.readline().split(b";")[0], 16):
                yield from self._read(length, size)
                self.rfile.readline()
            self.rfile.readline()
        else:
            yield from self._read(int(self.headers.get("Content-Length", 0)), size)

    def _read(self, length: int, size: int) -> Iterator[bytes]:
        while length:
            piece = self.rfile.read(min(size, length))
            if not piece:
                raise ConnectionResetError("the client went away")
            length -= len(piece)
            yield piece

    # The answer

    def _send(self, request: Request, answer: Answer, fault: Fault) -> None:
        has_content = 200 <= answer.status < 300 and self.command == "GET"
        spoilt = self.server.hub.take_fault(request, content=True) if has_content else _NO_FAULT
        body = self._part(answer, spoilt)
        if spoilt.wrong_bytes and body:
            body = body[:-1] + bytes([body[-1] ^ 0xFF])
        request.status = answer.status
        self.send_response(answer.status)
        headers = {"Content-Length": str(len(body) + spoilt.extra_length), **answer.headers}
        for name, value in _replaced(headers, {**fault.headers, **spoilt.headers}).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self._write(request, body[: spoilt.cut_after], spoilt)
        if spoilt.cut_after is not None or spoilt.extra_length:
            self._close(reset=spoilt.reset)

    def _part(self, answer: Answer, fault: Fault) -> bytes:
        """The body to send: the part that is asked for, with the answer changed to say so."""
        if not answer.ranged:
            return answer.body
        etag, size = answer.headers["ETag"], len(answer.body)
        if self.headers.get("If-Match", etag) not in (etag, "*"):
            answer.status = 412
            return b""
        if fault.ignore_range:
            return answer.body
        answer.headers["Accept-Ranges"] = "bytes"
        if self.headers.get("If-Range", etag) != etag:
            return answer.body
        span = _span(self.headers.get("Range", ""), size)
        if span is None:
            return answer.body
        start, end = span
        if start >= end:
            answer.status = 416
            answer.headers["Content-Range"] = f"bytes */{size}"
            return b""
        answer.status = 206
        answer.headers["Content-Range"] = f"bytes {start}-{end - 1}/{size}"
        return answer.body[start:end]

    def _write(self, request: Request, body: bytes, fault: Fault) -> None:
        size = _chunk_size(fault)
        for start in range(0, len(body), size):
            piece = body[start : start + size]
            request.bytes_sent += len(piece)
            self.wfile.write(piece)
            self._pace(fault, len(piece))

    def _pace(self, fault: Fault, size: int) -> None:
        """Wait as long as so many bytes are to take."""
        rate = fault.bytes_per_second
        if rate is not None and self.server.hub.stopping.wait(size / rate):
            raise ConnectionResetError("the server stops")

    def _close(self, *, reset: bool) -> None:
        """End the connection here, by an end of stream or by a reset."""
        self.close_connection = True
        if reset:
            linger = struct.pack("ii", 1, 0)
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
            os.close(self.connection.detach())

    def log_message(self, format: str, *args: Any) -> None:
        """Say nothing: `HubServer.log` has it."""


def _chunk_size(fault: Fault) -> int:
    """How much to send or to read between two pauses."""
    if fault.bytes_per_second is None:
        return _CHUNK
    return max(1, int(fault.bytes_per_second * _PACE))


def _span(asked: str, size: int) -> tuple[int, int] | None:
    """Where a Range header's one range starts and ends; None: it wants everything.

    A range that begins behind the end comes back empty.
    """
    match = re.fullmatch(r"bytes=(\d*)-(\d*)", asked.strip())
    if match is None or match.groups() == ("", ""):
        return None
    first, last = match.groups()
    if not first:
        return max(0, size - int(last)), size
    return int(first), min(size, int(last) + 1) if last else size


def _replaced(headers: Mapping[str, str], by: Mapping[str, str | None]) -> dict[str, str]:
    """The headers with others in place of those of the same name, and without those of None."""
    lowered = {name.lower() for name in by}
    kept = {name: it for name, it in headers.items() if name.lower() not in lowered}
    return kept | {name: it for name, it in by.items() if it is not None}
