"""LoRA adapters of llama.cpp: one GGUF file, general.type being "adapter"."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from loratool.adapter import Adapter, FormatOptions, LazyUpdate, Rereading
from loratool.checkpoint import LazyTensor
from loratool.errors import FormatError, InputError, Problem, UnsupportedError
from loratool.files import entries, is_dir, is_file
from loratool.updates import Experts, Kind, LowRank, Update
from loratool.writer import Spool
from loratool_plugins.adapter_formats import _ours
from loratool_plugins.adapter_formats._experts import DOWN, GATE_UP, halves
from loratool_plugins.adapter_formats._scales import (
    RUNTIME_TYPES,
    alpha_of,
    fold,
    most_common,
    require_finite,
)

if TYPE_CHECKING:
    from loratool_plugins.adapter_formats.gguf_layout import Names
    from loratool_plugins.checkpoint_formats._gguf_header import Header

FILE = "adapter.gguf"
_METADATA = "loratool.metadata"
_ALPHA = "adapter.lora.alpha"
_ALORA = "adapter.alora.invocation_tokens"
_HUB = "https://huggingface.co/"
_FP32 = 2.0**-23  # two scales that differ by less than this share are one in llama.cpp


@dataclass(frozen=True)
class Gguf:
    """LoRA adapters as llama.cpp loads them, for the architectures whose names are known."""

    carries: ClassVar[frozenset[Kind]] = frozenset({"low_rank", "experts"})
    library: ClassVar[str] = "llama.cpp"
    usage: ClassVar[str] = f"""\
```
llama-cli -m BASE.gguf --lora ADAPTER/{FILE}
```"""

    def objection(self, path: Path) -> str:
        """Why there is no GGUF file with an adapter."""
        file = _file(path)
        if file is None:
            return "no .gguf file" if is_file(path) else "not one .gguf file"
        from loratool_plugins.checkpoint_formats._gguf_header import read_header

        try:
            header = read_header(file)
        except InputError as error:
            return str(error).removeprefix(f"{file}: ")
        kind = header.metadata.get("general.type", "model")
        return "" if kind == "adapter" else f"general.type is {kind!r}, not 'adapter'"

    def open(self, path: Path) -> Adapter:
        """Open it by its header; what is wrong inside is collected.

        Raises:
            InputError: the file cannot be read.
            FormatError: it is damaged, or no LoRA adapter.
            UnsupportedError: its architecture is not known.
        """
        return _open(path, FormatOptions())

    def refusals(self, adapter: Adapter) -> Iterable[Problem]:
        """What llama.cpp has no tensor for, or what is not known of the base."""
        from loratool_plugins.adapter_formats.gguf_layout import Names, architecture_of, heads_of

        config = adapter.base_config or adapter.model_config
        architecture = architecture_of(config)
        if architecture is None:
            yield Problem("error", "the base", _unknown_base(config))
            return
        names, heads = Names(architecture), heads_of(config)
        for update in adapter.values():
            if update.kind in self.carries and (message := _refusal(update, names, heads)):
                yield Problem("error", update.name, message)

    def write(
        self, adapter: Adapter, results: Iterable[tuple[LazyUpdate, Update | None]], folder: Path
    ) -> tuple[str, ...]:
        """Write the file: one alpha for all; what is left of other scales goes into lora_b."""
        from loratool_plugins.adapter_formats.gguf_layout import Names, architecture_of, heads_of

        config = adapter.base_config or adapter.model_config
        names, heads = Names(architecture_of(config) or ""), heads_of(config)
        with Spool(folder) as spool:
            found: list[_Entry] = []
            shared: list[str] = []
            for update, result in results:
                if isinstance(result, LowRank):
                    found.append(_low_rank(adapter, update, result, names, heads, spool))
                elif isinstance(result, Experts):
                    found += _experts(update, result, names, shared, spool)
            if not found:
                return ()
            layout = _Layout(found)
            tensors = [tensor for entry in found for tensor in layout.tensors(entry, spool)]
            text = _ours.text_of(
                adapter,
                base_config=_ours.shape_of(config),
                scales=layout.scales,
                folds=layout.folds,
                shared=shared,
            )
            _write(folder / FILE, names.architecture, layout.alpha, adapter, text, tensors)
        if not layout.rounded:
            return ()
        return (
            f"{len(layout.rounded)} scales ({layout.rounded[0]}, ...) are not what one alpha of "
            f"{layout.alpha:g} gives, and were rounded to fp32",
        )


def _file(path: Path) -> Path | None:
    """The file itself, or the directory's only GGUF file."""
    if is_file(path):
        return path if path.suffix == ".gguf" else None
    if not is_dir(path):
        return None
    found = [file for file in entries(path) if file.suffix == ".gguf" and is_file(file)]
    return found[0] if len(found) == 1 else None


