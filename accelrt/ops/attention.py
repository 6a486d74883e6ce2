"""Attention along the frame axis, by stride."""

from __future__ import annotations

import torch
from torch import Tensor

from accelrt import reference

from ._library import (
    check_cuda_built,
    check_shape,
    check_tensor,
    explain,
    fails,
    native,
    register_fake,
)

MAX_FRAMES = 64
MAX_HEAD_DIM = 256


def _check(q: Tensor, k: Tensor, v: Tensor, num_heads: int, out: Tensor) -> None:
    op = "temporal_attention"
    check_tensor(op, "q", q)
    if q.dim() != 4:
        raise fails(op, f"q has shape {tuple(q.shape)}; expected [B, T, P, C]")
    batch, frames, pixels, channels = q.shape
    if num_heads < 1 or channels % num_heads:
        raise fails(op, f"num_heads {num_heads} does not divide the {channels} channels")
    if channels // num_heads > MAX_HEAD_DIM:
        raise fails(op, f"head dim {channels // num_heads} exceeds {MAX_HEAD_DIM}")
    if k.dim() != 4 or not 1 <= k.shape[1] <= MAX_FRAMES or frames > MAX_FRAMES:
        raise fails(
            op, f"{frames} query and {k.shape[1]} key frames; each must be 1 to {MAX_FRAMES}"
        )
    for name, t in (("k", k), ("v", v)):
        check_tensor(op, name, t, q)
        check_shape(op, name, t, (batch, k.shape[1], pixels, channels))
    check_tensor(op, "out", out, q)
    check_shape(op, "out", out, q.shape)
    for name, t in (("q", q), ("k", k), ("v", v), ("out", out)):
        if t.numel() and t.stride(-1) != 1:
            raise fails(op, f"{name}'s channel stride is {t.stride(-1)}; it must be 1")
    check_cuda_built(op, q)


def temporal_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    num_heads: int,
    *,
    scale: float | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """Softmax attention over the frames of each pixel and head; no permute copy.

    Args:
        q: ``[B, T, P, H * D]``: batch, frames, pixels (height times width), channels.
        k, v: ``[B, T_k, P, H * D]``. ``T`` and ``T_k`` are at most 64, ``D`` at most 256.
            All strides are free except the channels', which must be 1.
        num_heads: ``H``.
        scale: of the scores; ``D ** -0.5`` by default.
        out: like ``q``; may be ``q`` itself.

    Source: the temporal layers of Streamlined Inference (arXiv 2411.01171), which are
    independent from pixel to pixel.
    """
    if q.dtype == torch.float64:
        return reference.temporal_attention(q, k, v, num_heads, scale=scale, out=out)
    result = q.new_empty(q.shape) if out is None else out
    if num_heads < 1:
        raise fails("temporal_attention", f"num_heads is {num_heads}; it must be at least 1")
    value = max(q.shape[-1] // num_heads, 1) ** -0.5 if scale is None else scale
    try:
        native.temporal_attention(q, k, v, num_heads, value, result)
    except RuntimeError as error:
        explain(error, _check, q, k, v, num_heads, result)
    return result


@register_fake("temporal_attention")
def _(q: Tensor, k: Tensor, v: Tensor, num_heads: int, scale: float, out: Tensor) -> None:
    _check(q, k, v, num_heads, out)
