"""Matrices that a low-rank update was merged into and rounded, with what was merged."""

from __future__ import annotations

import torch

from loratool.dtypes import dtype_name
from loratool.linalg import Context
from loratool.rounding import round_to


def merged(
    shape: tuple[int, int] = (256, 512),
    rank: int = 8,
    ratio: float = 3e-3,
    dtype: torch.dtype = torch.bfloat16,
    *,
    base: torch.dtype | None = None,
    delta_first: bool = False,
    seed: int = 0,
) -> tuple[Context, torch.Tensor]:
    """A merge, and the update (out, in) in fp32; ratio is ||update|| / ||weights||."""
    generator = torch.Generator().manual_seed(seed)
    before = (0.02 * torch.randn(shape, generator=generator)).to(base or dtype)
    update = torch.randn(shape[0], rank, generator=generator) @ torch.randn(
        rank, shape[1], generator=generator
    )
    update *= ratio * before.float().norm() / update.norm()
    added = update.to(dtype).float() if delta_first else update
    after = round_to(before.double() + added.double(), dtype_name(dtype))
    return Context("w", before, after, False), update


def tuned(
    shape: tuple[int, int] = (256, 512),
    ratio: float = 3e-3,
    dtype: torch.dtype = torch.bfloat16,
    decay: float = 0.5,
) -> Context:
    """A full fine-tune: singular values that fall like i^-decay, none of which is 0."""
    generator = torch.Generator().manual_seed(1)
    before = (0.02 * torch.randn(shape, generator=generator)).to(dtype)
    u, s, v = torch.linalg.svd(torch.randn(shape, generator=generator), full_matrices=False)
    update = (u * torch.arange(1.0, len(s) + 1) ** -decay) @ v
    update *= ratio * before.float().norm() / update.norm()
    return Context("w", before, (before.float() + update).to(dtype), False)


def delta(context: Context) -> torch.Tensor:
    return context.after.float() - context.before.float()
