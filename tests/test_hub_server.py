from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from huggingface_hub import (
    CommitOperationAdd,
    CommitOperationCopy,
    CommitOperationDelete,
    HfApi,
    constants,
    file_download,
    hf_hub_download,
    snapshot_download,
)
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import _http, get_session, httpx

from tests.hub_server import HubServer

WEIGHTS = bytes(range(256)) * 40
CONFIG = b'{"model_type": "tiny"}\n'
FILES = {"config.json": CONFIG, "model.safetensors": WEIGHTS, "sub/notes.txt": b"notes"}
REPO = "anna/base"


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    """A Hub with two users; the client in this process does without Xet."""
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    with HubServer() as server:
        server.add_user("anna", token="hf_anna")
        server.add_user("ben", token="hf_ben", write=False)
        yield server


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """How long the client would have waited between its attempts: it does not."""
    waited: list[float] = []
    clock = SimpleNamespace(sleep=waited.append)
    monkeypatch.setattr(_http, "time", clock)
    monkeypatch.setattr(file_download, "time", clock)
    return waited


@pytest.fixture
def api(hub: HubServer) -> HfApi:
    """The client of anna, who may write."""
    return HfApi(endpoint=hub.url, token="hf_anna")


def fetch(hub: HubServer, folder: Path, path: str, token: str | bool = False, **more: Any) -> bytes:
    """What hf_hub_download gets."""
    found = hf_hub_download(
        REPO, path, endpoint=hub.url, cache_dir=folder / "cache", token=token, **more
    )
    return Path(found).read_bytes()


def contents(folder: str | Path) -> dict[str, bytes]:
    files = (it for it in Path(folder).rglob("*") if it.is_file())
    return {it.relative_to(folder).as_posix(): it.read_bytes() for it in files}


def write_files(folder: Path, files: dict[str, bytes]) -> Path:
    for path, content in files.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(content)
    return folder


def raw(hub: HubServer, method: str, path: str, **headers: str) -> httpx.Response:
    """A request without the client's own retries; it follows redirects."""
    return get_session().request(method, hub.url + path, headers=headers)


class TestRepositories:
    def test_create_and_delete(self, hub: HubServer, api: HfApi) -> None:
        assert str(api.create_repo(REPO)) == f"{hub.url}/{REPO}"
        assert list(hub.files(REPO)) == [".gitattributes"]
        with pytest.raises(HfHubHTTPError, match="409"):
            api.create_repo(REPO)
        assert str(api.create_repo(REPO, exist_ok=True)) == f"{hub.url}/{REPO}"
        api.delete_repo(REPO)
        with pytest.raises(RepositoryNotFoundError):
            api.delete_repo(REPO)
        assert not api.repo_exists(REPO)

    def test_a_private_repository_is_created(self, hub: HubServer, api: HfApi) -> None:
        api.create_repo(REPO, private=True)
        assert api.model_info(REPO).private
        assert not HfApi(endpoint=hub.url, token=False).repo_exists(REPO)

    def test_whoami(self, api: HfApi) -> None:
        me = api.whoami()
        assert (me["name"], me["auth"]["accessToken"]["role"]) == ("anna", "write")
        with pytest.raises(HfHubHTTPError, match="Invalid user token"):
            api.whoami(token="hf_unknown")

    def test_model_info(self, hub: HubServer, api: HfApi) -> None:
        card = b"---\nlicense: mit\nlibrary_name: peft\ntags:\n- lora\n---\n# Base\n"
        hub.add_repo(REPO, {**FILES, "README.md": card})
        info = api.model_info(REPO, files_metadata=True)
        assert info.sha == hub.commits(REPO)[0].oid
        assert info.siblings is not None and info.card_data is not None
        sizes = {it.rfilename: (it.size, it.lfs and it.lfs.size) for it in info.siblings}
        assert sizes["config.json"] == (len(CONFIG), None)
        assert sizes["model.safetensors"] == (len(WEIGHTS), len(WEIGHTS))
        assert (info.tags, info.card_data.license) == (["peft"], "mit")

    def test_history_is_deterministic(self, hub: HubServer) -> None:
        hub.add_repo(REPO, FILES)
        hub.commit(REPO, {"a.txt": b"1"})
        with HubServer() as other:
            other.add_repo(REPO, FILES)
            other.commit(REPO, {"a.txt": b"1"})
            assert other.commits(REPO)[0].oid == hub.commits(REPO)[0].oid


