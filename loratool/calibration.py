"""Inputs that somebody gives for a model, as batches that the model can be run on.

    given = read_inputs(Path("texts.jsonl"), model, [checkpoint])
    for number, outputs in run(model, given.batches): ...

A file holds texts (`.txt`, one a line; `.jsonl` or `.json` of strings or of objects with "text"),
token ids (`.jsonl` or `.json` of lists or of objects with "input_ids"; `.npy`; `.safetensors` with
"input_ids") or images (a folder, one image, or a `.txt` that lists some). What is wrong with it is
told before anything is computed.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from loratool.checkpoint import Checkpoint
from loratool.errors import InputError, UsageError
from loratool.files import file_content
from loratool.quiet import quiet, shorten
from loratool.reports import counted
from loratool.running import Model
from loratool.samples import ACCEPTED, Row, read_samples, text_lines
from loratool.shell import position_limit

DEFAULT_SAMPLES, DEFAULT_LENGTH = 128, 512
# Tokens of a batch, padding included, and its rows: bounds of its activations.
_BATCH_TOKENS, _BATCH_ROWS = 4096, 32
_BATCH_IMAGES = 16
# A tokenizer that knows fewer of the tokens than this is not meant for the texts.
_MOST_UNKNOWN = 0.2
_IMAGES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff")


@dataclass(frozen=True)
class Limits:
    """How much of a file is used.

    Attributes:
        samples: at most so many, the first ones.
        length: tokens of each, at most; None for 512, or the model's limit if that is less.
    """

    samples: int = DEFAULT_SAMPLES
    length: int | None = None

    def __post_init__(self) -> None:
        if self.samples < 1:
            raise UsageError(f"at least one sample is needed, not {self.samples}")
        if self.length is not None and self.length < 1:
            raise UsageError(f"samples need at least one token, not {self.length}")


@dataclass(frozen=True)
class Inputs:
    """Samples in batches of similar length, padded on the right.

    Attributes:
        batches: the arguments of the forward call, by name: `input_ids` and `attention_mask`
            (rows, tokens) int64, or `pixel_values` (rows, channels, height, width) fp32.
        rows: for each batch, which samples it holds, counted from 0 in the file's order.
        kind: "texts", "token ids" or "images".
        notes: what was cut or left out.
    """

    batches: tuple[Mapping[str, torch.Tensor], ...]
    rows: tuple[tuple[int, ...], ...]
    kind: str
    notes: tuple[str, ...] = ()

    @property
    def count(self) -> int:
        """Number of samples."""
        return sum(map(len, self.rows))

    @property
    def tokens(self) -> int | None:
        """Number of tokens that are not padding; None for images."""
        masks = [self.real(number) for number in range(len(self.batches))]
        return None if None in masks else sum(int(m.sum()) for m in masks if m is not None)

    def real(self, batch: int) -> torch.Tensor | None:
        """Which positions of a batch are not padding: (rows, tokens) bool; None if all are."""
        mask = self.batches[batch].get("attention_mask")
        return None if mask is None else mask.bool()

    def unpadded(self, batch: int, values: torch.Tensor) -> torch.Tensor:
        """Vectors of a batch without those of padding.

        Args:
            batch: its number.
            values: (rows, tokens, n), (rows * tokens, n), or of another shape (..., n), which has
                no vector for each token and comes back whole.

        Returns:
            (vectors, n).
        """
        flat = values.reshape(-1, values.shape[-1])
        real = self.real(batch)
        if real is None or bool(real.all()):
            return flat
        is_by_token = values.shape[:-1] == real.shape or values.shape[:-1] == (real.numel(),)
        return flat[real.flatten().to(flat.device)] if is_by_token else flat

    def split(self, share: float) -> tuple[Inputs, Inputs]:
        """Two parts, for fitting and for judging: every so many batch's rows go to the second.

        Args:
            share: of the samples, about, that the second part gets; both get at least one.

        Raises:
            InputError: there is one sample only.
        """
        if self.count < 2:
            raise InputError("one sample cannot be divided; give at least two")
        every = max(2, round(1 / share))
        chosen = {row for row in range(self.count) if row % every == every - 1} or {self.count - 1}
        return self._only(lambda row: row not in chosen), self._only(lambda row: row in chosen)

    def _only(self, is_wanted: Callable[[int], bool]) -> Inputs:
        batches, rows = [], []
        for batch, numbers in zip(self.batches, self.rows, strict=True):
            kept = [place for place, number in enumerate(numbers) if is_wanted(number)]
            if kept:
                batches.append({name: value[kept] for name, value in batch.items()})
                rows.append(tuple(numbers[place] for place in kept))
        return replace(self, batches=tuple(batches), rows=tuple(rows))


def read_inputs(
    path: Path,
    model: Model,
    limits: Limits | None = None,
    owners: Sequence[Checkpoint] = (),
    tokenizer: Path | None = None,
) -> Inputs:
    """Read a file of inputs, check it against a model's headers, and make batches of it.

    Args:
        path: the file, or a folder of images.
        model: what the inputs are for.
        limits: how much of it to use.
        owners: checkpoints whose own tokenizer or image processor reads the inputs; the first one
            that has it is taken.
        tokenizer: a directory that holds it, instead.

    Raises:
        InputError: the file is missing, empty or of a kind that cannot be read or that the model
            does not take; no tokenizer can be had; token ids are outside of the vocabulary, or
            longer than the model's positions; images cannot be opened.
        UsageError: `limits.length` is more than the model's positions.
    """
    limits = limits or Limits()
    if not path.exists():
        raise InputError(f"{path}: no such file or folder; {ACCEPTED}")
    takes = _main_input(model)
    if takes == "pixel_values":
        return _read_images(path, model, limits, owners, tokenizer)
    if takes != "input_ids":
        raise InputError(f"{model.label}: reads {takes}; only texts and images can be given")
    if path.is_dir() or path.suffix.lower() in _IMAGES:
        raise InputError(f"{path}: {model.shell.architecture} reads no images; give it texts")
    longest = length_limit(model)
    if limits.length and longest and limits.length > longest:
        raise UsageError(f"length {limits.length}: {model.label} has only {longest} positions")
    found = read_samples(path, _padding(model))
    used = found[: limits.samples]
    kind = "texts" if isinstance(used[0], str) else "token ids"
    notes = []
    if len(found) > len(used):
        notes.append(f"{path}: only the first {len(used)} of {len(found)} samples are used")
    length = limits.length or min(DEFAULT_LENGTH, longest or DEFAULT_LENGTH)
    texts = [sample for sample in used if isinstance(sample, str)]
    rows = [sample for sample in used if isinstance(sample, Row)]
    if texts:
        rows = _tokenized(texts, path, owners, tokenizer)
    else:
        _check_ids(rows, path, model, longest if limits.length is None else None)
    long = sum(len(row.ids) > length for row in rows)
    if long:
        notes.append(f"{path}: {counted(long, 'sample')} cut to {length} tokens")
    return _padded([row.cut(length) for row in rows], model, kind, tuple(notes))


def length_limit(model: Model) -> int | None:
    """The most tokens that a model has positions for; None if there is no limit."""
    limit = position_limit(model.config)
    if limit is None:
        return None
    for name, module in model.shell.model.named_modules():
        if not name.endswith("position_embeddings") or not isinstance(module, torch.nn.Embedding):
            continue
        if module.padding_idx is not None:  # RoBERTa counts from the one after padding
            limit = min(limit, module.num_embeddings - module.padding_idx - 1)
    return limit


def _padding(model: Model) -> int | None:
    pad = getattr(model.config.get_text_config(), "pad_token_id", None)
    return pad if isinstance(pad, int) and pad >= 0 else None


def _main_input(model: Model) -> str:
    return str(getattr(model.shell.model, "main_input_name", "input_ids"))


def _check_ids(rows: Sequence[Row], path: Path, model: Model, longest: int | None) -> None:
    table: Any = model.shell.model.get_input_embeddings()  # type: ignore[operator]
    vocabulary = int(table.weight.shape[0])
    kinds = int(getattr(model.config, "type_vocab_size", 0) or 0)
    for number, row in enumerate(rows, 1):
        wrong = next((token for token in row.ids if not 0 <= token < vocabulary), None)
        if wrong is not None:
            raise InputError(
                f"{path}: sample {number}: token id {wrong} is not in {model.label}'s vocabulary "
                f"of {vocabulary}; were the texts read by another tokenizer?"
            )
        if longest and len(row.ids) > longest:
            raise InputError(
                f"{path}: sample {number}: has {len(row.ids)} tokens, but {model.label} has only "
                f"{longest} positions; cut the samples (--calibration-length {longest})"
            )
        if row.segments and not all(0 <= kind < max(1, kinds) for kind in row.segments):
            raise InputError(
                f"{path}: sample {number}: token_type_ids must lie below {max(1, kinds)}"
            )


def _tokenized(
    texts: Sequence[str], path: Path, owners: Sequence[Checkpoint], folder: Path | None
) -> list[Row]:
    """Texts as the tokenizer has them, with its special tokens."""
    tokenizer, label = _tokenizer(owners, folder)
    try:
        with quiet():
            found = [tokenizer(text, truncation=False) for text in texts]
    except Exception as error:
        raise InputError(f"{path}: {label}: the tokenizer fails: {shorten(error)}") from error
    rows = [Row(list(f["input_ids"]), _segments(f)) for f in found]
    if empty := [number for number, row in enumerate(rows, 1) if not row.ids]:
        raise InputError(f"{path}: text {empty[0]}: the tokenizer of {label} makes nothing of it")
    unknown = getattr(tokenizer, "unk_token_id", None)
    total = sum(len(row.ids) for row in rows)
    share = sum(row.ids.count(unknown) for row in rows) / total if unknown is not None else 0.0
    if share > _MOST_UNKNOWN:
        raise InputError(
            f"{path}: {share:.0%} of the tokens are unknown to the tokenizer of {label}: is it the "
            "model's own? Give it by --tokenizer DIR, or give token ids (.npy, .safetensors)"
        )
    return rows


def _segments(found: Mapping[str, Any]) -> list[int] | None:
    kinds = found.get("token_type_ids")
    return list(kinds) if kinds is not None and any(kinds) else None


def _tokenizer(owners: Sequence[Checkpoint], folder: Path | None) -> tuple[Any, str]:
    """The tokenizer, and whose it is."""
    from transformers import AutoTokenizer

    files = (
        *("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.txt", "vocab.json"),
        *("spiece.model", "sentencepiece.bpe.model"),
    )
    hint = "give token ids (.npy, .safetensors), or the tokenizer's directory (--tokenizer DIR)"
    return _from_owner(AutoTokenizer, "tokenizer", files, owners, folder, hint)


def _from_owner(
    loader: Any,
    what: str,
    files: Sequence[str],
    owners: Sequence[Checkpoint],
    folder: Path | None,
    hint: str,
) -> tuple[Any, str]:
    """What transformers loads from a directory, or from the files beside a checkpoint's weights."""
    if folder is not None:
        if not folder.is_dir():
            raise InputError(f"{folder}: is no directory with a {what}")
        return _loaded(loader, folder, str(folder), what, hint), str(folder)
    for owner in owners:
        if any(name in owner.side_files for name in files):
            with _side_files(owner) as place:
                return _loaded(loader, place, owner.label, what, hint), owner.label
    label = owners[0].label if owners else "the model"
    raise InputError(f"{label}: has no {what}; {hint}")


