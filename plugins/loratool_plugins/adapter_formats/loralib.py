"""loralib's state dicts: `<module>.lora_A` and `<module>.lora_B` in a torch or safetensors file.

They hold neither alpha nor which slots of a fused weight have an update (MergedLinear), nor the
orientation of the weight; a convolution's factors look like a linear layer's. What a person or the
base tells of these reaches the reader through `Adapter.reread`.
"""

from __future__ import annotations

import re
from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from loratool.adapter import Adapter, FormatOptions, LazyUpdate, Rereading
from loratool.checkpoint import LazyTensor
from loratool.errors import FormatError, Problem
from loratool.files import PICKLES, entries, is_dir, is_file
from loratool.safetensors_file import lazy_tensors, read_header
from loratool.updates import Kind, LowRank, Replacement, Update
from loratool.writer import Spool
from loratool_plugins.adapter_formats import _keys, _ours
from loratool_plugins.adapter_formats._scales import TORCH_TYPES, alpha_of, fold, require_finite
from loratool_plugins.adapter_formats.loralib_layout import DEFAULT_ALPHA, Facts, Reader
from loratool_plugins.checkpoint_formats.torch import load_with_metadata

if TYPE_CHECKING:
    import torch

FILE = "lora.pt"
_OPTIONS = frozenset({"alpha", "enable_lora", "fan_in_fan_out", "base"})
# What directories of other formats, and of models, call their weights.
_OTHERS = re.compile(r"(adapter_model|adapters?|model|pytorch_model|pytorch_lora_weights)\b.*")


@dataclass(frozen=True)
class Loralib:
    """State dicts of Microsoft's loralib: linear, embedding, MergedLinear, square convolutions."""

    carries: ClassVar[frozenset[Kind]] = frozenset({"low_rank", "replacement"})
    library: ClassVar[str] = "loralib"
    usage: ClassVar[str] = f"""\
Build the model with loralib's modules of the ranks above, leaving lora_alpha at its default 1:
loralib's files do not say alpha, so it is worked into lora_B.

```python
import torch

model.load_state_dict(torch.load("ADAPTER/{FILE}", weights_only=True), strict=False)
```"""

    def objection(self, path: Path) -> str:
        """Why there is no state dict with loralib's keys."""
        file = _weight_file(path)
        if file is None:
            return f"no {FILE}, and not one single file of weights"
        return _keys.objection(file, "loralib", "*.lora_A / *.lora_B")

    def open(self, path: Path) -> Adapter:
        """Open it by its headers; what is wrong inside is collected.

        Raises:
            InputError: the file cannot be read.
            FormatError: it is malformed, or holds keys of another format, too.
        """
        return _open(path, FormatOptions())

    def refusals(self, adapter: Adapter) -> Iterable[Problem]:
        """Convolutions, whose factors loralib has in another form, and bare parameters."""
        for update in adapter.values():
            if update.kind != "low_rank":
                continue
            if len(update.shape) > 2:
                message = "loralib's convolutions have factors of another form: leave it out"
                yield Problem("error", update.name, message)
            elif not update.name.endswith(".weight"):
                message = "loralib knows weights of modules only: leave it out"
                yield Problem("error", update.name, message)

    def write(
        self, adapter: Adapter, results: Iterable[tuple[LazyUpdate, Update | None]], folder: Path
    ) -> tuple[str, ...]:
        """Write the state dict; the scale is worked into B as if alpha were 1, its default."""
        import torch

        state: OrderedDict[str, torch.Tensor] = OrderedDict()
        folds: dict[str, tuple[float, str]] = {}
        tables: list[str] = []
        rounded: list[str] = []
        with Spool(folder) as spool:
            for update, found in results:
                if isinstance(found, Replacement):
                    state[update.name] = found.tensor.read()
                    continue
                if not isinstance(found, LowRank):
                    continue
                require_finite(update.name, found.a, found.b)
                module = update.name.removesuffix(".weight")
                if _ours.is_table(adapter, update):
                    tables.append(module)
                    found = found.transposed()
                alpha = alpha_of(found.scale, found.rank)
                folded = fold(found.b, alpha, TORCH_TYPES)
                if alpha not in (0, DEFAULT_ALPHA):
                    folds[module] = alpha, spool.add(module, found.b).dtype
                if not folded.exact:
                    rounded.append(module)
                for side, values in (("A", found.a), ("B", folded.values)):
                    state[f"{module}.lora_{side}"] = spool.add(module, values).read()
            if not state:
                return ()
            text = _ours.text_of(adapter, folds=folds, tables=tables)
            # Where torch keeps facts about modules; loading ignores those of unknown ones.
            state._metadata = OrderedDict({_ours.KEY: {_ours.KEY: text}})  # type: ignore[attr-defined]
            torch.save(state, folder / FILE)
        return _rounding_note(rounded)


def _rounding_note(modules: Sequence[str]) -> tuple[str, ...]:
    if not modules:
        return ()
    return (f"{len(modules)} scales are no short numbers ({modules[0]}, ...): rounded to fp64",)


def _weight_file(path: Path) -> Path | None:
    """The file itself, or the directory's only one that could be a loralib state dict."""
    suffixes = (".safetensors", *PICKLES)
    if is_file(path):
        return path if path.suffix in suffixes else None
    if not is_dir(path):
        return None
    if is_file(path / FILE):
        return path / FILE
    found = [file for file in entries(path) if file.suffix in suffixes and is_file(file)]
    return found[0] if len(found) == 1 and not _OTHERS.match(found[0].name) else None


def _open(path: Path, told: FormatOptions) -> Adapter:
    file = _weight_file(path)
    if file is None:
        raise FormatError(f"{path}: holds no state dict of loralib")
    tensors, text = _load(file)
    _keys.require_one_style(file, tensors)
    ours = _ours.parsed(text, str(file))
    facts = _ours.restored(ours, str(file))
    reader = Reader(tensors, told, Facts.of(ours, facts.pop("transposed"), str(file)))
    updates = reader.updates()
    files, model_files, config = _ours.beside(path, (file,))
    options = _OPTIONS - {"alpha"} if ours else _OPTIONS

    def read(more: FormatOptions) -> Adapter:
        return _open(path, more.over(told))

    return Adapter(
        updates,
        **facts,
        model_files=model_files,
        model_config=config,
        context=reader.replaced,
        problems=tuple(reader.problems),
        notes=reader.notes(path),
        files=files,
        rereading=Rereading(options, updates, read),
        path=path,
    )


def _load(file: Path) -> tuple[dict[str, LazyTensor], str | None]:
    """The tensors of a file, and loratool's metadata in it."""
    if file.suffix == ".safetensors":
        header = read_header(file)
        return lazy_tensors(file, header), header.metadata.get(_ours.KEY)
    tensors, said = load_with_metadata(file)
    mine = said.get(_ours.KEY)
    text = mine.get(_ours.KEY) if isinstance(mine, Mapping) else None
    return tensors, text if isinstance(text, str) else None
