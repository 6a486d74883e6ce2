"""Spatial transformers, sliced along images, in place."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch.nn.functional as F
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from torch import Tensor, nn

from accelrt import ops

from .attention import CrossAttention, attention_reason, self_attention
from .base import Group
from .norms import GroupNormAct, unfused_norm
from .recognise import is_plain_conv, is_plain_linear, is_pointwise_conv
from .slicing import slice_length
from .state import Context, State, channels_last, empty_images, tokens
from .transformer_block import BlockRunner, block_parts, block_reason

Attend = Callable[[Tensor, int, int], Tensor]
RunBlock = Callable[[Tensor, int, int], Tensor]


class SpatialTransformerGroup(Group):
    """``Transformer2DModel`` on continuous input: every image attends to itself."""

    axis = "frames"
    classes = (Transformer2DModel,)

    def configured_length(self) -> int | None:
        """Images per slice."""
        return self.config.frames_per_slice

    def unrecognised(self) -> str:
        """Besides hooks: other kinds of input, and forward chunking."""
        reason = super().unrecognised()
        if reason:
            return reason
        module: Any = self.module
        if not module.is_input_continuous:
            return "the input is not continuous"
        if any(getattr(block, "_chunk_size", None) is not None for block in self._blocks()):
            return "forward chunking is enabled"
        return ""

    def _blocks(self) -> list[nn.Module]:
        module: Any = self.module
        return list(module.transformer_blocks)

    def unfused(self) -> list[str]:
        """Norms, blocks and attention layers that are not recognised."""
        module: Any = self.module
        remarks = unfused_norm("norm", module.norm, None)
        for index, block in enumerate(self._blocks()):
            reason = block_reason(block)
            parts = [reason] if reason else block_parts(block)
            remarks += [f"block {index}: {part}" for part in parts]
        return remarks

    @staticmethod
    def _call_blocks(context: Context, images: int) -> str:
        """Why this call's conditioning cannot be sliced surely."""
        if context.attention_mask is not None:
            return "an attention mask was given"
        if context.cross_attention_kwargs:
            return "cross_attention_kwargs were given"
        if context.full is None:
            return ""
        if not isinstance(context.full, Tensor):
            return "the conditioning is a tuple (IP-Adapter)"
        if context.full.dim() != 3 or context.full.shape[0] != images:
            return f"the context {tuple(context.full.shape)} has not one row per image"
        return ""

    def run(self, state: State) -> None:
        """``[N, C, H, W]`` to the same shape."""
        x = state.take()
        context = state.context
        reason = self.unrecognised() or self._call_blocks(context, x.shape[0])
        if reason:
            self.left_alone = reason
            module: Any = self.module
            y = module(
                x,
                encoder_hidden_states=context.full,
                cross_attention_kwargs=context.cross_attention_kwargs,
                attention_mask=context.attention_mask,
                return_dict=False,
            )[0]
            state.hidden = channels_last(y)
            state.hold(state.hidden)
            return
        state.hidden = self._sliced(state, x)

    def _sliced(self, state: State, x: Tensor) -> Tensor:
        module: Any = self.module
        images, channels, height, width = x.shape
        inner = module.inner_dim
        widest = height * width * max(channels, inner) * x.element_size()
        n = slice_length(images, self.config.frames_per_slice, widest, self.config, x.device)
        self.measured(n, images)

        norm = GroupNormAct(module.norm, None, x.dtype, self.config.fuse)
        blocks = [self._block(block, state, x) for block in self._blocks()]
        in_place = self.config.inplace and state.writable(x)
        out = x if in_place else empty_images(x, images, module.out_channels, height, width)
        source, target = tokens(x), tokens(out)
        for start in range(0, images, n):
            stop = min(start + n, images)
            stream = self._project_in(norm(x[start:stop]))
            for run in blocks:
                stream = run(stream, start, stop)
            y = self._project_out(stream, height, width)
            residual, into = source[start:stop], target[start:stop]
            if self.config.fuse and y.dtype == residual.dtype:
                ops.residual_blend(residual, y, out=into)
            else:
                into.copy_(residual + y)
        return out

    def _project_in(self, normed: Tensor) -> Tensor:
        """The stream ``[n, H * W, inner]``: a contiguous tensor of our own."""
        module: Any = self.module
        proj = module.proj_in
        if module.use_linear_projection:
            stream: Tensor = proj(tokens(normed))
            return stream.contiguous() if is_plain_linear(proj) else stream.clone()
        if self.config.fuse and is_pointwise_conv(proj, normed.dtype):
            return F.linear(tokens(normed), proj.weight.flatten(1), proj.bias)
        stream = tokens(channels_last(proj(normed)))
        return stream if is_plain_conv(proj) else stream.clone()

    def _project_out(self, stream: Tensor, height: int, width: int) -> Tensor:
        module: Any = self.module
        proj = module.proj_out
        if module.use_linear_projection:
            y: Tensor = proj(stream)
            return y
        if self.config.fuse and is_pointwise_conv(proj, stream.dtype):
            return F.linear(stream, proj.weight.flatten(1), proj.bias)
        images = stream.view(stream.shape[0], height, width, -1).permute(0, 3, 1, 2)
        return tokens(channels_last(proj(images)))

    def _block(self, block: Any, state: State, x: Tensor) -> RunBlock:
        """How one transformer block runs on a slice, decided once per call."""
        context = state.context
        if block_reason(block) or block.pos_embed is not None:

            def as_it_came(stream: Tensor, start: int, stop: int) -> Tensor:
                sliced = None if context.full is None else context.full[start:stop]
                y: Tensor = block(stream, encoder_hidden_states=sliced)
                return y.contiguous()

            return as_it_came

        runner = BlockRunner(block, self.config, x)
        first = self._attention(block.attn1, None, state)
        second = None
        if block.attn2 is not None:
            second = self._attention(block.attn2, context.full, state)

        def parts(stream: Tensor, start: int, stop: int) -> Tensor:
            cross = None if second is None else partial(second, start=start, stop=stop)
            runner(stream, partial(first, start=start, stop=stop), cross)
            return stream

        return parts

    def _attention(self, attn: Any, full: Tensor | None, state: State) -> Callable[..., Tensor]:
        if attention_reason(attn) or not self.config.fuse:

            def as_it_came(x: Tensor, start: int, stop: int) -> Tensor:
                y: Tensor = attn(
                    x, encoder_hidden_states=None if full is None else full[start:stop]
                )
                return y

            return as_it_came
        if full is None:
            return lambda x, start, stop: self_attention(attn, x)
        return CrossAttention(attn, full, state.context.shared, state.frames)
