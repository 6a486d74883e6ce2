"""AnimateDiff: ``UNetMotionModel``."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from diffusers.models.unets.unet_2d_blocks import UNetMidBlock2DCrossAttn
from diffusers.models.unets.unet_motion_model import (
    CrossAttnDownBlockMotion,
    CrossAttnUpBlockMotion,
    DownBlockMotion,
    UNetMidBlockCrossAttnMotion,
    UNetMotionModel,
    UNetMotionOutput,
    UpBlockMotion,
)
from torch import Tensor, nn

from accelrt.config import Config
from accelrt.groups import Group, State
from accelrt.groups.base import container_reason
from accelrt.groups.convolution import ConvInGroup, OutGroup
from accelrt.groups.motion import MotionGroup
from accelrt.groups.recognise import is_plain
from accelrt.groups.resnet import ResnetGroup
from accelrt.groups.sampling import DownsampleGroup, UpsampleGroup
from accelrt.groups.spatial import SpatialTransformerGroup

from .family import Family, register
from .stages import Stage
from .unet_motion_parts import (
    EmbedGroup,
    PushGroup,
    ResidualsGroup,
    StockDownGroup,
    StockMidGroup,
    StockUpGroup,
)

_DOWN = (DownBlockMotion, CrossAttnDownBlockMotion)
_UP = (UpBlockMotion, CrossAttnUpBlockMotion)
_MID = (UNetMidBlockCrossAttnMotion, UNetMidBlock2DCrossAttn)


def _layers(name: str, block: Any, config: Config, index: int) -> list[Group]:
    """Spatial transformer and motion module of one layer, those that the block has."""
    groups: list[Group] = []
    for kind, cls in (("attentions", SpatialTransformerGroup), ("motion_modules", MotionGroup)):
        modules = getattr(block, kind, None)
        if modules is not None:
            groups.append(cls(f"{name}.{kind}.{index}", modules[index], config))
    return groups


def _down_stage(name: str, block: Any, config: Config) -> Stage:
    if not is_plain(block, *_DOWN):
        return Stage(name, (StockDownGroup(name, block, config, container_reason(block, _DOWN)),))
    groups: list[Group] = []
    for i, resnet in enumerate(block.resnets):
        groups.append(ResnetGroup(f"{name}.resnets.{i}", resnet, config))
        groups += _layers(name, block, config, i)
        groups[-1] = PushGroup(groups[-1])
    for i, module in enumerate(block.downsamplers or ()):
        last = i == len(block.downsamplers) - 1
        groups.append(DownsampleGroup(f"{name}.downsamplers.{i}", module, config, push=last))
    return Stage(name, tuple(groups))


def _mid_stage(block: Any, config: Config) -> Stage:
    name = "mid_block"
    if not is_plain(block, *_MID):
        return Stage(name, (StockMidGroup(name, block, config, container_reason(block, _MID)),))
    groups: list[Group] = [ResnetGroup(f"{name}.resnets.0", block.resnets[0], config)]
    for i in range(len(block.attentions)):
        groups += _layers(name, block, config, i)
        groups.append(ResnetGroup(f"{name}.resnets.{i + 1}", block.resnets[i + 1], config))
    return Stage(name, tuple(groups))


def _up_stage(name: str, block: Any, config: Config, final: bool) -> Stage:
    if not is_plain(block, *_UP):
        why = container_reason(block, _UP)
        return Stage(name, (StockUpGroup(name, block, config, why, final=final),))
    groups: list[Group] = []
    for i, resnet in enumerate(block.resnets):
        groups.append(ResnetGroup(f"{name}.resnets.{i}", resnet, config, joins=True, owner=block))
        groups += _layers(name, block, config, i)
    for i, module in enumerate(block.upsamplers or ()):
        group = UpsampleGroup(f"{name}.upsamplers.{i}", module, config, to_skip=not final)
        groups.append(group)
    return Stage(name, tuple(groups))


class UNetMotion(Family):
    """The UNet of AnimateDiff: a 2-D UNet with motion modules between its layers."""

    lora_scale_kwargs = "cross_attention_kwargs"

    def declines(self, model: nn.Module, inputs: dict[str, Any]) -> str:
        """Also samples that are not videos."""
        sample = inputs["sample"]
        if isinstance(sample, Tensor) and sample.dim() != 5:
            return f"sample has {sample.dim()} dimensions, not 5"
        return super().declines(model, inputs)

    def begin(self, model: nn.Module, inputs: dict[str, Any]) -> State:
        """Frames, and whether upsamplers must aim at the sizes of the skips."""
        unet: Any = model
        sample = inputs["sample"]
        state = State(inputs, frames=sample.shape[2])
        factor = 2**unet.num_upsamplers
        state.extras["odd_size"] = any(size % factor for size in sample.shape[-2:])
        return state

    def blocks(self, model: nn.Module) -> Iterable[nn.Module]:
        """Down, mid and up blocks."""
        unet: Any = model
        mid = () if unet.mid_block is None else (unet.mid_block,)
        return (*unet.down_blocks, *mid, *unet.up_blocks)

    def stages(self, model: nn.Module, config: Config) -> tuple[Stage, ...]:
        """``embed``, ``conv_in``, ``down_blocks.*``, ``mid_block``, ``up_blocks.*``, ``out``."""
        unet: Any = model
        stages = [
            Stage("embed", (EmbedGroup("time_embedding", unet, config),)),
            Stage("conv_in", (ConvInGroup("conv_in", unet.conv_in, config, push=True),)),
        ]
        for i, block in enumerate(unet.down_blocks):
            stages.append(_down_stage(f"down_blocks.{i}", block, config))
        mid: list[Group] = [ResidualsGroup("down_residuals", config, "down")]
        if unet.mid_block is not None:
            mid += _mid_stage(unet.mid_block, config).groups
        mid.append(ResidualsGroup("mid_residual", config, "mid"))
        stages.append(Stage("mid_block", tuple(mid)))
        for i, block in enumerate(unet.up_blocks):
            final = i == len(unet.up_blocks) - 1
            stages.append(_up_stage(f"up_blocks.{i}", block, config, final))
        out = OutGroup(
            "conv_out",
            unet.conv_out,
            config,
            norm=unet.conv_norm_out or None,
            act=unet.conv_act if unet.conv_norm_out else None,
        )
        return (*stages, Stage("out", (out,)))

    def finish(self, model: nn.Module, state: State) -> Any:
        """``[B * T, C, H, W]`` to ``[B, C, T, H, W]``."""
        images = state.take()
        sample = images.view(-1, state.frames, *images.shape[1:]).permute(0, 2, 1, 3, 4)
        if not state.inputs["return_dict"]:
            return (sample,)
        return UNetMotionOutput(sample=sample)


register(UNetMotionModel, ("", UNetMotion()))
