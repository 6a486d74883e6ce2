"""Shared pieces of the references: the accumulation dtype and the store."""

from __future__ import annotations

import torch
from torch import Tensor


def accumulation_dtype(x: Tensor) -> torch.dtype:
    """float64 for float64 inputs, float32 for everything else."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def store(result: Tensor, like: Tensor, out: Tensor | None) -> Tensor:
    """Round ``result`` to ``out`` (or to ``like``'s dtype) exactly once."""
    if out is None:
        return result.to(like.dtype)
    return out.copy_(result)
