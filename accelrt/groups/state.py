"""What travels from stage to stage."""

from __future__ import annotations

import weakref
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from accelrt.memory import arena

from .skips import Skip


@dataclass
class Context:
    """Conditioning of the cross-attention layers.

    Args:
        full: what the model was given, ``[N, L, D]`` with one row per image; or a tuple
            (IP-Adapter), or ``None``.
        shared: ``[B, L, D]`` if the rows of all frames of a sample are the same, so that
            keys and values are computed once per sample; else ``None``.
        attention_mask: as the blocks of the model expect it.
        encoder_attention_mask: the same, over the rows of ``full``.
        cross_attention_kwargs: for attention processors.
    """

    full: Any = None
    shared: Tensor | None = None
    attention_mask: Tensor | None = None
    encoder_attention_mask: Tensor | None = None
    cross_attention_kwargs: dict[str, Any] | None = None


class State:
    """Activations and conditioning between stages.

    Between any two stages of a denoiser this is everything that the remaining stages
    need, so stages may be skipped, repeated or replaced there. Stages change the state
    in place and return it; :meth:`hold` protects a tensor that is kept elsewhere.

    Args:
        inputs: the arguments of the forward call by name.
        frames: frames per sample.
        context: conditioning of cross-attention.
        extras: what a family needs besides.

    Attributes:
        hidden: ``[N, C, H, W]``, channels-last, ``N`` images (batch times frames), or
            the residual stream ``[B, S, D]`` of an image transformer.
        skips: the stack of skip tensors of a UNet.
        temb: time embedding ``[B, E]``, one row per sample.
        held: weak references to tensors that somebody keeps.
    """

    def __init__(
        self,
        inputs: dict[str, Any],
        *,
        frames: int = 1,
        context: Context | None = None,
        extras: dict[str, Any] | None = None,
    ) -> None:
        # Not a dataclass: torch.compile cannot trace the default factories of one.
        self.inputs = inputs
        self.hidden: Tensor | None = None
        self.skips: list[Skip] = []
        self.temb: Tensor | None = None
        self.frames = frames
        self.context = Context() if context is None else context
        self.extras = {} if extras is None else extras
        self.held: list[weakref.ref[Tensor]] = []
        self._activated: Tensor | None = None

    def take(self) -> Tensor:
        """Remove and return ``hidden``, so that the caller holds the only reference."""
        hidden = self.hidden
        if hidden is None:
            raise RuntimeError("a stage was run before the stage that makes its input")
        self.hidden = None
        return hidden

    def hold(self, tensor: Tensor) -> None:
        """Forbid groups to overwrite ``tensor``: somebody keeps it."""
        self.held.append(weakref.ref(tensor))

    def writable(self, tensor: Tensor) -> bool:
        """No skip and no holder needs the values of ``tensor`` any more."""
        kept = any(t is tensor for t in self.skips) or any(r() is tensor for r in self.held)
        return not kept

    def temb_per_image(self) -> Tensor | None:
        """The time embedding with one row per image, as stock blocks expect it."""
        return None if self.temb is None else per_image(self.temb, self.frames)

    def activated_temb(self) -> Tensor | None:
        """``silu(temb)`` ``[B, E]``, computed once for all ResNet blocks."""
        if self._activated is None and self.temb is not None:
            self._activated = torch.nn.functional.silu(self.temb)
        return self._activated


def per_image(rows: Tensor, frames: int) -> Tensor:
    """Repeat ``[B, D]`` to ``[B * frames, D]``."""
    if frames == 1:
        return rows
    batch, width = rows.shape
    return rows[:, None].expand(batch, frames, width).reshape(batch * frames, width)


def channels_last(x: Tensor) -> Tensor:
    """``[N, C, H, W]`` in channels-last layout, without a copy if it is already."""
    return x.contiguous(memory_format=torch.channels_last)


def nhwc(x: Tensor) -> Tensor:
    """The ``[N, H, W, C]`` view of an ``[N, C, H, W]`` tensor."""
    return x.permute(0, 2, 3, 1)


def tokens(x: Tensor) -> Tensor:
    """``[N, H * W, C]`` of an ``[N, C, H, W]`` tensor; a view if it is channels-last."""
    return x.permute(0, 2, 3, 1).flatten(1, 2)


def with_rows(x: Tensor) -> Tensor:
    """``x`` with a last stride of one, as the row operators need it; a copy only if not."""
    return x if x.stride(-1) == 1 else x.contiguous()


def empty_rows(like: Tensor, *shape: int) -> Tensor:
    """An uninitialised contiguous tensor, which lives beyond a slice."""
    return arena.empty(like.device, shape, like.dtype)


def empty_images(like: Tensor, images: int, channels: int, height: int, width: int) -> Tensor:
    """An uninitialised channels-last ``[N, C, H, W]``, which lives beyond a slice."""
    shape = (images, channels, height, width)
    return arena.empty(like.device, shape, like.dtype, channels_last=True)
