"""LoRA files of diffusers: pytorch_lora_weights.safetensors."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from loratool.adapter import Adapter, LazyUpdate
from loratool.errors import Problem
from loratool.updates import Kind, Update
from loratool_plugins.adapter_formats import _diffusers_reader, _diffusers_writer
from loratool_plugins.adapter_formats import _diffusion_files as files

FILE = "pytorch_lora_weights.safetensors"


@dataclass(frozen=True)
class Diffusers:
    """LoRA of pipelines as diffusers saves it, of all its ages."""

    carries: ClassVar[frozenset[Kind]] = frozenset({"low_rank", "dora", "dense"})
    canonical: ClassVar[bool] = True
    library: ClassVar[str] = "diffusers"
    usage: ClassVar[str] = """\
```python
from diffusers import DiffusionPipeline

pipeline = DiffusionPipeline.from_pretrained("BASE")
pipeline.load_lora_weights("ADAPTER")
```"""

    def objection(self, path: Path) -> str:
        """Why there is no file with diffusers' keys."""
        return files.objection(path, "diffusers")

    def open(self, path: Path) -> Adapter:
        """Open it by its headers; what is wrong inside is collected.

        Raises:
            InputError: the file cannot be read.
            FormatError: it is malformed.
        """
        return _diffusers_reader.read_adapter(path)

    def refusals(self, adapter: Adapter) -> Iterable[Problem]:
        """What PEFT's settings of a component cannot say."""
        return _diffusers_writer.refusals(adapter)

    def write(
        self, adapter: Adapter, results: Iterable[tuple[LazyUpdate, Update | None]], folder: Path
    ) -> tuple[str, ...]:
        """Write tensors, and the settings of every component in the header."""
        return _diffusers_writer.write(adapter, results, folder / FILE)
