"""loratool push, against a Hub on loopback."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

os.environ.setdefault("HF_HUB_DISABLE_XET", "1")

from huggingface_hub import constants, snapshot_download
from huggingface_hub.utils import _http

from loratool.errors import OutputError
from loratool.publication import Publication, Publishing
from loratool.refs import parse_remote
from loratool_plugins.stores import hub_publish
from tests.cli.tiny import (
    Result,
    Tensors,
    done,
    llama,
    loratool,
    refused,
    save_model,
    snapshot,
)
from tests.hub_server import HubServer

REPO = "anna/math"
TOKEN = "hf_annas_own_token"
ADAPTER = {
    "README.md", "adapter_config.json", "adapter_model.safetensors", "loratool.json",
    "model/config.json",
}  # fmt: skip


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[HubServer]:
    """A Hub where anna may write; the client in this process is anna's, and does not wait."""
    with HubServer() as server:
        server.add_user("anna", token=TOKEN)
        server.add_user("ben", token="hf_bens_own_token", write=False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        template = constants.HUGGINGFACE_CO_URL_TEMPLATE.replace(constants.ENDPOINT, server.url)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "ENDPOINT", server.url)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
        monkeypatch.setattr(_http, "time", SimpleNamespace(sleep=lambda seconds: None))
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        yield server


@pytest.fixture
def mine(adapter: Path, tmp_path: Path) -> Path:
    """A copy of the adapter."""
    return Path(shutil.copytree(adapter, tmp_path / "mine"))


def push(folder: Path, *options: object, to: str = REPO) -> Result:
    return loratool("push", folder, to, "--base-name", "org/base", *options)


def names(hub: HubServer, revision: str = "main", repo: str = REPO) -> set[str]:
    return {*hub.files(repo, revision)} - {".gitattributes"}


def written(hub: HubServer, since: int) -> list[str]:
    """What was asked to be changed."""
    found = hub.log.find(since=since)
    return [
        str(it) for it in found if it.method not in ("GET", "HEAD") and "preupload" not in it.path
    ]


# What arrives


def test_what_is_pushed_is_there(hub: HubServer, adapter: Path, tmp_path: Path) -> None:
    found = done(push(adapter, "--json", "--message", "first"))
    assert found.data["commit"] == hub.commits(REPO)[0].oid and found.data["created"]
    assert hub.commits(REPO)[0].title == "first"
    assert found.data["url"] == f"{hub.url}/{REPO}"
    assert names(hub) == ADAPTER == {*found.data["sent"]}
    folder = Path(
        snapshot_download(REPO, endpoint=hub.url, token=TOKEN, local_dir=tmp_path / "got")
    )
    for name in ADAPTER - {"README.md", "adapter_config.json"}:
        assert (folder / name).read_bytes() == (adapter / name).read_bytes()
    everything = b"".join(hub.files(REPO).values())
    assert str(adapter.parent).encode() not in everything and TOKEN.encode() not in everything
    assert b"base_model: org/base\nbase_model_relation: adapter\n" in everything


def test_the_same_again_makes_no_commit(hub: HubServer, adapter: Path) -> None:
    done(push(adapter))
    mark, commits = hub.log.mark(), len(hub.commits(REPO))
    found = done(push(adapter))
    assert f"Nothing has changed at {hub.url}/{REPO}" in found.out
    assert written(hub, mark) == [] and len(hub.commits(REPO)) == commits


def test_another_state_supersedes_files_in_the_same_commit(
    hub: HubServer, tmp_path: Path, tensors: Tensors
) -> None:
    done(push(save_model(tmp_path / "two", tensors, files=2)))
    hub.commit(REPO, {"images/plot.png": b"PNG", "extra.md": b"text", "pytorch_model.bin": b"old"})
    before = len(hub.commits(REPO))
    one = save_model(tmp_path / "one", tensors)
    preview = done(push(one, "--dry-run", "--json")).data
    found = done(push(one, "--json")).data
    gone = [
        "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors",
        "model.safetensors.index.json", "pytorch_model.bin",
    ]  # fmt: skip
    assert found["removed"] == preview["removed"] == gone
    assert [*found["sent"]] == ["model.safetensors"] == preview["new"]
    assert len(hub.commits(REPO)) == before + 1
    assert names(hub) == {
        "README.md", "config.json", "model.safetensors", "images/plot.png", "extra.md",
    }  # fmt: skip


