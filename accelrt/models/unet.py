"""What the UNets have in common: down, mid and up blocks of ResNets and layers."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from torch import nn

from accelrt.config import Config
from accelrt.groups import Group, State
from accelrt.groups.base import container_reason
from accelrt.groups.convolution import ConvInGroup, OutGroup
from accelrt.groups.independence import mixes_samples
from accelrt.groups.recognise import is_plain
from accelrt.groups.resnet import ResnetGroup
from accelrt.groups.sampling import DownsampleGroup, UpsampleGroup, last_upsampler
from accelrt.steps.boundary import Boundary

from .family import Family
from .passes import split_inputs
from .stages import Stage
from .unet_parts import (
    AdapterGroup,
    PushGroup,
    ResidualsGroup,
    StockDownGroup,
    StockMidGroup,
    StockUpGroup,
)

Layer = Callable[[str, nn.Module, Config], Group]


def unet_passes(
    model: nn.Module,
    inputs: dict[str, Any],
    config: Config,
    frames: int,
    known: tuple[type, ...],
) -> list[dict[str, Any]]:
    """The calls of ``config.samples_per_pass`` samples that a UNet's call is cut into.

    The call stays whole if the samples may see each other, or if an argument is of an
    unknown form.

    Args:
        model: the UNet.
        inputs: its arguments by name.
        config: of the call.
        frames: per sample.
        known: classes of its blocks that treat every sample alone.
    """
    samples, batch = config.samples_per_pass, inputs["sample"].shape[0]
    if samples is None or samples >= batch or mixes_samples(model):
        return [inputs]
    unet: Any = model
    blocks = (*unet.down_blocks, unet.mid_block, *unet.up_blocks)
    if any(block is not None and type(block) not in known for block in blocks):
        return [inputs]
    parts = split_inputs(inputs, batch, samples, frames=frames)
    return [inputs] if isinstance(parts, str) else parts


_RESIDUALS = (
    "down_block_additional_residuals",
    "mid_block_additional_residual",
    "down_intrablock_additional_residuals",
)


class SkipFamily(Family):
    """What step policies must know of a UNet."""

    has_skips = True

    def adds_to_skips(self, inputs: dict[str, Any]) -> bool:
        """Residuals of a ControlNet or features of a T2I-Adapter are given."""
        return any(inputs.get(name) is not None for name in _RESIDUALS)

    def default_boundary(self, stages: Sequence[Stage]) -> Boundary:
        """All but the last layer of the last up block, whose skip the first convolution makes."""
        last = stages[-2]
        resnets = [i for i, group in enumerate(last.groups) if _is_resnet(group)]
        if len(resnets) < 2:
            return super().default_boundary(stages)
        return Boundary(last.groups[resnets[-1] - 1].name)

    def published_boundary(self, stages: Sequence[Stage]) -> Boundary | None:
        """From the first convolution to the first temporal layer of the last up block."""
        names = [group.name for group in stages[-2].groups]
        temporal = [name for name in names if self.is_temporal(name)]
        return Boundary(temporal[0], first=stages[1].name) if temporal else None

    def is_temporal(self, name: str) -> bool:
        """Whether a group of that name mixes frames."""
        return ".motion_modules." in name


def _is_resnet(group: Group) -> bool:
    return ".resnets." in group.name and getattr(group, "joins", False)


class UNet(SkipFamily):
    """A UNet of diffusers; a family names its block classes and its layers.

    A block whose class is not named, or that has hooks, is one group that runs as it came.
    """

    #: Block classes whose children are run one by one.
    down_classes: tuple[type, ...] = ()
    mid_classes: tuple[type, ...] = ()
    up_classes: tuple[type, ...] = ()
    #: Lists of a block whose items follow its ResNets, in order, and their groups.
    layers: tuple[tuple[str, Layer], ...] = ()
    #: The stock blocks are told the number of frames.
    frames = False
    #: The forward takes the residuals of ControlNets, and the features of T2I-Adapters.
    controlnets = False
    adapters = False

    def block_reason(self, block: nn.Module, classes: tuple[type, ...]) -> str:
        """Why a block must run as it came; empty if its children can be run one by one.

        Args:
            block: a down, mid or up block.
            classes: those that the family names for its place.
        """
        return "" if is_plain(block, *classes) else container_reason(block, classes)

    @abstractmethod
    def embed(self, model: nn.Module, config: Config) -> Group:
        """The group that fills ``state.temb`` and ``state.context``."""

    def parts(
        self, model: nn.Module, inputs: dict[str, Any], config: Config
    ) -> list[dict[str, Any]]:
        """``samples_per_pass`` at a time, where samples do not look at each other."""
        known = (*self.down_classes, *self.mid_classes, *self.up_classes)
        return unet_passes(model, inputs, config, self.frames_of(inputs), known)

    def begin(self, model: nn.Module, inputs: dict[str, Any]) -> State:
        """Notes whether upsamplers must aim at the sizes of the skips."""
        unet: Any = model
        state = State(inputs)
        factor = 2 ** getattr(unet, "num_upsamplers", 0)
        state.extras["odd_size"] = any(size % factor for size in inputs["sample"].shape[-2:])
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
            Stage("embed", (self.embed(model, config),)),
            Stage("conv_in", (ConvInGroup("conv_in", unet.conv_in, config, push=True),)),
        ]
        for i, block in enumerate(unet.down_blocks):
            stages.append(self._down(f"down_blocks.{i}", block, config))
        stages.append(self._mid(unet.mid_block, config))
        before: UpsampleGroup | None = None
        for i, block in enumerate(unet.up_blocks):
            final = i == len(unet.up_blocks) - 1
            stage = self._up(f"up_blocks.{i}", block, config, final, before)
            before = last_upsampler(stage.groups)
            stages.append(stage)
        norm = unet.conv_norm_out or None
        act = unet.conv_act if norm is not None else None
        out = OutGroup("conv_out", unet.conv_out, config, norm=norm, act=act)
        return (*stages, Stage("out", (out,)))

    def _layers(self, name: str, block: Any, config: Config, index: int) -> list[Group]:
        """The layers after one ResNet, those that the block has."""
        groups: list[Group] = []
        for kind, group in self.layers:
            modules = getattr(block, kind, None)
            if modules is not None and modules[index] is not None:
                groups.append(group(f"{name}.{kind}.{index}", modules[index], config))
        return groups

    def _down(self, name: str, block: Any, config: Config) -> Stage:
        groups: list[Group] = []
        adapter = AdapterGroup(f"{name}.adapter", config)
        cross = getattr(block, "has_cross_attention", False)
        why = self.block_reason(block, self.down_classes)
        if why:
            groups.append(StockDownGroup(name, block, config, why, frames=self.frames))
        else:
            for i, resnet in enumerate(block.resnets):
                groups.append(ResnetGroup(f"{name}.resnets.{i}", resnet, config))
                groups += self._layers(name, block, config, i)
                if self.adapters and cross and i == len(block.resnets) - 1:
                    groups.append(adapter)
                groups[-1] = PushGroup(groups[-1])
            for i, module in enumerate(block.downsamplers or ()):
                last = i == len(block.downsamplers) - 1
                path = f"{name}.downsamplers.{i}"
                groups.append(DownsampleGroup(path, module, config, push=last))
        if self.adapters and not cross:
            groups.append(adapter)
        return Stage(name, tuple(groups))

    def _mid(self, block: Any, config: Config) -> Stage:
        """The residuals of a ControlNet come before the block and after it."""
        name = "mid_block"
        groups: list[Group] = []
        if self.controlnets:
            groups.append(ResidualsGroup("down_residuals", config, "down"))
        why = "" if block is None else self.block_reason(block, self.mid_classes)
        if why:
            frames = self.frames and hasattr(block, "motion_modules")
            groups.append(StockMidGroup(name, block, config, why, frames=frames))
        elif block is not None:
            groups.append(ResnetGroup(f"{name}.resnets.0", block.resnets[0], config))
            for i, resnet in enumerate(block.resnets[1:]):
                groups += self._layers(name, block, config, i)
                groups.append(ResnetGroup(f"{name}.resnets.{i + 1}", resnet, config))
        if self.adapters and block is not None:
            groups.append(AdapterGroup(f"{name}.adapter", config, only_same_shape=True))
        if self.controlnets:
            groups.append(ResidualsGroup("mid_residual", config, "mid"))
        return Stage(name, tuple(groups))

    def _up(
        self, name: str, block: Any, config: Config, final: bool, before: UpsampleGroup | None
    ) -> Stage:
        why = self.block_reason(block, self.up_classes)
        if why:
            stock = StockUpGroup(name, block, config, why, final=final, frames=self.frames)
            return Stage(name, (stock,))
        groups: list[Group] = []
        for i, resnet in enumerate(block.resnets):
            path = f"{name}.resnets.{i}"
            group = ResnetGroup(path, resnet, config, joins=True, owner=block, before=before)
            groups.append(group)
            before = None
            groups += self._layers(name, block, config, i)
        for i, module in enumerate(block.upsamplers or ()):
            path = f"{name}.upsamplers.{i}"
            groups.append(UpsampleGroup(path, module, config, to_skip=not final))
        return Stage(name, tuple(groups))