def _loaded(loader: Any, folder: Path, label: str, what: str, hint: str) -> Any:
    try:
        with quiet():
            return loader.from_pretrained(str(folder), local_files_only=True)
    except Exception as error:
        reason = shorten(error)
        raise InputError(f"{label}: its {what} cannot be used ({reason}); {hint}") from error


@contextmanager
def _side_files(owner: Checkpoint) -> Iterator[Path]:
    """A directory with the files beside a checkpoint's weights, its config completed."""
    from loratool.skeleton import complete_config

    with tempfile.TemporaryDirectory() as folder:
        for name, source in owner.side_files.items():
            if "/" not in name:
                Path(folder, name).write_bytes(file_content(source))
        config, _ = complete_config(owner.config, {n: t.shape for n, t in owner.items()})
        if config is not None:
            Path(folder, "config.json").write_text(json.dumps(config))
        yield Path(folder)


def _padded(rows: Sequence[Row], model: Model, kind: str, notes: tuple[str, ...]) -> Inputs:
    """Batches of rows of similar length."""
    config = model.config
    pad = _padding(model) or 0
    order = sorted(range(len(rows)), key=lambda number: (len(rows[number].ids), number))
    groups: list[list[int]] = []
    for number in order:
        size = len(rows[number].ids)
        if (
            groups
            and len(groups[-1]) < _BATCH_ROWS
            and size * (len(groups[-1]) + 1) <= (_BATCH_TOKENS)
        ):
            groups[-1].append(number)
        else:
            groups.append([number])
    has_segments = any(row.segments for row in rows)
    batches = []
    for group in groups:
        chosen = [rows[number] for number in group]
        width = max(len(row.ids) for row in chosen)
        ids = torch.tensor([row.ids + [pad] * (width - len(row.ids)) for row in chosen])
        mask = torch.tensor([[1] * len(r.ids) + [0] * (width - len(r.ids)) for r in chosen])
        batch = {"input_ids": ids, "attention_mask": mask}
        if has_segments:
            kinds = [row.segments or [0] * len(row.ids) for row in chosen]
            batch["token_type_ids"] = torch.tensor([k + [0] * (width - len(k)) for k in kinds])
        if getattr(config, "is_encoder_decoder", False):
            start = getattr(config, "decoder_start_token_id", None)
            first = torch.full_like(ids[:, :1], pad if start is None else start)
            batch["decoder_input_ids"] = torch.cat([first, ids[:, :-1]], dim=1)
        batches.append(batch)
    return Inputs(tuple(batches), tuple(map(tuple, groups)), kind, notes)


