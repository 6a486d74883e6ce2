"""First and last convolutions of a UNet or VAE."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from accelrt.config import Config

from .base import FUSED, Group, Status
from .norms import GroupNormAct, unfused_norm
from .recognise import is_plain_conv
from .slicing import slice_length
from .state import State, channels_last


class ConvInGroup(Group):
    """The first convolution; the change to channels-last is made on its small input.

    Args:
        name, module, config: as in :class:`Group`; ``module`` is the convolution.
        push: the output is also the first skip.
        frames_first: videos are ``[B, T, C, H, W]``, not ``[B, C, T, H, W]``.
    """

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

    def unfused(self) -> list[str]:
        """The convolution is the library's in any case."""
        return []

    def status(self) -> Status:
        """The layout change is part of the input's reshaping."""
        return Status(FUSED, "layout change on the input")

    def run(self, state: State) -> None:
        """Read ``state.inputs["sample"]`` (a video, or ``[N, C, H, W]``)."""
        sample: Tensor = state.inputs["sample"]
        if sample.dim() == 5 and self.frames_first:
            sample = sample.flatten(0, 1)
        elif sample.dim() == 5:
            batch, channels, frames, height, width = sample.shape
            images = sample.permute(0, 2, 3, 4, 1).reshape(batch * frames, height, width, channels)
            sample = images.permute(0, 3, 1, 2)
        x = channels_last(self.module(channels_last(sample)))
        if self.push:
            state.skips.append(x)
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
        size = channels * height * width * x.element_size()
        n = slice_length(images, self.config.frames_per_slice, size, self.config, x.device)
        self.measured(n, images)
        if n >= images:
            h = x if norm is None else norm(x)
            state.hidden = conv(h).contiguous()
            if not is_plain_conv(conv):
                state.hold(state.hidden)
            return
        out: Tensor | None = None
        for start in range(0, images, n):
            xs = x[start : start + n]
            h = conv(xs if norm is None else norm(xs))
            if out is None:
                out = torch.empty((images, *h.shape[1:]), dtype=h.dtype, device=h.device)
            out[start : start + n] = h
        state.hidden = out
