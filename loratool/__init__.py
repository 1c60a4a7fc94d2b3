"""loratool: LoRA adapters from fine-tuned checkpoints, validated, merged and exported.

Public names are imported when first used: `import loratool` imports no torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from loratool.api import (
        bench,
        compare,
        convert,
        diff,
        export,
        extract,
        inspect,
        merge,
        pull,
        push,
        rescale,
        stack,
        switch,
        unmerge,
        validate,
    )
    from loratool.errors import LoratoolError
    from loratool.opening import open_adapter, open_checkpoint

__all__ = [
    "LoratoolError",
    "bench",
    "compare",
    "convert",
    "diff",
    "export",
    "extract",
    "inspect",
    "merge",
    "open_adapter",
    "open_checkpoint",
    "pull",
    "push",
    "rescale",
    "stack",
    "switch",
    "unmerge",
    "validate",
]

_HOMES = {
    "LoratoolError": "loratool.errors",
    "open_adapter": "loratool.opening",
    "open_checkpoint": "loratool.opening",
}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'loratool' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_HOMES.get(name, "loratool.api")), name)