class TestDownloads:
    def test_snapshot(self, hub: HubServer, tmp_path: Path) -> None:
        hub.add_repo(REPO, FILES)
        found = snapshot_download(REPO, endpoint=hub.url, cache_dir=tmp_path, token=False)
        assert contents(found) == FILES
        calls = {(it.method, it.host, it.path.split("/")[-1]) for it in hub.log}
        assert ("GET", "hub", "model.safetensors") not in calls  # the HEAD told where it is
        assert ("GET", "cdn", "model.safetensors") in calls

    def test_branch_tag_commit_and_reference(self, hub: HubServer, tmp_path: Path) -> None:
        first = hub.add_repo(REPO, {"a.txt": b"1"}).branches["main"]
        HfApi(endpoint=hub.url, token="hf_anna").create_tag(REPO, tag="v1.0")
        hub.commit(REPO, {"a.txt": b"2"})
        hub.commit(REPO, {"a.txt": b"3"}, revision="dev/x")
        expected = {"main": b"2", "v1.0": b"1", first: b"1", "dev/x": b"3"}
        for revision, content in expected.items():
            assert fetch(hub, tmp_path, "a.txt", revision=revision) == content
        assert raw(hub, "GET", f"/{REPO}/resolve/refs/heads/main/a.txt").content == b"2"

    def test_what_is_missing(self, hub: HubServer, tmp_path: Path) -> None:
        hub.add_repo(REPO, FILES)
        with pytest.raises(EntryNotFoundError):
            fetch(hub, tmp_path, "absent.txt")
        with pytest.raises(RevisionNotFoundError):
            fetch(hub, tmp_path, "config.json", revision="absent")
        with pytest.raises(RepositoryNotFoundError, match="404"):
            hf_hub_download(
                "anna/absent", "a", endpoint=hub.url, cache_dir=tmp_path, token="hf_ben"
            )

    def test_a_cached_file_needs_one_request(self, hub: HubServer, tmp_path: Path) -> None:
        hub.add_repo(REPO, FILES)
        fetch(hub, tmp_path, "config.json")
        mark = hub.log.mark()
        assert fetch(hub, tmp_path, "config.json") == CONFIG
        assert [it.method for it in hub.log.find(since=mark)] == ["HEAD"]
        mark = hub.log.mark()
        assert fetch(hub, tmp_path, "config.json", revision=hub.commits(REPO)[0].oid) == CONFIG
        assert not hub.log.find(since=mark)

    def test_ranges(self, hub: HubServer) -> None:
        hub.add_repo(REPO, FILES)
        for path, content in (("config.json", CONFIG), ("model.safetensors", WEIGHTS)):
            url, size = f"/{REPO}/resolve/main/{path}", len(content)
            for asked, start, end in (("2-5", 2, 6), (f"{size - 3}-", size - 3, size)):
                answer = raw(hub, "GET", url, Range=f"bytes={asked}")
                assert (answer.status_code, answer.content) == (206, content[start:end])
                assert answer.headers["Content-Range"] == f"bytes {start}-{end - 1}/{size}"
            assert raw(hub, "GET", url, Range="bytes=-4").content == content[-4:]
            assert raw(hub, "GET", url, Range=f"bytes=0-{size + 9}").content == content
            beyond = raw(hub, "GET", url, Range=f"bytes={size}-")
            assert (beyond.status_code, beyond.headers["Content-Range"]) == (416, f"bytes */{size}")
            assert raw(hub, "GET", url, **{"If-Match": '"other"'}).status_code == 412
        assert hub.log.find("GET", r"model\.safetensors")[1].range == "bytes=2-5"

    def test_head(self, hub: HubServer) -> None:
        hub.add_repo(REPO, FILES)
        head = get_session().head(
            f"{hub.url}/{REPO}/resolve/main/model.safetensors", follow_redirects=False
        )
        assert head.status_code == 302
        assert head.headers["X-Linked-Size"] == str(len(WEIGHTS))
        assert head.headers["Location"].startswith(hub.cdn_url)
        unsigned = head.headers["Location"].replace("signature=", "signature=0")
        assert get_session().get(unsigned).status_code == 403
        small = raw(hub, "HEAD", f"/{REPO}/resolve/main/config.json")
        assert small.headers["Content-Length"] == str(len(CONFIG))
        assert small.headers["X-Repo-Commit"] == hub.commits(REPO)[0].oid

    def test_the_cdn_gets_no_token(self, hub: HubServer, tmp_path: Path) -> None:
        hub.add_repo(REPO, FILES, private=True)
        assert fetch(hub, tmp_path, "model.safetensors", token="hf_anna") == WEIGHTS
        assert {it.host: it.token for it in hub.log} == {"hub": "hf_anna", "cdn": None}
        mark, url = hub.log.mark(), f"/{REPO}/resolve/main/model.safetensors"
        assert raw(hub, "GET", url, Authorization="Bearer hf_anna").content == WEIGHTS
        tokens = [(it.host, it.token) for it in hub.log.find(since=mark)]
        assert tokens == [("hub", "hf_anna"), ("cdn", None)]


