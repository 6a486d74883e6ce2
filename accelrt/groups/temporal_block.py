"""The inside of a ``TemporalBasicTransformerBlock``: one sub-layer more than a spatial one."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from diffusers.models.attention import TemporalBasicTransformerBlock
from torch import Tensor, nn

from accelrt.config import Config
from accelrt.memory.arena import temporary

from .attention import CrossAttention, attention_reason, by_pixel, temporal_self_attention
from .feed_forward import FeedForwardRunner, activation_remark, feed_forward_reason
from .recognise import is_plain, plain_norm
from .transformer_block import SubLayers

_NORMS = ("norm_in", "norm1", "norm2", "norm3")


def temporal_block_reason(module: nn.Module) -> str:
    """Why a block must be called as it came; empty if its parts can be run one by one."""
    if not is_plain(module, TemporalBasicTransformerBlock):
        return f"{type(module).__name__} is not a plain TemporalBasicTransformerBlock"
    block: Any = module
    return "" if block.is_res else "the block has no residual connections"


def temporal_block_parts(module: nn.Module) -> list[str]:
    """Remarks about parts of a recognised block that have no fused operator."""
    block: Any = module
    remarks = []
    for name in _NORMS:
        norm = getattr(block, name)
        if norm is not None and not plain_norm(norm, nn.LayerNorm, None):
            remarks.append(f"{name}: {type(norm).__name__} runs as it came")
    for name in ("attn1", "attn2"):
        attn = getattr(block, name)
        if attn is not None and attention_reason(attn):
            remarks.append(f"{name}: {attention_reason(attn)}")
    for name in ("ff_in", "ff"):
        layer = getattr(block, name)
        reason = feed_forward_reason(layer) or activation_remark(layer)
        if reason:
            remarks.append(f"{name}: {reason}")
    return remarks


class TemporalBlockRunner(SubLayers):
    """Runs a recognised block on pixels with all their frames, ``[B * T, P, D]``.

    Args:
        module: a block for which :func:`temporal_block_reason` is empty.
        config: ``fuse`` and ``ff_rows``.
        x: any tensor of the dtype of the stream.
        frames: ``T``.
        context: ``[B, L, E]``, one row per sample.
    """

    def __init__(
        self, module: nn.Module, config: Config, x: Tensor, frames: int, context: Tensor
    ) -> None:
        super().__init__(module, config, x.dtype, _NORMS)
        block = self.block
        self.feed_in = FeedForwardRunner(block.ff_in, config)
        self.first: Callable[[Tensor], Tensor]
        self.second: Callable[[Tensor], Tensor] | None = None
        self.constant: Tensor | None = None
        if attention_reason(block.attn1) or not config.fuse:
            self.first = partial(by_pixel, block.attn1, frames=frames)
        else:
            self.first = partial(temporal_self_attention, block.attn1, frames=frames)
        if block.attn2 is None:
            return
        if attention_reason(block.attn2) or not config.fuse:
            self.second = partial(by_pixel, block.attn2, frames=frames, context=context)
            return
        # Frames and pixels of a sample are one long query.
        cross = CrossAttention(block.attn2, None, context, frames)
        images = context.shape[0] * frames
        self.second = partial(cross, start=0, stop=images)
        self.constant = cross.constant(0, images)

    def __call__(self, spatial: Tensor, position: Tensor) -> Tensor:
        """The temporal features, a new contiguous tensor.

        Args:
            spatial: ``[B * T, P, D]``, the spatial stream of some pixels.
            position: ``[B * T, D]``, the embedding of each frame's position.
        """
        mix = temporary(spatial, *spatial.shape)
        placed = position[:, None, :].expand_as(spatial)
        normed: Tensor | None = self.norms.add_norm("norm_in", placed, spatial, into=mix)
        assert normed is not None
        if self.norms.fused["norm_in"]:  # the normed tensor is ours to write to
            self.feed_in(normed, mix, add=self._add_norm1)
        else:
            self.feed_in(normed, mix)
            normed = None
        self.run(mix, self.first, self.second, normed=normed, constant=self.constant)
        return mix

    def _add_norm1(self, y: Tensor, stream: Tensor, normed: Tensor) -> None:
        """Add a slice of ``ff_in`` to the stream, and put ``norm1`` of the sum in ``normed``."""
        result = self.norms.add_norm("norm1", y, stream, out=normed)
        if result is not normed:
            normed.copy_(result)
