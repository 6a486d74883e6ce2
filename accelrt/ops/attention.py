"""Attention over tokens, and along the frame axis, by stride."""

from __future__ import annotations

import torch
from torch import Tensor

from accelrt import reference
from accelrt.memory.arena import temporary

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


def _check_full(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, out: Tensor) -> None:
    op = "attention"
    check_tensor(op, "q", q)
    if q.dim() != 4:
        raise fails(op, f"q has shape {tuple(q.shape)}; expected [B, S, H, D]")
    batch, queries, heads, dim = q.shape
    if not 1 <= dim <= MAX_HEAD_DIM:
        raise fails(op, f"head dim {dim} is not within 1 and {MAX_HEAD_DIM}")
    if k.dim() != 4 or k.shape[1] < 1:
        raise fails(op, f"k has shape {tuple(k.shape)}; expected [B, L, H, D] with L at least 1")
    keys = k.shape[1]
    for name, t in (("k", k), ("v", v)):
        check_tensor(op, name, t, q)
        check_shape(op, name, t, (batch, keys, heads, dim))
    if bias is not None:
        check_tensor(op, "bias", bias, q)
        full = (batch, heads, queries, keys)
        fits = bias.dim() == 4 and bias.shape[3] == keys
        if not fits or any(n not in (1, m) for n, m in zip(bias.shape, full, strict=True)):
            raise fails(
                op,
                f"bias has shape {tuple(bias.shape)}; expected {full}, where the first three "
                "may be 1",
            )
    check_tensor(op, "out", out, q)
    check_shape(op, "out", out, q.shape)
    named = [("q", q), ("k", k), ("v", v), ("out", out)]
    for name, t in [*named, *([("bias", bias)] if bias is not None else [])]:
        if t.numel() and t.shape[-1] > 1 and t.stride(-1) != 1:
            raise fails(op, f"{name}'s last stride is {t.stride(-1)}; it must be 1")
    check_cuda_built(op, q)


def _check_call(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, out: Tensor) -> None:
    _check_full(q, k, v, bias, out)
    if q.numel() and out.data_ptr() in (k.data_ptr(), v.data_ptr()):
        raise fails("attention", "out overlaps k or v; only q may be written over")


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    bias: Tensor | None = None,
    scale: float | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """Softmax attention without a matrix of scores; no copies of heads.

    The thirds of a fused projection ``[B, S, 3, H, D]`` and a context's keys and values are
    read where they lie.

    Args:
        q: ``[B, S, H, D]``: batch, queries, heads, channels of a head (at most 256).
        k, v: ``[B, L, H, D]``, ``L`` at least 1. All strides are free except the channels',
            which must be 1.
        bias: ``[B or 1, H or 1, S or 1, L]`` in the dtype of ``q``, added to the scaled
            scores. ``-inf`` masks a key; a query whose keys are all masked gives zeros.
        scale: of the scores; ``D ** -0.5`` by default.
        out: like ``q``; may be ``q`` itself, must not overlap the other inputs.

    Returns:
        ``out``: ``[B, S, H, D]`` in the dtype of ``q``.

    Raises:
        ValueError: a shape, dtype or stride is none of the above.

    On the CPU float16, and bfloat16 without AVX512-BF16, are computed in float32; with it, the
    weights are rounded to bfloat16 for the second product, as torch's own kernel does. On a GPU
    this is torch's scaled_dot_product_attention on the same views, and a copy to ``out``; with
    ``ACCELRT_CUDA_PRODUCTS=own`` a kernel of ours, which writes to ``out``, takes 16-bit tensors
    with ``D`` a multiple of 8, whose pointers and strides are multiples of 16 bytes.

    Source: FlashAttention (arXiv 2205.14135), the online softmax over blocks of keys;
    FlashAttention-2 (arXiv 2307.08691) on a GPU.
    """
    if q.dtype == torch.float64:
        return reference.attention(q, k, v, bias=bias, scale=scale, out=out)
    result = temporary(q, *q.shape) if out is None else out
    value = max(q.shape[-1], 1) ** -0.5 if scale is None else scale
    try:
        native.attention(q, k, v, bias, value, result)
    except RuntimeError as error:
        explain(error, _check_call, q, k, v, bias, result)
    return result


@register_fake("attention")
def _full_shape(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, scale: float, out: Tensor
) -> None:
    _check_full(q, k, v, bias, out)


def _check_temporal(q: Tensor, k: Tensor, v: Tensor, num_heads: int, out: Tensor) -> None:
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
    result = temporary(q, *q.shape) if out is None else out
    if num_heads < 1:
        raise fails("temporal_attention", f"num_heads is {num_heads}; it must be at least 1")
    value = max(q.shape[-1] // num_heads, 1) ** -0.5 if scale is None else scale
    try:
        native.temporal_attention(q, k, v, num_heads, value, result)
    except RuntimeError as error:
        explain(error, _check_temporal, q, k, v, num_heads, result)
    return result


@register_fake("temporal_attention")
def _temporal_shape(
    q: Tensor, k: Tensor, v: Tensor, num_heads: int, scale: float, out: Tensor
) -> None:
    _check_temporal(q, k, v, num_heads, out)
