"""Element types by their safetensors names, known without importing torch."""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING

from loratool.errors import FormatError, UsageError

if TYPE_CHECKING:
    import torch

# safetensors name -> (bytes an element, torch attribute)
_TABLE = {
    "F64": (8, "float64"),
    "F32": (4, "float32"),
    "F16": (2, "float16"),
    "BF16": (2, "bfloat16"),
    "F8_E4M3": (1, "float8_e4m3fn"),
    "F8_E5M2": (1, "float8_e5m2"),
    "F8_E4M3FNUZ": (1, "float8_e4m3fnuz"),
    "F8_E5M2FNUZ": (1, "float8_e5m2fnuz"),
    "F8_E8M0": (1, "float8_e8m0fnu"),
    "C64": (8, "complex64"),
    "I64": (8, "int64"),
    "I32": (4, "int32"),
    "I16": (2, "int16"),
    "I8": (1, "int8"),
    "U64": (8, "uint64"),
    "U32": (4, "uint32"),
    "U16": (2, "uint16"),
    "U8": (1, "uint8"),
    "BOOL": (1, "bool"),
}

# What a user types for --dtype, and the types that updates can be rounded to.
FLOAT_NAMES = {
    "fp64": "F64",
    "fp32": "F32",
    "fp16": "F16",
    "bf16": "BF16",
    "fp8_e4m3": "F8_E4M3",
    "fp8_e5m2": "F8_E5M2",
}


def itemsize(dtype: str) -> int:
    """Bytes an element of `dtype`; FormatError if safetensors has no such type."""
    try:
        return _TABLE[dtype][0]
    except KeyError:
        raise FormatError(f"unknown dtype {dtype!r}; known are {', '.join(_TABLE)}") from None


def is_float(dtype: str) -> bool:
    """Whether `dtype` can hold weights that are merged into."""
    return dtype in FLOAT_NAMES.values()


def parse_float_dtype(text: str) -> str:
    """The safetensors name of what a user typed, such as "bf16"; UsageError otherwise."""
    name = FLOAT_NAMES.get(text.lower(), text.upper())
    if name not in FLOAT_NAMES.values():
        raise UsageError(f"unknown dtype {text!r}: use one of {', '.join(FLOAT_NAMES)}")
    return name


def torch_dtype(dtype: str) -> torch.dtype:
    """The torch type of a safetensors name."""
    import torch

    itemsize(dtype)
    found: torch.dtype = getattr(torch, _TABLE[dtype][1])
    return found


@cache
def _names_by_torch() -> dict[torch.dtype, str]:
    import torch

    return {getattr(torch, attribute): name for name, (_, attribute) in _TABLE.items()}


def dtype_name(dtype: torch.dtype) -> str:
    """The safetensors name of a torch type; FormatError if it has none."""
    try:
        return _names_by_torch()[dtype]
    except KeyError:
        raise FormatError(f"tensors of type {dtype} cannot be written to safetensors") from None