def _read_images(
    path: Path, model: Model, limits: Limits, owners: Sequence[Checkpoint], folder: Path | None
) -> Inputs:
    from transformers import AutoImageProcessor

    files = _image_files(path, model)
    chosen = files[: limits.samples]
    notes = []
    if len(files) > len(chosen):
        notes.append(f"{path}: only the first {len(chosen)} of {len(files)} images are used")
    hint = "give the directory of its image processor (--tokenizer DIR)"
    names = ("preprocessor_config.json", "processor_config.json")
    loaded = _from_owner(AutoImageProcessor, "image processor", names, owners, folder, hint)
    values = [_pixels(file, *loaded) for file in chosen]
    sizes = {tuple(value.shape) for value in values}
    groups = [
        [n for n, value in enumerate(values) if tuple(value.shape) == size]
        for size in sorted(sizes)
    ]
    parts = [g[i : i + _BATCH_IMAGES] for g in groups for i in range(0, len(g), _BATCH_IMAGES)]
    batches = tuple({"pixel_values": torch.stack([values[n] for n in part])} for part in parts)
    return Inputs(batches, tuple(map(tuple, parts)), "images", tuple(notes))


def _image_files(path: Path, model: Model) -> list[Path]:
    if path.is_dir():
        found = sorted(file for file in path.rglob("*") if file.suffix.lower() in _IMAGES)
        if not found:
            raise InputError(f"{path}: holds no images ({', '.join(_IMAGES)})")
        return found
    if path.suffix.lower() in _IMAGES:
        return [path]
    if path.suffix.lower() == ".txt":
        listed = [path.parent / line.strip() for line in text_lines(path)]
        if not listed:
            raise InputError(f"{path}: is empty; list one image a line")
        if missing := [file for file in listed if not file.is_file()]:
            raise InputError(f"{path}: names {missing[0]}, which is no file; list one image a line")
        return listed
    raise InputError(
        f"{path}: {model.shell.architecture} reads images: give a folder of them, or a .txt that "
        "lists some"
    )


def _pixels(file: Path, processor: Any, label: str) -> torch.Tensor:
    """An image as the model's processor has it: (channels, height, width), fp32."""
    try:
        from PIL import Image
    except ImportError as error:
        raise InputError("images are read by Pillow: pip install pillow") from error
    try:
        with Image.open(file) as opened:
            image = opened.convert("RGB")
    except (OSError, ValueError, SyntaxError) as error:
        raise InputError(f"{file}: is no image that can be read ({shorten(error)})") from error
    try:
        with quiet():
            found = processor(images=[image], return_tensors="pt")["pixel_values"][0]
    except Exception as error:
        raise InputError(f"{file}: {label}: its processor fails: {shorten(error)}") from error
    values: torch.Tensor = found.float()
    if not bool(values.isfinite().all()):
        raise InputError(f"{file}: {label}: its processor gives NaN or Inf")
    return values