def test_only_what_changed_is_sent(hub: HubServer, mine: Path) -> None:
    done(push(mine))
    (mine / "model" / "generation_config.json").write_text('{"top_k": 5}')
    mark = hub.log.mark()
    found = done(push(mine, "--json")).data
    assert [*found["sent"]] == ["model/generation_config.json"] and found["unchanged"] == 5
    assert hub.log.find("PUT", since=mark) == []
    (mine / "model" / "generation_config.json").unlink()
    assert done(push(mine, "--json")).data["removed"] == ["model/generation_config.json"]


def test_a_dry_run_sends_nothing(hub: HubServer, adapter: Path) -> None:
    found = done(push(adapter, "--dry-run", "--revision", "dev", "--tag", "v1"))
    assert {request.method for request in hub.log} <= {"GET", "HEAD"}
    assert REPO not in hub.repos.repos
    assert f"Would push {adapter} to {hub.url}/{REPO}/tree/dev" in found.out
    for name in ADAPTER:
        assert re.search(rf"{re.escape(name)} +[\d.]+ K?i?B +new", found.out)


def test_strays_and_tokens_stay_here(hub: HubServer, mine: Path) -> None:
    (mine / "notes.txt").write_text("for me")
    (mine / ".env").write_text(f"HF_TOKEN={TOKEN}")
    assert "not sent: .env, notes.txt" in done(push(mine)).err
    assert names(hub) == ADAPTER
    mark = hub.log.mark()
    (mine / "tokenizer_config.json").write_text(json.dumps({"auth": TOKEN}))
    found = push(mine)
    refused(found, "tokenizer_config.json:1: holds an access token")
    assert TOKEN not in found.err and len(hub.log) == mark


