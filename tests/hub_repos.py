"""What a Hub holds, without HTTP: users, model repositories with their history, and LFS objects.

Everything is in memory and deterministic: the same calls in the same order give the same commit
hashes and dates. Failures are `HubError`, with the status and error code that the real Hub answers.
"""

from __future__ import annotations

import base64
import fnmatch
import hashlib
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from functools import cached_property
from types import MappingProxyType
from typing import Any

LFS_PATTERNS = (
    "*.safetensors", "*.bin", "*.onnx", "*.data", "*.gguf", "*.pt", "*.pth", "*.ckpt", "*.zip",
    "*.npz", "*.npy", "*.h5", "*.msgpack",
)  # fmt: skip
"""Files that are always stored as LFS objects, whatever their size."""

LFS_SIZE = 10 * 1024 * 1024
"""Any file of at least this many bytes is stored as an LFS object."""

_FIRST_DATE = datetime(2026, 1, 1, tzinfo=UTC)
_GIT_ATTRIBUTES = "".join(f"{it} filter=lfs diff=lfs merge=lfs -text\n" for it in LFS_PATTERNS)


class HubError(Exception):
    """A request that the Hub refuses: the status, the X-Error-Code and the X-Error-Message."""

    def __init__(self, status: int, code: str | None, message: str, commit: str | None = None):
        super().__init__(f"{status} {code}: {message}")
        self.status = status
        self.code = code
        self.message = message
        self.commit = commit  # answered as X-Repo-Commit where an entry is missing


@dataclass(frozen=True)
class User:
    """Whoever a token stands for, and the namespaces they may write to."""

    name: str
    token: str
    write: bool
    organizations: tuple[str, ...] = ()

    def member_of(self, namespace: str) -> bool:
        return namespace == self.name or namespace in self.organizations


@dataclass(frozen=True)
class Blob:
    """One version of one file."""

    content: bytes
    lfs: bool

    @cached_property
    def sha256(self) -> str:
        return hashlib.sha256(self.content).hexdigest()

    @cached_property
    def pointer(self) -> bytes:
        """The text that git keeps in place of an LFS object."""
        lines = (
            "version https://git-lfs.github.com/spec/v1",
            f"oid sha256:{self.sha256}",
            f"size {len(self.content)}",
        )
        return "".join(f"{line}\n" for line in lines).encode()

    @cached_property
    def git_oid(self) -> str:
        """What git calls this blob: of an LFS object, the name of its pointer."""
        stored = self.pointer if self.lfs else self.content
        return hashlib.sha1(b"blob %d\0" % len(stored) + stored).hexdigest()

    @property
    def etag(self) -> str:
        return self.sha256 if self.lfs else self.git_oid


@dataclass(frozen=True)
class Commit:
    """A whole tree, path -> blob, and how it came to be."""

    oid: str
    parent: Commit | None
    title: str
    description: str
    author: str
    date: datetime
    blobs: Mapping[str, Blob]

    def history(self) -> Iterator[Commit]:
        """This commit and those before it, newest first."""
        commit: Commit | None = self
        while commit is not None:
            yield commit
            commit = commit.parent

    def last_change(self, path: str) -> Commit:
        """The commit that gave `path`, a file or a folder, the content that it has here."""
        changed = self
        for commit in self.history():
            if commit.under(path) != self.under(path):
                break
            changed = commit
        return changed

    def under(self, path: str) -> dict[str, Blob]:
        """The file at `path`, or the files in the folder of that name."""
        return {
            name: blob
            for name, blob in self.blobs.items()
            if not path or name == path or name.startswith(f"{path}/")
        }

    def blob(self, path: str) -> Blob:
        if path not in self.blobs:
            raise HubError(404, "EntryNotFound", "Entry not found", commit=self.oid)
        return self.blobs[path]

    def folders(self) -> list[str]:
        found: set[str] = set()
        for path in self.blobs:
            parts = path.split("/")[:-1]
            found.update("/".join(parts[: depth + 1]) for depth in range(len(parts)))
        return sorted(found)


