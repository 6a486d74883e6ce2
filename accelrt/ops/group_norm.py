"""GroupNorm in two passes: partial statistics of slices, then the fused application."""

from __future__ import annotations

import torch
from torch import Tensor

from accelrt import reference
from accelrt.memory.arena import temporary, temporary_as, temporary_images
from accelrt.reference import group_norm_merge

from ._library import (
    check_cuda_built,
    check_float_list,
    check_shape,
    check_tensor,
    explain,
    fails,
    native,
    register_fake,
)

__all__ = ["group_norm_apply", "group_norm_merge", "group_norm_stats"]


def _channels(op: str, x: Tensor, x2: Tensor | None, groups: int, frames: int) -> int:
    check_tensor(op, "x", x)
    if x.dim() != 4:
        raise fails(op, f"x has shape {tuple(x.shape)}; expected [N, C, H, W]")
    if frames < 1 or x.shape[0] % frames:
        raise fails(op, f"frames {frames} does not divide the {x.shape[0]} images")
    channels = x.shape[1]
    if x2 is not None:
        check_tensor(op, "x2", x2, x)
        if x2.dim() != 4:
            raise fails(op, f"x2 has shape {tuple(x2.shape)}; expected [N, C2, H, W]")
        check_shape(op, "x2", x2, (x.shape[0], x2.shape[1], *x.shape[2:]))
        channels += x2.shape[1]
    if groups < 1 or channels % groups:
        raise fails(op, f"num_groups {groups} does not divide the {channels} channels")
    return channels


def _check_stats(
    op: str,
    x: Tensor,
    x2: Tensor | None,
    add: Tensor | None,
    groups: int,
    frames: int,
    stats: Tensor,
) -> int:
    channels = _channels(op, x, x2, groups, frames)
    if add is not None:
        check_tensor(op, "add", add, x)
        check_shape(op, "add", add, (x.shape[0], channels))
    check_float_list(op, "stats", stats, x, (x.shape[0] // frames, groups, 3))
    if not stats.is_contiguous():
        raise fails(op, f"stats must be contiguous; its strides are {stats.stride()}")
    check_cuda_built(op, x)
    return channels


def group_norm_stats(
    x: Tensor,
    num_groups: int,
    *,
    x2: Tensor | None = None,
    add: Tensor | None = None,
    frames: int = 1,
    out: Tensor | None = None,
    accumulate: bool = False,
) -> Tensor:
    """Partial GroupNorm statistics (count, mean, sum of squared deviations) of a slice.

    Slices may be cut along images or along pixels; the statistics of all slices
    merge exactly (Chan et al.), which is what makes sliced groups equal the whole
    (unlike the slicing of the Streamlined Inference paper, whose statistics are
    those of each slice).

    Args:
        x: ``[N, C1, H, W]``; channels-last and NCHW are the fast layouts.
        num_groups: ``G``, dividing ``C = C1 + C2``.
        x2: ``[N, C2, H, W]``, read as if concatenated to ``x`` along the channels.
        add: ``[N, C]``, added to every pixel first (the time embedding), or ``None``.
        frames: images per clip; ``frames`` consecutive images share statistics, as in
            GroupNorm over ``(C/g, T, H, W)``.
        out: float32 ``[N / frames, G, 3]``, contiguous.
        accumulate: merge into what ``out`` holds instead of replacing it.

    Returns:
        float32 ``[N / frames, G, 3]``: count, mean, M2, to be given to
        :func:`group_norm_apply` or merged with :func:`group_norm_merge`.
    """
    if x.dtype == torch.float64:
        return reference.group_norm_stats(
            x, num_groups, x2=x2, add=add, frames=frames, out=out, accumulate=accumulate
        )
    if out is None:
        if accumulate:
            raise fails("group_norm_stats", "accumulate=True needs out=")
        if frames < 1:
            raise fails("group_norm_stats", f"frames is {frames}; it must be at least 1")
        out = x.new_empty((x.shape[0] // frames, num_groups, 3), dtype=torch.float32)
    try:
        native.group_norm_stats(x, x2, add, num_groups, frames, accumulate, out)
    except RuntimeError as error:
        explain(error, _check_stats, "group_norm_stats", x, x2, add, num_groups, frames, out)
    return out


def _check_apply(
    x: Tensor,
    x2: Tensor | None,
    add: Tensor | None,
    stats: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    groups: int,
    frames: int,
    out: Tensor,
) -> None:
    op = "group_norm_apply"
    channels = _check_stats(op, x, x2, add, groups, frames, stats)
    for name, t in (("weight", weight), ("bias", bias)):
        if t is not None:
            check_tensor(op, name, t, x)
            check_shape(op, name, t, (channels,))
    for name, t in (("scale", scale), ("shift", shift)):
        if t is not None:
            check_tensor(op, name, t, x)
            check_shape(op, name, t, (x.shape[0], channels))
    check_tensor(op, "out", out, x)
    check_shape(op, "out", out, (x.shape[0], channels, *x.shape[2:]))


def group_norm_apply(
    x: Tensor,
    stats: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    eps: float = 1e-5,
    x2: Tensor | None = None,
    add: Tensor | None = None,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    frames: int = 1,
    silu: bool = False,
    out: Tensor | None = None,
) -> Tensor:
    """Normalise a slice with the statistics of the whole, in one pass.

    ``y = ((x | x2) + add - mean) * rstd * weight + bias``, then
    ``y * (1 + scale) + shift``, then SiLU if asked.

    Args:
        x, x2, add, num_groups, frames: as in :func:`group_norm_stats`.
        stats: float32 ``[N / frames, G, 3]`` over the whole input.
        weight, bias: ``[C]`` or ``None``.
        eps: added to the variance.
        scale, shift: ``[N, C]`` or ``None``, applied after the affine part.
        silu: apply SiLU last.
        out: ``[N, C, H, W]``; may be ``x`` if there is no ``x2``. By default in the
            layout (channels-last or NCHW) of ``x``.
    """
    if x.dtype == torch.float64:
        return reference.group_norm_apply(
            x, stats, num_groups, weight, bias, eps=eps, x2=x2, add=add, scale=scale,
            shift=shift, frames=frames, silu=silu, out=out,
        )  # fmt: skip
    if out is None:
        if x2 is None:
            out = temporary_as(x)
        else:
            made = temporary_images if x.stride(1) == 1 else temporary
            out = made(x, x.shape[0], x.shape[1] + x2.shape[1], *x.shape[2:])
    try:
        native.group_norm_apply(
            x, x2, add, stats, weight, bias, scale, shift, num_groups, frames, eps, silu, out
        )
    except RuntimeError as error:
        explain(
            error, _check_apply, x, x2, add, stats, weight, bias, scale, shift, num_groups,
            frames, out,
        )  # fmt: skip
    return out


@register_fake("group_norm_stats")
def _(
    x: Tensor,
    x2: Tensor | None,
    add: Tensor | None,
    num_groups: int,
    frames: int,
    accumulate: bool,
    out: Tensor,
) -> None:
    _check_stats("group_norm_stats", x, x2, add, num_groups, frames, out)


@register_fake("group_norm_apply")
def _(
    x: Tensor,
    x2: Tensor | None,
    add: Tensor | None,
    stats: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    num_groups: int,
    frames: int,
    eps: float,
    silu: bool,
    out: Tensor,
) -> None:
    _check_apply(x, x2, add, stats, weight, bias, scale, shift, num_groups, frames, out)
