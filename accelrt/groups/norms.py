"""Norm leaves: the fused operator when the module is recognised, else the module itself."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from accelrt import ops
from accelrt.memory.arena import temporary

from .recognise import is_silu, plain_norm
from .spare import Spare
from .state import channels_last, tokens


class GroupNormAct:
    """GroupNorm over each image, then an activation; decided once per group call.

    Args:
        norm: the norm module.
        act: the activation module, or ``None``.
        dtype: of the activations.
        fuse: allow the fused operators.
    """

    def __init__(
        self, norm: nn.Module, act: nn.Module | None, dtype: torch.dtype, fuse: bool
    ) -> None:
        self.norm = norm
        self.act = act
        self.fused = fuse and plain_norm(norm, nn.GroupNorm, dtype)
        self.silu = self.fused and is_silu(act)

    def __call__(
        self,
        x: Tensor,
        x2: Tensor | None = None,
        *,
        add: Tensor | None = None,
        scale: Tensor | None = None,
        shift: Tensor | None = None,
        overwrite: bool = False,
        spare: Spare | None = None,
    ) -> Tensor:
        """``act(norm(x | x2 + add) * (1 + scale) + shift)``.

        Args:
            x: ``[n, C1, H, W]``.
            x2: ``[n, C2, H, W]`` joined along the channels, or ``None``.
            add, scale, shift: ``[n, C]`` or ``None``.
            overwrite: the result may be written over ``x``.
            spare: where the result of the fused operator goes, if not there.
        """
        if self.fused:
            norm = self.norm
            assert isinstance(norm, nn.GroupNorm)
            stats = ops.group_norm_stats(x, norm.num_groups, x2=x2, add=add)
            out = x if overwrite and x2 is None else None
            if out is None and spare is not None:
                out = spare.images(x.shape[0], norm.num_channels, *x.shape[2:])
            normed = ops.group_norm_apply(
                x, stats, norm.num_groups, norm.weight, norm.bias, eps=norm.eps, x2=x2,
                add=add, scale=scale, shift=shift, silu=self.silu, out=out,
            )  # fmt: skip
            return normed if self.silu else self._activated(normed)
        full = x if x2 is None else torch.cat([x, x2], dim=1)
        if add is not None:
            full = full + add[:, :, None, None]
        y = norm_as_stock(self.norm, full)
        if scale is not None:
            y = y * (1 + scale[:, :, None, None])
        if shift is not None:
            y = y + shift[:, :, None, None]
        return self._activated(y)

    def _activated(self, y: Tensor) -> Tensor:
        if self.act is None:
            return y
        activated: Tensor = self.act(y)
        return activated


def norm_as_stock(norm: nn.Module, x: Tensor) -> Tensor:
    """Call a norm module on ``[n, C, H, W]`` in the layout that stock models give it.

    On channels-last tensors torch's CPU GroupNorm is ten times less accurate in float32.
    """
    return channels_last(norm(x.contiguous()))


class ClipNorm:
    """GroupNorm over ``(C/g, T, H, W)`` of each clip, then an activation, on slices of pixels.

    A plain norm needs its statistics first, one pass over everything, and is then applied
    to slices. Any other module normalises everything at once, as it came, and slices are
    taken from that.

    Args:
        norm: the norm module; it sees clips ``[B, C, T, H, W]``.
        act: the activation module, or ``None``.
        x: ``[B * T, C, H, W]``, channels-last.
        frames: ``T``.
        add: ``[B * T, C]``, added first, or ``None``.
        stats: the statistics of ``x + add`` if they are known already.
    """

    def __init__(
        self,
        norm: nn.Module,
        act: nn.Module | None,
        x: Tensor,
        frames: int,
        *,
        add: Tensor | None = None,
        stats: Tensor | None = None,
    ) -> None:
        self.norm = norm
        self.act = act
        self.frames = frames
        self.add = add
        self.stats: Tensor | None = None
        self.source = tokens(x)
        self.silu = is_silu(act)
        if plain_norm(norm, nn.GroupNorm, x.dtype):
            assert isinstance(norm, nn.GroupNorm)
            if stats is None:
                stats = ops.group_norm_stats(x, norm.num_groups, add=add, frames=frames)
            self.stats = stats
            return
        if add is not None:
            x = x + add[:, :, None, None]
        clips = x.view(-1, frames, *x.shape[1:]).transpose(1, 2)
        whole: Tensor = norm(clips.contiguous())  # see norm_as_stock
        self.source = tokens(whole.transpose(1, 2).reshape(x.shape))

    def __call__(self, start: int, stop: int) -> Tensor:
        """The pixels ``start`` to ``stop`` of all images, ``[B * T, P, C]``, contiguous."""
        part = self.source[:, start:stop]
        if self.stats is None:
            return part.contiguous() if self.act is None else self.act(part.contiguous())
        norm = self.norm
        assert isinstance(norm, nn.GroupNorm)
        y = temporary(part, *part.shape)
        ops.group_norm_apply(
            planar(part), self.stats, norm.num_groups, norm.weight, norm.bias, eps=norm.eps,
            add=self.add, frames=self.frames, silu=self.silu, out=planar(y),
        )  # fmt: skip
        return y if self.silu or self.act is None else self.act(y)


def planar(x: Tensor) -> Tensor:
    """``[N, P, C]`` as the norm operators take it: ``[N, C, 1, P]``."""
    return x.permute(0, 2, 1).unsqueeze(2)


def unfused_norm(name: str, norm: nn.Module, act: nn.Module | None) -> list[str]:
    """The remark of a summary if ``norm`` and ``act`` cannot be one fused operator."""
    if not plain_norm(norm, nn.GroupNorm, None):
        return [f"{name}: {type(norm).__name__} runs as it came"]
    if act is not None and not is_silu(act):
        return [f"{name}: {type(act).__name__} activation is separate"]
    return []
