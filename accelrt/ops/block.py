"""A whole transformer block in one call."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from accelrt import reference
from accelrt.memory.arena import temporary
from accelrt.reference.block import (
    AttentionWeights,
    BlockContext,
    BlockWeights,
    FeedForwardWeights,
    LinearWeights,
    NormWeights,
)

from ._library import check_cuda_built, check_shape, check_tensor, explain, fails, native
from ._library import register_fake as _register_fake
from .feed_forward import ACTIVATIONS

__all__ = [
    "AttentionWeights",
    "BlockContext",
    "BlockWeights",
    "FeedForwardWeights",
    "LinearWeights",
    "NormWeights",
    "context_keys",
    "transformer_block",
    "transformer_block_workspace",
]

_OP, _PROJECTION = "transformer_block", "block_projection"
_ALIGNMENT = 64


def context_keys(context: Tensor, weights: AttentionWeights) -> tuple[Tensor, Tensor]:
    """Keys and values of a context, bit for bit as :func:`transformer_block` makes them of it.

    Args:
        context: ``[B, L, E]``, contiguous; float32, bfloat16, float16 or float64.
        weights: of the cross-attention, with ``k`` and ``v`` apart.

    Returns:
        Two tensors ``[B, L, H, head_dim]``, to be given in place of the context.

    Raises:
        ValueError: a shape, dtype, device or stride does not fit, or ``k`` or ``v`` is missing.
    """
    if weights.k is None or weights.v is None:
        raise fails(_PROJECTION, "the weights of keys and values must be given apart")
    if context.dtype != torch.float64:
        check_tensor(_PROJECTION, "context", context)
    if context.dim() != 3 or not context.is_contiguous():
        raise fails(
            _PROJECTION,
            f"context has shape {tuple(context.shape)} and strides {context.stride()}; expected "
            "contiguous [B, L, E]",
        )
    batch, tokens, _ = context.shape
    k, v = (
        _projected(context.flatten(0, 1), layer).view(batch, tokens, weights.heads, -1)
        for layer in (weights.k, weights.v)
    )
    return k, v


def _projected(x: Tensor, layer: LinearWeights) -> Tensor:
    if x.dtype == torch.float64:
        return torch.nn.functional.linear(x, *layer)
    out = x.new_empty(x.shape[0], layer.weight.shape[0])
    try:
        native.block_projection(x, *layer, out)
    except RuntimeError as error:
        explain(error, _fake_projection, x, *layer, out)
    return out


def transformer_block_workspace(
    stream: Tensor,
    weights: BlockWeights,
    *,
    context: BlockContext | None = None,
    ff_rows: int | None = None,
    heads_per_slice: int | None = None,
) -> int:
    """Elements of the workspace that :func:`transformer_block` needs.

    Four tensors like the stream (with ``heads_per_slice`` two, and keys and values of those
    heads), or fewer tokens' hidden activations beside one, whichever is more; arguments as
    there.
    """
    batch, length, width = stream.shape
    rows, element = batch * length, stream.element_size()
    inner = weights.attention.out.weight.shape[1]
    cross_inner = keys = 0
    if weights.cross is not None:
        cross_inner = weights.cross.q.weight.shape[0]
        keys = context.shape[1] if isinstance(context, Tensor) else 0
    hidden = weights.feed_forward.hidden.weight.shape[0]
    wanted = rows if not ff_rows else min(ff_rows, rows)
    ff = wanted if wanted < length else wanted // max(length, 1) * length

    def size(count: int, columns: int) -> int:
        return -(-count * columns * element // _ALIGNMENT) * _ALIGNMENT

    part = size(rows, max(width, inner, cross_inner))
    projected = 2 * size(batch * keys, cross_inner)
    heads = max(weights.attention.heads, 1)
    at_once = heads if not heads_per_slice else min(heads_per_slice, heads)
    attention = 4 * part
    if at_once < heads:
        attention = 2 * part + 2 * size(rows, inner // heads * at_once)
    need = max(attention, 2 * part + projected, part + size(ff, hidden) + size(ff, width))
    return need // element


def transformer_block(
    stream: Tensor,
    modulation: Tensor,
    weights: BlockWeights,
    *,
    mask: Tensor | None = None,
    context: BlockContext | None = None,
    cross_mask: Tensor | None = None,
    ff_rows: int | None = None,
    heads_per_slice: int | None = None,
    workspace: Tensor | None = None,
) -> Tensor:
    """Run a transformer block with adaLN modulation on its residual stream, in place.

    Modulated LayerNorm, self-attention, gate; cross-attention without norm and gate, if the
    block has it; modulated LayerNorm, feed-forward, gate: ``BasicTransformerBlock`` of
    diffusers with ``ada_norm_zero`` or ``ada_norm_single``. One call runs all of it, with no
    Python in between.

    Args:
        stream: ``[B, S, D]``, contiguous; overwritten by the result.
        modulation: ``[B, 6, D]`` with any strides but the last, which is 1: shift, scale and
            gate of the attention, then of the feed-forward.
        weights: of the layers, all of the dtype and device of ``stream``, contiguous.
        mask: added to the scores of self-attention, ``[B or 1, H or 1, S or 1, S]``.
        context: for the cross-attention: ``[B, L, E]``, or its keys and values, each
            ``[B, L, H, head_dim]``.
        cross_mask: added to its scores, ``[B or 1, H or 1, S or 1, L]``.
        ff_rows: tokens whose hidden activations exist at once (more than ``S``: whole
            samples); all by default.
        heads_per_slice: heads of the self-attention whose keys and values exist at once; all
            by default.
        workspace: at least :func:`transformer_block_workspace` elements of the dtype and
            device of ``stream``, aligned to 64 bytes; allocated by default.

    Returns:
        ``stream``.

    Raises:
        ValueError: a shape, dtype, device or stride does not fit; nothing has been written.

    Source: adaLN blocks of DiT (arXiv 2212.09748, section 3.2) and PixArt (arXiv 2310.00426,
    section 2.3).
    """
    if weights.feed_forward.activation not in ACTIVATIONS:
        raise fails(
            _OP,
            f"activation is {weights.feed_forward.activation!r}; allowed: {', '.join(ACTIVATIONS)}",
        )
    if (context is None) != (weights.cross is None):
        raise fails(_OP, "cross-attention weights and a context go together; one is missing")
    if ff_rows is not None and ff_rows < 1:
        raise fails(_OP, f"ff_rows is {ff_rows}; it must be at least 1")
    if heads_per_slice is not None and heads_per_slice < 1:
        raise fails(_OP, f"heads_per_slice is {heads_per_slice}; it must be at least 1")
    if stream.dtype == torch.float64:
        return reference.transformer_block(
            stream, modulation, weights, mask=mask, context=context, cross_mask=cross_mask
        )
    if workspace is None and stream.dim() == 3:
        need = transformer_block_workspace(
            stream, weights, context=context, ff_rows=ff_rows, heads_per_slice=heads_per_slice
        )
        workspace = temporary(stream, need)
    elif workspace is None:
        workspace = stream.new_empty(0)
    norm1, attention, norm2, ff, cross = weights
    args = (
        stream, modulation, *norm1, *norm2,
        *_attention(attention), mask, heads_per_slice or 0,
        *((None,) * 8 + (1, 1.0) if cross is None else _attention(cross)), cross_mask,
        *((None, *context) if isinstance(context, tuple) else (context, None, None)),
        *ff.hidden, *ff.out, ACTIVATIONS[ff.activation], ff_rows or 0, workspace,
    )  # fmt: skip
    try:
        native.transformer_block(*args)
    except RuntimeError as error:
        explain(error, _fake, *args)
    return stream


def _attention(w: AttentionWeights) -> tuple[Any, ...]:
    none = (None, None)
    scale = w.scale
    if scale is None:
        scale = max(w.out.weight.shape[1] // max(w.heads, 1), 1) ** -0.5
    return (*w.q, *(w.k or none), *(w.v or none), *w.out, w.heads, scale)


def _check_linear(
    name: str, weight: Tensor | None, bias: Tensor | None, shape: tuple[int, int], like: Tensor
) -> None:
    if weight is None:
        raise fails(_OP, f"{name}_weight is missing")
    check_tensor(_OP, f"{name}_weight", weight, like)
    check_shape(_OP, f"{name}_weight", weight, shape)
    if not weight.is_contiguous():
        raise fails(_OP, f"{name}_weight has strides {weight.stride()}; it must be contiguous")
    if bias is not None:
        check_tensor(_OP, f"{name}_bias", bias, like)
        check_shape(_OP, f"{name}_bias", bias, shape[:1])
        _check_last_stride(f"{name}_bias", bias)


def _check_last_stride(name: str, t: Tensor) -> None:
    if t.numel() and t.shape[-1] > 1 and t.stride(-1) != 1:
        raise fails(_OP, f"the last stride of {name} is {t.stride(-1)}; it must be 1")


def _check_mask(name: str, mask: Tensor | None, full: tuple[int, ...], like: Tensor) -> None:
    if mask is None:
        return
    check_tensor(_OP, name, mask, like)
    fits = mask.dim() == 4 and mask.shape[3] == full[3]
    if not fits or any(n not in (1, m) for n, m in zip(mask.shape[:3], full, strict=False)):
        raise fails(
            _OP,
            f"{name} has shape {tuple(mask.shape)}; expected {full}, with 1 allowed in the "
            "first three",
        )
    _check_last_stride(name, mask)


def _check_heads(name: str, heads: int, inner: int) -> None:
    if heads < 1 or inner % heads:
        raise fails(_OP, f"{name} is {heads}; it must divide the {inner} channels")


@_register_fake(_OP)
def _fake(
    stream: Tensor, modulation: Tensor,
    norm1_weight: Tensor | None, norm1_bias: Tensor | None, norm1_eps: float,
    norm2_weight: Tensor | None, norm2_bias: Tensor | None, norm2_eps: float,
    q_weight: Tensor, q_bias: Tensor | None, k_weight: Tensor | None, k_bias: Tensor | None,
    v_weight: Tensor | None, v_bias: Tensor | None, out_weight: Tensor, out_bias: Tensor | None,
    heads: int, scale: float, mask: Tensor | None, heads_per_slice: int,
    cross_q_weight: Tensor | None, cross_q_bias: Tensor | None,
    cross_k_weight: Tensor | None, cross_k_bias: Tensor | None,
    cross_v_weight: Tensor | None, cross_v_bias: Tensor | None,
    cross_out_weight: Tensor | None, cross_out_bias: Tensor | None,
    cross_heads: int, cross_scale: float, cross_mask: Tensor | None,
    context: Tensor | None, keys: Tensor | None, values: Tensor | None,
    ff_in_weight: Tensor, ff_in_bias: Tensor | None,
    ff_out_weight: Tensor, ff_out_bias: Tensor | None,
    activation: int, ff_rows: int, workspace: Tensor,
) -> None:  # fmt: skip
    check_tensor(_OP, "stream", stream)
    if stream.dim() != 3:
        raise fails(_OP, f"stream has shape {tuple(stream.shape)}; expected [B, S, D]")
    if not stream.is_contiguous():
        raise fails(_OP, f"stream has strides {stream.stride()}; it must be contiguous")
    batch, length, width = stream.shape
    check_tensor(_OP, "modulation", modulation, stream)
    check_shape(_OP, "modulation", modulation, (batch, 6, width))
    _check_last_stride("modulation", modulation)
    norms = {
        "norm1_weight": norm1_weight, "norm1_bias": norm1_bias,
        "norm2_weight": norm2_weight, "norm2_bias": norm2_bias,
    }  # fmt: skip
    for name, t in norms.items():
        if t is not None:
            check_tensor(_OP, name, t, stream)
            check_shape(_OP, name, t, (width,))
            _check_last_stride(name, t)
    inner = out_weight.shape[-1]
    _check_linear("out", out_weight, out_bias, (width, inner), stream)
    if k_weight is None and v_weight is None:
        _check_linear("q", q_weight, q_bias, (3 * inner, width), stream)
    else:
        for name, weight, bias in (
            ("q", q_weight, q_bias), ("k", k_weight, k_bias), ("v", v_weight, v_bias)
        ):  # fmt: skip
            _check_linear(name, weight, bias, (inner, width), stream)
    _check_heads("heads", heads, inner)
    _check_mask("mask", mask, (batch, heads, length, length), stream)
    if cross_q_weight is not None:
        cross_inner = cross_q_weight.shape[0]
        _check_linear("cross_q", cross_q_weight, cross_q_bias, (cross_inner, width), stream)
        _check_linear("cross_out", cross_out_weight, cross_out_bias, (width, cross_inner), stream)
        _check_heads("cross_heads", cross_heads, cross_inner)
        if context is not None:
            check_tensor(_OP, "context", context, stream)
            if context.dim() != 3 or context.shape[0] != batch or context.shape[1] < 1:
                raise fails(
                    _OP, f"context has shape {tuple(context.shape)}; expected [{batch}, L, E]"
                )
            if not context.is_contiguous():
                raise fails(_OP, f"context has strides {context.stride()}; it must be contiguous")
            tokens = context.shape[1]
            shape = (cross_inner, context.shape[2])
            _check_linear("cross_k", cross_k_weight, cross_k_bias, shape, stream)
            _check_linear("cross_v", cross_v_weight, cross_v_bias, shape, stream)
        else:
            if keys is None or values is None or keys.dim() != 4 or keys.shape[1] < 1:
                raise fails(_OP, "cross-attention needs a context, or keys and values")
            tokens = keys.shape[1]
            shape4 = (batch, tokens, cross_heads, cross_inner // cross_heads)
            for name, given in (("keys", keys), ("values", values)):
                check_tensor(_OP, name, given, stream)
                check_shape(_OP, name, given, shape4)
                _check_last_stride(name, given)
        _check_mask("cross_mask", cross_mask, (batch, cross_heads, length, tokens), stream)
    hidden = ff_in_weight.shape[0]
    _check_linear("ff_in", ff_in_weight, ff_in_bias, (hidden, width), stream)
    gated = activation in (ACTIVATIONS["geglu"], ACTIVATIONS["geglu_tanh"])
    if gated and hidden % 2:
        raise fails(_OP, f"ff_in_weight has {hidden} rows; geglu needs an even number")
    shape = (width, hidden // 2 if gated else hidden)
    _check_linear("ff_out", ff_out_weight, ff_out_bias, shape, stream)
    check_tensor(_OP, "workspace", workspace, stream)
    if workspace.numel() and not workspace.is_contiguous():
        raise fails(_OP, "workspace is not contiguous")
    check_cuda_built(_OP, stream)


@_register_fake(_PROJECTION)
def _fake_projection(x: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor) -> None:
    check_tensor(_PROJECTION, "x", x)
    if weight.dim() != 2 or weight.shape[1] != x.shape[1] or not weight.is_contiguous():
        raise fails(
            _PROJECTION,
            f"weight has shape {tuple(weight.shape)}; expected contiguous [N, {x.shape[1]}]",
        )
    check_tensor(_PROJECTION, "weight", weight, x)
    if bias is not None:
        check_tensor(_PROJECTION, "bias", bias, x)
        check_shape(_PROJECTION, "bias", bias, weight.shape[:1])
    check_shape(_PROJECTION, "out", out, (x.shape[0], weight.shape[0]))
    check_cuda_built(_PROJECTION, x)