def test_a_token_from_a_file_is_known_too(
    hub: HubServer, mine: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("HF_TOKEN")
    (tmp_path / "token").write_text(TOKEN)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
    (mine / "merges.txt").write_text(f"a\n{TOKEN}\n")
    refused(push(mine), "merges.txt:2: holds an access token")
    assert REPO not in hub.repos.repos


# Repository, branch, tag, pull request


def test_private_is_never_taken_for_public(hub: HubServer, adapter: Path) -> None:
    done(push(adapter, "--private"))
    assert hub.repos.repos[REPO].private
    hub.add_repo("anna/open", {"README.md": b"# x\n"})
    refused(push(adapter, "--private", to="anna/open"), "anna/open: is public", "nothing was sent")
    refused(push(adapter, "--public"), "is private")
    refused(push(adapter, "--public", "--private"), status=2)
    assert {*hub.files("anna/open")} == {"README.md"}


def test_a_missing_branch_is_created(hub: HubServer, adapter: Path, mine: Path) -> None:
    done(push(adapter))
    (mine / "model" / "generation_config.json").write_text("{}")
    found = done(push(mine, "--revision", "dev", "--json")).data
    assert found["url"].endswith("/tree/dev") and [*found["sent"]] == [
        "model/generation_config.json"
    ]
    assert names(hub) == ADAPTER
    assert names(hub, "dev") == {*ADAPTER, "model/generation_config.json"}
    done(push(adapter, to=f"{REPO}@dev"))
    assert names(hub, "dev") == ADAPTER
    refused(push(adapter, "--revision", "a", to=f"{REPO}@b"), status=2)


def test_a_tag_is_put_on_the_commit(hub: HubServer, adapter: Path, mine: Path) -> None:
    first = done(push(adapter, "--tag", "v1", "--json")).data["commit"]
    assert hub.repos.repos[REPO].tags == {"v1": first}
    done(push(adapter, "--tag", "v1"))
    done(push(adapter, "--tag", "same"))
    assert hub.repos.repos[REPO].tags == {"v1": first, "same": first}
    (mine / "model" / "generation_config.json").write_text("{}")
    refused(push(mine, "--tag", "v1"), "the tag v1 is at another commit", first[:8], "--force")
    refused(push(mine, "--revision", "v1"), "v1 is a tag")
    assert len(hub.commits(REPO)) == 2
    second = done(push(mine, "--tag", "v1", "--force", "--json")).data["commit"]
    assert hub.repos.repos[REPO].tags["v1"] == second != first


def test_a_pull_request_changes_nothing(hub: HubServer, adapter: Path, tmp_path: Path) -> None:
    hub.add_repo("eve/math", {"README.md": b"---\nlicense: mit\n---\n# Hers\n"})
    found = done(push(adapter, "--pr", to="eve/math"))
    assert f"Proposed {adapter} at {hub.url}/eve/math/discussions/1" in found.out
    assert names(hub, repo="eve/math") == {"README.md"}
    assert names(hub, "refs/pr/1", "eve/math") == ADAPTER
    refused(push(adapter, "--pr", "--tag", "v1"), status=2)


def test_the_card_that_somebody_wrote_there_stays(hub: HubServer, adapter: Path) -> None:
    done(push(adapter))
    own = b"---\nlicense: mit\n---\n\n# By hand\n"
    hub.commit(REPO, {"README.md": own})
    assert f"README.md of {REPO}: kept" in done(push(adapter)).err
    card = hub.files(REPO)["README.md"]
    assert card.endswith(b"---\n\n# By hand\n") and b"license: mit\nlibrary_name: peft\n" in card
    assert "Nothing has changed" in done(push(adapter)).out
    done(push(adapter, "--force"))
    assert b"# By hand" not in hub.files(REPO)["README.md"]
    hub.commit(REPO, {"README.md": b"---\nlicense: mit\n---\n"})
    done(push(adapter))
    assert (
        b"# math" in hub.files(REPO)["README.md"]
        and b"license: mit" in hub.files(REPO)["README.md"]
    )


def test_another_kind_is_refused_but_for_force(
    hub: HubServer, adapter: Path, base: Path, tmp_path: Path
) -> None:
    done(push(base))
    refused(push(adapter), f"{REPO}: holds a model, not an adapter", "--force")
    assert names(hub) == {"README.md", "config.json", "model.safetensors"}
    done(push(adapter, "--force"))
    assert names(hub) == ADAPTER
    hub.add_repo("anna/data", {"train.parquet": b"PAR1"})
    refused(push(adapter, to="anna/data"), "holds other weights or data (train.parquet), not")


# What goes wrong


def test_whoever_may_not_write_is_told(
    hub: HubServer, adapter: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    refused(push(adapter, to="eve/math"), "may not write to eve", "settings/tokens")
    hub.add_repo("eve/there")
    refused(push(adapter, to="eve/there"), "may not write to eve")
    monkeypatch.setenv("HF_TOKEN", "hf_bens_own_token")
    refused(push(adapter), "may not write to anna")
    monkeypatch.setenv("HF_TOKEN", "hf_nobodys_token")
    found = push(adapter)
    refused(found, "does not accept the access token")
    assert "nobodys" not in found.err
    monkeypatch.delenv("HF_TOKEN")
    refused(push(adapter), "writing needs an access token", "hf auth login")
    assert REPO not in hub.repos.repos


@pytest.mark.parametrize(
    "name", ["math", "anna/ma th", "datasets/anna/math", "anna/a--b", "anna/x."]
)
def test_names_that_are_none(hub: HubServer, adapter: Path, name: str) -> None:
    refused(push(adapter, to=name), name)
    assert not hub.log.find("POST")


def test_offline_and_unreachable(
    hub: HubServer, adapter: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    refused(push(adapter), "HF_HUB_OFFLINE is set", "unset it")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    hub.stop()
    refused(push(adapter), f"{hub.url} cannot be reached", "HF_ENDPOINT")


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        ({"status": 429, "headers": {"Retry-After": "17"}}, "try again in 17 seconds"),
        ({"status": 503}, "the Hub has a problem (status 503"),
        ({"status": 500, "message": "Oh no"}, "status 500: Oh no"),
        ({"status": 412}, "somebody else has changed it"),
        ({"status": 413}, "because of its size"),
        ({"hang_up": "before"}, "was cut: run the same command again"),
    ],
)
def test_a_refused_commit_leaves_nothing(
    hub: HubServer, adapter: Path, fault: dict[str, Any], words: str
) -> None:
    hub.add_repo(REPO, {".gitattributes": b""})
    hub.fail("POST", "/commit/", times=None, **fault)
    refused(push(adapter), REPO, words)
    assert len(hub.commits(REPO)) == 1 and names(hub) == set()
    hub.heal()
    done(push(adapter))
    assert names(hub) == ADAPTER


def test_a_branch_for_a_refused_commit_goes_again(hub: HubServer, adapter: Path) -> None:
    hub.add_repo(REPO)
    hub.fail("PUT", "/upload/", times=None, status=403)
    refused(push(adapter, "--revision", "dev"), "the Hub's storage refuses (status 403)")
    assert {*hub.repos.repos[REPO].branches} == {"main"}
    hub.heal()
    hub.fail("POST", "/commit/", status=500)
    refused(push(adapter, "--revision", "dev"), "status 500")
    assert {*hub.repos.repos[REPO].branches} == {"main"}
    assert hub.log.find("DELETE", "/branch/dev")


def test_a_race_is_lost_whole(
    hub: HubServer, adapter: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.add_repo(REPO, {"README.md": b"# x\n"})
    batches = hub_publish._batches

    def meanwhile(additions: Any) -> Any:
        hub.commit(REPO, {"README.md": b"# y\n"})
        return batches(additions)

    monkeypatch.setattr(hub_publish, "_batches", meanwhile)
    refused(push(adapter), "somebody else has changed it in the meantime", "push again")
    assert hub.files(REPO)["README.md"] == b"# y\n" and names(hub) == {"README.md"}
    monkeypatch.undo()


def test_an_answer_that_is_lost_is_looked_up(hub: HubServer, adapter: Path) -> None:
    hub.add_repo(REPO)
    hub.fail("POST", "/commit/", hang_up="after")
    found = done(push(adapter, "--json", "--tag", "v1"))
    assert found.data["commit"] == hub.commits(REPO)[0].oid == hub.repos.repos[REPO].tags["v1"]
    assert len(hub.commits(REPO)) == 2 and "answer was lost" in found.err


def test_a_cut_upload_commits_nothing_and_goes_on(
    hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hub_publish, "_BATCH", 1)
    folder = save_model(tmp_path / "model", llama(), files=3)
    third = (folder / "model-00003-of-00003.safetensors").read_bytes()
    hub.fail("PUT", hashlib.sha256(third).hexdigest(), times=None, cut_after=100)
    refused(push(folder), "model-00003-of-00003.safetensors", "what has arrived is not sent twice")
    assert [it.title for it in hub.commits(REPO)] == ["initial commit"]
    hub.heal()
    mark = hub.log.mark()
    done(push(folder))
    assert len(hub.log.find("PUT", since=mark)) == 1
    assert len(hub.log.find("POST", "objects/batch", since=mark)) >= 3
    assert len(hub.log.find("POST", "/commit/", since=mark)) == 1
    assert hub.files(REPO)["model-00003-of-00003.safetensors"] == third


def test_files_that_the_repository_ignores_are_not_left_out_silently(
    hub: HubServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.add_repo(REPO)
    preupload = hub_publish.HfApi.preupload_lfs_files

    def ignoring(self: Any, repo: str, additions: Any, **more: Any) -> None:
        preupload(self, repo, additions, **more)
        for addition in additions:
            addition._should_ignore = True

    monkeypatch.setattr(hub_publish.HfApi, "preupload_lfs_files", ignoring)
    publication = Publication("adapter", {"adapter_config.json": b"{}"})
    with pytest.raises(OutputError, match=r"\.gitignore keeps adapter_config\.json out"):
        hub_publish.publish(publication, parse_remote(REPO), Publishing())
    assert len(hub.commits(REPO)) == 1


# Others load it


def test_the_card_s_own_lines_load_it(
    hub: HubServer, base: Path, adapter: Path, tmp_path: Path
) -> None:
    """What it says for PEFT, in a process of its own, with the base on the Hub, too."""
    files = {name: content for name, content in snapshot(base).items() if content is not None}
    hub.add_repo("org/base", {**files, "README.md": b"---\nlicense: llama3\n---\n# base\n"})
    environment = hub.environment(tmp_path, TOKEN)
    command = [sys.executable, "-c", "from loratool.cli.main import main; main()"]
    subprocess.run(
        [*command, "push", str(adapter), REPO, "--base", "org/base"],
        env=environment, check=True, capture_output=True,
    )  # fmt: skip
    card = hub.files(REPO)["README.md"].decode()
    assert "license: llama3\n" in card and "base_model: org/base\n" in card
    lines = card.partition("```python\n")[2].partition("```")[0]
    check = (
        "\nimport torch\nmerged = model.merge_and_unload().state_dict()\n"
        "from safetensors.torch import load_file\n"
        f"tuned = load_file({str(adapter.parent / 'tuned' / 'model.safetensors')!r})\n"
        "assert all(torch.allclose(merged[n], t, atol=1e-5) for n, t in tuned.items())\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", lines + check], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
