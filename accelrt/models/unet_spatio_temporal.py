"""Stable Video Diffusion: ``UNetSpatioTemporalConditionModel``."""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from typing import Any

import torch
from diffusers.models.unets.unet_3d_blocks import (
    CrossAttnDownBlockSpatioTemporal,
    CrossAttnUpBlockSpatioTemporal,
    DownBlockSpatioTemporal,
    UNetMidBlockSpatioTemporal,
    UpBlockSpatioTemporal,
)
from diffusers.models.unets.unet_spatio_temporal_condition import (
    UNetSpatioTemporalConditionModel,
    UNetSpatioTemporalConditionOutput,
)
from torch import Tensor, nn

from accelrt.config import Config
from accelrt.groups import Context, Group, State
from accelrt.groups.base import StockGroup, container_reason
from accelrt.groups.convolution import ConvInGroup, OutGroup
from accelrt.groups.recognise import is_plain
from accelrt.groups.sampling import DownsampleGroup, UpsampleGroup, last_upsampler
from accelrt.groups.spatio_temporal import SpatioTemporalTransformerGroup
from accelrt.groups.temporal_resnet import resnet_containers, spatio_temporal_resnet

from .family import CallShape, meta, register, without_guidance
from .stages import Stage
from .unet import SkipFamily, unet_passes
from .unet_parts import PushGroup, StockDownGroup, StockMidGroup, StockUpGroup

_DOWN = (DownBlockSpatioTemporal, CrossAttnDownBlockSpatioTemporal)
_UP = (UpBlockSpatioTemporal, CrossAttnUpBlockSpatioTemporal)
_MID = (UNetMidBlockSpatioTemporal,)


class VideoEmbedGroup(StockGroup):
    """Embedding of timestep and added ids, and the context, all with one row per sample.

    Args:
        name: as in :class:`Group`.
        model: the model, kept by weak reference: it must not keep itself alive.
        config: as in :class:`Group`.
    """

    why = "an embedding"

    def __init__(self, name: str, model: Any, config: Config) -> None:
        super().__init__(name, model.time_embedding, config)
        self._model = weakref.ref(model)

    def run(self, state: State) -> None:
        """Fill ``state.temb`` and ``state.context``."""
        unet: Any = self._model()
        inputs = state.inputs
        sample, timestep = inputs["sample"], inputs["timestep"]
        if not torch.is_tensor(timestep):
            dtype = torch.float64 if isinstance(timestep, float) else torch.int64
            timestep = torch.tensor([timestep], dtype=dtype, device=sample.device)
        elif timestep.dim() == 0:
            timestep = timestep[None].to(sample.device)
        batch = sample.shape[0]
        temb = unet.time_embedding(unet.time_proj(timestep.expand(batch)).to(sample.dtype))
        ids = unet.add_time_proj(inputs["added_time_ids"].flatten()).reshape(batch, -1)
        state.temb = temb + unet.add_embedding(ids.to(temb.dtype))
        state.context = Context(shared=inputs["encoder_hidden_states"])


class _StockArguments:
    """What stock blocks of this family are called with, beside the hidden states."""

    module: nn.Module

    def _arguments(self, state: State) -> dict[str, Any]:
        arguments: dict[str, Any] = {
            "temb": state.temb_per_image(),
            "image_only_indicator": state.extras["image_only"],
        }
        context = state.context.shared
        if getattr(self.module, "has_cross_attention", False) and context is not None:
            rows = context.repeat_interleave(state.frames, dim=0)
            arguments["encoder_hidden_states"] = rows
        return arguments


class StockVideoDownGroup(_StockArguments, StockDownGroup):
    """A whole spatio-temporal down block."""


class StockVideoMidGroup(_StockArguments, StockMidGroup):
    """A whole spatio-temporal mid block."""


class StockVideoUpGroup(_StockArguments, StockUpGroup):
    """A whole spatio-temporal up block."""


def _layer(
    name: str,
    block: Any,
    config: Config,
    index: int,
    *,
    joins: bool,
    before: UpsampleGroup | None = None,
) -> list[Group]:
    """ResNet block and transformer of one layer, which may have no transformer."""
    resnet = block.resnets[index]
    groups = spatio_temporal_resnet(
        f"{name}.resnets.{index}", resnet, config, joins=joins, before=before
    )
    attentions = getattr(block, "attentions", None)
    if attentions is not None:
        groups.append(_transformer(name, block, config, index))
    return groups


def _transformer(name: str, block: Any, config: Config, index: int) -> Group:
    path = f"{name}.attentions.{index}"
    return SpatioTemporalTransformerGroup(path, block.attentions[index], config)


def _down_stage(name: str, block: Any, config: Config) -> Stage:
    if not is_plain(block, *_DOWN):
        why = container_reason(block, _DOWN)
        return Stage(name, (StockVideoDownGroup(name, block, config, why),))
    groups: list[Group] = []
    for i in range(len(block.resnets)):
        groups += _layer(name, block, config, i, joins=False)
        groups[-1] = PushGroup(groups[-1])
    for i, module in enumerate(block.downsamplers or ()):
        last = i == len(block.downsamplers) - 1
        groups.append(DownsampleGroup(f"{name}.downsamplers.{i}", module, config, push=last))
    return Stage(name, tuple(groups))


def _mid_stage(block: Any, config: Config) -> Stage:
    name = "mid_block"
    if not is_plain(block, *_MID):
        why = container_reason(block, _MID)
        return Stage(name, (StockVideoMidGroup(name, block, config, why),))
    groups = spatio_temporal_resnet(f"{name}.resnets.0", block.resnets[0], config)
    for i in range(len(block.attentions)):
        groups.append(_transformer(name, block, config, i))
        resnet = block.resnets[i + 1]
        groups += spatio_temporal_resnet(f"{name}.resnets.{i + 1}", resnet, config)
    return Stage(name, tuple(groups))


