"""ResNet blocks with a temporal half: frames first, then pixels."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from diffusers.models.resnet import AlphaBlender, SpatioTemporalResBlock, TemporalResnetBlock
from torch import Tensor, nn

from accelrt import ops
from accelrt.config import Config

from .base import Group, StockGroup, container_reason
from .convolve import along_frames
from .mixing import image_only, mixer_reason, temporal_weight
from .norms import ClipNorm, planar, unfused_norm
from .recognise import is_inactive_dropout, is_plain, is_silu, plain_norm
from .resnet import ResnetGroup
from .sampling import UpsampleGroup
from .skips import whole
from .slicing import independent, slice_length, starts
from .state import State, channels_last, empty_images, empty_rows, per_image, tokens


def spatio_temporal_resnet(
    name: str,
    module: nn.Module,
    config: Config,
    *,
    joins: bool = False,
    before: UpsampleGroup | None = None,
) -> list[Group]:
    """The groups of one ``SpatioTemporalResBlock``: its spatial and its temporal half.

    Args:
        name, module, config: as in :class:`Group`.
        joins: pop a skip and join it to the hidden states along the channels.
        before: as for :class:`ResnetGroup`.
    """
    if not is_plain(module, SpatioTemporalResBlock):
        why = container_reason(module, (SpatioTemporalResBlock,))
        return [StockResnetGroup(name, module, config, why, joins=joins)]
    block: Any = module
    spatial = ResnetGroup(
        f"{name}.spatial_res_block", block.spatial_res_block, config, joins=joins, before=before
    )
    temporal = TemporalResnetGroup(
        f"{name}.temporal_res_block", block.temporal_res_block, config, mixer=block.time_mixer
    )
    return [spatial, temporal]


def resnet_containers(block: nn.Module) -> Iterator[nn.Module]:
    """The blocks of ``block`` whose halves are groups of their own."""
    for resnet in getattr(block, "resnets", ()):
        if isinstance(resnet, SpatioTemporalResBlock):
            yield resnet


class StockResnetGroup(StockGroup):
    """A whole block with hooks, or of another class: called as it came.

    Args:
        name, module, config: as in :class:`Group`.
        why: the reason.
        joins: as for :func:`spatio_temporal_resnet`.
    """

    def __init__(
        self, name: str, module: nn.Module, config: Config, why: str, *, joins: bool
    ) -> None:
        super().__init__(name, module, config)
        self.why = why
        self.joins = joins

    def run(self, state: State) -> None:
        """``[N, C, H, W]`` (and the popped skip) through the stock block."""
        x = state.take()
        if self.joins:
            x = torch.cat([x, whole(state.skips.pop())], dim=1)
        indicator = image_only(state, x)
        y = self.module(x, temb=state.temb_per_image(), image_only_indicator=indicator)
        state.hidden = channels_last(y)
        state.hold(state.hidden)


class TemporalResnetGroup(Group):
    """``TemporalResnetBlock`` and the blend with its input, sliced along pixels.

    Both norms run over ``(C/g, T, H, W)``, so their statistics are collected over all
    slices before the slices are normalised; the convolutions of kernel ``(3, 1, 1)``
    treat each pixel alone. What must exist whole is the input and the output of the
    first convolution, the latter for ``samples_per_slice`` samples, and not with
    ``recompute="always"``, which computes it twice. In diffusers' layout of channels-last
    images ``[B * T, H, W, C]`` the frames of a pixel are already where a channels-last
    ``Conv3d`` wants them: nothing is permuted in memory.

    Args:
        name, module, config: as in :class:`Group`.
        mixer: the ``AlphaBlender`` of the block.
    """

    axis = "pixels"
    classes = (TemporalResnetBlock,)

    def __init__(self, name: str, module: nn.Module, config: Config, *, mixer: nn.Module) -> None:
        super().__init__(name, module, config)
        self.mixer = mixer

    def configured_length(self) -> int | None:
        """Pixels per slice."""
        return self.config.pixels_per_slice

    def unrecognised(self) -> str:
        """Besides hooks: parts that do not treat every pixel alone."""
        reason = super().unrecognised()
        if reason:
            return reason
        if type(self.mixer) is not AlphaBlender:
            return mixer_reason(self.mixer)
        block: Any = self.module
        for name in ("conv1", "conv2"):
            if not is_temporal_conv(getattr(block, name)):
                return f"{name} is not a convolution along the frames alone"
        if block.conv_shortcut is not None:
            return "a convolution in the shortcut"
        if not is_inactive_dropout(block.dropout):
            return "dropout is active"
        return ""

    def unfused(self) -> list[str]:
        """Norms or a blend that are not plain, or an activation that is not SiLU."""
        block: Any = self.module
        reason = mixer_reason(self.mixer)
        return [
            *unfused_norm("norm1", block.norm1, block.nonlinearity),
            *unfused_norm("norm2", block.norm2, block.nonlinearity),
            *([f"time_mixer: {reason}"] if reason else []),
        ]

    def run(self, state: State) -> None:
        """``[N, C, H, W]`` to the same shape."""
        x = state.take()
        reason = self.unrecognised()
        if reason:
            self.left_alone = reason
            state.hidden = self._stock(state, x)
            state.hold(state.hidden)
            return
        state.hidden = self._sliced(state, x)

    def _stock(self, state: State, x: Tensor) -> Tensor:
        """Both halves of the blend in the stock layout ``[B, C, T, H, W]``."""
        clips = x.view(-1, state.frames, *x.shape[1:]).transpose(1, 2)
        temb = state.temb_per_image()
        if temb is not None:
            temb = temb.view(-1, state.frames, temb.shape[1])
        y = self.mixer(
            x_spatial=clips,
            x_temporal=self.module(clips, temb),
            image_only_indicator=image_only(state, x),
        )
        return channels_last(y.transpose(1, 2).flatten(0, 1))

    def _time_rows(self, state: State) -> Tensor | None:
        """The projected time embedding ``[N, C]``."""
        block: Any = self.module
        if block.time_emb_proj is None:
            return None
        if state.temb is None:
            raise ValueError(f"{self.name}: the block needs a time embedding; temb is None")
        silu = is_silu(block.nonlinearity)
        rows = state.activated_temb() if silu else block.nonlinearity(state.temb)
        return per_image(block.time_emb_proj(rows), state.frames)

    def _sliced(self, state: State, x: Tensor) -> Tensor:
        frames, config = state.frames, self.config
        images, channels, height, width = x.shape
        batch, pixels = images // frames, height * width
        of_pixel = frames * channels * x.element_size()
        samples = slice_length(batch, config.samples_per_slice, pixels * of_pixel, config, x.device)
        p = slice_length(pixels, config.pixels_per_slice, samples * of_pixel, config, x.device)
        self.measured(p, pixels)

        rows = self._time_rows(state)
        indicator = image_only(state, x)
        plain = not mixer_reason(self.mixer)
        weight = temporal_weight(self.mixer, state, x) if plain else None
        in_place = config.inplace and state.writable(x)
        out = x if in_place else empty_images(x, *x.shape)
        for start in starts(images, samples * frames, x):
            clip = slice(start, start + samples * frames)
            if weight is None:
                blend = partial(self._mixed, indicator=indicator[start // frames :][:samples])
            else:
                own = weight if weight.shape[0] == 1 else weight[clip]
                blend = partial(_weighted, weight=own, in_place=in_place)
            sample_rows = None if rows is None else rows[clip]
            self._samples(x[clip], tokens(out)[clip], sample_rows, blend, frames, p)
        return out

    def _mixed(self, x: Tensor, y: Tensor, out: Tensor, *, indicator: Tensor) -> None:
        """The blend by its own module, which hooks watch or load."""
        out.copy_(self.mixer(x_spatial=x, x_temporal=x + y, image_only_indicator=indicator))

    def _samples(
        self,
        x: Tensor,
        out: Tensor,
        rows: Tensor | None,
        blend: Callable[[Tensor, Tensor, Tensor], None],
        frames: int,
        p: int,
    ) -> None:
        """Some samples ``[b * T, C, H, W]``, ``p`` pixels at a time.

        ``out`` is ``[b * T, H * W, C]`` and may be the memory of ``x``.
        """
        block: Any = self.module
        images, _, height, width = x.shape
        pixels = height * width
        act = block.nonlinearity
        first = ClipNorm(block.norm1, act, x, frames)
        merge = plain_norm(block.norm2, nn.GroupNorm, x.dtype)
        # A norm that is not plain needs the convolution's output whole.
        again = merge and p < pixels and self.config.recomputes
        stats: Tensor | None = None
        hidden: Tensor | None = None
        for start in starts(pixels, p, x):
            y = along_frames(block.conv1, first(start, start + p), frames)
            if merge:
                stats = ops.group_norm_stats(
                    planar(y), block.norm2.num_groups, add=rows, frames=frames,
                    out=stats, accumulate=stats is not None,
                )  # fmt: skip
            if p >= pixels:
                hidden = y
                break
            if not again:
                if hidden is None:
                    hidden = empty_rows(y, images, pixels, y.shape[2])
                hidden[:, start : start + p] = y
            del y
        source = tokens(x)
        if hidden is not None:
            del first
            planes = hidden.view(images, height, width, -1).permute(0, 3, 1, 2)
            second = ClipNorm(block.norm2, act, planes, frames, add=rows, stats=stats)
            del planes
        parts = (block, self.mixer)
        for start in independent(pixels, p, x, self.config, *parts):
            part = slice(start, start + p)
            if hidden is None:
                y = along_frames(block.conv1, first(start, start + p), frames)
                y = ClipNorm(block.norm2, act, planar(y), frames, add=rows, stats=stats)(0, p)
            else:
                y = second(start, start + p)
            y = along_frames(block.conv2, y, frames)
            blend(source[:, part], y, out[:, part])
            del y


def _weighted(x: Tensor, y: Tensor, out: Tensor, *, weight: Tensor, in_place: bool) -> None:
    """``out = x + weight * y``; with ``in_place``, ``out`` is the memory of ``x``."""
    if in_place:
        out.addcmul_(weight, y)
    else:
        out.copy_(torch.addcmul(x, weight, y))


def is_temporal_conv(module: object) -> bool:
    """A 3-D convolution that treats every pixel alone and keeps the number of frames.

    Adapters of peft count: their additional convolutions have the same geometry, or a
    kernel of one.
    """
    if type(module).__module__.partition(".")[0] == "peft":
        module = getattr(module, "base_layer", None)
    if not isinstance(module, nn.Conv3d):
        return False
    taps = module.kernel_size[0]
    return (
        module.kernel_size[1:] == (1, 1)
        and module.stride == (1, 1, 1)
        and taps % 2 == 1
        and module.padding == (module.dilation[0] * (taps // 2), 0, 0)
        and module.padding_mode == "zeros"
    )
