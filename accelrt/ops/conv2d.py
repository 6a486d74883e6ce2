"""A convolution of channels-last images."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from accelrt import reference
from accelrt.memory.arena import temporary_images

from ._library import check_shape, check_tensor, explain, fails, native, register_fake

_OP = "conv2d"


def conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] = 0,
    out: Tensor | None = None,
) -> Tensor:
    """``F.conv2d`` with zeros for the padding and channels last in memory.

    On the CPU sums are in float32 and rounded once, after the bias; neither ``x`` nor
    ``weight`` is copied whole, in any dtype: memory beside is some 3.5 MiB a thread, unless
    one output pixel needs more. With the tile registers of AMX it is up to 7 MiB a thread, and
    up to 16 MiB of packed weights. On CUDA the library's convolution runs.

    A convolution along one axis alone, such as ``(3, 1, 1)`` over the frames of a video, is one
    with a kernel of ``(3, 1)`` over images of a row per frame.

    Args:
        x: ``[N, C, H, W]``; channels of stride one, the other strides free.
        weight: ``[O, C, kh, kw]``, contiguous or channels-last.
        bias: ``[O]``, or ``None``.
        stride: one of both axes, or ``(height, width)``.
        padding: zeros on both sides, of both axes or as ``(height, width)``.
        out: ``[N, O, H', W']``, channels of stride one; overlaps no input.

    Returns:
        ``out``, or a new channels-last tensor.

    Raises:
        ValueError: an argument does not fit; nothing has been written.
    """
    strides, paddings = _pair("stride", stride, 1), _pair("padding", padding, 0)
    if x.dtype == torch.float64:
        return reference.conv2d(x, weight, bias, stride=strides, padding=paddings, out=out)
    if out is None:
        if x.dim() != 4 or weight.dim() != 4:
            raise _dimensions(x, weight)
        shape = (x.shape[0], weight.shape[0], *_extent(x, weight, strides, paddings))
        out = temporary_images(x, *shape)
    args = (_channels_last(x), weight, bias, *strides, *paddings, _channels_last(out))
    if x.device.type == "cuda":
        _fake(*args)
        return out.copy_(F.conv2d(x, weight, bias, strides, paddings))
    try:
        native.conv2d(*args)
    except RuntimeError as error:
        explain(error, _fake, *args)
    return out


def _pair(name: str, value: int | Sequence[int], least: int) -> tuple[int, int]:
    pair = (value, value) if isinstance(value, int) else tuple(value)
    if len(pair) != 2 or any(not isinstance(v, int) or v < least for v in pair):
        raise fails(_OP, f"{name} is {value!r}; allowed: one or two integers from {least}")
    return pair[0], pair[1]


def _channels_last(t: Tensor) -> Tensor:
    """``[N, C, H, W]`` as ``[N, H, W, C]``; another number of dimensions is refused later."""
    return t.permute(0, 2, 3, 1) if t.dim() == 4 else t


def _dimensions(x: Tensor, weight: Tensor) -> ValueError:
    return fails(
        _OP,
        f"x has shape {tuple(x.shape)} and weight {tuple(weight.shape)}; expected [N, C, H, W] "
        "and [O, C, kh, kw]",
    )


def _extent(
    x: Tensor, weight: Tensor, strides: tuple[int, int], paddings: tuple[int, int]
) -> tuple[int, int]:
    """Height and width of the output of ``x`` ``[N, C, H, W]``."""
    size = []
    for axis in (0, 1):
        room = x.shape[2 + axis] + 2 * paddings[axis] - weight.shape[2 + axis]
        if room < 0 or weight.shape[2 + axis] < 1:
            raise fails(
                _OP,
                f"a kernel of {tuple(weight.shape[2:])} does not fit into images of "
                f"{tuple(x.shape[2:])} with padding {paddings}",
            )
        size.append(room // strides[axis] + 1)
    return size[0], size[1]


@register_fake(_OP)
def _fake(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride_height: int,
    stride_width: int,
    padding_height: int,
    padding_width: int,
    out: Tensor,
) -> None:
    """The images come as ``[N, H, W, C]``."""
    check_tensor(_OP, "x", x)
    if x.dim() != 4 or weight.dim() != 4:
        raise _dimensions(x, weight)
    check_tensor(_OP, "weight", weight, x)
    check_tensor(_OP, "out", out, x)
    check_shape(_OP, "weight", weight, (weight.shape[0], x.shape[3], *weight.shape[2:]))
    planar = x.permute(0, 3, 1, 2)
    size = _extent(planar, weight, (stride_height, stride_width), (padding_height, padding_width))
    if out.dim() != 4:
        raise fails(_OP, f"out has {out.dim()} dimensions; expected 4")
    shape = (x.shape[0], weight.shape[0], *size)
    check_shape(_OP, "out", out.permute(0, 3, 1, 2), shape)
    given = [("x", x), ("out", out)]
    if bias is not None:
        check_tensor(_OP, "bias", bias, x)
        check_shape(_OP, "bias", bias, weight.shape[:1])
        given.append(("bias", bias))
    for name, t in given:
        if t.numel() and t.shape[-1] > 1 and t.stride(-1) != 1:
            raise fails(_OP, f"the channels of {name} have stride {t.stride(-1)}; it must be 1")
    if not (weight.is_contiguous() or weight.is_contiguous(memory_format=torch.channels_last)):
        raise fails(_OP, f"weight has strides {weight.stride()}; contiguous or channels-last")
