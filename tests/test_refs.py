"""References: local paths, Hub names, weights."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from loratool.errors import InputError, UsageError
from loratool.opening import locate
from loratool.refs import Ref, parse_ref, parse_weighted

# Names that exist nowhere below the directory in which the tests run.
NAMES = st.from_regex(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,20}", fullmatch=True).map(lambda n: f"zz-{n}")


@given(
    owner=NAMES,
    name=NAMES,
    revision=st.none() | st.from_regex(r"[A-Za-z0-9/._-]{1,12}", fullmatch=True),
    subfolder=st.none() | st.from_regex(r"[a-z0-9/]{1,12}", fullmatch=True),
)
def test_hub_references_are_taken_apart(
    owner: str, name: str, revision: str | None, subfolder: str | None
) -> None:
    text = f"{owner}/{name}"
    text += f"@{revision}" if revision is not None else ""
    text += f":{subfolder}" if subfolder is not None else ""
    assert parse_ref(text) == Ref(text, None, f"{owner}/{name}", revision, subfolder)


@given(st.text(max_size=30))
def test_any_text_is_a_reference_of_some_kind(text: str) -> None:
    found = parse_ref(text)
    assert found.text == text
    assert found.path is None or found.repo is None
    if found.repo is not None:
        assert text.startswith(found.repo)
        assert found.repo.count("/") == 1


@pytest.mark.parametrize(
    "text", ["", ".hidden/name", "-flag/name", "../name/x", "a/b/c", "./a/b", "a b/c", "/a/b", "a"]
)
def test_what_is_no_hub_name_is_only_a_path(text: str) -> None:
    assert parse_ref(text).repo is None


def test_a_local_path_wins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "org" / "name").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert parse_ref("org/name") == Ref("org/name", Path("org/name"))
    assert parse_ref(tmp_path / "org").path == tmp_path / "org"
    assert parse_ref("org/other").repo == "org/other"
    assert locate("org/name").path == Path("org/name")


def test_a_path_that_cannot_be_looked_at_is_an_input_error(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with pytest.raises(InputError, match="x: cannot be read: File name too long"):
        parse_ref("x" * 5000)

    def denied(_: Path, **__: object) -> bool:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "exists", denied)  # root may look everywhere
    for parse in (parse_ref, parse_weighted):
        with pytest.raises(InputError, match="a=1: cannot be read: Permission denied"):
            parse("a=1")


@pytest.mark.parametrize(
    ("text", "hint"),
    [
        ("nowhere", "check the path"),
        ("a/b/c", "org/name"),
        ("", "''"),
        ("nosuch://me:secret@host/x", "nosuch://host/x"),
    ],
)
def test_what_does_not_exist_is_an_input_error(text: str, hint: str) -> None:
    with pytest.raises(InputError, match="no such file or directory") as caught:
        locate(text)
    assert hint in str(caught.value)
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("https://huggingface.co/org/name", ("org/name", None, None)),
        ("https://huggingface.co/org/name/", ("org/name", None, None)),
        ("https://huggingface.co/org/name/tree/main", ("org/name", "main", None)),
        ("https://hf.co/org/name/tree/v1.0/sub/dir", ("org/name", "v1.0", "sub/dir")),
        ("hf://org/name@v2/sub", ("org/name", "v2", "sub")),
    ],
)
def test_addresses_of_the_hub_are_names_on_it(text: str, parts: tuple[str, ...]) -> None:
    found = parse_ref(text)
    assert (found.repo, found.revision, found.subfolder) == parts
    assert found.url is None


@pytest.mark.parametrize("text", ["s3://bucket/dir", "https://host/dir/", "zip://a::s3://b/c"])
def test_other_addresses_are_urls(text: str) -> None:
    assert parse_ref(text) == Ref(text, None, url=text)


@given(name=NAMES, weight=st.floats(allow_nan=False, allow_infinity=False))
def test_a_weight_follows_the_last_equals_sign(name: str, weight: float) -> None:
    assert parse_weighted(f"{name}={weight!r}") == (name, weight)
    assert parse_weighted(f"x={name}={weight!r}") == (f"x={name}", weight)


@given(NAMES)
def test_without_an_equals_sign_the_weight_is_one(name: str) -> None:
    assert parse_weighted(name) == (name, 1.0)


@given(name=NAMES, tail=st.text(max_size=10))
def test_other_weights_are_usage_errors(name: str, tail: str) -> None:
    assume("=" not in tail)
    try:
        number = float(tail)
    except ValueError:
        number = math.nan
    assume(not math.isfinite(number))
    with pytest.raises(UsageError, match="weight"):
        parse_weighted(f"{name}={tail}")


def test_a_weight_alone_is_a_usage_error() -> None:
    with pytest.raises(UsageError, match="name an adapter"):
        parse_weighted("=0.5")


def test_a_path_with_an_equals_sign_is_taken_as_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "math=0.7").mkdir()
    assert parse_weighted("math=0.7") == ("math=0.7", 1.0)
    assert parse_weighted("./math=0.7") == ("./math=0.7", 1.0)
    assert parse_weighted("math=0.7=0.5") == ("math=0.7", 0.5)
