"""URLs: adapters and models in memory, in a local S3, on HTTP servers of all kinds."""

from __future__ import annotations

import json
import os
import shutil
import sys
import threading
import uuid
import zipfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import boto3
import fsspec
import pytest
import torch
from moto.server import ThreadedMotoServer
from safetensors.torch import load_file

from loratool.adapter import Adapter
from loratool.card import signed
from loratool.errors import InputError, LoratoolError, OutputError, UsageError
from loratool.files import file_size, local, mirror_of, read_start
from loratool.opening import open_adapter, open_checkpoint
from loratool.publication import Publication, Published, Publishing
from loratool.refs import parse_ref
from loratool.updates import LowRank
from loratool_plugins.stores import _fsspec_mirror
from loratool_plugins.stores._fsspec_errors import reading, writing
from loratool_plugins.stores._fsspec_place import connect, shown
from loratool_plugins.stores._fsspec_same import _PARTS, is_same
from loratool_plugins.stores.fsspec import Fsspec
from tests.adapters import factors, write_adapter
from tests.cli.tiny import done, llama, loratool, save_model
from tests.plugins.stores.web_server import Site, serving

MODULE = "model.layers.1.mlp.up_proj"
SECRET = "hunter2"


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(_fsspec_mirror, "_PAUSE_SECONDS", 0.01)


@pytest.fixture(scope="session")
def s3() -> Iterator[Any]:
    """A client of a local S3 server; s3fs finds it by the usual variables."""
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    with pytest.MonkeyPatch.context() as patch:
        host, port = server.get_host_and_port()
        patch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
        patch.setenv("AWS_ACCESS_KEY_ID", "testing")
        patch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
        patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        yield boto3.client("s3")
    server.stop()


@pytest.fixture
def bucket(s3: Any) -> str:
    name = f"bucket-{uuid.uuid4().hex[:12]}"
    s3.create_bucket(Bucket=name)
    return name


