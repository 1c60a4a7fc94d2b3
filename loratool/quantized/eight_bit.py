"""bitsandbytes' 8 bits a weight: value = code * row maximum / 127.

`weight` holds the codes, `SCB` beside it the maximum of each row, and `weight_format` 0 for codes
in row-major order; the interleaved orders of old GPU kernels are refused.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from loratool.checkpoint import Checkpoint, Form, LazyTensor, Parts
from loratool.families import Family
from loratool.quantized.scheme import Findings, Found, row_tiles, small_content, turned
from loratool.quantized.unsupported import method_of

if TYPE_CHECKING:
    import torch

_WORDS = "int8 of bitsandbytes, one scale a row"
_STEP = 7.874015718698502e-3  # 1 / 127 as bitsandbytes writes it


def find(checkpoint: Checkpoint, settings: Mapping[str, Any], conv1d: Family | None) -> Findings:
    """The 8-bit weights of a checkpoint.

    Args:
        checkpoint: as it is stored.
        settings: what its config.json says of its quantization.
        conv1d: the family, if some of its plain weights are the transposes of the quantized ones.
    """
    findings = Findings()
    expected = method_of(settings) == "bitsandbytes"
    for name, tensor in checkpoint.items():
        module, _, leaf = name.rpartition(".")
        scales = checkpoint.get(f"{module}.SCB")
        if leaf == "SCB" and f"{module}.weight" not in checkpoint:
            findings.problems.append(f"{name}: {module}.weight, which it scales, is missing")
        if leaf != "weight" or tensor.dtype != "I8" or len(tensor.shape) != 2:
            continue
        if scales is not None:
            _take(findings, checkpoint, tensor, scales, conv1d)
        elif expected:
            findings.problems.append(
                f"{name}: is int8 but {module}.SCB is missing: download the checkpoint again"
            )
    return findings


def _take(
    findings: Findings,
    checkpoint: Checkpoint,
    codes: LazyTensor,
    scales: LazyTensor,
    conv1d: Family | None,
) -> None:
    module = codes.name.rpartition(".")[0]
    if scales.numel != codes.shape[0] or scales.dtype != "F32":
        findings.problems.append(
            f"{scales.name}: is {scales.dtype} {scales.shape}, but {codes.name} has "
            f"{codes.shape[0]} rows"
        )
        return
    order = checkpoint.get(f"{module}.weight_format")
    if order is not None and any(small_content(order)):
        findings.problems.append(
            f"{order.name}: the codes are interleaved for old GPU kernels: load the model with "
            "bitsandbytes 0.45 or later and save it again"
        )
        return
    is_turned = conv1d is not None and re.fullmatch(conv1d.conv1d, module) is not None

    def decode(parts: Parts) -> Iterator[torch.Tensor]:
        values = decoded(parts["codes"], parts["scales"])
        return turned(values) if is_turned else values

    def encode(values: torch.Tensor) -> Parts:
        found = encoded(values.T.contiguous() if is_turned else values)
        return {"codes": found[0], "scales": found[1].view(scales.shape)}

    form = Form({"codes": codes, "scales": scales}, decode, encode)
    shape = codes.shape[::-1] if is_turned else codes.shape
    findings.add(codes.name, Found(shape, _WORDS, form), *([order.name] if order else []))


def decoded(codes: torch.Tensor, scales: torch.Tensor) -> Iterator[torch.Tensor]:
    """Yield the values of rows of int8 codes, in fp32 and rounded as bitsandbytes does.

    Args:
        codes: (out, in), int8.
        scales: out of them, fp32: the maximum of each row.
    """
    factors = scales.reshape(-1, 1)
    for rows in row_tiles(codes):
        yield (codes[rows] * factors[rows]).mul_(_STEP)


def encoded(values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes (out, in) and row maxima (out,) of new values (out, in), fp32 and finite."""
    import torch

    codes = torch.empty(values.shape, dtype=torch.int8)
    maxima = torch.empty(values.shape[0])
    for rows in row_tiles(values):
        tile = values[rows].float()
        largest = maxima[rows] = tile.abs().amax(dim=1)
        steps = torch.where(largest > 0, 127.0 / largest, 0.0)
        codes[rows] = torch.round(tile * steps[:, None]).to(torch.int8)
    return codes, maxima
