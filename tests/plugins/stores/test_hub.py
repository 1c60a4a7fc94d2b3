"""References to the Hub, wherever a path may stand."""

from __future__ import annotations

import json
import threading
from pathlib import Path

import click
import pytest
from huggingface_hub import constants

import loratool
from loratool.errors import FormatError, InputError
from loratool.files import local, mirror_of
from loratool.opening import locate, open_adapter, open_checkpoint
from tests.cli.tiny import Result, done, finetuned, llama, names, refused, save_model
from tests.cli.tiny import loratool as run
from tests.hub_server import HubServer

Files = dict[str, bytes]


def files_of(folder: Path) -> Files:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`base` in two shards, `tuned`, and an `adapter` that names anna/base."""
    folder = tmp_path_factory.mktemp("made")
    save_model(folder / "base", llama(), files=2)
    save_model(folder / "tuned", finetuned(llama()))
    words = ["--rank", 2, "--base-name", "anna/base"]
    done(run("extract", folder / "base", folder / "tuned", *words, "-o", folder / "adapter"))
    return folder


@pytest.fixture
def filled(hub: HubServer, made: Path) -> HubServer:
    """The Hub with these as anna/base, anna/tuned and anna/lora."""
    hub.add_repo("anna/base", files=files_of(made / "base"))
    hub.add_repo("anna/tuned", files=files_of(made / "tuned"))
    hub.add_repo("anna/lora", files=files_of(made / "adapter"))
    return hub


def weights(folder: Path) -> Files:
    return {name: data for name, data in files_of(folder).items() if name.endswith(".safetensors")}


def test_validate_and_inspect_read_headers_only(filled: HubServer) -> None:
    done(run("validate", "anna/lora", "--base", "anna/base"))
    done(run("inspect", "anna/base"))
    downloads = filled.log.find("GET", r"/cdn/.*safetensors")
    assert downloads and all(request.range for request in downloads)
    assert mirror_of(locate("anna/base").path).absent


def test_a_large_model_moves_kilobytes(hub: HubServer, tmp_path: Path) -> None:
    save_model(tmp_path / "big", llama(hidden=4096))
    size = (tmp_path / "big" / "model.safetensors").stat().st_size
    hub.add_repo("anna/big", files=files_of(tmp_path / "big"))
    mark = hub.log.mark()
    done(run("inspect", "anna/big", "--json"))
    assert size > 2_000_000 > 20 * hub.log.bytes_sent(since=mark)


def test_merge_extract_and_export_by_reference(
    filled: HubServer, made: Path, tmp_path: Path
) -> None:
    done(run("merge", "anna/base", "anna/lora=0.5", "-o", tmp_path / "there"))
    done(run("merge", made / "base", f"{made}/adapter=0.5", "-o", tmp_path / "here"))
    assert weights(tmp_path / "there") == weights(tmp_path / "here")
    done(run("extract", "anna/base", "anna/tuned", "--rank", 2, "-o", tmp_path / "adapter"))
    assert weights(tmp_path / "adapter") == weights(made / "adapter")
    named = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert named["base_model_name_or_path"] == "anna/base"


def test_only_the_shards_that_are_read_come(filled: HubServer) -> None:
    opened = open_checkpoint("anna/base")
    name = next(iter(opened))
    opened[name].read()
    absent = mirror_of(opened.path).absent
    assert opened.shards[name] not in absent
    assert set(opened.shards.values()) - {opened.shards[name]} <= set(absent)


def test_revisions_and_subfolders(hub: HubServer, made: Path) -> None:
    first = hub.add_repo("anna/many", files={"x.txt": b"1"})
    adapter = files_of(made / "adapter")
    later = hub.commit("anna/many", {f"sub/one/{n}": data for n, data in adapter.items()})
    for text in ("anna/many:sub/one", f"anna/many@{later}:sub/one", "anna/many@main:sub/one"):
        assert len(open_adapter(text)) == len(open_adapter(made / "adapter"))
    assert first
    refused(run("inspect", "anna/many@nowhere"), "anna/many", "nowhere")


def test_several_adapters_are_listed(hub: HubServer, made: Path) -> None:
    adapter = files_of(made / "adapter")
    hub.add_repo("anna/many", files={f"{d}/{n}": b for d in "ab" for n, b in adapter.items()})
    refused(run("validate", "anna/many", "--base", made / "base"), "anna/many:a", "anna/many:b")


def test_what_a_repository_without_an_adapter_holds_is_said(hub: HubServer, made: Path) -> None:
    hub.add_repo("anna/notes", files={"notes.md": b"x", "plan.txt": b"y"})
    words = ("anna/notes", "holds no adapter", "notes.md", "plan.txt")
    refused(run("validate", "anna/notes", "--base", made / "base"), *words)


def test_a_local_path_of_that_name_wins_and_says_so(
    filled: HubServer, made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    save_model(tmp_path / "anna" / "base", llama())
    mark = filled.log.mark()
    found = done(run("validate", made / "adapter", "--base", "anna/base"))
    assert "anna/base: taken as the local path" in found.err
    assert not filled.log.find(since=mark)


def test_a_base_that_is_left_out_is_the_one_that_the_adapter_names(
    filled: HubServer, made: Path, tmp_path: Path
) -> None:
    found = done(run("merge", "anna/lora=0.5", "-o", tmp_path / "there"))
    assert "base: anna/base" in found.err and "to download" in found.err
    done(run("merge", made / "base", f"{made}/adapter=0.5", "-o", tmp_path / "here"))
    assert weights(tmp_path / "there") == weights(tmp_path / "here")
    assert "to download" not in done(run("validate", "anna/lora")).err


def test_a_named_base_is_never_a_local_path(
    filled: HubServer, made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    save_model(tmp_path / "anna" / "base", llama(hidden=8))  # would not fit
    found = done(run("validate", made / "adapter"))
    assert "anna/base@" in found.out


def test_a_large_named_base_is_not_fetched_unasked(
    filled: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("loratool.cli.named_base._UNASKED", 1000)
    out = tmp_path / "out"
    found = run("merge", "anna/lora", "-o", out)
    assert found.status == 1 and "would be downloaded: agree by --yes" in found.err
    assert not out.exists()
    done(run("merge", "anna/lora", "--yes", "-o", out))


@pytest.mark.parametrize(
    ("said", "words"),
    [("", "names no base"), ("/home/x/base", "no name on the Hub"), ("a/b:c", "no name on the")],
)
def test_a_base_that_cannot_be_had_by_name(
    filled: HubServer, made: Path, tmp_path: Path, said: str, words: str
) -> None:
    files = files_of(made / "adapter")
    config = json.loads(files["adapter_config.json"])
    files["adapter_config.json"] = json.dumps(config | {"base_model_name_or_path": said}).encode()
    filled.add_repo("anna/other", files=files)
    refused(run("merge", "anna/other", "-o", tmp_path / "out"), words, "give the base")


def test_two_adapters_that_name_different_bases(filled: HubServer, made: Path) -> None:
    files = files_of(made / "adapter")
    files["adapter_config.json"] = files["adapter_config.json"].replace(b"anna/base", b"anna/b2")
    filled.add_repo("anna/other", files=files)
    refused(run("merge", "anna/lora", "anna/other"), "anna/base", "anna/b2", "give the base")


def test_pull_brings_the_same_bytes(filled: HubServer, made: Path, tmp_path: Path) -> None:
    done(run("pull", "anna/lora", "-o", tmp_path / "lora", "--base", "anna/base"))
    assert files_of(tmp_path / "lora") == files_of(made / "adapter")
    report = done(run("pull", "anna/base", "--json")).data
    assert files_of(Path(report["path"])) == files_of(made / "base")
    assert loratool.pull("anna/tuned").data["what"] == "checkpoint"


def test_pull_offline_takes_the_cache(
    filled: HubServer, made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done(run("pull", "anna/lora"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    mark = filled.log.mark()
    done(run("pull", "anna/lora", "-o", tmp_path / "lora"))
    assert weights(tmp_path / "lora") == weights(made / "adapter")
    refused(run("pull", "anna/base"), "anna/base", "HF_HUB_OFFLINE")
    assert not filled.log.find(since=mark)


def pickled(made: Path) -> Files:
    import io

    import torch

    buffer = io.BytesIO()
    torch.save(llama(), buffer)
    return {
        "config.json": (made / "base" / "config.json").read_bytes(),
        "pytorch_model.bin": buffer.getvalue(),
    }


def test_pickle_stays_away_unless_asked_for(hub: HubServer, made: Path, tmp_path: Path) -> None:
    hub.add_repo("anna/old", files=pickled(made))
    refused(run("pull", "anna/old", "-o", tmp_path / "x"), "pytorch_model.bin", "--allow-pickle")
    assert not hub.log.find("GET", "/cdn/.*bin") and not (tmp_path / "x").exists()
    done(run("pull", "anna/old", "-o", tmp_path / "x", "--allow-pickle"))
    assert len(open_checkpoint(tmp_path / "x")) == len(llama())
    both = files_of(made / "tuned") | {"pytorch_model.bin": b"junk"}
    hub.add_repo("anna/both", files=both)
    found = done(run("pull", "anna/both", "-o", tmp_path / "y"))
    assert "pytorch_model.bin" in found.err and "pytorch_model.bin" not in names(tmp_path / "y")


def test_a_pickle_with_code_is_refused(hub: HubServer, made: Path, tmp_path: Path) -> None:
    import pickle

    files = pickled(made) | {"pytorch_model.bin": pickle.dumps(Path)}
    hub.add_repo("anna/evil", files=files)
    refused(run("pull", "anna/evil", "-o", tmp_path / "x", "--allow-pickle"), "pytorch_model.bin")
    assert not (tmp_path / "x").exists()


def test_an_adapter_that_does_not_fit_is_not_fetched(filled: HubServer, tmp_path: Path) -> None:
    save_model(tmp_path / "small", llama(hidden=8))
    mark = filled.log.mark()
    found = run("pull", "anna/lora", "-o", tmp_path / "x", "--base", tmp_path / "small")
    refused(found, "does not fit")
    assert all(request.range for request in filled.log.find("GET", "/cdn/", since=mark))
    refused(run("pull", "anna/base", "--base", tmp_path / "small"), "is a model, not an adapter")


def test_a_manifest_of_other_weights_is_noticed(
    filled: HubServer, made: Path, tmp_path: Path
) -> None:
    files = files_of(made / "adapter")
    files["adapter_model.safetensors"] = files["adapter_model.safetensors"][:-1] + b"\1"
    filled.add_repo("anna/changed", files=files)
    words = ("adapter_model.safetensors", "loratool.json", "digest differs")
    refused(run("pull", "anna/changed", "-o", tmp_path / "x"), *words)
    assert not (tmp_path / "x").exists()


SHARD = r"/resolve/.*00001-of-00002"


def merged(out: Path) -> Result:
    return run("merge", "anna/base", "anna/lora", "-o", out)


def test_wrong_bytes_are_never_used(filled: HubServer, tmp_path: Path) -> None:
    rule = filled.fail("GET", r"/cdn/.*00001-of-00002", wrong_bytes=True, times=None)
    assert rule is None or rule
    out = tmp_path / "out"
    refused(merged(out), "model-00001-of-00002.safetensors")
    assert not out.exists()
    filled.heal()
    done(merged(out))


def test_a_length_that_is_a_lie_is_noticed(filled: HubServer, tmp_path: Path) -> None:
    filled.fail("GET", r"/cdn/.*00002-of-00002", extra_length=10, times=None)
    refused(merged(tmp_path / "out"), "model-00002-of-00002.safetensors")
    assert not (tmp_path / "out").exists()


def test_a_cut_download_is_told_and_a_second_try_works(filled: HubServer, tmp_path: Path) -> None:
    done(run("validate", "anna/lora", "--base", "anna/base"))
    filled.fail("GET", r"/cdn/.*00002-of-00002", cut_after=500, times=None)
    refused(merged(tmp_path / "out"), "anna/base")
    assert not (tmp_path / "out").exists()
    filled.heal()
    done(merged(tmp_path / "out"))


def test_a_server_without_ranges_will_do(filled: HubServer, tmp_path: Path) -> None:
    filled.fail("GET", r"/cdn/", ignore_range=True, times=None)
    done(merged(tmp_path / "out"))


@pytest.mark.parametrize(
    ("setup", "words"),
    [
        ({"status": 429, "headers": {"Retry-After": "60"}}, ("slow down", "requests")),
        ({"status": 500}, ("anna/base",)),
        ({"hang_up": "before"}, ("anna/base",)),
    ],
)
def test_a_server_in_trouble(
    filled: HubServer, tmp_path: Path, setup: dict[str, object], words: tuple[str, ...]
) -> None:
    filled.fail("GET", r"/api/models/anna/base", times=None, **setup)
    found = merged(tmp_path / "out")
    assert found.status == 1 and found.err.count("Error: ") == 1 and "Traceback" not in found.err
    assert "anna/base" in found.err
    assert any(word in found.err.lower() for word in words)


def test_missing_private_and_gated(
    filled: HubServer, made: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    filled.add_repo("anna/secret", files=files_of(made / "adapter"), private=True)
    filled.add_repo("anna/gate", files=files_of(made / "adapter"), gated=True)
    base = ("--base", made / "base")
    refused(run("validate", "anna/nothing", *base), "anna/nothing", "hf auth login")
    refused(run("validate", "anna/secret", *base), "anna/secret", "HF_TOKEN")
    refused(run("validate", "anna/gate", *base), "anna/gate", "access is restricted")
    monkeypatch.setenv("HF_TOKEN", "hf_anna")
    done(run("validate", "anna/secret", *base))


def test_several_threads_bring_a_file_once(filled: HubServer) -> None:
    path = locate("anna/base").path / "model-00001-of-00002.safetensors"
    threads = [threading.Thread(target=local, args=(path,)) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(filled.log.find("GET", SHARD)) <= 2  # the Hub's answer, and the CDN's
    assert path.is_file()


def test_a_pasted_page_is_its_repository(filled: HubServer) -> None:
    for text in ("https://huggingface.co/anna/lora", "https://huggingface.co/anna/lora/tree/main"):
        assert open_adapter(text).label == open_adapter("anna/lora").label


def test_nothing_there(hub: HubServer) -> None:
    hub.add_repo("anna/empty", files={})
    with pytest.raises(FormatError, match="holds no adapter"):
        open_adapter("anna/empty")
    with pytest.raises(InputError):
        open_adapter("anna/lora:nowhere")


@pytest.mark.parametrize("agrees", [True, False])
def test_on_a_terminal_it_asks_before_a_named_base_is_fetched(
    filled: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, agrees: bool
) -> None:
    asked: list[str] = []

    def confirm(text: str, abort: bool, err: bool) -> None:
        asked.append(text)
        if not agrees:
            raise click.Abort

    monkeypatch.setattr("loratool.cli.named_base._is_a_person_there", lambda: True)
    monkeypatch.setattr(click, "confirm", confirm)
    mark = filled.log.mark()
    found = run("merge", "anna/lora", "-o", tmp_path / "out")
    assert len(asked) == 1 and asked[0].startswith("Download ")
    assert (found.status == 0) == agrees == (tmp_path / "out").exists()
    whole = [r for r in filled.log.find("GET", "/cdn/anna/base", since=mark) if not r.range]
    assert bool(whole) == agrees


def test_what_is_pushed_is_pulled(
    hub: HubServer, made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_anna")
    for name, base in (("adapter", ("--base", made / "base")), ("base", ())):
        report = done(run("push", made / name, f"anna/{name}", "--tag", "v1", "--json")).data
        for revision in ("", "@v1", f"@{report['commit']}"):
            out = tmp_path / f"{name}{revision}"
            done(run("pull", f"anna/{name}{revision}", *base, "-o", out))
            assert weights(out) == weights(made / name)
            pulled = {n: b for n, b in files_of(out).items() if n != ".gitattributes"}
            assert pulled == {n: b for n, b in hub.files(f"anna/{name}").items() if n in pulled}


def test_every_verb_takes_a_name(filled: HubServer, made: Path, tmp_path: Path) -> None:
    out = [tmp_path / str(number) for number in range(6)]
    files = files_of(made / "adapter")
    filled.add_repo("anna/two", files={f"math/{name}": data for name, data in files.items()})
    done(run("rescale", "anna/lora", "--rank", 1, "-o", out[0]))
    done(run("stack", "anna/lora=0.5", f"{out[0]}=0.5", "--base", "anna/base", "-o", out[1]))
    done(run("merge", "anna/base", "anna/lora", "--reversible", "-o", out[2]))
    done(run("switch", out[2], "--to", "anna/two:math=0.5"))
    done(run("unmerge", out[2], "-o", out[3]))
    assert weights(out[3]) == weights(made / "base")
    done(run("merge", made / "base", "anna/lora", "-o", out[4]))
    done(run("unmerge", out[4], "anna/lora", "--base", "anna/base", "-o", out[5]))
    done(run("validate", "anna/lora", "--merged", out[4]))
