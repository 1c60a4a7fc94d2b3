"""Models in GGUF files, as llama.cpp uses them: single, or split into several.

A GGUF file holds all of a model: tensors under names of its own, some of them permuted or shifted
for llama.cpp, most of them quantized, and metadata in place of config.json. It is read as the
checkpoint of transformers that it was made from, and written only to put a merged model back into
the scheme that its base came in.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loratool.checkpoint import Checkpoint, Extent, Form, LazyTensor, Parts, Stored
from loratool.errors import FormatError, InputError, UnsupportedError
from loratool.files import entries, is_dir, is_file, local, read_start
from loratool.reports import counted, listed
from loratool_plugins.checkpoint_formats import directory

if TYPE_CHECKING:
    import mmap

    import torch

    from loratool.plugins import Executor
    from loratool_plugins.checkpoint_formats._gguf_architectures import Architecture, Model
    from loratool_plugins.checkpoint_formats._gguf_header import Entry, Header
    from loratool_plugins.checkpoint_formats._gguf_values import Codec

_SUFFIX = ".gguf"
_MAGIC = b"GGUF"
_PART = re.compile(r"(.+)-(\d{5})-of-(\d{5})\.gguf")
_OTHER_WEIGHTS = {".safetensors", ".bin", ".pt", ".pth"}
_SHOWN = 6


@dataclass(frozen=True)
class Gguf:
    """A GGUF file, its first part, or a directory with one GGUF model; headers only."""

    def objection(self, path: Path) -> str:
        """Why there is no GGUF file; weights in another format beside it go before it."""
        if is_file(path):
            named = path.suffix == _SUFFIX or _has_magic(path)
            return "" if named else "does not begin like a GGUF file"
        if not is_dir(path):
            return "neither a file nor a directory"
        suffixes = {entry.suffix for entry in entries(path) if is_file(entry)}
        if _SUFFIX not in suffixes:
            return f"no {_SUFFIX} file"
        others = sorted(suffixes & _OTHER_WEIGHTS)
        return f"{others[0]} files go before {_SUFFIX}" if others else ""

    def open(self, path: Path) -> Checkpoint:
        """Open it by its header.

        Raises:
            InputError: a file cannot be read.
            FormatError: a file is damaged, is no model, or a part is missing.
            UnsupportedError: the architecture or a kind of values is not known.
        """
        from loratool_plugins.checkpoint_formats._gguf_header import read_header

        headers = [read_header(file) for file in _files(path)]
        _require_whole_model(headers)
        return _checkpoint(path, headers)

    def write(
        self,
        checkpoint: Checkpoint,
        folder: Path,
        executor: Executor,
        progress: Callable[[str, int], None],
    ) -> None:
        """Write stored tensors under the headers that their checkpoint was opened with.

        Args:
            checkpoint: the stored form of an opened GGUF model, with other bytes in some tensors.
            folder: an existing, empty directory.
            executor: runs one task a tensor.
            progress: is told each tensor's name and bytes as it is done.
        """
        from loratool.writer import weight_files, write_in_order, write_side_files

        def tell(name: str, size: int) -> None:
            if name in checkpoint:  # and not of padding
                progress(name, size)

        for file, tensors in weight_files(checkpoint).items():
            header = checkpoint.headers[file]
            content = _with_padding(file, header, tensors)
            write_in_order(folder / file, header, content, executor, tell)
        write_side_files(checkpoint.side_files, folder)


def _has_magic(path: Path) -> bool:
    """Whether a file of another name is a GGUF file; model stores call theirs by digests."""
    try:
        return path.suffix not in _OTHER_WEIGHTS and read_start(path, 4) == _MAGIC
    except OSError:
        return False


def _files(path: Path) -> list[Path]:
    """The files of the model that a path stands for, in order.

    Raises:
        FormatError: several models could be meant, or a part is missing.
    """
    if is_dir(path):
        found = [entry for entry in entries(path) if entry.suffix == _SUFFIX and is_file(entry)]
        firsts = [file for file in found if _number(file) in (0, 1)]
        if len(firsts) > 1:
            names = listed([file.name for file in firsts], _SHOWN)
            raise FormatError(f"{path}: several GGUF models: {names}; name the file that you mean")
        path = (firsts or found)[0]
    if (match := _PART.fullmatch(path.name)) is None:
        return [path]
    stem, count = match[1], int(match[3])
    files = [path.with_name(f"{stem}-{n:05d}-of-{count:05d}.gguf") for n in range(1, count + 1)]
    missing = [file.name for file in files if not is_file(file)]
    if missing or not files:
        raise FormatError(
            f"{path.parent}: the model is split into {counted(count, 'file')}, but "
            f"{listed(missing, _SHOWN)} is missing: download it"
        )
    return files


def _number(file: Path) -> int:
    """Which part of a split model a file is, counted from 1; 0 for a whole one."""
    match = _PART.fullmatch(file.name)
    return int(match[2]) if match else 0


def _require_whole_model(headers: list[Header]) -> None:
    first = headers[0]
    kind = first.metadata.get("general.type", "model")
    if kind == "adapter":
        raise FormatError(
            f"{first.path}: is a LoRA adapter (general.type), not a model: give it as the adapter"
        )
    if kind != "model":
        raise FormatError(f"{first.path}: general.type is {kind!r}: it holds no language model")
    count = first.metadata.get("split.count") or 1
    if count != len(headers):
        raise FormatError(
            f"{first.path}: is one of {count} files (split.count) and their names do not say so: "
            "give them back the names that they had, NAME-00001-of-0000N.gguf"
        )
    for number, header in enumerate(headers):
        if (stated := header.metadata.get("split.no", number)) != number:
            part = stated + 1 if type(stated) is int else stated
            raise FormatError(
                f"{header.path}: is part {part} of the model by its header and part {number + 1} "
                "by its name: give it back its own"
            )
    expected = first.metadata.get("split.tensors.count")
    found = sum(len(header.entries) for header in headers)
    if len(headers) > 1 and expected not in (None, found):
        raise FormatError(
            f"{first.path}: the model has {expected} tensors, its files have {found}: they are of "
            "different models"
        )


def _checkpoint(path: Path, headers: list[Header]) -> Checkpoint:
    from loratool_plugins.checkpoint_formats._gguf_architectures import ARCHITECTURES, Model

    first = headers[0]
    name = first.metadata.get("general.architecture")
    architecture = ARCHITECTURES.get(str(name))
    if architecture is None:
        raise UnsupportedError(
            f"{first.path}: GGUF files of the architecture {name!r} are not read: their tensors "
            f"may be changed in ways that loratool does not know ({', '.join(ARCHITECTURES)} are): "
            "use the checkpoint that it was converted from"
        )
    places: dict[str, tuple[Header, Entry]] = {}
    for header in headers:
        for entry in header.entries:
            if entry.name in places:
                other = places[entry.name][0].path
                raise FormatError(f"{header.path}: {entry.name}: is already in {other}")
            places[entry.name] = (header, entry)
    model = Model(
        str(name),
        first.metadata,
        {n: entry.shape for n, (_, entry) in places.items()},
        lambda tensor: _floats(*places[tensor]),
    )
    codecs = _codecs(first.path, architecture, model, places)
    _require_complete(first.path, model)
    maps = {header.path: _Mapped(header.path) for header in headers}
    raw = {n: _raw(maps[header.path], entry) for n, (header, entry) in places.items()}
    plain: dict[str, LazyTensor] = {}
    forms: dict[str, Form] = {}
    quantized: dict[str, str] = {}
    shards: dict[str, str] = {}
    names = _safetensors_names(headers)
    for gguf, codec in codecs.items():
        own = architecture.name(gguf) or gguf
        forms[own] = _form(codec, raw[gguf])
        plain[own] = _plain(own, codec, forms[own], raw[gguf])
        shards[own] = names[places[gguf][0].path]
        if codec.is_quantized:
            quantized[own] = f"GGUF {codec.kind.name}"
    side_files = directory.side_files(path)
    stored = Checkpoint(
        raw,
        side_files=side_files,
        shards={n: header.path.name for n, (header, _) in places.items()},
        path=path,
        headers={header.path.name: header.raw for header in headers},
        written_as="gguf",
    )
    beside = _config_beside(path, first.path, architecture)
    found = Checkpoint(
        plain,
        config=beside,
        side_files=side_files,
        shards=shards,
        notes=_notes(path, first.path, side_files),
        path=path,
        quantized=quantized,
        stored=Stored(stored, forms),
    )
    return found if beside else found.with_config(_config(first.path, architecture, model, codecs))


def _safetensors_names(headers: list[Header]) -> dict[Path, str]:
    """The names that transformers finds the weights under once they are written as safetensors."""
    if len(headers) == 1:
        return {headers[0].path: "model.safetensors"}
    return {
        header.path: f"model-{number:05d}-of-{len(headers):05d}.safetensors"
        for number, header in enumerate(headers, 1)
    }


def _codecs(
    file: Path,
    architecture: Architecture,
    model: Model,
    places: Mapping[str, tuple[Header, Entry]],
) -> dict[str, Codec]:
    """How each weight is stored, by its GGUF name.

    Raises:
        UnsupportedError: a tensor or its kind of values is not known; all of them at once.
        FormatError: a tensor's shape contradicts the metadata.
    """
    from loratool_plugins.checkpoint_formats._gguf_architectures import Missing
    from loratool_plugins.checkpoint_formats._gguf_values import Codec, can_dequantize

    codecs: dict[str, Codec] = {}
    unknown: list[str] = []
    unreadable: list[str] = []
    for name, (_, entry) in places.items():
        if name in architecture.unused:
            continue
        if architecture.name(name) is None:
            unknown.append(name)
            continue
        if not can_dequantize(entry.kind):
            unreadable.append(f"{name} ({entry.kind.name})")
            continue
        try:
            layout = architecture.layout(name, model)
        except Missing as error:
            raise FormatError(f"{file}: its metadata cannot be used: {error}") from None
        if layout.change == "heads" and entry.shape[0] % (2 * layout.heads):
            raise FormatError(
                f"{file}: {name}: {entry.shape[0]} rows are no {layout.heads} heads of an even "
                "size, as the metadata have it: the file is damaged"
            )
        codecs[name] = Codec(entry.kind, entry.shape, layout)
    if unknown:
        raise UnsupportedError(
            f"{file}: holds tensors that no {model.architecture} model of loratool's has "
            f"({listed(unknown, _SHOWN)}): use the checkpoint that it was converted from"
        )
    if unreadable:
        raise UnsupportedError(
            f"{file}: the gguf package cannot dequantize {listed(unreadable, _SHOWN)}: get the "
            "model in another quantization"
        )
    return codecs


def _require_complete(file: Path, model: Model) -> None:
    from loratool_plugins.checkpoint_formats._gguf_architectures import Missing, contradiction

    try:
        wrong = contradiction(model)
    except Missing as error:
        raise FormatError(f"{file}: its metadata cannot be used: {error}") from None
    if wrong:
        raise FormatError(f"{file}: {wrong}: download it again")


def _config_beside(path: Path, file: Path, architecture: Architecture) -> dict[str, Any] | None:
    """The config.json that lies in the file's directory; it says more than the metadata can."""
    config = directory.read_config(path)
    if config is not None and config.get("model_type") != architecture.model_type:
        raise FormatError(
            f"{path / 'config.json'}: is of a {config.get('model_type')!r} model, but {file.name} "
            f"holds a {architecture.model_type!r} one: take it away, or name the file"
        )
    return config


