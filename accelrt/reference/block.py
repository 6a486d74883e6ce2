"""Reference of the transformer block, and the weights that it takes."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ._common import accumulation_dtype, store
from .layer_norm import layer_norm_modulate
from .linear import activated


class LinearWeights(NamedTuple):
    """``weight`` ``[N, K]`` and ``bias`` ``[N]`` of a linear layer."""

    weight: Tensor
    bias: Tensor | None = None


class NormWeights(NamedTuple):
    """``weight`` and ``bias`` ``[D]`` of a LayerNorm; ``eps`` is added to the variance."""

    weight: Tensor | None = None
    bias: Tensor | None = None
    eps: float = 1e-5


class AttentionWeights(NamedTuple):
    """An attention layer with ``I = heads * head_dim`` inner channels.

    Args:
        q: ``[I, D]``; or ``[3 * I, D]``, queries, keys and values in one, if ``k`` and ``v``
            are ``None``.
        k, v: ``[I, D]``, or ``[I, E]`` for a context of width ``E``.
        out: ``[D, I]``.
        heads: number of heads.
        scale: of the scores; ``head_dim ** -0.5`` by default.
    """

    q: LinearWeights
    k: LinearWeights | None
    v: LinearWeights | None
    out: LinearWeights
    heads: int
    scale: float | None = None


class FeedForwardWeights(NamedTuple):
    """A feed-forward layer with ``F`` hidden channels.

    Args:
        hidden: ``[F, D]``; of a GEGLU ``[2 * F, D]``, the values and then their gates.
        out: ``[D, F]``.
        activation: ``"gelu"``, ``"gelu_tanh"``, ``"geglu"`` or ``"geglu_tanh"``.
    """

    hidden: LinearWeights
    out: LinearWeights
    activation: str = "gelu_tanh"


class BlockWeights(NamedTuple):
    """The layers of a transformer block; ``cross`` is its cross-attention, if it has one."""

    norm1: NormWeights
    attention: AttentionWeights
    norm2: NormWeights
    feed_forward: FeedForwardWeights
    cross: AttentionWeights | None = None


#: ``[B, L, E]``, or its keys and values, each ``[B, L, H, head_dim]``.
BlockContext = Tensor | tuple[Tensor, Tensor]


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
    """A modulated transformer block, in place; see :func:`accelrt.ops.transformer_block`."""
    acc = accumulation_dtype(stream)
    x = stream.to(acc)
    shift, scale, gate, ff_shift, ff_scale, ff_gate = modulation.to(acc).unbind(1)

    def norm(w: NormWeights, scale: Tensor, shift: Tensor) -> Tensor:
        return layer_norm_modulate(
            x, _to(w.weight, acc), _to(w.bias, acc), scale=scale, shift=shift, eps=w.eps
        )

    y = _attention(norm(weights.norm1, scale, shift), None, weights.attention, mask, acc)
    x = x + gate[:, None] * y
    if weights.cross is not None:
        x = x + _attention(x, context, weights.cross, cross_mask, acc)
    ff = weights.feed_forward
    h = _linear(norm(weights.norm2, ff_scale, ff_shift), ff.hidden, acc)
    h = activated(h, ff.activation)
    return store(x + ff_gate[:, None] * _linear(h, ff.out, acc), stream, stream)


def _to(t: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    return None if t is None else t.to(dtype)


def _linear(x: Tensor, w: LinearWeights, acc: torch.dtype) -> Tensor:
    return F.linear(x, w.weight.to(acc), _to(w.bias, acc))


def _attention(
    x: Tensor,
    context: BlockContext | None,
    w: AttentionWeights,
    mask: Tensor | None,
    acc: torch.dtype,
) -> Tensor:
    q = _linear(x, w.q, acc)
    if isinstance(context, tuple):
        k, v = (t.to(acc).flatten(2) for t in context)
    elif w.k is None or w.v is None:
        q, k, v = q.chunk(3, dim=-1)
    else:
        source = x if context is None else context.to(acc)
        k, v = _linear(source, w.k, acc), _linear(source, w.v, acc)

    def heads(t: Tensor) -> Tensor:  # [B, S, H * D] -> [B, H, S, D]
        return t.reshape(*t.shape[:2], w.heads, -1).transpose(1, 2)

    q, k, v = heads(q), heads(k), heads(v)
    scores = q @ k.transpose(-1, -2) * (q.shape[-1] ** -0.5 if w.scale is None else w.scale)
    if mask is not None:
        scores = scores + mask.to(acc)
    mixed = torch.softmax(scores, dim=-1) @ v
    return _linear(mixed.transpose(1, 2).flatten(2), w.out, acc)
