"""Files of LyCORIS: kohya's, with more kinds of update."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from loratool.adapter import Adapter, LazyUpdate
from loratool.errors import Problem
from loratool.updates import Kind, Update
from loratool_plugins.adapter_formats import _diffusion_files as files
from loratool_plugins.adapter_formats import _kohya_reader, _kohya_writer

FILE = "lycoris.safetensors"


@dataclass(frozen=True)
class Lycoris:
    """LyCORIS's LoHa, LoKr, DoRA, IA3, full deltas and norms, beside LoRA, in kohya's naming."""

    carries: ClassVar[frozenset[Kind]] = frozenset(
        {"low_rank", "dense", "loha", "lokr", "dora", "ia3"}
    )
    namings: ClassVar[frozenset[str]] = frozenset({"kohya"})
    canonical: ClassVar[bool] = True
    library: ClassVar[str] = "lycoris-lora"
    usage: ClassVar[str] = f"""\
`{FILE}` is one file, as ComfyUI, AUTOMATIC1111's web UI and lycoris-lora take it."""

    def objection(self, path: Path) -> str:
        """Why there is no file with LyCORIS's keys."""
        return files.objection(path, "lycoris")

    def open(self, path: Path) -> Adapter:
        """Open it by its headers; what is wrong inside is collected.

        Raises:
            InputError: the file cannot be read.
            FormatError: it is malformed, or of a method that loratool does not merge.
        """
        return _kohya_reader.read_adapter(path)

    def refusals(self, adapter: Adapter) -> Iterable[Problem]:
        """Modules without a name, and parts that cannot be put together."""
        return _kohya_writer.refusals(adapter)

    def write(
        self, adapter: Adapter, results: Iterable[tuple[LazyUpdate, Update | None]], folder: Path
    ) -> tuple[str, ...]:
        """Write one file; parts of what is one module in this naming are put together."""
        return _kohya_writer.write(adapter, results, folder / FILE)