def _config(
    file: Path, architecture: Architecture, model: Model, codecs: Mapping[str, Codec]
) -> dict[str, Any]:
    """A config.json made of the metadata."""
    from loratool_plugins.checkpoint_formats._gguf_architectures import Missing, config_of

    dtypes = ["" if codec.is_quantized else codec.dtype for codec in codecs.values()]
    try:
        return config_of(architecture, model, dtypes)
    except (Missing, KeyError) as error:
        what = f"{error.args[0]} is missing" if isinstance(error, KeyError) else str(error)
        raise FormatError(
            f"{file}: no config.json can be made of its metadata: {what}; put it into a directory "
            "with the model's own config.json"
        ) from None


def _notes(path: Path, file: Path, side_files: Mapping[str, Path]) -> tuple[str, ...]:
    if any(name.startswith("tokenizer") for name in side_files):
        return ()
    return (
        f"{path}: its tokenizer stays in it: AutoTokenizer.from_pretrained(FOLDER, gguf_file="
        f"{file.name!r}) of transformers reads it",
    )


class _Mapped:
    """A file, mapped on first use."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._map: mmap.mmap | None = None

    def content(self, entry: Entry) -> torch.Tensor:
        """A tensor's bytes, as a view of the file.

        Raises:
            InputError: the file cannot be mapped, or became shorter.
        """
        import mmap

        import torch

        if not entry.length:
            return torch.empty(0, dtype=torch.uint8)
        if self._map is None:
            try:
                with local(self.path).open("rb") as file:
                    # Private, so that torch may take it for writable; nobody writes.
                    self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
            except (OSError, ValueError) as error:
                raise InputError(f"{self.path}: cannot be mapped: {error}") from error
        if entry.begin + entry.length > len(self._map):
            raise InputError(f"{self.path}: became shorter while it was read")
        return torch.frombuffer(
            self._map, dtype=torch.uint8, count=entry.length, offset=entry.begin
        )


def _raw(mapped: _Mapped, entry: Entry) -> LazyTensor:
    def blocks() -> Iterator[torch.Tensor]:
        yield mapped.content(entry)

    extent = Extent(mapped.path, entry.begin, entry.length)
    return LazyTensor(entry.name, "U8", (entry.length,), blocks, str(mapped.path), extent)


def _form(codec: Codec, raw: LazyTensor) -> Form:
    def decode(parts: Parts) -> Iterator[torch.Tensor]:
        return codec.decode(parts["bytes"])

    def encode(values: torch.Tensor) -> Parts:
        return {"bytes": codec.encode(values)}

    return Form({"bytes": raw}, decode, encode, obstacle=codec.obstacle)


def _plain(name: str, codec: Codec, form: Form, raw: LazyTensor) -> LazyTensor:
    if not codec.is_view:
        return LazyTensor(name, codec.dtype, codec.plain_shape, form.blocks, raw.origin)

    def blocks() -> Iterator[torch.Tensor]:
        from loratool.dtypes import torch_dtype

        yield raw.read().view(torch_dtype(codec.dtype)).view(codec.shape)

    return LazyTensor(name, codec.dtype, codec.shape, blocks, raw.origin, raw.extent)


def _floats(header: Header, entry: Entry) -> list[float]:
    """The values of a small F32 tensor, read from the file."""
    import struct

    count = entry.length // 4
    if entry.kind.name != "F32":
        raise FormatError(f"{header.path}: {entry.name}: is {entry.kind.name}, not F32")
    try:
        with local(header.path).open("rb") as file:
            file.seek(entry.begin)
            return list(struct.unpack(f"<{count}f", file.read(entry.length)))
    except OSError as error:
        raise InputError(f"{header.path}: cannot be read: {error.strerror}") from error


def _with_padding(
    file: str, raw: bytes, tensors: Mapping[str, LazyTensor]
) -> dict[str, LazyTensor]:
    """What follows a header: the tensors, and zeros where they begin at aligned places."""
    from loratool_plugins.checkpoint_formats._gguf_header import parse_header

    header = parse_header(Path(file), raw)
    found: dict[str, LazyTensor] = {}
    position = len(raw)
    for entry in header.entries:
        if entry.begin > position:
            found[f"before {entry.name}"] = _zeros(entry.begin - position)
        found[entry.name] = tensors[entry.name]
        position = entry.begin + entry.length
    if rest := (len(raw) - position) % header.alignment:
        found["after all"] = _zeros(rest)
    return found


def _zeros(count: int) -> LazyTensor:
    def blocks() -> Iterator[torch.Tensor]:
        import torch

        yield torch.zeros(count, dtype=torch.uint8)

    return LazyTensor("padding", "U8", (count,), blocks)
