"""The video VAE of Stable Video Diffusion: ``AutoencoderKLTemporalDecoder``.

Its encoder is that of the image VAE. Its decoder normalises and convolves over all frames
of a call, so decoding a video in chunks of frames (``decode_chunk_size``) changes the
result; here all frames pass together, in place, and what is cut is the work inside of
each group.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from diffusers.models.autoencoders.autoencoder_kl_temporal_decoder import (
    AutoencoderKLTemporalDecoder,
)
from diffusers.models.resnet import SpatioTemporalResBlock
from diffusers.models.unets.unet_3d_blocks import MidBlockTemporalDecoder, UpBlockTemporalDecoder
from torch import Tensor, nn

from accelrt.config import Config
from accelrt.groups import Group, State
from accelrt.groups.base import StockGroup, container_reason
from accelrt.groups.convolution import ConvInGroup, OutGroup
from accelrt.groups.mixing import image_only
from accelrt.groups.recognise import is_plain
from accelrt.groups.sampling import UpsampleGroup, last_upsampler
from accelrt.groups.slab import FrameSlab
from accelrt.groups.slicing import independent, slice_length
from accelrt.groups.state import channels_last
from accelrt.groups.temporal_resnet import (
    is_temporal_conv,
    resnet_containers,
    spatio_temporal_resnet,
)
from accelrt.groups.vae_attention import VaeAttentionGroup

from .autoencoder_kl import KLEncoder
from .family import CallShape, Family, meta, register
from .stages import Stage


class StockTemporalBlockGroup(StockGroup):
    """A block of another class, or with hooks: called as it came."""

    def __init__(self, name: str, module: nn.Module, config: Config, why: str) -> None:
        super().__init__(name, module, config)
        self.why = why

    def run(self, state: State) -> None:
        """``[N, C, H, W]`` through the stock block."""
        x = state.take()
        y = self.module(x, image_only_indicator=image_only(state, x))
        state.hidden = channels_last(y)
        state.hold(state.hidden)


class TimeConvOutGroup(Group):
    """The last convolution, along the frames, sliced along rows of pixels, in place."""

    axis = "rows"

    def unrecognised(self) -> str:
        """A convolution that mixes pixels."""
        if is_temporal_conv(self.module):
            return ""
        return f"{type(self.module).__name__} is not a convolution along the frames alone"

    def unfused(self) -> list[str]:
        """The convolution is the library's in any case."""
        return []

    def run(self, state: State) -> None:
        """``[B * T, C, H, W]`` to the same shape."""
        x = state.take()
        clips = x.view(-1, state.frames, *x.shape[1:]).transpose(1, 2)  # [B, C, T, H, W]
        height = clips.shape[3]
        row = x[..., 0, :].numel() * x.element_size()
        rows = slice_length(height, None, row, self.config, x.device)
        reason = self.unrecognised()
        changes_channels = getattr(self.module, "out_channels", x.shape[1]) != x.shape[1]
        in_place = self.config.inplace and state.writable(x)
        if reason or rows >= height or changes_channels or not in_place:
            self.left_alone = reason
            y = self.module(clips)
            state.hidden = y.transpose(1, 2).flatten(0, 1)
            return
        self.measured(rows, height)
        for start in independent(height, rows, x, self.config, self.module):
            part = clips[:, :, :, start : start + rows]
            part.copy_(self.module(part))
        state.hidden = x


def _up_stage(name: str, block: Any, config: Config, before: UpsampleGroup | None) -> Stage:
    if not is_plain(block, UpBlockTemporalDecoder):
        why = container_reason(block, (UpBlockTemporalDecoder,))
        return Stage(name, (StockTemporalBlockGroup(name, block, config, why),))
    groups: list[Group] = []
    for i, resnet in enumerate(block.resnets):
        groups += spatio_temporal_resnet(f"{name}.resnets.{i}", resnet, config, before=before)
        before = None
    for i, module in enumerate(block.upsamplers or ()):
        groups.append(UpsampleGroup(f"{name}.upsamplers.{i}", module, config))
    return Stage(name, tuple(groups))


def _mid_stage(name: str, block: Any, config: Config) -> Stage:
    if not is_plain(block, MidBlockTemporalDecoder):
        why = container_reason(block, (MidBlockTemporalDecoder,))
        return Stage(name, (StockTemporalBlockGroup(name, block, config, why),))
    groups = spatio_temporal_resnet(f"{name}.resnets.0", block.resnets[0], config)
    # As in the stock block, resnets without an attention layer before them do not run.
    pairs = zip(block.resnets[1:], block.attentions, strict=False)
    for i, (resnet, attention) in enumerate(pairs):
        groups.append(VaeAttentionGroup(f"{name}.attentions.{i}", attention, config))
        groups += spatio_temporal_resnet(f"{name}.resnets.{i + 1}", resnet, config)
    return Stage(name, tuple(groups))


