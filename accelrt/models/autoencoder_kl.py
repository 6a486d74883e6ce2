"""The image VAE: ``AutoencoderKL``.

The forwards of its encoder and decoder are swapped, beneath everything that
``encode`` and ``decode`` do: tiling, slicing and the quantisation convolutions
stay those of the stock model.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.unets.unet_2d_blocks import (
    DownEncoderBlock2D,
    UNetMidBlock2D,
    UpDecoderBlock2D,
)
from torch import Tensor, nn

from accelrt.config import Config
from accelrt.groups import Group, State
from accelrt.groups.base import StockGroup, container_reason
from accelrt.groups.convolution import ConvInGroup, OutGroup
from accelrt.groups.recognise import is_plain
from accelrt.groups.resnet import ResnetGroup
from accelrt.groups.sampling import DownsampleGroup, UpsampleGroup, last_upsampler
from accelrt.groups.state import channels_last
from accelrt.groups.vae_attention import VaeAttentionGroup

from .family import CallShape, Family, meta, register
from .stages import Stage


class StockBlockGroup(StockGroup):
    """A block of another class, or with hooks: called as it came."""

    def __init__(self, name: str, module: nn.Module, config: Config, why: str) -> None:
        super().__init__(name, module, config)
        self.why = why

    def run(self, state: State) -> None:
        """``[N, C, H, W]`` through the stock block."""
        state.hidden = channels_last(self.module(state.take()))
        state.hold(state.hidden)


def _block(
    name: str,
    block: Any,
    config: Config,
    *known: type,
    before: UpsampleGroup | None = None,
) -> Stage:
    """The stage of one block of resnets and perhaps a sampler.

    Args:
        name, block, config: of the block.
        known: classes whose children are run one by one.
        before: the upsampler that ends the block before.
    """
    if not is_plain(block, *known):
        why = container_reason(block, known)
        return Stage(name, (StockBlockGroup(name, block, config, why),))
    groups: list[Group] = []
    for i, resnet in enumerate(block.resnets):
        group = ResnetGroup(f"{name}.resnets.{i}", resnet, config, before=before)
        groups.append(group)
        before = None
    for i, module in enumerate(getattr(block, "downsamplers", None) or ()):
        groups.append(DownsampleGroup(f"{name}.downsamplers.{i}", module, config))
    for i, module in enumerate(getattr(block, "upsamplers", None) or ()):
        groups.append(UpsampleGroup(f"{name}.upsamplers.{i}", module, config))
    return Stage(name, tuple(groups))


def _mid_block(name: str, block: Any, config: Config) -> Stage:
    if not is_plain(block, UNetMidBlock2D):
        why = container_reason(block, (UNetMidBlock2D,))
        return Stage(name, (StockBlockGroup(name, block, config, why),))
    groups: list[Group] = [ResnetGroup(f"{name}.resnets.0", block.resnets[0], config)]
    for i, attention in enumerate(block.attentions):
        if attention is not None:
            groups.append(VaeAttentionGroup(f"{name}.attentions.{i}", attention, config))
        resnet = block.resnets[i + 1]
        groups.append(ResnetGroup(f"{name}.resnets.{i + 1}", resnet, config))
    return Stage(name, tuple(groups))


def parts_of_images(inputs: dict[str, Any], name: str, images: int | None) -> list[dict[str, Any]]:
    """``inputs`` cut along the first axis of the tensor ``name``, ``images`` at a time."""
    x: Tensor = inputs[name]
    if images is None or x.shape[0] <= images:
        return [inputs]
    return [{**inputs, name: x[start : start + images]} for start in range(0, x.shape[0], images)]


class _Half(Family):
    """What encoder and decoder share: images pass one after the other."""

    def begin(self, model: nn.Module, inputs: dict[str, Any]) -> State:
        """One run takes some images, ``[n, C, H, W]``."""
        return State(inputs)

    def declines(self, model: nn.Module, inputs: dict[str, Any]) -> str:
        """Also latent embeddings (the VQ model's decoder), which are not described."""
        if inputs.get("latent_embeds") is not None:
            return "latent_embeds were given"
        return super().declines(model, inputs)

    def parts(
        self, model: nn.Module, inputs: dict[str, Any], config: Config
    ) -> list[dict[str, Any]]:
        """``vae_images`` at a time: peak memory is that of so many images."""
        return parts_of_images(inputs, self.input_name, config.vae_images)

    def finish(self, model: nn.Module, state: State) -> Tensor:
        """The output of the last convolution."""
        return state.take()

    def _out(self, model: Any, config: Config) -> Stage:
        group = OutGroup(
            "conv_out", model.conv_out, config, norm=model.conv_norm_out, act=model.conv_act
        )
        return Stage("out", (group,))


class KLEncoder(_Half):
    """Convolution, down blocks, mid block, output."""

    def example(self, model: nn.Module, shape: CallShape, dtype: torch.dtype) -> dict[str, Any]:
        """One picture per output."""
        encoder: Any = model
        scale = 2 ** (len(encoder.down_blocks) - 1)
        channels = encoder.conv_in.in_channels
        size = (shape.outputs, channels, scale * shape.height, scale * shape.width)
        return {"sample": meta(*size, dtype=dtype)}

    def blocks(self, model: nn.Module) -> Iterable[nn.Module]:
        """Down blocks and mid block."""
        encoder: Any = model
        return (*encoder.down_blocks, encoder.mid_block)

    def stages(self, model: nn.Module, config: Config) -> tuple[Stage, ...]:
        """``conv_in``, ``down_blocks.0`` onwards, ``mid_block``, ``out``."""
        encoder: Any = model
        stages = [Stage("conv_in", (ConvInGroup("conv_in", encoder.conv_in, config),))]
        for i, block in enumerate(encoder.down_blocks):
            stages.append(_block(f"down_blocks.{i}", block, config, DownEncoderBlock2D))
        stages.append(_mid_block("mid_block", encoder.mid_block, config))
        return (*stages, self._out(encoder, config))


class KLDecoder(_Half):
    """Convolution, mid block, up blocks, output."""

    def example(self, model: nn.Module, shape: CallShape, dtype: torch.dtype) -> dict[str, Any]:
        """The latents of all frames."""
        decoder: Any = model
        size = (decoder.conv_in.in_channels, shape.height, shape.width)
        return {"sample": meta(shape.outputs * shape.frames, *size, dtype=dtype)}

    def blocks(self, model: nn.Module) -> Iterable[nn.Module]:
        """Mid block and up blocks."""
        decoder: Any = model
        return (decoder.mid_block, *decoder.up_blocks)

    def stages(self, model: nn.Module, config: Config) -> tuple[Stage, ...]:
        """``conv_in``, ``mid_block``, ``up_blocks.0`` onwards, ``out``."""
        decoder: Any = model
        stages = [
            Stage("conv_in", (ConvInGroup("conv_in", decoder.conv_in, config),)),
            _mid_block("mid_block", decoder.mid_block, config),
        ]
        for i, block in enumerate(decoder.up_blocks):
            before = last_upsampler(stages[-1].groups)
            name = f"up_blocks.{i}"
            stages.append(_block(name, block, config, UpDecoderBlock2D, before=before))
        return (*stages, self._out(decoder, config))


register(AutoencoderKL, ("encoder", KLEncoder()), ("decoder", KLDecoder()))
