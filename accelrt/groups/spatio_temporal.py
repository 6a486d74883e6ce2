"""Spatio-temporal transformers: every layer over images first, then over pixels."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from diffusers.models.transformers.transformer_temporal import TransformerSpatioTemporalModel
from torch import Tensor, nn

from accelrt import ops
from accelrt.config import Config

from .attention import CrossAttention, attention_reason, rows_of_images, self_attention
from .banded_attention import BandedAttention, band_length, image_slices
from .base import FUSED, Group, Status
from .independence import together
from .mixing import image_only, mixer_reason, spatial_weight
from .norms import GroupNormAct, unfused_norm
from .products import linear_into, project
from .recognise import has_plain_weights, is_plain_linear, is_row_wise
from .sample_attention import SampleAttention
from .slicing import independent, slice_length
from .state import State, channels_last, empty_images, empty_rows, tokens
from .temporal_block import TemporalBlockRunner, temporal_block_parts, temporal_block_reason
from .transformer_block import BlockRunner, block_parts, block_reason

SpatialBlock = Callable[[Tensor, int, int], Tensor]
TemporalBlock = Callable[[Tensor, Tensor], Tensor]
Blend = Callable[[Tensor, Tensor, Tensor], Tensor]


class SpatioTemporalTransformerGroup(Group):
    """``TransformerSpatioTemporalModel``, sliced along images, then along pixels.

    In the spatial half of a layer every image attends to itself, in the temporal half
    every pixel: only the residual stream ``[N, H * W, D]`` between the halves exists
    whole, beside the input. Frames stay outermost in memory; nothing is permuted.

    The cross-attention context is ``state.context.shared``, one row per sample. The
    code published with Streamlined Inference (arXiv 2411.01171) lays it out for pixels
    before samples, so that with guidance the halves of a batch see each other's context.
    """

    axis = "frames"
    classes = (TransformerSpatioTemporalModel,)

    def __init__(self, name: str, module: nn.Module, config: Config) -> None:
        super().__init__(name, module, config)
        self.pixels: tuple[int, int] | None = None

    def configured_length(self) -> int | None:
        """Images per slice of the spatial half."""
        return self.config.frames_per_slice

    def unrecognised(self) -> str:
        """Besides hooks: parts that may not treat every image or pixel alone."""
        reason = super().unrecognised()
        if reason:
            return reason
        module: Any = self.module
        blocks = module.transformer_blocks
        if not 0 < len(blocks) == len(module.temporal_transformer_blocks):
            return "not one temporal block per spatial block"
        if not is_row_wise(module.proj_in) or not is_row_wise(module.proj_out):
            return "projections of an unknown kind"
        if any(block_reason(block) and _chunks_images(block) for block in blocks):
            return "forward chunking over images in a block that is not recognised"
        return ""

    def unfused(self) -> list[str]:
        """Norm, blocks, attention layers and blend that are not recognised."""
        module: Any = self.module
        remarks = unfused_norm("norm", module.norm, None)
        for index, block in enumerate(module.transformer_blocks):
            reason = block_reason(block)
            parts = [reason] if reason else block_parts(block)
            remarks += [f"block {index}: {part}" for part in parts]
        for index, block in enumerate(module.temporal_transformer_blocks):
            reason = temporal_block_reason(block)
            parts = [reason] if reason else temporal_block_parts(block)
            remarks += [f"temporal block {index}: {part}" for part in parts]
        reason = mixer_reason(module.time_mixer)
        remarks += [f"time_mixer: {reason}"] if reason else []
        return [*remarks, *filter(None, self._together())]

    def _together(self) -> tuple[str, str]:
        """Why all images, and all pixels, must pass in one slice; empty if they need not."""
        module: Any = self.module
        return (
            together(module.transformer_blocks),
            together(module.temporal_transformer_blocks, "pixels", "temporal block"),
        )

    def status(self) -> Status:
        """Also the slices of the temporal half, and what became of forward chunking."""
        status = super().status()
        if status.kind == FUSED:
            remarks = []
            if self.pixels is not None:
                remarks.append("then {}/{} pixels".format(*self.pixels))
            if any(getattr(m, "_chunk_size", None) is not None for m in self.module.modules()):
                remarks.append("ff_rows takes the place of forward chunking")
            status.reason = "; ".join(remarks)
        return status

    def run(self, state: State) -> None:
        """``[N, C, H, W]`` to the same shape."""
        x = state.take()
        context = state.context.shared
        if context is None:
            raise ValueError(f"{self.name}: the block needs a context with one row per sample")
        reason = self.unrecognised()
        if reason:
            self.left_alone = reason
            module: Any = self.module
            y = module(
                x,
                encoder_hidden_states=context.repeat_interleave(state.frames, dim=0),
                image_only_indicator=image_only(state, x),
                return_dict=False,
            )[0]
            state.hidden = channels_last(y)
            state.hold(state.hidden)
            return
        state.hidden = self._sliced(state, x, context)

    def _sliced(self, state: State, x: Tensor, context: Tensor) -> Tensor:
        module: Any = self.module
        config, frames = self.config, state.frames
        images, channels, height, width = x.shape
        pixels = height * width
        size = max(channels, module.inner_dim) * x.element_size()
        n = slice_length(images, config.frames_per_slice, pixels * size, config, x.device)
        p = slice_length(pixels, config.pixels_per_slice, images * size, config, x.device)
        if n < images or p < pixels:
            whole_images, whole_pixels = self._together()
            n = images if whole_images else n
            p = pixels if whole_pixels else p
        self.measured(n, images)
        self.pixels = (p, pixels)

        position = self._positions(x, frames)
        blend = self._blend(state, x)
        in_place = config.inplace and state.writable(x)
        out = x if in_place else empty_images(x, *x.shape)
        source, target = tokens(x), tokens(out)
        stream: Tensor | None = None
        last = len(module.transformer_blocks) - 1
        for index, block in enumerate(module.transformer_blocks):
            spatial = self._spatial_block(block, x, context, frames)
            stream = self._over_images(spatial, x, stream, n)
            del spatial  # its keys and values
            temporal = self._temporal_block(
                module.temporal_transformer_blocks[index], x, context, frames
            )
            final = index == last
            for start in independent(pixels, p, x, config, module):
                part = stream[:, start : start + p]  # [N, P, D]
                mix = temporal(part, position)
                blend(part, mix, mix if final else part)
                if final:
                    del part
                    self._project_out(
                        mix, source[:, start : start + p], target[:, start : start + p]
                    )
        return out

    def _positions(self, x: Tensor, frames: int) -> Tensor:
        """The embedding of every frame's position, ``[N, D]``."""
        module: Any = self.module
        steps = module.time_proj(torch.arange(frames, device=x.device)).to(x.dtype)
        rows: Tensor = module.time_pos_embed(steps)
        return rows.repeat(x.shape[0] // frames, 1)

    def _over_images(self, block: SpatialBlock, x: Tensor, stream: Tensor | None, n: int) -> Tensor:
        """The spatial half of a layer on ``n`` images at a time.

        Args:
            block: the transformer block.
            x: ``[N, C, H, W]``, the input of the group.
            stream: ``[N, H * W, D]``, written in place; ``None`` for the first layer.
            n: images per slice.
        """
        module: Any = self.module
        images, _, height, width = x.shape
        first = stream is None
        norm = GroupNormAct(module.norm, None, x.dtype, self.config.fuse)
        if stream is None:
            stream = empty_rows(x, images, height * width, module.inner_dim)
        size = (height * width, module.inner_dim)
        for start in image_slices(images, n, x, size, self.config, module):
            stop = min(start + n, images)
            part = stream[start:stop]
            if first:
                self._project_in(tokens(norm(x[start:stop])), part)
            y = block(part, start, stop)
            if y is not part:
                part.copy_(y)
        return stream

    def _project_in(self, normed: Tensor, out: Tensor) -> None:
        """``out = proj_in(normed)`` for some images ``[n, H * W, C]``, contiguous."""
        module: Any = self.module
        proj = module.proj_in
        plain = is_plain_linear(proj) and has_plain_weights(proj, normed.dtype)
        if self.config.fuse and plain:
            linear_into(out.view(-1, out.shape[-1]), normed.flatten(0, 1), proj)
        else:
            out.copy_(proj(normed))

    def _project_out(self, stream: Tensor, residual: Tensor, out: Tensor) -> None:
        """``out = proj_out(stream) + residual`` for some pixels ``[N, P, C]``."""
        module: Any = self.module
        y = project(module.proj_out, stream, fuse=self.config.fuse)
        if self.config.fuse and y.dtype == residual.dtype:
            ops.residual_blend(residual, y, out=out)
        else:
            out.copy_(y + residual)

    def _spatial_block(self, block: Any, x: Tensor, context: Tensor, frames: int) -> SpatialBlock:
        """How a block runs on a slice of images, decided once per call."""

        def rows(start: int, stop: int) -> Tensor:
            return rows_of_images(context, start, stop, frames)

        if block_reason(block) or block.pos_embed is not None:
            return lambda stream, start, stop: block(
                stream, encoder_hidden_states=rows(start, stop)
            )
        runner = BlockRunner(block, self.config, x)
        first: Callable[[Tensor], Tensor] = block.attn1
        if not attention_reason(block.attn1) and self.config.fuse:
            first = partial(self_attention, block.attn1)
        attn = block.attn2
        cross: CrossAttention | None = None
        if attn is not None and not attention_reason(attn) and self.config.fuse:
            cross = CrossAttention(attn, None, context, frames)

        banded = SampleAttention(block.attn1, self.config.fuse, x.dtype)
        attention: BandedAttention | None = None  # its buffers serve all images

        def parts(stream: Tensor, start: int, stop: int) -> Tensor:
            nonlocal attention
            second: Callable[[Tensor], Tensor] | None = None
            if cross is not None:
                second = partial(cross, start=start, stop=stop)
            elif attn is not None:
                second = partial(attn, encoder_hidden_states=rows(start, stop))
            constant = None if cross is None else cross.constant(start, stop)
            tokens = stream.shape[1]
            if banded.by_tokens and stop - start == 1 and band_length(stream, self.config) < tokens:
                if attention is None:
                    attention = BandedAttention(banded, stream, self.config)
                place = slice(start, stop)
                runner.run_in_bands(stream, attention, second, place, constant=constant)
            else:
                runner(stream, first, second, constant)
            return stream

        return parts

    def _temporal_block(self, block: Any, x: Tensor, context: Tensor, frames: int) -> TemporalBlock:
        """How a temporal block runs on a slice of pixels, decided once per call."""
        if not temporal_block_reason(block):
            return TemporalBlockRunner(block, self.config, x, frames, context)

        def as_it_came(spatial: Tensor, position: Tensor) -> Tensor:
            rows = context.repeat_interleave(spatial.shape[1], dim=0)
            y: Tensor = block(
                spatial + position[:, None], num_frames=frames, encoder_hidden_states=rows
            )
            return y.clone()  # a hook may keep y; the blend is written over ours

        return as_it_came

    def _blend(self, state: State, x: Tensor) -> Blend:
        """The blend of both halves: spatial, temporal, and where the result goes."""
        module: Any = self.module
        mixer = module.time_mixer
        if mixer_reason(mixer) or not self.config.fuse:
            indicator = image_only(state, x)
            return lambda spatial, temporal, out: out.copy_(
                mixer(x_spatial=spatial, x_temporal=temporal, image_only_indicator=indicator)
            )
        alpha = spatial_weight(mixer, state, x)
        return lambda spatial, temporal, out: ops.residual_blend(
            spatial, temporal, alpha=alpha, out=out
        )


def _chunks_images(block: Any) -> bool:
    """The block's own forward cuts its images into chunks, which must divide their number."""
    chunk = getattr(block, "_chunk_size", None)
    return chunk is not None and getattr(block, "_chunk_dim", 0) == 0
