"""Convolutions, and the modules around one: our kernel where it is the faster, torch's elsewhere.

Which it is depends on processor and dtype and is decided in the extension
(``own_conv_is_faster``): ours serves where torch's has no instructions for the dtype.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from diffusers.models.downsampling import Downsample2D
from diffusers.models.upsampling import Upsample2D
from torch import Tensor, nn

from accelrt import _C, ops

from .products import DTYPE_NAMES, runs_on_cpu
from .recognise import has_plain_weights, is_plain
from .spare import Spare
from .state import nhwc


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def conv_is_ours(dtype: torch.dtype) -> bool:
    """Whether our kernel is the faster one on this processor for ``dtype``."""
    name = DTYPE_NAMES.get(dtype)
    return name is not None and _C.own_conv_is_faster(name)


def serves(x: Tensor, weight: Tensor, groups: int = 1) -> bool:
    """Our kernel is the faster one and reads ``x`` ``[N, C, H, W]`` and ``weight`` as they are."""
    return (
        groups == 1
        and runs_on_cpu(x)
        and conv_is_ours(x.dtype)
        and weight.dtype == x.dtype
        and (x.stride(1) == 1 or x.shape[1] == 1)
        and min(x.shape) > 0
        and (weight.is_contiguous() or weight.is_contiguous(memory_format=torch.channels_last))
    )


def _is_known(conv: object, cls: type, dtype: torch.dtype) -> bool:
    """A plain convolution of one group without dilation, padded with zeros."""
    return (
        is_plain(conv, cls)
        and has_plain_weights(conv, dtype)  # type: ignore[arg-type]
        and conv.groups == 1  # type: ignore[attr-defined]
        and not any(d != 1 for d in conv.dilation)  # type: ignore[attr-defined]
        and conv.padding_mode == "zeros"  # type: ignore[attr-defined]
        and not isinstance(conv.padding, str)  # type: ignore[attr-defined]
    )


def is_ours(conv: Any, x: Tensor) -> bool:
    """A plain convolution that our kernel computes for ``x`` ``[N, C, H, W]``."""
    return _is_known(conv, nn.Conv2d, x.dtype) and serves(x, conv.weight)


def _spared(spare: Spare, x: Tensor, channels: int) -> Tensor:
    """An output of as many pixels as ``x``."""
    return spare.images(x.shape[0], channels, *x.shape[2:])


def conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    *,
    padding: tuple[int, int],
    groups: int = 1,
    out: Tensor | None = None,
) -> Tensor:
    """``F.conv2d`` of ``[N, C, H, W]``, with plain weights in the dtype of ``x``.

    ``out`` is a tensor of its own if ``None``; else channels-last, and overlaps no input.
    """
    if serves(x, weight, groups):
        return ops.conv2d(x, weight, bias, padding=padding, out=out)
    y = F.conv2d(x, weight, bias, padding=padding, groups=groups)
    return y if out is None else out.copy_(y)


def convolve(module: Any, x: Tensor, *, fuse: bool = True, spare: Spare | None = None) -> Tensor:
    """``module(x)`` for a ``Conv2d``, a ``Downsample2D``, or anything else.

    Args:
        module: called as it came, with its hooks, unless it is recognised.
        x: ``[N, C, H, W]``.
        fuse: ``False``: as it came.
        spare: where our kernel writes the output, of a convolution that keeps the size.
    """
    if fuse and is_ours(module, x):
        out = None if spare is None else _spared(spare, x, module.out_channels)
        return ops.conv2d(
            x, module.weight, module.bias, stride=module.stride, padding=module.padding, out=out
        )
    if fuse and is_plain(module, Downsample2D) and module.use_conv and module.norm is None:
        conv = module.conv
        if is_ours(conv, x):
            # Without padding of its own, the module has one at the far ends alone.
            return convolve(conv, F.pad(x, (0, 1, 0, 1)) if module.padding == 0 else x)
    y: Tensor = module(x)
    return y


def upsampler_conv(module: Any) -> Any:
    """What a plain ``Upsample2D`` runs after interpolation; ``None`` if it does anything else."""
    plain = is_plain(module, Upsample2D) and module.norm is None and not module.use_conv_transpose
    if not plain or not module.use_conv or not module.interpolate:
        return None
    return module.conv if module.name == "conv" else module.Conv2d_0


def enlarge(
    module: Any,
    x: Tensor,
    size: tuple[int, int] | None = None,
    *,
    fuse: bool = True,
    spares: tuple[Spare | None, Spare | None] = (None, None),
) -> Tensor:
    """``module(x, size)`` of an ``Upsample2D``.

    Args:
        module: called as it came, with its hooks, unless it is recognised.
        x: ``[N, C, h, w]``.
        size: height and width of the output; twice those of ``x`` if ``None``.
        fuse: ``False``: as it came.
        spares: where the enlarged images go, and where our kernel writes the output.
    """
    conv = upsampler_conv(module)
    if fuse and is_ours(conv, x):
        images, output = spares
        larger = _nearest(x, size) if images is None else _nearest_into(images, x, size)
        return convolve(conv, larger, spare=output)
    y: Tensor = module(x, size)
    return y


def _nearest(x: Tensor, size: tuple[int, int] | None) -> Tensor:
    if size is None:
        return F.interpolate(x, scale_factor=2.0, mode="nearest")
    return F.interpolate(x, size=size, mode="nearest")


def _nearest_into(spare: Spare, x: Tensor, size: tuple[int, int] | None) -> Tensor:
    """The same in ``spare``."""
    n, channels, h, w = x.shape
    height, width = (2 * h, 2 * w) if size is None else size
    y = spare.images(n, channels, height, width)
    if (height, width) == (2 * h, 2 * w):
        nhwc(y).view(n, h, 2, w, 2, channels).copy_(nhwc(x)[:, :, None, :, None])
        return y
    return y.copy_(_nearest(x, size))


def along_frames(conv: Any, x: Tensor, frames: int) -> Tensor:
    """A convolution along the frames alone, with a kernel of ``(taps, 1, 1)``.

    Args:
        conv: of class ``Conv3d``, or around one.
        x: ``[B * T, P, C]``, contiguous.
        frames: ``T``.

    Returns:
        ``[B * T, P, C']``, contiguous.
    """
    clips = x.view(-1, frames, *x.shape[1:])  # [B, T, P, C]
    if _is_known(conv, nn.Conv3d, x.dtype):
        images, weight = clips.permute(0, 3, 1, 2), conv.weight.squeeze(-1)
        if serves(images, weight):
            z = ops.conv2d(images, weight, conv.bias, padding=conv.padding[:2])
            return z.permute(0, 2, 3, 1).reshape(x.shape[0], x.shape[1], -1)
    y: Tensor = conv(clips.unsqueeze(2).permute(0, 4, 1, 2, 3))
    return y.permute(0, 2, 3, 4, 1).reshape(x.shape[0], x.shape[1], -1)