@dataclass
class Repo:
    """A model repository: commits, and the branches, tags and pull requests that name them."""

    id: str
    private: bool = False
    gated: bool = False
    readers: set[str] = field(default_factory=set)  # users let into a gated or private repository
    branches: dict[str, str] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)
    pulls: dict[str, str] = field(default_factory=dict)
    commits: dict[str, Commit] = field(default_factory=dict)

    @property
    def namespace(self) -> str:
        return self.id.partition("/")[0]

    def resolve(self, revision: str) -> Commit:
        """The commit that a branch, a tag, a commit hash or a `refs/...` names."""
        kind, _, name = revision.removeprefix("refs/").partition("/")
        tables = {"heads": self.branches, "tags": self.tags, "pr": self.pulls}
        if revision.startswith("refs/") and kind in tables:
            oid = tables[kind].get(name)
        else:
            oid = self.branches.get(revision) or self.tags.get(revision) or revision
        if oid not in self.commits:
            raise HubError(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return self.commits[oid]

    def record(
        self,
        blobs: Mapping[str, Blob],
        revision: str,
        title: str,
        *,
        description: str = "",
        author: str = "",
        parent: Commit | None = None,
    ) -> Commit:
        """Add a commit and let `revision`, a branch or a `refs/pr/N`, name it."""
        number = len(self.commits)
        tree = "".join(f"{path}\0{blobs[path].git_oid}\n" for path in sorted(blobs))
        identity = f"{self.id}\n{number}\n{parent.oid if parent else ''}\n{title}\n{tree}"
        commit = Commit(
            oid=hashlib.sha1(identity.encode()).hexdigest(),
            parent=parent,
            title=title,
            description=description,
            author=author or self.namespace,
            date=_FIRST_DATE + timedelta(seconds=number),
            blobs=MappingProxyType(dict(blobs)),
        )
        self.commits[commit.oid] = commit
        if revision.startswith("refs/pr/"):
            self.pulls[revision.removeprefix("refs/pr/")] = commit.oid
        else:
            self.branches[revision] = commit.oid
        return commit

    def open_pull(self, base: Commit) -> str:
        """A new pull request that starts at `base`: its revision, `refs/pr/N`."""
        number = str(len(self.pulls) + 1)
        self.pulls[number] = base.oid
        return f"refs/pr/{number}"


class Repos:
    """The users, the repositories and the LFS objects of one Hub."""

    def __init__(self, lfs_size: int = LFS_SIZE) -> None:
        self.lfs_size = lfs_size
        self.users: dict[str, User] = {}  # by token
        self.repos: dict[str, Repo] = {}
        self.lfs: dict[str, bytes] = {}  # by sha256
        self.parts: dict[tuple[str, int], bytes] = {}  # of multipart uploads in progress

    # Who may do what

    def user(self, token: str | None) -> User | None:
        if token is None:
            return None
        if token not in self.users:
            raise HubError(401, None, "Invalid credentials in Authorization header")
        return self.users[token]

    def readable(self, repo_id: str, user: User | None) -> Repo:
        """The repository, if this user may know that it exists.

        Whoever is not logged in is told 401 for a missing repository, as for a private one.
        """
        repo = self.repos.get(repo_id)
        if repo is None or (repo.private and not _is_reader(repo, user)):
            if user is None:
                raise HubError(401, "RepoNotFound", "Invalid username or password.")
            raise HubError(404, "RepoNotFound", "Repository not found")
        return repo

    def downloadable(self, repo_id: str, user: User | None) -> Repo:
        """The repository, if this user may have its files: a gated one shows all but these."""
        repo = self.readable(repo_id, user)
        if repo.gated and not _is_reader(repo, user):
            refusal = f"Access to model {repo_id} is restricted"
            raise HubError(401 if user is None else 403, "GatedRepo", refusal)
        return repo

    def writable(
        self, repo_id: str, user: User | None, *, member: bool = True
    ) -> tuple[Repo, User]:
        """The repository, if this user may write to it; a pull request needs no `member`."""
        writer = self.writer(user, repo_id.partition("/")[0] if member else None)
        return self.readable(repo_id, writer), writer

    def writer(self, user: User | None, namespace: str | None = None) -> User:
        """The user, if they may write (to this namespace)."""
        if user is None:
            # The real Hub sends no code here: the client knows these 401 by their https:// address.
            raise HubError(401, "RepoNotFound", "Invalid username or password.")
        if not user.write or not (namespace is None or user.member_of(namespace)):
            raise HubError(403, None, "You don't have the rights to write to this namespace")
        return user

    # Repositories and files

    def create(self, repo_id: str, *, private: bool = False, gated: bool = False) -> Repo:
        if repo_id in self.repos:
            raise HubError(409, None, "You already created this model repo")
        self.repos[repo_id] = Repo(repo_id, private=private, gated=gated)
        return self.repos[repo_id]

    def create_as_hub(self, repo_id: str, *, private: bool) -> Repo:
        """Create, with the first commit that the Hub makes by itself."""
        repo = self.create(repo_id, private=private)
        blobs = {".gitattributes": Blob(_GIT_ATTRIBUTES.encode(), lfs=False)}
        repo.record(blobs, "main", "initial commit")
        return repo

    def store(self, path: str, content: bytes) -> Blob:
        """The blob of a file that is given whole, kept as the Hub would keep it."""
        blob = Blob(content, lfs=self.is_lfs(path, len(content)))
        if blob.lfs:
            self.lfs[blob.sha256] = content
        return blob

    def is_lfs(self, path: str, size: int) -> bool:
        if size == 0:
            return False
        return size >= self.lfs_size or _matches(path, LFS_PATTERNS)

    def upload(self, oid: str, content: bytes) -> None:
        """Keep an LFS object that was uploaded whole."""
        if hashlib.sha256(content).hexdigest() != oid:
            raise HubError(400, None, "The content does not match the SHA256 that was announced")
        self.lfs[oid] = content

    def complete(self, oid: str, numbers: Iterable[int]) -> None:
        """Join the parts of an LFS object."""
        keys = [(oid, number) for number in numbers]
        if any(key not in self.parts for key in keys):
            raise HubError(400, None, "A part is missing")
        self.upload(oid, b"".join(self.parts[key] for key in keys))
        for key in keys:
            del self.parts[key]

    def apply(
        self, repo: Repo, revision: str, lines: list[dict[str, Any]], user: User, create_pr: bool
    ) -> tuple[Commit, str]:
        """Make the commit that a client describes: the new commit, and the revision it is on."""
        header = next(line["value"] for line in lines if line["key"] == "header")
        base = repo.resolve(revision)
        if not (create_pr or revision in repo.branches or revision.startswith("refs/pr/")):
            raise HubError(404, "RevisionNotFound", f"Not a branch: {revision}")
        if header.get("parentCommit") not in (None, base.oid):
            raise HubError(412, None, "A commit has happened since. Please refresh and try again.")
        blobs = dict(base.blobs)
        for line in lines:
            if line["key"] != "header":
                self._apply_line(blobs, line["key"], line["value"])
        target = repo.open_pull(base) if create_pr else revision
        commit = repo.record(
            blobs,
            target,
            header["summary"],
            description=header.get("description", ""),
            author=user.name,
            parent=base,
        )
        return commit, target

    def _apply_line(self, blobs: dict[str, Blob], key: str, value: Mapping[str, Any]) -> None:
        path = value["path"]
        if key == "file":
            blobs[path] = Blob(base64.b64decode(value["content"]), lfs=False)
        elif key == "lfsFile":
            if value["oid"] not in self.lfs:
                raise HubError(
                    400, None, f"LFS pointer pointed to a file that is not there: {path}"
                )
            blobs[path] = Blob(self.lfs[value["oid"]], lfs=True)
        elif key in ("deletedFile", "deletedFolder"):
            prefix = path.rstrip("/") + "/"
            doomed = [it for it in blobs if it == path or it.startswith(prefix)]
            if not doomed or (key == "deletedFile" and path not in blobs):
                raise HubError(404, "EntryNotFound", "A file with this name doesn't exist")
            for name in doomed:
                del blobs[name]
        else:
            raise HubError(400, None, f"Unknown operation: {key}")


def _is_reader(repo: Repo, user: User | None) -> bool:
    return user is not None and (user.member_of(repo.namespace) or user.name in repo.readers)


def _matches(path: str, patterns: Iterable[str]) -> bool:
    names = (path, path.rpartition("/")[2])
    return any(fnmatch.fnmatchcase(name, pattern) for name in names for pattern in patterns)


# How the Hub's API shows these things in JSON


def model_json(repo: Repo, commit: Commit, *, with_blobs: bool = False) -> dict[str, Any]:
    card = card_data(commit)
    first = next(iter(repo.commits.values()))
    siblings = []
    for path, blob in sorted(commit.blobs.items()):
        sibling: dict[str, Any] = {"rfilename": path}
        if with_blobs:
            sibling |= {"size": len(blob.content), "blobId": blob.git_oid}
            if blob.lfs:
                lfs = {"sha256": blob.sha256, "size": len(blob.content)}
                sibling["lfs"] = lfs | {"pointerSize": len(blob.pointer)}
        siblings.append(sibling)
    return {
        "_id": hashlib.sha1(repo.id.encode()).hexdigest()[:24],
        "id": repo.id,
        "modelId": repo.id,
        "author": repo.namespace,
        "sha": commit.oid,
        "createdAt": date_text(first.date),
        "lastModified": date_text(commit.date),
        "private": repo.private,
        "gated": "manual" if repo.gated else False,
        "disabled": False,
        "downloads": 0,
        "likes": 0,
        "tags": [card["library_name"]] if "library_name" in card else [],
        "cardData": card,
        "siblings": siblings,
    }


def card_data(commit: Commit) -> dict[str, str]:
    """The one-line fields of the README's metadata; lists and nested fields are left out."""
    readme = commit.blobs.get("README.md")
    match = re.match(r"---\n(.*?)\n---", readme.content.decode(), re.DOTALL) if readme else None
    lines = match[1].splitlines() if match else []
    fields = (re.fullmatch(r"(\w+): *(\S.*)", line) for line in lines)
    return {it[1]: it[2].strip("\"'") for it in fields if it}


def tree_json(
    commit: Commit, folder: str, *, recursive: bool, expand: bool
) -> list[dict[str, Any]]:
    """The entries of a folder, its folders before its files."""
    prefix = f"{folder}/" if folder else ""
    if folder and folder not in commit.folders():
        raise HubError(404, "EntryNotFound", f"{folder} does not exist", commit=commit.oid)
    inside = [it for it in (*commit.folders(), *sorted(commit.blobs)) if it.startswith(prefix)]
    return [
        entry_json(commit, path, expand=expand)
        for path in inside
        if recursive or "/" not in path.removeprefix(prefix)
    ]


def entry_json(commit: Commit, path: str, *, expand: bool) -> dict[str, Any]:
    blob = commit.blobs.get(path)
    if blob is None:
        below = "".join(f"{name}\0{it.git_oid}" for name, it in sorted(commit.under(path).items()))
        oid = hashlib.sha1(below.encode()).hexdigest()
        entry: dict[str, Any] = {"type": "directory", "oid": oid, "size": 0, "path": path}
    else:
        size = len(blob.content)
        entry = {"type": "file", "oid": blob.git_oid, "size": size, "path": path}
        if blob.lfs:
            entry["lfs"] = {"oid": blob.sha256, "size": size, "pointerSize": len(blob.pointer)}
    if expand:
        last = commit.last_change(path)
        entry["lastCommit"] = {"id": last.oid, "title": last.title, "date": date_text(last.date)}
        if blob is not None:
            unscanned = {"status": "unscanned", "avScan": None, "pickleImportScan": None}
            entry["securityFileStatus"] = unscanned
    return entry


def commit_json(commit: Commit) -> dict[str, Any]:
    return {
        "id": commit.oid,
        "title": commit.title,
        "message": commit.description,
        "authors": [{"user": commit.author}],
        "date": date_text(commit.date),
    }


def refs_json(repo: Repo, *, pulls: bool) -> dict[str, Any]:
    def shown(names: Mapping[str, str], prefix: str) -> list[dict[str, str]]:
        return [
            {"name": name, "ref": f"refs/{prefix}/{name}", "targetCommit": oid}
            for name, oid in names.items()
        ]

    answer = {"branches": shown(repo.branches, "heads"), "tags": shown(repo.tags, "tags")}
    answer["converts"] = []
    if pulls:
        answer["pullRequests"] = shown(repo.pulls, "pr")
    return answer


def preupload_json(repos: Repos, commit: Commit, question: Mapping[str, Any]) -> dict[str, Any]:
    """Which files are to go through LFS, which to be ignored, and which are there already."""
    ignored = [line.strip() for line in question.get("gitIgnore", "").splitlines() if line.strip()]
    files = []
    for asked in question["files"]:
        path, size = asked["path"], asked["size"]
        present = commit.blobs.get(path)
        files.append(
            {
                "path": path,
                "uploadMode": "lfs" if repos.is_lfs(path, size) else "regular",
                "shouldIgnore": _matches(path, ignored),
                "oid": present.etag if present else None,
            }
        )
    return {"commitOid": commit.oid, "files": files}


def user_json(user: User) -> dict[str, Any]:
    role = "write" if user.write else "read"
    return {
        "type": "user",
        "id": hashlib.sha1(user.name.encode()).hexdigest()[:24],
        "name": user.name,
        "fullname": user.name,
        "orgs": [{"type": "org", "name": name} for name in user.organizations],
        "auth": {"type": "access_token", "accessToken": {"displayName": "test", "role": role}},
    }


def date_text(date: datetime) -> str:
    return date.strftime("%Y-%m-%dT%H:%M:%S.000Z")