def _slab(decoder: Any, sample: Tensor) -> FrameSlab | None:
    """Where the outputs of the up blocks go, if their children are run one by one."""
    height, width = sample.shape[2:]
    shapes: list[tuple[int, int, int]] = []
    for block in decoder.up_blocks:
        if not is_plain(block, UpBlockTemporalDecoder):
            return None
        for resnet in block.resnets:
            if not is_plain(resnet, SpatioTemporalResBlock):
                return None
            shapes.append((resnet.spatial_res_block.out_channels, height, width))
        for _ in block.upsamplers or ():
            height, width = 2 * height, 2 * width
    return FrameSlab(list(dict.fromkeys(shapes))) if shapes else None


class TemporalDecoder(Family):
    """Convolution, mid block, up blocks, output, convolution along the frames."""

    def declines(self, model: nn.Module, inputs: dict[str, Any]) -> str:
        """Also frames that make no whole videos, and weights of mixed dtypes."""
        reason = super().declines(model, inputs)
        if reason:
            return reason
        decoder: Any = model
        sample, frames = inputs["sample"], inputs["num_frames"]
        if frames < 1 or sample.shape[0] % frames:
            return f"{sample.shape[0]} images are no whole videos of {frames} frames"
        indicator = inputs["image_only_indicator"]
        if not isinstance(indicator, Tensor) or indicator.shape[-1] != frames:
            return "image_only_indicator has another number of frames"
        upscale = next((p.dtype for p in decoder.up_blocks.parameters()), sample.dtype)
        return "" if upscale == sample.dtype else f"the up blocks are {upscale}"

    def example(self, model: nn.Module, shape: CallShape, dtype: torch.dtype) -> dict[str, Any]:
        """The latents of all frames of all videos."""
        decoder: Any = model
        size = (decoder.conv_in.in_channels, shape.height, shape.width)
        return {
            "sample": meta(shape.outputs * shape.frames, *size, dtype=dtype),
            "image_only_indicator": meta(shape.outputs, shape.frames, dtype=dtype),
            "num_frames": shape.frames,
        }

    def parts(
        self, model: nn.Module, inputs: dict[str, Any], config: Config
    ) -> list[dict[str, Any]]:
        """Whole videos: as few as hold ``vae_images`` frames."""
        sample, frames = inputs["sample"], inputs["num_frames"]
        images = config.vae_images
        if images is None or sample.shape[0] <= max(images, frames):
            return [inputs]
        videos = max(1, images // frames)
        indicator: Tensor = inputs["image_only_indicator"]
        return [
            {
                **inputs,
                "sample": sample[start * frames : (start + videos) * frames],
                "image_only_indicator": indicator[start : start + videos],
            }
            for start in range(0, indicator.shape[0], videos)
        ]

    def begin(self, model: nn.Module, inputs: dict[str, Any]) -> State:
        """Frames, and which of them are images by themselves."""
        state = State(inputs, frames=inputs["num_frames"])
        state.extras["image_only"] = inputs["image_only_indicator"]
        state.extras["slab"] = _slab(model, inputs["sample"])
        return state

    def blocks(self, model: nn.Module) -> Iterable[nn.Module]:
        """Mid block, up blocks, and their blocks of two halves."""
        decoder: Any = model
        blocks = (decoder.mid_block, *decoder.up_blocks)
        return (*blocks, *(r for block in blocks for r in resnet_containers(block)))

    def stages(self, model: nn.Module, config: Config) -> tuple[Stage, ...]:
        """``conv_in``, ``mid_block``, ``up_blocks.0`` onwards, ``out``."""
        decoder: Any = model
        stages = [
            Stage("conv_in", (ConvInGroup("conv_in", decoder.conv_in, config),)),
            _mid_stage("mid_block", decoder.mid_block, config),
        ]
        for i, block in enumerate(decoder.up_blocks):
            before = last_upsampler(stages[-1].groups)
            stages.append(_up_stage(f"up_blocks.{i}", block, config, before))
        out = OutGroup(
            "conv_out", decoder.conv_out, config, norm=decoder.conv_norm_out, act=decoder.conv_act
        )
        return (
            *stages,
            Stage("out", (out, TimeConvOutGroup("time_conv_out", decoder.time_conv_out, config))),
        )

    def finish(self, model: nn.Module, state: State) -> Tensor:
        """The output of the last convolution."""
        return state.take()


register(AutoencoderKLTemporalDecoder, ("encoder", KLEncoder()), ("decoder", TemporalDecoder()))
