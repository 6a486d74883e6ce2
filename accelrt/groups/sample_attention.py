"""Attention layers of image transformers, called on slices of samples."""

from __future__ import annotations

from typing import Any

import torch
from diffusers.models.attention_processor import AttnProcessor
from torch import Tensor

from .attention import attention_reason, mix
from .recognise import is_plain_linear


def mask_by_sample(mask: Tensor, batch: int, heads: int, queries: int, keys: int) -> Tensor | None:
    """The bias of a call as ``[B, 1 or H, 1 or S, K]``, or ``None`` if it is no such thing.

    Args:
        mask: ``[B, Q, K]`` for all heads, or ``[B * H, Q, K]``; ``Q`` is 1 or ``S``. The
            stock layers take other shapes too, or say what is wrong with them.
        batch, heads, queries, keys: of the layer.
    """
    if mask.dim() != 3 or mask.shape[2] != keys or mask.shape[1] not in (1, queries):
        return None
    if mask.shape[0] not in (batch, batch * heads):
        return None
    return mask.view(batch, mask.shape[0] // batch, *mask.shape[1:])


class SampleAttention:
    """One attention layer of a block, for slices of samples.

    Args:
        attn: the layer; run as it came unless it is recognised.
        fuse: ``False`` to run it as it came anyway.
        dtype: of the residual stream.
        context: ``[B, L, E]`` for cross-attention, or ``None``.
        mask: from :func:`mask_by_sample`, or ``None``.
    """

    def __init__(
        self,
        attn: Any,
        fuse: bool,
        dtype: torch.dtype,
        context: Tensor | None = None,
        mask: Tensor | None = None,
    ) -> None:
        self.attn = attn
        self.context = context
        self.mask = mask
        self.known = fuse and not attention_reason(attn)
        if self.known and mask is not None and type(attn.processor) is AttnProcessor:
            # The scores and the mask meet in one addition there, which may not mix dtypes.
            self.known = mask.dtype == dtype and not attn.upcast_attention
        self.fresh = self.known and is_plain_linear(attn.to_out[0])

    @property
    def keeps_input(self) -> bool:
        """Somebody may look at the input after the call: it must not be overwritten."""
        return not (self.known and is_plain_linear(self.attn.to_q))

    def attend(self, x: Tensor, samples: slice) -> Tensor:
        """Attention of the tokens ``[n, S, D]`` of some samples."""
        attn = self.attn
        context = None if self.context is None else self.context[samples]
        mask = None if self.mask is None else self.mask[samples]
        if not self.known:
            stock_mask = None if mask is None else mask.flatten(0, 1)
            y: Tensor = attn(x, encoder_hidden_states=context, attention_mask=stock_mask)
            return y
        source = x if context is None else context
        q, k, v = attn.to_q(x), attn.to_k(source), attn.to_v(source)
        del x, source  # a normed slice that nobody else needs
        mixed = mix(attn, q, k, v, mask)
        del q, k, v
        projected: Tensor = attn.to_out[0](mixed)
        return projected
