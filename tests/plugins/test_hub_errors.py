"""What huggingface_hub raises, against a Hub that misbehaves, becomes one message."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

os.environ.setdefault("HF_HUB_DISABLE_XET", "1")

from huggingface_hub import HfApi, constants, file_download, snapshot_download
from huggingface_hub.utils import _http

from loratool.errors import FormatError, InputError, OutputError, UsageError
from loratool.refs import parse_remote
from loratool_plugins.stores._hub_errors import explained, explaining, hide_tokens
from loratool_plugins.stores._hub_quiet import quietly
from tests.hub_server import HubServer

REF = parse_remote("anna/base@v1")


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[HubServer]:
    with HubServer() as server:
        server.add_user("anna", token="hf_annas_token")
        server.add_user("ben", token="hf_bens_token")
        server.add_repo("anna/base", {"config.json": b"{}", "model.safetensors": bytes(500)})
        server.add_repo("anna/gated", {"config.json": b"{}"}, gated=True)
        server.add_repo("anna/private", {"config.json": b"{}"}, private=True)
        template = constants.HUGGINGFACE_CO_URL_TEMPLATE.replace(constants.ENDPOINT, server.url)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "ENDPOINT", server.url)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
        clock = SimpleNamespace(sleep=lambda seconds: None)
        monkeypatch.setattr(_http, "time", clock)
        monkeypatch.setattr(file_download, "time", clock)
        monkeypatch.delenv("HF_TOKEN", raising=False)
        yield server


def message(call: Callable[[], Any]) -> str:
    with pytest.raises(InputError) as caught, explaining(REF), quietly():
        call()
    assert "\n" not in str(caught.value) and str(caught.value).startswith(REF.text)
    return str(caught.value)


def get(name: str = "config.json", repo: str = "anna/base", **more: Any) -> Callable[[], str]:
    return lambda: str(HfApi().hf_hub_download(repo, name, **more))


def test_what_is_not_there(hub: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "holds no file a b.json: see" in message(get("a b.json"))
    assert "has no revision v1" in message(get(revision="v1"))
    assert "no such repository" in message(get(repo="anna/nothing"))
    assert "if it is private, log in" in message(get(repo="anna/private"))
    assert f"accept the conditions at {hub.url}/anna/base" in message(get(repo="anna/gated"))
    monkeypatch.setenv("HF_TOKEN", "hf_bens_token")
    assert "your token may not see it" in message(get(repo="anna/private"))
    assert "has not been let in" in message(get(repo="anna/gated"))
    monkeypatch.setenv("HF_TOKEN", "hf_wrong_token")
    found = message(get())
    assert "does not accept the access token" in found and "wrong_token" not in found
    assert "is not a valid name" in message(get(repo="anna/a--b"))


def test_what_goes_wrong_on_the_way(hub: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.fail("HEAD", "config.json", times=None, status=429, headers={"Retry-After": "9"})
    assert "try again in 9 seconds" in message(get())
    hub.heal()
    hub.fail("HEAD", "config.json", times=None, status=502)
    assert "the Hub has a problem (status 502" in message(get())
    hub.heal()
    hub.fail("GET", "model.safetensors", times=None, cut_after=100)
    assert "was cut: try again" in message(get("model.safetensors"))
    hub.heal()
    hub.fail("GET", "config.json", times=None, extra_length=-1)
    assert "1 bytes arrived where 2 were announced" in message(get())
    hub.heal()
    hub.fail("GET", "/tree/", times=None, hang_up="before")
    assert "was cut" in message(lambda: list(HfApi().list_repo_tree("anna/base")))
    hub.stop()
    assert f"{hub.url} cannot be reached" in message(get())


def test_offline(hub: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    for call in (get(), lambda: snapshot_download("anna/base"), lambda: HfApi().whoami(token="a")):
        assert "is not in the cache, and HF_HUB_OFFLINE is set" in message(call)


def test_tokens_that_cannot_be_sent(hub: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    for token in ("hf_geheimnisvoll_ä", "hf_secret\x01part"):
        monkeypatch.setenv("HF_TOKEN", token)
        found = message(lambda: HfApi().model_info("anna/base"))
        assert "HF_TOKEN" in found and "access token" in found and token not in found


def test_addresses_that_are_none(hub: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    for address in ("hub.example", "ftp://hub.example", "http://[::1"):
        monkeypatch.setattr(constants, "ENDPOINT", address)
        assert "check HF_ENDPOINT" in message(lambda: HfApi().model_info("anna/base"))


def test_answers_of_somebody_else(hub: HubServer) -> None:
    hub.fail("HEAD", "config.json", times=None, headers={"ETag": None, "X-Repo-Commit": None})
    assert "does not answer as the Hub does" in message(get())


def test_other_errors_pass() -> None:
    mine = FormatError("x: is wrong")
    assert explained(mine, REF) is mine
    for error in (UsageError("--x"), KeyError("bug"), RuntimeError("bug")):
        with pytest.raises(type(error)), explaining(REF):
            raise error
    full = OSError(28, "No space left on device", "/cache/x")
    assert str(explained(full, REF, "a.bin", writing=True)) == (
        "anna/base@v1: a.bin: /cache/x: No space left on device"
    )
    assert isinstance(explained(full, REF, writing=True), OutputError)


def test_tokens_are_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "my-own")
    assert hide_tokens("a hf_abcdefgh my-own b") == "a [token] [token] b"