def _open(path: Path, told: FormatOptions) -> Adapter:
    from loratool_plugins.adapter_formats.gguf_layout import KNOWN, Names, architecture_of, heads_of
    from loratool_plugins.adapter_formats.gguf_reader import Reader, complain_of_base, facts_of
    from loratool_plugins.checkpoint_formats._gguf_header import read_header

    file = _file(path)
    if file is None:
        raise FormatError(f"{path}: holds no GGUF file")
    header = read_header(file)
    _require_lora(header)
    architecture = str(header.metadata.get("general.architecture"))
    if architecture not in KNOWN:
        raise UnsupportedError(
            f"{file}: adapters for the architecture {architecture!r} are not read: llama.cpp's "
            f"names and changes of its tensors are not known ({', '.join(KNOWN)} are): use the "
            "adapter that it was converted from"
        )
    ours = _ours.parsed(header.metadata.get(_METADATA), str(file))
    facts = _ours.restored(ours, str(file))
    facts.pop("transposed")
    try:
        tensor_facts = facts_of(ours)
    except (TypeError, ValueError) as error:
        raise FormatError(f"{file}: its {_METADATA} is not what loratool writes") from error
    config = told.base.config if told.base is not None else None
    config = config if config is not None else facts.pop("base_config", None)
    alpha = _alpha(header)
    reader = Reader(header, Names(architecture), alpha, heads_of(config), tensor_facts)
    updates = reader.updates()
    complain_of_base(reader, config or {}, architecture_of(config))
    files, model_files, model_config = _ours.beside(path, (file,))
    if not facts["settings"]:
        facts["settings"] = _settings(header)
    facts.setdefault("base_name", _base_name(header))
    notes = () if alpha is not None else (_no_alpha(path),)

    def read(more: FormatOptions) -> Adapter:
        return _open(path, more.over(told))

    return Adapter(
        updates,
        **{**facts, "base_config": config},
        model_files=model_files,
        model_config=model_config,
        context=reader.replaced,
        problems=tuple(reader.problems),
        notes=notes,
        files=files,
        rereading=Rereading(frozenset({"base"}), updates, read),
        path=path,
    )


def _require_lora(header: Header) -> None:
    """Raise FormatError unless the file is a plain LoRA adapter."""
    kind = header.metadata.get("adapter.type")
    if kind != "lora":
        raise FormatError(f"{header.path}: adapter.type is {kind!r}: it is no LoRA adapter")
    if _ALORA in header.metadata:
        raise FormatError(
            f"{header.path}: is an activated LoRA ({_ALORA}): it acts from certain tokens on only, "
            "which no weight can express: it cannot be merged or converted"
        )


def _alpha(header: Header) -> float | None:
    """alpha; None where llama.cpp takes the scale for 1."""
    alpha = header.metadata.get(_ALPHA, 0.0)
    if isinstance(alpha, bool) or not isinstance(alpha, int | float) or not math.isfinite(alpha):
        raise FormatError(f"{header.path}: {_ALPHA} must be a finite number, not {alpha!r}")
    return float(alpha) or None


def _no_alpha(path: Path) -> str:
    return f"{path}: does not say alpha ({_ALPHA}): the scale is 1, as llama.cpp takes it"


def _settings(header: Header) -> dict[str, Any]:
    plain = (str, int, float, bool)
    return {k: v for k, v in header.metadata.items() if isinstance(v, plain) and k != _METADATA}


def _base_name(header: Header) -> str:
    """The base's Hub id, if the file names one base on the Hub."""
    url = header.metadata.get("general.base_model.0.repo_url")
    if header.metadata.get("general.base_model.count") != 1 or not isinstance(url, str):
        return ""
    return url.removeprefix(_HUB) if url.startswith(_HUB) else ""


def _unknown_base(config: Mapping[str, Any] | None) -> str:
    if not config:
        return (
            "llama.cpp's names and the order of rows depend on the base's architecture and heads, "
            "which the adapter does not say: give the base, with its config.json (--base)"
        )
    return f"llama.cpp's names of a {config.get('model_type')!r} model are not known"


def _refusal(update: LazyUpdate, names: Names, heads: Mapping[str, int]) -> str:
    """Why an update cannot be written; "" if it can."""
    from loratool_plugins.adapter_formats.gguf_layout import layout_of

    model = f"{names.architecture} model"
    if update.kind == "experts":
        known = update.name.rpartition(".")[2] in (GATE_UP, DOWN) and update.shape[1] % 2 == 0
        if known and names.experts(update.name):
            return ""
        return f"llama.cpp has no such experts in a {model}: leave it out"
    tensor = names.tensor(update.name)
    if tensor is None or not update.name.endswith(".weight") or len(update.shape) != 2:
        return f"llama.cpp has no such matrix in a {model}: leave it out"
    layout = layout_of(names, tensor, heads)
    if layout is None:
        return "how many heads the model has is not known: give the base (--base)"
    if layout.change == "heads" and update.shape[0] % (2 * layout.heads):
        return f"its {update.shape[0]} rows are not those of {layout.heads} heads"
    return ""


