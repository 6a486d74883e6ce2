"""First and last convolutions of a UNet or VAE."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from accelrt.config import Config
from accelrt.memory.arena import outlives_slice

from .bands import ConvRows, conv_in_bands, is_row_conv, rows_per_band, takes_rows
from .base import FUSED, Group, Status
from .convolve import convolve
from .independence import is_watched
from .norms import GroupNormAct, unfused_norm
from .recognise import is_plain_conv
from .skips import RecomputedSkip
from .slicing import independent, slice_length, starts
from .state import State, channels_last, empty_images


def over_images(module: Any, x: Tensor, config: Config, *, plain: bool) -> tuple[Tensor, int]:
    """A convolution of ``[N, C, H, W]``, some images at a time into one buffer.

    Args:
        module: the convolution, or a module around it that treats every image alone.
        x: channels-last.
        config: gives the length of a slice.
        plain: nobody else sees what goes through the module.

    Returns:
        The output, channels-last, and the images per slice.
    """
    images = x.shape[0]
    out_channels = getattr(module, "out_channels", x.shape[1])
    size = max(out_channels, x.shape[1]) * x.shape[2] * x.shape[3] * x.element_size()
    n = slice_length(images, config.frames_per_slice, size, config, x.device) if plain else images
    if n >= images:
        return channels_last(convolve(module, x, fuse=config.fuse)), images
    out: Tensor | None = None
    for start in independent(images, n, x, config, module):
        y = convolve(module, x[start : start + n], fuse=config.fuse)
        if out is None:
            out = empty_images(y, images, *y.shape[1:])
        out[start : start + n] = y
    assert out is not None
    return out, n


def skips_are_ours(state: State) -> bool:
    """Nothing of the call is added to the skips: what is popped is what was pushed."""
    return not state.extras.get("adapter") and state.extras.get("down_residuals") is None


def recomputed(module: Any, x: Tensor, like: Tensor, config: Config) -> RecomputedSkip:
    """The skip ``module(x)``, of which ``like`` is the value."""

    def images(start: int, stop: int) -> Tensor:
        return channels_last(convolve(module, x[start:stop], fuse=config.fuse))

    return RecomputedSkip(images, like)


class ConvInGroup(Group):
    """The first convolution; the change to channels-last is made on its small input.

    Its output, as a skip, is computed again from that input with ``recompute="always"``.

    Args:
        name, module, config: as in :class:`Group`; ``module`` is the convolution.
        push: the output is also the first skip.
        frames_first: videos are ``[B, T, C, H, W]``, not ``[B, C, T, H, W]``.
    """

    axis = "frames"
    makes_skip = True

    def __init__(
        self,
        name: str,
        module: nn.Module,
        config: Config,
        *,
        push: bool = False,
        frames_first: bool = False,
    ) -> None:
        super().__init__(name, module, config)
        self.push = push
        self.frames_first = frames_first

    def configured_length(self) -> int | None:
        """Images per slice."""
        return self.config.frames_per_slice

    def unfused(self) -> list[str]:
        """The convolution is the library's in any case."""
        return []

    def status(self) -> Status:
        """The layout change is part of the input's reshaping."""
        length = self.configured_length() if self.length is None else self.length
        return Status(FUSED, "layout change on the input", self.axis, length, self.total)

    def run(self, state: State) -> None:
        """Read ``state.inputs["sample"]`` (a video, or ``[N, C, H, W]``)."""
        sample: Tensor = state.inputs["sample"]
        if sample.dim() == 5 and self.frames_first:
            sample = sample.flatten(0, 1)
        elif sample.dim() == 5:
            batch, channels, frames, height, width = sample.shape
            images = sample.permute(0, 2, 3, 4, 1).reshape(batch * frames, height, width, channels)
            sample = images.permute(0, 3, 1, 2)
        sample = channels_last(sample)
        x, n = over_images(self.module, sample, self.config, plain=is_plain_conv(self.module))
        self.measured(n, sample.shape[0])
        if self.push:
            plain = is_plain_conv(self.module) and self.config.recomputes
            again = plain and skips_are_ours(state)
            state.skips.append(recomputed(self.module, sample, x, self.config) if again else x)
        state.hidden = x


class OutGroup(Group):
    """GroupNorm, activation and the last convolution, sliced along images.

    Args:
        name, module, config: as in :class:`Group`; ``module`` is the convolution.
        norm, act: the modules before it; both may be ``None``.
    """

    axis = "frames"

    def __init__(
        self,
        name: str,
        module: nn.Module,
        config: Config,
        *,
        norm: nn.Module | None,
        act: nn.Module | None,
    ) -> None:
        super().__init__(name, module, config)
        self.norm = norm
        self.act = act

    def configured_length(self) -> int | None:
        """Images per slice."""
        return self.config.frames_per_slice

    def unfused(self) -> list[str]:
        """The norm, if it is not plain."""
        return [] if self.norm is None else unfused_norm("norm", self.norm, self.act)

    def run(self, state: State) -> None:
        """``state.hidden`` becomes ``[N, C_out, H, W]`` in the standard layout."""
        x = state.take()
        conv: Any = self.module
        norm = None
        if self.norm is not None:
            norm = GroupNormAct(self.norm, self.act, x.dtype, self.config.fuse)
        images, channels, height, width = x.shape
        row = channels * width * x.element_size()
        rows = height
        if is_row_conv(conv, x.dtype) and (norm is None or takes_rows(norm)):
            rows = rows_per_band(height, row, self.config, x.device)
        if rows < height:
            self.axis = "rows"
            self.measured(rows, height)
            shape = (images, conv.out_channels, height, width)
            whole = torch.empty(shape, dtype=x.dtype, device=x.device)
            state.hidden = whole
            banded = ConvRows(conv, x, width, rows)
            for i in starts(images, 1, x):
                conv_in_bands(banded, norm, x[i : i + 1], whole[i : i + 1], rows)
            return
        parts = (conv, self.norm, self.act)
        n = slice_length(images, self.config.frames_per_slice, row * height, self.config, x.device)
        if any(part is not None and is_watched(part) for part in parts):
            n = images  # a hook may want all of them
        self.axis = "frames"
        self.measured(n, images)
        if n >= images:
            h = x if norm is None else norm(x)
            state.hidden = convolve(conv, h, fuse=self.config.fuse).contiguous()
            if not is_plain_conv(conv):
                state.hold(state.hidden)
            return
        out: Tensor | None = None
        for start in independent(images, n, x, self.config, *parts):
            xs = x[start : start + n]
            h = convolve(conv, xs if norm is None else norm(xs), fuse=self.config.fuse)
            if out is None:
                out = torch.empty((images, *h.shape[1:]), dtype=h.dtype, device=h.device)
                outlives_slice(out)
            out[start : start + n] = h
            del h
        state.hidden = out
