"""LoRA files of kohya's sd-scripts, which most trainers and user interfaces for images read."""

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

FILE = "lora.safetensors"
USAGE = """\
`FILE` is one file, as ComfyUI, AUTOMATIC1111's web UI and kohya's sd-scripts take it. diffusers:

```python
from diffusers import DiffusionPipeline

pipeline = DiffusionPipeline.from_pretrained("BASE")
pipeline.load_lora_weights("ADAPTER", weight_name="FILE")
```"""


@dataclass(frozen=True)
class Kohya:
    """LoRA of diffusion models with underscored names, as kohya's sd-scripts save it."""

    carries: ClassVar[frozenset[Kind]] = frozenset({"low_rank", "dora"})
    namings: ClassVar[frozenset[str]] = frozenset({"kohya"})
    canonical: ClassVar[bool] = True
    library: ClassVar[str] = "diffusers"
    usage: ClassVar[str] = USAGE.replace("FILE", FILE)

    def objection(self, path: Path) -> str:
        """Why there is no file with kohya's keys."""
        return files.objection(path, "kohya")

    def open(self, path: Path) -> Adapter:
        """Open it by its headers; what is wrong inside is collected.

        Raises:
            InputError: the file cannot be read.
            FormatError: it is malformed.
        """
        return _kohya_reader.read_adapter(path)

    def refusals(self, adapter: Adapter) -> Iterable[Problem]:
        """Modules without a name, parts that cannot be put together, other DoRA than of LoRA."""
        for update in adapter.values():
            if update.kind == "dora" and update.rank is None:
                message = "is DoRA of an update that is not low-rank: write it as lycoris"
                yield Problem("error", update.name, message)
        yield from _kohya_writer.refusals(adapter)

    def write(
        self, adapter: Adapter, results: Iterable[tuple[LazyUpdate, Update | None]], folder: Path
    ) -> tuple[str, ...]:
        """Write one file; parts of what is one module in this naming are put together."""
        return _kohya_writer.write(adapter, results, folder / FILE)
