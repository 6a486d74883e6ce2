"""References of the attention operators."""

from __future__ import annotations

import torch
from torch import Tensor

from ._common import accumulation_dtype, store


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    bias: Tensor | None = None,
    scale: float | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """Softmax attention over tokens; see :func:`accelrt.ops.attention`."""
    acc = accumulation_dtype(q)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    query, key, value = (t.to(acc).transpose(1, 2) for t in (q, k, v))  # [B, H, tokens, D]
    scores = query @ key.transpose(-1, -2) * scale
    if bias is not None:
        scores = scores + bias.to(acc)
    weights = torch.softmax(scores, dim=-1)
    # A row without keys has no weights.
    weights = torch.where((scores == -torch.inf).all(-1, keepdim=True), 0.0, weights)
    return store((weights @ value).transpose(1, 2), q, out)


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