@dataclass(frozen=True)
class _Entry:
    """Spooled factors as llama.cpp lays them out, but for the scale.

    Attributes:
        tensor: llama.cpp's name of the weight.
        a: (r, in), (V, r) of a table, (E, r, in) of experts.
        b: (out, r), or (E, out, r).
        scale: of the product.
    """

    tensor: str
    a: LazyTensor
    b: LazyTensor
    scale: float

    @property
    def rank(self) -> int:
        """What llama.cpp divides alpha by."""
        return self.b.shape[-1]

    @property
    def alpha(self) -> float:
        """The alpha that gives its scale."""
        return alpha_of(self.scale, self.rank)


def _low_rank(
    adapter: Adapter,
    update: LazyUpdate,
    found: LowRank,
    names: Names,
    heads: Mapping[str, int],
    spool: Spool,
) -> _Entry:
    from loratool_plugins.adapter_formats.gguf_layout import TABLE, layout_of

    tensor, layout = names.tensor(update.name), None
    if tensor is not None:
        layout = layout_of(names, tensor, heads)
    if tensor is None or layout is None:
        raise AssertionError(f"{update.name}: its refusal was passed over")
    require_finite(update.name, found.a, found.b)
    if tensor == TABLE:
        return _Entry(tensor, spool.add("a", found.b), spool.add("b", found.a.T), found.scale)
    b = found.b
    if layout.change == "heads":
        import torch

        b = b[torch.from_numpy(layout.stored_rows(len(b)).argsort())]
    return _Entry(tensor, spool.add("a", found.a), spool.add("b", b), found.scale)


def _experts(
    update: LazyUpdate, found: Experts, names: Names, shared: list[str], spool: Spool
) -> Iterator[_Entry]:
    require_finite(update.name, found.a, found.b)
    layer = names.experts(update.name)
    parts: dict[str, Experts]
    if update.name.endswith(f".{DOWN}"):
        parts = {"down": found}
    else:
        gate, up, same = halves(found)
        parts = {"gate": gate, "up": up}
        shared += [layer.removeprefix("blk.")] if same and layer else []
    for which, part in parts.items():
        a, b = spool.add("a", part.a), spool.add("b", part.b)
        yield _Entry(f"{layer}.ffn_{which}_exps.weight", a, b, part.scale)


@dataclass
class _Layout:
    """One alpha for all, and what was done to updates that have another."""

    entries: list[_Entry]
    scales: dict[str, float] = field(default_factory=dict)
    folds: dict[str, tuple[float, str]] = field(default_factory=dict)
    rounded: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        import numpy as np

        alpha = float(np.float32(most_common(entry.alpha for entry in self.entries)))
        # Zero would mean that there is none, and the scale 1.
        self.alpha = alpha if alpha and math.isfinite(alpha) else 1.0

    def tensors(self, entry: _Entry, spool: Spool) -> list[LazyTensor]:
        """An update's tensors under their names in the file."""
        factor = entry.scale * entry.rank / self.alpha
        same = entry.scale == self.alpha / entry.rank
        close = abs(factor - 1) < _FP32
        b = fold(entry.b.read(), 1.0 if close else factor, RUNTIME_TYPES)
        a = fold(entry.a.read(), 1.0, RUNTIME_TYPES)
        if not same:
            self.scales[entry.tensor] = entry.scale
        if not close and factor != 0:
            self.folds[entry.tensor] = factor, entry.b.dtype
        if not (a.exact and b.exact) or (close and not same):
            self.rounded.append(entry.tensor)
        return [
            spool.add(f"{entry.tensor}.lora_a", a.values),
            spool.add(f"{entry.tensor}.lora_b", b.values),
        ]


def _write(
    file: Path,
    architecture: str,
    alpha: float,
    adapter: Adapter,
    text: str,
    tensors: list[LazyTensor],
) -> None:
    """Write the file through the gguf package, one tensor after the other."""
    import gguf
    import numpy as np

    from loratool.card import is_hub_name

    writer = gguf.GGUFWriter(file, architecture)
    writer.add_type(gguf.GGUFType.ADAPTER)
    writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
    writer.add_float32(_ALPHA, alpha)
    if is_hub_name(adapter.base_name):
        writer.add_base_model_count(1)
        writer.add_base_model_name(0, adapter.base_name.rpartition("/")[2])
        writer.add_base_model_repo_url(0, _HUB + adapter.base_name)
    writer.add_string(_METADATA, text)
    for tensor in tensors:
        kind = gguf.GGMLQuantizationType[tensor.dtype]
        shape = (*tensor.shape[:-1], tensor.shape[-1] * (tensor.nbytes // tensor.numel))
        writer.add_tensor_info(tensor.name, shape, np.dtype(np.uint8), tensor.nbytes, kind)
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for tensor in tensors:
            writer.write_tensor_data(_bytes(tensor))
    finally:
        writer.close()


def _bytes(tensor: LazyTensor) -> Any:
    import torch

    return tensor.read().contiguous().view(torch.uint8).reshape(-1).numpy()
