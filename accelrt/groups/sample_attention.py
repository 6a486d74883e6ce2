"""Attention layers of image transformers, called on slices of samples."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from diffusers.models.attention_processor import AttnProcessor
from torch import Tensor, nn

from .attention import attention_reason, mix
from .products import attention, project
from .recognise import is_plain_linear, is_row_wise


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
        self._kept: tuple[dict[str, Any], str] | None = None

    def keep_keys(self, known: dict[str, Any] | None, name: str) -> None:
        """Take keys and values of the context from ``known[name]``, and put them there first.

        Args:
            known: of a request in which the context stays; ``None`` for none.
            name: of the layer.
        """
        attn = self.attn
        if known is None or self.context is None or not self.known:
            return
        if _is_free(attn.to_k) and _is_free(attn.to_v):
            self._kept = known, name

    def kept_keys(self, make: Callable[[Tensor], tuple[Tensor, Tensor]]) -> Any:
        """Keys and values of all samples' context, made by ``make`` once; ``None`` if not kept."""
        if self._kept is None or self.context is None:
            return None
        known, name = self._kept
        if name not in known:
            known[name] = make(self.context)
        return known[name]

    @property
    def keeps_input(self) -> bool:
        """Somebody may look at the input after the call: it must not be overwritten."""
        return not (self.known and is_plain_linear(self.attn.to_q))

    @property
    def by_tokens(self) -> bool:
        """Every projection may be called for some tokens of a sample only."""
        attn = self.attn
        return self.known and all(
            _is_free(layer) for layer in (attn.to_q, attn.to_k, attn.to_v, attn.to_out[0])
        )

    def attend(self, x: Tensor, samples: slice) -> Tensor:
        """Attention of the tokens ``[n, S, D]`` of some samples."""
        attn = self.attn
        context = None if self.context is None else self.context[samples]
        mask = None if self.mask is None else self.mask[samples]
        if not self.known:
            stock_mask = None if mask is None else mask.flatten(0, 1)
            y: Tensor = attn(x, encoder_hidden_states=context, attention_mask=stock_mask)
            return y
        q = project(attn.to_q, x)
        if context is None:
            k, v = project(attn.to_k, x), project(attn.to_v, x)
        else:
            k, v = self.context_keys(samples)
        del x  # a normed slice that nobody else needs
        mixed = mix(attn, q, k, v, mask)
        del q, k, v
        return project(attn.to_out[0], mixed)

    def context_keys(self, samples: slice) -> tuple[Tensor, Tensor]:
        """Keys and values ``[n, L, D]`` of the context of some samples."""
        attn = self.attn
        kept = self.kept_keys(lambda c: (project(attn.to_k, c), project(attn.to_v, c)))
        if kept is not None:
            k, v = (t[samples].flatten(2) for t in kept)
            return k, v
        assert self.context is not None
        context = self.context[samples]
        return project(attn.to_k, context), project(attn.to_v, context)

    def queries(self, x: Tensor, k: Tensor, v: Tensor, samples: slice, rows: slice) -> Tensor:
        """Attention of the tokens ``[n, s, D]`` of some samples, with keys that are made.

        Args:
            x: the tokens ``rows``.
            k, v: ``[n, L, D]``.
            samples, rows: their places in the call.
        """
        q = project(self.attn.to_q, x)
        del x
        mixed = self.mix(q, k, v, samples, rows)
        del q
        return project(self.attn.to_out[0], mixed)

    def mix(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        samples: slice,
        rows: slice,
        heads: slice = slice(None),
    ) -> Tensor:
        """Scaled dot-product attention ``[n, s, h * d]`` of some rows and heads.

        Args:
            q: ``[n, s, h * d]``.
            k, v: ``[n, L, h * d]``.
            samples, rows, heads: their places in the call, for the mask.
        """
        attn = self.attn
        mask = None if self.mask is None else self.mask[samples]
        if mask is not None and mask.shape[1] > 1:
            mask = mask[:, heads]
        if mask is not None and mask.shape[2] > 1:
            mask = mask[:, :, rows]
        if q.shape[2] == attn.inner_dim:
            return mix(attn, q, k, v, mask)
        width = attn.inner_dim // attn.heads
        # AttnProcessor2_0 ignores attn.scale, the older processor uses it.
        scale = attn.scale if type(attn.processor) is AttnProcessor else None
        q, k, v = (t.view(*t.shape[:2], -1, width) for t in (q, k, v))
        return attention(q, k, v, mask, scale=scale)


def _is_free(layer: nn.Module) -> bool:
    """Treats each row alone, and nobody counts its calls or loads its weights in them."""
    hooked = layer._forward_hooks or layer._forward_pre_hooks or "forward" in layer.__dict__
    return is_row_wise(layer) and not hooked
