"""Spatial transformers, sliced along images, in place."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from diffusers.models.transformers.transformer_2d import Transformer2DModel
from torch import Tensor

from accelrt import ops

from .attention import CrossAttention, attention_reason, self_attention
from .banded_attention import BandedAttention, band_length, image_slices
from .base import Group, Status
from .image_conditioning import ImageConditioning, unsliceable
from .independence import together
from .norms import GroupNormAct, unfused_norm
from .products import linear, project
from .recognise import is_plain_conv, is_plain_linear, is_pointwise_conv
from .sample_attention import SampleAttention
from .slicing import slice_length
from .state import State, channels_last, empty_images, tokens
from .transformer_block import (
    BlockRunner,
    block_parts,
    block_reason,
    chunking_reason,
    remark_chunking,
)

Attend = Callable[[Tensor, int, int], Tensor]
RunBlock = Callable[[Tensor, int, int], Tensor]


class SpatialTransformerGroup(Group):
    """``Transformer2DModel`` on continuous input: every image attends to itself.

    Conditioning that has one row per image is sliced with the images: the context, the
    embeddings of an IP-Adapter, masks of the keys. Other conditioning, and layers that
    may look at the whole batch, see all images at once.
    """

    axis = "frames"
    classes = (Transformer2DModel,)

    def configured_length(self) -> int | None:
        """Images per slice."""
        return self.config.frames_per_slice

    def unrecognised(self) -> str:
        """Besides hooks: other kinds of input, and chunks of an unknown feed-forward."""
        reason = super().unrecognised()
        if reason:
            return reason
        module: Any = self.module
        if not module.is_input_continuous:
            return "the input is not continuous"
        return next(filter(None, map(chunking_reason, self._blocks())), "")

    def _blocks(self) -> list[Any]:
        module: Any = self.module
        return list(getattr(module, "transformer_blocks", ()))

    def _together(self) -> str:
        """Why all images must pass in one slice; empty if they need not."""
        return together(self._blocks())

    def unfused(self) -> list[str]:
        """Norms, blocks and attention layers that are not recognised."""
        module: Any = self.module
        remarks = unfused_norm("norm", module.norm, None)
        for index, block in enumerate(self._blocks()):
            reason = block_reason(block)
            parts = [reason] if reason else block_parts(block)
            remarks += [f"block {index}: {part}" for part in parts]
        reason = self._together()
        return [*remarks, reason] if reason else remarks

    def status(self) -> Status:
        """Also says that ``ff_rows`` takes the place of forward chunking."""
        status = super().status()
        return remark_chunking(status, self._blocks())

    def run(self, state: State) -> None:
        """``[N, C, H, W]`` to the same shape."""
        x = state.take()
        context = state.context
        images, _, height, width = x.shape
        reason = self.unrecognised() or unsliceable(context, images, height * width)
        if reason:
            self.left_alone = reason
            module: Any = self.module
            # By name: FreeNoise's split inference tells arguments apart by their names.
            first = (x,) if type(module) is Transformer2DModel else ()
            named = {} if first else {"hidden_states": x}
            y = module(
                *first,
                **named,
                encoder_hidden_states=context.full,
                cross_attention_kwargs=context.cross_attention_kwargs,
                attention_mask=context.attention_mask,
                encoder_attention_mask=context.encoder_attention_mask,
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
        if n < images and self._together():
            n = images
        self.measured(n, images)

        norm = GroupNormAct(module.norm, None, x.dtype, self.config.fuse)
        given = ImageConditioning.of(state.context, x.dtype)
        blocks = [self._block(block, state, given, x) for block in self._blocks()]
        in_place = self.config.inplace and state.writable(x)
        out = x if in_place else empty_images(x, images, module.out_channels, height, width)
        source, target = tokens(x), tokens(out)
        size = (height * width, inner)
        for start in image_slices(images, n, x, size, self.config, module):
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
            del stream, y  # not beside the next slice
        return out

    def _project_in(self, normed: Tensor) -> Tensor:
        """The stream ``[n, H * W, inner]``: a contiguous tensor of our own."""
        module: Any = self.module
        proj = module.proj_in
        if module.use_linear_projection:
            stream = project(proj, tokens(normed), fuse=self.config.fuse)
            return stream.contiguous() if is_plain_linear(proj) else stream.clone()
        if self.config.fuse and is_pointwise_conv(proj, normed.dtype):
            return linear(tokens(normed), proj.weight.flatten(1), proj.bias)
        stream = tokens(channels_last(proj(normed)))
        return stream if is_plain_conv(proj) else stream.clone()

    def _project_out(self, stream: Tensor, height: int, width: int) -> Tensor:
        module: Any = self.module
        proj = module.proj_out
        if module.use_linear_projection:
            return project(proj, stream, fuse=self.config.fuse)
        if self.config.fuse and is_pointwise_conv(proj, stream.dtype):
            return linear(stream, proj.weight.flatten(1), proj.bias)
        images = stream.view(stream.shape[0], height, width, -1).permute(0, 3, 1, 2)
        return tokens(channels_last(proj(images)))

    def _block(self, block: Any, state: State, given: ImageConditioning, x: Tensor) -> RunBlock:
        """How one transformer block runs on a slice, decided once per call."""
        if block_reason(block) or block.pos_embed is not None:

            def as_it_came(stream: Tensor, start: int, stop: int) -> Tensor:
                y: Tensor = block(
                    stream,
                    attention_mask=_rows(given.self_bias, start, stop),
                    encoder_hidden_states=given.context(start, stop),
                    encoder_attention_mask=_rows(given.cross_bias, start, stop),
                    cross_attention_kwargs=given.kwargs or None,
                )
                return y.contiguous()

            return as_it_came

        runner = BlockRunner(block, self.config, x)
        first = self._self_attention(block.attn1, given)
        second = None if block.attn2 is None else self._cross_attention(block.attn2, state, given)

        banded = SampleAttention(block.attn1, self.config.fuse, x.dtype)
        by_tokens = banded.by_tokens and given.self_bias is None
        attention: BandedAttention | None = None  # its buffers serve all images

        def parts(stream: Tensor, start: int, stop: int) -> Tensor:
            nonlocal attention
            cross = None if second is None else _of_images(second, start, stop)
            tokens = stream.shape[1]
            if by_tokens and stop - start == 1 and band_length(stream, self.config) < tokens:
                if attention is None:
                    attention = BandedAttention(banded, stream, self.config)
                runner.run_in_bands(stream, attention, cross, slice(start, stop))
            else:
                runner(stream, _of_images(first, start, stop), cross)
            return stream

        return parts

    def _self_attention(self, attn: Any, given: ImageConditioning) -> Attend:
        bias = given.self_bias
        if attention_reason(attn) or not self.config.fuse:
            return lambda x, start, stop: attn(
                x, attention_mask=_rows(bias, start, stop), **given.kwargs
            )
        if bias is None:
            return lambda x, start, stop: self_attention(attn, x)
        return partial(_biased_self_attention, attn, bias)

    def _cross_attention(self, attn: Any, state: State, given: ImageConditioning) -> Attend:
        bias = given.cross_bias
        known = not attention_reason(attn) and given.pictures is None
        if not known or not self.config.fuse:
            return lambda x, start, stop: attn(
                x,
                encoder_hidden_states=given.context(start, stop),
                attention_mask=_rows(bias, start, stop),
                **given.kwargs,
            )
        if given.text is None:
            if bias is None:
                return lambda x, start, stop: self_attention(attn, x)
            return partial(_biased_self_attention, attn, bias)
        return CrossAttention(attn, given.text, state.context.shared, state.frames, bias)


def _biased_self_attention(attn: Any, bias: Tensor, x: Tensor, start: int, stop: int) -> Tensor:
    """Self-attention of some images with their rows of a bias ``[N, 1 or S, S]``."""
    return self_attention(attn, x, bias[start:stop, None])


def _of_images(attend: Attend, start: int, stop: int) -> Callable[[Tensor], Tensor]:
    """An attention layer of some images, as a function of their stream alone."""
    return lambda x: attend(x, start, stop)


def _rows(bias: Tensor | None, start: int, stop: int) -> Tensor | None:
    """The bias of some images."""
    return None if bias is None else bias[start:stop]