class TestListing:
    def test_tree(self, hub: HubServer, api: HfApi) -> None:
        hub.add_repo(REPO, {**FILES, "sub/deep/x.txt": b"x"})
        top = {it.path: type(it).__name__ for it in api.list_repo_tree(REPO)}
        assert top == {
            "sub": "RepoFolder",
            "config.json": "RepoFile",
            "model.safetensors": "RepoFile",
        }
        below = [it.path for it in api.list_repo_tree(REPO, "sub", recursive=True)]
        assert below == ["sub/deep", "sub/deep/x.txt", "sub/notes.txt"]
        with pytest.raises(EntryNotFoundError):
            list(api.list_repo_tree(REPO, "absent"))

    def test_pages(self) -> None:
        with HubServer(page_size=2) as hub:
            names = [f"a b/{number}.txt" for number in range(5)]
            hub.add_repo(REPO, dict.fromkeys(names, b""))
            api = HfApi(endpoint=hub.url, token=False)
            assert sorted(api.list_repo_files(REPO)) == names
            assert [it.path for it in api.list_repo_tree(REPO, "a b")] == names
            hub.commit(REPO, {"x": b"1"})
            hub.commit(REPO, {"x": b"2"})
            assert len(api.list_repo_commits(REPO)) == 3

    def test_paths_info(self, hub: HubServer, api: HfApi) -> None:
        hub.add_repo(REPO, FILES)
        oid = hub.commit(REPO, {"config.json": b"{}"}, message="new config")
        config, weights, folder = api.get_paths_info(
            REPO, ["config.json", "model.safetensors", "sub", "absent"], expand=True
        )
        assert config.size == 2 and config.last_commit.oid == oid
        assert weights.lfs.sha256 == hub.repos.store("a.bin", WEIGHTS).sha256
        assert weights.last_commit.title == "initial commit"
        assert folder.path == "sub"

    def test_references_and_commits(self, hub: HubServer, api: HfApi) -> None:
        first = hub.add_repo(REPO, FILES).branches["main"]
        second = hub.commit(REPO, {"a.txt": b"1"}, message="second")
        api.create_branch(REPO, branch="old/one", revision=first)
        api.create_tag(REPO, tag="v1", revision="old/one")
        with pytest.raises(HfHubHTTPError, match="409"):
            api.create_tag(REPO, tag="v1")
        with pytest.raises(RevisionNotFoundError):
            api.create_branch(REPO, branch="x", revision="absent")
        refs = api.list_repo_refs(REPO, include_pull_requests=True)
        branches = {it.name: it.target_commit for it in refs.branches}
        assert branches == {"main": second, "old/one": first}
        assert [(it.ref, it.target_commit) for it in refs.tags] == [("refs/tags/v1", first)]
        assert [it.title for it in api.list_repo_commits(REPO)] == ["second", "initial commit"]
        api.delete_branch(REPO, branch="old/one")
        api.delete_tag(REPO, tag="v1")
        with pytest.raises(RevisionNotFoundError):
            api.delete_tag(REPO, tag="v1")


