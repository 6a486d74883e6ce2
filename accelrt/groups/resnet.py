"""ResNet blocks, sliced along images."""

from __future__ import annotations

from typing import Any

import torch
from diffusers.models.resnet import ResnetBlock2D
from torch import Tensor, nn

from accelrt import ops
from accelrt.config import Config

from .base import Group, by_name
from .norms import GroupNormAct, unfused_norm
from .recognise import is_inactive_dropout, is_plain_conv, is_silu
from .slicing import slice_length
from .state import State, channels_last, empty_images, nhwc, per_image


class ResnetGroup(Group):
    """``ResnetBlock2D``: norm, SiLU, conv, time embedding, norm, SiLU, conv, shortcut.

    The norms are those of each image, so slices of images are independent. A block of
    an up stage reads its two sources without their concatenation ever existing whole.

    Args:
        name, module, config: as in :class:`Group`.
        joins: pop a skip and join it to the hidden states along the channels.
        owner: the up block, whose FreeU attributes are honoured.
    """

    axis = "frames"
    classes = (ResnetBlock2D,)

    def __init__(
        self,
        name: str,
        module: nn.Module,
        config: Config,
        *,
        joins: bool = False,
        owner: nn.Module | None = None,
    ) -> None:
        super().__init__(name, module, config)
        self.joins = joins
        self.owner = owner

    def configured_length(self) -> int | None:
        """Images per slice."""
        return self.config.frames_per_slice

    def unrecognised(self) -> str:
        """Besides hooks: variants of the block that the group does not know."""
        reason = super().unrecognised()
        if reason:
            return reason
        block: Any = self.module
        known = ("default", "scale_shift")  # the others do not use the projection
        if block.time_embedding_norm not in known and block.time_emb_proj is not None:
            return f"time_embedding_norm {block.time_embedding_norm!r} is not known"
        if not is_inactive_dropout(block.dropout):
            return "dropout is active"
        return ""

    def unfused(self) -> list[str]:
        """Norms that are not plain."""
        block: Any = self.module
        return [
            *unfused_norm("norm1", block.norm1, block.nonlinearity),
            *unfused_norm("norm2", block.norm2, block.nonlinearity),
        ]

    def _freeu(self, state: State, x: Tensor, x2: Tensor) -> tuple[Tensor, Tensor]:
        owner: Any = self.owner
        names = ("s1", "s2", "b1", "b2")
        values = {name: getattr(owner, name, None) for name in names}
        if owner.resolution_idx not in (0, 1) or not all(values.values()):
            return x, x2
        from diffusers.utils.torch_utils import apply_freeu

        if x is x2 or not state.writable(x):
            x = x.clone()  # FreeU scales half of the channels in place
        x, x2 = apply_freeu(owner.resolution_idx, x, x2, **values)
        return channels_last(x), channels_last(x2)

    def run(self, state: State) -> None:
        """One ResNet block on ``state.hidden`` (and the popped skip)."""
        x = state.take()
        x2 = state.skips.pop() if self.joins else None
        if x2 is not None and self.owner is not None:
            x, x2 = self._freeu(state, x, x2)
        block: Any = self.module
        reason = self.unrecognised()
        if not reason and state.temb is not None and self._drops_time():
            reason = "a time embedding without a projection"
        if reason:
            self.left_alone = reason
            full = x if x2 is None else torch.cat([x, x2], dim=1)
            y = by_name(block, ResnetBlock2D, input_tensor=full, temb=state.temb_per_image())
            state.hidden = channels_last(y)
            state.hold(state.hidden)
            return
        state.hidden = self._sliced(state, x, x2)

    def _drops_time(self) -> bool:
        """The stock block would add the bare embedding, which has the wrong width."""
        block: Any = self.module
        return block.time_emb_proj is None and block.time_embedding_norm == "default"

    def _time_rows(self, state: State) -> Tensor | None:
        """The projected time embedding ``[N, C]`` or ``[N, 2 C]``, one row per image."""
        block: Any = self.module
        if block.time_emb_proj is None:
            return None
        if state.temb is None:
            raise ValueError(f"{self.name}: the block needs a time embedding; temb is None")
        rows: Tensor | None
        if block.skip_time_act:
            rows = state.temb
        elif is_silu(block.nonlinearity):
            rows = state.activated_temb()
        else:
            rows = block.nonlinearity(state.temb)
        return per_image(block.time_emb_proj(rows), state.frames)

    def _sliced(self, state: State, x: Tensor, x2: Tensor | None) -> Tensor:
        block: Any = self.module
        fuse = self.config.fuse
        first = GroupNormAct(block.norm1, block.nonlinearity, x.dtype, fuse)
        second = GroupNormAct(block.norm2, block.nonlinearity, x.dtype, fuse)
        overwrite1, overwrite2 = is_plain_conv(block.conv1), is_plain_conv(block.conv2)
        resample = block.upsample if block.upsample is not None else block.downsample
        scale = 1.0 / block.output_scale_factor
        rows = self._time_rows(state)
        time_scale = time_shift = None
        if rows is not None and block.time_embedding_norm == "scale_shift":
            time_scale, time_shift = rows.chunk(2, dim=1)
            rows = None

        images, channels, height, width = x.shape
        joined = channels if x2 is None else channels + x2.shape[1]
        widest = max(joined, block.out_channels) * height * width * x.element_size()
        n = slice_length(images, self.config.frames_per_slice, widest, self.config, x.device)
        self.measured(n, images)

        single = n >= images
        out: Tensor | None = None
        for start in range(0, images, n):
            stop = min(start + n, images)
            xs = x if single else x[start:stop]
            ys = x2 if single or x2 is None else x2[start:stop]
            h = first(xs, ys)
            if resample is not None:
                h = resample(h)
            h = block.conv1(h)
            h = second(
                h,
                add=None if rows is None else rows[start:stop],
                scale=None if time_scale is None else time_scale[start:stop],
                shift=None if time_shift is None else time_shift[start:stop],
                overwrite=overwrite1,
            )
            h = block.conv2(h)
            residual = xs
            if resample is not None or block.conv_shortcut is not None:
                residual = xs if ys is None else torch.cat([xs, ys], dim=1)
                if resample is not None:
                    residual = resample(residual)
                if block.conv_shortcut is not None:
                    residual = block.conv_shortcut(residual)
            elif ys is not None:
                residual = torch.cat([xs, ys], dim=1)
            if single:
                target = h if overwrite2 else torch.empty_like(h)
                out = target
            else:
                if out is None:
                    out = self._output(state, x, x2, h, images)
                target = out[start:stop]
            _residual_sum(residual, h, block.output_scale_factor, scale, target, fuse)
        assert out is not None
        return channels_last(out)

    def _output(self, state: State, x: Tensor, x2: Tensor | None, h: Tensor, images: int) -> Tensor:
        """Where the slices go: over a dying input of the right shape, or a new buffer."""
        shape = (images, *h.shape[1:])
        if self.config.inplace:
            # A slice is written only after all its inputs were read.
            for dying in (x2, x):
                if (
                    dying is not None
                    and dying.shape == shape
                    and dying.dtype == h.dtype
                    and state.writable(dying)
                ):
                    return dying
        return empty_images(h, *shape)


def _residual_sum(
    x: Tensor, h: Tensor, factor: float, scale: float, out: Tensor, fuse: bool
) -> None:
    if fuse and x.dtype == h.dtype:
        ops.residual_blend(nhwc(x), nhwc(h), scale=scale, out=nhwc(out))
    elif factor == 1.0:
        torch.add(x, h, out=out) if x.dtype == h.dtype == out.dtype else out.copy_(x + h)
    else:
        out.copy_((x + h) / factor)
