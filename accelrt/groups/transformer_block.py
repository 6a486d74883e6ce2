"""The inside of a ``BasicTransformerBlock``, shared by spatial and motion transformers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.embeddings import SinusoidalPositionalEmbedding
from torch import Tensor, nn

from accelrt import ops
from accelrt.config import Config

from .attention import attention_reason
from .feed_forward import FeedForwardRunner, activation_remark, feed_forward_reason
from .recognise import is_plain, is_plain_linear, plain_norm
from .state import with_rows


def block_reason(module: nn.Module) -> str:
    """Why a block must be called as it came; empty if its parts can be run one by one."""
    if not is_plain(module, BasicTransformerBlock):
        return f"{type(module).__name__} is not a plain BasicTransformerBlock"
    block: Any = module
    if block.norm_type != "layer_norm":
        return f"norm_type {block.norm_type!r} runs as it came"
    if block.only_cross_attention:
        return "only_cross_attention runs as it came"
    if block._chunk_size is not None:
        return "forward chunking is enabled"
    return ""


def block_parts(module: nn.Module) -> list[str]:
    """Remarks about parts of a recognised block that have no fused operator."""
    block: Any = module
    remarks = []
    for name in ("norm1", "norm2", "norm3"):
        norm = getattr(block, name)
        if norm is not None and not plain_norm(norm, nn.LayerNorm, None):
            remarks.append(f"{name}: {type(norm).__name__} runs as it came")
    for name in ("attn1", "attn2"):
        attn = getattr(block, name)
        if attn is not None and attention_reason(attn):
            remarks.append(f"{name}: {attention_reason(attn)}")
    reason = feed_forward_reason(block.ff) or activation_remark(block.ff)
    if reason:
        remarks.append(reason)
    return remarks


class BlockRunner:
    """Runs a recognised block on a residual stream, in place.

    Each residual sum is fused with the LayerNorm of the next sub-layer.

    Args:
        module: a block for which :func:`block_reason` is empty.
        config: ``fuse`` and ``ff_rows``.
        x: any tensor of the dtype of the stream.
        frames: frames per sample; needed for a positional embedding.
    """

    def __init__(self, module: nn.Module, config: Config, x: Tensor, frames: int = 1) -> None:
        block: Any = module
        self.block = block
        self.fuse = config.fuse
        self.dtype = x.dtype
        self.frames = frames
        self.feed_forward = FeedForwardRunner(block.ff, config)
        self.shift = self._position_shift(x)
        self.fused = {
            name: config.fuse and plain_norm(getattr(block, name), nn.LayerNorm, x.dtype)
            for name in ("norm1", "norm2", "norm3")
        }

    def _position_shift(self, x: Tensor) -> Tensor | None:
        """The positional embedding as a shift per image, ``[N, D]``."""
        position: Any = self.block.pos_embed
        if position is None or not self.positions_known(x):
            return None
        table: Tensor = position.pe[0, : self.frames]
        return table.repeat(x.shape[0] // self.frames, 1)

    def positions_known(self, x: Tensor) -> bool:
        """The positional embedding is absent, or plain, long enough and of our dtype."""
        position: Any = self.block.pos_embed
        return position is None or (
            is_plain(position, SinusoidalPositionalEmbedding)
            and position.pe.dtype == x.dtype
            and position.pe.shape[1] >= self.frames
        )

    def _norm(self, name: str, x: Tensor, shift: Tensor | None) -> Tensor:
        norm: Any = getattr(self.block, name)
        if self.fused[name]:
            return ops.layer_norm_modulate(x, norm.weight, norm.bias, shift=shift, eps=norm.eps)
        y: Tensor = norm(x)
        return y if shift is None else y + shift[:, None, :]

    def _add_norm(
        self, name: str, y: Tensor, stream: Tensor, shift: Tensor | None, overwrite: bool
    ) -> Tensor:
        """``stream += y``; returns the norm ``name`` of it."""
        norm: Any = getattr(self.block, name)
        if self.fused[name] and y.dtype == stream.dtype:
            y = with_rows(y)
            normed, _ = ops.gate_residual_layer_norm_modulate(
                y, stream, None, norm.weight, norm.bias, shift=shift, eps=norm.eps,
                out=y if overwrite else None, residual_out=stream,
            )  # fmt: skip
            return normed
        stream.add_(y)
        return self._norm(name, stream, shift)

    def __call__(
        self,
        stream: Tensor,
        first: Callable[[Tensor], Tensor],
        second: Callable[[Tensor], Tensor] | None,
    ) -> None:
        """Run the block on ``stream`` ``[n, S, D]``, contiguous, in place.

        Args:
            stream: the residual stream.
            first: the first attention layer, from the normed stream to its output.
            second: the second one, or ``None``.
        """
        block, shift = self.block, self.shift
        y = first(self._norm("norm1", stream, shift))
        if second is not None:
            normed = self._add_norm("norm2", y, stream, shift, _fresh(block.attn1))
            del y
            y = second(normed)
            del normed
        attn = block.attn1 if second is None else block.attn2
        normed = self._add_norm("norm3", y, stream, None, _fresh(attn))
        del y
        self.feed_forward(normed, stream)


def _fresh(attn: Any) -> bool:
    """The layer's output is a new tensor that nobody else sees."""
    return not attention_reason(attn) and is_plain_linear(attn.to_out[0])
