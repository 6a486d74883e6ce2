"""Motion modules: GroupNorm over all frames and pixels, then attention along time."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from diffusers.models.unets.unet_motion_model import AnimateDiffTransformer3D
from torch import Tensor, nn

from accelrt import ops

from .attention import attention_reason, temporal_self_attention
from .base import Group
from .recognise import is_plain_linear, is_row_wise, plain_norm
from .slicing import slice_length
from .state import State, channels_last, empty_images, tokens
from .transformer_block import BlockRunner, block_parts, block_reason


class MotionGroup(Group):
    """``AnimateDiffTransformer3D``, sliced along pixels.

    A first pass collects the GroupNorm statistics, which run over ``(C/g, T, H, W)``;
    after it all operators treat each pixel alone, so a slice is some pixels with all
    their frames. The statistics pass is what slicing in Streamlined Inference (arXiv
    2411.01171, section 3) leaves out: there each slice is normalised by itself, which
    changes the result.

    Args:
        name, module, config: as in :class:`Group`.
    """

    axis = "pixels"
    classes = (AnimateDiffTransformer3D,)

    def configured_length(self) -> int | None:
        """Pixels per slice."""
        return self.config.pixels_per_slice

    def unrecognised(self) -> str:
        """Besides hooks: a norm whose statistics cannot be taken apart."""
        reason = super().unrecognised()
        if reason:
            return reason
        module: Any = self.module
        if not plain_norm(module.norm, nn.GroupNorm, None):
            return "the norm over all frames and pixels is not a plain GroupNorm"
        if not is_row_wise(module.proj_in) or not is_row_wise(module.proj_out):
            return "projections of an unknown kind"
        if any(getattr(block, "_chunk_size", None) is not None for block in self._blocks()):
            return "forward chunking is enabled"
        return ""

    def _blocks(self) -> list[nn.Module]:
        module: Any = self.module
        return list(module.transformer_blocks)

    def unfused(self) -> list[str]:
        """Blocks and layers that are not recognised."""
        remarks = []
        for index, block in enumerate(self._blocks()):
            reason = block_reason(block) or _temporal_reason(block)
            parts = [reason] if reason else block_parts(block)
            remarks += [f"block {index}: {part}" for part in parts]
        return remarks

    def run(self, state: State) -> None:
        """``[N, C, H, W]`` to the same shape."""
        x = state.take()
        module: Any = self.module
        reason = self.unrecognised()
        if not reason and not plain_norm(module.norm, nn.GroupNorm, x.dtype):
            reason = f"the norm's weights are not {x.dtype}"
        if reason:
            self.left_alone = reason
            state.hidden = channels_last(module(x, num_frames=state.frames))
            state.hold(state.hidden)
            return
        state.hidden = self._sliced(state, x)

    def _sliced(self, state: State, x: Tensor) -> Tensor:
        module: Any = self.module
        norm = module.norm
        frames = state.frames
        images, channels, height, width = x.shape
        pixels = height * width
        widest = images * max(channels, module.proj_in.out_features) * x.element_size()
        p = slice_length(pixels, self.config.pixels_per_slice, widest, self.config, x.device)
        self.measured(p, pixels)

        stats = ops.group_norm_stats(x, norm.num_groups, frames=frames)
        blocks = [self._block(block, x, frames) for block in self._blocks()]
        own_stream = is_plain_linear(module.proj_in)
        in_place = self.config.inplace and state.writable(x)
        out = x if in_place else empty_images(x, *x.shape)
        source, target = tokens(x), tokens(out)  # [N, H * W, C]
        for start in range(0, pixels, p):
            part, into = source[:, start : start + p], target[:, start : start + p]
            # [N, C, 1, P]: the operator's layout for a row of pixels
            normed = x.new_empty(part.shape)
            ops.group_norm_apply(
                part.permute(0, 2, 1).unsqueeze(2), stats, norm.num_groups, norm.weight,
                norm.bias, eps=norm.eps, frames=frames,
                out=normed.permute(0, 2, 1).unsqueeze(2),
            )  # fmt: skip
            stream: Tensor = module.proj_in(normed)
            del normed
            if not own_stream:
                stream = stream.clone()
            for run in blocks:
                stream = run(stream)
            y = module.proj_out(stream)
            del stream
            if self.config.fuse and y.dtype == part.dtype:
                ops.residual_blend(part, y, out=into)
            else:
                into.copy_(part + y)
        return out

    def _block(self, block: Any, x: Tensor, frames: int) -> Callable[[Tensor], Tensor]:
        """How one temporal block runs on ``[N, P, D]``, decided once per call."""
        if block_reason(block) or _temporal_reason(block):
            return partial(_by_pixel, block, frames=frames)
        runner = BlockRunner(block, self.config, x, frames)
        if not runner.positions_known(x):
            return partial(_by_pixel, block, frames=frames)
        first = self._attention(block.attn1, frames)
        second = None if block.attn2 is None else self._attention(block.attn2, frames)

        def parts(stream: Tensor) -> Tensor:
            runner(stream, first, second)
            return stream

        return parts

    def _attention(self, attn: Any, frames: int) -> Callable[[Tensor], Tensor]:
        if attention_reason(attn) or not self.config.fuse:
            return partial(_by_pixel, attn, frames=frames)
        return partial(temporal_self_attention, attn, frames=frames)


def _temporal_reason(block: Any) -> str:
    """A second attention layer must be one of frames, as the stock model calls it."""
    if block.attn2 is not None and getattr(block.attn2, "is_cross_attention", False):
        return "cross-attention in a motion module"
    return ""


def _by_pixel(module: Any, x: Tensor, frames: int) -> Tensor:
    """Call a stock module on ``[B * P, T, D]``, the layout it expects.

    Args:
        module: a block or attention layer that attends along its sequence.
        x: ``[B * T, P, D]``.
        frames: ``T``.
    """
    _, pixels, width = x.shape
    moved = x.reshape(-1, frames, pixels, width).transpose(1, 2)  # [B, P, T, D]
    y: Tensor = module(moved.flatten(0, 1))
    return y.reshape(-1, pixels, frames, width).transpose(1, 2).flatten(0, 1)
