"""A modulated block as one operator call, where everything in it is recognised."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from diffusers.models.activations import GEGLU, GELU
from diffusers.models.attention_processor import AttnProcessor
from torch import Tensor, nn

from accelrt import ops
from accelrt.config import Config
from accelrt.memory.arena import temporary

from .feed_forward import FeedForwardRunner
from .recognise import has_plain_weights, is_plain, is_plain_linear, plain_norm
from .sample_attention import SampleAttention
from .slicing import slice_length

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class BlockCall:
    """The weights of a block, for slices of samples that pass through it in one call.

    Args:
        weights: of its layers.
        attentions: self-attention and, if the block has it, cross-attention.
        feed_forward: gives the rows per slice.
        heads: of the self-attention whose keys and values exist at once.
    """

    def __init__(
        self,
        weights: ops.BlockWeights,
        attentions: Sequence[SampleAttention],
        feed_forward: FeedForwardRunner,
        heads: int,
    ) -> None:
        self.weights = weights
        self.attentions = attentions
        self.feed_forward = feed_forward
        self.heads = heads
        self._workspace: Tensor | None = None

    @classmethod
    def of(
        cls,
        norms: Sequence[Any],
        attentions: Sequence[SampleAttention],
        feed_forward: FeedForwardRunner,
        like: Tensor,
        config: Config,
    ) -> BlockCall | None:
        """The call, or ``None`` if some part must run by itself.

        Args:
            norms: before self-attention and before the feed-forward.
            attentions: self-attention, and cross-attention or not.
            feed_forward: of the block.
            like: the residual stream of the longest slice, ``[b, S, D]``.
            config: ``bands`` allows to cut the heads, ``slice_mib`` says how.
        """
        dtype = like.dtype
        if dtype not in _DTYPES or not feed_forward.known or len(attentions) > 2:
            return None
        if not all(plain_norm(norm, nn.LayerNorm, dtype) for norm in norms):
            return None
        layers = [_attention(layer, dtype) for layer in attentions]
        second = attentions[1] if len(attentions) > 1 else None
        ff = _feed_forward(feed_forward.module, dtype)
        if ff is None or layers[0] is None or layers[-1] is None:
            return None
        if attentions[0].context is not None:
            return None
        if second is not None and (
            second.context is None
            or second.context.dtype != dtype
            or not second.context.is_contiguous()
        ):
            return None
        first, last = (ops.NormWeights(norm.weight, norm.bias, norm.eps) for norm in norms)
        cross = None if second is None else layers[1]
        weights = ops.BlockWeights(first, layers[0], last, ff, cross)
        return cls(weights, attentions, feed_forward, _heads_per_slice(layers[0], like, config))

    def __call__(self, stream: Tensor, modulation: Tensor, samples: slice) -> None:
        """Run the block on some samples ``[b, S, D]``, in place.

        Args:
            stream: the samples; the first call has the most.
            modulation: ``[b, 6, D]``.
            samples: their place in the call, for context and masks.
        """
        first, *second = self.attentions
        mask = None if first.mask is None else first.mask[samples]
        context: Tensor | tuple[Tensor, Tensor] | None = None
        cross_mask = None
        if second:
            whole, bias = second[0].context, second[0].mask
            assert whole is not None
            weights = self.weights.cross
            assert weights is not None
            kept = second[0].kept_keys(lambda given: ops.context_keys(given, weights))
            context = whole[samples] if kept is None else (kept[0][samples], kept[1][samples])
            cross_mask = None if bias is None else bias[samples]
        rows = self.feed_forward.rows_of(stream)
        if self._workspace is None:
            need = ops.transformer_block_workspace(
                stream, self.weights, context=context, ff_rows=rows, heads_per_slice=self.heads
            )
            self._workspace = temporary(stream, need)
        ops.transformer_block(
            stream, modulation, self.weights, mask=mask, context=context, cross_mask=cross_mask,
            ff_rows=rows, heads_per_slice=self.heads, workspace=self._workspace,
        )  # fmt: skip


def _heads_per_slice(weights: ops.AttentionWeights, like: Tensor, config: Config) -> int:
    """As many heads as have keys and values of half of ``slice_mib``: queries and input stay."""
    if not config.bands:
        return weights.heads
    batch, length, _ = like.shape
    inner = weights.out.weight.shape[1]
    size = 4 * batch * length * (inner // weights.heads) * like.element_size()
    return slice_length(weights.heads, None, size, config, like.device)


def _linear(layer: Any, dtype: torch.dtype) -> ops.LinearWeights | None:
    if not is_plain_linear(layer) or not has_plain_weights(layer, dtype):
        return None
    if not layer.weight.is_contiguous():
        return None
    return ops.LinearWeights(layer.weight, layer.bias)


def _attention(layer: SampleAttention, dtype: torch.dtype) -> ops.AttentionWeights | None:
    if not layer.known or (layer.mask is not None and layer.mask.dtype != dtype):
        return None
    attn = layer.attn
    q, k, v, out = (_linear(m, dtype) for m in (attn.to_q, attn.to_k, attn.to_v, attn.to_out[0]))
    if q is None or k is None or v is None or out is None:
        return None
    # AttnProcessor2_0 ignores attn.scale, the older processor uses it.
    scale = float(attn.scale) if type(attn.processor) is AttnProcessor else None
    return ops.AttentionWeights(q, k, v, out, attn.heads, scale)


def _feed_forward(module: Any, dtype: torch.dtype) -> ops.FeedForwardWeights | None:
    first = module.net[0]
    if not is_plain(first, GEGLU, GELU):
        return None
    activation = "geglu"
    if isinstance(first, GELU):
        activation = "gelu_tanh" if first.approximate == "tanh" else "gelu"
    hidden, out = _linear(first.proj, dtype), _linear(module.net[2], dtype)
    if hidden is None or out is None:
        return None
    return ops.FeedForwardWeights(hidden, out, activation)
