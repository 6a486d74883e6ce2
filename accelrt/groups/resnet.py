"""ResNet blocks, sliced along images."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from diffusers.models.resnet import ResnetBlock2D
from torch import Tensor, nn

from accelrt import ops
from accelrt.config import Config
from accelrt.memory import arena
from accelrt.memory.arena import keep_to_plan, temporary_as, temporary_images

from .bands import (
    BandedResnet,
    NearestRows,
    enlarge_in_bands,
    resnet_bands_reason,
    rows_per_band,
    upsampler_row_conv,
)
from .base import UNTOUCHED, Group, Status, by_name
from .convolve import convolve, enlarge, is_ours
from .norms import GroupNormAct, unfused_norm
from .recognise import is_inactive_dropout, is_plain_conv, is_silu
from .sampling import UpsampleGroup
from .skips import Skip, whole
from .slab import FrameSlab, overlap
from .slicing import independent, slice_length, starts
from .spare import Spare
from .state import State, channels_last, empty_images, nhwc, per_image

_FREEU = ("s1", "s2", "b1", "b2")


class ResnetGroup(Group):
    """``ResnetBlock2D``: norm, SiLU, conv, time embedding, norm, SiLU, conv, shortcut.

    The norms are those of each image, so slices of images are independent. A block of
    an up stage reads its two sources without their concatenation ever existing whole.

    Args:
        name, module, config: as in :class:`Group`.
        joins: pop a skip and join it to the hidden states along the channels.
        owner: the up block, whose FreeU attributes are honoured.
        before: the upsampler that precedes the block; its output exists for a slice only.
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
        before: UpsampleGroup | None = None,
    ) -> None:
        super().__init__(name, module, config)
        self.joins = joins
        self.owner = owner
        self.before = before
        if before is not None:
            before.deferred = True

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

    def status(self) -> Status:
        """Also why the block takes no bands where the config asks for them."""
        status = super().status()
        if self.config.bands and self.config.fuse and status.kind != UNTOUCHED:
            why = resnet_bands_reason(self.module, None)
            if not why and self.before is not None:
                plain = self.before.unsliced() or upsampler_row_conv(self.before.module, None)
                why = "" if plain else "the upsampler has no plain 3x3 convolution"
            if why:
                status.reason = "; ".join(filter(None, (status.reason, f"no bands: {why}")))
        return status

    def _has_freeu(self) -> bool:
        owner: Any = self.owner
        if owner is None or owner.resolution_idx not in (0, 1):
            return False
        return all(getattr(owner, name, None) for name in _FREEU)

    def _freeu(self, state: State) -> None:
        """Scale hidden states and next skip, both whole."""
        owner: Any = self.owner
        x, x2 = state.take(), whole(state.skips.pop())
        from diffusers.utils.torch_utils import apply_freeu

        if x is x2 or not state.writable(x):
            x = x.clone()  # FreeU scales half of the channels in place
        values = {name: getattr(owner, name) for name in _FREEU}
        x, x2 = apply_freeu(owner.resolution_idx, x, x2, **values)
        state.hidden = channels_last(x)
        state.skips.append(channels_last(x2))

    def run(self, state: State) -> None:
        """One ResNet block on ``state.hidden`` (and the popped skip)."""
        reason = self.unrecognised()
        if not reason and state.temb is not None and self._drops_time():
            reason = "a time embedding without a projection"
        freeu = self.joins and self._has_freeu()
        pending = self.before is not None and self.before.is_pending(state)
        if self.before is not None and pending and (reason or freeu):
            self.before.enlarge(state)
            pending = False
        if freeu:
            self._freeu(state)
        if reason:
            self.left_alone = reason
            x = state.take()
            full = torch.cat([x, whole(state.skips.pop())], dim=1) if self.joins else x
            temb = state.temb_per_image()
            y = by_name(self.module, ResnetBlock2D, input_tensor=full, temb=temb)
            state.hidden = channels_last(y)
            state.hold(state.hidden)
            return
        plan = _Plan(self, state, self.before if pending else None)
        state.hidden = self._banded(state, plan) if plan.banded else self._sliced(state, plan)

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

    def _modulation(self, state: State) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """What the second norm adds, scales and shifts by: ``[N, C]`` each, or ``None``."""
        block: Any = self.module
        rows = self._time_rows(state)
        if rows is None or block.time_embedding_norm != "scale_shift":
            return rows, None, None
        scale, shift = rows.chunk(2, dim=1)
        return None, scale, shift

    def _sliced(self, state: State, plan: _Plan) -> Tensor:
        """Whole images, some at a time."""
        block: Any = self.module
        x = state.take()
        x2 = state.skips.pop() if self.joins else None
        fuse, before = self.config.fuse, plan.before
        first = GroupNormAct(block.norm1, block.nonlinearity, x.dtype, fuse)
        second = GroupNormAct(block.norm2, block.nonlinearity, x.dtype, fuse)
        overwrite1, overwrite2 = is_plain_conv(block.conv1), is_plain_conv(block.conv2)
        resample = block.upsample if block.upsample is not None else block.downsample
        scale = 1.0 / block.output_scale_factor
        modulation = self._modulation(state)
        spares = self._spares(x, plan) if x2 is None else _Spares()

        images, n = plan.images, plan.length
        self._measured(plan, n, images, "frames")
        single = n >= images
        out: Tensor | None = None
        parts = (block, None if before is None else before.module)
        slices: Iterable[int] = starts(images, n, x)
        if state.extras.get("slab") is None:  # else an image may go over those before it
            slices = independent(images, n, x, self.config, *parts)
        for start in slices:
            stop = min(start + n, images)
            xs = x if single else x[start:stop]
            ys = _images(x2, start, stop)
            if before is not None:
                both = (spares.first, spares.enlarged)
                xs = channels_last(enlarge(before.module, xs, plan.size, fuse=fuse, spares=both))
                keep_to_plan()  # a convolution leaves copies of its weights in the heap
            h = first(xs, ys, spare=spares.first)
            if resample is not None:
                h = resample(h)
            h = convolve(block.conv1, h, fuse=fuse, spare=spares.second)
            keep_to_plan()
            add, times, shift = (_images(t, start, stop) for t in modulation)
            h = second(h, add=add, scale=times, shift=shift, overwrite=overwrite1)
            h = convolve(block.conv2, h, fuse=fuse, spare=spares.first)
            keep_to_plan()
            residual = xs if ys is None else _joined(xs, ys)
            del xs, ys
            if resample is not None:
                residual = resample(residual)
            if block.conv_shortcut is not None:
                residual = convolve(block.conv_shortcut, residual, fuse=fuse, spare=spares.second)
            if single and spares.first is None:
                target = h if overwrite2 else temporary_as(h)
                out = target
            else:
                if out is None:
                    out = self._output(state, x, x2, h, tuple(h.shape[1:]))
                target = out[start:stop]
            _residual_sum(residual, h, block.output_scale_factor, scale, target, fuse)
            del h, residual, target
        assert out is not None
        return channels_last(out)

    def _spares(self, x: Tensor, plan: _Plan) -> _Spares:
        """Buffers of the slices, where nothing but our kernels would make tensors."""
        block: Any = self.module
        convs = [block.conv1, block.conv2]
        if block.conv_shortcut is not None:
            convs.append(block.conv_shortcut)
        ours = all(is_ours(conv, x) for conv in convs) and not self.unfused()
        resamples = block.upsample is not None or block.downsample is not None
        # Two slices at once would need two of each; one slice that is all, without an arena that
        # keeps holes out of the heap, has its output where it would have a buffer.
        alone = plan.length >= plan.images and arena.current() is None
        if not (self.config.fuse and ours) or resamples or alone or self.config.pipeline_slices:
            return _Spares()
        pixels = plan.length * plan.height * plan.width
        widest = max(x.shape[1], plan.channels, block.conv2.out_channels)
        return _Spares(
            Spare(x, widest * pixels),
            Spare(x, max(block.conv1.out_channels, block.conv2.out_channels) * pixels),
            Spare(x, plan.channels * pixels),
        )

    def _banded(self, state: State, plan: _Plan) -> Tensor:
        """One image at a time, in bands of rows."""
        block: Any = self.module
        x = state.take()
        x2 = state.skips.pop() if self.joins else None
        modulation = self._modulation(state)
        rows, size, again = plan.rows, (plan.height, plan.width), self.config.recomputes
        self._measured(plan, rows, plan.height, "rows")

        nearest: NearestRows | None = None
        enlarged: Tensor | None = None  # one image
        if plan.before is not None:
            nearest = NearestRows(plan.conv, x, size, rows)
            if not again:
                enlarged = empty_images(x, 1, plan.channels, *size)
                if plan.images == 1:  # all of it, so that x dies before the output is made
                    enlarge_in_bands(nearest, x, enlarged, rows)
                    x, nearest = enlarged, None
        shape = (block.conv2.out_channels, *size)
        out = self._output(state, x, x2, x, shape)
        bands = BandedResnet(block, x, size, rows, nearest if again else None)
        own = out is x or out is x2 or block.conv1.out_channels != shape[0]
        in_slab = out is not x and state.extras.get("slab") is not None
        hidden: Tensor | None = None
        if own and (not again or nearest is not None):
            hidden = empty_images(x, 1, block.conv1.out_channels, *size)
        for i in starts(plan.images, 1, x):
            xi, ys, target = x[i : i + 1], _images(x2, i, i + 1), out[i : i + 1]
            if in_slab and overlap(xi, target):
                xi = xi.clone()
            if nearest is not None and enlarged is not None:
                enlarge_in_bands(nearest, xi, enlarged, rows)
                xi = enlarged
            add, scale, shift = (_images(t, i, i + 1) for t in modulation)
            kept = hidden if own else target
            bands(xi, ys, target, kept, add=add, scale=scale, shift=shift)
            del xi, ys, target, kept
        return out

    def _measured(self, plan: _Plan, length: int, total: int, axis: str) -> None:
        """Remember how the call was cut, also for the upsampler inside it."""
        for group in (self, plan.before):
            if group is not None:
                group.axis = axis
                group.measured(length, total)

    def _output(
        self, state: State, x: Tensor, x2: Skip | None, like: Tensor, shape: tuple[int, ...]
    ) -> Tensor:
        """Where the images go: over a dying input of the right shape, or a new buffer."""
        images, (channels, height, width) = x.shape[0], shape
        if self.config.inplace:
            # A slice is written only after all its inputs were read.
            for dying in (x2, x):
                if (
                    isinstance(dying, Tensor)
                    and dying.shape == (images, *shape)
                    and dying.dtype == like.dtype
                    and state.writable(dying)
                ):
                    return dying
            slab: FrameSlab | None = state.extras.get("slab")
            part = None if slab is None else slab.place(state, x, (channels, height, width))
            if part is not None:
                return part
        return empty_images(like, images, channels, height, width)


