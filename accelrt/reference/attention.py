"""Reference of the temporal attention operator."""

from __future__ import annotations

import torch
from torch import Tensor

from ._common import accumulation_dtype, store


def temporal_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    num_heads: int,
    *,
    scale: float | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """Softmax attention along the frame axis; see :func:`accelrt.ops.temporal_attention`."""
    acc = accumulation_dtype(q)
    batch, frames, pixels, channels = q.shape
    head_dim = channels // num_heads
    scale = head_dim**-0.5 if scale is None else scale

    def heads(t: Tensor) -> Tensor:  # [B, T, P, H*D] -> [B, P, H, T, D]
        return t.to(acc).reshape(*t.shape[:3], num_heads, head_dim).permute(0, 2, 3, 1, 4)

    weights = torch.softmax(heads(q) @ heads(k).transpose(-1, -2) * scale, dim=-1)
    result = (weights @ heads(v)).permute(0, 3, 1, 2, 4).reshape(batch, frames, pixels, channels)
    return store(result, q, out)
