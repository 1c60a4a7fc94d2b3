"""Publishing to a place without commits: in an order in which nobody loads a half of it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from pathlib import Path

from loratool.card import is_unchanged
from loratool.checkpoint import RECORD
from loratool.errors import OutputError, UsageError
from loratool.files import file_size, local
from loratool.publication import Publication, Published, Publishing
from loratool_plugins.stores._fsspec_errors import ReadError, writing
from loratool_plugins.stores._fsspec_listing import list_place
from loratool_plugins.stores._fsspec_place import Place, RemoteFile
from loratool_plugins.stores._fsspec_same import is_same

# Stores in which a directory is a part of names and need not be made; making one of another name
# would make a bucket.
_OBJECT_STORES = ("s3", "s3a", "gs", "gcs", "az", "abfs", "abfss", "oci", "oss", "tos", "memory")
# What makes a directory loadable; sent last, in this order.
_HEADS: Mapping[str, tuple[str, ...]] = {
    "adapter": ("adapter_config.json",),
    "model": ("*.index.json", "config.json"),
    "onnx": ("config.json", "*.onnx", "*/*.onnx"),
}
_TOKENIZER = (
    "tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab*", "merges.txt",
    "spiece.model", "chat_template*", "additional_chat_templates/*", "*processor_config.json",
    "generation_config.json", "loratool.json",
)  # fmt: skip
# What belongs to each kind, and is removed when a publication of that kind has it no more.
_OWN: Mapping[str, tuple[str, ...]] = {
    "adapter": (
        "adapter_config.json", "adapter_model*", "sparse.safetensors", "model/*", "loratool.json",
    ),
    "model": (
        "config.json", "*.index.json", "*.safetensors", "pytorch_model*.bin", f"{RECORD}/*",
        f"{RECORD}/*/*", *_TOKENIZER,
    ),
    "onnx": (
        "config.json", "*.onnx", "*.onnx_data*", "*.onnx.data", "*.data", "*.safetensors",
        "*/*.onnx", "*/*.onnx_data*", *_TOKENIZER,
    ),
}  # fmt: skip
# What people put beside anything, and tokenizers beside an adapter; stays.
_BESIDE = (
    "README*", "LICENSE*", "LICENCE*", "NOTICE*", "USE_POLICY*", ".gitattributes", *_TOKENIZER,
)  # fmt: skip
_CARD = "README.md"


@dataclass(frozen=True)
class _Plan:
    """What is to be done.

    Attributes:
        new: the names to send, those that make it loadable last.
        same: the names that are there already.
        removed: the names to remove.
        heads: the names, there or to come, that make it loadable.
        left: unknown files that stay.
    """

    new: tuple[str, ...]
    same: tuple[str, ...]
    removed: tuple[str, ...]
    heads: tuple[str, ...]
    left: tuple[str, ...]


def publish(publication: Publication, place: Place, how: Publishing) -> Published:
    """Make a place hold a publication; see `Fsspec.publish`."""
    _check_options(place, how)
    there = _existing(place)
    if not how.force:
        publication = _with_their_card(publication, place, there)
    plan = _plan(publication, place, there, how.force)
    sizes = {name: _length(content) for name, content in publication.files.items()}
    if not how.dry_run and (plan.new or plan.removed):
        _carry_out(publication, place, there, plan, sizes)
    notes = list(publication.notes)
    if plan.left:
        notes.append(f"{place.name}: left alone: {_some(plan.left)}")
    return Published(
        place.name,
        sent={name: sizes[name] for name in plan.new},
        removed=plan.removed,
        unchanged=len(plan.same),
        created=not there,
        notes=tuple(notes),
        new=frozenset(set(plan.new) - there.keys()),
    )


def _check_options(place: Place, how: Publishing) -> None:
    options = {
        "a tag": bool(how.tag),
        "a pull request": how.pull_request,
        "a revision": bool(how.revision),
        "privacy": how.private is not None,
    }
    for option, given in options.items():
        if given:
            raise UsageError(
                f"{place.name}: {option} means nothing for {place.protocol}://; leave it out"
            )
    if place.is_web or "::" in place.url:
        raise OutputError(
            f"{place.name}: can only be read; publish to org/name or to a store such as s3://"
        )


def _existing(place: Place) -> Mapping[str, RemoteFile]:
    """What lies there already.

    Raises:
        OutputError: that cannot be known, the bucket does not exist, or it is a file.
    """
    try:
        listing = list_place(place)
    except ReadError as error:
        if not error.missing:
            raise OutputError(str(error)) from error
        _check_bucket(place)
        return {}
    if listing.single:
        raise OutputError(f"{place.name}: is a file; give the URL of a directory")
    return listing.files


def _check_bucket(place: Place) -> None:
    if place.protocol not in _OBJECT_STORES or place.protocol == "memory":
        return
    bucket = place.root.strip("/").partition("/")[0]
    with place.lock, writing(place):
        exists = place.fs.exists(bucket)
    if not exists:
        raise OutputError(
            f"{place.name}: there is no bucket {bucket}, or you may not see it; create it first"
        )


def _with_their_card(
    publication: Publication, place: Place, there: Mapping[str, RemoteFile]
) -> Publication:
    """The publication without its generated card where somebody has written one."""
    ours, theirs = publication.files.get(_CARD), there.get(_CARD)
    if not isinstance(ours, bytes) or theirs is None or not is_unchanged(ours.decode()):
        return publication
    with place.lock, writing(place, _CARD):
        written = place.fs.cat_file(theirs.path)
    if is_unchanged(written.decode("utf-8", "replace")):
        return publication
    files = {name: content for name, content in publication.files.items() if name != _CARD}
    note = f"{place.name}: {_CARD} kept, since somebody has written it; --force replaces it"
    return replace(publication, files=files, notes=(*publication.notes, note))


def _plan(
    publication: Publication, place: Place, there: Mapping[str, RemoteFile], force: bool
) -> _Plan:
    """Compare what is there with what is to be there.

    Raises:
        OutputError: something else is there, and `force` is not given.
    """
    others = [name for name in there if name not in publication.files]
    kind = _kind(there)
    if not force and kind not in (None, publication.kind):
        raise OutputError(
            f"{place.name}: holds {_called(str(kind))}, not {_called(publication.kind)}; "
            "choose another place, or replace it with --force"
        )
    own = _OWN[publication.kind] + (_OWN[kind] if kind is not None else ())
    removed = tuple(name for name in others if _matches(name, own))
    left = tuple(n for n in others if not _matches(n, own) and not _matches(n, _BESIDE))
    if left and not force:
        raise OutputError(
            f"{place.name}: holds files that loratool does not know: {_some(left)}; choose another "
            "place, or leave them there with --force"
        )
    same = {
        name
        for name, content in publication.files.items()
        if name in there and is_same(place, there[name], content)
    }
    heads = _HEADS[publication.kind]
    order = sorted(publication.files, key=lambda name: (_first_match(name, heads), name))
    old_heads = [name for name in others if kind is not None and _matches(name, _HEADS[kind])]
    return _Plan(
        new=tuple(name for name in order if name not in same),
        same=tuple(sorted(same)),
        removed=removed,
        heads=(*(name for name in order if _matches(name, heads)), *old_heads),
        left=left,
    )


def _carry_out(
    publication: Publication,
    place: Place,
    there: Mapping[str, RemoteFile],
    plan: _Plan,
    sizes: Mapping[str, int],
) -> None:
    """Take the heads down, send and remove, look whether all is there, and put the heads up.

    Raises:
        OutputError: it cannot be written, or arrived with another length.
    """
    body = [name for name in plan.new if name not in plan.heads]
    only_heads = not body and not plan.removed
    heads = [name for name in plan.heads if name in publication.files]
    if only_heads and len(heads) == 1:  # replaced in one step
        _send(place, heads[0], publication.files[heads[0]])
    else:
        _remove(place, [name for name in plan.heads if name in there])
        for name in body:
            _send(place, name, publication.files[name])
        _remove(place, [name for name in plan.removed if name not in plan.heads])
        _check_arrival(place, sizes, [n for n in publication.files if n not in plan.heads])
        for name in heads:
            _send(place, name, publication.files[name])
    _check_arrival(place, sizes, publication.files)


def _send(place: Place, name: str, content: Path | bytes) -> None:
    path = _path(place, name)
    source = content if isinstance(content, bytes) else local(content)
    with place.lock, writing(place, name):
        if place.protocol not in _OBJECT_STORES:
            place.fs.makedirs(path.rpartition("/")[0], exist_ok=True)
        if isinstance(source, bytes):
            place.fs.pipe_file(path, source)
        else:
            place.fs.put_file(str(source), path)


def _remove(place: Place, names: Iterable[str]) -> None:
    for name in names:
        with place.lock, writing(place, name), suppress(FileNotFoundError):
            place.fs.rm_file(_path(place, name))


def _check_arrival(place: Place, sizes: Mapping[str, int], names: Iterable[str]) -> None:
    names = list(names)
    if not names:
        return
    try:
        there = list_place(place).files
    except ReadError as error:
        raise OutputError(str(error)) from error
    for name in names:
        found = there[name].size if name in there else None
        if found != sizes[name]:
            raise OutputError(
                f"{place.name}: {name} arrived with {found or 0} bytes of {sizes[name]}; publish "
                "it again"
            )


def _path(place: Place, name: str) -> str:
    return f"{place.root.rstrip('/')}/{name}"


def _length(content: Path | bytes) -> int:
    return len(content) if isinstance(content, bytes) else file_size(content)


def _kind(names: Iterable[str]) -> str | None:
    """What kind of thing these files are; None if none that loratool knows."""
    found = list(names)
    for kind, patterns in (
        ("adapter", ("adapter_config.json", "adapter_model*")),
        ("onnx", ("*.onnx", "*/*.onnx")),
        ("model", ("config.json", "*.safetensors", "pytorch_model*.bin")),
    ):
        if any(_matches(name, patterns) for name in found):
            return kind
    return None


def _called(kind: str) -> str:
    return {"adapter": "an adapter", "model": "a whole model", "onnx": "an ONNX model"}[kind]


def _matches(name: str, patterns: Iterable[str]) -> bool:
    """Whether a name fits a pattern; a star stands for no slash."""
    return any(fnmatchcase(name, p) and name.count("/") == p.count("/") for p in patterns)


def _first_match(name: str, patterns: tuple[str, ...]) -> int:
    """The place of the pattern that a name fits, from 1; 0 if it fits none."""
    return next((i for i, p in enumerate(patterns, 1) if _matches(name, (p,))), 0)


def _some(names: tuple[str, ...]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
