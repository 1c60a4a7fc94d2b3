"""What a repository holds, and what of it a publication takes the place of."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from functools import partial
from pathlib import Path, PurePosixPath

from huggingface_hub.hf_api import RepoFile

from loratool.publication import Kind, Publication

_PIECE = 1 << 20
# What makes a repository one of a kind. A star is never a slash.
_SIGNS: Mapping[Kind, tuple[str, ...]] = {
    "adapter": (
        "adapter_config.json", "adapter_model.*", "adapter_model-*.safetensors",
        "sparse.safetensors",
    ),
    "model": (
        "model.safetensors", "model-*.safetensors", "model.safetensors.index.json",
        "pytorch_model.bin", "pytorch_model-*.bin", "pytorch_model.bin.index.json",
    ),
    "onnx": ("*.onnx", "*.onnx.data", "*.onnx_data", "*.onnx_data_*"),
}  # fmt: skip
# What else a publication of that kind brings, and takes away when it has it no more: settings and
# records, but never cards, licenses, tokenizers beside an adapter, or anything unknown.
_MANAGED: Mapping[Kind, tuple[str, ...]] = {
    "adapter": ("loratool.json", "model/*"),
    "model": ("config.json", "generation_config.json"),
    "onnx": ("loratool.json", "config.json", "generation_config.json"),
}
_HEAVY = (
    ".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".h5", ".msgpack", ".npz",
    ".parquet", ".arrow", ".csv", ".jsonl", ".zip", ".tar", ".gz",
)  # fmt: skip
_RECORD = "loratool-record/"


@dataclass(frozen=True)
class Changes:
    """What a commit would do.

    Attributes:
        sent: name -> bytes of files that are new or changed.
        new: those of them that are new.
        removed: superseded files.
        unchanged: how many files are there already.
    """

    sent: Mapping[str, int] = field(default_factory=dict)
    new: frozenset[str] = frozenset()
    removed: tuple[str, ...] = ()
    unchanged: int = 0

    def __bool__(self) -> bool:
        return bool(self.sent or self.removed)


def kinds(names: Iterable[str]) -> set[Kind]:
    """What a repository with these files is."""
    found = [*names]
    return {kind for kind, signs in _SIGNS.items() if any(_matches(n, signs) for n in found)}


def unknown(names: Iterable[str]) -> list[str]:
    """Weights and data that are of none of our kinds."""
    ours = [pattern for kind in _SIGNS for pattern in _SIGNS[kind]]
    return [name for name in names if name.endswith(_HEAVY) and not _matches(name, ours)]


def compare(publication: Publication, there: Mapping[str, RepoFile], force: bool) -> Changes:
    """What has to be done so that a repository holds a publication.

    Big files are read in pieces, and only those that are as long as the ones there.

    Args:
        publication: what it shall hold.
        there: what it holds, by name.
        force: whether files of other kinds go, too.
    """
    sizes = {name: _size(content) for name, content in publication.files.items()}
    equal = {
        name
        for name, content in publication.files.items()
        if name in there and there[name].size == sizes[name] and _is_same(content, there[name])
    }
    which = [*_SIGNS] if force else [publication.kind]
    gone = sorted(n for n in there if n not in sizes and any(_is_managed(n, k) for k in which))
    return Changes(
        {name: size for name, size in sizes.items() if name not in equal},
        frozenset(sizes.keys() - there.keys()),
        tuple(gone),
        len(equal),
    )


def _is_managed(name: str, kind: Kind) -> bool:
    record = kind == "model" and name.startswith(_RECORD)
    return record or _matches(name, (*_SIGNS[kind], *_MANAGED[kind]))


def _matches(name: str, patterns: Iterable[str]) -> bool:
    parts = PurePosixPath(name).parts
    return any(
        len(parts) == pattern.count("/") + 1 and all(map(fnmatchcase, parts, pattern.split("/")))
        for pattern in patterns
    )


def _size(content: Path | bytes) -> int:
    return len(content) if isinstance(content, bytes) else content.stat().st_size


def _is_same(content: Path | bytes, file: RepoFile) -> bool:
    """Whether the bytes are those of a file there: by SHA-256 for LFS, else by git's digest."""
    if file.lfs is not None:
        digest, wanted = hashlib.sha256(), file.lfs.sha256
    else:
        digest, wanted = hashlib.sha1(b"blob %d\0" % file.size), file.blob_id
    if isinstance(content, bytes):
        digest.update(content)
    else:
        with content.open("rb") as opened:
            for piece in iter(partial(opened.read, _PIECE), b""):
                digest.update(piece)
    return digest.hexdigest() == wanted