@pytest.fixture(params=["memory", "s3", "file"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """An empty place of each kind."""
    if request.param == "memory":
        return f"memory://{uuid.uuid4().hex}/math"
    if request.param == "file":
        return f"file://{tmp_path}/away/math"
    return f"s3://{request.getfixturevalue('bucket')}/adapters/math"


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    return write_adapter(
        tmp_path / "adapter",
        {MODULE: factors(1, 24, 16, 2), "lm_head": factors(2, 32, 16, 3)},
        base_model_name_or_path="org/base",
    )


def folder_files(folder: Path) -> dict[str, bytes]:
    paths = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}


def publication(folder: Path, kind: Any = "adapter") -> Publication:
    return Publication(kind, {name: folder / name for name in folder_files(folder)})


def publish(folder: Path, url: str, kind: Any = "adapter", **how: Any) -> Published:
    return Fsspec().publish(publication(folder, kind), parse_ref(url), Publishing(**how))


def put(url: str, files: dict[str, bytes]) -> None:
    fs, root = fsspec.core.url_to_fs(url)
    for name, content in files.items():
        fs.pipe_file(f"{root}/{name}", content)


def names_at(url: str) -> set[str]:
    fs, root = fsspec.core.url_to_fs(url)
    fs.invalidate_cache()
    return {name.removeprefix(root).lstrip("/") for name in fs.find(root)}


def deltas(found: Adapter) -> dict[str, torch.Tensor]:
    computed = {name: update.load() for name, update in found.items()}
    assert all(isinstance(update, LowRank) for update in computed.values())
    return {name: u.scale * u.b @ u.a for name, u in computed.items() if isinstance(u, LowRank)}


def assert_same_adapter(url: str, folder: Path) -> None:
    there, here = deltas(open_adapter(url)), deltas(open_adapter(folder))
    assert there.keys() == here.keys()
    assert all(torch.equal(there[name], here[name]) for name in here)


def message(error: pytest.ExceptionInfo[LoratoolError]) -> str:
    text = str(error.value)
    assert SECRET not in text
    assert "\n" not in text
    return text


# Round trips


def test_published_adapters_open_by_url(url: str, adapter: Path) -> None:
    done = publish(adapter, url)
    assert done.created
    assert done.sent == {name: len(raw) for name, raw in folder_files(adapter).items()}
    assert_same_adapter(url, adapter)


def test_publishing_again_sends_nothing(url: str, adapter: Path) -> None:
    publish(adapter, url)
    again = publish(adapter, url)
    assert (again.sent, again.removed, again.unchanged, again.created) == ({}, (), 2, False)


def test_a_dry_run_only_reports(url: str, adapter: Path) -> None:
    planned = publish(adapter, url, dry_run=True)
    assert set(planned.sent) == {"adapter_config.json", "adapter_model.safetensors"}
    with pytest.raises(InputError, match="nothing is there"):
        open_adapter(url)


def test_what_a_publication_has_no_more_is_removed(url: str, tmp_path: Path) -> None:
    three = save_model(tmp_path / "three", llama(), files=3)
    publish(three, url, "model")
    put(url, {"README.md": b"mine"})
    one = save_model(tmp_path / "one", llama())
    again = publish(one, url, "model")
    assert set(again.removed) == set(folder_files(three)) - {"config.json"}
    assert (set(again.sent), again.unchanged) == ({"model.safetensors"}, 1)
    assert names_at(url) == {*folder_files(one), "README.md"}


def test_content_from_memory_is_published(url: str, adapter: Path) -> None:
    given = Publication("adapter", folder_files(adapter))
    Fsspec().publish(given, parse_ref(url), Publishing())
    assert_same_adapter(url, adapter)


@pytest.mark.parametrize("kind", ["s3", "web", "poor web"])
def test_a_sharded_model_by_url_merges_and_validates_by_headers(
    kind: str, adapter: Path, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    tensors = {**llama(), "model.unused.weight": torch.zeros(700, 1000)}
    base = save_model(tmp_path / "base", tensors, files=2)
    site = Site({f"base/{name}": raw for name, raw in folder_files(base).items()})
    if kind == "poor web":
        site = replace(site, listing=False, ranges=False)
    with serving(site):
        url = f"{site.url}/base"
        if kind == "s3":
            url = f"s3://{request.getfixturevalue('bucket')}/base"
            publish(base, url, "model")
        done(loratool("validate", adapter, "--base", url))
        assert kind != "web" or sum(site.sent.values()) < 200_000
        assert not list((tmp_path / "cache").rglob("*.safetensors"))
        done(loratool("merge", url, adapter, "-o", tmp_path / "away"))
        done(loratool("merge", base, adapter, "-o", tmp_path / "here"))
    for file in (tmp_path / "here").glob("*.safetensors"):
        assert (tmp_path / "away" / file.name).read_bytes() == file.read_bytes()


def test_a_model_in_s3_is_validated_by_ranges(
    adapter: Path, tmp_path: Path, bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    tensors = {**llama(), "model.unused.weight": torch.zeros(700, 1000)}
    publish(save_model(tmp_path / "base", tensors, files=2), f"s3://{bucket}/base", "model")
    fs = connect(f"s3://{bucket}").fs
    moved = 0
    original = fs.cat_ranges

    def counted(*args: Any, **options: Any) -> Any:
        nonlocal moved
        blocks = original(*args, **options)
        moved += sum(map(len, blocks))
        return blocks

    monkeypatch.setattr(fs, "cat_ranges", counted)
    done(loratool("validate", adapter, "--base", f"s3://{bucket}/base"))
    assert 0 < moved < 200_000


def test_push_and_pull_take_urls(url: str, adapter: Path, tmp_path: Path) -> None:
    done(loratool("push", adapter, url))
    assert "Nothing has changed" in done(loratool("push", adapter, url)).out
    done(loratool("pull", url, "-o", tmp_path / "back"))
    weights = "adapter_model.safetensors"
    assert (tmp_path / "back" / weights).read_bytes() == (adapter / weights).read_bytes()


def test_a_url_of_one_file_is_that_file(tmp_path: Path) -> None:
    raw = (save_model(tmp_path / "base", llama()) / "model.safetensors").read_bytes()
    with serving(Site({"dir/model v1.safetensors": raw})) as site:
        opened = open_checkpoint(f"{site.url}/dir/model%20v1.safetensors?download=true")
        assert opened.path is not None
        assert opened.path.name == "model v1.safetensors"
        assert torch.equal(opened["lm_head.weight"].read(), llama()["lm_head.weight"])
    put("memory://single", {"model.safetensors": raw})
    assert list(open_checkpoint("memory://single/model.safetensors")) == list(opened)


def test_archives_are_looked_into(adapter: Path, tmp_path: Path) -> None:
    shutil.make_archive(str(tmp_path / "packed"), "zip", adapter.parent, "adapter")
    assert_same_adapter(f"zip://adapter::file://{tmp_path}/packed.zip", adapter)


def test_caches_in_front_are_passed_over(adapter: Path) -> None:
    put("memory://cached", folder_files(adapter))
    assert_same_adapter("simplecache::memory://cached", adapter)


def test_file_urls_are_paths(adapter: Path) -> None:
    assert Fsspec().fetch(parse_ref(f"file://{adapter}")) == adapter
    with pytest.raises(InputError, match="nothing is there"):
        Fsspec().fetch(parse_ref(f"file://{adapter}/nothing"))


# HTTP servers


@pytest.mark.parametrize("ranges", [True, False])
@pytest.mark.parametrize("listing", [True, False])
@pytest.mark.parametrize("lengths", [True, False])
@pytest.mark.parametrize("slash", ["/", ""])
def test_any_web_server_will_do(
    adapter: Path, ranges: bool, listing: bool, lengths: bool, slash: str
) -> None:
    files = {f"a/math/{name}": raw for name, raw in folder_files(adapter).items()}
    site = Site(files, ranges=ranges, listing=listing, lengths=lengths, stamps=lengths)
    with serving(site):
        assert_same_adapter(f"{site.url}/a/math{slash}", adapter)


def test_folders_of_a_listing_are_read(adapter: Path, tmp_path: Path) -> None:
    files = {**folder_files(adapter), "model/config.json": b'{"model_type": "llama"}'}
    with serving(Site(files)) as site:
        opened = open_adapter(f"{site.url}/")
        assert opened.model_config == {"model_type": "llama"}


def test_passwords_in_urls_work_and_are_never_shown(adapter: Path, bucket: str) -> None:
    with serving(Site(folder_files(adapter), password=SECRET)) as site:
        address = site.url.removeprefix("http://")
        assert_same_adapter(f"http://me:{SECRET}@{address}/", adapter)
        assert SECRET not in open_adapter(f"http://me:{SECRET}@{address}/").label
        with pytest.raises(InputError) as error:
            open_adapter(f"http://me:{SECRET}x@{address}/?token={SECRET}")
        assert "no permission" in message(error)
        with pytest.raises(InputError) as error:
            open_adapter(f"http://me:{SECRET}@127.0.0.1:9/?token={SECRET}")
        assert "cannot be reached" in message(error)
    with pytest.raises(InputError) as error:
        open_adapter(f"s3://me:{SECRET}@bucket/x")
    assert "Invalid bucket name" in message(error)


def test_urls_are_shown_without_secrets() -> None:
    assert shown("https://u:p@ss@h/a?token=x#y") == "https://h/a"
    assert shown("zip://d::https://u:p@h/a.zip?k=v") == "zip://d::https://h/a.zip"
    assert shown("s3://bucket/a@b") == "s3://bucket/a@b"


# Changes and cuts


def test_a_changed_file_leads_to_another_directory(adapter: Path, tmp_path: Path) -> None:
    put("memory://changing", folder_files(adapter))
    old = Fsspec().fetch(parse_ref("memory://changing"))
    assert Fsspec().fetch(parse_ref("memory://changing")) == old
    other = write_adapter(tmp_path / "other", {MODULE: factors(9, 24, 16, 2)})
    put("memory://changing", folder_files(other))
    assert Fsspec().fetch(parse_ref("memory://changing")) != old
    assert_same_adapter("memory://changing", other)


def test_a_file_that_changes_while_it_is_read_is_refused(bucket: str, adapter: Path) -> None:
    publish(adapter, f"s3://{bucket}")
    opened = open_adapter(f"s3://{bucket}")
    raw = bytearray((adapter / "adapter_model.safetensors").read_bytes())
    raw[-1] ^= 1
    put(f"s3://{bucket}", {"adapter_model.safetensors": bytes(raw)})
    with pytest.raises(InputError) as error:
        deltas(opened)
    assert "changed while it was read" in message(error)


def test_a_file_that_shrinks_is_refused(adapter: Path) -> None:
    site = Site(folder_files(adapter))
    with serving(site):
        opened = open_adapter(f"{site.url}/")
        site.files["adapter_model.safetensors"] = bytes(10)
        with pytest.raises(InputError) as error:
            deltas(opened)
    assert "10 bytes long" in message(error)


@pytest.mark.parametrize("ranges", [True, False])
def test_a_cut_is_survived_and_a_second_try_goes_on(ranges: bool) -> None:
    raw = os.urandom(3 << 20)
    site = Site({"model.safetensors": raw}, ranges=ranges, cut_after=1 << 20, cuts=2)
    with serving(site):
        path = Fsspec().fetch(parse_ref(f"{site.url}/model.safetensors"))
        assert local(path).read_bytes() == raw

        site.files["model.safetensors"] = raw = os.urandom(3 << 20)
        path = Fsspec().fetch(parse_ref(f"{site.url}/model.safetensors"))
        site.cut_after, site.cuts = 1 << 20, 1
        mirror = mirror_of(path)
        assert mirror is not None
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(_fsspec_mirror, "_TRIES", 1)
            with pytest.raises(InputError) as error:
                local(path)
            assert "try again" in message(error)
        assert not path.exists()
        site.ranges_seen.clear()
        assert local(path).read_bytes() == raw
        assert site.ranges_seen
        assert not site.ranges_seen[0].startswith("bytes=0-")


def test_several_threads_read_one_file(bucket: str) -> None:
    raw = os.urandom(1 << 20)
    put(f"s3://{bucket}", {"config.json": b"{}", "model.safetensors": raw})
    folder = Fsspec().fetch(parse_ref(f"s3://{bucket}"))
    assert file_size(folder / "model.safetensors") == len(raw)
    assert read_start(folder / "model.safetensors", 100) == raw[:100]
    results: list[bytes] = []

    def read() -> None:
        results.append(local(folder / "model.safetensors").read_bytes())

    threads = [threading.Thread(target=read) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == [raw] * 8
    assert not list(folder.parent.glob("*.partial"))


def test_a_file_damaged_in_the_cache_comes_again(adapter: Path) -> None:
    put("memory://damaged", folder_files(adapter))
    path = Fsspec().fetch(parse_ref("memory://damaged")) / "adapter_model.safetensors"
    local(path).write_bytes(b"short")
    assert_same_adapter("memory://damaged", adapter)


def test_empty_files_come(bucket: str) -> None:
    put(f"s3://{bucket}", {"config.json": b""})
    path = Fsspec().fetch(parse_ref(f"s3://{bucket}")) / "config.json"
    assert read_start(path, 10) == b""
    assert local(path).read_bytes() == b""


# What is refused


@pytest.mark.parametrize("name", ["../evil", "a\\b", "x/../../evil", "a\nb"])
def test_names_that_could_lie_outside_are_refused_in_stores(
    name: str, adapter: Path, tmp_path: Path
) -> None:
    from fsspec.implementations.memory import MemoryFile, MemoryFileSystem

    fs = MemoryFileSystem()
    root = f"/{uuid.uuid4().hex}"
    fs.store[f"{root}/{name}"] = MemoryFile(fs, f"{root}/{name}", b"evil")
    with pytest.raises(InputError) as error:
        open_adapter(f"memory:/{root}")
    assert "could end up anywhere" in str(error.value)
    assert not list(tmp_path.rglob("evil"))


@pytest.mark.parametrize("name", ["../evil", "sub/../../evil", "a\\b"])
def test_names_that_could_lie_outside_are_refused_in_s3_and_archives(
    name: str, s3: Any, bucket: str, tmp_path: Path
) -> None:
    s3.put_object(Bucket=bucket, Key=f"dir/{name}", Body=b"evil")
    with zipfile.ZipFile(tmp_path / "evil.zip", "w") as archive:
        archive.writestr(f"dir/{name}", "evil")
    s3.upload_file(str(tmp_path / "evil.zip"), bucket, "evil.zip")
    for url in (f"s3://{bucket}/dir", f"zip://::s3://{bucket}/evil.zip"):
        with pytest.raises(InputError) as error:
            open_checkpoint(url)
        assert "could end up anywhere" in message(error)


@pytest.mark.parametrize("link", ["%2e%2e%2fevil", "%2fetc%2fpasswd", "a%5cb", "sub%2f..%2fx"])
def test_names_that_could_lie_outside_are_refused_on_the_web(link: str, adapter: Path) -> None:
    with serving(Site(folder_files(adapter), links=(link,))) as site:
        with pytest.raises(InputError) as error:
            open_adapter(f"{site.url}/")
    assert "could end up anywhere" in message(error)


def test_links_to_elsewhere_are_passed_over(adapter: Path) -> None:
    links = ("../evil", "../../", "/", "https://example.org/evil", "mailto:me@example.org", "#top")
    files = {f"math/{name}": raw for name, raw in folder_files(adapter).items()}
    with serving(Site(files, links=links)) as site:
        assert_same_adapter(f"{site.url}/math", adapter)


def test_an_index_cannot_name_files_elsewhere() -> None:
    index = {"weight_map": {"a": "../evil.safetensors"}}
    files = {"model.safetensors.index.json": json.dumps(index).encode(), "config.json": b"{}"}
    with serving(Site(files, listing=False)) as site:
        with pytest.raises(InputError) as error:
            open_checkpoint(f"{site.url}/")
    assert "could end up anywhere" in message(error)


def test_a_file_below_a_file_is_refused(bucket: str) -> None:
    put(f"s3://{bucket}", {"a": b"1", "a/b": b"2"})
    with pytest.raises(InputError) as error:
        open_checkpoint(f"s3://{bucket}")
    assert "a/b lies below what is a file" in message(error)


def test_missing_places_say_so(bucket: str, adapter: Path) -> None:
    for url in (f"s3://{bucket}/nothing", "s3://no-such-bucket/x", "memory://nothing-here/x"):
        with pytest.raises(InputError) as error:
            open_adapter(url)
        assert message(error) == f"{url}: nothing is there; check the URL"
    with pytest.raises(OutputError) as refused:
        publish(adapter, "s3://no-such-bucket/x", dry_run=True)
    assert "there is no bucket no-such-bucket" in message(refused)
    with serving(Site({})) as site, pytest.raises(InputError) as error:
        open_adapter(f"{site.url}/nothing")
    assert "none of the usual names" in message(error)


@pytest.mark.parametrize(
    ("status", "said"),
    [(401, "no permission"), (403, "no permission"), (503, "cannot be reached"), (404, "usual")],
)
def test_refusals_of_web_servers(status: int, said: str) -> None:
    with serving(Site({}, status=status)) as site, pytest.raises(InputError) as error:
        open_adapter(f"{site.url}/math")
    assert said in message(error)


def test_missing_packages_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    for url, package in (
        ("gs://bucket/x", "gcsfs"),
        ("sftp://me:hunter2@host/x", "paramiko"),
        ("https://me:hunter2@host/x", "aiohttp"),
    ):
        monkeypatch.setitem(sys.modules, package, None)
        with pytest.raises(InputError) as error:
            open_adapter(url)
        assert message(error).endswith(f"is not installed: `pip install {package}`")
    assert Fsspec().holds(parse_ref("gs://bucket/x"))


def test_only_urls_of_known_protocols_are_held() -> None:
    store = Fsspec()
    for url in ("s3://a/b", "zip://x::https://a/b.zip", "simplecache::s3://a/b", "memory://a"):
        assert store.holds(parse_ref(url))
    for text in ("org/name", "./nothing", "nosuch://a/b", "https://huggingface.co/org/name"):
        assert not store.holds(parse_ref(text))


def test_credentials_that_are_missing(
    bucket: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from botocore.exceptions import NoCredentialsError

    place = connect(f"s3://{bucket}")
    with pytest.raises(InputError) as error, reading(place, "config.json"):
        raise NoCredentialsError
    assert "no permission to read it: set AWS_PROFILE" in message(error)


@pytest.mark.parametrize(
    ("raised", "said"),
    [
        (PermissionError(f"no, {SECRET}"), "no permission to write"),
        (FileNotFoundError("bucket"), "create it first"),
        (NotImplementedError(), "can only be read"),
        (TimeoutError(), "cannot be reached"),
        (ValueError(f"https://me:{SECRET}@host/a is odd"), "https://host/a is odd"),
    ],
)
def test_what_writing_can_raise(raised: Exception, said: str) -> None:
    with pytest.raises(OutputError) as error, writing(connect("memory://x"), "config.json"):
        raise raised
    assert said in message(error)


def test_bugs_stay_bugs() -> None:
    with pytest.raises(TypeError), reading(connect("memory://x")):
        raise TypeError


def test_an_unwritable_cache(adapter: Path, tmp_path: Path, monkeypatch: Any) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    put("memory://cache", folder_files(adapter))
    with pytest.raises(InputError) as error:
        open_adapter("memory://cache")
    assert "set XDG_CACHE_HOME" in message(error)


# Publishing


@pytest.mark.parametrize(
    "how", [{"tag": "v1"}, {"pull_request": True}, {"revision": "x"}, {"private": True}]
)
def test_what_only_the_hub_has_is_a_usage_error(how: dict[str, Any], adapter: Path) -> None:
    with pytest.raises(UsageError, match="means nothing for memory://"):
        publish(adapter, "memory://options", **how)


def test_web_servers_and_chains_can_only_be_read(adapter: Path) -> None:
    for url in ("https://example.org/a", "zip://a::memory://b.zip"):
        with pytest.raises((OutputError, InputError)):
            publish(adapter, url)


def test_other_things_are_not_replaced_without_force(
    url: str, adapter: Path, tmp_path: Path
) -> None:
    publish(save_model(tmp_path / "model", llama(), files=2), url, "model")
    before = names_at(url)
    with pytest.raises(OutputError) as error:
        publish(adapter, url)
    assert "holds a whole model, not an adapter" in message(error)
    assert names_at(url) == before
    publish(adapter, url, force=True)
    assert names_at(url) == set(folder_files(adapter))


def test_unknown_files_are_never_removed(url: str, adapter: Path) -> None:
    put_dir = url.removeprefix("file://")
    if url.startswith("file://"):
        Path(put_dir).mkdir(parents=True)
    put(url, {"thesis.tex": b"years of work"})
    with pytest.raises(OutputError) as error:
        publish(adapter, url)
    assert "thesis.tex" in message(error)
    done = publish(adapter, url, force=True)
    assert names_at(url) == {*folder_files(adapter), "thesis.tex"}
    assert "thesis.tex" in done.notes[0]


def test_a_card_that_somebody_wrote_is_kept(bucket: str, adapter: Path) -> None:
    url, ref = f"s3://{bucket}/math", parse_ref(f"s3://{bucket}/math")
    files = folder_files(adapter)
    first = Publication("adapter", {**files, "README.md": signed("one\n").encode()})
    second = Publication("adapter", {**files, "README.md": signed("two\n").encode()})
    Fsspec().publish(first, ref, Publishing())
    done = Fsspec().publish(second, ref, Publishing())
    assert set(done.sent) == {"README.md"}
    assert done.new == frozenset()
    put(url, {"README.md": b"mine"})
    done = Fsspec().publish(first, ref, Publishing())
    assert (done.sent, done.removed) == ({}, ())
    assert "somebody has written it" in done.notes[0]
    assert set(Fsspec().publish(first, ref, Publishing(force=True)).sent) == {"README.md"}


def test_no_reader_sees_a_loadable_half(
    adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = f"memory://{uuid.uuid4().hex}"
    publish(adapter, url)
    other = write_adapter(tmp_path / "other", {MODULE: factors(9, 24, 16, 5)}, r=5)
    fs = connect(url).fs
    order: list[str] = []
    original, removal = fs.put_file, fs.rm_file

    def put_file(source: str, path: str, **options: Any) -> None:
        assert not fs.exists(f"{path.rpartition('/')[0]}/adapter_config.json")
        order.append(f"+{path.rpartition('/')[2]}")
        original(source, path, **options)

    def rm_file(path: str) -> None:
        order.append(f"-{path.rpartition('/')[2]}")
        removal(path)

    monkeypatch.setattr(fs, "put_file", put_file)
    monkeypatch.setattr(fs, "rm_file", rm_file)
    publish(other, url)
    assert order == ["-adapter_config.json", "+adapter_model.safetensors", "+adapter_config.json"]


def test_an_upload_that_fails_leaves_nothing_loadable_and_goes_on(
    adapter: Path, bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = f"s3://{bucket}/math"
    fs = connect(url).fs
    original = fs.put_file

    def failing(source: str, path: str, **options: Any) -> None:
        if path.endswith("adapter_config.json"):
            raise ConnectionResetError("cut")
        original(source, path, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fs, "put_file", failing)
        with pytest.raises(OutputError) as error:
            publish(adapter, url)
        assert "cannot be reached" in message(error)
    with pytest.raises(LoratoolError):
        open_adapter(url)
    assert set(publish(adapter, url).sent) == {"adapter_config.json"}
    assert_same_adapter(url, adapter)


def test_a_file_is_no_directory_to_publish_to(adapter: Path) -> None:
    put("memory://afile", {"x": b"1"})
    with pytest.raises(OutputError, match="is a file"):
        publish(adapter, "memory://afile/x")


def test_large_uploads_in_parts_are_recognised(s3: Any, bucket: str, tmp_path: Path) -> None:
    content = os.urandom((11 << 20) + 5)
    (tmp_path / "large").write_bytes(content)
    part = _PARTS[0]
    upload = s3.create_multipart_upload(Bucket=bucket, Key="dir/large")["UploadId"]
    key = {"Bucket": bucket, "Key": "dir/large", "UploadId": upload}
    parts = []
    for number, start in enumerate(range(0, len(content), part), 1):
        body = content[start : start + part]
        tag = s3.upload_part(**key, PartNumber=number, Body=body)["ETag"]
        parts.append({"PartNumber": number, "ETag": tag})
    s3.complete_multipart_upload(**key, MultipartUpload={"Parts": parts})
    from loratool_plugins.stores._fsspec_listing import list_place

    place = connect(f"s3://{bucket}/dir")
    there = list_place(place).files["large"]
    assert is_same(place, there, tmp_path / "large")
    assert not is_same(place, there, content[:-1] + bytes([content[-1] ^ 1]))


def test_a_fetched_model_has_the_same_tensors(bucket: str, tmp_path: Path) -> None:
    base = save_model(tmp_path / "base", llama(), files=2)
    publish(base, f"s3://{bucket}", "model")
    opened = open_checkpoint(f"s3://{bucket}")
    for file in base.glob("*.safetensors"):
        for name, value in load_file(file).items():
            assert torch.equal(opened[name].read(), value)
    assert opened.label == f"s3://{bucket}"
