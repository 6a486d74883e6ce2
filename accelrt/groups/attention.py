"""Attention layers: spatial, cross and temporal, on channels-last tokens."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from diffusers.models.attention_processor import Attention, AttnProcessor, AttnProcessor2_0
from torch import Tensor, nn

from accelrt import ops

from .recognise import is_inactive_dropout, is_plain, is_plain_linear, is_row_wise

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
    """``[n, S, H * D]`` to ``[n, H, S, D]``, a view."""
    return x.view(*x.shape[:-1], heads, -1).transpose(1, 2)


def attend(attn: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Scaled dot-product attention of ``[n, S, C]`` with ``[n, L, C]``, and ``to_out``."""
    # AttnProcessor2_0 ignores attn.scale, the older processor uses it.
    scale = attn.scale if type(attn.processor) is AttnProcessor else None
    y = F.scaled_dot_product_attention(
        _heads(q, attn.heads), _heads(k, attn.heads), _heads(v, attn.heads), scale=scale
    )
    projected: Tensor = attn.to_out[0](y.transpose(1, 2).flatten(2))
    return projected


def self_attention(attn: Any, x: Tensor) -> Tensor:
    """Self-attention of tokens ``[n, S, C]``."""
    return attend(attn, attn.to_q(x), attn.to_k(x), attn.to_v(x))


class CrossAttention:
    """Cross-attention for slices of images, with keys and values per sample if possible.

    Args:
        attn: a recognised attention layer.
        full: context ``[N, L, D]``, one row per image.
        shared: ``[B, L, D]`` if all frames of a sample share their context, or ``None``.
        frames: frames per sample.
    """

    def __init__(self, attn: Any, full: Tensor, shared: Tensor | None, frames: int) -> None:
        self.attn = attn
        self.full = full
        self.frames = frames
        self.shared: tuple[Tensor, Tensor] | None = None
        if shared is not None:
            self.shared = (attn.to_k(shared), attn.to_v(shared))

    def __call__(self, x: Tensor, start: int, stop: int) -> Tensor:
        """Attention of tokens ``[n, S, C]`` of the images ``start`` to ``stop``."""
        attn = self.attn
        q = attn.to_q(x)
        if self.shared is None:
            context = self.full[start:stop]
            return attend(attn, q, attn.to_k(context), attn.to_v(context))
        images, length, width = q.shape
        first, last = start // self.frames, (stop - 1) // self.frames
        k, v = (t[first : last + 1] for t in self.shared)
        if first == last or images == (last + 1 - first) * self.frames:
            # The frames of a sample are one long query.
            samples = last + 1 - first
            y = attend(attn, q.reshape(samples, -1, width), k, v)
            return y.view(images, length, -1)
        sample = torch.arange(start, stop, device=x.device) // self.frames - first
        return attend(attn, q, k[sample], v[sample])


def temporal_self_attention(attn: Any, x: Tensor, frames: int) -> Tensor:
    """Attention along the frames of every pixel.

    Args:
        attn: a recognised attention layer.
        x: ``[B * T, P, C]``, frames outermost: no permuted copy is made.
        frames: ``T``.
    """
    pixels, width = x.shape[1], attn.inner_dim
    projections = (attn.to_q, attn.to_k, attn.to_v)
    q, k, v = (projection(x).reshape(-1, frames, pixels, width) for projection in projections)
    scale = attn.scale if type(attn.processor) is AttnProcessor else None
    if frames <= MAX_FRAMES and width // attn.heads <= MAX_HEAD_DIM:
        out = q if is_plain_linear(attn.to_q) else None
        y = ops.temporal_attention(q, k, v, attn.heads, scale=scale, out=out)
    else:
        y = _temporal_by_permutation(q, k, v, attn.heads, scale)
    projected: Tensor = attn.to_out[0](y.view(-1, pixels, width))
    return projected


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
