"""Down- and upsamplers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from diffusers.models.downsampling import Downsample2D
from diffusers.models.upsampling import Upsample2D
from torch import Tensor, nn

from accelrt.config import Config

from .bands import NearestRows, enlarge_in_bands, rows_per_band, upsampler_row_conv
from .base import Group, by_name
from .convolution import over_images, recomputed, skips_are_ours
from .convolve import enlarge
from .recognise import is_plain
from .slicing import independent, slice_length, starts
from .state import State, channels_last, empty_images


class DownsampleGroup(Group):
    """A strided convolution, sliced along images.

    Its output, as a skip, is computed again from the skip beneath with
    ``recompute="always"``.

    Args:
        name, module, config: as in :class:`Group`.
        push: the output is also a skip.
    """

    axis = "frames"
    classes = (Downsample2D,)
    makes_skip = True

    def __init__(self, name: str, module: nn.Module, config: Config, *, push: bool = False) -> None:
        super().__init__(name, module, config)
        self.push = push

    def configured_length(self) -> int | None:
        """Images per slice."""
        return self.config.frames_per_slice

    def unfused(self) -> list[str]:
        """Nothing is done on the way to the convolution."""
        return []

    def run(self, state: State) -> None:
        """``[N, C, H, W]`` to ``[N, C', H', W']``."""
        x = state.take()
        module: Any = self.module
        self.left_alone = self.unrecognised()
        if self.left_alone:
            y = channels_last(by_name(module, Downsample2D, hidden_states=x))
            state.hold(y)
        else:
            plain = is_plain(module.conv, nn.Conv2d, nn.AvgPool2d)
            y, n = over_images(module, x, self.config, plain=plain)
            self.measured(n, x.shape[0])
        state.hidden = y
        if not self.push:
            return
        again = self.config.recomputes and not self.left_alone and plain and skips_are_ours(state)
        from_skip = bool(state.skips) and state.skips[-1] is x
        state.skips.append(recomputed(module, x, y, self.config) if again and from_skip else y)


class UpsampleGroup(Group):
    """Nearest-neighbour upsampling and its convolution, sliced along images.

    The enlarged input exists for one slice only; where a ResNet group takes the upsampler
    as its ``before``, so does the output: this group then only notes in ``state.extras``,
    under its name, that the hidden states are still to be enlarged.

    Args:
        name, module, config: as in :class:`Group`.
        to_skip: aim at the size of the next skip when the state says that sizes are odd.

    Attributes:
        deferred: the ResNet group that follows enlarges its own slices.
    """

    axis = "frames"
    classes = (Upsample2D,)

    def __init__(
        self, name: str, module: nn.Module, config: Config, *, to_skip: bool = False
    ) -> None:
        super().__init__(name, module, config)
        self.to_skip = to_skip
        self.deferred = False

    def configured_length(self) -> int | None:
        """Images per slice."""
        return self.config.frames_per_slice

    def unfused(self) -> list[str]:
        """Interpolation and convolution are two operators."""
        return ["interpolation and convolution are two operators"]

    def unsliced(self) -> str:
        """Why the module must see all images at once; empty if it need not."""
        module: Any = self.module
        reason = self.unrecognised()
        if not reason and (module.norm is not None or module.use_conv_transpose):
            return "a variant with a norm or a transposed convolution"
        return reason

    def size(self, state: State) -> tuple[int, int] | None:
        """Height and width of the next skip if they are the target, else ``None``."""
        if not self.to_skip or not state.extras.get("odd_size"):
            return None
        height, width = state.skips[-1].shape[2:]
        return height, width

    def shape(self, x: Tensor, size: tuple[int, int] | None) -> tuple[int, int, int]:
        """Channels, height and width of the output."""
        module: Any = self.module
        channels = module.out_channels if module.use_conv else x.shape[1]
        if size is None:
            factor = 2 if module.interpolate else 1
            size = factor * x.shape[2], factor * x.shape[3]
        return channels, *size

    def is_pending(self, state: State) -> bool:
        """Whether the hidden states still are the input of this group."""
        return bool(state.extras.get(self.name))

    def run(self, state: State) -> None:
        """``[N, C, H, W]`` to ``[N, C', 2 H, 2 W]``, or to the size of the next skip."""
        # The mark stays: who repeats the stages after this one finds it again.
        state.extras[self.name] = pending = self.deferred and not self.unsliced()
        if not pending:
            self.enlarge(state)

    def enlarge(self, state: State) -> None:
        """All images."""
        size = self.size(state)
        x = state.take()
        module: Any = self.module
        self.left_alone = self.unsliced()
        if self.left_alone:
            y = by_name(module, Upsample2D, hidden_states=x, output_size=size)
            state.hidden = channels_last(y)
            state.hold(state.hidden)
            return
        images = x.shape[0]
        channels, height, width = self.shape(x, size)
        row = max(x.shape[1], channels) * width * x.element_size()
        conv = upsampler_row_conv(module, x.dtype)
        rows = height if conv is None else rows_per_band(height, row, self.config, x.device)
        out: Tensor | None = None
        if rows < height:
            self.axis = "rows"
            self.measured(rows, height)
            nearest = NearestRows(conv, x, (height, width), rows)
            out = empty_images(x, images, channels, height, width)
            for i in starts(images, 1, x):
                enlarge_in_bands(nearest, x[i : i + 1], out[i : i + 1], rows)
            state.hidden = out
            return
        n = slice_length(images, self.config.frames_per_slice, row * height, self.config, x.device)
        self.axis = "frames"
        self.measured(n, images)
        if n >= images:
            state.hidden = channels_last(enlarge(module, x, size, fuse=self.config.fuse))
            return
        for start in independent(images, n, x, self.config, module):
            y = enlarge(module, x[start : start + n], size, fuse=self.config.fuse)
            if out is None:
                out = empty_images(y, images, *y.shape[1:])
            out[start : start + n] = y
        state.hidden = out


def last_upsampler(groups: Sequence[Group]) -> UpsampleGroup | None:
    """The upsampler that ends a stage, which the next stage may run on its own slices."""
    last = groups[-1] if groups else None
    return last if isinstance(last, UpsampleGroup) else None