def _up_stage(
    name: str, block: Any, config: Config, final: bool, before: UpsampleGroup | None
) -> Stage:
    if not is_plain(block, *_UP):
        why = container_reason(block, _UP)
        return Stage(name, (StockVideoUpGroup(name, block, config, why, final=final),))
    groups: list[Group] = []
    for i in range(len(block.resnets)):
        groups += _layer(name, block, config, i, joins=True, before=before)
        before = None
    for i, module in enumerate(block.upsamplers or ()):
        path = f"{name}.upsamplers.{i}"
        groups.append(UpsampleGroup(path, module, config, to_skip=not final))
    return Stage(name, tuple(groups))


class UNetSpatioTemporal(SkipFamily):
    """The UNet of Stable Video Diffusion: every layer has a spatial and a temporal half."""

    dimensions = 5

    def declines(self, model: nn.Module, inputs: dict[str, Any]) -> str:
        """Also contexts that are not one row per sample."""
        sample, context = inputs["sample"], inputs["encoder_hidden_states"]
        reason = super().declines(model, inputs)
        if reason:
            return reason
        if not isinstance(context, Tensor) or context.dim() != 3:
            return "encoder_hidden_states is not a tensor [B, L, D]"
        if context.shape[0] != sample.shape[0]:
            return f"{context.shape[0]} contexts for {sample.shape[0]} samples"
        return ""

    def parts(
        self, model: nn.Module, inputs: dict[str, Any], config: Config
    ) -> list[dict[str, Any]]:
        """``samples_per_pass`` at a time, where samples do not look at each other."""
        frames = self.frames_of(inputs)
        return unet_passes(model, inputs, config, frames, (*_DOWN, *_MID, *_UP))

    def frames_of(self, inputs: dict[str, Any]) -> int:
        """Frames are the second axis."""
        frames: int = inputs["sample"].shape[1]
        return frames

    def latents(self, model: nn.Module, inputs: dict[str, Any]) -> Tensor:
        """Without the channels of the given picture."""
        unet: Any = model
        sample: Tensor = inputs["sample"]
        return sample[:, :, : unet.config.out_channels]

    def is_temporal(self, name: str) -> bool:
        """Transformers have a temporal half."""
        return ".attentions." in name

    def begin(self, model: nn.Module, inputs: dict[str, Any]) -> State:
        """Frames, and whether upsamplers must aim at the sizes of the skips."""
        unet: Any = model
        sample = inputs["sample"]
        state = State(inputs, frames=sample.shape[1])
        factor = 2**unet.num_upsamplers
        state.extras["odd_size"] = any(size % factor for size in sample.shape[-2:])
        state.extras["image_only"] = sample.new_zeros(sample.shape[:2])
        return state

    def blocks(self, model: nn.Module) -> Iterable[nn.Module]:
        """Down, mid and up blocks, and their ResNet blocks, which are two groups each."""
        unet: Any = model
        for block in (*unet.down_blocks, unet.mid_block, *unet.up_blocks):
            yield block
            yield from resnet_containers(block)

    def stages(self, model: nn.Module, config: Config) -> tuple[Stage, ...]:
        """``embed``, ``conv_in``, ``down_blocks.*``, ``mid_block``, ``up_blocks.*``, ``out``."""
        unet: Any = model
        conv_in = ConvInGroup("conv_in", unet.conv_in, config, push=True, frames_first=True)
        stages = [
            Stage("embed", (VideoEmbedGroup("time_embedding", unet, config),)),
            Stage("conv_in", (conv_in,)),
        ]
        for i, block in enumerate(unet.down_blocks):
            stages.append(_down_stage(f"down_blocks.{i}", block, config))
        stages.append(_mid_stage(unet.mid_block, config))
        before: UpsampleGroup | None = None
        for i, block in enumerate(unet.up_blocks):
            final = i == len(unet.up_blocks) - 1
            stage = _up_stage(f"up_blocks.{i}", block, config, final, before)
            before = last_upsampler(stage.groups)
            stages.append(stage)
        out = OutGroup(
            "conv_out", unet.conv_out, config, norm=unet.conv_norm_out, act=unet.conv_act
        )
        return (*stages, Stage("out", (out,)))

    def call_shape(self, model: nn.Module, inputs: dict[str, Any]) -> CallShape:
        """From the sample ``[B, T, C, H, W]``."""
        batch, frames, _, height, width = inputs["sample"].shape
        return CallShape(batch, without_guidance(batch), frames, height, width)

    def example(self, model: nn.Module, shape: CallShape, dtype: torch.dtype) -> dict[str, Any]:
        """A video, the embedding of its first picture, and the added ids."""
        config: Any = model.config
        size = (shape.samples, shape.frames, config.in_channels, shape.height, shape.width)
        context = (shape.samples, shape.tokens or 1, config.cross_attention_dim)
        return {
            "sample": meta(*size, dtype=dtype),
            "timestep": meta(),
            "encoder_hidden_states": meta(*context, dtype=dtype),
            "added_time_ids": meta(shape.samples, 3, dtype=dtype),
        }

    def finish(self, model: nn.Module, state: State) -> Tensor:
        """``[B * T, C, H, W]`` to ``[B, T, C, H, W]``."""
        images = state.take()
        sample = images.view(-1, state.frames, *images.shape[1:])
        return sample

    def result(self, model: nn.Module, inputs: dict[str, Any], output: Tensor) -> Any:
        """A tuple, or diffusers' output class."""
        if not inputs["return_dict"]:
            return (output,)
        return UNetSpatioTemporalConditionOutput(sample=output)


register(UNetSpatioTemporalConditionModel, ("", UNetSpatioTemporal()))
