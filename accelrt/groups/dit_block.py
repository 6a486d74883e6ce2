"""Blocks of an image transformer with adaLN-Zero modulation, sliced along samples."""

from __future__ import annotations

from typing import Any

from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.normalization import AdaLayerNormZero
from torch import Tensor, nn

from accelrt import ops

from .attention import attention_reason, self_attention
from .base import Group
from .feed_forward import FeedForwardRunner, activation_remark, feed_forward_reason
from .recognise import is_plain, is_plain_linear, plain_norm
from .slicing import slice_length
from .state import State, with_rows


class AdaLNBlockGroup(Group):
    """``BasicTransformerBlock`` with ``norm_type="ada_norm_zero"`` and self-attention.

    The modulation comes from the block's own embedding of timestep and class. Samples
    are independent; inside a slice of samples the feed-forward is sliced along tokens.
    """

    axis = "samples"
    classes = (BasicTransformerBlock,)

    def configured_length(self) -> int | None:
        """Samples per slice."""
        return self.config.samples_per_slice

    def unrecognised(self) -> str:
        """Besides hooks: blocks of another kind."""
        reason = super().unrecognised()
        if reason:
            return reason
        block: Any = self.module
        if block.norm_type != "ada_norm_zero":
            return f"norm_type {block.norm_type!r} is not known"
        if not is_plain(block.norm1, AdaLayerNormZero) or block.norm1.emb is None:
            return f"norm1: {type(block.norm1).__name__} is not a plain AdaLayerNormZero"
        if block.attn2 is not None or block.pos_embed is not None:
            return "cross-attention or positional embedding in the block"
        if block._chunk_size is not None:
            return "forward chunking is enabled"
        return ""

    def unfused(self) -> list[str]:
        """Norms, attention and activation that are not recognised."""
        block: Any = self.module
        remarks = []
        for name, norm in (("norm1", block.norm1.norm), ("norm3", block.norm3)):
            if not plain_norm(norm, nn.LayerNorm, None):
                remarks.append(f"{name}: {type(norm).__name__} runs as it came")
        attention = attention_reason(block.attn1)
        if attention:
            remarks.append(f"attn1: {attention}")
        reason = feed_forward_reason(block.ff) or activation_remark(block.ff)
        return [*remarks, reason] if reason else remarks

    def run(self, state: State) -> None:
        """``[B, S, D]`` to the same shape."""
        stream = state.take()
        inputs = state.inputs
        kwargs = inputs.get("cross_attention_kwargs")
        block: Any = self.module
        reason = self.unrecognised()
        if not reason and kwargs:
            reason = "cross_attention_kwargs were given"
        if reason:
            self.left_alone = reason
            state.hidden = block(
                stream,
                timestep=inputs["timestep"],
                class_labels=inputs["class_labels"],
                cross_attention_kwargs=kwargs,
            )
            state.hold(state.hidden)
            return
        norm1 = block.norm1
        emb = norm1.emb(inputs["timestep"], inputs["class_labels"], hidden_dtype=stream.dtype)
        modulation: Tensor = norm1.linear(norm1.silu(emb))
        if modulation.dtype != stream.dtype or modulation.shape[0] != stream.shape[0]:
            # One timestep for all samples broadcasts in the stock block.
            modulation = modulation.to(stream.dtype).expand(stream.shape[0], -1)
        if not stream.is_contiguous():  # the patch embedding leaves channels outermost
            stream = stream.contiguous()
        elif not (self.config.inplace and state.writable(stream)):
            stream = stream.clone()

        batch, length, width = stream.shape
        size = length * width * stream.element_size()
        n = slice_length(batch, self.config.samples_per_slice, size, self.config, stream.device)
        self.measured(n, batch)
        feed_forward = FeedForwardRunner(block.ff, self.config)
        for start in range(0, batch, n):
            part = slice(start, start + n)
            self._samples(stream[part], modulation[part], feed_forward)
        state.hidden = stream

    def _samples(self, stream: Tensor, modulation: Tensor, feed_forward: FeedForwardRunner) -> None:
        """Run the block on some samples ``[b, S, D]``, in place."""
        block: Any = self.module
        norm1, norm3 = block.norm1.norm, block.norm3
        shift1, scale1, gate1, shift2, scale2, gate2 = modulation.chunk(6, dim=1)
        fuse = self.config.fuse
        if fuse and plain_norm(norm1, nn.LayerNorm, stream.dtype):
            normed = ops.layer_norm_modulate(
                stream, norm1.weight, norm1.bias, scale=scale1, shift=shift1, eps=norm1.eps
            )
        else:
            normed = norm1(stream) * (1 + scale1[:, None]) + shift1[:, None]
        known = fuse and not attention_reason(block.attn1)
        y = self_attention(block.attn1, normed) if known else block.attn1(normed)
        del normed
        if fuse and plain_norm(norm3, nn.LayerNorm, stream.dtype) and y.dtype == stream.dtype:
            overwrite = known and is_plain_linear(block.attn1.to_out[0])
            y = with_rows(y)
            normed, _ = ops.gate_residual_layer_norm_modulate(
                y, stream, gate1, norm3.weight, norm3.bias, scale=scale2, shift=shift2,
                eps=norm3.eps, out=y if overwrite else None, residual_out=stream,
            )  # fmt: skip
        else:
            stream.addcmul_(gate1[:, None], y)
            normed = norm3(stream) * (1 + scale2[:, None]) + shift2[:, None]
        del y
        feed_forward(normed, stream, gate2)
