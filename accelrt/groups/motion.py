"""Motion modules: GroupNorm over all frames and pixels, then attention along time."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from diffusers.models.unets.unet_motion_model import AnimateDiffTransformer3D
from torch import Tensor, nn

from accelrt import ops

from .attention import attention_reason, by_pixel, temporal_self_attention
from .base import Group, Status
from .independence import together
from .norms import ClipNorm, unfused_norm
from .products import project
from .recognise import is_plain_linear, is_row_wise
from .slicing import independent, slice_length
from .state import State, channels_last, empty_images, tokens
from .transformer_block import (
    BlockRunner,
    block_parts,
    block_reason,
    chunking_reason,
    remark_chunking,
)


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
        """Besides hooks: projections that may look at more than a pixel."""
        reason = super().unrecognised()
        if reason:
            return reason
        module: Any = self.module
        if not is_row_wise(module.proj_in) or not is_row_wise(module.proj_out):
            return "projections of an unknown kind"
        return next(filter(None, map(chunking_reason, self._blocks())), "")

    def _blocks(self) -> list[nn.Module]:
        module: Any = self.module
        return list(getattr(module, "transformer_blocks", ()))

    def unfused(self) -> list[str]:
        """The norm, blocks and layers that are not recognised."""
        module: Any = self.module
        remarks = unfused_norm("norm", module.norm, None)
        for index, block in enumerate(self._blocks()):
            reason = block_reason(block) or _temporal_reason(block)
            parts = [reason] if reason else block_parts(block)
            remarks += [f"block {index}: {part}" for part in parts]
        reason = together(self._blocks(), "pixels")
        return [*remarks, reason] if reason else remarks

    def status(self) -> Status:
        """Also says that ``ff_rows`` takes the place of forward chunking."""
        return remark_chunking(super().status(), self._blocks())

    def run(self, state: State) -> None:
        """``[N, C, H, W]`` to the same shape."""
        x = state.take()
        module: Any = self.module
        reason = self.unrecognised()
        if reason:
            self.left_alone = reason
            state.hidden = channels_last(module(x, num_frames=state.frames))
            state.hold(state.hidden)
            return
        state.hidden = self._sliced(state, x)

    def _sliced(self, state: State, x: Tensor) -> Tensor:
        module: Any = self.module
        frames = state.frames
        images, channels, height, width = x.shape
        pixels = height * width
        widest = images * max(channels, module.proj_in.out_features) * x.element_size()
        p = slice_length(pixels, self.config.pixels_per_slice, widest, self.config, x.device)
        if p < pixels and together(self._blocks(), "pixels"):
            p = pixels
        self.measured(p, pixels)

        norm = ClipNorm(module.norm, None, x, frames)
        blocks = [self._block(block, x, frames) for block in self._blocks()]
        own_stream = is_plain_linear(module.proj_in)
        in_place = self.config.inplace and state.writable(x)
        out = x if in_place else empty_images(x, *x.shape)
        source, target = tokens(x), tokens(out)  # [N, H * W, C]
        for start in independent(pixels, p, x, self.config, module):
            part, into = source[:, start : start + p], target[:, start : start + p]
            stream: Tensor = project(module.proj_in, norm(start, start + p), fuse=self.config.fuse)
            if not own_stream:
                stream = stream.clone()
            for run in blocks:
                stream = run(stream)
            y = project(module.proj_out, stream, fuse=self.config.fuse)
            del stream
            if self.config.fuse and y.dtype == part.dtype:
                ops.residual_blend(part, y, out=into)
            else:
                into.copy_(part + y)
            del y  # not beside the next slice
        return out

    def _block(self, block: Any, x: Tensor, frames: int) -> Callable[[Tensor], Tensor]:
        """How one temporal block runs on ``[N, P, D]``, decided once per call."""
        if block_reason(block) or _temporal_reason(block):
            return partial(by_pixel, block, frames=frames)
        runner = BlockRunner(block, self.config, x, frames)
        if not runner.positions_known(x):
            return partial(by_pixel, block, frames=frames)
        first = self._attention(block.attn1, frames)
        second = None if block.attn2 is None else self._attention(block.attn2, frames)

        def parts(stream: Tensor) -> Tensor:
            runner(stream, first, second)
            return stream

        return parts

    def _attention(self, attn: Any, frames: int) -> Callable[[Tensor], Tensor]:
        if attention_reason(attn) or not self.config.fuse:
            return partial(by_pixel, attn, frames=frames)
        return partial(temporal_self_attention, attn, frames=frames)


def _temporal_reason(block: Any) -> str:
    """A second attention layer must be one of frames, as the stock model calls it."""
    if block.attn2 is not None and getattr(block.attn2, "is_cross_attention", False):
        return "cross-attention in a motion module"
    return ""