class _Spares(NamedTuple):
    """Buffers for the slices of a block: ``None`` where every slice makes tensors of its own.

    The steps of the block take the first and the second in turn, from the enlarged input to
    the second convolution; then the second is free for the shortcut.
    """

    first: Spare | None = None
    second: Spare | None = None
    enlarged: Spare | None = None


class _Plan:
    """How one call of a group is cut.

    Args:
        group: the group.
        state: its hidden states and skips are not taken yet.
        before: the upsampler to be run on the group's slices.
    """

    def __init__(self, group: ResnetGroup, state: State, before: UpsampleGroup | None) -> None:
        block: Any = group.module
        config = group.config
        x = state.hidden
        assert x is not None
        self.before = before
        self.size = None if before is None else before.size(state)
        shape = x.shape[1:] if before is None else before.shape(x, self.size)
        self.images = x.shape[0]
        self.channels, self.height, self.width = shape
        joined = self.channels + (state.skips[-1].shape[1] if group.joins else 0)
        row = max(joined, block.out_channels) * self.width * x.element_size()
        wanted = config.frames_per_slice
        self.length = slice_length(self.images, wanted, row * self.height, config, x.device)
        self.rows = rows_per_band(self.height, row, config, x.device)
        self.conv = None if before is None else upsampler_row_conv(before.module, x.dtype)
        self.banded = (
            self.rows < self.height
            and config.fuse
            and (before is None or self.conv is not None)
            and not resnet_bands_reason(block, x.dtype)
        )


def _images(x: Skip | None, start: int, stop: int) -> Tensor | None:
    """The images ``start`` to ``stop`` of a tensor, or of a skip that is recomputed."""
    if x is None or not isinstance(x, Tensor):
        return None if x is None else x.images(start, stop)
    return x if stop - start == x.shape[0] else x[start:stop]


def _joined(x: Tensor, y: Tensor) -> Tensor:
    """Two slices of channels-last images, joined along the channels."""
    if torch.compiler.is_compiling():  # Dynamo takes no ``out`` of this layout
        return torch.cat([x, y], dim=1)
    joint = temporary_images(x, x.shape[0], x.shape[1] + y.shape[1], *x.shape[2:])
    return torch.cat([x, y], dim=1, out=joint)


def _residual_sum(
    x: Tensor, h: Tensor, factor: float, scale: float, out: Tensor, fuse: bool
) -> None:
    if fuse and x.dtype == h.dtype:
        ops.residual_blend(nhwc(x), nhwc(h), scale=scale, out=nhwc(out))
    elif factor == 1.0:
        torch.add(x, h, out=out) if x.dtype == h.dtype == out.dtype else out.copy_(x + h)
    else:
        out.copy_((x + h) / factor)
