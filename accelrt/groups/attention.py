"""Attention layers: spatial, cross and temporal, on channels-last tokens."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.models.attention_processor import Attention, AttnProcessor, AttnProcessor2_0
from torch import Tensor, nn

from accelrt import ops

from .products import attention, project
from .recognise import is_inactive_dropout, is_plain, is_plain_linear, is_row_wise
from .spare import Spare

MAX_FRAMES = 64
MAX_HEAD_DIM = 256


def attention_reason(module: nn.Module, *, in_vae: bool = False) -> str:
    """Why an attention layer must run as it came; empty if it is recognised.

    Args:
        module: the layer.
        in_vae: allow the GroupNorm and the residual connection of VAE attention.
    """
    if not is_plain(module, Attention):
        return f"{type(module).__name__} is not a plain Attention"
    attn: Any = module
    processor = type(attn.processor)
    if processor not in (AttnProcessor2_0, AttnProcessor):
        return f"processor {processor.__name__} runs as it came"
    if attn.spatial_norm is not None or attn.norm_q is not None or attn.norm_k is not None:
        return "spatial or query-key norm"
    if attn.norm_cross is not None or attn.added_kv_proj_dim is not None:
        return "normed or added keys and values"
    if attn.inner_dim != attn.inner_kv_dim or attn.to_k is None:
        return "grouped keys and values"
    if not in_vae and (
        attn.group_norm is not None or attn.residual_connection or attn.rescale_output_factor != 1.0
    ):
        return "a norm or residual inside the attention layer"
    if not all(is_row_wise(m) for m in (attn.to_q, attn.to_k, attn.to_v, attn.to_out[0])):
        return "projections of an unknown kind"
    if not is_inactive_dropout(attn.to_out[1]):
        return "dropout is active"
    return ""


def _heads(x: Tensor, heads: int) -> Tensor:
    """``[n, S, H * D]`` to ``[n, S, H, D]``, a view."""
    return x.view(*x.shape[:-1], heads, -1)


def mix(attn: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """Scaled dot-product attention of ``[n, S, C]`` with ``[n, L, C]``, before ``to_out``.

    Args:
        attn: a recognised attention layer.
        q, k, v: queries ``[n, S, C]``, keys and values ``[n, L, C]``.
        mask: ``[n, 1 or H, 1 or S, L]``, added to the scores (or boolean), or ``None``.
    """
    # AttnProcessor2_0 ignores attn.scale, the older processor uses it.
    scale = attn.scale if type(attn.processor) is AttnProcessor else None
    q, k, v = (_heads(t, attn.heads) for t in (q, k, v))
    # Nobody else sees the queries of a plain layer.
    return attention(q, k, v, mask, scale=scale, overwrite=is_plain_linear(attn.to_q))


def attend(
    attn: Any,
    qkv: Iterable[Tensor],
    mask: Tensor | None = None,
    spare: Spare | None = None,
) -> Tensor:
    """Attention of ``[n, S, C]`` with ``[n, L, C]``, and ``to_out``.

    Args:
        attn: a recognised attention layer.
        qkv: queries, keys and values, which should have no other reference: those that are not
            written over are let go before the output is made.
        mask: as for :func:`mix`.
        spare: where the output may go.
    """
    q, k, v = qkv
    mixed = mix(attn, q, k, v, mask)
    del qkv, q, k, v
    return project(attn.to_out[0], mixed, spare=spare)


def self_attention(
    attn: Any, x: Tensor, mask: Tensor | None = None, spares: Sequence[Spare] = ()
) -> Tensor:
    """Self-attention of tokens ``[n, S, C]``.

    Args:
        attn: a recognised attention layer.
        x: the tokens.
        mask: as for :func:`mix`.
        spares: where products go: the output, which may be over ``x``, queries, keys, values.
    """
    out, *parts = spares or (None,) * 4
    layers = zip((attn.to_q, attn.to_k, attn.to_v), parts, strict=True)
    return attend(attn, (project(layer, x, spare=spare) for layer, spare in layers), mask, out)


class CrossAttention:
    """Cross-attention for slices of images, with keys and values per sample if possible.

    With one key the softmax is one whatever the query, so the layer adds the same vector
    to every token of an image: ``to_out(to_v(context))``.

    Args:
        attn: a recognised attention layer.
        full: context ``[N, L, D]``, one row per image; ``None`` if ``shared`` is given.
        shared: ``[B, L, D]`` if all frames of a sample share their context, or ``None``.
        frames: frames per sample.
        mask: bias ``[N, 1 or S, L]`` of the scores, or ``None``.
    """

    def __init__(
        self,
        attn: Any,
        full: Tensor | None,
        shared: Tensor | None,
        frames: int,
        mask: Tensor | None = None,
    ) -> None:
        self.attn = attn
        self.mask = mask
        self.full = full
        self.frames = frames
        self.shared: tuple[Tensor, Tensor] | None = None
        context = full if shared is None else shared
        if context is None:
            raise ValueError("cross-attention needs a context: full and shared are None")
        self.rows: Tensor | None = None  # [B or N, 1, D]: what every token gets
        if context.shape[1] == 1 and mask is None and _ignores_queries(attn):
            self.rows = project(attn.to_out[0], project(attn.to_v, context))
        elif shared is not None:
            self.shared = (project(attn.to_k, shared), project(attn.to_v, shared))
        self._per_sample = shared is not None

    def constant(self, start: int, stop: int) -> Tensor | None:
        """What every token of the images ``start`` to ``stop`` gets, ``[n, 1, D]``.

        ``None`` if it depends on the token.
        """
        if self.rows is None:
            return None
        return rows_of_images(self.rows, start, stop, self.frames if self._per_sample else 1)

    def __call__(self, x: Tensor, start: int, stop: int) -> Tensor:
        """Attention of tokens ``[n, S, C]`` of the images ``start`` to ``stop``."""
        constant = self.constant(start, stop)
        if constant is not None:
            return constant.repeat(1, x.shape[1], 1)  # the caller may write to it
        attn = self.attn
        mask = None if self.mask is None else self.mask[start:stop, None]
        if self.shared is None:
            assert self.full is not None
            context = self.full[start:stop]
            inputs = ((attn.to_q, x), (attn.to_k, context), (attn.to_v, context))
            return attend(attn, (project(layer, tokens) for layer, tokens in inputs), mask)
        images, length, _ = x.shape
        first, last = start // self.frames, (stop - 1) // self.frames
        k, v = (t[first : last + 1] for t in self.shared)
        if self.frames == 1:
            return attend(attn, (project(attn.to_q, x), k, v), mask)
        if mask is None and (first == last or images == (last + 1 - first) * self.frames):
            # The frames of a sample are one long query.
            samples = last + 1 - first
            y = attend(attn, (project(attn.to_q, x).reshape(samples, -1, attn.inner_dim), k, v))
            return y.view(images, length, -1)
        sample = torch.arange(start, stop, device=x.device) // self.frames - first
        return attend(attn, (project(attn.to_q, x), k[sample], v[sample]), mask)


def _ignores_queries(attn: Any) -> bool:
    """Queries and keys have no reader but the softmax: no hook sees them."""
    return is_plain_linear(attn.to_q) and is_plain_linear(attn.to_k)


def rows_of_images(rows: Tensor, start: int, stop: int, frames: int) -> Tensor:
    """One row per image from one row per sample: ``[B, ...]`` to ``[stop - start, ...]``."""
    if frames == 1:
        return rows[start:stop]
    return rows[torch.arange(start, stop, device=rows.device) // frames]


def temporal_self_attention(attn: Any, x: Tensor, frames: int) -> Tensor:
    """Attention along the frames of every pixel.

    Args:
        attn: a recognised attention layer.
        x: ``[B * T, P, C]``, frames outermost: no permuted copy is made.
        frames: ``T``.
    """
    pixels, width = x.shape[1], attn.inner_dim
    projections = (attn.to_q, attn.to_k, attn.to_v)
    q, k, v = (project(layer, x).reshape(-1, frames, pixels, width) for layer in projections)
    scale = attn.scale if type(attn.processor) is AttnProcessor else None
    if frames <= MAX_FRAMES and width // attn.heads <= MAX_HEAD_DIM:
        out = q if is_plain_linear(attn.to_q) else None
        y = ops.temporal_attention(q, k, v, attn.heads, scale=scale, out=out)
    else:
        y = _temporal_by_permutation(q, k, v, attn.heads, scale)
    del q, k, v
    return project(attn.to_out[0], y.view(-1, pixels, width))


def _temporal_by_permutation(
    q: Tensor, k: Tensor, v: Tensor, heads: int, scale: float | None
) -> Tensor:
    """Temporal attention beyond the operator's limits, ``[B, T, P, H * D]``."""
    batch, frames, pixels, width = q.shape

    def moved(t: Tensor) -> Tensor:  # [B * P, H, T, D]
        return t.view(batch, frames, pixels, heads, -1).permute(0, 2, 3, 1, 4).flatten(0, 1)

    y = F.scaled_dot_product_attention(moved(q), moved(k), moved(v), scale=scale)
    y = y.view(batch, pixels, heads, frames, -1).permute(0, 3, 1, 2, 4)
    return y.reshape(batch, frames, pixels, width)


def by_pixel(module: Any, x: Tensor, frames: int, context: Tensor | None = None) -> Tensor:
    """Call a stock module on ``[B * P, T, D]``, the layout it expects.

    Args:
        module: a block or attention layer that attends along its sequence.
        x: ``[B * T, P, D]``.
        frames: ``T``.
        context: ``[B, L, E]`` for cross-attention, one row per sample.
    """
    _, pixels, width = x.shape
    moved = x.reshape(-1, frames, pixels, width).transpose(1, 2)  # [B, P, T, D]
    arguments: dict[str, Tensor] = {}
    if context is not None:
        arguments["encoder_hidden_states"] = context.repeat_interleave(pixels, dim=0)
    y: Tensor = module(moved.flatten(0, 1), **arguments)
    return y.reshape(-1, pixels, frames, width).transpose(1, 2).flatten(0, 1)
