"""Down- and upsamplers."""

from __future__ import annotations

from typing import Any

from diffusers.models.downsampling import Downsample2D
from diffusers.models.upsampling import Upsample2D
from torch import Tensor, nn

from accelrt.config import Config

from .base import Group, StockGroup, by_name
from .slicing import slice_length
from .state import State, channels_last, empty_images


class DownsampleGroup(StockGroup):
    """A strided convolution: one operator without intermediates, so nothing to slice.

    Args:
        name, module, config: as in :class:`Group`.
        push: the output is also a skip.
    """

    why = "a single convolution has no intermediates to slice"
    classes = (Downsample2D,)

    def __init__(self, name: str, module: nn.Module, config: Config, *, push: bool = False) -> None:
        super().__init__(name, module, config)
        self.push = push

    def run(self, state: State) -> None:
        """``[N, C, H, W]`` to ``[N, C', H', W']``."""
        x = channels_last(by_name(self.module, Downsample2D, hidden_states=state.take()))
        if self.unrecognised():
            state.hold(x)
        if self.push:
            state.skips.append(x)
        state.hidden = x


class UpsampleGroup(Group):
    """Nearest-neighbour upsampling and its convolution, sliced along images.

    The enlarged input exists for one slice only.

    Args:
        name, module, config: as in :class:`Group`.
        to_skip: aim at the size of the next skip when the state says that sizes are odd.
    """

    axis = "frames"
    classes = (Upsample2D,)

    def __init__(
        self, name: str, module: nn.Module, config: Config, *, to_skip: bool = False
    ) -> None:
        super().__init__(name, module, config)
        self.to_skip = to_skip

    def configured_length(self) -> int | None:
        """Images per slice."""
        return self.config.frames_per_slice

    def unfused(self) -> list[str]:
        """Interpolation and convolution run as they came."""
        return ["interpolation and convolution run as they came"]

    def run(self, state: State) -> None:
        """``[N, C, H, W]`` to ``[N, C', 2 H, 2 W]``, or to the size of the next skip."""
        x = state.take()
        module: Any = self.module
        size = None
        if self.to_skip and state.extras.get("odd_size"):
            size = state.skips[-1].shape[2:]
        reason = self.unrecognised()
        if reason or module.norm is not None or module.use_conv_transpose:
            self.left_alone = reason or "a variant with a norm or a transposed convolution"
            y = by_name(module, Upsample2D, hidden_states=x, output_size=size)
            state.hidden = channels_last(y)
            state.hold(state.hidden)
            return
        images, channels, height, width = x.shape
        pixels = 4 * height * width if size is None else int(size[0]) * int(size[1])
        n = slice_length(
            images,
            self.config.frames_per_slice,
            channels * pixels * x.element_size(),
            self.config,
            x.device,
        )
        self.measured(n, images)
        if n >= images:
            state.hidden = channels_last(module(x, size))
            return
        out: Tensor | None = None
        for start in range(0, images, n):
            y = module(x[start : start + n], size)
            if out is None:
                out = empty_images(y, images, *y.shape[1:])
            out[start : start + n] = y
        state.hidden = out