class TestUploads:
    def test_upload_folder(self, hub: HubServer, api: HfApi, tmp_path: Path) -> None:
        files = {**FILES, "README.md": b"---\nlicense: mit\n---\n", "empty.bin": b""}
        api.create_repo(REPO)
        info = api.upload_folder(repo_id=REPO, folder_path=write_files(tmp_path, files))
        assert hub.commits(REPO)[0].oid == info.oid
        stored = hub.files(REPO)
        assert {path: stored[path] for path in files} == files
        assert hub.log.bytes_received("/upload/") == len(WEIGHTS)
        assert [it.token for it in hub.log.find("PUT")] == [None]

    def test_nothing_new(self, hub: HubServer, api: HfApi, tmp_path: Path) -> None:
        hub.add_repo(REPO, FILES)
        oid, mark = hub.commits(REPO)[0].oid, hub.log.mark()
        info = api.upload_folder(repo_id=REPO, folder_path=write_files(tmp_path, FILES))
        assert info.oid == oid and len(hub.commits(REPO)) == 1
        asked = [it.path.removeprefix(f"/api/models/{REPO}") for it in hub.log.find(since=mark)]
        batch = f"/{REPO}.git/info/lfs/objects/batch"
        assert asked == ["/preupload/main", batch, "/revision/main"]

    def test_parts(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        with HubServer(part_size=4000) as hub:
            hub.add_user("anna", token="hf_anna")
            hub.add_repo(REPO)
            api = HfApi(endpoint=hub.url, token="hf_anna")
            api.upload_file(repo_id=REPO, path_in_repo="m.bin", path_or_fileobj=WEIGHTS)
            assert hub.files(REPO) == {"m.bin": WEIGHTS}
            assert [it.bytes_received for it in hub.log.find("PUT")] == [4000, 4000, 2240]

    def test_operations(self, hub: HubServer, api: HfApi) -> None:
        hub.add_repo(REPO, {**FILES, "old/a": b"", "old/b": b"", "c.txt": b"c"})
        api.create_commit(
            REPO,
            [
                CommitOperationDelete("old/"),
                CommitOperationDelete("c.txt"),
                CommitOperationAdd("d.txt", b"d"),
                CommitOperationCopy("model.safetensors", "copy.safetensors"),
                CommitOperationCopy("config.json", "copy.json"),
            ],
            commit_message="many",
        )
        expected = {**FILES, "d.txt": b"d", "copy.safetensors": WEIGHTS, "copy.json": CONFIG}
        assert hub.files(REPO) == expected
        with pytest.raises(EntryNotFoundError):
            api.delete_file("absent", repo_id=REPO)

    def test_pull_request(self, hub: HubServer, api: HfApi, tmp_path: Path) -> None:
        hub.add_repo(REPO, FILES)
        info = api.upload_file(
            repo_id=REPO, path_in_repo="a.txt", path_or_fileobj=b"a", create_pr=True
        )
        assert (info.pr_num, info.pr_revision) == (1, "refs/pr/1")
        assert "a.txt" not in hub.files(REPO)
        assert fetch(hub, tmp_path, "a.txt", revision="refs/pr/1") == b"a"
        api.upload_file(
            repo_id=REPO, path_in_repo="b.txt", path_or_fileobj=b"b", revision="refs/pr/1"
        )
        assert {"a.txt", "b.txt"} <= hub.files(REPO, "refs/pr/1").keys()
        refs = api.list_repo_refs(REPO, include_pull_requests=True)
        assert refs.pull_requests is not None and refs.pull_requests[0].ref == "refs/pr/1"

    def test_a_commit_on_an_older_parent(self, hub: HubServer, api: HfApi) -> None:
        first = hub.add_repo(REPO, FILES).branches["main"]
        hub.commit(REPO, {"a.txt": b"1"})
        with pytest.raises(HfHubHTTPError, match="A commit has happened since") as caught:
            api.upload_file(
                repo_id=REPO, path_in_repo="a.txt", path_or_fileobj=b"2", parent_commit=first
            )
        assert caught.value.response.status_code == 412
        assert hub.files(REPO)["a.txt"] == b"1"

    def test_a_body_in_chunks(self, hub: HubServer, api: HfApi) -> None:
        hub.add_repo(REPO)
        header, line = (
            b'{"key": "header", "value": {"summary": "by hand"}}\n',
            b'{"key": "file", "value": {"path": "a.txt", "content": "YQ=="}}\n',
        )
        answer = get_session().post(
            f"{hub.url}/api/models/{REPO}/commit/main",
            content=iter((header, line)),
            headers={"Authorization": "Bearer hf_anna"},
        )
        assert answer.json()["commitOid"] == hub.commits(REPO)[0].oid
        assert hub.files(REPO) == {"a.txt": b"a"}
        assert hub.log.bytes_received("/commit/") == len(header + line)

    def test_an_absent_branch(self, hub: HubServer, api: HfApi) -> None:
        hub.add_repo(REPO)
        with pytest.raises(RevisionNotFoundError):
            api.upload_file(repo_id=REPO, path_in_repo="a", path_or_fileobj=b"", revision="no")

    def test_ignored_files(self, hub: HubServer, api: HfApi, tmp_path: Path) -> None:
        hub.add_repo(REPO)
        files = {".gitignore": b"*.log\n", "a.log": b"", "a.txt": b"a"}
        api.upload_folder(repo_id=REPO, folder_path=write_files(tmp_path, files))
        assert hub.files(REPO).keys() == {".gitignore", "a.txt"}


class TestAccess:
    def test_private(self, hub: HubServer, tmp_path: Path) -> None:
        hub.add_repo(REPO, FILES, private=True)
        with pytest.raises(RepositoryNotFoundError, match="401"):
            fetch(hub, tmp_path, "config.json")
        with pytest.raises(RepositoryNotFoundError, match="404"):
            fetch(hub, tmp_path, "config.json", token="hf_ben")
        with pytest.raises(HfHubHTTPError, match="Invalid credentials"):
            fetch(hub, tmp_path, "config.json", token="hf_unknown")
        assert fetch(hub, tmp_path, "config.json", token="hf_anna") == CONFIG

    def test_gated(self, hub: HubServer, tmp_path: Path) -> None:
        repo = hub.add_repo(REPO, FILES, gated=True)
        assert HfApi(endpoint=hub.url, token=False).model_info(REPO).gated == "manual"
        with pytest.raises(GatedRepoError, match="401"):
            fetch(hub, tmp_path, "config.json")
        with pytest.raises(GatedRepoError, match="403"):
            snapshot_download(REPO, endpoint=hub.url, cache_dir=tmp_path, token="hf_ben")
        repo.readers.add("ben")
        assert fetch(hub, tmp_path, "config.json", token="hf_ben") == CONFIG

    def test_writing(self, hub: HubServer) -> None:
        hub.add_repo(REPO, FILES)
        hub.add_user("cleo", token="hf_cleo")
        hub.add_user("dora", token="hf_dora", organizations=["anna"])

        def upload(token: str | bool, **more: Any) -> None:
            HfApi(endpoint=hub.url, token=token).upload_file(
                repo_id=REPO, path_in_repo="a.bin", path_or_fileobj=b"a", **more
            )

        with pytest.raises(RepositoryNotFoundError, match="401"):
            upload(False)
        for token in ("hf_ben", "hf_cleo"):
            with pytest.raises(HfHubHTTPError, match="403 Forbidden"):
                upload(token)
        upload("hf_cleo", create_pr=True)
        assert "a.bin" not in hub.files(REPO)
        upload("hf_dora")
        assert hub.files(REPO)["a.bin"] == b"a"


class TestFaults:
    """Each as the client sees it."""

    @pytest.fixture(autouse=True)
    def repo(self, hub: HubServer) -> None:
        hub.add_repo(REPO, FILES)

    @pytest.mark.parametrize(
        ("status", "code", "error"),
        [
            (401, None, HfHubHTTPError),
            (403, "GatedRepo", GatedRepoError),
            (404, "RepoNotFound", RepositoryNotFoundError),
            (404, "RevisionNotFound", RevisionNotFoundError),
            (404, "EntryNotFound", EntryNotFoundError),
            (403, None, LocalEntryNotFoundError),
            (409, None, LocalEntryNotFoundError),
        ],
    )
    def test_refusals(
        self, hub: HubServer, tmp_path: Path, status: int, code: str | None, error: type[Exception]
    ) -> None:
        hub.fail("HEAD", "config.json", status=status, code=code)
        with pytest.raises(error):
            fetch(hub, tmp_path, "config.json")
        assert [it.status for it in hub.log] == [status]
        assert fetch(hub, tmp_path, "config.json") == CONFIG

    @pytest.mark.parametrize("status", [429, 500, 503])
    def test_overload_before_a_download(
        self, hub: HubServer, tmp_path: Path, waits: list[float], status: int
    ) -> None:
        hub.fail("HEAD", "config.json", times=3, status=status, headers={"Retry-After": "4"})
        assert fetch(hub, tmp_path, "config.json") == CONFIG
        # The first failure is not waited for: then comes another round of up to six attempts.
        assert waits == [5.0, 5.0]

    def test_overload_for_long(self, hub: HubServer, tmp_path: Path, waits: list[float]) -> None:
        hub.fail("HEAD", "config.json", times=None, status=503)
        with pytest.raises(LocalEntryNotFoundError):
            fetch(hub, tmp_path, "config.json")
        assert (waits, len(hub.log)) == ([1, 2, 4, 8, 8], 7)
        hub.heal()
        assert fetch(hub, tmp_path, "config.json") == CONFIG

    def test_overload_of_a_download(
        self, hub: HubServer, tmp_path: Path, waits: list[float]
    ) -> None:
        hub.fail("GET", "safetensors", status=429, headers={"Retry-After": "0"})
        assert fetch(hub, tmp_path, "model.safetensors") == WEIGHTS
        assert waits == [1.0]
        hub.fail("GET", "config.json", status=500)
        with pytest.raises(HfHubHTTPError, match="500"):
            fetch(hub, tmp_path, "config.json")

    @pytest.mark.parametrize("chunk", [1000, constants.DOWNLOAD_CHUNK_SIZE])
    def test_a_download_goes_on_after_a_cut(
        self,
        hub: HubServer,
        tmp_path: Path,
        waits: list[float],
        monkeypatch: pytest.MonkeyPatch,
        chunk: int,
    ) -> None:
        monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", chunk)
        hub.fail("GET", r"/resolve/.*safetensors", cut_after=2500)
        assert fetch(hub, tmp_path, "model.safetensors") == WEIGHTS
        first, second = hub.log.find("GET", "safetensors")
        assert (first.range, first.bytes_sent) == (None, 2500)
        # The client keeps whole chunks, of 10 MiB if it is left alone.
        assert second.range == ("bytes=2000-" if chunk == 1000 else None)
        assert waits == [1]

    def test_a_server_that_ignores_ranges(
        self,
        hub: HubServer,
        tmp_path: Path,
        waits: list[float],
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 1000)
        hub.fail("GET", "safetensors", cut_after=2500)
        hub.fail("GET", "safetensors", ignore_range=True)
        assert fetch(hub, tmp_path, "model.safetensors") == WEIGHTS
        assert [it.status for it in hub.log.find("GET")] == [200, 200]
        assert hub.log.bytes_sent("safetensors") == 2500 + len(WEIGHTS)

    def test_a_reset_ends_a_download(self, hub: HubServer, tmp_path: Path) -> None:
        hub.fail("GET", "safetensors", cut_after=2500, reset=True)
        with pytest.raises(httpx.ReadError):
            fetch(hub, tmp_path, "model.safetensors")

    def test_no_answer_to_a_head(self, hub: HubServer, tmp_path: Path) -> None:
        hub.fail("HEAD", "config.json", hang_up="before")
        with pytest.raises(httpx.RemoteProtocolError):
            fetch(hub, tmp_path, "config.json")

    def test_a_signature_that_is_no_longer_good(self, hub: HubServer, tmp_path: Path) -> None:
        hub.fail("GET", "/cdn/", status=403)
        with pytest.raises(HfHubHTTPError, match="403 Forbidden"):
            fetch(hub, tmp_path, "model.safetensors")
        assert fetch(hub, tmp_path, "model.safetensors") == WEIGHTS

    def test_wrong_bytes_are_not_noticed(self, hub: HubServer, tmp_path: Path) -> None:
        hub.fail("GET", "safetensors", wrong_bytes=True)
        found = fetch(hub, tmp_path, "model.safetensors")
        assert (len(found), found == WEIGHTS) == (len(WEIGHTS), False)

    def test_wrong_lengths(self, hub: HubServer, tmp_path: Path, waits: list[float]) -> None:
        hub.fail("GET", "safetensors", extra_length=100)
        assert fetch(hub, tmp_path, "model.safetensors") == WEIGHTS  # asked again
        assert len(hub.log.find("GET", "safetensors")) == 2
        hub.fail("GET", "config.json", extra_length=-5)
        with pytest.raises(OSError, match="Consistency check failed"):
            fetch(hub, tmp_path, "config.json")

    def test_lies_about_size_and_digest(self, hub: HubServer, tmp_path: Path) -> None:
        hub.fail("HEAD", "safetensors", headers={"X-Linked-Size": "5"})
        with pytest.raises(OSError, match="should be of size 5"):
            fetch(hub, tmp_path, "model.safetensors")
        hub.fail("HEAD", "safetensors", headers={"X-Linked-ETag": '"other"'})
        found = hf_hub_download(
            REPO, "model.safetensors", endpoint=hub.url, cache_dir=tmp_path, token=False
        )
        assert Path(found).resolve().name == "other"
        hub.fail("HEAD", "config.json", headers={"x-repo-commit": None})
        with pytest.raises(LocalEntryNotFoundError, match="X-Repo-Commit"):
            fetch(hub, tmp_path, "config.json")

    def test_slowness(
        self, hub: HubServer, tmp_path: Path, waits: list[float], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(constants, "HF_HUB_DOWNLOAD_TIMEOUT", 0.2)
        hub.fail("GET", "sub/notes.txt", bytes_per_second=1)
        assert fetch(hub, tmp_path, "sub/notes.txt") == b"notes"
        assert set(waits) == {1}

    @pytest.mark.parametrize("size", [9000, 3_000_000])
    def test_an_upload_is_cut(
        self, hub: HubServer, api: HfApi, tmp_path: Path, waits: list[float], size: int
    ) -> None:
        (tmp_path / "m.bin").write_bytes(bytes(size))
        hub.fail("PUT", "/upload/", cut_after=5000)
        api.upload_file(repo_id=REPO, path_in_repo="m.bin", path_or_fileobj=tmp_path / "m.bin")
        assert [it.bytes_received for it in hub.log.find("PUT")] == [5000, size]
        assert waits == [1]
        assert hub.files(REPO)["m.bin"] == bytes(size)

    def test_an_upload_that_the_storage_refuses(self, hub: HubServer, api: HfApi) -> None:
        hub.fail("PUT", "/upload/", status=403)
        with pytest.raises(RuntimeError, match=r"Error while uploading 'm\.bin'"):
            api.upload_file(repo_id=REPO, path_in_repo="m.bin", path_or_fileobj=b"m")
        assert hub.files(REPO) == FILES

    def test_a_commit_is_not_sent_again(self, hub: HubServer, api: HfApi) -> None:
        hub.fail("POST", "/commit/", status=503)
        with pytest.raises(HfHubHTTPError, match="503"):
            api.upload_file(repo_id=REPO, path_in_repo="a.txt", path_or_fileobj=b"a")
        hub.fail("POST", "/commit/", hang_up="after")
        with pytest.raises(httpx.RemoteProtocolError):
            api.upload_file(repo_id=REPO, path_in_repo="a.txt", path_or_fileobj=b"a")
        assert hub.files(REPO)["a.txt"] == b"a"  # it was made all the same

    def test_a_race_that_only_the_server_sees(self, hub: HubServer, api: HfApi) -> None:
        hub.fail("POST", "/commit/", status=412, message="A commit has happened since.")
        with pytest.raises(HfHubHTTPError, match="A commit has happened since"):
            api.upload_file(repo_id=REPO, path_in_repo="a.txt", path_or_fileobj=b"a")

    def test_a_hub_that_is_gone(self, hub: HubServer, tmp_path: Path, waits: list[float]) -> None:
        fetch(hub, tmp_path, "config.json")
        where = {"endpoint": hub.url, "cache_dir": tmp_path / "cache", "token": False}
        assert contents(snapshot_download(REPO, **where)) == FILES
        hub.stop()
        assert fetch(hub, tmp_path, "config.json") == CONFIG
        assert contents(snapshot_download(REPO, **where)) == FILES
        with pytest.raises(LocalEntryNotFoundError):
            fetch(hub, tmp_path, "absent.txt")
        assert waits == [1, 2, 4, 8, 8]

    def test_offline(self, hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        fetch(hub, tmp_path, "config.json")
        mark = hub.log.mark()
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
        assert fetch(hub, tmp_path, "config.json") == CONFIG
        with pytest.raises(LocalEntryNotFoundError):
            fetch(hub, tmp_path, "model.safetensors")
        with pytest.raises(OfflineModeIsEnabled):
            HfApi(endpoint=hub.url, token=False).get_paths_info(REPO, ["config.json"])
        assert not hub.log.find(since=mark)

    def test_a_snapshot_can_lack_files_without_a_tree(
        self, hub: HubServer, tmp_path: Path, waits: list[float]
    ) -> None:
        """What the client does when it has some of the files and cannot list them all."""
        fetch(hub, tmp_path, "config.json")
        hub.fail("GET", "/tree/", times=None, status=503)
        cache = tmp_path / "cache"
        found = snapshot_download(REPO, endpoint=hub.url, cache_dir=cache, token=False)
        assert contents(found) == {"config.json": CONFIG}


SCRIPT = """
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

torch.manual_seed(0)
config = LlamaConfig(
    vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
    intermediate_size=48, max_position_embeddings=24,
)
model = LlamaForCausalLM(config).eval()
model.push_to_hub("anna/llama", max_shard_size="60KB")
assert AutoConfig.from_pretrained("anna/llama").hidden_size == 32
loaded = AutoModelForCausalLM.from_pretrained("anna/llama").eval()
ids = torch.arange(8)[None]
assert torch.equal(loaded(ids).logits, model(ids).logits)

adapter = LoraConfig(target_modules=["q_proj"], init_lora_weights=False, r=2)
tuned = get_peft_model(loaded, adapter).eval()
tuned.push_to_hub("anna/adapter")
base = AutoModelForCausalLM.from_pretrained("anna/llama")
again = PeftModel.from_pretrained(base, "anna/adapter").eval()
assert torch.equal(again(ids).logits, tuned(ids).logits)
assert not torch.equal(again(ids).logits, model(ids).logits)
"""


def test_transformers_and_peft(hub: HubServer, tmp_path: Path) -> None:
    environment = hub.environment(tmp_path, token="hf_anna")
    run = subprocess.run(
        [sys.executable, "-c", SCRIPT],
        env=environment,
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    shards = [path for path in hub.files("anna/llama") if path.startswith("model-")]
    assert len(shards) >= 2
    assert {"adapter_config.json", "adapter_model.safetensors"} <= hub.files("anna/adapter").keys()
    unserved = [str(it) for it in hub.log if it.status == 404 and "/resolve/" not in it.path]
    assert all("/tree/" in it for it in unserved), unserved
